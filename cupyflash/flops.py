"""Counting the floating-point operations of attention: what the problem needs, not what a kernel does.

By convention only matrix products count, a multiplication and an addition as two, and only for the pairs of a
query and a key that causal and window let meet::

    forward     2 · pairs · (E + Ev)          S = Q Kᵀ (E),  O = P V (Ev)
    backward    2 · pairs · (3 E + 2 Ev)      S = Q Kᵀ again, dQ, dK (E each),  dP = dO Vᵀ, dV (Ev each)

With E = Ev the backward pass is 2.5 forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .problem.checks import check_flag
from .problem.masks import band
from .problem.shapes import check_shape, lead_axes

__all__ = ["flops", "pairs_in_band"]


def flops(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...] | None = None,
    *,
    is_causal: bool = False,
    window: Sequence[int | None] | None = None,
    align: str | int = "top_left",
    enable_gqa: bool = False,
    backward: bool = False,
) -> int:
    """Floating-point operations of `attention` on arrays of these shapes.

    Counts the matrix products, exactly for causal and window.  Masks given as arrays or functions lower no
    count.

    Parameters
    ----------
    query_shape : (..., [Hq,] L, E)
    key_shape : (..., [Hkv,] S, E)
    value_shape : (..., [Hkv,] S, Ev); None is key_shape
    is_causal, window, align, enable_gqa : as in `attention`
    backward : count the backward pass alone instead of the forward pass

    Returns
    -------
    A Python int, of any size.

    Raises
    ------
    TypeError
        a shape is not a tuple of ints, or another argument is of the wrong kind.
    ValueError
        the shapes do not fit one another, or window or align is out of range: as `attention` does.

    >>> flops((16, 4096, 128), (16, 4096, 128))  # 4 · 16 · 4096² · 128
    137438953472
    >>> flops((16, 4096, 128), (16, 4096, 128), is_causal=True)
    68736253952
    >>> flops((16, 4096, 128), (16, 4096, 128), backward=True)
    343597383680
    """
    query = check_shape("query_shape", query_shape)
    key = check_shape("key_shape", key_shape)
    value = key if value_shape is None else check_shape("value_shape", value_shape)
    lead, _, _ = lead_axes(query, key, value, check_flag("enable_gqa", enable_gqa))
    (seqlen_q, head_dim), (seqlen_k, head_dim_v) = query[-2:], value[-2:]

    diagonals, _ = band(is_causal, window, align, seqlen_q, seqlen_k)
    pairs = math.prod(lead) * pairs_in_band(diagonals.lower, diagonals.upper, seqlen_q, seqlen_k)
    if check_flag("backward", backward):
        return 2 * pairs * (3 * head_dim + 2 * head_dim_v)
    return 2 * pairs * (head_dim + head_dim_v)


def pairs_in_band(lower: int | None, upper: int | None, seqlen_q: int, seqlen_k: int) -> int:
    """The number of pairs (i, j) of seqlen_q × seqlen_k with lower ≤ j − i ≤ upper, where None is unbounded.

    >>> pairs_in_band(None, 0, 3, 5)  # causal: 1 + 2 + 3
    6
    """
    below = 0 if lower is None else _pairs_up_to(lower - 1, seqlen_q, seqlen_k)
    up_to = seqlen_q * seqlen_k if upper is None else _pairs_up_to(upper, seqlen_q, seqlen_k)
    return max(0, up_to - below)


def _pairs_up_to(diagonal: int, seqlen_q: int, seqlen_k: int) -> int:
    """The number of pairs with j − i ≤ diagonal.

    Row i has min(max(0, i + diagonal + 1), S) of them, which is max(0, x) − max(0, x − S) at x = i + diagonal
    + 1; and Σ_i max(0, i + a) over L rows is T(L − 1 + a) − T(a − 1), with T(n) = 1 + 2 + … + n.
    """

    def triangle(n: int) -> int:
        return n * (n + 1) // 2 if n > 0 else 0

    def ramp(a: int) -> int:
        return triangle(seqlen_q - 1 + a) - triangle(a - 1)

    return ramp(diagonal + 1) - ramp(diagonal + 1 - seqlen_k)
