// AdamW over flat buffers in place; the formulas stand in fastlm/ops/adamw.py.
//
// Three kernels, none of which the host waits for: sums of squares in float64 over at most kBlocks blocks,
// cut as a function of n only; one block that adds them in a fixed order and decides about norm, clip, bias
// corrections and whether the step counts; and the sweep, 16 bytes of each float32 buffer a thread. A step
// that is skipped reads one number and writes nothing but the zeros of the gradient.
#include "device.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1024;

// What the finish leaves for the sweep, in the workspace before the partial sums.
struct Factors {
  float clip;   // of the gradient
  float decay;  // lr * weight_decay
  float rate;   // lr / (1 - beta1^t)
  float root;   // 1 / sqrt(1 - beta2^t)
};

struct Options {
  double beta1, beta2, eps, weight_decay, max_norm;
};

template <int VEC> __host__ __device__ inline int64_t pack_count(int64_t n) { return (n + VEC - 1) / VEC; }

int64_t norm_blocks(int64_t n) {
  const int64_t blocks = (n + 4 * kThreads - 1) / (4 * kThreads);
  return blocks < kBlocks ? blocks : kBlocks;
}

// The sum over all threads of the block, of which there are a whole number of warps; thread 0 gets it.
__device__ inline double block_sum(double v) {
  __shared__ double warps[32];
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v += __shfl_down_sync(0xffffffffu, v, s);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  v = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0;
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v += __shfl_down_sync(0xffffffffu, v, s);
  return v;
}

// In float64 no square of a float32 overflows.
template <int VEC>
__global__ void __launch_bounds__(kThreads) norm_kernel(const float* grad, double* partials, int64_t n) {
  double total = 0.0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * VEC;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC; i < n; i += stride) {
    if (i + VEC <= n) {
      float g[VEC];
      load_pack<VEC>(grad + i, g);
#pragma unroll
      for (int j = 0; j < VEC; ++j) total += static_cast<double>(g[j]) * g[j];
    } else {
      for (int64_t j = i; j < n; ++j) total += static_cast<double>(grad[j]) * grad[j];
    }
  }
  total = block_sum(total);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

template <class Count>
__global__ void __launch_bounds__(kBlocks)
    finish_kernel(const double* partials, int blocks, const float* lr, Count* step, float* grad_norm,
                  float* skipped, Factors* factors, Options o) {
  const double total = block_sum(threadIdx.x < blocks ? partials[threadIdx.x] : 0.0);
  if (threadIdx.x != 0) return;
  const float norm = static_cast<float>(sqrt(total));
  const bool applied = norm < INFINITY;  // false for NaN too
  const bool clipping = o.max_norm > 0.0 && o.max_norm < INFINITY;
  const double t = static_cast<double>(*step) + 1.0, rate = *lr;
  factors->clip = clipping ? static_cast<float>(fmin(1.0, o.max_norm / (norm + 1e-6))) : 1.0f;
  factors->decay = static_cast<float>(rate * o.weight_decay);
  factors->rate = static_cast<float>(rate / (1.0 - pow(o.beta1, t)));
  factors->root = static_cast<float>(1.0 / sqrt(1.0 - pow(o.beta2, t)));
  *grad_norm = norm;
  *skipped = applied ? 0.0f : 1.0f;
  if (applied) *step = static_cast<Count>(t);
}

// VEC elements from p + i on, or those of them that lie below n.
template <int VEC, class T>
__device__ inline void load_below(const T* p, int64_t i, int64_t n, float (&out)[VEC]) {
  if (i + VEC <= n) return load_pack<VEC>(p + i, out);
#pragma unroll
  for (int j = 0; j < VEC; ++j) out[j] = i + j < n ? to_f32(p[i + j]) : 0.0f;
}

template <int VEC, class T>
__device__ inline void store_below(T* p, int64_t i, int64_t n, const float (&in)[VEC]) {
  if (i + VEC <= n) return store_pack<VEC>(p + i, in);
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    if (i + j < n) p[i + j] = from_f32<T>(in[j]);
}

template <class P, int VEC>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(float* master, float* grad, float* exp_avg, float* exp_avg_sq, P* param, const uint8_t* mask,
                 const float* skipped, const Factors* factors, float beta1, float one_minus_beta1,
                 float beta2, float one_minus_beta2, float eps, bool zero_grad, int64_t n) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
  if (i >= n) return;
  if (*skipped == 0.0f) {
    const Factors f = *factors;
    float p[VEC], g[VEC], m[VEC], v[VEC], decays[VEC];
    load_below<VEC>(grad, i, n, g);
    load_below<VEC>(master, i, n, p);
    load_below<VEC>(exp_avg, i, n, m);
    load_below<VEC>(exp_avg_sq, i, n, v);
    if (mask) load_below<VEC>(mask, i, n, decays);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      g[j] *= f.clip;
      m[j] = beta1 * m[j] + one_minus_beta1 * g[j];  // exactly g for beta1 = 0
      v[j] = beta2 * v[j] + one_minus_beta2 * g[j] * g[j];
      if (!mask || decays[j] != 0.0f) p[j] -= f.decay * p[j];
      p[j] -= f.rate * m[j] / (sqrtf(v[j]) * f.root + eps);
    }
    store_below<VEC>(master, i, n, p);
    store_below<VEC>(exp_avg, i, n, m);
    store_below<VEC>(exp_avg_sq, i, n, v);
    if (param) store_below<VEC>(param, i, n, p);
  }
  if (zero_grad) {
    const float zeros[VEC] = {};
    store_below<VEC>(grad, i, n, zeros);
  }
}

