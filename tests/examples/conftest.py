"""What several tests of examples use."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from tests import cupy_stand_in


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for CuPy, importable, with an `asarray` that brings NumPy arrays to the GPU, as CuPy's does."""
    module = cupy_stand_in.make_module()
    from_lists_and_arrays = module.asarray

    def asarray(value: Any, dtype: Any = None) -> Any:
        if isinstance(value, np.ndarray):
            return cupy_stand_in.Array(value.astype(dtype or value.dtype))
        return from_lists_and_arrays(value, dtype=dtype)

    module.asarray = asarray
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module
