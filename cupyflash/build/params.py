"""The kernels' parameter blocks as NumPy dtypes.

kernels_cu/params.cuh declares the same structures in C++.  `layout_checks` writes, for the end of a kernel's
source, an assertion for every field, so that a drift between the two is a compile error that names the field.
"""

from __future__ import annotations

import numpy as np

__all__ = ["BATCH_AXES", "COMBINE_PARAMS", "FWD_PARAMS", "TENSOR", "layout_checks"]

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

FWD_PARAMS = np.dtype(
    [
        ("q", TENSOR),
        ("k", TENSOR),
        ("v", TENSOR),
        ("out", TENSOR),
        ("lse", np.uintp),
        ("partial_out", np.uintp),
        ("partial_lse", np.uintp),
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
        ("lower", np.int32),
        ("upper", np.int32),
    ],
    align=True,
)

COMBINE_PARAMS = np.dtype(
    [
        ("out", TENSOR),
        ("lse", np.uintp),
        ("partial_out", np.uintp),
        ("partial_lse", np.uintp),
        ("batch_shape", np.int32, (BATCH_AXES,)),
        ("batch_size", np.int32),
        ("num_heads_q", np.int32),
        ("seqlen_q", np.int32),
        ("head_dim_v", np.int32),
        ("num_splits", np.int32),
    ],
    align=True,
)


def layout_checks(structure: str, dtype: np.dtype[np.void]) -> str:
    """``static_assert`` lines that hold the C++ ``structure`` to ``dtype``: size and places."""
    assert dtype.fields is not None
    lines = [f'static_assert(sizeof({structure}) == {dtype.itemsize}, "{structure} has another size in Python");']
    for name, (field, offset, *_) in dtype.fields.items():
        where = f"__builtin_offsetof({structure}, {name}) == {offset}"
        size = f"sizeof({structure}::{name}) == {field.itemsize}"
        lines.append(f'static_assert({where} && {size}, "{structure}.{name} lies elsewhere in Python");')
    return "\n".join(lines) + "\n"
