// What cross_entropy and linear_cross_entropy do with a token's logits, a stretch of columns at a time.
//
//   x = softcap * tanh(logits / softcap),  lse = log(sum exp(x)),  p = exp(x - lse)
//   loss = (1 - s) w_t (lse - x_t) + s / V sum_c w_c (lse - x_c) + z lse^2
//   dx_c = A (p_c - [c = t]) + B (W p_c - w_c) + D p_c,  dlogits_c = dx_c (1 - (x_c / softcap)^2)
//
// The derivation stands in fastlm/ops/cross_entropy.py. All arithmetic is float32, sums over tokens float64.
#pragma once

#include <optional>

#include "vec.h"

namespace fastlm {
namespace cross_entropy {

constexpr int64_t kStretch = 2048;  // columns at a time: they stay in the first-level cache between passes

// A vector as float32; null if there is none.
inline const float* floats(const Tensor& t, Scratch& scratch) {
  if (!t.is<bf16>()) return t.as<float>();
  const int64_t n = t.numel();
  float* out = scratch.take<float>(n);
  for_vectors(n, [&](int64_t i, auto count) { store_n(out + i, load_n(t.as<bf16>() + i, count), count); });
  return out;
}

struct Options {
  int64_t classes, ignore_index;
  float smoothing, z_loss, softcap;  // softcap 0: none
  bool mean, per_token;              // reduction; neither: the sum
  const float* weight;               // of each class; null: 1
  float weight_sum;                  // over all classes

  Options(int64_t classes, const Tensor& weight, int64_t ignore_index, double smoothing, double z_loss,
          std::optional<double> softcap, const std::string& reduction, Scratch& scratch)
      : classes(classes),
        ignore_index(ignore_index),
        smoothing(static_cast<float>(smoothing)),
        z_loss(static_cast<float>(z_loss)),
        softcap(static_cast<float>(softcap.value_or(0.0))),
        mean(reduction == "mean"),
        per_token(reduction == "none"),
        weight(floats(weight, scratch)),
        weight_sum(static_cast<float>(classes)) {
    require(!weight.defined() || weight.numel() == classes, "weight must have ", classes, " elements, got ",
            weight.numel());
    require(mean || per_token || reduction == "sum", "reduction must be mean, sum or none, got ", reduction);
    if (this->weight)
      weight_sum =
          accumulate<1>(classes, [&](int64_t i, auto n, vf* t) { t[0] += load_n(this->weight + i, n); })[0];
  }

  float weight_of(int64_t target) const { return weight ? weight[target] : 1.0f; }
};

// statistics (3, tokens): lse, what rounding took from it, loss without z-loss; all 0 for an ignored token.
struct Statistics {
  float *lse, *low, *loss;

  Statistics(const Tensor& t, int64_t tokens) {
    require(t.numel() == 3 * tokens, "statistics must have ", 3 * tokens, " elements, got ", t.numel());
    lse = t.as<float>();
    low = lse + tokens;
    loss = low + tokens;
  }
};

// The first target out of range is an IndexError in Python.
inline void check_targets(const int64_t* target, int64_t tokens, const Options& o) {
  for (int64_t i = 0; i < tokens; ++i) {
    if (target[i] == o.ignore_index || (target[i] >= 0 && target[i] < o.classes)) continue;
    std::ostringstream text;
    text << "target: got " << target[i] << "; allowed: 0 to " << o.classes - 1 << ", or ignore_index "
         << o.ignore_index;
    throw std::out_of_range(text.str());
  }
}

// x of n <= kStretch logits: themselves, or softcap * tanh of them in the buffer. In memory, so that forward
// and backward see the same rounded numbers whatever else the compiler fuses.
template <class Fn, class T>
inline void with_x(const T* logits, int64_t n, const Options& o, float* buffer, Fn&& fn) {
  if (o.softcap == 0.0f) return fn(logits);
  for_vectors(n, [&](int64_t i, auto count) {
    store_n(buffer + i, o.softcap * tanh(load_n(logits + i, count) / o.softcap), count);
  });
  fn(static_cast<const float*>(buffer));
}

// One token in forward, fed its columns from left to right.
class Token {
 public:
  explicit Token(int64_t target) : target_(target) {}

  // n more columns, the first of which is `first`.
  template <class T> void add(const T* logits, int64_t first, int64_t n, const Options& o, float* buffer) {
    with_x(logits, n, o, buffer, [&](const auto* x) { add_x(x, first, n, o); });
  }

  void finish(const Options& o, int64_t i, const Statistics& out) const {
    const float log_sum = std::log(sum_), lse = max_ + log_sum, part = lse - max_;
    float loss = (1.0f - o.smoothing) * o.weight_of(target_) * ((max_ - x_target_) + log_sum);
    if (o.smoothing != 0.0f)
      loss +=
          o.smoothing / static_cast<float>(o.classes) * (o.weight_sum * ((max_ - base_) + log_sum) - smooth_);
    out.lse[i] = lse;
    out.low[i] = (max_ - (lse - part)) + (log_sum - part);  // Knuth's two-sum
    out.loss[i] = loss;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  template <class T> void add_x(const T* x, int64_t first, int64_t n, const Options& o) {
    vf top[4];
    for (vf& t : top) t = splat(max_);
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
      for (int k = 0; k < 4; ++k) top[k] = max(top[k], load(x + i + k * W));
    for (; i < n; i += W) {
      const int count = static_cast<int>(std::min<int64_t>(W, n - i));
      top[0] = max(top[0], count == W ? load(x + i) : load_part(x + i, count, -kInfinity));
    }
    const float largest = max(max(max(top[0], top[1]), max(top[2], top[3])));
    // Nothing but -inf so far: exp(-inf - -inf) would be NaN. A NaN must stay.
    const float ref = largest == -kInfinity ? 0.0f : largest;
    if (first == 0 && std::abs(largest) < kInfinity) base_ = largest;
    const auto [sum] = accumulate<1>(
        n, [&](int64_t i, auto count, vf* t) { t[0] += exp(load_n(x + i, count, -kInfinity) - ref); });
    sum_ = sum_ * std::exp(max_ - ref) + sum;
    max_ = largest;
    if (o.smoothing != 0.0f) {
      const auto [smooth] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) {
        const vf d = load_n(x + i, count, base_) - base_;
        t[0] += o.weight ? d * load_n(o.weight + first + i, count) : d;
      });
      smooth_ += smooth;
    }
    if (target_ >= first && target_ < first + n) x_target_ = to_float(x[target_ - first]);
  }

