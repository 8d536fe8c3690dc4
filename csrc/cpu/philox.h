// Philox4x32-10: the bits of fastlm/philox.py, W counters at a time.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 4.3.
#pragma once

#include "vec.h"

namespace fastlm {

struct PhiloxKey {
  explicit PhiloxKey(int64_t seed)
      : low(static_cast<uint32_t>(seed)), high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
  uint32_t low, high;
};

// The smallest word of a kept element; 2^32, which no word reaches, for p = 1.
inline uint64_t drop_threshold(double p) { return static_cast<uint64_t>(p * 0x1p32); }

// Replaces W counters by their four words.
inline void philox(PhiloxKey key, vu (&c)[4]) {
  constexpr uint32_t a = 0xD2511F53, b = 0xCD9E8D57;
  for (int round = 0; round < 10; ++round) {
    const vu high0 = mulhi(c[0], a), low0 = c[0] * a, high1 = mulhi(c[2], b), low1 = c[2] * b;
    c[0] = high1 ^ c[1] ^ key.low;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key.high;
    c[3] = low0;
    key.low += 0x9E3779B9;
    key.high += 0xBB67AE85;
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

// Within each four lanes: the first (Half = 0) or second half of a and b, alternating by runs of `Run`.
template <int Run, int Half> inline vu unpack(vu a, vu b) {
  struct Pick {
    constexpr int operator()(int i) const {
      const int j = i % 4, from_b = j / Run % 2;
      return i / 4 * 4 + Half * 2 + (Run == 1 ? j / 2 : j % 2) + from_b * W;
    }
  };
  return shuffle<Pick>(a, b, std::make_integer_sequence<int, W>{});
}

}  // namespace detail

// 4 * W successive words of the stream: word 4 i + j is word j of the counter (c + i, c2, c3), where c holds
// c0 in its low and c1 in its high half. words[0] has the first W.
inline void philox_lanes(PhiloxKey key, uint64_t c, uint32_t c2, uint32_t c3, vu (&words)[4]) {
  // Counters in the order that transposing every four lanes turns into the order of memory.
  vu step;
  for (int i = 0; i < W; ++i) step[i] = static_cast<uint32_t>(i % 4 * (W / 4) + i / 4);
  const vu low = step + static_cast<uint32_t>(c);
  const vu carry = bitcast<vu>(low < step) & 1u;
  vu w[4] = {low, carry + static_cast<uint32_t>(c >> 32), splat(c2), splat(c3)};
  philox(key, w);
  const vu a = detail::unpack<1, 0>(w[0], w[1]), b = detail::unpack<1, 0>(w[2], w[3]);
  const vu d = detail::unpack<1, 1>(w[0], w[1]), e = detail::unpack<1, 1>(w[2], w[3]);
  words[0] = detail::unpack<2, 0>(a, b);
  words[1] = detail::unpack<2, 1>(a, b);
  words[2] = detail::unpack<2, 0>(d, e);
  words[3] = detail::unpack<2, 1>(d, e);
}

}  // namespace fastlm
