// Gradients of attention, all in one pass over the weights, which are computed again (see attention.cpp):
//
//   dV = (P * M')^T dO,  dS = P * (M' * (dO V^T) - delta),  delta = rowsum(dO * O) - dLSE
//   dX = dS * (the soft cap's derivative),  dQ = scale dX K,  dK = scale dX^T Q
//   dBias = dS, dSink = -sum exp(sink - lse) delta, and T5's bias gets dS by the bucket of its diagonal
//
// One task for each batch and key head, or for each chunk of kKeys of its keys too where heads are few: dK and
// dV are summed over the group's heads and queries in float32 scratch. dQ is the sum of what each chunk gives,
// in the order of the chunks, whichever task computed them, so that results have the same bits for any number
// of threads and any batch. Where the bias is one for several batches or heads, one task goes through them all
// and adds to its gradient in order. T5's bias takes a number for each diagonal, then for each bucket.
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
  int64_t n;  // keys up to the last that it sees
  Exponent exponent;
  float delta;
  uint32_t* keep;
  const float* slope;  // of the soft cap, or null
  float* d_score;      // for dS, or null
};

// P and dX of `count` rows of a tile, two or the last one, from their scores and dO V^T.
template <bool Shaped, class E>
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
        if constexpr (Shaped) {
          if (rows[u].d_score) store(rows[u].d_score + at, d);
          if (rows[u].slope) d = select(d == 0.0f, vf{}, d * load(rows[u].slope + at));
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
  Heads<float> lse, d_lse;
  Heads<T> dq, dk, dv;
  const Tensor &d_bias, &d_relative_bias, &d_sinks;
};

void add_row(float* out, const float* row, int64_t n) {
  for_vectors(n, [&](int64_t c, auto count) {
    store_n(out + c, load_n(out + c, count) + load_n(row + c, count), count);
  });
}

// Adds n values of dS, of query i and the keys from j on, to the bias's gradient, float32.
void add_to_bias(const Bias& place, float* d_bias, const Sequence& s, int64_t h, int64_t i, int64_t j,
                 const float* d_score, int64_t n) {
  float* out = d_bias + place.at(s.index, h, i, j);
  if (place.stride[3] != 0) return add_row(out, d_score, n);
  *out += accumulate<1>(n, [&](int64_t c, auto count, vf* sums) { sums[0] += load_n(d_score + c, count); })[0];
}

// Operands packed from the keys [first, end) of a head, `first` a multiple of kKeys, and the sums of their
// gradients.
template <class E> struct Chunk {
  int64_t first, end;
  Tiles<E> k, v, k_across;
  float *dk, *dv;
};

// What dS is added to besides: the bias's gradient, and a head's sums along diagonals. Either may be null.
struct Shared {
  const Bias& bias;
  const Bias& d_bias_place;
  float* d_bias;
  const Diagonals& diagonals;
  float* d_diagonals;
};

inline float delta_of(float product, const Heads<float>& d_lse, int64_t b, int64_t h, int64_t i) {
  return d_lse ? product - *d_lse.at(b, h, i) : product;
}

template <class T> float row_delta(const Problem& p, const Backward<T>& t, int64_t b, int64_t h, int64_t i) {
  const T *g = t.d_out.at(b, h, i), *o = t.out.at(b, h, i);
  const float product = accumulate<1>(p.v_width, [&](int64_t c, auto count, vf* sums) {
    sums[0] = fma(load_n(g + c, count), load_n(o + c, count), sums[0]);
  })[0];
  return delta_of(product, t.d_lse, b, h, i);
}

