// LayerNorm (CENTRED) and RMSNorm over the last dimension, forward and backward; the formulas stand in
// csrc/cpu/norm.h. LLAMA rounds xhat to x's dtype before it is multiplied.
//
// A row belongs to a warp, or if it is long to a block, and stays in registers between the statistics and the
// result, so that forward reads x once and backward reads x and dy once. Rows that are too long for that, or
// not aligned to 16 bytes (and then element by element), are read again from the cache.
//
// dweight and dbias: rows are cut into at most kGroups groups, as a function of their number only; each group
// is summed in order into a row of partials, and then the partials in order. The partials lie in `workspace`,
// which the caller allocates, so that nothing here allocates and a CUDA graph can capture every call.
#pragma once

#include "device.cuh"

namespace fastlm {

constexpr int kForwardThreads = 1024, kForwardPerThread = 16;  // elements of a row in a thread's registers
// Backward keeps x, dy and the sums for dweight and dbias: 16 elements of each only where 8 would not hold
// the row, and few enough threads that nothing spills.
constexpr int kBackwardThreads = 512, kBackwardPerThread = 8, kBackwardPerThreadLong = 16;
// The kernels' launch bounds name the fewest blocks on a processor too, lest nvcc spill to get in one more.
constexpr int64_t kGroups = 512;
constexpr int64_t kRowsPerGroup = 4;
constexpr int kWarpsPerBlock = 4;  // when a row belongs to a warp

inline int64_t group_count(int64_t rows) {
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

  explicit Parameter(const Tensor& t)
      : data(t.is<float>() ? t.as<float>() : static_cast<const void*>(t.as<T>())), full(t.is<float>()) {}

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

// What xhat is multiplied with: weight, or RMSNorm's weight + offset.
template <bool CENTRED, class T, int N>
__device__ inline void load_scale(const Parameter<T>& weight, float offset, int64_t i, float (&out)[N]) {
  weight.load(i, out, 1.0f);
  if constexpr (!CENTRED) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] += offset;
  }
}

// xhat as it is multiplied.
template <bool LLAMA, class T> __device__ inline float factor(float xhat) {
  if constexpr (LLAMA) return to_f32(from_f32<T>(xhat));
  else return xhat;
}

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

template <bool CENTRED, bool LLAMA, class T, int VEC, int ITEMS>
__global__ void __launch_bounds__(kForwardThreads, 1)
    forward_kernel(const T* x, Parameter<T> weight, Parameter<T> bias, float offset, float eps, T* y, float* mean,
                   float* rstd, int64_t rows, int64_t n) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // a whole warp: rows share a block only if each has one warp
  x += row * n;
  y += row * n;
  float v[ITEMS > 0 ? ITEMS : 1][VEC];

  float coarse = 0.0f, fine = 0.0f;
  if constexpr (CENTRED) {
    float total[1] = {};
    for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
      load_pack<VEC>(x + i, v[k]);
#pragma unroll
      for (int j = 0; j < VEC; ++j) total[0] += v[k][j];
    });
    row_sum(total);
    coarse = total[0] / n;
  }

  // The corrected two-pass algorithm, as on the CPU: `fine` is what the first estimate of the mean lacks.
  float totals[CENTRED ? 2 : 1] = {};
  for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
    if constexpr (ITEMS == 0 || !CENTRED) load_pack<VEC>(x + i, v[k]);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const float d = CENTRED ? v[k][j] - coarse : v[k][j];
      totals[0] += d * d;
      if constexpr (CENTRED) totals[1] += d;
    }
  });
  row_sum(totals);
  float variance = totals[0] / n;
  if constexpr (CENTRED) {
    fine = totals[1] / n;
    variance -= fine * fine;
    variance = variance < 0.0f ? 0.0f : variance;  // a NaN must stay, hence no fmaxf
  }
  const float r = 1.0f / sqrtf(variance + eps);

  for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
    float w[VEC];
    if constexpr (ITEMS == 0) load_pack<VEC>(x + i, v[k]);
    load_scale<CENTRED>(weight, offset, i, w);
    if constexpr (CENTRED) {
      float b[VEC];
      bias.load(i, b, 0.0f);
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[k][j] = ((v[k][j] - coarse) - fine) * r * w[j] + b[j];
    } else {
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[k][j] = factor<LLAMA, T>(v[k][j] * r) * w[j];
    }
    store_pack<VEC>(y + i, v[k]);
  });
  if (threadIdx.x == 0) {
    if (CENTRED && mean) mean[row] = coarse + fine;
    if (rstd) rstd[row] = r;
  }
}

