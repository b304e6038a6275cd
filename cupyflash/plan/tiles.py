"""Kernel families and their tiles as data: which there are for which dtype, head dim and GPU, and what each takes.

None of them has been timed on a GPU.  They follow from counting: see the comments at the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..hashing import hash_once
from .device import DeviceSpec

__all__ = ["FAMILIES", "HEAD_DIMS", "TILES", "Family", "TileConfig", "TileRow", "rows_for"]


@hash_once
@dataclass(frozen=True)
class TileConfig:
    """The part of the score matrix that a block works on at a time: block_m rows of queries by block_n keys.

    Without `q_in_registers` a block reads its queries from shared memory again for every tile of keys.
    """

    block_m: int
    block_n: int
    num_warps: int
    q_in_registers: bool = True

    def __str__(self) -> str:
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}{'' if self.q_in_registers else 'q'}"


@dataclass(frozen=True)
class Family:
    """What the plan has to know about a kernel file.

    Parameters
    ----------
    shared_bytes : callable (tile, head_dim, head_dim_v, itemsize) -> int
        Dynamic shared memory of a block.
    rules : callable tile -> list of str
        What is wrong with a tile, on any GPU.
    row_alignment : callable itemsize -> int
        Bytes at whose multiples rows have to begin.
    packs, splits : bool
        Whether there are kernels whose tiles hold several heads, and kernels that share a tile's keys.
    """

    shared_bytes: Callable[[TileConfig, int, int, int], int]
    rules: Callable[[TileConfig], list[str]]
    row_alignment: Callable[[int], int]
    packs: bool = False
    splits: bool = False


@dataclass(frozen=True)
class TileRow:
    """The tiles of a family for padded head dims on GPUs of compute capability `since` and later, best first."""

    family: str
    dtypes: tuple[str, ...]
    head_dim: int
    head_dim_v: int
    since: tuple[int, int]
    tiles: tuple[TileConfig, ...]

    def reasons(self, tile: TileConfig, itemsize: int, device: DeviceSpec) -> list[str]:
        """Why the kernel can't run with this tile on that GPU; empty if it can."""
        family = FAMILIES[self.family]
        reasons = [f"tile {tile}: {rule}" for rule in family.rules(tile)]
        takes = family.shared_bytes(tile, self.head_dim, self.head_dim_v, itemsize)
        if takes > device.smem_per_block:
            reasons.append(
                f"tile {tile} takes {takes} bytes of shared memory at head dims {self.head_dim} and "
                f"{self.head_dim_v}, {device.name} has {device.smem_per_block} per block"
            )
        return reasons


def _sm80_rules(tile: TileConfig) -> list[str]:
    rules = []
    if tile.block_m != 16 * tile.num_warps:
        rules.append(f"a warp owns 16 queries, so {tile.num_warps} warps need m{16 * tile.num_warps}")
    if tile.block_n % (4 * tile.num_warps):
        rules.append(f"the block copies {4 * tile.num_warps} keys at a time, so n must be a multiple of that")
    return rules


def _sm80_shared_bytes(tile: TileConfig, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """As laid out in fwd_sm80.cu: Q, if it stays there, K twice, V; O in the place of Q and K."""
    q, out = (itemsize * tile.block_m * dim for dim in (head_dim, head_dim_v))
    k, v = (itemsize * tile.block_n * dim for dim in (head_dim, head_dim_v))
    if tile.q_in_registers:
        return max(max(2 * k, out) + v, k + q)
    return max(q + 2 * k, out) + v


FAMILIES: dict[str, Family] = {
    # Copies are of 16 bytes at a time.
    "fwd_sm80": Family(_sm80_shared_bytes, _sm80_rules, lambda itemsize: 16, packs=True, splits=False),
}

#: What head dims are padded to.
HEAD_DIMS = (64, 128)

# Eight warps fetch K and V half as often as four do; four warps make twice as many blocks, for problems that would
# leave SMs idle.  At head dim 128 either takes 48 KiB and, as compiled, up to 255 registers a thread: one block of
# eight warps or two of four per SM, also in the 100 KiB of sm_86, sm_89 and sm_120.
_WIDE, _NARROW = TileConfig(128, 64, 8), TileConfig(64, 64, 4)

#: Families in the order of preference.
TILES: tuple[TileRow, ...] = (
    TileRow("fwd_sm80", ("float16", "bfloat16"), 64, 64, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", ("float16", "bfloat16"), 128, 128, (8, 0), (_WIDE, _NARROW)),
)


def rows_for(dtype: str, head_dim: int, head_dim_v: int, cc: tuple[int, int]) -> Sequence[TileRow]:
    """The rows whose padded head dims hold these, on such a GPU: the best first.

    Of the rows of a family for the same head dims, that with the latest `since` counts.  Families come in the order
    of the table, within one that with the least padding first.
    """
    latest: dict[tuple[str, int, int], TileRow] = {}
    for row in TILES:
        if dtype in row.dtypes and (row.head_dim, row.head_dim_v) == (head_dim, head_dim_v) and row.since <= cc:
            key = (row.family, row.head_dim, row.head_dim_v)
            if key not in latest or latest[key].since < row.since:
                latest[key] = row
    order = list(FAMILIES)
    return sorted(latest.values(), key=lambda row: (order.index(row.family), row.head_dim + row.head_dim_v))
