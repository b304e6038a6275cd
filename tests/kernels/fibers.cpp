// Fibers that pass a token round a ring, each holding integers and floating-point numbers in registers across every
// switch. Prints the sum at the end; tests/kernels/test_fibers.py knows what it must be.
#include <cstdio>
#include <memory>

#include "emulator/fiber.cpp"

namespace {

constexpr int kFibers = 300;
constexpr int kRounds = 50;

emulator::Context contexts[kFibers];
emulator::Context ring_end;
emulator::StackPool stacks;
int running = 0;
double total = 0;

void pass_on() {
  const int me = running;
  running = (me + 1) % kFibers;
  emulator::switch_context(contexts[me], contexts[running]);
}

void run() {
  const int me = running;
  // More values than there are registers that calls preserve, all live across the switch.
  double numbers[10];
  long long integers[8];
  for (int i = 0; i < 10; ++i) numbers[i] = me * 0.5 + i;
  for (int i = 0; i < 8; ++i) integers[i] = me * 1000LL + i;
  for (int round = 0; round < kRounds; ++round) {
    pass_on();
    for (double& number : numbers) number += 0.25;
    for (long long& integer : integers) integer += 3;
  }
  for (const double number : numbers) total += number;
  for (const long long integer : integers) total += static_cast<double>(integer);
  if (me == kFibers - 1) emulator::switch_context(contexts[me], ring_end);
  pass_on();
}

}  // namespace

int main() {
  stacks.grow(10);
  stacks.grow(kFibers);
  for (int i = 0; i < kFibers; ++i) emulator::prepare(contexts[i], stacks.bottom(i), i, run);
  emulator::switch_context(ring_end, contexts[0]);
  const bool guarded = stacks.is_overflow(stacks.bottom(7) - 1) && !stacks.is_overflow(stacks.bottom(7));
  std::printf("%.2f %d\n", total, guarded);
}
