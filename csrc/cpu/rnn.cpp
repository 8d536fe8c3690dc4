// Elman's layer over a whole sequence: a form of recurrent.h.
#include "recurrent.h"

namespace fastlm {
namespace {

template <class Fn> void with_cell(const std::string& nonlinearity, Fn&& fn) {
  require(nonlinearity == "tanh" || nonlinearity == "relu", "nonlinearity must be tanh or relu, got ", nonlinearity);
  if (nonlinearity == "relu") fn(recurrent::Rnn<true>{});
  else fn(recurrent::Rnn<false>{});
}

}  // namespace

// x (seq, batch, hidden); nonlinearity "tanh" or "relu".
void rnn_forward(Tensor x, Tensor weight, Tensor bias, Tensor h0, Tensor lengths, std::string nonlinearity,
                 bool reverse, Tensor y, Tensor h) {
  with_cell(nonlinearity, [&](auto cell) {
    recurrent::forward<decltype(cell)>(x, weight, bias, h0, {}, lengths, reverse, y, h, {}, {}, {});
  });
}
FASTLM_EXPORT(rnn_forward);

void rnn_backward(Tensor dy, Tensor dh, Tensor weight, Tensor h0, Tensor lengths, Tensor y, std::string nonlinearity,
                  bool reverse, Tensor dx, Tensor dweight, Tensor dbias, Tensor dh0) {
  const recurrent::Gradients d{dy, dh, {}, dx, dweight, dbias, dh0, {}};
  with_cell(nonlinearity, [&](auto cell) {
    recurrent::backward<decltype(cell)>(d, weight, h0, {}, lengths, y, {}, {}, reverse);
  });
}
FASTLM_EXPORT(rnn_backward);

}  // namespace fastlm
