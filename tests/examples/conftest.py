"""What several tests of examples use."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest

from cupyflash.backends.cuda import CudaBackend
from cupyflash.backends.reference import MathBackend
from tests import cupy_stand_in


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for CuPy, importable, and what else examples use of CuPy.

    Its `asarray` brings NumPy arrays to the GPU, which the package itself may not do.
    """
    module = cupy_stand_in.make_module()
    from_lists_and_arrays = module.asarray

    def asarray(value: Any, dtype: Any = None) -> Any:
        if isinstance(value, np.ndarray):
            return cupy_stand_in.Array(value.astype(dtype or value.dtype))
        return from_lists_and_arrays(value, dtype=dtype)

    module.asarray = asarray
    module.cuda.runtime.memGetInfo = lambda: (3 << 30, 4 << 30)  # free, total
    module.cuda.get_current_stream = lambda: types.SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def math_on_cuda(monkeypatch: pytest.MonkeyPatch, cupy: Any) -> None:
    """The backend "cuda" takes CuPy arrays to `math`: the stand-in launches no kernels."""
    assert cupy
    monkeypatch.setattr(CudaBackend, "reasons", lambda self, problem: [])
    monkeypatch.setattr(CudaBackend, "run", lambda self, problem, buffers: MathBackend().run(problem, buffers))
