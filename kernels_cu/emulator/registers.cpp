// setmaxnreg: warps hand registers back and take those that others have handed back.

#include "collective.h"
#include "warpgroup.h"

namespace emulator {

namespace {

constexpr int kRegisters = 65536;
constexpr int kStep = 8;
constexpr int kLeast = 24;
constexpr int kMost = 256;

constexpr const char* name_of(bool increase) { return increase ? "setmaxnreg.inc" : "setmaxnreg.dec"; }

// Warps that wait take what they want as soon as it is there.
void serve(Block& block) {
  RegisterPool& pool = block.registers;
  for (int w = 0; w < block.num_warps; ++w) {
    const int missing = pool.wanted[w] - pool.per_thread[w];
    if (pool.wanted[w] == 0 || missing > pool.free) continue;
    pool.free -= missing;
    pool.per_thread[w] = pool.wanted[w];
    pool.wanted[w] = 0;
    make_ready(block.warps[w], kAllLanes);
  }
}

}  // namespace

// As many as __launch_bounds__ with one block for each multiprocessor gives.
void RegisterPool::reset(int num_warps) {
  const int each = kRegisters / (num_warps * kWarpSize) / kStep * kStep;
  free = 0;
  per_thread.fill(each < kMost ? each : kMost);
  wanted.fill(0);
}

std::string register_table(const Block& block) {
  const RegisterPool& pool = block.registers;
  std::string text;
  for (int w = 0; w < block.num_warps; ++w) {
    if (pool.wanted[w] == 0) continue;
    text += "  warp " + std::to_string(w) + ": has " + std::to_string(pool.per_thread[w]) +
            " registers for each thread, wants " + std::to_string(pool.wanted[w]) + ", " + std::to_string(pool.free) +
            " are free\n";
  }
  return text;
}

std::string uneven_registers_report(const Block& block) {
  for (int w = 0; w < block.num_warps; ++w) {
    const int first = w / kWarpgroupWarps * kWarpgroupWarps;
    const auto& per_thread = block.registers.per_thread;
    if (per_thread[w] == per_thread[first]) continue;
    return "setmaxnreg: the warps of a warpgroup end with different numbers of registers: warp " +
           std::to_string(first) + " has " + std::to_string(per_thread[first]) + ", warp " + std::to_string(w) + " " +
           std::to_string(per_thread[w]);
  }
  return "";
}

void set_max_registers(int registers, bool increase, Site site) {
  const char* what = name_of(increase);
  collective(what, site, nullptr, [=](const auto&) -> bool {
    const Thread& me = current_thread();
    Block& block = *me.block;
    RegisterPool& pool = block.registers;
    int& mine = pool.per_thread[me.warp_index];
    if (registers % kStep != 0 || registers < kLeast || registers > kMost) {
      fail(site, "%s: %d registers, not a multiple of 8 in 24 to 256", what, registers);
    }
    if (increase ? registers < mine : registers > mine) {
      fail(site, "%s: %d registers, but the warp has %d", what, registers, mine);
    }
    if (!increase) {
      pool.free += mine - registers;
      mine = registers;
      serve(block);
      return true;
    }
    if (registers - mine > pool.free) {
      pool.wanted[me.warp_index] = registers;
      return false;
    }
    pool.free -= registers - mine;
    mine = registers;
    return true;
  });
}

}  // namespace emulator
