"""From a plan to launches: kernel sources, parameter blocks, order.  The emulator and the GPU share all of it.

    plan ──render_kernel()──▶ KernelSource            (compile time: what a KernelSpec says)
      └────launches()───────▶ Launch, parameter block  (run time: pointers, lengths, strides, scale)

A backend compiles the first in its own way and hands the second to its own launch call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..errors import Unsupported
from ..plan.specs import (
    CombineSpec,
    FwdSpec,
    KernelSpec,
    Launch,
    MaskSummarySpec,
    MergeSpec,
    Mods,
    ModSummarySpec,
    Plan,
    WeightsSpec,
)
from ..problem.dtypes import dtype_named
from ..problem.philox import dropout_threshold
from ..problem.problem import STAGES, Buffers, Problem
from ..problem.shapes import join, joinable_axes
from .functor import NO_MODS, render_mods
from .modding import CallMods, ModSummary, summarize_mods
from .params import (
    BATCH_AXES,
    COMBINE_PARAMS,
    FWD_PARAMS,
    MASK,
    MERGE_PARAMS,
    MOD_MARKS,
    MOD_SUMMARY_PARAMS,
    NO_SCORES,
    PART,
    SCORE_PARAMS,
    SUMMARY_PARAMS,
    TENSOR,
    layout_checks,
    pack_combine,
    pack_forward,
    pack_scores,
)
from .source import ConfigValue, KernelSource, render

__all__ = [
    "Copy",
    "MaskSummary",
    "Operands",
    "batch_refusals",
    "copies_of",
    "entry_of",
    "launches",
    "prepare",
    "render_kernel",
    "summarize_mask",
]

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
_STRUCTURES = {
    "Tensor": TENSOR,
    "Mask": MASK,
    "ModMarks": MOD_MARKS,
    "ScoreParams": SCORE_PARAMS,
    "FwdParams": FWD_PARAMS,
    "CombineParams": COMBINE_PARAMS,
    "SummaryParams": SUMMARY_PARAMS,
    "ModSummaryParams": MOD_SUMMARY_PARAMS,
    "Part": PART,
    "MergeParams": MERGE_PARAMS,
}
# What a copy's rows begin at multiples of: as much as any kernel asks for.
_COPY_ALIGNMENT = 16


def entry_of(spec: KernelSpec) -> str:
    """The name of the kernel's entry."""
    return f"flash_{spec.family}"


@lru_cache(maxsize=256)
def render_kernel(spec: KernelSpec) -> KernelSource:
    """The kernel's source over the constants of `spec`, with checks that it and build/params.py agree."""
    source = render(f"{spec.family}.cu", _constants(spec), [entry_of(spec)], str(spec), _types(spec))
    checks = "".join(layout_checks(name, dtype) for name, dtype in _STRUCTURES.items())
    return KernelSource(source.name, source.text + checks, source.entries)


def _types(spec: KernelSpec) -> str:
    """ScoreMod, MaskMod and ModArgs, for the kernels that apply mods."""
    if not isinstance(spec, FwdSpec | WeightsSpec | ModSummarySpec):
        return ""
    mods = _mods_of(spec) or Mods()
    return f'#include "mods.cuh"\n{render_mods(mods.score, mods.mask)}'


def _mods_of(spec: KernelSpec) -> Mods | None:
    return spec.features.mods if isinstance(spec, FwdSpec | WeightsSpec) else getattr(spec, "mods", None)


