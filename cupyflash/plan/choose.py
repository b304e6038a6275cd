"""The choice of kernels: candidates → reasons against them → the choice, by the clock where `tune` asked it.

`choose` turns a `Problem` into a `Plan`.  Which kernel it names depends on the `Selector` alone, not on exact lengths,
and nothing but the number of splits and the order of tiles hangs on S, so that a loop over growing keys finds all the
rest again.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from ..errors import Unsupported
from ..hashing import hash_once
from ..problem.dtypes import dtype_named
from ..problem.expression import MAX_LENGTH as MAX_LENGTH_WITH_MODS
from ..problem.problem import STAGES, Problem
from .device import DeviceSpec
from .specs import CombineSpec, Features, FwdSpec, KernelSpec, Launch, Mods, Plan, WeightsSpec
from .tiles import FAMILIES, TILES, TileConfig, TileRow, rows_for

__all__ = [
    "Candidate",
    "Rows",
    "Selector",
    "blocks_per_sm",
    "candidates",
    "choose",
    "choose_spec",
    "every_spec",
    "key_of",
    "num_splits",
    "pack_of",
    "refusals",
    "section_of",
    "selector_of",
    "use_timed",
]

# The kernel's indices are int32: the sum of two lengths, and of the rows that fill up a tile, has to fit. The rows of
# heads that share tiles count as one length.
_MAX_LENGTH = 2**30 - 2**8
_MAX_BLOCKS = 2**31 - 1
_ANY_DEVICE = (99, 0)
# Where scale · log2(e) and the scores keep far from float32's ends, it is folded into the exponent.
_FOLDED_SCALES = (2.0**-64, 2.0**64)

# The heights of the tiles by which packing and the number of blocks are judged, before a tile is chosen.
_NARROWEST, _WIDEST = 64, 128
_ROW_STEP = 16  # rows of a selector are counted in these
# Where there are as few tiles of keys, dividing them costs more than it gains; and more parts than these, too.
_MIN_KEY_TILES, _MAX_SPLITS = 4, 128

# What kernels are compiled with.  What is rare shares the one that is bounded on both sides: a window that is open to
# the right, and a scale that can't be folded.
_PLAIN = (_FULL, _CAUSAL, _WINDOW, _ANY_SCALE) = (
    Features(),
    Features(has_upper=True),
    Features(has_lower=True, has_upper=True),
    Features(has_lower=True, has_upper=True, scale_first=True),
)


class Rows(NamedTuple):
    """The rows of queries that tiles have to hold, as far as they select a tile."""

    height: int  # of one head, or of the heads that share a tile; up to the tallest tile
    fills_device: bool  # the tallest tile makes at least one block for each SM


@hash_once
@dataclass(frozen=True)
class Selector:
    """What selects a kernel."""

    dtype: str
    head_dim: int
    head_dim_v: int
    features: Features
    rows: Rows  # where a tile holds queries of one head
    packed_rows: Rows | None  # where it holds all heads that share a key head; None where that does not pay
    unmapped: tuple[str, ...] = ()  # why no tensor maps describe the operands


@dataclass(frozen=True)
class Candidate:
    """A kernel that holds the problem's dtype and head dims.

    Parameters
    ----------
    spec : FwdSpec
    reasons : tuple of str
        Why it can't run on the device; empty if it can.
    behind : str
        Why another one that can run is preferred; empty for the choice.
    """

    spec: FwdSpec
    reasons: tuple[str, ...]
    behind: str = ""


def refusals(problem: Problem) -> list[str]:
    """What the problem asks and no kernel does on any device, one sentence each; empty if some kernel can run it.

    A score_mod or mask_mod that can't be traced is refused when it is: see `cupyflash.problem.trace`.
    """
    reasons = list(_refused(problem.of_any_length))
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    if seqlen_q > _MAX_LENGTH:
        reasons.append(f"it takes lengths up to {_MAX_LENGTH}, but L was {seqlen_q}")
    if seqlen_k > _MAX_LENGTH:
        reasons.append(f"it takes lengths up to {_MAX_LENGTH}, but S was {seqlen_k}")
    if problem.has_alibi and abs(problem.shift) > _MAX_LENGTH:
        reasons.append(f"it takes shifts of the diagonal up to {_MAX_LENGTH} with ALiBi, but align was {problem.shift}")
    if problem.has_score_mod or problem.has_mask_mod:
        lengths = (problem.batch_size, problem.num_heads_q, seqlen_q, seqlen_k)
        if max(lengths) > MAX_LENGTH_WITH_MODS:
            reasons.append(f"it takes lengths up to {MAX_LENGTH_WITH_MODS} with mods, but B, Hq, L, S were {lengths}")
    # At one row a tile: no tile makes more blocks.
    if problem.batch_size * problem.num_heads_q * seqlen_q > _MAX_BLOCKS and _most_tiles(problem) > _MAX_BLOCKS:
        reasons.append(f"it takes up to {_MAX_BLOCKS} tiles of queries, and these are more")
    return reasons


@lru_cache(maxsize=512)
def _refused(problem: Problem) -> tuple[str, ...]:
    """What is refused whatever the lengths."""
    dtype, head_dim, head_dim_v, precision = problem.dtype, problem.head_dim, problem.head_dim_v, problem.precision
    reasons = []
    dtypes = sorted({dtype for row in TILES for dtype in row.dtypes})
    if dtype not in dtypes:
        reasons.append(f"it has no {dtype}, only {', '.join(dtypes)}")
    elif not rows_for(dtype, head_dim, head_dim_v, _ANY_DEVICE):
        held = ", ".join(sorted({f"{row.head_dim}" for row in TILES if dtype in row.dtypes}, key=int))
        reasons.append(f"it has the head dims {held}, but E was {head_dim} and Ev was {head_dim_v}")
    if precision != "ieee":
        reasons.append(f"it has no precision {precision!r}")
    return tuple(reasons)


def choose(
    problem: Problem,
    device: DeviceSpec,
    mods: Mods | None = None,
    spec: FwdSpec | None = None,
    unmapped: tuple[str, ...] = (),
) -> Plan:
    """The plan for a problem that `refusals` has nothing against.

    Parameters
    ----------
    mods : Mods or None
        The problem's score_mod and mask_mod, traced.
    spec : FwdSpec or None
        One of the problem's `candidates` that can run; None: the best.
    unmapped : tuple of str
        Why no tensor maps describe the operands: what `cupyflash.build.bulk.map_refusals` says of the operands.

    Raises
    ------
    Unsupported
        No kernel runs on the device; with a reason for each candidate.
    """
    plan = _plan_forward(problem, mods, device, spec, unmapped)
    if problem.weights_stage is None:
        return plan
    tile, heads = WeightsSpec.tile, problem.batch_size * problem.num_heads_q
    num_tiles = _num_tiles(heads, problem.seqlen_q, tile.block_m, 1)
    if num_tiles == 0 or problem.seqlen_k == 0:  # there are no weights
        return _NOTHING if problem.stops_at_scores else plan
    parts = num_splits(num_tiles, math.ceil(problem.seqlen_k / tile.block_n), device.sms)
    features = _features(problem, (False, False), mods)  # they look at both bounds in any case
    return _with_weights(plan, problem.dtype, problem.weights_stage, features, num_tiles * parts, parts)


def _plan_forward(
    problem: Problem, mods: Mods | None, device: DeviceSpec, spec: FwdSpec | None, unmapped: tuple[str, ...]
) -> Plan:
    band = problem.band
    bounds = band.lower is not None, band.upper is not None
    queries = _queries(problem.of_any_length, bounds, mods, problem.seqlen_q, device, spec, unmapped)
    if queries is None:
        return _NOTHING
    if not queries.splits and not queries.has_sections:
        return _plan(queries, 1, 1)
    keys = _keys_of_a_tile(problem, queries.queries_of_a_tile)
    section = _section(queries, keys) if queries.has_sections else 1
    if not queries.splits:
        return _plan(queries, 1, section)
    return _plan_for_keys(queries, math.ceil(keys / queries.spec.tile.block_n), section)


@dataclass(frozen=True, eq=False)
class _Queries:
    """What is settled by all but the keys."""

    problem: Problem  # of any length
    device: DeviceSpec
    spec: FwdSpec
    pack: int
    num_tiles: int
    tiles_per_head: int  # or of the heads that are packed
    num_rows: int
    queries_of_a_tile: int
    splits: bool
    has_sections: bool  # tiles of queries see different numbers of keys
    slots: int  # blocks that the device runs at once


_NOTHING = Plan(())


@lru_cache(maxsize=4096)
def _queries(
    problem: Problem,
    bounds: tuple[bool, bool],
    mods: Mods | None,
    seqlen_q: int,
    device: DeviceSpec,
    spec: FwdSpec | None,
    unmapped: tuple[str, ...],
) -> _Queries | None:
    """The kernel and its tiles of queries; None where there is nothing to compute.

    Parameters
    ----------
    problem : Problem
        Of any length.
    bounds : (bool, bool)
        Whether the band has a lower and an upper bound.
    """
    num_rows = problem.batch_size * problem.num_heads_q * seqlen_q
    if num_rows == 0:
        return None
    features = _features(problem, bounds, mods)
    if spec is None:
        spec = choose_spec(_selector(problem, features, seqlen_q, device, unmapped), device)
    pack = pack_of(_num_heads(problem), seqlen_q) if spec.packed else 1
    num_tiles = _num_tiles(problem.batch_size * problem.num_heads_q, seqlen_q, spec.tile.block_m, pack)
    tiles_per_head = math.ceil(seqlen_q * pack / spec.tile.block_m)
    slots = device.sms * blocks_per_sm(spec, device)
    at_once = math.ceil(spec.tile.block_m / pack)
    splits = FAMILIES[spec.family].splits and not features.dropout
    has_sections = bounds[1] and tiles_per_head > 1
    return _Queries(
        problem, device, spec, pack, num_tiles, tiles_per_head, num_rows, at_once, splits, has_sections, slots
    )


@lru_cache(maxsize=4096)
def _section(queries: _Queries, keys: int) -> int:
    """`section_of` where a tile of queries sees at most so many keys; counted in heads, or groups that are packed."""
    problem = queries.problem
    # Heads that share keys or values stay together.
    groups = problem.num_heads_q // problem.num_heads_k, problem.num_heads_q // problem.num_heads_v
    together = max(groups)
    bytes_of_key = problem.head_dim * together // groups[0] + problem.head_dim_v * together // groups[1]
    kept = keys * bytes_of_key * problem.element.storage.itemsize
    num_families = problem.batch_size * problem.num_heads_q // together
    units = max(1, together // queries.pack)
    return units * section_of(num_families, queries.tiles_per_head * units, kept, queries.slots, queries.device.l2)


def section_of(num_families: int, num_tiles: int, num_bytes: int, slots: int, l2: int) -> int:
    """Of how many families, heads that share keys and values, the tiles of queries are taken together.

    As many as leave half of the L2 cache empty, but at least as many as make two waves of blocks: so that long and
    short tiles make up for one another; and sections of equal size where that costs no more than half of it.

    Parameters
    ----------
    num_tiles, num_bytes : int
        Of one family: tiles of queries, bytes of keys and values.
    slots : int
        Blocks that the device runs at once.
    l2 : int
        Bytes of the cache.
    """
    most = min(num_families, max(l2 // 2 // max(1, num_bytes), math.ceil(2 * slots / num_tiles)))
    for size in range(most, most // 2, -1):
        if num_families % size == 0:
            return size
    return math.ceil(num_families / math.ceil(num_families / most))


@lru_cache(maxsize=4096)
def _plan_for_keys(queries: _Queries, num_key_tiles: int, section: int) -> Plan:
    """The plan for so many tiles of keys that a tile of queries sees at most."""
    return _plan(queries, num_splits(queries.num_tiles, num_key_tiles, queries.slots), section)


@lru_cache(maxsize=4096)
def _plan(queries: _Queries, splits: int, section: int) -> Plan:
    spec, pack = queries.spec, queries.pack
    row_alignment = FAMILIES[spec.family].row_alignment(dtype_named(spec.dtype).storage.itemsize)
    forward = _launch(spec, queries.num_tiles * splits, queries.slots)
    if splits == 1:
        return Plan((forward,), 1, pack, row_alignment, section=section)
    combine = CombineSpec(spec.dtype)
    launches = (forward, Launch(combine, (math.ceil(queries.num_rows / combine.rows_per_block),)))
    return Plan(launches, splits, pack, row_alignment, section=section)


def _launch(spec: FwdSpec, num_items: int, slots: int) -> Launch:
    """With a block for each item of work, or no more blocks than the device runs at once."""
    if spec.persists and num_items > slots:
        return Launch(spec, (slots,), num_items)
    return Launch(spec, (num_items,))


@lru_cache(maxsize=512)
def _with_weights(forward: Plan, dtype: str, stage: str, features: Features, blocks: int, parts: int) -> Plan:
    """The plan of a forward pass with a launch for the weights behind it, or of scores without a forward pass."""
    spec = _weights_spec(dtype, stage, features)
    weights = Launch(spec, (blocks,))
    if spec.stage == "softmax":
        return replace(forward, launches=(*forward.launches, weights), weights_parts=parts)
    return Plan((weights,), row_alignment=dtype_named(dtype).storage.itemsize, weights_parts=parts)


def _weights_spec(dtype: str, stage: str, features: Features) -> WeightsSpec:
    """The kernel for a stage of a problem whose forward pass has those features.

    Writing the scores takes long enough for a few kernels to do: one where there are no masks and nothing changes
    scores, another that does all but a float mask and dropout.
    """
    mods = features.mods
    score_mod = replace(mods, mask=None) if mods is not None and mods.score is not None else None
    if stage == "capped" and features.changed:
        return WeightsSpec(dtype, "capped", Features(changed=True, mods=score_mod))
    if stage in ("modded", "capped") and score_mod is not None:
        return WeightsSpec(dtype, "modded", Features(mods=score_mod))
    if stage in ("raw", "modded", "capped"):
        return WeightsSpec(dtype, "raw")
    has_all = bool(features.float_mask or features.bool_mask or features.changed)
    dropout = features.dropout and stage == "dropout"
    kept = replace(
        Features(True, True, bool_mask=has_all, changed=has_all),
        float_mask=features.float_mask,
        dropout=dropout,
        mods=mods,
    )
    return WeightsSpec(dtype, "biased" if stage == "biased" else "softmax", kept)


def selector_of(
    problem: Problem, device: DeviceSpec, mods: Mods | None = None, unmapped: tuple[str, ...] = ()
) -> Selector:
    """What of the problem selects a kernel."""
    bounds = problem.band.lower is not None, problem.band.upper is not None
    return _selector(problem, _features(problem, bounds, mods), problem.seqlen_q, device, unmapped)


def _selector(
    problem: Problem, features: Features, seqlen_q: int, device: DeviceSpec, unmapped: tuple[str, ...]
) -> Selector:
    def rows_in_packs_of(pack: int) -> Rows:
        height = min(_WIDEST, math.ceil(seqlen_q * pack / _ROW_STEP) * _ROW_STEP)
        heads = problem.batch_size * problem.num_heads_q
        return Rows(height, _num_tiles(heads, seqlen_q, _WIDEST, pack) >= device.sms)

    # Dropout is for training, which has queries in plenty; and the words of one draw are for queries of one head.
    pack = 1 if features.dropout else pack_of(_num_heads(problem), seqlen_q)
    packed_rows = rows_in_packs_of(pack) if pack > 1 else None
    dims = problem.head_dim, problem.head_dim_v
    return Selector(problem.dtype, *dims, features, rows_in_packs_of(1), packed_rows, unmapped)


def _num_heads(problem: Problem) -> tuple[int, int, int]:
    return problem.num_heads_q, problem.num_heads_k, problem.num_heads_v


@lru_cache(maxsize=512)
def choose_spec(selector: Selector, device: DeviceSpec) -> FwdSpec:
    """The kernel for what `selector` says; raises as `choose`."""
    found = candidates(selector, device)
    for candidate in found:
        if not candidate.reasons and not candidate.behind:
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
    itemsize = dtype_named(selector.dtype).storage.itemsize
    found: list[Candidate] = []
    chosen: tuple[TileRow, TileConfig] | None = None
    for row in rows_for(selector.dtype, selector.head_dim, selector.head_dim_v, device.cc):
        rows = _rows_of(row, selector)
        for tile in sorted(_tiles_of(row, selector.features), key=lambda tile: _cost(tile, rows)):
            reasons = (*row.reasons(tile, itemsize, device), *_unsuited(row, selector, rows))
            behind = ""
            if not reasons and chosen is None:
                chosen = row, tile
            elif not reasons and chosen is not None:
                behind = _why_behind(row, tile, *chosen, rows)
            found.append(Candidate(_spec(row, tile, selector), reasons, behind))
    return _as_timed(found, _TIMED[device].get(key_of(selector), "")) if device in _TIMED else found


# What `cupyflash.tune` found: for each device, by the key of a selector, the name of the fastest kernel.
_TIMED: dict[DeviceSpec, Mapping[str, str]] = {}


def use_timed(device: DeviceSpec, fastest: Mapping[str, str]) -> None:
    """From now on these kernels are the choice on that device, where they are candidates that can run.

    Parameters
    ----------
    fastest : dict of str to str
        Names of kernels by `key_of` selectors.
    """
    _TIMED[device] = dict(fastest)
    for memo in (choose_spec, _queries):
        memo.cache_clear()


def key_of(selector: Selector) -> str:
    """A name for what selects a kernel, the same in every process."""
    return hashlib.sha256(repr(selector).encode()).hexdigest()[:40]


def _as_timed(found: list[Candidate], fastest: str) -> list[Candidate]:
    """The candidates with that one as the choice; as they are, if it is none or can't run."""
    if fastest not in {str(candidate.spec) for candidate in found if not candidate.reasons}:
        return found
    behind = f"{fastest} was the fastest when they were timed"
    return [
        replace(candidate, behind="" if candidate.reasons or str(candidate.spec) == fastest else behind)
        for candidate in found
    ]


