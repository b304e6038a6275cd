// What device code calls: the surface between a compiled kernel and the emulator's runtime.
//
// Everything here is called from a fiber, that is, from inside a kernel, and takes the Site of the
// instruction.
#pragma once

#include <cstddef>
#include <cstdint>

#include "site.h"

// The libraries of kernels and of the runtime hide all symbols but those they mean to share.
#pragma GCC visibility push(default)

namespace emulator {

struct Dim3 {
  unsigned int x, y, z;
};

// What a thread may ask about itself without entering the runtime.
struct Identity {
  int thread_index;  // in the block
  int warp_index;
  int lane_index;
  Dim3 block_index;
  Dim3 grid_size;
};

// The thread whose fiber runs on this OS thread; null outside kernels. `__thread` rather than `thread_local`:
// no wrapper function around each access.
extern __thread Identity* current;

// Shared memory starts above 0, so that an address which forgot the base is out of bounds.
constexpr std::uint32_t kSharedBase = 1024;

enum class Shuffle { kXor, kIdx, kDown };
enum class Vote { kBallot, kAny, kAll };
enum class Format { kFloat16, kBFloat16 };

void sync_warp(Site);
void barrier_sync(int barrier, int num_threads, Site);  // num_threads == 0: the whole block
void barrier_arrive(int barrier, int num_threads, Site);
std::uint32_t shuffle(Shuffle, std::uint32_t value, int operand, Site);
std::uint32_t vote(Vote, bool predicate, Site);
bool elect(Site);

void mbarrier_init(std::uint32_t barrier, std::uint32_t count, Site);
void mbarrier_arrive(std::uint32_t barrier, Site);
void mbarrier_arrive_expect_tx(std::uint32_t barrier, std::uint32_t bytes, Site);
void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity, Site);
void fence_mbarrier_init(Site);
void fence_proxy_async(Site);
void nanosleep(std::uint32_t nanoseconds);

void load_global(void* value, const void* source, std::uint32_t bytes, Site);
void store_global(void* destination, const void* value, std::uint32_t bytes, Site);
std::uint32_t atomic_add(std::uint32_t* address, std::uint32_t value, Site);
float atomic_add(float* address, float value, Site);
std::uint32_t atomic_max(std::uint32_t* address, std::uint32_t value, Site);
float atomic_max(float* address, float value, Site);

void load_shared(void* value, std::uint32_t source, std::uint32_t bytes, Site);
void store_shared(std::uint32_t destination, const void* value, std::uint32_t bytes, Site);

void copy_async(std::uint32_t destination, const void* source, std::uint32_t source_bytes, Site);
void copy_async_commit(Site);
void copy_async_wait(int pending_groups, Site);

void bulk_load(std::uint32_t destination, const void* map, std::uint32_t barrier, int rank, const int* coordinates,
               Site);
void bulk_store(const void* map, std::uint32_t source, int rank, const int* coordinates, Site);
void bulk_commit(Site);
void bulk_wait(int pending_groups, bool only_reads, Site);
void prefetch_tensor_map(const void* map, Site);

void load_matrices(std::uint32_t* frag, int count, bool transposed, std::uint32_t row, Site);
void store_matrices(std::uint32_t row, const std::uint32_t* frag, int count, bool transposed, Site);
void multiply_accumulate(Format, float* acc, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, Site);
void multiply_accumulate_k8(float* acc, const std::uint32_t* a, std::uint32_t b, Site);  // Format::kFloat16

// a: four registers, or null and then the operand is in shared memory at a_descriptor.
void wgmma(Format, float* acc, int num_registers, const std::uint32_t* a, std::uint64_t a_descriptor,
           std::uint64_t b_descriptor, bool accumulate, bool transpose_a, bool transpose_b, Site);
void wgmma_fence(Site);
void wgmma_commit(Site);
void wgmma_wait(int pending_groups, Site);
void set_max_registers(int registers, bool increase, Site);

// Whether this launch has an observer: asked before anything is gathered for it.
extern bool observing;
struct Bytes {
  const void* data;
  std::size_t count;
};
void observe(const char* event, const Bytes* parts, std::size_t num_parts);

}  // namespace emulator

#pragma GCC visibility pop
