// What the optimizers share: the norm, the decision whether a step counts, clipping, and flat buffers in
// float32 or bfloat16 worked on in float32 a tile at a time; see fastlm/ops/optimizer_step.py.
//
// Two passes over memory: one reads the gradient for its norm, unless that is given, one does all the rest. A
// tile stays in the innermost cache, so what is narrow costs conversions there and no memory traffic.
#pragma once

#include "philox.h"

namespace fastlm {

constexpr int64_t kTile = 1024;     // elements; whole groups of random words
constexpr int64_t kTileGrain = 16;  // tiles that are worth a block of their own
constexpr int kMaxStates = 2;
constexpr int64_t kMaskRun = 64;    // elements that a flag of a short decay_mask stands for

typedef float half_vf __attribute__((vector_size(W * 2)));  // W / 2 elements
typedef double vd __attribute__((vector_size(W * 4)));      // the same in float64
typedef uint8_t vb __attribute__((vector_size(W)));
typedef int16_t vs __attribute__((vector_size(W * 2)));

// The arguments that every optimizer has beside its states and numbers.
struct StepArguments {
  Tensor master, grad, step, param, decay_mask, seed, norm, offsets, lr;
  double weight_decay, max_norm;
  bool zero_grad;
  Tensor grad_norm, skipped;
  Tensor trail = {};
};

// A piece of all buffers in float32.
struct Piece {
  float* p;
  const float* g;  // not clipped
  float* state[kMaxStates];
  const uint8_t* mask;  // of the whole buffer
  int64_t run;          // elements that one of its flags stands for
  int64_t start;        // in the buffer
  float clip;
  int64_t n;

  Piece part(int64_t begin, int64_t end) const {
    Piece out{p + begin, g + begin, {}, mask, run, start + begin, clip, end - begin};
    for (int s = 0; s < kMaxStates; ++s) out.state[s] = state[s] ? state[s] + begin : nullptr;
    return out;
  }
};

inline vi mask_n(const uint8_t* p, std::integral_constant<int, W>) {
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, vi) != 0;
}
inline vi mask_n(const uint8_t* p, int n) {
  vi mask = {};
  for (int i = 0; i < n; ++i) mask[i] = p[i] ? -1 : 0;
  return mask;
}

// `decay` where the mask holds, 0 elsewhere.
template <class Count> inline vf decay_n(const Piece& x, int64_t i, Count count, float decay) {
  if (!x.mask) return splat(decay);
  const int64_t at = x.start + i;
  if (x.run == 1) return select(mask_n(x.mask + at, count), splat(decay), vf{});
  const uint8_t* flag = x.mask + at / kMaskRun;
  const int64_t left = kMaskRun - at % kMaskRun;  // elements up to the next flag
  if (left >= count) return splat(*flag ? decay : 0.0f);
  vf d;
  for (int k = 0; k < W; ++k) d[k] = k < count && flag[k < left ? 0 : 1] ? decay : 0.0f;
  return d;
}

namespace detail {

// A flat buffer of float32 or bfloat16.
struct Flat {
  Flat() = default;
  Flat(const Tensor& t, const char* what, int64_t n) {
    if (!t.defined()) return;
    require(t.numel() == n, what, " must have ", n, " elements, got ", t.numel());
    require(t.is<float>() || t.is<bf16>(), what, " must be float32 or bfloat16, got ", name(t.dtype));
    (t.is<float>() ? reinterpret_cast<void*&>(wide) : reinterpret_cast<void*&>(narrow)) = t.data;
  }

  // n elements from `begin` on in float32: where they lie, or widened into `room`.
  float* open(int64_t begin, int64_t n, float* room) const {
    if (wide) return wide + begin;
    if (!narrow) return nullptr;
    for_vectors(n,
                [&](int64_t i, auto count) { store_n(room + i, load_n(narrow + begin + i, count), count); });
    return room;
  }

  // Writes them back: to nearest, or stochastically by the low half of words >> shift.
  void close(int64_t begin, int64_t n, const float* values, const uint32_t* words, int shift) const {
    if (!narrow) return;
    for_vectors(n, [&](int64_t i, auto count) {
      vf v = load_n(values + i, count);
      if (words) {
        vu r;
        std::memcpy(&r, words + i, sizeof r);
        const vu up = (bitcast<vu>(v) + ((r >> shift) & 0xffffu)) & 0xffff0000u;
        v = select(abs(v) < std::numeric_limits<float>::infinity(), bitcast<vf>(up), v);
      }
      store_n(narrow + begin + i, v, count);
    });
  }

  void clear(int64_t begin, int64_t n) const {
    if (wide) std::fill(wide + begin, wide + begin + n, 0.0f);
    if (narrow) std::fill(narrow + begin, narrow + begin + n, bf16{});
  }

