// The activations and the gated units: one forward and one backward for eight ops.
//
//   y = dropout(act(gate + gate_bias) * (up + up_bias))        without `up`, the second factor is 1
//
// Rows are read where they lie, so the halves of a packed projection cost no copy. Bias gradients are summed
// in float32 over a number of blocks that is a function of the shape, then over the blocks in order.
#pragma once

#include "activation_forms.h"
#include "philox.h"
#include "rows.h"

namespace fastlm::activation {

// Tensor (..., n), or half `which` of one (..., 2 n), as rows: where row i begins.
template <class T> class RowsOf {
 public:
  RowsOf() = default;
  RowsOf(T* data, const Tensor& t) : data_(data) {
    for (int d = 0; d < t.ndim - 1; ++d) {
      if (t.shape[d] == 1) continue;
      if (dims_ > 0 && stride_[dims_ - 1] == t.shape[d] * t.stride[d]) {  // goes on where the last one left off
        shape_[dims_ - 1] *= t.shape[d];
        stride_[dims_ - 1] = t.stride[d];
      } else {
        shape_[dims_] = t.shape[d];
        stride_[dims_++] = t.stride[d];
      }
    }
  }
  RowsOf half(int64_t offset) const {
    RowsOf out = *this;
    if (data_) out.data_ += offset;
    return out;
  }
  T* row(int64_t i) const {
    if (dims_ == 1) return data_ + i * stride_[0];
    int64_t offset = 0;
    for (int d = dims_ - 1; d >= 0; --d) {
      offset += i % shape_[d] * stride_[d];
      i /= shape_[d];
    }
    return data_ + offset;
  }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
  int dims_ = 0;
  int64_t shape_[kMaxDims], stride_[kMaxDims];
};

// Dropout: element i of y is kept and scaled where word i of the Philox stream of the seed is at least
// floor(p * 2^32), else 0.
class Dropout {
 public:
  Dropout(const Tensor& seed, double p) {
    if (!seed.defined()) return;
    require_size(seed, "seed", 1);
    require(p >= 0 && p <= 1, "dropout_p must be in 0 to 1, got ", p);
    const uint64_t threshold = drop_threshold(p);
    key_ = PhiloxKey(*seed.as<int64_t>());
    on_ = true;
    all_ = threshold >> 32;
    least_ = static_cast<uint32_t>(threshold);
    scale_ = all_ ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  }
  bool on() const { return on_; }
  bool drops_all() const { return all_; }
  vf operator()(vf v, const uint32_t* words) const {
    vu w;
    std::memcpy(&w, words, sizeof w);
    return select(w >= splat(least_), v * scale_, vf{});
  }

  static constexpr int64_t kWords = 1024;
  struct Words {
    alignas(64) uint32_t at[kWords + 8 * W];
  };
  // The words of elements begin to begin + n <= kWords.
  const uint32_t* draw(int64_t begin, int64_t n, Words& out) const {
    const int64_t skip = begin % 4;
    for (int64_t i = 0; i < skip + n; i += 4 * W) {
      vu words[4];
      philox_lanes(key_, static_cast<uint64_t>((begin + i) / 4), 0, 0, words);
      std::memcpy(out.at + i, words, sizeof words);
    }
    return out.at + skip;
  }

 private:
  PhiloxKey key_{0};
  bool on_ = false, all_ = false;
  uint32_t least_ = 0;
  float scale_ = 1.0f;
};

// Outputs of so many bytes are written past the caches, which would not keep them until they are read: it saves
// reading them first.
constexpr int64_t kStreamed = int64_t{16} << 20;

inline void put(float* p, vf v, std::integral_constant<int, W> whole,
                [[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed && reinterpret_cast<uintptr_t>(p) % sizeof v == 0) {
    _mm512_stream_ps(p, (__m512)v);
    return;
  }
#endif
  store_n(p, v, whole);
}
inline void put(bf16* p, vf v, std::integral_constant<int, W> whole,
                [[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed && reinterpret_cast<uintptr_t>(p) % sizeof(vh) == 0) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v));
    return;
  }
#endif
  store_n(p, v, whole);
}
template <class T> inline void put(T* p, vf v, int n, bool) { store_n(p, v, n); }

