"""Runs the launches of a call with weights, or of scores alone, by hand on guarded arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cupyflash.backends.emulator import Counters, Module, Options, guarded_array, guarded_copy
from cupyflash.build.launch import launches
from cupyflash.build.operands import prepare
from cupyflash.build.rendering import entry_of
from cupyflash.plan.choose import choose
from cupyflash.plan.device import EMULATOR
from cupyflash.plan.specs import Launch, Plan, WeightsSpec
from cupyflash.problem.normalize import normalize
from tests.kernels.simt import module


def planned(arguments: dict[str, Any], parts: int | None = None) -> tuple[Any, Plan, Any]:
    """Problem, plan and buffers; so many blocks share the keys of a tile of weights."""
    problem, buffers = normalize(**{"enable_gqa": True, **arguments})
    plan = choose(problem, EMULATOR)
    if parts is not None:
        *before, last = plan.launches
        changed = Launch(last.spec, (last.grid[0] // plan.weights_parts * parts,))
        plan = replace(plan, launches=(*before, changed), weights_parts=parts)
    return problem, plan, buffers


def weights_spec(arguments: dict[str, Any]) -> WeightsSpec:
    spec = planned(arguments)[1].launches[-1].spec
    assert isinstance(spec, WeightsSpec)
    return spec


def run(
    arguments: dict[str, Any],
    *,
    kernel: Module | None = None,
    options: Options | None = None,
    parts: int | None = None,
) -> tuple[np.ndarray, Counters]:
    """(weights or scores, counters of their kernel); they are filled with NaN before.

    `arguments` are those of `normalize`: with `stage` they ask for what `attention_weights` gives.
    """
    arguments = {name: guarded_copy(x, name) if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
    problem, plan, buffers = planned(arguments, parts)
    weights = guarded_array(buffers.weights.shape, buffers.weights.dtype, "weights")
    weights[...] = np.nan
    operands = prepare(problem, plan, buffers._replace(weights=weights), lambda array: array.ctypes.data)
    for launch, args in launches(problem, plan, operands):
        is_weights = isinstance(launch.spec, WeightsSpec)
        compiled = kernel if kernel is not None and is_weights else module(launch.spec)
        function = compiled.get_function(entry_of(launch.spec))
        counters = function(
            launch.grid,
            launch.block,
            args,
            shared_mem=launch.shared_bytes,
            options=options if is_weights else None,
        )
    return weights, counters
