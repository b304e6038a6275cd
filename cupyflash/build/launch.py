"""From a plan to launches: kernel sources, parameter blocks, order.  The emulator and the GPU share all of it.

    plan ──render_kernel()──▶ KernelSource            (compile time: what a KernelSpec says)
      └────launches()───────▶ Launch, parameter block  (run time: pointers, lengths, strides, scale)

A backend compiles the first in its own way and hands the second to its own launch call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..errors import Unsupported
from ..plan.specs import CombineSpec, FwdSpec, KernelSpec, Launch, Plan
from ..problem.problem import Buffers, Problem
from ..problem.shapes import join, joinable_axes
from .params import BATCH_AXES, COMBINE_PARAMS, FWD_PARAMS, TENSOR, layout_checks
from .source import ConfigValue, KernelSource, render

__all__ = ["Operands", "entry_of", "launches", "prepare", "render_kernel"]

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
# What a copy's rows begin at multiples of: as much as any kernel asks for.
_COPY_ALIGNMENT = 16


def entry_of(spec: KernelSpec) -> str:
    """The name of the kernel's entry."""
    return f"flash_{spec.family}"


@lru_cache(maxsize=256)
def render_kernel(spec: KernelSpec) -> KernelSource:
    """The kernel's source over the constants of `spec`, with checks that it and build/params.py agree."""
    source = render(f"{spec.family}.cu", _constants(spec), [entry_of(spec)], str(spec))
    structures = {"Tensor": TENSOR, "FwdParams": FWD_PARAMS, "CombineParams": COMBINE_PARAMS}
    checks = "".join(layout_checks(name, dtype) for name, dtype in structures.items())
    return KernelSource(source.name, source.text + checks, source.entries)


def _constants(spec: KernelSpec) -> dict[str, ConfigValue]:
    if isinstance(spec, CombineSpec):
        return {"Element": _ELEMENTS[spec.dtype], "kNumThreads": spec.num_threads, "kRowsPerBlock": spec.rows_per_block}
    return {
        "Element": _ELEMENTS[spec.dtype],
        "kBaseline": spec.baseline,
        "kHeadDim": spec.head_dim,
        "kHeadDimV": spec.head_dim_v,
        "kBlockM": spec.tile.block_m,
        "kBlockN": spec.tile.block_n,
        "kNumWarps": spec.tile.num_warps,
        "kQInRegisters": spec.tile.q_in_registers,
        "kSharedBytes": spec.shared_bytes,
        "kHasLower": spec.features.has_lower,
        "kHasUpper": spec.features.has_upper,
        "kScaleFirst": spec.features.scale_first,
        "kPacked": spec.packed,
        "kSplit": spec.split,
    }


class Operands(NamedTuple):
    """Arrays as kernels take them: elements of a row contiguous, rows at multiples of the plan's alignment."""

    query: Any  # (*batch, Hq, L, E)
    key: Any  # (*batch, Hk, S, E)
    value: Any  # (*batch, Hv, S, Ev)
    out: Any  # (*batch, Hq, L, Ev)
    lse: Any  # (*batch, Hq, L) contiguous, or None
    partial_out: Any  # (num_splits, *batch, Hq, L, Ev) accumulators, or None
    partial_lse: Any  # (num_splits, *batch, Hq, L), or None


def prepare(problem: Problem, plan: Plan, buffers: Buffers, address: Callable[[Any], int]) -> Operands:
    """The operands of a call: the arrays themselves, or a copy of one whose rows a kernel can't take.

    An `out` like that becomes a new array; the caller copies it back.  `address` gives an array's first byte.
    """
    xp = problem.namespace

    def fitting(array: Any, copy: Callable[[Any, Any], Any]) -> Any:
        return array if _rows_fit(array, plan.row_alignment, address) else copy(array, xp)

    partial_out = partial_lse = None
    if plan.num_splits > 1:
        accumulator = problem.element.accumulator
        partial_out = xp.empty((plan.num_splits, *buffers.out.shape), accumulator)
        partial_lse = xp.empty(partial_out.shape[:-1], accumulator)
    return Operands(
        fitting(buffers.query, _copy),
        fitting(buffers.key, _copy),
        fitting(buffers.value, _copy),
        fitting(buffers.out, lambda out, xp: _empty_rows(out.shape, out.dtype, xp)),
        buffers.lse,
        partial_out,
        partial_lse,
    )


