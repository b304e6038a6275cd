"""The steps from the definition to FlashAttention: all are equal, and only the first can overflow."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupyflash import formulas
from cupyflash.formulas import (
    flash_attention_rows,
    flash_attention_tiles,
    multi_pass_attention,
    online_softmax_attention,
    original_attention,
    safe_softmax_attention,
)

Attention = Callable[..., np.ndarray]


def tiled(block_m: int, block_n: int) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> np.ndarray:
        return flash_attention_tiles(*args, **kwargs, block_m=block_m, block_n=block_n)[0]

    return attention


SAFE = {
    "safe_softmax": safe_softmax_attention,
    "online_softmax": online_softmax_attention,
    "multi_pass": multi_pass_attention,
    "flash_rows": flash_attention_rows,
    "flash_tiles_1x1": tiled(1, 1),
    "flash_tiles_3x4": tiled(3, 4),
    "flash_tiles_default": tiled(64, 64),
}
EVERY = {"original": original_attention, **SAFE}


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64, from sums that do not round (math.fsum)."""
    query, key, value = (array.astype(np.float64) for array in (query, key, value))
    out, lse = np.empty((len(query), value.shape[1])), np.empty(len(query))
    for i, row in enumerate(query):
        scores = [scale * math.fsum(row * other) for other in key]
        weights = [math.exp(score - max(scores)) for score in scores]
        total = math.fsum(weights)
        out[i] = [math.fsum(weights * column) / total for column in value.T]
        lse[i] = max(scores) + math.log(total)
    return out, lse


def error_bound(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> float:
    """For any order of summation: (E + 2) u on each score, (3 S + 8) u on the weighted sum; doubled.

    Higham, "Accuracy and stability of numerical algorithms" (2002), section 3.1.  An error of a score enters
    the quotient twice, above and below the line.
    """
    unit = np.finfo(query.dtype).eps / 2
    magnitude = abs(scale) * np.max(np.abs(query) @ np.abs(key).T)
    relative = 2 * (query.shape[1] + 2) * magnitude + 3 * len(key) + 8
    return 2 * unit * float(relative) * float(np.abs(value).max(initial=0))


def random_inputs(
    seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int, dtype: str = "float64", seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (seqlen_q, head_dim), (seqlen_k, head_dim), (seqlen_k, head_dim_v)
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return query, key, value


@given(
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 12)),
    head_dims=st.tuples(st.integers(1, 6), st.integers(0, 6)),
    blocks=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    scale=st.sampled_from([None, 0.0, 1.0, -2.0, 0.3]),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_step_equals_the_definition(
    lengths: tuple[int, int],
    head_dims: tuple[int, int],
    blocks: tuple[int, int],
    scale: float | None,
    dtype: str,
    seed: int,
) -> None:
    inputs = random_inputs(*lengths, *head_dims, dtype, seed)
    before = [array.copy() for array in inputs]
    used_scale = 1 / math.sqrt(head_dims[0]) if scale is None else scale
    expected, expected_lse = exact(*inputs, used_scale)
    bound = error_bound(*inputs, used_scale)
    for name, attention in {**EVERY, "flash_tiles_random": tiled(*blocks)}.items():
        out = attention(*inputs, scale)
        assert out.dtype == dtype, name
        assert out.shape == (lengths[0], head_dims[1]), name
        np.testing.assert_allclose(out, expected, rtol=0, atol=bound, err_msg=name)
    _, lse = flash_attention_tiles(*inputs, scale, block_m=blocks[0], block_n=blocks[1])
    assert lse.dtype == dtype
    magnitude = np.abs(expected_lse).max() + abs(used_scale) * np.max(np.abs(inputs[0]) @ np.abs(inputs[1]).T)
    unit = np.finfo(dtype).eps / 2
    bound = 2 * unit * (head_dims[0] + lengths[1] + 4) * (1 + magnitude)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=bound)
    for array, copy in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", [1, -1])
