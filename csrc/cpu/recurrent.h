// Recurrent layers over a whole sequence: what lstm, gru and rnn share beside their cells.
//
// One team of threads goes through all the steps and meets at a barrier once a step. A thread owns the same
// hidden units of the same rows throughout, so what it carries stays in its cache, as does its part of the
// recurrent weight, which is packed once a call. Forward, a block of weight holds the rows of all gates of its
// units: the product of a block lies in the first-level cache when the cell reads it. Backward, the cell writes
// the gradient of the product, the team meets, and each thread multiplies it by its columns of the weight.
// The weight's gradient is one product over all steps, after them.
#pragma once

#include "gemm.h"
#include "rows.h"

namespace fastlm {
namespace recurrent {

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// Cells, on vectors of units: `x` and `r` are the gates' parts of the inputs and of the recurrent product,
// `kept` what backward reads, `passed` what the gradient of the state before gets not through the product.
struct Lstm {
  static constexpr int kGates = 4, kKept = 4;
  static constexpr bool kCell = true, kReadsBefore = false, kOwnRecurrent = false;

  static vf step(const vf* x, const vf* r, vf /*h*/, vf& c, vf* kept) {
    const vf i = sigmoid(x[0] + r[0]), f = sigmoid(x[1] + r[1]), g = tanh(x[2] + r[2]), o = sigmoid(x[3] + r[3]);
    c = fma(f, c, i * g);
    kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
    return o * tanh(c);
  }
  static vf back(vf dh, vf& dc, vf /*before*/, vf c_before, vf /*h*/, vf c, const vf* kept, vf* dx, vf* /*dr*/) {
    const vf i = kept[0], f = kept[1], g = kept[2], o = kept[3], squashed = tanh(c);
    dc = fma(dh * o, 1.0f - squashed * squashed, dc);
    dx[0] = dc * g * i * (1.0f - i);
    dx[1] = dc * c_before * f * (1.0f - f);
    dx[2] = dc * i * (1.0f - g * g);
    dx[3] = dh * squashed * o * (1.0f - o);
    dc = dc * f;
    return vf{};
  }
};

struct Gru {
  static constexpr int kGates = 3, kKept = 4;
  static constexpr bool kCell = false, kReadsBefore = true, kOwnRecurrent = true;

  static vf step(const vf* x, const vf* r, vf h, vf& /*c*/, vf* kept) {
    const vf reset = sigmoid(x[0] + r[0]), update = sigmoid(x[1] + r[1]), fresh = tanh(fma(reset, r[2], x[2]));
    kept[0] = reset, kept[1] = update, kept[2] = fresh, kept[3] = r[2];
    return fma(1.0f - update, fresh, update * h);
  }
  static vf back(vf dh, vf& /*dc*/, vf before, vf /*c_before*/, vf /*h*/, vf /*c*/, const vf* kept, vf* dx, vf* dr) {
    const vf reset = kept[0], update = kept[1], fresh = kept[2], q = kept[3];
    dx[2] = dh * (1.0f - update) * (1.0f - fresh * fresh);
    dx[0] = dr[0] = dx[2] * q * reset * (1.0f - reset);
    dx[1] = dr[1] = dh * (before - fresh) * update * (1.0f - update);
    dr[2] = dx[2] * reset;
    return dh * update;
  }
};

template <bool Relu> struct Rnn {
  static constexpr int kGates = 1, kKept = 0;
  static constexpr bool kCell = false, kReadsBefore = false, kOwnRecurrent = false;

  static vf step(const vf* x, const vf* r, vf /*h*/, vf& /*c*/, vf* /*kept*/) {
    const vf u = x[0] + r[0];
    return Relu ? select(u < 0.0f, vf{}, u) : tanh(u);
  }
  static vf back(vf dh, vf& /*dc*/, vf /*before*/, vf /*c_before*/, vf h, vf /*c*/, const vf* /*kept*/, vf* dx,
                 vf* /*dr*/) {
    dx[0] = Relu ? select(h > 0.0f, dh, vf{}) : dh * (1.0f - h * h);
    return vf{};
  }
};

// What a call is over. `step` counts as the layer runs, `time` as the sequence lies.
struct Run {
  int64_t seq, batch, hidden;
  const int64_t* lengths;
  bool reverse;

