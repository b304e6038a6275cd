// What generated score and mask functions are made of: NumPy's operations, one function for each.
//
// build/functor.py writes, for a user's score_mod and mask_mod, three types over this file:
//
//     struct ModArgs { Coord last; ... };  // by value, the arrays and numbers that the two read
//
//     struct ScoreMod {                    // s <- score_mod(s, b, h, i, j)
//       static constexpr bool kIdentity;   // true: there is none
//       static constexpr bool kLooksUpByKey;  // it reads another element for another key
//       template <class Real>
//       static Real apply(Real score, const Coord& at, const ModArgs& args);
//     };
//
//     struct MaskMod {                     // true: the key takes part
//       static constexpr bool kIdentity;
//       static bool apply(const Coord& at, const ModArgs& args);
//     };
//
// Both may be applied to coordinates beyond the ends of the sequences, which a tile has where it sticks out: before
// anything is read they are brought back to ModArgs::last. Both are pure, and no lane needs another.
//
// Integers. A value lives in int where its range is known to fit, else in long long, or u64 for NumPy's uint64. What
// may overflow is computed modulo 2^32 or 2^64 and then brought to NumPy's dtype, so it wraps as in NumPy.
// Floats. float for NumPy's float16, bfloat16 and float32. No product is fused into a sum (isa::mul_rn), so that all but
// the functions of the mathematical library give NumPy's bits.
#pragma once

#include "isa.cuh"

// Where a score lies: batch, query head, query, key. All are >= 0.
struct Coord {
  int b;
  int h;
  int q_idx;
  int kv_idx;
};

