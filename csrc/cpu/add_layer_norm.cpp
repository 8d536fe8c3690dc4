// LayerNorm of a residual sum: total = x + residual, rounded; y = norm(total); the gradient of x and of
// residual.
#include "layer_norm.h"

namespace fastlm {

// x, residual (..., n) float32 or bfloat16, contiguous, of one dtype; weight, bias (n) of that dtype or
// float32, or None; y, total like x; mean, rstd (rows) float32.
void add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps, Tensor y,
                            Tensor total, Tensor mean, Tensor rstd) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    require(x.ndim > 0, "x must have at least one dimension");
    const int64_t n = x.size(-1), count = x.numel();
    require_size(residual, "residual", count);
    require_parameter(weight, "weight", n);
    require_parameter(bias, "bias", n);
    require_size(y, "y", count);
    require_size(total, "residual_out", count);
    if (count == 0) return;
    Scratch scratch;
    norm_forward<T>(x.as<T>(), residual.as<T>(), floats(weight, scratch), floats(bias, scratch),
                    static_cast<float>(eps), y.as<T>(), total.as<T>(), mean.wanted<float>(),
                    rstd.wanted<float>(), count / n, n);
  });
}
FASTLM_EXPORT(add_layer_norm_forward);

// d_y, d_total like total, one of them may be None; dx, the gradient of x and of residual, like total;
// dweight, dbias (n) float32, added to. An output that is None or empty is not computed.
void add_layer_norm_backward(Tensor d_y, Tensor d_total, Tensor weight, Tensor total, Tensor mean,
                             Tensor rstd, double /*eps*/, Tensor dx, Tensor dweight, Tensor dbias) {
  for_dtype(total, [&](auto element) {
    using T = decltype(element);
    require(total.ndim > 0, "residual_out must have at least one dimension");
    const int64_t n = total.size(-1), count = total.numel(), rows = n == 0 ? 0 : count / n;
    require(d_y.defined() || d_total.defined(), "d_y and d_residual_out must not both be None");
    require_parameter(d_y, "d_y", count);
    require_parameter(d_total, "d_residual_out", count);
    require_parameter(weight, "weight", n);
    require(mean.numel() == rows && rstd.numel() == rows, "mean and rstd must have ", rows, " elements");
    if (count == 0) return;
    if (!d_y.defined()) {
      if (T* out = dx.wanted<T>())
        parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
          std::memcpy(out + begin, d_total.as<T>() + begin, static_cast<size_t>(end - begin) * sizeof(T));
        });
      return;
    }
    Scratch scratch;
    norm_backward<T>(d_y.as<T>(), d_total.as<T>(), total.as<T>(), floats(weight, scratch), mean.as<float>(),
                     rstd.as<float>(), dx.wanted<T>(), dweight.wanted<float>(), dbias.wanted<float>(), rows,
                     n);
  });
}
FASTLM_EXPORT(add_layer_norm_backward);

}  // namespace fastlm