// What was streamed is seen by other threads after this.
inline void finish([[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed) _mm_sfence();
#endif
}

// parallel_for over elements, in blocks that begin at whole vectors and at whole counters of Philox.
constexpr int64_t kUnit = 64;
inline int64_t block_count_of(int64_t count, int64_t grain, int64_t most) {
  return block_count((count + kUnit - 1) / kUnit, grain / kUnit, most);
}
template <class Fn> void parallel_elements(int64_t count, int64_t grain, int64_t most, Fn&& fn) {
  parallel_for(
      (count + kUnit - 1) / kUnit, grain / kUnit,
      [&](int64_t begin, int64_t end, int64_t block) {
        fn(begin * kUnit, std::min(end * kUnit, count), block);
      },
      most);
}

// The inputs of a call.
template <class T> struct Inputs {
  RowsOf<const T> gate, up;  // `up` is null where there is none
  const float *gate_bias = nullptr, *up_bias = nullptr;
  int64_t count = 0, n = 0;  // elements of y, and columns
  Dropout dropout;

  // Calls fn(row, column, start, length) for the pieces of rows that lie in [begin, end).
  template <class Fn> void for_pieces(int64_t begin, int64_t end, Fn&& fn) const {
    const int64_t most = dropout.on() ? Dropout::kWords : end - begin;
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / n, column = at - row * n;
      const int64_t length = std::min(std::min(end - at, n - column), most);
      fn(row, column, at, length);
      at += length;
    }
  }
};

template <class Act, bool Gated, class T> void run_forward(const Inputs<T>& in, T* y) {
  const bool streamed = in.count * static_cast<int64_t>(sizeof(T)) >= kStreamed;
  parallel_elements(in.count, kGrain, kMaxBlocks, [&](int64_t begin, int64_t end, int64_t) {
    Dropout::Words buffer;
    in.for_pieces(begin, end, [&](int64_t row, int64_t column, int64_t at, int64_t length) {
      const T* gate = in.gate.row(row) + column;
      const T* up = Gated ? in.up.row(row) + column : nullptr;
      const float* gate_bias = in.gate_bias ? in.gate_bias + column : nullptr;
      const float* up_bias = in.up_bias ? in.up_bias + column : nullptr;
      const uint32_t* words = in.dropout.on() ? in.dropout.draw(at, length, buffer) : nullptr;
      for_vectors(length, [&](int64_t i, auto lanes) {
        vf u = load_n(gate + i, lanes);
        if (gate_bias) u += load_n(gate_bias + i, lanes);
        vf v = Act::template at<T>(u).value;
        if constexpr (Gated) {
          vf w = load_n(up + i, lanes);
          if (up_bias) w += load_n(up_bias + i, lanes);
          v *= w;
        }
        if (words) v = in.dropout(v, words + i);
        put(y + at + i, v, lanes, streamed);
      });
    });
    finish(streamed);
  });
}

template <class T> struct Gradients {
  RowsOf<T> gate, up;
  float *gate_bias = nullptr, *up_bias = nullptr;  // added to
};

template <class Act, bool Gated, class T>
void run_backward(RowsOf<const T> dy, const Inputs<T>& in, const Gradients<T>& out) {
  const int64_t n = in.n, count = in.count;
  const int64_t columns = (out.gate_bias ? n : 0) + (out.up_bias ? n : 0);  // of a row of partial sums
  const int64_t grain = columns ? std::max(kGrain, 4 * n) : kGrain;         // four rows pay for one
  const int64_t most = columns ? kMaxPartials : kMaxBlocks, blocks = block_count_of(count, grain, most);
  const bool streamed = count * static_cast<int64_t>(sizeof(T)) >= kStreamed;
  Scratch scratch;
  float* gate_partials = out.gate_bias ? scratch.take<float>(blocks * n) : nullptr;
  float* up_partials = out.up_bias ? scratch.take<float>(blocks * n) : nullptr;
  parallel_elements(count, grain, most, [&](int64_t begin, int64_t end, int64_t block) {
    Dropout::Words buffer;
    if (gate_partials) std::fill_n(gate_partials + block * n, n, 0.0f);
    if (up_partials) std::fill_n(up_partials + block * n, n, 0.0f);
    in.for_pieces(begin, end, [&](int64_t row, int64_t column, int64_t at, int64_t length) {
      const T* upstream = dy.row(row) + column;
      const T* gate = in.gate.row(row) + column;
      const T* up = Gated ? in.up.row(row) + column : nullptr;
      const float* gate_bias = in.gate_bias ? in.gate_bias + column : nullptr;
      const float* up_bias = in.up_bias ? in.up_bias + column : nullptr;
      T* d_gate = out.gate ? out.gate.row(row) + column : nullptr;
      T* d_up = Gated && out.up ? out.up.row(row) + column : nullptr;
      float* gate_sum = gate_partials ? gate_partials + block * n + column : nullptr;
      float* up_sum = up_partials ? up_partials + block * n + column : nullptr;
      const uint32_t* words = in.dropout.on() ? in.dropout.draw(at, length, buffer) : nullptr;
      for_vectors(length, [&](int64_t i, auto lanes) {
        vf u = load_n(gate + i, lanes);
        if (gate_bias) u += load_n(gate_bias + i, lanes);
        const Pair act = Act::template at<T>(u);
        vf d = load_n(upstream + i, lanes);
        if (words) d = in.dropout(d, words + i);
        if constexpr (Gated) {
          const vf d_w = d * act.value;
          if (d_up) put(d_up + i, d_w, lanes, streamed);
          if (up_sum) store_n(up_sum + i, load_n(up_sum + i, lanes) + d_w, lanes);
          vf w = load_n(up + i, lanes);
          if (up_bias) w += load_n(up_bias + i, lanes);
          d *= w;
        }
        d *= act.slope;
        if (d_gate) put(d_gate + i, d, lanes, streamed);
        if (gate_sum) store_n(gate_sum + i, load_n(gate_sum + i, lanes) + d, lanes);
      });
    });
    finish(streamed);
  });
  if (gate_partials) add_partials(gate_partials, blocks, n, out.gate_bias);
  if (up_partials) add_partials(up_partials, blocks, n, out.up_bias);
}

