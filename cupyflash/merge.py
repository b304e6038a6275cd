"""Join attention over disjoint sets of keys by its log-sum-exps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .problem.checks import library_of
from .problem.dtypes import DTYPES

__all__ = ["merge_attention"]


def merge_attention(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
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

    Returns
    -------
    out : array (…, L, Ev), in the dtype of `outs`
    lse : array (…, L), in the dtype of `lses`

    Raises
    ------
    TypeError
        outs or lses is no sequence of NumPy or CuPy arrays, or dtypes differ from what is said above.
    ValueError
        no parts, as many outs as lses are not given, or shapes don't fit.

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
    outs, lses = _check_sequence("outs", outs), _check_sequence("lses", lses)
    if len(outs) != len(lses):
        raise ValueError(f"lses must have as many parts as outs ({len(outs)}), but had {len(lses)}")
    library = library_of("outs[0]", outs[0])
    dtype = DTYPES.get(outs[0].dtype)
    if dtype is None:
        raise TypeError(f"outs[0] must be float16, bfloat16, float32 or float64, but was {outs[0].dtype}")
    shape = outs[0].shape
    if len(shape) < 2:
        raise ValueError(f"outs[0] must have at least 2 dimensions (length, head dim), but had shape {shape}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(f"outs[{i}]", out, library, dtype.storage, shape)
        _check_part(f"lses[{i}]", lse, library, dtype.accumulator, shape[:-1])

    xp = np if library == "numpy" else sys.modules[library]
    with np.errstate(all="ignore"):
        largest = lses[0]
        for lse in lses[1:]:
            largest = xp.maximum(largest, lse)
        shift = xp.where(xp.isneginf(largest), 0, largest)
        weights = [xp.exp(lse - shift) for lse in lses]
        total = sum(weights[1:], weights[0])
        divisor = xp.where(total == 0, 1, total)
        merged = sum(
            (weight / divisor)[..., None] * out.astype(dtype.accumulator, copy=False)
            for weight, out in zip(weights, outs, strict=True)
        )
        return xp.asarray(merged).astype(dtype.storage, copy=False), shift + xp.log(total)


def _check_sequence(name: str, parts: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(parts, (tuple, list)):
        raise TypeError(f"{name} must be a tuple or list of arrays, but was {type(parts).__name__}")
    if not parts:
        raise ValueError(f"{name} must have at least one part, but was empty")
    return tuple(parts)


def _check_part(name: str, array: Any, library: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if library_of(name, array) != library:
        raise TypeError(f"{name} must be of the same library as outs[0], but was {type(array).__name__}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, but was {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but had shape {array.shape}")