struct Buffers {
  Tensor master, grad, exp_avg, exp_avg_sq, param, mask, skipped;
};

template <class P, int VEC>
void sweep(const Buffers& b, const Factors* factors, const Options& o, bool zero_grad, cudaStream_t stream) {
  const int64_t n = b.master.numel(), blocks = (pack_count<VEC>(n) + kThreads - 1) / kThreads;
  require(blocks <= 0x7fffffff, "too many elements for one launch: ", n);
  sweep_kernel<P, VEC><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      b.master.as<float>(), b.grad.as<float>(), b.exp_avg.as<float>(), b.exp_avg_sq.as<float>(),
      b.param.as<P>(), static_cast<const uint8_t*>(b.mask.data), b.skipped.as<float>(), factors,
      static_cast<float>(o.beta1), static_cast<float>(1.0 - o.beta1), static_cast<float>(o.beta2),
      static_cast<float>(1.0 - o.beta2), static_cast<float>(o.eps), zero_grad, n);
  check_launch("adamw_forward (sweep)");
}

template <int VEC>
void launch(const Buffers& b, const Tensor& step, const Tensor& lr, const Options& o, bool zero_grad,
            const Tensor& grad_norm, const Tensor& workspace, cudaStream_t stream) {
  const int64_t n = b.master.numel();
  const auto blocks = static_cast<unsigned>(norm_blocks(n));
  auto* factors = static_cast<Factors*>(workspace.data);
  auto* partials = reinterpret_cast<double*>(factors + 1);
  if (n > 0) {
    norm_kernel<VEC><<<blocks, kThreads, 0, stream>>>(b.grad.as<float>(), partials, n);
    check_launch("adamw_forward (norm)");
  }
  if (step.is<int64_t>())
    finish_kernel<int64_t><<<1, kBlocks, 0, stream>>>(partials, static_cast<int>(blocks), lr.as<float>(),
                                                      step.as<int64_t>(), grad_norm.as<float>(),
                                                      b.skipped.as<float>(), factors, o);
  else
    finish_kernel<float><<<1, kBlocks, 0, stream>>>(partials, static_cast<int>(blocks), lr.as<float>(),
                                                    step.as<float>(), grad_norm.as<float>(),
                                                    b.skipped.as<float>(), factors, o);
  check_launch("adamw_forward (finish)");
  if (n == 0) return;
  if (b.param.is<__nv_bfloat16>()) sweep<__nv_bfloat16, VEC>(b, factors, o, zero_grad, stream);
  else if (b.param.is<__half>()) sweep<__half, VEC>(b, factors, o, zero_grad, stream);
  else sweep<float, VEC>(b, factors, o, zero_grad, stream);
}

void require_buffer(const Tensor& t, const char* what, int64_t n) {
  require(t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
}

}  // namespace

// Bytes of workspace for adamw_forward with these arguments.
int64_t adamw_forward_workspace(Tensor master, Tensor /*grad*/, Tensor /*exp_avg*/, Tensor /*exp_avg_sq*/,
                                Tensor /*step*/, Tensor /*param*/, Tensor /*decay_mask*/, Tensor /*lr*/,
                                double /*beta1*/, double /*beta2*/, double /*eps*/, double /*weight_decay*/,
                                double /*max_norm*/, bool /*zero_grad*/, Tensor /*grad_norm*/,
                                Tensor /*skipped*/) {
  return static_cast<int64_t>(sizeof(Factors) + norm_blocks(master.numel()) * sizeof(double));
}
FASTLM_EXPORT(adamw_forward_workspace);

// master, grad, exp_avg, exp_avg_sq (n) float32, contiguous; step a float32 or int64 scalar; param (n)
// float32, float16 or bfloat16, or None; decay_mask (n) bool or uint8, or None; lr a float32 scalar. All but
// the last two are changed. grad_norm and skipped: float32 scalars, written.
void adamw_forward(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor param,
                   Tensor decay_mask, Tensor lr, double beta1, double beta2, double eps, double weight_decay,
                   double max_norm, bool zero_grad, Tensor grad_norm, Tensor skipped, Tensor workspace,
                   int64_t stream) {
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
  require(!decay_mask.defined() || decay_mask.is<bool>() || decay_mask.is<uint8_t>(),
          "decay_mask must be bool or uint8, got ", name(decay_mask.dtype));

  const Buffers b{master, grad, exp_avg, exp_avg_sq, param, decay_mask, skipped};
  const Options o{beta1, beta2, eps, weight_decay, max_norm};
  const bool packs = aligned16(master.data) && aligned16(grad.data) && aligned16(exp_avg.data) &&
                     aligned16(exp_avg_sq.data) && aligned16(param.data) && aligned16(decay_mask.data);
  if (packs) launch<4>(b, step, lr, o, zero_grad, grad_norm, workspace, as_stream(stream));
  else launch<1>(b, step, lr, o, zero_grad, grad_norm, workspace, as_stream(stream));
}
FASTLM_EXPORT(adamw_forward);

}  // namespace fastlm
