// Cross-entropy of a linear layer's output without ever holding all its logits; formulas in cross_entropy.h.
//
// Tokens that count are taken in chunks, and for each chunk the classes in blocks, so that only a block's
// logits exist at a time:
//   forward   x = hidden W^T for a band of tokens at a time; each token's running maximum and sums go on
//   backward  x again; dlogits, since lse is known; dhidden += dlogits W;
//             then for the whole chunk dW += dlogits^T hidden and dbias += the column sums of dlogits
//   together  both at once, for an upstream gradient known in advance: exp(x - ref), ref the largest x so far, of a
//             chunk is kept between the two, in what products are formed in: three products for four, one exponential
//             for two, and dlogits take the place of what was kept. A chunk is then as small as the workspace, and
//             where it would be too small for the products to pay, or with softcap, whose gradient needs x itself,
//             forward and backward run one after the other. Where dW is to be overwritten and has room for what is
//             kept of all tokens, it lies at dW's end and gives way to dW block by block: one chunk, no workspace.
// A block of W is packed once for the chunk and shared by the threads. Sums run over classes, and over the
// tokens of a chunk, in ascending order whatever the number of threads. Ignored tokens cost nothing.
#include "cross_entropy.h"
#include "gemm.h"

namespace fastlm {
namespace {

using cross_entropy::Extras;
using cross_entropy::Goal;
using cross_entropy::Gradient;
using cross_entropy::Options;
using cross_entropy::Statistics;
using cross_entropy::Targets;
using cross_entropy::Token;
using cross_entropy::Upstream;
using gemm::Packed;

constexpr int64_t kTokens = 2048;  // in a chunk: adding dW in float32 is then small against its product
constexpr int64_t kColumns = 768;  // in a block: whole blocks of gemm's k, and packed W stays in the cache
static_assert(kColumns <= cross_entropy::kStretch);
constexpr int64_t kTogether = 60 << 20;  // bytes of workspace of `together` unless one is asked for
constexpr int64_t kOfToken = 30 << 10;   // or so many a token: of many tokens other activations take ten times as much
constexpr int64_t kFewest = 128;         // tokens in a chunk of it: fewer, and adding dW costs what the product saves

template <class T> struct Problem {
  const T* hidden;
  const T* weight;
  const float* bias;
  const Targets& target;
  int64_t tokens, width;
  const Options& o;
  int64_t workspace;
};

// How many tokens and how many classes are taken at a time, and whether what is kept of them lies in dW.
struct Sizes {
  int64_t chunk = kTokens, columns = kColumns;
  bool in_dweight = false;
};

// A function of the shape, the workspace and of what dW is, since chunks decide the order of dW's sums. keep: what forward
// keeps of a chunk is there, too; spare: dW holds nothing yet.
template <class T>
Sizes sizes(int64_t count, int64_t width, int64_t classes, int64_t workspace, bool keep, bool spare) {
  using E = gemm::Element<T>;
  Sizes s;
  if (workspace == 0 && keep) workspace = std::max(kTogether, count * kOfToken);
  if (workspace > 0) {
    // W's block packed twice; for a token: dlogits or what is kept, dhidden's sums, hidden gathered and packed
    const int64_t per_column = 2 * width * sizeof(E);
    s.columns = workspace / 2 / per_column / gemm::kPanel * gemm::kPanel;
    s.columns = std::min(std::max<int64_t>(s.columns, gemm::kPanel), kColumns);
    const int64_t room = workspace - s.columns * per_column, small = width * (sizeof(float) + sizeof(T) + sizeof(E));
    const int64_t wide = (keep ? classes : s.columns) * sizeof(E), none = s.columns * sizeof(E);
    s.in_dweight = keep && spare && count * sizeof(E) <= width * sizeof(float) && count * (small + none) <= room;
    s.chunk = std::max<int64_t>(room / (small + (s.in_dweight ? none : wide)), gemm::kTileRows);
  }
  s.columns = std::min(s.columns, classes);
  if (keep && s.chunk < count) {  // chunks of equal size: the last would else be too small
    const int64_t chunks = (count + s.chunk - 1) / s.chunk;
    s.chunk = (count + chunks - 1) / chunks;
  }
  s.chunk = std::min(s.chunk, count);
  return s;
}

// The tokens that count, and the sizes for so many.
template <class T> struct Schedule : Sizes {
  int64_t *index, count = 0;

  Schedule(const Problem<T>& p, Scratch& scratch, bool keep = false, bool spare = false) : index(scratch.take<int64_t>(p.tokens)) {
    for (int64_t i = 0; i < p.tokens; ++i)
      if (!p.target.ignored(i)) index[count++] = i;
    static_cast<Sizes&>(*this) = sizes<T>(count, p.width, p.o.classes, p.workspace, keep, spare);
  }

  // fn(begin, n, x): a chunk of n tokens, index[begin] and on, whose rows of hidden lie together at x.
  template <class Fn> void for_chunks(const Problem<T>& p, Fn&& fn) const {
    Scratch scratch;
    T* gathered = count == p.tokens ? nullptr : scratch.take<T>(chunk * p.width);
    for (int64_t begin = 0; begin < count; begin += chunk) {
      const int64_t n = std::min(chunk, count - begin);
      for (int64_t i = 0; gathered && i < n; ++i) {
        const T* row = p.hidden + index[begin + i] * p.width;
        std::copy(row, row + p.width, gathered + i * p.width);
      }
      fn(begin, n, gathered ? gathered : p.hidden + begin * p.width);
    }
  }
};

// [0, n) in parallel, fn(begin, end) for at most gemm::kBandTiles tiles at a time; the cut does not change any result, so it
// may follow the number of threads.
template <class Fn> void for_bands(int64_t n, Fn&& fn) {
  const gemm::Shares bands(n, gemm::kTileRows, gemm::kBandTiles, thread_count());
  parallel_for(bands.count, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) fn(bands.begin(begin), bands.begin(begin + 1));
  });
}

