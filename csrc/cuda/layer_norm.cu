// LayerNorm over the last dimension; the formulas stand in csrc/cpu/layer_norm.cpp.
//
// A row belongs to a warp, or if it is long to a block, and stays in registers between the statistics and the
// result, so that forward reads x once and backward reads x and dy once. Rows that are too long for that, or
// not aligned to 16 bytes, are read again from the cache.
//
// dweight and dbias: rows are cut into at most kGroups groups, as a function of their number only; each group
// is summed in order into a row of partials, and then the partials in order. The partials lie in `workspace`,
// which the caller allocates, so that nothing here allocates and a CUDA graph can capture every call.
#include "device.cuh"

namespace fastlm {
namespace {

constexpr int kForwardThreads = 1024, kForwardPerThread = 16;  // elements of a row in a thread's registers
// Backward keeps x, dy and the sums for dweight and dbias: 16 elements of each only where 8 would not hold
// the row, and few enough threads that nothing spills.
constexpr int kBackwardThreads = 512, kBackwardPerThread = 8, kBackwardPerThreadLong = 16;
constexpr int64_t kGroups = 512;
constexpr int64_t kRowsPerGroup = 4;
constexpr int kWarpsPerBlock = 4;  // when a row belongs to a warp

int64_t group_count(int64_t rows) {
  const int64_t groups = (rows + kRowsPerGroup - 1) / kRowsPerGroup;
  return groups < kGroups ? groups : kGroups;
}

// The first row of a group, rows being shared out as evenly as can be.
__host__ __device__ inline int64_t group_begin(int64_t rows, int64_t groups, int64_t group) {
  const int64_t size = rows / groups, extra = rows % groups;
  return group * size + (group < extra ? group : extra);
}

// Weight or bias, of x's dtype T or float32; without one, its neutral element.
template <class T> struct Parameter {
  const void* data;
  bool full;  // float32

  template <int N> __device__ void load(int64_t i, float (&out)[N], float neutral) const {
    if (data == nullptr) {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = neutral;
    } else if (full) {
      load_pack<N>(static_cast<const float*>(data) + i, out);
    } else {
      load_pack<N>(static_cast<const T*>(data) + i, out);
    }
  }
};

// Calls fn(k, column) for the packs of VEC columns that this thread has of a row: at most ITEMS, which the
// caller keeps in registers under k, or with ITEMS 0 any number, all of them under k = 0.
template <int VEC, int ITEMS, class Fn> __device__ inline void for_packs(int64_t n, Fn&& fn) {
  if constexpr (ITEMS > 0) {
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int i = (threadIdx.x + k * blockDim.x) * VEC;  // such rows are short enough for an int
      if (i < n) fn(k, i);
    }
  } else {
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * VEC; i < n; i += blockDim.x * VEC) fn(0, i);
  }
}

template <class T, int VEC, int ITEMS>
__global__ void __launch_bounds__(kForwardThreads)
    forward_kernel(const T* x, Parameter<T> weight, Parameter<T> bias, float eps, T* y, float* mean,
                   float* rstd, int64_t rows, int64_t n) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // a whole warp: rows share a block only if each has one warp
  x += row * n;
  y += row * n;
  float v[ITEMS > 0 ? ITEMS : 1][VEC];

  float2 total = make_float2(0.0f, 0.0f);
  for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
    load_pack<VEC>(x + i, v[k]);
#pragma unroll
    for (int j = 0; j < VEC; ++j) total.x += v[k][j];
  });
  const float coarse = row_sum(total).x / n;

  // The corrected two-pass algorithm, as on the CPU: `fine` is what the first estimate of the mean lacks.
  total = make_float2(0.0f, 0.0f);
  for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
    if constexpr (ITEMS == 0) load_pack<VEC>(x + i, v[k]);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float d = v[k][j] - coarse;
      total.x += d;
      total.y += d * d;
    }
  });
  total = row_sum(total);
  const float fine = total.x / n, variance = total.y / n - fine * fine;
  const float r = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + eps);  // a NaN must stay, hence no fmaxf

  for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
    float w[VEC], b[VEC];
    if constexpr (ITEMS == 0) load_pack<VEC>(x + i, v[k]);
    weight.load(i, w, 1.0f);
    bias.load(i, b, 0.0f);
