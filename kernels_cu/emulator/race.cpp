#include "race.h"

#include <cstdio>
#include <cstring>

#include "report.h"

namespace emulator {

namespace {

constexpr bool is_write(AccessKind kind) {
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
  }
  return "access";
}

inline bool is_ordered(const Access& earlier, const Clock& clock, int warp, std::uint8_t lane) {
  if (earlier.clock == 0) return true;
  if (earlier.lane == kInFlight) return false;
  if (earlier.warp != warp) return clock.seen[earlier.warp] >= earlier.clock;
  if (earlier.clock < clock.seen[warp]) return true;
  // A collective runs when all lanes have come to it, so reads before it are over, and so are its own when it
  // is.
  if (!is_write(earlier.kind) && (earlier.lane == kWholeWarp || lane == kWholeWarp)) return true;
  return earlier.lane == lane && lane != kWholeWarp;
}

}  // namespace

void RaceDetector::reset(bool enabled, std::uint32_t shared_bytes) {
  enabled_ = enabled;
  latest_clock_ = 1;
  words_.assign(enabled ? (shared_bytes + 3) / 4 : 0, Word{});
  sites_.assign(enabled ? kSites : 0, Site{});
}

void RaceDetector::begin_block(Clock* clocks, int num_warps) {
  if (!enabled_) return;
  const std::uint32_t past = latest_clock_;
  latest_clock_ = past + 1;
  for (int w = 0; w < num_warps; ++w) {
    clocks[w].seen.fill(past);
    clocks[w].seen[w] = latest_clock_;
  }
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
  mine.warp = static_cast<std::uint8_t>(warp);
  mine.lane = kind == AccessKind::kCopy ? kInFlight : lane;
  mine.kind = kind;
  mine.site = site_index(site);

  const auto complain = [&](std::uint32_t word, const Access& earlier) {
    const Site other = sites_[earlier.site];
    char lane_text[24] = "";
    if (earlier.lane < kWholeWarp) std::snprintf(lane_text, sizeof lane_text, " lane %d", earlier.lane);
    const char* cure = earlier.lane == kInFlight ? "cp.async wait" : earlier.warp == warp ? "__syncwarp" : "barrier";
    std::snprintf(report, report_bytes,
                  "shared-memory race: %s of shared+0x%x is not ordered after the %s by warp %d%s at %s:%d "
                  "(missing %s?)",
                  name_of(kind), word * 4, name_of(earlier.kind), earlier.warp, lane_text, base_name(other.file),
                  other.line, cure);
    return false;
  };

  for (std::uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words_[w];
    if (!is_ordered(word.write, clock, warp, lane)) return complain(w, word.write);
    if (is_write(kind)) {
      for (const Access& read : word.reads) {
        if (read.clock == 0) break;
        if (!is_ordered(read, clock, warp, lane)) return complain(w, read);
      }
      word.write = mine;
      word.reads[0].clock = 0;
      continue;
    }
    // A read: replaces this warp's earlier one, which any writer ordered after this one is ordered after as
    // well.
    int slot = 0;
    while (slot < kReaders - 1 && word.reads[slot].clock != 0 && word.reads[slot].warp != warp) ++slot;
    Access& read = word.reads[slot];
    const bool was_free = read.clock == 0;
    if (!was_free && read.warp == warp && read.clock == mine.clock) {
      if (read.lane != lane && lane != kWholeWarp) read.lane = read.lane == kWholeWarp ? lane : kSeveralLanes;
      continue;
    }
    read = mine;
    if (was_free && slot + 1 < kReaders) word.reads[slot + 1].clock = 0;
  }
  return true;
}

void RaceDetector::land(const Clock& clock, int warp, std::uint8_t lane, std::uint32_t offset, std::uint32_t bytes) {
  if (!enabled_) return;
  for (std::uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    words_[w].write.lane = lane;
    words_[w].write.clock = clock.seen[warp];
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

void RaceDetector::order_lanes(Clock& clock, int warp) {
  if (!enabled_) return;
  ++clock.seen[warp];
  if (latest_clock_ < clock.seen[warp]) latest_clock_ = clock.seen[warp];
}

}  // namespace emulator