// One group of rows for each threadIdx.y: dx, and with ITEMS > 0 also the group's sums for dweight and dbias,
// of which each thread keeps its own columns in registers from row to row.
template <bool CENTRED, bool LLAMA, class T, int VEC, int ITEMS>
__global__ void __launch_bounds__(kBackwardThreads, ITEMS > 0 ? 1 : 2)
    backward_kernel(const T* dy, const T* x, Parameter<T> weight, float offset, const float* mean,
                    const float* rstd, T* dx, float* partial_dweight, float* partial_dbias, int64_t rows,
                    int64_t n, int64_t groups) {
  constexpr int KEPT = ITEMS > 0 ? ITEMS : 1;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (group >= groups) return;
  float xhat[KEPT][VEC], g[KEPT][VEC], dw[KEPT][VEC] = {}, db[KEPT][VEC] = {};

  const int64_t end = group_begin(rows, groups, group + 1);
  for (int64_t row = group_begin(rows, groups, group); row < end; ++row) {
    const float r = rstd[row];
    float m = 0.0f;
    if constexpr (CENTRED) m = mean[row];
    const auto load = [&](int k, int64_t i, bool add) {
      float w[VEC];
      load_pack<VEC>(x + row * n + i, xhat[k]);
      load_pack<VEC>(dy + row * n + i, g[k]);
      load_scale<CENTRED>(weight, offset, i, w);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        xhat[k][j] = (xhat[k][j] - m) * r;
        if (add) {
          dw[k][j] += g[k][j] * factor<LLAMA, T>(xhat[k][j]);
          if constexpr (CENTRED) db[k][j] += g[k][j];
        }
        g[k][j] =
            __fmul_rn(g[k][j], w[j]);  // not to be fused, lest g - average(g) be other than 0 in one column
      }
    };

    float totals[CENTRED ? 2 : 1] = {};
    for_packs<VEC, ITEMS>(n, [&](int k, auto i) {
      load(k, i, ITEMS > 0);
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        totals[0] += g[k][j] * xhat[k][j];
        if constexpr (CENTRED) totals[1] += g[k][j];
      }
    });
    if (!dx) continue;
    row_sum(totals);
    const float average_gx = totals[0] / n;
    float average_g = 0.0f;
    if constexpr (CENTRED) average_g = totals[1] / n;
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
      if (CENTRED && partial_dbias) store_pack<VEC>(partial_dbias + group * n + i, db[k]);
    });
  }
}

constexpr int kPartialsThreads = 128;

// The groups' sums for rows that do not fit registers: a thread has one column of one group (blockIdx.y).
template <bool CENTRED, bool LLAMA, class T>
__global__ void __launch_bounds__(kPartialsThreads)
    partials_kernel(const T* dy, const T* x, const float* mean, const float* rstd, float* partial_dweight,
                    float* partial_dbias, int64_t rows, int64_t n, int64_t groups) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, group = blockIdx.y;
  if (column >= n) return;
  float dw = 0.0f, db = 0.0f;
  const int64_t end = group_begin(rows, groups, group + 1);
  for (int64_t row = group_begin(rows, groups, group); row < end; ++row) {
    const float d = to_f32(dy[row * n + column]);
    float centred = to_f32(x[row * n + column]);
    if constexpr (CENTRED) {
      centred -= mean[row];
      db += d;
    }
    dw += d * factor<LLAMA, T>(centred * rstd[row]);
  }
  if (partial_dweight) partial_dweight[group * n + column] = dw;
  if (CENTRED && partial_dbias) partial_dbias[group * n + column] = db;
}

