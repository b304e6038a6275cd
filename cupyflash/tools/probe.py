"""Questions put to another process: what hangs or crashes there leaves this one alone.

A library that does not fit its driver may do either when it is loaded, and so may a program on the path.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["QUESTIONS", "Finding", "ask"]


@dataclass(frozen=True)
class Finding:
    """An answer.

    Parameters
    ----------
    text : str
        What was found, or why nothing was.
    is_there : bool
    data : dict
        What else is to be known of it.
    """

    text: str
    is_there: bool = True
    data: dict[str, Any] = field(default_factory=dict)


def ask(question: str, timeout: float) -> Finding:
    """The answer to one of `QUESTIONS`, or that there was none within `timeout` seconds."""
    code = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from cupyflash.tools import probe; probe.answer()"
    # Of a session of its own: what it starts in turn is ended with it.
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(sys.path), question],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        return Finding(f"no answer within {timeout:g} seconds", False)
    if process.returncode < 0:
        return Finding(f"the process was ended by signal {-process.returncode}", False)
    lines = (out if process.returncode == 0 else err).strip().splitlines()  # an error's last line names it
    last = lines[-1] if lines else f"the process ended with status {process.returncode}"
    return Finding(**json.loads(last)) if process.returncode == 0 and lines else Finding(last, False)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=2)
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def answer() -> None:
    """Prints the answer to the question that the command line names; for the other process."""
    found = QUESTIONS[sys.argv[2]]()
    print(f"\n{json.dumps({'text': found.text, 'is_there': found.is_there, 'data': found.data})}")


def _cupy() -> Finding:
    if importlib.util.find_spec("cupy") is None:
        return Finding("not installed", False)
    cupy = importlib.import_module("cupy")
    text = f"{cupy.__version__}, {cupy.__path__[0]}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return Finding(f"{text}; it finds no GPU: {error}", data={"devices": 0})
    return Finding(f"{text}; it finds {count} GPU{'s' * (count != 1)}", data={"devices": count})


# Of cuda.h: CU_DEVICE_ATTRIBUTE_…
_MULTIPROCESSOR_COUNT, _MAJOR, _MINOR = 16, 75, 76


def _driver() -> Finding:
    if sys.platform == "darwin":
        return Finding("NVIDIA has none for macOS", False)
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Finding(f"{library} was not found", False)
    version, count = ctypes.c_int(), ctypes.c_int()
    if status := cuda.cuInit(0):
        return Finding(f"cuInit fails with status {status}", False)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for index in range(count.value):
        device, name, number = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        numbers = []
        for attribute in (_MAJOR, _MINOR, _MULTIPROCESSOR_COUNT):
            cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        devices.append([name.value.decode(errors="replace"), *numbers])
    major, minor = divmod(version.value, 1000)
    return Finding(f"for CUDA up to {major}.{minor // 10}", data={"version": version.value, "devices": devices})


def _nvrtc() -> Finding:
    from ..build.nvrtc import nvrtc_path, nvrtc_version
    from ..errors import Unsupported

    try:
        major, minor = nvrtc_version()
    except Unsupported as error:
        return Finding("; ".join(error.reasons["cuda"]), False)
    return Finding(f"{major}.{minor}, {nvrtc_path()}")


def _compiler() -> Finding:
    from ..build.host import find_compiler
    from ..errors import Unsupported

    try:
        compiler = find_compiler()
    except Unsupported as error:
        return Finding("; ".join(error.reasons["emulator"]), False)
    return Finding(f"{' '.join(compiler.command)}: {compiler.version.splitlines()[0]}")


#: By name.
QUESTIONS: dict[str, Callable[[], Finding]] = {
    "CuPy": _cupy,
    "driver": _driver,
    "NVRTC": _nvrtc,
    "C++ compiler": _compiler,
}
