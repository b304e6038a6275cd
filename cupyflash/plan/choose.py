"""The choice of kernels: candidates → reasons against them → the choice.

`choose` turns a `Problem` into a `Plan`.  Which kernel it names depends on the `Selector` alone, not on exact lengths,
so that a loop over growing keys finds it again: see `choose_spec`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..errors import Unsupported
from ..hashing import hash_once
from ..problem.dtypes import dtype_named
from ..problem.problem import Problem
from .device import DeviceSpec
from .specs import CombineSpec, Features, FwdSpec, Launch, Plan
from .tiles import FAMILIES, TILES, TileConfig, TileRow, rows_for

__all__ = [
    "Candidate",
    "Selector",
    "blocks_per_sm",
    "candidates",
    "choose",
    "choose_spec",
    "every_spec",
    "num_splits",
    "pack_of",
    "refusals",
    "selector_of",
]

# The kernel's indices are int32: the sum of two lengths, and of the rows that fill up a tile, has to fit.
_MAX_LENGTH = 2**30 - 2**8
_MAX_BLOCKS = 2**31 - 1
_ANY_DEVICE = (99, 0)
# Where scale · log2(e) and the scores keep far from float32's ends, it is folded into the exponent.
_FOLDED_SCALES = (2.0**-64, 2.0**64)

# The heights of the tiles by which packing and the number of blocks are judged, before a tile is chosen.
_NARROWEST, _WIDEST = 64, 128
# Where there are as few tiles of keys, dividing them costs more than it gains; and more parts than these, too.
_MIN_KEY_TILES, _MAX_SPLITS = 4, 128

# What kernels are compiled with.  What is rare shares the one that is bounded on both sides: a window that is open to
# the right, and a scale that can't be folded.
_FEATURES = (_FULL, _CAUSAL, _WINDOW, _ANY_SCALE) = (
    Features(),
    Features(has_upper=True),
    Features(has_lower=True, has_upper=True),
    Features(has_lower=True, has_upper=True, scale_first=True),
)


@hash_once
@dataclass(frozen=True)
class Selector:
    """What selects a kernel."""

    dtype: str
    head_dim: int
    head_dim_v: int
    features: Features
    packed: bool
    fills_device: bool  # the widest tile makes at least one block for each SM


@dataclass(frozen=True)
class Candidate:
    """A kernel that holds the problem's dtype and head dims, and what is against it."""

    spec: FwdSpec
    reasons: tuple[str, ...]


def refusals(problem: Problem) -> list[str]:
    """What the problem asks and no kernel does on any device, one sentence each; empty if some kernel can run it."""
    reasons = []
    dtypes = sorted({dtype for row in TILES for dtype in row.dtypes})
    if problem.dtype not in dtypes:
        reasons.append(f"it has no {problem.dtype}, only {', '.join(dtypes)}")
    elif not rows_for(problem.dtype, problem.head_dim, problem.head_dim_v, _ANY_DEVICE):
        held = ", ".join(sorted({f"{row.head_dim}" for row in TILES if problem.dtype in row.dtypes}, key=int))
        reasons.append(f"it has the head dims {held}, but E was {problem.head_dim} and Ev was {problem.head_dim_v}")
    for name, asked in (
        ("float mask", problem.float_mask_dtype),
        ("bool mask", problem.has_bool_mask),
        ("score_mod", problem.has_score_mod),
        ("mask_mod", problem.has_mask_mod),
        ("softcap", problem.softcap),
        ("alibi_slopes", problem.has_alibi),
        ("sinks", problem.has_sinks),
        ("dropout", problem.dropout_p),
        (f"precision {problem.precision!r}", problem.precision != "ieee"),
        ("weights", problem.weights_stage),
    ):
        if asked:
            reasons.append(f"it has no {name}")
    for name, length in (("L", problem.seqlen_q), ("S", problem.seqlen_k)):
        if length > _MAX_LENGTH:
            reasons.append(f"it takes lengths up to {_MAX_LENGTH}, but {name} was {length}")
    if _num_tiles(problem, min(tile.block_m for row in TILES for tile in row.tiles), 1) > _MAX_BLOCKS:
        reasons.append(f"it takes up to {_MAX_BLOCKS} tiles of queries, and these are more")
    return reasons


