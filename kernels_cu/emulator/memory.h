// Global memory that notices what goes past its ends.
//
// An array lies between stretches of inaccessible address space, flush against the far one, so a stray access
// is a fault of the CPU and costs nothing when all is well. The fault becomes a report that names the array
// and the kernel's line, and the process goes on. What fits between the array and the page borders is filled
// with a known byte and looked at after each launch.
#pragma once

#include <cstddef>
#include <string>

namespace emulator {

// "near array 'k': 2032 bytes past its end" for an address in or around a guarded array, "" for any other.
std::string describe_address(const void* address);

// Says which array was overrun within its page, if any; "" if none. Repairs the filling.
std::string check_filling();

// Turns faults of kernels into reports as long as it lives. Other faults go to the handlers that were there
// before.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;
};

// A stack for this OS thread's fault handler: the one in use may be the one that overflowed.
class AlternateStack {
 public:
  AlternateStack();
  ~AlternateStack();
  AlternateStack(const AlternateStack&) = delete;
  AlternateStack& operator=(const AlternateStack&) = delete;

 private:
  struct Storage;
  Storage* storage_;
};

}  // namespace emulator

#pragma GCC visibility push(default)

extern "C" {

// An array of `bytes` bytes at a multiple of `alignment` (a power of two up to 4096), all zero, pages taken
// from the system only where touched. It ends where inaccessible memory begins (up to `alignment` - 1 bytes
// earlier), or with `at_start` starts where inaccessible memory ends. Null if there is no memory.
void* cupyflash_emulator_allocate(std::size_t bytes, std::size_t alignment, int at_start, const char* name);
void cupyflash_emulator_free(void* array);
}

#pragma GCC visibility pop
