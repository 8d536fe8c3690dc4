// Scaled dot-product attention: blocks of queries against tiles of keys, so that only a block by a tile of the
// (Sq, Sk) weights exists at a time (Dao, "FlashAttention-2", 2023, section 3.1).
//
//   S = scale Q K^T,  P = exp(S - lse),  O = (P * M') V with the dropout mask M', 0 or 1 / (1 - p)
//   dV = (P * M')^T dO,  dS = P * (M' * (dO V^T) - delta),  delta = rowsum(dO * O),  dQ = scale dS K,  dK = scale dS^T Q
//
// Work is cut by shape alone and every sum has one order, so results have the same bits for any number of threads:
//   forward   one task for each batch, key head and range of queries; it packs the keys and values it sees once
//   backward  one task for each batch and key head, or for each tile of its keys too where heads are few: all five
//             products in one pass, dK and dV summed over the group's heads and queries in float32 scratch. dQ is the
//             sum of what each tile gives, in the order of the tiles, whichever task computed them.
// Nor do they depend on what else is in the batch.
// Products take their operands in the input's dtype where the chip multiplies it, and sum in float32.
#include "gemm.h"
#include "philox.h"

namespace fastlm {
namespace {

using gemm::Left;
using gemm::Packed;

constexpr int64_t kQueries = 64;          // rows of a block
constexpr int64_t kKeys = 512;            // columns of a tile
constexpr int64_t kTasks = 32;            // fewer heads than this are cut further,
constexpr int64_t kPartials = 256 << 20;  // unless backward's partial dQ would take more bytes than this
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInf = std::numeric_limits<float>::infinity();

// A (batch, heads, seq, width) tensor with contiguous rows.
template <class T> struct Heads {
  explicit Heads(const Tensor& t) : data(t.wanted<T>()), batch(t.stride[0]), head(t.stride[1]), row(t.stride[2]) {}
  T* at(int64_t b, int64_t h, int64_t i = 0) const { return data + b * batch + h * head + i * row; }
  explicit operator bool() const { return data != nullptr; }
  T* data;
  int64_t batch, head, row;
};

struct Problem {
  int64_t batches, heads, key_heads, queries, keys, width, v_width;
  Tensor key_lengths;
  bool causal;
  float scale;
  float scale2, scale2_rest;  // scale / log 2, as exponentials of 2 are cheapest, in two parts, see split
  bool dropout;
  PhiloxKey seed{0};
  uint32_t threshold = 0;
  float kept_scale = 1.0f;

