"""Bank conflicts and sectors, without a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from cupyflash.backends.emulator import Options, Traffic, guarded_array, guarded_copy
from tests.kernels.harness import compiled

pytestmark = pytest.mark.usefixtures("cxx")

# One warp copies a tile of 32 rows of 128 bytes and reads it with ldmatrix; chunk c of 16 bytes of row r lies
# at place c ^ SWIZZLE.
TILE = r"""
#include "isa.cuh"
__device__ __forceinline__ u32 chunk_address(int row, int chunk) {
  return isa::shared_base() + 128 * row + 16 * (chunk ^ (SWIZZLE));
}
extern "C" __global__ void tile(const u32* x, u32* out) {
  const int lane = isa::lane_index();
  for (int i = 0; i < 8; ++i) {
    const int row = 4 * i + lane / 8;
    isa::cp_async_16(chunk_address(row, lane % 8), x + 32 * row + 4 * (lane % 8), 16);
  }
  isa::cp_async_commit();
  isa::cp_async_wait<0>();
  isa::sync_warp();
  u32 sum = 0;
  for (int chunk = 0; chunk < 8; ++chunk) {
    u32 frag[4];
    const int row = lane;
    isa::ldmatrix_x4(frag, chunk_address(row, chunk));
    sum += frag[0] + frag[1] + frag[2] + frag[3];
  }
  isa::stg_4(out + lane, sum);
}
"""


def run_tile(swizzle):
    x = guarded_copy(np.arange(1024, dtype=np.uint32), "x")
    out = guarded_array(32, np.uint32, "out")
    tile = compiled(TILE.replace("SWIZZLE", swizzle)).get_function("tile")
    counters = tile((1,), (32,), (x, out), shared_mem=4096, options=Options(counters=True))
    return counters, out.copy()


def test_swizzle_removes_bank_conflicts():
    swizzled, same = run_tile("row % 8")
    assert swizzled.ldmatrix == Traffic(instructions=8, cost=32, ideal=32)
    assert swizzled.cp_async_shared == Traffic(instructions=8, cost=32, ideal=32)
    assert swizzled.cp_async_global == Traffic(instructions=8, cost=128, ideal=128)
    assert swizzled.st_global == Traffic(instructions=1, cost=4, ideal=4)

    straight, out = run_tile("0")
    # All eight rows of a matrix begin in the same bank.
    assert straight.ldmatrix == Traffic(instructions=8, cost=256, ideal=32)
    assert straight.cp_async_shared == Traffic(instructions=8, cost=32, ideal=32)
    np.testing.assert_array_equal(out, same)


def wavefronts(statement):
    """The traffic of ld.shared of one statement, run by a warp."""
    text = rf"""
#include "isa.cuh"
extern "C" __global__ void read(u32* out) {{
  const int lane = isa::lane_index();
  const u32 base = isa::shared_base();
  for (int i = 0; i < 128; ++i) isa::st_shared_4(base + 4 * (32 * i + lane), 0);
  isa::sync_warp();
  {statement}
}}
"""
    out = guarded_array(32, np.uint32, "out")
    read = compiled(text).get_function("read")
    counters = read((1,), (32,), (out,), shared_mem=16384, options=Options(counters=True))
    assert counters.st_shared == Traffic(instructions=128, cost=128, ideal=128)
    return counters.ld_shared


# Worked out by hand from "32 banks of 4 bytes; one word of each bank per wavefront; equal words are free".
READS = {
    "isa::ld_shared_4(base + 4 * lane);": Traffic(1, 1, 1),
    "isa::ld_shared_4(base);": Traffic(1, 1, 1),
    "isa::ld_shared_4(base + 8 * lane);": Traffic(1, 2, 1),
    "isa::ld_shared_4(base + 128 * lane);": Traffic(1, 32, 1),
    "isa::ld_shared_4(base + 132 * lane);": Traffic(1, 1, 1),
    "isa::ld_shared_8(base + 8 * lane);": Traffic(1, 2, 2),
    "isa::ld_shared_8(base + 16 * lane);": Traffic(1, 4, 2),
    "isa::ld_shared_16(base + 16 * lane);": Traffic(1, 4, 4),
    "isa::ld_shared_16(base + 32 * lane);": Traffic(1, 8, 4),
    "if (lane < 8) isa::ld_shared_16(base + 128 * lane);": Traffic(1, 8, 1),
    "for (int i = 0; i < 3; ++i) isa::ld_shared_4(base + 8 * lane);": Traffic(3, 6, 3),
}


@pytest.mark.parametrize("statement", READS)
def test_wavefronts(statement):
    assert wavefronts(statement) == READS[statement]


STORES = {
    "4 * lane": Traffic(1, 4, 4),
    "8 * lane": Traffic(1, 8, 4),
    "32 * lane": Traffic(1, 32, 4),
    "4 * lane + 16": Traffic(1, 5, 4),
    "0": Traffic(1, 1, 1),
}


@pytest.mark.parametrize("offset", STORES)
def test_sectors(offset):
    text = rf"""
#include "isa.cuh"
extern "C" __global__ void store(unsigned char* out) {{
  const int lane = isa::lane_index();
  isa::stg_4(out + {offset}, 0);
}}
"""
    out = guarded_array(2048, np.uint8, "out", alignment=256)
    counters = compiled(text).get_function("store")((1,), (32,), (out,), options=Options(counters=True))
    assert counters.st_global == STORES[offset]


def test_counts_add_up_over_workers():
    text = r"""
#include "isa.cuh"
extern "C" __global__ void store(u32* out) {
  isa::sync_threads();
  isa::stg_4(out + 64 * isa::block_index_x() + isa::thread_index(), 1);
}
"""
    out = guarded_array(64 * 9, np.uint32, "out")
    for workers in (1, 2, 3):
        out[...] = 0
        counters = compiled(text).get_function("store")(
            (9,), (64,), (out,), options=Options(counters=True, workers=workers, schedule="random", seed=5)
        )
        assert (out == 1).all()
        assert counters.blocks == 9
        assert counters.collectives == 18
        assert counters.st_global.instructions == 18
