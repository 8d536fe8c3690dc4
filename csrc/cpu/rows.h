// What kernels over rows share: parameters as float32, and their gradients summed in a fixed order.
#pragma once

#include "vec.h"

namespace fastlm {

constexpr int64_t kGrain = 16384;     // elements that are worth a block of their own
constexpr int64_t kMaxPartials = 64;  // blocks that a parameter's gradient is first summed in

// A vector, as a weight or bias, as float32; null if there is none.
inline const float* floats(const Tensor& t, Scratch& scratch) {
  if (!t.is<bf16>()) return t.as<float>();
  const int64_t n = t.numel();
  float* out = scratch.take<float>(n);
  for_vectors(n, [&](int64_t i, auto count) { store_n(out + i, load_n(t.as<bf16>() + i, count), count); });
  return out;
}

// out += the sum of `blocks` rows of n partials, in their order.
inline void add_partials(const float* partials, int64_t blocks, int64_t n, float* out) {
  parallel_for(n, kGrain / kMaxPartials, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, auto count) {
      vf total = {};
      for (int64_t b = 0; b < blocks; ++b) total += load_n(partials + b * n + begin + i, count);
      store_n(out + begin + i, load_n(out + begin + i, count) + total, count);
    });
  });
}

// Runs fn with a value of the element type of x.
template <class Fn>
void for_dtype(const Tensor& x, Fn&& fn, const char* what = "x") {
  if (x.is<float>()) return fn(float{});
  require(x.is<bf16>(), what, " must be float32 or bfloat16, got ", x.defined() ? name(x.dtype) : "None");
  fn(bf16{});
}

inline void require_size(const Tensor& t, const char* what, int64_t n) {
  require(t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
}

inline void require_parameter(const Tensor& t, const char* what, int64_t n) {
  if (t.defined()) require_size(t, what, n);
}

}  // namespace fastlm
