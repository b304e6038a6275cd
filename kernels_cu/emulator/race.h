// Finds accesses to shared memory that nothing orders, in whatever order they happened to run.
//
// Every warp carries a vector clock: one number per warp, "how far I have seen each warp's work". A warp's
// own number goes up whenever it publishes its work (a barrier, __syncwarp); waiting at a barrier joins the
// clocks of those who arrived. Every 4-byte word of shared memory remembers its last write and the reads
// since, each with the accessor's number at that time. An access by warp B is ordered after an earlier one by
// warp A if B's clock has seen A's number. (FastTrack, C. Flanagan and S. N. Freund, PLDI 2009, with warps
// for threads.)
//
// Within a warp the lanes are told apart too: another lane's access is ordered only if the warp's own number
// has moved since, which is what finds a missing __syncwarp. What an instruction of the whole warp does
// (ldmatrix, stmatrix) belongs to no lane.
//
// A destination of cp.async is written by nobody in particular until the copying thread has waited for it: an
// access in between races with the copy even from the same thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.h"

namespace emulator {

constexpr int kMaxWarps = 32;

struct Clock {
  std::array<std::uint32_t, kMaxWarps> seen{};

  void join(const Clock& other) {
    for (int i = 0; i < kMaxWarps; ++i) {
      if (seen[i] < other.seen[i]) seen[i] = other.seen[i];
    }
  }
};

// Who, among a warp, made an access. 0 to 31 are lanes.
constexpr std::uint8_t kWholeWarp = 32;     // one instruction of all lanes
constexpr std::uint8_t kSeveralLanes = 33;  // the same read by more than one lane
constexpr std::uint8_t kInFlight = 34;      // a cp.async nobody has waited for

enum class AccessKind : std::uint8_t { kLoad, kStore, kCopy, kLoadMatrix, kStoreMatrix };

struct Access {
  std::uint32_t clock = 0;  // 0: none; warps start at 1
  std::uint8_t warp = 0;
  std::uint8_t lane = 0;
  AccessKind kind = AccessKind::kLoad;
  std::uint8_t unused = 0;
  std::uint32_t site = 0;  // an index into the detector's table
};

class RaceDetector {
 public:
  // Forgets everything and covers `shared_bytes` of shared memory. Disabled, all else does nothing.
  void reset(bool enabled, std::uint32_t shared_bytes);
  bool enabled() const { return enabled_; }

  // Starts a block: all that earlier blocks did is in the past of every warp, so nothing needs clearing.
  void begin_block(Clock* clocks, int num_warps);

  // Notes an access to [offset, offset + bytes) of shared memory. On a race writes the report to `report` (of
  // `report_bytes`) and returns false.
  bool access(const Clock& clock, int warp, std::uint8_t lane, AccessKind kind, std::uint32_t offset,
              std::uint32_t bytes, Site site, char* report, std::size_t report_bytes);

  // The thread waited for its copy to [offset, offset + bytes): from now on it is a plain write of that lane.
  void land(const Clock& clock, int warp, std::uint8_t lane, std::uint32_t offset, std::uint32_t bytes);

  // The warp makes its work up to now visible in `published`.
  void release(Clock& clock, int warp, Clock& published);
  void acquire(Clock& clock, const Clock& published);
  // __syncwarp: the lanes' work up to now is ordered before the warp's later work.
  void order_lanes(Clock& clock, int warp);

 private:
  // Where more warps read one word between two barriers, the last slot keeps only the latest.
  static constexpr int kReaders = 15;
  static constexpr int kSites = 4096;

  struct Word {
    Access write;
    std::array<Access, kReaders> reads;
  };

  std::uint32_t site_index(Site site);

  bool enabled_ = false;
  std::uint32_t latest_clock_ = 1;  // the highest that any access can carry
  std::vector<Word> words_;
  std::vector<Site> sites_;
};

}  // namespace emulator
