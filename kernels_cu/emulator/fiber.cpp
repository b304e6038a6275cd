#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace emulator {

namespace {

// Wide enough that a large array does not reach over it, and odd in pages: were all stacks a power of two apart, their
// pages would compete for the same few places in the TLB.
std::size_t guard_bytes() {
  static const std::size_t bytes = 64 * 1024 + static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

std::size_t stride_bytes() { return StackPool::kStackBytes + guard_bytes(); }

}  // namespace

StackPool::~StackPool() {
  if (mapping_ != nullptr) munmap(mapping_, stride_bytes() * static_cast<std::size_t>(count_));
}

void StackPool::grow(int count) {
  if (count <= count_) return;
  if (mapping_ != nullptr) munmap(mapping_, stride_bytes() * static_cast<std::size_t>(count_));
  mapping_ = nullptr;
  count_ = 0;
  const std::size_t bytes = stride_bytes() * static_cast<std::size_t>(count);
  void* mapping = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<std::byte*>(mapping);
  count_ = count;
  for (int i = 0; i < count; ++i) {
    if (mprotect(bottom(i), kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
}

std::byte* StackPool::bottom(int index) const {
  return mapping_ + stride_bytes() * static_cast<std::size_t>(index) + guard_bytes();
}

bool StackPool::is_overflow(const void* address) const {
  const auto offset = reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(mapping_);
  return offset < stride_bytes() * static_cast<std::size_t>(count_) && offset % stride_bytes() < guard_bytes();
}

#if defined(EMULATOR_PORTABLE_FIBERS)

void prepare(Context& context, std::byte* stack_bottom, int stagger, void (*entry)()) {
  const std::size_t offset = static_cast<std::size_t>(stagger % 61) * 64;
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack_bottom;
  context.state.uc_stack.ss_size = StackPool::kStackBytes - offset;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

// Both routines push the registers that a call preserves, store the stack pointer in *from, load it from
// `to`, pop, and end in a plain return, which the CPU predicts better than an indirect jump.
extern "C" void cupyflash_emulator_switch(void** from, void* to);

#if defined(__x86_64__)

asm(R"(
  .text
  .p2align 4
  .globl cupyflash_emulator_switch
  .hidden cupyflash_emulator_switch
  .type cupyflash_emulator_switch, @function
cupyflash_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cupyflash_emulator_switch, .-cupyflash_emulator_switch
)");

namespace {

constexpr int kSavedWords = 6;

void* first_frame(std::byte* top, void (*entry)()) {
  auto* frame = reinterpret_cast<std::uint64_t*>(top);
  *--frame = 0;  // the return address of `entry`: ends a debugger's walk, and aligns the stack as after a call
  *--frame = reinterpret_cast<std::uint64_t>(entry);
  frame -= kSavedWords;
  std::memset(frame, 0, kSavedWords * sizeof(*frame));
  return frame;
}

}  // namespace

#else  // __aarch64__

asm(R"(
  .text
  .p2align 4
  .globl cupyflash_emulator_switch
  .hidden cupyflash_emulator_switch
  .type cupyflash_emulator_switch, %function
cupyflash_emulator_switch:
  stp x29, x30, [sp, #-160]!
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x29, x30, [sp], #160
  ret
  .size cupyflash_emulator_switch, .-cupyflash_emulator_switch
)");

namespace {

constexpr int kSavedWords = 20;

void* first_frame(std::byte* top, void (*entry)()) {
  auto* frame = reinterpret_cast<std::uint64_t*>(top) - kSavedWords;
  std::memset(frame, 0, kSavedWords * sizeof(*frame));
  frame[1] = reinterpret_cast<std::uint64_t>(entry);  // x30, where `ret` goes
  return frame;
}

}  // namespace

#endif

void prepare(Context& context, std::byte* stack_bottom, int stagger, void (*entry)()) {
  std::byte* top = stack_bottom + StackPool::kStackBytes - static_cast<std::size_t>(stagger % 61) * 64;
  context.stack_pointer = first_frame(top, entry);
}

void switch_context(Context& from, Context& to) { cupyflash_emulator_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emulator
