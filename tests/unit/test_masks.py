"""Bands: what causal, window and align mean, and what backends ask of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupyflash.problem.masks import Band, band

LENGTHS = st.integers(0, 9)
SIDES = st.one_of(st.none(), st.integers(-1, 12))
ALIGNS = st.one_of(st.sampled_from(["top_left", "bottom_right"]), st.integers(-12, 12))


def by_definition(is_causal, window, align, seqlen_q, seqlen_k):  # type: ignore[no-untyped-def]
    """The rules of the documentation, one score at a time."""
    shift = {"top_left": 0, "bottom_right": seqlen_k - seqlen_q}.get(align, align)
    left, right = (None if side in (None, -1) else side for side in window or (None, None))
    keep = np.ones((seqlen_q, seqlen_k), bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            keep[i, j] = (
                (not is_causal or j <= i + shift)
                and (left is None or j >= i + shift - left)
                and (right is None or j <= i + shift + right)
            )
    return keep


@given(st.booleans(), st.one_of(st.none(), st.tuples(SIDES, SIDES)), ALIGNS, LENGTHS, LENGTHS)
def test_a_band_keeps_what_the_definition_keeps(is_causal, window, align, seqlen_q, seqlen_k) -> None:  # type: ignore[no-untyped-def]
    diagonals, shift = band(is_causal, window, align, seqlen_q, seqlen_k)
    keep = by_definition(is_causal, window, align, seqlen_q, seqlen_k)
    found = diagonals.materialize(np.arange(seqlen_q)[:, None], np.arange(seqlen_k))
    np.testing.assert_array_equal(np.broadcast_to(found, keep.shape), keep)
    assert shift == {"top_left": 0, "bottom_right": seqlen_k - seqlen_q}.get(align, align)
    if keep.size:
        assert diagonals.is_full == bool(keep.all())


@given(st.one_of(st.none(), st.integers(-9, 9)), st.one_of(st.none(), st.integers(-9, 9)), st.data())
def test_ranges_and_tiles_agree_with_the_matrix(lower, upper, data) -> None:  # type: ignore[no-untyped-def]
    diagonals, seqlen_k = Band(lower, upper), data.draw(st.integers(1, 9))
    row_start = data.draw(st.integers(0, 8))
    row_stop = data.draw(st.integers(row_start + 1, 9))
    keep = diagonals.materialize(np.arange(row_start, row_stop)[:, None], np.arange(seqlen_k))
    start, stop = diagonals.key_range(row_start, row_stop, seqlen_k)
    assert 0 <= start <= stop <= seqlen_k
    assert not keep[:, :start].any()
    assert not keep[:, stop:].any()
    seen = np.flatnonzero(keep.any(axis=0))
    if seen.size and (lower is None or upper is None or lower <= upper):
        assert (start, stop) == (seen[0], seen[-1] + 1)
    key_start = data.draw(st.integers(0, seqlen_k - 1))
    key_stop = data.draw(st.integers(key_start + 1, seqlen_k))
    assert diagonals.keeps_tile(row_start, row_stop, key_start, key_stop) == keep[:, key_start:key_stop].all()


def test_the_matrices_of_the_readme() -> None:
    drawn = {
        ((True, None, "top_left")): "10000 11000 11100",
        ((True, None, "bottom_right")): "11100 11110 11111",
        ((True, None, 1)): "11000 11100 11110",
        ((False, (1, 0), "top_left")): "10000 11000 01100",
        ((False, (1, 1), 1)): "11100 01110 00111",
    }
    for (is_causal, window, align), rows in drawn.items():
        diagonals, _ = band(is_causal, window, align, 3, 5)
        keep = diagonals.materialize(np.arange(3)[:, None], np.arange(5))
        assert " ".join("".join(str(int(k)) for k in row) for row in keep) == rows


@pytest.mark.parametrize("window", [(2**62, 0), (0, 2**62), (2**62, 2**62)])
def test_huge_sides_are_clamped_to_the_matrix(window: tuple[int, int]) -> None:
    diagonals, _ = band(False, window, -(2**31), 5, 7)
    for bound in (diagonals.lower, diagonals.upper):
        assert bound is None or -5 <= bound <= 7
