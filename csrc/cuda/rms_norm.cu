// RMSNorm over the last dimension: y = x * rstd * (weight + offset), rstd = 1 / sqrt(average(x^2) + eps), and its
// gradients.
#include "norm.cuh"

namespace fastlm {
namespace {

// Whether xhat is to be rounded; in float32 there is nothing to round, and one kernel serves both orders.
bool is_llama(const std::string& casting) {
  require(casting == "gemma" || casting == "llama", "casting must be gemma or llama, got ", casting);
  return casting == "llama";
}

template <class T> constexpr bool kRounds = sizeof(T) < sizeof(float);

}  // namespace

// x (..., n) float32, float16 or bfloat16, contiguous; weight (n) of x's dtype or float32, or None; casting "gemma",
// or "llama" to round x * rstd to x's dtype; y like x; rstd (rows) float32, not written if None or empty.
void rms_norm_forward(Tensor x, Tensor weight, double eps, double offset, std::string casting, Tensor y,
                      Tensor rstd, int64_t stream) {
  const bool llama = is_llama(casting);
  for_dtype(x, "x", [&](auto element) {
    using T = decltype(element);
    auto* run = llama ? &norm_forward<false, kRounds<T>, T> : &norm_forward<false, false, T>;
    run(x, weight, {}, offset, eps, y, {}, rstd, stream);
  });
}
FASTLM_EXPORT(rms_norm_forward);

// Bytes of workspace for rms_norm_backward with these arguments.
int64_t rms_norm_backward_workspace(Tensor /*dy*/, Tensor x, Tensor /*weight*/, Tensor /*rstd*/, double /*eps*/,
                                    double /*offset*/, std::string /*casting*/, Tensor /*dx*/, Tensor dweight) {
  return norm_workspace<false>(x, dweight, {});
}
FASTLM_EXPORT(rms_norm_backward_workspace);

// dy, x (..., n) contiguous, of one dtype; rstd (rows) from the forward; dx like x; dweight (n) float32, added to.
// An output that is None or empty is not computed; workspace as many bytes as rms_norm_backward_workspace says.
void rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, double /*eps*/, double offset,
                       std::string casting, Tensor dx, Tensor dweight, Tensor workspace, int64_t stream) {
  const bool llama = is_llama(casting);
  for_dtype(x, "x", [&](auto element) {
    using T = decltype(element);
    auto* run = llama ? &norm_backward<false, kRounds<T>, T> : &norm_backward<false, false, T>;
    run(dy, x, weight, offset, {}, rstd, dx, dweight, {}, workspace, stream);
  });
}
FASTLM_EXPORT(rms_norm_backward);

}  // namespace fastlm
