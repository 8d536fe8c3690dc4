// Gradients of attention, all in one pass over the weights, which are computed again (see attention.cpp):
//
//   dV = (P * M')^T dO,  dS = P * (M' * (dO V^T) - delta),  delta = rowsum(dO * O)
//   dQ = scale dS K,  dK = scale dS^T Q
//
// One task for each batch and key head, or for each tile of its keys too where heads are few: dK and dV are
// summed over the group's heads and queries in float32 scratch. dQ is the sum of what each tile gives, in the
// order of the tiles, whichever task computed them, so that results have the same bits for any number of
// threads and any batch.
#include "attention.h"

namespace fastlm {
namespace {

using namespace attention;

constexpr int64_t kPartials = 256 << 20;  // bytes of partial dQ that may be spent on more tasks

// A block by a tile of what backward computes, as operands of products: P * M' without the factor 1 / (1 -
// p), and dS, both with queries as k, and dS with keys as k.
template <class E> struct Weights;

template <> struct Weights<float> {
  Weights(int64_t, float* scores, float* d_weights, Scratch&) : p(scores), ds(d_weights) {}
  Left p_by_queries() const { return {reinterpret_cast<const char*>(p), 4, kPitch * 4}; }
  Left ds_by_queries() const { return {reinterpret_cast<const char*>(ds), 4, kPitch * 4}; }
  Left ds_by_keys() const { return {reinterpret_cast<const char*>(ds), kPitch * 4, 4}; }
  // Columns j to j + 2 W of `count` rows from r on: two, or the last one.
  void put(int64_t r, int64_t j, int count, const vf (&weight)[2][2], const vf (&d_score)[2][2]) const {
    for (int u = 0; u < count; ++u) {
      store_pair(p + (r + u) * kPitch + j, weight[u][0], weight[u][1]);
      store_pair(ds + (r + u) * kPitch + j, d_score[u][0], d_score[u][1]);
    }
  }
  float *p, *ds;  // in the memory of the scores and of dO V^T
};

#if defined(__AVX512BF16__)
template <> struct Weights<bf16> {
  Weights(int64_t rows, float*, float*, Scratch& scratch)
      : p(scratch.take<uint32_t>((rows + 1) / 2 * kPitch)),
        ds(scratch.take<uint32_t>((rows + 1) / 2 * kPitch)),
        ds_rows(scratch.take<bf16>((rows + 1) / 2 * 2 * kPitch)) {}
  Left p_by_queries() const { return {reinterpret_cast<const char*>(p), 4, kPitch * 4}; }
  Left ds_by_queries() const { return {reinterpret_cast<const char*>(ds), 4, kPitch * 4}; }
  Left ds_by_keys() const { return {reinterpret_cast<const char*>(ds_rows), kPitch * 2, 4}; }
  void put(int64_t r, int64_t j, int, const vf (&weight)[2][2], const vf (&d_score)[2][2]) const {
    const int64_t at = r / 2 * kPitch + j;
    zip(gemm::round_neighbours(weight[0][0], weight[0][1]),
        gemm::round_neighbours(weight[1][0], weight[1][1]), p + at);
    const vu first = gemm::round_neighbours(d_score[0][0], d_score[0][1]);
    const vu second = gemm::round_neighbours(d_score[1][0], d_score[1][1]);
    zip(first, second, ds + at);
    gemm::store_words(reinterpret_cast<uint32_t*>(ds_rows + r * kPitch + j), first);
    gemm::store_words(reinterpret_cast<uint32_t*>(ds_rows + (r + 1) * kPitch + j), second);
  }
  // 2 W words from the elements of one row and those of the next.
  static void zip(vu first, vu second, uint32_t* out) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    for (int u = 0; u < 2; ++u) {
      const __m512i order = _mm512_load_si512(kOrder + 32 * u);
      gemm::store_words(out + u * W, (vu)_mm512_permutex2var_epi16((__m512i)first, order, (__m512i)second));
    }
  }
  uint32_t *p, *ds;
  bf16* ds_rows;
};
#endif

// What a row of a tile needs besides its scores.
struct Row {
  int64_t n;  // keys that it sees
  Exponent exponent;
  float delta;
  uint32_t* keep;
};

// P and dS of `count` rows of a tile, two or the last one, from their scores and dO V^T.
template <class E>
void softmax_gradient(const float* scores, const float* d_weights, int64_t r, int count, int64_t columns,
                      float kept_scale, const Row (&rows)[2], const Weights<E>& out) {
  const auto compute = [&](int64_t j, auto masked) {
    vf weight[2][2] = {}, d_score[2][2] = {};
    for (int u = 0; u < count; ++u)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = j + half * W, offset = (r + u) * kPitch + at;
        vf w = exp2(rows[u].exponent.template of<E>(load(scores + offset)));
        vf g = load(d_weights + offset);
        if (rows[u].keep) g = kept(g, rows[u].keep + at) * kept_scale;
        vf d = w * (g - rows[u].delta);
        if (rows[u].keep) w = kept(w, rows[u].keep + at);
        if (masked) {
          const vi seen = lanes_below(rows[u].n - at);
          w = select(seen, w, vf{});
          d = select(seen, d, vf{});
        }
        weight[u][half] = w;
        d_score[u][half] = d;
      }
    out.put(r, j, count, weight, d_score);
  };
  const int64_t seen = std::min(rows[0].n, rows[count - 1].n), whole = seen / (2 * W) * (2 * W);
  for (int64_t j = 0; j < whole; j += 2 * W) compute(j, std::false_type{});
  for (int64_t j = whole; j < columns; j += 2 * W) compute(j, std::true_type{});
}

