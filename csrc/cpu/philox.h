// Philox4x32-10: the bits of fastlm/philox.py, W counters at a time.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
#pragma once

#include "vec.h"

namespace fastlm {

struct PhiloxKey {
  explicit PhiloxKey(int64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      low[round] = k0;
      high[round] = k1;
    }
  }
  uint32_t low[10], high[10];  // of each round
};

// The smallest word of a kept element; 2^32, which no word reaches, for p = 1.
inline uint64_t drop_threshold(double p) { return static_cast<uint64_t>(p * 0x1p32); }

// Replaces K times W / 2 counters by their four words: one a lane of 64 bits, of which the upper halves are of no
// account, so that the product's lower half need not be cut out. K at once, as a round waits for its products.
template <int K> inline void philox(const PhiloxKey& key, vu (&c)[K][4]) {
  const vu a = splat(0xD2511F53u), b = splat(0xCD9E8D57u);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vu low = splat(key.low[round]), high = splat(key.high[round]);
#pragma GCC unroll 2
    for (int k = 0; k < K; ++k) {
      const vu64 x = multiply_even(c[k][0], a), y = multiply_even(c[k][2], b);
      c[k][0] = bitcast<vu>(y >> 32) ^ c[k][1] ^ low;
      c[k][1] = bitcast<vu>(y);
      c[k][2] = bitcast<vu>(x >> 32) ^ c[k][3] ^ high;
      c[k][3] = bitcast<vu>(x);
    }
  }
}

namespace detail {

// Lane i of the result is lane Pick{}(i) of a followed by b.
template <class Pick, int... I> inline vu shuffle(vu a, vu b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick{}(I)...);
#else
  return __builtin_shuffle(a, b, vi{Pick{}(I)...});
#endif
}

// The lower halves of the 64-bit lanes of a and b, by turns.
inline vu join(vu a, vu b) {
  return bitcast<vu>((bitcast<vu64>(b) << 32) | (bitcast<vu64>(a) & 0xffffffffu));
}

// Of each two 64-bit lanes the first (Half = 0) or the second, a's before b's.
template <int Half> inline vu unpack(vu a, vu b) {
  struct Pick {
    constexpr int operator()(int i) const { return i / 4 * 4 + Half * 2 + i % 2 + i / 2 % 2 * W; }
  };
  return shuffle<Pick>(a, b, std::make_integer_sequence<int, W>{});
}

}  // namespace detail

// 4 * W successive words of the stream: word 4 i + j is word j of the counter (c + i, c2, c3), where c holds
// c0 in its low and c1 in its high half. words[0] has the first W.
inline void philox_lanes(const PhiloxKey& key, uint64_t c, uint32_t c2, uint32_t c3, vu (&words)[4]) {
  // Counters in the order that unpacking turns into the order of memory.
  vu64 step;
  for (int i = 0; i < W / 2; ++i) step[i] = static_cast<uint64_t>(i % 2 * (W / 4) + i / 2);
  vu w[2][4];
  for (int half = 0; half < 2; ++half) {
    const vu64 counter = step + (c + static_cast<uint64_t>(half * (W / 2)));
    w[half][0] = bitcast<vu>(counter);
    w[half][1] = bitcast<vu>(counter >> 32);
    w[half][2] = splat(c2);
    w[half][3] = splat(c3);
  }
  philox(key, w);
  for (int half = 0; half < 2; ++half) {
    const vu first = detail::join(w[half][0], w[half][1]), second = detail::join(w[half][2], w[half][3]);
    words[2 * half] = detail::unpack<0>(first, second);
    words[2 * half + 1] = detail::unpack<1>(first, second);
  }
}

}  // namespace fastlm
