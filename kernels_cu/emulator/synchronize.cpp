// Instructions by which threads wait for each other or exchange values: warps, named barriers, shuffles,
// votes.

#include "collective.h"
#include "report.h"

namespace emulator {

void report_divergence(const char* what, Site site) {
  const Thread& me = current_thread();
  const Warp& warp = *me.warp;
  const Rendezvous& meeting = warp.rendezvous;
  if (warp.alive != kAllLanes) {
    fail(site, "warp divergence: this lane executes %s, but lanes %s of its warp have exited", what,
         lanes_text(~warp.alive).c_str());
  }
  fail(site, "warp divergence: this lane executes %s while lanes %s of its warp wait at %s at %s", what,
       lanes_text(meeting.arrived).c_str(), meeting.activity.what, text_of(meeting.activity.site).c_str());
}

void sync_warp(Site site) {
  collective("__syncwarp", site, nullptr, [](const auto&) {
    const Thread& me = current_thread();
    me.block->races.order_lanes(me.block->clock_of(me), me.warp_index);
  });
}

namespace {

struct BarrierOperands {
  int barrier;
  int num_threads;
};

// The current warp comes to a barrier as a whole. False: it has to wait.
bool arrive(const char* what, BarrierOperands operands, bool waits, Site site) {
  const Thread& me = current_thread();
  Block& block = *me.block;
  const auto [index, count] = operands;
  const int expected = count == 0 ? block.num_threads : count;
  if (index < 0 || index >= kNamedBarriers) fail(site, "%s: there is no barrier %d, only 0 to 15", what, index);
  if (expected < 0 || expected % kWarpSize != 0) {
    fail(site, "%s %d: the thread count %d is not a multiple of 32", what, index, expected);
  }
  if (expected > block.num_threads) {
    fail(site, "%s %d: the thread count %d exceeds the block's %d threads", what, index, expected, block.num_threads);
  }
  NamedBarrier& barrier = block.barriers[index];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.first = site;
  } else if (barrier.expected != expected) {
    fail(site, "%s %d: the thread count is %d here, but %d for those who arrived at %s", what, index, expected,
         barrier.expected, text_of(barrier.first).c_str());
  }
  const std::uint32_t bit = 1u << me.warp_index;
  if ((barrier.arrived_warps & bit) != 0) {
    fail(site, "%s %d: warp %d arrives for the second time before the barrier is complete (%d of %d threads)", what,
         index, me.warp_index, barrier.arrived, barrier.expected);
  }
  barrier.arrived_warps |= bit;
  barrier.arrived += kWarpSize;
  block.races.release(block.clock_of(me), me.warp_index, barrier.published);
  if (waits) barrier.waiting_warps |= bit;
  if (barrier.arrived < barrier.expected) return !waits;

  for (std::uint32_t waiting = barrier.waiting_warps; waiting != 0; waiting &= waiting - 1) {
    const int w = __builtin_ctz(waiting);
    block.races.acquire(block.clocks[w], barrier.published);
    if (w != me.warp_index) make_ready(block.warps[w], kAllLanes);
  }
  barrier = NamedBarrier{};
  return true;
}

bool arrive_together(const char* what, const std::array<void*, kWarpSize>& lanes, bool waits, Site site) {
  const auto operands = *static_cast<const BarrierOperands*>(lanes[0]);
  for (const void* lane : lanes) {
    const auto& other = *static_cast<const BarrierOperands*>(lane);
    if (other.barrier != operands.barrier || other.num_threads != operands.num_threads) {
      fail(site, "%s: the lanes of one warp name different barriers: (%d, %d) and (%d, %d)", what, operands.barrier,
           operands.num_threads, other.barrier, other.num_threads);
    }
  }
  return arrive(what, operands, waits, site);
}

}  // namespace

void barrier_sync(int barrier, int num_threads, Site site) {
  constexpr const char* kWhat = "bar.sync";
  BarrierOperands operands{barrier, num_threads};
  collective(kWhat, site, &operands,
             [&](const auto& lanes) -> bool { return arrive_together(kWhat, lanes, /*waits=*/true, site); });
}

void barrier_arrive(int barrier, int num_threads, Site site) {
  constexpr const char* kWhat = "bar.arrive";
  BarrierOperands operands{barrier, num_threads};
  collective(kWhat, site, &operands, [&](const auto& lanes) { arrive_together(kWhat, lanes, /*waits=*/false, site); });
}

namespace {

struct Exchange {
  std::uint32_t value;
  int operand;
  std::uint32_t result;
};

}  // namespace

std::uint32_t shuffle(Shuffle kind, std::uint32_t value, int operand, Site site) {
  static constexpr const char* kNames[] = {"shfl.sync.bfly", "shfl.sync.idx", "shfl.sync.down"};
  Exchange mine{value, operand, 0};
  collective(kNames[static_cast<int>(kind)], site, &mine, [kind](const auto& lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      auto& exchange = *static_cast<Exchange*>(lanes[lane]);
      // Like the instruction, look only at five bits of the operand.
      const int operand = exchange.operand & 31;
      int source = lane;
      if (kind == Shuffle::kXor) source = lane ^ operand;
      if (kind == Shuffle::kIdx) source = operand;
      if (kind == Shuffle::kDown && lane + operand < kWarpSize) source = lane + operand;
      exchange.result = static_cast<const Exchange*>(lanes[source])->value;
    }
  });
  return mine.result;
}

std::uint32_t vote(Vote kind, bool predicate, Site site) {
  static constexpr const char* kNames[] = {"vote.sync.ballot", "vote.sync.any", "vote.sync.all"};
  Exchange mine{predicate, 0, 0};
  collective(kNames[static_cast<int>(kind)], site, &mine, [](const auto& lanes) {
    std::uint32_t votes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) votes |= static_cast<Exchange*>(lanes[lane])->value << lane;
    for (void* lane : lanes) static_cast<Exchange*>(lane)->result = votes;
  });
  if (kind == Vote::kAny) return mine.result != 0;
  if (kind == Vote::kAll) return mine.result == kAllLanes;
  return mine.result;
}

// The PTX ISA leaves open which lane it is, only that it is always the same.
bool elect(Site site) {
  Exchange mine{0, 0, 0};
  collective("elect.sync", site, &mine, [](const auto& lanes) {
    const int elected = current_thread().block->elected_lane;
    for (int lane = 0; lane < kWarpSize; ++lane) static_cast<Exchange*>(lanes[lane])->result = lane == elected;
  });
  return mine.result != 0;
}

void nanosleep(std::uint32_t) { yield(); }

}  // namespace emulator