// out (m, w.n) = x (m, width) W^T + bias for a block of classes.
template <class E, class T>
void multiply_logits(const T* x, int64_t m, const Packed<E>& w, const float* bias, float* out) {
  for (int64_t i = 0; bias && i < m; ++i) std::copy(bias, bias + w.n, out + i * w.n);
  Scratch scratch;
  const bool aliasing = w.k * sizeof(T) % 4096 == 0;  // rows would share the same few sets of the cache
  gemm::multiply(gemm::left<E>(x, w.k, 1, m, w.k, scratch, aliasing), w, m, out, w.n, bias != nullptr);
}

// Of a chunk's logits between forward and backward: for each block of classes e = exp(x - ref), (tokens, columns), whose
// place dlogits take; ref of each block and token; x of each token's target.
template <class E> struct Kept {
  E* e;
  float *refs, *hits;
  int64_t chunk, columns;

  Kept(const Sizes& s, int64_t classes, int64_t width, float* dweight, Scratch& scratch)
      : e(s.in_dweight ? reinterpret_cast<E*>(dweight + classes * width) - s.chunk * classes
                       : scratch.take<E>(s.chunk * classes)),
        refs(scratch.take<float>((classes + s.columns - 1) / s.columns * s.chunk)),
        hits(scratch.take<float>(s.chunk)),
        chunk(s.chunk),
        columns(s.columns) {}

  // Of the block that begins with class `first`, of n tokens.
  E* block(int64_t first, int64_t n) const { return e + first * n; }
  float& ref(int64_t first, int64_t token) const { return refs[first / columns * chunk + token]; }
};

