// Instructions of sm_90a alone, which later GPUs do not have: wgmma, the product of a warpgroup (four neighbouring warps,
// the first one's index a multiple of four), and setmaxnreg.
#pragma once

#include "types.cuh"

namespace isa {

// -----------------------------------------------------------------------------------------------------------
// wgmma_fence: all 32 lanes of the four warps, before the first wgmma and after registers of one were written or waited
// for. wgmma_commit: makes a group of what was issued since the last one. wgmma_wait: returns when at most kPending of
// the latest groups are still under way. From the issue of a wgmma to the wait for it nobody may touch its registers,
// nor write its operands in shared memory.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// acc[64 x N] = a[64 x 16] b[16 x N], added to acc if `accumulate`. N = 2 kRegisters is a multiple of 16 up to 256.
// Warp w of the warpgroup has rows 16 w to 16 w + 15, and lane l of it
//
//     acc[i]  row  g + 8 (i / 2 % 2),  column  8 (i / 4) + 2 c + i % 2        g = l / 4, c = l % 4
//     a[0]    (g,     2c .. 2c + 1)      a[2]  (g,     2c + 8 .. 2c + 9)      as in mma_m16n8k16
//     a[1]    (g + 8, 2c .. 2c + 1)      a[3]  (g + 8, 2c + 8 .. 2c + 9)
//
// so that acc[8 j .. 8 j + 7], packed, are the a of columns 16 j to 16 j + 15. Operands in shared memory are given by
// descriptors (descriptor.cuh): rows of a and columns of b are contiguous along k, or, transposed, along the other
// axis. wgmma_ss: a and b in shared memory; wgmma_rs: a in registers.
//
// An operand of an asm statement is one register, so each N is a function of its own. ISA_TEXT names the registers
// %0, %1, ...; ISA_ACC are the operands of these names.
#define ISA_ACC8(i)                                                                                       \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define ISA_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ISA_TEXT_32 ISA_TEXT_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ISA_TEXT_48 ISA_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define ISA_TEXT_64 ISA_TEXT_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define ISA_TEXT_80 ISA_TEXT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define ISA_TEXT_96 ISA_TEXT_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define ISA_TEXT_112 ISA_TEXT_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ISA_TEXT_128 ISA_TEXT_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ISA_TEXT_144 ISA_TEXT_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define ISA_TEXT_160 ISA_TEXT_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define ISA_TEXT_176 ISA_TEXT_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define ISA_TEXT_192 ISA_TEXT_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define ISA_TEXT_208 ISA_TEXT_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define ISA_TEXT_224 ISA_TEXT_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define ISA_TEXT_240 ISA_TEXT_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define ISA_TEXT_256 ISA_TEXT_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define ISA_ACC_16 ISA_ACC8(0)
#define ISA_ACC_32 ISA_ACC_16, ISA_ACC8(8)
#define ISA_ACC_48 ISA_ACC_32, ISA_ACC8(16)
#define ISA_ACC_64 ISA_ACC_48, ISA_ACC8(24)
#define ISA_ACC_80 ISA_ACC_64, ISA_ACC8(32)
#define ISA_ACC_96 ISA_ACC_80, ISA_ACC8(40)
#define ISA_ACC_112 ISA_ACC_96, ISA_ACC8(48)
#define ISA_ACC_128 ISA_ACC_112, ISA_ACC8(56)
#define ISA_ACC_144 ISA_ACC_128, ISA_ACC8(64)
#define ISA_ACC_160 ISA_ACC_144, ISA_ACC8(72)
#define ISA_ACC_176 ISA_ACC_160, ISA_ACC8(80)
#define ISA_ACC_192 ISA_ACC_176, ISA_ACC8(88)
#define ISA_ACC_208 ISA_ACC_192, ISA_ACC8(96)
#define ISA_ACC_224 ISA_ACC_208, ISA_ACC8(104)
#define ISA_ACC_240 ISA_ACC_224, ISA_ACC8(112)
#define ISA_ACC_256 ISA_ACC_240, ISA_ACC8(120)

#define ISA_WGMMA_OF(Element, ELEMENT, N, kRegisters, R0, R1, R2, R3, R4, R5, R6)                              \
  template <int kTransposeA, int kTransposeB>                                                                  \
  __device__ __forceinline__ void wgmma_ss(Element, float (&acc)[kRegisters], u64 a, u64 b, bool accumulate) { \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %" R2                                     \
                 ", 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ELEMENT "." ELEMENT " {" ISA_TEXT_##N       \
                 "}, %" R0 ", %" R1 ", accumulate, 1, 1, %" R3 ", %" R4 ";\n}"                                 \
                 : ISA_ACC_##N                                                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)), "n"(kTransposeA), "n"(kTransposeB)       \
                 : "memory");                                                                                  \
  }                                                                                                            \
  template <int kTransposeB>                                                                                   \
  __device__ __forceinline__ void wgmma_rs(Element, float (&acc)[kRegisters], const u32(&a)[4], u64 b,         \
                                           bool accumulate) {                                                  \
    asm volatile("{\n.reg .pred accumulate;\nsetp.ne.u32 accumulate, %" R5                                     \
                 ", 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." ELEMENT "." ELEMENT " {" ISA_TEXT_##N       \
                 "}, {%" R0 ", %" R1 ", %" R2 ", %" R3 "}, %" R4 ", accumulate, 1, 1, %" R6 ";\n}"             \
                 : ISA_ACC_##N                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<u32>(accumulate)),      \
                   "n"(kTransposeB)                                                                            \
                 : "memory");                                                                                  \
  }
