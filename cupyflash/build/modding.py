"""The score_mod and mask_mod of one call: traced, as parameters of its kernels, and summarised by tiles.

buffers ──trace_mods()──▶ CallMods ──structure──▶ Mods, which the plan chooses kernels by
                             └──────pack()──────▶ the bytes of a kernel's second parameter
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..plan.specs import FwdSpec, Launch, Mods, ModSummarySpec, Plan
from ..problem.expression import Expression
from ..problem.problem import Buffers, Problem
from ..problem.trace import Trace, check_bounds, trace_mask_mod, trace_score_mod
from .functor import PackedMods, mods_dtype, pack_mods
from .params import MOD_SUMMARY_PARAMS, Block, by_value

__all__ = ["CallMods", "ModSummary", "summarize_mods", "trace_mods"]


class CallMods(NamedTuple):
    """What a call's score_mod and mask_mod compute, and of which arrays and numbers."""

    score: Trace | None
    mask: Trace | None

    @property
    def structure(self) -> Mods:
        """What is compiled."""
        score, mask = (None if trace is None else trace.expression for trace in self)
        return Mods(score, mask)

    def pack(self, mods: Mods, problem: Problem, buffers: Buffers, address: Callable[[Any], int]) -> PackedMods:
        """The second parameter of a kernel that has one of the two functions, or both."""

        def checked(array: Any) -> int:
            _check_library(array, problem, buffers)
            return address(array)

        traces = self.score if mods.score else None, self.mask if mods.mask else None
        return pack_mods(*traces, _lengths(problem), checked)


def trace_mods(problem: Problem, buffers: Buffers) -> CallMods | None:
    """The call's functions, traced; None where there are none.

    Raises
    ------
    TraceError
        One of them can't become part of a kernel, or may look beyond the end of an array.
    TypeError
        One returns what it may not.
    """
    if not (problem.has_score_mod or problem.has_mask_mod):
        return None
    score_mod, mask_mod = buffers.score_mod, buffers.mask_mod
    found = CallMods(
        None if score_mod is None else trace_score_mod(score_mod, problem.element.accumulator),
        None if mask_mod is None else trace_mask_mod(mask_mod),
    )
    for trace in found:
        if trace is not None:
            check_bounds(trace, _lengths(problem))
    mods_dtype(found.structure.score, found.structure.mask)  # raises where they need too many parameters
    return found


def _lengths(problem: Problem) -> tuple[int, int, int, int]:
    return problem.batch_size, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k


def _check_library(array: Any, problem: Problem, buffers: Buffers) -> None:
    if isinstance(array, np.ndarray) is not (problem.library == "numpy"):
        raise TypeError(
            f"score_mod and mask_mod must look up {problem.library} arrays as query is one, but one was a "
            f"{type(array).__module__.partition('.')[0]} array; convert it outside of the function"
        )
    if problem.library == "cupy" and array.device != buffers.query.device:
        raise ValueError(
            f"score_mod and mask_mod must look up arrays on the device of query, {buffers.query.device}, but one was "
            f"on {array.device}"
        )


class ModSummary(NamedTuple):
    """What is known of each tile of a mask_mod, and the launch that finds it out."""

    array: Any  # bytes (batch, groups of heads, tiles of rows, tiles of keys); 1 where nothing depends on it
    marks: tuple[int, int, int, int]  # MOD_MARKS
    launch: Launch
    args: tuple[Block, Block]
    kept: tuple[Any, ...]


def summarize_mods(
    mods: CallMods | None, problem: Problem, plan: Plan, buffers: Buffers, address: Callable[[Any], int]
) -> ModSummary | None:
    """A new array for the summary of mask_mod by the forward kernel's tiles, not yet filled, and the launch for it.

    The bytes are those of a bool mask's summary.  An axis that mask_mod does not depend on is of length 1.  None where
    there is no mask_mod, or but one tile of keys.
    """
    tile = next((launch.spec.tile for launch in plan.launches if isinstance(launch.spec, FwdSpec)), None)
    if mods is None or mods.mask is None or tile is None or problem.seqlen_k <= tile.block_n:
        return None
    needs = _coordinates_of(mods.mask.expression)
    pack = plan.pack
    needs_rows = "q_idx" in needs or (pack > 1 and "h" in needs)
    num_batches = problem.batch_size if "b" in needs else 1
    num_groups = problem.num_heads_q // pack if "h" in needs else 1
    num_rows, block_rows = (problem.seqlen_q * pack, tile.block_m) if needs_rows else (1, 1)
    row_tiles, key_tiles = math.ceil(num_rows / block_rows), math.ceil(problem.seqlen_k / tile.block_n)
    array = problem.namespace.empty((num_batches, num_groups, row_tiles, key_tiles), np.uint8)
    steps = [0 if n == 1 else stride for n, stride in zip(array.shape, array.strides, strict=True)]

    params = np.array(
        [
            (
                address(array),
                array.size,
                num_groups,
                pack,
                num_rows,
                problem.seqlen_k,
                block_rows,
                tile.block_n,
            )
        ],
        MOD_SUMMARY_PARAMS,
    )
    spec = ModSummarySpec(Mods(None, mods.mask.expression))
    packed = mods.pack(spec.mods, problem, buffers, address)
    launch = Launch(spec, (math.ceil(array.size / spec.tiles_per_block),))
    marks = (address(array), steps[0], steps[1], steps[2])
    return ModSummary(array, marks, launch, (by_value(params), packed.args), packed.arrays)


def _coordinates_of(expression: Expression) -> set[str]:
    return {node.op for node in expression.nodes if not node.operands}