def _constants(spec: KernelSpec) -> dict[str, ConfigValue]:
    if isinstance(spec, MaskSummarySpec | ModSummarySpec):
        return {"kTilesPerBlock": spec.tiles_per_block}
    if isinstance(spec, MergeSpec):
        elements = {"Element": _ELEMENTS[spec.dtype], "OutElement": _ELEMENTS[spec.out_dtype]}
        return elements | {"kRowsPerBlock": spec.rows_per_block}
    if isinstance(spec, CombineSpec):
        return {"Element": _ELEMENTS[spec.dtype], "kNumThreads": spec.num_threads, "kRowsPerBlock": spec.rows_per_block}
    features = spec.features
    constants: dict[str, ConfigValue] = {
        "Element": _ELEMENTS[spec.dtype],
        "kBlockM": spec.tile.block_m,
        "kBlockN": spec.tile.block_n,
        "kNumWarps": spec.tile.num_warps,
        "kSharedBytes": spec.shared_bytes,
        "kHasLower": features.has_lower,
        "kHasUpper": features.has_upper,
        "FloatMask": _ELEMENTS[features.float_mask] if features.float_mask else "NoMask",
        "kHasBoolMask": features.bool_mask,
        "kChangesScores": features.changed,
        "kDropout": features.dropout,
    }
    if isinstance(spec, WeightsSpec):
        dtype = dtype_named(spec.dtype)
        written = spec.dtype if spec.stage == "softmax" else dtype.accumulator.name
        stage = STAGES.index(spec.stage)
        return constants | {"Written": _ELEMENTS[written], "kStage": stage, "kPacked": False, "kSplit": False}
    return constants | {
        "kBaseline": spec.baseline,
        "kHeadDim": spec.head_dim,
        "kHeadDimV": spec.head_dim_v,
        "kQInRegisters": spec.tile.q_in_registers,
        "kScaleFirst": features.scale_first,
        "kPacked": spec.packed,
        "kSplit": spec.split,
    }


class Operands(NamedTuple):
    """Arrays as kernels take them: elements of a row contiguous, rows at multiples of the plan's alignment."""

    query: Any  # (*batch, Hq, L, E)
    key: Any  # (*batch, Hk, S, E)
    value: Any  # (*batch, Hv, S, Ev)
    out: Any  # (*batch, Hq, L, Ev)
    lse: Any  # (*batch, Hq, L) contiguous: the caller's, or a new one that weights need; or None
    partial_out: Any  # (num_splits, *batch, Hq, L, Ev) accumulators, or None
    partial_lse: Any  # (num_splits, *batch, Hq, L, 2), or None
    weights: Any  # (*batch, Hq, L, S) contiguous, or None
    # What of them goes into parameter blocks.
    batch_shape: tuple[int, ...]  # BATCH_AXES of them
    addresses: list[int]  # of the eight arrays, 0 for None
    steps: list[Any]  # for each of the first four its strides in elements, as in a Tensor
    scores: bytes  # SCORE_PARAMS
    sinks: tuple[int, int]  # as in COMBINE_PARAMS: address, and whether they are float32
    summary: MaskSummary | None  # of the bool mask by the plan's tiles
    mod_summary: ModSummary | None  # of mask_mod
    mod_args: dict[Mods, np.void]  # the second parameter of kernels with mods
    kept: tuple[Any, ...]  # arrays that live as long as the call


