"""Tensor maps of operands: what they say, and which arrays have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupyflash import explain
from cupyflash.build.bulk import make_maps, map_refusals, panel_columns
from cupyflash.plan.device import DEVICES, EMULATOR
from cupyflash.plan.specs import FwdSpec
from cupyflash.plan.tiles import TileConfig
from cupyflash.problem.normalize import normalize

H200 = DEVICES["H200"]
SPEC = FwdSpec("fwd_sm90", "float16", 96, 128, TileConfig(128, 80, 12, False, 2), baseline=90)


def half(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def record(*arguments: Any) -> Any:
    """Instead of a map its description, but for the address."""
    return arguments[1:]


def maps(spec: FwdSpec, *arrays: np.ndarray) -> list[Any]:
    return list(make_maps(spec, arrays, [array.ctypes.data for array in arrays], record))


def test_boxes_are_what_the_kernel_copies_at_once() -> None:
    found = maps(SPEC, half(2, 4, 300, 90), half(2, 1, 70, 90), half(2, 1, 70, 120), half(2, 4, 300, 120))
    assert [(box, swizzle) for _, _, _, box, swizzle in found] == [
        ((1, 1, 64, 32), 64),
        ((1, 1, 80, 32), 64),
        ((1, 1, 80, 64), 128),
        ((1, 1, 16, 64), 128),
    ]
    assert found[0][:3] == ((2, 4, 300, 90), (4 * 300 * 180, 300 * 180, 180, 2), "float16")
    assert [panel_columns(n) for n in (32, 64, 96, 128, 192, 256)] == [32, 64, 32, 64, 64, 64]


def test_one_axis_for_the_batch() -> None:
    x = half(2, 3, 4, 5, 96)
    expected = ((6, 4, 5, 96), (4 * 5 * 192, 5 * 192, 192, 2))
    for array in (x, x[None], x[:, :, None].swapaxes(2, 3)[:, :, :, 0]):
        assert maps(SPEC, array, array, array, array)[0][:2] == expected
    # What is repeated is there once: stride 0; and an axis of one element may step as it likes.
    assert maps(SPEC, *[np.broadcast_to(x[:1, :1], x.shape)] * 4)[0][1] == (0, 5 * 192, 192, 2)
    assert maps(SPEC, *[half(4, 5, 96)[None]] * 4)[0][1] == (0, 5 * 192, 192, 2)
    assert maps(SPEC, *[half(4, 1, 7)[:, ::-1]] * 4)[0][1] == (0, 14, 16, 2)


def test_what_no_copy_moves_has_no_map() -> None:
    x = half(2, 4, 5, 96)
    kinds = [[type(found) for found in maps(spec, x, x[..., :0, :], x, x)] for spec in (SPEC,)]
    assert kinds == [[tuple, np.ndarray, tuple, tuple]]
    packed = FwdSpec("fwd_sm90", "float16", 96, 128, SPEC.tile, packed=True, baseline=90)
    assert [type(found) for found in maps(packed, x, x, x, x)] == [np.ndarray, tuple, tuple, np.ndarray]


X = half(2, 3, 90, 64)
REFUSED = {
    "can't move query: strides must be at least 0 and less than 2**40, but were": {"query": X[:, ::-1]},
    "can't move key: its rows or elements are one, repeated (strides": {"key": np.broadcast_to(X[:, :, :1], X.shape)},
    "can't move value: its batch axes (2, 2) are not one behind the other (strides": {
        "query": half(2, 2, 3, 90, 64),
        "key": half(2, 2, 3, 90, 64),
        "value": half(2, 3, 3, 90, 64)[:, :2],
    },
    "can't move out: strides must be": {"out": half(2, 3, 90, 64)[..., ::-1, :]},
    "bulk copies need elements, but E was 0 and Ev was 64": {"query": half(2, 3, 90, 0), "key": half(2, 3, 90, 0)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_arrays_without_maps_are_left_to_another_kernel(reason: str) -> None:
    arguments = {"query": X, "key": X, "value": X} | REFUSED[reason]
    problem, buffers = normalize(**arguments)
    (found,) = map_refusals(problem, buffers, H200)
    assert reason in found
    assert map_refusals(problem, buffers, EMULATOR) == ()
    explained = explain(**arguments, device="H200")
    assert explained.plan is not None
    assert explained.plan.launches[0].spec.family == "fwd_sm80"
    assert f"fwd_sm90-f16-d64-m128n128w12qs2: {found}" in str(explained)


def test_what_is_copied_anyway_has_a_map() -> None:
    """Rows that are not contiguous, or not at multiples of 16 bytes."""
    for key in (half(2, 3, 90, 128)[..., ::2], half(2, 3, 90, 65)[..., 1:], half(2, 3, 64, 90).swapaxes(-1, -2)):
        problem, buffers = normalize(X, key, X)
        assert map_refusals(problem, buffers, H200) == ()