  float* wide = nullptr;
  bf16* narrow = nullptr;
};

// Masters in two halves: bfloat16, and what is to be added to the bits of those as float32.
struct Halves {
  Halves(const Tensor& t, const Tensor& master) {
    if (!t.defined()) return;
    require(t.numel() == master.numel(), "trail must have ", master.numel(), " elements, got ", t.numel());
    upper = master.as<bf16>();
    lower = t.as<int16_t>();
  }

  float* open(int64_t begin, int64_t n, float* room) const {
    for_vectors(n, [&](int64_t i, auto count) {
      vs low = {};
      std::memcpy(&low, lower + begin + i, static_cast<size_t>(count) * sizeof(int16_t));
      const vf high = load_n(upper + begin + i, count);
      store_n(room + i, bitcast<vf>(bitcast<vi>(high) + __builtin_convertvector(low, vi)), count);
    });
    return room;
  }

  void close(int64_t begin, int64_t n, const float* values) const {
    for_vectors(n, [&](int64_t i, auto count) {
      const vu bits = bitcast<vu>(load_n(values + i, count));
      const vs high = __builtin_convertvector((bits + 0x8000u) >> 16, vs), low = __builtin_convertvector(bits, vs);
      const size_t bytes = static_cast<size_t>(count) * sizeof(int16_t);
      std::memcpy(static_cast<void*>(upper + begin + i), &high, bytes);
      std::memcpy(lower + begin + i, &low, bytes);
    });
  }

  bf16* upper = nullptr;
  int16_t* lower = nullptr;
};

// In float64 no square of a float32 overflows.
inline double sum_of_squares(const float* x, int64_t n) {
  constexpr int kLanes = W / 2, kChains = 4;  // so many sums hide the latency of an addition
  vd sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) {
      half_vf narrow;
      std::memcpy(&narrow, x + i + c * kLanes, sizeof narrow);
      const vd wide = __builtin_convertvector(narrow, vd);
      sums[c] += wide * wide;
    }
  const vd total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double result = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) result += total[lane];
  for (; i < n; ++i) result += static_cast<double>(x[i]) * x[i];
  return result;
}

inline int64_t tile_count(int64_t n) { return (n + kTile - 1) / kTile; }

// fn(begin, n) for the tiles of a block, in order.
template <class Fn> void for_tiles(int64_t first, int64_t last, int64_t n, Fn&& fn) {
  for (int64_t begin = first * kTile; begin < std::min(last * kTile, n); begin += kTile)
    fn(begin, std::min(kTile, n - begin));
}

inline double sum_of_squares(const Flat& x, int64_t start, int64_t n) {
  const int64_t tiles = tile_count(n);
  Scratch scratch;
  double* partials = scratch.take<double>(block_count(tiles, kTileGrain));
  parallel_for(tiles, kTileGrain, [&](int64_t first, int64_t last, int64_t block) {
    Scratch own;
    float* room = own.take<float>(kTile);
    double total = 0.0;
    for_tiles(first, last, n, [&](int64_t begin, int64_t count) {
      total += sum_of_squares(x.open(start + begin, count, room), count);
    });
    partials[block] = total;
  });
  double total = 0.0;
  for (int64_t b = 0; b < block_count(tiles, kTileGrain); ++b) total += partials[b];
  return total;
}

// Ends and clip factors of the segments; one segment if there are no offsets.
struct Segments {
  std::vector<int64_t> ends;
  std::vector<float> clips;
};

inline float clip_of(double norm, double max_norm) {
  if (!(max_norm > 0.0) || !std::isfinite(max_norm)) return 1.0f;
  return static_cast<float>(std::min(1.0, max_norm / (static_cast<float>(norm) + 1e-6)));
}

inline Segments segments_of(const StepArguments& a, const Flat& grad, int64_t n, float& norm) {
  Segments s;
  double total = 0.0;
  if (a.offsets.defined()) {
    const int64_t* offsets = a.offsets.as<int64_t>();
    int64_t begin = 0;  // nobody has checked what is in offsets
    for (int64_t k = 1; k < a.offsets.numel(); ++k) {
      const int64_t end = k + 1 == a.offsets.numel() ? n : std::clamp(offsets[k], begin, n);
      const double squares = sum_of_squares(grad, begin, end - begin);
      s.ends.push_back(end);
      s.clips.push_back(clip_of(std::sqrt(squares), a.max_norm));
      total += squares;
      begin = end;
    }
  }
  if (a.norm.defined()) norm = *a.norm.as<float>();
  else norm = static_cast<float>(std::sqrt(a.offsets.defined() ? total : sum_of_squares(grad, 0, n)));
  if (s.ends.empty()) s = {{n}, {clip_of(norm, a.max_norm)}};
  return s;
}

