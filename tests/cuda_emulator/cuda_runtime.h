// Runs CUDA kernels on the CPU, so that their arithmetic and indexing are tested where there is no GPU.
//
// Blocks run one after another, from the last to the first if CUDA_EMULATOR_REVERSED is set, the threads of a
// block as fibers that switch at __syncthreads and at warp shuffles, one warp running ahead of the others as far
// as it can. That shows wrong results, missing barriers
// between warps and barriers that not all threads reach; it shows neither races within a warp or between
// blocks, nor speed. fastlm's sources are compiled against this header in place of CUDA's, after the launch
// syntax is rewritten to emulator::launch (__init__.py).
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 * 1024;

// A meeting of `count` threads; the last to come lets the others go on.
struct Barrier {
  unsigned count = 0, arrived = 0, round = 0;
  void arrive() {
    if (++arrived >= count) {
      arrived = 0;
      ++round;
    }
  }
  void leave() {  // a thread that has returned is waited for no longer, as on a GPU
    --count;
    if (count > 0 && arrived >= count) {
      arrived = 0;
      ++round;
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 index;
  Barrier* waiting = nullptr;
  unsigned round = 0;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<uint64_t> lanes;  // what each thread offers to a shuffle
  Barrier all;
  ucontext_t scheduler;
  unsigned current = 0, switches = 0;
  std::function<void()> body;
};

inline Block* block = nullptr;

inline void wait(Barrier& barrier) {
  Fiber& self = block->fibers[block->current];
  self.waiting = &barrier;
  self.round = barrier.round;
  barrier.arrive();
  swapcontext(&self.context, &block->scheduler);
}

inline void enter() {
  block->body();
  Fiber& self = block->fibers[block->current];
  self.done = true;
  block->all.leave();
  block->warps[block->current / kWarp].leave();
  swapcontext(&self.context, &block->scheduler);
}

// Runs a warp as far as it gets without the others, so that a barrier missing between them shows. Returns how
// many of its threads came to their end.
inline unsigned run_warp(unsigned warp, unsigned threads) {
  unsigned ended = 0;
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned t = warp * kWarp; t < threads && t < (warp + 1) * kWarp; ++t) {
      Fiber& f = block->fibers[t];
      if (f.done || (f.waiting && f.waiting->round == f.round)) continue;
      f.waiting = nullptr;
      block->current = t;
      threadIdx = f.index;
      swapcontext(&block->scheduler, &f.context);
      moved = true;
      ++block->switches;
      ended += f.done;
    }
  }
  return ended;
}

inline void run_block(dim3 size) {
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024) throw std::runtime_error("a block must have 1 to 1024 threads");
  block->fibers.resize(threads);
  block->lanes.assign(threads, 0);
  block->warps.assign((threads + kWarp - 1) / kWarp, {});
  block->all = {threads};
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& f = block->fibers[t];
    block->warps[t / kWarp].count++;
    f.index = dim3(t % size.x, t / size.x % size.y, t / size.x / size.y);
    f.stack.resize(kStack);
    f.waiting = nullptr;
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  const unsigned warps = static_cast<unsigned>(block->warps.size());
  const bool forth = (blockIdx.x + blockIdx.y) % 2 == 0;
  for (unsigned left = threads; left > 0;) {
    const unsigned before = block->switches;
    for (unsigned w = 0; w < warps; ++w) left -= run_warp(forth ? w : warps - 1 - w, threads);
    if (block->switches == before)
      throw std::runtime_error("deadlock: some threads wait at a barrier that others never reach");
  }
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 size, size_t shared, cudaStream_t, A... arguments) {
  if (shared) throw std::runtime_error("dynamic shared memory is not emulated");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("invalid grid");
  Block state;
  block = &state;
  state.body = [&] { kernel(arguments...); };
  gridDim = grid;
  blockDim = size;
  const bool reversed = std::getenv("CUDA_EMULATOR_REVERSED") != nullptr;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = reversed ? dim3(grid.x - 1 - x, grid.y - 1 - y, grid.z - 1 - z) : dim3(x, y, z);
        run_block(size);
      }
  block = nullptr;
}

template <class T> T shuffle(T v, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned self = block->current;
  Barrier& warp = block->warps[self / kWarp];
  std::memcpy(&block->lanes[self], &v, sizeof v);
  wait(warp);
  const unsigned source = self / kWarp * kWarp + from % kWarp;
  if (source < block->lanes.size()) std::memcpy(&v, &block->lanes[source], sizeof v);
  wait(warp);
  return v;
}

// A bit for each lane of the warp that offers the same value.
template <class T> unsigned matches(T v) {
  const unsigned self = block->current, first = self / kWarp * kWarp;
  Barrier& warp = block->warps[self / kWarp];
  uint64_t own = 0;
  std::memcpy(&own, &v, sizeof v);
  block->lanes[self] = own;
  wait(warp);
  unsigned same = 0;
  for (unsigned lane = 0; lane < kWarp && first + lane < block->lanes.size(); ++lane)
    same |= static_cast<unsigned>(block->lanes[first + lane] == own) << lane;
  wait(warp);
  return same;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block->all); }
inline void __syncwarp(unsigned = ~0u) {
  emulator::wait(emulator::block->warps[emulator::block->current / 32]);
}
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emulator::shuffle(v, lane); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulator::shuffle(v, (emulator::block->current % 32) ^ mask);
}
template <class T> T __shfl_down_sync(unsigned, T v, int by) {
  const unsigned lane = emulator::block->current % 32;
  return emulator::shuffle(v, lane + by < 32 ? lane + by : lane);
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T> T __ldg(const T* p) { return *p; }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
// Of integers only: a sum of floats would depend on the order.
inline int atomicAdd(int* p, int v) { return std::exchange(*p, *p + v); }
template <class T> unsigned __match_any_sync(unsigned, T v) { return emulator::matches(v); }