// Adds what the queries [first, first + rows) of one head give to the chunk's dk and dv, and writes the sum of
// what its tiles give to their dq, unscaled, to `dq` if that is not null. Whether there were any tiles.
template <bool Shaped, class T, class E>
bool backward_block(const Problem& p, const Backward<T>& t, const Chunk<E>& chunk, const Shared& shared,
                    const Sequence& s, int64_t h, int64_t first, int64_t rows, float* dq) {
  const int64_t b = s.index;
  Range keys = p.seen(s, first, first + rows - 1);
  keys.first = std::max(keys.first / p.tile * p.tile, chunk.first);
  keys.end = std::min(keys.end, chunk.end);
  const auto next = [&](int64_t j) {
    while (j < keys.end && !p.meets(b, first, j)) j += p.tile;
    return j;
  };
  int64_t j = next(keys.first);
  if (j >= keys.end) return false;
  Scratch scratch;
  const bool d_scores = Shaped && (shared.d_bias || shared.d_diagonals);
  const bool gradient_of_scores = dq || chunk.dk || d_scores;
  float* scores = scratch.take<float>(rows * kPitch);
  float* d_weights = scratch.take<float>(rows * kPitch);
  float* dq_part = scratch.take<float>(rows * p.width);
  const Weights<E> weights(rows, scores, d_weights, scratch);
  const Left q = gemm::left<E>(t.q.at(b, h, first), t.q.row, 1, rows, p.width, scratch, true);
  const Left d_out = gemm::left<E>(t.d_out.at(b, h, first), t.d_out.row, 1, rows, p.v_width, scratch, true);
  Packed<E> q_across{}, d_out_across{};
  if (chunk.dk) q_across = gemm::pack<E>(t.q.at(b, h, first), t.q.row, 1, rows, p.width, scratch);
  if (chunk.dv)
    d_out_across = gemm::pack<E>(t.d_out.at(b, h, first), t.d_out.row, 1, rows, p.v_width, scratch);
  float delta[kQueries];
  for (int64_t r = 0; r < rows; ++r) delta[r] = row_delta(p, t, b, h, first + r);
  uint32_t* keep[2] = {};
  float *slope[2] = {}, *d_score[2] = {};
  for (int u = 0; u < 2; ++u) {
    if (p.dropout) keep[u] = scratch.take<uint32_t>(kPitch);
    if (Shaped && p.options.softcap > 0.0) {
      slope[u] = scratch.take<float>(kPitch);
      std::fill_n(slope[u], kPitch, 0.0f);
    }
    if (d_scores) d_score[u] = scratch.take<float>(kPitch);
  }
  bool any = false, any_here = false;  // in this call, and in this run of kKeys keys
  for (int64_t following; j < keys.end; j = following) {
    following = next(j + p.tile);
    const int64_t columns = std::min(p.tile, keys.end - j), at = j - chunk.first;
    gemm::multiply_part(q, chunk.k.at(j), rows, p.width, 0, columns, scores, kPitch, false);
    if (gradient_of_scores)
      gemm::multiply_part(d_out, chunk.v.at(j), rows, p.v_width, 0, columns, d_weights, kPitch, false);
    for (int64_t r = 0; r < rows; r += 2) {
      Row pair[2] = {};
      Range seen[2] = {};
      const int count = r + 1 < rows ? 2 : 1;
      for (int u = 0; u < count; ++u) {
        const int64_t i = first + r + u;
        const Range mine = p.seen(s, i);
        const int64_t n = std::clamp<int64_t>(mine.end - j, 0, columns);
        seen[u] = {std::clamp<int64_t>(mine.first - j, 0, n), n};
        float* row = scores + (r + u) * kPitch;
        if constexpr (Shaped)
          shape_row(p, s, shared.bias, shared.diagonals, h, i, j, seen[u].first, n, row, slope[u]);
        else std::fill_n(row, seen[u].first, p.unseen);
        if (p.dropout) keep_row(p, b, h, i, j, columns, keep[u]);
        const float lse = *t.lse.at(b, h, i);
        const auto [lse2, lse2_rest] = split(lse == -kInf ? kInf : lse * kLog2e);  // of nothing: weights 0
        pair[u] = {n, {p.scale2, p.scale2_rest, lse2, lse2_rest}, delta[r + u], keep[u], slope[u], d_score[u]};
      }
      softmax_gradient<Shaped>(scores, d_weights, r, count, columns, p.kept_scale, pair, weights);
      for (int u = 0; d_scores && u < count; ++u) {
        const int64_t i = first + r + u, skip = seen[u].first, n = seen[u].end - skip;
        if (n <= 0) continue;
        const float* row = d_score[u] + skip;
        if (shared.d_bias) add_to_bias(shared.d_bias_place, shared.d_bias, s, h, i, j + skip, row, n);
        if (shared.d_diagonals)
          add_row(shared.d_diagonals + (j + skip - i - s.shift - shared.diagonals.lowest), row, n);
      }
    }
    if (chunk.dv)
      gemm::multiply_part(weights.p_by_queries(), d_out_across, columns, rows, 0, p.v_width,
                          chunk.dv + at * p.v_width, p.v_width, true);
    if (chunk.dk)
      gemm::multiply_part(weights.ds_by_queries(), q_across, columns, rows, 0, p.width,
                          chunk.dk + at * p.width, p.width, true);
    if (dq) {
      // A run of kKeys is summed by itself first: so the sum is the same if every run is a task of its own.
      float* part = any ? dq_part : dq;
      gemm::multiply_part(weights.ds_by_keys(), chunk.k_across.at(j), rows, columns, 0, p.width, part, p.width,
                          any_here);
      any_here = following < keys.end && following / kKeys == j / kKeys;
      if (!any_here) {
        if (any) add_row(dq, dq_part, rows * p.width);
        any = true;
      }
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

// The sums along diagonals of one head, added to those of its buckets.
void add_to_buckets(const Problem& p, const Diagonals& place, const float* d_diagonals, double* buckets) {
  for (int64_t c = 0; c < place.count; ++c)
    buckets[p.bucket(place.lowest + c)] += static_cast<double>(d_diagonals[c]);
}

// d_sinks (heads) += -sum over sequences and queries of exp(sink - lse) delta.
template <class T> void sink_gradient(const Problem& p, const Backward<T>& t) {
  const Tensor &sinks = p.options.sinks, &gradient = t.d_sinks;
  if (!gradient.defined()) return;
  parallel_for(p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const double sink = number(sinks, h * sinks.stride[0]);
      double sum = 0.0;
      for (int64_t b = 0; b < p.batches; ++b) {
        const int64_t queries = p.sequence(b).queries;
        for (int64_t i = 0; i < queries; ++i) {
          const double lse = *t.lse.at(b, h, i);
          if (lse != -kInf) sum -= std::exp(sink - lse) * row_delta(p, t, b, h, i);
        }
      }
      gradient.as<float>()[h * gradient.stride[0]] += static_cast<float>(sum);
    }
  });
}

template <bool Shaped, class T> void backward(const Problem& p, const Backward<T>& t) {
  using E = gemm::Element<T>;
  const Tensor &relative = t.d_relative_bias, &bias_gradient = t.d_bias;
  const Bias bias(p.options.bias);
  const bool wants_bias = bias_gradient.numel() > 0;
  // The bias's gradient is summed in float32, in place if it is that.
  Tensor sums = bias_gradient;
  std::vector<float> wide;
  if (wants_bias && !bias_gradient.is<float>()) {
    wide.resize(bias_gradient.numel());
    sums.data = wide.data();
  }
  const Bias d_bias_place(sums);
  float* d_bias = wants_bias ? static_cast<float*>(sums.data) : nullptr;
  if (d_bias) std::fill_n(d_bias, sums.numel(), 0.0f);

  // Batches and key heads that share the bias's gradient make one task.
  const auto shares = [&](int d) { return wants_bias && bias_gradient.size(d) == 1; };
  const int64_t batch_tasks = shares(0) ? std::min<int64_t>(p.batches, 1) : p.batches;
  const int64_t head_tasks = shares(1) ? 1 : p.key_heads;
  const int64_t units = batch_tasks * head_tasks, dq_size = p.rows * p.width;
  const int64_t all_chunks = (p.keys + kKeys - 1) / kKeys;
  const bool by_chunk = units < kTasks && all_chunks > 1 && !shares(3) &&
                        (!t.dq || all_chunks * dq_size * static_cast<int64_t>(sizeof(float)) <= kPartials);
  const int64_t chunks = by_chunk ? all_chunks : 1;
  Scratch scope;
  float* partial = by_chunk && t.dq ? scope.take<float>(chunks * dq_size) : nullptr;
  std::vector<uint8_t> written(partial ? chunks * p.rows : 0);
  const int64_t buckets = relative.defined() ? relative.size(0) : 0;
  std::vector<double> bucket_sums(p.batches * p.heads * chunks * buckets);

  const auto run = [&](int64_t b, int64_t hk, int64_t c) {
    const Sequence s = p.sequence(b);
    const int64_t all = p.k_starts.empty() ? p.keys : p.k_starts[b + 1] - p.k_starts[b];
    const int64_t first = std::min(c * kKeys, all), last = by_chunk ? std::min(first + kKeys, all) : all;
    const int64_t known = std::clamp(s.keys, first, last);
    Scratch scratch;
    Chunk<E> chunk{first, known, {}, {}, {}, nullptr, nullptr};
    const bool scores = t.dq || t.dk || d_bias || buckets;
    const auto needed = [](int64_t) { return true; };
    chunk.k = tiles<E>(p, t.k, b, hk, {first, known}, p.width, true, scratch, needed);
    if (scores) chunk.v = tiles<E>(p, t.v, b, hk, {first, known}, p.v_width, true, scratch, needed);
    if (t.dq) chunk.k_across = tiles<E>(p, t.k, b, hk, {first, known}, p.width, false, scratch, needed);
    const auto zeros = [&](bool wanted, int64_t n) {
      float* out = wanted ? scratch.take<float>(n) : nullptr;
      if (wanted) std::fill_n(out, n, 0.0f);
      return out;
    };
    chunk.dk = zeros(static_cast<bool>(t.dk), (known - first) * p.width);
    chunk.dv = zeros(static_cast<bool>(t.dv), (known - first) * p.v_width);
    float* own_dq = t.dq && !by_chunk ? scratch.take<float>(kQueries * p.width) : nullptr;
    for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h) {
      Scratch of_head;
      const Diagonals distances = diagonals(p, s, h, of_head);
      float* d_diagonals = buckets ? of_head.take<float>(distances.count) : nullptr;
      if (d_diagonals) std::fill_n(d_diagonals, distances.count, 0.0f);
      const Shared shared{bias, d_bias_place, d_bias, distances, d_diagonals};
      for (int64_t i = 0; i < s.queries; i += kQueries) {
        const int64_t rows = std::min(kQueries, s.queries - i);
        float* dq = partial ? partial + c * dq_size + p.row(b, h, i) * p.width : own_dq;
        const bool any = backward_block<Shaped, T, E>(p, t, chunk, shared, s, h, i, rows, dq);
        if (partial && any) std::fill_n(written.data() + c * p.rows + p.row(b, h, i), rows, uint8_t{1});
        if (!own_dq) continue;
        if (!any) std::fill_n(dq, rows * p.width, 0.0f);
        for (int64_t r = 0; r < rows; ++r)
          store_row(t.dq.at(b, h, i + r), dq + r * p.width, p.width, p.scale);
      }
      if (d_diagonals)
        add_to_buckets(p, distances, d_diagonals,
                       bucket_sums.data() + ((b * p.heads + h) * chunks + c) * buckets);
    }
    if (t.dk) store_keys(t.dk, b, hk, first, last, known, p.width, chunk.dk, p.scale);
    if (t.dv) store_keys(t.dv, b, hk, first, last, known, p.v_width, chunk.dv, p.kept_scale);
  };
  parallel_for(units * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / chunks, c = paired(task % chunks, chunks);
      for (int64_t b = unit / head_tasks; b < p.batches; b += batch_tasks)
        for (int64_t hk = unit % head_tasks; hk < p.key_heads; hk += head_tasks) run(b, hk, c);
    }
  });

  if (partial)
    parallel_for(p.batches * p.heads, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      float* total = scratch.take<float>(p.width);
      for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t b = bh / p.heads, h = bh % p.heads, queries = p.sequence(b).queries;
        for (int64_t i = 0; i < queries; ++i) {
          const int64_t row = p.row(b, h, i);
          std::fill_n(total, p.width, 0.0f);
          for (int64_t c = 0; c < chunks; ++c)
            if (written[c * p.rows + row]) add_row(total, partial + c * dq_size + row * p.width, p.width);
          store_row(t.dq.at(b, h, i), total, p.width, p.scale);
        }
      }
    });
  for (int64_t h = 0; h < p.heads && buckets; ++h)
    for (int64_t n = 0; n < buckets; ++n) {
      double sum = 0.0;
      for (int64_t b = 0; b < p.batches; ++b)
        for (int64_t c = 0; c < chunks; ++c)
          sum += bucket_sums[((b * p.heads + h) * chunks + c) * buckets + n];
      relative.as<float>()[n * relative.stride[0] + h * relative.stride[1]] += static_cast<float>(sum);
    }
  if (d_bias && bias_gradient.is<bf16>()) {
    bf16* out = bias_gradient.as<bf16>();
    parallel_for(sums.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      store_row(out + begin, d_bias + begin, end - begin, 1.0f);
    });
  }
  sink_gradient(p, t);
}