#define ISA_WGMMA(N, kRegisters, ...)                      \
  ISA_WGMMA_OF(Float16, "f16", N, kRegisters, __VA_ARGS__) \
  ISA_WGMMA_OF(BFloat16, "bf16", N, kRegisters, __VA_ARGS__)

ISA_WGMMA(16, 8, "8", "9", "10", "11", "12", "13", "14")
ISA_WGMMA(32, 16, "16", "17", "18", "19", "20", "21", "22")
ISA_WGMMA(48, 24, "24", "25", "26", "27", "28", "29", "30")
ISA_WGMMA(64, 32, "32", "33", "34", "35", "36", "37", "38")
ISA_WGMMA(80, 40, "40", "41", "42", "43", "44", "45", "46")
ISA_WGMMA(96, 48, "48", "49", "50", "51", "52", "53", "54")
ISA_WGMMA(112, 56, "56", "57", "58", "59", "60", "61", "62")
ISA_WGMMA(128, 64, "64", "65", "66", "67", "68", "69", "70")
ISA_WGMMA(144, 72, "72", "73", "74", "75", "76", "77", "78")
ISA_WGMMA(160, 80, "80", "81", "82", "83", "84", "85", "86")
ISA_WGMMA(176, 88, "88", "89", "90", "91", "92", "93", "94")
ISA_WGMMA(192, 96, "96", "97", "98", "99", "100", "101", "102")
ISA_WGMMA(208, 104, "104", "105", "106", "107", "108", "109", "110")
ISA_WGMMA(224, 112, "112", "113", "114", "115", "116", "117", "118")
ISA_WGMMA(240, 120, "120", "121", "122", "123", "124", "125", "126")
ISA_WGMMA(256, 128, "128", "129", "130", "131", "132", "133", "134")

#undef ISA_WGMMA
#undef ISA_WGMMA_OF
#undef ISA_ACC8
#undef ISA_TEXT_16
#undef ISA_ACC_16
#undef ISA_TEXT_32
#undef ISA_ACC_32
#undef ISA_TEXT_48
#undef ISA_ACC_48
#undef ISA_TEXT_64
#undef ISA_ACC_64
#undef ISA_TEXT_80
#undef ISA_ACC_80
#undef ISA_TEXT_96
#undef ISA_ACC_96
#undef ISA_TEXT_112
#undef ISA_ACC_112
#undef ISA_TEXT_128
#undef ISA_ACC_128
#undef ISA_TEXT_144
#undef ISA_ACC_144
#undef ISA_TEXT_160
#undef ISA_ACC_160
#undef ISA_TEXT_176
#undef ISA_ACC_176
#undef ISA_TEXT_192
#undef ISA_ACC_192
#undef ISA_TEXT_208
#undef ISA_ACC_208
#undef ISA_TEXT_224
#undef ISA_ACC_224
#undef ISA_TEXT_240
#undef ISA_ACC_240
#undef ISA_TEXT_256
#undef ISA_ACC_256

// -----------------------------------------------------------------------------------------------------------
// Registers for each thread: every warp of a warpgroup gives some back, or waits until it has that many. A multiple of
// 8 from 24 to 256. The kernel needs __launch_bounds__; without, the compiler ignores both.

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace isa
