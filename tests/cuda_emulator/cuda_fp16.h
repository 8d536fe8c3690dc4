// float16 as CUDA spells it, for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  float v = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
            : exponent == 31 ? (mantissa ? std::numeric_limits<float>::quiet_NaN() : INFINITY)
                             : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return h.bits & 0x8000 ? -v : v;
}
inline __half __float2half_rn(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float v = std::fabs(f);
  if (f != f) return {0x7fff};
  if (v >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (v < 0x1p-14f)
    return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(v, 24))))};
  int exponent;
  const int mantissa =
      static_cast<int>(std::nearbyint(std::ldexp(std::frexp(v, &exponent), 11)));  // 1024 to 2048
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + mantissa))};
}
inline __half __float2half(float f) { return __float2half_rn(f); }
