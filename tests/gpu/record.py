"""Run the ISA layer's tiny kernels on the GPU and keep what they give, for tests/kernels/test_conformance.py.

    python -m tests.gpu.record [--folder tests/kernels/recorded]

A draft: nobody has run it on a GPU yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cupyflash.backends.tensormap import driver_map
from tests.gpu.device import NO_GPU, Gpu, find_gpu, load
from tests.kernels.conformance import RECORDED, Array, Probe, Recording, probes_of, save_recording
from tests.kernels.harness import HERE, source_of


def run_on_gpu(probe: Probe, module: Any) -> dict[str, Array]:
    """The outputs of a launch."""
    import cupy

    outputs = {name: cupy.asarray(before) for name, before in probe.outputs.items()}
    arrays = {**{name: cupy.asarray(array) for name, array in probe.inputs.items()}, **outputs}
    arguments = tuple(probe.arguments(arrays, lambda array: int(array.data.ptr), driver_map))
    kernel = module.get_function(probe.entry)
    kernel(probe.grid, (probe.threads,), arguments, shared_mem=probe.shared_mem)
    return {name: array.get() for name, array in outputs.items()}


def record(gpu: Gpu, folder: Path) -> Path:
    """Records everything this GPU can run; after an error in one probe, what came before it is kept."""
    modules: dict[str, Any] = {}
    outputs: dict[str, Mapping[str, Array]] = {}
    probes = probes_of(gpu.arch)
    try:
        for name, probe in probes.items():
            if probe.file not in modules:
                text = (HERE / probe.file).read_text(encoding="utf-8")
                target = replace(gpu, arch=f"{gpu.arch}a") if probe.exact else gpu
                modules[probe.file] = load(source_of(text, probe.file), target)
            outputs[name] = run_on_gpu(probe, modules[probe.file])
            print(f"recorded {name}", flush=True)
    finally:
        inputs = {name: probes[name].inputs for name in outputs}
        path = save_recording(Recording(gpu.arch, gpu.versions, inputs, outputs), folder)
        print(f"{len(outputs)} of {len(probes)} probes are in {path}", flush=True)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Record what a GPU gives for the emulator's tests.")
    parser.add_argument("--folder", type=Path, default=RECORDED)
    given = parser.parse_args(arguments)
    gpu, reason = find_gpu()
    if gpu is None:
        print(f"nothing can be recorded: {reason}", file=sys.stderr)
        return NO_GPU
    record(gpu, given.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
