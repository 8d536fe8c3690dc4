// gemm.h as a function of its own, for the engine and for its tests.
#include "gemm.h"
#include "rows.h"

namespace fastlm {

// c (m, n) = a (m, k) b (k, n) + bias (n), which may be None; or c += if `accumulate`. a and b float32 or bfloat16 with
// any strides; c float32, or bfloat16 if not `accumulate`, its last dimension contiguous; bias float32 or bfloat16. Two
// bfloat16 operands are multiplied as such where the chip can, others as float32; sums are float32.
void matmul(Tensor a, Tensor b, Tensor c, bool accumulate, Tensor bias) {
  require(a.ndim == 2 && b.ndim == 2 && c.ndim == 2, "a, b and c must have 2 dimensions, got ", a.ndim, ", ",
          b.ndim, " and ", c.ndim);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  require(b.size(0) == k, "b must have ", k, " rows, got ", b.size(0));
  require(c.size(0) == m && c.size(1) == n, "c must be ", m, " x ", n, ", got ", c.size(0), " x ", c.size(1));
  require(n <= 1 || c.stride[1] == 1, "c must have a contiguous last dimension, got stride ", c.stride[1]);
  require_parameter(bias, "bias", n);
  const bool rounded = c.is<bf16>();
  require(!rounded || !accumulate, "c must be float32 to be added to, got bfloat16");
  Scratch scratch;
  gemm::Result to;
  to.accumulate = accumulate;
  to.bias = floats(bias, scratch);
  if (rounded) to.rounded = c.as<bf16>(), to.ld_rounded = c.stride[0];
  else to.c = c.as<float>(), to.ldc = c.stride[0];
  for_dtype(a, [&](auto of_a) {
    for_dtype(b, [&](auto of_b) {
      using A = decltype(of_a);
      using B = decltype(of_b);
      using E = gemm::Element<std::conditional_t<std::is_same_v<A, B>, A, float>>;
      gemm::multiply_parallel<E>(a.as<A>(), a.stride[0], a.stride[1], b.as<B>(), b.stride[0], b.stride[1], m, n, k, to);
    }, "b");
  }, "a");
}
FASTLM_EXPORT(matmul);

// Bytes of their own that threads take and keep for matmul, but for what one packs of a band of a.
int64_t matmul_scratch(Tensor a, Tensor b, Tensor, bool, Tensor) {
  const int64_t k = b.size(0), n = b.size(1);
  const bool halves = a.is<bf16>() && b.is<bf16>();
  return static_cast<int64_t>(sizeof(uint32_t)) *
         (halves ? gemm::packed_words<gemm::Element<bf16>>(k, n) : gemm::packed_words<float>(k, n));
}
FASTLM_EXPORT(matmul_scratch);

}  // namespace fastlm
