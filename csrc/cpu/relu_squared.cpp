// The square of ReLU of x + bias, and dropout after it: a form of activation.h.
#include "activation.h"

namespace fastlm {

using namespace activation;

// x (..., n) float32 or bfloat16, the last dimension contiguous; bias (n) of x's dtype or float32, or None; seed
// one int64, or None for no dropout; y like x, contiguous.
void relu_squared_forward(Tensor x, Tensor bias, Tensor seed, double dropout_p, Tensor y) {
  forward<ReluSquared>(Given{x, {}, bias, {}}, seed, dropout_p, y);
}
FASTLM_EXPORT(relu_squared_forward);

// dy, dx like x; dbias (n) float32, added to. An output that is None or empty is not computed.
void relu_squared_backward(Tensor dy, Tensor x, Tensor bias, Tensor seed, double dropout_p, Tensor dx,
                  Tensor dbias) {
  backward<ReluSquared>(dy, Given{x, {}, bias, {}}, seed, dropout_p, Given{dx, {}, dbias, {}});
}
FASTLM_EXPORT(relu_squared_backward);

}  // namespace fastlm
