// Cross-entropy between logits and class indices; the formulas stand in csrc/cpu/cross_entropy.h.
//
// Forward: a block for each token reads its row once. Each thread keeps a running maximum and a sum of
// exponentials under it, which is scaled down when the maximum rises; the threads' pairs are joined at the
// end, in a fixed order. One more block then adds the tokens. Ignored tokens are not read at all.
// Backward: a block for each stretch of a row reads it once and writes the gradient; lse is all it needs of
// the rest of the row.
//
// A row may start anywhere (50257 classes are odd): packs of 16 bytes are laid from the boundary at or before
// it, and only the first and the last are taken element by element.
#include "device.cuh"

namespace fastlm {
namespace {

constexpr int kForwardThreads = 512, kBackwardThreads = 256, kReduceThreads = 1024;
constexpr int kPacks = 2;  // packs that a thread has in flight
constexpr float kInfinity = INFINITY;

// Class weights in whichever dtype they came; both null: 1.
template <class T> struct Weights {
  const float* full;
  const T* same;

  __host__ __device__ bool any() const { return full || same; }
  __device__ float at(int64_t c) const { return full ? full[c] : same ? to_f32(same[c]) : 1.0f; }
};

struct Options {
  int classes;
  int64_t ignore_index;
  float smoothing, z_loss, softcap;
  bool mean, per_token;
  const float* weight_sum;  // over all classes, if there are weights and smoothing

  __device__ bool good(int64_t target) const { return target >= 0 && target < classes; }
  __device__ float total_weight() const { return weight_sum ? *weight_sum : static_cast<float>(classes); }
};

// The rounded product: fused with a following subtraction it would not be what lse was made from.
template <bool CAP> __device__ inline float x_of(float logit, float softcap) {
  if constexpr (CAP) return __fmul_rn(softcap, tanhf(logit / softcap));
  else return logit;
}

// Elements by which a row starts after a boundary of 16 bytes.
template <class T> __device__ inline int shift_of(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
}

template <int VEC, class T> __device__ inline void load_within(const T* p, int i, int n, float (&out)[VEC]) {
  if (i >= 0 && i + VEC <= n) return load_pack<VEC>(p + i, out);
#pragma unroll
  for (int j = 0; j < VEC; ++j) out[j] = i + j >= 0 && i + j < n ? to_f32(p[i + j]) : -kInfinity;
}

template <int VEC, class T> __device__ inline void store_within(T* p, int i, int n, const float (&in)[VEC]) {
  if (i >= 0 && i + VEC <= n) return store_pack<VEC>(p + i, in);
#pragma unroll
  for (int j = 0; j < VEC; ++j)
    if (i + j >= 0 && i + j < n) p[i + j] = from_f32<T>(in[j]);
}

// The largest over the threads of a block, of which there are a whole number of warps; every thread gets it.
__device__ inline float block_max(float v) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, s));
  __shared__ float warps[32];
  const int lane = threadIdx.x % 32, count = blockDim.x / 32;
  if (lane == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = lane < count ? warps[lane] : -kInfinity;
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, s));
  return v;
}

__device__ inline double block_sum(double v) {
  __shared__ double warps[32];
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(0xffffffffu, v, s);
  __syncthreads();  // the call before may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0;
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v += __shfl_xor_sync(0xffffffffu, v, s);
  return v;
}

template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    weight_sum_kernel(Weights<T> weight, int classes, float* sum) {
  double total = 0.0;
  for (int c = threadIdx.x; c < classes; c += blockDim.x) total += weight.at(c);
  total = block_sum(total);
  if (threadIdx.x == 0) *sum = static_cast<float>(total);
}