#pragma unroll
    for (int j = 0; j < VEC; ++j) v[k][j] = ((v[k][j] - coarse) - fine) * r * w[j] + b[j];
    store_pack<VEC>(y + i, v[k]);
  });
  if (threadIdx.x == 0) {
    if (mean) mean[row] = coarse + fine;
    if (rstd) rstd[row] = r;
  }
}

// One group of rows for each threadIdx.y: dx, and with ITEMS > 0 also the group's sums for dweight and dbias,
// of which each thread keeps its own columns in registers from row to row.
template <class T, int VEC, int ITEMS>
__global__ void __launch_bounds__(kBackwardThreads)
    backward_kernel(const T* dy, const T* x, Parameter<T> weight, const float* mean, const float* rstd, T* dx,
                    float* partial_dweight, float* partial_dbias, int64_t rows, int64_t n, int64_t groups) {
  constexpr int KEPT = ITEMS > 0 ? ITEMS : 1;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (group >= groups) return;
  float xhat[KEPT][VEC], g[KEPT][VEC], dw[KEPT][VEC] = {}, db[KEPT][VEC] = {};

  const int64_t end = group_begin(rows, groups, group + 1);
  for (int64_t row = group_begin(rows, groups, group); row < end; ++row) {
    const float m = mean[row], r = rstd[row];
    const auto load = [&](int k, int64_t i, bool add) {
      float w[VEC];
      load_pack<VEC>(x + row * n + i, xhat[k]);
      load_pack<VEC>(dy + row * n + i, g[k]);
      weight.load(i, w, 1.0f);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        xhat[k][j] = (xhat[k][j] - m) * r;
        if (add) {
          dw[k][j] += g[k][j] * xhat[k][j];
          db[k][j] += g[k][j];
        }
        g[k][j] =
            __fmul_rn(g[k][j], w[j]);  // not to be fused, lest g - average(g) be other than 0 in one column
      }
    };

    float2 total = make_float2(0.0f, 0.0f);
    for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
      load(k, i, ITEMS > 0);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        total.x += g[k][j];
        total.y += g[k][j] * xhat[k][j];
      }
    });
    if (!dx) continue;
    total = row_sum(total);
    const float average_g = total.x / n, average_gx = total.y / n;
    for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
      if constexpr (ITEMS == 0) load(k, i, false);
#pragma unroll
      for (int j = 0; j < VEC; ++j) g[k][j] = r * ((g[k][j] - average_g) - xhat[k][j] * average_gx);
      store_pack<VEC>(dx + row * n + i, g[k]);
    });
  }

  if constexpr (ITEMS > 0) {
    for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
      if (partial_dweight) store_pack<VEC>(partial_dweight + group * n + i, dw[k]);
      if (partial_dbias) store_pack<VEC>(partial_dbias + group * n + i, db[k]);
    });
  }
}

constexpr int kPartialsThreads = 128;

// The groups' sums for rows that do not fit registers: a thread has one column of one group (blockIdx.y).
template <class T>
__global__ void __launch_bounds__(kPartialsThreads)
    partials_kernel(const T* dy, const T* x, const float* mean, const float* rstd, float* partial_dweight,
                    float* partial_dbias, int64_t rows, int64_t n, int64_t groups) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, group = blockIdx.y;
  if (column >= n) return;
  float dw = 0.0f, db = 0.0f;
  const int64_t end = group_begin(rows, groups, group + 1);
  for (int64_t row = group_begin(rows, groups, group); row < end; ++row) {
    const float d = to_f32(dy[row * n + column]);
    dw += d * ((to_f32(x[row * n + column]) - mean[row]) * rstd[row]);
    db += d;
  }
  if (partial_dweight) partial_dweight[group * n + column] = dw;
  if (partial_dbias) partial_dbias[group * n + column] = db;
}

constexpr int kSumThreads = 16;  // threads that share the groups of one column

