// wgmma: products of a warpgroup, m64nNk16, that go on by themselves until they are waited for.
//
// A warp's accumulators are poison from the issue of a wgmma to the warp's wait for it. Operands in shared memory are
// read when the first warp issues the wgmma and again when it completes, and must not have changed. It completes for
// the whole warpgroup, when the first of its warps has waited for it and all have issued it, so a warp that has waited
// may tell others that the operands are free.

#include <cstring>

#include "access.h"
#include "collective.h"
#include "numeric.h"
#include "report.h"
#include "warpgroup.h"

namespace emulator {

namespace {

constexpr int kTileM = 64;
constexpr int kTileK = 16;
constexpr int kWarpRows = 16;
constexpr const char* kName = "wgmma.mma_async";

Warpgroup& group_of(Block& block, int warp) { return block.warpgroups[warp / kWarpgroupWarps]; }
WarpgroupWarp& member(Block& block, int warp) { return group_of(block, warp).warps[warp % kWarpgroupWarps]; }

// A matrix descriptor, taken apart: PTX ISA, "Matrix descriptor format".
struct Descriptor {
  std::uint32_t start;
  std::uint32_t leading;  // byte offsets
  std::uint32_t stride;
  std::uint32_t span;  // of the swizzle in bytes; 16: none

  Descriptor(std::uint64_t bits, Site site) {
    const auto field = [&](int low, int width) {
      return static_cast<std::uint32_t>(bits >> low & ((std::uint64_t{1} << width) - 1));
    };
    start = field(0, 14) << 4;
    leading = field(16, 14) << 4;
    stride = field(32, 14) << 4;
    static constexpr std::uint32_t kSpans[] = {16, 128, 64, 32};
    span = kSpans[field(62, 2)];
    if (field(49, 3) != 0) fail(site, "%s: a descriptor's base offset is %u; only 0 is modelled", kName, field(49, 3));
    if (field(14, 2) != 0 || field(30, 2) != 0 || field(46, 3) != 0 || field(52, 10) != 0) {
      fail(site, "%s: the descriptor 0x%016llx has bits that must be 0", kName, static_cast<unsigned long long>(bits));
    }
    // Eight rows of `span` bytes are one pattern. An address in a later row of it would need a base offset.
    const std::uint32_t pattern = 8 * span;
    if (span > 16 && start % pattern >= 128) {
      fail(site, "%s: an operand starts at shared+0x%x, not in the first 128 bytes of a pattern of %u", kName,
           start - kSharedBase, pattern);
    }
  }

  // The address of the eight elements (row .. row, k .. k + 7), K-major, k a multiple of 8.
  std::uint32_t k_major(int row, int k) const {
    const auto r = static_cast<std::uint32_t>(row);
    const auto chunk = static_cast<std::uint32_t>(k / 8);
    const std::uint32_t offset = r / 8 * stride + r % 8 * span + (span == 16 ? chunk * leading : chunk * 16);
    return swizzled(start + offset);
  }

  // The address of the eight elements (row .. row + 7, k), MN-major, row a multiple of 8.
  std::uint32_t mn_major(int row, int k) const {
    const std::uint32_t span_elements = span / 2;
    const auto r = static_cast<std::uint32_t>(row);
    const auto kk = static_cast<std::uint32_t>(k);
    return swizzled(start + r / span_elements * leading + kk / 8 * stride + kk % 8 * span + r % span_elements * 2);
  }

 private:
  // Bits 4 and up are exchanged by bits 7 and up: three bits of them for 128 bytes, two for 64, one for 32.
  std::uint32_t swizzled(std::uint32_t address) const { return address ^ (address >> 3 & (span - 16)); }
};

// The operand's elements as (rows, 16). With `note` the race detector learns of it.
std::vector<std::uint16_t> fetch(std::uint64_t bits, int rows, bool transposed, bool note, std::uint32_t when,
                                 Site site) {
  const Thread& me = current_thread();
  const Descriptor descriptor(bits, site);
  const int identity = kFirstWarpgroup + me.warp_index / kWarpgroupWarps;
  if (transposed && descriptor.span == 16) {
    fail(site, "%s: transposed operands without swizzle are not modelled", kName);
  }
  const auto chunk_at = [&](std::uint32_t address) {
    const std::byte* chunk = shared_bytes(kName, address, 16, 16, site);
    if (note) note_async(AccessKind::kMultiply, kWholeWarp, identity, when, address, 16, site);
    return chunk;
  };
  std::vector<std::uint16_t> elements(static_cast<std::size_t>(rows * kTileK));
  if (!transposed) {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < kTileK; k += 8) {
        std::memcpy(&elements[static_cast<std::size_t>(row * kTileK + k)], chunk_at(descriptor.k_major(row, k)), 16);
      }
    }
    return elements;
  }
  for (int k = 0; k < kTileK; ++k) {
    for (int row = 0; row < rows; row += 8) {
      std::uint16_t chunk[8];
      std::memcpy(chunk, chunk_at(descriptor.mn_major(row, k)), 16);
      for (int i = 0; i < 8; ++i) elements[static_cast<std::size_t>((row + i) * kTileK + k)] = chunk[i];
    }
  }
  return elements;
}

