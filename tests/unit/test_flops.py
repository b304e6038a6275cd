"""flops against counting: the pairs one by one, and the matrix products of forward and backward."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupyflash.flops import flops, pairs_in_band

bounds = st.none() | st.integers(-12, 12)


def matrix(lower: int | None, upper: int | None, seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """The band as 0/1 matrix, straight from its definition."""
    diagonal = np.arange(seqlen_k)[None, :] - np.arange(seqlen_q)[:, None]
    kept = np.ones((seqlen_q, seqlen_k), int)
    if lower is not None:
        kept[diagonal < lower] = 0
    if upper is not None:
        kept[diagonal > upper] = 0
    return kept


@given(bounds, bounds, st.integers(0, 9), st.integers(0, 9))
def test_pairs_are_counted_exactly(lower: int | None, upper: int | None, seqlen_q: int, seqlen_k: int) -> None:
    count = pairs_in_band(lower, upper, seqlen_q, seqlen_k)
    assert type(count) is int
    assert count == matrix(lower, upper, seqlen_q, seqlen_k).sum()


@given(
    seqlen_q=st.integers(0, 8),
    seqlen_k=st.integers(0, 8),
    is_causal=st.booleans(),
    window=st.none() | st.tuples(*[st.none() | st.integers(-1, 10)] * 2),
    align=st.sampled_from(["top_left", "bottom_right"]) | st.integers(-9, 9),
)
def test_causal_window_and_align(
    seqlen_q: int, seqlen_k: int, is_causal: bool, window: tuple[int | None, ...] | None, align: str | int
) -> None:
    shift = {"top_left": 0, "bottom_right": seqlen_k - seqlen_q}.get(align, align)
    left, right = (None if side == -1 else side for side in window or (None, None))
    pairs = 0
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            meets = not is_causal or j <= i + shift
            meets &= left is None or i + shift - left <= j
            meets &= right is None or j <= i + shift + right
            pairs += meets
    shapes = (3, seqlen_q, 5), (3, seqlen_k, 5), (3, seqlen_k, 7)
    counted = flops(*shapes, is_causal=is_causal, window=window, align=align)
    assert counted == 2 * 3 * pairs * (5 + 7)


def test_dense_is_two_matrix_products() -> None:
    """A product (m, k) (k, n) is 2 m k n operations, as in torch.utils.flop_counter."""
    batch, heads, seqlen_q, seqlen_k, head_dim, head_dim_v = 2, 3, 50, 70, 16, 24
    shapes = (
        (batch, heads, seqlen_q, head_dim),
        (batch, heads, seqlen_k, head_dim),
        (batch, heads, seqlen_k, head_dim_v),
    )

    def product(m: int, k: int, n: int) -> int:
        return 2 * batch * heads * m * k * n

    scores, out = product(seqlen_q, head_dim, seqlen_k), product(seqlen_q, seqlen_k, head_dim_v)
    assert flops(*shapes) == scores + out
    value_grad = product(seqlen_k, seqlen_q, head_dim_v)
    weights_grad = product(seqlen_q, head_dim_v, seqlen_k)
    query_grad, key_grad = product(seqlen_q, seqlen_k, head_dim), product(seqlen_k, seqlen_q, head_dim)
    assert flops(*shapes, backward=True) == scores + value_grad + weights_grad + query_grad + key_grad


@pytest.mark.parametrize("is_causal", [False, True])
def test_backward_is_two_and_a_half_forwards(is_causal: bool) -> None:
    shape = (2, 4, 33, 8)
    assert flops(shape, shape, is_causal=is_causal, backward=True) * 2 == flops(shape, shape, is_causal=is_causal) * 5


def test_value_shape_defaults_to_key_shape() -> None:
    assert flops((4, 8), (6, 8)) == flops((4, 8), (6, 8), (6, 8)) == 2 * 4 * 6 * 16


def test_a_million_rows() -> None:
    length = 10**6
    shape = (8, 64, length, 128)
    assert flops(shape, shape, is_causal=True) == 2 * 8 * 64 * (length * (length + 1) // 2) * 256
    inside = (length - 4096) * 4097 + 4096 * 4097 // 2
    assert flops(shape, shape, is_causal=True, window=(4096, 0)) == 2 * 8 * 64 * inside * 256
    assert flops((10**9, 10**9, 1), (10**9, 10**9, 1)) == 4 * 10**27


@pytest.mark.parametrize(
    ("query", "key", "value", "enable_gqa", "batch"),
    [
        ((5, 8), (7, 8), (7, 3), False, 1),
        ((4, 5, 8), (7, 8), (7, 3), False, 4),
        ((5, 8), (4, 7, 8), (7, 3), False, 4),
        ((2, 1, 5, 8), (1, 3, 7, 8), (6, 1, 1, 7, 3), False, 36),
        ((2, 6, 5, 8), (2, 3, 7, 8), (2, 2, 7, 3), True, 12),
        ((1, 6, 5, 8), (4, 1, 7, 8), (6, 7, 3), True, 24),
        ((6, 5, 8), (3, 7, 8), (3, 7, 3), True, 6),
    ],
)
def test_leading_axes(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], enable_gqa: bool, batch: int
) -> None:
    assert flops(query, key, value, enable_gqa=enable_gqa) == 2 * batch * 5 * 7 * (8 + 3)


@pytest.mark.parametrize(
    ("query", "key", "value", "expected"),
    [
        ((0, 8), (7, 8), (7, 3), 0),
        ((5, 8), (0, 8), (0, 3), 0),
        ((0, 5, 8), (0, 7, 8), (0, 7, 3), 0),
        ((5, 0), (7, 0), (7, 3), 2 * 35 * 3),
        ((5, 8), (7, 8), (7, 0), 2 * 35 * 8),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], expected: int, is_causal: bool
) -> None:
    counted = flops(query, key, value, is_causal=is_causal)
    assert counted == (expected * 15 // 35 if is_causal else expected)  # 1 + 2 + 3 + 4 + 5 of 5 × 7


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (([4, 8], (6, 8)), {}, TypeError, "query_shape must be a tuple of ints, but was [4, 8]"),
        (((4, 8), (6, 8.0)), {}, TypeError, "key_shape must be a tuple of ints, but was (6, 8.0)"),
        (
            ((4, 8), (6, 8), (6,)),
            {},
            ValueError,
            "value_shape must be a tuple of at least two ints ≥ 0, but was (6,)",
        ),
        (((4, 8), (6, 9)), {}, ValueError, "key must have query's head dim 8 as its last axis, but had shape (6, 9)"),
        (
            ((4, 8), (6, 8), (5, 8)),
            {},
            ValueError,
            "value must have key's length 6 as its axis -2, but had shape (5, 8)",
        ),
        (((2, 4, 8), (3, 6, 8)), {}, ValueError, "the leading axes of query (2, 4, 8) and key (3, 6, 8)"),
        (
            ((4, 4, 8), (3, 6, 8)),
            {"enable_gqa": True},
            ValueError,
            "key must have a number of heads that divides",
        ),
        (((4, 8), (6, 8)), {"enable_gqa": True}, ValueError, "query must have a head axis"),
        (((4, 8), (6, 8)), {"window": (-2, 0)}, ValueError, "window's left side must be an int >= 0"),
        (((4, 8), (6, 8)), {"window": 3}, TypeError, "window must be a pair"),
        (((4, 8), (6, 8)), {"align": "left"}, ValueError, "align must be"),
        (((4, 8), (6, 8)), {"is_causal": 1}, TypeError, "is_causal must be a bool, but was 1"),
        (((4, 8), (6, 8)), {"backward": 1}, TypeError, "backward must be a bool, but was 1"),
        (((4, 8), (6, 8)), {"enable_gqa": 1}, TypeError, "enable_gqa must be a bool, but was 1"),
    ],
)
def test_bad_arguments(shapes: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        flops(*shapes, **options)
    assert str(caught.value).startswith(message)


def test_docstrings_are_true() -> None:
    result = doctest.testmod(sys.modules["cupyflash.flops"])  # cupyflash.flops is the function
    assert result.attempted >= 4
    assert result.failed == 0
