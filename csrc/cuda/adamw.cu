// AdamW over flat buffers in place; the formulas stand in fastlm/ops/adamw.py and
// fastlm/ops/optimizer_step.py.
//
// Kernels, none of which the host waits for: sums of squares in float64 over at most kBlocks blocks
// (kSegmentBlocks for each segment, if there are offsets), cut as a function of the sizes only; with offsets
// one warp a segment, which adds its sums and leaves its clip factor; one block that adds all in a fixed
// order and decides about norm, clip, bias corrections and whether the step counts; and the sweep, 16 bytes
// of each float32 buffer a thread. A step that is skipped reads one number and writes nothing but the zeros
// of the gradient.
#include "device.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1024;
constexpr int kSegmentBlocks = 64;
constexpr int64_t kMaskRun = 64;  // elements that a flag of a short decay_mask stands for

// What the finish leaves for the sweep, in the workspace before clip factors and partial sums.
struct Factors {
  float decay;  // lr * weight_decay
  float rate;   // lr / (1 - beta1^t)
  float root;   // 1 / sqrt(1 - beta2^t)
  uint32_t t;   // of the random words
};

struct Options {
  double beta1, beta2, eps, weight_decay, max_norm;
  bool zero_grad;
};

// A flat buffer whose dtype is known at run time: the branch is the same for all threads and costs nothing
// beside memory.
struct Flat {
  Flat() = default;
  Flat(const Tensor& t, const char* what, int64_t n) : data(t.defined() ? t.data : nullptr), dtype(t.dtype) {
    require(!t.defined() || t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
    require(dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16, what,
            " must be float32, bfloat16 or float16, got ", name(dtype));
  }
  void* data = nullptr;
  DType dtype = DType::float32;
};

struct Segments {
  const int64_t* offsets;  // null: one segment
  int count;
};

// The ends are taken into [0, n): nobody has checked what is in offsets.
__device__ inline int64_t segment_end(Segments s, int k, int64_t n) {
  if (!s.offsets || k == s.count) return n;
  const int64_t end = s.offsets[k];
  return end < 0 ? 0 : end < n ? end : n;
}

// The last segment that begins at i or before.
__device__ inline int segment_of(Segments s, int64_t i) {
  int low = 0, high = s.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (s.offsets[middle] <= i) low = middle;
    else high = middle;
  }
  return low;
}

template <int VEC> __host__ __device__ inline int64_t pack_count(int64_t n) { return (n + VEC - 1) / VEC; }

int norm_blocks(int64_t n, bool by_segment) {
  const int64_t blocks = (n + 4 * kThreads - 1) / (4 * kThreads),
                most = by_segment ? kSegmentBlocks : kBlocks;
  return static_cast<int>(blocks < most ? blocks : most);
}

__device__ inline float clip_of(double total, double max_norm) {
  const bool clipping = max_norm > 0.0 && max_norm < INFINITY;
  return clipping ? static_cast<float>(fmin(1.0, max_norm / (static_cast<float>(sqrt(total)) + 1e-6))) : 1.0f;
}

__device__ inline double warp_sum(double v) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v += __shfl_down_sync(0xffffffffu, v, s);
  return v;
}

// The sum over all threads of the block, of which there are a whole number of warps; thread 0 gets it.
__device__ inline double block_sum(double v) {
  __shared__ double warps[32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  return warp_sum(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0);
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

template <int VEC> __device__ inline void load_below(const Flat& x, int64_t i, int64_t n, float (&out)[VEC]) {
  if (x.dtype == DType::float32) load_below<VEC>(static_cast<const float*>(x.data), i, n, out);
  else if (x.dtype == DType::bfloat16) load_below<VEC>(static_cast<const __nv_bfloat16*>(x.data), i, n, out);
  else load_below<VEC>(static_cast<const __half*>(x.data), i, n, out);
}

template <int VEC>
__device__ inline void store_below(const Flat& x, int64_t i, int64_t n, const float (&in)[VEC]) {
  if (x.dtype == DType::float32) store_below<VEC>(static_cast<float*>(x.data), i, n, in);
  else if (x.dtype == DType::bfloat16) store_below<VEC>(static_cast<__nv_bfloat16*>(x.data), i, n, in);
  else store_below<VEC>(static_cast<__half*>(x.data), i, n, in);
}

// Philox4x32-10 (fastlm/philox.py): replaces a counter by its four words.
__device__ inline void philox(uint64_t seed, uint32_t (&c)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(c[0]) * 0xD2511F53u,
                   b = static_cast<uint64_t>(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The words of elements i to i + VEC; VEC is 1 or 4 and i a multiple of it.
template <int VEC>
__device__ inline void random_words(const int64_t* seed, uint32_t t, uint32_t pair, int64_t i,
                                    uint32_t (&out)[VEC]) {
  const uint64_t counter = static_cast<uint64_t>(i) / 4;
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), t, pair};
  philox(static_cast<uint64_t>(*seed), c);
  if (VEC == 4) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) out[j] = c[j];
  } else {  // no index that is known only at run time: it would put the words into local memory
    out[0] = i & 2 ? (i & 1 ? c[3] : c[2]) : (i & 1 ? c[1] : c[0]);
  }
}

