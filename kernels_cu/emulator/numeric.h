// The number formats of the device, on the host: binary16 and bfloat16 with round-to-nearest-even, and
// ex2.approx.ftz.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

// Every kernel is compiled with this header, and <immintrin.h> alone took half of that time: so these are the
// compilers' own names for the instructions.
#if defined(__F16C__)
using Halves = short __attribute__((vector_size(16)));
using FourFloats = float __attribute__((vector_size(16)));
using EightFloats = float __attribute__((vector_size(32)));
#endif

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// cvt.f32.f16
inline float float_from_f16(std::uint16_t half) {
#if defined(__F16C__)
  return __builtin_ia32_vcvtph2ps(Halves{static_cast<short>(half)})[0];
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  const std::uint32_t exponent = (half >> 10) & 31;
  const std::uint32_t mantissa = half & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
#endif
}

// cvt.rn.f16.f32. NaNs become the canonical 0x7fff.
inline std::uint16_t f16_from_float(float value) {
  if (value != value) return 0x7fff;
#if defined(__F16C__)
  return static_cast<std::uint16_t>(__builtin_ia32_vcvtps2ph(FourFloats{value}, /*nearest=*/0)[0]);
#else
  const std::uint32_t sign = bits_of(value) >> 16 & 0x8000;
  std::uint32_t magnitude = bits_of(value) & 0x7fffffff;
  if (magnitude >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Below 2^-14 the spacing is 2^-24, that of floats in [0.5, 1): the addition rounds.
    return static_cast<std::uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  magnitude += 0xc8000fff + (magnitude >> 13 & 1);  // rebias the exponent, round half to even
  return static_cast<std::uint16_t>(sign | magnitude >> 13);
#endif
}

// cvt.f32.bf16
inline float float_from_bf16(std::uint16_t bits) { return float_of(static_cast<std::uint32_t>(bits) << 16); }

// cvt.rn.bf16.f32. NaNs become the canonical 0x7fff.
inline std::uint16_t bf16_from_float(float value) {
  if (value != value) return 0x7fff;
  const std::uint32_t bits = bits_of(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Sixteen elements at once: most of mma's time is this.
inline void floats_from_f16(const std::uint16_t (&halves)[16], float (&values)[16]) {
#if defined(__F16C__)
  for (int i = 0; i < 16; i += 8) {
    Halves eight;
    std::memcpy(&eight, halves + i, sizeof eight);
    const EightFloats converted = __builtin_ia32_vcvtph2ps256(eight);
    std::memcpy(values + i, &converted, sizeof converted);
  }
#else
  for (int i = 0; i < 16; ++i) values[i] = float_from_f16(halves[i]);
#endif
}

inline void floats_from_bf16(const std::uint16_t (&bits)[16], float (&values)[16]) {
  for (int i = 0; i < 16; ++i) values[i] = float_from_bf16(bits[i]);
}

// ex2.approx.ftz.f32: denormal arguments and results are zeros.
inline float ex2_approx_ftz(float x) {
  const float result = __builtin_exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;
}

// max.NaN.f32. NaNs become the canonical 0x7fffffff, and -0 is less than +0.
inline float max_nan(float a, float b) {
  if (a != a || b != b) return float_of(0x7fffffff);
  if (a == b) return float_of(bits_of(a) & bits_of(b));  // they differ as zeros alone
  return a < b ? b : a;
}

}  // namespace emulator
