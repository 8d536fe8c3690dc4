// ReLU of one half of a projection, times the other, and dropout after it: a form of activation.h.
#include "activation.h"

namespace fastlm {

using namespace activation;

// gate, up (..., n) float32 or bfloat16, their last dimension contiguous, or gate packed (..., 2 n) and up None;
// biases of gate's dtype or float32, or None; seed one int64, or None for no dropout; y (..., n) contiguous.
void reglu_forward(Tensor gate, Tensor up, Tensor gate_bias, Tensor up_bias, Tensor seed, 
                    bool up_first, double dropout_p, Tensor y) {
  const Given in{gate, up, gate_bias, up_bias, true, !up.defined(), up_first};
  forward<Relu>(in, seed, dropout_p, y);
}
FASTLM_EXPORT(reglu_forward);

// dy like y; gradients like the inputs, those of biases float32 and added to. One that is None or empty is not
// computed.
void reglu_backward(Tensor dy, Tensor gate, Tensor up, Tensor gate_bias, Tensor up_bias, Tensor seed, 
                     bool up_first, double dropout_p, Tensor d_gate, Tensor d_up, Tensor d_gate_bias,
                     Tensor d_up_bias) {
  const Given in{gate, up, gate_bias, up_bias, true, !up.defined(), up_first};
  const Given d{d_gate, d_up, d_gate_bias, d_up_bias, true, !up.defined(), up_first};
  backward<Relu>(dy, in, seed, dropout_p, d);
}
FASTLM_EXPORT(reglu_backward);

}  // namespace fastlm
