// Lion over flat buffers in place; the formulas stand in fastlm/ops/lion.py.
#include "optimizer.h"

namespace fastlm {

// exp_avg (n) float32 or bfloat16; the rest as adamw_forward takes it.
void lion_forward(Tensor master, Tensor grad, Tensor exp_avg, Tensor step, Tensor param, Tensor decay_mask,
                  Tensor seed, Tensor norm, Tensor offsets, Tensor lr, double beta1, double beta2,
                  double weight_decay, double max_norm, bool zero_grad, Tensor grad_norm, Tensor skipped) {
  const StepArguments arguments{master,  grad, step,         param,    decay_mask, seed,      norm,
                                offsets, lr,   weight_decay, max_norm, zero_grad,  grad_norm, skipped};
  optimizer_step(arguments, {exp_avg}, [&](double, double lr_now) {
    const auto rate = static_cast<float>(lr_now), decay = static_cast<float>(lr_now * weight_decay);
    const auto b1 = static_cast<float>(beta1), to_c = static_cast<float>(1.0 - beta1);
    const auto b2 = static_cast<float>(beta2), to_m = static_cast<float>(1.0 - beta2);
    return [=](const Piece& x) {
      for_vectors(x.n, [&](int64_t i, auto count) {
        const vf g = load_n(x.g + i, count) * x.clip, m = load_n(x.state[0] + i, count);
        const vf c = fma(m, splat(b1), g * to_c);
        const vf sign =
            select(c > 0.0f, splat(1.0f), select(c < 0.0f, splat(-1.0f), c));  // of 0, NaN themselves
        vf p = load_n(x.p + i, count);
        p -= decay_n(x, i, count, decay) * p;
        store_n(x.p + i, p - rate * sign, count);
        store_n(x.state[0] + i, fma(m, splat(b2), g * to_m), count);
      });
    };
  });
}
FASTLM_EXPORT(lion_forward);

}  // namespace fastlm
