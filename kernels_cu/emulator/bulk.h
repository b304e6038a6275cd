// Bulk copies of tiles between global and shared memory (TMA): cp.async.bulk.tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.h"

namespace emulator {

struct Block;
struct Mbarrier;

constexpr int kMaxRank = 5;

// How the 16-byte chunks of a tile are exchanged in shared memory.
enum class Swizzle : std::uint32_t { kNone, k32, k64, k128 };

// What a tensor map holds here; the driver's is opaque. cupyflash/backends/tensormap.py makes it. Axis 0 is the one
// whose elements are contiguous.
struct TensorLayout {
  std::uint64_t mark;  // kTensorMark: this is one
  std::uint64_t address;
  std::uint64_t extents[kMaxRank];
  std::uint64_t strides[kMaxRank - 1];  // in bytes, of axes 1 and up
  std::uint32_t box[kMaxRank];
  std::uint32_t rank;
  std::uint32_t element_bytes;
  Swizzle swizzle;
  std::uint64_t unused;
};
static_assert(sizeof(TensorLayout) == 128, "a tensor map has 128 bytes");
constexpr std::uint64_t kTensorMark = 0x70616D2D6F727563;

// A tile: the box of a tensor at some coordinates, and its place in shared memory.
struct Tile {
  TensorLayout layout;
  int coordinates[kMaxRank];
  std::uint32_t shared_address;
  std::uint32_t bytes;  // of the box, whether inside the tensor or not
};

// One that has not landed.
struct BulkLoad {
  Tile tile;
  Site site;
  Mbarrier* barrier;
};

struct BulkStore {
  Tile tile;
  Site site;
  std::uint32_t when;            // in the race detector's count
  std::vector<std::byte> bytes;  // of shared memory at the time of issue
  int group;                     // kOpenGroup: not committed
  bool is_read;                  // shared memory may change; global memory is written at the latest possible time

  static constexpr int kOpenGroup = -1;
};

// Those of one thread that are not written, in the order of issue.
struct BulkStores {
  std::vector<BulkStore> pending;
  int groups = 0;  // committed

  void reset() {
    pending.clear();
    groups = 0;
  }
};

void land_bulk_load(Block& block, std::size_t index);

// When the current thread exits: fails if stores are under way that it has not waited for.
void finish_bulk_stores();

}  // namespace emulator
