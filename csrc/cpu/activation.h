// The activations and the gated units: one forward and one backward for eight ops.
//
//   y = dropout(act(gate + gate_bias) * (up + up_bias))        without `up`, the second factor is 1
//
// With F the normal distribution function or a sigmoid, F(u) = 1 - F(-u), so u * F(u) needs only t = |u| and
// the tail F(-t), which keeps its relative accuracy:
//
//   act(u) = max(u, 0) - t * F(-t)     act'(u) = g for u < 0 and 1 - g for u >= 0, g = F(-t) - t * F'(t)
//
// Rows are read where they lie, so the halves of a packed projection cost no copy. Bias gradients are summed in
// float32 over a number of blocks that is a function of the shape, then over the blocks in order.
#pragma once

#include "philox.h"
#include "rows.h"

namespace fastlm::activation {

// Where bfloat16 is all that becomes of a value, whose rounding error is 2e-3, shorter polynomials serve. All
// are minimax fits of our own of the relative error, highest power first.
template <class T> constexpr bool kShort = std::is_same_v<T, bf16>;

template <size_t N> inline vf polynomial(vf x, const float (&c)[N]) {
  vf p = splat(c[0]);
  for (size_t i = 1; i < N; ++i) p = fma(p, x, splat(c[i]));
  return p;
}

// 1 / d for d in [1, 100].
template <class T> inline vf reciprocal(vf d) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);  // within 2^-14
  return kShort<T> ? r : r * (2.0f - d * r);
#else
  return 1.0f / d;
#endif
}

// 2^t for t in [-10^6, 0]; 0 where that is below the smallest denormal number.
template <class T> inline vf power(vf t) {
  constexpr float coarse[] = {0.05517166852951050f, 0.2426111400127411f, 0.6932609677314758f,
                              0.9999280571937561f};
  constexpr float fine[] = {0.001327647245489061f, 0.009675541892647743f, 0.05550713092088699f,
                            0.2402212023735046f,   0.6931469440460205f,   1.0f};  // within 8e-5 and 8e-8
#if !defined(__AVX512F__)
  t = select(t < -160.0f, splat(-160.0f), t);
#endif
  const vf shifted = t + 0x1.8p+23f, n = shifted - 0x1.8p+23f, f = t - n;  // n rounds t to an integer
  const vf p = kShort<T> ? polynomial(f, coarse) : polynomial(f, fine);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const vi k = bitcast<vi>(shifted) - 0x4b400000, half = k >> 1;  // in two factors, for denormal results
  return p * bitcast<vf>((half + 127) << 23) * bitcast<vf>((k - half + 127) << 23);
#endif
}

constexpr float kLog2e = 1.4426950408889634f;

struct Tail {
  vf value, slope;  // F(-t), F'(t)
};

struct Normal {
  static constexpr float limit = 40.0f;  // the tail is 0 beyond it, where infinity * 0 would be NaN
  template <class T> static Tail at(vf t) {
    // Phi(-t) = exp(-t^2 / 2) * R(t), where R(t) = erfcx(t / sqrt(2)) / 2 is a polynomial in s = 1 / (1 + a
    // t), within 2e-4 and 6e-8 on [0, 14.6], where the exponential reaches 0.
    constexpr float coarse[] = {-0.1155936970905161f, 0.3069303631782532f, 0.1203025802969933f,
                                0.1890102475881577f, -0.0005471872282214463f};
    constexpr float fine[] = {0.03841174766421318f,  -0.1693286001682281f, 0.2289953827857971f,
                              -0.07688941806554794f, 0.1427995413541794f,  0.09457131475210190f,
                              0.1219489648938179f,   0.1194836869835854f,  7.402495612041093e-06f};
    const vf s = reciprocal<T>(fma(splat(kShort<T> ? 0.45f : 0.3f), t, splat(1.0f)));
    const vf e = power<T>(t * t * (-0.5f * kLog2e));
    return {e * (kShort<T> ? polynomial(s, coarse) : polynomial(s, fine)), e * 0.3989422804014327f};
  }
};

struct Tanh {
  static constexpr float limit = 40.0f;
  template <class T> static Tail at(vf t) {
    constexpr float a = 1.5957691216057308f, cubic = 0.044715f;  // a = 2 sqrt(2 / pi)
    const vf square = t * t;
    const vf e = power<T>(t * fma(square, splat(-a * cubic * kLog2e), splat(-a * kLog2e)));  // exp(-2 z)
    const vf r = reciprocal<T>(1.0f + e), tail = e * r;
    return {tail, tail * r * fma(square, splat(3 * a * cubic), splat(a))};
  }
};

struct Logistic {
  static constexpr float limit = 120.0f;
  template <class T> static Tail at(vf t) {
    const vf e = power<T>(t * -kLog2e), r = reciprocal<T>(1.0f + e), tail = e * r;
    return {tail, tail * r};
  }
};

struct Pair {
  vf value, slope;  // act(u), act'(u)
};

// u * F(u). A NaN passes.
template <class F> struct Smooth {
  template <class T> static Pair at(vf u) {
    const vf t = at_most(abs(u), F::limit);
    const Tail tail = F::template at<T>(t);
    const vf g = tail.value - t * tail.slope;
    return {at_least(u, 0.0f) - t * tail.value, select(u < 0.0f, g, 1.0f - g)};
  }
};

struct Relu {
  template <class T> static Pair at(vf u) { return {at_least(u, 0.0f), select(u <= 0.0f, vf{}, splat(1.0f))}; }
};

struct ReluSquared {
  template <class T> static Pair at(vf u) {
    const vf r = at_least(u, 0.0f);
    return {r * r, 2.0f * r};
  }
};

using Silu = Smooth<Logistic>;

// Calls fn with the form that `approximate` names.
template <class Fn> void for_gelu(const std::string& approximate, Fn&& fn) {
  require(approximate == "none" || approximate == "tanh", "approximate must be none or tanh, got ",
          approximate);
  if (approximate == "tanh") fn(Smooth<Tanh>{});
  else fn(Smooth<Normal>{});
}

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
template <class T, class... Tensors> bool one_row(const Inputs<T>& in, const Given& given, const Tensors&... t) {
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
