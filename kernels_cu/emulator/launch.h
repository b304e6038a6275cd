// The runtime's door for Python: launches a compiled kernel over a grid.
#pragma once

#include <cstddef>
#include <cstdint>

#include "block.h"
#include "kernel.h"

#pragma GCC visibility push(default)

extern "C" {

// Like cuLaunchKernel: arguments[i] points at the i-th argument's value. Returns 0, or 1 with the reason in
// `report`. `counters` gets the sums over all blocks, `observer`, if there is one, what the kernel's threads observed:
// a thread's observations in order, worker by worker. One launch runs at a time.
int cupyflash_emulator_launch(const CupyflashKernel* kernel, const std::uint32_t grid[3], std::uint32_t num_threads,
                              std::uint32_t shared_bytes, void** arguments, const emulator::LaunchOptions* options,
                              emulator::Counters* counters, void (*observer)(const void* data, std::size_t bytes),
                              char* report, std::size_t report_bytes);
}

#pragma GCC visibility pop
