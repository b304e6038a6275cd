"""From a plan to launches: parameter blocks, in order.  The emulator and the GPU share all of it.

    plan ──render_kernel()──▶ KernelSource            (compile time: what a KernelSpec says)
      └────launches()───────▶ Launch, parameter block  (run time: pointers, lengths, strides, scale)

A backend compiles the first in its own way and hands the second to its own launch call.
"""

from __future__ import annotations

import numpy as np

from ..plan.specs import FwdSpec, Launch, Plan
from ..problem.problem import Problem
from .functor import NO_MODS
from .operands import Operands
from .params import FWD_PARAMS, Block, pack_forward, raw

__all__ = ["launches"]


def launches(problem: Problem, plan: Plan, operands: Operands) -> list[tuple[Launch, tuple[Block, ...]]]:
    """The plan's launches in order, each with its parameters."""
    found: list[tuple[Launch, tuple[Block, ...]]] = []
    if operands.summary is not None and operands.summary.launch is not None and operands.summary.params is not None:
        found.append((operands.summary.launch, (operands.summary.params,)))
    if operands.mod_summary is not None:
        found.append((operands.mod_summary.launch, operands.mod_summary.args))
    forward = None
    for launch in plan.launches:
        spec = launch.spec
        if spec.family == "weights":
            params = _forward_params(problem, plan, operands, plan.weights_parts)
        else:
            if forward is None:  # `combine` is given the same
                forward = _forward_params(problem, plan, operands, plan.num_splits)
            params = forward
        if spec.family == "combine":
            found.append((launch, (params,)))
        else:
            args = NO_MODS if spec.mods is None else operands.mod_args[spec.mods]
            maps = operands.maps if isinstance(spec, FwdSpec) else ()
            found.append((launch, (params, args, *maps)))
    return found


def _forward_params(problem: Problem, plan: Plan, operands: Operands, num_splits: int) -> Block:
    num_heads_q, seqlen_q, seqlen_k, band = problem.num_heads_q, problem.seqlen_q, problem.seqlen_k, problem.band
    params = pack_forward(
        *operands.tensors,
        *operands.workspace,
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
        plan.section,
        # The kernel may look at a bound that the band lacks: then at one that removes nothing.
        -seqlen_q if band.lower is None else band.lower,
        seqlen_k if band.upper is None else band.upper,
        operands.scores,
    )
    return np.frombuffer(params, _FORWARD)


_FORWARD = raw(FWD_PARAMS)
