"""Operands as bulk copies see them: the tensor maps of a launch, and which arrays have none.

A map has an axis for the batch, for heads, rows and elements.  What a backend makes of that is its own affair: it hands
in `cupyflash.backends.tensormap.driver_map` or `emulated_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from ..plan.choose import choose
from ..plan.device import DeviceSpec
from ..plan.specs import FwdSpec, Mods, Plan
from ..plan.tiles import FAMILIES
from ..problem.problem import Buffers, Problem
from ..problem.shapes import join, joinable_axes
from .params import Block
from .strides import strides_of_copy

__all__ = ["Ints", "MapMaker", "make_maps", "map_refusals", "panel_columns", "plan_of"]

Ints: TypeAlias = tuple[int, ...]
#: (address, shape, strides, dtype, box, swizzle) -> the map as a kernel's argument
MapMaker: TypeAlias = Callable[[int, Ints, Ints, str, Ints, int], Block]

_NAMES = ("query", "key", "value", "out")
_STRIDE_UNIT, _MAX_STRIDE = 16, 2**40
_WARPGROUP_ROWS, _WARP_ROWS = 64, 16
_MAJORS = {family.only for family in FAMILIES.values() if family.takes_maps}
_NO_MAP = np.zeros(1, "V128")


def plan_of(problem: Problem, buffers: Buffers, device: DeviceSpec, mods: Mods | None) -> Plan:
    """The plan of a call: `choose`, with kernels that take tensor maps only where these describe the operands."""
    plan = choose(problem, device, mods)
    if plan.takes_maps and (unmapped := map_refusals(problem, buffers, device)):
        plan = choose(problem, device, mods, unmapped=unmapped)
    return plan


def panel_columns(head_dim: int) -> int:
    """Columns of a panel, that is of one copy: as in kernels_cu/warpgroup.cuh."""
    return 64 if head_dim % 64 == 0 else 32


def make_maps(spec: FwdSpec, arrays: Sequence[Any], addresses: Sequence[int], make: MapMaker) -> tuple[Block, ...]:
    """The maps of Q, K, V and O, (*batch, head, row, element) arrays that `map_refusals` has nothing against.

    Rows of several heads in one tile are not copied by maps, neither in nor out.
    """
    shapes, strides = tuple([array.shape for array in arrays]), tuple([array.strides for array in arrays])
    return _maps_of(spec, shapes, strides, tuple(addresses), arrays[0].itemsize, make)


@lru_cache(maxsize=512)
def _maps_of(
    spec: FwdSpec,
    shapes: tuple[Ints, ...],
    strides: tuple[Ints, ...],
    addresses: Ints,
    itemsize: int,
    make: MapMaker,
) -> tuple[Block, ...]:
    head_dims = (spec.head_dim, spec.head_dim, spec.head_dim_v, spec.head_dim_v)
    rows = (_WARPGROUP_ROWS, spec.tile.block_n, spec.tile.block_n, _WARP_ROWS)
    unused = {"query", "out"} if spec.packed else set[str]()
    maps = []
    for name, shape, steps, address, head_dim, num_rows in zip(
        _NAMES, shapes, strides, addresses, head_dims, rows, strict=True
    ):
        if 0 in shape or name in unused:
            maps.append(_NO_MAP)
            continue
        found = _matrices(shape, steps, itemsize)
        assert found is not None
        columns = panel_columns(head_dim)
        maps.append(make(address, *found, spec.dtype, (1, 1, num_rows, columns), columns * itemsize))
    return tuple(maps)


def map_refusals(problem: Problem, buffers: Buffers, device: DeviceSpec) -> tuple[str, ...]:
    """Why bulk copies can't move the operands; empty if they can, and where no kernel of the device asks."""
    if device.cc[0] not in _MAJORS:
        return ()
    query, key, value, out = buffers.query, buffers.key, buffers.value, buffers.out
    shapes = query.shape, key.shape, value.shape, out.shape
    return _refusals(shapes, (query.strides, key.strides, value.strides, out.strides), query.itemsize)


@lru_cache(maxsize=2048)
def _refusals(shapes: tuple[Ints, ...], strides: tuple[Ints, ...], itemsize: int) -> tuple[str, ...]:
    reasons = []
    head_dim, head_dim_v = shapes[0][-1], shapes[2][-1]
    if head_dim == 0 or head_dim_v == 0:
        reasons.append(f"bulk copies need elements, but E was {head_dim} and Ev was {head_dim_v}")
    for name, shape, steps in zip(_NAMES, shapes, strides, strict=True):
        if 0 not in shape and (reason := _refused(shape, steps, itemsize)):
            reasons.append(f"bulk copies can't move {name}: {reason}")
    return tuple(reasons)


def _refused(shape: Ints, strides: Ints, itemsize: int) -> str:
    if any(n > 1 and stride == 0 for n, stride in zip(shape[-2:], strides[-2:], strict=True)):
        return f"its rows or elements are one, repeated (strides {strides})"
    is_copied = (shape[-1] > 1 and strides[-1] != itemsize) or any(
        n > 1 and stride % _STRIDE_UNIT for n, stride in zip(shape[:-1], strides[:-1], strict=True)
    )
    if not is_copied and any(n > 1 and not 0 <= s < _MAX_STRIDE for n, s in zip(shape, strides, strict=True)):
        return f"strides must be at least 0 and less than 2**40, but were {strides}"
    if _matrices(shape, strides_of_copy(shape, strides, itemsize) if is_copied else strides, itemsize) is None:
        return f"its batch axes {shape[:-3]} are not one behind the other (strides {strides})"
    return ""


@lru_cache(maxsize=512)
def _matrices(shape: Ints, strides: Ints, itemsize: int) -> tuple[Ints, Ints] | None:
    """Shape and strides with all batch axes joined to one; None if they are not one behind the other."""
    batch, steps = shape[:-3], tuple([0 if n == 1 else s for n, s in zip(shape[:-3], strides[:-3], strict=True)])
    ranges = joinable_axes(batch, [steps])
    if len(ranges) > 1:
        return None
    # A joined axis steps as its innermost axis longer than 1 does.
    step = next((s for n, s in zip(batch[::-1], steps[::-1], strict=True) if n > 1), 0)
    inner = [_STRIDE_UNIT if n == 1 else s for n, s in zip(shape[-3:-1], strides[-3:-1], strict=True)]
    return (*(join(batch, ranges) or (1,)), *shape[-3:]), (step, *inner, itemsize)
