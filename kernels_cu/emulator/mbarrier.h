// Barriers in shared memory (mbarrier), which count arrivals of threads and bytes of bulk loads.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "race.h"
#include "site.h"

namespace emulator {

struct Block;
struct Thread;

constexpr std::uint32_t kMbarrierBytes = 8;

// Phases are numbered from 0; phase n is complete when `phase` > n.
struct Mbarrier {
  std::uint32_t address = 0;
  int identity = 0;  // of the bulk loads that complete here, in the clocks
  Site site;         // of its init
  int thread = 0;    // that executed it
  std::uint32_t count = 0;
  std::uint32_t pending = 0;  // arrivals that the phase still waits for
  std::int64_t bytes = 0;     // announced and not yet here; below 0: here and not yet announced
  std::int64_t phase = 0;     // the current one
  bool fenced = false;        // bulk loads know of it
  std::vector<Thread*> waiting;
  std::vector<std::int64_t> last_waited;  // by thread: the latest phase it has waited for, kNeverWaited
  Clock published;                        // of those who arrived
  Clock completed;                        // `published` when the latest phase was complete

  static constexpr std::int64_t kNeverWaited = -2;

  std::int64_t loaded = kNeverWaited;  // the phase of its latest bulk load,
  Site load;                           // and where that was issued
};

// The mbarrier that an instruction of the current thread names; fails if there is none.
Mbarrier& use_mbarrier(const char* what, std::uint32_t address, Site);

// Bytes of a bulk load have landed.
void complete_bytes(Block& block, Mbarrier& barrier, std::uint32_t bytes);

// The time at which bulk loads of the current phase count as made.
std::uint32_t load_time(const Block& block, const Mbarrier& barrier);

// Fails if the bytes overlap an mbarrier.
void check_no_mbarrier(const char* what, std::uint32_t address, std::uint32_t bytes, Site);

// Lines of a deadlock report.
std::string mbarrier_table(const Block& block);

// What is wrong with the mbarriers of a block that has ended; "" if nothing.
std::string unfinished_mbarrier_report(const Block& block);

}  // namespace emulator
