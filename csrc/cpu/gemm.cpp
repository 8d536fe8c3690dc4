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

// Of y = x weight^T + bias, from dy (k, m) and x (k, n), both float32 or both bfloat16 and contiguous in the last dimension:
// dweight (m, n) float32 = dy^T x, or += if `accumulate`, and dbias (m) float32 += the sums of dy over k; or no dbias.
void linear_gradients(Tensor dy, Tensor x, Tensor dweight, bool accumulate, Tensor dbias) {
  require(dy.ndim == 2 && x.ndim == 2 && dweight.ndim == 2, "dy, x and dweight must have 2 dimensions, got ", dy.ndim, ", ",
          x.ndim, " and ", dweight.ndim);
  const int64_t k = dy.size(0), m = dy.size(1), n = x.size(1);
  require(x.size(0) == k && n >= 1, "x must have ", k, " rows and some columns, got ", x.size(0), " x ", n);
  require(dweight.size(0) == m && dweight.size(1) == n, "dweight must be ", m, " x ", n, ", got ", dweight.size(0), " x ",
          dweight.size(1));
  require(dy.dtype == x.dtype, "dy and x must have the same dtype");
  require((m <= 1 || dy.stride[1] == 1) && (n <= 1 || x.stride[1] == 1) && (n <= 1 || dweight.stride[1] == 1),
          "dy, x and dweight must have contiguous last dimensions");
  require_parameter(dbias, "dbias", m);
  gemm::Result to;
  to.c = dweight.as<float>(), to.ldc = dweight.stride[0], to.accumulate = accumulate;
  for_dtype(dy, [&](auto of) {
    using T = decltype(of);
    gemm::multiply_parallel<gemm::Element<T>>(dy.as<T>(), 1, dy.stride[0], x.as<T>(), x.stride[0], 1, m, n, k, to,
                                              dbias.wanted<float>());
  }, "dy");
}
FASTLM_EXPORT(linear_gradients);

// Bytes that they take beside their arguments, but for what a thread packs for itself.
int64_t matmul_workspace(Tensor a, Tensor b, Tensor, bool, Tensor) {
  const int64_t k = b.size(0), n = b.size(1);
  const auto bytes = [&](auto of_a, auto element) {
    using E = decltype(element);
    if (gemm::by_columns<E, decltype(of_a)>(a.stride[1], n)) return int64_t{0};
    return gemm::packed_words<E>(k, n) * static_cast<int64_t>(sizeof(uint32_t));
  };
  if (a.is<float>()) return bytes(float{}, float{});
  return b.is<bf16>() ? bytes(bf16{}, gemm::Element<bf16>{}) : bytes(bf16{}, float{});
}
FASTLM_EXPORT(matmul_workspace);

int64_t linear_gradients_workspace(Tensor, Tensor x, Tensor, bool, Tensor) {
  const int64_t k = x.size(0), n = x.size(1);
  return static_cast<int64_t>(sizeof(uint32_t)) *
         (x.is<bf16>() ? gemm::packed_words<gemm::Element<bf16>>(k, n) : gemm::packed_words<float>(k, n));
}
FASTLM_EXPORT(linear_gradients_workspace);

}  // namespace fastlm
