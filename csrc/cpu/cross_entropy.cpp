// Cross-entropy between logits and class indices or probabilities; the formulas stand in cross_entropy.h.
//
// Forward reads the logits once: a stretch of a row stays in the first-level cache between the pass that
// looks for its maximum and the pass that sums exponentials. Backward reads them once more and writes as
// much. Ignored tokens are not read at all.
#include "cross_entropy.h"

namespace fastlm {
namespace {

using cross_entropy::Extras;
using cross_entropy::Gradient;
using cross_entropy::kStretch;
using cross_entropy::Options;
using cross_entropy::Statistics;
using cross_entropy::Targets;
using cross_entropy::Token;
using cross_entropy::Upstream;

int64_t grain(int64_t classes) { return (kGrain + classes - 1) / classes; }

// Runs fn with a value of the element type of logits.
template <class Fn> void for_logits(const Tensor& logits, Fn&& fn) {
  require(logits.ndim > 0, "logits must have at least one dimension");
  for_dtype(logits, fn, "logits");
}

template <class T> void forward(const T* logits, const Targets& target, const Options& o, const Statistics& out) {
  const int64_t classes = o.classes;
  parallel_for(target.tokens(), grain(classes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* buffer = o.buffer(scratch);
    for (int64_t i = begin; i < end; ++i) {
      if (target.ignored(i)) {
        out.clear(i);
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
void backward(const T* logits, const Targets& target, const Statistics& s, const Upstream& up, const Options& o,
              T* d_logits) {
  const int64_t classes = o.classes;
  parallel_for(target.tokens(), grain(classes), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* buffer = o.buffer(scratch);
    for (int64_t i = begin; i < end; ++i) {
      T* out = d_logits + i * classes;
      if (target.ignored(i)) {
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

// logits (..., V) float32 or bfloat16, contiguous; target (...) int64, or probabilities (..., V); weight (V),
// token_weight (...) and probabilities of logits' dtype or float32, weights or None. loss and z () or, for reduction
// "none", (...); lse, confidence and entropy (...) and correct (...) bool, these and z of no elements without extras;
// statistics (3 or, for probabilities, 4, ...); denominators (2): all float32.
void cross_entropy_forward(Tensor logits, Tensor target, Tensor weight, Tensor token_weight, int64_t ignore_index,
                           double label_smoothing, double z_loss, std::optional<double> softcap,
                           double logit_scale, std::string reduction, bool extras, Tensor loss, Tensor z,
                           Tensor lse, Tensor correct, Tensor confidence, Tensor entropy, Tensor statistics,
                           Tensor denominators) {
  for_logits(logits, [&](auto element) {
    using T = decltype(element);
    Scratch scratch;
    const Options o(logits.size(-1), weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                    reduction, extras, scratch);
    const Targets targets(target, logits.numel() / o.classes, o);
    targets.check();
    const Extras more(z, lse, correct, confidence, entropy);
    Statistics s(statistics, targets);
    more.enter(s);
    forward(logits.as<T>(), targets, o, s);
    cross_entropy::reduce(s, targets, cross_entropy::token_weights(token_weight, targets.tokens(), scratch), o,
                          loss.as<float>(), more.z, denominators.as<float>());
  });
}
FASTLM_EXPORT(cross_entropy_forward);

// d_loss and d_z () or (...), d_lse (...), float32, each None or of no elements for 0; d_logits like logits, not
// computed if None.
void cross_entropy_backward(Tensor d_loss, Tensor d_z, Tensor d_lse, Tensor logits, Tensor target, Tensor weight,
                            Tensor token_weight, Tensor statistics, Tensor denominators, int64_t ignore_index,
                            double label_smoothing, double z_loss, std::optional<double> softcap,
                            double logit_scale, std::string reduction, bool extras, Tensor d_logits) {
  for_logits(logits, [&](auto element) {
    using T = decltype(element);
    if (d_logits.numel() == 0) return;
    Scratch scratch;
    const Options o(logits.size(-1), weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                    reduction, extras, scratch);
    const Targets targets(target, logits.numel() / o.classes, o);
    const float* u = cross_entropy::token_weights(token_weight, targets.tokens(), scratch);
    require(d_logits.numel() == logits.numel(), "d_logits must have ", logits.numel(), " elements");
    backward(logits.as<T>(), targets, Statistics(statistics, targets),
             Upstream(d_loss, d_z, d_lse, denominators, u, targets.tokens(), o), o, d_logits.as<T>());
  });
}
FASTLM_EXPORT(cross_entropy_backward);

}  // namespace fastlm
