// LSTM over a whole sequence: a form of recurrent.h.
#include "recurrent.h"

namespace fastlm {

// x (seq, batch, 4 hidden), gates and their order in weight, bias and gates: i, f, g, o.
void lstm_forward(Tensor x, Tensor weight, Tensor bias, Tensor h0, Tensor c0, Tensor lengths, bool reverse, Tensor y,
                  Tensor h, Tensor c, Tensor gates, Tensor cells) {
  recurrent::forward<recurrent::Lstm>(x, weight, bias, h0, c0, lengths, reverse, y, h, c, gates, cells);
}
FASTLM_EXPORT(lstm_forward);

void lstm_backward(Tensor dy, Tensor dh, Tensor dc, Tensor weight, Tensor h0, Tensor c0, Tensor lengths, Tensor y,
                   Tensor gates, Tensor cells, bool reverse, Tensor dx, Tensor dweight, Tensor dbias, Tensor dh0,
                   Tensor dc0) {
  const recurrent::Gradients d{dy, dh, dc, dx, dweight, dbias, dh0, dc0};
  recurrent::backward<recurrent::Lstm>(d, weight, h0, c0, lengths, y, gates, cells, reverse);
}
FASTLM_EXPORT(lstm_backward);

}  // namespace fastlm
