"""Runs fwd_simt, and combine after it, as the plan for some GPU says: the launches by hand, on guarded arrays."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import numpy as np

from cupyflash.backends.emulator import Counters, Module, Options, guarded_array, guarded_copy
from cupyflash.build.launch import Operands, entry_of, launches, render_kernel
from cupyflash.plan import choose as choose_module
from cupyflash.plan.choose import choose
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import FwdSpec, KernelSpec, Plan
from cupyflash.problem.normalize import normalize
from cupyflash.problem.problem import Problem


@cache
def module(spec: KernelSpec) -> Module:
    return Module(render_kernel(spec))


def planned(arguments: dict[str, Any], splits: int = 1, pack: int = 1) -> tuple[Problem, Plan]:
    """The plan for a T4, which has no tensor cores for any of the dtypes, with so many splits and heads in a tile."""
    problem, _ = normalize(**arguments)
    with (
        mock.patch.object(choose_module, "num_splits", return_value=splits),
        mock.patch.object(choose_module, "pack_of", return_value=pack),
    ):
        return problem, choose(problem, DEVICES["T4"])


def forward_spec(arguments: dict[str, Any], **how: int) -> FwdSpec:
    spec = planned(arguments, **how)[1].launches[0].spec
    assert isinstance(spec, FwdSpec)
    assert spec.family == "fwd_simt"
    return spec


def run(
    arguments: dict[str, Any], *, kernel: Module | None = None, options: Options | None = None, **how: int
) -> tuple[np.ndarray, np.ndarray, Counters]:
    """(out, lse, counters of the forward kernel) for q, k, v of four axes; outputs are filled with NaN before."""
    arguments = {"enable_gqa": True, **arguments}
    arguments |= {name: guarded_copy(arguments[name], name) for name in ("query", "key", "value")}
    problem, plan = planned(arguments, **how)
    accumulator = problem.element.accumulator
    rows = (*problem.batch_shape, problem.num_heads_q, problem.seqlen_q)
    out = guarded_array((*rows, problem.head_dim_v), problem.element.storage, "out")
    lse = guarded_array(rows, accumulator, "lse")
    operands = Operands(arguments["query"], arguments["key"], arguments["value"], out, lse, None, None)
    if plan.num_splits > 1:
        partial_out = guarded_array((plan.num_splits, *out.shape), accumulator, "partial_out")
        partial_lse = guarded_array((plan.num_splits, *rows), accumulator, "partial_lse")
        operands = operands._replace(partial_out=partial_out, partial_lse=partial_lse)
    for array in operands[3:]:
        if array is not None:
            array[...] = np.nan
    counters = []
    for launch, params in launches(problem, plan, operands, lambda array: array.ctypes.data):
        compiled = kernel if kernel is not None and isinstance(launch.spec, FwdSpec) else module(launch.spec)
        function = compiled.get_function(entry_of(launch.spec))
        counters.append(function(launch.grid, launch.block, (params,), shared_mem=launch.shared_bytes, options=options))
    return out, lse, counters[0]