  int64_t group() const { return heads / key_heads; }
  int64_t length(int64_t b) const {
    if (!key_lengths.defined()) return keys;
    const int64_t at = b * key_lengths.stride[0];
    const int64_t n = key_lengths.is<int32_t>() ? key_lengths.as<int32_t>()[at] : key_lengths.as<int64_t>()[at];
    return std::clamp<int64_t>(n, 0, keys);
  }
  // Number of keys that query i sees: they are the first ones.
  int64_t visible(int64_t i, int64_t length) const {
    return causal ? std::clamp<int64_t>(i + keys - queries + 1, 0, length) : length;
  }
};

// A number as the sum of two float32 of its sign, neither 0 unless it is: so that -inf times both is -inf twice. Rounded
// to one, the scale or lse would change every weight by as much as all other errors together.
std::pair<float, float> split(double x) {
  float high = static_cast<float>(x);
  if (std::isinf(x)) return {high, 0.0f};
  if (std::abs(static_cast<double>(high)) >= std::abs(x)) high = std::nextafterf(high, 0.0f);
  return {high, static_cast<float>(x - high)};
}

// x = scale2 s - offset, precisely if products are formed in float32.
struct Exponent {
  float scale, scale_rest, offset, offset_rest;
  template <class E> vf of(vf s) const {
    const vf x = fma(s, splat(scale), splat(-offset));
    return std::is_same_v<E, float> ? x + fma(s, splat(scale_rest), splat(-offset_rest)) : x;
  }
};

Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_lengths, const Tensor& seed,
                bool causal, double scale, double dropout_p) {
  for (const auto& [t, what] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    require(t->ndim == 4, what, " must have 4 dimensions, got ", t->ndim);
    require(t->dtype == q.dtype, what, " must be ", name(q.dtype), " like q, got ", name(t->dtype));
    require(t->size(3) <= 1 || t->stride[3] == 1, what, " must have a contiguous last dimension");
  }
  Problem p{q.size(0), q.size(1),   k.size(1), q.size(2), k.size(2), q.size(3), v.size(3),
            key_lengths, causal, static_cast<float>(scale), 0.0f, 0.0f, dropout_p > 0.0};
  std::tie(p.scale2, p.scale2_rest) = split(scale * kLog2e);
  require(p.key_heads > 0 && p.heads % p.key_heads == 0, "k must have a number of heads that divides ", p.heads);
  require(k.size(0) == p.batches && k.size(3) == p.width, "k must have q's batch and head size");
  require(v.size(0) == p.batches && v.size(1) == p.key_heads && v.size(2) == p.keys, "v must have k's shape but the last");
  require(!key_lengths.defined() || key_lengths.numel() == p.batches, "key_lengths must have ", p.batches, " elements");
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

// The t-th of n parts in an order that pairs the first with the last: causal work grows along the parts, and any run
// of neighbouring tasks then has its share.
int64_t paired(int64_t t, int64_t n) { return t % 2 == 0 ? t / 2 : n - 1 - t / 2; }

vf larger(vf a, vf b) { return a > b ? a : b; }  // b if either is NaN, in one instruction

// 2^x for x below 127, within 1.5 ulp; 0 where that would be denormal (on AVX-512, beyond denormals), NaN for NaN.
// The polynomial is a minimax fit of our own of (2^r - 1) / r on [-1/2, 1/2].
inline vf exp2(vf x) {
#if defined(__AVX512F__)
  x = larger(splat(-160.0f), x);
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf clipped = larger(splat(-127.0f), x);
  const vi tiny = x < -126.0f;
  const vf shifted = clipped + 0x1.8p+23f;  // rounds to an integer, which is then the low bits of the sum
  const vf n = shifted - 0x1.8p+23f;
  x = clipped;
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

vi lanes_below(int64_t n) { return first_lanes(static_cast<int>(std::min<int64_t>(n, W))); }

// All ones for each kept key of [first, first + n), 0 for a dropped one; `first` is a multiple of 4. Writes whole
// groups of 4 W words.
void keep_row(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, uint32_t* keep) {
  const uint64_t counter = static_cast<uint64_t>(i) << 32 | static_cast<uint64_t>(first / 4);
  for (int64_t j = 0; j < n; j += 4 * W) {
    vu r[4];
    philox_lanes(p.seed, counter + static_cast<uint64_t>(j / 4), static_cast<uint32_t>(h), static_cast<uint32_t>(b), r);
    for (int u = 0; u < 4; ++u) gemm::store_words(keep + j + u * W, bitcast<vu>(r[u] >= p.threshold));
  }
}
vf kept(vf v, const uint32_t* keep) {
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

constexpr int64_t kPitch = kKeys + 4 * W;  // of a tile's rows: room for whole groups of vectors, off the powers of two

// Calls fn(j, masked) for 2 W columns at a time from 0 to n; `masked` is true_type for the last, incomplete ones.
template <class Fn> inline void for_pairs(int64_t n, Fn&& fn) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) fn(j, std::false_type{});
  if (j < n) fn(j, std::true_type{});
}
int64_t whole_pairs(int64_t n) { return (n + 2 * W - 1) / (2 * W) * (2 * W); }

// One row of a tile of scores: raises `top`, the row's maximum so far in units of log 2, writes 2^(scale2 s - top) of the
// first n scores and 0 up to `columns`, and returns their sum, dropped ones included. `weights` may be the scores' memory.
template <class E>
float softmax_row(const Problem& p, const float* scores, int64_t n, int64_t columns, const uint32_t* keep, E* weights,
                  float& top) {
  const auto seen = [&](vf x, int64_t j, auto masked) { return masked ? select(lanes_below(n - j), x, splat(-kInf)) : x; };
  vf a = splat(top), b = a;
  for_pairs(n, [&](int64_t j, auto masked) {
    a = larger(seen(load(scores + j) * p.scale2, j, masked), a);
    b = larger(seen(load(scores + j + W) * p.scale2, j + W, masked), b);
  });
  top = max(larger(a, b));
  const Exponent exponent{p.scale2, p.scale2_rest, top == -kInf ? 0.0f : top, 0.0f};  // -inf - -inf would be NaN
  vf sum_a = {}, sum_b = {};
  for_pairs(n, [&](int64_t j, auto masked) {
    vf low = exp2(seen(exponent.of<E>(load(scores + j)), j, masked));
    vf high = exp2(seen(exponent.of<E>(load(scores + j + W)), j + W, masked));
    sum_a += low;
    sum_b += high;
    if (keep) {
      low = kept(low, keep + j);
      high = kept(high, keep + j + W);
    }
    store_pair(weights + j, low, high);
  });
  for (int64_t j = whole_pairs(n); j < columns; j += 2 * W) store_pair(weights + j, vf{}, vf{});
  return sum(sum_a + sum_b);
}

// Packed tiles of the keys [first, end) of one head: `along` has the head size as k (for scores), `across` the keys.
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
void add_row(float* out, const float* row, int64_t n) {
  for_vectors(n, [&](int64_t c, auto count) { store_n(out + c, load_n(out + c, count) + load_n(row + c, count), count); });
}

// Queries [first, first + rows) of one head against all their keys.
template <class T, class E>
void forward_block(const Problem& p, const Heads<T>& q, const Tiles<E>& k, const Tiles<E>& v, int64_t b, int64_t h,
                   int64_t first, int64_t rows, int64_t length, const Heads<T>& out, float* lse) {
  Scratch scratch;
  const int64_t keys = p.visible(first + rows - 1, length);
  float* scores = scratch.take<float>(rows * kPitch);
  E* weights = std::is_same_v<E, float> ? reinterpret_cast<E*>(scores) : scratch.take<E>(rows * kPitch);
  float* sums = scratch.take<float>(rows * p.v_width);
  uint32_t* keep = p.dropout ? scratch.take<uint32_t>(kPitch) : nullptr;
  // The row's maximum so far, before the tile and after it, and its sum of weights; padded to whole vectors.
  alignas(64) float before[kQueries], top[kQueries], tile_sum[kQueries], total[kQueries];
  std::fill_n(top, kQueries, -kInf);
  std::fill_n(total, kQueries, 0.0f);
  std::fill_n(tile_sum, kQueries, 0.0f);
  if (keys == 0) std::fill_n(sums, rows * p.v_width, 0.0f);
  const Left queries = gemm::left<E>(q.at(b, h, first), q.row, 1, rows, p.width, scratch, true);
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t columns = std::min(kKeys, keys - j);
    gemm::multiply_part(queries, k[j / kKeys], rows, p.width, 0, columns, scores, kPitch, false);
    std::copy_n(top, kQueries, before);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = std::clamp<int64_t>(p.visible(first + r, length) - j, 0, columns);
      if (keep) keep_row(p, b, h, first + r, j, n, keep);
      tile_sum[r] = softmax_row(p, scores + r * kPitch, n, columns, keep, weights + r * kPitch, top[r]);
    }
    for (int64_t r = 0; r < rows; r += W) {
      // -inf before a row's first key: 2^-inf = 0 then, and the select guards -inf - -inf.
      const vf m = load(top + r), shrink = exp2(load(before + r) - select(m == -kInf, vf{}, m));
      store(total + r, fma(load(total + r), shrink, load(tile_sum + r)));
      store(before + r, shrink);
    }
    if (j > 0)
      for (int64_t r = 0; r < rows; ++r)
        if (before[r] != 1.0f) store_row(sums + r * p.v_width, sums + r * p.v_width, p.v_width, before[r]);
    const Left left = {reinterpret_cast<const char*>(weights), kPitch * static_cast<int64_t>(sizeof(E)), 4};
    gemm::multiply_part(left, v[j / kKeys], rows, columns, 0, p.v_width, sums, p.v_width, j > 0);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool blind = total[r] == 0.0f;
    store_row(out.at(b, h, first + r), sums + r * p.v_width, p.v_width, blind ? 0.0f : p.kept_scale / total[r]);
    // In float64: an error of lse is one of every weight of the row in backward.
    lse[r] = blind ? kInf : static_cast<float>(top[r] * kLn2 + std::log(static_cast<double>(total[r])));
  }
}

