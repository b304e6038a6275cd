#include "memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include "block.h"

namespace emulator {

namespace {

struct GuardedArray {
  std::string name;
  std::byte* mapping;
  std::size_t mapping_bytes;
  std::byte* body;  // the accessible pages
  std::size_t body_bytes;
  std::byte* begin;
  std::size_t bytes;
};

// Far enough for an index that is off by a few rows of a large array; address space costs nothing.
constexpr std::size_t kArrayGuardBytes = std::size_t{64} << 20;
constexpr std::byte kFilling{0xA5};

std::mutex arrays_mutex;
std::vector<GuardedArray> arrays;

bool is_filled(const std::byte* begin, const std::byte* end) {
  for (; begin != end; ++begin) {
    if (*begin != kFilling) return false;
  }
  return true;
}

}  // namespace

std::string describe_address(const void* address) {
  // No lock: called from a fault, and arrays change only between launches.
  const auto* byte = static_cast<const std::byte*>(address);
  for (const GuardedArray& array : arrays) {
    if (byte < array.mapping || byte >= array.mapping + array.mapping_bytes) continue;
    const std::byte* end = array.begin + array.bytes;
    if (byte < array.begin) {
      return "near array '" + array.name + "': " + std::to_string(array.begin - byte) + " bytes before its start";
    }
    return "near array '" + array.name + "': " + std::to_string(byte - end) + " bytes past its end";
  }
  return "";
}

std::string check_filling() {
  std::string report;
  const std::lock_guard<std::mutex> lock(arrays_mutex);
  for (const GuardedArray& array : arrays) {
    std::byte* end = array.begin + array.bytes;
    std::byte* body_end = array.body + array.body_bytes;
    const bool before = is_filled(array.body, array.begin);
    const bool after = is_filled(end, body_end);
    if (before && after) continue;
    report = "the launch wrote " + std::string(before ? "past the end" : "before the start") + " of array '" +
             array.name + "'";
    std::memset(array.body, static_cast<int>(kFilling), static_cast<std::size_t>(array.begin - array.body));
    std::memset(end, static_cast<int>(kFilling), static_cast<std::size_t>(body_end - end));
  }
  return report;
}

namespace {

struct sigaction previous_segv;
struct sigaction previous_bus;

// Not async-signal-safe by the book: it allocates. The fault is a kernel's own access, though, so no lock of
// the allocator is held.
void on_fault(int signal, siginfo_t* info, void*) {
  if (current == nullptr) {
    // Not a kernel's: the instruction faults again under the handler that was there before.
    sigaction(signal, signal == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
    return;
  }
  const Thread& me = current_thread();
  const Activity activity = me.activity;
  if (me.block->stacks.is_overflow(info->si_addr)) {
    fail(activity.site, "stack overflow: a thread's local arrays and calls exceed %zu bytes (last instruction: %s)",
         StackPool::kStackBytes, activity.what == nullptr ? "none" : activity.what);
  }
  const std::string place = describe_address(info->si_addr);
  fail(activity.site, "%s: illegal access to global memory at %p%s%s",
       activity.what == nullptr ? "start" : activity.what, info->si_addr, place.empty() ? ", near no array" : ", ",
       place.c_str());
}

}  // namespace

FaultHandlers::FaultHandlers() {
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  // SA_NODEFER: fail() leaves the handler by switching to another stack, so the signal must not stay blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

FaultHandlers::~FaultHandlers() {
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
}

struct AlternateStack::Storage {
  stack_t previous;
  alignas(16) std::byte bytes[64 * 1024];
};

AlternateStack::AlternateStack() : storage_(new Storage) {
  stack_t stack{};
  stack.ss_sp = storage_->bytes;
  stack.ss_size = sizeof storage_->bytes;
  sigaltstack(&stack, &storage_->previous);
}

AlternateStack::~AlternateStack() {
  sigaltstack(&storage_->previous, nullptr);
  delete storage_;
}

}  // namespace emulator

extern "C" void* cupyflash_emulator_allocate(std::size_t bytes, std::size_t alignment, int at_start, const char* name) {
  using namespace emulator;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t body_bytes = (bytes + page - 1) / page * page;
  const std::size_t mapping_bytes = body_bytes + 2 * kArrayGuardBytes;
  void* mapping = mmap(nullptr, mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  auto* body = static_cast<std::byte*>(mapping) + kArrayGuardBytes;
  if (body_bytes > 0 && mprotect(body, body_bytes, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping, mapping_bytes);
    return nullptr;
  }
  std::byte* begin = at_start != 0 ? body : body + (body_bytes - bytes) / alignment * alignment;
  std::byte* end = begin + bytes;
  std::memset(body, static_cast<int>(kFilling), static_cast<std::size_t>(begin - body));
  std::memset(end, static_cast<int>(kFilling), static_cast<std::size_t>(body + body_bytes - end));
  const std::lock_guard<std::mutex> lock(arrays_mutex);
  arrays.push_back({name, static_cast<std::byte*>(mapping), mapping_bytes, body, body_bytes, begin, bytes});
  return begin;
}

extern "C" void cupyflash_emulator_free(void* array) {
  using namespace emulator;
  const std::lock_guard<std::mutex> lock(arrays_mutex);
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    if (arrays[i].begin != array) continue;
    munmap(arrays[i].mapping, arrays[i].mapping_bytes);
    arrays.erase(arrays.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
}
