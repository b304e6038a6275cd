"""The one table of element types.  Whatever depends on a dtype is looked up here."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "DType", "dtype_named"]


@dataclass(frozen=True)
class DType:
    """An element type that attention accepts.

    `storage` is the type of the arrays, `accumulator` the type in which scores, sums and outputs are accumulated.
    """

    name: str
    storage: np.dtype
    accumulator: np.dtype

    @property
    def is_half(self) -> bool:
        """True for the 16-bit types, which are computed in float32."""
        return self.storage.itemsize == 2


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

_BY_NAME = {
    dtype.name: dtype
    for dtype in (
        DType("float16", np.dtype(np.float16), _FLOAT32),
        DType("bfloat16", np.dtype(ml_dtypes.bfloat16), _FLOAT32),
        DType("float32", _FLOAT32, _FLOAT32),
        DType("float64", _FLOAT64, _FLOAT64),
    )
}

#: Keyed by NumPy dtype in native byte order: a look-up that fails is a dtype that attention refuses.
DTYPES: dict[np.dtype, DType] = {dtype.storage: dtype for dtype in _BY_NAME.values()}


def dtype_named(name: str) -> DType:
    """Return the table's row for one of "float16", "bfloat16", "float32", "float64"."""
    return _BY_NAME[name]
