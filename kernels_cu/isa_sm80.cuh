// Instructions of sm_80 and later, one function for one PTX instruction, in the order of emulator/isa_host.h.
//
// Notation: g = lane / 4, c = lane % 4. A fragment's picture names, for one lane, the (row, column) of each
// register's elements; a register of two 16-bit elements holds the lower column (or k) in its lower half. The
// pictures are those of the PTX ISA, "Matrix multiply-accumulate" and "ldmatrix"; tests/kernels holds the
// emulator to them.
//
// Rules for all functions here:
// - Shared memory is addressed by the 32-bit number that shared_base() starts, global memory by pointer.
// - Functions that name a warp ("all 32 lanes") must be reached by all its lanes together.
// - Whatever reads or writes memory, or synchronises, is `volatile` with a "memory" clobber: the compiler
//   may not move other accesses across it.
#pragma once

#include "types.cuh"

namespace isa {

// -----------------------------------------------------------------------------------------------------------
// Who am I

// Divided as what they are, unsigned: the compiler then knows the ranges, and addresses made of these numbers
// take less arithmetic and fewer registers. A block has up to 1024 threads.
__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x % 1024); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int block_index_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_index_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int block_index_z() { return static_cast<int>(blockIdx.z); }
__device__ __forceinline__ int grid_size_x() { return static_cast<int>(gridDim.x); }
__device__ __forceinline__ int grid_size_y() { return static_cast<int>(gridDim.y); }
__device__ __forceinline__ int grid_size_z() { return static_cast<int>(gridDim.z); }

// -----------------------------------------------------------------------------------------------------------
// Bits and numbers

__device__ __forceinline__ u32 float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(u32 bits) { return __uint_as_float(bits); }

// a * b, rounded. Compilers may fuse a plain product into an addition that follows and round once; not these.
__device__ __forceinline__ float mul_rn(float a, float b) {
  float result;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ double mul_rn(double a, double b) {
  double result;
  asm("mul.rn.f64 %0, %1, %2;" : "=d"(result) : "d"(a), "d"(b));
  return result;
}

// A double is two words, the lower one in x.
__device__ __forceinline__ uint2 double_bits(double value) {
  return {static_cast<u32>(__double2loint(value)), static_cast<u32>(__double2hiint(value))};
}
__device__ __forceinline__ double bits_double(uint2 bits) {
  return __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x));
}

// 2^x with a relative error of 2^-22; results below 2^-126 are 0, and 2^-inf = 0.
__device__ __forceinline__ float ex2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger one, or NaN where one of them is; fmaxf gives the other one then. Since sm_80.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Round to nearest even. The instruction names the upper element first.
__device__ __forceinline__ u32 pack_f16x2(float lower, float upper) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
  return packed;
}

__device__ __forceinline__ u32 pack_bf16x2(float lower, float upper) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
  return packed;
}

// The same in what sm_75 has.
__device__ __forceinline__ u32 pack_f16x2_sm75(float lower, float upper) {
  u32 packed;
  asm("{\n.reg .b16 lower, upper;\ncvt.rn.f16.f32 lower, %1;\ncvt.rn.f16.f32 upper, %2;\n"
      "mov.b32 %0, {lower, upper}; }"
      : "=r"(packed)
      : "f"(lower), "f"(upper));
  return packed;
}

// bits: one element in the lower half.
__device__ __forceinline__ float unpack_f16(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
  return value;
}

__device__ __forceinline__ float unpack_bf16(u32 bits) { return __uint_as_float(bits << 16); }

// -----------------------------------------------------------------------------------------------------------
// Order and company

__device__ __forceinline__ void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
__device__ __forceinline__ void sync_threads() { asm volatile("bar.sync 0;" ::: "memory"); }

// Named barriers 1 to 15 (0 is sync_threads). num_threads counts those that sync and those that only arrive;
// a multiple of 32, since a warp arrives as a whole.
__device__ __forceinline__ void barrier_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// The value of lane ^ lane_mask, of source_lane, of lane + delta (a lane past the end keeps its own). All 32
// lanes.
__device__ __forceinline__ u32 shuffle_xor(u32 value, int lane_mask) {
  u32 result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(result) : "r"(value), "r"(lane_mask));
  return result;
}

