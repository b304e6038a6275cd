"""From a plan to launches: parameter blocks, in order.  The emulator and the GPU share all of it.

    plan ──render_kernel()──▶ KernelSource            (compile time: what a KernelSpec says)
      └────launches()───────▶ Launch, parameter block  (run time: pointers, lengths, strides, scale)

A backend compiles the first in its own way and hands the second to its own launch call.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..plan.specs import CombineSpec, Launch, Plan, WeightsSpec
from ..problem.problem import Problem
from .functor import NO_MODS
from .operands import Operands
from .params import pack_combine, pack_forward
from .rendering import mods_of

__all__ = ["launches"]


def launches(problem: Problem, plan: Plan, operands: Operands) -> Iterator[tuple[Launch, tuple[np.void, ...]]]:
    """The plan's launches in order, each with its parameters."""
    if operands.summary is not None and operands.summary.launch is not None and operands.summary.params is not None:
        yield operands.summary.launch, (operands.summary.params,)
    if operands.mod_summary is not None:
        yield operands.mod_summary.launch, operands.mod_summary.args
    for launch in plan.launches:
        spec = launch.spec
        if isinstance(spec, CombineSpec):
            yield launch, (_combine_params(problem, plan, operands),)
            continue
        parts = plan.weights_parts if isinstance(spec, WeightsSpec) else plan.num_splits
        mods = mods_of(spec)
        args = NO_MODS if mods is None else operands.mod_args[mods]
        yield launch, (_forward_params(problem, plan, operands, parts), args)


def _forward_params(problem: Problem, plan: Plan, operands: Operands, num_splits: int) -> np.void:
    query, key, value, out, *others = operands.addresses
    query_steps, key_steps, value_steps, out_steps = operands.steps
    num_heads_q, seqlen_q, seqlen_k, band = problem.num_heads_q, problem.seqlen_q, problem.seqlen_k, problem.band
    return pack_forward(
        query,
        *query_steps,
        key,
        *key_steps,
        value,
        *value_steps,
        out,
        *out_steps,
        *others,
        problem.scale,
        *operands.batch_shape,
        problem.batch_size,
        num_heads_q,
        num_heads_q // problem.num_heads_k,
        num_heads_q // problem.num_heads_v,
        plan.pack,
        seqlen_q,
        seqlen_k,
        problem.head_dim,
        problem.head_dim_v,
        num_splits,
        # The kernel may look at a bound that the band lacks: then at one that removes nothing.
        -seqlen_q if band.lower is None else band.lower,
        seqlen_k if band.upper is None else band.upper,
        operands.scores,
    )


def _combine_params(problem: Problem, plan: Plan, operands: Operands) -> np.void:
    _, _, _, out, lse, partial_out, partial_lse, _ = operands.addresses
    return pack_combine(
        out,
        *operands.steps[3],
        lse,
        partial_out,
        partial_lse,
        operands.sinks[0],
        *operands.batch_shape,
        problem.batch_size,
        problem.num_heads_q,
        problem.seqlen_q,
        problem.head_dim_v,
        plan.num_splits,
        operands.sinks[1],
    )