// Rounded up or down to bfloat16, still as float32; r in its lower half.
__device__ inline float rounded(float v, uint32_t r) {
  if (!(fabsf(v) < INFINITY)) return v;
  return __uint_as_float((__float_as_uint(v) + (r & 0xffffu)) & 0xffff0000u);
}

// In float64 no square of a float32 overflows. Blocks along x share a segment, of which there is one along y.
template <int VEC>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(Flat grad, Segments segments, double* partials, int64_t n) {
  const int k = static_cast<int>(blockIdx.y);
  const int64_t first = segments.offsets ? segment_end(segments, k, n) : 0,
                last = segment_end(segments, k + 1, n);
  double total = 0.0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * VEC;
  for (int64_t i = first + (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC; i < last;
       i += stride) {
    float g[VEC];
    load_below<VEC>(grad, i, last, g);
#pragma unroll
    for (int j = 0; j < VEC; ++j) total += static_cast<double>(g[j]) * g[j];
  }
  total = block_sum(total);
  if (threadIdx.x == 0) partials[k * gridDim.x + blockIdx.x] = total;
}

// One warp a segment.
__global__ void __launch_bounds__(32)
    segment_kernel(const double* partials, int blocks, double* totals, float* clips, double max_norm) {
  double total = 0.0;
  for (int b = threadIdx.x; b < blocks; b += 32) total += partials[blockIdx.x * blocks + b];
  total = warp_sum(total);
  if (threadIdx.x != 0) return;
  totals[blockIdx.x] = total;
  clips[blockIdx.x] = clip_of(total, max_norm);
}

template <class Count>
__global__ void __launch_bounds__(kBlocks)
    finish_kernel(const double* parts, int count, const float* norm_given, const float* lr, Count* step,
                  float* grad_norm, float* skipped, Factors* factors, float* clip, Options o) {
  double total = 0.0;
  for (int i = threadIdx.x; i < count; i += kBlocks) total += parts[i];
  total = block_sum(total);
  if (threadIdx.x != 0) return;
  const float norm = norm_given ? *norm_given : static_cast<float>(sqrt(total));
  const bool applied = norm < INFINITY;  // false for NaN too
  const double t = static_cast<double>(*step) + 1.0, rate = *lr;
  if (clip) *clip = clip_of(static_cast<double>(norm) * norm, o.max_norm);
  factors->decay = static_cast<float>(rate * o.weight_decay);
  factors->rate = static_cast<float>(rate / (1.0 - pow(o.beta1, t)));
  factors->root = static_cast<float>(1.0 / sqrt(1.0 - pow(o.beta2, t)));
  factors->t = static_cast<uint32_t>(static_cast<int64_t>(t));
  *grad_norm = norm;
  *skipped = applied ? 0.0f : 1.0f;
  if (applied) *step = static_cast<Count>(t);
}

struct Buffers {
  Flat master, grad, exp_avg, exp_avg_sq, param;
  const uint8_t* mask;
  int64_t run;  // elements that a flag of the mask stands for
  const int64_t* seed;
  int16_t* trail;  // null, or the lower halves of the masters
};

// The weights in float32 from their halves, of which p has the upper; those from n on are left as they are.
template <int VEC> __device__ inline void join(const int16_t* trail, int64_t i, int64_t n, float (&p)[VEC]) {
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    if (i + j < n) p[j] = __uint_as_float(__float_as_uint(p[j]) + static_cast<uint32_t>(trail[i + j]));
}

// Leaves the upper halves in p, rounded to nearest, halves away from zero: exact as bfloat16.
template <int VEC> __device__ inline void split(int16_t* trail, int64_t i, int64_t n, float (&p)[VEC]) {
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const uint32_t bits = __float_as_uint(p[j]);
    if (i + j < n) trail[i + j] = static_cast<int16_t>(bits & 0xffffu);
    p[j] = __uint_as_float((bits + 0x8000u) & 0xffff0000u);
  }
}

