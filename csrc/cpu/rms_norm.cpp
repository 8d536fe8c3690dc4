// RMSNorm over the last dimension: y = x * rstd * (weight + offset), rstd = 1 / sqrt(average(x^2) + eps), and its
// gradients.
#include "norm.h"

namespace fastlm {

// x (..., n) float32 or bfloat16, contiguous; weight (n) of x's dtype or float32, or None; casting "gemma", or
// "llama" to round x * rstd to x's dtype; y like x; rstd (rows) float32, not written if None or empty.
void rms_norm_forward(Tensor x, Tensor weight, double eps, double offset, std::string casting, Tensor y, Tensor rstd) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const Rows r(x, "x");
    require_parameter(weight, "weight", r.n);
    require_size(y, "y", r.count);
    if (r.count == 0) return;
    Scratch scratch;
    const float* w = scale(weight, offset, scratch);
    with_flag(is_llama(casting), [&](auto llama) {
      norm_forward<false, llama, T>(x.as<T>(), {}, w, nullptr, static_cast<float>(eps), y.as<T>(), nullptr,
                                    rstd.wanted<float>(), r.rows, r.n);
    });
  });
}
FASTLM_EXPORT(rms_norm_forward);

// dy, x (..., n) contiguous, of one dtype; rstd (rows) from the forward; dx like x; dweight (n) float32, added to.
// An output that is None or empty is not computed.
void rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, double /*eps*/, double offset,
                       std::string casting, Tensor dx, Tensor dweight) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const Rows r(x, "x");
    require_parameter(weight, "weight", r.n);
    require_size(dy, "dy", r.count);
    require_size(rstd, "rstd", r.rows);
    if (r.count == 0) return;
    Scratch scratch;
    const float* w = scale(weight, offset, scratch);
    SplitGradient<T> split;
    split.dx = dx.wanted<T>();
    with_flag(is_llama(casting), [&](auto llama) {
      norm_backward<false, llama, T>(dy.as<T>(), nullptr, x.as<T>(), w, nullptr, rstd.as<float>(), split,
                                     dweight.wanted<float>(), nullptr, nullptr, r.rows, r.n);
    });
  });
}
FASTLM_EXPORT(rms_norm_backward);

}  // namespace fastlm
