"""The tiled backend's parts: its slices are views, its tiles are bounded, its conversions and passes are exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupyflash
from cupyflash.backends import block, tiled
from cupyflash.backends.scratch import Scratch, widen
from cupyflash.backends.slices import slice_call
from cupyflash.problem.normalize import normalize

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("batch", "heads"),
    [((), (6, 6, 6)), ((2,), (6, 3, 3)), ((2, 3), (12, 4, 6)), ((3,), (6, 1, 6)), ((1, 2), (6, 6, 2))],
)
@pytest.mark.parametrize("swapped", [False, True], ids=["contiguous", "swapaxes"])
def test_slices_are_views_that_cover_the_call(
    batch: tuple[int, ...], heads: tuple[int, int, int], swapped: bool
) -> None:
    def make(num_heads: int, length: int, width: int) -> np.ndarray:
        if swapped:
            return RNG.standard_normal((*batch, length, num_heads, width), dtype=np.float32).swapaxes(-2, -3)
        return RNG.standard_normal((*batch, num_heads, length, width), dtype=np.float32)

    query, key, value = make(heads[0], 5, 4), make(heads[1], 7, 4), make(heads[2], 7, 3)
    mask = RNG.random((*batch, 1, 5, 7)) < 0.5
    problem, buffers = normalize(query, key, value, mask, enable_gqa=True, return_lse=True)
    buffers.out.fill(0)
    for part in slice_call(problem, buffers):
        for name in ("query", "key", "value", "bool_mask", "out", "lse"):
            owner = getattr(buffers, name)
            assert np.shares_memory(getattr(part, name), owner), name
        per_unit = part.query.shape[len(part.lead_shape)]
        assert part.key.shape[:-2] == part.value.shape[:-2] == part.lead_shape == part.query.shape[:-3]
        units = math.prod(part.lead_shape)
        head = np.arange(units)[:, None] * part.period + part.first_head + np.arange(per_unit)
        by_head = query.reshape(-1, 5, 4)
        np.testing.assert_array_equal(part.query.reshape(units * per_unit, 5, 4), by_head[head.ravel()])
        shared = (head[:, 0] // heads[0]) * heads[1] + head[:, 0] % heads[0] // (heads[0] // heads[1])
        np.testing.assert_array_equal(part.key.reshape(units, 7, 4), key.reshape(-1, 7, 4)[shared])
        part.out[...] += 1
    assert (buffers.out == 1).all()


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(0, 2048),
    st.integers(1, 64),
    st.booleans(),
    st.booleans(),
    st.integers(1, 16),
)
def test_tiles_fit_the_cache(
    seqlen_q: int, seqlen_k: int, width: int, group: int, is_causal: bool, is_half: bool, threads: int
) -> None:
    dtype = np.float16 if is_half else np.float32
    key = np.broadcast_to(np.zeros((), dtype), (1, seqlen_k, width))
    query = np.broadcast_to(np.zeros((), dtype), (group, seqlen_q, width))
    problem, _ = normalize(query, key, key, is_causal=is_causal, enable_gqa=True, out=None)
    tiling = tiled._tiling(problem, 1, is_half, threads)
    assert 1 <= tiling.rows <= seqlen_q
    assert 1 <= tiling.keys <= tiling.batch_keys <= seqlen_k
    scores = group * tiling.rows * tiling.batch_keys
    assert scores <= 2**18 or tiling.rows == 1 or tiling.keys <= 16
    assert threads == 1 or tiling.threads in (1, threads)


def test_every_float16_widens_exactly() -> None:
    source = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = source[np.isfinite(source)]
    for values in (source, finite, finite[::2], finite[::-1]):
        target = np.empty(values.shape, np.float32)
        widen(values, target)
        np.testing.assert_array_equal(target, values.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(target), np.signbit(values))


def test_nested_borrowers_get_work_arrays_of_their_own() -> None:
    outer, inner = Scratch.borrow(), Scratch.borrow()
    try:
        assert not np.shares_memory(outer("a", (4,), np.dtype(np.float32)), inner("a", (4,), np.dtype(np.float32)))
    finally:
        inner.give_back()
        outer.give_back()


def test_a_larger_work_array_replaces_the_smaller_one() -> None:
    scratch = Scratch()
    small = scratch("a", (4,), np.dtype(np.float32))
    large = scratch("a", (8, 8), np.dtype(np.float32))
    assert not np.shares_memory(small, large)
    assert np.shares_memory(scratch("a", (4,), np.dtype(np.float32)), large)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which passes ran: True for an exact one."""
    seen: list[bool] = []
    attend = block.Block._attend

    def spy(self: Any, exact: bool) -> bool:
        seen.append(exact)
        return attend(self, exact)

    monkeypatch.setattr(block.Block, "_attend", spy)
    return seen


def test_ordinary_calls_need_one_fast_pass(passes: list[bool]) -> None:
    query, key, value = RNG.standard_normal((3, 1, 300, 16), dtype=np.float32)
    cupyflash.attention(query, key, value, is_causal=True)
    cupyflash.attention(query, key, value, window=(3, 0), align=-50)  # the first rows see no key
    cupyflash.attention(query, key, value, np.arange(300) < 7)
    cupyflash.attention(query * 50, key, value, np.arange(300) > 290)  # no bound, and the first keys are removed
    assert not any(passes)


def test_nan_behind_a_mask_takes_the_exact_pass_and_nothing_else_does(passes: list[bool]) -> None:
    query, key, value = RNG.standard_normal((3, 1, 300, 16), dtype=np.float32)
    key[0, 5] = np.nan
    out = cupyflash.attention(query, key, value, np.arange(300) != 5)
    assert np.isfinite(out).all()
    assert passes.count(True) > 0
    assert passes.count(True) == passes.count(False)


def test_values_too_large_for_unshifted_weights_take_the_exact_pass(passes: list[bool]) -> None:
    query, key, value = RNG.standard_normal((3, 1, 300, 16), dtype=np.float32)
    value *= 1e37
    out = cupyflash.attention(query, key, value)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, cupyflash.attention(query, key, value, backend="math"), rtol=1e-4, atol=1e32)
    assert True in passes


def test_the_mean_of_the_largest_values_is_finite() -> None:
    query, key = np.ones((1, 3, 8), np.float32), np.zeros((1, 900, 8), np.float32)
    value = np.full((1, 900, 4), np.finfo(np.float32).max / 2, np.float32)
    for extra in ({}, {"sinks": np.zeros(1, np.float32)}, {"dropout_p": 0.25, "seed": 1}, {"is_causal": True}):
        out = cupyflash.attention(query, key, value, **extra)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out, cupyflash.attention(query, key, value, backend="math", **extra), rtol=1e-5)
