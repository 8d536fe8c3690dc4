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

// Queries [first, first + rows) of one head against all their keys.
template <class T, class E>
void forward_block(const Problem& p, const Heads<T>& q, const Tiles<E>& k, const Tiles<E>& v, int64_t b,
                   int64_t h, int64_t first, int64_t rows, int64_t length, const Heads<T>& out, float* lse) {
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
    store_row(out.at(b, h, first + r), sums + r * p.v_width, p.v_width,
              blind ? 0.0f : p.kept_scale / total[r]);
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
      const int64_t b = t / ranges / p.key_heads, hk = t / ranges % p.key_heads;
      const int64_t r = paired(t % ranges, ranges);
      const int64_t first = blocks * r / ranges * kQueries;
      const int64_t last = std::min(blocks * (r + 1) / ranges * kQueries, p.queries);
      const int64_t length = p.length(b), keys = p.visible(last - 1, length);
      Scratch scratch;
      const Tiles<E> kt = tiles<E>(k, b, hk, 0, keys, p.width, true, scratch);
      const Tiles<E> vt = tiles<E>(v, b, hk, 0, keys, p.v_width, false, scratch);
      for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h)
        for (int64_t i = first; i < last; i += kQueries)
          forward_block<T, E>(p, q, kt, vt, b, h, i, std::min(kQueries, last - i), length, out,
                              lse.at(b, h) + i);
    }
  });
}

}  // namespace

// q (B, H, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), out (B, H, Sq, Dv): float32 or bfloat16, last
// dimension contiguous; lse (B, H, Sq) float32, contiguous: the natural logarithm, +inf for a query that sees
// no key. key_lengths (B) int32 or int64, or None; dropout_seed one int64, read if dropout_p > 0. Query i
// sees key j < key_lengths[b] if not causal or j <= i + Sk - Sq.
void attention_forward(Tensor q, Tensor k, Tensor v, Tensor key_lengths, Tensor dropout_seed, bool causal,
                       double scale, double dropout_p, Tensor out, Tensor lse) {
  const Problem p = problem(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p);
  require_like(out, "out", q, p.v_width);
  require_lse(lse, q);
  for_dtype(q, [&](auto element) {
    using T = decltype(element);
    forward<T>(p, Heads<T>(q), Heads<T>(k), Heads<T>(v), Heads<T>(out), Heads<float>(lse));
  });
}
FASTLM_EXPORT(attention_forward);

}  // namespace fastlm
