// Instructions that a warp executes as one.
#pragma once

#include <type_traits>

#include "block.h"

namespace emulator {

// Ends the block: the lanes of this warp are not at one instruction.
[[noreturn]] void report_divergence(const char* what, Site site);

// Brings all lanes of the warp together at one instruction and lets the last one execute it for all:
// `execute(operands)`, operands[lane] being what that lane passed. Returns when it is done. An `execute` that
// returns false leaves the warp suspended; whoever it waits for makes it ready.
template <class Execute>
void collective(const char* what, Site site, void* operands, Execute execute) {
  Thread& me = current_thread();
  Warp& warp = *me.warp;
  Rendezvous& meeting = warp.rendezvous;
  if (warp.alive != kAllLanes) report_divergence(what, site);
  if (meeting.arrived == 0) {
    meeting.activity = {what, site};
  } else if (meeting.activity.what != what || meeting.activity.site.line != site.line ||
             meeting.activity.site.file != site.file) {
    report_divergence(what, site);
  }
  meeting.operands[me.lane_index] = operands;
  meeting.arrived |= 1u << me.lane_index;
  if (meeting.arrived != kAllLanes) {
    suspend(what, site);
    return;
  }
  ++me.block->counters.collectives;
  meeting.arrived = 0;
  bool goes_on = true;
  if constexpr (std::is_same_v<decltype(execute(meeting.operands)), bool>) {
    goes_on = execute(meeting.operands);
  } else {
    execute(meeting.operands);
  }
  if (goes_on) {
    make_ready(warp, kAllLanes & ~(1u << me.lane_index));
  } else {
    suspend(what, site);
  }
}

}  // namespace emulator
