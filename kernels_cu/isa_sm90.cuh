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

// The same lane of every warp, every time: the one that starts bulk copies. All 32 lanes.
__device__ __forceinline__ bool elect_one() {
  u32 result;
  asm volatile("{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\nselp.u32 %0, 1, 0, elected;\n}"
               : "=r"(result));
  return result != 0;
}

// -----------------------------------------------------------------------------------------------------------
// Barriers in shared memory, 8 bytes at multiples of 8. A phase is complete when `count` arrivals have come, and all
// the bytes that they announced; then the next phase begins. Phases are waited for by parity: 0 for the first, then
// 1, 0, 1, ... Waiting for parity 1 before the first phase is complete returns at once.

// One thread. Others may use the barrier after a barrier of threads; bulk loads after fence_mbarrier_init.
__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Announces bytes of bulk loads, then arrives. Parts of a box that are outside the tensor count as bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// By the thread that initialised the barriers.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// By every thread that wrote shared memory with st_shared, stmatrix or cp_async, before a barrier after which wgmma or
// bulk copies touch what it wrote.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -----------------------------------------------------------------------------------------------------------
// Bulk copies of tiles. One thread starts a copy. A tile is the map's box at the coordinates of its first element,
// axis 0 first; it lies in shared memory at a multiple of 128 bytes, for a swizzle of 128 bytes at one of 1024, axis 0
// contiguous. Elements outside the tensor are loaded as zeros and not stored.

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What the L2 cache is to do with what is loaded.
__device__ __forceinline__ u64 l2_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 l2_evict_normal() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 l2_evict_last() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// From global to shared memory. Completes bytes at the mbarrier.
__device__ __forceinline__ void bulk_load(u32 destination, const TensorMap* map, u32 barrier, u64 l2_policy, int c0,
                                          int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(l2_policy)
      : "memory");
}

__device__ __forceinline__ void bulk_load(u32 destination, const TensorMap* map, u32 barrier, u64 l2_policy, int c0,
                                          int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(l2_policy)
      : "memory");
}

__device__ __forceinline__ void bulk_load(u32 destination, const TensorMap* map, u32 barrier, u64 l2_policy, int c0,
                                          int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(l2_policy)
      : "memory");
}

// From shared to global memory, as part of the thread's open group.
__device__ __forceinline__ void bulk_store(const TensorMap* map, u32 source, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

__device__ __forceinline__ void bulk_store(const TensorMap* map, u32 source, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

__device__ __forceinline__ void bulk_store(const TensorMap* map, u32 source, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns when at most kPending of this thread's latest groups are still under way; with _read, when those before
// them have read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Does nothing for about that time. A branch to it that depends on a value keeps the compiler from moving a later wait
// to before the value is known.
__device__ __forceinline__ void nanosleep(u32 nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory");
}

}  // namespace isa
