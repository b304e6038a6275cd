// The names of integers and elements that every kernel file uses.
//
// No <stdint.h>: NVRTC has no host headers, and `long` differs between hosts.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Elements of 16 bits travel as bits, two of them in a u32, the one with the lower index in the lower half.
// These types only say which format the bits are in: `using Element = BFloat16;` in a Config chooses
// instructions, never storage.
struct Float16 {};   // IEEE 754 binary16
struct BFloat16 {};  // the upper half of a binary32

// -inf as a float's bits; there is no INFINITY without <math.h>.
constexpr u32 kNegativeInfinityBits = 0xff800000u;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Where a Config names elements that are not there.
struct NoMask {};

// A tensor map: what bulk copies of tiles know of an array in global memory. Made by the driver (under the emulator, a
// plain struct: cupyflash/backends/tensormap.py makes both) and passed as `const __grid_constant__ TensorMap`.
struct alignas(128) TensorMap {
  u64 opaque[16];
};
