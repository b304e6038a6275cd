// mbarrier: init, arrivals, announced bytes, waits by parity.

#include "mbarrier.h"

#include <algorithm>

#include "access.h"
#include "report.h"

namespace emulator {

namespace {

constexpr std::uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes either way

std::string name_of(const Mbarrier& barrier) {
  char text[64];
  std::snprintf(text, sizeof text, "mbarrier shared+0x%x", barrier.address - kSharedBase);
  return text;
}

Mbarrier* find(Block& block, std::uint32_t address) {
  for (Mbarrier& barrier : block.mbarriers) {
    if (barrier.address == address) return &barrier;
  }
  return nullptr;
}

// Ends the phase if nothing is missing.
void advance(Block& block, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  for (const BulkLoad& load : block.loads) {
    if (load.barrier != &barrier) continue;
    fail(load.site,
         "cp.async.bulk.tensor load: phase %lld of %s is complete before this load is (too few bytes announced?)",
         static_cast<long long>(barrier.phase), name_of(barrier).c_str());
  }
  // Who waited sees the arrivals' past and the loads.
  if (block.races.enabled()) {
    barrier.published.seen[barrier.identity] = load_time(block, barrier);
    block.races.reach(barrier.published.seen[barrier.identity]);
    barrier.completed = barrier.published;
  }
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (Thread* thread : barrier.waiting) make_ready(*thread->warp, 1u << thread->lane_index);
  barrier.waiting.clear();
}

void arrive(const char* what, std::uint32_t address, std::uint32_t bytes, Site site) {
  maybe_preempt();
  Mbarrier& barrier = use_mbarrier(what, address, site);
  Thread& me = current_thread();
  Block& block = *me.block;
  if (barrier.pending == 0) {
    fail(site, "%s: all %u arrivals at %s have come in phase %lld, this is one too many (%lld bytes still to come)",
         what, barrier.count, name_of(barrier).c_str(), static_cast<long long>(barrier.phase),
         static_cast<long long>(barrier.bytes));
  }
  if (barrier.bytes + bytes > kMaxCount) {
    fail(site, "%s: %lld bytes announced at %s; an mbarrier counts at most %u", what,
         static_cast<long long>(barrier.bytes + bytes), name_of(barrier).c_str(), kMaxCount);
  }
  block.races.release_lane(block.clock_of(me), me.warp_index, barrier.published);
  barrier.bytes += bytes;
  --barrier.pending;
  advance(block, barrier);
}

}  // namespace

Mbarrier& use_mbarrier(const char* what, std::uint32_t address, Site site) {
  Mbarrier* barrier = find(*current_thread().block, address);
  if (barrier == nullptr) {
    fail(site, "%s: there is no mbarrier at shared+0x%x (missing mbarrier_init?)", what, address - kSharedBase);
  }
  // The init of a barrier must be ordered before its use, like a write before a read.
  note_shared(AccessKind::kUseBarrier, static_cast<std::uint8_t>(current->lane_index), address, kMbarrierBytes, site);
  return *barrier;
}

std::uint32_t load_time(const Block& block, const Mbarrier& barrier) {
  return block.races.past() + 1 + static_cast<std::uint32_t>(barrier.phase);
}

void complete_bytes(Block& block, Mbarrier& barrier, std::uint32_t bytes) {
  barrier.bytes -= bytes;
  advance(block, barrier);
}

void check_no_mbarrier(const char* what, std::uint32_t address, std::uint32_t bytes, Site site) {
  for (const Mbarrier& barrier : current_thread().block->mbarriers) {
    if (address < barrier.address + kMbarrierBytes && barrier.address < address + bytes) {
      fail(site, "%s: %u bytes at shared+0x%x overlap the %s of %s", what, bytes, address - kSharedBase,
           name_of(barrier).c_str(), text_of(barrier.site).c_str());
    }
  }
}

std::string mbarrier_table(const Block& block) {
  std::string text;
  for (const Mbarrier& barrier : block.mbarriers) {
    if (barrier.waiting.empty()) continue;
    text += "  " + name_of(barrier) + " of " + text_of(barrier.site) + ": phase " + std::to_string(barrier.phase) +
            ", " + std::to_string(barrier.count - barrier.pending) + " of " + std::to_string(barrier.count) +
            " arrived, " + std::to_string(barrier.bytes) + " bytes still to come\n";
  }
  return text;
}

std::string unfinished_mbarrier_report(const Block& block) {
  for (const Mbarrier& barrier : block.mbarriers) {
    // Its bytes would arrive in shared memory that may be another block's by then.
    if (barrier.loaded > *std::max_element(barrier.last_waited.begin(), barrier.last_waited.end())) {
      return text_of(barrier.load) + ": the block ended and no thread has waited for this bulk load, at the " +
             name_of(barrier) + ", in phase " + std::to_string(barrier.loaded);
    }
    if (barrier.bytes == 0) continue;
    return text_of(barrier.site) + ": the block ended with " + std::to_string(barrier.bytes) +
           " bytes still to come at the " + name_of(barrier) + ", in phase " + std::to_string(barrier.phase);
  }
  return "";
}

void mbarrier_init(std::uint32_t address, std::uint32_t count, Site site) {
  constexpr const char* kWhat = "mbarrier.init";
  Thread& me = current_thread();
  Block& block = *me.block;
  if (const Mbarrier* other = find(block, address)) {
    fail(site, "%s: %s is in use since %s", kWhat, name_of(*other).c_str(), text_of(other->site).c_str());
  }
  shared_bytes(kWhat, address, kMbarrierBytes, kMbarrierBytes, site);
  if (count == 0 || count > kMaxCount) fail(site, "%s: a count of %u, not 1 to %u", kWhat, count, kMaxCount);
  if (block.mbarriers.size() == kMaxMbarriers) {
    fail(site, "%s: the emulator has room for %d mbarriers", kWhat, kMaxMbarriers);
  }
  note_shared(AccessKind::kInitBarrier, static_cast<std::uint8_t>(me.lane_index), address, kMbarrierBytes, site);
  Mbarrier barrier;
  barrier.address = address;
  barrier.identity = kFirstMbarrier + static_cast<int>(block.mbarriers.size());
  barrier.site = site;
  barrier.thread = me.thread_index;
  barrier.count = barrier.pending = count;
  barrier.last_waited.assign(static_cast<std::size_t>(block.num_threads), Mbarrier::kNeverWaited);
  block.mbarriers.push_back(std::move(barrier));
}

void mbarrier_arrive(std::uint32_t address, Site site) { arrive("mbarrier.arrive", address, 0, site); }

void mbarrier_arrive_expect_tx(std::uint32_t address, std::uint32_t bytes, Site site) {
  arrive("mbarrier.arrive.expect_tx", address, bytes, site);
}

void mbarrier_wait(std::uint32_t address, std::uint32_t parity, Site site) {
  constexpr const char* kWhat = "mbarrier.try_wait.parity";
  maybe_preempt();
  Mbarrier& barrier = use_mbarrier(kWhat, address, site);
  Thread& me = current_thread();
  Block& block = *me.block;
  if (parity > 1) fail(site, "%s: a parity of %u, not 0 or 1", kWhat, parity);
  // A parity names the current phase or the one before; the one before phase 0 counts as complete.
  const std::int64_t phase = barrier.phase % 2 == parity ? barrier.phase : barrier.phase - 1;
  std::int64_t& last = barrier.last_waited[static_cast<std::size_t>(me.thread_index)];
  if (last != Mbarrier::kNeverWaited && phase > last + 1 && (phase - last) % 2 == 1) {
    fail(site, "%s: this thread waits for phase %lld of %s, which is two ahead, in phase %lld: parity cannot tell",
         kWhat, static_cast<long long>(last + 1), name_of(barrier).c_str(), static_cast<long long>(barrier.phase));
  }
  last = phase;
  while (barrier.phase <= phase) {
    barrier.waiting.push_back(&me);
    suspend(kWhat, site);
  }
  if (barrier.phase >= phase + 2) {
    fail(site, "%s: %s went two phases on while this thread waited for phase %lld: parity cannot tell", kWhat,
         name_of(barrier).c_str(), static_cast<long long>(phase));
  }
  block.races.acquire_lane(block.clock_of(me), me.warp_index, barrier.completed);
}

void fence_mbarrier_init(Site) {
  const Thread& me = current_thread();
  for (Mbarrier& barrier : me.block->mbarriers) barrier.fenced |= barrier.thread == me.thread_index;
}

void fence_proxy_async(Site) {
  maybe_preempt();
  Thread& me = current_thread();
  me.block->races.fence_proxy(me.warp_index, me.lane_index);
}

}  // namespace emulator
