// What cross_entropy and linear_cross_entropy do with a token's logits, a stretch of columns at a time.
//
//   x = softcap * tanh(scale * logits / softcap),  lse = log(sum exp(x)),  p = exp(x - lse)
//   loss = u ((1 - s) sum_c q_c (lse - x_c) + s / V sum_c w_c (lse - x_c) + z lse^2)
//   dx_c = A (Q p_c - q_c) + B (W p_c - w_c) + D p_c,  dlogits_c = dx_c scale (1 - (x_c / softcap)^2)
//   q_c = w_c [c = t] for a class index t, w_c target_c for probabilities
//
// The derivation stands in fastlm/ops/cross_entropy.py. All arithmetic is float32, sums over tokens float64.
#pragma once

#include <optional>

#include "gemm.h"
#include "rows.h"

namespace fastlm {
namespace cross_entropy {

constexpr int64_t kNoClass = std::numeric_limits<int64_t>::min();  // a target that is none of the classes
constexpr int64_t kStretch = 2048;  // columns at a time: they stay in the first-level cache between passes

struct Options {
  int64_t classes, ignore_index;
  float smoothing, z_loss, softcap;  // softcap 0: none
  float scale;                       // of the logits
  bool mean, per_token;              // reduction; neither: the sum
  bool extras;
  const float* weight;               // of each class; null: 1
  float weight_sum;                  // over all classes

  Options(int64_t classes, const Tensor& weight, int64_t ignore_index, double smoothing, double z_loss,
          std::optional<double> softcap, double scale, const std::string& reduction, bool extras, Scratch& scratch)
      : classes(classes),
        ignore_index(ignore_index),
        smoothing(static_cast<float>(smoothing)),
        z_loss(static_cast<float>(z_loss)),
        softcap(static_cast<float>(softcap.value_or(0.0))),
        scale(static_cast<float>(scale)),
        mean(reduction == "mean"),
        per_token(reduction == "none"),
        extras(extras),
        weight(floats(weight, scratch)),
        weight_sum(static_cast<float>(classes)) {
    require(!weight.defined() || weight.numel() == classes, "weight must have ", classes, " elements, got ",
            weight.numel());
    require(mean || per_token || reduction == "sum", "reduction must be mean, sum or none, got ", reduction);
    if (this->weight)
      weight_sum =
          accumulate<1>(classes, [&](int64_t i, auto n, vf* t) { t[0] += load_n(this->weight + i, n); })[0];
  }

  // Of a checked target; 0 of kNoClass.
  float weight_of(int64_t target) const { return target < 0 ? 0.0f : weight ? weight[target] : 1.0f; }

  // Where x of a stretch is kept if it is not the logits themselves.
  bool transforms() const { return softcap != 0.0f || scale != 1.0f; }
  float* buffer(Scratch& scratch) const { return transforms() ? scratch.take<float>(kStretch) : nullptr; }
};

// What a token should be: a class, or a probability for each class, in one of two dtypes.
struct Goal {
  int64_t index;
  const float* full;
  const bf16* half;

  bool soft() const { return full || half; }
  template <class Count> vf probability(int64_t c, Count count) const {
    return full ? load_n(full + c, count) : load_n(half + c, count);
  }
};

// The targets of all tokens: (tokens) indices or (tokens, classes) probabilities.
class Targets {
 public:
  Targets(const Tensor& t, int64_t tokens, const Options& o) : o_(o), tokens_(tokens) {
    if (t.is<int64_t>()) index_ = t.as<int64_t>();
    else if (t.is<bf16>()) half_ = t.as<bf16>();
    else full_ = t.as<float>();
    const int64_t size = soft() ? tokens * o.classes : tokens;
    require(t.numel() == size, "target must have ", size, " elements, got ", t.numel());
  }

