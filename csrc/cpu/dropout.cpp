// Dropout: a form of activation.h that is the identity. Backward is forward with dy for x.
#include "activation.h"

namespace fastlm {
namespace {

struct Identity {
  template <class T> static activation::Pair at(vf u) { return {u, splat(1.0f)}; }
};

}  // namespace

// x any shape, float32 or bfloat16, contiguous; seed one int64; y like x.
void dropout_forward(Tensor x, Tensor seed, double p, Tensor y) {
  require(seed.defined(), "seed must be a tensor, got None");
  activation::forward<Identity>({x, {}, {}, {}}, seed, p, y);
}
FASTLM_EXPORT(dropout_forward);

// dy, dx as x, y.
void dropout_backward(Tensor dy, Tensor seed, double p, Tensor dx) {
  if (dx.defined()) dropout_forward(dy, seed, p, dx);
}
FASTLM_EXPORT(dropout_backward);

}  // namespace fastlm