template <class T>
void forward(const Problem& p, const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const Heads<T>& out,
             const Heads<float>& lse) {
  using E = gemm::Element<T>;
  const int64_t pairs = p.batches * p.key_heads, blocks = (p.queries + kQueries - 1) / kQueries;
  if (pairs == 0 || blocks == 0) return;
  // At least two blocks a range, for which packing pays.
  const int64_t ranges = std::clamp<int64_t>((kTasks + pairs - 1) / pairs, 1, (blocks + 1) / 2);
  parallel_for(pairs * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / ranges / p.key_heads, hk = t / ranges % p.key_heads, r = paired(t % ranges, ranges);
      const int64_t first = blocks * r / ranges * kQueries;
      const int64_t last = std::min(blocks * (r + 1) / ranges * kQueries, p.queries);
      const int64_t length = p.length(b), keys = p.visible(last - 1, length);
      Scratch scratch;
      const Tiles<E> kt = tiles<E>(k, b, hk, 0, keys, p.width, true, scratch);
      const Tiles<E> vt = tiles<E>(v, b, hk, 0, keys, p.v_width, false, scratch);
      for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h)
        for (int64_t i = first; i < last; i += kQueries)
          forward_block<T, E>(p, q, kt, vt, b, h, i, std::min(kQueries, last - i), length, out, lse.at(b, h) + i);
    }
  });
}

