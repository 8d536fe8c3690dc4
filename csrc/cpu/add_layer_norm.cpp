// LayerNorm of a residual sum: total = residual + dropout(x + x_bias), rounded; y = norm(total); the gradients of x
// and of residual, which are one without dropout.
#include "norm.h"

namespace fastlm {

// x, residual (..., n) float32 or bfloat16, contiguous, of one dtype; weight, bias, x_bias (n) of that dtype or
// float32, or None; seed one int64, or None without dropout; y, total like x; mean, rstd (rows) float32.
void add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor x_bias, Tensor seed,
                            double eps, double dropout_p, Tensor y, Tensor total, Tensor mean, Tensor rstd) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const Rows r(x, "x");
    require_size(residual, "residual", r.count);
    require_parameter(weight, "weight", r.n);
    require_parameter(bias, "bias", r.n);
    require_parameter(x_bias, "x_bias", r.n);
    require_size(y, "y", r.count);
    require_size(total, "residual_out", r.count);
    if (r.count == 0) return;
    Scratch scratch;
    const ResidualSum<T> sum{residual.as<T>(), floats(x_bias, scratch), total.as<T>(), RowDropout(seed, dropout_p)};
    norm_forward<true, false, T>(x.as<T>(), sum, floats(weight, scratch), floats(bias, scratch),
                                 static_cast<float>(eps), y.as<T>(), mean.wanted<float>(), rstd.wanted<float>(),
                                 r.rows, r.n);
  });
}
FASTLM_EXPORT(add_layer_norm_forward);

// d_y, d_total like total, one of them may be None; dx, d_residual like total, d_residual None where dx is that of
// both; dweight, dbias, dx_bias (n) float32, added to. An output that is None or empty is not computed.
void add_layer_norm_backward(Tensor d_y, Tensor d_total, Tensor weight, Tensor total, Tensor mean, Tensor rstd,
                             Tensor seed, double /*eps*/, double dropout_p, Tensor dx, Tensor d_residual,
                             Tensor dweight, Tensor dbias, Tensor dx_bias) {
  for_dtype(total, [&](auto element) {
    using T = decltype(element);
    const Rows r(total, "residual_out");
    require(d_y.defined() || d_total.defined(), "d_y and d_residual_out must not both be None");
    require_parameter(d_y, "d_y", r.count);
    require_parameter(d_total, "d_residual_out", r.count);
    require_parameter(weight, "weight", r.n);
    require(mean.numel() == r.rows && rstd.numel() == r.rows, "mean and rstd must have ", r.rows, " elements");
    if (r.count == 0) return;
    const SplitGradient<T> split{dx.wanted<T>(), d_residual.wanted<T>(), RowDropout(seed, dropout_p)};
    if (!d_y.defined()) return sum_backward(d_total.as<T>(), split, dx_bias.wanted<float>(), r.rows, r.n);
    Scratch scratch;
    norm_backward<true, false, T>(d_y.as<T>(), d_total.as<T>(), total.as<T>(), floats(weight, scratch),
                                  mean.as<float>(), rstd.as<float>(), split, dweight.wanted<float>(),
                                  dbias.wanted<float>(), dx_bias.wanted<float>(), r.rows, r.n);
  });
}
FASTLM_EXPORT(add_layer_norm_backward);

}  // namespace fastlm