  bool soft() const { return !index_; }
  int64_t tokens() const { return tokens_; }
  bool ignored(int64_t i) const { return index_ && index_[i] == o_.ignore_index; }
  // w_t, of a token that counts.
  float weight(int64_t i) const { return index_ ? o_.weight_of(index_[i]) : 1.0f; }

  Goal operator[](int64_t i) const {
    if (index_) return {index_[i], nullptr, nullptr};
    return {-1, full_ ? full_ + i * o_.classes : nullptr, half_ ? half_ + i * o_.classes : nullptr};
  }

  // The first target out of range is an IndexError in Python.
  void check() const {
    for (int64_t i = 0; index_ && i < tokens_; ++i) {
      if (ignored(i) || index_[i] == kNoClass || (index_[i] >= 0 && index_[i] < o_.classes)) continue;
      std::ostringstream text;
      text << "target: got " << index_[i] << "; allowed: 0 to " << o_.classes - 1 << ", or ignore_index "
           << o_.ignore_index;
      throw std::out_of_range(text.str());
    }
  }

 private:
  const Options& o_;
  int64_t tokens_;
  const int64_t* index_ = nullptr;
  const float* full_ = nullptr;
  const bf16* half_ = nullptr;
};

// Weights of the tokens as float32; null if there are none.
inline const float* token_weights(const Tensor& t, int64_t tokens, Scratch& scratch) {
  require(!t.defined() || t.numel() == tokens, "token_weight must have ", tokens, " elements, got ", t.numel());
  return floats(t, scratch);
}

// What forward writes for each token, 0 where ignored. statistics (3 or 4, tokens): lse, what rounding took from
// it, loss without u and z-loss, and for probabilities Q. The extras are null unless asked for.
struct Statistics {
  float *lse, *low, *loss, *mass = nullptr;
  float *lse_out = nullptr, *confidence = nullptr, *entropy = nullptr;
  bool* correct = nullptr;

  Statistics(const Tensor& t, const Targets& targets) {
    const int64_t tokens = targets.tokens(), rows = targets.soft() ? 4 : 3;
    require(t.numel() == rows * tokens, "statistics must have ", rows * tokens, " elements, got ", t.numel());
    lse = t.as<float>();
    low = lse + tokens;
    loss = low + tokens;
    if (targets.soft()) mass = loss + tokens;
  }

  void clear(int64_t i) const {
    lse[i] = low[i] = loss[i] = 0.0f;
    if (correct) {
      lse_out[i] = confidence[i] = entropy[i] = 0.0f;
      correct[i] = false;
    }
  }
};

// x of n <= kStretch logits: themselves, or scaled and capped in the buffer. In memory, so that forward and
// backward see the same rounded numbers whatever else the compiler fuses.
template <class Fn, class T>
inline void with_x(const T* logits, int64_t n, const Options& o, float* buffer, Fn&& fn) {
  if (!o.transforms()) return fn(logits);
  const float scale = o.scale, softcap = o.softcap;  // which the buffer cannot alias
  if (softcap != 0.0f)
    for_vectors(n, [&](int64_t i, auto count) {
      store_n(buffer + i, softcap * tanh(scale * load_n(logits + i, count) / softcap), count);
    });
  else
    for_vectors(n, [&](int64_t i, auto count) { store_n(buffer + i, scale * load_n(logits + i, count), count); });
  fn(static_cast<const float*>(buffer));
}

// The largest of n elements; NaN if there is one.
template <class T> inline float largest_of(const T* x, int64_t n, float start) {
  vf top[4];
  for (vf& t : top) t = splat(start);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int k = 0; k < 4; ++k) top[k] = max(top[k], load(x + i + k * W));
  for (; i < n; i += W) {
    const int count = static_cast<int>(std::min<int64_t>(W, n - i));
    top[0] = max(top[0], count == W ? load(x + i) : load_part(x + i, count, start));
  }
  return max(max(max(top[0], top[1]), max(top[2], top[3])));
}

// Where the largest element of a row stands, the first of equal ones; fed from left to right.
class First {
 public:
  template <class T> void add(const T* x, int64_t first, int64_t n) {
    const float top = largest_of(x, n, best_);
    if (!(top > best_)) return;
    best_ = top;
    int64_t i = 0;
    while (to_float(x[i]) != top) ++i;
    where_ = first + i;
  }

