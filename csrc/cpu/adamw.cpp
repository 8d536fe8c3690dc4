// AdamW over flat buffers in place; the formulas stand in fastlm/ops/adamw.py.
#include "optimizer.h"

namespace fastlm {

// master, grad, exp_avg, exp_avg_sq (n) float32 or bfloat16 each, contiguous; step a float32 or int64 scalar;
// param (n) float32 or bfloat16, or None; decay_mask (n) bool or uint8, or None; seed one int64, or None;
// norm a float32 scalar, or None; offsets (segments + 1) int64, or None; lr a float32 scalar; trail (n) int16
// beside a bfloat16 master, or None. All up to param, and trail, are changed. grad_norm and skipped: float32 scalars, written.
void adamw_forward(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor param,
                   Tensor decay_mask, Tensor seed, Tensor norm, Tensor offsets, Tensor lr, Tensor trail,
                   double beta1, double beta2, double eps, double weight_decay, double max_norm, bool zero_grad,
                   Tensor grad_norm, Tensor skipped) {
  const StepArguments arguments{master,  grad, step,         param,    decay_mask, seed,      norm,
                                offsets, lr,   weight_decay, max_norm, zero_grad,  grad_norm, skipped, trail};
  optimizer_step(arguments, {exp_avg, exp_avg_sq}, [&](double t, double lr_now) {
    const auto decay = static_cast<float>(lr_now * weight_decay);
    const auto rate = static_cast<float>(lr_now / (1.0 - std::pow(beta1, t)));
    const auto root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
    const auto b1 = static_cast<float>(beta1), to_m = static_cast<float>(1.0 - beta1);
    const auto b2 = static_cast<float>(beta2), to_v = static_cast<float>(1.0 - beta2);
    const auto tiny = static_cast<float>(eps);
    return [=](const Piece& x) {
      for_vectors(x.n, [&](int64_t i, auto count) {
        const vf g = load_n(x.g + i, count) * x.clip;
        const vf m = fma(load_n(x.state[0] + i, count), splat(b1), g * to_m);  // exactly g for beta1 = 0
        const vf v = fma(load_n(x.state[1] + i, count), splat(b2), g * g * to_v);
        vf p = load_n(x.p + i, count);
        p -= decay_n(x, i, count, decay) * p;
        p -= rate * m / fma(sqrt(v), splat(root), splat(tiny));
        store_n(x.state[0] + i, m, count);
        store_n(x.state[1] + i, v, count);
        store_n(x.p + i, p, count);
      });
    };
  });
}
FASTLM_EXPORT(adamw_forward);

}  // namespace fastlm
