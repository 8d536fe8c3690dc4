// The rows of LayerNorm (Centred) and RMSNorm, plain or of a residual sum, forward and backward.
//
//   xhat = (x - mean) * rstd,  g = dy * weight
//   dx = rstd * (g - average(g) - xhat * average(g * xhat))
//   dweight += sum over rows of dy * xhat,  dbias += sum over rows of dy
//
// RMSNorm has no mean and no bias. A row stays in the first-level cache between its passes, so memory is read and
// written once. Arithmetic is float32.
#pragma once

#include "residual.h"

namespace fastlm {

// Rounded to T and back.
template <class T> vf rounded(vf v) {
  if constexpr (std::is_same_v<T, bf16>) return widen(narrow(v));
  else return v;
}

struct Stats {
  // The mean in two parts: x - coarse is exact for x near the mean, however large that is.
  float coarse, fine;
  float rstd;
};

// Deviations from an estimate of the mean give the variance, and their sum what the estimate lacks (the corrected
// algorithm of Chan, Golub, LeVeque 1983). The estimate is the mean of the row's start, which saves a pass; where
// it is further from the mean than the deviation, digits would cancel, and a second pass starts from the mean.
template <class T> Stats deviations(const T* x, int64_t n, float eps) {
  const float inverse = 1.0f / static_cast<float>(n);
  const int start = static_cast<int>(std::min<int64_t>(n, W));
  float coarse = sum(start == W ? load(x) : load_part(x, start)) / static_cast<float>(start);
  for (bool again = false;; again = true) {
    const auto [first, second] = accumulate<2>(n, [&](int64_t i, auto count, vf* t) {
      const vf d = load_n(x + i, count, coarse) - coarse;  // 0 in the lanes beyond the row
      t[0] += d;
      t[1] = fma(d, d, t[1]);
    });
    const float fine = first * inverse, variance = second * inverse - fine * fine;
    // A NaN must stay, hence no std::max.
    if (again || !(fine * fine > variance))
      return {coarse, fine, 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps)};
    coarse += fine;
  }
}

template <bool Centred, class T> Stats statistics(const T* x, int64_t n, float eps) {
  if constexpr (Centred) {
    return deviations(x, n, eps);
  } else {
    const auto [squares] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) {
      const vf v = load_n(x + i, count);  // 0 in the lanes beyond the row
      t[0] = fma(v, v, t[0]);
    });
    return {0.0f, 0.0f, 1.0f / std::sqrt(squares / static_cast<float>(n) + eps)};
  }
}

// y = norm(x), or with a residual of the sum. Llama: xhat is rounded to T before it is multiplied.
template <bool Centred, bool Llama, class T>
void norm_forward(const T* x, const ResidualSum<T>& sum, const float* weight, const float* bias, float eps, T* y,
                  float* mean, float* rstd, int64_t rows, int64_t n) {
  parallel_for(rows, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    uint32_t* room = sum.dropout.on() ? scratch.take<uint32_t>(RowDropout::room(n)) : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = sum.residual ? sum(x, row, n, room) : x + row * n;
      T* yr = y + row * n;
      const Stats s = statistics<Centred>(xr, n, eps);
      const float shift = -s.fine * s.rstd;
      for_vectors(n, [&](int64_t i, auto count) {
        vf v = load_n(xr + i, count);
        if constexpr (Centred) v = fma(v - s.coarse, splat(s.rstd), splat(shift));
        else v *= s.rstd;
        if constexpr (Llama) v = rounded<T>(v);
        if (weight) v *= load_n(weight + i, count);
        if (bias) v += load_n(bias + i, count);
        store_n(yr + i, v, count);
      });
      if (mean) mean[row] = s.coarse + s.fine;
      if (rstd) rstd[row] = s.rstd;
    }
  });
}

// Rows that go together through the sums, so that dweight and dbias are read and written once for all of them.
constexpr int kTogether = W == 16 ? 4 : 2;

// Of R rows, average(g) and average(g * xhat) each; adds their part of dweight and dbias, which may be null, on the
// way. A row's averages do not depend on R.
template <bool Centred, bool Llama, int R, class T>
std::array<float, 2 * R> norm_backward_averages(const T* dy, const T* x, const float* weight, const float* mean,
                                                const float* rstd, float* dweight, float* dbias, int64_t n) {
  constexpr int K = Centred ? 2 : 1;  // RMSNorm needs no average of g
  const auto sums = accumulate<K * R, 2>(n, [&](int64_t i, auto count, vf* t) {
    const vf w = weight ? load_n(weight + i, count) : splat(1.0f);
    vf dw = {}, db = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf d = load_n(dy + r * n + i, count);
      vf xhat = load_n(x + r * n + i, count, Centred ? mean[r] : 0.0f);  // 0 in the lanes beyond the row
      if constexpr (Centred) xhat -= mean[r];
      xhat *= rstd[r];
      dw = fma(d, Llama ? rounded<T>(xhat) : xhat, dw);
      db += d;
      const vf g = rounded_product(d, w);
      if constexpr (Centred) t[K * r] += g;
      t[K * r + K - 1] = fma(g, xhat, t[K * r + K - 1]);
    }
    if (dweight) store_n(dweight + i, load_n(dweight + i, count) + dw, count);
    if (dbias) store_n(dbias + i, load_n(dbias + i, count) + db, count);
  });
  const float inverse = 1.0f / static_cast<float>(n);
  std::array<float, 2 * R> out;
  for (int r = 0; r < R; ++r) {
    out[2 * r] = Centred ? sums[K * r] * inverse : 0.0f;
    out[2 * r + 1] = sums[K * r + K - 1] * inverse;
  }
  return out;
}