  int64_t time(int64_t step) const { return reverse ? seq - 1 - step : step; }
  bool here(int64_t time, int64_t row) const { return lengths == nullptr || time < lengths[row]; }
};

// Work of one step: bands of rows times blocks of hidden units.
struct Items {
  int64_t blocks, bands, rows, batch, threads;

  Items(int64_t blocks, int64_t batch) : blocks(blocks), batch(batch), threads(thread_count()) {
    // As many bands as leave the busiest thread the least: a tile of rows costs about as much when it is not
    // full. Results do not depend on it: an element of a product has the same bits in any partition.
    constexpr int64_t kMostRows = 192, kLeastRows = 2 * gemm::kTileRows;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t n = (batch + kMostRows - 1) / kMostRows; n == 1 || batch / n >= kLeastRows; ++n) {
      const int64_t tiles = ((batch + n - 1) / n + gemm::kTileRows - 1) / gemm::kTileRows;
      const int64_t cost = (blocks * n + threads - 1) / threads * tiles;
      if (cost < least) least = cost, bands = n;
      if (n >= threads * 4) break;
    }
    rows = (batch + bands - 1) / bands;
    threads = std::min(threads, blocks * bands);
  }
  int64_t count() const { return blocks * bands; }
  int64_t block(int64_t item) const { return item / bands; }
  int64_t first_row(int64_t item) const { return std::min(item % bands * rows, batch); }
  int64_t end_row(int64_t item) const { return std::min(first_row(item) + rows, batch); }
};

// For every step: first(step, item, thread) of all items, a barrier, then second(step, item, thread); an item
// belongs to one thread throughout. Neither may throw.
template <class First, class Second>
void run_steps(int64_t steps, const Items& items, First&& first, Second&& second) {
  const auto run = [&](int64_t thread, int64_t team, auto&& meet) {
    const int64_t begin = items.count() * thread / team, end = items.count() * (thread + 1) / team;
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t i = begin; i < end; ++i) first(s, i, thread);
      meet();
      for (int64_t i = begin; i < end; ++i) second(s, i, thread);
    }
  };
#if defined(_OPENMP)
  if (items.threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(items.threads))
    run(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
    return;
  }
#endif
  run(0, 1, [] {});
}

// (batch, hidden) with any strides but the last, as contiguous float32 or as what products read; 0 if there
// is none.
template <class To, class T> To* state(const Tensor& t, int64_t batch, int64_t hidden, Scratch& scratch) {
  To* out = scratch.take<To>(batch * hidden);
  if (!t.defined()) {
    std::memset(static_cast<void*>(out), 0, static_cast<size_t>(batch * hidden) * sizeof(To));
    return out;
  }
  for (int64_t b = 0; b < batch; ++b)
    for_vectors(hidden, [&](int64_t j, auto count) {
      store_n(out + b * hidden + j, load_n(t.as<T>() + b * t.stride[0] + j, count), count);
    });
  return out;
}
template <class To, class From> void copy(const From* from, To* to, int64_t n) {
  for_vectors(n, [&](int64_t j, auto count) { store_n(to + j, load_n(from + j, count), count); });
}

