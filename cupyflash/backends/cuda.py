"""The `cuda` backend: the kernels on CuPy arrays, on the arrays' device and the caller's current stream.

NVRTC compiles a kernel for the device once; the cubin is kept on disk and loaded with ``cupy.RawModule(path=…)``.  A
call allocates its outputs, a copy of an operand whose rows a kernel can't take, partial results where blocks share
keys, the log-sum-exps that weights are made with, and a byte for each tile of a bool mask; it does not wait for the
device.  After one call of its kind, which compiles and loads, it can be captured in a CUDA graph.  What it worked with
is given back to CuPy's memory pool all the same, and a replay writes there again: so capture with a pool that lives as
long as the graph, ``with cupy.cuda.using_allocator(pool.malloc)``.  Where the arrays are PyTorch's, its graphs do that.

Nobody has run this on a GPU yet.  What is tested without one: the kernels under the emulator, their compilation for
every architecture, and, with a stand-in for CuPy, that the launches here are those of the emulator.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any

from ..build.bulk import plan_of
from ..build.cache import default_cache
from ..build.debug import show_launch
from ..build.launch import launches
from ..build.merging import merge_parts, merge_refusals
from ..build.modding import CallMods, trace_mods
from ..build.nvrtc import compile_cubin, nvrtc_version
from ..build.operands import prepare
from ..build.params import Block
from ..build.rendering import arch_for, entry_of, render_kernel
from ..environment import debug_level
from ..errors import Unsupported
from ..plan.choose import refusals, use_timed
from ..plan.device import DeviceSpec
from ..plan.specs import KernelSpec, Launch, Plan
from ..problem.parts import Parts
from ..problem.problem import Buffers, Problem
from .tensormap import driver_map
from .tuned import load

__all__ = ["CudaBackend", "device_spec"]

_MERGES_SINCE = (7, 5)


class CudaBackend:
    """Runs what the kernels can on a CUDA device of compute capability 7.5 or later."""

    def reasons(self, problem: Problem) -> list[str]:
        """See `cupyflash.backends.registry.Backend`."""
        if problem.library != "cupy":
            return [_why_no_cupy_arrays()]
        return refusals(problem) + _why_no_compiler()

    def run(self, problem: Problem, buffers: Buffers) -> None:
        """See `cupyflash.backends.registry.Backend`."""
        cupy, device_id, level = problem.namespace, buffers.query.device.id, debug_level()
        mods = trace_mods(problem, buffers)
        plan = plan_of(problem, buffers, device_spec(cupy, device_id), mods and mods.structure)
        operands = prepare(problem, plan, buffers, _address, mods, driver_map)
        for launch, args in launches(problem, plan, operands):
            _run(cupy, device_id, launch, args, level)
        if operands.out is not buffers.out:
            buffers.out[...] = operands.out

    def prepared(self, problem: Problem, buffers: Buffers, plan: Plan, mods: CallMods | None) -> Callable[[], None]:
        """The launches of a plan, ready to be repeated on the current device, which is that of the arrays."""
        cupy, device_id = problem.namespace, buffers.query.device.id
        operands = prepare(problem, plan, buffers, _address, mods, driver_map)
        ready = list(launches(problem, plan, operands))

        def run() -> None:
            assert operands is not None  # their arrays live as long as this function
            for launch, args in ready:
                _run(cupy, device_id, launch, args, 0)

        return run

    def merge_reasons(self, parts: Parts) -> list[str]:
        """See `cupyflash.backends.registry.Merger`."""
        if parts.library != "cupy":
            return [_why_no_cupy_arrays()]
        reasons = merge_refusals(parts)
        spec = device_spec(parts.namespace, parts.outs[0].device.id)
        if spec.cc < _MERGES_SINCE:
            needed, found = (".".join(map(str, cc)) for cc in (_MERGES_SINCE, spec.cc))
            reasons.append(f"it merges on compute capability {needed} or later, {spec.name} has {found}")
        return reasons + _why_no_compiler()

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        """See `cupyflash.backends.registry.Merger`."""
        cupy, device_id, level = parts.namespace, parts.outs[0].device.id, debug_level()
        return merge_parts(parts, _address, lambda launch, args: _run(cupy, device_id, launch, args, level))


def _run(cupy: Any, device_id: int, launch: Launch, args: tuple[Block, ...], level: int) -> None:
    """Launches on the current device, `device_id`, and the current stream; `level` as in build/debug.py."""
    if level:
        show_launch(launch, args, arch_for(launch.spec, device_spec(cupy, device_id)), level)
    kernel = _kernel(cupy, launch.spec, device_id)
    kernel(launch.grid, launch.block, args, shared_mem=launch.shared_bytes)


def _why_no_compiler() -> list[str]:
    try:
        nvrtc_version()
    except Unsupported as error:
        return [str(error)]
    return []


def _why_no_cupy_arrays() -> str:
    """For arrays of NumPy: what it takes to have CuPy's."""
    if importlib.util.find_spec("cupy") is None:
        return (
            "it takes CuPy arrays only, and CuPy is not installed: pip install 'cupyflash[cuda13]', or [cuda12], on a "
            "machine with an NVIDIA GPU"
        )
    return "it takes CuPy arrays only: pass cupy.asarray(…)"


_address: Callable[[Any], int] = attrgetter("data.ptr")


@lru_cache(maxsize=64)
def device_spec(cupy: Any, device_id: int) -> DeviceSpec:
    """What CuPy says of a device; the choice of kernels then knows what was timed on it."""
    properties = cupy.cuda.runtime.getDeviceProperties(device_id)
    found = DeviceSpec(
        name=properties["name"].decode(),
        cc=(properties["major"], properties["minor"]),
        sms=properties["multiProcessorCount"],
        smem_per_block=properties["sharedMemPerBlockOptin"],
        smem_per_sm=properties["sharedMemPerMultiprocessor"],
        l2=properties["l2CacheSize"],
    )
    use_timed(found, load(found))
    return found


@lru_cache(maxsize=1024)
def _kernel(cupy: Any, spec: KernelSpec, device_id: int) -> Any:
    """The kernel on the current device, loaded, with leave to use its shared memory: both are per device."""
    binary = compile_cubin(render_kernel(spec), arch_for(spec, device_spec(cupy, device_id)), default_cache())
    kernel = cupy.RawModule(path=str(binary.path)).get_function(entry_of(spec))
    kernel.max_dynamic_shared_size_bytes = spec.shared_bytes
    return kernel
