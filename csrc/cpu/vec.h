// Vectors of float32 as wide as the chip's registers, and the few services every CPU kernel needs:
// fixed-order reductions, elementary functions, parallel_for and scratch memory.
//
// Built on the vector extensions of GCC and clang, so the same source serves AVX-512, AVX2, SSE2 and Arm.
// Each variant is a module of its own, compiled with its own flags; nothing here may be shared between them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "huge_pages.h"
#include "tensor.h"

namespace fastlm {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));    // W bf16 values as bits
typedef uint64_t vu64 __attribute__((vector_size(W * 4)));  // W / 2 of them

template <class To, class From> inline To bitcast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

inline vf splat(float v) { return vf{} + v; }
inline vi splat(int32_t v) { return vi{} + v; }
inline vu splat(uint32_t v) { return vu{} + v; }

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

// Where there is one instruction between 16 and 32 bits, GCC would convert by halves and permutations.
inline vf widen(vh h) {
#if defined(__AVX512F__)
  const vu bits = (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  const vu bits = (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  const vu bits = __builtin_convertvector(h, vu);
#endif
  return bitcast<vf>(bits << 16);
}

// Rounds to nearest even; NaN stays NaN. Same bits in every variant, denormals included.
inline vh narrow(vf v) {
  const vu bits = bitcast<vu>(v);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  const vu out = v != v ? quiet : rounded;
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)out);
#else
  return __builtin_convertvector(out, vh);
#endif
}

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, vf v) {
  const vh h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n < W elements; the other lanes hold `fill`.
template <class T> inline vf load_part(const T* p, int n, float fill = 0.0f) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
#endif
  alignas(64) float a[W];
  for (int i = 0; i < W; ++i) a[i] = fill;
  for (int i = 0; i < n; ++i) a[i] = to_float(p[i]);
  return load(a);
}
template <class T> inline void store_part(T* p, vf v, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    return;
  }
#endif
  alignas(64) T a[W];
  store(a, v);
  for (int i = 0; i < n; ++i) p[i] = a[i];
}

// A kernel's inner loop over n elements: whole vectors, then one partial. fn(offset, count), count == W for
// whole. `count` is a constant in the first call, so load_n and store_n below cost nothing there.
template <class Fn> inline void for_vectors(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + W <= n; i += W) fn(i, std::integral_constant<int, W>{});
  if (i < n) fn(i, static_cast<int>(n - i));
}
template <class T> inline vf load_n(const T* p, std::integral_constant<int, W>, float = 0.0f) {
  return load(p);
}
template <class T> inline vf load_n(const T* p, int n, float fill = 0.0f) { return load_part(p, n, fill); }
template <class T> inline void store_n(T* p, vf v, std::integral_constant<int, W>) { store(p, v); }
template <class T> inline void store_n(T* p, vf v, int n) { store_part(p, v, n); }

// a * b + c; one rounding where the chip has it (-ffp-contract=fast), two where it has not.
inline vf fma(vf a, vf b, vf c) { return a * b + c; }

// a * b rounded, and not fused with an addition that follows: for a difference that must be 0 between equals.
inline vf rounded_product(vf a, vf b) {
  vf p = a * b;
#if defined(__x86_64__)
  asm("" : "+x"(p));
#elif defined(__aarch64__)
  asm("" : "+w"(p));
#endif
  return p;
}

inline vi first_lanes(int n) {  // a mask of the first n lanes
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < n;
}

// NaN in either argument gives NaN.
inline vf max(vf a, vf b) { return select((a > b) | (a != a), a, b); }
inline vf min(vf a, vf b) { return select((a < b) | (a != a), a, b); }
// The same against a bound that is a number; a NaN in v stays. One instruction where GCC would take two, in
// the form with a mask (of all lanes) since GCC 12 warns of its own headers in the other.
inline vf at_most(vf v, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(bound), (__m512)v);
#else
  return select(v > bound, splat(bound), v);
#endif
}
inline vf at_least(vf v, float bound) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(bound), (__m512)v);
#else
  return select(v < bound, splat(bound), v);