def prepare(
    problem: Problem, plan: Plan, buffers: Buffers, address: Callable[[Any], int], mods: CallMods | None = None
) -> Operands:
    """The operands of a call: the arrays themselves, or a copy of one whose rows a kernel can't take.

    An `out` like that becomes a new array; the caller copies it back.  `address` gives an array's first byte.  `mods`
    are what `plan` was chosen for.

    Raises
    ------
    Unsupported
        The batch has more axes than a kernel carries, after joining those that lie behind one another in every array.
    """
    itemsize = problem.element.storage.itemsize
    alignment = _alignment(plan, itemsize)
    arrays = [buffers.query, buffers.key, buffers.value, buffers.out]
    addresses = [address(array) for array in arrays]
    steps: list[Any] = [_steps(array.shape, array.strides, itemsize, alignment) for array in arrays]
    for i, array in enumerate(arrays):
        if steps[i] is None or (addresses[i] % alignment and array.size):
            make = _empty_rows_like if array is buffers.out else _copy
            arrays[i] = array = make(array, problem.namespace)
            addresses[i], steps[i] = address(array), _steps(array.shape, array.strides, itemsize, 1)

    batch_shape = problem.batch_shape
    masks = [] if problem.has_plain_scores else _masks(buffers, address)
    summary = None
    if problem.has_bool_mask:
        summary = _summary_for(plan, masks[-1], problem.namespace, address)
    steps += [_mask_steps(mask) for mask in (*masks, *([summary.array] if summary else ()))]
    if len(batch_shape) > BATCH_AXES:
        batch_shape, steps = _join(batch_shape, tuple(steps))
    mod_summary, mod_args, mod_arrays = None, {}, ()
    if mods is not None:
        mod_summary = summarize_mods(mods, problem, plan, buffers, address)
        mod_args, mod_arrays = _pack_mods(mods, problem, plan, buffers, address)
    scores, sinks, kept = NO_SCORES, (0, 0), ()
    if problem.has_sinks or not problem.has_plain_scores:
        marks = mod_summary.marks if mod_summary else _NO_MARKS
        scores, sinks, kept = _scores(problem, buffers, masks, summary, marks, steps[4:], address)
    accumulator, xp = problem.element.accumulator, problem.namespace
    lse, partial_out, partial_lse = buffers.lse, None, None
    if lse is None and buffers.weights is not None and not problem.stops_at_scores:
        lse = xp.empty(buffers.out.shape[:-1], accumulator)
    if plan.num_splits > 1:
        partial_out = xp.empty((plan.num_splits, *buffers.out.shape), accumulator)
        partial_lse = xp.empty((*partial_out.shape[:-1], 2), accumulator)
    workspace = (lse, partial_out, partial_lse, buffers.weights)
    for array in workspace:
        addresses.append(0 if array is None else address(array))
    return Operands(
        *(arrays[0], arrays[1], arrays[2], arrays[3]),
        *workspace,
        (1,) * (BATCH_AXES - len(batch_shape)) + batch_shape,
        addresses,
        steps[:4],
        scores,
        sinks,
        summary,
        mod_summary,
        mod_args,
        (*kept, *mod_arrays),
    )


def _pack_mods(
    mods: CallMods, problem: Problem, plan: Plan, buffers: Buffers, address: Callable[[Any], int]
) -> tuple[dict[Mods, np.void], tuple[Any, ...]]:
    """For each kernel its second parameter; and the arrays that those point to."""
    found = {_mods_of(launch.spec) for launch in plan.launches} - {None}
    packed = {one: mods.pack(one, problem, buffers, address) for one in found if one is not None}
    arrays = [array for one in packed.values() for array in one.arrays]
    return {one: block.args for one, block in packed.items()}, tuple(arrays)


def _masks(buffers: Buffers, address: Callable[[Any], int]) -> list[Any]:
    """The float and the bool mask that there are; copied where elements do not lie at multiples of their size."""
    masks = [mask for mask in (buffers.float_mask, buffers.bool_mask) if mask is not None]
    return [_entries_once(m).copy() if any(n % m.itemsize for n in (address(m), *m.strides)) else m for m in masks]


def _entries_once(mask: Any) -> Any:
    """The mask with axes of length 1 in place of those along which it repeats itself by a stride of 0."""
    return mask[tuple([slice(None, 1) if stride == 0 else slice(None) for stride in mask.strides])]


def _packed(array: Any, address: Callable[[Any], int]) -> Any:
    """The array itself if its elements follow one another at multiples of their size, else a copy."""
    return array if array.flags.c_contiguous and address(array) % array.itemsize == 0 else array.copy()


def _summary_for(plan: Plan, mask: Any, xp: Any, address: Callable[[Any], int]) -> MaskSummary | None:
    """Which tiles of the forward kernel are empty or whole; None where that says nothing.

    A tile whose rows are queries of several heads has a place in the summary only if they all see the same keys.
    """
    tile = next((launch.spec.tile for launch in plan.launches if isinstance(launch.spec, FwdSpec)), None)
    if tile is None or mask.shape[-1] <= tile.block_n:
        return None
    same_for_rows = all(n == 1 or step == 0 for n, step in zip(mask.shape[-3:-1], mask.strides[-3:-1], strict=True))
    if plan.pack > 1 and not same_for_rows:
        return None
    return summarize_mask(mask, tile.block_m, tile.block_n, xp, address)


