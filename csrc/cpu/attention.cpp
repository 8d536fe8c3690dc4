// Scaled dot-product attention: blocks of queries against tiles of keys, so that only a block by a tile of
// the (Sq, Sk) weights exists at a time (Dao, "FlashAttention-2", 2023, section 3.1).
//
//   S = scale Q K^T,  P = exp(S - lse),  O = (P * M') V with the dropout mask M', 0 or 1 / (1 - p)
//
// One task for each batch, key head and range of queries packs the keys and values that it sees once. Work is
// cut by shape alone and every sum has one order, so results have the same bits for any number of threads and
// whatever else is in the batch. Products take their operands in the input's dtype where the chip multiplies
// it, and sum in float32.
#include "attention.h"

namespace fastlm {
namespace {

using namespace attention;

// Calls fn(j, masked) for 2 W columns at a time from 0 to n; `masked` is true_type for the last ones, if
// incomplete.
template <class Fn> inline void for_pairs(int64_t n, Fn&& fn) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) fn(j, std::false_type{});
  if (j < n) fn(j, std::true_type{});
}
int64_t whole_pairs(int64_t n) { return (n + 2 * W - 1) / (2 * W) * (2 * W); }

// One row of a tile of scores: raises `top`, the row's maximum so far in units of log 2, writes 2^(scale2 s -
// top) of the first n scores and 0 up to `columns`, and returns their sum, dropped ones included. `weights`
// may be the scores' memory.
template <class E>
float softmax_row(const Problem& p, const float* scores, int64_t n, int64_t columns, const uint32_t* keep,
                  E* weights, float& top) {
  const auto seen = [&](vf x, int64_t j, auto masked) {
    return masked ? select(lanes_below(n - j), x, splat(-kInf)) : x;
  };
  vf a = splat(top), b = a;
  for_pairs(n, [&](int64_t j, auto masked) {
    a = larger(seen(load(scores + j) * p.scale2, j, masked), a);
    b = larger(seen(load(scores + j + W) * p.scale2, j + W, masked), b);
  });
  top = max(larger(a, b));
  const float offset = top == -kInf ? 0.0f : top;  // -inf - -inf would be NaN
  const Exponent exponent{p.scale2, p.scale2_rest, offset, 0.0f};
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

// Queries [first, first + rows) of one head against the keys that they see.
template <class T, class E>
void forward_block(const Problem& p, const Heads<T>& q, const Tiles<E>& k, const Tiles<E>& v, const Bias& bias,
                   const Diagonals& diagonals, const Sequence& s, int64_t h, int64_t first, int64_t rows,
                   const Heads<T>& out, float* lse) {
  Scratch scratch;
  const Range keys = p.seen(s, first, first + rows - 1);
  float* scores = scratch.take<float>(rows * kPitch);
  E* weights = std::is_same_v<E, float> ? reinterpret_cast<E*>(scores) : scratch.take<E>(rows * kPitch);
  float* sums = scratch.take<float>(rows * p.v_width);
  uint32_t* keep = p.dropout ? scratch.take<uint32_t>(kPitch) : nullptr;
  // The row's maximum so far, before the tile and after it, and its sum of weights; padded to whole vectors.
  alignas(64) float before[kQueries], top[kQueries], tile_sum[kQueries], total[kQueries];
  std::fill_n(top, kQueries, -kInf);
  std::fill_n(total, kQueries, 0.0f);
  std::fill_n(tile_sum, kQueries, 0.0f);
  const Left queries = gemm::left<E>(q.at(s.index, h, first), q.row, 1, rows, p.width, scratch, true);
  bool any = false;
  for (int64_t j = keys.first / p.tile * p.tile; j < keys.end; j += p.tile) {
    if (!p.meets(s.index, first, j)) continue;
    const int64_t columns = std::min(p.tile, keys.end - j);
    gemm::multiply_part(queries, k.at(j), rows, p.width, 0, columns, scores, kPitch, false);
    std::copy_n(top, kQueries, before);
    for (int64_t r = 0; r < rows; ++r) {
      const Range mine = p.seen(s, first + r);
      const int64_t n = std::clamp<int64_t>(mine.end - j, 0, columns), skip = std::min(mine.first - j, n);
      float* row = scores + r * kPitch;
      if (p.shaped) shape_row(p, s, bias, diagonals, h, first + r, j, skip, n, row, nullptr);
      else if (skip > 0) std::fill_n(row, skip, p.unseen);
      if (keep) keep_row(p, s.index, h, first + r, j, n, keep);
      tile_sum[r] = softmax_row(p, row, n, columns, keep, weights + r * kPitch, top[r]);
    }
    for (int64_t r = 0; r < rows; r += W) {
      // -inf before a row's first key: 2^-inf = 0 then, and the select guards -inf - -inf.
      const vf m = load(top + r), shrink = exp2(load(before + r) - select(m == -kInf, vf{}, m));
      store(total + r, fma(load(total + r), shrink, load(tile_sum + r)));
      store(before + r, shrink);
    }
    if (any)
      for (int64_t r = 0; r < rows; ++r)
        if (before[r] != 1.0f) store_row(sums + r * p.v_width, sums + r * p.v_width, p.v_width, before[r]);
    const Left left = {reinterpret_cast<const char*>(weights), kPitch * static_cast<int64_t>(sizeof(E)), 4};
    gemm::multiply_part(left, v.at(j), rows, columns, 0, p.v_width, sums, p.v_width, any);
    any = true;
  }
  if (!any) std::fill_n(sums, rows * p.v_width, 0.0f);
  const Tensor& sinks = p.options.sinks;
  const double sink = sinks.defined() ? number(sinks, h * sinks.stride[0]) : -kInf;
  for (int64_t r = 0; r < rows; ++r) {
    // In float64: an error of lse is one of every weight of the row in backward.
    double most = top[r] * kLn2, sum = total[r], shrink = 1.0;
    if (sink > most) {
      shrink = std::exp(most - sink);
      most = sink;
    }
    sum *= shrink;
    if (sinks.defined() && most != -kInf) sum += std::exp(sink - most);
    const bool blind = total[r] == 0.0f;
    store_row(out.at(s.index, h, first + r), sums + r * p.v_width, p.v_width,
              blind ? 0.0f : static_cast<float>(p.kept_scale * shrink / sum));
    lse[r] = sum == 0.0 ? -kInf : static_cast<float>(most + std::log(sum));
  }
}

template <class T>
void forward(const Problem& p, const Heads<T>& q, const Heads<T>& k, const Heads<T>& v, const Heads<T>& out,
             const Heads<float>& lse) {
  using E = gemm::Element<T>;
  const int64_t pairs = p.batches * p.key_heads, blocks = (p.queries + kQueries - 1) / kQueries;
  if (pairs == 0 || blocks == 0) return;
  const Bias bias(p.options.bias);
  // At least two blocks a range, for which packing pays.
  const int64_t ranges = std::clamp<int64_t>((kTasks + pairs - 1) / pairs, 1, (blocks + 1) / 2);
  parallel_for(pairs * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Sequence s = p.sequence(t / ranges / p.key_heads);
      const int64_t b = s.index, hk = t / ranges % p.key_heads;
      const int64_t r = paired(t % ranges, ranges), own = (s.queries + kQueries - 1) / kQueries;
      const int64_t first = own * r / ranges * kQueries;
      const int64_t last = std::min(own * (r + 1) / ranges * kQueries, s.queries);
      if (first >= last) continue;
      Range keys = p.seen(s, first, last - 1);
      keys.first = keys.first / p.tile * p.tile;
      const auto needed = [&](int64_t j) {
        for (int64_t i = first; i < last; i += kQueries)
          if (p.meets(b, i, j)) return true;
        return false;
      };
      Scratch scratch;
      const Tiles<E> kt = tiles<E>(p, k, b, hk, keys, p.width, true, scratch, needed);
      const Tiles<E> vt = tiles<E>(p, v, b, hk, keys, p.v_width, false, scratch, needed);
      for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h) {
        Scratch of_head;
        const Diagonals distances = diagonals(p, s, h, of_head);
        for (int64_t i = first; i < last; i += kQueries)
          forward_block<T, E>(p, q, kt, vt, bias, distances, s, h, i, std::min(kQueries, last - i), out,
                              lse.at(b, h, i));
      }
    }
  });
}