// A block by a tile of what backward computes, as operands of products: P * M' (but for its factor 1 / (1 - p)) and dS,
// both with queries as k, and dS with keys as k.
template <class E> struct Weights;

template <> struct Weights<float> {
  Weights(int64_t, float* scores, float* d_weights, Scratch&) : p(scores), ds(d_weights) {}
  Left p_by_queries() const { return {reinterpret_cast<const char*>(p), 4, kPitch * 4}; }
  Left ds_by_queries() const { return {reinterpret_cast<const char*>(ds), 4, kPitch * 4}; }
  Left ds_by_keys() const { return {reinterpret_cast<const char*>(ds), kPitch * 4, 4}; }
  // Columns j to j + 2 W of `count` rows from r on: two, or the last one.
  void put(int64_t r, int64_t j, int count, const vf (&weight)[2][2], const vf (&d_score)[2][2]) const {
    for (int u = 0; u < count; ++u) {
      store_pair(p + (r + u) * kPitch + j, weight[u][0], weight[u][1]);
      store_pair(ds + (r + u) * kPitch + j, d_score[u][0], d_score[u][1]);
    }
  }
  float *p, *ds;  // in the memory of the scores and of dO V^T
};

#if defined(__AVX512BF16__)
template <> struct Weights<bf16> {
  Weights(int64_t rows, float*, float*, Scratch& scratch)
      : p(scratch.take<uint32_t>((rows + 1) / 2 * kPitch)),
        ds(scratch.take<uint32_t>((rows + 1) / 2 * kPitch)),
        ds_rows(scratch.take<bf16>((rows + 1) / 2 * 2 * kPitch)) {}
  Left p_by_queries() const { return {reinterpret_cast<const char*>(p), 4, kPitch * 4}; }
  Left ds_by_queries() const { return {reinterpret_cast<const char*>(ds), 4, kPitch * 4}; }
  Left ds_by_keys() const { return {reinterpret_cast<const char*>(ds_rows), kPitch * 2, 4}; }
  void put(int64_t r, int64_t j, int, const vf (&weight)[2][2], const vf (&d_score)[2][2]) const {
    const int64_t at = r / 2 * kPitch + j;
    zip(gemm::round_neighbours(weight[0][0], weight[0][1]), gemm::round_neighbours(weight[1][0], weight[1][1]), p + at);
    const vu first = gemm::round_neighbours(d_score[0][0], d_score[0][1]);
    const vu second = gemm::round_neighbours(d_score[1][0], d_score[1][1]);
    zip(first, second, ds + at);
    gemm::store_words(reinterpret_cast<uint32_t*>(ds_rows + r * kPitch + j), first);
    gemm::store_words(reinterpret_cast<uint32_t*>(ds_rows + (r + 1) * kPitch + j), second);
  }
  // 2 W words from the elements of one row and those of the next.
  static void zip(vu first, vu second, uint32_t* out) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    for (int u = 0; u < 2; ++u) {
      const __m512i order = _mm512_load_si512(kOrder + 32 * u);
      gemm::store_words(out + u * W, (vu)_mm512_permutex2var_epi16((__m512i)first, order, (__m512i)second));
    }
  }
  uint32_t *p, *ds;
  bf16* ds_rows;
};
#endif

