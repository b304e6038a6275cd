"""The calls of the GPU tests, without a GPU: they are valid, and their arrays keep their strides on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.testing import DTYPES, LAYOUTS
from tests.gpu.calls import CLAIMED, is_not_written, not_written, on_device, to_device
from tests.gpu.small_calls import NAMES


class Pointer:
    """Stands in for cupy.cuda.MemoryPointer, over a copy of NumPy's memory."""

    def __init__(self, memory: np.ndarray, offset: int = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


def ndarray(shape: tuple[int, ...], dtype: Any, pointer: Pointer, strides: tuple[int, ...]) -> np.ndarray:
    return np.ndarray(shape, dtype, pointer.memory, pointer.offset, strides)


DEVICE = SimpleNamespace(
    asarray=lambda array: SimpleNamespace(data=Pointer(array.copy())), ndarray=ndarray, empty=np.empty, full=np.full
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_keep_strides_and_values(layout: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    array = LAYOUTS[layout](rng.standard_normal((2, 3, 4, 8)).astype(DTYPES[dtype]))
    moved = to_device(array, DEVICE)
    assert moved.strides == array.strides
    assert moved.dtype == array.dtype
    np.testing.assert_array_equal(moved, array)
    assert not np.may_share_memory(moved, array)


def test_arguments_without_arrays_pass() -> None:
    given = {"attn_mask": (np.ones(3, bool), np.zeros(3)), "scale": 0.5, "window": (3, None), "key": np.ones((0, 4))}
    moved = on_device(given, DEVICE)
    assert moved["scale"] == 0.5
    assert moved["window"] == (3, None)
    assert moved["key"].shape == (0, 4)
    assert [part.dtype for part in moved["attn_mask"]] == [np.bool_, np.float64]
    assert not np.may_share_memory(moved["attn_mask"][0], given["attn_mask"][0])


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("name", [name for name in CLAIMED if name != "long"])
@pytest.mark.parametrize("backend", sorted({"numpy", "emulator"} & set(cupyflash.backends())))
def test_claimed_calls_are_valid(backend: str, name: str) -> None:
    """And the emulator, which runs the same kernels, does not refuse them either."""
    CLAIMED[name].check(backend)


def test_small_calls_are_small() -> None:
    for name in NAMES:
        assert max(CLAIMED[name].key_shape[-2:]) <= 300


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_not_written_is_nan(dtype: str) -> None:
    out = not_written((3, 4), DTYPES[dtype], DEVICE)
    assert np.isnan(out.astype(np.float32)).all()
    assert is_not_written(out)
    out[1, 2] = 0
    assert not is_not_written(out)