template <class Cell, class T> struct Forward {
  using E = gemm::Element<T>;
  static constexpr int G = Cell::kGates, K = Cell::kKept;
  static constexpr int64_t kUnits = G == 1 ? 4 * W : W;  // of a block; its columns fill whole panels
  static constexpr int64_t kColumns = G * kUnits;

  // The weight's rows (gates * hidden, hidden) as packed blocks.
  static uint32_t* pack(const Tensor& weight, int64_t hidden, Scratch& scratch) {
    const int64_t blocks = (hidden + kUnits - 1) / kUnits, size = gemm::packed_words<E>(hidden, kColumns);
    uint32_t* out = scratch.take<uint32_t>(blocks * size);
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch own;
      T* rows = own.take<T>(kColumns * hidden);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t units = std::min(kUnits, hidden - u * kUnits);
        for (int64_t g = 0; g < G; ++g)
          for (int64_t i = 0; i < kUnits; ++i) {
            T* row = rows + (g * kUnits + i) * hidden;
            const size_t bytes = static_cast<size_t>(hidden) * sizeof(T);
            if (i >= units) std::memset(static_cast<void*>(row), 0, bytes);
            else std::memcpy(row, weight.as<T>() + (g * hidden + u * kUnits + i) * weight.stride[0], bytes);
          }
        gemm::pack<E>(rows, 1, hidden, hidden, kColumns, out + u * size);
      }
    });
    return out;
  }

  static void run(const Run& run, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& h0,
                  const Tensor& c0, T* y, T* h, T* c, T* kept, float* cells) {
    const int64_t hidden = run.hidden, batch = run.batch;
    Scratch scratch;
    E* states[2] = {state<E, T>(h0, batch, hidden, scratch), scratch.take<E>(batch * hidden)};
    const float* first_c = Cell::kCell ? state<float, T>(c0, batch, hidden, scratch) : nullptr;
    const Tensor none;
    const float* b = bias.defined() ? floats(bias, scratch) : state<float, float>(none, G, hidden, scratch);
    const uint32_t* packed = pack(weight, hidden, scratch);
    const Items items((hidden + kUnits - 1) / kUnits, batch);
    float* products = scratch.take<float>(items.threads * items.rows * kColumns);

    const auto work = [&](int64_t step, int64_t item, int64_t thread) {
      const int64_t t = run.time(step), u = items.block(item), r0 = items.first_row(item), r1 = items.end_row(item);
      const int64_t j0 = u * kUnits, units = std::min(kUnits, hidden - j0);
      const E* before = states[step % 2];
      E* after = states[1 - step % 2];
      float* product = products + thread * items.rows * kColumns;
      const gemm::Packed<E> block{packed + u * gemm::packed_words<E>(hidden, kColumns), hidden, kColumns};
      const gemm::Left left{reinterpret_cast<const char*>(before + r0 * hidden),
                            hidden * static_cast<int64_t>(sizeof(E)), sizeof(uint32_t)};
      gemm::multiply(left, block, r1 - r0, product, kColumns, false);
      for (int64_t r = r0; r < r1; ++r) {
        const bool here = run.here(t, r);
        const int64_t at = t * batch + r;
        const T* in = x.as<T>() + t * x.stride[0] + r * x.stride[1];
        const float* c_before = step == 0 ? first_c + r * hidden : cells + (run.time(step - 1) * batch + r) * hidden;
        for_vectors(units, [&](int64_t i, auto count) {
          const int64_t j = j0 + i;
          vf parts[G], r_parts[G], keep[K + 1] = {}, cell = {};
          const vf old = load_n(before + r * hidden + j, count);
          if constexpr (Cell::kCell) cell = load_n(c_before + j, count);
          vf out = {}, next = old;
          if (here) {
            for (int g = 0; g < G; ++g) {
              parts[g] = load_n(in + g * hidden + j, count);
              r_parts[g] = load(product + (r - r0) * kColumns + g * kUnits + i) + load_n(b + g * hidden + j, count);
            }
            next = out = Cell::step(parts, r_parts, old, cell, keep);
          }
          store_n(y + at * hidden + j, out, count);
          if (here && !std::is_same_v<E, T>) next = load_n(y + at * hidden + j, count);  // as it was rounded
          store_n(after + r * hidden + j, next, count);
          for (int k = 0; k < K; ++k) store_n(kept + (at * K + k) * hidden + j, keep[k], count);
          if constexpr (Cell::kCell) store_n(cells + at * hidden + j, cell, count);
        });
      }
    };
    run_steps(run.seq, items, work, [](int64_t, int64_t, int64_t) {});
    copy(states[run.seq % 2], h, batch * hidden);
    if constexpr (Cell::kCell)
      copy(run.seq == 0 ? first_c : cells + run.time(run.seq - 1) * batch * hidden, c, batch * hidden);
  }
};

// Upstream gradients and gradients to be made; c's are for a cell that has it. Undefined where there is none.
struct Gradients {
  Tensor dy, dh, dc, dx, dweight, dbias, dh0, dc0;
};

