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
from ..plan.choose import KernelSpec, Launch, Plan
from ..problem.problem import Buffers, Problem
from ..problem.shapes import join, joinable_axes
from .params import BATCH_AXES, FWD_PARAMS, TENSOR, layout_checks
from .source import ConfigValue, KernelSource, render

__all__ = ["Operands", "entry_of", "launches", "prepare", "render_kernel"]

_ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16"}
_ELEMENT_BYTES = 2
_ROW_ALIGNMENT = 16  # bytes: what one cp.async copies


def entry_of(spec: KernelSpec) -> str:
    """The name of the kernel's entry."""
    return f"flash_{spec.family}"


@lru_cache(maxsize=256)
def render_kernel(spec: KernelSpec) -> KernelSource:
    """The kernel's source over the constants of `spec`, with checks that it and build/params.py agree."""
    constants: dict[str, ConfigValue] = {
        "Element": _ELEMENTS[spec.dtype],
        "kHeadDim": spec.head_dim,
        "kBlockM": spec.tile.block_m,
        "kBlockN": spec.tile.block_n,
        "kNumWarps": spec.tile.num_warps,
        "kSharedBytes": spec.shared_bytes,
        "kHasLower": spec.has_lower,
        "kHasUpper": spec.has_upper,
        "kScaleFirst": spec.scale_first,
    }
    source = render(f"{spec.family}.cu", constants, [entry_of(spec)], str(spec))
    checks = layout_checks("Tensor", TENSOR) + layout_checks("FwdParams", FWD_PARAMS)
    return KernelSource(source.name, source.text + checks, source.entries)


class Operands(NamedTuple):
    """Arrays as kernels take them: elements of a row contiguous, rows at multiples of 16 bytes."""

    query: Any  # (*batch, Hq, L, E)
    key: Any  # (*batch, Hk, S, E)
    value: Any  # (*batch, Hv, S, E)
    out: Any  # (*batch, Hq, L, E)
    lse: Any  # (*batch, Hq, L) contiguous, or None


def prepare(problem: Problem, buffers: Buffers, address: Callable[[Any], int]) -> Operands:
    """The operands of a call: the arrays themselves, or a copy of one whose rows a kernel can't take.

    An `out` like that becomes a new array; the caller copies it back.  `address` gives an array's first byte.
    """

    def fitting(array: Any, copy: Callable[[Any, Any], Any]) -> Any:
        return array if _rows_fit(array, address) else copy(array, problem.namespace)

    return Operands(
        fitting(buffers.query, _copy),
        fitting(buffers.key, _copy),
        fitting(buffers.value, _copy),
        fitting(buffers.out, lambda out, xp: xp.empty(out.shape, out.dtype)),
        buffers.lse,
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
    for launch in plan:
        yield launch, _forward_params(problem, operands, address)


def _forward_params(problem: Problem, operands: Operands, address: Callable[[Any], int]) -> np.void:
    rank = len(problem.batch_shape)
    arrays = (operands.query, operands.key, operands.value, operands.out)
    shape, batch_strides = _batch_axes(problem.batch_shape, tuple([array.strides[:rank] for array in arrays]))
    tensors = [
        (address(array), strides, *_in_elements(_without_unit_axes(array.shape[rank:-1], array.strides[rank:-1])))
        for array, strides in zip(arrays, batch_strides, strict=True)
    ]
    block = (
        *tensors,
        0 if operands.lse is None else address(operands.lse),
        shape,
        problem.num_heads_q,
        problem.num_heads_q // problem.num_heads_k,
        problem.num_heads_q // problem.num_heads_v,
        problem.seqlen_q,
        problem.seqlen_k,
        # The kernel may look at a bound that the band lacks: then at one that removes nothing.
        -problem.seqlen_q if problem.band.lower is None else problem.band.lower,
        problem.seqlen_k if problem.band.upper is None else problem.band.upper,
        problem.scale,
    )
    with np.errstate(over="ignore", under="ignore"):  # a scale beyond float32 is 0 or infinite there
        params: np.void = np.array([block], FWD_PARAMS)[0]
    return params


@lru_cache(maxsize=512)
def _batch_axes(
    batch_shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
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
    joined = tuple([_in_elements((0,) * missing + tuple([one[axis] for axis in inner])) for one in strides])
    return (1,) * missing + shape, joined


def _without_unit_axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)])


def _in_elements(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([stride // _ELEMENT_BYTES for stride in strides])


def _rows_fit(array: Any, address: Callable[[Any], int]) -> bool:
    if array.size == 0:  # nothing is read
        return True
    *outer, element = array.strides
    aligned = all(stride % _ROW_ALIGNMENT == 0 for stride in _without_unit_axes(array.shape[:-1], tuple(outer)))
    return element == _ELEMENT_BYTES and aligned and address(array) % _ROW_ALIGNMENT == 0


def _copy(array: Any, xp: Any) -> Any:
    """A contiguous copy, in which what is repeated by a stride of 0 is still there once."""
    once = array[tuple([slice(None, 1) if stride == 0 else slice(None) for stride in array.strides[:-1]])]
    copy = xp.empty(once.shape, once.dtype)
    copy[...] = once
    return xp.broadcast_to(copy, array.shape)
