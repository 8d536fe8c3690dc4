// Dropout: element n of x is kept and scaled where word n of the Philox stream of the seed is at least
// floor(p * 2^32), else 0. Backward is forward with dy for x.
#include "philox.h"
#include "rows.h"

namespace fastlm {
namespace {

template <class T>
void drop(const T* x, PhiloxKey key, double p, T* y, int64_t n) {
  const uint64_t threshold = drop_threshold(p);
  if (threshold >> 32) {
    std::fill(y, y + n, T{});
    return;
  }
  const vu least = splat(static_cast<uint32_t>(threshold));
  const float scale = static_cast<float>(1.0 / (1.0 - p));
  constexpr int64_t group = 4 * W;  // elements to a call of philox_lanes
  parallel_for((n + group - 1) / group, kGrain / group, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      vu words[4];
      philox_lanes(key, static_cast<uint64_t>(g) * W, 0, 0, words);
      const int64_t at = g * group;
      for_vectors(std::min(group, n - at), [&](int64_t i, auto count) {
        const vf v = load_n(x + at + i, count) * scale;
        store_n(y + at + i, select(words[i / W] >= least, v, vf{}), count);
      });
    }
  });
}

void dropout(const Tensor& x, const Tensor& seed, double p, const Tensor& y) {
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    require_size(seed, "seed", 1);
    require_size(y, "y", x.numel());
    require(p >= 0 && p <= 1, "p must be in 0 to 1, got ", p);
    if (x.numel() > 0) drop(x.as<T>(), PhiloxKey(*seed.as<int64_t>()), p, y.as<T>(), x.numel());
  });
}

}  // namespace

// x any shape, float32 or bfloat16, contiguous; seed one int64; y like x.
void dropout_forward(Tensor x, Tensor seed, double p, Tensor y) { dropout(x, seed, p, y); }
FASTLM_EXPORT(dropout_forward);

// dy, dx as x, y.
void dropout_backward(Tensor dy, Tensor seed, double p, Tensor dx) {
  if (dx.defined()) dropout(dy, seed, p, dx);
}
FASTLM_EXPORT(dropout_backward);

}  // namespace fastlm
