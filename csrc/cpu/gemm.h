// Matrix products for one thread's tile of work: C (float32) = or += A B, where A and B are float32 or
// bfloat16 with any strides, so that every transposition is just another pair of strides.
//
// B is packed into panels of kPanel columns, A is read in place where its layout allows it and packed
// elsewhere; a packed operand serves any number of products. Both are sequences of 32-bit words along k: one
// float, or two bfloat16 on chips that multiply those (Element<bf16> is bf16 there and float elsewhere;
// packing converts). The inner kernel keeps a tile of kTileRows x kPanel of C in registers.
//
//   const Packed<E> packed = pack<E>(b, row_stride, column_stride, k, n, scratch);
//   multiply(left<E>(a, row_stride, column_stride, m, k, scratch), packed, m, c, ldc, accumulate);
//
// An element of C is summed over k in ascending order whatever the tiling, so it has the same bits in any
// partition of m and n.
#pragma once

#include <array>

#include "vec.h"

namespace fastlm {
namespace gemm {

// What products of inputs of type T are formed in. The chip's bfloat16 products treat denormals as zero.
#if defined(__AVX512BF16__)
template <class T> using Element = T;
#else
template <class T> using Element = float;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;  // 32 registers: 24 sums, a row of B, an element of A
#else
constexpr int kTileVectors = 2;  // 16 registers: 12 sums
#endif
constexpr int kTileRows = 6;
constexpr int kPanel = kTileVectors * W;
// Words of k at a time: a panel of B stays in the second-level cache. Of floats fewer, since a sum of many rounds as
// often as it has terms, and bfloat16 results do not show it.
template <class E> constexpr int64_t kBlockWords = std::is_same_v<E, float> ? 192 : 512;
constexpr int64_t kBlockRows = 480;    // rows of A at a time: they stay there too
constexpr int64_t kBandTiles = 16;     // of those that one thread takes at a time: 96 bfloat16 columns are whole cache lines

constexpr int64_t kCacheLine = 64;    // bytes
constexpr int64_t kAhead = 64;        // rows: packing reads a few lines of each, which the chip does not foresee
template <class E> constexpr int kPerWord = sizeof(uint32_t) / sizeof(E);
template <class E> constexpr int64_t kBlock = kBlockWords<E> * kPerWord<E>;

template <class E> inline int64_t words(int64_t k) { return (k + kPerWord<E> - 1) / kPerWord<E>; }
inline int64_t whole_vectors(int64_t n) { return (n + W - 1) / W * W; }
template <class E> inline int64_t packed_words(int64_t k, int64_t n) {
  return words<E>(k) * whole_vectors(n);
}

// Into the second-level cache: the few lines that may be on their way to the first would be too few.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

inline void store_words(uint32_t* p, vu v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512BF16__)
inline __mmask32 lane_mask(int64_t n) { return static_cast<__mmask32>(n >= 32 ? ~0u : (1u << n) - 1); }

// 2 W floats as W words: a word holds two neighbours.
inline vu round_neighbours(vf low, vf high) { return (vu)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
// The words whose lower halves come from one vector and upper halves from the other.
inline vu round_pairs(vf lower, vf upper) {
  alignas(64) static constexpr uint16_t kZip[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(kZip), (__m512i)round_neighbours(lower, upper));
}
#endif

// Elements for products alone to read, so that their denormals may be zero: one instruction where the chip has it.
template <class Count> inline void store_element(float* p, vf v, Count n) { store_n(p, v, n); }
template <class Count> inline void store_element(bf16* p, vf v, Count n) {
#if defined(__AVX512BF16__)
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  if (n == W) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  alignas(32) bf16 all[W];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), half);
  std::copy(all, all + n, p);
#else
  store_n(p, v, n);
#endif
}

// W words from elements that lie side by side along k; elements from `count` on are zero and not read.
template <class E, class T> inline vu load_along(const T* p, int64_t count) {
  if constexpr (std::is_same_v<E, float>) {
    return bitcast<vu>(count >= W ? load(p) : load_part(p, static_cast<int>(count)));
  } else {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) return (vu)_mm512_maskz_loadu_epi16(lane_mask(count), p);
    else
      return round_neighbours(count >= W ? load(p) : load_part(p, static_cast<int>(count)),
                              count >= 2 * W ? load(p + W)
                              : count > W    ? load_part(p + W, static_cast<int>(count - W))
                                             : vf{});
#endif
  }
}