// What a row of a tile needs besides its scores.
struct Row {
  int64_t n;  // keys that it sees
  Exponent exponent;
  float delta;
  uint32_t* keep;
};

// P and dS of `count` rows of a tile, two or the last one, from their scores and dO V^T.
template <class E>
void softmax_gradient(const float* scores, const float* d_weights, int64_t r, int count, int64_t columns,
                      float kept_scale, const Row (&rows)[2], const Weights<E>& out) {
  const auto compute = [&](int64_t j, auto masked) {
    vf weight[2][2] = {}, d_score[2][2] = {};
    for (int u = 0; u < count; ++u)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = j + half * W, offset = (r + u) * kPitch + at;
        vf w = exp2(rows[u].exponent.template of<E>(load(scores + offset)));
        vf g = load(d_weights + offset);
        if (rows[u].keep) g = kept(g, rows[u].keep + at) * kept_scale;
        vf d = w * (g - rows[u].delta);
        if (rows[u].keep) w = kept(w, rows[u].keep + at);
        if (masked) {
          const vi seen = lanes_below(rows[u].n - at);
          w = select(seen, w, vf{});
          d = select(seen, d, vf{});
        }
        weight[u][half] = w;
        d_score[u][half] = d;
      }
    out.put(r, j, count, weight, d_score);
  };
  const int64_t seen = std::min(rows[0].n, rows[count - 1].n), whole = seen / (2 * W) * (2 * W);
  for (int64_t j = 0; j < whole; j += 2 * W) compute(j, std::false_type{});
  for (int64_t j = whole; j < columns; j += 2 * W) compute(j, std::true_type{});
}

// The tensors of a backward pass; gradients may be absent.
template <class T> struct Backward {
  Heads<T> d_out, q, k, v, out;
  Heads<float> lse;
  Heads<T> dq, dk, dv;
};

// Operands packed from the keys [first, end) of a head, `first` a multiple of kKeys, and the sums of their gradients.
template <class E> struct Chunk {
  int64_t first, end;
  Tiles<E> k, v, k_across;
  float *dk, *dv;
};

// Adds what the queries [first, first + rows) of one head give to the chunk's dk and dv, and writes the sum of what its
// tiles give to their dq, unscaled, to `dq` if that is not null. Whether there were any tiles.
template <class T, class E>
bool backward_block(const Problem& p, const Backward<T>& t, const Chunk<E>& chunk, int64_t b, int64_t h, int64_t first,
                    int64_t rows, int64_t length, float* dq) {
  const int64_t keys = std::min(p.visible(first + rows - 1, length), chunk.end) - chunk.first;
  if (keys <= 0) return false;
  Scratch scratch;
  const bool gradient_of_scores = dq || chunk.dk;
  float* scores = scratch.take<float>(rows * kPitch);
  float* d_weights = scratch.take<float>(rows * kPitch);
  float* dq_tile = scratch.take<float>(rows * p.width);
  const Weights<E> weights(rows, scores, d_weights, scratch);
  const Left q = gemm::left<E>(t.q.at(b, h, first), t.q.row, 1, rows, p.width, scratch, true);
  const Left d_out = gemm::left<E>(t.d_out.at(b, h, first), t.d_out.row, 1, rows, p.v_width, scratch, true);
  Packed<E> q_across{}, d_out_across{};
  if (chunk.dk) q_across = gemm::pack<E>(t.q.at(b, h, first), t.q.row, 1, rows, p.width, scratch);
  if (chunk.dv) d_out_across = gemm::pack<E>(t.d_out.at(b, h, first), t.d_out.row, 1, rows, p.v_width, scratch);
  float delta[kQueries];
  for (int64_t r = 0; r < rows; ++r) {
    const T *g = t.d_out.at(b, h, first + r), *o = t.out.at(b, h, first + r);
    delta[r] = accumulate<1>(p.v_width, [&](int64_t c, auto count, vf* sums) {
      sums[0] = fma(load_n(g + c, count), load_n(o + c, count), sums[0]);
    })[0];
  }
  uint32_t* keep[2] = {};
  if (p.dropout)
    for (uint32_t*& row : keep) row = scratch.take<uint32_t>(kPitch);
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t columns = std::min(kKeys, keys - j), tile = j / kKeys;
    gemm::multiply_part(q, chunk.k[tile], rows, p.width, 0, columns, scores, kPitch, false);
    if (gradient_of_scores)
      gemm::multiply_part(d_out, chunk.v[tile], rows, p.v_width, 0, columns, d_weights, kPitch, false);
    for (int64_t r = 0; r < rows; r += 2) {
      Row pair[2] = {};
      const int count = r + 1 < rows ? 2 : 1;
      for (int u = 0; u < count; ++u) {
        const int64_t i = first + r + u, key = chunk.first + j;
        if (p.dropout) keep_row(p, b, h, i, key, columns, keep[u]);
        const auto [lse2, lse2_rest] = split(t.lse.at(b, h)[i] * kLog2e);
        pair[u] = {std::clamp<int64_t>(p.visible(i, length) - key, 0, columns),
                   {p.scale2, p.scale2_rest, lse2, lse2_rest}, delta[r + u], keep[u]};
      }
      softmax_gradient(scores, d_weights, r, count, columns, p.kept_scale, pair, weights);
    }
    if (chunk.dv)
      gemm::multiply_part(weights.p_by_queries(), d_out_across, columns, rows, 0, p.v_width,
                          chunk.dv + j * p.v_width, p.v_width, true);
    if (chunk.dk)
      gemm::multiply_part(weights.ds_by_queries(), q_across, columns, rows, 0, p.width, chunk.dk + j * p.width, p.width,
                          true);
    if (dq) {
      float* part = j == 0 ? dq : dq_tile;
      gemm::multiply_part(weights.ds_by_keys(), chunk.k_across[tile], rows, columns, 0, p.width, part, p.width, false);
      if (j > 0) add_row(dq, dq_tile, rows * p.width);
    }
  }
  return true;
}

