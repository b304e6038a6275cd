"""From arrays to parameter blocks: which axes join, what is copied, how the emulator's options are read."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends.emulated import options_from
from cupyflash.backends.emulator import Options
from cupyflash.build.launch import launches
from cupyflash.build.operands import prepare
from cupyflash.build.params import (
    FWD_PARAMS,
    MASK,
    MOD_MARKS,
    SCORE_PARAMS,
    TENSOR,
    fields_of,
    pack_forward,
    pack_marks,
    pack_mask,
    pack_scores,
    pack_tensor,
)
from cupyflash.plan.choose import choose
from cupyflash.plan.device import EMULATOR
from cupyflash.problem.normalize import normalize
from cupyflash.problem.shapes import join, joinable_axes
from cupyflash.testing import LAYOUTS


def address(array: Any) -> int:
    number: int = array.ctypes.data
    return number


def params_of(query: np.ndarray, key: np.ndarray, value: np.ndarray, **arguments: Any) -> np.void:
    problem, buffers = normalize(query, key, value, **arguments)
    plan = choose(problem, EMULATOR)
    operands = prepare(problem, plan, buffers, address)
    ((_, (params, _)),) = launches(problem, plan, operands)
    return fields_of(params, FWD_PARAMS)


def half(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float16)


def test_up_to_four_batch_axes_are_carried_as_they_are() -> None:
    params = params_of(half(2, 3, 4, 5, 64), half(2, 3, 4, 7, 64), half(2, 3, 4, 7, 64))
    assert params["batch_shape"].tolist() == [1, 1, 2, 3]
    assert params["q"]["batch_strides"].tolist() == [0, 0, 3 * 4 * 5 * 64, 4 * 5 * 64]
    assert params["v"]["batch_strides"].tolist() == [0, 0, 3 * 4 * 7 * 64, 4 * 7 * 64]
    assert (params["q"]["head_stride"], params["q"]["row_stride"]) == (5 * 64, 64)


def test_of_more_axes_those_that_lie_behind_one_another_become_one() -> None:
    params = params_of(half(2, 3, 1, 2, 2, 4, 5, 64), half(2, 3, 1, 2, 2, 4, 7, 64), half(2, 1, 1, 2, 2, 4, 7, 64))
    assert params["batch_shape"].tolist() == [1, 2, 3, 4]
    assert params["q"]["batch_strides"].tolist() == [0, 12 * 4 * 5 * 64, 4 * 4 * 5 * 64, 4 * 5 * 64]
    assert params["v"]["batch_strides"].tolist() == [0, 4 * 4 * 7 * 64, 0, 4 * 7 * 64]


@pytest.mark.parametrize(
    ("structure", "pack"),
    [
        (FWD_PARAMS, pack_forward),
        (SCORE_PARAMS, pack_scores),
        (TENSOR, pack_tensor),
        (MASK, pack_mask),
        (MOD_MARKS, pack_marks),
    ],
)
def test_a_structure_has_the_bytes_that_numpy_gives_it(structure: Any, pack: Any) -> None:
    expected = np.zeros(1, structure)[0]  # padding is zero in both
    numbers: list[Any] = []
    for place, name in enumerate(structure.names):
        field = structure[name]
        if field.names:  # a structure within it is given as bytes
            numbers.append(bytes([place] * field.itemsize))
            expected[name] = np.frombuffer(numbers[-1], field)[0]
        else:
            values = range(100 * place + 1, 100 * place + 1 + int(np.prod(field.shape)))
            numbers += values
            expected[name] = np.reshape(values, field.shape)
    assert pack(*numbers) == expected.tobytes()
    with pytest.raises(struct.error):
        pack(*numbers[:-1])


@pytest.mark.parametrize("stage", ["raw", "biased", "softmax", "dropout"])
def test_weights_are_all_that_grows_with_the_scores(stage: str) -> None:
    """What is allocated before the launches: the weights, and some numbers for each row."""
    query, key = half(2, 3000, 64), half(2, 2000, 64)
    mask = np.broadcast_to(np.arange(2000) < 1990, (2, 3000, 2000))
    for _ in range(2):  # the first call of a kind keeps its description
        tracemalloc.start()
        problem, buffers = normalize(query, key, key, (np.zeros(2000, np.float16), mask), dropout_p=0.5, stage=stage)
        operands = prepare(problem, choose(problem, EMULATOR), buffers, address)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert operands.weights is buffers.weights
    assert 0 < peak - buffers.weights.nbytes - buffers.out.nbytes < 100 * 2 * 3000 + 2**16


def test_axes_that_broadcast_keep_their_place() -> None:
    params = params_of(half(2, 1, 4, 5, 64), half(1, 3, 4, 7, 64), half(7, 64), scale=0.5)
    assert params["batch_shape"].tolist() == [1, 1, 2, 3]
    assert params["q"]["batch_strides"].tolist() == [0, 0, 4 * 5 * 64, 0]
    assert params["k"]["batch_strides"].tolist() == [0, 0, 0, 4 * 7 * 64]
    assert params["v"]["batch_strides"].tolist() == [0, 0, 0, 0]
    assert (params["group_size_k"], params["group_size_v"], params["num_heads_q"]) == (1, 4, 4)
    assert params["scale"] == np.float32(0.5)


def test_bounds_that_a_band_lacks_remove_nothing() -> None:
    params = params_of(half(1, 30, 64), half(1, 50, 64), half(1, 50, 64), window=(3, None))
    assert (params["lower"], params["upper"]) == (-3, 50)
    params = params_of(half(1, 30, 64), half(1, 50, 64), half(1, 50, 64), is_causal=True, scale=-1)
    assert (params["lower"], params["upper"]) == (-30, 0)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (1, 1), (2, 2, 2, 2)])
def test_joined_axes_are_a_view(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        arrays = [np.zeros(shape), np.zeros(shape[::-1]).transpose(), np.zeros([2 * n for n in shape])]
        arrays = [
            array[tuple(slice(None, None, 2) for _ in shape)] if array.shape != shape else array for array in arrays
        ]
        chosen = [arrays[i] for i in rng.integers(0, len(arrays), 2)]
        strides = [tuple(s if n > 1 else 0 for n, s in zip(shape, a.strides, strict=True)) for a in chosen]
        ranges = joinable_axes(shape, strides)
        for array in chosen:
            assert np.shares_memory(array.reshape(join(shape, ranges)), array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_an_operand_whose_rows_do_not_fit_is_copied(layout: str) -> None:
    query = LAYOUTS[layout](np.random.default_rng(0).standard_normal((2, 3, 5, 64)).astype(np.float16))
    rows_fit = query.strides[-1] == 2 and not any(s % 16 for s in query.strides[:-1]) and query.ctypes.data % 16 == 0
    problem, buffers = normalize(query, half(2, 3, 7, 64), half(2, 3, 7, 64))
    operands = prepare(problem, choose(problem, EMULATOR), buffers, address)
    assert (operands.query is buffers.query) == rows_fit
    assert operands.key is buffers.key
    assert operands.out is buffers.out
    np.testing.assert_array_equal(operands.query, query)
    assert operands.query.ctypes.data % 16 == 0
    assert operands.query.strides[-1] == 2


def test_a_copy_holds_what_is_repeated_once() -> None:
    odd = np.ones((3, 5, 65), np.float16)[..., 1:]
    problem, buffers = normalize(np.broadcast_to(odd, (100, 3, 5, 64)), half(7, 64), half(7, 64))
    copied = prepare(problem, choose(problem, EMULATOR), buffers, address).query
    assert copied.shape == (100, 3, 5, 64)
    assert copied.strides[0] == 0


def test_too_many_batch_axes() -> None:
    query, key = half(2, 1, 2, 1, 2, 1, 5, 64), half(1, 2, 1, 2, 1, 1, 7, 64)
    with pytest.raises(
        cupyflash.Unsupported, match=r"kernels carry 4 batch axes, but the batch \(2, 2, 2, 2, 2\) has 5"
    ):
        params_of(query, key, key)


def test_options_of_the_environment() -> None:
    assert options_from("") == Options()
    text = "schedule=random, seed=3,workers=2,race_detector=0,late_landing=1,counters=1"
    assert options_from(text) == Options("random", 3, False, True, True, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sede=3", r"CUPYFLASH_EMULATOR must set each of schedule, seed, .* once at most, but was 'sede=3'"),
        ("seed=3,seed=4", "once at most"),
        ("seed=x", "must set seed to an int ≥ 0, but was"),
        ("seed", "must set seed to an int ≥ 0, but was"),
        ("race_detector=2", "must set race_detector to 0 or 1, but was"),
        ("schedule=slow", "schedule must be one of fifo, random, priority, but was 'slow'"),
        ("workers=0", "at least 1"),
    ],
)
def test_options_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options_from(text)


def test_the_emulator_refuses_cupy_arrays_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = half(2, 3, 64)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cupyflash.Unsupported, match=r"emulator: .*CXX='no-such-compiler' does not run"):
        cupyflash.attention(x, x, x, backend="emulator")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(cupyflash.Unsupported, match=r"emulator: .*install g\+\+ or clang"):
        cupyflash.attention(x, x, x, backend="emulator")


def test_cuda_asked_for_with_numpy_arrays_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = half(2, 3, 64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(cupyflash.Unsupported, match=r"cuda: it takes CuPy arrays only, and CuPy is not installed: pip"):
        cupyflash.attention(x, x, x, backend="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(cupyflash.Unsupported, match=r"cuda: it takes CuPy arrays only: pass cupy\.asarray"):
        cupyflash.attention(x, x, x, backend="cuda")
    assert "cupy" not in sys.modules
