#include "block.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>

#include "report.h"

namespace emulator {

__thread Identity* current = nullptr;

namespace {

// Demotions of the leader under kPriority are rarer than preemptions: PCT wants few of them.
constexpr std::uint32_t kDemoteOneIn = 512;
// And at one choice of a thread in so many a bulk load lands; else they land when nothing can run.
constexpr std::uint32_t kLandOneIn = 8;

// Shared memory starts the way it does on the device: with whatever was there. All ones is a NaN in every
// format.
constexpr int kPoison = 0xff;

int random_bit(Random& random, std::uint32_t bits) {
  for (auto skip = random.below(static_cast<std::uint32_t>(__builtin_popcount(bits))); skip > 0; --skip) {
    bits &= bits - 1;
  }
  return __builtin_ctz(bits);
}

// The warp to run next, -1 if none can.
int pick_warp(Block& block) {
  if (block.launch->options.schedule == Schedule::kFifo) {
    for (int step = 0; step < block.num_warps; ++step) {
      const int w = (block.last_warp + step) % block.num_warps;
      if (block.warps[w].ready != 0) return w;
    }
    return -1;
  }
  std::uint32_t ready = 0;
  for (int w = 0; w < block.num_warps; ++w) {
    if (block.warps[w].ready != 0) ready |= 1u << w;
  }
  if (ready == 0) return -1;
  if (block.launch->options.schedule == Schedule::kRandom) return random_bit(block.random, ready);
  int leader = __builtin_ctz(ready);
  for (std::uint32_t rest = ready; rest != 0; rest &= rest - 1) {
    const int w = __builtin_ctz(rest);
    if (block.warps[w].priority > block.warps[leader].priority) leader = w;
  }
  if (block.random.below(kDemoteOneIn) == 0) block.warps[leader].priority >>= 16;
  return leader;
}

// Within a warp the lowest ready lane: orders among lanes have found nothing that orders among warps do not.
Thread* take_lane(Block& block, Warp& warp) {
  const int lane = __builtin_ctz(warp.ready);
  warp.ready &= warp.ready - 1;
  return &block.threads[warp.index * kWarpSize + lane];
}

Thread* pick(Block& block) {
  if (block.launch->stopped.load(std::memory_order_relaxed)) return nullptr;
  const Schedule schedule = block.launch->options.schedule;
  const auto land_one = [&block, schedule] {
    const auto count = static_cast<std::uint32_t>(block.loads.size());
    land_bulk_load(block, schedule == Schedule::kFifo ? 0 : block.random.below(count));
  };
  if (!block.loads.empty() && schedule == Schedule::kRandom && block.random.below(kLandOneIn) == 0) land_one();
  int w = pick_warp(block);
  while (w < 0 && !block.loads.empty()) {
    land_one();
    w = pick_warp(block);
  }
  if (w < 0) return nullptr;
  block.last_warp = w;
  return take_lane(block, block.warps[w]);
}

// A null `to` is the worker.
void switch_to(Block& block, Thread& from, Thread* to) {
  if (to == &from) return;
  ++block.counters.switches;
  current = to;
  switch_context(from.context, to == nullptr ? block.launcher : to->context);
}

void run_thread() {
  Thread& me = current_thread();
  Block& block = *me.block;
  block.launch->kernel(block.launch->arguments);

  const Rendezvous& meeting = me.warp->rendezvous;
  if (meeting.arrived != 0) {
    fail(meeting.activity.site, "warp divergence: this thread exits while lanes %s of its warp wait at %s",
         lanes_text(meeting.arrived).c_str(), meeting.activity.what);
  }
  if (!me.copies.empty()) {
    fail(me.activity.site, "the thread exits with %zu cp.async operations it has not waited for", me.copies.size());
  }
  finish_bulk_stores();
  finish_warpgroup();
  me.exited = true;
  me.warp->alive &= ~(1u << me.lane_index);
  --block.alive;
  switch_to(block, me, me.warp->ready != 0 ? take_lane(block, *me.warp) : pick(block));
}

std::string index_text(Dim3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string deadlock_report(const Block& block) {
  std::string text = "deadlock in block " + index_text(block.index) + ": no thread can run\n";
  for (int w = 0; w < block.num_warps; ++w) {
    std::map<std::string, std::uint32_t> lanes_by_state;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Thread& thread = block.threads[w * kWarpSize + lane];
      const std::string state =
          thread.exited ? "exited"
                        : std::string("waiting at ") + thread.activity.what + " at " + text_of(thread.activity.site);
      lanes_by_state[state] |= 1u << lane;
    }
    for (const auto& [state, lanes] : lanes_by_state) {
      text += "  warp " + std::to_string(w) + " lanes " + lanes_text(lanes) + ": " + state + "\n";
    }
  }
  for (int b = 0; b < kNamedBarriers; ++b) {
    const NamedBarrier& barrier = block.barriers[b];
    if (barrier.arrived == 0) continue;
    text += "  barrier " + std::to_string(b) + ": " + std::to_string(barrier.arrived) + " of " +
            std::to_string(barrier.expected) + " threads arrived\n";
  }
  return text + mbarrier_table(block) + register_table(block);
}

std::string end_report(const Block& block) {
  for (int b = 0; b < kNamedBarriers; ++b) {
    const NamedBarrier& barrier = block.barriers[b];
    if (barrier.arrived == 0) continue;
    return text_of(barrier.first) + ": block " + index_text(block.index) + " ended with barrier " + std::to_string(b) +
           " unfinished: " + std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
           " threads arrived";
  }
  const std::string report = unfinished_mbarrier_report(block);
  return report.empty() ? uneven_registers_report(block) : report;
}

}  // namespace

Block::Block() : threads(new Thread[kMaxThreads]) {
  mbarriers.reserve(kMaxMbarriers);
  void* mapping = mmap(nullptr, kMaxSharedBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  shared = static_cast<std::byte*>(mapping);
}

Block::~Block() { munmap(shared, kMaxSharedBytes); }

bool Block::run(const Launch& launch_, Dim3 index_, std::uint64_t linear_index) {
  launch = &launch_;
  index = index_;
  num_threads = launch->num_threads;
  num_warps = num_threads / kWarpSize;
  alive = num_threads;
  last_warp = 0;
  failed = false;
  report.clear();
  random.seed(launch->options.seed, linear_index);
  stacks.grow(num_threads);
  std::memset(shared, kPoison, launch->shared_bytes);
  barriers.fill(NamedBarrier{});
  mbarriers.clear();
  loads.clear();
  elected_lane = launch->options.schedule == Schedule::kFifo ? 0 : static_cast<int>(launch->options.seed % kWarpSize);
  races.begin_block(clocks.data(), num_warps);
  for (Warpgroup& group : warpgroups) group.reset();
  registers.reset(num_warps);
  for (int w = 0; w < num_warps; ++w) {
    Warp& warp = warps[w];
    warp.index = w;
    warp.alive = warp.ready = kAllLanes;
    warp.priority = random.next();
    warp.rendezvous.arrived = 0;
    warp.bulk_stores = 0;
    warp.accesses.reset();
  }
  for (int t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    static_cast<Identity&>(thread) = {t, t / kWarpSize, t % kWarpSize, index, launch->grid_size};
    thread.warp = &warps[t / kWarpSize];
    thread.block = this;
    thread.exited = false;
    thread.activity = {};
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.stores.reset();
    prepare(thread.context, stacks.bottom(t), t, run_thread);
  }

  Thread* first = pick(*this);
  if (first == nullptr) return true;  // another worker's block failed
  current = first;
  switch_context(launcher, first->context);
  current = nullptr;

  if (!failed && !launch->stopped) {
    report = alive > 0 ? deadlock_report(*this) : end_report(*this);
    failed = !report.empty();
  }
  if (!failed) {
    ++counters.blocks;
    for (int w = 0; w < num_warps; ++w) warps[w].accesses.finish();
  }
  return !failed;
}

void suspend(const char* what, Site site) {
  Thread& me = current_thread();
  me.activity = {what, site};
  Block& block = *me.block;
  switch_to(block, me, me.warp->ready != 0 ? take_lane(block, *me.warp) : pick(block));
}

void make_ready(Warp& warp, std::uint32_t lanes) { warp.ready |= lanes; }

void yield() {
  Thread& me = current_thread();
  Block& block = *me.block;
  make_ready(*me.warp, 1u << me.lane_index);
  // In turn means the next warp's turn, and the leader would only lead again.
  block.last_warp = (me.warp_index + 1) % block.num_warps;
  me.warp->priority >>= 16;
  switch_to(block, me, pick(block));
}

void fail(Site site, const char* format, ...) {
  Thread& me = current_thread();
  Block& block = *me.block;
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  block.report = text_of(site) + ": block " + index_text(block.index) + " thread " + std::to_string(me.thread_index) +
                 " (warp " + std::to_string(me.warp_index) + " lane " + std::to_string(me.lane_index) + "): " + message;
  block.failed = true;
  switch_to(block, me, nullptr);
  __builtin_unreachable();  // a failed block is never continued
}

}  // namespace emulator
