"""Kernel families and their tiles as data: which there are for which dtype, head dim and GPU, and what each takes.

None of them has been timed on a GPU.  They follow from counting: see the comments at the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..hashing import hash_once
from .device import DeviceSpec

__all__ = ["FAMILIES", "TILES", "Family", "TileConfig", "TileRow", "rows_for"]


@hash_once
@dataclass(frozen=True)
class TileConfig:
    """The part of the score matrix that a block works on at a time: block_m rows of queries by block_n keys.

    Without `q_in_registers` a block reads its queries from shared memory again for every tile of keys.  `stages` is how
    many tiles of keys, and as many of values, are under way or in use at once, for kernels that leave it open; with
    `ping_pong` their warpgroups take turns at starting products, and one in `exp2_by_fma` exponentials is computed with
    multiply-adds, if that is not 0; where scores are changed or weights dropped it is.
    """

    block_m: int
    block_n: int
    num_warps: int
    q_in_registers: bool = True
    stages: int = 0
    ping_pong: bool = False
    exp2_by_fma: int = 0

    def __str__(self) -> str:
        ring = (f"s{self.stages}" if self.stages else "") + "p" * self.ping_pong
        ring += f"e{self.exp2_by_fma}" if self.exp2_by_fma else ""
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}{'' if self.q_in_registers else 'q'}{ring}"


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
        Whether there are kernels whose tiles hold several heads, and whether blocks may share a tile's keys.
    any_scale : bool
        Every kernel takes any scale: there is none with `Features.scale_first`.
    baselines : tuple of int
        The oldest GPUs whose instructions kernels use, 75 or 80 for compute capability 7.5 or 8.0; more than one
        where older GPUs have kernels of their own.
    only : int or None
        The one major compute capability whose GPUs have its instructions: its kernels are compiled for "sm_90a" where
        others are for "sm_90".  None: later GPUs have them too.
    takes_maps : bool
        Kernels find Q, K, V and O by tensor maps, which do not describe every array: see `build/bulk.py`.
    persists : bool
        Blocks of most kernels, see `FwdSpec.persists`, take one item of work after another, so that a grid need not be
        larger than what the device runs at once.
    least_rows : int
        Where tiles have fewer rows to hold, another family's lower ones, several to an SM, are the better choice.
    """

    shared_bytes: Callable[[TileConfig, int, int, int], int]
    rules: Callable[[TileConfig], list[str]]
    row_alignment: Callable[[int], int]
    packs: bool = False
    splits: bool = False
    any_scale: bool = False
    baselines: tuple[int, ...] = (75,)
    only: int | None = None
    takes_maps: bool = False
    persists: bool = False
    least_rows: int = 1

    def arch_for(self, device: DeviceSpec) -> str:
        """What the compiler calls the architecture for which it compiles the family's kernels for that GPU."""
        return device.arch if self.only is None else f"{device.arch}a"


@dataclass(frozen=True)
class TileRow:
    """The tiles of a family for padded head dims on GPUs of compute capability `since` and later, best first."""

    family: str
    dtypes: tuple[str, ...]
    head_dim: int
    head_dim_v: int
    since: tuple[int, int]
    tiles: tuple[TileConfig, ...]

    @property
    def baseline(self) -> int:
        """The oldest GPUs whose instructions its kernels use: one of its family's `baselines`."""
        cc = 10 * self.since[0] + self.since[1]
        return max(baseline for baseline in FAMILIES[self.family].baselines if baseline <= cc)

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


def _simt_rules(tile: TileConfig) -> list[str]:
    if tile.block_m % (2 * tile.num_warps) or tile.block_n % 16:
        return [f"a row has 16 threads, so m must be a multiple of {2 * tile.num_warps} and n of 16"]
    return []