void run(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options, const Tensor& out,
         const Tensor& lse) {
  const Problem p = problem(q, k, v, options);
  require_like(out, "out", q, p.v_width);
  require_lse(lse, "lse", q);
  const Heads<float> lse_rows = row_values(lse, p.of_queries());
  for_dtype(q, [&](auto element) {
    using T = decltype(element);
    forward<T>(p, heads<T>(q, p.of_queries()), heads<T>(k, p.of_keys()), heads<T>(v, p.of_keys()),
               heads<T>(out, p.of_queries()), lse_rows);
    clear_unused<T>(out, p.q_starts);
  });
  for_unused(p.q_starts, q.size(0), [&](int64_t i) {
    for (int64_t h = 0; h < p.heads; ++h) lse.as<float>()[h * lse.stride[0] + i] = -kInf;
  });
}

}  // namespace

// q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), out (B, H, Sq, Dv): float32 or bfloat16, last dimension
// contiguous; lse (B, H, Sq) float32: the natural logarithm, -inf for a query that sees no key. The options as
// fastlm/ops/attention.py says; left and right are -1 for unbounded, softcap 0 for none.
void attention_forward(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor relative_bias, Tensor sinks,
                       Tensor alibi_slopes, Tensor key_lengths, Tensor segment_ids, Tensor key_segment_ids,
                       Tensor dropout_seed, int64_t left, int64_t right, bool top_left, double scale,
                       double softcap, bool bidirectional, int64_t max_distance, double dropout_p, Tensor out,
                       Tensor lse) {
  run(q, k, v,
      {bias, relative_bias, sinks, alibi_slopes, key_lengths, segment_ids, key_segment_ids, {}, {}, dropout_seed,
       left, right, top_left, scale, softcap, bidirectional, max_distance, dropout_p},
      out, lse);
}
FASTLM_EXPORT(attention_forward);

// q (Tq, H, D), k (Tk, Hk, D), v (Tk, Hk, Dv), out (Tq, H, Dv), lse (H, Tq); the longest lengths are read from
// cu_seqlens, int32 or int64.
void varlen_attention_forward(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor relative_bias, Tensor sinks,
                              Tensor alibi_slopes, Tensor key_lengths, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                              Tensor dropout_seed, int64_t left, int64_t right, bool top_left, double scale,
                              double softcap, bool bidirectional, int64_t max_distance, double dropout_p, int64_t,
                              int64_t, Tensor out, Tensor lse) {
  run(q, k, v,
      {bias, relative_bias, sinks, alibi_slopes, key_lengths, {}, {}, cu_seqlens_q, cu_seqlens_k, dropout_seed,
       left, right, top_left, scale, softcap, bidirectional, max_distance, dropout_p},
      out, lse);
}
FASTLM_EXPORT(varlen_attention_forward);

}  // namespace fastlm