def test_where_the_definition_fails(dtype: str, side: int) -> None:
    """A slightly larger or smaller score leaves the range of exp, and only the definition turns into NaN."""
    info = np.finfo(dtype)
    smallest = math.log(float(info.smallest_subnormal))
    limit = math.floor(math.log(float(info.max) / 4)) if side > 0 else -math.floor(-smallest)
    key = np.array([[1.0], [1.0 - 1 / 256]], dtype) if side > 0 else np.array([[1.0], [1.0 + 1 / 256]], dtype)
    value = np.array([[1.0], [3.0]], dtype)
    good, bad = (np.array([[score]], dtype) for score in (limit, limit + 3 * side))
    assert np.isfinite(original_attention(good, key, value, scale=1.0)).all()
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(original_attention(bad, key, value, scale=1.0)).all()
    expected, _ = exact(bad, key, value, 1.0)
    for name, attention in SAFE.items():
        out = attention(bad, key, value, scale=1.0)  # warnings are errors here
        np.testing.assert_allclose(out, expected, rtol=0, atol=error_bound(bad, key, value, 1.0), err_msg=name)


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_scores_pick_the_largest(name: str, dtype: str) -> None:
    query, key, value = random_inputs(5, 11, 3, 2, dtype)
    scores = query @ key.T
    largest = value[scores.argmax(axis=1)]
    np.testing.assert_array_equal(SAFE[name](query, key, value, scale=1e30), largest)


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("order", [1, -1])
def test_rising_and_falling_maxima(name: str, order: int) -> None:
    """Sorted scores: every key is a new max, or only the first is."""
    key = np.arange(12.0)[::order, None]
    value = np.cos(np.arange(24.0)).reshape(12, 2)
    query = np.array([[1.0], [-1.0]])
    expected, _ = exact(query, key, value, 3.0)
    bound = error_bound(query, key, value, 3.0)
    np.testing.assert_allclose(SAFE[name](query, key, value, 3.0), expected, rtol=0, atol=bound)


def test_a_scale_that_is_a_numpy_scalar_does_not_widen() -> None:
    inputs = random_inputs(2, 3, 4, 5, "float32")
    for name, attention in EVERY.items():
        out = attention(*inputs, np.float64(0.5))
        assert out.dtype == np.float32, name
        np.testing.assert_array_equal(out, attention(*inputs, 0.5))


def test_no_queries_and_no_head_dim() -> None:
    for attention in EVERY.values():
        assert attention(np.zeros((0, 4)), np.zeros((3, 4)), np.zeros((3, 2))).shape == (0, 2)
        out = attention(np.zeros((1, 0)), np.zeros((2, 0)), np.array([[1.0], [3.0]]))
        np.testing.assert_allclose(out, [[2.0]], rtol=1e-15)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4,), (3, 4), (3, 2)), "query must have 2 dimensions, one head, but had shape (4,)"),
        (((2, 4), (1, 3, 4), (3, 2)), "key must have 2 dimensions, one head, but had shape (1, 3, 4)"),
        (((2, 4), (3, 4), (3,)), "value must have 2 dimensions, one head, but had shape (3,)"),
        (((2, 4), (3, 5), (3, 2)), "key must have query's head dim 4, but had shape (3, 5)"),
        (
            ((2, 4), (3, 4), (2, 2)),
            "key and value must have the same length ≥ 1, but had shapes (3, 4) and (2, 2)",
        ),
        (
            ((2, 4), (0, 4), (0, 2)),
            "key and value must have the same length ≥ 1, but had shapes (0, 4) and (0, 2)",
        ),
    ],
)
def test_bad_shapes(name: str, shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared whole)
        EVERY[name](*(np.zeros(shape) for shape in shapes))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["block_m", "block_n"])
def test_bad_tile(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, but was 0$"):
        flash_attention_tiles(*random_inputs(2, 3, 4, 5), **{name: 0})


def test_docstrings_are_true() -> None:
    result = doctest.testmod(formulas)
    assert result.attempted >= 12
    assert result.failed == 0
