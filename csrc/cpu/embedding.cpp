// Embedding: y[t] = weight[ids[t]] (+ position_weight[positions[t]]), and the sums that are its gradients.
//
// Each element of a gradient belongs to one thread, which adds in the order of tokens: the bits depend
// neither on the number of threads nor on how the work is cut.
#include "rows.h"

namespace fastlm {
namespace {

// ids or positions, int64 or int32, whose values must be rows of a table.
class Index {
 public:
  Index(const Tensor& t, const char* what, int64_t rows)
      : wide_(t.is<int64_t>() ? t.as<int64_t>() : nullptr),
        narrow_(wide_ ? nullptr : t.as<int32_t>()),
        what_(what),
        rows_(rows) {}

  // The row at place t; out of range is std::out_of_range, in Python an IndexError.
  int64_t operator[](int64_t t) const {
    const int64_t row = wide_ ? wide_[t] : narrow_[t];
    if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows_)) fail(row, t);
    return row;
  }

 private:
  [[noreturn]] void fail(int64_t row, int64_t t) const {
    std::ostringstream text;
    text << what_ << ": got " << row << " at place " << t << "; allowed: 0 to " << rows_ - 1;
    throw std::out_of_range(text.str());
  }

  const int64_t* wide_;
  const int32_t* narrow_;
  const char* what_;
  int64_t rows_;
};

// place(t) is the row of `positions` for token t.
template <class T, class Place>
void forward(const Index& ids, const T* weight, const T* positions, Place&& place, T* y, int64_t tokens,
             int64_t h) {
  parallel_for(tokens, (kGrain + h - 1) / h, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = weight + ids[t] * h;
      T* out = y + t * h;
      if (!positions) {
        std::memcpy(out, row, static_cast<size_t>(h) * sizeof(T));
        continue;
      }
      const T* added = positions + place(t) * h;
      for_vectors(h, [&](int64_t i, auto count) {
        store_n(out + i, load_n(row + i, count) + load_n(added + i, count), count);
      });
    }
  });
}

template <class T>
void add(const T* from, float* to, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) {
    store_n(to + i, load_n(to + i, count) + load_n(from + i, count), count);
  });
}

// total[index[t]] += dy[t]. A block owns a stripe of columns of the rows whose number falls into its group,
// and looks through all tokens for them.
template <class T>
void add_rows(const T* dy, const Index& index, float* total, int64_t tokens, int64_t h) {
  constexpr int64_t kStripe = 1024;
  const int64_t stripes = (h + kStripe - 1) / kStripe;
  const int64_t wanted = block_count(tokens * h, 2 * kGrain, kMaxPartials);
  int64_t groups = 1;
  while (groups * stripes < wanted) groups *= 2;
  parallel_for(
      stripes * groups, 1,
      [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const int64_t group = b / stripes, column = b % stripes * kStripe;
          const int64_t width = std::min(kStripe, h - column);
          for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = index[t];
            if ((row & (groups - 1)) == group) add(dy + t * h + column, total + row * h + column, width);
          }
        }
      },
      stripes * groups);
}

// total[s] += sum over sequences of dy[., s]; positions that count from 0.
template <class T>
void add_sequences(const T* dy, float* total, int64_t sequences, int64_t s, int64_t h) {
  parallel_for(s, std::max<int64_t>(1, kGrain / (sequences * h)), [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place)
      for (int64_t b = 0; b < sequences; ++b) add(dy + (b * s + place) * h, total + place * h, h);
  });
}

int64_t columns(const Tensor& weight) {
  require(weight.ndim == 2, "weight must have two dimensions");
  return weight.size(1);
}

void require_positions(const Tensor& ids, const Tensor& positions, const Tensor& position_weight, int64_t h) {
  require(columns(position_weight) == h, "position_weight must have ", h, " columns");
  if (positions.defined()) return require_size(positions, "positions", ids.numel());
  require(ids.ndim > 0, "ids must have a dimension that positions count along");
  require(ids.size(-1) <= position_weight.size(0), "position_weight must have ", ids.size(-1), " rows");
}

}  // namespace

// ids (..., s) int64 or int32; weight (v, h) float32 or bfloat16; positions like ids, or None for
// 0, 1, 2, ...; position_weight (p, h) of weight's dtype or None; y (..., s, h). All contiguous.
void embedding_forward(Tensor ids, Tensor weight, Tensor positions, Tensor position_weight, Tensor y) {
  for_dtype(weight, [&](auto element) {
    using T = decltype(element);
    const int64_t h = columns(weight), tokens = ids.numel();
    require_size(y, "y", tokens * h);
    if (position_weight.defined()) require_positions(ids, positions, position_weight, h);
    if (tokens == 0 || h == 0) return;
    const Index rows(ids, "ids", weight.size(0));
    if (positions.defined()) {
      const Index places(positions, "positions", position_weight.size(0));
      const auto place = [&](int64_t t) { return places[t]; };
      forward(rows, weight.as<T>(), position_weight.as<T>(), place, y.as<T>(), tokens, h);
    } else {
      const int64_t s = ids.ndim > 0 ? ids.size(-1) : 1;
      const auto place = [s](int64_t t) { return t % s; };
      forward(rows, weight.as<T>(), position_weight.as<T>(), place, y.as<T>(), tokens, h);
    }
  });
}
FASTLM_EXPORT(embedding_forward);

// dy (..., s, h) of weight's dtype; dweight (v, h), dposition (p, h) float32, added to. None is not computed.
void embedding_backward(Tensor dy, Tensor ids, Tensor weight, Tensor positions, Tensor position_weight,
                        Tensor dweight, Tensor dposition) {
  for_dtype(dy, [&](auto element) {
    using T = decltype(element);
    const int64_t h = columns(weight), tokens = ids.numel();
    require_size(dy, "dy", tokens * h);
    if (tokens == 0 || h == 0) return;
    if (float* total = dweight.wanted<float>())
      add_rows(dy.as<T>(), Index(ids, "ids", weight.size(0)), total, tokens, h);
    if (float* total = dposition.wanted<float>()) {
      require_positions(ids, positions, position_weight, h);
      if (positions.defined())
        add_rows(dy.as<T>(), Index(positions, "positions", position_weight.size(0)), total, tokens, h);
      else
        add_sequences(dy.as<T>(), total, tokens / ids.size(-1), ids.size(-1), h);
    }
  });
}
FASTLM_EXPORT(embedding_backward);

}  // namespace fastlm