// Rows [first, end) of keys: the sums, then 0 for the keys that do not exist.
template <class T>
void store_keys(const Heads<T>& out, int64_t b, int64_t h, int64_t first, int64_t end, int64_t known, int64_t width,
                const float* sums, float scale) {
  for (int64_t j = first; j < end; ++j) {
    if (j < known) store_row(out.at(b, h, j), sums + (j - first) * width, width, scale);
    else std::fill_n(out.at(b, h, j), width, T{});
  }
}

template <class T> void backward(const Problem& p, const Backward<T>& t) {
  using E = gemm::Element<T>;
  const int64_t pairs = p.batches * p.key_heads, dq_size = p.batches * p.heads * p.queries * p.width;
  const int64_t tiles_of_keys = (p.keys + kKeys - 1) / kKeys;
  if (pairs == 0) return;
  const bool split = pairs < kTasks && tiles_of_keys > 1 &&
                     (!t.dq || tiles_of_keys * dq_size * static_cast<int64_t>(sizeof(float)) <= kPartials);
  const int64_t chunks = split ? tiles_of_keys : 1, chunk_keys = split ? kKeys : p.keys;
  Scratch shared;
  float* partial = split && t.dq ? shared.take<float>(chunks * dq_size) : nullptr;
  parallel_for(pairs * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks / p.key_heads, hk = task / chunks % p.key_heads;
      const int64_t c = paired(task % chunks, chunks), first = c * chunk_keys;
      const int64_t last = std::min(first + chunk_keys, p.keys), length = p.length(b);
      const int64_t known = std::max(std::min(last, length), first);
      Scratch scratch;
      Chunk<E> chunk{first, known, {}, {}, {}, nullptr, nullptr};
      chunk.k = tiles<E>(t.k, b, hk, first, known, p.width, true, scratch);
      if (t.dq || t.dk) chunk.v = tiles<E>(t.v, b, hk, first, known, p.v_width, true, scratch);
      if (t.dq) chunk.k_across = tiles<E>(t.k, b, hk, first, known, p.width, false, scratch);
      const auto zeros = [&](bool wanted, int64_t n) {
        float* sums = wanted ? scratch.take<float>(n) : nullptr;
        if (wanted) std::fill_n(sums, n, 0.0f);
        return sums;
      };
      chunk.dk = zeros(static_cast<bool>(t.dk), (known - first) * p.width);
      chunk.dv = zeros(static_cast<bool>(t.dv), (known - first) * p.v_width);
      float* own_dq = t.dq && !split ? scratch.take<float>(kQueries * p.width) : nullptr;
      for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h)
        for (int64_t i = 0; i < p.queries; i += kQueries) {
          const int64_t rows = std::min(kQueries, p.queries - i);
          float* dq = partial ? partial + c * dq_size + ((b * p.heads + h) * p.queries + i) * p.width : own_dq;
          const bool any = backward_block<T, E>(p, t, chunk, b, h, i, rows, length, dq);
          if (!own_dq) continue;
          if (!any) std::fill_n(dq, rows * p.width, 0.0f);
          for (int64_t r = 0; r < rows; ++r) store_row(t.dq.at(b, h, i + r), dq + r * p.width, p.width, p.scale);
        }
      if (t.dk) store_keys(t.dk, b, hk, first, last, known, p.width, chunk.dk, p.scale);
      if (t.dv) store_keys(t.dv, b, hk, first, last, known, p.v_width, chunk.dv, p.kept_scale);
    }
  });
  if (!partial) return;
  parallel_for(p.batches * p.heads * p.queries, kQueries, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* total = scratch.take<float>(p.width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.queries / p.heads, h = row / p.queries % p.heads, i = row % p.queries;
      // Tiles that the row's block does not see were not written.
      const int64_t block_end = std::min(i / kQueries * kQueries + kQueries, p.queries);
      const int64_t keys = p.visible(block_end - 1, p.length(b));
      std::fill_n(total, p.width, 0.0f);
      for (int64_t c = 0; c * kKeys < keys; ++c) add_row(total, partial + c * dq_size + row * p.width, p.width);
      store_row(t.dq.at(b, h, i), total, p.width, p.scale);
    }
  });
}

