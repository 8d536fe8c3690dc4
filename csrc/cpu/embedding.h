// Rows of tables by index: which a token takes, and the sums over the tokens of each row that are its gradient.
//
// The tokens are sorted by row, stably; equal rows are runs, which are added up in registers in the order of
// tokens and reach the gradient once. Each of its elements belongs to one thread: the bits depend neither on
// the number of threads nor on how the work is cut.
#pragma once

#include "rows.h"

namespace fastlm {
namespace embedding {

// The row of a table for each token: given, int64 or int32; counted from 0 to `period`, again and again; or 0.
class Index {
 public:
  Index(const Tensor& t, const char* what, int64_t rows, int64_t period = 1)
      : wide_(t.is<int64_t>() ? t.as<int64_t>() : nullptr),
        narrow_(t.is<int64_t>() ? nullptr : t.as<int32_t>()),
        period_(period),
        what_(what),
        rows_(rows) {}

  // Out of range is std::out_of_range, in Python an IndexError.
  int64_t operator[](int64_t t) const {
    const int64_t row = wide_ ? wide_[t] : narrow_ ? narrow_[t] : t % period_;
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows_)) fail(row, t);
    return row;
  }

  int64_t rows() const { return rows_; }

 private:
  [[noreturn]] void fail(int64_t row, int64_t t) const {
    std::ostringstream text;
    text << what_ << ": got " << row << " at place " << t << "; allowed: 0 to " << rows_ - 1;
    throw std::out_of_range(text.str());
  }

  const int64_t* wide_;
  const int32_t* narrow_;
  int64_t period_;
  const char* what_;
  int64_t rows_;
};

// The arguments (ids, weight, positions, position_weight, segments, segment_weight): up to three tables of which
// each token takes a row.
template <class T> class Tables {
 public:
  Tables(const Tensor& ids, const Tensor& weight, const Tensor& positions, const Tensor& position_weight,
         const Tensor& segments, const Tensor& segment_weight)
      : tokens(ids.numel()), h(weight.ndim == 2 ? weight.size(1) : 0) {
    require(weight.ndim == 2, "weight must have two dimensions");
    take(0, ids, "ids", weight, 1);
    const int64_t length = ids.ndim > 0 ? ids.size(-1) : 1;
    if (position_weight.defined()) take(1, positions, "positions", position_weight, length);
    if (segment_weight.defined()) take(2, segments, "segments", segment_weight, 1);
  }

  Tables(const Tables&) = delete;  // order_ points into it
  Tables& operator=(const Tables&) = delete;

  const Index& index(int table) const { return *index_[table]; }

  // fn(count): how many tables there are, as a constant.
  template <class Fn> void with_count(Fn&& fn) const {
    if (count_ == 1) fn(std::integral_constant<int, 1>{});
    else if (count_ == 2) fn(std::integral_constant<int, 2>{});
    else fn(std::integral_constant<int, 3>{});
  }

  // out = the sum of token t's rows.
  template <int N, class Out> void add_rows(int64_t t, Out* out) const {
    const T* row[N];
    for (int k = 0; k < N; ++k) row[k] = rows_[k] + (*order_[k])[t] * h;
    for_vectors(h, [&](int64_t i, auto count) {
      vf v = load_n(row[0] + i, count);
      for (int k = 1; k < N; ++k) v += load_n(row[k] + i, count);
      store_n(out + i, v, count);
    });
  }

  const int64_t tokens, h;

 private:
  void take(int which, const Tensor& index, const char* what, const Tensor& table, int64_t period) {
    require(table.ndim == 2 && table.size(1) == h, what, ": their table must have ", h, " columns");
    if (index.defined()) require_size(index, what, tokens);
    else require(which > 0 && period <= table.size(0), what, ": their table must have ", period, " rows");
    index_[which].emplace(index, what, table.size(0), std::max<int64_t>(period, 1));
    order_[count_] = &*index_[which];
    rows_[count_++] = table.as<T>();
  }

  std::optional<Index> index_[3];
  const Index* order_[3] = {};
  const T* rows_[3] = {};
  int count_ = 0;
};

// Tokens in the order of their rows, those of one row in the order of tokens.
struct Runs {
  struct Entry {
    int64_t row, token;
  };
  Entry* entries;
  int64_t* starts;  // of each run among the entries, and the number of entries behind the last
  int64_t count = 0;