void run(Tensor d_out, const Tensor& d_lse, const Tensor& q, const Tensor& k, const Tensor& v,
         const Options& options, const Tensor& out, const Tensor& lse, const Tensor& dq, const Tensor& dk,
         const Tensor& dv, const Tensor& d_bias, const Tensor& d_relative_bias, const Tensor& d_sinks) {
  const Problem p = problem(q, k, v, options);
  require_like(d_out, "d_out", q, p.v_width);
  require_like(out, "out", q, p.v_width);
  require_lse(lse, "lse", q);
  require_lse(d_lse, "d_lse", q);
  require_like(dq, "dq", q, p.width);
  require_like(dk, "dk", k, p.width);
  require_like(dv, "dv", v, p.v_width);
  require(!d_bias.defined() || (d_bias.contiguous() && d_bias.dtype == options.bias.dtype),
          "d_bias must be contiguous and of bias's dtype");
  require(!d_relative_bias.defined() || d_relative_bias.is<float>(), "d_relative_bias must be float32");
  require(!d_sinks.defined() || d_sinks.is<float>(), "d_sinks must be float32");
  const int64_t *of_queries = p.of_queries(), *of_keys = p.of_keys();
  for_dtype(q, [&](auto element) {
    using T = decltype(element);
    std::vector<T> zeros(d_out.defined() ? 0 : p.v_width);
    const Heads<T> g = d_out.defined() ? heads<T>(d_out, of_queries) : Heads<T>{zeros.data(), 0, 0, 0, nullptr};
    const Heads<float> g_lse =
        d_lse.defined() ? row_values(d_lse, of_queries) : Heads<float>{nullptr, 0, 0, 0, nullptr};
    const auto maybe = [&](const Tensor& t, const int64_t* starts) {
      return t.defined() ? heads<T>(t, starts) : Heads<T>{nullptr, 0, 0, 0, nullptr};
    };
    const Backward<T> all{g,
                          heads<T>(q, of_queries),
                          heads<T>(k, of_keys),
                          heads<T>(v, of_keys),
                          heads<T>(out, of_queries),
                          row_values(lse, of_queries),
                          g_lse,
                          maybe(dq, of_queries),
                          maybe(dk, of_keys),
                          maybe(dv, of_keys),
                          d_bias,
                          d_relative_bias,
                          d_sinks};
    if (p.shaped) backward<true>(p, all);
    else backward<false>(p, all);
    clear_unused<T>(dq, p.q_starts);
    clear_unused<T>(dk, p.k_starts);
    clear_unused<T>(dv, p.k_starts);
  });
}

}  // namespace