constexpr int kSumThreads = 16;  // threads that share the groups of one column

// out += the sum over groups of n partials each, in a fixed order; blockIdx.y chooses dweight or dbias.
static __global__ void __launch_bounds__(32 * kSumThreads)
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
inline dim3 block_for(int64_t n, int per_thread, unsigned most) {
  unsigned threads = 32;
  while (threads < most && static_cast<int64_t>(threads) * per_thread < n) threads *= 2;
  return dim3(threads, threads == 32 ? kWarpsPerBlock : 1);
}

inline unsigned blocks_for(int64_t items, unsigned per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  require(blocks <= 0x7fffffff, "too many rows for one launch: ", items);
  return static_cast<unsigned>(blocks);
}

// x (..., n) as a matrix.
struct Rows {
  int64_t n, count, rows;
  explicit Rows(const Tensor& x)
      : n(x.ndim > 0 ? x.size(-1) : 0), count(x.numel()), rows(n == 0 ? 0 : count / n) {}
};

inline void require_size(const Tensor& t, const char* what, int64_t size) {
  require(t.numel() == size, what, " must have ", size, " elements, got ", t.numel());
}
inline void require_parameter(const Tensor& t, const char* what, int64_t n) {
  if (t.defined()) require_size(t, what, n);
}
// An output that may be None or empty.
inline void require_wanted(const Tensor& t, const char* what, int64_t size) {
  if (t.numel() > 0) require_size(t, what, size);
}

// x (..., n) contiguous, of element type T; weight, bias (n) of T or float32, or None; y like x; mean, rstd (rows)
// float32, not written if None or empty. RMSNorm has no bias and no mean, LayerNorm no offset.
template <bool CENTRED, bool LLAMA, class T>
void norm_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double offset, double eps,
                  const Tensor& y, const Tensor& mean, const Tensor& rstd, int64_t stream) {
  constexpr int VEC = 16 / sizeof(T), ITEMS = kForwardPerThread / VEC;
  const auto [n, count, rows] = Rows(x);
  require_parameter(weight, "weight", n);
  require_parameter(bias, "bias", n);
  require_size(y, "y", count);
  require_wanted(mean, "mean", rows);
  require_wanted(rstd, "rstd", rows);
  if (count == 0) return;
  const bool packs = n % VEC == 0 && aligned16(x.data) && aligned16(y.data) && aligned16(weight.data) &&
                     aligned16(bias.data);
  const bool fits = n <= kForwardThreads * kForwardPerThread;
  const dim3 block = block_for(n, kForwardPerThread, kForwardThreads);
  auto* kernel = !packs ? &forward_kernel<CENTRED, LLAMA, T, 1, 0>
                 : fits ? &forward_kernel<CENTRED, LLAMA, T, VEC, ITEMS>
                        : &forward_kernel<CENTRED, LLAMA, T, VEC, 0>;
  kernel<<<blocks_for(rows, block.y), block, 0, as_stream(stream)>>>(
      x.as<T>(), Parameter<T>(weight), Parameter<T>(bias), static_cast<float>(offset), static_cast<float>(eps),
      y.as<T>(), mean.wanted<float>(), rstd.wanted<float>(), rows, n);
  check_launch(CENTRED ? "layer_norm_forward" : "rms_norm_forward");
}

// Bytes of workspace for norm_backward.
template <bool CENTRED>
int64_t norm_workspace(const Tensor& x, const Tensor& dweight, const Tensor& dbias) {
  if (dweight.numel() == 0 && dbias.numel() == 0) return 0;
  const Rows r(x);
  return (CENTRED ? 2 : 1) * group_count(r.rows) * r.n * static_cast<int64_t>(sizeof(float));
}