def choose(problem: Problem, device: DeviceSpec) -> Plan:
    """The plan for a problem that `refusals` has nothing against.

    Raises
    ------
    Unsupported
        No kernel runs on the device; with a reason for each candidate.
    """
    if 0 in (problem.batch_size, problem.num_heads_q, problem.seqlen_q):
        return Plan(())
    selector = selector_of(problem, device)
    spec = choose_spec(selector, device)
    pack = pack_of(problem) if spec.packed else 1
    num_tiles = _num_tiles(problem, spec.tile.block_m, pack)
    splits = 1
    if FAMILIES[spec.family].splits:
        splits = num_splits(
            num_tiles, _num_key_tiles(problem, spec.tile, pack), device.sms * blocks_per_sm(spec, device)
        )
    row_alignment = FAMILIES[spec.family].row_alignment(dtype_named(spec.dtype).storage.itemsize)
    if splits == 1:
        return Plan((Launch(spec, (num_tiles,)),), 1, pack, row_alignment)
    combine = CombineSpec(spec.dtype)
    num_rows = problem.batch_size * problem.num_heads_q * problem.seqlen_q
    launches = (
        Launch(replace(spec, split=True), (num_tiles * splits,)),
        Launch(combine, (math.ceil(num_rows / combine.rows_per_block),)),
    )
    return Plan(launches, splits, pack, row_alignment)


def selector_of(problem: Problem, device: DeviceSpec) -> Selector:
    """What of the problem selects a kernel."""
    pack = pack_of(problem)
    return Selector(
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        features=_features(problem),
        packed=pack > 1,
        fills_device=_num_tiles(problem, _WIDEST, pack) >= device.sms,
    )


@lru_cache(maxsize=512)
def choose_spec(selector: Selector, device: DeviceSpec) -> FwdSpec:
    """The kernel for what `selector` says; raises as `choose`."""
    found = candidates(selector, device)
    for candidate in found:
        if not candidate.reasons:
            return candidate.spec
    reasons = [reason for candidate in found for reason in candidate.reasons]
    if not reasons:
        cc = min(row.since for row in TILES if selector.dtype in row.dtypes)
        reasons = [
            f"{selector.dtype} needs compute capability {cc[0]}.{cc[1]} or later, {device.name} has "
            f"{device.cc[0]}.{device.cc[1]}"
        ]
    raise Unsupported(
        f'no kernel runs on {device.name}: {"; ".join(reasons)}; pass backend="math"', {"cuda": tuple(reasons)}
    )


def candidates(selector: Selector, device: DeviceSpec) -> list[Candidate]:
    """Every kernel that holds the dtype and head dims, best first, with what is against it on that device."""
    found = []
    itemsize = dtype_named(selector.dtype).storage.itemsize
    for row in rows_for(selector.dtype, selector.head_dim, selector.head_dim_v, device.cc):
        # Best first; where the best would leave SMs idle, the one that makes the most blocks.
        tiles = row.tiles if selector.fills_device else sorted(row.tiles, key=lambda tile: tile.block_m)
        for tile in tiles:
            found.append(Candidate(_spec(row, tile, selector), tuple(row.reasons(tile, itemsize, device))))
    return found


def _spec(row: TileRow, tile: TileConfig, selector: Selector) -> FwdSpec:
    baseline = min(80, 10 * row.since[0] + row.since[1])
    dims = (row.head_dim, row.head_dim_v)
    packed = selector.packed and FAMILIES[row.family].packs
    return FwdSpec(row.family, selector.dtype, *dims, tile, selector.features, packed, baseline=baseline)