__device__ __forceinline__ u32 shuffle_idx(u32 value, int source_lane) {
  u32 result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(result) : "r"(value), "r"(source_lane));
  return result;
}

__device__ __forceinline__ u32 shuffle_down(u32 value, int delta) {
  u32 result;
  asm volatile("shfl.sync.down.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(result) : "r"(value), "r"(delta));
  return result;
}

__device__ __forceinline__ float shuffle_xor(float value, int lane_mask) {
  return bits_float(shuffle_xor(float_bits(value), lane_mask));
}
__device__ __forceinline__ float shuffle_idx(float value, int source_lane) {
  return bits_float(shuffle_idx(float_bits(value), source_lane));
}
__device__ __forceinline__ float shuffle_down(float value, int delta) {
  return bits_float(shuffle_down(float_bits(value), delta));
}
__device__ __forceinline__ double shuffle_xor(double value, int lane_mask) {
  const uint2 bits = double_bits(value);
  return bits_double({shuffle_xor(bits.x, lane_mask), shuffle_xor(bits.y, lane_mask)});
}

// Bit i is lane i's predicate. All 32 lanes.
__device__ __forceinline__ u32 ballot(bool predicate) {
  u32 votes;
  asm volatile("{\n.reg .pred vote;\nsetp.ne.u32 vote, %1, 0;\nvote.sync.ballot.b32 %0, vote, 0xffffffff;\n}"
               : "=r"(votes)
               : "r"(static_cast<u32>(predicate)));
  return votes;
}

__device__ __forceinline__ bool any(bool predicate) {
  u32 result;
  asm volatile(
      "{\n.reg .pred vote, result;\nsetp.ne.u32 vote, %1, 0;\nvote.sync.any.pred result, vote, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, result;\n}"
      : "=r"(result)
      : "r"(static_cast<u32>(predicate)));
  return result != 0;
}

__device__ __forceinline__ bool all(bool predicate) {
  u32 result;
  asm volatile(
      "{\n.reg .pred vote, result;\nsetp.ne.u32 vote, %1, 0;\nvote.sync.all.pred result, vote, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, result;\n}"
      : "=r"(result)
      : "r"(static_cast<u32>(predicate)));
  return result != 0;
}

// -----------------------------------------------------------------------------------------------------------
// Global memory. Pointers are aligned to the access's size.

// One byte or two travel in the lowest bits of a register.
__device__ __forceinline__ u32 ldg_1(const void* source) {
  u32 value;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ u32 ldg_2(const void* source) {
  u32 value;
  asm volatile("ld.global.u16 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ u32 ldg_4(const void* source) {
  u32 value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint2 ldg_8(const void* source) {
  uint2 value;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint4 ldg_16(const void* source) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

__device__ __forceinline__ void stg_1(void* destination, u32 value) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(destination), "r"(value) : "memory");
}

__device__ __forceinline__ void stg_2(void* destination, u32 value) {
  asm volatile("st.global.u16 [%0], %1;" ::"l"(destination), "r"(value) : "memory");
}

__device__ __forceinline__ void stg_4(void* destination, u32 value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(destination), "r"(value) : "memory");
}

__device__ __forceinline__ void stg_8(void* destination, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(destination), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ void stg_16(void* destination, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// Each returns the value from before.
__device__ __forceinline__ u32 atomic_add(u32* address, u32 value) {
  u32 before;
  asm volatile("atom.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ float atomic_add(float* address, float value) {
  float before;
  asm volatile("atom.global.add.f32 %0, [%1], %2;" : "=f"(before) : "l"(address), "f"(value) : "memory");
  return before;
}

__device__ __forceinline__ u32 atomic_max(u32* address, u32 value) {
  u32 before;
  asm volatile("atom.global.max.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

// There is no atom.max.f32. As integers, floats >= 0 are ordered like floats and those below 0 the other way
// round, and every negative float is, as a signed integer, below every positive one. value is not a NaN.
__device__ __forceinline__ float atomic_max(float* address, float value) {
  u32 before;
  if (static_cast<int>(float_bits(value)) >= 0) {
    asm volatile("atom.global.max.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(float_bits(value)) : "memory");
  } else {
    asm volatile("atom.global.min.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(float_bits(value)) : "memory");
  }
  return bits_float(before);
}

// -----------------------------------------------------------------------------------------------------------
// Shared memory. Addresses are aligned to the access's size.

// Where the block's dynamic shared memory starts, aligned to 1024 bytes: what 128-byte swizzles will need.
__device__ __forceinline__ u32 shared_base() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return static_cast<u32>(__cvta_generic_to_shared(dynamic_shared_memory));
}

__device__ __forceinline__ u32 ld_shared_4(u32 source) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint2 ld_shared_8(u32 source) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint4 ld_shared_16(u32 source) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(source)
               : "memory");
  return value;
}

__device__ __forceinline__ void st_shared_4(u32 destination, u32 value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(destination), "r"(value) : "memory");
}

__device__ __forceinline__ void st_shared_8(u32 destination, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(destination), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ void st_shared_16(u32 destination, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(destination), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// -----------------------------------------------------------------------------------------------------------
// Asynchronous copies, global to shared, 16 bytes. The first source_bytes come from source, the rest are
// zeros; with 0 nothing is read. The bytes are there for the copying thread after its cp_async_wait, for
// others after a barrier too.

__device__ __forceinline__ void cp_async_16(u32 destination, const void* source, u32 source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most kPending of this thread's latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// -----------------------------------------------------------------------------------------------------------
// Matrices

// Loads 1, 2 or 4 matrices of 8 x 8 elements of 16 bits. Lane 8 m + r gives the address of matrix m's row r
// (16 bytes, 16-byte aligned); the other lanes' addresses are not used. Register m holds matrix m's elements
// (g, 2c) and (g, 2c + 1); with _trans (2c, g) and (2c + 1, g). All 32 lanes.
__device__ __forceinline__ void ldmatrix_x1(u32 (&frag)[1], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(frag[0]) : "r"(row) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(u32 (&frag)[2], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(frag[0]), "=r"(frag[1])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(u32 (&frag)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(u32 (&frag)[1], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(frag[0]) : "r"(row) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&frag)[2], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(frag[0]), "=r"(frag[1])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&frag)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(frag[0]), "=r"(frag[1]), "=r"(frag[2]), "=r"(frag[3])
               : "r"(row)
               : "memory");
}

// acc[16 x 8] += a[16 x 16] b[16 x 8], accumulated in float. All 32 lanes.
//
//     a[0]  (g,     2c .. 2c + 1)           b0  k = 2c .. 2c + 1,      n = g
//     a[1]  (g + 8, 2c .. 2c + 1)           b1  k = 2c + 8 .. 2c + 9,  n = g
//     a[2]  (g,     2c + 8 .. 2c + 9)
//     a[3]  (g + 8, 2c + 8 .. 2c + 9)       acc[0], acc[1]  (g,     2c), (g,     2c + 1)
//                                           acc[2], acc[3]  (g + 8, 2c), (g + 8, 2c + 1)
//
// Two neighbouring accumulators, packed, are therefore the a of the next product: P goes from Q K^T to P V
// without leaving its lane.
__device__ __forceinline__ void mma_m16n8k16(Float16, float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16(BFloat16, float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc[16 x 8] += a[16 x 8] b[8 x 8]: the first half of the product above, with a[0], a[1] and b0, or its second
// half, with a[2], a[3] and b1. All that sm_75 has. All 32 lanes.
__device__ __forceinline__ void mma_m16n8k8(Float16, float (&acc)[4], u32 a0, u32 a1, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// The same choice of format for the conversions above.
__device__ __forceinline__ u32 pack(Float16, float lower, float upper) { return pack_f16x2(lower, upper); }
__device__ __forceinline__ u32 pack(BFloat16, float lower, float upper) { return pack_bf16x2(lower, upper); }

}  // namespace isa
