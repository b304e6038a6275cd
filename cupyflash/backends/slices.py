"""Views of a call in which the tiled backend can walk over units: key heads with the query heads that share them.

Everything here is a view.  What depends on shapes and strides alone is remembered from call to call.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from ..problem.problem import Buffers, Problem

__all__ = ["Slice", "slice_call"]


class Slice(NamedTuple):
    """Views of a call in which every unit has one key head and one value head.

    All arrays have the same leading axes, `lead_shape`, the last of which counts units.  Usually it is the only one:
    batch axes join it where the strides of all arrays allow.  Axes of masks have length 1 where they broadcast.
    """

    lead_shape: tuple[int, ...]
    packs_key: bool  # BLAS can't take the rows as they are: another dtype, or not contiguous
    packs_value: bool
    period: int  # unit n, in C order over lead_shape, starts at entry n·period + first_head of b·Hq + h
    first_head: int
    query: Any  # (*lead, G, L, E)
    key: Any  # (*lead, S, E)
    value: Any  # (*lead, S, Ev)
    float_mask: Any  # (*lead, G, L, S) or None
    bool_mask: Any
    out: Any  # (*lead, G, L, Ev)
    lse: Any  # (*lead, G, L) or None
    weights: Any  # (*lead, G, L, S) or None
    key_norms: dict[tuple[Any, ...], float]  # the largest norm in a tile of keys, once a block has looked


def slice_call(problem: Problem, buffers: Buffers) -> list[Slice]:
    """The slices of a call.

    Units are the runs of gcd(Hq/Hk, Hq/Hv) query heads, which share their key head and their value head.  After
    lcm(Hq/Hk, Hq/Hv) query heads, the period, the pattern repeats; there is one slice for each place of a unit within
    it, so one in all where Hk = Hv.
    """
    query, key, value, float_mask, bool_mask, *_, out, lse, weights, _ = buffers
    arrays = (query, key, value, float_mask, bool_mask, out, lse, weights)
    layout = tuple([array if array is None else (array.shape, array.strides) for array in arrays])
    return [Slice._make((*facts, *map(_view, arrays, steps), {})) for facts, steps in _recipes(problem, layout)]


class _Step(NamedTuple):
    """How a slice is taken from an array: array.reshape(split_shape)[selection].reshape(joined_shape)."""

    split_shape: tuple[int, ...] | None  # None where the step is not needed
    selection: tuple[Any, ...] | None
    joined_shape: tuple[int, ...]


def _view(array: Any, step: _Step | None) -> Any:
    if step is None:
        return None
    if step.split_shape is not None:
        array = array.reshape(step.split_shape)
    if step.selection is not None:
        array = array[step.selection]
    return array.reshape(step.joined_shape)


class _Axes(NamedTuple):
    """An array as it is before its leading axes are joined."""

    split_shape: tuple[int, ...] | None
    selection: tuple[Any, ...] | None
    lead: tuple[int, ...]  # (*batch, units), 1 where it broadcasts
    lead_strides: tuple[int, ...]
    rest: tuple[int, ...]


@lru_cache(maxsize=512)
def _recipes(problem: Problem, layout: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], list[_Step | None]]]:
    """For each slice the first fields of `Slice`, and a step for each array, from the arrays' shapes and strides."""
    per_key, per_value = problem.num_heads_q // problem.num_heads_k, problem.num_heads_q // problem.num_heads_v
    group, period = math.gcd(per_key, per_value), math.lcm(per_key, per_value)
    lead_shape = (*problem.batch_shape, problem.num_heads_q // period)
    packs_key, packs_value = (_needs_packing(problem, *entry) for entry in layout[1:3])

    recipes = []
    for place in range(0, period, group):
        arrays: list[_Axes | None] = []
        for sharers, entry in zip((0, per_key, per_value, 0, 0, 0, 0, 0), layout, strict=True):
            if entry is None:
                arrays.append(None)
                continue
            shape, strides = entry
            if sharers:
                arrays.append(_by_shared_head(shape, strides, lead_shape, period, place, sharers))
            else:
                arrays.append(_by_query_head(shape, strides, lead_shape, period, place, group))
        ranges = _joined_axes(lead_shape, [array.lead_strides for array in arrays if array is not None])
        steps = [
            array and _Step(array.split_shape, array.selection, (*_join(array.lead, ranges), *array.rest))
            for array in arrays
        ]
        recipes.append(((_join(lead_shape, ranges), packs_key, packs_value, period, place), steps))
    return recipes


def _by_shared_head(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    lead_shape: tuple[int, ...],
    period: int,
    place: int,
    sharers: int,
) -> _Axes:
    """Key or value, whose heads are shared by so many query heads: the one head of each unit."""
    rank, step = len(lead_shape) - 1, period // sharers
    selection = None if step == 1 else (..., slice(place // sharers, None, step), slice(None), slice(None))
    lead = (*shape[:rank], lead_shape[-1])
    return _Axes(None, selection, lead, _lead_strides(lead, (*strides[:rank], strides[rank] * step)), shape[rank + 1 :])


def _by_query_head(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    lead_shape: tuple[int, ...],
    period: int,
    place: int,
    group: int,
) -> _Axes:
    """An array with query heads, or a mask for all heads: the `group` heads of each unit, as an axis of their own."""
    rank, units = len(lead_shape) - 1, lead_shape[-1]
    if shape[rank] != units * period:
        lead = (*shape[:rank], 1)
        return _Axes(None, None, lead, _lead_strides(lead, (*strides[:rank], 0)), (1, *shape[rank + 1 :]))
    split_shape, selection = None, None
    if group < period:
        split_shape = (*shape[:rank], units, period, *shape[rank + 1 :])
        selection = (*(slice(None),) * (rank + 1), slice(place, place + group))
    lead = (*shape[:rank], units)
    lead_strides = _lead_strides(lead, (*strides[:rank], strides[rank] * period))
    return _Axes(split_shape, selection, lead, lead_strides, (group, *shape[rank + 1 :]))


def _lead_strides(lead: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if n == 1 else stride for n, stride in zip(lead, strides, strict=True))


def _needs_packing(problem: Problem, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if BLAS can't take the last two axes as they are: another dtype, or rows that are not contiguous."""
    itemsize, (row, element) = problem.element.storage.itemsize, strides[-2:]
    is_matrix = element == itemsize and row % itemsize == 0 and row >= itemsize * shape[-1]
    return problem.element.is_half or not is_matrix


def _join(shape: tuple[int, ...], axes: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(math.prod(shape[first:last]) for first, last in axes)


def _joined_axes(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Ranges of adjacent axes that are one axis in every array: a reshape that joins them is a view."""
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
