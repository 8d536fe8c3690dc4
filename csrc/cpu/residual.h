// The sum that add_layer_norm and add_rms_norm normalise, residual + dropout(x + x_bias), and the gradients of
// its terms.
#pragma once

#include "philox.h"
#include "rows.h"

namespace fastlm {

// Runs fn with the flag as a type, so that what is off costs nothing in a loop.
template <class Fn> void with_flag(bool flag, Fn&& fn) {
  if (flag) fn(std::true_type{});
  else fn(std::false_type{});
}

// The mask of dropout.cpp on the rows of a matrix: word k of the stream belongs to element k in contiguous order.
class RowDropout {
 public:
  RowDropout(const Tensor& seed, double p) : key_(seed.defined() ? *seed.as<int64_t>() : 0) {
    require(p >= 0 && p <= 1, "dropout_p must be in 0 to 1, got ", p);
    const uint64_t threshold = drop_threshold(p);
    on_ = threshold > 0;
    if (!on_) return;
    require_size(seed, "seed", 1);
    most_ = splat(static_cast<uint32_t>(threshold - 1));
    scale_ = p < 1 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
  }

  bool on() const { return on_; }

  // Words that a row of n elements needs room for.
  static int64_t room(int64_t n) { return (n + 3 + kGroup - 1) / kGroup * kGroup + W; }

  // The words of elements first to first + n, in `room`.
  const uint32_t* words(int64_t first, int64_t n, uint32_t* room) const {
    const int64_t skip = first % 4;
    for (int64_t i = 0; i < skip + n; i += kGroup) {
      vu four[4];
      philox_lanes(key_, static_cast<uint64_t>((first + i) / 4), 0, 0, four);
      std::memcpy(room + i, four, sizeof four);
    }
    return room + skip;
  }

  // v where the element is kept, scaled, else 0. Reads W words.
  vf operator()(vf v, const uint32_t* words) const {
    vu w;
    std::memcpy(&w, words, sizeof w);
    return select(w > most_, v * scale_, vf{});
  }

  // to = row `row` of n elements under its mask. `room`: for the words of a row.
  template <class From, class To> void apply(int64_t row, int64_t n, const From* from, To* to, uint32_t* room) const {
    const uint32_t* words = on_ ? this->words(row * n, n, room) : nullptr;
    with_flag(on_, [&](auto drop) {
      for_vectors(n, [&](int64_t i, auto count) {
        vf v = load_n(from + i, count);
        if constexpr (drop) v = (*this)(v, words + i);
        store_n(to + i, v, count);
      });
    });
  }

 private:
  static constexpr int64_t kGroup = 4 * W;  // words of one call of philox_lanes
  PhiloxKey key_;
  vu most_ = {};  // the largest word of a dropped element
  float scale_ = 1.0f;
  bool on_ = false;
};

// What a norm of a residual sum is given beside x; without a residual there is no sum.
template <class T> struct ResidualSum {
  const T* residual = nullptr;
  const float* x_bias = nullptr;
  T* total = nullptr;
  RowDropout dropout{Tensor{}, 0.0};

  // Row `row` of total, of n elements. `room`: for the words of a row.
  const T* operator()(const T* x, int64_t row, int64_t n, uint32_t* room) const {
    const T* r = residual + row * n;
    T* t = total + row * n;
    x += row * n;
    const uint32_t* words = dropout.on() ? dropout.words(row * n, n, room) : nullptr;
    with_flag(words != nullptr, [&](auto drop) {
      with_flag(x_bias != nullptr, [&](auto biased) {
        for_vectors(n, [&](int64_t i, auto count) {
          vf v = load_n(x + i, count);
          if constexpr (biased) v += load_n(x_bias + i, count);
          if constexpr (drop) v = dropout(v, words + i);
          store_n(t + i, v + load_n(r + i, count), count);
        });
      });
    });
    return t;
  }
};

// Where the gradient d of a row of the sum goes. Without dropout dx is the gradient of both terms.
template <class T> struct SplitGradient {
  T* dx = nullptr;
  T* d_residual = nullptr;
  RowDropout dropout{Tensor{}, 0.0};

  bool wanted(const float* dx_bias) const { return dx || d_residual || dx_bias; }

  // d(i, count) gives W elements of the row's d; dx_bias, which may be null, is added to.
  template <class D> void operator()(int64_t row, int64_t n, float* dx_bias, uint32_t* room, D&& d) const {
    T* x = dx ? dx + row * n : nullptr;
    if (!dropout.on() && !d_residual && !dx_bias) {
      for_vectors(n, [&](int64_t i, auto count) { store_n(x + i, d(i, count), count); });
      return;
    }
    T* r = d_residual ? d_residual + row * n : nullptr;
    const uint32_t* words = dropout.on() ? dropout.words(row * n, n, room) : nullptr;
    with_flag(words != nullptr, [&](auto drop) {
      for_vectors(n, [&](int64_t i, auto count) {
        vf v = d(i, count);
        if (r) store_n(r + i, v, count);
        if constexpr (drop) v = dropout(v, words + i);
        if (x) store_n(x + i, v, count);
        if (dx_bias) store_n(dx_bias + i, load_n(dx_bias + i, count) + v, count);
      });
    });
  }
};

}  // namespace fastlm
