// What attention's forward and backward share: exponentials, dropout, tiles of packed keys and values.
#pragma once

#include "attention_problem.h"

namespace fastlm {
namespace attention {

using gemm::Left;
using gemm::Packed;

constexpr int64_t kTasks = 32;  // fewer heads than this are cut further
// Floats from one row of a tile to the next: room for whole groups of vectors, and no power of two.
constexpr int64_t kPitch = kKeys + 4 * W;

// scale2 s - offset, the exponent of 2 that weights a score; with the rests only where products are float32
// and so precise that it shows.
struct Exponent {
  float scale, scale_rest, offset, offset_rest;
  template <class E> vf of(vf s) const {
    const vf x = fma(s, splat(scale), splat(-offset));
    return std::is_same_v<E, float> ? x + fma(s, splat(scale_rest), splat(-offset_rest)) : x;
  }
};

template <class Fn> void for_dtype(const Tensor& q, Fn&& fn) {
  if (q.is<float>()) return fn(float{});
  require(q.is<bf16>(), "q must be float32 or bfloat16, got ", q.defined() ? name(q.dtype) : "None");
  fn(bf16{});
}

// The t-th of n parts in an order that pairs the first with the last: causal work grows along the parts, and
// any run of neighbouring tasks then has its share.
inline int64_t paired(int64_t t, int64_t n) { return t % 2 == 0 ? t / 2 : n - 1 - t / 2; }

inline vf larger(vf a, vf b) { return a > b ? a : b; }  // b if either is NaN, in one instruction

// 2^x for x below 127, within 1.5 ulp; 0 where that would be denormal (on AVX-512, beyond denormals), NaN for
// NaN. The polynomial is a minimax fit of our own of (2^r - 1) / r on [-1/2, 1/2].
inline vf exp2(vf x) {
#if defined(__AVX512F__)
  x = at_least(x, -160.0f);
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vi tiny = x < -126.0f;
  x = at_least(x, -127.0f);
  const vf shifted = x + 0x1.8p+23f;  // rounds to an integer, which is then the low bits of the sum
  const vf n = shifted - 0x1.8p+23f;
#endif
  const vf r = x - n;
  vf p = splat(0.00132647273f);
  p = fma(p, r, splat(0.00967151299f));
  p = fma(p, r, splat(0.0555073358f));
  p = fma(p, r, splat(0.240222424f));
  p = fma(p, r, splat(0.693147004f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return tiny ? vf{} : p * bitcast<vf>((bitcast<vi>(shifted) - 0x4b400000 + 127) << 23);
#endif
}

inline vi lanes_below(int64_t n) { return first_lanes(static_cast<int>(std::min<int64_t>(n, W))); }

// All ones for each kept key of [first, first + n), 0 for a dropped one; `first` is a multiple of 4. Writes
// whole groups of 4 W words.
inline void keep_row(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n,
                     uint32_t* keep) {
  const uint64_t counter = static_cast<uint64_t>(i) << 32 | static_cast<uint64_t>(first / 4);
  for (int64_t j = 0; j < n; j += 4 * W) {
    vu r[4];
    philox_lanes(p.seed, counter + static_cast<uint64_t>(j / 4), static_cast<uint32_t>(h),
                 static_cast<uint32_t>(b), r);
    for (int u = 0; u < 4; ++u) gemm::store_words(keep + j + u * W, bitcast<vu>(r[u] >= p.threshold));
  }
}
inline vf kept(vf v, const uint32_t* keep) {
  vu mask;
  std::memcpy(&mask, keep, sizeof mask);
  return bitcast<vf>(bitcast<vu>(v) & mask);
}

// 2 W floats as elements of a product.
inline void store_pair(float* p, vf low, vf high) {
  store(p, low);
  store(p + W, high);
}
#if defined(__AVX512BF16__)
inline void store_pair(bf16* p, vf low, vf high) {
  gemm::store_words(reinterpret_cast<uint32_t*>(p), gemm::round_neighbours(low, high));
}
#endif

// Packed tiles of the keys of one head from `first` on, a multiple of a tile, or of its values: with the head
// size as k (`along`), or the keys. Only those that `needed(j)` says are packed.
template <class E> struct Tiles {
  const Packed<E>& at(int64_t j) const { return data[(j - first) / tile]; }
  Packed<E>* data;
  int64_t first, tile;
};
template <class E, class T, class Needed>
Tiles<E> tiles(const Problem& p, const Heads<T>& t, int64_t b, int64_t h, Range keys, int64_t width, bool along,
               Scratch& scratch, Needed&& needed) {
  Tiles<E> out{scratch.take<Packed<E>>((keys.end - keys.first + p.tile - 1) / p.tile), keys.first, p.tile};
  for (int64_t j = keys.first; j < keys.end; j += p.tile) {
    if (!needed(j)) continue;
    const int64_t n = std::min(p.tile, keys.end - j);
    out.data[(j - keys.first) / p.tile] = along ? gemm::pack<E>(t.at(b, h, j), 1, t.row, width, n, scratch)
                                                : gemm::pack<E>(t.at(b, h, j), t.row, 1, n, width, scratch);
  }
  return out;
}

template <class T> void store_row(T* out, const float* row, int64_t n, float scale) {
  for_vectors(n, [&](int64_t c, auto count) { store_n(out + c, load_n(row + c, count) * scale, count); });
}

// A row of a head that lies in `like` (q, k or v) but is `width` wide.
inline void require_like(const Tensor& t, const char* what, const Tensor& like, int64_t width) {
  if (!t.defined()) return;
  const int last = like.ndim - 1;
  bool same = t.ndim == like.ndim && t.size(last) == width;
  for (int d = 0; same && d < last; ++d) same = t.size(d) == like.size(d);
  require(same && (width <= 1 || t.stride[last] == 1), what, " must be like q, k or v but ", width,
          " wide, with a contiguous last dimension");
}

inline void require_lse(const Tensor& t, const char* what, const Tensor& q) {
  if (!t.defined()) return;
  const bool packed = q.ndim == 3;
  bool same = t.ndim == q.ndim - 1 && t.is<float>();
  for (int d = 0; same && d < t.ndim; ++d) same = t.size(d) == q.size(packed ? 1 - d : d);
  require(same && (t.size(-1) <= 1 || t.stride[t.ndim - 1] == 1), what,
          " must be float32, a number a head and query, with a contiguous last dimension");
}

// Calls fn(row) for the rows of a packed tensor that belong to no sequence, of each head.
template <class Fn> void for_unused(const std::vector<int64_t>& starts, int64_t total, Fn&& fn) {
  if (starts.empty()) return;
  for (int64_t i = 0; i < starts.front(); ++i) fn(i);
  for (int64_t i = starts.back(); i < total; ++i) fn(i);
}
template <class T> void clear_unused(const Tensor& t, const std::vector<int64_t>& starts) {
  if (!t.defined() || starts.empty() || t.numel() == 0) return;
  for_unused(starts, t.size(0), [&](int64_t i) {
    for (int64_t h = 0; h < t.size(1); ++h)
      std::fill_n(t.as<T>() + i * t.stride[0] + h * t.stride[1], t.size(2), T{});
  });
}

}  // namespace attention
}  // namespace fastlm