def _unsuited(row: TileRow, selector: Selector, rows: Rows) -> Iterator[str]:
    """What is against a family for this problem, whatever the tile."""
    family = FAMILIES[row.family]
    if family.takes_maps:
        yield from selector.unmapped
    if rows.height < family.least_rows:
        # Rounded up to what selectors tell apart: no number to be shown.
        yield f"{row.family} is for {family.least_rows} rows of queries or more, here are fewer"


def _rows_of(row: TileRow, selector: Selector) -> Rows:
    packed = selector.packed_rows if FAMILIES[row.family].packs else None
    return selector.rows if packed is None else packed


def _padded(tile: TileConfig, rows: Rows) -> int:
    """The rows that tiles of that height make of those that there are."""
    return math.ceil(rows.height / tile.block_m) * tile.block_m


def _cost(tile: TileConfig, rows: Rows) -> tuple[int, int]:
    """By which tiles of a row are ordered, before their order in the table.

    First the rows that are computed for nothing; then, where the tallest tile would leave SMs idle, the one that makes
    the most blocks.
    """
    return _padded(tile, rows), 0 if rows.fills_device else tile.block_m


def _why_behind(row: TileRow, tile: TileConfig, best_row: TileRow, best: TileConfig, rows: Rows) -> str:
    if row.family != best_row.family:
        return f"{best_row.family} is preferred to {row.family}"
    if row != best_row:
        return (
            f"it pads the head dims to {row.head_dim} and {row.head_dim_v}, {best_row.head_dim} and "
            f"{best_row.head_dim_v} hold them too"
        )
    if _padded(tile, rows) > _padded(best, rows):
        return f"tile {tile} pads the rows to {_padded(tile, rows)}, {best} to {_padded(best, rows)}"
    if _cost(tile, rows) > _cost(best, rows):
        return f"tile {tile} would leave SMs idle, {best} makes more blocks"
    if tile.block_m < best.block_m:
        return f"tile {tile} would read keys and values more often than {best}"
    return f"tile {best} stands before {tile} in the table"


