// A launch without Python, for machines that are themselves emulated. test_aarch64.py puts the flattened kernel `mix`
// before this text and its export before main. Prints a checksum of the output, then what the emulator says to a read past the end.
#include <cstdio>
#include <vector>

#include "emulator/export.h"
#include "emulator/runtime.cpp"

int main() {
  constexpr int kThreads = 128;
  constexpr int kTiles = 6;
  auto* x = static_cast<u32*>(cupyflash_emulator_allocate(kTiles * 1024, 16, 0, "x"));
  std::vector<u32> out(kThreads);
  for (int i = 0; i < kTiles * 256; ++i) {
    // Halves between 1/2 and 2 with random low bits.
    const u32 bits = static_cast<u32>(i) * 2654435761u;
    x[i] = 0x38003800u | (bits & 0x07ff07ffu);
  }
  for (int num_tiles = kTiles; num_tiles <= kTiles + 1; ++num_tiles) {
    for (int schedule = 0; schedule < 3; ++schedule) {
      u32* out_gmem = out.data();
      void* arguments[] = {&x, &out_gmem, &num_tiles};
      const emulator::LaunchOptions options = {7, static_cast<emulator::Schedule>(schedule), 1, 1, 1, 2};
      const std::uint32_t grid[3] = {3, 1, 1};
      emulator::Counters counters;
      char report[4096];
      if (cupyflash_emulator_launch(&cupyflash_kernel_mix, grid, kThreads, 4096, arguments, &options, &counters,
                                    nullptr, report, sizeof report) != 0) {
        // Without the address, which differs from run to run.
        const char* array = std::strstr(report, "near array");
        std::printf("%s\n", array == nullptr ? report : array);
        continue;
      }
      u32 sum = 0;
      for (const u32 word : out) sum = 31 * sum + word;
      std::printf("%08x %llu\n", sum, static_cast<unsigned long long>(counters.mma));
    }
  }
}
