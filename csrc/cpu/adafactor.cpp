// Adafactor on one parameter in place; the formulas stand in fastlm/ops/adafactor.py.
//
// Passes over the gradient: its norm (unless given), the moments, the size of the update, the update; weights
// are read for their size with the moments. Blocks of rows (of elements, for a vector) are summed in their
// order.
#include "optimizer.h"

namespace fastlm {
namespace {

constexpr int64_t kMostBlocks = 64;  // each has sums of the columns of its own

struct Parameter {
  detail::Flat master, grad;
  int64_t rows, columns;  // a vector is one row
  float clip;
  int64_t grain() const { return std::max<int64_t>(1, kTile * kTileGrain / std::max<int64_t>(columns, 1)); }

  // fn(row, column, n, p, g, block) for pieces of rows, in parallel over blocks of rows; g is clipped.
  template <class Fn> void each(Fn&& fn) const {
    if (rows == 1) {
      parallel_for(
          detail::tile_count(columns), kTileGrain,
          [&](int64_t first, int64_t last, int64_t block) {
            pieces(0, first * kTile, std::min(last * kTile, columns), block, fn);
          },
          kMostBlocks);
      return;
    }
    parallel_for(
        rows, grain(),
        [&](int64_t first, int64_t last, int64_t block) {
          for (int64_t r = first; r < last; ++r) pieces(r, 0, columns, block, fn);
        },
        kMostBlocks);
  }

  int64_t blocks() const {
    return rows == 1 ? block_count(detail::tile_count(columns), kTileGrain, kMostBlocks)
                     : block_count(rows, grain(), kMostBlocks);
  }

 private:
  template <class Fn> void pieces(int64_t row, int64_t first, int64_t last, int64_t block, Fn& fn) const {
    Scratch scratch;
    float* room = scratch.take<float>(2 * kTile);
    for (int64_t begin = first; begin < last; begin += kTile) {
      const int64_t n = std::min(kTile, last - begin), at = row * columns + begin;
      const float* given = grad.open(at, n, room);
      float* g = room;  // a copy also of float32: clipping leaves the gradient as it is
      for_vectors(n, [&](int64_t i, auto count) { store_n(g + i, load_n(given + i, count) * clip, count); });
      fn(row, begin, n, master.open(at, n, room + kTile), g, block);
    }
  }
};

double sum(const double* x, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

// The second moments' estimate at a place of a row.
struct Estimate {
  const float *row, *column, *variance;  // row scaled by 1 / max(mean, eps1); of a vector only the variance
  float least;
  template <class Count> vf root(int64_t r, int64_t c, Count count) const {
    const vf v = variance ? load_n(variance + c, count, 1.0f) : row[r] * load_n(column + c, count, 1.0f);
    return sqrt(at_least(v, least));
  }
};

}  // namespace

// master (rows, columns) or (n), grad like it, float32 or bfloat16 each, contiguous; row_var (rows) and
// col_var (columns) float32 of a matrix, variance (n) float32 of a vector, the others None; the rest as
// adamw_forward takes it.
void adafactor_forward(Tensor master, Tensor grad, Tensor row_var, Tensor col_var, Tensor variance,
                       Tensor step, Tensor param, Tensor seed, Tensor norm, Tensor lr, double beta2_decay,
                       double eps1, double eps2, double d, double weight_decay, double max_norm,
                       bool zero_grad, Tensor grad_norm, Tensor skipped) {
  const int64_t n = master.numel();
  const bool matrix = master.ndim == 2;
  const int64_t rows = matrix ? master.size(0) : 1, columns = matrix ? master.size(1) : n;
  Parameter x{{master, "master", n}, {grad, "grad", n}, rows, columns, 1.0f};
  const detail::Flat copy(param, "param", n);
  require(matrix ? row_var.numel() == rows && col_var.numel() == columns : variance.numel() == n,
          "row_var, col_var and variance must have the sizes of master");
  for (const Tensor* t : {&lr, &grad_norm, &skipped})
    require(t->numel() == 1, "lr, grad_norm and skipped must have one element, got ", t->numel());

  const float length = norm.defined() ? *norm.as<float>()
                                      : static_cast<float>(std::sqrt(detail::sum_of_squares(x.grad, 0, n)));
  *grad_norm.as<float>() = length;
  *skipped.as<float>() = std::isfinite(length) ? 0.0f : 1.0f;
  const auto clear = [&] {
    if (zero_grad) parallel_for(n, kTile * kTileGrain, [&](int64_t a, int64_t b) { x.grad.clear(a, b - a); });
  };
  if (!std::isfinite(length)) return clear();
  x.clip = detail::clip_of(length, max_norm);
  const double t = detail::count_step(step), rate = *lr.as<float>();
  if (n == 0) return;
  const double keep = std::pow(t, beta2_decay);
  const auto mixed = [keep](float old, double mean) {
    return static_cast<float>(old * (1.0 - keep) + mean * keep);
  };

  Scratch scratch;
  const int64_t blocks = x.blocks();
  double* weights = scratch.take<double>(blocks);
  double* updates = scratch.take<double>(blocks);
  std::fill(weights, weights + blocks, 0.0);
  std::fill(updates, updates + blocks, 0.0);
  float* scaled = scratch.take<float>(matrix ? rows : 1);
  if (matrix) {
    double* in_rows = scratch.take<double>(rows);
    double* in_columns = scratch.take<double>(blocks * columns);
    std::fill(in_rows, in_rows + rows, 0.0);
    std::fill(in_columns, in_columns + blocks * columns, 0.0);
    x.each([&](int64_t r, int64_t c, int64_t count, const float* p, const float* g, int64_t block) {
      weights[block] += detail::sum_of_squares(p, count);
      in_rows[r] += detail::sum_of_squares(g, count);
      double* own = in_columns + block * columns + c;
      for (int64_t i = 0; i < count; ++i) own[i] += static_cast<double>(g[i]) * g[i];
    });
    float *row = row_var.as<float>(), *column = col_var.as<float>();
    double mean = 0.0;
    for (int64_t r = 0; r < rows; ++r) mean += row[r] = mixed(row[r], in_rows[r] / columns);
    const double least = std::max(mean / rows, eps1);
    for (int64_t r = 0; r < rows; ++r) scaled[r] = static_cast<float>(row[r] / least);
    parallel_for(columns, 256, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        double total = 0.0;
        for (int64_t b = 0; b < blocks; ++b) total += in_columns[b * columns + c];
        column[c] = mixed(column[c], total / rows);
      }
    });
  } else {
    float* v = variance.as<float>();
    x.each([&](int64_t, int64_t c, int64_t count, const float* p, const float* g, int64_t block) {
      weights[block] += detail::sum_of_squares(p, count);
      for (int64_t i = 0; i < count; ++i) v[c + i] = mixed(v[c + i], static_cast<double>(g[i]) * g[i]);
    });
  }