template <class Cell, class T> struct Backward {
  using E = gemm::Element<T>;
  static constexpr int G = Cell::kGates, K = Cell::kKept;
  static constexpr int64_t kUnits = gemm::kPanel;

  // dweight (gates * hidden, hidden) += the sum over rows and steps of d_recurrent^T h, h the state before.
  static void weight_gradient(const Run& run, const T* d_recurrent, const T* y, const Tensor& h0, float* dweight) {
    const int64_t width = G * run.hidden, slab = run.batch * width, outputs = run.batch * run.hidden;
    const T* later = d_recurrent + (run.reverse ? 0 : slab);
    gemm::multiply_parallel<E>(later, 1, width, y + (run.reverse ? outputs : 0), run.hidden, 1, width, run.hidden,
                               (run.seq - 1) * run.batch, dweight, run.hidden, true);
    if (!h0.defined()) return;
    Scratch scratch;
    const T* first = d_recurrent + run.time(0) * slab;
    if (run.reverse && run.lengths != nullptr) {  // each row begins at its own last element
      T* own = scratch.take<T>(slab);
      for (int64_t r = 0; r < run.batch; ++r) {
        const int64_t last = std::max<int64_t>(std::min(run.lengths[r], run.seq) - 1, 0);
        std::memcpy(own + r * width, d_recurrent + last * slab + r * width, static_cast<size_t>(width) * sizeof(T));
      }
      first = own;
    }
    gemm::multiply_parallel<E>(first, 1, width, h0.as<T>(), h0.stride[0], 1, width, run.hidden, run.batch, dweight,
                               run.hidden, true);
  }

  // dbias (n) += the sum of the rows, first within a step.
  static void bias_gradient(const Run& run, const T* rows, float* dbias) {
    const int64_t n = G * run.hidden;
    parallel_for(n, 4 * W, [&](int64_t begin, int64_t end) {
      for_vectors(end - begin, [&](int64_t i, auto count) {
        vf total = {};
        for (int64_t t = 0; t < run.seq; ++t) {
          vf step = {};
          for (int64_t r = 0; r < run.batch; ++r) step += load_n(rows + (t * run.batch + r) * n + begin + i, count);
          total += step;
        }
        store_n(dbias + begin + i, load_n(dbias + begin + i, count) + total, count);
      });
    });
  }

  static void run(const Run& run, const Gradients& d, const Tensor& weight, const Tensor& h0, const Tensor& c0,
                  const T* y, const T* kept, const float* cells) {
    const int64_t hidden = run.hidden, batch = run.batch, width = G * hidden;
    Scratch scratch;
    float* dh = state<float, T>(d.dh, batch, hidden, scratch);
    float* dc = Cell::kCell ? state<float, T>(d.dc, batch, hidden, scratch) : nullptr;
    const T* first_h = Cell::kReadsBefore ? state<T, T>(h0, batch, hidden, scratch) : nullptr;
    const float* first_c = Cell::kCell ? state<float, T>(c0, batch, hidden, scratch) : nullptr;
    const bool parameters = d.dweight.wanted<float>() != nullptr || d.dbias.wanted<float>() != nullptr;
    T* dx = d.dx.wanted<T>();
    T* own = parameters && (Cell::kOwnRecurrent || dx == nullptr) ? scratch.take<T>(run.seq * batch * width) : nullptr;
    E* slabs[2] = {scratch.take<E>(batch * width), scratch.take<E>(batch * width)};

    const int64_t blocks = (hidden + kUnits - 1) / kUnits, size = gemm::packed_words<E>(width, kUnits);
    uint32_t* packed = scratch.take<uint32_t>(blocks * size);
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        gemm::pack<E>(weight.as<T>() + u * kUnits, weight.stride[0], 1, width,
                      std::min(kUnits, hidden - u * kUnits), packed + u * size);
    });
    const Items items(blocks, batch);

    const auto cell = [&](int64_t step, int64_t item, int64_t) {
      const int64_t t = run.time(run.seq - 1 - step), before = run.reverse ? t + 1 : t - 1;
      const int64_t j0 = items.block(item) * kUnits, units = std::min(kUnits, hidden - j0);
      E* slab = slabs[step % 2];
      for (int64_t r = items.first_row(item); r < items.end_row(item); ++r) {
        const bool here = run.here(t, r), starts = step == run.seq - 1;
        const int64_t at = t * batch + r;
        const T* up = d.dy.defined() ? d.dy.as<T>() + t * d.dy.stride[0] + r * d.dy.stride[1] : nullptr;
        // The output is 0 at padding, where the state went by.
        const T* h_before = starts || !run.here(before, r) ? first_h + r * hidden : y + (before * batch + r) * hidden;
        const float* c_before = starts ? first_c + r * hidden : cells + (before * batch + r) * hidden;
        for_vectors(units, [&](int64_t i, auto count) {
          const int64_t j = j0 + i;
          vf parts[G] = {}, r_parts[G] = {};
          if (here) {
            vf up_h = load_n(dh + r * hidden + j, count), up_c = {}, keep[K + 1], old = {}, old_c = {}, now_c = {};
            if (up != nullptr) up_h += load_n(up + j, count);
            for (int k = 0; k < K; ++k) keep[k] = load_n(kept + (at * K + k) * hidden + j, count);
            if constexpr (Cell::kReadsBefore) old = load_n(h_before + j, count);
            if constexpr (Cell::kCell) {
              up_c = load_n(dc + r * hidden + j, count);
              old_c = load_n(c_before + j, count);
              now_c = load_n(cells + at * hidden + j, count);
            }
            const vf now = load_n(y + at * hidden + j, count);
            const vf passed = Cell::back(up_h, up_c, old, old_c, now, now_c, keep, parts, r_parts);
            store_n(dh + r * hidden + j, passed, count);
            if constexpr (Cell::kCell) store_n(dc + r * hidden + j, up_c, count);
          }
          for (int g = 0; g < G; ++g) {
            const vf recurrent = Cell::kOwnRecurrent ? r_parts[g] : parts[g];
            store_n(slab + r * width + g * hidden + j, recurrent, count);
            if (dx != nullptr) store_n(dx + at * width + g * hidden + j, parts[g], count);
            if (own != nullptr) store_n(own + at * width + g * hidden + j, recurrent, count);
          }
        });
      }
    };
    const auto product = [&](int64_t step, int64_t item, int64_t) {
      const int64_t u = items.block(item), r0 = items.first_row(item), j0 = u * kUnits;
      const gemm::Packed<E> block{packed + u * size, width, std::min(kUnits, hidden - j0)};
      const gemm::Left left{reinterpret_cast<const char*>(slabs[step % 2] + r0 * width),
                            width * static_cast<int64_t>(sizeof(E)), sizeof(uint32_t)};
      gemm::multiply(left, block, items.end_row(item) - r0, dh + r0 * hidden + j0, hidden, true);
    };
    run_steps(run.seq, items, cell, product);

    if (T* out = d.dh0.wanted<T>()) copy(dh, out, batch * hidden);
    if constexpr (Cell::kCell)
      if (T* out = d.dc0.wanted<T>()) copy(dc, out, batch * hidden);
    if (run.seq == 0) return;
    const T* d_recurrent = own != nullptr ? own : dx;
    if (float* out = d.dweight.wanted<float>()) weight_gradient(run, d_recurrent, y, h0, out);
    if (float* out = d.dbias.wanted<float>()) bias_gradient(run, d_recurrent, out);
  }
};

