"""What is known of a bool mask by tiles: an array for it, and the launch of kernels_cu/mask_summary.cu."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..plan.specs import Launch, MaskSummarySpec
from .params import BATCH_AXES, SUMMARY_PARAMS, Block, by_value
from .strides import join_batch

__all__ = ["MaskSummary", "entries_once", "summarize_mask"]


class MaskSummary(NamedTuple):
    """What is known of each tile of a bool mask, and the launch that finds it out: see `summarize_mask`."""

    array: Any  # bytes, of the mask's rank; the last two axes count tiles, and those of length 1 broadcast
    launch: Launch | None  # None: there is nothing to look at
    params: Block | None


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
    once = entries_once(mask)
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
        batch_shape, (steps,) = join_batch(batch_shape, (steps,))
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
    return MaskSummary(array, launch, by_value(np.array([block], SUMMARY_PARAMS)))


def entries_once(mask: Any) -> Any:
    """The mask with axes of length 1 in place of those along which it repeats itself by a stride of 0."""
    return mask[tuple([slice(None, 1) if stride == 0 else slice(None) for stride in mask.strides])]


def _distance(array: Any, axis: int) -> float:
    """Bytes between neighbours along the axis; infinite where there are none."""
    return abs(array.strides[axis]) if array.shape[axis] > 1 else math.inf