def launches(
    problem: Problem, plan: Plan, operands: Operands, address: Callable[[Any], int]
) -> Iterator[tuple[Launch, np.void]]:
    """The plan's launches in order, each with its parameter block.

    Raises
    ------
    Unsupported
        The batch has more axes than a kernel carries, after joining those that lie behind one another in every array.
    """
    for launch in plan.launches:
        if isinstance(launch.spec, FwdSpec):
            yield launch, _forward_params(problem, plan, operands, address)
        else:
            yield launch, _combine_params(problem, plan, operands, address)


def _forward_params(problem: Problem, plan: Plan, operands: Operands, address: Callable[[Any], int]) -> np.void:
    arrays = (operands.query, operands.key, operands.value, operands.out)
    shape, tensors = _tensors(problem, arrays, address)
    block = (
        *tensors,
        *_addresses(address, operands.lse, operands.partial_out, operands.partial_lse),
        problem.scale,
        shape,
        problem.batch_size,
        problem.num_heads_q,
        problem.num_heads_q // problem.num_heads_k,
        problem.num_heads_q // problem.num_heads_v,
        plan.pack,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.head_dim,
        problem.head_dim_v,
        plan.num_splits,
        # The kernel may look at a bound that the band lacks: then at one that removes nothing.
        -problem.seqlen_q if problem.band.lower is None else problem.band.lower,
        problem.seqlen_k if problem.band.upper is None else problem.band.upper,
    )
    params: np.void = np.array([block], FWD_PARAMS)[0]
    return params


def _combine_params(problem: Problem, plan: Plan, operands: Operands, address: Callable[[Any], int]) -> np.void:
    shape, tensors = _tensors(problem, (operands.out,), address)
    block = (
        *tensors,
        *_addresses(address, operands.lse, operands.partial_out, operands.partial_lse),
        shape,
        problem.batch_size,
        problem.num_heads_q,
        problem.seqlen_q,
        problem.head_dim_v,
        plan.num_splits,
    )
    params: np.void = np.array([block], COMBINE_PARAMS)[0]
    return params


def _addresses(address: Callable[[Any], int], *arrays: Any) -> tuple[int, ...]:
    return tuple([0 if array is None else address(array) for array in arrays])


def _tensors(
    problem: Problem, arrays: tuple[Any, ...], address: Callable[[Any], int]
) -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
    """The batch's joined axes, and for each array (*batch, head, row, element) the fields of a Tensor."""
    rank = len(problem.batch_shape)
    itemsize = problem.element.storage.itemsize
    all_strides = tuple([array.strides[:rank] for array in arrays])
    shape, batch_strides = _batch_axes(problem.batch_shape, all_strides, itemsize)
    tensors = []
    for array, strides in zip(arrays, batch_strides, strict=True):
        outer = _without_unit_axes(array.shape[rank:-1], array.strides[rank:-1])
        tensors.append((address(array), strides, *_in_elements(outer, itemsize)))
    return shape, tensors


@lru_cache(maxsize=512)
def _batch_axes(
    batch_shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The joined batch axes and each array's strides along them in elements, filled up to BATCH_AXES in front."""
    strides = tuple([_without_unit_axes(batch_shape, one) for one in strides])
    ranges = joinable_axes(batch_shape, strides)
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
    joined = tuple([_in_elements((0,) * missing + tuple([one[axis] for axis in inner]), itemsize) for one in strides])
    return (1,) * missing + shape, joined


def _without_unit_axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)])


def _in_elements(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple([stride // itemsize for stride in strides])


def _rows_fit(array: Any, alignment: int, address: Callable[[Any], int]) -> bool:
    if array.size == 0:  # nothing is read
        return True
    *outer, element = array.strides
    # Strides of less than an element would leave the kernels' strides, which count elements, with a remainder.
    alignment = max(alignment, array.itemsize)
    aligned = all(stride % alignment == 0 for stride in _without_unit_axes(array.shape[:-1], tuple(outer)))
    return (element == array.itemsize or array.shape[-1] == 1) and aligned and address(array) % alignment == 0


def _copy(array: Any, xp: Any) -> Any:
    """A copy in rows that fit, in which what is repeated by a stride of 0 is still there once."""
    once = array[tuple([slice(None, 1) if stride == 0 else slice(None) for stride in array.strides[:-1]])]
    copy = _empty_rows(once.shape, once.dtype, xp)
    copy[...] = once
    return xp.broadcast_to(copy, array.shape)


def _empty_rows(shape: tuple[int, ...], dtype: Any, xp: Any) -> Any:
    """A new array whose rows begin at multiples of _COPY_ALIGNMENT bytes."""
    step = _COPY_ALIGNMENT // dtype.itemsize
    return xp.empty((*shape[:-1], -(-shape[-1] // step) * step), dtype)[..., : shape[-1]]