// The forward of one chunk at a time.
template <class T> class Forward {
 public:
  using E = gemm::Element<T>;

  Forward(const Problem<T>& p, const Schedule<T>& schedule, const Statistics& out)
      : p_(p), schedule_(schedule), out_(out) {
    tokens_ = scratch_.take<Token>(schedule.chunk);
    packed_ = scratch_.take<uint32_t>(gemm::packed_words<E>(p.width, schedule.columns));
    if (schedule.count < p.tokens)
      for (int64_t i = 0; i < p.tokens; ++i) out.clear(i);
  }

  void chunk(int64_t begin, int64_t n, const T* x, const Kept<E>* kept) {
    const Options& o = p_.o;
    const int64_t* index = schedule_.index + begin;
    for (int64_t i = 0; i < n; ++i) tokens_[i] = Token(p_.target[index[i]]);
    for (int64_t first = 0; first < o.classes; first += schedule_.columns) {
      const int64_t columns = std::min(schedule_.columns, o.classes - first);
      const Packed<E> w =
          gemm::pack_parallel<E>(p_.weight + first * p_.width, 1, p_.width, p_.width, columns, packed_);
      for_bands(n, [&](int64_t top, int64_t end) {
        Scratch own;
        float* tile = own.take<float>((end - top) * columns);
        float* buffer = o.buffer(own);
        multiply_logits(x + top * p_.width, end - top, w, p_.bias ? p_.bias + first : nullptr, tile);
        for (int64_t i = top; i < end; ++i) {
          const float* row = tile + (i - top) * columns;
          if (kept) {
            E* e = kept->block(first, n) + i * columns;
            kept->ref(first, i) = tokens_[i].add(row, first, columns, o, buffer, [&](int64_t j, auto count, vf v) {
              gemm::store_element(e + j, v, count);
            });
          } else {
            tokens_[i].add(row, first, columns, o, buffer);
          }
        }
      });
    }
    for (int64_t i = 0; i < n; ++i) {
      tokens_[i].finish(o, index[i], out_);
      if (kept) kept->hits[i] = tokens_[i].hit();
    }
  }

 private:
  const Problem<T>& p_;
  const Schedule<T>& schedule_;
  const Statistics& out_;
  Scratch scratch_;
  Token* tokens_;
  uint32_t* packed_;
};

template <class T> void forward(const Problem<T>& p, const Statistics& out) {
  Scratch scratch;
  const Schedule<T> schedule(p, scratch);
  Forward<T> forward(p, schedule, out);
  schedule.for_chunks(p, [&](int64_t begin, int64_t n, const T* x) { forward.chunk(begin, n, x, nullptr); });
}

// dbias[j] += the sum over n rows of x[., j], for `columns` columns of rows that lie `stride` apart.
template <class E>
void add_column_sums(const E* x, int64_t n, int64_t columns, int64_t stride, float* dbias) {
  for_vectors(columns, [&](int64_t j, auto count) {
    vf total = {};
    for (int64_t i = 0; i < n; ++i) total += load_n(x + i * stride + j, count);
    store_n(dbias + j, load_n(dbias + j, count) + total, count);
  });
}