// dy, x (..., n) contiguous, of element type T; mean, rstd (rows) from the forward; dx like x; dweight, dbias (n)
// float32, added to. An output that is None or empty is not computed; workspace of norm_workspace bytes.
template <bool CENTRED, bool LLAMA, class T>
void norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double offset, const Tensor& mean,
                   const Tensor& rstd, const Tensor& dx, const Tensor& dweight, const Tensor& dbias,
                   const Tensor& workspace, int64_t stream_handle) {
  constexpr int VEC = 16 / sizeof(T), ITEMS = kBackwardPerThread / VEC, LONG = kBackwardPerThreadLong / VEC;
  constexpr const char* op = CENTRED ? "layer_norm_backward" : "rms_norm_backward";
  const auto [n, count, rows] = Rows(x);
  const int64_t groups = group_count(rows), bytes = norm_workspace<CENTRED>(x, dweight, dbias);
  const cudaStream_t stream = as_stream(stream_handle);
  require_parameter(weight, "weight", n);
  require_size(dy, "dy", count);
  if (CENTRED) require_size(mean, "mean", rows);
  require_size(rstd, "rstd", rows);
  require_wanted(dx, "dx", count);
  require_wanted(dweight, "dweight", n);
  require_wanted(dbias, "dbias", n);
  require(workspace.numel() >= bytes, "workspace must have ", bytes, " bytes, got ", workspace.numel());
  if (count == 0) return;

  float* partials = static_cast<float*>(workspace.data);
  float* partial_dweight = dweight.numel() > 0 ? partials : nullptr;
  float* partial_dbias = dbias.numel() > 0 ? partials + groups * n : nullptr;
  const bool sums = partial_dweight || partial_dbias;
  const bool packs = n % VEC == 0 && aligned16(x.data) && aligned16(dy.data) && aligned16(dx.data) &&
                     aligned16(weight.data) && aligned16(workspace.data);
  const bool kept = packs && n <= kBackwardThreads * kBackwardPerThreadLong;  // a row in registers
  if (dx.numel() > 0 || (kept && sums)) {
    const bool fits = n <= kBackwardThreads * kBackwardPerThread;
    const dim3 block = block_for(n, fits ? kBackwardPerThread : kBackwardPerThreadLong, kBackwardThreads);
    auto* kernel = !packs  ? &backward_kernel<CENTRED, LLAMA, T, 1, 0>
                   : !kept ? &backward_kernel<CENTRED, LLAMA, T, VEC, 0>
                   : fits  ? &backward_kernel<CENTRED, LLAMA, T, VEC, ITEMS>
                           : &backward_kernel<CENTRED, LLAMA, T, VEC, LONG>;
    // Without sums to carry from row to row, a row is a group.
    const int64_t parts = kept && sums ? groups : rows;
    kernel<<<blocks_for(parts, block.y), block, 0, stream>>>(
        dy.as<T>(), x.as<T>(), Parameter<T>(weight), static_cast<float>(offset), mean.as<float>(),
        rstd.as<float>(), dx.wanted<T>(), partial_dweight, partial_dbias, rows, n, parts);
    check_launch(op);
  }
  if (!sums) return;
  if (!kept) {
    const dim3 grid(blocks_for(n, kPartialsThreads), static_cast<unsigned>(groups));
    auto* kernel = &partials_kernel<CENTRED, LLAMA, T>;
    kernel<<<grid, kPartialsThreads, 0, stream>>>(dy.as<T>(), x.as<T>(), mean.as<float>(), rstd.as<float>(),
                                                  partial_dweight, partial_dbias, rows, n, groups);
    check_launch(op);
  }
  sum_kernel<<<dim3(blocks_for(n, 32), CENTRED ? 2 : 1), dim3(32, kSumThreads), 0, stream>>>(
      partial_dweight, partial_dbias, dweight.wanted<float>(), dbias.wanted<float>(), n, groups);
  check_launch(op);
}

}  // namespace fastlm