void to_floats(Format format, const std::uint16_t* bits, float (&values)[kTileK]) {
  std::uint16_t copy[kTileK];
  std::memcpy(copy, bits, sizeof copy);
  if (format == Format::kFloat16) {
    floats_from_f16(copy, values);
  } else {
    floats_from_bf16(copy, values);
  }
}

bool agree(const WgmmaOperands& a, const WgmmaOperands& b) {
  return a.format == b.format && a.n == b.n && a.a_in_registers == b.a_in_registers && a.accumulate == b.accumulate &&
         a.transpose_a == b.transpose_a && a.transpose_b == b.transpose_b && a.a_descriptor == b.a_descriptor &&
         a.b_descriptor == b.b_descriptor;
}

// Row and column that a lane's accumulator i has in its warp's 16 rows: PTX ISA, "Register fragments for
// wgmma.mma_async.m64nNk16".
int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
int accumulator_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

struct WgmmaCall {
  WgmmaOperands operands;
  float* acc;
  const std::uint32_t* a;
};

using EightFloats = float __attribute__((vector_size(32), aligned(4)));

// values (16, n) = (values or 0) + a (16, 16) b (16, n), added in the order of k.
void multiply_rows(const float (&a)[kWarpRows][kTileK], const std::vector<float>& b, int n, bool accumulate,
                   std::vector<float>& values) {
  for (int row = 0; row < kWarpRows; ++row) {
    for (int column = 0; column < n; column += 8) {
      auto& place = *reinterpret_cast<EightFloats*>(&values[static_cast<std::size_t>(row * n + column)]);
      EightFloats sum = accumulate ? place : EightFloats{};
      for (int k = 0; k < kTileK; ++k) {
        sum += a[row][k] * *reinterpret_cast<const EightFloats*>(&b[static_cast<std::size_t>(k * n + column)]);
      }
      place = sum;
    }
  }
}

// The warp's accumulators, taken from their registers unless an earlier wgmma is still to write them.
PendingAccumulators& take_accumulators(WarpgroupWarp& warp, const std::array<void*, kWarpSize>& lanes, int n,
                                       Site site) {
  const auto call = [&](int lane) { return static_cast<const WgmmaCall*>(lanes[lane]); };
  for (PendingAccumulators& pending : warp.accumulators) {
    if (pending.registers[0] != call(0)->acc) continue;
    if (pending.n != n) {
      fail(site, "%s: these accumulators are under way with n = %d since %s", kName, pending.n,
           text_of(pending.site).c_str());
    }
    return pending;
  }
  PendingAccumulators taken;
  taken.n = n;
  taken.values.resize(static_cast<std::size_t>(kWarpRows * n));
  for (int lane = 0; lane < kWarpSize; ++lane) {
    taken.registers[lane] = call(lane)->acc;
    for (int i = 0; i < n / 2; ++i) {
      taken.values[static_cast<std::size_t>(accumulator_row(lane, i) * n + accumulator_column(lane, i))] =
          call(lane)->acc[i];
    }
    std::memset(call(lane)->acc, 0xff, static_cast<std::size_t>(n / 2) * sizeof(float));
  }
  warp.accumulators.push_back(std::move(taken));
  return warp.accumulators.back();
}

std::uint32_t group_time(const Block& block, int group) {
  return block.races.past() + 1 + static_cast<std::uint32_t>(group);
}

