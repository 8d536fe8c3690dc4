// Cross-entropy between logits and class indices or probabilities; the formulas stand in csrc/cpu/cross_entropy.h.
//
// Forward: a block for each token reads its row once. Each thread keeps a running maximum and a sum of
// exponentials under it, which is scaled down when the maximum rises; the threads' pairs are joined at the
// end, in a fixed order. One more block then adds the tokens. Ignored tokens are not read at all.
// Backward: a block for each stretch of a row reads it once and writes the gradient; lse is all it needs of
// the rest of the row.
//
// A row may start anywhere (50257 classes are odd): packs of 16 bytes are laid from the boundary at or before
// it, and only the first and the last are taken element by element. Probabilities are read element by element.
#include <climits>

#include "device.cuh"

namespace fastlm {
namespace {

constexpr int kForwardThreads = 512, kBackwardThreads = 256, kReduceThreads = 1024;
constexpr int kPacks = 2;  // packs that a thread has in flight
constexpr float kInfinity = INFINITY;
constexpr int64_t kNoClass = INT64_MIN;  // a target that is none of the classes

// Weights of classes or tokens, or probabilities, in whichever dtype they came; both null: 1.
template <class T> struct Weights {
  const float* full;
  const T* same;

  __host__ __device__ bool any() const { return full || same; }
  __device__ float at(int64_t c) const { return full ? full[c] : same ? to_f32(same[c]) : 1.0f; }
  __device__ Weights from(int64_t c) const { return {full ? full + c : nullptr, same ? same + c : nullptr}; }
};

template <class T> Weights<T> weights_of(const Tensor& t) {
  Weights<T> w{};
  if (!t.defined()) return w;
  if (t.is<float>()) w.full = t.as<float>();
  else w.same = t.as<T>();
  return w;
}

// What a token should be: class indices, or probabilities for each class.
template <class T> struct Targets {
  const int64_t* index;  // null: probabilities
  Weights<T> probability;
};

// What forward tells of each token beside its statistics, and reduce of them all; null unless asked for.
struct Extras {
  float *z, *lse, *confidence, *entropy;
  bool* correct;
};

struct Options {
  int classes;
  int64_t ignore_index;
  float smoothing, z_loss, softcap;  // softcap 0: none
  float scale;                       // of the logits
  bool mean, per_token;
  const float* weight_sum;  // over all classes, if there are weights and smoothing

