// RMSNorm over the last dimension: y = x * rstd * weight, rstd = 1 / sqrt(average(x^2) + eps), and its gradients
//
//   xhat = x * rstd,  g = dy * weight
//   dx = rstd * (g - xhat * average(g * xhat)),  dweight += sum over rows of dy * xhat
//
// A row stays in the first-level cache between its two passes, so memory is read and written once. Arithmetic is
// float32.
#include "rows.h"

namespace fastlm {
namespace {

template <class T>
void forward_row(const T* x, const float* weight, float eps, T* y, float* rstd, int64_t n) {
  const auto [squares] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) {
    const vf v = load_n(x + i, count);  // 0 in the lanes beyond the row
    t[0] = fma(v, v, t[0]);
  });
  const float r = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for_vectors(n, [&](int64_t i, auto count) {
    vf v = load_n(x + i, count) * r;
    if (weight) v *= load_n(weight + i, count);
    store_n(y + i, v, count);
  });
  if (rstd) *rstd = r;
}

template <class T>
void backward_row(const T* dy, const T* x, const float* weight, float rstd, T* dx, float* dweight, int64_t n) {
  const auto [dot] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) {
    const vf d = load_n(dy + i, count), product = d * (load_n(x + i, count) * rstd);
    if (dweight) store_n(dweight + i, load_n(dweight + i, count) + product, count);
    t[0] += weight ? product * load_n(weight + i, count) : product;
  });
  if (!dx) return;
  const float average = dot / static_cast<float>(n);
  for_vectors(n, [&](int64_t i, auto count) {
    const vf xhat = load_n(x + i, count) * rstd, d = load_n(dy + i, count);
    const vf g = weight ? d * load_n(weight + i, count) : d;
    store_n(dx + i, rstd * (g - xhat * average), count);
  });
}

}  // namespace

// x (..., n) float32 or bfloat16, contiguous; weight (n) of x's dtype or float32, or None; y like x; rstd (rows)
// float32, not written if None or empty.
void rms_norm_forward(Tensor x, Tensor weight, double eps, Tensor y, Tensor rstd) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    require(x.ndim > 0, "x must have at least one dimension");
    const int64_t n = x.size(-1), count = x.numel();
    require_parameter(weight, "weight", n);
    require_size(y, "y", count);
    if (count == 0) return;
    Scratch scratch;
    const float* w = floats(weight, scratch);
    float* r = rstd.wanted<float>();
    parallel_for(count / n, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        forward_row(x.as<T>() + row * n, w, static_cast<float>(eps), y.as<T>() + row * n, r ? r + row : nullptr,
                    n);
    });
  });
}
FASTLM_EXPORT(rms_norm_forward);

// dy, x (..., n) contiguous, of one dtype; rstd (rows) from the forward; dx like x; dweight (n) float32, added to.
// An output that is None or empty is not computed.
void rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, double /*eps*/, Tensor dx, Tensor dweight) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    require(x.ndim > 0, "x must have at least one dimension");
    const int64_t n = x.size(-1), count = x.numel(), rows = n == 0 ? 0 : count / n;
    require_parameter(weight, "weight", n);
    require_size(dy, "dy", count);
    require_size(rstd, "rstd", rows);
    if (count == 0) return;
    Scratch scratch;
    const float *w = floats(weight, scratch), *r = rstd.as<float>();
    float* total = dweight.wanted<float>();
    T* out = dx.wanted<T>();
    const int64_t grain = (kGrain + n - 1) / n, blocks = block_count(rows, grain, kMaxPartials);
    float* partials = total ? scratch.take<float>(blocks * n) : nullptr;
    parallel_for(
        rows, grain,
        [&](int64_t begin, int64_t end, int64_t block) {
          float* partial = total ? partials + block * n : nullptr;
          if (partial) std::fill(partial, partial + n, 0.0f);
          for (int64_t row = begin; row < end; ++row)
            backward_row(dy.as<T>() + row * n, x.as<T>() + row * n, w, r[row], out ? out + row * n : nullptr, partial,
                         n);
        },
        kMaxPartials);
    if (total) add_partials(partials, blocks, n, total);
  });
}
FASTLM_EXPORT(rms_norm_backward);

}  // namespace fastlm
