// Rotary position embedding: y1 = x1 c - x2 s, y2 = x2 c + x1 s for the pairs of the first 2 * half columns; the
// others are copied. Backward is forward with the angle's sign changed.
//
// The work is cut into blocks of tokens of one sequence, whose rows of the tables stay in the cache over all heads.
// Both members of a pair are read before either is written, so y may be x.
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kTokens = 32;

inline vf swap_pairs(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_permute_ps(0xffff, (__m512)v, 0xb1);
#else
  vf out;
  for (int i = 0; i < W; ++i) out[i] = v[i ^ 1];
  return out;
#endif
}

// c and s: the token's row; s with its sign.
template <class T> void turn_halves(const T* x, const float* c, const float* s, T* y, int64_t half) {
  for_vectors(half, [&](int64_t i, auto lanes) {
    const vf x1 = load_n(x + i, lanes), x2 = load_n(x + half + i, lanes);
    const vf cos = load_n(c + i, lanes), sin = load_n(s + i, lanes);
    store_n(y + i, x1 * cos - x2 * sin, lanes);
    store_n(y + half + i, x2 * cos + x1 * sin, lanes);
  });
}

// c and s: every entry twice, of s the first negated.
template <class T> void turn_interleaved(const T* x, const float* c, const float* s, T* y, int64_t half) {
  for_vectors(2 * half, [&](int64_t i, auto lanes) {
    const vf v = load_n(x + i, lanes);
    store_n(y + i, v * load_n(c + i, lanes) + swap_pairs(v) * load_n(s + i, lanes), lanes);
  });
}

template <class T>
void turn(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool interleaved,
          const Tensor& y, float sign) {
  const int64_t batch = x.size(0), heads = x.size(1), seq = x.size(2), dim = x.size(3);
  const int64_t half = cos.size(1), places = cos.size(0), rest = dim - 2 * half;
  const int64_t* at = positions.as<int64_t>();
  if (at) {
    require(positions.ndim == 2 && positions.size(0) == batch && positions.size(1) == seq,
            "positions must be (batch, seq)");
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = 0; t < seq; ++t) {
        const int64_t place = at[b * positions.stride[0] + t * positions.stride[1]];
        if (place >= 0 && place < places) continue;
        std::ostringstream text;
        text << "positions: got " << place << "; allowed: 0 to " << places - 1;
        throw std::out_of_range(text.str());
      }
  } else {
    require(seq <= places, "cos must have a row for each of ", seq, " tokens, got ", places);
  }
  const T* from = x.as<T>();
  T* to = y.as<T>();
  const float *cosines = cos.as<float>(), *sines = sin.as<float>();
  const int64_t blocks = (seq + kTokens - 1) / kTokens, grain = kGrain / (kTokens * heads * dim) + 1;
  parallel_for(batch * blocks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const int64_t width = interleaved ? 2 * half : half;
    float *c = scratch.take<float>(kTokens * width), *s = scratch.take<float>(kTokens * width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t b = block / blocks, first = block % blocks * kTokens, last = std::min(first + kTokens, seq);
      for (int64_t t = first; t < last; ++t) {
        const int64_t place = at ? at[b * positions.stride[0] + t * positions.stride[1]] : t;
        const float *cr = cosines + place * cos.stride[0], *sr = sines + place * sin.stride[0];
        float *ct = c + (t - first) * width, *st = s + (t - first) * width;
        for (int64_t i = 0; i < half; ++i) {
          if (interleaved) {
            ct[2 * i] = ct[2 * i + 1] = cr[i];
            st[2 * i + 1] = sr[i] * sign;
            st[2 * i] = -st[2 * i + 1];
          } else {
            ct[i] = cr[i];
            st[i] = sr[i] * sign;
          }
        }
      }
      // Innermost what lies closest in memory.
      const bool heads_inside = x.stride[1] < x.stride[2];
      const int64_t tokens = last - first;
      for (int64_t k = 0; k < heads * tokens; ++k) {
        const int64_t h = heads_inside ? k % heads : k / tokens, t = heads_inside ? k / heads : k % tokens;
        const T* row = from + b * x.stride[0] + h * x.stride[1] + (first + t) * x.stride[2];
        T* out = to + b * y.stride[0] + h * y.stride[1] + (first + t) * y.stride[2];
        if (interleaved) turn_interleaved(row, c + t * width, s + t * width, out, half);
        else turn_halves(row, c + t * width, s + t * width, out, half);
        if (rest > 0 && row != out) std::memcpy(out + 2 * half, row + 2 * half, rest * sizeof(T));
      }
    }
  });
}

void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool interleaved,
            const Tensor& y, float sign) {
  require(x.ndim == 4 && cos.ndim == 2 && sin.ndim == 2, "x must be (batch, heads, seq, dim), tables (P, R / 2)");
  require(2 * cos.size(1) <= x.size(3), "the tables must have at most half as many columns as x");
  require(sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1), "sin must have the shape of cos");
  require_size(y, "y", x.numel());
  for_dtype(x, [&](auto element) {
    if (x.numel() > 0) turn<decltype(element)>(x, cos, sin, positions, interleaved, y, sign);
  });
}

}  // namespace

// x (batch, heads, seq, dim) float32 or bfloat16, the last dimension contiguous; cos, sin (P, R / 2) float32, their
// rows contiguous; positions (batch, seq) int64, or None for 0, 1, ...; y like x.
void rotary_embedding_forward(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved, Tensor y) {
  rotary(x, cos, sin, positions, interleaved, y, 1.0f);
}
FASTLM_EXPORT(rotary_embedding_forward);

// dy, dx as x, y.
void rotary_embedding_backward(Tensor dy, Tensor cos, Tensor sin, Tensor positions, bool interleaved, Tensor dx) {
  if (dx.defined()) rotary(dy, cos, sin, positions, interleaved, dx, -1.0f);
}
FASTLM_EXPORT(rotary_embedding_backward);

}  // namespace fastlm
