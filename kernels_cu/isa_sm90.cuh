// Instructions that sm_90 adds to isa_sm80.cuh, one function for one PTX instruction.
#pragma once

#include "types.cuh"

namespace isa {

// The reverse of ldmatrix: register m's elements (g, 2c) and (g, 2c + 1), with _trans (2c, g) and (2c + 1,
// g), go to the row of matrix m whose address lane 8 m + r gave. All 32 lanes.
__device__ __forceinline__ void stmatrix_x1(u32 row, const u32 (&frag)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row), "r"(frag[0]) : "memory");
}

__device__ __forceinline__ void stmatrix_x2(u32 row, const u32 (&frag)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(frag[0]), "r"(frag[1])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4(u32 row, const u32 (&frag)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(frag[0]),
               "r"(frag[1]), "r"(frag[2]), "r"(frag[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x1_trans(u32 row, const u32 (&frag)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(frag[0]) : "memory");
}

__device__ __forceinline__ void stmatrix_x2_trans(u32 row, const u32 (&frag)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(frag[0]), "r"(frag[1])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(u32 row, const u32 (&frag)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(frag[0]),
               "r"(frag[1]), "r"(frag[2]), "r"(frag[3])
               : "memory");
}

}  // namespace isa