// out += the sum over groups of n partials each, in a fixed order; blockIdx.y chooses dweight or dbias.
__global__ void __launch_bounds__(32 * kSumThreads)
    sum_kernel(const float* partial_dweight, const float* partial_dbias, float* dweight, float* dbias, int64_t n,
               int64_t groups) {
  const float* partial = blockIdx.y == 0 ? partial_dweight : partial_dbias;
  float* out = blockIdx.y == 0 ? dweight : dbias;
  if (!out) return;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  __shared__ float sums[kSumThreads][32];
  float total = 0.0f;
  if (column < n)
    for (int64_t i = threadIdx.y; i < groups; i += kSumThreads) total += partial[i * n + column];
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= n) return;
  for (int i = 1; i < kSumThreads; ++i) total += sums[i][threadIdx.x];
  out[column] += total;
}

// Threads along a row and rows side by side in a block, for `per_thread` elements of a row in each thread.
dim3 block_for(int64_t n, int per_thread, unsigned most) {
  unsigned threads = 32;
  while (threads < most && static_cast<int64_t>(threads) * per_thread < n) threads *= 2;
  return dim3(threads, threads == 32 ? kWarpsPerBlock : 1);
}

unsigned blocks_for(int64_t items, unsigned per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  require(blocks <= 0x7fffffff, "too many rows for one launch: ", items);
  return static_cast<unsigned>(blocks);
}

template <class T> Parameter<T> parameter(const Tensor& t) {
  const bool full = t.is<float>();
  return {full ? t.as<float>() : static_cast<const void*>(t.as<T>()), full};
}

template <class T>
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, float eps, const Tensor& y,
             const Tensor& mean, const Tensor& rstd, int64_t rows, int64_t n, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T), ITEMS = kForwardPerThread / VEC;
  const bool packs = n % VEC == 0 && n <= kForwardThreads * kForwardPerThread && aligned16(x.data) &&
                     aligned16(y.data) && aligned16(weight.data) && aligned16(bias.data);
  const dim3 block = block_for(n, kForwardPerThread, kForwardThreads);
  auto* kernel = packs ? &forward_kernel<T, VEC, ITEMS> : &forward_kernel<T, 1, 0>;
  kernel<<<blocks_for(rows, block.y), block, 0, stream>>>(x.as<T>(), parameter<T>(weight), parameter<T>(bias),
                                                          eps, y.as<T>(), mean.wanted<float>(),
                                                          rstd.wanted<float>(), rows, n);
  check_launch("layer_norm_forward");
}

template <class T>
void backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean, const Tensor& rstd,
              const Tensor& dx, const Tensor& dweight, const Tensor& dbias, const Tensor& workspace,
              int64_t rows, int64_t n, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T), ITEMS = kBackwardPerThread / VEC, LONG = kBackwardPerThreadLong / VEC;
  const int64_t groups = group_count(rows);
  const bool sums = dweight.numel() > 0 || dbias.numel() > 0;
  float* partials = static_cast<float*>(workspace.data);
  float* partial_dweight = dweight.numel() > 0 ? partials : nullptr;
  float* partial_dbias = dbias.numel() > 0 ? partials + groups * n : nullptr;
  const bool packs = n % VEC == 0 && n <= kBackwardThreads * kBackwardPerThreadLong && aligned16(x.data) &&
                     aligned16(dy.data) && aligned16(dx.data) && aligned16(weight.data) &&
                     aligned16(workspace.data);
  if (rows > 0 && (dx.numel() > 0 || (packs && sums))) {
    const bool fits = n <= kBackwardThreads * kBackwardPerThread;
    const dim3 block = block_for(n, fits ? kBackwardPerThread : kBackwardPerThreadLong, kBackwardThreads);
    auto* kernel = !packs ? &backward_kernel<T, 1, 0>
                   : fits ? &backward_kernel<T, VEC, ITEMS>
                          : &backward_kernel<T, VEC, LONG>;
    // Without sums to carry from row to row, a row is a group.
    const int64_t parts = packs && sums ? groups : rows;
    kernel<<<blocks_for(parts, block.y), block, 0, stream>>>(
        dy.as<T>(), x.as<T>(), parameter<T>(weight), mean.as<float>(), rstd.as<float>(), dx.wanted<T>(),
        partial_dweight, partial_dbias, rows, n, parts);
    check_launch("layer_norm_backward");
  }
  if (!sums || rows == 0) return;
  if (!packs) {
    const dim3 grid(blocks_for(n, kPartialsThreads), static_cast<unsigned>(groups));
    partials_kernel<T><<<grid, kPartialsThreads, 0, stream>>>(dy.as<T>(), x.as<T>(), mean.as<float>(),
                                                              rstd.as<float>(), partial_dweight,
                                                              partial_dbias, rows, n, groups);
    check_launch("layer_norm_backward (partial sums)");
  }
  sum_kernel<<<dim3(blocks_for(n, 32), 2), dim3(32, kSumThreads), 0, stream>>>(
      partial_dweight, partial_dbias, dweight.wanted<float>(), dbias.wanted<float>(), n, groups);
  check_launch("layer_norm_backward (sums)");
}

