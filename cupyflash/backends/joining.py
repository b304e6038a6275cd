"""`merge_attention` in array operations, on NumPy and CuPy arrays alike: the definition that its kernel is held to."""

from __future__ import annotations

from typing import Any

from ..interrupts import without_float_warnings
from ..problem.parts import Parts

__all__ = ["join_arrays"]


def join_arrays(parts: Parts) -> tuple[Any, Any]:
    """The joint output and log-sum-exp: lse = log Σ exp lse_i and out = Σ exp(lse_i - lse) · out_i."""
    return without_float_warnings(_join, parts)


def _join(parts: Parts) -> tuple[Any, Any]:
    xp, element = parts.namespace, parts.element
    largest = parts.lses[0]
    for lse in parts.lses[1:]:
        largest = xp.maximum(largest, lse)
    shift = xp.where(xp.isneginf(largest), 0, largest)
    weights = [xp.exp(lse - shift) for lse in parts.lses]
    total = sum(weights[1:], weights[0])
    divisor = xp.where(total == 0, 1, total)
    merged = sum(
        (weight / divisor)[..., None] * out.astype(element.accumulator, copy=False)
        for weight, out in zip(weights, parts.outs, strict=True)
    )
    return xp.asarray(merged).astype(element.storage, copy=False), shift + xp.log(total)
