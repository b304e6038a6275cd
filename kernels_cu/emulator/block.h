// The state of one running block: its threads, warps and barriers, and the order in which they run.
//
// A worker (an OS thread) owns one Block and runs one block of the grid after another in it. Within a block
// exactly one fiber runs at a time; it keeps the CPU until it waits for something (suspend) or offers it to
// others (yield).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "api.h"
#include "bulk.h"
#include "counters.h"
#include "fiber.h"
#include "mbarrier.h"
#include "race.h"
#include "warpgroup.h"

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = kWarpSize * kMaxWarps;
constexpr int kNamedBarriers = 16;
constexpr std::uint32_t kAllLanes = 0xffffffffu;
constexpr std::uint32_t kMaxSharedBytes = 227 * 1024;

// The order in which warps that could run do run.
enum class Schedule : std::int32_t {
  kFifo,    // in turn
  kRandom,  // any of them, preempted now and then
  // The one with the highest of random priorities that now and then change, and preempted. PCT: S. Burckhardt
  // et al., "A randomized scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010.
  kPriority,
};

// Python fills this: cupyflash/backends/emulator.py.
struct LaunchOptions {
  std::uint64_t seed;
  Schedule schedule;
  std::int32_t race_detector;
  std::int32_t late_landing;
  std::int32_t counters;
  std::int32_t workers;
  const std::int32_t* stop = nullptr;  // not 0 there: the caller wants no further block
};

// What stands before the bytes of an observation. Python reads it: cupyflash/backends/emulator.py.
struct ObservationHeader {
  std::uint32_t num_bytes;  // that follow
  std::uint32_t block;
  std::uint32_t thread;
  char event[20];
};

struct Warp;
struct Block;

struct PendingCopy {
  std::uint32_t destination;  // an address in shared memory
  const void* source;
  std::uint32_t source_bytes;
};

// What a thread is doing that may go wrong or last, for reports.
struct Activity {
  const char* what = nullptr;
  Site site;
};

struct Thread : Identity {
  Warp* warp = nullptr;
  Block* block = nullptr;
  bool exited = false;
  Activity activity;
  std::vector<PendingCopy> copies;         // in the order of issue
  std::vector<std::uint32_t> copy_groups;  // each group's end in `copies`
  BulkStores stores;
  Context context;
};

// Where the lanes of a warp meet to execute one instruction together.
struct Rendezvous {
  std::uint32_t arrived = 0;
  Activity activity;
  std::array<void*, kWarpSize> operands;
};

struct Warp {
  int index = 0;
  std::uint32_t alive = 0;
  std::uint32_t ready = 0;  // lanes that could run
  std::uint64_t priority = 0;
  Rendezvous rendezvous;
  AccessCounter accesses;
  int bulk_stores = 0;  // issued by its lanes
};

struct NamedBarrier {
  int expected = 0;  // threads
  int arrived = 0;
  std::uint32_t arrived_warps = 0;
  std::uint32_t waiting_warps = 0;
  Site first;
  Clock published;
};

// Numbers that depend on the seed and the block alone.
class Random {
 public:
  void seed(std::uint64_t seed, std::uint64_t stream) {
    state_ = (seed + 1) * 0x9E3779B97F4A7C15ull ^ (stream + 1) * 0xD1B54A32D192ED03ull;
    if (state_ == 0) state_ = 1;
    next();
    next();
  }
  // xorshift64*
  std::uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1Dull;
  }
  std::uint32_t below(std::uint32_t bound) { return static_cast<std::uint32_t>(((next() >> 32) * bound) >> 32); }

 private:
  std::uint64_t state_ = 1;
};

// What all blocks of one launch share.
struct Launch {
  LaunchOptions options;
  void (*kernel)(void** arguments);
  void** arguments;
  Dim3 grid_size;
  int num_threads;
  std::uint32_t shared_bytes;
  std::atomic<bool> stopped{false};  // some block failed
};

struct Block {
  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const Launch* launch = nullptr;
  Dim3 index{};
  int num_threads = 0;
  int num_warps = 0;
  int alive = 0;
  std::unique_ptr<Thread[]> threads;
  std::array<Warp, kMaxWarps> warps;
  std::array<Clock, kMaxWarps> clocks;
  std::array<NamedBarrier, kNamedBarriers> barriers;
  std::vector<Mbarrier> mbarriers;  // never reallocated: threads that wait hold references
  std::vector<BulkLoad> loads;      // that have not landed, in the order of issue
  std::array<Warpgroup, kMaxWarpgroups> warpgroups;
  RegisterPool registers;
  int elected_lane = 0;
  std::byte* shared = nullptr;  // what address kSharedBase names
  RaceDetector races;
  Counters counters;
  std::vector<std::byte> observations;  // of the launch, in the order in which they were made
  Random random;
  int last_warp = 0;
  bool failed = false;
  std::string report;  // why it failed
  StackPool stacks;
  Context launcher;  // the worker itself

  // Runs the block `index` of the launch to its end. False if it failed; then `report` says why.
  bool run(const Launch& launch, Dim3 index, std::uint64_t linear_index);

  Clock& clock_of(const Thread& thread) { return clocks[thread.warp_index]; }
};

inline Thread& current_thread() { return *static_cast<Thread*>(current); }

// Waits until somebody calls make_ready for this thread.
void suspend(const char* what, Site site);
void make_ready(Warp& warp, std::uint32_t lanes);
// Lets others go first, if there are any.
void yield();
// Under a random schedule, one access to memory in so many offers the CPU to other warps.
constexpr std::uint32_t kPreemptOneIn = 256;

inline void maybe_preempt() {
  Block& block = *current_thread().block;
  if (block.launch->options.schedule == Schedule::kFifo) return;
  if (block.random.below(kPreemptOneIn) == 0) yield();
}

// Ends the block with a report that starts with the site and the current thread. Like printf.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace emulator