  int64_t where() const { return where_; }

 private:
  float best_ = -std::numeric_limits<float>::infinity();
  int64_t where_ = 0;
};

// One token in forward, fed its columns from left to right.
class Token {
 public:
  explicit Token(const Goal& goal) : goal_(goal) {}

  // n more columns, the first of which is `first`. keep(i, count, e) gets e = exp(x - ref) of each; returns ref.
  template <class T, class Keep>
  float add(const T* logits, int64_t first, int64_t n, const Options& o, float* buffer, Keep&& keep) {
    if (o.extras) {
      top_logit_.add(logits, first, n);
      if (goal_.full) top_goal_.add(goal_.full + first, first, n);
      if (goal_.half) top_goal_.add(goal_.half + first, first, n);
    }
    float ref = 0.0f;
    with_x(logits, n, o, buffer, [&](const auto* x) { ref = add_x(x, first, n, o, keep); });
    return ref;
  }
  template <class T> void add(const T* logits, int64_t first, int64_t n, const Options& o, float* buffer) {
    add(logits, first, n, o, buffer, [](int64_t, auto, vf) {});
  }

  // x of the target, a class that was among the columns.
  float hit() const { return hit_; }

  void finish(const Options& o, int64_t i, const Statistics& out) const {
    const float log_sum = std::log(sum_), lse = max_ + log_sum, part = lse - max_;
    float loss = goal_.soft() ? mass_ * ((max_ - base_) + log_sum) - hit_
                              : o.weight_of(goal_.index) * ((max_ - hit_) + log_sum);
    loss *= 1.0f - o.smoothing;
    if (o.smoothing != 0.0f)
      loss +=
          o.smoothing / static_cast<float>(o.classes) * (o.weight_sum * ((max_ - base_) + log_sum) - smooth_);
    out.lse[i] = lse;
    out.low[i] = (max_ - (lse - part)) + (log_sum - part);  // Knuth's two-sum
    out.loss[i] = loss;
    if (out.mass) out.mass[i] = mass_;
    if (!out.correct) return;
    out.lse_out[i] = lse;
    out.correct[i] = lse == lse && top_logit_.where() == (goal_.soft() ? top_goal_.where() : goal_.index);
    out.confidence[i] = 1.0f / sum_;
    out.entropy[i] = log_sum - far_ / sum_;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kFar = -1e30f;  // for -inf where its product with 0 must be 0

  template <class T, class Keep>
  float add_x(const T* x, int64_t first, int64_t n, const Options& o, Keep&& keep) {
    const float largest = largest_of(x, n, max_);
    // Nothing but -inf so far: exp(-inf - -inf) would be NaN. A NaN must stay.
    const float ref = largest == -kInfinity ? 0.0f : largest;
    if (first == 0 && std::abs(largest) < kInfinity) base_ = largest;
    const float scale = std::exp(max_ - ref);
    if (o.extras) {
      const auto [sum, far] = accumulate<2>(n, [&](int64_t i, auto count, vf* t) {
        const vf d = load_n(x + i, count, -kInfinity) - ref, e = exp(d);
        keep(i, count, e);
        t[0] += e;
        t[1] += e * at_least(d, kFar);
      });
      far_ = scale * (far_ + sum_ * std::max(max_ - ref, kFar)) + far;
      sum_ = sum_ * scale + sum;
    } else {
      const auto [sum] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) {
        const vf e = exp(load_n(x + i, count, -kInfinity) - ref);
        keep(i, count, e);
        t[0] += e;
      });
      sum_ = sum_ * scale + sum;
    }
    max_ = largest;
    if (o.smoothing != 0.0f) {
      const auto [smooth] = accumulate<1>(n, [&](int64_t i, auto count, vf* t) {
        const vf d = load_n(x + i, count, base_) - base_;
        t[0] += o.weight ? d * load_n(o.weight + first + i, count) : d;
      });
      smooth_ += smooth;
    }
    if (goal_.soft()) {
      const auto [hit, mass] = accumulate<2>(n, [&](int64_t i, auto count, vf* t) {
        vf q = goal_.probability(first + i, count);
        if (o.weight) q *= load_n(o.weight + first + i, count);
        // A class of probability 0 counts for nothing, also if its logit is -inf.
        t[0] += select(q == 0.0f, vf{}, q * (load_n(x + i, count, base_) - base_));
        t[1] += q;
      });
      hit_ += hit;
      mass_ += mass;
    } else if (goal_.index >= first && goal_.index < first + n) {
      hit_ = to_float(x[goal_.index - first]);
    }
    return ref;
  }

