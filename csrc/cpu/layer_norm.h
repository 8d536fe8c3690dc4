// The rows of LayerNorm, plain or of a residual sum, forward and backward.
//
//   xhat = (x - mean) * rstd,  g = dy * weight
//   dx = rstd * (g - average(g) - xhat * average(g * xhat))
//   dweight += sum over rows of dy * xhat,  dbias += sum over rows of dy
//
// A row stays in the first-level cache between its passes, so memory is read and written once. Arithmetic is
// float32.
#pragma once

#include "rows.h"

namespace fastlm {

struct Stats {
  // The mean in two parts: x - coarse is exact for x near the mean, however large that is.
  float coarse, fine;
  float rstd;
};

// The corrected two-pass algorithm (Chan, Golub, LeVeque 1983): deviations from a first estimate of the mean
// give the variance, and their sum what the estimate lacks.
template <class T> Stats statistics(const T* x, int64_t n, float eps) {
  const float inverse = 1.0f / static_cast<float>(n);
  const auto [total] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) { t[0] += load_n(x + i, count); });
  const float coarse = total * inverse;
  const auto [first, second] = accumulate<2>(n, [&](int64_t i, auto count, vf* t) {
    const vf d = load_n(x + i, count, coarse) - coarse;  // 0 in the lanes beyond the row
    t[0] += d;
    t[1] = fma(d, d, t[1]);
  });
  const float fine = first * inverse, variance = second * inverse - fine * fine;
  // A NaN must stay, hence no std::max.
  return {coarse, fine, 1.0f / std::sqrt((variance < 0.0f ? 0.0f : variance) + eps)};
}

// y = norm(x), or with a residual total = x + residual, rounded, and y = norm(total).
template <class T>
void norm_forward(const T* x, const T* residual, const float* weight, const float* bias, float eps, T* y,
                  T* total, float* mean, float* rstd, int64_t rows, int64_t n) {
  parallel_for(rows, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = x + row * n;
      T* yr = y + row * n;
      if (residual) {
        const T* rr = residual + row * n;
        T* tr = total + row * n;
        for_vectors(n, [&](int64_t i, auto count) {
          store_n(tr + i, load_n(xr + i, count) + load_n(rr + i, count), count);
        });
        xr = tr;
      }
      const Stats s = statistics(xr, n, eps);
      for_vectors(n, [&](int64_t i, auto count) {
        vf v = ((load_n(xr + i, count) - s.coarse) - s.fine) * s.rstd;
        if (weight) v *= load_n(weight + i, count);
        if (bias) v += load_n(bias + i, count);
        store_n(yr + i, v, count);
      });
      if (mean) mean[row] = s.coarse + s.fine;
      if (rstd) rstd[row] = s.rstd;
    }
  });
}

// d_total, which may be null, is what reaches x other than through the norm.
template <class T>
void norm_backward_row(const T* dy, const T* d_total, const T* x, const float* weight, float mean, float rstd,
                       T* dx, float* dweight, float* dbias, int64_t n) {
  const auto [sum_g, sum_gx] = accumulate<2>(n, [&](int64_t i, auto count, vf* t) {
    const vf d = load_n(dy + i, count);
    const vf xhat = (load_n(x + i, count, mean) - mean) * rstd;  // 0 in the lanes beyond the row
    if (dweight) store_n(dweight + i, fma(d, xhat, load_n(dweight + i, count)), count);
    if (dbias) store_n(dbias + i, load_n(dbias + i, count) + d, count);
    const vf g = weight ? rounded_product(d, load_n(weight + i, count)) : d;
    t[0] += g;
    t[1] = fma(g, xhat, t[1]);
  });
  if (!dx) return;
  const float inverse = 1.0f / static_cast<float>(n);
  const float average_g = sum_g * inverse, average_gx = sum_gx * inverse;
  for_vectors(n, [&](int64_t i, auto count) {
    const vf d = load_n(dy + i, count);
    const vf xhat = (load_n(x + i, count) - mean) * rstd;
    const vf g = weight ? rounded_product(d, load_n(weight + i, count)) : d;
    vf v = rstd * ((g - average_g) - xhat * average_gx);
    if (d_total) v += load_n(d_total + i, count);
    store_n(dx + i, v, count);
  });
}

template <class T>
void norm_backward(const T* dy, const T* d_total, const T* x, const float* weight, const float* mean,
                   const float* rstd, T* dx, float* dweight, float* dbias, int64_t rows, int64_t n) {
  const int64_t grain = (kGrain + n - 1) / n, blocks = block_count(rows, grain, kMaxPartials);
  Scratch scratch;
  float* partial_dweight = dweight ? scratch.take<float>(blocks * n) : nullptr;
  float* partial_dbias = dbias ? scratch.take<float>(blocks * n) : nullptr;
  parallel_for(
      rows, grain,
      [&](int64_t begin, int64_t end, int64_t block) {
        float* dw = dweight ? partial_dweight + block * n : nullptr;
        float* db = dbias ? partial_dbias + block * n : nullptr;
        if (dw) std::fill(dw, dw + n, 0.0f);
        if (db) std::fill(db, db + n, 0.0f);
        for (int64_t row = begin; row < end; ++row)
          norm_backward_row(dy + row * n, d_total ? d_total + row * n : nullptr, x + row * n, weight,
                            mean[row], rstd[row], dx ? dx + row * n : nullptr, dw, db, n);
      },
      kMaxPartials);
  if (dweight) add_partials(partial_dweight, blocks, n, dweight);
  if (dbias) add_partials(partial_dbias, blocks, n, dbias);
}

}  // namespace fastlm