// Runs fn with a value of the element type of x.
template <class Fn> void for_dtype(const Tensor& x, Fn&& fn) {
  if (x.is<float>()) return fn(float{});
  if (x.is<__half>()) return fn(__half{});
  require(x.is<__nv_bfloat16>(), "x must be float32, float16 or bfloat16, got ",
          x.defined() ? name(x.dtype) : "None");
  fn(__nv_bfloat16{});
}

}  // namespace

// x (..., n) float32, float16 or bfloat16, contiguous; weight, bias (n) of x's dtype or float32, or None; y
// like x; mean, rstd (rows) float32, not written if None or empty.
void layer_norm_forward(Tensor x, Tensor weight, Tensor bias, double eps, Tensor y, Tensor mean, Tensor rstd,
                        int64_t stream) {
  require(x.ndim > 0, "x must have at least one dimension");
  const int64_t n = x.size(-1), count = x.numel();
  require(!weight.defined() || weight.numel() == n, "weight must have ", n, " elements, got ",
          weight.numel());
  require(!bias.defined() || bias.numel() == n, "bias must have ", n, " elements, got ", bias.numel());
  require(y.numel() == count, "y must have ", count, " elements, got ", y.numel());
  if (count == 0) return;
  for_dtype(x, [&](auto element) {
    forward<decltype(element)>(x, weight, bias, static_cast<float>(eps), y, mean, rstd, count / n, n,
                               as_stream(stream));
  });
}
FASTLM_EXPORT(layer_norm_forward);

// Bytes of workspace for layer_norm_backward with these arguments.
int64_t layer_norm_backward_workspace(Tensor /*dy*/, Tensor x, Tensor /*weight*/, Tensor mean,
                                      Tensor /*rstd*/, double /*eps*/, Tensor /*dx*/, Tensor dweight,
                                      Tensor dbias) {
  if (dweight.numel() == 0 && dbias.numel() == 0) return 0;
  return 2 * group_count(mean.numel()) * x.size(-1) * static_cast<int64_t>(sizeof(float));
}
FASTLM_EXPORT(layer_norm_backward_workspace);

// dy, x (..., n) contiguous, of one dtype; mean, rstd (rows) from the forward; dx like x; dweight, dbias (n)
// float32, added to. An output that is None or empty is not computed; workspace as many bytes as
// layer_norm_backward_workspace says.
void layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, double /*eps*/,
                         Tensor dx, Tensor dweight, Tensor dbias, Tensor workspace, int64_t stream) {
  require(x.ndim > 0, "x must have at least one dimension");
  const int64_t n = x.size(-1), count = x.numel(), rows = n == 0 ? 0 : count / n;
  require(!weight.defined() || weight.numel() == n, "weight must have ", n, " elements, got ",
          weight.numel());
  require(dy.numel() == count, "dy must have ", count, " elements, got ", dy.numel());
  require(mean.numel() == rows && rstd.numel() == rows, "mean and rstd must have ", rows, " elements");
  const int64_t needed = layer_norm_backward_workspace(dy, x, weight, mean, rstd, 0.0, dx, dweight, dbias);
  require(workspace.numel() >= needed, "workspace must have ", needed, " bytes, got ", workspace.numel());
  if (n == 0) return;
  for_dtype(x, [&](auto element) {
    backward<decltype(element)>(dy, x, weight, mean, rstd, dx, dweight, dbias, workspace, rows, n,
                                as_stream(stream));
  });
}
FASTLM_EXPORT(layer_norm_backward);

}  // namespace fastlm