// The backward of one chunk at a time.
template <class T> class Backward {
 public:
  using E = gemm::Element<T>;

  Backward(const Problem<T>& p, const Schedule<T>& schedule, const Statistics& s, const Upstream& up, T* dhidden,
           float* dweight, float* dbias, bool replace = false, bool keep = false)
      : p_(p), schedule_(schedule), s_(s), up_(up), dhidden_(dhidden), dweight_(dweight), dbias_(dbias), replace_(replace) {
    const int64_t chunk = schedule.chunk, block = schedule.columns, width = p.width;
    if (!keep) packed_ = scratch_.take<uint32_t>(gemm::packed_words<E>(width, block));
    if (dhidden) packed_rows_ = scratch_.take<uint32_t>(gemm::packed_words<E>(block, width));
    if (dweight) packed_hidden_ = scratch_.take<uint32_t>(gemm::packed_words<E>(chunk, width));
    if (dhidden) sums_ = scratch_.take<float>(chunk * width);
    if (!keep || schedule.in_dweight) dlogits_ = scratch_.take<E>(chunk * block);
    if (dhidden && schedule.count < p.tokens) std::fill(dhidden, dhidden + p.tokens * width, T{});
    if (replace && dbias) std::fill(dbias, dbias + p.o.classes, 0.0f);
    if (replace && dweight && schedule.count == 0) std::fill(dweight, dweight + p.o.classes * width, 0.0f);
  }

  // kept: by forward, or null for the logits to be computed again.
  void chunk(int64_t begin, int64_t n, const T* x, const Kept<E>* kept) {
    const Options& o = p_.o;
    const int64_t width = p_.width, block = schedule_.columns;
    const int64_t* index = schedule_.index + begin;
    Packed<E> h{};
    if (dweight_) h = gemm::pack_parallel<E>(x, width, 1, n, width, packed_hidden_);
    for (int64_t first = 0; first < o.classes; first += block) {
      const int64_t columns = std::min(block, o.classes - first);
      const T* rows = p_.weight + first * width;
      const Packed<E> w{packed_, width, columns}, v{packed_rows_, columns, width};
      const int64_t panels = kept ? 0 : gemm::panel_count<E>(width, columns);
      const int64_t more = dhidden_ ? gemm::panel_count<E>(columns, width) : 0;
      parallel_for(panels + more, 2, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          if (t < panels) gemm::pack_one<E>(rows, 1, width, width, columns, packed_, t);
          else gemm::pack_one<E>(rows, width, 1, columns, width, packed_rows_, t - panels);
        }
      });
      const E* e = kept ? kept->block(first, n) : nullptr;
      E* dlogits = e && !reaches(first + columns, e) ? kept->block(first, n) : dlogits_;
      for_bands(n, [&](int64_t top, int64_t end) {
        Scratch own;
        const int64_t m = end - top;
        E* dx = dlogits + top * columns;
        const auto gradient = [&](int64_t i) {
          const int64_t token = index[top + i];
          return Gradient(token, p_.target[token], s_, up_, o);
        };
        if (kept) {
          if (dlogits == dlogits_) std::copy(e + top * columns, e + end * columns, dx);
          for (int64_t i = 0; i < m; ++i)
            gradient(i).kept_columns(dx + i * columns, kept->ref(first, top + i), kept->hits[top + i], first, columns, o);
        } else {
          float *tile, *buffer = o.buffer(own);
          if constexpr (std::is_same_v<E, float>) tile = dx;
          else tile = own.take<float>(m * columns);
          multiply_logits(x + top * width, m, w, p_.bias ? p_.bias + first : nullptr, tile);
          for (int64_t i = 0; i < m; ++i)
            gradient(i).columns(tile + i * columns, first, columns, o, buffer, dx + i * columns);
        }
        if (dhidden_)
          gemm::multiply(gemm::left<E>(dx, columns, 1, m, columns, own), v, m, sums_ + top * width, width,
                         first > 0);
      });
      if (!dweight_ && !dbias_) continue;
      for_bands(columns, [&](int64_t top, int64_t end) {
        Scratch own;
        if (dweight_)
          gemm::multiply(gemm::left<E>(dlogits + top, 1, columns, end - top, n, own, true), h, end - top,
                         dweight_ + (first + top) * width, width, !replace_ || begin > 0);
        if (dbias_) add_column_sums(dlogits + top, n, end - top, columns, dbias_ + first + top);
      });
    }
    if (dhidden_)
      for_bands(n, [&](int64_t top, int64_t end) {
        for (int64_t i = top; i < end; ++i) {
          T* row = dhidden_ + index[i] * width;
          for_vectors(width, [&](int64_t j, auto count) {
            store_n(row + j, load_n(sums_ + i * width + j, count), count);
          });
        }
      });
  }

 private:
  // Whether dW up to a class is written over what is kept at e.
  bool reaches(int64_t end, const E* e) const {
    return schedule_.in_dweight && reinterpret_cast<const E*>(dweight_ + end * p_.width) > e;
  }

  const Problem<T>& p_;
  const Schedule<T>& schedule_;
  const Statistics& s_;
  const Upstream& up_;
  T* dhidden_;
  float *dweight_, *dbias_;
  bool replace_;  // what dweight and dbias held
  Scratch scratch_;
  uint32_t *packed_ = nullptr, *packed_rows_ = nullptr, *packed_hidden_ = nullptr;
  float* sums_ = nullptr;
  E* dlogits_ = nullptr;
};

