"""Which GPU is here, what drives it, and how to load a kernel on it.

python -m tests.gpu.device    prints it as JSON; without a GPU it says why and ends with status 2
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cupyflash.build.cache import default_cache
from cupyflash.build.nvrtc import compile_cubin, nvrtc_version
from cupyflash.build.source import KernelSource
from cupyflash.errors import Unsupported

NO_GPU = 2  # exit status of everything that needs a GPU and finds none
SMI_SECONDS = 20.0


@dataclass(frozen=True)
class Gpu:
    """CuPy's current device.

    Attributes
    ----------
    name, arch : str
        ``"NVIDIA H200"``, ``"sm_90"``.
    driver : str
        The driver's version by nvidia-smi, or "unknown"; cuda : the newest CUDA it knows, ``"13.0"``.
    cupy, nvrtc : str
        Versions.
    l2_bytes, multiprocessors : int
    """

    name: str
    arch: str
    driver: str
    cuda: str
    cupy: str
    nvrtc: str
    l2_bytes: int
    multiprocessors: int

    @property
    def capability(self) -> int:
        return int(self.arch.removeprefix("sm_"))

    @property
    def versions(self) -> dict[str, str]:
        """Name, driver, cuda, cupy and nvrtc."""
        return {name: str(value) for name, value in asdict(self).items() if name not in ("l2_bytes", "multiprocessors")}


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU and "", or None and what is missing."""
    try:
        import cupy
    except (ImportError, OSError) as error:  # OSError: its folder of kernels cannot be written
        return None, f"CuPy cannot be imported ({error}); pip install 'cupyflash[cuda13]' or 'cupyflash[cuda12]'"
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return None, f"CuPy {cupy.__version__} finds no CUDA device ({error})"
    if count == 0:
        return None, f"CuPy {cupy.__version__} finds no CUDA device"
    try:
        nvrtc = nvrtc_version()
    except Unsupported as error:
        return None, str(error)
    device = cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    cuda = runtime.driverGetVersion()
    gpu = Gpu(
        name=properties["name"].decode(),
        arch=f"sm_{device.compute_capability}",
        driver=nvidia_smi("driver_version").get("driver_version", "unknown"),
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        cupy=cupy.__version__,
        nvrtc=".".join(map(str, nvrtc)),
        l2_bytes=properties["l2CacheSize"],
        multiprocessors=properties["multiProcessorCount"],
    )
    return gpu, ""


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says about the first GPU, ``{"clocks.sm": "1980 MHz"}``; empty where it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return {}
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if answer.returncode == 0 and len(values) == len(fields) else {}


def load(source: KernelSource, gpu: Gpu) -> Any:
    """The source compiled for this GPU, as a ``cupy.RawModule``."""
    import cupy

    return cupy.RawModule(path=str(compile_cubin(source, gpu.arch, default_cache()).path))


def main(arguments: Sequence[str] | None = None) -> int:
    gpu, reason = find_gpu()
    if gpu is None:
        print(f"no GPU can be used: {reason}", file=sys.stderr)
        return NO_GPU
    print(json.dumps(asdict(gpu)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