  __device__ bool good(int64_t target) const { return target >= 0 && target < classes; }
  __device__ float total_weight() const { return weight_sum ? *weight_sum : static_cast<float>(classes); }
};

// w_t: 0 for a target of no class, NaN for one out of range.
template <class T> __device__ inline float class_weight(const Weights<T>& weight, int64_t t, const Options& o) {
  return o.good(t) ? weight.at(t) : t == kNoClass ? 0.0f : NAN;
}

// Rounded products: fused with a following subtraction they would not be what lse was made from.
template <bool TRANSFORM> __device__ inline float x_of(float logit, const Options& o) {
  if constexpr (!TRANSFORM) return logit;
  const float x = __fmul_rn(o.scale, logit);
  return o.softcap == 0.0f ? x : __fmul_rn(o.softcap, tanhf(x / o.softcap));
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

// All threads' values joined; the block is a whole number of warps, and every thread gets the result.
template <class V, class Join> __device__ inline V block_join(V v, V none, Join join) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v = join(v, __shfl_xor_sync(0xffffffffu, v, s));
  __shared__ V warps[32];
  const int lane = threadIdx.x % 32, count = blockDim.x / 32;
  __syncthreads();  // the call before may still be read
  if (lane == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = lane < count ? warps[lane] : none;
#pragma unroll
  for (int s = 16; s > 0; s /= 2) v = join(v, __shfl_xor_sync(0xffffffffu, v, s));
  return v;
}

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Smaller {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};

__device__ inline float block_max(float v) { return block_join(v, -kInfinity, Larger()); }

// Where the largest element of a row stands, the first of equal ones; a thread is fed from left to right.
struct First {
  float best = -kInfinity;
  int where = 0;

  __device__ void add(float v, int c) {
    if (!(v > best)) return;
    best = v;
    where = c;
  }

  // Of all threads of the block.
  __device__ int of_block() const {
    return block_join(best == block_max(best) ? where : INT_MAX, INT_MAX, Smaller());
  }
};

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

// MORE: probabilities or extras.
template <class T, bool TRANSFORM, bool MORE>
__global__ void __launch_bounds__(kForwardThreads, MORE ? 1 : 2)
    forward_kernel(const T* logits, Targets<T> target, Weights<T> weight, float* statistics, Extras extras,
                   int64_t tokens, Options o) {
  constexpr int VEC = 16 / sizeof(T);
  constexpr float kFar = -1e30f;  // for -inf where its product with 0 must be 0
  const int64_t token = blockIdx.x;
  const bool soft = MORE && !target.index;
  const int64_t t = soft ? -1 : target.index[token];
  float *lse = statistics + token, *low = lse + tokens, *loss = low + tokens;
  if (!soft && t == o.ignore_index) {
    if (threadIdx.x == 0) {
      *lse = *low = *loss = 0.0f;
      if (MORE && extras.lse) {
        extras.lse[token] = extras.confidence[token] = extras.entropy[token] = 0.0f;
        extras.correct[token] = false;
      }
    }
    return;
  }
  const T* row = logits + token * o.classes;
  const Weights<T> goal = soft ? target.probability.from(token * o.classes) : Weights<T>{};
  const int n = o.classes;
  const int near = o.good(t) ? static_cast<int>(t) : 0;
  const float x_target = soft || o.good(t) ? x_of<TRANSFORM>(to_f32(row[near]), o) : 0.0f;
  // Sums of x are relative to the target's (or the first), so that a large common offset costs no digits.
  const float base = fabsf(x_target) < kInfinity ? x_target : 0.0f;
  float top = -kInfinity, sum = 0.0f, smooth = 0.0f, hit = 0.0f, mass = 0.0f, far = 0.0f;
  First top_logit, top_goal;

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
        if (MORE && extras.lse && inside) top_logit.add(x[k][j], c);
        if constexpr (TRANSFORM) x[k][j] = inside ? x_of<TRANSFORM>(x[k][j], o) : -kInfinity;
        largest = fmaxf(largest, x[k][j]);
        if (o.smoothing != 0.0f && inside) smooth += weight.at(c) * (x[k][j] - base);
        if (soft && inside) {
          const float p = goal.at(c), q = weight.at(c) * p;
          if (extras.lse) top_goal.add(p, c);
          if (q != 0.0f) hit += q * (x[k][j] - base);  // also if the logit is -inf
          mass += q;
        }
      }
    // Nothing but -inf so far: exp(-inf - -inf) would be NaN.
    const float ref = largest == -kInfinity ? 0.0f : largest;
    if (MORE && extras.lse) far += sum * fmaxf(top - ref, kFar);
    const float fall = __expf(top - ref);
    sum *= fall;
    far *= fall;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float e = __expf(x[k][j] - ref);
        sum += e;
        if (MORE && extras.lse) far += e * fmaxf(x[k][j] - ref, kFar);
      }
    top = largest;
  }

  const float largest = block_max(top), ref = largest == -kInfinity ? 0.0f : largest;
  const float fall = __expf(top - ref);
  if (MORE) far = (far + sum * fmaxf(top - ref, kFar)) * fall;
  float sums[] = {sum * fall, smooth}, goals[] = {hit, mass}, fars[] = {far};
  row_sum(sums);
  int first = 0, first_goal = 0;
  if constexpr (MORE) {
    row_sum(goals);
    row_sum(fars);
    first = top_logit.of_block();
    first_goal = top_goal.of_block();
  }
  if (threadIdx.x != 0) return;
  const float log_sum = logf(sums[0]), value = largest + log_sum, part = value - largest;
  const float w = soft ? 1.0f : class_weight(weight, t, o);
  float result = soft ? goals[1] * ((largest - base) + log_sum) - goals[0] : w * ((largest - x_target) + log_sum);
  result *= 1.0f - o.smoothing;
  if (o.smoothing != 0.0f)
    result += o.smoothing / n * (o.total_weight() * ((largest - base) + log_sum) - sums[1]);
  *lse = value;
  *low = (largest - (value - part)) + (log_sum - part);  // Knuth's two-sum
  *loss = result;
  if (soft) loss[tokens] = goals[1];
  if (!MORE || !extras.lse) return;
  extras.lse[token] = value;
  extras.correct[token] = value == value && first == (soft ? first_goal : t);
  extras.confidence[token] = 1.0f / sums[0];
  extras.entropy[token] = log_sum - fars[0] / sums[0];
}

