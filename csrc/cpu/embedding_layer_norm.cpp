// BERT's input: dropout(LayerNorm(the sum of up to three embeddings)), a row at a time in the first-level cache.
//
// Backward gathers the rows again, turns dy into dx row by row, and adds the rows of dx up as embedding does.
#include "embedding.h"
#include "norm.h"

namespace fastlm {
namespace {

using embedding::Tables;

template <class T>
void forward(const Tables<T>& tables, const float* weight, const float* bias, const RowDropout& dropout, float eps,
             T* y, float* mean, float* rstd) {
  const int64_t h = tables.h;
  tables.with_count([&](auto count) {
    parallel_for(tables.tokens, (kGrain + h - 1) / h, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      float* x = scratch.take<float>(h);
      uint32_t* room = scratch.take<uint32_t>(RowDropout::room(h));
      for (int64_t t = begin; t < end; ++t) {
        tables.template add_rows<count>(t, x);
        const Stats s = statistics<true>(x, h, eps);
        mean[t] = s.coarse + s.fine;
        rstd[t] = s.rstd;
        for_vectors(h, [&](int64_t i, auto n) {
          vf v = ((load_n(x + i, n) - s.coarse) - s.fine) * s.rstd;
          if (weight) v *= load_n(weight + i, n);
          if (bias) v += load_n(bias + i, n);
          store_n(x + i, v, n);
        });
        dropout.apply(t, h, x, y + t * h, room);
      }
    });
  });
}

// dx (tokens, h), or null; d_weight, d_bias (h), added to, or null.
template <class T>
void backward(const T* dy, const Tables<T>& tables, const float* weight, const RowDropout& dropout, const float* mean,
              const float* rstd, T* dx, float* d_weight, float* d_bias) {
  const int64_t h = tables.h, grain = (kGrain + h - 1) / h;
  const int64_t blocks = block_count(tables.tokens, grain, kMaxPartials);
  Scratch scratch;
  float* partial_weight = d_weight ? scratch.take<float>(blocks * h) : nullptr;
  float* partial_bias = d_bias ? scratch.take<float>(blocks * h) : nullptr;
  tables.with_count([&](auto count) {
    parallel_for(
        tables.tokens, grain,
        [&](int64_t begin, int64_t end, int64_t block) {
          Scratch own;
          float* x = own.take<float>(h);
          float* g = own.take<float>(h);
          uint32_t* room = own.take<uint32_t>(RowDropout::room(h));
          float* dw = d_weight ? partial_weight + block * h : nullptr;
          float* db = d_bias ? partial_bias + block * h : nullptr;
          if (dw) std::fill(dw, dw + h, 0.0f);
          if (db) std::fill(db, db + h, 0.0f);
          for (int64_t t = begin; t < end; ++t) {
            tables.template add_rows<count>(t, x);
            dropout.apply(t, h, dy + t * h, g, room);
            const auto averages = norm_backward_averages<true, false, 1>(g, x, weight, mean + t, rstd + t, dw, db, h);
            if (!dx) continue;
            const auto d = norm_backward_row<true, float>(g, nullptr, x, weight, mean[t], rstd[t], averages.data());
            for_vectors(h, [&](int64_t i, auto n) { store_n(dx + t * h + i, d(i, n), n); });
          }
        },
        kMaxPartials);
  });
  if (d_weight) add_partials(partial_weight, blocks, h, d_weight);
  if (d_bias) add_partials(partial_bias, blocks, h, d_bias);
}

}  // namespace

// Tables as embedding's; norm_weight, norm_bias (h) of weight's dtype or float32, or None; seed one int64, or None
// for no dropout; y (..., s, h) like weight; mean, rstd (..., s) float32.
void embedding_layer_norm_forward(Tensor ids, Tensor weight, Tensor positions, Tensor position_weight,
                                  Tensor segments, Tensor segment_weight, Tensor norm_weight, Tensor norm_bias,
                                  Tensor seed, std::optional<int64_t> /*padding_idx*/, double eps,
                                  double dropout_p, Tensor y, Tensor mean, Tensor rstd) {
  for_dtype(weight, [&](auto element) {
    using T = decltype(element);
    const Tables<T> tables(ids, weight, positions, position_weight, segments, segment_weight);
    require_parameter(norm_weight, "norm_weight", tables.h);
    require_parameter(norm_bias, "norm_bias", tables.h);
    require_size(y, "y", tables.tokens * tables.h);
    require_size(mean, "mean", tables.tokens);
    require_size(rstd, "rstd", tables.tokens);
    if (y.numel() == 0) return;
    Scratch scratch;
    forward(tables, floats(norm_weight, scratch), floats(norm_bias, scratch), RowDropout(seed, dropout_p),
            static_cast<float>(eps), y.as<T>(), mean.as<float>(), rstd.as<float>());
  });
}
FASTLM_EXPORT(embedding_layer_norm_forward);

// dy (..., s, h) like weight; the gradients added to, the tables' float32 or like weight, the others float32; row
// padding_idx of dweight is left alone. None is not
// computed.
void embedding_layer_norm_backward(Tensor dy, Tensor ids, Tensor weight, Tensor positions, Tensor position_weight,
                                   Tensor segments, Tensor segment_weight, Tensor norm_weight, Tensor seed,
                                   Tensor mean, Tensor rstd, std::optional<int64_t> padding_idx, double /*eps*/,
                                   double dropout_p, Tensor dweight, Tensor dposition, Tensor dsegment,
                                   Tensor d_norm_weight, Tensor d_norm_bias) {
  for_dtype(weight, [&](auto element) {
    using T = decltype(element);
    const Tables<T> tables(ids, weight, positions, position_weight, segments, segment_weight);
    const int64_t tokens = tables.tokens, h = tables.h;
    require_parameter(norm_weight, "norm_weight", h);
    require_size(dy, "dy", tokens * h);
    require_size(mean, "mean", tokens);
    require_size(rstd, "rstd", tokens);
    if (dy.numel() == 0) return;
    Scratch scratch;
    const bool rows = dweight.defined() || dposition.defined() || dsegment.defined();
    T* dx = rows ? scratch.take<T>(tokens * h) : nullptr;
    backward(dy.as<T>(), tables, floats(norm_weight, scratch), RowDropout(seed, dropout_p), mean.as<float>(),
             rstd.as<float>(), dx, d_norm_weight.wanted<float>(), d_norm_bias.wanted<float>());
    add_gradient(dx, tables, 0, padding_idx.value_or(-1), dweight);
    add_gradient(dx, tables, 1, -1, dposition);
    add_gradient(dx, tables, 2, -1, dsegment);
  });
}
FASTLM_EXPORT(embedding_layer_norm_backward);

}  // namespace fastlm
