// What four neighbouring warps do together: wgmma and setmaxnreg.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "api.h"
#include "race.h"
#include "site.h"

namespace emulator {

struct Block;

constexpr int kWarpgroupWarps = 4;

// What the warps of a warpgroup must agree on.
struct WgmmaOperands {
  Format format;
  int n;
  bool a_in_registers;
  bool transpose_a;
  bool transpose_b;
  bool accumulate;
  std::uint64_t a_descriptor;
  std::uint64_t b_descriptor;
};

// One wgmma of a warpgroup, from its first warp's issue until its group is complete.
struct Wgmma {
  WgmmaOperands operands;
  Site site;
  std::vector<std::uint16_t> a;  // (64, 16), if it is in shared memory: what was there at issue
  std::vector<std::uint16_t> b;  // (n, 16)
  std::vector<float> b_values;   // (16, n)
};

// Accumulators of one warp that wgmmas under way will write.
struct PendingAccumulators {
  std::array<float*, 32> registers;  // of each lane
  int n;
  std::vector<float> values;  // (16, n)
  int group;                  // the latest that writes them
  Site site;
};

struct WarpgroupWarp {
  int issued = 0;     // wgmmas
  int committed = 0;  // groups
  int finished = 0;   // groups it has waited for
  int wanted = 0;     // groups it waits for, 0: it does not
  bool fenced = false;
  std::vector<PendingAccumulators> accumulators;
};

struct Warpgroup {
  std::array<WarpgroupWarp, kWarpgroupWarps> warps;
  std::deque<Wgmma> wgmmas;     // those of groups that are not complete
  int first = 0;                // the number of wgmmas.front()
  std::vector<int> group_ends;  // each group's end in the numbers of wgmmas
  int complete = 0;             // groups

  void reset();
};

// When the current thread exits: fails if its warp has wgmmas under way.
void finish_warpgroup();

// The registers of a multiprocessor: setmaxnreg moves them between warps.
struct RegisterPool {
  int free = 0;                             // for a warp's threads, in registers of one thread
  std::array<int, kMaxWarps> per_thread{};  // of each warp
  std::array<int, kMaxWarps> wanted{};      // what a warp waits for, 0: it does not

  void reset(int num_warps);
};

// Lines of a deadlock report.
std::string register_table(const Block& block);

// What is wrong with the registers of a block that has ended; "" if nothing: a warpgroup changes them as a whole.
std::string uneven_registers_report(const Block& block);

}  // namespace emulator