namespace mods {

// An array, read element by element. Strides count elements and may be zero or negative.
template <int kRank>
struct Lookup {
  const void* data;
  long long sizes[kRank];
  long long strides[kRank];
};

template <>
struct Lookup<0> {
  const void* data;
};

__device__ __forceinline__ int clamp_to(int index, int last) { return index < last ? index : last; }

// A negative index counts from the end.
template <class Index>
__device__ __forceinline__ long long from_end(Index index, long long size) {
  return index < 0 ? index + size : static_cast<long long>(index);
}

// The types of elements in memory, by what `load` gives for them.
struct Bool {};
struct Int8 {};
struct UInt8 {};
struct Int16 {};
struct UInt16 {};
struct Int32 {};
struct UInt32 {};
struct Int64 {};
struct UInt64 {};
struct Float32 {};
struct Float64 {};

__device__ __forceinline__ u64 word_pair(uint2 words) { return static_cast<u64>(words.y) << 32 | words.x; }

__device__ __forceinline__ bool load_element(Bool, const unsigned char* data, long long i) {
  return isa::ldg_1(data + i) != 0;
}
__device__ __forceinline__ int load_element(Int8, const unsigned char* data, long long i) {
  return static_cast<signed char>(isa::ldg_1(data + i));
}
__device__ __forceinline__ int load_element(UInt8, const unsigned char* data, long long i) {
  return static_cast<int>(isa::ldg_1(data + i));
}
__device__ __forceinline__ int load_element(Int16, const unsigned char* data, long long i) {
  return static_cast<short>(isa::ldg_2(data + 2 * i));
}
__device__ __forceinline__ int load_element(UInt16, const unsigned char* data, long long i) {
  return static_cast<int>(isa::ldg_2(data + 2 * i));
}
__device__ __forceinline__ int load_element(Int32, const unsigned char* data, long long i) {
  return static_cast<int>(isa::ldg_4(data + 4 * i));
}
__device__ __forceinline__ long long load_element(UInt32, const unsigned char* data, long long i) {
  return static_cast<long long>(isa::ldg_4(data + 4 * i));
}
__device__ __forceinline__ long long load_element(Int64, const unsigned char* data, long long i) {
  return static_cast<long long>(word_pair(isa::ldg_8(data + 8 * i)));
}
__device__ __forceinline__ u64 load_element(UInt64, const unsigned char* data, long long i) {
  return word_pair(isa::ldg_8(data + 8 * i));
}
__device__ __forceinline__ float load_element(Float16, const unsigned char* data, long long i) {
  return isa::unpack_f16(isa::ldg_2(data + 2 * i));
}
__device__ __forceinline__ float load_element(BFloat16, const unsigned char* data, long long i) {
  return isa::unpack_bf16(isa::ldg_2(data + 2 * i));
}
__device__ __forceinline__ float load_element(Float32, const unsigned char* data, long long i) {
  return isa::bits_float(isa::ldg_4(data + 4 * i));
}
__device__ __forceinline__ double load_element(Float64, const unsigned char* data, long long i) {
  return isa::bits_double(isa::ldg_8(data + 8 * i));
}

template <class Element, int kRank, class... Index>
__device__ __forceinline__ auto load(Element element, const Lookup<kRank>& array, Index... indices) {
  static_assert(sizeof...(indices) == kRank, "one index for every axis");
  long long offset = 0;
  if constexpr (kRank > 0) {
    int axis = 0;
    ((offset += static_cast<long long>(indices) * array.strides[axis++]), ...);
  }
  return load_element(element, static_cast<const unsigned char*>(array.data), offset);
}

// -----------------------------------------------------------------------------------------------------------
// Integers: int, long long or u64

template <class T>
struct Modular {
  using type = u64;
};
template <>
struct Modular<int> {
  using type = u32;
};
template <class T>
using modular = typename Modular<T>::type;

template <class T>
__device__ __forceinline__ T add(T a, T b) {
  return static_cast<T>(static_cast<modular<T>>(a) + static_cast<modular<T>>(b));
}
template <class T>
__device__ __forceinline__ T subtract(T a, T b) {
  return static_cast<T>(static_cast<modular<T>>(a) - static_cast<modular<T>>(b));
}
template <class T>
__device__ __forceinline__ T multiply(T a, T b) {
  return static_cast<T>(static_cast<modular<T>>(a) * static_cast<modular<T>>(b));
}
template <class T>
__device__ __forceinline__ T negative(T a) {
  return subtract(static_cast<T>(0), a);
}
template <class T>
__device__ __forceinline__ T absolute(T a) {
  return a < 0 ? negative(a) : a;
}
template <class T>
__device__ __forceinline__ T square(T a) {
  return multiply(a, a);
}
template <class T>
__device__ __forceinline__ T sign(T a) {
  return a > 0 ? 1 : a < 0 ? -1 : 0;
}

// Rounds towards minus infinity; 0 where b is 0, and what -x gives for x / -1.
template <class T>
__device__ __forceinline__ T floor_divide(T a, T b) {
  if (b == 0) return 0;
  if (b == static_cast<T>(-1) && b < 0) return negative(a);
  const T quotient = a / b;
  return quotient * b != a && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}
// Has b's sign; 0 where b is 0.
template <class T>
__device__ __forceinline__ T remainder(T a, T b) {
  if (b == 0 || (b == static_cast<T>(-1) && b < 0)) return 0;
  const T rest = a % b;
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
// Has a's sign.
template <class T>
__device__ __forceinline__ T fmod(T a, T b) {
  return b == 0 || (b == static_cast<T>(-1) && b < 0) ? 0 : a % b;
}

template <class T>
__device__ __forceinline__ T bitwise_and(T a, T b) {
  return a & b;
}
template <class T>
__device__ __forceinline__ T bitwise_or(T a, T b) {
  return a | b;
}
template <class T>
__device__ __forceinline__ T bitwise_xor(T a, T b) {
  return a ^ b;
}
template <class T>
__device__ __forceinline__ T invert(T a) {
  return ~a;
}
// By kBits, the width of NumPy's dtype, or more, or by a negative number: all bits leave. T may be narrower than that,
// and then holds the result, so all bits leave it sooner.
template <int kBits, class T>
constexpr T kShiftEnd = static_cast<T>(kBits < 8 * sizeof(T) ? kBits : 8 * sizeof(T));

template <int kBits, class T>
__device__ __forceinline__ T left_shift(T a, T b) {
  if (b < 0 || b >= kShiftEnd<kBits, T>) return 0;
  return static_cast<T>(static_cast<modular<T>>(a) << static_cast<int>(b));
}
template <int kBits, class T>
__device__ __forceinline__ T right_shift(T a, T b) {
  if (b < 0 || b >= kShiftEnd<kBits, T>) return a < 0 ? static_cast<T>(-1) : 0;
  return a >> static_cast<int>(b);
}

template <class T>
__device__ __forceinline__ T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
  return a > b ? a : b;
}
template <class T>
__device__ __forceinline__ T fmin(T a, T b) {
  return minimum(a, b);
}
template <class T>
__device__ __forceinline__ T fmax(T a, T b) {
  return maximum(a, b);
}

// -----------------------------------------------------------------------------------------------------------
// float and double

// The mathematical library's functions, which differ by type in C's names. They may err by a few units in the last
// place, on a GPU by those that the CUDA C++ Programming Guide lists.
__device__ __forceinline__ float exp(float a) { return ::expf(a); }
__device__ __forceinline__ float exp2(float a) { return ::exp2f(a); }
__device__ __forceinline__ float expm1(float a) { return ::expm1f(a); }
__device__ __forceinline__ float log(float a) { return ::logf(a); }
__device__ __forceinline__ float log2(float a) { return ::log2f(a); }
__device__ __forceinline__ float log10(float a) { return ::log10f(a); }
__device__ __forceinline__ float log1p(float a) { return ::log1pf(a); }
__device__ __forceinline__ float sin(float a) { return ::sinf(a); }
__device__ __forceinline__ float cos(float a) { return ::cosf(a); }
__device__ __forceinline__ float tan(float a) { return ::tanf(a); }
__device__ __forceinline__ float sinh(float a) { return ::sinhf(a); }
__device__ __forceinline__ float cosh(float a) { return ::coshf(a); }
__device__ __forceinline__ float tanh(float a) { return ::tanhf(a); }
__device__ __forceinline__ float arctan(float a) { return ::atanf(a); }
__device__ __forceinline__ float power(float a, float b) { return ::powf(a, b); }

__device__ __forceinline__ double exp(double a) { return ::exp(a); }
__device__ __forceinline__ double exp2(double a) { return ::exp2(a); }
__device__ __forceinline__ double expm1(double a) { return ::expm1(a); }
__device__ __forceinline__ double log(double a) { return ::log(a); }
__device__ __forceinline__ double log2(double a) { return ::log2(a); }
__device__ __forceinline__ double log10(double a) { return ::log10(a); }
__device__ __forceinline__ double log1p(double a) { return ::log1p(a); }
__device__ __forceinline__ double sin(double a) { return ::sin(a); }
__device__ __forceinline__ double cos(double a) { return ::cos(a); }
__device__ __forceinline__ double tan(double a) { return ::tan(a); }
__device__ __forceinline__ double sinh(double a) { return ::sinh(a); }
__device__ __forceinline__ double cosh(double a) { return ::cosh(a); }
__device__ __forceinline__ double tanh(double a) { return ::tanh(a); }
__device__ __forceinline__ double arctan(double a) { return ::atan(a); }
__device__ __forceinline__ double power(double a, double b) { return ::pow(a, b); }

// These are exact.
__device__ __forceinline__ float sqrt(float a) { return ::sqrtf(a); }
__device__ __forceinline__ float floor(float a) { return ::floorf(a); }
__device__ __forceinline__ float ceil(float a) { return ::ceilf(a); }
__device__ __forceinline__ float trunc(float a) { return ::truncf(a); }
__device__ __forceinline__ float rint(float a) { return ::rintf(a); }
__device__ __forceinline__ float absolute(float a) { return ::fabsf(a); }
__device__ __forceinline__ float copysign(float a, float b) { return ::copysignf(a, b); }
__device__ __forceinline__ float fmod(float a, float b) { return ::fmodf(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return isa::mul_rn(a, b); }

__device__ __forceinline__ double sqrt(double a) { return ::sqrt(a); }
__device__ __forceinline__ double floor(double a) { return ::floor(a); }
__device__ __forceinline__ double ceil(double a) { return ::ceil(a); }
__device__ __forceinline__ double trunc(double a) { return ::trunc(a); }
__device__ __forceinline__ double rint(double a) { return ::rint(a); }
__device__ __forceinline__ double absolute(double a) { return ::fabs(a); }
__device__ __forceinline__ double copysign(double a, double b) { return ::copysign(a, b); }
__device__ __forceinline__ double fmod(double a, double b) { return ::fmod(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return isa::mul_rn(a, b); }

template <class Real>
__device__ __forceinline__ Real real_remainder(Real a, Real b) {
  Real rest = fmod(a, b);
  if (b == 0) return rest;
  if (rest == 0) return copysign(static_cast<Real>(0), b);
  return (b < 0) != (rest < 0) ? rest + b : rest;
}
// As NumPy finds it: the quotient of what the remainder leaves, corrected by the rounding of the division.
template <class Real>
__device__ __forceinline__ Real real_floor_divide(Real a, Real b) {
  if (b == 0) return a / b;
  const Real rest = fmod(a, b);
  Real quotient = (a - rest) / b;
  if (rest != 0 && (b < 0) != (rest < 0)) quotient -= 1;
  if (quotient == 0) return copysign(static_cast<Real>(0), a / b);
  const Real whole = floor(quotient);
  return quotient - whole > static_cast<Real>(0.5) ? whole + 1 : whole;
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float subtract(float a, float b) { return a - b; }
__device__ __forceinline__ float divide(float a, float b) { return a / b; }
__device__ __forceinline__ float remainder(float a, float b) { return real_remainder(a, b); }
__device__ __forceinline__ float floor_divide(float a, float b) { return real_floor_divide(a, b); }
__device__ __forceinline__ float negative(float a) { return -a; }
__device__ __forceinline__ float square(float a) { return multiply(a, a); }
__device__ __forceinline__ float reciprocal(float a) { return 1 / a; }
__device__ __forceinline__ float sign(float a) { return a > 0 ? 1 : a < 0 ? -1 : a == 0 ? 0 : a; }
__device__ __forceinline__ float minimum(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float maximum(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float fmin(float a, float b) { return a <= b || b != b ? a : b; }
__device__ __forceinline__ float fmax(float a, float b) { return a >= b || b != b ? a : b; }
__device__ __forceinline__ bool isnan(float a) { return a != a; }
__device__ __forceinline__ bool isfinite(float a) { return a - a == 0; }
__device__ __forceinline__ bool isinf(float a) { return a == a && a - a != 0; }
__device__ __forceinline__ bool signbit(float a) { return copysign(static_cast<float>(1), a) < 0; }

__device__ __forceinline__ double add(double a, double b) { return a + b; }
__device__ __forceinline__ double subtract(double a, double b) { return a - b; }
__device__ __forceinline__ double divide(double a, double b) { return a / b; }
__device__ __forceinline__ double remainder(double a, double b) { return real_remainder(a, b); }
__device__ __forceinline__ double floor_divide(double a, double b) { return real_floor_divide(a, b); }
__device__ __forceinline__ double negative(double a) { return -a; }
__device__ __forceinline__ double square(double a) { return multiply(a, a); }
__device__ __forceinline__ double reciprocal(double a) { return 1 / a; }
__device__ __forceinline__ double sign(double a) { return a > 0 ? 1 : a < 0 ? -1 : a == 0 ? 0 : a; }
__device__ __forceinline__ double minimum(double a, double b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ double maximum(double a, double b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ double fmin(double a, double b) { return a <= b || b != b ? a : b; }
__device__ __forceinline__ double fmax(double a, double b) { return a >= b || b != b ? a : b; }
__device__ __forceinline__ bool isnan(double a) { return a != a; }
__device__ __forceinline__ bool isfinite(double a) { return a - a == 0; }
__device__ __forceinline__ bool isinf(double a) { return a == a && a - a != 0; }
__device__ __forceinline__ bool signbit(double a) { return copysign(static_cast<double>(1), a) < 0; }

}  // namespace mods
