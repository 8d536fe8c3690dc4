// Puts what csrc/cpu/vec.h offers within reach of tests/test_vec.py; compiled there once for each instruction set.
#include "cpu/vec.h"

using namespace fastlm;

namespace {

template <class Fn> void map(const float* x, float* y, int64_t n, Fn&& fn) {
  for_vectors(n, [&](int64_t i, auto count) { store_n(y + i, fn(load_n(x + i, count)), count); });
}

vf loaded(const float* p) { return load(p); }

}  // namespace

extern "C" {

int width() { return W; }

void probe_exp(const float* x, float* y, int64_t n) { map(x, y, n, [](vf v) { return exp(v); }); }
void probe_tanh(const float* x, float* y, int64_t n) { map(x, y, n, [](vf v) { return tanh(v); }); }
void probe_erf(const float* x, float* y, int64_t n) { map(x, y, n, [](vf v) { return erf(v); }); }
void probe_sqrt(const float* x, float* y, int64_t n) { map(x, y, n, [](vf v) { return sqrt(v); }); }

void probe_narrow(const float* x, bf16* y, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) { store_n(y + i, load_n(x + i, count), count); });
}
void probe_widen(const bf16* x, float* y, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) { store_n(y + i, load_n(x + i, count), count); });
}
void probe_scalar_narrow(const float* x, bf16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

float probe_sum(const float* x) { return sum(loaded(x)); }
float probe_max(const float* x) { return max(loaded(x)); }
void probe_max2(const float* a, const float* b, float* y) { store(y, max(loaded(a), loaded(b))); }
void probe_min2(const float* a, const float* b, float* y) { store(y, min(loaded(a), loaded(b))); }
float probe_accumulate(const float* x, int64_t n) {
  return accumulate<1>(n, [&](int64_t i, auto count, vf* t) { t[0] += load_n(x + i, count); })[0];
}
float probe_part(const float* x, int n, float fill) { return sum(load_part(x, n, fill)); }

void probe_mulhi(const uint32_t* a, uint32_t b, uint32_t* y) {
  vu v;
  std::memcpy(&v, a, sizeof v);
  v = mulhi(v, b);
  std::memcpy(y, &v, sizeof v);
}
void probe_dot2(const float* acc, const uint32_t* a, const uint32_t* b, float* y) {
  vu va, vb;
  std::memcpy(&va, a, sizeof va);
  std::memcpy(&vb, b, sizeof vb);
  store(y, dot2(loaded(acc), va, vb));
}

// block[i] = the block that item i fell to; every item is counted once.
int64_t probe_blocks(int64_t n, int64_t grain, int64_t* block, int64_t* count) {
  parallel_for(n, grain, [&](int64_t begin, int64_t end, int64_t b) {
    for (int64_t i = begin; i < end; ++i) {
      block[i] = b;
      ++count[i];
    }
  });
  return block_count(n, grain);
}

// The number in the message of the exception that comes out, when every block from `first` on throws its own.
int64_t probe_throw(int64_t n, int64_t first) {
  try {
    parallel_for(n, 1, [&](int64_t, int64_t, int64_t b) { require(b < first, b); });
  } catch (const std::invalid_argument& e) {
    return std::stoll(e.what());
  }
  return -1;
}

// 0 when nested scopes overlap nowhere, are aligned, and the second round finds the memory of the first.
int probe_scratch(int64_t bytes) {
  char *first[2], *second[2];
  for (int round = 0; round < 3; ++round) {
    Scratch outer;
    char* a = outer.take<char>(bytes);
    std::fill(a, a + bytes, 'a');
    char* inside = nullptr;
    {
      Scratch inner;
      char* b = inside = inner.take<char>(2 * bytes + 1);
      std::fill(b, b + 2 * bytes + 1, 'b');
      char* c = outer.take<char>(bytes);
      std::fill(c, c + bytes, 'c');
      if (b[0] != 'b' || b[2 * bytes] != 'b') return 1;
      if (reinterpret_cast<uintptr_t>(b) % 64 || reinterpret_cast<uintptr_t>(c) % 64) return 2;
    }
    if (a[0] != 'a' || a[bytes - 1] != 'a' || reinterpret_cast<uintptr_t>(a) % 64) return 3;
    if (round > 0) (round == 1 ? first : second)[0] = a, (round == 1 ? first : second)[1] = inside;
  }
  return first[0] == second[0] && first[1] == second[1] ? 0 : 4;
}
}
