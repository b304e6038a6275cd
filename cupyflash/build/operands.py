"""From a call's arrays to what its kernels are given: the arrays or copies of them, addresses, strides, workspace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import Unsupported
from ..plan.specs import FwdSpec, Launch, Mods, Plan
from ..problem.philox import dropout_threshold
from ..problem.problem import Buffers, Problem
from .bulk import MapMaker, make_maps
from .mask_summary import MaskSummary, entries_once, summarize_mask
from .modding import CallMods, ModSummary, summarize_mods
from .params import BATCH_AXES, MASK, MOD_MARKS, NO_SCORES, Block, pack_marks, pack_mask, pack_scores, pack_tensor
from .strides import COPY_ALIGNMENT, join_batch, steps_of, strides_of_copy, tensor_of

__all__ = ["Copy", "Operands", "Summary", "batch_refusals", "copies_of", "prepare", "summaries_of"]

_NO_MASK, _NO_MARKS = bytes(MASK.itemsize), bytes(MOD_MARKS.itemsize)


class Operands(NamedTuple):
    """Arrays as kernels take them: elements of a row contiguous, rows at multiples of the plan's alignment."""

    query: Any  # (*batch, Hq, L, E)
    key: Any  # (*batch, Hk, S, E)
    value: Any  # (*batch, Hv, S, Ev)
    out: Any  # (*batch, Hq, L, Ev)
    lse: Any  # (*batch, Hq, L) contiguous: the caller's, or a new one that weights need; or None
    partial: Any  # accumulators (num_splits, *batch, Hq, L, 2) and behind them (num_splits, *batch, Hq, L, Ev), or None
    weights: Any  # (*batch, Hq, L, S) contiguous, or None
    # What of them goes into parameter blocks.
    batch_shape: tuple[int, ...]  # BATCH_AXES of them
    tensors: list[bytes]  # TENSOR of the first four arrays
    workspace: tuple[int, int, int, int]  # addresses of lse, the two partial results and weights, 0 for None
    scores: bytes  # SCORE_PARAMS
    summary: MaskSummary | None  # of the bool mask by the plan's tiles
    mod_summary: ModSummary | None  # of mask_mod
    mod_args: dict[Mods, Block]  # the second parameter of kernels with mods
    maps: tuple[Block, ...]  # the tensor maps that the plan's forward kernel takes behind these
    kept: tuple[Any, ...]  # arrays that live as long as the call