// loss and its z term, () or (tokens), and denominators (2) from the tokens' statistics, by one block.
template <class T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const float* statistics, Targets<T> target, Weights<T> weight, Weights<T> token_weight,
                  float* loss, float* z_term, float* denominators, int64_t tokens, Options o) {
  const float *lse = statistics, *losses = statistics + 2 * tokens;
  double total = 0.0, squares = 0.0, weights = 0.0, count = 0.0;
  for (int64_t i = threadIdx.x; i < tokens; i += blockDim.x) {
    const int64_t t = target.index ? target.index[i] : 0;
    if (target.index && t == o.ignore_index) {
      if (o.per_token) loss[i] = 0.0f;
      if (o.per_token && z_term) z_term[i] = 0.0f;
      continue;
    }
    const float square = lse[i] * lse[i], u = token_weight.at(i);
    if (o.per_token) {
      const float z = u * (o.z_loss * square);
      loss[i] = u * losses[i] + z;
      if (z_term) z_term[i] = z;
    }
    total += static_cast<double>(u) * losses[i];
    squares += static_cast<double>(u) * square;
    weights += static_cast<double>(u) * (target.index ? class_weight(weight, t, o) : 1.0f);
    count += u;
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
  if (z_term) *z_term = static_cast<float>(z);
}

// The gradients of the loss, of its z term and of lse; null for 0.
struct Upstream {
  const float *loss, *z, *lse;
};

template <class T, bool TRANSFORM, bool SOFT>
__global__ void __launch_bounds__(kBackwardThreads, TRANSFORM || SOFT ? 4 : 6)
    backward_kernel(Upstream up, const T* logits, Targets<T> target, Weights<T> weight, Weights<T> token_weight,
                    const float* statistics, const float* denominators, T* d_logits, int64_t tokens,
                    Options o) {
  constexpr int VEC = 16 / sizeof(T);
  const int64_t token = blockIdx.x, t = SOFT ? -1 : target.index[token];
  const T* row = logits + token * o.classes;
  T* out = d_logits + token * o.classes;
  const Weights<T> goal = SOFT ? target.probability.from(token * o.classes) : Weights<T>{};
  const int n = o.classes, step = blockDim.x * VEC, shift = shift_of(row);
  const bool together = shift == shift_of(out);  // else the output is written element by element
  const int first = (blockIdx.y * kPacks * blockDim.x + threadIdx.x) * VEC - shift;
  const bool ignored = !SOFT && t == o.ignore_index;

  float x[kPacks][VEC];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (!ignored) load_within<VEC>(row, first + k * step, n, x[k]);

  float a = 0.0f, b = 0.0f, d = 0.0f, lse = 0.0f, low = 0.0f, mass = 1.0f, total_weight = 0.0f;
  if (!ignored) {
    const int64_t place = o.per_token ? token : 0;
    const float u = token_weight.at(token);
    float g = up.loss ? u * up.loss[place] : 0.0f, h = up.z ? g + u * up.z[place] : g;
    if (o.mean) {
      g = denominators[0] == 0.0f ? 0.0f : g / denominators[0];
      h = denominators[1] == 0.0f ? 0.0f : h / denominators[1];
    }
    lse = statistics[token];
    low = statistics[tokens + token];
    if constexpr (SOFT) mass = statistics[3 * tokens + token];
    total_weight = o.total_weight();
    a = g * (1.0f - o.smoothing) * (SOFT ? 1.0f : class_weight(weight, t, o));
    b = g * (o.smoothing / n);
    d = h * 2.0f * o.z_loss * lse + (up.lse ? up.lse[token] : 0.0f);
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
      const bool inside = c >= 0 && c < n;
      const float v = x_of<TRANSFORM>(x[k][j], o), p = __expf((v - lse) - low);
      const float q = SOFT ? (inside ? weight.at(c) * goal.at(c) : 0.0f) : c == t ? 1.0f : 0.0f;
      float dx = a * (mass * p - q) + d * p;
      if (o.smoothing != 0.0f) dx += b * (total_weight * p - (inside ? weight.at(c) : 0.0f));
      if constexpr (TRANSFORM) {
        if (o.softcap != 0.0f) dx *= 1.0f - (v / o.softcap) * (v / o.softcap);
        dx *= o.scale;
      }
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
  int64_t tokens;
  Targets<T> target;
  Weights<T> weight, token_weight;
  Options o;
  cudaStream_t stream;

  Call(const Tensor& logits, const Tensor& target, const Tensor& weight, const Tensor& token_weight,
       int64_t ignore_index, double smoothing, double z_loss, std::optional<double> softcap, double scale,
       const std::string& reduction, const Tensor& workspace, int64_t stream)
      : logits(logits.as<T>()),
        tokens(0),
        target{},
        weight(weights_of<T>(weight)),
        token_weight(weights_of<T>(token_weight)),
        o{},
        stream(as_stream(stream)) {
    const int64_t classes = logits.size(-1);
    require(classes > 0 && classes < (int64_t{1} << 30), "logits must have 1 to 2^30 classes, got ", classes);
    tokens = logits.numel() / classes;
    if (target.is<int64_t>()) this->target.index = target.as<int64_t>();
    else this->target.probability = weights_of<T>(target);
    const int64_t size = target.is<int64_t>() ? tokens : tokens * classes;
    require(target.numel() == size, "target must have ", size, " elements, got ", target.numel());
    require(!weight.defined() || weight.numel() == classes, "weight must have ", classes, " elements, got ",
            weight.numel());
    require(!token_weight.defined() || token_weight.numel() == tokens, "token_weight must have ", tokens,
            " elements, got ", token_weight.numel());
    o.classes = static_cast<int>(classes);
    o.ignore_index = ignore_index;
    o.smoothing = static_cast<float>(smoothing);
    o.z_loss = static_cast<float>(z_loss);
    o.softcap = static_cast<float>(softcap.value_or(0.0));
    o.scale = static_cast<float>(scale);
    o.mean = reduction == "mean";
    o.per_token = reduction == "none";
    require(o.mean || o.per_token || reduction == "sum", "reduction must be mean, sum or none, got ",
            reduction);
    if (!weight.defined() || o.smoothing == 0.0f || tokens == 0) return;
    require(workspace.numel() >= static_cast<int64_t>(sizeof(float)), "workspace must have ", sizeof(float),
            " bytes");
    float* sum = reinterpret_cast<float*>(workspace.as<uint8_t>());
    weight_sum_kernel<T><<<1, kReduceThreads, 0, this->stream>>>(this->weight, o.classes, sum);
    check_launch("cross_entropy (sum of class weights)");
    o.weight_sum = sum;
  }

  bool transforms() const { return o.softcap != 0.0f || o.scale != 1.0f; }
  int64_t statistics() const { return (target.index ? 3 : 4) * tokens; }
};

}  // namespace

// Bytes of workspace: the sum of the class weights.
int64_t cross_entropy_forward_workspace(Tensor, Tensor, Tensor, Tensor, int64_t, double, double,
                                        std::optional<double>, double, std::string, bool, Tensor, Tensor, Tensor,
                                        Tensor, Tensor, Tensor, Tensor, Tensor) {
  return sizeof(float);
}
FASTLM_EXPORT(cross_entropy_forward_workspace);

int64_t cross_entropy_backward_workspace(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                         int64_t, double, double, std::optional<double>, double, std::string,
                                         bool, Tensor) {
  return sizeof(float);
}
FASTLM_EXPORT(cross_entropy_backward_workspace);

// logits (..., V) float32, float16 or bfloat16, contiguous; target (...) int64, or probabilities (..., V); weight (V),
// token_weight (...) and probabilities of logits' dtype or float32, weights or None. loss and z () or, for reduction
// "none", (...); lse, confidence and entropy (...) and correct (...) bool, these and z of no elements without extras;
// statistics (3 or, for probabilities, 4, ...); denominators (2): all float32. A target out of range makes its token's
// loss NaN.
void cross_entropy_forward(Tensor logits, Tensor target, Tensor weight, Tensor token_weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, std::optional<double> softcap,
                           double logit_scale, std::string reduction, bool extras, Tensor loss, Tensor z,
                           Tensor lse, Tensor correct, Tensor confidence, Tensor entropy, Tensor statistics,
                           Tensor denominators, Tensor workspace, int64_t stream) {
  for_dtype(logits, "logits", [&](auto element) {
    using T = decltype(element);
    const Call<T> c(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap,
                    logit_scale, reduction, workspace, stream);
    require(statistics.numel() == c.statistics(), "statistics must have ", c.statistics(), " elements");
    const Extras more{z.wanted<float>(), lse.wanted<float>(), confidence.wanted<float>(), entropy.wanted<float>(),
                      correct.wanted<bool>()};
    if (c.tokens > 0) {
      unsigned threads = 32;
      while (threads < kForwardThreads &&
             threads * kPacks * (16 / sizeof(T)) < static_cast<unsigned>(c.o.classes))
        threads *= 2;
      auto* kernel = c.transforms() ? &forward_kernel<T, true, false> : &forward_kernel<T, false, false>;
      if (extras || !c.target.index)
        kernel = c.transforms() ? &forward_kernel<T, true, true> : &forward_kernel<T, false, true>;
      kernel<<<row_count(c.tokens), threads, 0, c.stream>>>(c.logits, c.target, c.weight,
                                                            statistics.as<float>(), more, c.tokens, c.o);
      check_launch("cross_entropy_forward");
    }
    reduce_kernel<T><<<1, kReduceThreads, 0, c.stream>>>(statistics.as<float>(), c.target, c.weight,
                                                         c.token_weight, loss.as<float>(), more.z,
                                                         denominators.as<float>(), c.tokens, c.o);
    check_launch("cross_entropy_forward (sum over tokens)");
  });
}
FASTLM_EXPORT(cross_entropy_forward);

// d_loss and d_z () or (...), d_lse (...), float32, each None or of no elements for 0; d_logits like logits, not
// computed if None.
void cross_entropy_backward(Tensor d_loss, Tensor d_z, Tensor d_lse, Tensor logits, Tensor target, Tensor weight,
                            Tensor token_weight, Tensor statistics, Tensor denominators, int64_t ignore_index,
                            double label_smoothing, double z_loss, std::optional<double> softcap,
                            double logit_scale, std::string reduction, bool, Tensor d_logits, Tensor workspace,
                            int64_t stream) {
  for_dtype(logits, "logits", [&](auto element) {
    using T = decltype(element);
    if (d_logits.numel() == 0) return;
    const Call<T> c(logits, target, weight, token_weight, ignore_index, label_smoothing, z_loss, softcap,
                    logit_scale, reduction, workspace, stream);
    require(statistics.numel() == c.statistics(), "statistics must have ", c.statistics(), " elements");
    require(d_logits.numel() == logits.numel(), "d_logits must have ", logits.numel(), " elements");
    const int64_t columns = int64_t{kBackwardThreads} * kPacks * (16 / sizeof(T));
    // One pack more than the row needs if it starts after a boundary.
    const int64_t stretches =
        (c.o.classes + static_cast<int64_t>(16 / sizeof(T)) - 1 + columns - 1) / columns;
    require(stretches <= 65535, "too many classes for one launch: ", c.o.classes);
    const Upstream up{d_loss.wanted<float>(), d_z.wanted<float>(), d_lse.wanted<float>()};
    auto* kernel = c.transforms() ? &backward_kernel<T, true, false> : &backward_kernel<T, false, false>;
    if (!c.target.index)
      kernel = c.transforms() ? &backward_kernel<T, true, true> : &backward_kernel<T, false, true>;
    kernel<<<dim3(row_count(c.tokens), static_cast<unsigned>(stretches)), kBackwardThreads, 0, c.stream>>>(
        up, c.logits, c.target, c.weight, c.token_weight, statistics.as<float>(), denominators.as<float>(),
        d_logits.as<T>(), c.tokens, c.o);
    check_launch("cross_entropy_backward");
  });
}
FASTLM_EXPORT(cross_entropy_backward);

}  // namespace fastlm