template <class T, bool CAP>
__global__ void __launch_bounds__(kForwardThreads, 2)
    forward_kernel(const T* logits, const int64_t* target, Weights<T> weight, float* statistics,
                   int64_t tokens, Options o) {
  constexpr int VEC = 16 / sizeof(T);
  const int64_t token = blockIdx.x, t = target[token];
  float *lse = statistics + token, *low = lse + tokens, *loss = low + tokens;
  if (t == o.ignore_index) {
    if (threadIdx.x == 0) *lse = *low = *loss = 0.0f;
    return;
  }
  const T* row = logits + token * o.classes;
  const int n = o.classes;
  const float x_target = o.good(t) ? x_of<CAP>(to_f32(row[t]), o.softcap) : 0.0f;
  // Smoothing sums x relative to the target's, so that a large common offset costs no digits.
  const float base = fabsf(x_target) < kInfinity ? x_target : 0.0f;
  float top = -kInfinity, sum = 0.0f, smooth = 0.0f;

  const int step = blockDim.x * VEC;
  for (int i = threadIdx.x * VEC - shift_of(row); i < n; i += kPacks * step) {
    float x[kPacks][VEC];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) load_within<VEC>(row, i + k * step, n, x[k]);
    float largest = top;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const int c = i + k * step + j;
        const bool inside = c >= 0 && c < n;
        if constexpr (CAP) x[k][j] = inside ? x_of<CAP>(x[k][j], o.softcap) : -kInfinity;
        largest = fmaxf(largest, x[k][j]);
        if (o.smoothing != 0.0f && inside) smooth += weight.at(c) * (x[k][j] - base);
      }
    // Nothing but -inf so far: exp(-inf - -inf) would be NaN.
    const float ref = largest == -kInfinity ? 0.0f : largest;
    sum *= __expf(top - ref);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int j = 0; j < VEC; ++j) sum += __expf(x[k][j] - ref);
    top = largest;
  }

  const float largest = block_max(top), ref = largest == -kInfinity ? 0.0f : largest;
  const float2 sums = row_sum(make_float2(sum * __expf(top - ref), smooth));
  if (threadIdx.x != 0) return;
  const float log_sum = logf(sums.x), value = largest + log_sum, part = value - largest;
  const float w = o.good(t) ? weight.at(t) : NAN;
  float result = (1.0f - o.smoothing) * w * ((largest - x_target) + log_sum);
  if (o.smoothing != 0.0f)
    result += o.smoothing / n * (o.total_weight() * ((largest - base) + log_sum) - sums.y);
  *lse = value;
  *low = (largest - (value - part)) + (log_sum - part);  // Knuth's two-sum
  *loss = result;
}

// loss () or (tokens) and denominators (2) from the tokens' statistics, by one block.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const float* statistics, const int64_t* target, Weights<T> weight, float* loss,
                  float* denominators, int64_t tokens, Options o) {
  const float *lse = statistics, *losses = statistics + 2 * tokens;
  double total = 0.0, squares = 0.0, weights = 0.0, count = 0.0;
  for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) {
    const int64_t t = target[i];
    const float square = lse[i] * lse[i];
    if (o.per_token) loss[i] = losses[i] + o.z_loss * square;
    if (t == o.ignore_index) continue;
    total += losses[i];
    squares += square;
    weights += o.good(t) ? weight.at(t) : NAN;
    count += 1.0;
  }
  total = block_sum(total);
  squares = block_sum(squares);
  weights = block_sum(weights);
  count = block_sum(count);
  if (threadIdx.x != 0) return;
  denominators[0] = static_cast<float>(weights);
  denominators[1] = static_cast<float>(count);
  if (o.per_token) return;
  double z = o.z_loss * squares;
  if (o.mean) {  // a mean over nothing is 0
    total = weights == 0.0 ? 0.0 : total / weights;
    z = count == 0.0 ? 0.0 : z / count;
  }
  *loss = static_cast<float>(total + z);
}

