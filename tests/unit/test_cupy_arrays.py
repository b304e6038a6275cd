"""CuPy arrays, by a stand-in: `math` runs them without touching NumPy arrays; the default says what is missing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import cupyflash
from tests import cupy_stand_in
from tests.cupy_stand_in import Array


@pytest.fixture(autouse=True)
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    module = cupy_stand_in.make_module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def to_device(value: Any) -> Any:
    if isinstance(value, tuple) and any(isinstance(item, np.ndarray) for item in value):
        return tuple(map(to_device, value))
    return Array(value) if isinstance(value, np.ndarray) else value


RNG = np.random.default_rng(3)
QUERY, KEY, VALUE = (
    RNG.standard_normal(shape, dtype=np.float32) for shape in ((2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 5))
)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True, "window": (3, 0), "align": "bottom_right"},
        {"attn_mask": RNG.standard_normal((9, 11)) < 0.5},
        {"attn_mask": (RNG.standard_normal((4, 1, 11), dtype=np.float32), np.arange(11) < 8)},
        {"softcap": 2.0, "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32)},
        {"alibi_slopes": np.ones((2, 4), np.float32), "sinks": np.zeros(4, np.float32)},
        {"dropout_p": 0.3, "seed": 7},
        {"dropout_p": 0.3, "seed": np.array([7], np.uint64)},
        {"score_mod": lambda score, b, h, i, j: score + b - h * abs(i - j), "mask_mod": lambda b, h, i, j: i != j},
    ],
    ids=lambda arguments: "+".join(arguments) or "plain",
)
def test_math_gives_what_it_gives_for_numpy_arrays(arguments: dict[str, Any]) -> None:
    options: dict[str, Any] = {"enable_gqa": True, "return_lse": True, "return_weights": True, "backend": "math"}
    expected = cupyflash.attention(QUERY, KEY, VALUE, **arguments, **options)
    on_device = {name: to_device(value) for name, value in arguments.items()}
    found = cupyflash.attention(Array(QUERY), Array(KEY), Array(VALUE), **on_device, **options)
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, Array)
        np.testing.assert_array_equal(a.memory, b)


def test_out_and_weights_and_merge() -> None:
    query, key, value = map(Array, (QUERY[0], KEY[0, :1], VALUE[0, :1]))
    out = Array(np.empty((4, 9, 5), np.float32))
    assert cupyflash.attention(query, key, value, out=out, backend="math") is out
    np.testing.assert_array_equal(out.memory, cupyflash.attention(QUERY[0], KEY[0, :1], VALUE[0, :1], backend="math"))

    weights = cupyflash.attention_weights(query, key, stage="softmax", backend="math")
    assert isinstance(weights, Array)

    parts = [
        cupyflash.attention(query, key[:, keys], value[:, keys], return_lse=True, backend="math")
        for keys in (slice(5), slice(5, None))
    ]
    merged, _ = cupyflash.merge_attention(*zip(*parts, strict=True), backend="math")
    np.testing.assert_allclose(merged.memory, out.memory, rtol=1e-5, atol=1e-6)


def test_what_the_default_backend_cannot_run_is_refused_and_math_is_named() -> None:
    wide = Array(np.zeros((2, 4, 9, 300), np.float32))
    with pytest.raises(cupyflash.Unsupported) as caught:
        cupyflash.attention(wide, wide, wide)
    message = str(caught.value)
    assert "backend 'cuda' can't run this call" in message
    assert "cuda: it has the head dims 256, but E was 300" in message
    assert 'backend="math"' in message
    assert "L=9 S=9 E=300" in message
    assert set(caught.value.reasons) >= {"cuda", "numpy", "math"}
    assert caught.value.reasons["math"] == ()


def test_the_numpy_backend_refuses_cupy_arrays() -> None:
    with pytest.raises(cupyflash.Unsupported, match="it takes NumPy arrays only"):
        cupyflash.attention(Array(QUERY), Array(QUERY), Array(QUERY), backend="numpy")


def test_libraries_do_not_mix() -> None:
    with pytest.raises(TypeError, match="key must be a CuPy array like query, but was a NumPy array"):
        cupyflash.attention(Array(QUERY), QUERY, Array(QUERY), backend="math")
    with pytest.raises(TypeError, match="attn_mask must be a NumPy array like query, but was a CuPy array"):
        cupyflash.attention(QUERY, QUERY, QUERY, Array(np.ones((9, 9), bool)))


def test_arrays_on_different_devices_are_refused() -> None:
    elsewhere = cupy_stand_in.ArrayElsewhere(QUERY)
    with pytest.raises(ValueError, match="all arrays must be on query's device"):
        cupyflash.attention(Array(QUERY), elsewhere, Array(QUERY), backend="math")
    seed = cupy_stand_in.ArrayElsewhere(np.array([7], np.uint64))
    with pytest.raises(ValueError, match="all arrays must be on query's device"):
        cupyflash.attention(*[Array(QUERY)] * 3, dropout_p=0.5, seed=seed, backend="math")


def test_out_that_shares_memory_is_refused() -> None:
    query = Array(QUERY.copy())
    with pytest.raises(ValueError, match="out must not share memory with query"):
        cupyflash.attention(query, Array(QUERY), Array(QUERY), out=query, backend="math")


def test_out_between_the_inputs_of_one_allocation() -> None:
    """Neighbours in packed memory are told apart where they lie: nothing is asked of the device."""
    packed = np.zeros((9, 4, 2, 8), np.float32)
    packed[:, :3] = RNG.standard_normal((9, 3, 2, 8))
    query, key, value, out = (Array(packed[:, i].swapaxes(0, 1)) for i in range(4))
    assert cupyflash.attention(query, key, value, out=out, backend="math") is out
    expected = cupyflash.attention(*(packed[:, i].swapaxes(0, 1) for i in range(3)), backend="math")
    np.testing.assert_array_equal(out.memory, expected)
    for start, name in ((40, "value"), (56, "query")):
        moved = Array(np.lib.stride_tricks.as_strided(packed.reshape(-1)[start:], (2, 5, 8), (32, 256, 4)))
        with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
            cupyflash.attention(Array(query.memory[:, :5]), key, value, out=moved, backend="math")