// The count with this step, which is written.
inline double count_step(const Tensor& step) {
  require(step.numel() == 1, "step must have one element, got ", step.numel());
  if (step.is<int64_t>()) return static_cast<double>(++*step.as<int64_t>());
  return *step.as<float>() = static_cast<float>(static_cast<double>(*step.as<float>()) + 1.0);
}

inline void random_words(const Tensor& seed, double t, int pair, int64_t begin, int64_t n, uint32_t* out) {
  const PhiloxKey key(*seed.as<int64_t>());
  for (int64_t i = 0; i < n; i += 4 * W) {
    vu words[4];
    philox_lanes(key, static_cast<uint64_t>(begin + i) / 4, static_cast<uint32_t>(static_cast<int64_t>(t)),
                 pair, words);
    std::memcpy(out + i, words, sizeof words);
  }
}

}  // namespace detail

// One step: make(t, rate) returns update(piece), which is called on every piece if the step counts.
template <class Make>
void optimizer_step(const StepArguments& a, std::initializer_list<Tensor> given, Make&& make) {
  using detail::Flat;
  const int64_t n = a.master.numel();
  const Flat master(a.master, "master", n), grad(a.grad, "grad", n), param(a.param, "param", n);
  const detail::Halves halves(a.trail, a.master);
  Flat states[kMaxStates];
  int kept = 0;
  for (const Tensor& t : given)
    if (t.defined()) states[kept++] = Flat(t, "a state", n);
  const int64_t flags = a.decay_mask.defined() ? a.decay_mask.numel() : n;
  require(flags == n || flags == (n + kMaskRun - 1) / kMaskRun, "decay_mask must have ", n, " elements, or one for each ",
          kMaskRun, ", got ", flags);
  require(!a.decay_mask.defined() || a.decay_mask.is<bool>() || a.decay_mask.is<uint8_t>(),
          "decay_mask must be bool or uint8, got ", name(a.decay_mask.dtype));
  for (const Tensor* t : {&a.lr, &a.grad_norm, &a.skipped})
    require(t->numel() == 1, "lr, grad_norm and skipped must have one element, got ", t->numel());

  float norm = 0.0f;
  const detail::Segments segments = detail::segments_of(a, grad, n, norm);
  const bool applied = std::isfinite(norm);
  *a.grad_norm.as<float>() = norm;
  *a.skipped.as<float>() = applied ? 0.0f : 1.0f;
  const double t = applied ? detail::count_step(a.step) : 0.0;
  const auto update = make(t, static_cast<double>(*a.lr.as<float>()));
  const bool random = a.seed.defined() && ((master.narrow && !halves.lower) || states[0].narrow || states[1].narrow);

  parallel_for(detail::tile_count(n), kTileGrain, [&](int64_t first, int64_t last) {
    Scratch scratch;
    float* room = scratch.take<float>((3 + kMaxStates) * kTile);
    uint32_t* words = random ? scratch.take<uint32_t>(kTile) : nullptr;
    detail::for_tiles(first, last, n, [&](int64_t begin, int64_t count) {
      if (applied) {
        const Piece tile{
            halves.lower ? halves.open(begin, count, room) : master.open(begin, count, room),
            grad.open(begin, count, room + kTile),
            {states[0].open(begin, count, room + 2 * kTile), states[1].open(begin, count, room + 3 * kTile)},
            a.decay_mask.defined() ? static_cast<const uint8_t*>(a.decay_mask.data) : nullptr,
            flags == n ? 1 : kMaskRun,
            begin,
            1.0f,
            count};
        auto segment =
            std::upper_bound(segments.ends.begin(), segments.ends.end(), begin) - segments.ends.begin();
        for (int64_t at = 0; at < count; ++segment) {
          const int64_t end = std::min(segments.ends[segment] - begin, count);
          Piece piece = tile.part(at, end);
          piece.clip = segments.clips[segment];
          update(piece);
          at = end;
        }
        if (halves.lower) halves.close(begin, count, tile.p);
        for (int number = 0; number < kept + !halves.lower; ++number) {  // the master is the last
          if (words && number % 2 == 0) detail::random_words(a.seed, t, number / 2, begin, count, words);
          const Flat& flat = number < kept ? states[number] : master;
          flat.close(begin, count, number < kept ? tile.state[number] : tile.p, words, number % 2 * 16);
        }
        if (param.wide) std::copy(tile.p, tile.p + count, param.wide + begin);
        param.close(begin, count, tile.p, nullptr, 0);
      }
      if (a.zero_grad) grad.clear(begin, count);
    });
  });
}

}  // namespace fastlm
