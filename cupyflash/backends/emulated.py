"""The `emulator` backend: the GPU kernels on NumPy arrays, run on a CPU by an emulator that tries to break them.

It is for tests, for debugging and for teaching; it is thousands of times slower than a GPU.  A race, a deadlock or an
access out of bounds is raised as `EmulatorError` with the kernel's file and line.  How launches are run is set by the
environment variable CUPYFLASH_EMULATOR, a list of fields of `cupyflash.backends.emulator.Options`::

    CUPYFLASH_EMULATOR="schedule=random,seed=3,workers=2,race_detector=0,late_landing=0"

and `device`, the name of one of `cupyflash.plan.device.DEVICES` whose plan is to be run: "device=T4".
"""

from __future__ import annotations

import os
from dataclasses import fields
from functools import lru_cache
from typing import Any

from ..build.bulk import plan_of
from ..build.debug import show_launch
from ..build.host import find_compiler
from ..build.launch import launches
from ..build.merging import merge_parts, merge_refusals
from ..build.modding import trace_mods
from ..build.operands import prepare
from ..build.params import Block
from ..build.rendering import arch_for, entry_of, render_kernel
from ..environment import debug_level
from ..errors import Unsupported
from ..plan.choose import refusals
from ..plan.device import DEVICES, EMULATOR, DeviceSpec
from ..plan.specs import KernelSpec, Launch
from ..problem.parts import Parts
from ..problem.problem import Buffers, Problem
from .emulator import Function, Module, Options
from .tensormap import emulated_map

__all__ = ["EmulatorBackend", "chosen_device", "device_from", "options_from"]

_ENVIRONMENT = "CUPYFLASH_EMULATOR"


class EmulatorBackend:
    """Runs what the kernels can; compiles each of them once with the host's C++ compiler."""

    def reasons(self, problem: Problem) -> list[str]:
        """See `cupyflash.backends.registry.Backend`."""
        if problem.library != "numpy":
            return ["it takes NumPy arrays only"]
        return refusals(problem) + _why_no_compiler()

    def run(self, problem: Problem, buffers: Buffers) -> None:
        """See `cupyflash.backends.registry.Backend`."""
        mods = trace_mods(problem, buffers)
        plan = plan_of(problem, buffers, chosen_device(), mods and mods.structure)
        operands = prepare(problem, plan, buffers, _address, mods, emulated_map)
        for launch, args in launches(problem, plan, operands):
            _run(launch, args)
        if operands.out is not buffers.out:
            buffers.out[...] = operands.out

    def merge_reasons(self, parts: Parts) -> list[str]:
        """See `cupyflash.backends.registry.Merger`."""
        if parts.library != "numpy":
            return ["it takes NumPy arrays only"]
        return merge_refusals(parts) + _why_no_compiler()

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        """See `cupyflash.backends.registry.Merger`."""
        return merge_parts(parts, _address, _run)


def _run(launch: Launch, args: tuple[Block, ...]) -> None:
    environment = os.environ.get(_ENVIRONMENT, "")
    options = options_from(environment)
    if level := debug_level():
        show_launch(launch, args, arch_for(launch.spec, device_from(environment)), level)
    _kernel(launch.spec)(launch.grid, launch.block, args, shared_mem=launch.shared_bytes, options=options)


def _why_no_compiler() -> list[str]:
    try:
        find_compiler()
    except Unsupported as error:
        return [str(error)]
    return []


@lru_cache(maxsize=256)
def _kernel(spec: KernelSpec) -> Function:
    return Module(render_kernel(spec)).get_function(entry_of(spec))


def _address(array: Any) -> int:
    address: int = array.ctypes.data
    return address


def options_from(text: str) -> Options:
    """The options of a text like "schedule=random,seed=3"; numbers and bools are integers.

    Raises
    ------
    ValueError
        A field that is unknown or twice there, or a value that is not one of its values.
    """
    default = Options()
    chosen: dict[str, Any] = {}
    for name, value in _items(text).items():
        if name == "device":
            continue
        kind = type(getattr(default, name))
        if kind is not str and not (value.isdecimal() and (kind is int or value in "01")):
            raise ValueError(
                f"{_ENVIRONMENT} must set {name} to {'0 or 1' if kind is bool else 'an int ≥ 0'}, but was {text!r}"
            )
        chosen[name] = value if kind is str else kind(int(value))
    return Options(**chosen)


def chosen_device() -> DeviceSpec:
    """The device whose plan is run, as the environment says."""
    return device_from(os.environ.get(_ENVIRONMENT, ""))


def device_from(text: str) -> DeviceSpec:
    """The device of a text like "device=T4,seed=3"; `EMULATOR` where it names none.

    Raises
    ------
    ValueError
        It is not the name of a known device.
    """
    name = _items(text).get("device", EMULATOR.name)
    known = {EMULATOR.name: EMULATOR, **DEVICES}
    if name not in known:
        raise ValueError(f"{_ENVIRONMENT} must set device to one of {', '.join(known)}, but was {text!r}")
    return known[name]


def _items(text: str) -> dict[str, str]:
    names = [*(field.name for field in fields(Options)), "device"]
    chosen: dict[str, str] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, value = item.partition("=")
        if name in chosen or name not in names:
            raise ValueError(f"{_ENVIRONMENT} must set each of {', '.join(names)} once at most, but was {text!r}")
        chosen[name] = value
    return chosen