// As attention_forward; d_out and d_lse like out and lse, or None; dq, dk, dv like q, k, v, d_bias like bias,
// d_relative_bias and d_sinks float32 and added to, or None for one that is not wanted.
void attention_backward(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor bias,
                        Tensor relative_bias, Tensor sinks, Tensor alibi_slopes, Tensor key_lengths,
                        Tensor segment_ids, Tensor key_segment_ids, Tensor dropout_seed, Tensor out, Tensor lse,
                        int64_t left, int64_t right, bool top_left, double scale, double softcap,
                        bool bidirectional, int64_t max_distance, double dropout_p, Tensor dq, Tensor dk,
                        Tensor dv, Tensor d_bias, Tensor d_relative_bias, Tensor d_sinks) {
  run(d_out, d_lse, q, k, v,
      {bias, relative_bias, sinks, alibi_slopes, key_lengths, segment_ids, key_segment_ids, {}, {}, dropout_seed,
       left, right, top_left, scale, softcap, bidirectional, max_distance, dropout_p},
      out, lse, dq, dk, dv, d_bias, d_relative_bias, d_sinks);
}
FASTLM_EXPORT(attention_backward);

void varlen_attention_backward(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor bias,
                               Tensor relative_bias, Tensor sinks, Tensor alibi_slopes, Tensor key_lengths,
                               Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor dropout_seed, Tensor out,
                               Tensor lse, int64_t left, int64_t right, bool top_left, double scale,
                               double softcap, bool bidirectional, int64_t max_distance, double dropout_p,
                               int64_t, int64_t, Tensor dq, Tensor dk, Tensor dv, Tensor d_bias,
                               Tensor d_relative_bias, Tensor d_sinks) {
  run(d_out, d_lse, q, k, v,
      {bias, relative_bias, sinks, alibi_slopes, key_lengths, {}, {}, cu_seqlens_q, cu_seqlens_k, dropout_seed,
       left, right, top_left, scale, softcap, bidirectional, max_distance, dropout_p},
      out, lse, dq, dk, dv, d_bias, d_relative_bias, d_sinks);
}
FASTLM_EXPORT(varlen_attention_backward);

}  // namespace fastlm