  Goal goal_;
  float max_ = -kInfinity, sum_ = 0.0f;
  float hit_ = 0.0f, mass_ = 0.0f;  // x of the target; or the sums of q_c (x_c - base) and q_c
  float base_ = 0.0f;
  float smooth_ = 0.0f;  // sum of w_c (x_c - base), so that a large common offset costs no digits
  float far_ = 0.0f;     // sum of exp(x_c - max) (x_c - max)
  First top_logit_, top_goal_;
};

// Null for a tensor that is None or of no elements, as the extras are unless asked for.
struct Extras {
  float *z, *lse, *confidence, *entropy;
  bool* correct;

  Extras(const Tensor& z, const Tensor& lse, const Tensor& correct, const Tensor& confidence,
         const Tensor& entropy)
      : z(z.wanted<float>()),
        lse(lse.wanted<float>()),
        confidence(confidence.wanted<float>()),
        entropy(entropy.wanted<float>()),
        correct(correct.wanted<bool>()) {}

  void enter(Statistics& s) const {
    s.lse_out = lse;
    s.confidence = confidence;
    s.entropy = entropy;
    s.correct = correct;
  }
};

// What the mean divides by: the sum of the weights of the tokens' classes, and that of the tokens, (2).
inline void denominators(const Targets& targets, const float* token_weight, float* out) {
  double weights = 0.0, count = 0.0;
  for (int64_t i = 0; i < targets.tokens(); ++i) {
    if (targets.ignored(i)) continue;
    const float u = token_weight ? token_weight[i] : 1.0f;
    weights += static_cast<double>(u) * targets.weight(i);
    count += u;
  }
  out[0] = static_cast<float>(weights);
  out[1] = static_cast<float>(count);
}

// loss and its z term, () or (tokens), and denominators (2) from the tokens' statistics.
inline void reduce(const Statistics& s, const Targets& targets, const float* token_weight, const Options& o,
                   float* loss, float* z_term, float* divisors) {
  denominators(targets, token_weight, divisors);
  double total = 0.0, squares = 0.0;
  for (int64_t i = 0; i < targets.tokens(); ++i) {
    if (targets.ignored(i)) {
      if (o.per_token) loss[i] = 0.0f;
      if (o.per_token && z_term) z_term[i] = 0.0f;
      continue;
    }
    const double square = static_cast<double>(s.lse[i]) * s.lse[i];
    const float u = token_weight ? token_weight[i] : 1.0f;
    if (o.per_token) {
      const float z = u * (o.z_loss * static_cast<float>(square));
      loss[i] = u * s.loss[i] + z;
      if (z_term) z_term[i] = z;
    }
    total += static_cast<double>(u) * s.loss[i];
    squares += u * square;
  }
  if (o.per_token) return;
  double z = o.z_loss * squares;
  if (o.mean) {  // a mean over nothing is 0
    total = divisors[0] == 0.0f ? 0.0 : total / divisors[0];
    z = divisors[1] == 0.0f ? 0.0 : z / divisors[1];
  }
  *loss = static_cast<float>(total + z);
  if (z_term) *z_term = static_cast<float>(z);
}

