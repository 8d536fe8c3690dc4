// GELU of u = x + bias: y = u * factor(u), du = dy * (factor(u) + u * slope(u)) with slope = factor'.
//
//   normal   factor = Phi(u), the normal distribution function;  slope = exp(-u^2 / 2) / sqrt(2 pi)
//   tanh     factor = sigmoid(2 z), z = sqrt(2 / pi) * (u + 0.044715 u^3);  slope = factor * (1 - factor) * 2 z'
//
// Both keep the relative accuracy of the left tail, and take one exponential. dbias is summed in float32 over a
// number of blocks that is a function of the shape, then over the blocks in order.
#include "rows.h"

namespace fastlm {
namespace {

// Both factors are 0 or 1 beyond it; u is clamped there, where 0 * infinity would be NaN. A NaN passes.
constexpr float kLimit = 40.0f;

struct Point {
  vf factor, slope;
};

struct Normal {
  static Point at(vf u) {
    // Phi(-t) = exp(-t^2 / 2) * R(t) with R(t) = erfcx(t / sqrt(2)) / 2: a minimax fit of our own in
    // s = 1 / (1 + 0.3 t), relative error 6e-8 on [0, 14.6], where exp(-t^2 / 2) reaches 0.
    const vf s = 1.0f / fma(splat(0.3f), abs(u), splat(1.0f));
    vf r = splat(0.03841174766421318f);
    r = fma(r, s, splat(-0.16932860016822815f));
    r = fma(r, s, splat(0.22899538278579712f));
    r = fma(r, s, splat(-0.07688941806554794f));
    r = fma(r, s, splat(0.14279954135417938f));
    r = fma(r, s, splat(0.0945713147521019f));
    r = fma(r, s, splat(0.1219489648938179f));
    r = fma(r, s, splat(0.11948368698358536f));
    r = fma(r, s, splat(7.402495612041093e-06f));
    const vf e = exp(u * u * -0.5f), tail = e * r;
    return {select(u < 0.0f, tail, 1.0f - tail), e * 0.3989422804014327f};
  }
};

struct Tanh {
  static Point at(vf u) {
    constexpr float a = 1.5957691216057308f, cubic = 0.044715f;  // 2 sqrt(2 / pi)
    const vf square = u * u;
    const vf factor = 1.0f / (1.0f + exp(u * fma(square, splat(-a * cubic), splat(-a))));
    return {factor, factor * (1.0f - factor) * fma(square, splat(3 * a * cubic), splat(a))};
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
        u = max(u, splat(-kLimit));
        store_n(y + at + i, u * Curve::at(u).factor, lanes);
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
            u = min(max(u, splat(-kLimit)), splat(kLimit));
            const Point point = Curve::at(u);
            const vf du = load_n(dy + at + i, lanes) * fma(u, point.slope, point.factor);
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
  require(approximate == "none" || approximate == "tanh", "approximate must be none or tanh, got ", approximate);
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
