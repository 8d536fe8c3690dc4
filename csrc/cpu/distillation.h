// A token's divergence between teacher and student, from a row of logits of each.
//
//   u = student / tau, v = teacher / tau; q, p their softmax; d = log q - log p
//   A = sum p b, B = sum q a, loss = scale * weight * (A + B)
//   forward KL  b = -d, a = 0            du = q - p          dv = p (b - A)
//   reverse KL  b = 0, a = d             du = q (a - B)      dv = p - q
//   js          b = beta (log p - log m), a = (1 - beta) (log q - log m), m = beta p + (1 - beta) q
//                                        du = q (a - B)      dv = p (b - A)
//
// The derivation stands in fastlm/ops/distillation_loss.py. A row is read twice forward, for log-sum-exp and for the
// sums, and once backward; it stays in the second-level cache between. Arithmetic is float32.
#pragma once

#include <string>

#include "vec.h"

namespace fastlm {
namespace distillation {

enum class Kind { forward_kl, reverse_kl, js };

struct Options {
  Kind kind;
  float beta, inverse, scale;  // inverse: of the temperature
  bool mean, batch_mean, per_token;

  Options(const std::string& divergence, double beta, double temperature, double scale,
          const std::string& reduction)
      : kind(divergence == "forward_kl"   ? Kind::forward_kl
             : divergence == "reverse_kl" ? Kind::reverse_kl
                                          : Kind::js),
        beta(static_cast<float>(beta)),
        inverse(static_cast<float>(1.0 / temperature)),
        scale(static_cast<float>(scale)),
        mean(reduction == "mean"),
        batch_mean(reduction == "batchmean"),
        per_token(reduction == "none") {
    require(kind != Kind::js || divergence == "js", "divergence must be forward_kl, reverse_kl or js, got ",
            divergence);
    require(mean || batch_mean || per_token || reduction == "sum",
            "reduction must be mean, batchmean, sum or none, got ", reduction);
  }

  // fn(kind) with the kind as a constant, so that no inner loop asks for it.
  template <class Fn> void with_kind(Fn&& fn) const {
    if (kind == Kind::forward_kl) fn(std::integral_constant<Kind, Kind::forward_kl>{});
    else if (kind == Kind::reverse_kl) fn(std::integral_constant<Kind, Kind::reverse_kl>{});
    else fn(std::integral_constant<Kind, Kind::js>{});
  }
};

// What a token keeps: both log-sum-exps in two parts, A and B. Six rows of `tokens` in memory.
struct Statistics {
  float* row;
  int64_t tokens;

