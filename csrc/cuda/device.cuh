// What the CUDA kernels share: packs of elements as wide as a memory transaction, sums over a row's threads
// in a fixed order, and the check after a launch.
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

// Both sums over the threads along x of a block (a power of two, at least a warp); every thread gets them.
// With more than one warp along x the block must be one row deep, and all its threads must come here.
__device__ inline float2 row_sum(float2 v) {
#pragma unroll
  for (int s = 16; s > 0; s /= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, s);
    v.y += __shfl_xor_sync(0xffffffffu, v.y, s);
  }
  if (blockDim.x == 32) return v;
  __shared__ float2 warps[32];
  const int lane = threadIdx.x % 32, count = blockDim.x / 32;
  if (lane == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  v = lane < count ? warps[lane] : make_float2(0.0f, 0.0f);
  __syncthreads();  // so that the next call may write
#pragma unroll
  for (int s = 16; s > 0; s /= 2) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, s);
    v.y += __shfl_xor_sync(0xffffffffu, v.y, s);
  }
  return v;
}

inline cudaStream_t as_stream(int64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// A launch that cannot be made says so at once; errors while running surface at the next synchronisation.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace fastlm
