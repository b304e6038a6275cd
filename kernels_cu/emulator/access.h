// The checks that every access to memory makes.
#pragma once

#include "block.h"

namespace emulator {

// The bytes at an address of shared memory, after checking alignment (to `alignment`) and bounds.
std::byte* shared_bytes(const char* what, std::uint32_t address, std::uint32_t bytes, std::uint32_t alignment, Site);

// Tells the race detector; fails on a race.
void note_shared(AccessKind kind, std::uint8_t lane, std::uint32_t address, std::uint32_t bytes, Site);

// The same for an access that goes on by itself: see RaceDetector::access_async.
void note_async(AccessKind kind, std::uint8_t lane, int identity, std::uint32_t when, std::uint32_t address,
                std::uint32_t bytes, Site);

// Checks alignment, and touches the first and last byte, so that a fault happens here, where the site is
// known.
void probe_global(const char* what, const void* address, std::uint32_t bytes, std::uint32_t alignment, Site);

}  // namespace emulator
