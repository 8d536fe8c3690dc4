// gemm.h as a function of its own, for its tests and for callers that need only a product.
#include "gemm.h"

namespace fastlm {
namespace {

template <class Fn> void for_dtype(const Tensor& x, const char* what, Fn&& fn) {
  if (x.is<float>()) return fn(float{});
  require(x.is<bf16>(), what, " must be float32 or bfloat16, got ", x.defined() ? name(x.dtype) : "None");
  fn(bf16{});
}

}  // namespace

// c (m, n) float32, last dimension contiguous, = a (m, k) b (k, n), or += if `accumulate`; a and b float32 or
// bfloat16 with any strides. Two bfloat16 operands are multiplied as such where the chip can, others as
// float32.
void matmul(Tensor a, Tensor b, Tensor c, bool accumulate) {
  require(a.ndim == 2 && b.ndim == 2 && c.ndim == 2, "a, b and c must have 2 dimensions, got ", a.ndim, ", ",
          b.ndim, " and ", c.ndim);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  require(b.size(0) == k, "b must have ", k, " rows, got ", b.size(0));
  require(c.size(0) == m && c.size(1) == n, "c must be ", m, " x ", n, ", got ", c.size(0), " x ", c.size(1));
  require(n <= 1 || c.stride[1] == 1, "c must have a contiguous last dimension, got stride ", c.stride[1]);
  for_dtype(a, "a", [&](auto of_a) {
    for_dtype(b, "b", [&](auto of_b) {
      using A = decltype(of_a);
      using B = decltype(of_b);
      using E = gemm::Element<std::conditional_t<std::is_same_v<A, B>, A, float>>;
      gemm::multiply_parallel<E>(a.as<A>(), a.stride[0], a.stride[1], b.as<B>(), b.stride[0], b.stride[1], m,
                                 n, k, c.as<float>(), c.stride[0], accumulate);
    });
  });
}
FASTLM_EXPORT(matmul);

}  // namespace fastlm
