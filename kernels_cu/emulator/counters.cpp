#include "counters.h"

#include <algorithm>
#include <set>

namespace emulator {

namespace {

constexpr int kBanks = 32;
constexpr std::uint32_t kSectorBytes = 32;

// The most different words that any one bank holds among [address, address + bytes) of the given addresses.
template <class Addresses>
std::uint64_t wavefronts(const Addresses& addresses, std::uint32_t bytes) {
  std::set<std::uint64_t> words;
  for (const std::uint64_t address : addresses) {
    for (std::uint32_t b = 0; b < bytes; b += 4) words.insert((address + b) / 4);
  }
  std::array<std::uint64_t, kBanks> load{};
  for (const std::uint64_t word : words) ++load[word % kBanks];
  return *std::max_element(load.begin(), load.end());
}

void add_traffic(Traffic& sum, const Traffic& part) {
  sum.instructions += part.instructions;
  sum.cost += part.cost;
  sum.ideal += part.ideal;
}

}  // namespace

void Counters::add(const Counters& other) {
  blocks += other.blocks;
  switches += other.switches;
  collectives += other.collectives;
  mma += other.mma;
  wgmma += other.wgmma;
  bulk += other.bulk;
  add_traffic(ld_shared, other.ld_shared);
  add_traffic(st_shared, other.st_shared);
  add_traffic(ldmatrix, other.ldmatrix);
  add_traffic(stmatrix, other.stmatrix);
  add_traffic(cp_async_shared, other.cp_async_shared);
  add_traffic(ld_global, other.ld_global);
  add_traffic(st_global, other.st_global);
  add_traffic(cp_async_global, other.cp_async_global);
}

void AccessCounter::shared(Traffic& traffic, Site site, int lane, std::uint32_t address, std::uint32_t bytes) {
  note({&traffic, site.file, site.line, bytes, true}, lane, address);
}

void AccessCounter::global(Traffic& traffic, Site site, int lane, std::uintptr_t address, std::uint32_t bytes) {
  note({&traffic, site.file, site.line, bytes, false}, lane, address);
}

void AccessCounter::note(const Key& key, int lane, std::uint64_t address) {
  Instruction& instruction = open_[key];
  const std::uint32_t index = instruction.times[lane]++ - instruction.closed;
  if (instruction.open.size() <= index) instruction.open.resize(index + 1);
  Group& group = instruction.open[index];
  group.lanes |= 1u << lane;
  group.addresses[lane] = address;
  // Only the front can be complete with none before it open: every lane passes the groups in order.
  if (index == 0 && group.lanes == 0xffffffffu) {
    close(key, group);
    instruction.open.erase(instruction.open.begin());
    ++instruction.closed;
  }
}

void AccessCounter::finish() {
  for (auto& [key, instruction] : open_) {
    for (const Group& group : instruction.open) close(key, group);
  }
  open_.clear();
}

void AccessCounter::close(const Key& key, const Group& group) {
  Traffic& traffic = *key.traffic;
  ++traffic.instructions;
  if (!key.is_shared) {
    std::set<std::uint64_t> sectors;
    std::set<std::uint64_t> words;
    for (int lane = 0; lane < 32; ++lane) {
      if ((group.lanes >> lane & 1) == 0) continue;
      for (std::uint32_t b = 0; b < key.bytes; b += 4) {
        words.insert((group.addresses[lane] + b) / 4);
        sectors.insert((group.addresses[lane] + b) / kSectorBytes);
      }
    }
    traffic.cost += sectors.size();
    traffic.ideal += (words.size() * 4 + kSectorBytes - 1) / kSectorBytes;
    return;
  }
  const int lanes_per_pass = key.bytes == 16 ? 8 : key.bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes_per_pass) {
    std::vector<std::uint64_t> addresses;
    for (int lane = first; lane < first + lanes_per_pass; ++lane) {
      if ((group.lanes >> lane & 1) != 0) addresses.push_back(group.addresses[lane]);
    }
    if (addresses.empty()) continue;
    traffic.cost += wavefronts(addresses, key.bytes);
    traffic.ideal += 1;
  }
}

void count_matrix(Traffic& traffic, const std::uint32_t (&rows)[8]) {
  traffic.cost += wavefronts(rows, 16);
  traffic.ideal += 1;
}

}  // namespace emulator
