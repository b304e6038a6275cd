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
//
// What a warp starts and what then goes on by itself has an identity of its own in the clocks: the wgmmas of a
// warpgroup, the bulk stores of a warp, the bulk loads that complete at one mbarrier. Only the matching wait brings
// that identity's number into a warp's clock.
//
// Words also remember whether their last write came through the generic proxy (st.shared, stmatrix, cp.async) and
// whether the writer has executed fence.proxy.async since: wgmma and bulk copies must not touch them before.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "site.h"

namespace emulator {

constexpr int kMaxWarps = 32;
constexpr int kMaxWarpgroups = kMaxWarps / 4;
constexpr int kMaxMbarriers = 56;

// Who has a number in the clocks: warps, and what goes on by itself.
constexpr int kFirstWarpgroup = kMaxWarps;                     // the wgmmas of a warpgroup
constexpr int kFirstStore = kFirstWarpgroup + kMaxWarpgroups;  // the bulk stores of a warp
constexpr int kFirstMbarrier = kFirstStore + kMaxWarps;        // the bulk loads that complete at an mbarrier
constexpr int kIdentities = kFirstMbarrier + kMaxMbarriers;

struct Clock {
  std::array<std::uint32_t, kIdentities> seen{};

  void join(const Clock& other) {
    for (int i = 0; i < kIdentities; ++i) {
      if (seen[i] < other.seen[i]) seen[i] = other.seen[i];
    }
  }
};

// Who, among a warp, made an access. 0 to 31 are lanes.
constexpr std::uint8_t kWholeWarp = 32;     // one instruction of all lanes
constexpr std::uint8_t kSeveralLanes = 33;  // the same read by more than one lane
constexpr std::uint8_t kInFlight = 34;      // a cp.async nobody has waited for

enum class AccessKind : std::uint8_t {
  kLoad,
  kStore,
  kCopy,
  kLoadMatrix,
  kStoreMatrix,
  kInitBarrier,  // mbarrier.init
  kUseBarrier,   // every other instruction on an mbarrier; those are not accesses to each other
  kBulkLoad,
  kBulkStore,
  kMultiply,  // wgmma reads its operands
};

// Eight bytes: most of the emulator's time goes by looking these up.
struct Access {
  std::uint32_t clock;      // 0: none
  std::uint32_t site : 12;  // an index into the detector's table
  std::uint32_t warp : 8;   // or another identity
  std::uint32_t lane : 6;
  std::uint32_t kind : 6;  // an AccessKind
};
static_assert(sizeof(Access) == 8);

class RaceDetector {
 public:
  // Covers `shared_bytes` of shared memory. Disabled, all else does nothing.
  void reset(bool enabled, std::uint32_t shared_bytes);
  bool enabled() const { return enabled_; }

  // Starts a block: what earlier blocks and launches did is in the past and no longer counts, so nothing needs clearing.
  void begin_block(Clock* clocks, int num_warps);

  // Notes an access to [offset, offset + bytes) of shared memory. On a race writes the report to `report` (of
  // `report_bytes`) and returns false.
  bool access(const Clock& clock, int warp, std::uint8_t lane, AccessKind kind, std::uint32_t offset,
              std::uint32_t bytes, Site site, char* report, std::size_t report_bytes);

  // The same for an access that goes on by itself: the warp starts it, `identity` makes it at its time `when`.
  bool access_async(const Clock& clock, int warp, std::uint8_t lane, int identity, std::uint32_t when, AccessKind kind,
                    std::uint32_t offset, std::uint32_t bytes, Site site, char* report, std::size_t report_bytes);

  // Numbers for an identity start after this one, and are made known when they are used.
  std::uint32_t past() const { return past_; }
  void reach(std::uint32_t clock) {
    if (latest_clock_ < clock) latest_clock_ = clock;
  }

  // fence.proxy.async by one thread.
  void fence_proxy(int warp, int lane);

  // The thread waited for its copy to [offset, offset + bytes): from now on it is a plain write of that lane.
  void land(const Clock& clock, int warp, std::uint8_t lane, std::uint32_t offset, std::uint32_t bytes);

  // The warp makes its work up to now visible in `published`.
  void release(Clock& clock, int warp, Clock& published);
  void acquire(Clock& clock, const Clock& published);
  // The same for one lane, which says nothing about the order of the others.
  void release_lane(Clock& clock, int warp, Clock& published);
  void acquire_lane(Clock& clock, int warp, const Clock& published);
  // __syncwarp: the lanes' work up to now is ordered before the warp's later work.
  void order_lanes(Clock& clock, int warp);

 private:
  // Where more warps read one word between two barriers, the last slot keeps only the latest.
  static constexpr int kReaders = 15;
  static constexpr int kSites = 4096;

  // Two cache lines; up to seven warps that read need the first one only.
  struct alignas(64) Word {
    Access write;
    // Those that are not in the past come first; what follows one that is means nothing.
    std::array<Access, kReaders> reads;
  };

  std::uint32_t site_index(Site site);
  bool note(const Clock& clock, int warp, std::uint8_t lane, Access mine, std::uint32_t offset, std::uint32_t bytes,
            char* report, std::size_t report_bytes);
  bool is_past(const Access& access) const { return access.clock <= past_; }
  bool is_ordered(const Access& earlier, const Clock& clock, int warp, std::uint8_t lane) const;
  bool is_fenced(const Access& write, std::uint32_t dirty) const;
  void describe(const Access& access, char (&text)[256]) const;

  bool enabled_ = false;
  std::uint32_t past_ = 0;                              // what earlier blocks did is not after this
  std::uint32_t latest_clock_ = 0;                      // the highest that any access can carry
  std::array<std::uint32_t, kMaxWarps> lanes_clock_{};  // accesses of a warp before this are ordered for all its lanes
  std::uint32_t fences_ = 0;
  std::uint32_t past_fences_ = 0;
  std::array<std::array<std::uint32_t, 32>, kMaxWarps> last_fence_{};
  std::vector<Word> words_;
  // For each word the number of fences before its last generic write; 0: the write was asynchronous.
  std::vector<std::uint32_t> dirty_;
  std::vector<Site> sites_;
};

}  // namespace emulator