template <class T, bool CAP>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_kernel(const float* d_loss, const T* logits, const int64_t* target, Weights<T> weight,
                    const float* statistics, const float* denominators, T* d_logits, int64_t tokens,
                    Options o) {
  constexpr int VEC = 16 / sizeof(T);
  const int64_t token = blockIdx.x, t = target[token];
  const T* row = logits + token * o.classes;
  T* out = d_logits + token * o.classes;
  const int n = o.classes, step = blockDim.x * VEC, shift = shift_of(row);
  const bool together = shift == shift_of(out);  // else the output is written element by element
  const int first = (blockIdx.y * kPacks * blockDim.x + threadIdx.x) * VEC - shift;
  const bool ignored = t == o.ignore_index;

  float x[kPacks][VEC];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (!ignored) load_within<VEC>(row, first + k * step, n, x[k]);

  float a = 0.0f, b = 0.0f, d = 0.0f, lse = 0.0f, low = 0.0f, total_weight = 0.0f;
  if (!ignored) {
    float g = d_loss[o.per_token ? token : 0], h = g;
    if (o.mean) {
      g = denominators[0] == 0.0f ? 0.0f : g / denominators[0];
      h = denominators[1] == 0.0f ? 0.0f : h / denominators[1];
    }
    lse = statistics[token];
    low = statistics[tokens + token];
    total_weight = o.total_weight();
    a = g * (1.0f - o.smoothing) * (o.good(t) ? weight.at(t) : NAN);
    b = g * (o.smoothing / n);
    d = h * 2.0f * o.z_loss * lse;
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = first + k * step;
    if (i >= n) continue;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const int c = i + j;
      if (ignored) {
        x[k][j] = 0.0f;
        continue;
      }
      const float v = x_of<CAP>(x[k][j], o.softcap), p = __expf((v - lse) - low);
      float dx = a * (p - (c == t ? 1.0f : 0.0f)) + d * p;
      if (o.smoothing != 0.0f) dx += b * (total_weight * p - (c >= 0 && c < n ? weight.at(c) : 0.0f));
      if constexpr (CAP) dx *= 1.0f - (v / o.softcap) * (v / o.softcap);
      x[k][j] = dx;
    }
    if (together) {
      store_within<VEC>(out, i, n, x[k]);
    } else {
#pragma unroll
      for (int j = 0; j < VEC; ++j)
        if (i + j >= 0 && i + j < n) out[i + j] = from_f32<T>(x[k][j]);
    }
  }
}

unsigned row_count(int64_t tokens) {
  require(tokens <= 0x7fffffff, "too many tokens for one launch: ", tokens);
  return static_cast<unsigned>(tokens);
}

// Everything about a call but its outputs.
template <class T> struct Call {
  const T* logits;
  const int64_t* target;
  int64_t tokens;
  Weights<T> weight;
  Options o;
  cudaStream_t stream;

  Call(const Tensor& logits, const Tensor& target, const Tensor& weight, int64_t ignore_index,
       double smoothing, double z_loss, std::optional<double> softcap, const std::string& reduction,
       const Tensor& workspace, int64_t stream)
      : logits(logits.as<T>()),
        target(target.as<int64_t>()),
        tokens(target.numel()),
        weight{},
        o{},
        stream(as_stream(stream)) {
    const int64_t classes = logits.size(-1);
    require(classes > 0 && classes < (int64_t{1} << 30), "logits must have 1 to 2^30 classes, got ", classes);
    require(logits.numel() == tokens * classes, "logits must have ", tokens * classes, " elements, got ",
            logits.numel());
    require(!weight.defined() || weight.numel() == classes, "weight must have ", classes, " elements, got ",
            weight.numel());
    o.classes = static_cast<int>(classes);
    o.ignore_index = ignore_index;
    o.smoothing = static_cast<float>(smoothing);
    o.z_loss = static_cast<float>(z_loss);
    o.softcap = static_cast<float>(softcap.value_or(0.0));
    o.mean = reduction == "mean";
    o.per_token = reduction == "none";
    require(o.mean || o.per_token || reduction == "sum", "reduction must be mean, sum or none, got ",
            reduction);
    if (!weight.defined()) return;
    if (weight.is<float>()) this->weight.full = weight.as<float>();
    else this->weight.same = weight.as<T>();
    if (o.smoothing == 0.0f || tokens == 0) return;
    require(workspace.numel() >= static_cast<int64_t>(sizeof(float)), "workspace must have ", sizeof(float),
            " bytes");
    float* sum = reinterpret_cast<float*>(workspace.as<uint8_t>());
    weight_sum_kernel<T><<<1, kReduceThreads, 0, this->stream>>>(this->weight, o.classes, sum);
    check_launch("cross_entropy (sum of class weights)");
    o.weight_sum = sum;
  }
};

