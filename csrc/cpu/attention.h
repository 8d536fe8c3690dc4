// What attention's forward and backward share: sizes and mask, exponentials, tiles of packed keys and values.
#pragma once

#include <tuple>

#include "gemm.h"
#include "philox.h"

namespace fastlm {
namespace attention {

using gemm::Left;
using gemm::Packed;

constexpr int64_t kQueries = 64;  // rows of a block
constexpr int64_t kKeys = 512;    // columns of a tile
constexpr int64_t kTasks = 32;    // fewer heads than this are cut further
// Floats from one row of a tile to the next: room for whole groups of vectors, and no power of two.
constexpr int64_t kPitch = kKeys + 4 * W;
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInf = std::numeric_limits<float>::infinity();

// A (batch, heads, seq, width) tensor with contiguous rows.
template <class T> struct Heads {
  explicit Heads(const Tensor& t)
      : data(t.wanted<T>()), batch(t.stride[0]), head(t.stride[1]), row(t.stride[2]) {}
  T* at(int64_t b, int64_t h, int64_t i = 0) const { return data + b * batch + h * head + i * row; }
  explicit operator bool() const { return data != nullptr; }
  T* data;
  int64_t batch, head, row;
};

struct Problem {
  int64_t batches, heads, key_heads, queries, keys, width, v_width;
  Tensor key_lengths;
  bool causal, dropout;
  float scale, scale2, scale2_rest;  // scale2: scale / log 2 in two parts, see split
  PhiloxKey seed{0};
  uint32_t threshold = 0;
  float kept_scale = 1.0f;

  int64_t group() const { return heads / key_heads; }
  int64_t length(int64_t b) const {
    if (!key_lengths.defined()) return keys;
    const int64_t at = b * key_lengths.stride[0];
    const int64_t n =
        key_lengths.is<int32_t>() ? key_lengths.as<int32_t>()[at] : key_lengths.as<int64_t>()[at];
    return std::clamp<int64_t>(n, 0, keys);
  }
  // Number of keys that query i sees: they are the first ones.
  int64_t visible(int64_t i, int64_t length) const {
    return causal ? std::clamp<int64_t>(i + keys - queries + 1, 0, length) : length;
  }
};

// A number as the sum of two float32 of its sign, neither 0 unless it is: so that -inf times both is -inf
// twice. Rounded to one, the scale or lse would change every weight by as much as all other errors together.
inline std::pair<float, float> split(double x) {
  float high = static_cast<float>(x);
  if (std::isinf(x)) return {high, 0.0f};
  if (std::abs(static_cast<double>(high)) >= std::abs(x)) high = std::nextafterf(high, 0.0f);
  return {high, static_cast<float>(x - high)};
}

// scale2 s - offset, the exponent of 2 that weights a score; with the rests only where products are float32
// and so precise that it shows.
struct Exponent {
  float scale, scale_rest, offset, offset_rest;
  template <class E> vf of(vf s) const {
    const vf x = fma(s, splat(scale), splat(-offset));
    return std::is_same_v<E, float> ? x + fma(s, splat(scale_rest), splat(-offset_rest)) : x;
  }
};

inline Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_lengths,
                       const Tensor& seed, bool causal, double scale, double dropout_p) {
  for (const auto& [t, what] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    require(t->ndim == 4, what, " must have 4 dimensions, got ", t->ndim);
    require(t->dtype == q.dtype, what, " must be ", name(q.dtype), " like q, got ", name(t->dtype));
    require(t->size(3) <= 1 || t->stride[3] == 1, what, " must have a contiguous last dimension");
  }
  Problem p;
  p.batches = q.size(0);
  p.heads = q.size(1);
  p.key_heads = k.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.width = q.size(3);
  p.v_width = v.size(3);
  p.key_lengths = key_lengths;
  p.causal = causal;
  p.dropout = dropout_p > 0.0;
  p.scale = static_cast<float>(scale);
  std::tie(p.scale2, p.scale2_rest) = split(scale * kLog2e);
  require(p.key_heads > 0 && p.heads % p.key_heads == 0, "k must have a number of heads that divides ",
          p.heads);
  require(k.size(0) == p.batches && k.size(3) == p.width, "k must have q's batch and head size");
  require(v.size(0) == p.batches && v.size(1) == p.key_heads && v.size(2) == p.keys,
          "v must have k's shape but the last");
  require(!key_lengths.defined() || key_lengths.numel() == p.batches, "key_lengths must have ", p.batches,
          " elements");
  require(!key_lengths.defined() || key_lengths.is<int32_t>() || key_lengths.is<int64_t>(),
          "key_lengths must be int32 or int64");
  if (p.dropout) {
    require(seed.numel() == 1, "dropout_seed must have one element, got ", seed.numel());
    p.seed = PhiloxKey(*seed.as<int64_t>());
    p.threshold = static_cast<uint32_t>(drop_threshold(dropout_p));
    p.kept_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  return p;
}

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

// Packed tiles of the keys [first, end) of one head, or of its values: with the head size as k (`along`), or
// the keys.
template <class E> struct Tiles {
  Packed<E>* data;
  const Packed<E>& operator[](int64_t t) const { return data[t]; }
};
template <class E, class T>
Tiles<E> tiles(const Heads<T>& t, int64_t b, int64_t h, int64_t first, int64_t end, int64_t width, bool along,
               Scratch& scratch) {
  Packed<E>* out = scratch.take<Packed<E>>((end - first + kKeys - 1) / kKeys);
  for (int64_t j = first; j < end; j += kKeys) {
    const int64_t n = std::min(kKeys, end - j);
    out[(j - first) / kKeys] = along ? gemm::pack<E>(t.at(b, h, j), 1, t.row, width, n, scratch)
                                     : gemm::pack<E>(t.at(b, h, j), t.row, 1, n, width, scratch);
  }
  return {out};
}

template <class T> void store_row(T* out, const float* row, int64_t n, float scale) {
  for_vectors(n, [&](int64_t c, auto count) { store_n(out + c, load_n(row + c, count) * scale, count); });
}

inline void require_like(const Tensor& t, const char* what, const Tensor& like, int64_t width) {
  if (!t.defined()) return;
  bool same = t.ndim == 4 && t.size(3) == width;
  for (int d = 0; same && d < 3; ++d) same = t.size(d) == like.size(d);
  require(same && (width <= 1 || t.stride[3] == 1), what, " must be a ", like.size(0), " x ", like.size(1),
          " x ", like.size(2), " x ", width, " tensor with a contiguous last dimension");
}

inline void require_lse(const Tensor& t, const Tensor& q) {
  bool same = t.ndim == 3;
  for (int d = 0; same && d < 3; ++d) same = t.size(d) == q.size(d);
  require(same && t.contiguous(), "lse must be a contiguous ", q.size(0), " x ", q.size(1), " x ", q.size(2),
          " tensor");
}

}  // namespace attention
}  // namespace fastlm