#endif
}
inline vf abs(vf v) { return bitcast<vf>(bitcast<vu>(v) & 0x7fffffffu); }
inline vf copysign(vf magnitude, vf sign) {
  return bitcast<vf>((bitcast<vu>(magnitude) & 0x7fffffffu) | (bitcast<vu>(sign) & 0x80000000u));
}
inline vf sqrt(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < W; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// The lanes joined two by two, the upper half with the lower, always in the order of a binary tree.
template <class V, class Join> inline float fold(V v, Join&& join) {
  constexpr int half_bytes = sizeof(V) / 2;
  if constexpr (half_bytes == sizeof(float)) {
    return join(v[0], v[1]);
  } else {
    typedef float half __attribute__((vector_size(half_bytes)));
    half low, high;
    std::memcpy(&low, &v, half_bytes);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + half_bytes, half_bytes);
    return fold(join(low, high), join);
  }
}
inline float sum(vf v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
inline float max(vf v) {
  return fold(v, [](auto a, auto b) { return ((a > b) | (a != a)) ? a : b; });
}

// Sums K terms over n elements: fn(offset, count, totals) adds to the K vectors in `totals`, 0 in lanes
// beyond n. Several sets of totals hide the latency of the addition, and the order of all sums is a function of
// n and the number of sets alone.
template <int K, int Sets = 4, class Fn> inline std::array<float, K> accumulate(int64_t n, Fn&& fn) {
  constexpr std::integral_constant<int, W> whole;
  vf totals[Sets][K] = {};
  int64_t i = 0;
  for (; i + Sets * W <= n; i += Sets * W) {
#pragma GCC unroll 4
    for (int s = 0; s < Sets; ++s) fn(i + s * W, whole, totals[s]);
  }
  for (; i + W <= n; i += W) fn(i, whole, totals[0]);
  if (i < n) fn(i, static_cast<int>(n - i), totals[1]);
  std::array<float, K> out;
  for (int k = 0; k < K; ++k) {
    vf t = totals[0][k] + totals[1][k];
    if constexpr (Sets == 4) t += totals[2][k] + totals[3][k];
    out[k] = sum(t);
  }
  return out;
}

// Product of the first of each pair of lanes, as 64 bits: one instruction that GCC does not find by itself.
inline vu64 multiply_even(vu a, vu b) {
#if defined(__AVX512F__)
  return (vu64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vu64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vu64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (bitcast<vu64>(a) & 0xffffffffu) * (bitcast<vu64>(b) & 0xffffffffu);
#endif
}

// Upper 32 bits of a 32 x 32 bit product: the step of Philox.
inline vu mulhi(vu a, uint32_t b) {
  const vu64 even = multiply_even(a, splat(b));
  const vu64 odd = multiply_even(bitcast<vu>(bitcast<vu64>(a) >> 32), splat(b));
  return bitcast<vu>((even >> 32) | (odd & 0xffffffff00000000u));
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] over W pairs of bf16: one instruction where the chip has it
// (which treats denormals as zero), else two fused steps.
inline vf dot2(vf acc, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc = fma(bitcast<vf>(a << 16), bitcast<vf>(b << 16), acc);
  return fma(bitcast<vf>(a & 0xffff0000u), bitcast<vf>(b & 0xffff0000u), acc);
#endif
}

// Polynomials are minimax fits of our own (Lawson's iteration in float64); errors in units of the last place
// were measured against float64 over dense grids, see tests/test_vec.py.

// Within 1 ulp; denormal results included; exp(-inf) = 0, exp(NaN) = NaN.
inline vf exp(vf x) {
  x = at_least(at_most(x, 89.0f), -105.0f);  // beyond both ends the result is inf or 0 anyway
  // Adding 1.5 * 2^23 rounds to an integer, which is then the low bits of the sum.
  const vf shifted = fma(x, splat(0x1.715476p+0f), splat(0x1.8p+23f));
  const vf n = shifted - 0x1.8p+23f;
  // ln 2 in two parts, the first with so few bits that its product with n is exact.
  vf r = fma(n, splat(-0x1.62e4p-1f), x);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  vf p = splat(0.00138144672f);
  p = fma(p, r, splat(0.00836878084f));
  p = fma(p, r, splat(0.0416683927f));
  p = fma(p, r, splat(0.166665196f));
  p = fma(p, r, splat(0.49999994f));
  p = fma(r * r, p, r) + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  // 2^n in two factors: n runs beyond the exponents of normal numbers at both ends.
  const vi k = bitcast<vi>(shifted) - 0x4b400000;
  const vi half = k >> 1;
  return p * bitcast<vf>((half + 127) << 23) * bitcast<vf>((k - half + 127) << 23);
#endif
}

// Within 1.5 ulp.
inline vf tanh(vf x) {
  const vf z = x * x;
  vf p = splat(-0.00571704516f);
  p = fma(p, z, splat(0.020650588f));
  p = fma(p, z, splat(-0.0537434965f));
  p = fma(p, z, splat(0.133314908f));
  p = fma(p, z, splat(-0.333332837f));
  const vf small = fma(x * z, p, x);
  const vf large = 1.0f - 2.0f / (exp(2.0f * abs(x)) + 1.0f);
  return copysign(select(abs(x) < 0.625f, small, large), x);  // also of -0
}

// Within 1.25 ulp.
inline vf erf(vf x) {
  const vf z = x * x;
  vf p = splat(7.85386146e-05f);
  p = fma(p, z, splat(-0.000801019371f));
  p = fma(p, z, splat(0.00518832775f));
  p = fma(p, z, splat(-0.0268538129f));
  p = fma(p, z, splat(0.112835854f));
  p = fma(p, z, splat(-0.37612626f));
  p = fma(p, z, splat(0.128379166f));
  const vf small = fma(x, p, x);
  const vf t = min(abs(x), splat(4.0f));  // erf rounds to 1 from 3.92 on
  vf q = splat(-1.4133685e-05f);          // log(erfc(t)) / t on [1, 4]
  q = fma(q, t, splat(0.000352330622f));
  q = fma(q, t, splat(-0.00376465381f));
  q = fma(q, t, splat(0.0240254961f));
  q = fma(q, t, splat(-0.106549092f));
  q = fma(q, t, splat(-0.634958327f));
  q = fma(q, t, splat(-1.12869716f));
  const vf large = 1.0f - exp(q * t);
  return select(abs(x) < 1.0f, small, copysign(large, x));
}

// That a parallel region from here would have.
inline int64_t thread_count() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Number of blocks that parallel_for cuts n items into: a function of n and grain only, never of the number
// of threads, so a sum of per-block partials taken in block order has the same bits on every machine.
constexpr int64_t kMaxBlocks = 256;
inline int64_t block_count(int64_t n, int64_t grain, int64_t most = kMaxBlocks) {
  if (n <= 0) return 0;
  return std::min((n + grain - 1) / std::max<int64_t>(grain, 1), most);
}

// Calls fn(begin, end) or fn(begin, end, block) for each of block_count(n, grain, most) blocks of 0 to n, in
// parallel. An exception in any block reaches the caller, that of the lowest block if there are several.
template <class Fn> void parallel_for(int64_t n, int64_t grain, Fn&& fn, int64_t most = kMaxBlocks) {
  const int64_t blocks = block_count(n, std::max<int64_t>(grain, 1), most);
  const auto run = [&](int64_t b) {
    // Blocks that hold one item more lie spread among the others: each thread takes neighbouring blocks.
    const int64_t begin = b * n / blocks, end = (b + 1) * n / blocks;
    if constexpr (std::is_invocable_v<Fn&, int64_t, int64_t, int64_t>) fn(begin, end, b);
    else fn(begin, end);
  };
#if defined(_OPENMP)
  if (blocks > 1 && thread_count() > 1) {
    std::exception_ptr error;
    int64_t failed = blocks;
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      try {
        run(b);
      } catch (...) {
#pragma omp critical(fastlm_parallel_for)
        if (b < failed) {
          failed = b;
          error = std::current_exception();
        }
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  for (int64_t b = 0; b < blocks; ++b) run(b);
}

// Workspace for the length of a scope, taken from a stack that each thread keeps and only ever grows: after
// the first call nothing is allocated. Scopes nest, also between a caller and the blocks it runs on its own
// thread. Contents are not cleared. Memory may be shared with other threads while the scope lasts.
class Scratch {
 public:
  // Outside of any scope: from now on this thread takes what fits from here first; null for its own memory only.
  static void lend(void* memory, size_t bytes) { stack().lent = {static_cast<char*>(memory), bytes, 0}; }

  Scratch() : chunk_(stack().chunk), used_(stack().used), lent_used_(stack().lent.used) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    Stack& s = stack();
    s.chunk = chunk_;
    s.used = used_;
    s.lent.used = lent_used_;
    if (chunk_ == 0 && used_ == 0 && s.chunks.size() > 1) s.merge();
  }

  // n elements on a 64-byte boundary.
  template <class T> T* take(int64_t n) {
    static_assert(std::is_trivially_destructible_v<T>);
    return static_cast<T*>(stack().take(static_cast<size_t>(std::max<int64_t>(n, 1)) * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Chunk {
    std::unique_ptr<void, Free> memory;
    size_t size;
  };
  struct Lent {
    char* memory = nullptr;
    size_t size = 0, used = 0;
  };
  struct Stack {
    Lent lent;
    std::vector<Chunk> chunks;
    size_t chunk = 0, used = 0;

    void* take(size_t bytes) {
      bytes = (bytes + 63) / 64 * 64;
      if (lent.used + bytes <= lent.size) {
        void* p = lent.memory + lent.used;
        lent.used += bytes;
        return p;
      }
      // Earlier chunks hold live pointers, so a full one is followed by another rather than moved.
      while (chunk < chunks.size() && used + bytes > chunks[chunk].size) {
        ++chunk;
        used = 0;
      }
      if (chunk == chunks.size()) add(std::max<size_t>(bytes, 1 << 16));
      void* p = static_cast<char*>(chunks[chunk].memory.get()) + used;
      used += bytes;
      return p;
    }

    void add(size_t bytes) {
      void* p = std::aligned_alloc(64, bytes);
      if (p == nullptr) throw std::bad_alloc();
      prefer_huge_pages(p, bytes);
      chunks.push_back({std::unique_ptr<void, Free>(p), bytes});
    }

    // One chunk as large as all together, so that the next call of the same size finds room in it.
    void merge() {
      size_t total = 0;
      for (const Chunk& c : chunks) total += c.size;
      chunks.clear();
      if (void* p = std::aligned_alloc(64, total)) {
        prefer_huge_pages(p, total);
        chunks.push_back({std::unique_ptr<void, Free>(p), total});
      }
    }
  };

  static Stack& stack() {
    static thread_local Stack s;
    return s;
  }

  size_t chunk_, used_, lent_used_;
};

}  // namespace fastlm
