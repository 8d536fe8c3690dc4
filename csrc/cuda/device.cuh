// What the CUDA kernels share: packs of elements as wide as a memory transaction, sums over a row's threads
// in a fixed order, the choice among element types, and the check after a launch.
#pragma once

#include <cuda_runtime.h>

#include "tensor.h"

namespace fastlm {

__device__ inline float to_f32(float v) { return v; }
__device__ inline float to_f32(__half v) { return __half2float(v); }
__device__ inline float to_f32(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> __device__ T from_f32(float v);
template <> __device__ inline float from_f32<float>(float v) { return v; }
template <> __device__ inline __half from_f32<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// N consecutive elements, moved by 16-byte transactions when they are that many bytes or a multiple of it.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

template <int N, class T> __device__ inline void load_pack(const T* p, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_f32(pack.v[i]);
}

template <int N, class T> __device__ inline void store_pack(T* p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = from_f32<T>(in[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <int N> __device__ inline void warp_sum(float (&v)[N]) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], s);
}

// Each of N sums over the threads along x of a block (a power of two, at least a warp); every thread gets them.
// With more than one warp along x the block must be one row deep, and all its threads must come here.
template <int N> __device__ inline void row_sum(float (&v)[N]) {
  warp_sum(v);
  if (blockDim.x == 32) return;
  __shared__ float warps[32][N];
  const int lane = threadIdx.x % 32, count = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (lane == 0) warps[threadIdx.x / 32][i] = v[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = lane < count ? warps[lane][i] : 0.0f;
  __syncthreads();  // so that the next call may write
  warp_sum(v);
}

// Runs fn with a value of t's element type.
template <class Fn> void for_dtype(const Tensor& t, const char* what, Fn&& fn) {
  require(t.ndim > 0, what, " must have at least one dimension");
  if (t.is<float>()) return fn(float{});
  if (t.is<__half>()) return fn(__half{});
  require(t.is<__nv_bfloat16>(), what, " must be float32, float16 or bfloat16, got ", name(t.dtype));
  fn(__nv_bfloat16{});
}

inline cudaStream_t as_stream(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// A launch that cannot be made says so at once; errors while running surface at the next synchronisation.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace fastlm