// What a caller gave, or wants, of one tensor of each kind: gate and up, or one packed in `gate`.
struct Given {
  Tensor gate, up, gate_bias, up_bias;
  bool gated = false, packed = false, up_first = false;
};

template <class T> Inputs<T> inputs(const Given& in, const Tensor& seed, double p, Scratch& scratch) {
  Inputs<T> out{{}, {}, nullptr, nullptr, 0, 0, Dropout(seed, p)};
  const int64_t width = in.gate.ndim == 0 ? 1 : in.gate.size(-1), halves = in.packed ? 2 : 1;
  require(width % halves == 0, "a packed gate must have an even last dimension, got ", width);
  out.n = width / halves;
  out.count = in.gate.numel() / halves;
  out.gate = {in.gate.as<T>(), in.gate};
  out.gate_bias = floats(in.gate_bias, scratch);
  require_parameter(in.gate_bias, "gate_bias", width);
  if (in.packed) {
    out.up = out.gate.half(in.up_first ? 0 : out.n);
    out.gate = out.gate.half(in.up_first ? out.n : 0);
    if (out.gate_bias) {
      out.up_bias = out.gate_bias + (in.up_first ? 0 : out.n);
      out.gate_bias += in.up_first ? out.n : 0;
    }
  } else if (in.gated) {
    require_size(in.up, "up", out.count);
    require_parameter(in.up_bias, "up_bias", width);
    out.up = {in.up.as<T>(), in.up};
    out.up_bias = floats(in.up_bias, scratch);
  }
  return out;
}

template <class T> Gradients<T> gradients(const Given& out, int64_t n) {
  Gradients<T> d;
  d.gate = {out.gate.wanted<T>(), out.gate};
  d.gate_bias = out.gate_bias.wanted<float>();
  if (out.packed) {
    d.up = d.gate.half(out.up_first ? 0 : n);
    d.gate = d.gate.half(out.up_first ? n : 0);
    if (d.gate_bias) {
      d.up_bias = d.gate_bias + (out.up_first ? 0 : n);
      d.gate_bias += out.up_first ? n : 0;
    }
  } else {
    d.up = {out.up.wanted<T>(), out.up};
    d.up_bias = out.up_bias.wanted<float>();
  }
  return d;
}

// Contiguous tensors without a bias are one long row.
template <class T, class... Tensors>
bool one_row(const Inputs<T>& in, const Given& given, const Tensors&... t) {
  return !in.gate_bias && !in.up_bias && !given.packed && (... && (!t.defined() || t.contiguous()));
}

template <class Act> void forward(const Given& given, const Tensor& seed, double p, const Tensor& y) {
  for_dtype(given.gate, [&](auto element) {
    using T = decltype(element);
    Scratch scratch;
    Inputs<T> in = inputs<T>(given, seed, p, scratch);
    require_size(y, "y", in.count);
    if (in.count == 0) return;
    if (in.dropout.drops_all()) {
      std::fill_n(y.as<T>(), in.count, T{});
      return;
    }
    if (one_row(in, given, given.gate, given.up)) in.n = in.count;
    if (given.gated) run_forward<Act, true>(in, y.as<T>());
    else run_forward<Act, false>(in, y.as<T>());
  });
}

// d: the gradients that are wanted; those of biases are float32 and added to.
template <class Act>
void backward(const Tensor& dy, const Given& given, const Tensor& seed, double p, const Given& d) {
  for_dtype(given.gate, [&](auto element) {
    using T = decltype(element);
    Scratch scratch;
    Inputs<T> in = inputs<T>(given, seed, p, scratch);
    require_size(dy, "dy", in.count);
    if (in.count == 0) return;
    if (in.dropout.drops_all()) {
      for (const Tensor& t : {d.gate, d.up})
        if (T* data = t.wanted<T>()) std::fill_n(data, t.numel(), T{});
      return;
    }
    const RowsOf<const T> upstream(dy.as<T>(), dy);
    const Gradients<T> out = gradients<T>(d, in.n);
    if (one_row(in, given, given.gate, given.up, dy)) in.n = in.count;
    if (given.gated) run_backward<Act, true>(upstream, in, out);
    else run_backward<Act, false>(upstream, in, out);
  });
}

}  // namespace fastlm::activation
