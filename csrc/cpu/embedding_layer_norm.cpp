// BERT's input: dropout(LayerNorm(the sum of up to three embeddings)), a row at a time in the first-level cache.
//
// Backward gathers the rows again, turns dy into dx row by row, and adds the rows of dx up as embedding does.
#include "embedding.h"
#include "norm.h"

namespace fastlm {
namespace {

using embedding::Tables;

// Keeps element n of the output and scales it where word n of the stream is at least the threshold.
class Mask {
 public:
  Mask(const Tensor& seed, double p, int64_t h) : h_(h), on_(seed.defined()) {
    if (!on_) return;
    require_size(seed, "seed", 1);
    require(p >= 0 && p <= 1, "dropout_p must be in 0 to 1, got ", p);
    key_ = PhiloxKey(*seed.as<int64_t>());
    nothing_ = drop_threshold(p) >> 32 != 0;
    least_ = static_cast<uint32_t>(drop_threshold(p));
    scale_ = static_cast<float>(1.0 / (1.0 - p));
  }

  bool drops_all() const { return nothing_; }
  int64_t buffer_size() const { return on_ ? h_ + 8 * W : 0; }

  // to = from under the mask of token t; n columns each.
  template <class From, class To> void apply(int64_t t, const From* from, To* to, uint32_t* buffer) const {
    if (!on_) return for_vectors(h_, [&](int64_t i, auto count) { store_n(to + i, load_n(from + i, count), count); });
    const uint64_t first = static_cast<uint64_t>(t) * static_cast<uint64_t>(h_);
    const int64_t skipped = static_cast<int64_t>(first % 4);
    for (int64_t i = 0; i < skipped + h_; i += 4 * W) {
      vu words[4];
      philox_lanes(key_, first / 4 + static_cast<uint64_t>(i) / 4, 0, 0, words);
      std::memcpy(buffer + i, words, sizeof words);
    }
    for_vectors(h_, [&](int64_t i, auto count) {
      vu word;
      std::memcpy(&word, buffer + skipped + i, sizeof word);
      store_n(to + i, select(word >= least_, load_n(from + i, count) * scale_, vf{}), count);
    });
  }

 private:
  int64_t h_;
  bool on_, nothing_ = false;
  PhiloxKey key_{0};
  uint32_t least_ = 0;
  float scale_ = 1.0f;
};

template <class T>
void forward(const Tables<T>& tables, const float* weight, const float* bias, const Mask& mask, float eps, T* y,
             float* mean, float* rstd) {
  const int64_t h = tables.h;
  tables.with_count([&](auto count) {
    parallel_for(tables.tokens, (kGrain + h - 1) / h, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      float* x = scratch.take<float>(h);
      uint32_t* words = scratch.take<uint32_t>(mask.buffer_size());
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
        if (mask.drops_all()) std::fill(y + t * h, y + (t + 1) * h, T{});
        else mask.apply(t, x, y + t * h, words);
      }
    });
  });
}

// dx (tokens, h), or null; d_weight, d_bias (h), added to, or null.
template <class T>
void backward(const T* dy, const Tables<T>& tables, const float* weight, const Mask& mask, const float* mean,
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
          uint32_t* words = own.take<uint32_t>(mask.buffer_size());
          float* dw = d_weight ? partial_weight + block * h : nullptr;
          float* db = d_bias ? partial_bias + block * h : nullptr;
          if (dw) std::fill(dw, dw + h, 0.0f);
          if (db) std::fill(db, db + h, 0.0f);
          for (int64_t t = begin; t < end; ++t) {
            tables.template add_rows<count>(t, x);
            mask.apply(t, dy + t * h, g, words);
            norm_backward_row<true, false, float>(
                g, nullptr, x, weight, mean[t], rstd[t], dw, db, h, dx != nullptr, [&](const auto& d) {
                  for_vectors(h, [&](int64_t i, auto n) { store_n(dx + t * h + i, d(i, n), n); });
                });
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
    forward(tables, floats(norm_weight, scratch), floats(norm_bias, scratch), Mask(seed, dropout_p, tables.h),
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
    const Mask mask(seed, dropout_p, h);
    if (dy.numel() == 0 || mask.drops_all()) return;
    Scratch scratch;
    const bool rows = dweight.defined() || dposition.defined() || dsegment.defined();
    T* dx = rows ? scratch.take<T>(tokens * h) : nullptr;
    backward(dy.as<T>(), tables, floats(norm_weight, scratch), mask, mean.as<float>(), rstd.as<float>(), dx,
             d_norm_weight.wanted<float>(), d_norm_bias.wanted<float>());
    add_gradient(dx, tables, 0, padding_idx.value_or(-1), dweight);
    add_gradient(dx, tables, 1, -1, dposition);
    add_gradient(dx, tables, 2, -1, dsegment);
  });
}
FASTLM_EXPORT(embedding_layer_norm_backward);

}  // namespace fastlm