  const Estimate estimate{scaled, col_var.as<float>(), variance.as<float>(), static_cast<float>(eps1 * eps1)};
  x.each([&](int64_t r, int64_t c, int64_t count, const float*, float* g, int64_t block) {
    for_vectors(count,
                [&](int64_t i, auto k) { store_n(g + i, load_n(g + i, k) / estimate.root(r, c + i, k), k); });
    updates[block] += detail::sum_of_squares(g, count);
  });
  const double rms = std::sqrt(sum(updates, blocks) / n), size = std::sqrt(sum(weights, blocks) / n);
  const double alpha = std::max(size, eps2) * std::min(rate, 1.0 / std::sqrt(t));
  const auto decay = static_cast<float>(rate * weight_decay),
             pace = static_cast<float>(alpha / std::max(1.0, rms / d));

  x.each([&](int64_t r, int64_t c, int64_t count, float* p, float* g, int64_t) {
    for_vectors(count, [&](int64_t i, auto k) {
      const vf old = load_n(p + i, k), u = load_n(g + i, k) / estimate.root(r, c + i, k);
      store_n(p + i, old - decay * old - pace * u, k);
    });
    const int64_t at = r * columns + c;
    if (seed.defined() && x.master.narrow) {
      // Words come in groups that begin at multiples of 4 W, pieces wherever their row does.
      uint32_t words[kTile + 8 * W];
      const int64_t group = at / (4 * W) * (4 * W);
      detail::random_words(seed, t, matrix ? 1 : 0, group, at - group + count, words);
      x.master.close(at, count, p, words + (at - group), matrix ? 0 : 16);
    } else {
      x.master.close(at, count, p, nullptr, 0);
    }
    if (copy.wide) std::copy(p, p + count, copy.wide + at);
    copy.close(at, count, p, nullptr, 0);
  });
  clear();
}
FASTLM_EXPORT(adafactor_forward);

}  // namespace fastlm
