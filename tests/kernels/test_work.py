"""The order of work: every item once, tiles by their lengths within sections of heads, no jump from one to the next."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cupyflash.backends.emulator import guarded_array
from cupyflash.build.params import FWD_PARAMS
from tests.kernels.harness import compiled

pytestmark = pytest.mark.usefixtures("cxx")

BLOCK_M = 16
TEXT = """
#include "isa.cuh"
struct Config {
  static constexpr int kBlockM = 16;
  static constexpr bool kHasUpper = UPPER, kPacked = PACKED;
};
#include "work.cuh"
extern "C" __global__ void items(FwdParams params, u32* out) {
  const FwdWork work = FwdWork::of_block<Config>(params);
  u32* mine = out + 4 * isa::block_index_x();
  isa::stg_4(mine, work.batch);
  isa::stg_4(mine + 1, work.head);
  isa::stg_4(mine + 2, work.row_begin);
  isa::stg_4(mine + 3, work.split);
}
"""


def items(has_upper, batch_size, num_heads, seqlen_q, pack=1, num_splits=1, section=1):
    """(batch, head, tile of rows, split) of every block."""
    text = TEXT.replace("UPPER", str(has_upper).lower()).replace("PACKED", str(pack > 1).lower())
    params = np.zeros((), FWD_PARAMS)
    numbers = {"batch_size": batch_size, "num_heads_q": num_heads, "seqlen_q": seqlen_q, "pack": pack}
    for name, value in (numbers | {"num_splits": num_splits, "section": section}).items():
        params[name] = value
    total = batch_size * (num_heads // pack) * -(-seqlen_q * pack // BLOCK_M) * num_splits
    out = guarded_array((total, 4), np.int32, "out")
    compiled(text).get_function("items")((total,), (32,), (params[()], out))
    assert not (out[:, 2] % BLOCK_M).any()
    return [(batch, head, row // BLOCK_M, split) for batch, head, row, split in out.tolist()]


@pytest.mark.parametrize("has_upper", [False, True])
@pytest.mark.parametrize(("batch_size", "num_heads", "pack"), [(1, 1, 1), (2, 3, 1), (3, 4, 2), (1, 7, 1)])
@pytest.mark.parametrize(
    ("seqlen_q", "num_splits", "section"), [(1, 1, 1), (40, 2, 1), (70, 1, 2), (33, 3, 5), (50, 1, 100)]
)
def test_every_item_once(has_upper, batch_size, num_heads, pack, seqlen_q, num_splits, section):
    section = min(section, batch_size * num_heads // pack)
    found = items(has_upper, batch_size, num_heads, seqlen_q, pack, num_splits, section)
    assert len(set(found)) == len(found)
    assert {(batch, head) for batch, head, _, _ in found} == {
        (batch, head) for batch in range(batch_size) for head in range(0, num_heads, pack)
    }
    assert [split for *_, split in found] == [*range(num_splits)] * (len(found) // num_splits)


@pytest.mark.parametrize("section", range(1, 9))
def test_lengths_never_jump(section):
    """Sections come one after the other; the last tile of all is a head's first, with a causal mask the shortest."""
    found = items(True, 2, 4, 70, section=section)
    heads = [4 * batch + head for batch, head, _, _ in found]
    tiles = [tile for _, _, tile, _ in found]
    assert [head // section for head in heads] == sorted(head // section for head in heads)
    assert max(abs(after - before) for before, after in itertools.pairwise(tiles)) <= 1
    assert tiles[-1] == 0
    for first in range(0, 8, section):
        own = [tile for head, tile in zip(heads, tiles, strict=True) if head // section == first // section]
        assert own in (sorted(own), sorted(own, reverse=True))


def test_without_an_upper_bound_head_by_head():
    found = items(False, 2, 3, 40, section=2)
    assert found == [(batch, head, tile, 0) for batch in range(2) for head in range(3) for tile in range(3)]


ROUNDS = """
#include "isa.cuh"
struct Config {
  static constexpr int kBlockM = 16;
  static constexpr bool kHasUpper = false, kPacked = false;
};
#include "work.cuh"
extern "C" __global__ void rounds(FwdParams params, u32* out) {
  u32 round = 0;
  for (Items items; items.are_left<Config, true>(params); items.advance(), ++round) {
    if (isa::lane_index() == 0) isa::stg_4(out + round * isa::grid_size_x() + isa::block_index_x(), items.item());
  }
}
"""


@pytest.mark.parametrize(("grid", "total"), [(3, 12), (3, 10), (3, 3), (5, 3), (1, 4)])
def test_every_other_round_of_a_block_goes_backwards(grid, total):
    """So that blocks get about the same where lengths fall."""
    params = np.zeros((), FWD_PARAMS)
    for name, value in {"batch_size": 1, "num_heads_q": 1, "seqlen_q": BLOCK_M * total, "num_splits": 1}.items():
        params[name] = value
    num_rounds = -(-total // grid)
    out = guarded_array((num_rounds, grid), np.int32, "out")
    out[...] = -1
    compiled(ROUNDS).get_function("rounds")((grid,), (32,), (params[()], out))
    expected = np.arange(num_rounds * grid).reshape(num_rounds, grid)
    expected[1::2] = expected[1::2, ::-1]
    np.testing.assert_array_equal(out, np.where(expected < total, expected, -1))