// A row of dx, W elements of it at a time: fn(i, count). d_total, which may be null, is what reaches x other than
// through the norm. The elements of dy and x that come `ahead` later are fetched meanwhile.
template <bool Centred, class T>
auto norm_backward_row(const T* dy, const T* d_total, const T* x, const float* weight, float mean, float rstd,
                       const float* averages, int64_t ahead = 0) {
  return [=, averages = std::array{averages[0], averages[1]}](int64_t i, auto count) {
    __builtin_prefetch(dy + ahead + i);  // rows are too short for the chip to see where the reading goes on
    __builtin_prefetch(x + ahead + i);
    vf g = load_n(dy + i, count), xhat = load_n(x + i, count);
    if constexpr (Centred) xhat -= mean;
    xhat *= rstd;
    if (weight) g = rounded_product(g, load_n(weight + i, count));
    if constexpr (Centred) g -= averages[0];
    vf v = rstd * (g - xhat * averages[1]);
    if (d_total) v += load_n(d_total + i, count);
    return v;
  };
}

// x: what was normalised. dweight, dbias and dx_bias, which may be null, are added to.
template <bool Centred, bool Llama, class T>
void norm_backward(const T* dy, const T* d_total, const T* x, const float* weight, const float* mean, const float* rstd,
                   const SplitGradient<T>& split, float* dweight, float* dbias, float* dx_bias, int64_t rows, int64_t n) {
  const int64_t grain = (kGrain + n - 1) / n, blocks = block_count(rows, grain, kMaxPartials);
  Scratch scratch;
  float* const sums[] = {dweight, dbias, dx_bias};
  float* partials[3];
  for (int k = 0; k < 3; ++k) partials[k] = sums[k] ? scratch.take<float>(blocks * n) : nullptr;
  parallel_for(
      rows, grain,
      [&](int64_t begin, int64_t end, int64_t block) {
        Scratch own;
        uint32_t* room = split.dropout.on() ? own.take<uint32_t>(RowDropout::room(n)) : nullptr;
        float* mine[3];
        for (int k = 0; k < 3; ++k) {
          mine[k] = partials[k] ? partials[k] + block * n : nullptr;
          if (mine[k]) std::fill(mine[k], mine[k] + n, 0.0f);
        }
        const auto together = [&](int64_t row, auto count) {
          constexpr int R = decltype(count)::value;
          const int64_t at = row * n;
          float zeros[R] = {};
          const float *m = Centred ? mean + row : zeros, *s = rstd + row;
          const auto averages =
              norm_backward_averages<Centred, Llama, R>(dy + at, x + at, weight, m, s, mine[0], mine[1], n);
          if (!split.wanted(mine[2])) return;
          for (int r = 0; r < R; ++r) {
            const int64_t from = at + r * n;
            const auto d = norm_backward_row<Centred>(dy + from, d_total ? d_total + from : nullptr, x + from, weight,
                                                      m[r], s[r], &averages[2 * r], kTogether * n);
            split(row + r, n, mine[2], room, d);
          }
        };
        int64_t row = begin;
        for (; row + kTogether <= end; row += kTogether) together(row, std::integral_constant<int, kTogether>{});
        for (; row < end; ++row) together(row, std::integral_constant<int, 1>{});
      },
      kMaxPartials);
  for (int k = 0; k < 3; ++k)
    if (sums[k]) add_partials(partials[k], blocks, n, sums[k]);
}

// The gradient of a residual sum whose norm has none.
template <class T>
void sum_backward(const T* d_total, const SplitGradient<T>& split, float* dx_bias, int64_t rows, int64_t n) {
  const int64_t grain = (kGrain + n - 1) / n, blocks = block_count(rows, grain, kMaxPartials);
  if (!split.wanted(dx_bias)) return;
  Scratch scratch;
  float* partials = dx_bias ? scratch.take<float>(blocks * n) : nullptr;
  parallel_for(
      rows, grain,
      [&](int64_t begin, int64_t end, int64_t block) {
        Scratch own;
        uint32_t* room = split.dropout.on() ? own.take<uint32_t>(RowDropout::room(n)) : nullptr;
        float* mine = partials ? partials + block * n : nullptr;
        if (mine) std::fill(mine, mine + n, 0.0f);
        for (int64_t row = begin; row < end; ++row)
          split(row, n, mine, room, [&](int64_t i, auto count) { return load_n(d_total + row * n + i, count); });
      },
      kMaxPartials);
  if (dx_bias) add_partials(partials, blocks, n, dx_bias);
}

// --- what the four ops share around the loops: x of T, rows of n, and parameters as float32

struct Rows {
  int64_t count, n, rows;
  explicit Rows(const Tensor& x, const char* what) : count(x.numel()) {
    require(x.ndim > 0, what, " must have at least one dimension");
    n = x.size(-1);
    rows = n == 0 ? 0 : count / n;
  }
};

// weight + offset as float32; null if there is none.
inline const float* scale(const Tensor& weight, double offset, Scratch& scratch) {
  const float* w = floats(weight, scratch);
  if (!w || offset == 0) return w;
  const int64_t n = weight.numel();
  float* out = scratch.take<float>(n);
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] + static_cast<float>(offset);
  return out;
}

inline bool is_llama(const std::string& casting) {
  require(casting == "gemma" || casting == "llama", "casting must be gemma or llama, got ", casting);
  return casting == "llama";
}

}  // namespace fastlm
