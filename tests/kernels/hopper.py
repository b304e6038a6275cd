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


def map_of(array: Array, box: tuple[int, ...], swizzle: int = 128) -> np.ndarray:
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


def operand_offsets(rows: int, start: int, leading: int, stride: int, swizzle: int, transposed: bool) -> Array:
    """The bytes at which the (rows, 16) elements of a wgmma operand lie, as its descriptor says.

    PTX ISA, "Shared memory matrix layout" and "Strides".  Not transposed, eight rows of `swizzle` bytes along k are a
    pattern, and `stride` leads to the next eight rows; without swizzle the rows have 16 bytes and `leading` leads to
    the next 8 of k.  Transposed, a pattern has eight rows of `swizzle` bytes along m or n: `stride` leads to the next
    8 of k and `leading` to the next pattern along m or n.
    """
    row, k = np.indices((rows, 16))
    span = swizzle or CHUNK
    if transposed:
        linear = row // (span // 2) * leading + k // 8 * stride + k % 8 * span + 2 * (row % (span // 2))
    else:
        linear = row // 8 * stride + row % 8 * span + (2 * k if swizzle else k // 8 * leading + 2 * (k % 8))
    linear += start
    chunk = linear // CHUNK % 8
    flipped = linear // LINE % 8 % max(1, swizzle // CHUNK)
    return linear + CHUNK * ((chunk ^ flipped) - chunk)


def place_operand(
    shared: Array, matrix: Array, start: int, leading: int, stride: int, swizzle: int, transposed: bool
) -> None:
    """Writes the elements of a wgmma operand to where its descriptor says, in steps of 16 along k, 32 bytes apart."""
    for step in range(matrix.shape[1] // 16):
        offsets = operand_offsets(len(matrix), start + 32 * step, leading, stride, swizzle, transposed)
        shared.view(np.uint16)[offsets // 2] = matrix[:, 16 * step : 16 * step + 16].view(np.uint16)


def wgmma_operands(
    rng: np.random.Generator, a: Array, b: Array, transpose_a: bool, transpose_b: bool, swizzle: int, gap: int = 0
) -> tuple[Array, Array]:
    """Shared memory with a (64, 16) and b (n, 16) in it, and the seven numbers by which the probes find them.

    Patterns lie `gap` bytes apart.  The numbers: where b begins; leading, stride and swizzle of a, then of b.
    """
    span = swizzle or CHUNK
    pattern = 8 * span + gap

    def strides(rows: int, transposed: bool) -> tuple[int, int]:
        if transposed:  # two patterns along k, one for each span along m or n
            return 2 * pattern, pattern
        return (16, pattern) if swizzle else (pattern * (rows // 8), pattern)

    def end(rows: int, transposed: bool, start: int) -> int:
        last = operand_offsets(rows, start, *strides(rows, transposed), swizzle, transposed).max()
        return -(-int(last + 2) // 1024) * 1024

    start_b = end(64, transpose_a, 0)
    shared = rng.integers(0, 256, end(len(b), transpose_b, start_b), dtype=np.uint8)
    place_operand(shared, a, 0, *strides(64, transpose_a), swizzle, transpose_a)
    place_operand(shared, b, start_b, *strides(len(b), transpose_b), swizzle, transpose_b)
    mode = OPERAND_SWIZZLE[swizzle]
    numbers = [start_b, *strides(64, transpose_a), mode, *strides(len(b), transpose_b), mode]
    return shared, np.array(numbers, np.uint32)


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
