// Embedding: y[t] = weight[ids[t]] (+ position_weight[positions[t]]) (+ segment_weight[segments[t]]), and the sums
// that are its gradients.
#include "embedding.h"

namespace fastlm {

using embedding::Tables;

// ids (..., s) int64 or int32; weight (v, h) float32 or bfloat16; positions like ids, or None for 0, 1, 2, ...;
// segments like ids, or None for 0; position_weight (p, h) and segment_weight (g, h) of weight's dtype or None;
// y (..., s, h). All contiguous.
void embedding_forward(Tensor ids, Tensor weight, Tensor positions, Tensor position_weight, Tensor segments,
                       Tensor segment_weight, std::optional<int64_t> /*padding_idx*/, Tensor y) {
  for_dtype(weight, [&](auto element) {
    using T = decltype(element);
    const Tables<T> tables(ids, weight, positions, position_weight, segments, segment_weight);
    const int64_t h = tables.h;
    require_size(y, "y", tables.tokens * h);
    if (y.numel() == 0) return;
    tables.with_count([&](auto count) {
      parallel_for(tables.tokens, (kGrain + h - 1) / h, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) tables.template add_rows<count>(t, y.as<T>() + t * h);
      });
    });
  });
}
FASTLM_EXPORT(embedding_forward);

// dy (..., s, h) of weight's dtype; dweight (v, h), dposition (p, h), dsegment (g, h), float32 or of dy's dtype, added
// to; row padding_idx of dweight is left alone. None is not computed.
void embedding_backward(Tensor dy, Tensor ids, Tensor weight, Tensor positions, Tensor position_weight,
                        Tensor segments, Tensor segment_weight, std::optional<int64_t> padding_idx,
                        Tensor dweight, Tensor dposition, Tensor dsegment) {
  for_dtype(dy, [&](auto element) {
    using T = decltype(element);
    const Tables<T> tables(ids, weight, positions, position_weight, segments, segment_weight);
    require_size(dy, "dy", tables.tokens * tables.h);
    if (dy.numel() == 0) return;
    add_gradient(dy.as<T>(), tables, 0, padding_idx.value_or(-1), dweight);
    add_gradient(dy.as<T>(), tables, 1, -1, dposition);
    add_gradient(dy.as<T>(), tables, 2, -1, dsegment);
  });
}
FASTLM_EXPORT(embedding_backward);

}  // namespace fastlm
