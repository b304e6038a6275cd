"""The kernels' parameter blocks as NumPy dtypes.

kernels_cu/params.cuh declares the same structures in C++.  `layout_checks` writes, for the end of a kernel's
source, an assertion for every field, so that a drift between the two is a compile error that names the field.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BATCH_AXES",
    "FWD_PARAMS",
    "MASK",
    "MAX_PARTS",
    "MERGE_PARAMS",
    "MOD_MARKS",
    "MOD_SUMMARY_PARAMS",
    "PART",
    "ROW_AXES",
    "SUMMARY_PARAMS",
    "TENSOR",
    "Block",
    "by_value",
    "fields_of",
    "layout_checks",
    "pack_forward",
    "pack_marks",
    "pack_mask",
    "pack_scores",
    "pack_tensor",
    "raw",
]

#: What a kernel takes by value: an array of one element, of raw bytes.  CuPy takes it like this; its scalars
#: end at 32 bytes before 14.1, and the fields of a structure it would list at every launch.
Block: TypeAlias = npt.NDArray[np.void]

#: Batch axes that a kernel carries.
BATCH_AXES = 4

TENSOR = np.dtype(
    [
        ("data", np.uintp),
        ("batch_strides", np.int64, (BATCH_AXES,)),
        ("head_stride", np.int64),
        ("row_stride", np.int64),
    ],
    align=True,
)

MASK = np.dtype(
    [
        ("data", np.uintp),
        ("batch_strides", np.int64, (BATCH_AXES,)),
        ("head_stride", np.int64),
        ("row_stride", np.int64),
        ("column_stride", np.int64),
    ],
    align=True,
)

MOD_MARKS = np.dtype(
    [("data", np.uintp), ("batch_stride", np.int64), ("group_stride", np.int64), ("row_stride", np.int64)], align=True
)

SCORE_PARAMS = np.dtype(
    [
        ("float_mask", MASK),
        ("bool_mask", MASK),
        ("summary", MASK),
        ("mod_marks", MOD_MARKS),
        ("alibi_slopes", np.uintp),
        ("sinks", np.uintp),
        ("seed_data", np.uintp),
        ("seed", np.uint64),
        ("softcap", np.float64),
        ("dropout_scale", np.float64),
        ("dropout_threshold", np.uint32),
        ("shift", np.int32),
        ("alibi_batch_stride", np.int32),
        ("sinks_are_float", np.int32),
    ],
    align=True,
)

FWD_PARAMS = np.dtype(
    [
        ("q", TENSOR),
        ("k", TENSOR),
        ("v", TENSOR),
        ("out", TENSOR),
        ("lse", np.uintp),
        ("partial_out", np.uintp),
        ("partial_lse", np.uintp),
        ("weights", np.uintp),
        ("scale", np.float64),
        ("batch_shape", np.int32, (BATCH_AXES,)),
        ("batch_size", np.int32),
        ("num_heads_q", np.int32),
        ("group_size_k", np.int32),
        ("group_size_v", np.int32),
        ("pack", np.int32),
        ("seqlen_q", np.int32),
        ("seqlen_k", np.int32),
        ("head_dim", np.int32),
        ("head_dim_v", np.int32),
        ("num_splits", np.int32),
        ("section", np.int32),
        ("lower", np.int32),
        ("upper", np.int32),
        ("scores", SCORE_PARAMS),
    ],
    align=True,
)

SUMMARY_PARAMS = np.dtype(
    [
        ("mask", MASK),
        ("summary", np.uintp),
        ("num_tiles", np.int64),
        ("batch_shape", np.int32, (BATCH_AXES,)),
        ("num_heads", np.int32),
        ("num_rows", np.int32),
        ("num_columns", np.int32),
        ("block_rows", np.int32),
        ("block_columns", np.int32),
        ("has_words", np.int32),
    ],
    align=True,
)

MOD_SUMMARY_PARAMS = np.dtype(
    [
        ("summary", np.uintp),
        ("num_tiles", np.int64),
        ("num_groups", np.int32),
        ("pack", np.int32),
        ("num_rows", np.int32),
        ("num_keys", np.int32),
        ("block_rows", np.int32),
        ("block_keys", np.int32),
    ],
    align=True,
)

#: Parts that one launch of the merge joins, and the axes of their rows.
MAX_PARTS = 32
ROW_AXES = BATCH_AXES + 2

PART = np.dtype(
    [
        ("out", np.uintp),
        ("lse", np.uintp),
        ("out_strides", np.int64, (ROW_AXES,)),
        ("out_column_stride", np.int64),
        ("lse_strides", np.int64, (ROW_AXES,)),
    ],
    align=True,
)

MERGE_PARAMS = np.dtype(
    [
        ("out", np.uintp),
        ("lse", np.uintp),
        ("shape", np.int32, (ROW_AXES,)),
        ("num_rows", np.int32),
        ("head_dim_v", np.int32),
        ("num_parts", np.int32),
        ("parts", PART, (MAX_PARTS,)),
    ],
    align=True,
)


# Whether there is one, the compiler says: 13.2, which PyTorch 2.15 brings, has none, 13.5 has.
_IF_OFFSETOF = (
    "#ifndef __has_builtin",
    "#define __has_builtin(name) 0",
    "#endif",
    "#if !defined(__CUDACC_RTC__) || __has_builtin(__builtin_offsetof)",
)


def layout_checks(structure: str, dtype: np.dtype[np.void]) -> str:
    """``static_assert`` lines that hold the C++ ``structure`` to ``dtype``: size and places.

    NVRTC 12 and early 13 have no ``__builtin_offsetof`` and look at sizes alone; later ones check the places too.
    """
    assert dtype.fields is not None
    sizes = [f'static_assert(sizeof({structure}) == {dtype.itemsize}, "{structure} has another size in Python");']
    places = []
    for name, (field, offset, *_) in dtype.fields.items():
        size, place = f"sizeof({structure}::{name}) == {field.itemsize}", f"__builtin_offsetof({structure}, {name})"
        sizes.append(f'static_assert({size}, "{structure}.{name} has another size in Python");')
        places.append(f'static_assert({place} == {offset}, "{structure}.{name} lies elsewhere in Python");')
    return "\n".join([*sizes, *_IF_OFFSETOF, *places, "#endif"]) + "\n"


def by_value(block: Block) -> Block:
    """The parameter block of an array of one structure."""
    return block.view(raw(block.dtype))


def fields_of(block: Block, structure: np.dtype[np.void]) -> np.void:
    """The block as the structure that it is."""
    fields: np.void = block.view(structure)[0]
    return fields


def raw(structure: np.dtype[np.void]) -> np.dtype[np.void]:
    """As many bytes, without fields."""
    return np.dtype(f"V{structure.itemsize}")


def _packer(structure: np.dtype[np.void]) -> Callable[..., bytes]:
    """A function from the numbers of a structure, in the order of its fields and their elements, to its bytes.

    A structure within it is given as bytes.  They are those of ``np.array([nested tuples], structure)``, in a small
    part of the time.
    """
    assert structure.fields is not None
    text, end = "=", 0
    for field, offset, *_ in structure.fields.values():
        base, shape = field.subdtype or (field, ())
        code = f"{base.itemsize}s" if base.fields else _CODES[base.str[1:]]
        text += f"{offset - end}x" + code * math.prod(shape)
        end = offset + field.itemsize
    return struct.Struct(text + f"{structure.itemsize - end}x").pack


_CODES = {"u8": "Q", "i8": "q", "i4": "i", "u4": "I", "f8": "d"}

pack_tensor, pack_mask, pack_marks = _packer(TENSOR), _packer(MASK), _packer(MOD_MARKS)
pack_scores, pack_forward = _packer(SCORE_PARAMS), _packer(FWD_PARAMS)

#: The SCORE_PARAMS of a call that has nothing of the kind.
NO_SCORES = bytes(SCORE_PARAMS.itemsize)
