// Loads, stores and asynchronous copies of single threads.

#include "access.h"

#include <cstring>

#include "mbarrier.h"
#include "numeric.h"

namespace emulator {

std::byte* shared_bytes(const char* what, std::uint32_t address, std::uint32_t bytes, std::uint32_t alignment,
                        Site site) {
  Block& block = *current_thread().block;
  const std::uint32_t available = block.launch->shared_bytes;
  if (address % alignment != 0) {
    fail(site, "%s: the shared address shared+0x%x is not a multiple of %u", what, address - kSharedBase, alignment);
  }
  if (address < kSharedBase || static_cast<std::uint64_t>(address) + bytes > kSharedBase + available) {
    fail(site, "%s: %u bytes at shared%+lld are outside the block's %u bytes of shared memory", what, bytes,
         static_cast<long long>(address) - kSharedBase, available);
  }
  if (!block.mbarriers.empty()) check_no_mbarrier(what, address, bytes, site);
  return block.shared + (address - kSharedBase);
}

void note_shared(AccessKind kind, std::uint8_t lane, std::uint32_t address, std::uint32_t bytes, Site site) {
  const Thread& me = current_thread();
  Block& block = *me.block;
  if (!block.races.enabled()) return;
  char report[512];
  if (!block.races.access(block.clock_of(me), me.warp_index, lane, kind, address - kSharedBase, bytes, site, report,
                          sizeof report)) {
    fail(site, "%s", report);
  }
}

void note_async(AccessKind kind, std::uint8_t lane, int identity, std::uint32_t when, std::uint32_t address,
                std::uint32_t bytes, Site site) {
  const Thread& me = current_thread();
  Block& block = *me.block;
  if (!block.races.enabled()) return;
  char report[512];
  if (!block.races.access_async(block.clock_of(me), me.warp_index, lane, identity, when, kind, address - kSharedBase,
                                bytes, site, report, sizeof report)) {
    fail(site, "%s", report);
  }
}

void probe_global(const char* what, const void* address, std::uint32_t bytes, std::uint32_t alignment, Site site) {
  Thread& me = current_thread();
  me.activity = {what, site};
  if (reinterpret_cast<std::uintptr_t>(address) % alignment != 0) {
    fail(site, "%s: the global address %p is not a multiple of %u", what, address, alignment);
  }
  const auto* probe = static_cast<const volatile std::byte*>(address);
  (void)probe[0];
  (void)probe[bytes - 1];
}

void load_global(void* value, const void* source, std::uint32_t bytes, Site site) {
  maybe_preempt();
  probe_global("ld.global", source, bytes, bytes, site);
  const Thread& me = current_thread();
  Block& block = *me.block;
  if (block.launch->options.counters != 0) {
    me.warp->accesses.global(block.counters.ld_global, site, me.lane_index, reinterpret_cast<std::uintptr_t>(source),
                             bytes);
  }
  std::memcpy(value, source, bytes);
}

void store_global(void* destination, const void* value, std::uint32_t bytes, Site site) {
  maybe_preempt();
  probe_global("st.global", destination, bytes, bytes, site);
  const Thread& me = current_thread();
  Block& block = *me.block;
  if (block.launch->options.counters != 0) {
    me.warp->accesses.global(block.counters.st_global, site, me.lane_index,
                             reinterpret_cast<std::uintptr_t>(destination), bytes);
  }
  std::memcpy(destination, value, bytes);
}

namespace {

// Blocks run on several OS threads, so these are atomic on the host as well.
template <class Combine>
std::uint32_t atomic_update(std::uint32_t* address, Site site, Combine combine) {
  maybe_preempt();
  probe_global("atom.global", address, sizeof *address, sizeof *address, site);
  std::uint32_t before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, combine(before), /*weak=*/true, __ATOMIC_ACQ_REL,
                                      __ATOMIC_RELAXED)) {
  }
  return before;
}

}  // namespace

std::uint32_t atomic_add(std::uint32_t* address, std::uint32_t value, Site site) {
  return atomic_update(address, site, [=](std::uint32_t before) { return before + value; });
}

float atomic_add(float* address, float value, Site site) {
  return float_of(atomic_update(reinterpret_cast<std::uint32_t*>(address), site,
                                [=](std::uint32_t before) { return bits_of(float_of(before) + value); }));
}

std::uint32_t atomic_max(std::uint32_t* address, std::uint32_t value, Site site) {
  return atomic_update(address, site, [=](std::uint32_t before) { return before < value ? value : before; });
}

