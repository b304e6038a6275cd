// Counts what a profiler would: instructions, bank conflicts of shared memory, sectors of global memory.
//
// Model. A warp's access to shared memory takes one wavefront for each different 4-byte word that one of the
// 32 banks must deliver; accesses of 8 and 16 bytes are served for half and quarter warps, and ldmatrix
// matrix by matrix. A warp's access to global memory moves every 32-byte sector it touches. `ideal` is the
// least that the same bytes could have cost, so "no bank conflicts" reads wavefronts == ideal.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "site.h"

namespace emulator {

// Python reads these by position: cupyflash/backends/emulator.py.
struct Traffic {
  std::uint64_t instructions = 0;
  std::uint64_t cost = 0;  // wavefronts or sectors
  std::uint64_t ideal = 0;
};

struct Counters {
  std::uint64_t blocks = 0;
  std::uint64_t switches = 0;     // from one thread to another
  std::uint64_t collectives = 0;  // instructions of a whole warp
  std::uint64_t mma = 0;
  std::uint64_t wgmma = 0;  // counted for each warp
  std::uint64_t bulk = 0;   // loads and stores of tiles
  Traffic ld_shared;
  Traffic st_shared;
  Traffic ldmatrix;
  Traffic stmatrix;
  Traffic cp_async_shared;
  Traffic ld_global;
  Traffic st_global;
  Traffic cp_async_global;

  void add(const Counters& other);
};

// Puts the lanes' separate accesses together to those of a warp: the n-th time each lane comes to one
// instruction is the same access. Lanes need not come together, so an access that some lanes skip is counted
// when the block ends.
class AccessCounter {
 public:
  void reset() { open_.clear(); }
  void shared(Traffic& traffic, Site site, int lane, std::uint32_t address, std::uint32_t bytes);
  void global(Traffic& traffic, Site site, int lane, std::uintptr_t address, std::uint32_t bytes);
  void finish();

 private:
  struct Group {
    std::uint32_t lanes = 0;
    std::array<std::uint64_t, 32> addresses;
  };
  struct Instruction {
    std::array<std::uint32_t, 32> times{};  // how often each lane has come here
    std::uint32_t bytes = 0;
    std::uint32_t closed = 0;  // groups before open.front()
    std::vector<Group> open;
  };
  struct Key {
    Traffic* traffic;
    const char* file;
    int line;
    std::uint32_t bytes;
    bool is_shared;
    auto order() const { return std::tuple(traffic, file, line, bytes, is_shared); }
    bool operator<(const Key& other) const { return order() < other.order(); }
  };

  void note(const Key& key, int lane, std::uint64_t address);
  static void close(const Key& key, const Group& group);

  std::map<Key, Instruction> open_;
};

// One 8 x 8 matrix of ldmatrix or stmatrix: eight rows of 16 bytes.
void count_matrix(Traffic& traffic, const std::uint32_t (&rows)[8]);

}  // namespace emulator
