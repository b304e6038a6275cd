"""Join attention over disjoint sets of keys by its log-sum-exps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from .backends.registry import select_merger
from .interop import NATIVE, call, is_foreign
from .problem.checks import device_of
from .problem.parts import check_parts

__all__ = ["merge_attention"]


Array = TypeVar("Array")


def merge_attention(outs: Sequence[Array], lses: Sequence[Any], *, backend: str | None = None) -> tuple[Array, Any]:
    """Merge attention outputs over disjoint key sets into attention over their union.

    With parts (o_i, lse_i) of the same queries, lse = log Σ exp lse_i and out = Σ exp(lse_i - lse) · o_i
    (Ye et al. 2025, "FlashInfer", eq. 1-3).  A part without keys has lse -inf and weighs nothing.

    Parameters
    ----------
    outs : sequence of array (…, L, Ev)
        float16, bfloat16, float32 or float64; one shape and dtype.
    lses : sequence of array (…, L)
        As `attention(…, return_lse=True)` gives them: natural log, float32 (float64 for float64 outputs).
        At most one part may have been computed with sinks, since each counts them.
    backend : str, optional
        As in `attention`.  "numpy" and "math" work in array operations; "cuda" and "emulator" in one kernel launch for
        up to 32 parts, more in a tree of launches, between which nothing is rounded.

    Returns
    -------
    out : array (…, L, Ev), in the dtype of `outs`
    lse : array (…, L), in the dtype of `lses`

    Raises
    ------
    TypeError
        outs or lses is no sequence of arrays of one library, or dtypes differ from what is said above.
    ValueError
        no parts, as many outs as lses are not given, or shapes don't fit.
    Unsupported
        The backend can't merge these parts; the message holds the reasons of every backend.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import attention, merge_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 10, 8))
    >>> halves = [attention(q, k[:, half], v[:, half], return_lse=True) for half in (slice(6), slice(6, None))]
    >>> out, lse = merge_attention(*zip(*halves))
    >>> bool(np.allclose(out, attention(q, k, v)))
    True
    """
    if isinstance(outs, (tuple, list)) and outs and type(outs[0]) not in NATIVE and is_foreign(outs[0]):
        return call(merge_attention, locals())
    parts = check_parts(outs, lses)
    with device_of(parts.outs[0]):
        return select_merger(parts, backend).merge(parts)
