"""From the parts of `merge_attention` to launches of kernels_cu/merge.cu.  The emulator and the GPU share all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..plan.specs import Launch, MergeSpec
from ..problem.dtypes import DTYPES
from ..problem.parts import Parts
from ..problem.shapes import join, joinable_axes
from .params import MAX_PARTS, MERGE_PARAMS, ROW_AXES, Block, by_value

__all__ = ["merge_parts", "merge_refusals"]

# The kernel counts rows and columns in int32.
_MAX_COUNT = 2**31 - 1


def merge_refusals(parts: Parts) -> list[str]:
    """What the parts ask and the kernel does not do on any device, one sentence each; empty if it can merge them."""
    *lead, head_dim_v = parts.outs[0].shape
    reasons = []
    for name, count in (("rows", math.prod(lead)), ("columns", head_dim_v)):
        if count > _MAX_COUNT:
            reasons.append(f"it merges up to {_MAX_COUNT} {name}, but outs had {count}")
    return reasons


def merge_parts(
    parts: Parts, address: Callable[[Any], int], run: Callable[[Launch, tuple[Block, ...]], object]
) -> tuple[Any, Any]:
    """The joint output and log-sum-exp, new arrays that `run` has filled, launch by launch.

    One launch joins up to MAX_PARTS parts.  More are joined in groups first, whose results are accumulators:
    nothing is rounded in between.
    """
    xp, element = parts.namespace, parts.element
    outs, lses = parts.outs, parts.lses
    while len(outs) > MAX_PARTS:
        groups = [slice(first, first + MAX_PARTS) for first in range(0, len(outs), MAX_PARTS)]
        joined = [_join(outs[group], lses[group], element.accumulator, xp, address, run) for group in groups]
        outs, lses = map(tuple, zip(*joined, strict=True))
    return _join(outs, lses, element.storage, xp, address, run)


def _join(
    outs: Sequence[Any],
    lses: Sequence[Any],
    dtype: np.dtype,
    xp: Any,
    address: Callable[[Any], int],
    run: Callable[[Launch, tuple[Block, ...]], object],
) -> tuple[Any, Any]:
    """One launch: the joint output, of `dtype`, and its log-sum-exp."""
    *lead, head_dim_v = outs[0].shape
    out = xp.empty((*lead, head_dim_v), dtype)
    lse = xp.empty(tuple(lead), lses[0].dtype)
    num_rows = math.prod(lead)
    if num_rows == 0:
        return out, lse
    outs = [_in_elements(array, xp, address) for array in outs]
    lses = [_in_elements(array, xp, address) for array in lses]
    shape, strides = _row_axes(tuple(lead), [array.strides[: len(lead)] for array in (*outs, *lses)])
    if len(shape) > ROW_AXES:
        outs, lses = [_copy(array, xp) for array in outs], [_copy(array, xp) for array in lses]
        shape, strides = _row_axes(tuple(lead), [array.strides[: len(lead)] for array in (*outs, *lses)])

    missing = (0,) * (ROW_AXES - len(shape))
    counted = [
        (*missing, *[stride // array.itemsize for stride in one])
        for array, one in zip((*outs, *lses), strides, strict=True)
    ]
    params = np.zeros(1, MERGE_PARAMS)
    params["out"], params["lse"] = address(out), address(lse)
    params["shape"] = (1,) * len(missing) + shape
    params["num_rows"], params["head_dim_v"], params["num_parts"] = num_rows, head_dim_v, len(outs)
    params["parts"][0, : len(outs)] = [
        (address(o), address(s), o_strides, o.strides[-1] // o.itemsize, s_strides)
        for o, s, o_strides, s_strides in zip(outs, lses, counted, counted[len(outs) :], strict=False)
    ]
    spec = MergeSpec(DTYPES[outs[0].dtype].name, DTYPES[dtype].name)
    run(Launch(spec, (math.ceil(num_rows / spec.rows_per_block),)), (by_value(params),))
    return out, lse


def _row_axes(
    lead: tuple[int, ...], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The leading axes, joined where they are one axis in every array, and each array's strides along them."""
    strides = [tuple([0 if n == 1 else step for n, step in zip(lead, one, strict=True)]) for one in strides]
    ranges = joinable_axes(lead, strides)
    # A joined axis steps as its innermost axis longer than 1 does.
    inner = [max((a for a in range(*axes) if lead[a] > 1), default=axes[0]) for axes in ranges]
    return join(lead, ranges), [tuple([one[axis] for axis in inner]) for one in strides]


def _in_elements(array: Any, xp: Any, address: Callable[[Any], int]) -> Any:
    """The array, or a copy if its address or strides are no multiples of its elements' size."""
    steps = [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1]
    return _copy(array, xp) if any(number % array.itemsize for number in (address(array), *steps)) else array


def _copy(array: Any, xp: Any) -> Any:
    copy = xp.empty(array.shape, array.dtype)
    copy[...] = array
    return copy