template <int VEC>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(Buffers b, Segments segments, const float* skipped, const Factors* factors,
                 const float* clips, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
                 float eps, bool zero_grad, int64_t n) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * VEC;
  if (i >= n) return;
  if (*skipped == 0.0f) {
    const Factors f = *factors;
    float p[VEC], g[VEC], m[VEC], v[VEC], decays[VEC];
    load_below<VEC>(b.grad, i, n, g);
    load_below<VEC>(b.master, i, n, p);
    if (b.trail) join<VEC>(b.trail, i, n, p);
    load_below<VEC>(b.exp_avg, i, n, m);
    load_below<VEC>(b.exp_avg_sq, i, n, v);
    if (b.mask && b.run == 1) load_below<VEC>(b.mask, i, n, decays);
    else
#pragma unroll
      for (int j = 0; j < VEC; ++j) decays[j] = b.mask ? b.mask[i / kMaskRun] : 1.0f;  // VEC divides kMaskRun
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      g[j] *= clips[segments.offsets && i + j < n ? segment_of(segments, i + j) : 0];
      m[j] = beta1 * m[j] + one_minus_beta1 * g[j];  // exactly g for beta1 = 0
      v[j] = beta2 * v[j] + one_minus_beta2 * g[j] * g[j];
      if (decays[j] != 0.0f) p[j] -= f.decay * p[j];
      p[j] -= f.rate * m[j] / (sqrtf(v[j]) * f.root + eps);
    }
    if (b.param.data) store_below<VEC>(b.param, i, n, p);
    if (b.seed) {
      uint32_t words[VEC];
      random_words<VEC>(b.seed, f.t, 0, i, words);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        if (b.exp_avg.dtype == DType::bfloat16) m[j] = rounded(m[j], words[j]);
        if (b.exp_avg_sq.dtype == DType::bfloat16) v[j] = rounded(v[j], words[j] >> 16);
      }
      if (b.master.dtype == DType::bfloat16 && !b.trail) {
        random_words<VEC>(b.seed, f.t, 1, i, words);
#pragma unroll
        for (int j = 0; j < VEC; ++j) p[j] = rounded(p[j], words[j]);
      }
    }
    if (b.trail) split<VEC>(b.trail, i, n, p);
    store_below<VEC>(b.master, i, n, p);
    store_below<VEC>(b.exp_avg, i, n, m);
    store_below<VEC>(b.exp_avg_sq, i, n, v);
  }
  if (zero_grad) {
    const float zeros[VEC] = {};
    store_below<VEC>(b.grad, i, n, zeros);
  }
}

// The workspace: factors, a clip factor for each segment, their sums, partial sums.
struct Room {
  Room(char* data, int64_t n, Segments segments) {
    blocks = norm_blocks(n, segments.offsets != nullptr);
    factors = reinterpret_cast<Factors*>(data);
    totals = reinterpret_cast<double*>(data + sizeof(Factors));
    partials = totals + segments.count;
    clips = reinterpret_cast<float*>(partials + static_cast<int64_t>(segments.count) * blocks);
    bytes = reinterpret_cast<char*>(clips + segments.count) - data;
  }
  Factors* factors;
  double *totals, *partials;
  float* clips;
  int blocks;
  int64_t bytes;
};

Segments segments_of(const Tensor& offsets) {
  return {offsets.as<int64_t>(), offsets.defined() ? static_cast<int>(offsets.numel() - 1) : 1};
}

template <int VEC>
void launch(const Buffers& b, Segments segments, int64_t n, const Tensor& step, const Tensor& norm,
            const Tensor& lr, const Options& o, const Tensor& grad_norm, const Tensor& skipped,
            const Room& room, cudaStream_t stream) {
  const double* parts = room.partials;
  int count = room.blocks;
  if (n > 0 && !norm.defined()) {
    const dim3 grid(static_cast<unsigned>(room.blocks), static_cast<unsigned>(segments.count));
    // A segment may begin anywhere, so packs are only for the whole.
    if (segments.offsets) norm_kernel<1><<<grid, kThreads, 0, stream>>>(b.grad, segments, room.partials, n);
    else norm_kernel<VEC><<<grid, kThreads, 0, stream>>>(b.grad, segments, room.partials, n);
    check_launch("adamw_forward (norm)");
    if (segments.offsets) {
      segment_kernel<<<static_cast<unsigned>(segments.count), 32, 0, stream>>>(
          room.partials, room.blocks, room.totals, room.clips, o.max_norm);
      check_launch("adamw_forward (segments)");
      parts = room.totals;
      count = segments.count;
    }
  }
  float* clip = segments.offsets ? nullptr : room.clips;
  if (step.is<int64_t>())
    finish_kernel<int64_t><<<1, kBlocks, 0, stream>>>(
        parts, n > 0 ? count : 0, norm.as<float>(), lr.as<float>(), step.as<int64_t>(), grad_norm.as<float>(),
        skipped.as<float>(), room.factors, clip, o);
  else
    finish_kernel<float><<<1, kBlocks, 0, stream>>>(parts, n > 0 ? count : 0, norm.as<float>(),
                                                    lr.as<float>(), step.as<float>(), grad_norm.as<float>(),
                                                    skipped.as<float>(), room.factors, clip, o);
  check_launch("adamw_forward (finish)");
  if (n == 0) return;
  const int64_t blocks = (pack_count<VEC>(n) + kThreads - 1) / kThreads;
  require(blocks <= 0x7fffffff, "too many elements for one launch: ", n);
  sweep_kernel<VEC><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      b, segments, skipped.as<float>(), room.factors, room.clips, static_cast<float>(o.beta1),
      static_cast<float>(1.0 - o.beta1), static_cast<float>(o.beta2), static_cast<float>(1.0 - o.beta2),
      static_cast<float>(o.eps), o.zero_grad, n);
  check_launch("adamw_forward (sweep)");
}

}  // namespace

