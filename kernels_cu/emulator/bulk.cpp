// cp.async.bulk.tensor. A load lands when nothing else can run: the oldest one, but by chance under a random schedule,
// where it may come at any time before, and under one by priorities. Until then its destination is poison. A store reads shared memory when it is waited for, and writes global memory when
// that is waited for or its thread ends. With late landing off both happen at once.

#include "bulk.h"

#include <algorithm>
#include <cstring>

#include "access.h"
#include "report.h"

namespace emulator {

namespace {

constexpr std::uint32_t kChunkBytes = 16;
constexpr std::uint32_t kLineBytes = 128;
constexpr std::uint32_t kTileAlignment = 128;

constexpr const char* kLoad = "cp.async.bulk.tensor load";
constexpr const char* kStore = "cp.async.bulk.tensor store";

// Where the chunks of a line of 128 bytes go, for the eight lines of a pattern: the figures of the PTX ISA, "Swizzling
// modes". Line and place are bits 7 to 9 and 4 to 6 of the address. The reader in wgmma.cpp has its own formula; the
// two must not know of each other, so that they cannot be wrong together.
constexpr std::uint8_t kPlaces[4][8][8] = {
    {{0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {0, 1, 2, 3, 4, 5, 6, 7}},
    {{0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6}},
    {{0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6},
     {2, 3, 0, 1, 6, 7, 4, 5},
     {3, 2, 1, 0, 7, 6, 5, 4},
     {0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6},
     {2, 3, 0, 1, 6, 7, 4, 5},
     {3, 2, 1, 0, 7, 6, 5, 4}},
    {{0, 1, 2, 3, 4, 5, 6, 7},
     {1, 0, 3, 2, 5, 4, 7, 6},
     {2, 3, 0, 1, 6, 7, 4, 5},
     {3, 2, 1, 0, 7, 6, 5, 4},
     {4, 5, 6, 7, 0, 1, 2, 3},
     {5, 4, 7, 6, 1, 0, 3, 2},
     {6, 7, 4, 5, 2, 3, 0, 1},
     {7, 6, 5, 4, 3, 2, 1, 0}},
};
constexpr std::uint32_t kSpanBytes[] = {~0u, 32, 64, 128};  // of a swizzled row

std::uint32_t place(Swizzle swizzle, std::uint32_t address) {
  const std::uint32_t line = address / kLineBytes % 8;
  const std::uint32_t chunk = address % kLineBytes / kChunkBytes;
  return address - chunk * kChunkBytes + kPlaces[static_cast<int>(swizzle)][line][chunk] * kChunkBytes;
}

// Calls visit(shared_address, global, bytes) for each chunk of the tile, in the order of an unswizzled tile:
// `bytes` of the chunk's 16 are those at `global`, the rest is outside the tensor. A box may begin before the
// tensor, in the middle of a chunk, so that they are not its first: skipped bytes come first.
template <class Visit>
void for_each_chunk(const Tile& tile, Visit visit) {
  const TensorLayout& layout = tile.layout;
  const std::uint32_t row_bytes = layout.box[0] * layout.element_bytes;
  std::uint32_t rows = 1;
  for (std::uint32_t axis = 1; axis < layout.rank; ++axis) rows *= layout.box[axis];
  for (std::uint32_t row = 0; row < rows; ++row) {
    std::uint64_t offset = 0;
    bool inside = true;
    std::uint32_t rest = row;
    for (std::uint32_t axis = 1; axis < layout.rank; ++axis) {
      const std::int64_t index = static_cast<std::int64_t>(tile.coordinates[axis]) + rest % layout.box[axis];
      rest /= layout.box[axis];
      inside = inside && index >= 0 && index < static_cast<std::int64_t>(layout.extents[axis]);
      offset += static_cast<std::uint64_t>(index) * layout.strides[axis - 1];
    }
    for (std::uint32_t byte = 0; byte < row_bytes; byte += kChunkBytes) {
      const std::int64_t begin =
          static_cast<std::int64_t>(tile.coordinates[0]) * layout.element_bytes + static_cast<std::int64_t>(byte);
      const std::int64_t row_end = static_cast<std::int64_t>(layout.extents[0] * layout.element_bytes);
      const std::int64_t first = std::clamp<std::int64_t>(-begin, 0, kChunkBytes);
      const std::int64_t last = std::clamp<std::int64_t>(row_end - begin, first, kChunkBytes);
      const bool any = inside && last > first;
      auto* global = reinterpret_cast<std::byte*>(layout.address + offset + static_cast<std::uint64_t>(begin + first));
      visit(place(layout.swizzle, tile.shared_address + row * row_bytes + byte), any ? global : nullptr,
            any ? static_cast<std::uint32_t>(first) : 0, any ? static_cast<std::uint32_t>(last - first) : 0);
    }
  }
}

TensorLayout read_map(const char* what, const void* map, Site site) {
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0) {
    fail(site, "%s: the tensor map at %p is not aligned to 64 bytes", what, map);
  }
  TensorLayout layout;
  std::memcpy(&layout, map, sizeof layout);
  if (layout.mark != kTensorMark) fail(site, "%s: what is at %p is not a tensor map", what, map);
  return layout;
}

Tile read_tile(const char* what, const void* map, std::uint32_t address, int rank, const int* coordinates, Site site) {
  current_thread().activity = {what, site};
  Tile tile{};
  tile.layout = read_map(what, map, site);
  if (static_cast<std::uint32_t>(rank) != tile.layout.rank) {
    fail(site, "%s: %d coordinates for a tensor map of %u axes", what, rank, tile.layout.rank);
  }
  tile.bytes = tile.layout.element_bytes;
  for (int axis = 0; axis < rank; ++axis) {
    tile.coordinates[axis] = coordinates[axis];
    tile.bytes *= tile.layout.box[axis];
  }
  const std::uint32_t row_bytes = tile.layout.box[0] * tile.layout.element_bytes;
  if (row_bytes > kSpanBytes[static_cast<int>(tile.layout.swizzle)]) {
    fail(site, "%s: rows of %u bytes exceed the %u bytes of the tensor map's swizzle", what, row_bytes,
         kSpanBytes[static_cast<int>(tile.layout.swizzle)]);
  }
  tile.shared_address = address;
  shared_bytes(what, address, tile.bytes, kTileAlignment, site);
  // Faults must come here, where the site is known, and not when the tile lands.
  for_each_chunk(tile, [&](std::uint32_t, const std::byte* global, std::uint32_t, std::uint32_t bytes) {
    if (bytes > 0) probe_global(what, global, bytes, 1, site);
  });
  return tile;
}

std::byte* shared_place(Block& block, std::uint32_t address) { return block.shared + (address - kSharedBase); }

void write_shared(Block& block, const Tile& tile) {
  for_each_chunk(tile, [&](std::uint32_t address, const std::byte* global, std::uint32_t skipped, std::uint32_t bytes) {
    std::byte* chunk = shared_place(block, address);
    std::memset(chunk, 0, kChunkBytes);
    if (bytes > 0) std::memcpy(chunk + skipped, global, bytes);
  });
}

// `shared`: the tile's bytes.
void write_global(const Tile& tile, const std::byte* shared) {
  for_each_chunk(tile, [&](std::uint32_t address, std::byte* global, std::uint32_t skipped, std::uint32_t bytes) {
    if (bytes > 0) std::memcpy(global, shared + (address - tile.shared_address) + skipped, bytes);
  });
}

}  // namespace

void land_bulk_load(Block& block, std::size_t index) {
  const BulkLoad load = block.loads[index];
  block.loads.erase(block.loads.begin() + static_cast<std::ptrdiff_t>(index));
  write_shared(block, load.tile);
  complete_bytes(block, *load.barrier, load.tile.bytes);
}

void bulk_load(std::uint32_t destination, const void* map, std::uint32_t address, int rank, const int* coordinates,
               Site site) {
  maybe_preempt();
  const Tile tile = read_tile(kLoad, map, destination, rank, coordinates, site);
  Mbarrier& barrier = use_mbarrier(kLoad, address, site);
  if (!barrier.fenced) {
    fail(site, "%s: the mbarrier of %s is not visible to it (missing fence_mbarrier_init by the initialising thread?)",
         kLoad, text_of(barrier.site).c_str());
  }
  const Thread& me = current_thread();
  Block& block = *me.block;
  note_async(AccessKind::kBulkLoad, static_cast<std::uint8_t>(me.lane_index), barrier.identity,
             load_time(block, barrier), destination, tile.bytes, site);
  ++block.counters.bulk;
  barrier.loaded = barrier.phase;
  barrier.load = site;
  block.loads.push_back({tile, site, &barrier});
  if (block.launch->options.late_landing != 0) {
    std::memset(shared_place(block, destination), 0xff, tile.bytes);
  } else {
    land_bulk_load(block, block.loads.size() - 1);
  }
}

void bulk_store(const void* map, std::uint32_t source, int rank, const int* coordinates, Site site) {
  maybe_preempt();
  const Tile tile = read_tile(kStore, map, source, rank, coordinates, site);
  Thread& me = current_thread();
  Block& block = *me.block;
  const std::uint32_t when = block.races.past() + 1 + static_cast<std::uint32_t>(me.warp->bulk_stores++);
  note_async(AccessKind::kBulkStore, static_cast<std::uint8_t>(me.lane_index), kFirstStore + me.warp_index, when,
             source, tile.bytes, site);
  ++block.counters.bulk;
  const std::byte* bytes = shared_place(block, source);
  me.stores.pending.push_back({tile, site, when, {bytes, bytes + tile.bytes}, BulkStore::kOpenGroup, false});
  if (block.launch->options.late_landing == 0) write_global(tile, bytes);
}

void bulk_commit(Site) {
  BulkStores& stores = current_thread().stores;
  for (BulkStore& store : stores.pending) {
    if (store.group == BulkStore::kOpenGroup) store.group = stores.groups;
  }
  ++stores.groups;
}

void bulk_wait(int pending_groups, bool only_reads, Site site) {
  Thread& me = current_thread();
  Block& block = *me.block;
  me.activity = {"cp.async.bulk.wait_group", site};
  std::vector<BulkStore>& pending = me.stores.pending;
  // Groups are in the order of issue, open ones last.
  std::size_t done = 0;
  while (done < pending.size() && pending[done].group != BulkStore::kOpenGroup &&
         pending[done].group < me.stores.groups - pending_groups) {
    BulkStore& store = pending[done++];
    if (!store.is_read &&
        std::memcmp(shared_place(block, store.tile.shared_address), store.bytes.data(), store.bytes.size()) != 0) {
      fail(store.site, "%s: shared memory has changed before the store had read it", kStore);
    }
    store.is_read = true;
    std::uint32_t& seen = block.clock_of(me).seen[kFirstStore + me.warp_index];
    seen = std::max(seen, store.when);
  }
  if (only_reads) return;
  for (std::size_t i = 0; i < done; ++i) write_global(pending[i].tile, pending[i].bytes.data());
  pending.erase(pending.begin(), pending.begin() + static_cast<std::ptrdiff_t>(done));
}

void finish_bulk_stores() {
  for (const BulkStore& store : current_thread().stores.pending) {
    if (!store.is_read) {
      fail(store.site, "%s: the thread exits without having waited for it (missing bulk_wait_read?)", kStore);
    }
    write_global(store.tile, store.bytes.data());
  }
}

void prefetch_tensor_map(const void* map, Site site) { read_map("prefetch.tensormap", map, site); }

}  // namespace emulator
