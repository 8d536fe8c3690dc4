// LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias, and its gradients
//
//   xhat = (x - mean) * rstd,  g = dy * weight
//   dx = rstd * (g - average(g) - xhat * average(g * xhat))
//   dweight += sum over rows of dy * xhat,  dbias += sum over rows of dy
//
// A row stays in the first-level cache between its passes, so memory is read and written once. Arithmetic is
// float32.
#include "vec.h"

namespace fastlm {
namespace {

constexpr int64_t kGrain = 16384;     // elements that are worth a block of their own
constexpr int64_t kMaxPartials = 64;  // blocks of rows that dweight and dbias are first summed in

// Weight or bias as float32; null if there is none.
const float* floats(const Tensor& t, Scratch& scratch) {
  if (!t.is<bf16>()) return t.as<float>();
  const int64_t n = t.numel();
  float* out = scratch.take<float>(n);
  for_vectors(n, [&](int64_t i, auto count) { store_n(out + i, load_n(t.as<bf16>() + i, count), count); });
  return out;
}

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

template <class T>
void forward(const T* x, const float* weight, const float* bias, float eps, T* y, float* mean, float* rstd,
             int64_t rows, int64_t n) {
  parallel_for(rows, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* xr = x + row * n;
      T* yr = y + row * n;
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

template <class T>
void backward_row(const T* dy, const T* x, const float* weight, float mean, float rstd, T* dx, float* dweight,
                  float* dbias, int64_t n) {
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
    store_n(dx + i, rstd * ((g - average_g) - xhat * average_gx), count);
  });
}

// out += the sum of `blocks` rows of n partials, in their order.
void add_partials(const float* partials, int64_t blocks, int64_t n, float* out) {
  parallel_for(n, kGrain / kMaxPartials, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, auto count) {
      vf total = {};
      for (int64_t b = 0; b < blocks; ++b) total += load_n(partials + b * n + begin + i, count);
      store_n(out + begin + i, load_n(out + begin + i, count) + total, count);
    });
  });
}

template <class T>
void backward(const T* dy, const T* x, const float* weight, const float* mean, const float* rstd, T* dx,
              float* dweight, float* dbias, int64_t rows, int64_t n) {
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
          backward_row(dy + row * n, x + row * n, weight, mean[row], rstd[row], dx ? dx + row * n : nullptr,
                       dw, db, n);
      },
      kMaxPartials);
  if (dweight) add_partials(partial_dweight, blocks, n, dweight);
  if (dbias) add_partials(partial_dbias, blocks, n, dbias);
}

// Runs fn with a value of the element type of x.
template <class Fn> void for_dtype(const Tensor& x, Fn&& fn) {
  if (x.is<float>()) return fn(float{});
  require(x.is<bf16>(), "x must be float32 or bfloat16, got ", x.defined() ? name(x.dtype) : "None");
  fn(bf16{});
}

void require_parameter(const Tensor& t, const char* what, int64_t n) {
  require(!t.defined() || t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
}

}  // namespace

// x (..., n) float32 or bfloat16, contiguous; weight, bias (n) of x's dtype or float32, or None; y like x;
// mean, rstd (rows) float32, not written if None or empty.
void layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps, Tensor y, Tensor mean,
                        Tensor rstd) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    require(x.ndim > 0, "x must have at least one dimension");
    const int64_t n = x.size(-1), count = x.numel();
    require_parameter(weight, "weight", n);
    require_parameter(bias, "bias", n);
    require(y.numel() == count, "y must have ", count, " elements, got ", y.numel());
    if (count == 0) return;
    Scratch scratch;
    forward(x.as<T>(), floats(weight, scratch), floats(bias, scratch), static_cast<float>(eps), y.as<T>(),
            mean.wanted<float>(), rstd.wanted<float>(), count / n, n);
  });
}
FASTLM_EXPORT(layer_norm_forward);

// dy, x (..., n) contiguous, of one dtype; mean, rstd (rows) from the forward; dx like x; dweight, dbias (n)
// float32, added to. An output that is None or empty is not computed.
void layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, double /*eps*/,
                         Tensor dx, Tensor dweight, Tensor dbias) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    require(x.ndim > 0, "x must have at least one dimension");
    const int64_t n = x.size(-1), count = x.numel(), rows = n == 0 ? 0 : count / n;
    require_parameter(weight, "weight", n);
    require(dy.numel() == count, "dy must have ", count, " elements, got ", dy.numel());
    require(mean.numel() == rows && rstd.numel() == rows, "mean and rstd must have ", rows, " elements");
    if (n == 0) return;
    Scratch scratch;
    backward(dy.as<T>(), x.as<T>(), floats(weight, scratch), mean.as<float>(), rstd.as<float>(),
             dx.wanted<T>(), dweight.wanted<float>(), dbias.wanted<float>(), rows, n);
  });
}
FASTLM_EXPORT(layer_norm_backward);

}  // namespace fastlm
