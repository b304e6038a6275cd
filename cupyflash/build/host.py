"""Kernels compiled for the CPU: the host's C++ compiler, the emulator's runtime and one shared library per
kernel.

All of it is cached: the runtime is compiled once, a kernel once per source text.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cupyflash.build.cache import Cache, digest
from cupyflash.build.source import KernelSource, kernels_folder
from cupyflash.errors import KernelCompileError, Unsupported
from cupyflash.interrupts import settle_after

__all__ = ["Compiler", "build_kernel", "build_runtime", "find_compiler"]

# -ftls-model: every instruction reads a thread-local pointer, and this is one load instead of a call.
_COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-g1",
    "-fvisibility=hidden",
    "-ftls-model=initial-exec",
)
# -U_FORTIFY_SOURCE: the checked longjmp and friends object to stacks that are not the thread's own.
_RUNTIME_FLAGS = ("-O2", "-Wall", "-Wextra", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
# -O1 compiles in about a third of -O2's time and runs as fast: the work is in the runtime. -ffp-contract: a product
# is rounded before it is added, see isa::mul_rn.
_KERNEL_FLAGS = (
    "-O1",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answered.

    Attributes
    ----------
    command
        the program and its fixed arguments; ``$CXX`` may hold several words.
    version
        what it says of itself, part of every cache key.
    """

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """The C++ compiler: ``$CXX``, else the first of c++, g++, clang++ on the path.

    Raises
    ------
    Unsupported
        there is none, ``$CXX`` does not run, or this is not Linux.
    """
    return _find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@lru_cache(maxsize=8)
def _find_compiler(cxx: str, path: str) -> Compiler:
    if not sys.platform.startswith("linux"):
        raise _no_compiler(f"it needs Linux, this is {sys.platform}")
    candidates = [tuple(shlex.split(cxx))] if cxx.strip() else [("c++",), ("g++",), ("clang++",)]
    for command in candidates:
        program = shutil.which(command[0], path=path)
        if program is None:
            continue
        answer = subprocess.run([program, *command[1:], "--version"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return Compiler((program, *command[1:]), answer.stdout.strip())
    if cxx.strip():
        raise _no_compiler(f"CXX={cxx!r} does not run")
    raise _no_compiler("none of c++, g++, clang++ is on the path and CXX is not set; install g++ or clang")


def _no_compiler(reason: str) -> Unsupported:
    return Unsupported(f"the emulator compiles kernels with the host's C++ compiler: {reason}", {"emulator": [reason]})


def build_runtime(cache: Cache, *, portable_fibers: bool = False) -> Path:
    """The emulator's runtime as a shared library.

    Parameters
    ----------
    cache
        where it is kept.
    portable_fibers
        switch stacks by ucontext instead of by hand-written assembly; slower, runs
        everywhere.

    Raises
    ------
    Unsupported
        there is no compiler.
    KernelCompileError
        the compiler refused; ``.log`` is its output.
    """
    compiler = find_compiler()
    folder = kernels_folder() / "emulator"
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cpp"))
    flags = (*_COMMON_FLAGS, *_RUNTIME_FLAGS, *_machine_flags())
    if portable_fibers:
        flags += ("-DEMULATOR_PORTABLE_FIBERS=1",)
    texts = [part for path in sources for part in (path.name, path.read_bytes())]
    key = digest("runtime", *compiler.command, compiler.version, *flags, _machine(), *texts)
    # The name is unique because the dynamic loader takes a library of the same name for the same library.
    library = f"libcupyflash-emulator-{key}.so"

    def build(workplace: Path) -> None:
        source = folder / "runtime.cpp"
        _compile(compiler, (*flags, f"-Wl,-soname,{library}", str(source)), workplace / library, "the emulator")

    return cache.get(key, build) / library


def build_kernel(source: KernelSource, cache: Cache, runtime: Path) -> Path:
    """A kernel as a shared library that runs under ``runtime``.

    Each of the source's entries becomes a symbol ``cupyflash_kernel_<entry>``, see
    kernels_cu/emulator/export.h.

    Raises
    ------
    Unsupported
        there is no compiler.
    KernelCompileError
        the compiler refused; ``.log`` is its output, with lines of the original files.
    """
    compiler = find_compiler()
    flags = (*_COMMON_FLAGS, *_KERNEL_FLAGS, *_machine_flags())
    exports = "".join(f"CUPYFLASH_EXPORT({entry});\n" for entry in source.entries)
    text = f'#include "emulator/export.h"\n{source.text}\n{exports}'
    # The runtime's name stands for the text of the emulator's headers, which the kernel includes.
    key = digest("kernel", *compiler.command, compiler.version, *flags, _machine(), runtime.name, text)

    def build(workplace: Path) -> None:
        unit = workplace / "kernel.cpp"
        unit.write_text(text, encoding="utf-8")
        arguments = (*flags, f"-I{kernels_folder()}", str(unit), str(runtime))
        _compile(compiler, arguments, workplace / "kernel.so", source.name)

    return cache.get(key, build) / "kernel.so"


def _compile(compiler: Compiler, arguments: Sequence[str], output: Path, what: str) -> None:
    command = [*compiler.command, *arguments, "-o", str(output)]
    # Ctrl-C reaches Python alone (a session of its own), and ends the compiler with the programs that it has started.
    # What they leave half done lies in the folder around the entry's, and goes with it.
    environment = {**os.environ, "TMPDIR": str(output.parent.parent)}
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )

    def end() -> None:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        for pipe in (run.stdout, run.stderr):
            if pipe is not None:
                pipe.close()
        run.wait()

    _, log = settle_after(run.communicate, end)
    if run.returncode != 0:
        raise KernelCompileError(f"{compiler.command[0]} could not compile {what}", log=log)


def _machine_flags() -> tuple[str, ...]:
    # Elsewhere -march=native is unknown or does not pay; on x86-64 it brings F16C and wider vectors.
    return ("-march=native",) if platform.machine() in ("x86_64", "AMD64") else ()


@lru_cache(maxsize=1)
def _machine() -> str:
    """What -march=native depends on, for a cache that several machines share."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            features = [line for line in file if line.startswith(("flags", "Features", "model name"))]
    except OSError:
        features = []
    return platform.machine() + "".join(sorted(set(features)))