// The words of W neighbouring columns from one row of elements, or from two if `next` is not null.
template <class E, class T> inline vu load_across(const T* p, [[maybe_unused]] const T* next, int64_t count) {
  const int n = static_cast<int>(count);
  const auto part = [&](const T* q) { return n >= W ? load(q) : load_part(q, n); };
  if constexpr (std::is_same_v<E, float>) {
    return bitcast<vu>(part(p));
  } else {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) {
      const auto bits = [&](const T* q) {
        return (vu)_mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lane_mask(count)), q));
      };
      return next ? bits(p) | bits(next) << 16 : bits(p);
    } else {
      return round_pairs(part(p), next ? part(next) : vf{});
    }
#endif
  }
}

template <class E, class T> inline uint32_t load_word(const T* p, [[maybe_unused]] const T* next) {
  if constexpr (std::is_same_v<E, float>) return bitcast<uint32_t>(to_float(*p));
  else
    return to_bf16(to_float(*p)).bits |
           (next ? static_cast<uint32_t>(to_bf16(to_float(*next)).bits) << 16 : 0u);
}

// Swaps the off-diagonal S x S blocks of every 2S x 2S block, for S = 1, 2, ..., W / 2: a transposition.
template <int S, size_t... J> inline void swap_lanes(vu& a, vu& b, std::index_sequence<J...>) {
#if defined(__clang__)
  const vu upper = __builtin_shufflevector(a, b, (J & S ? W + J - S : J)...);
  b = __builtin_shufflevector(a, b, (J & S ? W + J : J + S)...);
#else
  const vu upper = __builtin_shuffle(a, b, vu{(J & S ? W + J - S : J)...});
  b = __builtin_shuffle(a, b, vu{(J & S ? W + J : J + S)...});
#endif
  a = upper;
}
template <int S = 1> inline void transpose(vu (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) swap_lanes<S>(rows[i], rows[i + S], std::make_index_sequence<W>{});
  if constexpr (2 * S < W) transpose<2 * S>(rows);
}

// sums += the values that W words hold.
template <class E> inline void add_words(vu words, float* sums) {
  if constexpr (std::is_same_v<E, float>) store(sums, load(sums) + bitcast<vf>(words));
  else store(sums, dot2(load(sums), words, splat(uint32_t{0x3f803f80})));  // times two ones
}

// k x n elements as words: out[word * width + column], zero from column n to `width`, a whole number of
// vectors. sums (width): to which each column's are added, or null; then n_stride is 1.
template <class E, class T>
void pack_panel(const T* src, int64_t k_stride, int64_t n_stride, int64_t k, int64_t n, uint32_t* out,
                int64_t width, float* sums = nullptr) {
  constexpr int P = kPerWord<E>;
  const int64_t count = words<E>(k);
  if (n_stride == 1) {
    for (int64_t w = 0; w < count; ++w) {
      const T* row = src + w * P * k_stride;
      const T* next = P == 2 && w * P + 1 < k ? row + k_stride : nullptr;
      for (int64_t j = 0; j < n; j += kCacheLine / static_cast<int64_t>(sizeof(T)))
        for (int64_t r = 0; r < P; ++r) fetch(row + (kAhead + r) * k_stride + j);
      for (int64_t j = 0; j < width; j += W) {
        const vu columns = load_across<E>(row + j, next ? next + j : nullptr, n - j);
        store_words(out + w * width + j, columns);
        if (sums) add_words<E>(columns, sums + j);
      }
    }
  } else if (k_stride == 1) {
    for (int64_t j = 0; j < width; j += W)
      for (int64_t w = 0; w < count; w += W) {
        vu block[W];
        for (int i = 0; i < W; ++i) fetch(src + (j + kAhead + i) * n_stride + w * P);
        for (int i = 0; i < W; ++i)
          block[i] = j + i < n ? load_along<E>(src + (j + i) * n_stride + w * P, k - w * P) : vu{};
        transpose(block);
        for (int i = 0; i < W && w + i < count; ++i) store_words(out + (w + i) * width + j, block[i]);
      }
  } else {
    for (int64_t w = 0; w < count; ++w)
      for (int64_t j = 0; j < width; ++j) {
        const T* p = src + w * P * k_stride + j * n_stride;
        out[w * width + j] = j < n ? load_word<E>(p, P == 2 && w * P + 1 < k ? p + k_stride : nullptr) : 0u;
      }
  }
}