// The gradients of the loss, of its z term and of lse, divided as the reduction says and times the tokens' weights;
// one that is None is 0.
class Upstream {
 public:
  Upstream(const Tensor& d_loss, const Tensor& d_z, const Tensor& d_lse, const Tensor& denominators,
           const float* token_weight, int64_t tokens, const Options& o)
      : d_loss_(d_loss.wanted<float>()),
        d_z_(d_z.wanted<float>()),
        d_lse_(d_lse.wanted<float>()),
        token_weight_(token_weight),
        per_token_(o.per_token) {
    const int64_t size = per_token_ ? tokens : 1;
    require(!d_loss_ || d_loss.numel() == size, "d_loss must have ", size, " elements, got ", d_loss.numel());
    require(!d_z_ || d_z.numel() == size, "d_z must have ", size, " elements, got ", d_z.numel());
    require(!d_lse_ || d_lse.numel() == tokens, "d_lse must have ", tokens, " elements, got ", d_lse.numel());
    divide(denominators, o);
  }

  // Of a loss that is one number, whose own gradient is d, 1 if that is None.
  Upstream(const Tensor& d, const Tensor& denominators, const float* token_weight, const Options& o)
      : d_loss_(d.defined() ? d.as<float>() : &kOne), token_weight_(token_weight), per_token_(false) {
    divide(denominators, o);
  }

  float main(int64_t i) const { return of(d_loss_, i) * scale_[0] * weight(i); }
  float z(int64_t i) const { return (of(d_loss_, i) + of(d_z_, i)) * scale_[1] * weight(i); }
  float lse(int64_t i) const { return d_lse_ ? d_lse_[i] : 0.0f; }

 private:
  static constexpr float kOne = 1.0f;

  void divide(const Tensor& denominators, const Options& o) {
    require(denominators.numel() == 2, "denominators must have 2 elements, got ", denominators.numel());
    for (int k = 0; k < 2 && o.mean; ++k) {
      const float d = denominators.as<float>()[k];
      scale_[k] = d == 0.0f ? 0.0f : 1.0f / d;
    }
  }

  float of(const float* d, int64_t i) const { return d ? d[per_token_ ? i : 0] : 0.0f; }
  float weight(int64_t i) const { return token_weight_ ? token_weight_[i] : 1.0f; }

  const float *d_loss_, *d_z_ = nullptr, *d_lse_ = nullptr, *token_weight_;
  bool per_token_;
  float scale_[2] = {1.0f, 1.0f};
};

// One token in backward; its columns may come in any order.
class Gradient {
 public:
  Gradient(int64_t i, const Goal& goal, const Statistics& s, const Upstream& up, const Options& o)
      : goal_(goal), lse_(s.lse[i]), low_(s.low[i]), mass_(goal.soft() ? s.mass[i] : o.weight_of(goal.index)) {
    a_ = up.main(i) * (1.0f - o.smoothing);
    b_ = up.main(i) * (o.smoothing / static_cast<float>(o.classes));
    d_ = up.z(i) * 2.0f * o.z_loss * s.lse[i] + up.lse(i);
  }

  // out = dlogits of n columns, the first of which is `first`; out may be the logits themselves.
  template <class T, class Out>
  void columns(const T* logits, int64_t first, int64_t n, const Options& o, float* buffer, Out* out) const {
    with_x(logits, n, o, buffer, [&](const auto* x) { columns_x(x, first, n, o, out); });
  }

