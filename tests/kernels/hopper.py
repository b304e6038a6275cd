"""How tiles lie in shared memory on sm_90, in NumPy, from the tables of the PTX ISA; and arrays as tensor maps."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cupyflash.backends.tensormap import emulated_map

Array: TypeAlias = npt.NDArray[Any]

CHUNK, LINE = 16, 128
# The descriptor's number of each swizzle span in bytes; 0 is none.
OPERAND_SWIZZLE = {0: 0, 128: 1, 64: 2, 32: 3}


def map_of(array: Array, box: tuple[int, ...], swizzle: int = 128) -> np.void:
    """The emulator's tensor map of an array."""
    return emulated_map(array.ctypes.data, array.shape, array.strides, array.dtype.name, box, swizzle)


def swizzled(shared: Array, swizzle: int) -> Array:
    """Bytes of shared memory with the chunks of each line in their swizzled places; its own inverse.

    PTX ISA, "Swizzling modes": a pattern of eight lines; line n exchanges chunks whose numbers differ in the bits of n,
    three bits of it for 128 bytes, two for 64, one for 32.
    """
    chunks = shared.reshape(-1, LINE // CHUNK, CHUNK)
    result = np.empty_like(chunks)
    for line in range(len(chunks)):
        for chunk in range(LINE // CHUNK):
            flipped = line % 8 % max(1, swizzle // CHUNK)
            result[line, chunk ^ flipped] = chunks[line, chunk]
    return result.reshape(shared.shape)


def tile_of(array: Array, at: tuple[int, ...], box: tuple[int, ...]) -> Array:
    """The box of an array whose first element is ``array[at]``; zeros where there is no element."""
    tile = np.zeros(box, array.dtype)
    inside, outside = [], []
    for begin, size, extent in zip(at, box, array.shape, strict=True):
        first, last = max(begin, 0), max(min(begin + size, extent), max(begin, 0))
        outside.append(slice(first, last))
        inside.append(slice(first - begin, last - begin))
    tile[tuple(inside)] = array[tuple(outside)]
    return tile


def place_operand(
    shared: Array, matrix: Array, start: int, leading: int, stride: int, swizzle: int, transposed: bool
) -> None:
    """Writes the (rows, k) elements of a wgmma operand to where its descriptor says.

    PTX ISA, "Shared memory matrix layout" and "Strides".  Not transposed, eight rows of `swizzle` bytes along k are a
    pattern, and `stride` leads to the next eight rows; without swizzle the rows have 16 bytes and `leading` leads to
    the next 8 of k.  Transposed, a pattern has eight rows of `swizzle` bytes along m or n: `stride` leads to the next
    8 of k and `leading` to the next pattern along m or n.
    """
    linear = np.array(swizzled(shared, swizzle))  # where everything would be without swizzle
    span = swizzle or CHUNK
    for row in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            if transposed:
                per_span = span // 2
                offset = row // per_span * leading + k // 8 * stride + k % 8 * span + 2 * (row % per_span)
            else:
                along_k = 2 * k if swizzle else k // 8 * leading + 2 * (k % 8)
                offset = row // 8 * stride + row % 8 * span + along_k
            linear[start + offset : start + offset + 2] = matrix[row, k : k + 1].view(np.uint8)
    shared[:] = swizzled(linear, swizzle)


def accumulator_places(n: int) -> tuple[Array, Array]:
    """(row, column) of each of the (128, n / 2) accumulators of a warpgroup, in an m64nN product.

    PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": thread T and register i have the row
    16 (T / 32) + T % 32 / 4 + 8 for i % 4 >= 2, and the column 8 (i / 4) + 2 (T % 4) + i % 2.
    """
    thread, i = np.arange(128)[:, None], np.arange(n // 2)[None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + np.where(i % 4 >= 2, 8, 0)
    column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
    return row, column


def a_fragments(matrix: Array) -> Array:
    """The (128, 4) registers of the (64, 16) elements of an a in registers."""
    thread = np.arange(128)[:, None]
    pair = np.arange(4)[None, :]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (pair % 2)
    column = 2 * (thread % 4) + 8 * (pair // 2)
    both = np.stack([matrix[row, column], matrix[row, column + 1]], axis=-1)
    return np.ascontiguousarray(both).view(np.uint32)[..., 0]