def prepare(
    problem: Problem,
    plan: Plan,
    buffers: Buffers,
    address: Callable[[Any], int],
    mods: CallMods | None = None,
    make_map: MapMaker | None = None,
) -> Operands:
    """The operands of a call: the arrays themselves, or a copy of one whose rows a kernel can't take.

    An `out` like that becomes a new array; the caller copies it back.  `address` gives an array's first byte.  `mods`
    are what `plan` was chosen for; `make_map` makes tensor maps, for plans whose kernels take them.

    Raises
    ------
    Unsupported
        The batch has more axes than a kernel carries, after joining those that lie behind one another in every array.
    """
    query, key, value, out = arrays = buffers.query, buffers.key, buffers.value, buffers.out
    itemsize = query.itemsize
    alignment = plan.row_alignment
    tensors = [
        tensor_of(query, address(query), itemsize, alignment),
        tensor_of(key, address(key), itemsize, alignment),
        tensor_of(value, address(value), itemsize, alignment),
        tensor_of(out, address(out), itemsize, alignment),
    ]
    if b"" in tensors:
        makers = _copy, _copy, _copy, _empty_rows_like
        arrays = tuple(
            array if tensor else make(array, problem.namespace)
            for array, tensor, make in zip(arrays, tensors, makers, strict=True)
        )
        tensors = [tensor_of(array, address(array), itemsize, 1) for array in arrays]

    batch_shape = problem.batch_shape
    scores, kept = NO_SCORES, ()
    summary, mod_summary = None, None
    mod_args: dict[Mods, Block] = {}
    if problem.has_sinks or not problem.has_plain_scores or len(batch_shape) > BATCH_AXES:
        masks = _masks(buffers, address)
        if problem.has_bool_mask:
            summary = _summary_for(plan, masks[-1], problem.namespace, address)
        steps = [_mask_steps(mask) for mask in (*masks, *([summary.array] if summary else ()))]
        if len(batch_shape) > BATCH_AXES:
            of_rows = [steps_of(array.shape, array.strides, itemsize, 1) for array in arrays]
            batch_shape, joined = join_batch(batch_shape, (*of_rows, *steps))
            tensors = [pack_tensor(address(array), *step) for array, step in zip(arrays, joined, strict=False)]
            steps = joined[4:]
        mod_arrays: tuple[Any, ...] = ()
        if mods is not None:
            mod_summary = summarize_mods(mods, problem, plan, buffers, address)
            mod_args, mod_arrays = _pack_mods(mods, problem, plan, buffers, address)
        marks = pack_marks(*mod_summary.marks) if mod_summary else _NO_MARKS
        scores, kept = _scores(problem, buffers, masks, summary, marks, steps, address)
        kept = (*kept, *mod_arrays)
    lse, weights, partial, places = buffers.lse, buffers.weights, None, (0, 0)
    accumulator, xp = problem.element.accumulator, problem.namespace
    if lse is None and weights is not None and not problem.stops_at_scores:
        lse = xp.empty(out.shape[:-1], accumulator)
    if plan.num_splits > 1:  # one allocation, which takes longer than the arithmetic
        num_rows = plan.num_splits * problem.batch_size * problem.num_heads_q * problem.seqlen_q
        partial = xp.empty((num_rows * (2 + problem.head_dim_v),), accumulator)
        place = address(partial)
        places = place + 2 * num_rows * accumulator.itemsize, place
    return Operands(
        *arrays,
        lse,
        partial,
        weights,
        (1,) * (BATCH_AXES - len(batch_shape)) + batch_shape,
        tensors,
        (0 if lse is None else address(lse), *places, 0 if weights is None else address(weights)),
        scores,
        summary,
        mod_summary,
        mod_args,
        _maps(plan, arrays, address, make_map) if plan.takes_maps else (),
        kept,
    )


def _maps(
    plan: Plan, arrays: tuple[Any, ...], address: Callable[[Any], int], make_map: MapMaker | None
) -> tuple[Block, ...]:
    spec = plan.launches[0].spec
    assert isinstance(spec, FwdSpec)
    assert make_map is not None, f"{spec.family} takes tensor maps"
    return make_maps(spec, arrays, [address(array) for array in arrays], make_map)


def _pack_mods(
    mods: CallMods, problem: Problem, plan: Plan, buffers: Buffers, address: Callable[[Any], int]
) -> tuple[dict[Mods, Block], tuple[Any, ...]]:
    """For each kernel its second parameter; and the arrays that those point to."""
    found = {launch.spec.mods for launch in plan.launches} - {None}
    packed = {one: mods.pack(one, problem, buffers, address) for one in found if one is not None}
    arrays = [array for one in packed.values() for array in one.arrays]
    return {one: block.args for one, block in packed.items()}, tuple(arrays)


def _masks(buffers: Buffers, address: Callable[[Any], int]) -> list[Any]:
    """The float and the bool mask that there are; copied where elements do not lie at multiples of their size."""
    masks = [mask for mask in (buffers.float_mask, buffers.bool_mask) if mask is not None]
    return [entries_once(mask).copy() if _is_torn(mask, address) else mask for mask in masks]


def _is_torn(mask: Any, address: Callable[[Any], int]) -> bool:
    return any(n % mask.itemsize for n in (address(mask), *mask.strides))


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