  // dlogits in the place of e = exp(x - ref), where there is no softcap. x_target: that of a target among them.
  template <class E>
  void kept_columns(E* e, float ref, float x_target, int64_t first, int64_t n, const Options& o) const {
    const Numbers g(*this, o);
    const float* weight = o.weight && (goal_.soft() || b_ != 0.0f) ? o.weight + first : nullptr;
    const float share = std::exp((ref - g.lse) - g.low), all = (a_ * mass_ + d_) * g.scale * share;
    if (goal_.soft() || b_ != 0.0f)
      for_vectors(n, [&](int64_t i, auto count) {
        const vf w = weight ? load_n(weight + i, count) : splat(1.0f);
        const vf q = goal_.soft() ? w * goal_.probability(first + i, count) : vf{};
        gemm::store_element(e + i, g.scale * g.of_probability(share * load_n(e + i, count), w, q), count);
      });
    else
      for_vectors(n, [&](int64_t i, auto count) { gemm::store_element(e + i, all * load_n(e + i, count), count); });
    if (goal_.index >= first && goal_.index < first + n) e[goal_.index - first] = at_target<E>(x_target, g, o);
  }

 private:
  struct Numbers;

  // dlogits of the target, a class.
  template <class Out> Out at_target(float x, const Numbers& g, const Options& o) const {
    const float d = g.of(splat(x), splat(o.weight_of(goal_.index)), splat(mass_))[0];
    if constexpr (std::is_same_v<Out, bf16>) return to_bf16(d);
    else return d;
  }

  template <class T, class Out>
  void columns_x(const T* x, int64_t first, int64_t n, const Options& o, Out* out) const {
    // Copies, which `out` cannot point into: their numbers stay in registers.
    const Numbers g(*this, o);
    const float* weight = o.weight ? o.weight + first : nullptr;
    const bool has_target = goal_.index >= first && goal_.index < first + n;
    const float x_target = has_target ? to_float(x[goal_.index - first]) : 0.0f;
    if (goal_.soft()) {
      for_vectors(n, [&](int64_t i, auto count) {
        const vf w = weight ? load_n(weight + i, count) : splat(1.0f);
        const vf q = w * goal_.probability(first + i, count);
        store_n(out + i, g.of(load_n(x + i, count), w, q), count);
      });
    } else if (!o.transforms() && b_ == 0.0f) {
      const float all = a_ * mass_ + d_;
      for_vectors(n, [&](int64_t i, auto count) {
        store_n(out + i, all * exp((load_n(x + i, count) - g.lse) - g.low), count);
      });
    } else {
      if (b_ == 0.0f) weight = nullptr;
      for_vectors(n, [&](int64_t i, auto count) {
        const vf w = weight ? load_n(weight + i, count) : splat(1.0f);
        store_n(out + i, g.of(load_n(x + i, count), w, vf{}), count);
      });
    }
    if (has_target) out[goal_.index - first] = at_target<Out>(x_target, g, o);
  }

  struct Numbers {
    float lse, low, a, b, d, mass, total, softcap, scale;

    Numbers(const Gradient& g, const Options& o)
        : lse(g.lse_),
          low(g.low_),
          a(g.a_),
          b(g.b_),
          d(g.d_),
          mass(g.mass_),
          total(o.weight_sum),
          softcap(o.softcap),
          scale(o.scale) {}

    // dx. Differences first: p_c near 1 must leave nothing of the target's.
    vf of_probability(vf p, vf w, vf q) const { return a * (mass * p - q) + b * (total * p - w) + d * p; }
    vf of(vf x, vf w, vf q) const {
      vf dx = of_probability(exp((x - lse) - low), w, q);
      if (softcap != 0.0f) {
        const vf t = x / softcap;
        dx *= 1.0f - t * t;
      }
      return scale * dx;
    }
  };

  Goal goal_;
  float lse_, low_;
  float mass_;  // Q: the sum of q_c
  float a_, b_, d_;
};

}  // namespace cross_entropy
}  // namespace fastlm