  int64_t target_;
  float max_ = -kInfinity, sum_ = 0.0f, x_target_ = 0.0f;
  float base_ = 0.0f;
  float smooth_ = 0.0f;  // sum of w_c (x_c - base), so that a large common offset costs no digits
};

// loss () or (tokens) and denominators (2) from the tokens' statistics.
inline void reduce(const Statistics& s, const int64_t* target, int64_t tokens, const Options& o, float* loss,
                   float* denominators) {
  double total = 0.0, squares = 0.0, weights = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const double square = static_cast<double>(s.lse[i]) * s.lse[i];
    if (o.per_token) loss[i] = s.loss[i] + o.z_loss * static_cast<float>(square);
    if (target[i] == o.ignore_index) continue;
    total += s.loss[i];
    squares += square;
    weights += o.weight_of(target[i]);
    ++count;
  }
  denominators[0] = static_cast<float>(weights);
  denominators[1] = static_cast<float>(count);
  if (o.per_token) return;
  double z = o.z_loss * squares;
  if (o.mean) {  // a mean over nothing is 0
    total = weights == 0.0 ? 0.0 : total / weights;
    z = count == 0 ? 0.0 : z / static_cast<double>(count);
  }
  *loss = static_cast<float>(total + z);
}

// d_loss divided as the reduction says.
class Upstream {
 public:
  Upstream(const Tensor& d_loss, const Tensor& denominators, int64_t tokens, const Options& o)
      : d_loss_(d_loss.as<float>()), per_token_(o.per_token) {
    require(d_loss.numel() == (per_token_ ? tokens : 1), "d_loss must have ", per_token_ ? tokens : 1,
            " elements, got ", d_loss.numel());
    require(denominators.numel() == 2, "denominators must have 2 elements, got ", denominators.numel());
    for (int k = 0; k < 2 && o.mean; ++k) {
      const float d = denominators.as<float>()[k];
      scale_[k] = d == 0.0f ? 0.0f : 1.0f / d;
    }
  }

  float main(int64_t i) const { return d_loss_[per_token_ ? i : 0] * scale_[0]; }
  float z(int64_t i) const { return d_loss_[per_token_ ? i : 0] * scale_[1]; }

 private:
  const float* d_loss_;
  bool per_token_;
  float scale_[2] = {1.0f, 1.0f};
};

// One token in backward; its columns may come in any order.
class Gradient {
 public:
  Gradient(int64_t i, int64_t target, const Statistics& s, const Upstream& up, const Options& o)
      : target_(target), lse_(s.lse[i]), low_(s.low[i]) {
    a_ = up.main(i) * (1.0f - o.smoothing) * o.weight_of(target);
    b_ = up.main(i) * (o.smoothing / static_cast<float>(o.classes));
    d_ = up.z(i) * 2.0f * o.z_loss * s.lse[i];
  }

  // out = dlogits of n columns, the first of which is `first`; out may be the logits themselves.
  template <class T, class Out>
  void columns(const T* logits, int64_t first, int64_t n, const Options& o, float* buffer, Out* out) const {
    with_x(logits, n, o, buffer, [&](const auto* x) { columns_x(x, first, n, o, out); });
  }

 private:
  template <class T, class Out>
  void columns_x(const T* x, int64_t first, int64_t n, const Options& o, Out* out) const {
    const bool has_target = target_ >= first && target_ < first + n;
    const float x_target = has_target ? to_float(x[target_ - first]) : 0.0f;
    if (o.softcap == 0.0f && b_ == 0.0f) {
      for_vectors(n, [&](int64_t i, auto count) {
        store_n(out + i, (a_ + d_) * exp((load_n(x + i, count) - lse_) - low_), count);
      });
    } else {
      for_vectors(n, [&](int64_t i, auto count) {
        const vf w = o.weight && b_ != 0.0f ? load_n(o.weight + first + i, count) : splat(1.0f);
        store_n(out + i, one(load_n(x + i, count), w, 0.0f, o), count);
      });
    }
    if (has_target) {
      const float g = one(splat(x_target), splat(o.weight_of(target_)), 1.0f, o)[0];
      if constexpr (std::is_same_v<Out, bf16>) out[target_ - first] = to_bf16(g);
      else out[target_ - first] = g;
    }
  }

  vf one(vf x, vf w, float hit, const Options& o) const {
    const vf p = exp((x - lse_) - low_);
    vf dx = a_ * (p - hit) + b_ * (o.weight_sum * p - w) + d_ * p;
    if (o.softcap != 0.0f) {
      const vf t = x / o.softcap;
      dx *= 1.0f - t * t;
    }
    return dx;
  }

  int64_t target_;
  float lse_, low_, a_, b_, d_;
};

}  // namespace cross_entropy
}  // namespace fastlm
