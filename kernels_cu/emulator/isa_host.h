// The functions of isa_sm80.cuh, isa_sm90.cuh and isa_sm90a.cuh for a host compiler, in the same order: each asks the
// emulator for what the instruction does. What the functions mean is said there, not here.
//
// The last parameter of an instruction that can be used wrongly is the place in the kernel that used it;
// callers leave it to its default. isa.cuh includes this file, after types.cuh.
#pragma once

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

// The functions of mathematics, which CUDA declares by itself. They are the C library's; its header for C++ would take
// longer to compile than most kernels do.
#define EMULATOR_OF_ONE(name)   \
  double name(double) noexcept; \
  float name##f(float) noexcept;
#define EMULATOR_OF_TWO(name)           \
  double name(double, double) noexcept; \
  float name##f(float, float) noexcept;
extern "C" {
EMULATOR_OF_ONE(atan)
EMULATOR_OF_ONE(ceil)
EMULATOR_OF_ONE(cos)
EMULATOR_OF_ONE(cosh)
EMULATOR_OF_ONE(exp)
EMULATOR_OF_ONE(exp2)
EMULATOR_OF_ONE(expm1)
EMULATOR_OF_ONE(fabs)
EMULATOR_OF_ONE(floor)
EMULATOR_OF_ONE(log)
EMULATOR_OF_ONE(log10)
EMULATOR_OF_ONE(log1p)
EMULATOR_OF_ONE(log2)
EMULATOR_OF_ONE(rint)
EMULATOR_OF_ONE(sin)
EMULATOR_OF_ONE(sinh)
EMULATOR_OF_ONE(sqrt)
EMULATOR_OF_ONE(tan)
EMULATOR_OF_ONE(tanh)
EMULATOR_OF_ONE(trunc)
EMULATOR_OF_TWO(copysign)
EMULATOR_OF_TWO(fmax)
EMULATOR_OF_TWO(fmin)
EMULATOR_OF_TWO(fmod)
EMULATOR_OF_TWO(pow)
}
#undef EMULATOR_OF_ONE
#undef EMULATOR_OF_TWO

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
inline float max_nan(float a, float b) { return emulator::max_nan(a, b); }
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

inline bool elect_one(Site site = Site::here()) { return emulator::elect(site); }

inline void mbarrier_init(u32 barrier, u32 count, Site site = Site::here()) {
  emulator::mbarrier_init(barrier, count, site);
}
inline void mbarrier_arrive(u32 barrier, Site site = Site::here()) { emulator::mbarrier_arrive(barrier, site); }
inline void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes, Site site = Site::here()) {
  emulator::mbarrier_arrive_expect_tx(barrier, bytes, site);
}
inline void mbarrier_wait(u32 barrier, u32 parity, Site site = Site::here()) {
  emulator::mbarrier_wait(barrier, parity, site);
}
inline void fence_mbarrier_init(Site site = Site::here()) { emulator::fence_mbarrier_init(site); }
inline void fence_proxy_async(Site site = Site::here()) { emulator::fence_proxy_async(site); }

inline void prefetch_tensor_map(const TensorMap* map, Site site = Site::here()) {
  emulator::prefetch_tensor_map(map, site);
}
inline u64 l2_evict_first() { return 0; }
inline u64 l2_evict_normal() { return 0; }
inline u64 l2_evict_last() { return 0; }
inline void bulk_load(u32 destination, const TensorMap* map, u32 barrier, u64 l2_policy, int c0, int c1, int c2,
                      Site site = Site::here()) {
  (void)l2_policy;
  const int coordinates[] = {c0, c1, c2};
  emulator::bulk_load(destination, map, barrier, 3, coordinates, site);
}
inline void bulk_load(u32 destination, const TensorMap* map, u32 barrier, u64 l2_policy, int c0, int c1, int c2, int c3,
                      Site site = Site::here()) {
  (void)l2_policy;
  const int coordinates[] = {c0, c1, c2, c3};
  emulator::bulk_load(destination, map, barrier, 4, coordinates, site);
}
inline void bulk_load(u32 destination, const TensorMap* map, u32 barrier, u64 l2_policy, int c0, int c1, int c2, int c3,
                      int c4, Site site = Site::here()) {
  (void)l2_policy;
  const int coordinates[] = {c0, c1, c2, c3, c4};
  emulator::bulk_load(destination, map, barrier, 5, coordinates, site);
}
inline void bulk_store(const TensorMap* map, u32 source, int c0, int c1, int c2, Site site = Site::here()) {
  const int coordinates[] = {c0, c1, c2};
  emulator::bulk_store(map, source, 3, coordinates, site);
}
inline void bulk_store(const TensorMap* map, u32 source, int c0, int c1, int c2, int c3, Site site = Site::here()) {
  const int coordinates[] = {c0, c1, c2, c3};
  emulator::bulk_store(map, source, 4, coordinates, site);
}
inline void bulk_store(const TensorMap* map, u32 source, int c0, int c1, int c2, int c3, int c4,
                       Site site = Site::here()) {
  const int coordinates[] = {c0, c1, c2, c3, c4};
  emulator::bulk_store(map, source, 5, coordinates, site);
}
inline void bulk_commit(Site site = Site::here()) { emulator::bulk_commit(site); }
template <int kPending>
inline void bulk_wait(Site site = Site::here()) {
  emulator::bulk_wait(kPending, /*only_reads=*/false, site);
}
template <int kPending>
inline void bulk_wait_read(Site site = Site::here()) {
  emulator::bulk_wait(kPending, /*only_reads=*/true, site);
}
inline void nanosleep(u32 nanoseconds) { emulator::nanosleep(nanoseconds); }

inline void wgmma_fence(Site site = Site::here()) { emulator::wgmma_fence(site); }
inline void wgmma_commit(Site site = Site::here()) { emulator::wgmma_commit(site); }
template <int kPending>
inline void wgmma_wait(Site site = Site::here()) {
  emulator::wgmma_wait(kPending, site);
}

inline emulator::Format format_of(Float16) { return emulator::Format::kFloat16; }
inline emulator::Format format_of(BFloat16) { return emulator::Format::kBFloat16; }
template <int kTransposeA, int kTransposeB, class Element, int kRegisters>
inline void wgmma_ss(Element, float (&acc)[kRegisters], u64 a, u64 b, bool accumulate, Site site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters <= 128, "N is a multiple of 16 up to 256");
  emulator::wgmma(format_of(Element()), acc, kRegisters, nullptr, a, b, accumulate, kTransposeA, kTransposeB, site);
}
template <int kTransposeB, class Element, int kRegisters>
inline void wgmma_rs(Element, float (&acc)[kRegisters], const u32 (&a)[4], u64 b, bool accumulate,
                     Site site = Site::here()) {
  static_assert(kRegisters % 8 == 0 && kRegisters <= 128, "N is a multiple of 16 up to 256");
  emulator::wgmma(format_of(Element()), acc, kRegisters, a, 0, b, accumulate, false, kTransposeB, site);
}

template <int kRegisters>
inline void setmaxnreg_dec(Site site = Site::here()) {
  emulator::set_max_registers(kRegisters, /*increase=*/false, site);
}
template <int kRegisters>
inline void setmaxnreg_inc(Site site = Site::here()) {
  emulator::set_max_registers(kRegisters, /*increase=*/true, site);
}

}  // namespace isa