  // Tokens of row `skip` (-1: none) are left out. A radix sort, 11 bits at a time.
  Runs(const Index& index, int64_t tokens, int64_t skip, Scratch& scratch)
      : entries(scratch.take<Entry>(tokens)), starts(scratch.take<int64_t>(tokens + 1)) {
    constexpr int kBits = 11;
    int64_t n = 0;
    for (int64_t t = 0; t < tokens; ++t)
      if (const int64_t row = index[t]; row != skip) entries[n++] = {row, t};
    Entry* other = scratch.take<Entry>(tokens);
    int64_t* ends = scratch.take<int64_t>(1 << kBits);
    for (int shift = 0; (index.rows() - 1) >> shift; shift += kBits) {
      const auto digit = [&](const Entry& e) { return e.row >> shift & ((1 << kBits) - 1); };
      std::fill(ends, ends + (1 << kBits), 0);
      for (int64_t i = 0; i < n; ++i) ++ends[digit(entries[i])];
      for (int64_t d = 0, place = 0; d < 1 << kBits; ++d) place += std::exchange(ends[d], place);
      for (int64_t i = 0; i < n; ++i) other[ends[digit(entries[i])]++] = entries[i];
      std::swap(entries, other);
    }
    for (int64_t i = 0; i < n; ++i)
      if (i == 0 || entries[i].row != entries[i - 1].row) starts[count++] = i;
    starts[count] = n;
  }
};

// total[index[t]] += d[t] for every token but those of row `skip`; d (tokens, h), total (rows, h).
template <class T, class G>
void add_by_row(const T* d, const Index& index, int64_t skip, int64_t tokens, int64_t h, G* total) {
  constexpr int kVectors = 8;  // of a row at a time, summed in registers
  constexpr int64_t kColumns = 64;
  Scratch scratch;
  const Runs runs(index, tokens, skip, scratch);
  const int64_t wanted = block_count(tokens * h, 2 * kGrain);
  // Few rows, as of segments, are cut into stripes of columns.
  const int64_t most = (h + kColumns - 1) / kColumns;
  const int64_t stripes = std::min(most, (wanted + std::max<int64_t>(runs.count, 1) - 1) / std::max<int64_t>(runs.count, 1));
  const int64_t width = (most + stripes - 1) / stripes * kColumns;
  const int64_t shares = std::min(wanted, runs.count);  // each of about as many tokens
  const int64_t n = runs.starts[runs.count];
  parallel_for(
      shares * stripes, 1,
      [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t share = b / stripes, left = b % stripes * width, right = std::min(left + width, h);
          const auto first = std::lower_bound(runs.starts, runs.starts + runs.count, n * share / shares);
          const auto last = std::lower_bound(runs.starts, runs.starts + runs.count, n * (share + 1) / shares);
          for (auto run = first; run < last; ++run) {
            const Runs::Entry* e = runs.entries + run[0];
            const int64_t length = run[1] - run[0];
            G* out = total + e->row * h;
            int64_t i = left;
            for (; i + kVectors * W <= right; i += kVectors * W) {
              vf sum[kVectors] = {};
              for (int64_t k = 0; k < length; ++k)
                for (int v = 0; v < kVectors; ++v) sum[v] += load(d + e[k].token * h + i + v * W);
              for (int v = 0; v < kVectors; ++v) store(out + i + v * W, load(out + i + v * W) + sum[v]);
            }
            for_vectors(right - i, [&](int64_t j, auto count) {
              vf sum = {};
              for (int64_t k = 0; k < length; ++k) sum += load_n(d + e[k].token * h + i + j, count);
              store_n(out + i + j, load_n(out + i + j, count) + sum, count);
            });
          }
        }
      },
      shares * stripes);
}

// The gradient of table `which`, if it is wanted, from d (tokens, h), that of each token's sum. It is float32 or of d's
// dtype, rounded once: no element is added to twice.
template <class T>
void add_gradient(const T* d, const Tables<T>& tables, int which, int64_t skip, const Tensor& gradient) {
  if (gradient.numel() == 0) return;
  const Index& index = tables.index(which);
  if (gradient.is<float>()) add_by_row(d, index, skip, tables.tokens, tables.h, gradient.as<float>());
  else add_by_row(d, index, skip, tables.tokens, tables.h, gradient.as<T>());
}

}  // namespace embedding
}  // namespace fastlm
