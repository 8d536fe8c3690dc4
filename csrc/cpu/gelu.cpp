// GELU of u = x + bias: y = u * F(u), du = dy * (F(u) + u * F'(u)), where
//
//   none   F(u) = Phi(u), the normal distribution function;  F'(u) = exp(-u^2 / 2) / sqrt(2 pi)
//   tanh   F(u) = sigmoid(2 z), z = sqrt(2 / pi) * (u + 0.044715 u^3);  F' = F * (1 - F) * 2 z'
//
// F(u) = 1 - F(-u), so both need only t = |u| and the tail F(-t), which keeps its relative accuracy:
//
//   y = max(u, 0) - t * F(-t)        dy/du = g for u < 0 and 1 - g for u >= 0, with g = F(-t) - t * F'(t)
//
// dbias is summed in float32 over a number of blocks that is a function of the shape, then over the blocks in
// order.
#include "rows.h"

namespace fastlm {
namespace {

// The tail is 0 beyond it; t goes no further, where infinity * 0 would be NaN. A NaN passes.
constexpr float kLimit = 40.0f;

struct Tail {
  vf value, slope;  // F(-t), F'(t)
};

// Where bfloat16 is all that becomes of a value, whose rounding error is 2e-3, shorter polynomials serve. All
// are minimax fits of our own of the relative error, highest power first.
template <class T> constexpr bool kShort = std::is_same_v<T, bf16>;

template <size_t N> vf polynomial(vf x, const float (&c)[N]) {
  vf p = splat(c[0]);
  for (size_t i = 1; i < N; ++i) p = fma(p, x, splat(c[i]));
  return p;
}

// 1 / d for d in [1, 100].
template <class T> vf reciprocal(vf d) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);  // within 2^-14
  return kShort<T> ? r : r * (2.0f - d * r);
#else
  return 1.0f / d;
#endif
}

// 2^t for t in [-10^6, 0]; 0 where that is below the smallest denormal number.
template <class T> vf power(vf t) {
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

struct Normal {
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
  template <class T> static Tail at(vf t) {
    constexpr float a = 1.5957691216057308f, cubic = 0.044715f;  // a = 2 sqrt(2 / pi)
    const vf square = t * t;
    const vf e = power<T>(t * fma(square, splat(-a * cubic * kLog2e), splat(-a * kLog2e)));  // exp(-2 z)
    const vf r = reciprocal<T>(1.0f + e), tail = e * r;
    return {tail, tail * r * fma(square, splat(3 * a * cubic), splat(a))};
  }
};

// Calls fn(start, column, length) for the pieces of rows of n elements that lie in [begin, end).
template <class Fn>
void for_pieces(int64_t begin, int64_t end, int64_t n, Fn&& fn) {
  for (int64_t at = begin; at < end;) {
    const int64_t column = at % n, length = std::min(end - at, n - column);
    fn(at, column, length);
    at += length;
  }
}

template <class Curve, class T>
void forward(const T* x, const float* bias, T* y, int64_t count, int64_t n) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    for_pieces(begin, end, n, [&](int64_t at, int64_t column, int64_t length) {
      for_vectors(length, [&](int64_t i, auto lanes) {
        vf u = load_n(x + at + i, lanes);
        if (bias) u += load_n(bias + column + i, lanes);
        const vf t = at_most(abs(u), kLimit);
        store_n(y + at + i, at_least(u, 0.0f) - t * Curve::template at<T>(t).value, lanes);
      });
    });
  });
}

template <class Curve, class T>
void backward(const T* dy, const T* x, const float* bias, T* dx, float* dbias, int64_t count, int64_t n) {
  const int64_t grain = dbias ? std::max(kGrain, 4 * n) : kGrain;  // four rows pay for a row of partial sums
  const int64_t most = dbias ? kMaxPartials : kMaxBlocks;
  Scratch scratch;
  float* partials = dbias ? scratch.take<float>(block_count(count, grain, most) * n) : nullptr;
  parallel_for(
      count, grain,
      [&](int64_t begin, int64_t end, int64_t block) {
        float* sums = dbias ? partials + block * n : nullptr;
        if (sums) std::fill(sums, sums + n, 0.0f);
        for_pieces(begin, end, n, [&](int64_t at, int64_t column, int64_t length) {
          for_vectors(length, [&](int64_t i, auto lanes) {
            vf u = load_n(x + at + i, lanes);
            if (bias) u += load_n(bias + column + i, lanes);
            const vf t = at_most(abs(u), kLimit);
            const Tail tail = Curve::template at<T>(t);
            const vf g = tail.value - t * tail.slope;
            const vf du = load_n(dy + at + i, lanes) * select(u < 0.0f, g, 1.0f - g);
            if (dx) store_n(dx + at + i, du, lanes);
            if (sums) store_n(sums + column + i, load_n(sums + column + i, lanes) + du, lanes);
          });
        });
      },
      most);
  if (dbias) add_partials(partials, block_count(count, grain, most), n, dbias);
}

// Columns that the bias has; without one, all elements are one row.
int64_t columns(const Tensor& x, const Tensor& bias) {
  if (!bias.defined()) return x.numel();
  require(x.ndim > 0, "x must have at least one dimension when there is a bias");
  require_size(bias, "bias", x.size(-1));
  return x.size(-1);
}

bool is_tanh(const std::string& approximate) {
  require(approximate == "none" || approximate == "tanh", "approximate must be none or tanh, got ",
          approximate);
  return approximate == "tanh";
}

}  // namespace

// x (..., n) float32 or bfloat16, contiguous; bias (n) of x's dtype or float32, or None; y like x.
void gelu_forward(Tensor x, Tensor bias, std::string approximate, Tensor y) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const int64_t n = columns(x, bias), count = x.numel();
    require_size(y, "y", count);
    const auto run = is_tanh(approximate) ? forward<Tanh, T> : forward<Normal, T>;
    Scratch scratch;
    if (count > 0) run(x.as<T>(), floats(bias, scratch), y.as<T>(), count, n);
  });
}
FASTLM_EXPORT(gelu_forward);

// dy, x, dx alike; dbias (n) float32, added to. An output that is None or empty is not computed.
void gelu_backward(Tensor dy, Tensor x, Tensor bias, std::string approximate, Tensor dx, Tensor dbias) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const int64_t n = columns(x, bias), count = x.numel();
    require_size(dy, "dy", count);
    require(!dbias.defined() || bias.defined(), "dbias must be None when there is no bias");
    const auto run = is_tanh(approximate) ? backward<Tanh, T> : backward<Normal, T>;
    Scratch scratch;
    if (count > 0)
      run(dy.as<T>(), x.as<T>(), floats(bias, scratch), dx.wanted<T>(), dbias.wanted<float>(), count, n);
  });
}
FASTLM_EXPORT(gelu_backward);

}  // namespace fastlm