def _tiles_of(row: TileRow, features: Features) -> list[TileConfig]:
    """The row's tiles, but once those that are one where scores are changed or weights dropped."""
    tiles = row.tiles if features.is_plain else [replace(tile, exp2_by_fma=0) for tile in row.tiles]
    return list(dict.fromkeys(tiles))


def _spec(row: TileRow, tile: TileConfig, selector: Selector) -> FwdSpec:
    dims = (row.head_dim, row.head_dim_v)
    family = FAMILIES[row.family]
    packed = selector.packed_rows is not None and family.packs
    features = replace(selector.features, scale_first=False) if family.any_scale else selector.features
    return FwdSpec(row.family, selector.dtype, *dims, tile, features, packed, baseline=row.baseline)


def pack_of(num_heads: tuple[int, int, int], seqlen_q: int) -> int:
    """How many query heads one tile should hold: those that share a key and a value head, or one.

    Packing pays where it leaves fewer of a tile's rows empty, by more than a tenth (FlashAttention-3's rule).

    Parameters
    ----------
    num_heads : (int, int, int)
        Of query, key and value.
    seqlen_q : int
    """
    num_heads_q, num_heads_k, num_heads_v = num_heads
    group = math.gcd(num_heads_q // num_heads_k, num_heads_q // num_heads_v)
    if seqlen_q * group > _MAX_LENGTH:
        return 1
    return group if _used(seqlen_q, _NARROWEST) < 0.9 * _used(seqlen_q * group, _NARROWEST) else 1


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


def every_spec() -> Iterator[KernelSpec]:
    """Every kernel that `choose` may name on some device, once `tune` has been there or before."""
    found: dict[KernelSpec, None] = {}
    for row in TILES:
        family = FAMILIES[row.family]
        choices = itertools.product(
            [
                (dtype, features, tile)
                for dtype in row.dtypes
                for features in _features_of(dtype)
                for tile in _tiles_of(row, features)
            ],
            (False, True) if family.packs else (False,),
        )
        for (dtype, features, tile), packed in choices:
            if features.dropout and packed:
                continue
            rows = Rows(tile.block_m, True)
            selector = Selector(dtype, row.head_dim, row.head_dim_v, features, rows, rows if packed else None)
            found[_spec(row, tile, selector)] = None
            if family.splits:
                found[CombineSpec(dtype)] = None
    for dtype in dict.fromkeys(dtype for row in TILES for dtype in row.dtypes):
        for stage, features in itertools.product((*STAGES, "dropout"), _features_of(dtype)):
            found[_weights_spec(dtype, stage, features)] = None
    yield from found


def _features(problem: Problem, bounds: tuple[bool, bool], mods: Mods | None) -> Features:
    if not problem.has_plain_scores:
        changed = bool(problem.softcap or problem.has_alibi)
        return _score_features(problem.float_mask_dtype, problem.has_bool_mask, changed, bool(problem.dropout_p), mods)
    if not _FOLDED_SCALES[0] <= problem.scale <= _FOLDED_SCALES[1]:
        return _ANY_SCALE
    has_lower, has_upper = bounds
    if has_lower:
        return _WINDOW
    return _CAUSAL if has_upper else _FULL


@lru_cache(maxsize=512)
def _score_features(
    float_mask: str | None, bool_mask: bool, changed: bool, dropout: bool, mods: Mods | None = None
) -> Features:
    """The features of a kernel that does this: one alone has a kernel of its own, several share one that does all.

    But a float mask, of whichever dtype, dropout and mods are only where they are asked for: they are most of the work.
    """
    if bool(float_mask) + bool_mask + changed + dropout > 1:
        bool_mask = changed = True
    return replace(_ANY_SCALE, float_mask=float_mask, bool_mask=bool_mask, changed=changed, dropout=dropout, mods=mods)


def _features_of(dtype: str) -> list[Features]:
    """All that kernels for that dtype are compiled with."""
    changes = itertools.product(dict.fromkeys((None, dtype, "float32")), *[(False, True)] * 3)
    return list(dict.fromkeys((*_PLAIN, *[_score_features(*change) for change in changes])))


def _num_tiles(num_heads: int, seqlen_q: int, block_m: int, pack: int) -> int:
    """Tiles of queries of all heads of the batch; a tile's rows are those of `pack` heads."""
    return math.ceil(seqlen_q * pack / block_m) * (num_heads // pack)


def _most_tiles(problem: Problem) -> int:
    lowest = min(tile.block_m for row in TILES for tile in row.tiles)
    return _num_tiles(problem.batch_size * problem.num_heads_q, problem.seqlen_q, lowest, 1)


def _keys_of_a_tile(problem: Problem, queries: int) -> int:
    """How many keys a tile of so many queries sees, at most."""
    lower, upper = problem.band.lower, problem.band.upper
    start = 0 if lower is None else max(0, lower)
    stop = problem.seqlen_k if upper is None else min(problem.seqlen_k, problem.seqlen_q + upper)
    if lower is not None and upper is not None:
        stop = min(stop, start + upper - lower + queries)
    return max(0, stop - start)
