// What attention computes beside products: sizes and sequences, who sees whom, and what is added to a score.
#pragma once

#include <tuple>

#include "gemm.h"
#include "philox.h"

namespace fastlm {
namespace attention {

constexpr int64_t kQueries = 64;   // rows of a block
constexpr int64_t kKeys = 512;     // columns of a tile, and of what one task of backward may own
constexpr int64_t kNarrow = 128;   // columns of a tile where whole tiles may be skipped
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Range {
  int64_t first, end;
  bool empty() const { return first >= end; }
};

// A (batch, heads, seq, width) tensor with contiguous rows, or a packed one (total, heads, width) whose
// sequences begin at `starts`; or one number a row, (batch, heads, seq) or (heads, total).
template <class T> struct Heads {
  T* at(int64_t b, int64_t h, int64_t i = 0) const {
    return data + b * batch + h * head + (starts ? starts[b] + i : i) * row;
  }
  explicit operator bool() const { return data != nullptr; }
  T* data;
  int64_t batch, head, row;
  const int64_t* starts;
};
template <class T> Heads<T> heads(const Tensor& t, const int64_t* starts) {
  if (starts) return {t.wanted<T>(), 0, t.stride[1], t.stride[0], starts};
  return {t.wanted<T>(), t.stride[0], t.stride[1], t.stride[2], nullptr};
}
inline Heads<float> row_values(const Tensor& t, const int64_t* starts) {
  if (starts) return {t.wanted<float>(), 0, t.stride[0], 1, starts};
  return {t.wanted<float>(), t.stride[0], t.stride[1], 1, nullptr};
}

// A number as the sum of two float32 of its sign, neither 0 unless it is: so that -inf times both is -inf
// twice. Rounded to one, the scale or lse would change every weight by as much as all other errors together.
inline std::pair<float, float> split(double x) {
  float high = static_cast<float>(x);
  if (std::isinf(x)) return {high, 0.0f};
  if (std::abs(static_cast<double>(high)) >= std::abs(x)) high = std::nextafterf(high, 0.0f);
  return {high, static_cast<float>(x - high)};
}

inline int64_t integer(const Tensor& t, int64_t i) {
  return t.is<int32_t>() ? t.as<int32_t>()[i] : t.as<int64_t>()[i];
}
inline float number(const Tensor& t, int64_t i) {
  return t.is<float>() ? t.as<float>()[i] : to_float(t.as<bf16>()[i]);
}
inline void require_integers(const Tensor& t, const char* what, int64_t n) {
  if (!t.defined()) return;
  require(t.is<int32_t>() || t.is<int64_t>(), what, " must be int32 or int64");
  require(t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
}
inline void require_numbers(const Tensor& t, const char* what) {
  require(!t.defined() || t.is<float>() || t.is<bf16>(), what, " must be float32 or bfloat16");
}

// The op's arguments beside q, k and v. cu_*: of a packed batch, whose bias has the longest lengths.
struct Options {
  Tensor bias, relative_bias, sinks, alibi_slopes, key_lengths, segment_ids, key_segment_ids, cu_q, cu_k, seed;
  int64_t left, right;
  bool top_left;
  double scale, softcap;
  bool bidirectional;
  int64_t max_distance;
  double dropout_p;
};

// One batch entry, or one sequence of a packed batch.
struct Sequence {
  int64_t index, queries, keys, shift;  // the keys that exist; query i stands at key i + shift
};

// The tensor added to the scores, broadcast by strides of 0.
struct Bias {
  explicit Bias(const Tensor& t) : tensor(t) {
    for (int d = 0; t.defined() && d < 4; ++d) stride[d] = t.size(d) == 1 ? 0 : t.stride[d];
  }
  int64_t at(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
  }
  const Tensor& tensor;
  int64_t stride[4] = {};
};

typedef uint8_t vb __attribute__((vector_size(W)));

struct Problem {
  int64_t batches, heads, key_heads, width, v_width;
  int64_t queries, keys, rows;  // of the longest sequence; of all sequences and heads
  Options options;
  std::vector<int64_t> q_starts, k_starts;  // of a packed batch
  bool shaped, dropout;                     // a score is more than scale times a product
  int64_t tile;                             // keys of a tile
  float scale, scale2, scale2_rest;  // scale2: what turns scores into powers of 2, in two parts, see split
  float unseen;                      // a score that gives weight 0
  PhiloxKey seed{0};
  uint32_t threshold = 0;
  float kept_scale = 1.0f;
  std::vector<int32_t> q_codes, k_codes;  // of segments, a row of `pitch` a batch
  std::vector<std::pair<int32_t, int32_t>> q_spans, k_spans;  // least and greatest of each block and tile
  int64_t q_pitch = 0, k_pitch = 0, q_blocks = 0, k_tiles = 0;
  std::vector<int32_t> buckets;  // of distances -clip to clip
  int64_t clip = 0;

  int64_t group() const { return heads / key_heads; }
  const int64_t* of_queries() const { return q_starts.empty() ? nullptr : q_starts.data(); }
  const int64_t* of_keys() const { return k_starts.empty() ? nullptr : k_starts.data(); }
  int64_t row(int64_t b, int64_t h, int64_t i) const {
    return q_starts.empty() ? (b * heads + h) * queries + i : h * q_starts.back() + q_starts[b] + i;
  }

  Sequence sequence(int64_t b) const {
    Sequence s{b, queries, keys, 0};
    if (!q_starts.empty()) {
      s.queries = q_starts[b + 1] - q_starts[b];
      s.keys = k_starts[b + 1] - k_starts[b];
    }
    if (!options.top_left) s.shift = s.keys - s.queries;
    if (options.key_lengths.defined())
      s.keys = std::clamp<int64_t>(integer(options.key_lengths, b * options.key_lengths.stride[0]), 0, s.keys);
    return s;
  }

  // The keys that queries [i, last] may see by position: each its own range, and here what holds them all.
  Range seen(const Sequence& s, int64_t i, int64_t last) const {
    const int64_t first = options.left < 0 ? 0 : std::clamp<int64_t>(i + s.shift - options.left, 0, s.keys);
    const int64_t end =
        options.right < 0 ? s.keys : std::clamp<int64_t>(last + s.shift + options.right + 1, 0, s.keys);
    return {first, end};
  }
  Range seen(const Sequence& s, int64_t i) const { return seen(s, i, i); }

  // Whether some query of the block at i may see some key of the tile at j, by their segments.
  bool meets(int64_t b, int64_t i, int64_t j) const {
    if (q_spans.empty() || k_spans.empty()) return true;
    const auto& [q_least, q_most] = q_spans[b * q_blocks + i / kQueries];
    const auto& [k_least, k_most] = k_spans[b * k_tiles + j / tile];
    return q_least <= k_most && k_least <= q_most;
  }

  int bucket(int64_t distance) const { return buckets[std::clamp(distance, -clip, clip) + clip]; }
};

// What depends on the distance of a key from a query, for one head of one sequence: T5's bias and ALiBi's.
struct Diagonals {
  const float* at(int64_t distance) const { return values + distance - lowest; }
  float* values;  // null if there is neither
  int64_t lowest, count;
};

inline Diagonals no_diagonals(const Sequence& s) {
  return {nullptr, -(s.queries - 1 + s.shift), std::max<int64_t>(s.queries + s.keys - 1, 0)};
}

inline Diagonals diagonals(const Problem& p, const Sequence& s, int64_t h, Scratch& scratch) {
  const Tensor &table = p.options.relative_bias, &slopes = p.options.alibi_slopes;
  Diagonals out = no_diagonals(s);
  if (!table.defined() && !slopes.defined()) return out;
  out.values = scratch.take<float>(out.count + W);
  const auto relative = [&](int64_t d) {
    return table.defined() ? number(table, p.bucket(d) * table.stride[0] + h * table.stride[1]) : 0.0f;
  };
  const int64_t end = out.lowest + out.count;
  const int64_t near = std::clamp(-p.clip, out.lowest, end), far = std::clamp(p.clip + 1, near, end);
  if (near > out.lowest) std::fill(out.values, out.values + near - out.lowest, relative(-p.clip));
  for (int64_t d = near; d < far; ++d) out.values[d - out.lowest] = relative(d);
  if (end > far) std::fill(out.values + far - out.lowest, out.values + out.count, relative(p.clip));
  if (slopes.defined()) {
    const int64_t last = slopes.ndim - 1;
    const float slope =
        number(slopes, (last > 0 ? s.index * slopes.stride[0] : 0) + h * slopes.stride[last]);
    for (int64_t c = 0; c < out.count; ++c)
      out.values[c] -= slope * std::abs(static_cast<float>(out.lowest + c));
  }
  std::fill_n(out.values + out.count, W, 0.0f);
  return out;
}

// Turns products of query i with the keys [j, j + n) into scores, those before key j + skip and those of other
// segments into -inf, and writes the soft cap's derivative to `slope` if that is not null. `products` has room
// for whole vectors.
inline void shape_row(const Problem& p, const Sequence& s, const Bias& bias, const Diagonals& diagonals,
                      int64_t h, int64_t i, int64_t j, int64_t skip, int64_t n, float* products, float* slope) {
  const float cap = static_cast<float>(p.options.softcap), inverse = cap > 0.0f ? 1.0f / cap : 0.0f;
  const float* diagonal = diagonals.values ? diagonals.at(j - i - s.shift) : nullptr;
  const int32_t* codes = p.k_codes.empty() ? nullptr : p.k_codes.data() + s.index * p.k_pitch + j;
  const int32_t code = codes ? p.q_codes[s.index * p.q_pitch + i] : 0;
  const int64_t at = bias.tensor.defined() ? bias.at(s.index, h, i, j) : 0;
  const auto run = [&](auto&& add_bias) {
    for_vectors(n, [&](int64_t c, auto count) {
      vf x = load(products + c) * p.scale;
      if (cap > 0.0f) {
        const vf bent = tanh(x * inverse);
        x = bent * cap;
        if (slope) store(slope + c, 1.0f - bent * bent);
      }
      x = add_bias(x, c, count);
      if (diagonal) x += load_n(diagonal + c, count);
      if (codes) {
        vi here;
        std::memcpy(&here, codes + c, sizeof here);
        x = select(here == code, x, splat(-kInf));
      }
      store(products + c, x);
    });
  };
  const auto run_typed = [&](auto* values) {
    if (bias.stride[3] == 0) {
      const float v = to_float(*values);
      run([&](vf x, int64_t, auto) { return x + v; });
    } else {
      run([&](vf x, int64_t c, auto count) { return x + load_n(values + c, count); });
    }
  };
  if (!bias.tensor.defined()) run([](vf x, int64_t, auto) { return x; });
  else if (bias.tensor.is<float>()) run_typed(bias.tensor.as<float>() + at);
  else if (bias.tensor.is<bf16>()) run_typed(bias.tensor.as<bf16>() + at);
  else {
    const bool* mask = bias.tensor.as<bool>() + at;
    run([&](vf x, int64_t c, int count) {
      vb bytes = {};
      if (bias.stride[3] == 0) bytes += static_cast<uint8_t>(*mask);
      else std::memcpy(&bytes, mask + c, static_cast<size_t>(count));
      return select(__builtin_convertvector(bytes, vi) != 0, x, splat(-kInf));
    });
  }
  std::fill_n(products, std::min(skip, n), -kInf);
}

// T5's bucket of each distance from -clip to clip; fastlm/ops/attention_math.py says how.
inline void make_buckets(Problem& p) {
  const Options& o = p.options;
  const int64_t count = o.relative_bias.size(0), one_way = o.bidirectional ? count / 2 : count;
  const int64_t exact = one_way / 2;
  p.clip = std::min(o.max_distance, std::max(p.queries, p.keys));  // no distance is larger
  p.buckets.resize(2 * p.clip + 1);
  for (int64_t d = -p.clip; d <= p.clip; ++d) {
    const int64_t away = o.bidirectional ? std::abs(d) : std::max<int64_t>(-d, 0);
    int64_t bucket = away;
    if (away >= exact)
      bucket = std::min(exact + static_cast<int64_t>(std::log(static_cast<double>(away) / exact) /
                                                         std::log(static_cast<double>(o.max_distance) / exact) *
                                                         (one_way - exact) +
                                                     1e-9),
                        one_way - 1);
    p.buckets[d + p.clip] = static_cast<int32_t>(bucket + (o.bidirectional && d > 0 ? one_way : 0));
  }
}

// Segment ids as 32-bit codes, equal where the ids are, and the codes that each block and tile spans.
inline void make_codes(Problem& p) {
  const Tensor &q_ids = p.options.segment_ids, &k_ids = p.options.key_segment_ids;
  p.q_pitch = p.queries + W;
  p.k_pitch = p.keys + W;
  p.q_blocks = (p.queries + kQueries - 1) / kQueries;
  p.k_tiles = (p.keys + p.tile - 1) / p.tile;
  p.q_codes.assign(p.batches * p.q_pitch, 0);
  p.k_codes.assign(p.batches * p.k_pitch, 0);
  p.q_spans.resize(p.batches * p.q_blocks);
  p.k_spans.resize(p.batches * p.k_tiles);
  std::vector<int64_t> known;
  for (int64_t b = 0; b < p.batches; ++b) {
    known.clear();
    if (k_ids.is<int64_t>()) {
      for (int64_t j = 0; j < p.keys; ++j)
        known.push_back(integer(k_ids, b * k_ids.stride[0] + j * k_ids.stride[1]));
      std::sort(known.begin(), known.end());
      known.erase(std::unique(known.begin(), known.end()), known.end());
    }
    const auto fill = [&](const Tensor& ids, int64_t n, int32_t* codes, int64_t width,
                          std::pair<int32_t, int32_t>* spans) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t id = integer(ids, b * ids.stride[0] + i * ids.stride[1]);
        int64_t code = id;
        if (ids.is<int64_t>()) {  // the place among the keys' ids; none of them: a code that no key has
          const auto place = std::lower_bound(known.begin(), known.end(), id);
          code = place != known.end() && *place == id ? place - known.begin() : -1;
        }
        codes[i] = static_cast<int32_t>(code);
        auto& span = spans[i / width];
        if (i % width == 0) span = {codes[i], codes[i]};
        span = {std::min(span.first, codes[i]), std::max(span.second, codes[i])};
      }
    };
    fill(q_ids, p.queries, p.q_codes.data() + b * p.q_pitch, kQueries, p.q_spans.data() + b * p.q_blocks);
    fill(k_ids, p.keys, p.k_codes.data() + b * p.k_pitch, p.tile, p.k_spans.data() + b * p.k_tiles);
  }
}

// Where sequences begin and the last ends, within [0, total] whatever is given.
inline std::vector<int64_t> make_starts(const Tensor& cu, int64_t total) {
  std::vector<int64_t> out(cu.numel());
  for (int64_t b = 0; b < cu.numel(); ++b)
    out[b] = std::clamp(integer(cu, b * cu.stride[0]), b ? out[b - 1] : 0, total);
  return out;
}

inline Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Options& o) {
  const bool packed = o.cu_q.defined();
  const int dims = packed ? 3 : 4;
  for (const auto& [t, what] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
    require(t->ndim == dims, what, " must have ", dims, " dimensions, got ", t->ndim);
    require(t->dtype == q.dtype, what, " must be ", name(q.dtype), " like q, got ", name(t->dtype));
    require(t->size(-1) <= 1 || t->stride[dims - 1] == 1, what, " must have a contiguous last dimension");
  }
  Problem p;
  p.options = o;
  p.heads = q.size(1);
  p.key_heads = k.size(1);
  p.width = q.size(-1);
  p.v_width = v.size(-1);
  if (packed) {
    require_integers(o.cu_q, "cu_seqlens_q", o.cu_q.numel());
    require_integers(o.cu_k, "cu_seqlens_k", o.cu_q.numel());
    require(o.cu_q.numel() > 0 && v.size(0) == k.size(0), "v must have k's rows");
    p.batches = o.cu_q.numel() - 1;
    p.q_starts = make_starts(o.cu_q, q.size(0));
    p.k_starts = make_starts(o.cu_k, k.size(0));
    p.queries = p.keys = 0;
    for (int64_t b = 0; b < p.batches; ++b) {
      p.queries = std::max(p.queries, p.q_starts[b + 1] - p.q_starts[b]);
      p.keys = std::max(p.keys, p.k_starts[b + 1] - p.k_starts[b]);
    }
    p.rows = p.heads * p.q_starts.back();
  } else {
    p.batches = q.size(0);
    p.queries = q.size(2);
    p.keys = k.size(2);
    p.rows = p.batches * p.heads * p.queries;
    require(k.size(0) == p.batches, "k must have q's batch");
    require(v.size(0) == p.batches && v.size(2) == p.keys, "v must have k's shape but the last");
  }
  require(p.key_heads > 0 && p.heads % p.key_heads == 0, "k must have a number of heads that divides ",
          p.heads);
  require(k.size(-1) == p.width && v.size(1) == p.key_heads, "k must have q's head size and v k's heads");
  require_integers(o.key_lengths, "key_lengths", p.batches);
  require_integers(o.segment_ids, "segment_ids", p.batches * p.queries);
  require_integers(o.key_segment_ids, "key_segment_ids", p.batches * p.keys);
  for (const auto& [t, what] : {std::pair{&o.relative_bias, "relative_bias"}, std::pair{&o.sinks, "sinks"},
                                std::pair{&o.alibi_slopes, "alibi_slopes"}}) {
    require_numbers(*t, what);
    require(!t->defined() || t->size(-1) == p.heads, what, " must have ", p.heads, " columns");
  }
  if (o.bias.defined()) {
    require(o.bias.is<float>() || o.bias.is<bf16>() || o.bias.is<bool>(), "bias must be float32, bfloat16 or bool");
    const int64_t full[4] = {p.batches, p.heads, p.queries, p.keys};
    require(o.bias.ndim == 4, "bias must have 4 dimensions");
    for (int d = 0; d < 4; ++d)
      require(o.bias.size(d) == 1 || o.bias.size(d) == full[d] || (packed && d > 1 && o.bias.size(d) > full[d]),
              "bias must broadcast over dimension ", d, ", got ", o.bias.size(d), " for ", full[d]);
    require(o.bias.size(3) == 1 || o.bias.stride[3] == 1, "bias must have a contiguous last dimension");
  }
  // Segments and a window that is narrow on both sides leave whole tiles unseen.
  const bool banded = o.left >= 0 && o.right >= 0 && o.left + o.right < 2 * kKeys;
  p.tile = banded || o.segment_ids.defined() ? kNarrow : kKeys;
  p.shaped = o.softcap > 0.0 || o.bias.defined() || o.relative_bias.defined() || o.alibi_slopes.defined() ||
             o.segment_ids.defined() || (o.left >= 0 && o.scale == 0.0);
  p.scale = static_cast<float>(o.scale);
  std::tie(p.scale2, p.scale2_rest) = split(p.shaped ? kLog2e : o.scale * kLog2e);
  p.unseen = p.scale2 < 0.0f ? kInf : -kInf;
  p.dropout = o.dropout_p > 0.0;
  if (p.dropout) {
    require(o.seed.numel() == 1, "dropout_seed must have one element, got ", o.seed.numel());
    p.seed = PhiloxKey(*o.seed.as<int64_t>());
    p.threshold = static_cast<uint32_t>(drop_threshold(o.dropout_p));
    p.kept_scale = static_cast<float>(1.0 / (1.0 - o.dropout_p));
  }
  if (o.relative_bias.defined()) make_buckets(p);
  if (o.segment_ids.defined()) make_codes(p);
  return p;
}

}  // namespace attention
}  // namespace fastlm
