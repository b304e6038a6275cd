"""Runs fwd_simt, and combine after it, as the plan for some GPU says: the launches by hand, on guarded arrays."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from cupyflash.backends.emulator import Counters, Module, Options, guarded_array, guarded_copy
from cupyflash.build.launch import launches
from cupyflash.build.modding import CallMods, trace_mods
from cupyflash.build.operands import prepare
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.plan.choose import choose
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import CombineSpec, FwdSpec, KernelSpec, Launch, Plan
from cupyflash.problem.normalize import normalize
from cupyflash.problem.problem import Buffers, Problem


@cache
def module(spec: KernelSpec) -> Module:
    return Module(render_kernel(spec))


def planned(
    arguments: dict[str, Any], splits: int = 1, pack: int = 1
) -> tuple[Problem, Plan, Buffers, CallMods | None]:
    """The plan for a T4, which has no tensor cores for these dtypes, but with so many splits and heads in a tile."""
    problem, buffers = normalize(**arguments)
    mods = trace_mods(problem, buffers)
    plan = choose(problem, DEVICES["T4"], mods and mods.structure)
    spec = plan.launches[0].spec
    assert isinstance(spec, FwdSpec)
    assert spec.family == "fwd_simt"
    spec = replace(spec, packed=pack > 1)
    heads = problem.batch_size * problem.num_heads_q
    tiles = math.ceil(problem.seqlen_q * pack / spec.tile.block_m) * (heads // pack)
    steps = [Launch(spec, (tiles * splits,))]
    if splits > 1:
        combine = CombineSpec(spec.dtype)
        steps.append(Launch(combine, (math.ceil(heads * problem.seqlen_q / combine.rows_per_block),)))
    return problem, Plan(tuple(steps), splits, pack, plan.row_alignment), buffers, mods


def forward_spec(arguments: dict[str, Any], **how: int) -> FwdSpec:
    spec = planned(arguments, **how)[1].launches[0].spec
    assert isinstance(spec, FwdSpec)
    return spec


def run(
    arguments: dict[str, Any], *, kernel: Module | None = None, options: Options | None = None, **how: int
) -> tuple[np.ndarray, np.ndarray, Counters]:
    """(out, lse, counters of the forward kernel) for q, k, v of four axes; outputs are filled with NaN before."""
    arguments = {"enable_gqa": True, **arguments}
    arguments |= {name: guarded_copy(arguments[name], name) for name in ("query", "key", "value")}
    problem, plan, buffers, mods = planned(arguments, **how)
    accumulator = problem.element.accumulator
    rows = (*problem.batch_shape, problem.num_heads_q, problem.seqlen_q)
    out = guarded_array((*rows, problem.head_dim_v), problem.element.storage, "out")
    lse = guarded_array(rows, accumulator, "lse")
    operands = prepare(problem, plan, buffers._replace(out=out, lse=lse), lambda array: array.ctypes.data, mods)
    if plan.num_splits > 1:
        # Guarded, and full of NaN, like the rest of what is written.
        rows = (plan.num_splits, *rows)
        shapes = {"partial_out": (*rows, problem.head_dim_v), "partial_lse": (*rows, 2)}
        partial = [guarded_copy(np.full(shape, np.nan, accumulator), name) for name, shape in shapes.items()]
        lse_place, *_, weights_place = operands.workspace
        places = (lse_place, *(array.ctypes.data for array in partial), weights_place)
        operands = operands._replace(partial=partial, workspace=places)
    out[...] = lse[...] = np.nan
    for launch, args in launches(problem, plan, operands):
        compiled = kernel if kernel is not None and isinstance(launch.spec, FwdSpec) else module(launch.spec)
        function = compiled.get_function(entry_of(launch.spec))
        done = function(launch.grid, launch.block, args, shared_mem=launch.shared_bytes, options=options)
        if isinstance(launch.spec, FwdSpec):
            counters = done
    return out, lse, counters
