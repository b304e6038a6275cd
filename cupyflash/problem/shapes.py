"""Shapes: how the axes of query, key, value and masks meet.  Pure functions of tuples."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["check_lengths", "check_shape", "is_int", "join", "joinable_axes", "lead_axes", "mask_shape"]

Shape = tuple[int, ...]


def lead_axes(query: Shape, key: Shape, value: Shape, enable_gqa: bool) -> tuple[Shape, Shape, tuple[int, int, int]]:
    """The leading axes of the output, those of the scores, and the number of query, key and value heads.

    The last leading axis, if there is one, counts heads.  Heads of key and value are shared by index: query head h
    reads key head h // (Hq / Hk), so a head axis that broadcasts counts as one head.

    Raises
    ------
    ValueError
        A shape of less than two axes, head dims or lengths that differ, leading axes that don't broadcast, and with
        enable_gqa a missing head axis or heads that don't divide the query's.
    """
    check_lengths(query, key, value)
    if key[-1] != query[-1]:
        raise ValueError(f"key must have query's head dim {query[-1]} as its last axis, but had shape {key}")
    return (_gqa_lead if enable_gqa else _broadcast_lead)(query, key, value)


def check_lengths(query: Shape, key: Shape, value: Shape) -> None:
    """Raise a ValueError for a shape without a length, or if key and value differ in theirs."""
    if min(len(query), len(key), len(value)) < 2:
        for name, shape in (("query", query), ("key", key), ("value", value)):
            if len(shape) < 2:
                raise ValueError(f"{name} must have at least 2 dimensions (length, head dim), but had shape {shape}")
    if value[-2] != key[-2]:
        raise ValueError(f"value must have key's length {key[-2]} as its axis -2, but had shape {value}")


def _broadcast_lead(query: Shape, key: Shape, value: Shape) -> tuple[Shape, Shape, tuple[int, int, int]]:
    """Without GQA all leading axes broadcast; a head axis of length 1 is shared by index."""
    try:
        score_lead = np.broadcast_shapes(query[:-2], key[:-2])
        lead = np.broadcast_shapes(score_lead, value[:-2])
    except ValueError:
        operands = f"query {query}, key {key} and value {value}"
        if not _broadcast(query[:-2], key[:-2]):  # attention_weights has no value to speak of
            operands = f"query {query} and key {key}"
        raise ValueError(f"the leading axes of {operands} must broadcast{_lead_hint(query, key, value)}") from None
    num_heads = lead[-1] if lead else 1
    num_heads_k, num_heads_v = (num_heads if len(shape) > 2 and shape[-3] == num_heads else 1 for shape in (key, value))
    return lead, score_lead, (num_heads, num_heads_k, num_heads_v)


def _lead_hint(query: Shape, key: Shape, value: Shape) -> str:
    """Which other reading of the shapes would fit, if one does."""
    with contextlib.suppress(ValueError):
        _gqa_lead(query, key, value)
        return "; for key and value with fewer heads pass enable_gqa=True"
    turned = [(*shape[:-3], shape[-2]) for shape in (query, key, value) if len(shape) > 2]
    if len(turned) == 3 and _broadcast(*turned):
        return "; for axes (…, length, heads, head dim) pass .swapaxes(-3, -2) of each"
    return ""


def _broadcast(*shapes: Shape) -> bool:
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        return False
    return True


def _gqa_lead(query: Shape, key: Shape, value: Shape) -> tuple[Shape, Shape, tuple[int, int, int]]:
    """With GQA axis -3 is the head axis of each operand, and the axes before it broadcast."""
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 3:
            raise ValueError(
                f"{name} must have a head axis (at least 3 dimensions) with enable_gqa, but had shape {shape}"
            )
    num_heads_q = query[-3]
    for name, shape in (("key", key), ("value", value)):
        if shape[-3] != num_heads_q and (shape[-3] == 0 or num_heads_q % shape[-3]):
            raise ValueError(
                f"{name} must have a number of heads that divides query's {num_heads_q}, but had {shape[-3]} "
                f"(shape {shape})"
            )
    try:
        score_batch = np.broadcast_shapes(query[:-3], key[:-3])
        batch = np.broadcast_shapes(score_batch, value[:-3])
    except ValueError:
        raise ValueError(
            f"the batch axes of query {query}, key {key} and value {value} (before the head axis) must broadcast"
        ) from None
    return (*batch, num_heads_q), (*score_batch, num_heads_q), (num_heads_q, key[-3], value[-3])


def mask_shape(mask: Shape, scores: Shape, rank: int) -> Shape:
    """The mask's shape with leading ones up to `rank`, after checking that it broadcasts into the scores' shape."""
    fits = len(mask) <= len(scores) and all(m in (1, n) for m, n in zip(reversed(mask), reversed(scores), strict=False))
    if not fits:
        hint = _batch_hint(mask, scores)
        raise ValueError(f"attn_mask must broadcast into the scores' shape {scores}, but had shape {mask}{hint}")
    return (1,) * (rank - len(mask)) + mask


def _batch_hint(mask: Shape, scores: Shape) -> str:
    """How to index a mask whose first axis is the batch's, (B, S) or (B, L, S), so that it fits."""
    missing = len(scores) - len(mask)
    if missing < 1 or len(mask) < 2 or mask[0] != scores[0]:
        return ""
    if any(m not in (1, n) for m, n in zip(mask[1:], scores[missing + 1 :], strict=True)):
        return ""
    return f"; if its first axis is the batch's, pass attn_mask[:{', None' * missing}]"


def check_shape(name: str, shape: Any) -> Shape:
    """Return the shape as a tuple of Python's ints.

    Raises
    ------
    TypeError
        it is not a tuple of ints.
    ValueError
        it has less than two dims or a negative one.
    """
    if not isinstance(shape, tuple) or not all(is_int(length) for length in shape):
        raise TypeError(f"{name} must be a tuple of ints, but was {shape!r}")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"{name} must be a tuple of at least two ints ≥ 0, but was {shape}")
    return tuple(int(length) for length in shape)


def is_int(value: Any) -> bool:
    """True for an integer of Python or NumPy that is not a bool."""
    return not isinstance(value, (bool, np.bool_)) and isinstance(value, numbers.Integral)


def joinable_axes(shape: Shape, strides: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Ranges [first, last) of adjacent axes that are one axis in every array: a reshape that joins them is a view.

    Parameters
    ----------
    shape : tuple of int
        The axes, outermost first.
    strides : sequence of tuple of int
        For each array its strides along them: 0 where it broadcasts.
    """
    if not shape:
        return []
    ranges = [(len(shape) - 1, len(shape))]
    inner = len(shape) - 1  # the outermost axis of the current range that is longer than 1
    for axis in range(len(shape) - 2, -1, -1):
        joins = shape[axis] == 1 or shape[inner] == 1 or all(s[axis] == s[inner] * shape[inner] for s in strides)
        if joins:
            ranges[-1] = (axis, ranges[-1][1])
        else:
            ranges.append((axis, axis + 1))
        if not joins or shape[axis] > 1:
            inner = axis
    return ranges[::-1]


def join(shape: Shape, ranges: Sequence[tuple[int, int]]) -> Shape:
    """The shape with each of the ranges joined to one axis."""
    return tuple(math.prod(shape[first:last]) for first, last in ranges)