// B as the kernel reads it: blocks of kBlock of k, in them panels of kPanel columns.
template <class E> struct Packed {
  const uint32_t* data;
  int64_t k, n;
};

// The panels that packing B (k x n) consists of; they may be packed in any order and by any thread.
template <class E> inline int64_t panel_count(int64_t k, int64_t n) {
  return (k + kBlock<E> - 1) / kBlock<E> * ((n + kPanel - 1) / kPanel);
}
template <class E, class T>
void pack_one(const T* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n, uint32_t* out,
              int64_t panel) {
  const int64_t across = (n + kPanel - 1) / kPanel;
  const int64_t k0 = panel / across * kBlock<E>, kc = std::min(kBlock<E>, k - k0);
  const int64_t j = panel % across * kPanel, columns = std::min<int64_t>(kPanel, n - j);
  pack_panel<E>(b + k0 * row_stride + j * column_stride, row_stride, column_stride, kc, columns,
                out + words<E>(k0) * whole_vectors(n) + words<E>(kc) * j, whole_vectors(columns));
}
// B (k x n) into packed_words<E>(k, n) words at `out`.
template <class E, class T>
Packed<E> pack(const T* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n, uint32_t* out) {
  for (int64_t t = 0; t < panel_count<E>(k, n); ++t) pack_one<E>(b, row_stride, column_stride, k, n, out, t);
  return {out, k, n};
}
template <class E, class T>
Packed<E> pack(const T* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n,
               Scratch& scratch) {
  return pack<E>(b, row_stride, column_stride, k, n, scratch.take<uint32_t>(packed_words<E>(k, n)));
}

// A as the kernel reads it: the word of row i and words w at data + i * row + w * step bytes. Row-major (step
// is a word) or word-major (row is a word).
struct Left {
  const char* data;
  int64_t row, step;

  bool row_major() const { return step == sizeof(uint32_t); }
};

// A (m x k) in place if it lies as the kernel wants it, else packed into the caller's scratch. `copy` packs
// in any case: rows many pages apart crowd each other out of the cache when they are read again and again.
// sums (m): to which each row's over k are added, or null; then row_stride is 1.
template <class E, class T>
Left left(const T* a, int64_t row_stride, int64_t column_stride, int64_t m, int64_t k, Scratch& scratch,
          bool copy = false, float* sums = nullptr) {
  constexpr int64_t word = sizeof(uint32_t);
  if (std::is_same_v<E, T> && !copy && column_stride == 1 && !sums)
    return {reinterpret_cast<const char*>(a), row_stride * static_cast<int64_t>(sizeof(T)), word};
  const int64_t count = words<E>(k);
  if (column_stride == 1 && !sums) {
    const int64_t length = whole_vectors(count);
    uint32_t* out = scratch.take<uint32_t>(m * length);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t w = 0; w < count; w += W)
        store_words(out + i * length + w,
                    load_along<E>(a + i * row_stride + w * kPerWord<E>, k - w * kPerWord<E>));
    return {reinterpret_cast<const char*>(out), length * word, word};
  }
  const int64_t width = whole_vectors(m);
  uint32_t* out = scratch.take<uint32_t>(count * width);
  float* partial = sums ? scratch.take<float>(width) : nullptr;
  for (int64_t k0 = 0; k0 < k; k0 += kBlock<E>) {
    if (sums) std::fill(partial, partial + width, 0.0f);
    pack_panel<E>(a + k0 * column_stride, column_stride, row_stride, std::min(kBlock<E>, k - k0), m,
                  out + words<E>(k0) * width, width, partial);
    for (int64_t i = 0; sums && i < m; ++i) sums[i] += partial[i];
  }
  return {reinterpret_cast<const char*>(out), word, width * word};
}

