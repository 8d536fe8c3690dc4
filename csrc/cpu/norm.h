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

// (average(g), average(g * xhat)) of a row; adds its part of dweight and dbias on the way.
template <bool Centred, bool Llama, class T>
std::array<float, 2> norm_backward_sums(const T* dy, const T* x, const float* weight, float mean, float rstd,
                                        float* dweight, float* dbias, int64_t n) {
  constexpr int last = Centred ? 1 : 0;  // of the sums: RMSNorm needs no average of g
  const auto sums = accumulate<last + 1>(n, [&](int64_t i, auto count, vf* t) {
    const vf d = load_n(dy + i, count);
    vf xhat = load_n(x + i, count, mean);  // 0 in the lanes beyond the row
    if constexpr (Centred) xhat -= mean;
    xhat *= rstd;
    if (dweight) store_n(dweight + i, fma(d, Llama ? rounded<T>(xhat) : xhat, load_n(dweight + i, count)), count);
    if (dbias) store_n(dbias + i, load_n(dbias + i, count) + d, count);
    const vf g = weight ? rounded_product(d, load_n(weight + i, count)) : d;
    if constexpr (Centred) t[0] += g;
    t[last] = fma(g, xhat, t[last]);
  });
  const float inverse = 1.0f / static_cast<float>(n);
  return {Centred ? sums[0] * inverse : 0.0f, sums[last] * inverse};
}

// A row of dx: sink gets a function that gives W elements of it at (i, count). d_total, which may be null, is what
// reaches x other than through the norm; dweight and dbias, which may be null, are added to.
template <bool Centred, bool Llama, class T, class Sink>
void norm_backward_row(const T* dy, const T* d_total, const T* x, const float* weight, float mean, float rstd,
                       float* dweight, float* dbias, int64_t n, bool wanted, Sink&& sink) {
  const auto averages = norm_backward_sums<Centred, Llama>(dy, x, weight, mean, rstd, dweight, dbias, n);
  if (!wanted) return;
  const float average_g = averages[0], average_gx = averages[1];
  sink([&](int64_t i, auto count) {
    vf g = load_n(dy + i, count), xhat = load_n(x + i, count);
    if constexpr (Centred) xhat -= mean;
    xhat *= rstd;
    if (weight) g = rounded_product(g, load_n(weight + i, count));
    if constexpr (Centred) g -= average_g;
    vf v = rstd * (g - xhat * average_gx);
    if (d_total) v += load_n(d_total + i, count);
    return v;
  });
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
        for (int64_t row = begin; row < end; ++row)
          norm_backward_row<Centred, Llama>(
              dy + row * n, d_total ? d_total + row * n : nullptr, x + row * n, weight, Centred ? mean[row] : 0.0f,
              rstd[row], mine[0], mine[1], n, split.wanted(mine[2]),
              [&](const auto& d) { split(row, n, mine[2], room, d); });
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