// The two integer instructions that isa_sm80.cuh composes, not a maximum of floats.
float atomic_max(float* address, float value, Site site) {
  const std::uint32_t bits = bits_of(value);
  auto* word = reinterpret_cast<std::uint32_t*>(address);
  if (static_cast<std::int32_t>(bits) >= 0) {
    return float_of(atomic_update(word, site, [=](std::uint32_t before) {
      return static_cast<std::int32_t>(before) < static_cast<std::int32_t>(bits) ? bits : before;
    }));
  }
  return float_of(atomic_update(word, site, [=](std::uint32_t before) { return bits < before ? bits : before; }));
}

void load_shared(void* value, std::uint32_t source, std::uint32_t bytes, Site site) {
  const std::byte* place = shared_bytes("ld.shared", source, bytes, bytes, site);
  maybe_preempt();
  const Thread& me = current_thread();
  note_shared(AccessKind::kLoad, static_cast<std::uint8_t>(me.lane_index), source, bytes, site);
  Block& block = *me.block;
  if (block.launch->options.counters != 0) {
    me.warp->accesses.shared(block.counters.ld_shared, site, me.lane_index, source, bytes);
  }
  std::memcpy(value, place, bytes);
}

void store_shared(std::uint32_t destination, const void* value, std::uint32_t bytes, Site site) {
  std::byte* place = shared_bytes("st.shared", destination, bytes, bytes, site);
  maybe_preempt();
  const Thread& me = current_thread();
  note_shared(AccessKind::kStore, static_cast<std::uint8_t>(me.lane_index), destination, bytes, site);
  Block& block = *me.block;
  if (block.launch->options.counters != 0) {
    me.warp->accesses.shared(block.counters.st_shared, site, me.lane_index, destination, bytes);
  }
  std::memcpy(place, value, bytes);
}

// -----------------------------------------------------------------------------------------------------------
// cp.async. A copy lands when its group is waited for, as late as the instruction allows; until then its
// destination is poison. With late landing off it lands at once, which is as early as the instruction allows.

namespace {

constexpr std::uint32_t kCopyBytes = 16;

void land(const Block& block, const PendingCopy& copy) {
  std::byte* place = block.shared + (copy.destination - kSharedBase);
  if (copy.source_bytes > 0) std::memcpy(place, copy.source, copy.source_bytes);
  std::memset(place + copy.source_bytes, 0, kCopyBytes - copy.source_bytes);
}

}  // namespace

void copy_async(std::uint32_t destination, const void* source, std::uint32_t source_bytes, Site site) {
  std::byte* place = shared_bytes("cp.async", destination, kCopyBytes, kCopyBytes, site);
  if (source_bytes > kCopyBytes) {
    fail(site, "cp.async: a source size of %u bytes exceeds the copy's %u", source_bytes, kCopyBytes);
  }
  maybe_preempt();
  if (source_bytes > 0) probe_global("cp.async", source, source_bytes, kCopyBytes, site);
  Thread& me = current_thread();
  Block& block = *me.block;
  note_shared(AccessKind::kCopy, static_cast<std::uint8_t>(me.lane_index), destination, kCopyBytes, site);
  if (block.launch->options.counters != 0) {
    me.warp->accesses.shared(block.counters.cp_async_shared, site, me.lane_index, destination, kCopyBytes);
    if (source_bytes > 0) {
      me.warp->accesses.global(block.counters.cp_async_global, site, me.lane_index,
                               reinterpret_cast<std::uintptr_t>(source), kCopyBytes);
    }
  }
  const PendingCopy copy{destination, source, source_bytes};
  me.copies.push_back(copy);
  me.activity = {"cp.async", site};
  if (block.launch->options.late_landing != 0) {
    std::memset(place, 0xff, kCopyBytes);
  } else {
    land(block, copy);
  }
}

void copy_async_commit(Site) {
  Thread& me = current_thread();
  me.copy_groups.push_back(static_cast<std::uint32_t>(me.copies.size()));
}

void copy_async_wait(int pending_groups, Site site) {
  Thread& me = current_thread();
  Block& block = *me.block;
  me.activity = {"cp.async.wait_group", site};
  const auto pending = static_cast<std::size_t>(pending_groups);
  if (me.copy_groups.size() <= pending) return;
  const std::size_t done_groups = me.copy_groups.size() - pending;
  const std::uint32_t done_copies = me.copy_groups[done_groups - 1];
  for (std::uint32_t i = 0; i < done_copies; ++i) {
    const PendingCopy& copy = me.copies[i];
    if (block.launch->options.late_landing != 0) land(block, copy);
    block.races.land(block.clock_of(me), me.warp_index, static_cast<std::uint8_t>(me.lane_index),
                     copy.destination - kSharedBase, kCopyBytes);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + done_copies);
  me.copy_groups.erase(me.copy_groups.begin(), me.copy_groups.begin() + static_cast<std::ptrdiff_t>(done_groups));
  for (std::uint32_t& end : me.copy_groups) end -= done_copies;
}

}  // namespace emulator
