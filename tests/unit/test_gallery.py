"""Each function of `cupyflash.mods` against the built-in argument, or the formula, that it restates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash import mods
from cupyflash.testing import Case, assert_attention_close

SHAPE = (2, 3, 29, 8)


def case(**arguments: Any) -> Case:
    return Case(query_shape=SHAPE, key_shape=SHAPE, value_shape=SHAPE, **arguments)


def with_mod(built_in: Case, backend: str, without: str, **mod: Any) -> Any:
    """The case's call with a mod in place of one of its arguments."""
    plain = Case(query_shape=SHAPE, key_shape=SHAPE, value_shape=SHAPE, dtype=built_in.dtype).arguments()
    assert without in plain
    return cupyflash.attention(**{**plain, **mod}, backend=backend)


@pytest.mark.parametrize("backend", ["numpy", "math"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
class TestLikeTheBuiltIn:
    def test_alibi(self, backend: str, dtype: str) -> None:
        built_in = case(dtype=dtype, alibi_shape=(3,))
        slopes = built_in.arguments()["alibi_slopes"]
        out = with_mod(built_in, backend, "alibi_slopes", score_mod=mods.alibi(slopes))
        assert_attention_close(out, built_in)

    def test_distance_decay(self, backend: str, dtype: str) -> None:
        built_in = case(dtype=dtype, alibi_shape=(3,))
        decay = np.exp(-built_in.arguments()["alibi_slopes"].astype(np.float64))
        out = with_mod(built_in, backend, "alibi_slopes", score_mod=mods.distance_decay(decay))
        assert_attention_close(out, built_in)

    def test_tanh_softcap(self, backend: str, dtype: str) -> None:
        built_in = case(dtype=dtype, softcap=2.0)
        assert_attention_close(with_mod(built_in, backend, "softcap", score_mod=mods.tanh_softcap(2.0)), built_in)

    @pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (5, 1)])
    def test_sliding_window(self, backend: str, dtype: str, left: int, right: int) -> None:
        built_in = case(dtype=dtype, window=(left, right))
        out = with_mod(built_in, backend, "window", mask_mod=mods.sliding_window(left, right))
        assert_attention_close(out, built_in)


ROWS, COLUMNS = np.arange(29)[:, None], np.arange(29)[None, :]
DOCUMENT = np.arange(29) // 7


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (mods.document_mask(DOCUMENT), DOCUMENT[:, None] == DOCUMENT[None, :]),
        (mods.prefix_lm(6), np.tril(np.ones((29, 29), bool)) | (np.arange(29) < 6)),
        (mods.dilated_window(2, 3), np.isin(ROWS - COLUMNS, [-6, -3, 0, 3, 6])),
        (mods.sliding_window(2), np.isin(ROWS - COLUMNS, [0, 1, 2])),
    ],
)
def test_masks_are_their_definition(function: Any, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(function(0, 0, ROWS, COLUMNS), expected)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(SHAPE) for _ in range(3))
    out = cupyflash.attention(q, k, v, mask_mod=function)
    np.testing.assert_array_equal(out, cupyflash.attention(q, k, v, mask_mod=lambda b, h, i, j: expected[i, j]))


def test_relative_position_bias_is_a_bias_by_distance() -> None:
    table = np.random.default_rng(0).standard_normal((3, 9))
    scores = np.zeros((1, 3, 29, 29))
    found = mods.relative_position_bias(table)(scores, 0, np.arange(3)[:, None, None], ROWS, COLUMNS)
    for h in range(3):
        for distance in range(-28, 29):
            assert (found[0, h][distance == ROWS - COLUMNS] == table[h, min(max(distance, -4), 4) + 4]).all()


def test_soft_clipping_stays_below_its_limit() -> None:
    x = np.linspace(-1000, 1000, 2001)
    clipped = mods.soft_clipping(5.0)(x, 0, 0, 0, 0)
    assert (np.abs(clipped) < 5).all()
    assert (np.diff(clipped) > 0).all()
    assert mods.soft_clipping(5.0)(np.float64(1e-3), 0, 0, 0, 0) == pytest.approx(1e-3, rel=1e-3)
