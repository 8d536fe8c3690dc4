// LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias, and its gradients.
#include "norm.h"

namespace fastlm {

// x (..., n) float32 or bfloat16, contiguous; weight, bias (n) of x's dtype or float32, or None; y like x;
// mean, rstd (rows) float32, not written if None or empty.
void layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps, Tensor y, Tensor mean,
                        Tensor rstd) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const Rows r(x, "x");
    require_parameter(weight, "weight", r.n);
    require_parameter(bias, "bias", r.n);
    require_size(y, "y", r.count);
    if (r.count == 0) return;
    Scratch scratch;
    norm_forward<true, false, T>(x.as<T>(), {}, floats(weight, scratch), floats(bias, scratch),
                                 static_cast<float>(eps), y.as<T>(), mean.wanted<float>(),
                                 rstd.wanted<float>(), r.rows, r.n);
  });
}
FASTLM_EXPORT(layer_norm_forward);

// dy, x (..., n) contiguous, of one dtype; mean, rstd (rows) from the forward; dx like x; dweight, dbias (n)
// float32, added to. An output that is None or empty is not computed.
void layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, double /*eps*/,
                         Tensor dx, Tensor dweight, Tensor dbias) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const Rows r(x, "x");
    require_parameter(weight, "weight", r.n);
    require_size(dy, "dy", r.count);
    require(mean.numel() == r.rows && rstd.numel() == r.rows, "mean and rstd must have ", r.rows, " elements");
    if (r.count == 0) return;
    Scratch scratch;
    SplitGradient<T> split;
    split.dx = dx.wanted<T>();
    norm_backward<true, false, T>(dy.as<T>(), nullptr, x.as<T>(), floats(weight, scratch), mean.as<float>(),
                                  rstd.as<float>(), split, dweight.wanted<float>(), dbias.wanted<float>(),
                                  nullptr, r.rows, r.n);
  });
}
FASTLM_EXPORT(layer_norm_backward);

}  // namespace fastlm