void require_like(const Tensor& t, const char* what, const Tensor& like, int64_t width) {
  if (!t.defined()) return;
  bool same = t.ndim == 4 && t.size(3) == width;
  for (int d = 0; same && d < 3; ++d) same = t.size(d) == like.size(d);
  require(same && (width <= 1 || t.stride[3] == 1), what, " must be a ", like.size(0), " x ", like.size(1), " x ",
          like.size(2), " x ", width, " tensor with a contiguous last dimension");
}

void require_lse(const Tensor& t, const Tensor& q) {
  bool same = t.ndim == 3;
  for (int d = 0; same && d < 3; ++d) same = t.size(d) == q.size(d);
  require(same && t.contiguous(), "lse must be a contiguous ", q.size(0), " x ", q.size(1), " x ", q.size(2), " tensor");
}

}  // namespace

// q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), out (B, H, Sq, Dv): float32 or bfloat16, last dimension contiguous;
// lse (B, H, Sq) float32, contiguous: the natural logarithm, +inf for a query that sees no key. key_lengths (B) int32 or
// int64, or None; dropout_seed one int64, read if dropout_p > 0. Query i sees key j < key_lengths[b] if not causal or
// j <= i + Sk - Sq.
void attention_forward(Tensor q, Tensor k, Tensor v, Tensor key_lengths, Tensor dropout_seed, bool causal, double scale,
                       double dropout_p, Tensor out, Tensor lse) {
  const Problem p = problem(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p);
  require_like(out, "out", q, p.v_width);
  require_lse(lse, q);
  for_dtype(q, [&](auto element) {
    using T = decltype(element);
    forward<T>(p, Heads<T>(q), Heads<T>(k), Heads<T>(v), Heads<T>(out), Heads<float>(lse));
  });
}
FASTLM_EXPORT(attention_forward);

// d_out and out like out above, lse from the forward; dq, dk, dv like q, k, v, or None for one that is not wanted.
void attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor key_lengths, Tensor dropout_seed, Tensor out,
                        Tensor lse, bool causal, double scale, double dropout_p, Tensor dq, Tensor dk, Tensor dv) {
  const Problem p = problem(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p);
  require_like(d_out, "d_out", q, p.v_width);
  require_like(out, "out", q, p.v_width);
  require_lse(lse, q);
  require_like(dq, "dq", q, p.width);
  require_like(dk, "dk", k, p.width);
  require_like(dv, "dv", v, p.v_width);
  for_dtype(q, [&](auto element) {
    using T = decltype(element);
    backward<T>(p, {Heads<T>(d_out), Heads<T>(q), Heads<T>(k), Heads<T>(v), Heads<T>(out), Heads<float>(lse),
                    Heads<T>(dq), Heads<T>(dk), Heads<T>(dv)});
  });
}
FASTLM_EXPORT(attention_backward);

}  // namespace fastlm