def _simt_shared_bytes(tile: TileConfig, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """Panels of 128 bytes of Q and K, and P, as accumulators; 16 bytes of padding at each row."""
    p_row = tile.block_n * max(4, itemsize) + 16
    return (tile.block_m + tile.block_n) * 144 + tile.block_m * p_row


def _sm90_rules(tile: TileConfig) -> list[str]:
    rules = []
    if tile.block_m not in (64, 128, 192) or tile.num_warps != tile.block_m // 16 + 4:
        rules.append("up to three warpgroups own 64 queries each, so m is 64, 128 or 192, with four warps that copy")
    if tile.block_n % 16 or tile.block_n > 256:
        rules.append("a product takes 16 to 256 keys, in steps of 16")
    if tile.stages < 2 or tile.q_in_registers:
        rules.append("queries are read from shared memory, and the ring has two stages or more")
    return rules


def _sm90_shared_bytes(tile: TileConfig, head_dim: int, head_dim_v: int, itemsize: int) -> int:
    """As laid out in fwd_sm90.cu: Q, in whose place O leaves; rings of K and of V; barriers of 8 bytes."""
    q = itemsize * tile.block_m * max(head_dim, head_dim_v)
    barriers = 2 * (tile.block_m // 64) + 4 * tile.stages
    return q + tile.stages * itemsize * tile.block_n * (head_dim + head_dim_v) + 8 * barriers


FAMILIES: dict[str, Family] = {
    # What bulk copies take: rows at multiples of 16 bytes.
    "fwd_sm90": Family(
        _sm90_shared_bytes,
        _sm90_rules,
        lambda itemsize: 16,
        packs=True,
        splits=True,
        baselines=(90,),
        only=9,
        takes_maps=True,
        persists=True,
        least_rows=65,
    ),
    # Copies are of 16 bytes at a time.
    "fwd_sm80": Family(
        _sm80_shared_bytes, _sm80_rules, lambda itemsize: 16, packs=True, splits=True, baselines=(75, 80)
    ),
    "fwd_simt": Family(
        _simt_shared_bytes, _simt_rules, lambda itemsize: itemsize, packs=True, splits=True, any_scale=True
    ),
}

# Eight warps fetch K and V half as often as four do; four warps make twice as many blocks, for problems that would
# leave SMs idle.  A thread keeps head_dim_v / 2 + block_n / 2 accumulators, and head_dim / 4 registers of Q if it
# keeps Q; it may have 255 registers, of which the rest of the kernel takes about 90.
_WIDE, _NARROW = TileConfig(128, 64, 8), TileConfig(64, 64, 4)
_WIDE_Q, _NARROW_Q = TileConfig(128, 64, 8, q_in_registers=False), TileConfig(64, 64, 4, q_in_registers=False)
# Half as many keys, then half as many queries: for the 99 KiB of sm_86, sm_89 and sm_120, and where registers are few.
_SHORT_Q, _SMALL_Q = TileConfig(128, 32, 8, q_in_registers=False), TileConfig(64, 32, 4, q_in_registers=False)
# For the 64 KiB of sm_75.
_TINY_Q = TileConfig(64, 16, 4, q_in_registers=False)

_HALF = ("float16", "bfloat16")

# On Hopper two warpgroups of 64 rows each, and a ring of two tiles of 128, 112 or 64 keys.  At head dim 64 exponentials
# take longer than the products: one in eight is computed with multiply-adds.  What stands behind these is for `tune`.
_HOPPER, _HOPPER_192, _HOPPER_256 = (TileConfig(128, n, 12, q_in_registers=False, stages=2) for n in (128, 112, 64))
_HOPPER_64, _HOPPER_IN_TURNS = replace(_HOPPER, exp2_by_fma=8), replace(_HOPPER, ping_pong=True)

# A thread has 4 x 4 scores; of double 4 x 2, for P would otherwise take twice the shared memory.
_SINGLE, _DOUBLE = TileConfig(64, 64, 8), TileConfig(64, 32, 8)

#: Families in the order of preference.
TILES: tuple[TileRow, ...] = (
    # 80, 120, 160, 216, 208 and 192 KiB: one block per SM.  A thread that computes has 240 registers for head_dim_v / 2
    # accumulators of O, block_n / 2 of S, block_n / 4 of P, and what changes scores: too few for 80 keys at 256.
    TileRow("fwd_sm90", _HALF, 64, 64, (9, 0), (_HOPPER_64, _HOPPER)),
    TileRow("fwd_sm90", _HALF, 96, 96, (9, 0), (_HOPPER,)),
    TileRow("fwd_sm90", _HALF, 128, 128, (9, 0), (_HOPPER, _HOPPER_IN_TURNS)),
    TileRow("fwd_sm90", _HALF, 192, 192, (9, 0), (_HOPPER_192,)),
    TileRow("fwd_sm90", _HALF, 192, 128, (9, 0), (_HOPPER,)),
    TileRow("fwd_sm90", _HALF, 256, 256, (9, 0), (_HOPPER_256,)),
    # 12 to 48 KiB and, as compiled, up to 116, 162, 190 and 212 registers: at least one block of eight warps or two of
    # four per SM, four of four at head dim 32.
    TileRow("fwd_sm80", _HALF, 32, 32, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", _HALF, 64, 64, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", _HALF, 96, 96, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", _HALF, 128, 128, (8, 0), (_WIDE, _NARROW)),
    # With Q in registers some would spill, here and at 192.  100 KiB; 80 where these do not fit.
    TileRow("fwd_sm80", _HALF, 160, 160, (8, 0), (_WIDE_Q, _NARROW_Q)),
    # 120 KiB; 84 and 60 where these do not fit.
    TileRow("fwd_sm80", _HALF, 192, 192, (8, 0), (_WIDE_Q, _SHORT_Q, _SMALL_Q)),
    # 70 KiB; 112 registers of O, beside which there are not enough for 64 keys; and 32 keys are no equal parts for
    # eight warps to copy.
    TileRow("fwd_sm80", _HALF, 224, 224, (8, 0), (_SMALL_Q,)),
    # 112 and 80 KiB; 128 registers of O.
    TileRow("fwd_sm80", _HALF, 256, 256, (8, 0), (_SHORT_Q, _SMALL_Q)),
    # E and Ev differ: Q and K with a part that V lacks (multi-head latent attention), values of another width.
    TileRow("fwd_sm80", _HALF, 64, 128, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", _HALF, 128, 64, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", _HALF, 192, 128, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", _HALF, 128, 256, (8, 0), (_SHORT_Q, _SMALL_Q)),
    TileRow("fwd_sm80", _HALF, 256, 128, (8, 0), (_WIDE_Q, _SMALL_Q)),
    # sm_75 multiplies float16 only.  At most 60 KiB.
    TileRow("fwd_sm80", ("float16",), 32, 32, (7, 5), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", ("float16",), 64, 64, (7, 5), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", ("float16",), 96, 96, (7, 5), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", ("float16",), 128, 128, (7, 5), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", ("float16",), 192, 192, (7, 5), (_SMALL_Q,)),
    TileRow("fwd_sm80", ("float16",), 256, 256, (7, 5), (_TINY_Q,)),
    # 35 KiB, of double 30.  Queries and keys are walked over in pieces of 128 bytes, so E chooses no kernel, and may be
    # anything up to 256 like Ev.  As compiled up to 128 registers at 64, then one block of eight warps per SM.
    *(
        TileRow("fwd_simt", (dtype,), 256, head_dim_v, (7, 5), (tile,))
        for dtype, tile in (("float32", _SINGLE), ("float64", _DOUBLE), ("bfloat16", _SINGLE))
        for head_dim_v in (32, 64, 128, 256)
    ),
)


def rows_for(dtype: str, head_dim: int, head_dim_v: int, cc: tuple[int, int]) -> Sequence[TileRow]:
    """The rows whose padded head dims hold these, on such a GPU: the best first.

    Of the rows of a family for the same head dims, that with the latest `since` counts.  Families come in the order
    of the table, within one that with the least padding first.
    """
    latest: dict[tuple[str, int, int], TileRow] = {}
    for row in TILES:
        holds = row.head_dim >= head_dim and row.head_dim_v >= head_dim_v
        if dtype in row.dtypes and holds and row.since <= cc and FAMILIES[row.family].only in (None, cc[0]):
            key = (row.family, row.head_dim, row.head_dim_v)
            if key not in latest or latest[key].since < row.since:
                latest[key] = row
    order = list(FAMILIES)
    return sorted(latest.values(), key=lambda row: (order.index(row.family), row.head_dim + row.head_dim_v))
