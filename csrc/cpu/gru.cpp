// GRU over a whole sequence: a form of recurrent.h.
#include "recurrent.h"

namespace fastlm {

// x (seq, batch, 3 hidden) in the order r, z, n; gates (seq, batch, 4 hidden): r, z, n and n's recurrent part.
void gru_forward(Tensor x, Tensor weight, Tensor bias, Tensor h0, Tensor lengths, bool reverse, Tensor y, Tensor h,
                 Tensor gates) {
  recurrent::forward<recurrent::Gru>(x, weight, bias, h0, {}, lengths, reverse, y, h, {}, gates, {});
}
FASTLM_EXPORT(gru_forward);

void gru_backward(Tensor dy, Tensor dh, Tensor weight, Tensor h0, Tensor lengths, Tensor y, Tensor gates, bool reverse,
                  Tensor dx, Tensor dweight, Tensor dbias, Tensor dh0) {
  const recurrent::Gradients d{dy, dh, {}, dx, dweight, dbias, dh0, {}};
  recurrent::backward<recurrent::Gru>(d, weight, h0, {}, lengths, y, gates, {}, reverse);
}
FASTLM_EXPORT(gru_backward);

}  // namespace fastlm