def pack_of(problem: Problem) -> int:
    """How many query heads one tile should hold: those that share a key and a value head, or one.

    Packing pays where it leaves fewer of a tile's rows empty, by more than a tenth (FlashAttention-3's rule).
    """
    group = math.gcd(problem.num_heads_q // problem.num_heads_k, problem.num_heads_q // problem.num_heads_v)
    rows = problem.seqlen_q
    return group if _used(rows, _NARROWEST) < 0.9 * _used(rows * group, _NARROWEST) else 1


def _used(rows: int, block_m: int) -> float:
    """The part of the tiles' rows that hold a query."""
    return rows / (math.ceil(rows / block_m) * block_m)


@lru_cache(maxsize=512)
def blocks_per_sm(spec: FwdSpec, device: DeviceSpec) -> int:
    """How many blocks an SM holds at once, by shared memory and, at 255 registers a thread, by registers."""
    reserved = 1 << 10  # of each block's shared memory, for the system
    by_memory = device.smem_per_sm // (spec.shared_bytes + reserved)
    by_registers = (1 << 16) // (256 * spec.num_threads)
    return max(1, min(by_memory, by_registers))


@lru_cache(maxsize=4096)
def num_splits(num_tiles: int, num_key_tiles: int, slots: int) -> int:
    """Into how many parts the keys of each tile of queries are divided.

    As in FlashAttention: one part where tiles of queries fill four fifths of the device, or where there are few tiles
    of keys; otherwise the smallest number whose last wave of blocks is nearly as full as that of the best.

    Parameters
    ----------
    num_tiles, num_key_tiles : int
        Tiles of queries, and of keys for one of them.
    slots : int
        Blocks that the device runs at once.
    """
    if num_tiles >= 0.8 * slots or num_key_tiles <= _MIN_KEY_TILES:
        return 1
    most = min(_MAX_SPLITS, slots, num_key_tiles)
    # Some numbers of parts leave the last ones empty: 11 tiles in parts of ceil(11 / 8) = 2 are 6 parts, not 8.
    choices = [n for n in range(1, most + 1) if math.ceil(num_key_tiles / math.ceil(num_key_tiles / n)) == n]
    efficiency = [num_tiles * n / slots / math.ceil(num_tiles * n / slots) for n in choices]
    best = max(efficiency)
    return next(n for n, e in zip(choices, efficiency, strict=True) if e >= 0.85 * best)


def every_spec() -> Iterator[FwdSpec | CombineSpec]:
    """Every kernel that `choose` may name on some device."""
    found: dict[FwdSpec | CombineSpec, None] = {}
    for row in TILES:
        family = FAMILIES[row.family]
        choices = itertools.product(
            row.tiles,
            row.dtypes,
            _FEATURES,
            (False, True) if family.packs else (False,),
            (False, True) if family.splits else (False,),
        )
        for tile, dtype, features, packed, split in choices:
            selector = Selector(dtype, row.head_dim, row.head_dim_v, features, packed, True)
            found[replace(_spec(row, tile, selector), split=split)] = None
            if split:
                found[CombineSpec(dtype)] = None
    yield from found


def _features(problem: Problem) -> Features:
    if not _FOLDED_SCALES[0] <= problem.scale <= _FOLDED_SCALES[1]:
        return _ANY_SCALE
    if problem.band.lower is not None:
        return _WINDOW
    return _FULL if problem.band.upper is None else _CAUSAL


def _num_tiles(problem: Problem, block_m: int, pack: int) -> int:
    """Tiles of queries; a tile's rows are those of `pack` heads."""
    heads = problem.batch_size * problem.num_heads_q // pack
    return math.ceil(problem.seqlen_q * pack / block_m) * heads


def _num_key_tiles(problem: Problem, tile: TileConfig, pack: int) -> int:
    """Tiles of keys that a tile of queries meets, at most."""
    keys, band = problem.seqlen_k, problem.band
    if band.lower is not None and band.upper is not None:
        queries = math.ceil(tile.block_m / pack)
        keys = min(keys, band.upper - band.lower + queries)
    return math.ceil(keys / tile.block_n)
