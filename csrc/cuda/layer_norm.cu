// LayerNorm over the last dimension: y = (x - mean) * rstd * weight + bias, and its gradients.
#include "norm.cuh"

namespace fastlm {

// x (..., n) float32, float16 or bfloat16, contiguous; weight, bias (n) of x's dtype or float32, or None; y
// like x; mean, rstd (rows) float32, not written if None or empty.
void layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps, Tensor y, Tensor mean, Tensor rstd,
                        int64_t stream) {
  for_dtype(x, "x", [&](auto element) {
    norm_forward<true, false, decltype(element)>(x, weight, bias, 0.0, eps, y, mean, rstd, stream);
  });
}
FASTLM_EXPORT(layer_norm_forward);

// Bytes of workspace for layer_norm_backward with these arguments.
int64_t layer_norm_backward_workspace(Tensor /*dy*/, Tensor x, Tensor /*weight*/, Tensor /*mean*/,
                                      Tensor /*rstd*/, double /*eps*/, Tensor /*dx*/, Tensor dweight,
                                      Tensor dbias) {
  return norm_workspace<true>(x, dweight, dbias);
}
FASTLM_EXPORT(layer_norm_backward_workspace);

// dy, x (..., n) contiguous, of one dtype; mean, rstd (rows) from the forward; dx like x; dweight, dbias (n)
// float32, added to. An output that is None or empty is not computed; workspace as many bytes as
// layer_norm_backward_workspace says.
void layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, double /*eps*/,
                         Tensor dx, Tensor dweight, Tensor dbias, Tensor workspace, int64_t stream) {
  for_dtype(x, "x", [&](auto element) {
    norm_backward<true, false, decltype(element)>(dy, x, weight, 0.0, mean, rstd, dx, dweight, dbias, workspace,
                                                  stream);
  });
}
FASTLM_EXPORT(layer_norm_backward);

}  // namespace fastlm
