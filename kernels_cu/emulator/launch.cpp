#include "launch.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "memory.h"

namespace emulator {

namespace {

std::mutex launch_mutex;
std::vector<std::unique_ptr<Block>> workers;  // kept between launches: their stacks are mapped

constexpr std::size_t kArgumentAlignment = 128;  // that of the strictest argument, a tensor map

// The arguments' values, copied to where a kernel may expect its parameters.
class Arguments {
 public:
  Arguments(const CupyflashKernel& kernel, void** values) {
    std::size_t total = 0;
    for (int i = 0; i < kernel.num_arguments; ++i) total += padded(kernel.argument_bytes[i]);
    storage_.resize(total + kArgumentAlignment);
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    std::byte* next = storage_.data() + (padded(address) - address);
    for (int i = 0; i < kernel.num_arguments; ++i) {
      std::memcpy(next, values[i], kernel.argument_bytes[i]);
      pointers_.push_back(next);
      next += padded(kernel.argument_bytes[i]);
    }
  }
  void** data() { return pointers_.data(); }

 private:
  static std::size_t padded(std::size_t bytes) {
    return (bytes + kArgumentAlignment - 1) / kArgumentAlignment * kArgumentAlignment;
  }
  std::vector<std::byte> storage_;
  std::vector<void*> pointers_;
};

// The n-th block to run: in order, or with a random schedule in an order that depends on the seed.
class BlockOrder {
 public:
  BlockOrder(const LaunchOptions& options, std::uint64_t count) : count_(count) {
    if (options.schedule == Schedule::kFifo || count < 3) return;
    offset_ = options.seed % count;
    factor_ = options.seed * 2654435761u % count;
    while (factor_ == 0 || std::gcd(factor_, count) != 1) factor_ = (factor_ + 1) % count;
  }
  std::uint64_t operator()(std::uint64_t n) const { return (n * factor_ + offset_) % count_; }

 private:
  std::uint64_t count_;
  std::uint64_t factor_ = 1;
  std::uint64_t offset_ = 0;
};

// Whether the caller, who may do so at any time, has asked for an end.
bool is_unwanted(const LaunchOptions& options) {
  return options.stop != nullptr && __atomic_load_n(options.stop, __ATOMIC_RELAXED) != 0;
}

}  // namespace

}  // namespace emulator

extern "C" int cupyflash_emulator_launch(const CupyflashKernel* kernel, const std::uint32_t grid[3],
                                         std::uint32_t num_threads, std::uint32_t shared_bytes, void** arguments,
                                         const emulator::LaunchOptions* options, emulator::Counters* counters,
                                         void (*observer)(const void* data, std::size_t bytes), char* report,
                                         std::size_t report_bytes) {
  using namespace emulator;
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const std::uint64_t num_blocks = static_cast<std::uint64_t>(grid[0]) * grid[1] * grid[2];
  const auto refuse = [&](const std::string& reason) {
    std::snprintf(report, report_bytes, "%s", reason.c_str());
    return 1;
  };
  if (num_blocks == 0) return refuse("the grid is empty");
  if (num_threads == 0 || num_threads % kWarpSize != 0 || num_threads > kMaxThreads) {
    return refuse("a block has 32 to 1024 threads, a multiple of 32, not " + std::to_string(num_threads));
  }
  if (shared_bytes > kMaxSharedBytes) {
    return refuse("a block has at most " + std::to_string(kMaxSharedBytes) + " bytes of shared memory, not " +
                  std::to_string(shared_bytes));
  }

  Arguments values(*kernel, arguments);
  Launch launch;
  launch.options = *options;
  launch.kernel = kernel->run;
  launch.arguments = values.data();
  launch.grid_size = {grid[0], grid[1], grid[2]};
  launch.num_threads = static_cast<int>(num_threads);
  launch.shared_bytes = shared_bytes;

  const BlockOrder order(*options, num_blocks);
  std::atomic<std::uint64_t> next{0};
  std::mutex report_mutex;
  std::string reason;
  const auto work = [&](Block& block) {
    const AlternateStack alternate_stack;
    block.counters = {};
    block.observations.clear();
    block.races.reset(options->race_detector != 0, shared_bytes);
    for (std::uint64_t n = next++; n < num_blocks && !launch.stopped && !is_unwanted(*options); n = next++) {
      const std::uint64_t b = order(n);
      const Dim3 index = {static_cast<unsigned int>(b % grid[0]), static_cast<unsigned int>(b / grid[0] % grid[1]),
                          static_cast<unsigned int>(b / grid[0] / grid[1])};
      if (block.run(launch, index, b)) continue;
      const std::lock_guard<std::mutex> report_lock(report_mutex);
      if (reason.empty()) reason = block.report;
      launch.stopped = true;
    }
  };

  const auto wanted = static_cast<std::uint64_t>(options->workers < 1 ? 1 : options->workers);
  const auto num_workers = static_cast<std::size_t>(wanted < num_blocks ? wanted : num_blocks);
  while (workers.size() < num_workers) workers.push_back(std::make_unique<Block>());
  observing = observer != nullptr;
  {
    const FaultHandlers fault_handlers;
    std::vector<std::thread> others;
    for (std::size_t w = 1; w < num_workers; ++w) others.emplace_back([&, w] { work(*workers[w]); });
    work(*workers[0]);
    for (std::thread& other : others) other.join();
  }
  *counters = {};
  for (std::size_t w = 0; w < num_workers; ++w) counters->add(workers[w]->counters);
  for (std::size_t w = 0; observing && w < num_workers; ++w) {
    observer(workers[w]->observations.data(), workers[w]->observations.size());
  }

  if (reason.empty() && is_unwanted(*options)) return refuse("the caller has stopped it");
  const std::string overrun = check_filling();
  if (reason.empty()) reason = overrun;
  return reason.empty() ? 0 : refuse(reason);
}