def _scores(
    problem: Problem,
    buffers: Buffers,
    masks: list[Any],
    summary: MaskSummary | None,
    marks: bytes,
    steps: list[Any],
    address: Callable[[Any], int],
) -> tuple[bytes, tuple[Any, ...]]:
    """What the kernels have to know of everything but the band: SCORE_PARAMS; arrays to be kept."""
    alibi_slopes, seed = buffers.alibi_slopes, buffers.seed
    arrays = [*masks, *([summary.array] if summary else ())]
    described = iter([pack_mask(address(array), *step) for array, step in zip(arrays, steps, strict=True)])
    float_mask = _NO_MASK if buffers.float_mask is None else next(described)
    bool_mask = _NO_MASK if buffers.bool_mask is None else next(described)
    sinks = None if buffers.sinks is None else _packed(buffers.sinks, address)
    if alibi_slopes is not None:
        alibi_slopes = _packed(alibi_slopes, address)
    seed_is_array = seed is not None and not isinstance(seed, int)
    if seed_is_array:
        seed = _packed(seed, address)
    p = problem.dropout_p
    params = pack_scores(
        float_mask,
        bool_mask,
        next(described, _NO_MASK),
        marks,
        0 if alibi_slopes is None else address(alibi_slopes),
        0 if sinks is None else address(sinks),
        address(seed) if seed_is_array else 0,
        seed if seed is not None and not seed_is_array else 0,
        _softcap(problem),
        0.0 if p == 1 else 1 / (1 - p),
        min(dropout_threshold(p), 2**32 - 1),
        problem.shift if problem.has_alibi else 0,
        problem.num_heads_q if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else 0,
        int(sinks is not None and sinks.dtype == np.float32),
    )
    return params, (*masks, sinks, alibi_slopes, seed)


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
        alignment = plan.row_alignment
        if steps_of(array.shape, array.strides, itemsize, alignment) is None:
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


class Summary(NamedTuple):
    """A launch ahead of the plan's own: what is known of each tile of a bool mask or of a mask_mod."""

    launch: Launch
    nbytes: int  # of the new array


def summaries_of(
    problem: Problem, plan: Plan, buffers: Buffers, address: Callable[[Any], int], mods: CallMods | None = None
) -> list[Summary]:
    """What `prepare` would have summarised, without doing it."""
    mask, found = buffers.bool_mask, []
    summary = None if mask is None else _summary_for(plan, mask, problem.namespace, address)
    if summary is not None and summary.launch is not None:
        found.append(Summary(summary.launch, summary.array.size))
    mod_summary = summarize_mods(mods, problem, plan, buffers, address)
    if mod_summary is not None:
        found.append(Summary(mod_summary.launch, mod_summary.array.size))
    return found


def batch_refusals(problem: Problem, buffers: Buffers, alignment: int, address: Callable[[Any], int]) -> list[str]:
    """Why `prepare` would refuse the batch, without preparing anything; empty if it would not.

    `alignment` is the plan's of rows.
    """
    shape = problem.batch_shape
    if len(shape) <= BATCH_AXES:
        return []
    arrays = [
        (array, not tensor_of(array, address(array), array.itemsize, alignment))
        for array in (buffers.query, buffers.key, buffers.value, buffers.out)
    ]
    masks = [mask for mask in (buffers.float_mask, buffers.bool_mask) if mask is not None]
    arrays += [(mask, _is_torn(mask, address)) for mask in masks]
    steps = []
    for array, is_copied in arrays:
        strides = strides_of_copy(array.shape, array.strides, array.itemsize) if is_copied else array.strides
        steps.append(tuple([0 if n == 1 else step for n, step in zip(array.shape, strides, strict=True)][: len(shape)]))
    try:
        join_batch(shape, tuple(steps))
    except Unsupported as error:
        return list(error.reasons["cuda"])
    return []


def _copy(array: Any, xp: Any) -> Any:
    """A copy in rows that fit, in which what is repeated by a stride of 0 is still there once."""
    once = _once(array)
    copy = _empty_rows_like(once, xp)
    copy[...] = once
    return xp.broadcast_to(copy, array.shape)


def _once(array: Any) -> Any:
    return array[tuple([slice(None, 1) if stride == 0 else slice(None) for stride in array.strides[:-1]])]


def _empty_rows_like(array: Any, xp: Any) -> Any:
    """A new array whose rows begin at multiples of COPY_ALIGNMENT bytes."""
    return xp.empty(_padded_rows(array.shape, array.dtype.itemsize), array.dtype)[..., : array.shape[-1]]


def _padded_rows(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    step = COPY_ALIGNMENT // itemsize
    return (*shape[:-1], -(-shape[-1] // step) * step)