inline Run run_of(const Tensor& y, const Tensor& lengths, bool reverse) {
  return {y.size(0), y.size(1), y.size(2), lengths.as<int64_t>(), reverse};
}

// x (seq, batch, gates * hidden) and weight (gates * hidden, hidden) float32 or bfloat16, bias, h0 and c0 of
// the same or None, lengths (batch) int64 or None; y (seq, batch, hidden), h, c (batch, hidden) and kept of x's
// dtype, cells (seq, batch, hidden) float32, all contiguous; c, kept and cells as the cell has them.
template <class Cell>
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& h0, const Tensor& c0,
             const Tensor& lengths, bool reverse, const Tensor& y, const Tensor& h, const Tensor& c,
             const Tensor& kept, const Tensor& cells) {
  const Run run = run_of(y, lengths, reverse);
  require(x.size(2) == Cell::kGates * run.hidden && weight.size(0) == x.size(2) && weight.size(1) == run.hidden,
          "x must have ", Cell::kGates, " * ", run.hidden, " columns and weight as many rows");
  require_parameter(bias, "bias", x.size(2));
  if (run.batch == 0) return;
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    Forward<Cell, T>::run(run, x, weight, bias, h0, c0, y.as<T>(), h.as<T>(), c.as<T>(), kept.as<T>(),
                          cells.as<float>());
  });
}

// The forward's arguments and results; dy any strides but the last, dh and dc likewise, each None for 0;
// gradients of x's dtype, those of weight and bias float32 and added to. One that is None is not computed.
template <class Cell>
void backward(const Gradients& d, const Tensor& weight, const Tensor& h0, const Tensor& c0, const Tensor& lengths,
              const Tensor& y, const Tensor& kept, const Tensor& cells, bool reverse) {
  const Run run = run_of(y, lengths, reverse);
  if (run.batch == 0) return;
  for_dtype(y, [&](auto element) {
    using T = decltype(element);
    Backward<Cell, T>::run(run, d, weight, h0, c0, y.as<T>(), kept.as<T>(), cells.as<float>());
  }, "y");
}

}  // namespace recurrent
}  // namespace fastlm