template <class T>
void backward(const Problem<T>& p, const Statistics& s, const Upstream& up, T* dhidden, float* dweight,
              float* dbias, bool replace = false) {
  Scratch scratch;
  const Schedule<T> schedule(p, scratch);
  Backward<T> backward(p, schedule, s, up, dhidden, dweight, dbias, replace);
  schedule.for_chunks(p, [&](int64_t begin, int64_t n, const T* x) { backward.chunk(begin, n, x, nullptr); });
}

// Whether `together` keeps a chunk's exponentials; else forward and backward run one after the other.
inline bool keeps(const Sizes& s, int64_t count, bool capped) { return !capped && s.chunk >= std::min(count, kFewest); }

template <class T>
void together(const Problem<T>& p, const Statistics& s, const Upstream& up, T* dhidden, float* dweight,
              float* dbias, bool replace) {
  Scratch scratch;
  const Schedule<T> schedule(p, scratch, true, replace && dweight);
  if (!keeps(schedule, schedule.count, p.o.softcap != 0.0f)) {
    forward(p, s);
    return backward(p, s, up, dhidden, dweight, dbias, replace);
  }
  const Kept<gemm::Element<T>> kept(schedule, p.o.classes, p.width, dweight, scratch);
  Forward<T> forward(p, schedule, s);
  Backward<T> backward(p, schedule, s, up, dhidden, dweight, dbias, replace, true);
  schedule.for_chunks(p, [&](int64_t begin, int64_t n, const T* x) {
    forward.chunk(begin, n, x, &kept);
    backward.chunk(begin, n, x, &kept);
  });
}

// Bytes that Schedule, Forward and Backward take of a call in which every token counts. capped: with softcap.
template <class T>
int64_t workspace_of(int64_t tokens, int64_t width, int64_t classes, int64_t workspace, bool capped, bool forward,
                     bool backward, bool spare) {
  using E = gemm::Element<T>;
  const bool keep = forward && backward;
  const Sizes s = sizes<T>(tokens, width, classes, workspace, keep, spare);
  if (keep && !keeps(s, tokens, capped))
    return workspace_of<T>(tokens, width, classes, workspace, capped, false, true, false);
  const auto bytes_of = [](int64_t elements, auto element) { return elements * static_cast<int64_t>(sizeof element); };
  const auto packed = [&](int64_t k, int64_t n) { return bytes_of(gemm::packed_words<E>(k, n), uint32_t{}); };
  int64_t bytes = bytes_of(tokens, int64_t{});
  if (keep) {
    const int64_t blocks = (classes + s.columns - 1) / s.columns;
    bytes += bytes_of(s.in_dweight ? 0 : s.chunk * classes, E{}) + bytes_of(s.chunk * (blocks + 1), float{});
  }
  if (forward) bytes += bytes_of(s.chunk, Token(Goal{})) + packed(width, s.columns);
  if (backward) {
    bytes += packed(s.columns, width) + packed(s.chunk, width) + bytes_of(s.chunk * width, float{});
    if (!keep) bytes += packed(width, s.columns);
    if (!keep || s.in_dweight) bytes += bytes_of(s.chunk * s.columns, E{});
  }
  return bytes;
}

int64_t workspace_of(const Tensor& hidden, const Tensor& weight, int64_t workspace, bool capped, bool forward,
                     bool backward, bool spare = false) {
  const int64_t width = weight.size(1), tokens = hidden.numel() / width, classes = weight.size(0);
  return hidden.is<bf16>() ? workspace_of<bf16>(tokens, width, classes, workspace, capped, forward, backward, spare)
                           : workspace_of<float>(tokens, width, classes, workspace, capped, forward, backward, spare);
}