// The tensors of a backward pass; gradients may be absent.
template <class T> struct Backward {
  Heads<T> d_out, q, k, v, out;
  Heads<float> lse;
  Heads<T> dq, dk, dv;
};

void add_row(float* out, const float* row, int64_t n) {
  for_vectors(n, [&](int64_t c, auto count) {
    store_n(out + c, load_n(out + c, count) + load_n(row + c, count), count);
  });
}

// Operands packed from the keys [first, end) of a head, `first` a multiple of kKeys, and the sums of their
// gradients.
template <class E> struct Chunk {
  int64_t first, end;
  Tiles<E> k, v, k_across;
  float *dk, *dv;
};

// Adds what the queries [first, first + rows) of one head give to the chunk's dk and dv, and writes the sum
// of what its tiles give to their dq, unscaled, to `dq` if that is not null. Whether there were any tiles.
template <class T, class E>
bool backward_block(const Problem& p, const Backward<T>& t, const Chunk<E>& chunk, int64_t b, int64_t h,
                    int64_t first, int64_t rows, int64_t length, float* dq) {
  const int64_t keys = std::min(p.visible(first + rows - 1, length), chunk.end) - chunk.first;
  if (keys <= 0) return false;
  Scratch scratch;
  const bool gradient_of_scores = dq || chunk.dk;
  float* scores = scratch.take<float>(rows * kPitch);
  float* d_weights = scratch.take<float>(rows * kPitch);
  float* dq_tile = scratch.take<float>(rows * p.width);
  const Weights<E> weights(rows, scores, d_weights, scratch);
  const Left q = gemm::left<E>(t.q.at(b, h, first), t.q.row, 1, rows, p.width, scratch, true);
  const Left d_out = gemm::left<E>(t.d_out.at(b, h, first), t.d_out.row, 1, rows, p.v_width, scratch, true);
  Packed<E> q_across{}, d_out_across{};
  if (chunk.dk) q_across = gemm::pack<E>(t.q.at(b, h, first), t.q.row, 1, rows, p.width, scratch);
  if (chunk.dv)
    d_out_across = gemm::pack<E>(t.d_out.at(b, h, first), t.d_out.row, 1, rows, p.v_width, scratch);
  float delta[kQueries];
  for (int64_t r = 0; r < rows; ++r) {
    const T *g = t.d_out.at(b, h, first + r), *o = t.out.at(b, h, first + r);
    delta[r] = accumulate<1>(p.v_width, [&](int64_t c, auto count, vf* sums) {
      sums[0] = fma(load_n(g + c, count), load_n(o + c, count), sums[0]);
    })[0];
  }
  uint32_t* keep[2] = {};
  if (p.dropout)
    for (uint32_t*& row : keep) row = scratch.take<uint32_t>(kPitch);
  for (int64_t j = 0; j < keys; j += kKeys) {
    const int64_t columns = std::min(kKeys, keys - j), tile = j / kKeys;
    gemm::multiply_part(q, chunk.k[tile], rows, p.width, 0, columns, scores, kPitch, false);
    if (gradient_of_scores)
      gemm::multiply_part(d_out, chunk.v[tile], rows, p.v_width, 0, columns, d_weights, kPitch, false);
    for (int64_t r = 0; r < rows; r += 2) {
      Row pair[2] = {};
      const int count = r + 1 < rows ? 2 : 1;
      for (int u = 0; u < count; ++u) {
        const int64_t i = first + r + u, key = chunk.first + j;
        if (p.dropout) keep_row(p, b, h, i, key, columns, keep[u]);
        const auto [lse2, lse2_rest] = split(t.lse.at(b, h)[i] * kLog2e);
        pair[u] = {std::clamp<int64_t>(p.visible(i, length) - key, 0, columns),
                   {p.scale2, p.scale2_rest, lse2, lse2_rest},
                   delta[r + u],
                   keep[u]};
      }
      softmax_gradient(scores, d_weights, r, count, columns, p.kept_scale, pair, weights);
    }
    if (chunk.dv)
      gemm::multiply_part(weights.p_by_queries(), d_out_across, columns, rows, 0, p.v_width,
                          chunk.dv + j * p.v_width, p.v_width, true);
    if (chunk.dk)
      gemm::multiply_part(weights.ds_by_queries(), q_across, columns, rows, 0, p.width,
                          chunk.dk + j * p.width, p.width, true);
    if (dq) {
      float* part = j == 0 ? dq : dq_tile;
      gemm::multiply_part(weights.ds_by_keys(), chunk.k_across[tile], rows, columns, 0, p.width, part,
                          p.width, false);
      if (j > 0) add_row(dq, dq_tile, rows * p.width);
    }
  }
  return true;
}

