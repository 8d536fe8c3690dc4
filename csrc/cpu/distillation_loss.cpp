// A divergence between teacher and student from the logits of both; formulas in distillation.h.
#include "distillation.h"
#include "rows.h"

namespace fastlm {
namespace {

using distillation::Options;
using distillation::Statistics;
using distillation::Upstream;

int64_t count_tokens(const Tensor& student, const Tensor& teacher, const Tensor& token_weight) {
  require(student.ndim > 0 && student.size(-1) > 0, "student must be (..., V) with V >= 1");
  require_size(teacher, "teacher", student.numel());
  const int64_t tokens = student.numel() / student.size(-1);
  require_parameter(token_weight, "token_weight", tokens);
  return tokens;
}

}  // namespace

// student, teacher (..., V) of one dtype, float32 or bfloat16, contiguous; token_weight (...) float32 or None; loss ()
// or, for reduction "none", (...); statistics (6, ...); denominator (1): all float32.
void distillation_loss_forward(Tensor student, Tensor teacher, Tensor token_weight, std::string divergence,
                               double beta, double temperature, double scale, std::string reduction, Tensor loss,
                               Tensor statistics, Tensor denominator) {
  for_dtype(student, [&](auto element) {
    using T = decltype(element);
    const int64_t tokens = count_tokens(student, teacher, token_weight), n = student.size(-1);
    const Options o(divergence, beta, temperature, scale, reduction);
    const Statistics s(statistics, tokens);
    const float* weight = token_weight.wanted<float>();
    parallel_for(tokens, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (weight && weight[i] == 0.0f) {
          for (int k = 0; k < 6; ++k) s.at(k, i) = 0.0f;
          continue;
        }
        measure(student.as<T>() + i * n, teacher.as<T>() + i * n, n, o, i, s);
      }
    });
    reduce(s, weight, o, student.ndim > 1 ? student.size(0) : 1, loss.as<float>(), denominator.as<float>());
  });
}
FASTLM_EXPORT(distillation_loss_forward);

// d_loss () or (...) float32; d_student, d_teacher like the logits, not computed if None.
void distillation_loss_backward(Tensor d_loss, Tensor student, Tensor teacher, Tensor token_weight,
                                Tensor statistics, Tensor denominator, std::string divergence, double beta,
                                double temperature, double scale, std::string reduction, Tensor d_student,
                                Tensor d_teacher) {
  for_dtype(student, [&](auto element) {
    using T = decltype(element);
    const int64_t tokens = count_tokens(student, teacher, token_weight), n = student.size(-1);
    if (tokens == 0) return;
    const Options o(divergence, beta, temperature, scale, reduction);
    const Statistics s(statistics, tokens);
    const float* weight = token_weight.wanted<float>();
    const Upstream up(d_loss, weight, denominator, tokens, o);
    T* outputs[2] = {d_student.wanted<T>(), d_teacher.wanted<T>()};
    require_parameter(d_student, "d_student", student.numel());
    require_parameter(d_teacher, "d_teacher", student.numel());
    parallel_for(tokens, (kGrain + n - 1) / n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (weight && weight[i] == 0.0f) {
          for (T* out : outputs)
            if (out) std::fill(out + i * n, out + (i + 1) * n, T{});
          continue;
        }
        differentiate(student.as<T>() + i * n, teacher.as<T>() + i * n, n, o, up(i), i, s,
                      outputs[0] ? outputs[0] + i * n : nullptr, outputs[1] ? outputs[1] + i * n : nullptr);
      }
    });
  });
}
FASTLM_EXPORT(distillation_loss_backward);

}  // namespace fastlm