  Statistics(const Tensor& t, int64_t tokens) : row(t.as<float>()), tokens(tokens) {
    require(t.numel() == 6 * tokens, "statistics must have ", 6 * tokens, " elements, got ", t.numel());
  }
  float& at(int which, int64_t token) const { return row[which * tokens + token]; }
};

struct LogSumExp {
  float value, low;  // low: what rounding took from value
};

// A logit over the temperature, rounded: not fused with the subtraction that follows, which is 0 at the maximum.
inline vf scaled(vf x, float inverse) { return rounded_product(x, splat(inverse)); }

template <class T> LogSumExp log_sum_exp(const T* x, int64_t n, float inverse) {
  constexpr int64_t kStretch = 2048;  // stays in the first-level cache between its maximum and its sum
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float top = -kInfinity, sum = 0.0f;
  for (int64_t first = 0; first < n; first += kStretch) {
    const T* part = x + first;
    const int64_t count = std::min(kStretch, n - first);
    vf most[4] = {splat(top), splat(top), splat(top), splat(top)};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
      for (int k = 0; k < 4; ++k) most[k] = max(most[k], scaled(load(part + i + k * W), inverse));
    for_vectors(count - i, [&](int64_t j, auto m) {
      most[0] = max(most[0], scaled(load_n(part + i + j, m, -kInfinity), inverse));
    });
    const float largest = max(max(max(most[0], most[1]), max(most[2], most[3])));
    const float ref = largest == -kInfinity ? 0.0f : largest;  // exp(-inf - -inf) would be NaN
    const auto [more] = accumulate<1>(count, [&](int64_t j, auto m, vf* t) {
      t[0] += exp(scaled(load_n(part + j, m, -kInfinity), inverse) - ref);
    });
    sum = sum * std::exp(top - ref) + more;
    top = largest;
  }
  const float log_sum = std::log(sum), lse = top + log_sum, part = lse - top;
  return {lse, (top - (lse - part)) + (log_sum - part)};  // Knuth's two-sum
}

// Natural logarithm of a positive normal number, within 2 ulp: with x = 2^k m, m in [sqrt(1/2), sqrt(2)),
// log m = 2 atanh((m - 1) / (m + 1)), whose series ends below 3e-9 of it.
inline vf log(vf x) {
  const vi k = (bitcast<vi>(x) - 0x3f3504f3) >> 23;
  const vf m = bitcast<vf>(bitcast<vi>(x) - (k << 23));
  const vf f = (m - 1.0f) / (m + 1.0f), z = f * f;
  vf s = fma(z, splat(1.0f / 9), splat(1.0f / 7));
  s = fma(z, s, splat(1.0f / 5));
  s = fma(z, s, splat(1.0f / 3));
  s = fma(2.0f * f * z, s, 2.0f * f);
  const vf n = __builtin_convertvector(k, vf);
  return fma(n, splat(0x1.62e4p-1f), fma(n, splat(0x1.7f7d1cp-20f), s));
}

struct Terms {
  vf p, q, b, a;
};

// b and a are 0 where their own class has probability 0.
template <Kind kind> inline Terms terms(vf log_p, vf log_q, float beta) {
  Terms t{exp(log_p), exp(log_q), vf{}, vf{}};
  const vf d = log_q - log_p;
  if constexpr (kind == Kind::forward_kl) t.b = select(t.p > 0.0f, -d, vf{});
  if constexpr (kind == Kind::reverse_kl) t.a = select(t.q > 0.0f, d, vf{});
  if constexpr (kind == Kind::js) {
    // log p - log m = -log(1 + (1 - beta) (e^d - 1)), and so from the other side: the one that cannot overflow
    const vi less = d <= 0.0f;
    const vf share = select(less, splat(1.0f - beta), splat(beta));
    const vf r = -log(1.0f + share * (exp(-abs(d)) - 1.0f));
    t.b = select(t.p > 0.0f, beta * select(less, r, r - d), vf{});
    t.a = select(t.q > 0.0f, (1.0f - beta) * select(less, r + d, r), vf{});
  }
  return t;
}

// The log-probabilities of n columns at i; -inf in lanes beyond the row.
template <class T, class Count>
inline vf log_probability(const T* x, int64_t i, Count n, float inverse, LogSumExp lse) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return (scaled(load_n(x + i, n, -kInfinity), inverse) - lse.value) - lse.low;
}

// Fills in token i's statistics from its rows.
template <class T>
void measure(const T* student, const T* teacher, int64_t n, const Options& o, int64_t i, const Statistics& s) {
  const LogSumExp u = log_sum_exp(student, n, o.inverse), v = log_sum_exp(teacher, n, o.inverse);
  float sums[2];
  o.with_kind([&](auto kind) {
    const auto both = accumulate<2>(n, [&](int64_t j, auto m, vf* total) {
      const Terms t = terms<kind>(log_probability(teacher, j, m, o.inverse, v),
                                  log_probability(student, j, m, o.inverse, u), o.beta);
      total[0] = fma(t.p, t.b, total[0]);
      total[1] = fma(t.q, t.a, total[1]);
    });
    sums[0] = both[0];
    sums[1] = both[1];
  });
  const float values[6] = {u.value, u.low, v.value, v.low, sums[0], sums[1]};
  for (int k = 0; k < 6; ++k) s.at(k, i) = values[k];
}

// d_student and d_teacher = g times the gradients with respect to u and v; null for one that is not wanted. Either may
// be the logits it is made from.
template <class T, class Out>
void differentiate(const T* student, const T* teacher, int64_t n, const Options& o, float g, int64_t i,
                   const Statistics& s, Out* d_student, Out* d_teacher) {
  const LogSumExp u{s.at(0, i), s.at(1, i)}, v{s.at(2, i), s.at(3, i)};
  const float mean_b = s.at(4, i), mean_a = s.at(5, i);
  o.with_kind([&](auto kind) {
    for_vectors(n, [&](int64_t j, auto m) {
      const Terms t = terms<kind>(log_probability(teacher, j, m, o.inverse, v),
                                  log_probability(student, j, m, o.inverse, u), o.beta);
      if (d_student)
        store_n(d_student + j, g * (kind == Kind::forward_kl ? t.q - t.p : t.q * (t.a - mean_a)), m);
      if (d_teacher)
        store_n(d_teacher + j, g * (kind == Kind::reverse_kl ? t.p - t.q : t.p * (t.b - mean_b)), m);
    });
  });
}

// loss () or (tokens) and the denominator (1) from the statistics; weight null for 1. `batch`: the size of the first
// dimension.
inline void reduce(const Statistics& s, const float* weight, const Options& o, int64_t batch, float* loss,
                   float* denominator) {
  double total = 0.0, weights = 0.0;
  for (int64_t i = 0; i < s.tokens; ++i) {
    const float w = weight ? weight[i] : 1.0f, value = o.scale * w * (s.at(4, i) + s.at(5, i));
    if (o.per_token) loss[i] = value;
    total += value;
    weights += w;
  }
  *denominator = o.mean ? static_cast<float>(weights) : o.batch_mean ? static_cast<float>(batch) : 1.0f;
  if (!o.per_token) *loss = *denominator == 0.0f ? 0.0f : static_cast<float>(total / *denominator);
}

// What multiplies token i's gradient with respect to u and v: d_loss, its weight, and the scales.
class Upstream {
 public:
  Upstream(const Tensor& d_loss, const float* weight, const Tensor& denominator, int64_t tokens, const Options& o)
      : d_loss_(d_loss.as<float>()), weight_(weight), per_token_(o.per_token) {
    require(d_loss.numel() == (per_token_ ? tokens : 1), "d_loss must have ", per_token_ ? tokens : 1,
            " elements, got ", d_loss.numel());
    require(denominator.numel() == 1, "denominator must have 1 element, got ", denominator.numel());
    const float d = *denominator.as<float>();
    scale_ = d == 0.0f ? 0.0f : o.scale * o.inverse / d;
  }

  float operator()(int64_t i) const {
    return d_loss_[per_token_ ? i : 0] * scale_ * (weight_ ? weight_[i] : 1.0f);
  }

 private:
  const float *d_loss_, *weight_;
  bool per_token_;
  float scale_;
};

}  // namespace distillation
}  // namespace fastlm
