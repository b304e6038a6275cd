#include "race.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "report.h"

namespace emulator {

namespace {

constexpr bool is_write(AccessKind kind) {
  return kind == AccessKind::kStore || kind == AccessKind::kCopy || kind == AccessKind::kStoreMatrix ||
         kind == AccessKind::kInitBarrier || kind == AccessKind::kBulkLoad;
}

constexpr bool is_asynchronous(AccessKind kind) {
  return kind == AccessKind::kBulkLoad || kind == AccessKind::kBulkStore || kind == AccessKind::kMultiply;
}

// Written by instructions that fence.proxy.async orders before asynchronous ones.
constexpr bool is_generic_write(AccessKind kind) {
  return kind == AccessKind::kStore || kind == AccessKind::kCopy || kind == AccessKind::kStoreMatrix;
}

constexpr const char* name_of(AccessKind kind) {
  switch (kind) {
    case AccessKind::kLoad:
      return "ld.shared";
    case AccessKind::kStore:
      return "st.shared";
    case AccessKind::kCopy:
      return "cp.async write";
    case AccessKind::kLoadMatrix:
      return "ldmatrix";
    case AccessKind::kStoreMatrix:
      return "stmatrix";
    case AccessKind::kInitBarrier:
      return "mbarrier.init";
    case AccessKind::kUseBarrier:
      return "mbarrier instruction";
    case AccessKind::kBulkLoad:
      return "bulk load";
    case AccessKind::kBulkStore:
      return "bulk store";
    case AccessKind::kMultiply:
      return "wgmma";
  }
  return "access";
}

constexpr AccessKind kind_of(const Access& access) { return static_cast<AccessKind>(access.kind); }

// What is missing between an earlier access and one by `warp`.
const char* cure_for(const Access& earlier, int warp) {
  // Another warp's copy: it may wait for it behind a barrier that is missing.
  if (earlier.lane == kInFlight)
    return static_cast<int>(earlier.warp) == warp ? "cp.async wait" : "cp.async wait or barrier";
  if (earlier.warp >= kFirstMbarrier) return "mbarrier wait";
  if (earlier.warp >= kFirstStore) return "bulk wait or barrier";
  if (earlier.warp >= kFirstWarpgroup) return "wgmma wait or barrier";
  return static_cast<int>(earlier.warp) == warp ? "__syncwarp" : "barrier";
}

// Numbers that only grow from launch to launch start again before they overflow.
constexpr std::uint32_t kMostNumbers = 1u << 31;

}  // namespace

inline bool RaceDetector::is_ordered(const Access& earlier, const Clock& clock, int warp, std::uint8_t lane) const {
  if (is_past(earlier)) return true;
  if (earlier.lane == kInFlight) return false;
  if (static_cast<int>(earlier.warp) != warp) return clock.seen[earlier.warp] >= earlier.clock;
  if (earlier.clock < lanes_clock_[warp]) return true;
  // A collective runs when all lanes have come to it, so reads before it are over, and so are its own when it
  // is.
  if (!is_write(kind_of(earlier)) && (earlier.lane == kWholeWarp || lane == kWholeWarp)) return true;
  return earlier.lane == lane && lane != kWholeWarp;
}

inline bool RaceDetector::is_fenced(const Access& write, std::uint32_t dirty) const {
  if (dirty <= past_fences_) return true;
  const auto& fences = last_fence_[write.warp];
  if (write.lane < kWholeWarp) return fences[write.lane] > dirty;
  return *std::min_element(fences.begin(), fences.end()) > dirty;
}

void RaceDetector::reset(bool enabled, std::uint32_t shared_bytes) {
  enabled_ = enabled;
  if (!enabled) return;
  if (latest_clock_ > kMostNumbers || fences_ > kMostNumbers) {
    latest_clock_ = fences_ = 0;
    words_.clear();
    dirty_.clear();
  }
  const std::size_t num_words = (shared_bytes + 3) / 4;
  if (words_.size() < num_words) {
    words_.resize(num_words);
    dirty_.resize(num_words);
  }
  sites_.assign(kSites, Site{});
}

void RaceDetector::begin_block(Clock* clocks, int num_warps) {
  if (!enabled_) return;
  past_ = latest_clock_;
  latest_clock_ = past_ + 1;
  for (int w = 0; w < num_warps; ++w) {
    clocks[w].seen.fill(past_);
    clocks[w].seen[w] = latest_clock_;
  }
  lanes_clock_.fill(latest_clock_);
  past_fences_ = fences_++;
  for (auto& lanes : last_fence_) lanes.fill(0);
}

// A hash table that never fills up in practice: a kernel has far fewer instructions that touch shared memory.
// When it does, later sites share the last slot's name.
std::uint32_t RaceDetector::site_index(Site site) {
  auto slot = (reinterpret_cast<std::uintptr_t>(site.file) * 31 + static_cast<std::uintptr_t>(site.line)) % kSites;
  for (int probes = 0; probes < kSites; ++probes, slot = (slot + 1) % kSites) {
    Site& entry = sites_[slot];
    if (entry.file == nullptr) entry = site;
    if (entry.file == site.file && entry.line == site.line) break;
  }
  return static_cast<std::uint32_t>(slot);
}

bool RaceDetector::access(const Clock& clock, int warp, std::uint8_t lane, AccessKind kind, std::uint32_t offset,
                          std::uint32_t bytes, Site site, char* report, std::size_t report_bytes) {
  if (!enabled_) return true;
  Access mine;
  mine.clock = clock.seen[warp];
  mine.site = site_index(site);
  mine.warp = static_cast<std::uint32_t>(warp);
  mine.lane = kind == AccessKind::kCopy ? kInFlight : lane;
  mine.kind = static_cast<std::uint32_t>(kind);
  return note(clock, warp, lane, mine, offset, bytes, report, report_bytes);
}

bool RaceDetector::access_async(const Clock& clock, int warp, std::uint8_t lane, int identity, std::uint32_t when,
                                AccessKind kind, std::uint32_t offset, std::uint32_t bytes, Site site, char* report,
                                std::size_t report_bytes) {
  if (!enabled_) return true;
  reach(when);
  Access mine;
  mine.clock = when;
  mine.site = site_index(site);
  mine.warp = static_cast<std::uint32_t>(identity);
  mine.lane = kWholeWarp;
  mine.kind = static_cast<std::uint32_t>(kind);
  return note(clock, warp, lane, mine, offset, bytes, report, report_bytes);
}

// "the st.shared by warp 3 lane 5 at fwd_sm90.cu:100"
void RaceDetector::describe(const Access& access, char (&text)[256]) const {
  const Site site = sites_[access.site];
  char who[40] = "";
  if (access.warp < kMaxWarps && access.lane < kWholeWarp) {
    std::snprintf(who, sizeof who, " by warp %u lane %u", unsigned{access.warp}, unsigned{access.lane});
  } else if (access.warp < kMaxWarps) {
    std::snprintf(who, sizeof who, " by warp %u", unsigned{access.warp});
  }
  std::snprintf(text, sizeof text, "the %s%s at %s:%d", name_of(kind_of(access)), who, base_name(site.file), site.line);
}

bool RaceDetector::note(const Clock& clock, int warp, std::uint8_t lane, Access mine, std::uint32_t offset,
                        std::uint32_t bytes, char* report, std::size_t report_bytes) {
  const AccessKind kind = kind_of(mine);
  const bool writes = is_write(kind);
  const bool asynchronous = is_asynchronous(kind);

  const auto complain = [&](std::uint32_t word, const Access& earlier) {
    char text[256];
    describe(earlier, text);
    std::snprintf(report, report_bytes, "shared-memory race: %s of shared+0x%x is not ordered after %s (missing %s?)",
                  name_of(kind), word * 4, text, cure_for(earlier, warp));
    return false;
  };

  for (std::uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words_[w];
    int slot = 0;
    if (!writes) {
      while (slot < kReaders - 1 && !is_past(word.reads[slot]) && word.reads[slot].warp != mine.warp) ++slot;
      const Access& read = word.reads[slot];
      // What this warp has read at this time it may read again: as the same lane, or as any where several have.
      if (read.clock == mine.clock && read.warp == mine.warp && !asynchronous &&
          (read.lane == lane || read.lane == kSeveralLanes)) {
        continue;
      }
    }
    if (!is_ordered(word.write, clock, warp, lane)) return complain(w, word.write);
    if (asynchronous && !is_fenced(word.write, dirty_[w])) {
      char text[256];
      describe(word.write, text);
      std::snprintf(report, report_bytes,
                    "%s of shared+0x%x: %s is not visible to it (missing fence_proxy_async by the writing threads?)",
                    name_of(kind), w * 4, text);
      return false;
    }
    if (writes) {
      for (const Access& read : word.reads) {
        if (is_past(read)) break;
        if (!is_ordered(read, clock, warp, lane)) return complain(w, read);
      }
      word.write = mine;
      dirty_[w] = is_generic_write(kind) ? fences_ : 0;
      word.reads[0].clock = 0;
      continue;
    }
    // A read: replaces this warp's earlier one, which any writer ordered after this one is ordered after as
    // well.
    Access& read = word.reads[slot];
    if (read.warp == mine.warp && read.clock == mine.clock) {
      if (!asynchronous && lane != kWholeWarp) read.lane = read.lane == kWholeWarp ? lane : kSeveralLanes;
      continue;
    }
    if (is_past(read) && slot + 1 < kReaders) word.reads[slot + 1].clock = 0;
    read = mine;
  }
  return true;
}

void RaceDetector::land(const Clock& clock, int warp, std::uint8_t lane, std::uint32_t offset, std::uint32_t bytes) {
  if (!enabled_) return;
  for (std::uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    words_[w].write.lane = lane;
    words_[w].write.clock = clock.seen[warp];
    dirty_[w] = fences_;
  }
}

void RaceDetector::release(Clock& clock, int warp, Clock& published) {
  if (!enabled_) return;
  published.join(clock);
  order_lanes(clock, warp);
}

void RaceDetector::acquire(Clock& clock, const Clock& published) {
  if (enabled_) clock.join(published);
}

void RaceDetector::release_lane(Clock& clock, int warp, Clock& published) {
  if (!enabled_) return;
  published.join(clock);
  reach(++clock.seen[warp]);
}

void RaceDetector::acquire_lane(Clock& clock, int warp, const Clock& published) {
  if (!enabled_) return;
  clock.join(published);
  lanes_clock_[warp] = std::max(lanes_clock_[warp], published.seen[warp] + 1);
}

void RaceDetector::order_lanes(Clock& clock, int warp) {
  if (!enabled_) return;
  reach(++clock.seen[warp]);
  lanes_clock_[warp] = clock.seen[warp];
}

void RaceDetector::fence_proxy(int warp, int lane) {
  if (!enabled_) return;
  last_fence_[warp][lane] = ++fences_;
}

}  // namespace emulator