// What becomes of the sums: stored, or added to what is there; or, with a bias, rounded to bfloat16, and then what is
// there are the sums over earlier k.
struct Result {
  float* c = nullptr;
  int64_t ldc = 0;  // elements between rows
  bool accumulate = false;
  const float* bias = nullptr;  // of a column
  bf16* rounded = nullptr;
  int64_t ld_rounded = 0;

  bool plain() const { return !bias && !rounded; }
  Result at(int64_t row, int64_t column) const {
    return {c ? c + row * ldc + column : nullptr,
            ldc,
            accumulate,
            bias ? bias + column : nullptr,
            rounded ? rounded + row * ld_rounded + column : nullptr,
            ld_rounded};
  }

  // The first n elements of a vector of row `row`, from column `column` on.
  void put(vf sums, int64_t row, int64_t column, int n) const {
    if (n == W) put(sums, row, column, std::integral_constant<int, W>{});
    else put<int>(sums, row, column, n);
  }
  template <class Count> void put(vf sums, int64_t row, int64_t column, Count n) const {
    float* p = c + row * ldc + column;
    if (accumulate) sums += load_n(p, n);
    if (bias) sums += load_n(bias + column, n);
    if (rounded) store_n(rounded + row * ld_rounded + column, sums, n);
    else store_n(p, sums, n);
  }
};

constexpr int64_t kFetched = 128;  // words of k from which on fetching the tile of C ahead costs nothing

// R x V vectors of C from `count` words of k; `odd`: of the last word only the lower half is there. The last
// vector of C has `last` columns; words of B are `pitch` apart.
template <class E, int R, int V, bool RowMajor>
void tile(const char* a, int64_t a_stride, const uint32_t* b, int64_t pitch, int64_t count, bool odd,
          const Result& c, int last) {
  constexpr int64_t word = sizeof(uint32_t);
  const int64_t row = RowMajor ? a_stride : word, step = RowMajor ? word : a_stride;
  if (c.accumulate && count >= kFetched) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(c.c + r * c.ldc + v * W, 1);
  }
  vf sums[R][V] = {};
  const auto add = [&](const auto& element) {
    vu columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&columns[v], b + v * W, sizeof(vu));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vu x = splat(element(a + r * row));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if constexpr (std::is_same_v<E, float>)
          sums[r][v] = fma(bitcast<vf>(x), bitcast<vf>(columns[v]), sums[r][v]);
        else sums[r][v] = dot2(sums[r][v], x, columns[v]);
      }
    }
    a += step;
    b += pitch;
  };
  for (int64_t w = odd ? 1 : 0; w < count; ++w)
    add([](const char* p) {
      uint32_t x;
      std::memcpy(&x, p, sizeof x);
      return x;
    });
  if (odd)
    add([](const char* p) {
      uint16_t x;
      std::memcpy(&x, p, sizeof x);
      return static_cast<uint32_t>(x);
    });
  if (c.plain()) {  // most tiles: without a question for every vector
    float* const out = c.c;
    const int64_t ldc = c.ldc;
    const bool accumulate = c.accumulate;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* p = out + r * ldc + v * W;
        if (v + 1 < V || last == W) store(p, accumulate ? load(p) + sums[r][v] : sums[r][v]);
        else store_part(p, accumulate ? load_part(p, last) + sums[r][v] : sums[r][v], last);
      }
    return;
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) c.put(sums[r][v], r, v * W, v + 1 < V ? W : last);
}

using Tile = void (*)(const char*, int64_t, const uint32_t*, int64_t, int64_t, bool, const Result&, int);

template <class E, bool RowMajor, size_t... I>
constexpr std::array<Tile, sizeof...(I)> make_tiles(std::index_sequence<I...>) {
  return {tile<E, I / kTileVectors + 1, I % kTileVectors + 1, RowMajor>...};
}
// By rows and vectors, each counted from one.
template <class E, bool RowMajor>
constexpr auto kTiles = make_tiles<E, RowMajor>(std::make_index_sequence<kTileRows * kTileVectors>{});

