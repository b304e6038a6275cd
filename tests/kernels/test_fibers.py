"""Switching stacks, by hand and by ucontext, and on AArch64 where a cross compiler and QEMU are at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cupyflash.build.source import kernels_folder

FIBERS, ROUNDS = 300, 50


def expected():
    """What fibers.cpp adds up."""
    numbers = sum(me * 0.5 + i + 0.25 * ROUNDS for me in range(FIBERS) for i in range(10))
    integers = sum(me * 1000 + i + 3 * ROUNDS for me in range(FIBERS) for i in range(8))
    return f"{numbers + integers:.2f} 1\n"


def build_and_run(compiler, runner, program, *flags):
    source = Path(__file__).parent / "fibers.cpp"
    command = [*compiler, "-std=c++17", *flags, f"-I{kernels_folder()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("optimisation", ["-O0", "-O2"])
@pytest.mark.parametrize("portable", [False, True], ids=["by-hand", "ucontext"])
def test_fibers(cxx, tmp_path, portable, optimisation):
    flags = ["-DEMULATOR_PORTABLE_FIBERS=1"] if portable else []
    assert build_and_run(cxx, [], tmp_path / "fibers", optimisation, *flags) == expected()


@pytest.mark.parametrize("optimisation", ["-O0", "-O2"])
def test_fibers_on_aarch64(tmp_path, optimisation):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-g++ and qemu-aarch64 are not both on PATH")
    assert build_and_run([compiler], [emulator], tmp_path / "fibers", optimisation, "-static") == expected()