void issue(const std::array<void*, kWarpSize>& lanes, Site site) {
  const Thread& me = current_thread();
  Block& block = *me.block;
  Warpgroup& group = group_of(block, me.warp_index);
  WarpgroupWarp& warp = member(block, me.warp_index);
  const WgmmaOperands& operands = static_cast<const WgmmaCall*>(lanes[0])->operands;
  ++block.counters.wgmma;
  for (const void* lane : lanes) {
    if (!agree(static_cast<const WgmmaCall*>(lane)->operands, operands)) {
      fail(site, "%s: the lanes of one warp have different descriptors", kName);
    }
  }
  if (me.warp_index / kWarpgroupWarps * kWarpgroupWarps + kWarpgroupWarps > block.num_warps) {
    fail(site, "%s: warp %d has no whole warpgroup, the block has %d warps", kName, me.warp_index, block.num_warps);
  }
  if (!warp.fenced) {
    fail(site, "%s: the warp has not executed wgmma_fence since its last wgmma_wait (or at all)", kName);
  }

  const std::uint32_t when = group_time(block, warp.committed);
  std::size_t index = static_cast<std::size_t>(warp.issued++ - group.first);
  const bool is_first = index == group.wgmmas.size();
  std::vector<std::uint16_t> a;
  if (!operands.a_in_registers) a = fetch(operands.a_descriptor, kTileM, operands.transpose_a, true, when, site);
  std::vector<std::uint16_t> b = fetch(operands.b_descriptor, operands.n, operands.transpose_b, true, when, site);
  if (is_first) {
    Wgmma wgmma{operands, site, std::move(a), std::move(b), {}};
    wgmma.b_values.resize(static_cast<std::size_t>(kTileK * operands.n));
    for (int n = 0; n < operands.n; ++n) {
      float column[kTileK];
      to_floats(operands.format, &wgmma.b[static_cast<std::size_t>(n * kTileK)], column);
      for (int k = 0; k < kTileK; ++k) wgmma.b_values[static_cast<std::size_t>(k * operands.n + n)] = column[k];
    }
    group.wgmmas.push_back(std::move(wgmma));
  }
  const Wgmma& wgmma = group.wgmmas[index];
  if (!is_first) {
    if (!agree(wgmma.operands, operands)) {
      fail(site, "%s: the warps of a warpgroup issue different ones; another is at %s", kName,
           text_of(wgmma.site).c_str());
    }
    if (a != wgmma.a || b != wgmma.b) {
      fail(site, "%s: an operand in shared memory has changed since another warp of the warpgroup issued it", kName);
    }
  }

  float rows[kWarpRows][kTileK];
  if (operands.a_in_registers) {
    std::uint16_t bits[kWarpRows][kTileK];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t pair = static_cast<const WgmmaCall*>(lanes[lane])->a[i];
        std::memcpy(&bits[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2)], &pair, sizeof pair);
      }
    }
    for (int row = 0; row < kWarpRows; ++row) to_floats(operands.format, bits[row], rows[row]);
  } else {
    const int first_row = me.warp_index % kWarpgroupWarps * kWarpRows;
    for (int row = 0; row < kWarpRows; ++row) {
      to_floats(operands.format, &wgmma.a[static_cast<std::size_t>((first_row + row) * kTileK)], rows[row]);
    }
  }
  PendingAccumulators& pending = take_accumulators(warp, lanes, operands.n, site);
  pending.group = warp.committed;
  pending.site = site;
  multiply_rows(rows, wgmma.b_values, operands.n, operands.accumulate, pending.values);
}

// All wgmmas of the next groups, up to `groups` in all, are over: shared memory must be as it was.
void complete(Warpgroup& group, int groups) {
  for (; group.complete < groups; ++group.complete) {
    for (; group.first < group.group_ends[static_cast<std::size_t>(group.complete)]; ++group.first) {
      const Wgmma& wgmma = group.wgmmas.front();
      const WgmmaOperands& operands = wgmma.operands;
      const bool same_b =
          fetch(operands.b_descriptor, operands.n, operands.transpose_b, false, 0, wgmma.site) == wgmma.b;
      const bool same_a = operands.a_in_registers ||
                          fetch(operands.a_descriptor, kTileM, operands.transpose_a, false, 0, wgmma.site) == wgmma.a;
      if (!same_a || !same_b) {
        fail(wgmma.site, "%s: the operand %s in shared memory has changed before it was complete", kName,
             same_a ? "b" : "a");
      }
      group.wgmmas.pop_front();
    }
  }
}