// C = A B as `c` says, in part: the first k (at most b.k) products of each sum, for `columns` columns of C (clipped at
// b.n) from column `first` (a multiple of kPanel) on. c is at row 0, column 0. A rounded result of more than kBlock
// products needs c.c for the sums on their way.
template <class E>
void multiply_part(const Left& a, const Packed<E>& b, int64_t m, int64_t k, int64_t first, int64_t columns,
                   const Result& c) {
  const int64_t end = std::min(first + columns, b.n);
  const auto& tiles = a.row_major() ? kTiles<E, true> : kTiles<E, false>;
  const int64_t stride = a.row_major() ? a.row : a.step;
  const uint32_t* block = b.data;
  int64_t k0 = 0;
  do {
    const int64_t kc = std::min(kBlock<E>, k - k0), count = words<E>(kc);
    const int64_t packed = words<E>(std::min(kBlock<E>, b.k - k0));  // of which `count` are wanted
    const char* data = a.data + k0 / kPerWord<E> * a.step;
    const bool odd = kPerWord<E> == 2 && kc % 2 == 1;
    Result to = k0 + kc < k ? Result{c.c, c.ldc} : c;
    to.accumulate = c.accumulate || k0 > 0;
    for (int64_t i0 = 0; i0 < m; i0 += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, m - i0), parts = (rows + kTileRows - 1) / kTileRows;
      for (int64_t j = first; j < end; j += kPanel) {
        // A panel is as wide as it was packed, also where fewer of its columns are wanted.
        const int64_t width = std::min<int64_t>(kPanel, end - j), vectors = (width + W - 1) / W;
        const int64_t pitch = whole_vectors(std::min<int64_t>(kPanel, b.n - j));
        const int last = static_cast<int>(width - (vectors - 1) * W);
        // Tiles of equal height or one row less, rather than full ones and a sliver.
        for (int64_t t = 0, i = i0; t < parts; ++t) {
          const int64_t height = rows / parts + (t < rows % parts ? 1 : 0);
          tiles[(height - 1) * kTileVectors + vectors - 1](data + i * a.row, stride, block + packed * j,
                                                           pitch, count, odd, to.at(i, j), last);
          i += height;
        }
      }
    }
    block += packed * whole_vectors(b.n);
    k0 += kc;
  } while (k0 < k);
}
template <class E>
void multiply_part(const Left& a, const Packed<E>& b, int64_t m, int64_t k, int64_t first, int64_t columns,
                   float* c, int64_t ldc, bool accumulate) {
  multiply_part(a, b, m, k, first, columns, Result{c, ldc, accumulate});
}

// C (m x b.n) = or += A B.
template <class E>
void multiply(const Left& a, const Packed<E>& b, int64_t m, float* c, int64_t ldc, bool accumulate) {
  multiply_part(a, b, m, b.k, 0, b.n, c, ldc, accumulate);
}

template <class E, class T>
Packed<E> pack_parallel(const T* b, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n,
                        uint32_t* out) {
  parallel_for(panel_count<E>(k, n), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) pack_one<E>(b, row_stride, column_stride, k, n, out, t);
  });
  return {out, k, n};
}

// n shared out in whole `unit`s (but for a last one that n cuts short), shares of at most `most` units that differ by one
// unit; as many as a multiple of `threads` where there are units for it.
struct Shares {
  int64_t n, unit, units, count;

  Shares(int64_t n, int64_t unit, int64_t most, int64_t threads) : n(n), unit(unit), units((n + unit - 1) / unit) {
    count = (units + most - 1) / most;
    const int64_t even = (count + threads - 1) / threads * threads;
    if (even <= units) count = even;
  }
  // Where share i begins; n for i = count.
  int64_t begin(int64_t i) const { return std::min(n, units * i / count * unit); }
};

// Whether `multiply_parallel` shares out C by columns: A needs no packing, and every thread gets as many panels, or nearly so.
template <class E, class TA> bool by_columns(int64_t a_column, int64_t n) {
  const int64_t panels = (n + kPanel - 1) / kPanel, threads = thread_count();
  return std::is_same_v<E, TA> && a_column == 1 && (panels % threads == 0 || panels >= 16 * threads);
}

