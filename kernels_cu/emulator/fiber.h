// Fibers: executions with a stack of their own that hand the CPU to each other by name.
//
// Every CUDA thread of a block is one fiber, and all fibers of a block share one OS thread, so a switch is a
// handful of instructions and nothing runs at the same time. Hand-written for x86-64 and AArch64 (6-9 ns);
// everything else, and any build with EMULATOR_PORTABLE_FIBERS, goes through ucontext (about 230 ns, because
// it saves the signal mask).
#pragma once

#include <cstddef>

#if !defined(EMULATOR_PORTABLE_FIBERS) && !defined(__x86_64__) && !defined(__aarch64__)
#define EMULATOR_PORTABLE_FIBERS 1
#endif

#if defined(EMULATOR_PORTABLE_FIBERS)
#include <ucontext.h>
#endif

namespace emulator {

// Where an execution stands while it does not run. Not movable: a ucontext_t points into itself.
struct Context {
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

#if defined(EMULATOR_PORTABLE_FIBERS)
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
};

// Stacks of one size, each with an inaccessible page below it, so that an overflow is a fault and not a
// riddle.
class StackPool {
 public:
  static constexpr std::size_t kStackBytes = 64 * 1024;

  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  // Makes at least `count` stacks. Throws std::bad_alloc.
  void grow(int count);
  std::byte* bottom(int index) const;
  // True if the address is in a page below one of the stacks.
  bool is_overflow(const void* address) const;

 private:
  std::byte* mapping_ = nullptr;
  int count_ = 0;
};

// Makes `context` start `entry` on the given stack at the next switch to it. `entry` must never return.
// `stagger` (any number >= 0) shifts the first frame: tops that lie exactly 64 KiB apart would share L1 cache
// sets.
void prepare(Context& context, std::byte* stack_bottom, int stagger, void (*entry)());

// Saves the caller in `from` and continues `to`. Returns when something switches back to `from`.
void switch_context(Context& from, Context& to);

}  // namespace emulator