// Runs fn with a value of the element type of logits.
template <class Fn> void for_dtype(const Tensor& logits, Fn&& fn) {
  require(logits.ndim > 0, "logits must have at least one dimension");
  if (logits.is<float>()) return fn(float{});
  if (logits.is<__half>()) return fn(__half{});
  require(logits.is<__nv_bfloat16>(), "logits must be float32, float16 or bfloat16, got ",
          name(logits.dtype));
  fn(__nv_bfloat16{});
}

}  // namespace

// Bytes of workspace: the sum of the class weights.
int64_t cross_entropy_forward_workspace(Tensor, Tensor, Tensor, int64_t, double, double,
                                        std::optional<double>, std::string, Tensor, Tensor, Tensor) {
  return sizeof(float);
}
FASTLM_EXPORT(cross_entropy_forward_workspace);

int64_t cross_entropy_backward_workspace(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, double,
                                         double, std::optional<double>, std::string, Tensor) {
  return sizeof(float);
}
FASTLM_EXPORT(cross_entropy_backward_workspace);

// logits (..., V) float32, float16 or bfloat16, contiguous; target (...) int64; weight (V) of logits' dtype
// or float32, or None; loss () or, for reduction "none", (...); statistics (3, ...); denominators (2): all
// float32. A target out of range makes its token's loss NaN.
void cross_entropy_forward(Tensor logits, Tensor target, Tensor weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, std::optional<double> softcap,
                           std::string reduction, Tensor loss, Tensor statistics, Tensor denominators,
                           Tensor workspace, int64_t stream) {
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    const Call<T> c(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
                    workspace, stream);
    require(statistics.numel() == 3 * c.tokens, "statistics must have ", 3 * c.tokens, " elements");
    if (c.tokens > 0) {
      unsigned threads = 32;
      while (threads < kForwardThreads &&
             threads * kPacks * (16 / sizeof(T)) < static_cast<unsigned>(c.o.classes))
        threads *= 2;
      auto* kernel = c.o.softcap == 0.0f ? &forward_kernel<T, false> : &forward_kernel<T, true>;
      kernel<<<row_count(c.tokens), threads, 0, c.stream>>>(c.logits, c.target, c.weight,
                                                            statistics.as<float>(), c.tokens, c.o);
      check_launch("cross_entropy_forward");
    }
    reduce_kernel<T><<<1, kReduceThreads, 0, c.stream>>>(statistics.as<float>(), c.target, c.weight,
                                                         loss.as<float>(), denominators.as<float>(), c.tokens,
                                                         c.o);
    check_launch("cross_entropy_forward (sum over tokens)");
  });
}
FASTLM_EXPORT(cross_entropy_forward);

// d_loss () or (...) float32; d_logits like logits, not computed if None.
void cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor target, Tensor weight, Tensor statistics,
                            Tensor denominators, int64_t ignore_index, double label_smoothing, double z_loss,
                            std::optional<double> softcap, std::string reduction, Tensor d_logits,
                            Tensor workspace, int64_t stream) {
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    if (d_logits.numel() == 0) return;
    const Call<T> c(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
                    workspace, stream);
    require(statistics.numel() == 3 * c.tokens, "statistics must have ", 3 * c.tokens, " elements");
    require(d_logits.numel() == logits.numel(), "d_logits must have ", logits.numel(), " elements");
    const int64_t columns = int64_t{kBackwardThreads} * kPacks * (16 / sizeof(T));
    // One pack more than the row needs if it starts after a boundary.
    const int64_t stretches =
        (c.o.classes + static_cast<int64_t>(16 / sizeof(T)) - 1 + columns - 1) / columns;
    require(stretches <= 65535, "too many classes for one launch: ", c.o.classes);
    auto* kernel = c.o.softcap == 0.0f ? &backward_kernel<T, false> : &backward_kernel<T, true>;
    kernel<<<dim3(row_count(c.tokens), static_cast<unsigned>(stretches)), kBackwardThreads, 0, c.stream>>>(
        d_loss.as<float>(), c.logits, c.target, c.weight, statistics.as<float>(), denominators.as<float>(),
        d_logits.as<T>(), c.tokens, c.o);
    check_launch("cross_entropy_backward");
  });
}
FASTLM_EXPORT(cross_entropy_backward);

}  // namespace fastlm
