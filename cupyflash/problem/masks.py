"""Structural masks: causal, sliding window and alignment are one value, a band of diagonals.

Query i and key j meet on diagonal j - i.  Causal masks, windows and every alignment keep a contiguous range of
diagonals, so all of them are a `Band(lower, upper)`::

    align="top_left"  is_causal          window=(1, 0)        window=(0, 1), align="bottom_right"
    (L=3, S=4)        1 0 0 0            1 0 0 0              0 1 1 0
                      1 1 0 0            1 1 0 0              0 0 1 1
                      1 1 1 0            0 1 1 0              0 0 0 1
                      Band(None, 0)      Band(-1, 0)          Band(1, 2)

Backends ask a band for the keys a block of rows can see, whether a tile is kept whole, and for the tile itself.
They never learn which feature the band came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from ..hashing import hash_once

__all__ = ["Band", "band", "check_align", "check_window", "checked_band"]

# Shifts beyond the index range of the kernels (int32) are refused, so that no backend has to widen.
_MAX_SHIFT = 2**31


@hash_once
@dataclass(frozen=True)
class Band:
    """Key j takes part for query i iff lower <= j - i <= upper; None is unbounded."""

    lower: int | None = None
    upper: int | None = None

    @property
    def is_full(self) -> bool:
        """True if the band removes nothing."""
        return self.lower is None and self.upper is None

    def key_range(self, row_start: int, row_stop: int, seqlen_k: int) -> tuple[int, int]:
        """The half-open range of keys that at least one of the rows [row_start, row_stop) may see."""
        start = 0 if self.lower is None else min(max(0, row_start + self.lower), seqlen_k)
        stop = seqlen_k if self.upper is None else min(seqlen_k, row_stop + self.upper)
        return start, max(start, stop)

    def keeps_tile(self, row_start: int, row_stop: int, key_start: int, key_stop: int) -> bool:
        """True if every row of the tile sees every key of the tile."""
        lowest, highest = key_start - (row_stop - 1), (key_stop - 1) - row_start
        return (self.lower is None or self.lower <= lowest) and (self.upper is None or highest <= self.upper)

    def materialize(self, q_idx: Any, kv_idx: Any) -> Any:
        """The band as a bool array over broadcast(q_idx, kv_idx), True where the key takes part."""
        diagonal = kv_idx - q_idx
        if self.lower is None:
            return diagonal <= self.upper if self.upper is not None else diagonal == diagonal
        if self.upper is None:
            return diagonal >= self.lower
        return (diagonal >= self.lower) & (diagonal <= self.upper)


_FULL = Band()


def band(
    is_causal: bool,
    window: Sequence[int | None] | None,
    align: str | int,
    seqlen_q: int,
    seqlen_k: int,
) -> tuple[Band, int]:
    """Build the band of a call and the shift of its main diagonal.

    With shift s, ``window=(left, right)`` keeps i + s - left <= j <= i + s + right and ``is_causal`` keeps j <= i + s.
    Bounds that can't remove anything become None, and bounds beyond the matrix are clamped to its edge, so that they
    fit any index type.

    Raises
    ------
    TypeError
        is_causal is not a bool, window is not a pair of int or None, align is neither str nor int.
    ValueError
        a window side below -1, an align string that is not known, an align outside the int32 range.
    """
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"is_causal must be a bool, but was {is_causal!r}")
    return checked_band(bool(is_causal), check_window(window), check_align(align), seqlen_q, seqlen_k)


def checked_band(
    is_causal: bool, window: tuple[int | None, int | None], align: str | int, seqlen_q: int, seqlen_k: int
) -> tuple[Band, int]:
    """`band` of arguments that have been checked."""
    shift = seqlen_k - seqlen_q if align == "bottom_right" else 0 if align == "top_left" else int(align)
    left, right = window
    if is_causal:
        right = 0 if right is None else min(right, 0)
    lower = None if left is None else min(shift - left, seqlen_k)
    upper = None if right is None else max(shift + right, -seqlen_q)
    if lower is not None and lower <= 1 - seqlen_q:
        lower = None
    if upper is not None and upper >= seqlen_k - 1:
        upper = None
    return _FULL if lower is None and upper is None else Band(lower, upper), shift


def check_align(align: str | int) -> str | int:
    """Return `align` as "top_left", "bottom_right" or an int, or raise as `band` says."""
    if isinstance(align, str):
        if align not in ("top_left", "bottom_right"):
            raise ValueError(f'align must be "top_left", "bottom_right" or an int, but was {align!r}')
        return align
    if isinstance(align, (bool, np.bool_)) or not isinstance(align, Integral):
        raise TypeError(f'align must be "top_left", "bottom_right" or an int, but was {align!r}')
    if not -_MAX_SHIFT <= align < _MAX_SHIFT:
        raise ValueError(f"align as a shift must lie in [-2**31, 2**31), but was {align}")
    return int(align)


def check_window(window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """Return `window` as (left, right) with None for unbounded sides, or raise as `band` says."""
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window must be a pair (left, right) of int or None, but was {window!r}")
    if len(window) != 2:
        raise ValueError(f"window must have two sides (left, right), but had {len(window)}: {window!r}")
    return _check_side("left", window[0]), _check_side("right", window[1])


def _check_side(name: str, side: int | None) -> int | None:
    if side is None:
        return None
    if isinstance(side, (bool, np.bool_)) or not isinstance(side, Integral):
        raise TypeError(f"window's {name} side must be an int >= 0, or None or -1 for unbounded, but was {side!r}")
    if side < -1:
        raise ValueError(f"window's {name} side must be an int >= 0, or None or -1 for unbounded, but was {side}")
    return None if side == -1 else int(side)