// Rows [first, end) of keys: the sums, then 0 for the keys that do not exist.
template <class T>
void store_keys(const Heads<T>& out, int64_t b, int64_t h, int64_t first, int64_t end, int64_t known,
                int64_t width, const float* sums, float scale) {
  for (int64_t j = first; j < end; ++j) {
    if (j < known) store_row(out.at(b, h, j), sums + (j - first) * width, width, scale);
    else std::fill_n(out.at(b, h, j), width, T{});
  }
}

template <class T> void backward(const Problem& p, const Backward<T>& t) {
  using E = gemm::Element<T>;
  const int64_t pairs = p.batches * p.key_heads, dq_size = p.batches * p.heads * p.queries * p.width;
  const int64_t tiles_of_keys = (p.keys + kKeys - 1) / kKeys;
  if (pairs == 0) return;
  const bool by_tile = pairs < kTasks && tiles_of_keys > 1 &&
                       (!t.dq || tiles_of_keys * dq_size * static_cast<int64_t>(sizeof(float)) <= kPartials);
  const int64_t chunks = by_tile ? tiles_of_keys : 1, chunk_keys = by_tile ? kKeys : p.keys;
  Scratch shared;
  float* partial = by_tile && t.dq ? shared.take<float>(chunks * dq_size) : nullptr;
  parallel_for(pairs * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks / p.key_heads, hk = task / chunks % p.key_heads;
      const int64_t c = paired(task % chunks, chunks), first = c * chunk_keys;
      const int64_t last = std::min(first + chunk_keys, p.keys), length = p.length(b);
      const int64_t known = std::max(std::min(last, length), first);
      Scratch scratch;
      Chunk<E> chunk{first, known, {}, {}, {}, nullptr, nullptr};
      chunk.k = tiles<E>(t.k, b, hk, first, known, p.width, true, scratch);
      if (t.dq || t.dk) chunk.v = tiles<E>(t.v, b, hk, first, known, p.v_width, true, scratch);
      if (t.dq) chunk.k_across = tiles<E>(t.k, b, hk, first, known, p.width, false, scratch);
      const auto zeros = [&](bool wanted, int64_t n) {
        float* sums = wanted ? scratch.take<float>(n) : nullptr;
        if (wanted) std::fill_n(sums, n, 0.0f);
        return sums;
      };
      chunk.dk = zeros(static_cast<bool>(t.dk), (known - first) * p.width);
      chunk.dv = zeros(static_cast<bool>(t.dv), (known - first) * p.v_width);
      float* own_dq = t.dq && !by_tile ? scratch.take<float>(kQueries * p.width) : nullptr;
      for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h)
        for (int64_t i = 0; i < p.queries; i += kQueries) {
          const int64_t rows = std::min(kQueries, p.queries - i);
          float* dq =
              partial ? partial + c * dq_size + ((b * p.heads + h) * p.queries + i) * p.width : own_dq;
          const bool any = backward_block<T, E>(p, t, chunk, b, h, i, rows, length, dq);
          if (!own_dq) continue;
          if (!any) std::fill_n(dq, rows * p.width, 0.0f);
          for (int64_t r = 0; r < rows; ++r)
            store_row(t.dq.at(b, h, i + r), dq + r * p.width, p.width, p.scale);
        }
      if (t.dk) store_keys(t.dk, b, hk, first, last, known, p.width, chunk.dk, p.scale);
      if (t.dv) store_keys(t.dv, b, hk, first, last, known, p.v_width, chunk.dv, p.kept_scale);
    }
  });
  if (!partial) return;
  parallel_for(p.batches * p.heads * p.queries, kQueries, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* total = scratch.take<float>(p.width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.queries / p.heads, h = row / p.queries % p.heads, i = row % p.queries;
      // Tiles that the row's block does not see were not written.
      const int64_t block_end = std::min(i / kQueries * kQueries + kQueries, p.queries);
      const int64_t keys = p.visible(block_end - 1, p.length(b));
      std::fill_n(total, p.width, 0.0f);
      for (int64_t c = 0; c * kKeys < keys; ++c)
        add_row(total, partial + c * dq_size + row * p.width, p.width);
      store_row(t.dq.at(b, h, i), total, p.width, p.scale);
    }
  });
}

}  // namespace

// d_out and out like out in attention_forward, lse from the forward; dq, dk, dv like q, k, v, or None for one
// that is not wanted.
void attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor key_lengths, Tensor dropout_seed,
                        Tensor out, Tensor lse, bool causal, double scale, double dropout_p, Tensor dq,
                        Tensor dk, Tensor dv) {
  const Problem p = problem(q, k, v, key_lengths, dropout_seed, causal, scale, dropout_p);
  require_like(d_out, "d_out", q, p.v_width);
  require_like(out, "out", q, p.v_width);
  require_lse(lse, q);
  require_like(dq, "dq", q, p.width);
  require_like(dk, "dk", k, p.width);
  require_like(dv, "dv", v, p.v_width);
  for_dtype(q, [&](auto element) {
    using T = decltype(element);
    backward<T>(p, {Heads<T>(d_out), Heads<T>(q), Heads<T>(k), Heads<T>(v), Heads<T>(out), Heads<float>(lse),
                    Heads<T>(dq), Heads<T>(dk), Heads<T>(dv)});
  });
}
FASTLM_EXPORT(attention_backward);

}  // namespace fastlm
