// The distillation loss of two linear layers' outputs without ever holding all logits of either; formulas in
// distillation.h.
//
// Tokens are taken in chunks, whose logits of student and teacher are made in float32, classes by classes:
//   forward   each token's statistics
//   backward  the logits again; the student's gradient in their place (or rounded to hidden's dtype beside them);
//             d_hidden = dlogits W, dW += dlogits^T hidden, dbias += the column sums of dlogits
// Sums run over classes and over tokens in ascending order whatever the number of threads.
#include "distillation.h"
#include "gemm.h"
#include "rows.h"

namespace fastlm {
namespace {

using distillation::Options;
using distillation::Statistics;
using distillation::Upstream;

constexpr int64_t kTokens = 256;   // in a chunk: adding dW in float32 is then small against its product
constexpr int64_t kColumns = 768;  // classes of which W is packed at a time

template <class T> struct Layer {
  const T* hidden;
  const T* weight;
  const float* bias;
  int64_t width, classes;

  Layer(const Tensor& hidden, const Tensor& weight, const Tensor& bias, int64_t tokens, Scratch& scratch)
      : hidden(hidden.as<T>()), weight(weight.as<T>()), bias(floats(bias, scratch)) {
    require(weight.ndim == 2 && hidden.ndim > 0 && hidden.size(-1) == weight.size(1),
            "hidden must be (..., H) and weight (V, H)");
    width = weight.size(1);
    classes = weight.size(0);
    require(hidden.numel() == tokens * width, "hidden must have ", tokens * width, " elements, got ", hidden.numel());
    require_parameter(bias, "bias", classes);
  }

  // Blocks of classes: fn(first, columns).
  template <class Fn> void for_blocks(Fn&& fn) const {
    for (int64_t first = 0; first < classes; first += kColumns) fn(first, std::min(kColumns, classes - first));
  }

  // The logits (n, classes) of n tokens from `begin` on.
  void logits(int64_t begin, int64_t n, float* out) const {
    if (bias)
      parallel_for(n, std::max<int64_t>(1, kGrain / classes), [&](int64_t top, int64_t end) {
        for (int64_t i = top; i < end; ++i) std::copy(bias, bias + classes, out + i * classes);
      });
    for_blocks([&](int64_t first, int64_t columns) {
      gemm::multiply_parallel<gemm::Element<T>>(hidden + begin * width, width, 1, weight + first * width, 1, width, n,
                                                columns, width, out + first, classes, bias != nullptr);
    });
  }
};

template <class T> struct Problem {
  Layer<T> student, teacher;
  const float* token_weight;
  int64_t tokens, chunk;

  Problem(const Tensor& student_hidden, const Tensor& student_weight, const Tensor& teacher_hidden,
          const Tensor& teacher_weight, const Tensor& student_bias, const Tensor& teacher_bias,
          const Tensor& token_weight, const Tensor& statistics, int64_t workspace, Scratch& scratch)
      : student(student_hidden, student_weight, student_bias, statistics.numel() / 6, scratch),
        teacher(teacher_hidden, teacher_weight, teacher_bias, statistics.numel() / 6, scratch),
        token_weight(token_weight.wanted<float>()),
        tokens(statistics.numel() / 6) {
    require(student.classes == teacher.classes, "student_weight and teacher_weight must have as many rows");
    require_parameter(token_weight, "token_weight", tokens);
    const int64_t row = student.classes * (2 * sizeof(float) + (sizeof(T) < sizeof(float) ? sizeof(T) : 0));
    chunk = std::max<int64_t>(1, std::min(workspace > 0 ? workspace / row : kTokens, tokens));
  }

  bool masked(int64_t i) const { return token_weight && token_weight[i] == 0.0f; }

  // fn(begin, n, student's logits, teacher's) for each chunk.
  template <class Fn> void for_chunks(Fn&& fn) const {
    Scratch scratch;
    float* u = scratch.take<float>(chunk * student.classes);
    float* v = scratch.take<float>(chunk * student.classes);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t n = std::min(chunk, tokens - begin);
      student.logits(begin, n, u);
      teacher.logits(begin, n, v);
      fn(begin, n, u, v);
    }
  }
};

template <class T> void forward(const Problem<T>& p, const Options& o, const Statistics& s) {
  const int64_t classes = p.student.classes;
  p.for_chunks([&](int64_t begin, int64_t n, const float* u, const float* v) {
    parallel_for(n, std::max<int64_t>(1, kGrain / classes), [&](int64_t top, int64_t end) {
      for (int64_t i = top; i < end; ++i) {
        if (!p.masked(begin + i)) measure(u + i * classes, v + i * classes, classes, o, begin + i, s);
        else
          for (int k = 0; k < 6; ++k) s.at(k, begin + i) = 0.0f;
      }
    });
  });
}

template <class T>
void backward(const Problem<T>& p, const Options& o, const Statistics& s, const Upstream& up, T* d_hidden,
              float* d_weight, float* d_bias) {
  using E = gemm::Element<T>;
  const Layer<T>& layer = p.student;
  const int64_t classes = layer.classes, width = layer.width;
  Scratch scratch;
  E* narrow = std::is_same_v<E, float> ? nullptr : scratch.take<E>(p.chunk * classes);
  float* sums = d_hidden ? scratch.take<float>(p.chunk * width) : nullptr;
  p.for_chunks([&](int64_t begin, int64_t n, float* u, const float* v) {
    E* d;
    if constexpr (std::is_same_v<E, float>) d = u;
    else d = narrow;
    parallel_for(n, std::max<int64_t>(1, kGrain / classes), [&](int64_t top, int64_t end) {
      for (int64_t i = top; i < end; ++i) {
        E* row = d + i * classes;
        if (p.masked(begin + i)) std::fill(row, row + classes, E{});
        else
          distillation::differentiate<float, E>(u + i * classes, v + i * classes, classes, o, up(begin + i), begin + i, s, row,
                                  nullptr);
      }
    });
    const T* x = layer.hidden + begin * width;
    layer.for_blocks([&](int64_t first, int64_t columns) {
      const T* w = layer.weight + first * width;
      if (sums)
        gemm::multiply_parallel<E>(d + first, classes, 1, w, width, 1, n, width, columns, sums, width, first > 0);
      if (d_weight)
        gemm::multiply_parallel<E>(d + first, 1, classes, x, width, 1, columns, width, n, d_weight + first * width,
                                   width, true);
    });
    if (d_bias)
      parallel_for(classes, 256, [&](int64_t left, int64_t right) {
        for_vectors(right - left, [&](int64_t j, auto count) {
          vf total = {};
          for (int64_t i = 0; i < n; ++i) total += load_n(d + i * classes + left + j, count);
          store_n(d_bias + left + j, load_n(d_bias + left + j, count) + total, count);
        });
      });
    if (sums)
      for_vectors(n * width, [&](int64_t j, auto count) {
        store_n(d_hidden + begin * width + j, load_n(sums + j, count), count);
      });
  });
}

}  // namespace