// Runs fn with the problem of the element type of hidden.
template <class Fn>
void for_problem(const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& bias,
                 const Options& o, int64_t workspace_bytes, Scratch& scratch, Fn&& fn) {
  require(hidden.ndim > 0 && weight.ndim == 2 && weight.size(1) == hidden.size(-1),
          "hidden must be (..., H) and weight (V, H)");
  const int64_t width = weight.size(1), tokens = hidden.numel() / width;
  const Targets targets(target, tokens, o);
  require(!bias.defined() || bias.numel() == o.classes, "bias must have ", o.classes, " elements, got ",
          bias.numel());
  const float* offsets = floats(bias, scratch);
  const auto run = [&](auto element) {
    using T = decltype(element);
    fn(Problem<T>{hidden.as<T>(), weight.as<T>(), offsets, targets, tokens, width, o,
                  workspace_bytes});
  };
  if (hidden.is<float>()) return run(float{});
  require(hidden.is<bf16>(), "hidden must be float32 or bfloat16, got ",
          hidden.defined() ? name(hidden.dtype) : "None");
  run(bf16{});
}

template <class T>
void require_gradients(const Problem<T>& p, const Tensor& dhidden, const Tensor& dweight, const Tensor& dbias) {
  const auto check = [](const Tensor& t, const char* name, int64_t size) {
    require(!t.defined() || t.numel() == size, name, " must have ", size, " elements");
  };
  check(dhidden, "dhidden", p.tokens * p.width);
  check(dweight, "dweight", p.o.classes * p.width);
  check(dbias, "dbias", p.o.classes);
}

}  // namespace

// hidden (..., H) and weight (V, H) of one dtype, float32 or bfloat16, contiguous; target (...) int64, or
// probabilities (..., V); those, bias and class_weight (V) and token_weight (...) of that dtype or float32, the last
// three or None; workspace_bytes 0: chosen here. The results are as in cross_entropy.cpp.
void linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor target, Tensor bias, Tensor class_weight,
                                  Tensor token_weight, int64_t ignore_index, double label_smoothing,
                                  double z_loss, std::optional<double> softcap, double logit_scale,
                                  std::string reduction, bool extras, int64_t workspace_bytes, Tensor loss,
                                  Tensor z, Tensor lse, Tensor correct, Tensor confidence, Tensor entropy,
                                  Tensor statistics, Tensor denominators) {
  Scratch scratch;
  const Options o(weight.size(0), class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                  reduction, extras, scratch);
  for_problem(hidden, weight, target, bias, o, workspace_bytes, scratch, [&](const auto& p) {
    p.target.check();
    const Extras more(z, lse, correct, confidence, entropy);
    Statistics s(statistics, p.target);
    more.enter(s);
    forward(p, s);
    cross_entropy::reduce(s, p.target, cross_entropy::token_weights(token_weight, p.tokens, scratch), o,
                          loss.as<float>(), more.z, denominators.as<float>());
  });
}
FASTLM_EXPORT(linear_cross_entropy_forward);

// d_loss and d_z () or (...), d_lse (...), float32, each None or of no elements for 0; dhidden like hidden,
// overwritten; dweight (V, H) and dbias (V) float32, added to. A gradient that is None is not computed.
void linear_cross_entropy_backward(Tensor d_loss, Tensor d_z, Tensor d_lse, Tensor hidden, Tensor weight,
                                   Tensor target, Tensor bias, Tensor class_weight, Tensor token_weight,
                                   Tensor statistics, Tensor denominators, int64_t ignore_index,
                                   double label_smoothing, double z_loss, std::optional<double> softcap,
                                   double logit_scale, std::string reduction, bool extras,
                                   int64_t workspace_bytes, Tensor dhidden, Tensor dweight, Tensor dbias) {
  Scratch scratch;
  const Options o(weight.size(0), class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                  reduction, extras, scratch);
  for_problem(hidden, weight, target, bias, o, workspace_bytes, scratch, [&](const auto& p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p.hidden)>>;
    require_gradients(p, dhidden, dweight, dbias);
    const float* u = cross_entropy::token_weights(token_weight, p.tokens, scratch);
    backward(p, Statistics(statistics, p.target), Upstream(d_loss, d_z, d_lse, denominators, u, p.tokens, o),
             dhidden.wanted<T>(), dweight.wanted<float>(), dbias.wanted<float>());
  });
}
FASTLM_EXPORT(linear_cross_entropy_backward);

