"""Where an array's rows lie, as kernels are told: elements between entries along each axis."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..errors import Unsupported
from ..problem.shapes import join, joinable_axes
from .params import BATCH_AXES, pack_tensor

__all__ = ["COPY_ALIGNMENT", "join_batch", "steps_of", "strides_of_copy", "tensor_of"]

#: What a copy's rows begin at multiples of: as much as any kernel asks for.
COPY_ALIGNMENT = 16


def tensor_of(array: Any, place: int, itemsize: int, alignment: int) -> bytes:
    """TENSOR of an array at that address; empty where `steps_of` says None, or the array begins at no such multiple."""
    strides = array.strides
    if len(strides) == 4:  # what nearly all calls have, in less time than any look-up of it takes
        batch, head, row, element = strides
        if element == itemsize and not (place | batch | head | row) % alignment:
            return pack_tensor(place, 0, 0, 0, batch // itemsize, head // itemsize, row // itemsize)
    steps = steps_of(array.shape, strides, itemsize, alignment)
    if steps is None or (place % alignment and array.size):
        return b""
    return pack_tensor(place, *steps[-BATCH_AXES - 2 :])


def steps_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, alignment: int) -> tuple[int, ...] | None:
    """Elements between entries along each batch axis, of which there are BATCH_AXES at least, between heads, rows.

    None if an element of a row does not follow the one before it, or if not all rows begin at multiples of `alignment`
    bytes where the first does.
    """
    steps = [0] * (BATCH_AXES + 3 - len(shape))
    fits = strides[-1] == itemsize or shape[-1] == 1
    for n, stride in zip(shape[:-1], strides, strict=False):
        if n == 1:
            steps.append(0)
        else:
            steps.append(stride // itemsize)
            if stride % alignment:
                fits = False
    return tuple(steps) if fits or 0 in shape else None  # nothing is read of an empty array


def strides_of_copy(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides of a copy in which what is repeated by a stride of 0 is still there once."""
    steps, step = [itemsize], -(-shape[-1] * itemsize // COPY_ALIGNMENT) * COPY_ALIGNMENT
    for n, stride in zip(shape[-2::-1], strides[-2::-1], strict=True):
        steps.append(0 if stride == 0 else step)
        step *= 1 if stride == 0 else n
    return tuple(steps[::-1])


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