// `multiply_parallel` by columns: a thread packs the panels that it alone reads, while they are in its cache. Nothing is
// waited for, and nothing comes from another thread, which is slow where threads share no cache.
template <class E, class TB>
void multiply_by_columns(const E* a, int64_t a_row, const TB* b, int64_t b_row, int64_t b_column, int64_t m, int64_t n,
                         int64_t k, const Result& c) {
  constexpr int64_t kPanels = 4, kRows = kTileRows * kBandTiles;
  const Shares shares(n, kPanel, kPanels, thread_count());
  parallel_for(shares.count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      Scratch own;
      const int64_t j = shares.begin(begin), columns = shares.begin(begin + 1) - j;
      const Packed<E> packed = pack<E>(b + j * b_column, b_row, b_column, k, columns, own);
      float* sums = c.rounded && k > kBlock<E> ? own.take<float>(kRows * columns) : nullptr;
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = std::min(kRows, m - i);
        Result to = c.at(i, j);
        if (sums) to.c = sums, to.ldc = columns;
        multiply_part(left<E>(a + i * a_row, a_row, 1, rows, k, own), packed, rows, k, 0, columns, to);
      }
    }
  });
}

// C = A B as `c` says, in parallel; A (m x k), B (k x n) with any strides. sums (m): to which those of A's rows over k are
// added, or null; then a_row is 1.
template <class E, class TA, class TB>
void multiply_parallel(const TA* a, int64_t a_row, int64_t a_column, const TB* b, int64_t b_row, int64_t b_column,
                       int64_t m, int64_t n, int64_t k, const Result& c, float* sums = nullptr) {
  if (m == 0 || n == 0) return;
  if constexpr (std::is_same_v<E, TA>)
    if (!sums && by_columns<E, TA>(a_column, n)) return multiply_by_columns<E>(a, a_row, b, b_row, b_column, m, n, k, c);
  constexpr int64_t kPanels = 4, kBlocks = 32;  // of a group; pieces of work
  Scratch shared;
  const Packed<E> packed =
      pack_parallel<E>(b, b_row, b_column, k, n, shared.take<uint32_t>(packed_words<E>(k, n)));
  // Where a band for each thread would be thin, the groups of a band are shared out too.
  const int64_t threads = thread_count();
  const bool thin = m < threads * kTileRows * kBandTiles / 2;
  const Shares bands(m, kTileRows, kBandTiles, thin ? 1 : threads), groups(n, kPanel, kPanels, 1);
  const auto run = [&](int64_t begin, int64_t end) {
    while (begin < end) {  // the groups of one band, whose rows of A are packed once
      const int64_t band = begin / groups.count, i = bands.begin(band), rows = bands.begin(band + 1) - i;
      const int64_t stop = std::min(end, (band + 1) * groups.count);
      Scratch own;
      const bool first = begin % groups.count == 0;  // a band that is cut adds its sums once
      const Left left_rows = left<E>(a + i * a_row, a_row, a_column, rows, k, own, false, sums && first ? sums + i : nullptr);
      Result to = c.at(i, 0);
      if (c.rounded && k > kBlock<E>) to.c = own.take<float>(rows * n), to.ldc = n;
      for (; begin < stop; ++begin) {
        const int64_t j = groups.begin(begin % groups.count), columns = groups.begin(begin % groups.count + 1) - j;
        multiply_part(left_rows, packed, rows, k, j, columns, to);
      }
    }
  };
  parallel_for(bands.count * groups.count, 1, run, kBlocks);
}
template <class E, class TA, class TB>
void multiply_parallel(const TA* a, int64_t a_row, int64_t a_column, const TB* b, int64_t b_row, int64_t b_column,
                       int64_t m, int64_t n, int64_t k, float* c, int64_t ldc, bool accumulate) {
  multiply_parallel<E>(a, a_row, a_column, b, b_row, b_column, m, n, k, Result{c, ldc, accumulate});
}

}  // namespace gemm
}  // namespace fastlm
