// SGD with momentum over flat buffers in place; the formulas stand in fastlm/ops/sgd.py.
#include "optimizer.h"

namespace fastlm {

// momentum_buffer (n) float32 or bfloat16, or None without momentum; the rest as adamw_forward takes it.
void sgd_forward(Tensor master, Tensor grad, Tensor momentum_buffer, Tensor step, Tensor param,
                 Tensor decay_mask, Tensor seed, Tensor norm, Tensor offsets, Tensor lr, double momentum,
                 double dampening, bool nesterov, double weight_decay, double max_norm, bool zero_grad,
                 Tensor grad_norm, Tensor skipped) {
  const StepArguments arguments{master,  grad, step,         param,    decay_mask, seed,      norm,
                                offsets, lr,   weight_decay, max_norm, zero_grad,  grad_norm, skipped};
  optimizer_step(arguments, {momentum_buffer}, [&](double t, double lr_now) {
    const auto rate = static_cast<float>(lr_now), decay = static_cast<float>(weight_decay);
    const auto kept = static_cast<float>(momentum),
               fresh = static_cast<float>(t == 1.0 ? 1.0 : 1.0 - dampening);
    return [=](const Piece& x) {
      for_vectors(x.n, [&](int64_t i, auto count) {
        vf p = load_n(x.p + i, count);
        vf g = load_n(x.g + i, count) * x.clip;
        g = fma(decay_n(x, i, count, decay), p, g);
        if (float* buffer = x.state[0]) {
          g *= fresh;
          const vf b = fma(load_n(buffer + i, count), splat(kept), g);
          store_n(buffer + i, b, count);
          g = nesterov ? fma(b, splat(kept), g) : b;
        }
        store_n(x.p + i, p - rate * g, count);
      });
    };
  });
}
FASTLM_EXPORT(sgd_forward);

}  // namespace fastlm
