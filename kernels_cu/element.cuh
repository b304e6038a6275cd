// Elements in memory, and the numbers in which one computes with them: float, for double double.
//
// For kernels that compute with single elements. Those that leave it to tensor cores see pairs of them as u32.
#pragma once

#include "isa.cuh"

// What an Element of a Config takes in memory, how it is read and how it is written: rounded to nearest even, with
// what every GPU has. Pointers need only an element's own alignment.
template <class Element>
struct ElementTraits;

template <>
struct ElementTraits<Float16> {
  using Storage = u16;
  using Accumulator = float;

  static __device__ __forceinline__ float load(const u16* source) { return isa::unpack_f16(isa::ldg_2(source)); }
  static __device__ __forceinline__ void store(u16* destination, float value) {
    isa::stg_2(destination, isa::pack_f16x2_sm75(value, 0.0f));
  }
};

template <>
struct ElementTraits<BFloat16> {
  using Storage = u16;
  using Accumulator = float;

  static __device__ __forceinline__ float load(const u16* source) { return isa::unpack_bf16(isa::ldg_2(source)); }
  static __device__ __forceinline__ void store(u16* destination, float value) {
    // Half of the last place that stays, less a hair unless that place is odd; a carry goes into the exponent. NaNs
    // become one, lest they carry to infinity. sm_75 has no instruction for this.
    const u32 bits = isa::float_bits(value);
    const u32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    isa::stg_2(destination, value == value ? rounded : 0x7fffu);
  }
};

template <>
struct ElementTraits<float> {
  using Storage = float;
  using Accumulator = float;

  static __device__ __forceinline__ float load(const float* source) { return isa::bits_float(isa::ldg_4(source)); }
  static __device__ __forceinline__ void store(float* destination, float value) {
    isa::stg_4(destination, isa::float_bits(value));
  }
};

template <>
struct ElementTraits<double> {
  using Storage = double;
  using Accumulator = double;

  static __device__ __forceinline__ double load(const double* source) { return isa::bits_double(isa::ldg_8(source)); }
  static __device__ __forceinline__ void store(double* destination, double value) {
    isa::stg_8(destination, isa::double_bits(value));
  }
};

// -inf for either type.
__device__ __forceinline__ float negative_infinity() { return isa::bits_float(kNegativeInfinityBits); }

// The larger one; if one is a NaN, the other.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

// e^x, to a few roundings. ex2(x log2(e)) would be off by |x| of them, which shows where there are few keys.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

__device__ __forceinline__ float natural_log(float x) { return logf(x); }
__device__ __forceinline__ double natural_log(double x) { return log(x); }

__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }

// Over the kLanes neighbouring lanes of a group, each of which gets the result; kLanes is a power of two. All 32 lanes.
template <int kLanes, class T>
__device__ __forceinline__ T largest_of_lanes(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = larger(value, isa::shuffle_xor(value, distance));
  }
  return value;
}

template <int kLanes, class T>
__device__ __forceinline__ T sum_of_lanes(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += isa::shuffle_xor(value, distance);
  return value;
}
