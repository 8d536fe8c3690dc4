// The activations as vectors: each form's `at<T>(u)` gives act(u) and act'(u), T being what they are rounded to.
//
// With F the normal distribution function or a sigmoid, F(u) = 1 - F(-u), so u * F(u) needs only t = |u| and
// the tail F(-t), which keeps its relative accuracy:
//
//   act(u) = max(u, 0) - t * F(-t)     act'(u) = g for u < 0 and 1 - g for u >= 0, g = F(-t) - t * F'(t)
#pragma once

#include <string>

#include "vec.h"

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
  template <class T> static Pair at(vf u) {
    return {at_least(u, 0.0f), select(u <= 0.0f, vf{}, splat(1.0f))};
  }
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

}  // namespace fastlm::activation