def _mask_steps(mask: Any) -> tuple[int, ...]:
    """Elements between a mask's entries along each batch axis, between heads, queries and keys."""
    steps = [0 if n == 1 else s // mask.itemsize for n, s in zip(mask.shape, mask.strides, strict=True)]
    return (0,) * (BATCH_AXES + 3 - len(steps)) + tuple(steps)


_NO_MASK = (0,) * (BATCH_AXES + 4)
_NO_MARKS = (0,) * 4


def _scores(
    problem: Problem,
    buffers: Buffers,
    masks: list[Any],
    summary: MaskSummary | None,
    marks: tuple[int, int, int, int],
    steps: list[Any],
    address: Callable[[Any], int],
) -> tuple[bytes, tuple[int, int], tuple[Any, ...]]:
    """What the kernels have to know of everything but the band: SCORE_PARAMS; the sinks; arrays to be kept."""
    alibi_slopes, seed = buffers.alibi_slopes, buffers.seed
    arrays = [*masks, *([summary.array] if summary else ())]
    described = iter([(address(array), *step) for array, step in zip(arrays, steps, strict=True)])
    float_mask = _NO_MASK if buffers.float_mask is None else next(described)
    bool_mask = _NO_MASK if buffers.bool_mask is None else next(described)
    sinks, sinks_of = (0, 0), None
    if buffers.sinks is not None:
        sinks_of = _packed(buffers.sinks, address)
        sinks = (address(sinks_of), int(sinks_of.dtype == np.float32))
    if alibi_slopes is not None:
        alibi_slopes = _packed(alibi_slopes, address)
    seed_is_array = seed is not None and not isinstance(seed, int)
    if seed_is_array:
        seed = _packed(seed, address)
    p = problem.dropout_p
    params = pack_scores(
        *float_mask,
        *bool_mask,
        *next(described, _NO_MASK),
        *marks,
        0 if alibi_slopes is None else address(alibi_slopes),
        sinks[0],
        address(seed) if seed_is_array else 0,
        seed if seed is not None and not seed_is_array else 0,
        _softcap(problem),
        0.0 if p == 1 else 1 / (1 - p),
        min(dropout_threshold(p), 2**32 - 1),
        problem.shift if problem.has_alibi else 0,
        problem.num_heads_q if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else 0,
        sinks[1],
    )
    return params.tobytes(), sinks, (*masks, sinks_of, alibi_slopes, seed)


def _softcap(problem: Problem) -> float:
    """As an accumulator holds it; 0, which caps nothing, where it is beyond the range, and where there is none."""
    limits = np.finfo(problem.element.accumulator)
    softcap = abs(problem.softcap)
    return 0.0 if softcap == 0 or softcap > float(limits.max) else max(softcap, float(limits.tiny))


class Copy(NamedTuple):
    """An operand that `prepare` does not take as it is."""

    operand: str  # "query", "key", "value" or "out"
    reason: str
    nbytes: int  # of the new array


def copies_of(plan: Plan, buffers: Buffers, address: Callable[[Any], int]) -> list[Copy]:
    """What `prepare` would copy, and why, without doing it."""
    copies = []
    for name in ("query", "key", "value", "out"):
        array = getattr(buffers, name)
        itemsize = array.dtype.itemsize
        alignment = _alignment(plan, itemsize)
        if _steps(array.shape, array.strides, itemsize, alignment) is None:
            reason = f"rows do not all begin at multiples of {alignment} bytes (strides {array.strides})"
            if array.shape[-1] != 1 and array.strides[-1] != itemsize:
                reason = f"rows are not contiguous: {array.strides[-1]} bytes between elements of {itemsize}"
        elif array.size and address(array) % alignment:
            reason = f"it does not begin at a multiple of {alignment} bytes"
        else:
            continue
        shape = array.shape if name == "out" else _once(array).shape
        copies.append(Copy(name, reason, math.prod(_padded_rows(shape, itemsize)) * itemsize))
    return copies


def launches(problem: Problem, plan: Plan, operands: Operands) -> Iterator[tuple[Launch, tuple[np.void, ...]]]:
    """The plan's launches in order, each with its parameters."""
    if operands.summary is not None and operands.summary.launch is not None and operands.summary.params is not None:
        yield operands.summary.launch, (operands.summary.params,)
    if operands.mod_summary is not None:
        yield operands.mod_summary.launch, operands.mod_summary.args
    for launch in plan.launches:
        spec = launch.spec
        if isinstance(spec, CombineSpec):
            yield launch, (_combine_params(problem, plan, operands),)
            continue
        parts = plan.weights_parts if isinstance(spec, WeightsSpec) else plan.num_splits
        mods = _mods_of(spec)
        args = NO_MODS if mods is None else operands.mod_args[mods]
        yield launch, (_forward_params(problem, plan, operands, parts), args)


def _forward_params(problem: Problem, plan: Plan, operands: Operands, num_splits: int) -> np.void:
    query, key, value, out, *others = operands.addresses
    query_steps, key_steps, value_steps, out_steps = operands.steps
    num_heads_q, seqlen_q, seqlen_k, band = problem.num_heads_q, problem.seqlen_q, problem.seqlen_k, problem.band
    return pack_forward(
        query,
        *query_steps,
        key,
        *key_steps,
        value,
        *value_steps,
        out,
        *out_steps,
        *others,
        problem.scale,
        *operands.batch_shape,
        problem.batch_size,
        num_heads_q,
        num_heads_q // problem.num_heads_k,
        num_heads_q // problem.num_heads_v,
        plan.pack,
        seqlen_q,
        seqlen_k,
        problem.head_dim,
        problem.head_dim_v,
        num_splits,
        # The kernel may look at a bound that the band lacks: then at one that removes nothing.
        -seqlen_q if band.lower is None else band.lower,
        seqlen_k if band.upper is None else band.upper,
        operands.scores,
    )


def _combine_params(problem: Problem, plan: Plan, operands: Operands) -> np.void:
    _, _, _, out, lse, partial_out, partial_lse, _ = operands.addresses
    return pack_combine(
        out,
        *operands.steps[3],
        lse,
        partial_out,
        partial_lse,
        operands.sinks[0],
        *operands.batch_shape,
        problem.batch_size,
        problem.num_heads_q,
        problem.seqlen_q,
        problem.head_dim_v,
        plan.num_splits,
        operands.sinks[1],
    )


@lru_cache(maxsize=2048)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, alignment: int) -> tuple[int, ...] | None:
    """Elements between entries along each batch axis, of which there are BATCH_AXES at least, between heads, rows.

    None if an element of a row does not follow the one before it, or if not all rows begin at multiples of `alignment`
    bytes where the first does.
    """
    steps = [0 if n == 1 else stride for n, stride in zip(shape[:-1], strides[:-1], strict=True)]
    if 0 not in shape:  # else nothing is read
        if strides[-1] != itemsize and shape[-1] != 1:
            return None
        for step in steps:
            if step % alignment:
                return None
    return (0,) * (BATCH_AXES + 2 - len(steps)) + tuple([step // itemsize for step in steps])


def batch_refusals(problem: Problem, buffers: Buffers) -> list[str]:
    """Why `prepare` would refuse the batch, without preparing anything; empty if it would not."""
    shape = problem.batch_shape
    if len(shape) <= BATCH_AXES:
        return []
    arrays = (buffers.query, buffers.key, buffers.value, buffers.out)
    steps = [tuple([0 if n == 1 else step for n, step in zip(shape, a.strides, strict=False)]) for a in arrays]
    try:
        _join(shape, tuple(steps))
    except Unsupported as error:
        return list(error.reasons["cuda"])
    return []


@lru_cache(maxsize=512)
def _join(
    batch_shape: tuple[int, ...], steps: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The batch's shape, and each array's steps, after joining the axes that can be joined."""
    rank = len(batch_shape)
    ranges = joinable_axes(batch_shape, [step[:rank] for step in steps])
    shape = join(batch_shape, ranges)
    missing = BATCH_AXES - len(shape)
    if missing < 0:
        reason = (
            f"kernels carry {BATCH_AXES} batch axes, but the batch {batch_shape} has {len(shape)} that do not lie "
            "behind one another in every array"
        )
        raise Unsupported(
            f'{reason}; copy the operands, or pass backend="math"', {"cuda": [reason], "emulator": [reason]}
        )
    # A joined axis steps as its innermost axis longer than 1 does.
    inner = [max((a for a in range(*axes) if batch_shape[a] > 1), default=axes[0]) for axes in ranges]
    front = (0,) * missing
    return shape, [front + tuple([step[axis] for axis in inner]) + step[rank:] for step in steps]


def _alignment(plan: Plan, itemsize: int) -> int:
    # Strides of less than an element would leave the kernels' strides, which count elements, with a remainder.
    return max(plan.row_alignment, itemsize)


def _copy(array: Any, xp: Any) -> Any:
    """A copy in rows that fit, in which what is repeated by a stride of 0 is still there once."""
    once = _once(array)
    copy = _empty_rows_like(once, xp)
    copy[...] = once
    return xp.broadcast_to(copy, array.shape)


def _once(array: Any) -> Any:
    return array[tuple([slice(None, 1) if stride == 0 else slice(None) for stride in array.strides[:-1]])]


def _empty_rows_like(array: Any, xp: Any) -> Any:
    """A new array whose rows begin at multiples of _COPY_ALIGNMENT bytes."""
    return xp.empty(_padded_rows(array.shape, array.dtype.itemsize), array.dtype)[..., : array.shape[-1]]


def _padded_rows(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    step = _COPY_ALIGNMENT // itemsize
    return (*shape[:-1], -(-shape[-1] // step) * step)


class MaskSummary(NamedTuple):
    """What is known of each tile of a bool mask, and the launch that finds it out: see `summarize_mask`."""

    array: Any  # bytes, of the mask's rank; the last two axes count tiles, and those of length 1 broadcast
    launch: Launch | None  # None: there is nothing to look at
    params: np.void | None


def summarize_mask(mask: Any, block_m: int, block_n: int, xp: Any, address: Callable[[Any], int]) -> MaskSummary:
    """A new array for the summary of a bool mask by tiles, not yet filled, and the launch that fills it.

    The summary's bytes are 0 where no key of a tile takes part for any of its queries, 2 where all do, and otherwise 1.
    It has one entry for what the mask has once: its axis is of length 1 where the mask's is, or has a stride of 0.

    Parameters
    ----------
    mask : bool array (*batch, Hq, L, S)
        Axes of length 1 broadcast; any strides.
    block_m, block_n : int
        Queries and keys of a tile.

    Raises
    ------
    Unsupported
        The mask has more batch axes than a kernel carries, after joining.
    """
    once = _entries_once(mask)
    # A warp's lanes stand side by side along the axis whose neighbours lie closer.
    is_swapped = _distance(once, -2) < _distance(once, -1)
    if is_swapped:
        once, block_m, block_n = once.swapaxes(-1, -2), block_n, block_m
    *batch, num_heads, num_rows, num_columns = once.shape
    summary = xp.empty((*batch, num_heads, math.ceil(num_rows / block_m), math.ceil(num_columns / block_n)), np.uint8)
    array = summary.swapaxes(-1, -2) if is_swapped else summary
    if summary.size == 0:
        return MaskSummary(array, None, None)

    batch_shape, steps = (
        tuple(batch),
        tuple([0 if n == 1 else s for n, s in zip(once.shape, once.strides, strict=True)]),
    )
    if len(batch_shape) > BATCH_AXES:
        batch_shape, (steps,) = _join(batch_shape, (steps,))
    missing = BATCH_AXES - len(batch_shape)
    *batch_steps, head_step, row_step, column_step = steps
    in_fours = (address(once), *batch_steps, head_step, row_step, block_n)
    block = (
        (address(once), (0,) * missing + tuple(batch_steps), head_step, row_step, column_step),
        address(summary),
        summary.size,
        (1,) * missing + batch_shape,
        num_heads,
        num_rows,
        num_columns,
        block_m,
        block_n,
        column_step == 1 and not any(number % 4 for number in in_fours),
    )
    spec = MaskSummarySpec()
    launch = Launch(spec, (math.ceil(summary.size / spec.tiles_per_block),))
    params: np.void = np.array([block], SUMMARY_PARAMS)[0]
    return MaskSummary(array, launch, params)


def _distance(array: Any, axis: int) -> float:
    """Bytes between neighbours along the axis; infinite where there are none."""
    return abs(array.strides[axis]) if array.shape[axis] > 1 else math.inf
