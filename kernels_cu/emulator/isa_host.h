// The functions of isa_sm80.cuh and isa_sm90.cuh for a host compiler, in the same order: each asks the
// emulator for what the instruction does. What the functions mean is said there, not here.
//
// The last parameter of an instruction that can be used wrongly is the place in the kernel that used it;
// callers leave it to its default. isa.cuh includes this file, after types.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"
#include "numeric.h"

// CUDA's words, for a compiler that does not know them. __noinline__ is left alone: libstdc++ uses it as an
// attribute.
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

namespace isa {

using emulator::Site;

inline int thread_index() { return emulator::current->thread_index; }
inline int warp_index() { return emulator::current->warp_index; }
inline int lane_index() { return emulator::current->lane_index; }
inline int block_index_x() { return static_cast<int>(emulator::current->block_index.x); }
inline int block_index_y() { return static_cast<int>(emulator::current->block_index.y); }
inline int block_index_z() { return static_cast<int>(emulator::current->block_index.z); }
inline int grid_size_x() { return static_cast<int>(emulator::current->grid_size.x); }
inline int grid_size_y() { return static_cast<int>(emulator::current->grid_size.y); }
inline int grid_size_z() { return static_cast<int>(emulator::current->grid_size.z); }

inline u32 float_bits(float value) { return emulator::bits_of(value); }
inline float bits_float(u32 bits) { return emulator::float_of(bits); }
inline uint2 double_bits(double value) {
  std::uint64_t whole;
  std::memcpy(&whole, &value, sizeof whole);
  return {static_cast<u32>(whole), static_cast<u32>(whole >> 32)};
}
inline double bits_double(uint2 bits) {
  const std::uint64_t whole = bits.x | static_cast<std::uint64_t>(bits.y) << 32;
  double value;
  std::memcpy(&value, &whole, sizeof value);
  return value;
}
// Kernels are compiled with -ffp-contract=off.
inline float mul_rn(float a, float b) { return a * b; }
inline double mul_rn(double a, double b) { return a * b; }
inline float ex2(float x) { return emulator::ex2_approx_ftz(x); }
inline u32 pack_f16x2(float lower, float upper) {
  return emulator::f16_from_float(lower) | static_cast<u32>(emulator::f16_from_float(upper)) << 16;
}
inline u32 pack_bf16x2(float lower, float upper) {
  return emulator::bf16_from_float(lower) | static_cast<u32>(emulator::bf16_from_float(upper)) << 16;
}
inline u32 pack_f16x2_sm75(float lower, float upper) { return pack_f16x2(lower, upper); }
inline float unpack_f16(u32 bits) { return emulator::float_from_f16(static_cast<u16>(bits)); }
inline float unpack_bf16(u32 bits) { return emulator::float_from_bf16(static_cast<u16>(bits)); }

inline void sync_warp(Site site = Site::here()) { emulator::sync_warp(site); }
inline void sync_threads(Site site = Site::here()) { emulator::barrier_sync(0, 0, site); }
inline void barrier_sync(int barrier, int num_threads, Site site = Site::here()) {
  emulator::barrier_sync(barrier, num_threads, site);
}
inline void barrier_arrive(int barrier, int num_threads, Site site = Site::here()) {
  emulator::barrier_arrive(barrier, num_threads, site);
}

inline u32 shuffle_xor(u32 value, int lane_mask, Site site = Site::here()) {
  return emulator::shuffle(emulator::Shuffle::kXor, value, lane_mask, site);
}
inline u32 shuffle_idx(u32 value, int source_lane, Site site = Site::here()) {
  return emulator::shuffle(emulator::Shuffle::kIdx, value, source_lane, site);
}
inline u32 shuffle_down(u32 value, int delta, Site site = Site::here()) {
  return emulator::shuffle(emulator::Shuffle::kDown, value, delta, site);
}
inline float shuffle_xor(float value, int lane_mask, Site site = Site::here()) {
  return bits_float(shuffle_xor(float_bits(value), lane_mask, site));
}
inline float shuffle_idx(float value, int source_lane, Site site = Site::here()) {
  return bits_float(shuffle_idx(float_bits(value), source_lane, site));
}
inline float shuffle_down(float value, int delta, Site site = Site::here()) {
  return bits_float(shuffle_down(float_bits(value), delta, site));
}
inline double shuffle_xor(double value, int lane_mask, Site site = Site::here()) {
  const uint2 bits = double_bits(value);
  const u32 lower = shuffle_xor(bits.x, lane_mask, site);
  return bits_double({lower, shuffle_xor(bits.y, lane_mask, site)});
}

inline u32 ballot(bool predicate, Site site = Site::here()) {
  return emulator::vote(emulator::Vote::kBallot, predicate, site);
}
inline bool any(bool predicate, Site site = Site::here()) {
  return emulator::vote(emulator::Vote::kAny, predicate, site) != 0;
}
inline bool all(bool predicate, Site site = Site::here()) {
  return emulator::vote(emulator::Vote::kAll, predicate, site) != 0;
}

inline u32 ldg_1(const void* source, Site site = Site::here()) {
  unsigned char value;
  emulator::load_global(&value, source, sizeof value, site);
  return value;
}
inline u32 ldg_2(const void* source, Site site = Site::here()) {
  u16 value;
  emulator::load_global(&value, source, sizeof value, site);
  return value;
}
inline u32 ldg_4(const void* source, Site site = Site::here()) {
  u32 value;
  emulator::load_global(&value, source, sizeof value, site);
  return value;
}
inline uint2 ldg_8(const void* source, Site site = Site::here()) {
  uint2 value;
  emulator::load_global(&value, source, sizeof value, site);
  return value;
}
inline uint4 ldg_16(const void* source, Site site = Site::here()) {
  uint4 value;
  emulator::load_global(&value, source, sizeof value, site);
  return value;
}
inline void stg_1(void* destination, u32 value, Site site = Site::here()) {
  emulator::store_global(destination, &value, 1, site);
}
inline void stg_2(void* destination, u32 value, Site site = Site::here()) {
  emulator::store_global(destination, &value, sizeof(u16), site);
}
inline void stg_4(void* destination, u32 value, Site site = Site::here()) {
  emulator::store_global(destination, &value, sizeof value, site);
}
inline void stg_8(void* destination, uint2 value, Site site = Site::here()) {
  emulator::store_global(destination, &value, sizeof value, site);
}
inline void stg_16(void* destination, uint4 value, Site site = Site::here()) {
  emulator::store_global(destination, &value, sizeof value, site);
}

inline u32 atomic_add(u32* address, u32 value, Site site = Site::here()) {
  return emulator::atomic_add(address, value, site);
}
inline float atomic_add(float* address, float value, Site site = Site::here()) {
  return emulator::atomic_add(address, value, site);
}
inline u32 atomic_max(u32* address, u32 value, Site site = Site::here()) {
  return emulator::atomic_max(address, value, site);
}
inline float atomic_max(float* address, float value, Site site = Site::here()) {
  return emulator::atomic_max(address, value, site);
}

inline u32 shared_base() { return emulator::kSharedBase; }
inline u32 ld_shared_4(u32 source, Site site = Site::here()) {
  u32 value;
  emulator::load_shared(&value, source, sizeof value, site);
  return value;
}
inline uint2 ld_shared_8(u32 source, Site site = Site::here()) {
  uint2 value;
  emulator::load_shared(&value, source, sizeof value, site);
  return value;
}
inline uint4 ld_shared_16(u32 source, Site site = Site::here()) {
  uint4 value;
  emulator::load_shared(&value, source, sizeof value, site);
  return value;
}
inline void st_shared_4(u32 destination, u32 value, Site site = Site::here()) {
  emulator::store_shared(destination, &value, sizeof value, site);
}
inline void st_shared_8(u32 destination, uint2 value, Site site = Site::here()) {
  emulator::store_shared(destination, &value, sizeof value, site);
}
inline void st_shared_16(u32 destination, uint4 value, Site site = Site::here()) {
  emulator::store_shared(destination, &value, sizeof value, site);
}

inline void cp_async_16(u32 destination, const void* source, u32 source_bytes, Site site = Site::here()) {
  emulator::copy_async(destination, source, source_bytes, site);
}
inline void cp_async_commit(Site site = Site::here()) { emulator::copy_async_commit(site); }
template <int kPending>
inline void cp_async_wait(Site site = Site::here()) {
  emulator::copy_async_wait(kPending, site);
}

inline void ldmatrix_x1(u32 (&frag)[1], u32 row, Site site = Site::here()) {
  emulator::load_matrices(frag, 1, false, row, site);
}
inline void ldmatrix_x2(u32 (&frag)[2], u32 row, Site site = Site::here()) {
  emulator::load_matrices(frag, 2, false, row, site);
}
inline void ldmatrix_x4(u32 (&frag)[4], u32 row, Site site = Site::here()) {
  emulator::load_matrices(frag, 4, false, row, site);
}
inline void ldmatrix_x1_trans(u32 (&frag)[1], u32 row, Site site = Site::here()) {
  emulator::load_matrices(frag, 1, true, row, site);
}
inline void ldmatrix_x2_trans(u32 (&frag)[2], u32 row, Site site = Site::here()) {
  emulator::load_matrices(frag, 2, true, row, site);
}
inline void ldmatrix_x4_trans(u32 (&frag)[4], u32 row, Site site = Site::here()) {
  emulator::load_matrices(frag, 4, true, row, site);
}

inline void mma_m16n8k16(Float16, float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site = Site::here()) {
  emulator::multiply_accumulate(emulator::Format::kFloat16, acc, a, b0, b1, site);
}
inline void mma_m16n8k16(BFloat16, float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site = Site::here()) {
  emulator::multiply_accumulate(emulator::Format::kBFloat16, acc, a, b0, b1, site);
}
inline void mma_m16n8k8(Float16, float (&acc)[4], u32 a0, u32 a1, u32 b, Site site = Site::here()) {
  const u32 a[2] = {a0, a1};
  emulator::multiply_accumulate_k8(acc, a, b, site);
}
inline u32 pack(Float16, float lower, float upper) { return pack_f16x2(lower, upper); }
inline u32 pack(BFloat16, float lower, float upper) { return pack_bf16x2(lower, upper); }

inline void stmatrix_x1(u32 row, const u32 (&frag)[1], Site site = Site::here()) {
  emulator::store_matrices(row, frag, 1, false, site);
}
inline void stmatrix_x2(u32 row, const u32 (&frag)[2], Site site = Site::here()) {
  emulator::store_matrices(row, frag, 2, false, site);
}
inline void stmatrix_x4(u32 row, const u32 (&frag)[4], Site site = Site::here()) {
  emulator::store_matrices(row, frag, 4, false, site);
}
inline void stmatrix_x1_trans(u32 row, const u32 (&frag)[1], Site site = Site::here()) {
  emulator::store_matrices(row, frag, 1, true, site);
}
inline void stmatrix_x2_trans(u32 row, const u32 (&frag)[2], Site site = Site::here()) {
  emulator::store_matrices(row, frag, 2, true, site);
}
inline void stmatrix_x4_trans(u32 row, const u32 (&frag)[4], Site site = Site::here()) {
  emulator::store_matrices(row, frag, 4, true, site);
}

}  // namespace isa