// The warp has waited for its first `groups` groups: it gets its accumulators and learns that the reads are over.
void deliver(Block& block, int w, int groups) {
  WarpgroupWarp& warp = member(block, w);
  warp.finished = groups;
  warp.wanted = 0;
  warp.fenced = false;
  std::vector<PendingAccumulators> rest;
  for (PendingAccumulators& pending : warp.accumulators) {
    if (pending.group >= groups) {
      rest.push_back(std::move(pending));
      continue;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < pending.n / 2; ++i) {
        if (bits_of(pending.registers[lane][i]) != kAllLanes) {
          fail(pending.site, "%s: accumulator %d of lane %d was written before the wgmma was waited for", kName, i,
               lane);
        }
        pending.registers[lane][i] =
            pending
                .values[static_cast<std::size_t>(accumulator_row(lane, i) * pending.n + accumulator_column(lane, i))];
      }
    }
  }
  warp.accumulators = std::move(rest);
  if (groups > 0) {
    std::uint32_t& seen = block.clocks[w].seen[kFirstWarpgroup + w / kWarpgroupWarps];
    const std::uint32_t time = group_time(block, groups - 1);
    if (seen < time) seen = time;
  }
}

bool all_have_committed(const Warpgroup& group, int groups) {
  for (const WarpgroupWarp& warp : group.warps) {
    if (warp.committed < groups) return false;
  }
  return true;
}

}  // namespace

void Warpgroup::reset() {
  for (WarpgroupWarp& warp : warps) warp = {};
  wgmmas.clear();
  first = 0;
  group_ends.clear();
  complete = 0;
}

void finish_warpgroup() {
  const Thread& me = current_thread();
  const WarpgroupWarp& warp = member(*me.block, me.warp_index);
  if (warp.accumulators.empty()) return;
  fail(warp.accumulators.front().site, "%s: the warp exits without having waited for it", kName);
}

void wgmma(Format format, float* acc, int num_registers, const std::uint32_t* a, std::uint64_t a_descriptor,
           std::uint64_t b_descriptor, bool accumulate, bool transpose_a, bool transpose_b, Site site) {
  maybe_preempt();
  WgmmaCall mine{
      {format, 2 * num_registers, a != nullptr, transpose_a, transpose_b, accumulate, a_descriptor, b_descriptor},
      acc,
      a};
  collective(kName, site, &mine, [=](const auto& lanes) { issue(lanes, site); });
}

void wgmma_fence(Site site) {
  collective("wgmma.fence", site, nullptr, [](const auto&) {
    const Thread& me = current_thread();
    member(*me.block, me.warp_index).fenced = true;
  });
}

void wgmma_commit(Site site) {
  constexpr const char* kWhat = "wgmma.commit_group";
  collective(kWhat, site, nullptr, [=](const auto&) {
    const Thread& me = current_thread();
    Block& block = *me.block;
    Warpgroup& group = group_of(block, me.warp_index);
    WarpgroupWarp& warp = member(block, me.warp_index);
    const auto number = static_cast<std::size_t>(warp.committed++);
    if (number == group.group_ends.size()) {
      group.group_ends.push_back(warp.issued);
    } else if (group.group_ends[number] != warp.issued) {
      fail(site, "%s: the warps of a warpgroup commit different wgmmas: %d and %d", kWhat, group.group_ends[number],
           warp.issued);
    }
    const int base = me.warp_index / kWarpgroupWarps * kWarpgroupWarps;
    for (int w = base; w < base + kWarpgroupWarps && w < block.num_warps; ++w) {
      const int wanted = member(block, w).wanted;
      if (wanted == 0 || !all_have_committed(group, wanted)) continue;
      complete(group, wanted);
      deliver(block, w, wanted);
      make_ready(block.warps[w], kAllLanes);
    }
  });
}

void wgmma_wait(int pending_groups, Site site) {
  constexpr const char* kWhat = "wgmma.wait_group";
  collective(kWhat, site, nullptr, [=](const auto&) -> bool {
    const Thread& me = current_thread();
    Block& block = *me.block;
    Warpgroup& group = group_of(block, me.warp_index);
    WarpgroupWarp& warp = member(block, me.warp_index);
    const int groups = warp.committed - pending_groups;
    if (groups <= warp.finished) {
      warp.fenced = false;
      return true;
    }
    if (all_have_committed(group, groups)) {
      complete(group, groups);
      deliver(block, me.warp_index, groups);
      return true;
    }
    warp.wanted = groups;
    return false;
  });
}

}  // namespace emulator
