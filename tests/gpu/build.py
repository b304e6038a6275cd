"""Compile what the other stages will ask for, on all processors, so that none of them waits for NVRTC one by one.

    python -m tests.gpu.build [--device H200] [--list]

Without `--device` the plans are those of the GPU that is here.  `--list` only prints the kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import gpu_workloads
from cupyflash.backends.cuda import device_spec
from cupyflash.backends.pool import num_threads
from cupyflash.build.cache import default_cache
from cupyflash.build.modding import trace_mods
from cupyflash.errors import Unsupported
from cupyflash.plan.choose import choose, refusals
from cupyflash.plan.device import DEVICES, DeviceSpec
from cupyflash.plan.specs import COMPANIONS, KernelSpec, Mods, ModSummarySpec
from cupyflash.problem.normalize import normalize
from cupyflash.testing import DTYPES
from cupyflash.tools.kernels import kernel_rows
from tests.cases import CASES
from tests.gpu.calls import CLAIMED
from tests.gpu.device import NO_GPU, find_gpu


def kernels_for(calls: Iterable[Mapping[str, Any]], device: DeviceSpec) -> list[KernelSpec]:
    """The kernels of these calls on that GPU, each once; calls that kernels refuse have none."""
    found: dict[KernelSpec, None] = {}
    for arguments in calls:
        problem, buffers = normalize(**arguments)
        problem = replace(problem, library="cupy")
        if refusals(problem):
            continue
        try:
            mods = trace_mods(problem, buffers)
            plan = choose(problem, device, mods and mods.structure)
        except Unsupported:
            continue
        found |= {launch.spec: None for launch in plan.launches}
        if mods is not None and mods.mask is not None:
            found[ModSummarySpec(Mods(None, mods.mask.expression))] = None
    return list(found)


def calls() -> Iterator[Mapping[str, Any]]:
    """Of the tests, of the sanitizer's stage and of the benchmark; the last without memory for their operands."""
    for case in (*CLAIMED.values(), *CASES.values()):
        yield case.arguments()
    for row in (*gpu_workloads.CASES, *gpu_workloads.HOST_CASES.values()):
        query, key = (np.broadcast_to(np.zeros((), DTYPES[row.dtype]), shape) for shape in row.shapes)
        asked = gpu_workloads.FEATURES[row.feature](row, *gpu_workloads.EVERYTHING) if row.feature else {}
        yield {"query": query, "key": key, "value": key, **row.options, **asked}
        if row.feature:
            yield {"query": query, "key": key, "value": key, **row.options}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile what the stages on a GPU will ask for.")
    parser.add_argument("--device", choices=DEVICES, metavar="NAME", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--list", action="store_true", help="print the kernels, and compile nothing")
    given = parser.parse_args(arguments)
    if given.device:
        device = DEVICES[given.device]
    else:
        gpu, reason = find_gpu()
        if gpu is None:
            print(f"no plan can be made: {reason}; pass --device", file=sys.stderr)
            return NO_GPU
        import cupy

        device = device_spec(cupy, cupy.cuda.Device().id)
    specs = [*kernels_for(calls(), device), *COMPANIONS]
    if given.list:
        print(*specs, sep="\n")
        return 0
    by_arch: dict[str, list[KernelSpec]] = {}
    for spec in specs:
        # Instructions of one architecture alone need its suffix.
        by_arch.setdefault(f"{device.arch}a" if spec.family == "fwd_sm90" else device.arch, []).append(spec)
    folder = default_cache().folder
    built = sum(1 for arch in by_arch for _ in kernel_rows(by_arch[arch], arch, folder, num_threads()))
    print(f"{built} kernels for {device.name} are in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
