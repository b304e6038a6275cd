"""Tensor maps: what a kernel's bulk copies of tiles (TMA) know of an array, 128 bytes passed by value.

`driver_map` asks the CUDA driver for one, `emulated_map` makes the plain struct that the emulator reads.  Both take and
refuse the same arrays, both remember their latest maps, and either's result is an argument of a kernel whose parameter
is ``const __grid_constant__ TensorMap``.

Axes are NumPy's: the last one is that whose elements are contiguous.  Kernels name coordinates the other way round.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from ..build.params import Block
from ..errors import CupyflashError, Unsupported

__all__ = ["driver_map", "emulated_map"]

Ints: TypeAlias = tuple[int, ...]

# The numbers of CUtensorMapDataType.
_DATA_TYPES = {"float16": 6, "bfloat16": 9, "float32": 7, "float64": 8}
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Bytes of a swizzled row; positions are the numbers of CUtensorMapSwizzle, and of Swizzle in emulator/bulk.h.
_SWIZZLES = (0, 32, 64, 128)
_MAP_BYTES = 128
_MIN_RANK, _MAX_RANK = 3, 5  # what the wrappers of the ISA layer take
_MAX_BOX = 256
_STRIDE_UNIT = 16
_MAX_STRIDE = 2**40
_MAX_EXTENT = 2**32
_L2_PROMOTION_256 = 3  # CUtensorMapL2promotion: fetch whole lines of 256 bytes
_CACHED_MAPS = 1024

# emulator/bulk.h: TensorLayout
_LAYOUT = np.dtype(
    [
        ("mark", np.uint64),
        ("address", np.uint64),
        ("extents", np.uint64, _MAX_RANK),
        ("strides", np.uint64, _MAX_RANK - 1),
        ("box", np.uint32, _MAX_RANK),
        ("rank", np.uint32),
        ("element_bytes", np.uint32),
        ("swizzle", np.uint32),
        ("unused", np.uint64),
    ]
)
_MARK = 0x70616D2D6F727563


@lru_cache(maxsize=_CACHED_MAPS)
def emulated_map(address: int, shape: Ints, strides: Ints, dtype: str, box: Ints, swizzle: int = 128) -> Block:
    """A tensor map for kernels under the emulator.

    Parameters
    ----------
    address
        of the first element, a multiple of 16.
    shape, strides
        of 3 to 5 axes; strides in bytes.  An axis that repeats its elements (stride 0) gets the extent 1: kernels pass
        the coordinate 0 there.
    dtype
        the elements' name: ``"float16"``, ``"bfloat16"``, ``"float32"``, ``"float64"``.
    box
        the shape of a tile.
    swizzle
        the bytes of a row of the tile whose 16-byte chunks are exchanged: 128, 64, 32, or 0 for none.

    Raises
    ------
    ValueError
        TMA cannot read such an array, or not in such tiles.
    """
    before, after = _layout_around_address(shape, strides, dtype, box, swizzle)
    return _as_argument(before + _checked(address).to_bytes(8, sys.byteorder) + after)


@lru_cache(maxsize=_CACHED_MAPS)
def _layout_around_address(shape: Ints, strides: Ints, dtype: str, box: Ints, swizzle: int) -> tuple[bytes, bytes]:
    extents, steps, sizes = _axes(shape, strides, dtype, box, swizzle)
    layout = np.zeros((), _LAYOUT)
    layout["mark"], layout["rank"] = _MARK, len(extents)
    layout["extents"][: len(extents)] = extents
    layout["strides"][: len(steps)] = steps
    layout["box"][: len(sizes)] = sizes
    layout["element_bytes"], layout["swizzle"] = _ITEM_BYTES[dtype], _SWIZZLES.index(swizzle)
    data, place = layout.tobytes(), 8  # of the address
    return data[:place], data[place + 8 :]


@lru_cache(maxsize=_CACHED_MAPS)
def driver_map(address: int, shape: Ints, strides: Ints, dtype: str, box: Ints, swizzle: int = 128) -> Block:
    """A tensor map for kernels on a GPU; see `emulated_map`.

    Raises
    ------
    ValueError
        TMA cannot read such an array, or not in such tiles.
    Unsupported
        there is no CUDA driver, or one older than CUDA 12.
    CupyflashError
        the driver refused.
    """
    before, after = _driver_arguments(shape, strides, dtype, box, swizzle)
    address, encode = _checked(address), _encoder("libcuda.so.1")
    # The driver wants its 128 bytes at a multiple of 64.
    room = ctypes.create_string_buffer(_MAP_BYTES + 64)
    place = -ctypes.addressof(room) % 64
    status = encode(ctypes.addressof(room) + place, *before, address, *after)
    if status != 0:
        raise CupyflashError(
            f"cuTensorMapEncodeTiled returned {status} for address={address:#x}, shape={shape}, strides={strides}, "
            f"dtype={dtype}, box={box}, swizzle={swizzle}"
        )
    return _as_argument(room.raw[place : place + _MAP_BYTES])


@lru_cache(maxsize=_CACHED_MAPS)
def _driver_arguments(
    shape: Ints, strides: Ints, dtype: str, box: Ints, swizzle: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of cuTensorMapEncodeTiled: what stands between the map and the address, and what behind it."""
    extents, steps, sizes = _axes(shape, strides, dtype, box, swizzle)
    rank = len(extents)
    return (_DATA_TYPES[dtype], rank), (
        (ctypes.c_uint64 * rank)(*extents),
        (ctypes.c_uint64 * (rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(*sizes),
        (ctypes.c_uint32 * rank)(*[1] * rank),  # every element of the box
        0,  # CU_TENSOR_MAP_INTERLEAVE_NONE
        _SWIZZLES.index(swizzle),
        _L2_PROMOTION_256,
        0,  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: zeros
    )


def _as_argument(data: bytes) -> Block:
    return np.frombuffer(data, f"V{_MAP_BYTES}")


def _checked(address: int) -> int:
    if address % _STRIDE_UNIT != 0:
        raise ValueError(f"address={address:#x} is not a multiple of {_STRIDE_UNIT}")
    return address


def _axes(shape: Ints, strides: Ints, dtype: str, box: Ints, swizzle: int) -> tuple[Ints, Ints, Ints]:
    """Extents, strides from the second axis on, and box, contiguous axis first, after checking them."""
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"dtype={dtype!r} has no tensor map; expected one of {', '.join(_ITEM_BYTES)}")
    item = _ITEM_BYTES[dtype]
    if swizzle not in _SWIZZLES:
        raise ValueError(f"swizzle={swizzle}; expected one of {', '.join(map(str, _SWIZZLES))}")
    if not (_MIN_RANK <= len(shape) <= _MAX_RANK and len(shape) == len(strides) == len(box)):
        raise ValueError(
            f"shape={shape}, strides={strides}, box={box}: expected {_MIN_RANK} to {_MAX_RANK} axes, as many in each"
        )
    if strides[-1] != item:
        raise ValueError(f"strides={strides}: elements of the last axis must lie {item} bytes apart")
    row = box[-1] * item
    if row % _STRIDE_UNIT != 0 or row > (swizzle or _MAX_BOX * item):
        limit = f", at most the swizzle's {swizzle}" if swizzle else ""
        raise ValueError(f"box={box}: a row has {row} bytes; expected a multiple of {_STRIDE_UNIT}{limit}")
    extents, steps = [shape[-1]], []
    for extent, stride, size in zip(shape[-2::-1], strides[-2::-1], box[-2::-1], strict=True):
        if extent == 1 or stride == 0:
            if extent != 1 and size != 1:
                raise ValueError(f"box={box}: along an axis of stride 0 a tile has the size 1")
            extents.append(1)
            steps.append(_STRIDE_UNIT)  # never used: what else a tile has there lies outside
            continue
        if not 0 < stride < _MAX_STRIDE or stride % _STRIDE_UNIT != 0:
            raise ValueError(
                f"strides={strides}: expected multiples of {_STRIDE_UNIT} above 0 and below 2**40; copy the array first"
            )
        extents.append(extent)
        steps.append(stride)
    if any(not 1 <= extent <= _MAX_EXTENT for extent in extents):
        raise ValueError(f"shape={shape}: expected 1 to 2**32 elements along each axis")
    if any(not 1 <= size <= _MAX_BOX for size in box):
        raise ValueError(f"box={box}: expected 1 to {_MAX_BOX} elements along each axis")
    return tuple(extents), tuple(steps), tuple(box[::-1])


@lru_cache(maxsize=4)
def _encoder(library: str) -> Any:
    """cuTensorMapEncodeTiled of the driver."""
    try:
        encode = ctypes.CDLL(library).cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        reason = f"{library} has no cuTensorMapEncodeTiled: {error}"
        raise Unsupported(f"tensor maps need the CUDA driver, 12.0 or later: {reason}", {"cuda": [reason]}) from error
    pointer, enumeration = ctypes.c_void_p, ctypes.c_int
    encode.restype = enumeration
    encode.argtypes = (
        pointer,  # tensorMap
        enumeration,  # tensorDataType
        ctypes.c_uint32,  # tensorRank
        pointer,  # globalAddress
        ctypes.POINTER(ctypes.c_uint64),  # globalDim
        ctypes.POINTER(ctypes.c_uint64),  # globalStrides
        ctypes.POINTER(ctypes.c_uint32),  # boxDim
        ctypes.POINTER(ctypes.c_uint32),  # elementStrides
        enumeration,  # interleave
        enumeration,  # swizzle
        enumeration,  # l2Promotion
        enumeration,  # oobFill
    )
    return encode