// hidden (..., H) and weight (V, H) of student and teacher, of one dtype, float32 or bfloat16, contiguous, each with its
// own H; biases (V) of that dtype or float32, or None; token_weight (...) float32 or None; workspace_bytes 0: chosen
// here. loss () or, for reduction "none", (...); statistics (6, ...); denominator (1): all float32.
void linear_distillation_loss_forward(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden,
                                      Tensor teacher_weight, Tensor student_bias, Tensor teacher_bias,
                                      Tensor token_weight, std::string divergence, double beta, double temperature,
                                      double scale, std::string reduction, int64_t workspace_bytes, Tensor loss,
                                      Tensor statistics, Tensor denominator) {
  for_dtype(student_hidden, [&](auto element) {
    using T = decltype(element);
    Scratch scratch;
    const Options o(divergence, beta, temperature, scale, reduction);
    const Problem<T> p(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                       token_weight, statistics, workspace_bytes, scratch);
    const Statistics s(statistics, p.tokens);
    forward(p, o, s);
    const int64_t batch = student_hidden.ndim > 1 ? student_hidden.size(0) : 1;
    reduce(s, p.token_weight, o, batch, loss.as<float>(), denominator.as<float>());
  });
}
FASTLM_EXPORT(linear_distillation_loss_forward);

// d_loss () or (...) float32; d_hidden like student_hidden, overwritten; d_weight (V, H) and d_bias (V) float32, added
// to. None is not computed.
void linear_distillation_loss_backward(Tensor d_loss, Tensor student_hidden, Tensor student_weight,
                                       Tensor teacher_hidden, Tensor teacher_weight, Tensor student_bias,
                                       Tensor teacher_bias, Tensor token_weight, Tensor statistics,
                                       Tensor denominator, std::string divergence, double beta, double temperature,
                                       double scale, std::string reduction, int64_t workspace_bytes,
                                       Tensor d_hidden, Tensor d_weight, Tensor d_bias) {
  for_dtype(student_hidden, [&](auto element) {
    using T = decltype(element);
    Scratch scratch;
    const Options o(divergence, beta, temperature, scale, reduction);
    const Problem<T> p(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                       token_weight, statistics, workspace_bytes, scratch);
    require_parameter(d_hidden, "d_hidden", student_hidden.numel());
    require_parameter(d_weight, "d_weight", student_weight.numel());
    require_parameter(d_bias, "d_bias", p.student.classes);
    backward(p, o, Statistics(statistics, p.tokens), Upstream(d_loss, p.token_weight, denominator, p.tokens, o),
             d_hidden.wanted<T>(), d_weight.wanted<float>(), d_bias.wanted<float>());
  });
}
FASTLM_EXPORT(linear_distillation_loss_backward);

}  // namespace fastlm
