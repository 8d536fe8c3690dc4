// LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias, and its gradients.
#include "layer_norm.h"

namespace fastlm {

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
    require_size(y, "y", count);
    if (count == 0) return;
    Scratch scratch;
    norm_forward<T>(x.as<T>(), nullptr, floats(weight, scratch), floats(bias, scratch),
                    static_cast<float>(eps), y.as<T>(), nullptr, mean.wanted<float>(), rstd.wanted<float>(),
                    count / n, n);
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
    require_size(dy, "dy", count);
    require(mean.numel() == rows && rstd.numel() == rows, "mean and rstd must have ", rows, " elements");
    if (count == 0) return;
    Scratch scratch;
    norm_backward<T>(dy.as<T>(), nullptr, x.as<T>(), floats(weight, scratch), mean.as<float>(),
                     rstd.as<float>(), dx.wanted<T>(), dweight.wanted<float>(), dbias.wanted<float>(), rows,
                     n);
  });
}
FASTLM_EXPORT(layer_norm_backward);

}  // namespace fastlm
