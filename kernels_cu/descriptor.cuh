// The 64-bit descriptors by which wgmma finds its operands in shared memory. PTX ISA, "Asynchronous warpgroup level
// matrix shared memory layout".
#pragma once

#include "isa.cuh"

// How rows of a tile are swizzled; the numbers are those of the descriptor. Tensor maps have numbers of their own.
enum class OperandSwizzle : u32 { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// An operand lies in patterns of eight rows of S bytes, S = 128, 64 or 32 being the span of the swizzle, as a bulk load
// with that swizzle leaves them. Patterns begin at multiples of 8 S bytes.
//
//     not transposed: S / 2 elements along k in a row, eight rows of a (columns of b) in a pattern
//         stride_bytes   from eight rows to the next eight
//         leading_bytes  not used
//         the next 16 of k are 32 bytes further in the same row
//     transposed: S / 2 elements along m (or n) in a row, eight of k in a pattern
//         stride_bytes   from eight of k to the next eight
//         leading_bytes  from S / 2 of m or n to the next
__device__ __forceinline__ constexpr u64 matrix_descriptor(u32 start, u32 leading_bytes, u32 stride_bytes,
                                                           OperandSwizzle swizzle) {
  return static_cast<u64>((start & 0x3ffff) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
         static_cast<u64>(stride_bytes >> 4) << 32 | static_cast<u64>(swizzle) << 62;
}
