// AdamW over flat buffers in place, with the global norm of the gradient, clipping, and the model-dtype copy;
// the formulas stand in fastlm/ops/adamw.py.
//
// Two passes over memory: one reads the gradient for its norm, one does all the rest at the speed of a copy.
#include "vec.h"

namespace fastlm {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a block of their own

typedef float half_vf __attribute__((vector_size(W * 2)));  // W / 2 elements
typedef double vd __attribute__((vector_size(W * 4)));      // the same in float64
typedef uint8_t vb __attribute__((vector_size(W)));

// In float64 no square of a float32 overflows.
double sum_of_squares(const float* x, int64_t n) {
  constexpr int kLanes = W / 2, kChains = 4;  // so many sums hide the latency of an addition
  vd sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) {
      half_vf narrow;
      std::memcpy(&narrow, x + i + c * kLanes, sizeof narrow);
      const vd wide = __builtin_convertvector(narrow, vd);
      sums[c] += wide * wide;
    }
  const vd total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double result = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  for (; i < n; ++i) result += static_cast<double>(x[i]) * x[i];
  return result;
}

double norm_of(const float* x, int64_t n) {
  const int64_t blocks = block_count(n, kGrain);
  Scratch scratch;
  double* partials = scratch.take<double>(blocks);
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end, int64_t block) {
    partials[block] = sum_of_squares(x + begin, end - begin);
  });
  double total = 0.0;
  for (int64_t b = 0; b < blocks; ++b) total += partials[b];
  return std::sqrt(total);
}

struct Factors {
  float clip;   // of the gradient
  float decay;  // lr * weight_decay
  float rate;   // lr / (1 - beta1^t)
  float root;   // 1 / sqrt(1 - beta2^t)
  float beta2, eps;
  float beta1, one_minus_beta1, one_minus_beta2;
};

vi mask_n(const uint8_t* p, std::integral_constant<int, W>) {
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, vi) != 0;
}
vi mask_n(const uint8_t* p, int n) {
  vi mask = {};
  for (int i = 0; i < n; ++i) mask[i] = p[i] ? -1 : 0;
  return mask;
}

template <class P>
void sweep(float* master, float* grad, float* exp_avg, float* exp_avg_sq, P* param, const uint8_t* mask,
           const Factors& f, bool zero_grad, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) {
    const vf g = load_n(grad + i, count) * f.clip;
    vf m = load_n(exp_avg + i, count), v = load_n(exp_avg_sq + i, count), p = load_n(master + i, count);
    const vf decay = mask ? select(mask_n(mask + i, count), splat(f.decay), vf{}) : splat(f.decay);
    m = fma(m, splat(f.beta1), g * f.one_minus_beta1);  // exactly g for beta1 = 0
    v = fma(v, splat(f.beta2), g * g * f.one_minus_beta2);
    p -= decay * p;
    p -= f.rate * m / fma(sqrt(v), splat(f.root), splat(f.eps));
    store_n(exp_avg + i, m, count);
    store_n(exp_avg_sq + i, v, count);
    store_n(master + i, p, count);
    if (param) store_n(param + i, p, count);
    if (zero_grad) store_n(grad + i, vf{}, count);
  });
}

template <class Count> void finish(Count* step, double lr, double beta1, double beta2, Factors& f) {
  const double t = static_cast<double>(*step) + 1.0;
  f.rate = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
  f.root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
  *step = static_cast<Count>(t);
}

template <class P>
void update(const Tensor& master, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
            P* param, const uint8_t* mask, const Factors& f, bool zero_grad) {
  const int64_t n = master.numel();
  float *p = master.as<float>(), *g = grad.as<float>(), *m = exp_avg.as<float>(), *v = exp_avg_sq.as<float>();
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    sweep(p + begin, g + begin, m + begin, v + begin, param ? param + begin : nullptr,
          mask ? mask + begin : nullptr, f, zero_grad, end - begin);
  });
}

void require_buffer(const Tensor& t, const char* what, int64_t n) {
  require(t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
}

}  // namespace

// master, grad, exp_avg, exp_avg_sq (n) float32, contiguous; step a float32 or int64 scalar; param (n)
// float32 or bfloat16, or None; decay_mask (n) bool or uint8, or None; lr a float32 scalar. All but the last
// two are changed. grad_norm and skipped: float32 scalars, written.
void adamw_forward(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor param,
                   Tensor decay_mask, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                   double max_norm, bool zero_grad, Tensor grad_norm, Tensor skipped) {
  const int64_t n = master.numel();
  require_buffer(grad, "grad", n);
  require_buffer(exp_avg, "exp_avg", n);
  require_buffer(exp_avg_sq, "exp_avg_sq", n);
  if (param.defined()) require_buffer(param, "param", n);
  if (decay_mask.defined()) require_buffer(decay_mask, "decay_mask", n);
  require_buffer(step, "step", 1);
  require_buffer(lr, "lr", 1);
  require_buffer(grad_norm, "grad_norm", 1);
  require_buffer(skipped, "skipped", 1);
  const auto* mask = static_cast<const uint8_t*>(decay_mask.data);
  require(!mask || decay_mask.is<bool>() || decay_mask.is<uint8_t>(),
          "decay_mask must be bool or uint8, got ", name(decay_mask.dtype));

  const float norm = static_cast<float>(norm_of(grad.as<float>(), n));
  const bool applied = std::isfinite(norm);
  *grad_norm.as<float>() = norm;
  *skipped.as<float>() = applied ? 0.0f : 1.0f;
  if (!applied) {
    float* g = grad.as<float>();
    if (zero_grad)
      parallel_for(n, kGrain, [&](int64_t begin, int64_t end) { std::fill(g + begin, g + end, 0.0f); });
    return;
  }
  const double rate = *lr.as<float>();
  Factors f{};
  const bool clipping = max_norm > 0.0 && std::isfinite(max_norm);
  f.clip = clipping ? static_cast<float>(std::min(1.0, max_norm / (norm + 1e-6))) : 1.0f;
  f.decay = static_cast<float>(rate * weight_decay);
  f.beta2 = static_cast<float>(beta2);
  f.eps = static_cast<float>(eps);
  f.beta1 = static_cast<float>(beta1);
  f.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  f.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  if (step.is<int64_t>()) finish(step.as<int64_t>(), rate, beta1, beta2, f);
  else finish(step.as<float>(), rate, beta1, beta2, f);

  if (param.is<bf16>()) update(master, grad, exp_avg, exp_avg_sq, param.as<bf16>(), mask, f, zero_grad);
  else update(master, grad, exp_avg, exp_avg_sq, param.as<float>(), mask, f, zero_grad);
}
FASTLM_EXPORT(adamw_forward);

}  // namespace fastlm