// Bytes of workspace for adamw_forward with these arguments.
int64_t adamw_forward_workspace(Tensor master, Tensor /*grad*/, Tensor /*exp_avg*/, Tensor /*exp_avg_sq*/,
                                Tensor /*step*/, Tensor /*param*/, Tensor /*decay_mask*/, Tensor /*seed*/,
                                Tensor /*norm*/, Tensor offsets, Tensor /*lr*/, Tensor /*trail*/, double /*beta1*/,
                                double /*beta2*/, double /*eps*/, double /*weight_decay*/,
                                double /*max_norm*/, bool /*zero_grad*/, Tensor /*grad_norm*/,
                                Tensor /*skipped*/) {
  return Room(nullptr, master.numel(), segments_of(offsets)).bytes;
}
FASTLM_EXPORT(adamw_forward_workspace);

// master, grad, exp_avg, exp_avg_sq (n) float32, bfloat16 or float16 each, contiguous; step a float32 or
// int64 scalar; param (n) of such a dtype, or None; decay_mask (n) bool or uint8, or None; seed one int64, or
// None; norm a float32 scalar, or None; offsets (segments + 1) int64, or None; lr a float32 scalar; trail (n)
// int16 beside a bfloat16 master, or None. All up to param, and trail, are changed. grad_norm and skipped: float32 scalars, written.
void adamw_forward(Tensor master, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor param,
                   Tensor decay_mask, Tensor seed, Tensor norm, Tensor offsets, Tensor lr, Tensor trail,
                   double beta1, double beta2, double eps, double weight_decay, double max_norm, bool zero_grad,
                   Tensor grad_norm, Tensor skipped, Tensor workspace, int64_t stream) {
  const int64_t n = master.numel();
  for (const Tensor* t : {&step, &lr, &grad_norm, &skipped})
    require(t->numel() == 1, "step, lr, grad_norm and skipped must have one element, got ", t->numel());
  const int64_t flags = decay_mask.defined() ? decay_mask.numel() : n;
  require(flags == n || flags == (n + kMaskRun - 1) / kMaskRun, "decay_mask must have ", n, " elements, or one for each ",
          kMaskRun, ", got ", flags);
  require(!decay_mask.defined() || decay_mask.is<bool>() || decay_mask.is<uint8_t>(),
          "decay_mask must be bool or uint8, got ", name(decay_mask.dtype));
  const Buffers b{Flat(master, "master", n),   Flat(grad, "grad", n),
                  Flat(exp_avg, "exp_avg", n), Flat(exp_avg_sq, "exp_avg_sq", n),
                  Flat(param, "param", n),     static_cast<const uint8_t*>(decay_mask.data),
                  flags == n ? 1 : kMaskRun, seed.as<int64_t>(), trail.as<int16_t>()};
  require(!trail.defined() || (trail.numel() == n && master.is<__nv_bfloat16>()), "trail must have ", n,
          " elements beside a bfloat16 master, got ", trail.defined() ? trail.numel() : 0);
  const Options o{beta1, beta2, eps, weight_decay, max_norm, zero_grad};
  const Segments segments = segments_of(offsets);
  const Room room(static_cast<char*>(workspace.data), n, segments);
  bool packs = aligned16(decay_mask.data);
  for (const Tensor* t : {&master, &grad, &exp_avg, &exp_avg_sq, &param}) packs = packs && aligned16(t->data);
  if (packs) launch<4>(b, segments, n, step, norm, lr, o, grad_norm, skipped, room, as_stream(stream));
  else launch<1>(b, segments, n, step, norm, lr, o, grad_norm, skipped, room, as_stream(stream));
}
FASTLM_EXPORT(adamw_forward);

}  // namespace fastlm
