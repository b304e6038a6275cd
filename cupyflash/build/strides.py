"""Where an array's rows lie, as kernels are told: elements between entries along each axis."""

from __future__ import annotations

from functools import lru_cache

from ..errors import Unsupported
from ..problem.shapes import join, joinable_axes
from .params import BATCH_AXES

__all__ = ["join_batch", "steps_of"]


@lru_cache(maxsize=2048)
def steps_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, alignment: int) -> tuple[int, ...] | None:
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


@lru_cache(maxsize=512)
def join_batch(
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