// forward, and the gradients of d_loss () float32, 1 if that is None, times a loss that is one number; replace: dweight and
// dbias are overwritten.
void linear_cross_entropy_together(Tensor d_loss, Tensor hidden, Tensor weight, Tensor target, Tensor bias, Tensor class_weight,
                                   Tensor token_weight, int64_t ignore_index, double label_smoothing,
                                   double z_loss, std::optional<double> softcap, double logit_scale,
                                   std::string reduction, bool extras, int64_t workspace_bytes, Tensor loss,
                                   Tensor z, Tensor lse, Tensor correct, Tensor confidence, Tensor entropy,
                                   Tensor statistics, Tensor denominators, Tensor dhidden, Tensor dweight,
                                   Tensor dbias, bool replace) {
  Scratch scratch;
  const Options o(weight.size(0), class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
                  reduction, extras, scratch);
  require(!o.per_token, "reduction must be mean or sum");
  for_problem(hidden, weight, target, bias, o, workspace_bytes, scratch, [&](const auto& p) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p.hidden)>>;
    p.target.check();
    require_gradients(p, dhidden, dweight, dbias);
    const Extras more(z, lse, correct, confidence, entropy);
    Statistics s(statistics, p.target);
    more.enter(s);
    const float* u = cross_entropy::token_weights(token_weight, p.tokens, scratch);
    cross_entropy::denominators(p.target, u, denominators.as<float>());
    together(p, s, Upstream(d_loss, denominators, u, o), dhidden.wanted<T>(), dweight.wanted<float>(),
             dbias.wanted<float>(), replace);
    cross_entropy::reduce(s, p.target, u, o, loss.as<float>(), more.z, denominators.as<float>());
  });
}
FASTLM_EXPORT(linear_cross_entropy_together);

// Bytes that they take beside their arguments, but for what threads take for a band of tokens.
int64_t linear_cross_entropy_forward_workspace(
    Tensor hidden, Tensor weight, Tensor, Tensor, Tensor, Tensor, int64_t, double, double, std::optional<double>, double,
    std::string, bool, int64_t workspace_bytes, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  return workspace_of(hidden, weight, workspace_bytes, false, true, false);
}
FASTLM_EXPORT(linear_cross_entropy_forward_workspace);

int64_t linear_cross_entropy_backward_workspace(
    Tensor, Tensor, Tensor, Tensor hidden, Tensor weight, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, double,
    double, std::optional<double>, double, std::string, bool, int64_t workspace_bytes, Tensor, Tensor, Tensor) {
  return workspace_of(hidden, weight, workspace_bytes, false, false, true);
}
FASTLM_EXPORT(linear_cross_entropy_backward_workspace);

int64_t linear_cross_entropy_together_workspace(
    Tensor, Tensor hidden, Tensor weight, Tensor, Tensor, Tensor, Tensor, int64_t, double, double, std::optional<double> softcap, double,
    std::string, bool, int64_t workspace_bytes, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor dweight, Tensor, bool replace) {
  return workspace_of(hidden, weight, workspace_bytes, softcap.value_or(0.0) != 0.0, true, true,
                      replace && dweight.numel() > 0);
}
FASTLM_EXPORT(linear_cross_entropy_together_workspace);

}  // namespace fastlm
