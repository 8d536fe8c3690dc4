// Cross-entropy between logits and class indices; the formulas stand in cross_entropy.h.
//
// Forward reads the logits once: a stretch of a row stays in the first-level cache between the pass that
// looks for its maximum and the pass that sums exponentials. Backward reads them once more and writes as
// much. Ignored tokens are not read at all.
#include "cross_entropy.h"

namespace fastlm {
namespace {

using cross_entropy::Gradient;
using cross_entropy::kStretch;
using cross_entropy::Options;
using cross_entropy::Statistics;
using cross_entropy::Token;
using cross_entropy::Upstream;

constexpr int64_t kGrain = 16384;  // logits that are worth a block of their own

int64_t grain(int64_t classes) { return (kGrain + classes - 1) / classes; }

// Runs fn with a value of the element type of logits.
template <class Fn> void for_dtype(const Tensor& logits, Fn&& fn) {
  require(logits.ndim > 0, "logits must have at least one dimension");
  if (logits.is<float>()) return fn(float{});
  require(logits.is<bf16>(), "logits must be float32 or bfloat16, got ",
          logits.defined() ? name(logits.dtype) : "None");
  fn(bf16{});
}

int64_t count_tokens(const Tensor& logits, const Tensor& target) {
  require(logits.numel() == target.numel() * logits.size(-1), "logits must have ",
          target.numel() * logits.size(-1), " elements, got ", logits.numel());
  return target.numel();
}

template <class T>
void forward(const T* logits, const int64_t* target, int64_t tokens, const Options& o,
             const Statistics& out) {
  const int64_t classes = o.classes;
  parallel_for(tokens, grain(classes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* buffer = o.softcap == 0.0f ? nullptr : scratch.take<float>(kStretch);
    for (int64_t i = begin; i < end; ++i) {
      if (target[i] == o.ignore_index) {
        out.lse[i] = out.low[i] = out.loss[i] = 0.0f;
        continue;
      }
      Token token(target[i]);
      for (int64_t first = 0; first < classes; first += kStretch)
        token.add(logits + i * classes + first, first, std::min(kStretch, classes - first), o, buffer);
      token.finish(o, i, out);
    }
  });
}

template <class T>
void backward(const T* logits, const int64_t* target, int64_t tokens, const Statistics& s, const Upstream& up,
              const Options& o, T* d_logits) {
  const int64_t classes = o.classes;
  parallel_for(tokens, grain(classes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* buffer = o.softcap == 0.0f ? nullptr : scratch.take<float>(kStretch);
    for (int64_t i = begin; i < end; ++i) {
      T* out = d_logits + i * classes;
      if (target[i] == o.ignore_index) {
        std::fill(out, out + classes, T{});
        continue;
      }
      const Gradient gradient(i, target[i], s, up, o);
      for (int64_t first = 0; first < classes; first += kStretch)
        gradient.columns(logits + i * classes + first, first, std::min(kStretch, classes - first), o, buffer,
                         out + first);
    }
  });
}

}  // namespace

// logits (..., V) float32 or bfloat16, contiguous; target (...) int64; weight (V) of logits' dtype or
// float32, or None; loss () or, for reduction "none", (...); statistics (3, ...); denominators (2): all
// float32.
void cross_entropy_forward(Tensor logits, Tensor target, Tensor weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, std::optional<double> softcap,
                           std::string reduction, Tensor loss, Tensor statistics, Tensor denominators) {
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    Scratch scratch;
    const int64_t tokens = count_tokens(logits, target);
    const Options o(logits.size(-1), weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
                    scratch);
    const Statistics s(statistics, tokens);
    cross_entropy::check_targets(target.as<int64_t>(), tokens, o);
    forward(logits.as<T>(), target.as<int64_t>(), tokens, o, s);
    cross_entropy::reduce(s, target.as<int64_t>(), tokens, o, loss.as<float>(), denominators.as<float>());
  });
}
FASTLM_EXPORT(cross_entropy_forward);

// d_loss () or (...) float32; d_logits like logits, not computed if None.
void cross_entropy_backward(Tensor d_loss, Tensor logits, Tensor target, Tensor weight, Tensor statistics,
                            Tensor denominators, int64_t ignore_index, double label_smoothing, double z_loss,
                            std::optional<double> softcap, std::string reduction, Tensor d_logits) {
  for_dtype(logits, [&](auto element) {
    using T = decltype(element);
    if (d_logits.numel() == 0) return;
    Scratch scratch;
    const int64_t tokens = count_tokens(logits, target);
    const Options o(logits.size(-1), weight, ignore_index, label_smoothing, z_loss, softcap, reduction,
                    scratch);
    require(d_logits.numel() == logits.numel(), "d_logits must have ", logits.numel(), " elements");
    backward(logits.as<T>(), target.as<int64_t>(), tokens, Statistics(statistics, tokens),
             Upstream(d_loss, denominators, tokens, o), o, d_logits.as<T>());
  });
}
FASTLM_EXPORT(cross_entropy_backward);

}  // namespace fastlm
