"""Finding the host's compiler, and building with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cupyflash.build import host
from cupyflash.build.cache import Cache, default_cache
from cupyflash.build.host import build_kernel, build_runtime, find_compiler
from cupyflash.errors import KernelCompileError, Unsupported
from tests.kernels.harness import source_of

NOTHING = '#include "isa.cuh"\nextern "C" __global__ void nothing() {}\n'


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        Unsupported, match=r"none of c\+\+, g\+\+, clang\+\+ is on the path and CXX is not set"
    ) as caught:
        find_compiler()
    assert list(caught.value.reasons) == ["emulator"]


def test_cxx_comes_first(monkeypatch, tmp_path):
    compiler = tmp_path / "my-compiler"
    compiler.write_text('#!/bin/sh\necho "mine 1.0 $1"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} --wrapped")
    found = find_compiler()
    assert found.command == (str(compiler), "--wrapped")
    assert found.version == "mine 1.0 --wrapped"
    monkeypatch.setenv("CXX", str(tmp_path / "gone"))
    with pytest.raises(Unsupported, match=r"CXX='.*gone' does not run"):
        find_compiler()


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    host._find_compiler.cache_clear()
    with pytest.raises(Unsupported, match="it needs Linux, this is win32"):
        find_compiler()
    host._find_compiler.cache_clear()


@pytest.mark.slow
def test_built_once(cxx, tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    runtime = build_runtime(cache)
    kernel = build_kernel(source_of(NOTHING), cache, runtime)
    monkeypatch.setattr(host, "_compile", None)
    assert build_runtime(cache) == runtime
    assert build_kernel(source_of(NOTHING), cache, runtime) == kernel
    with pytest.raises(TypeError):
        build_kernel(source_of(NOTHING + "// another text\n"), cache, runtime)
    with pytest.raises(TypeError):
        build_runtime(cache, portable_fibers=True)


def test_compiler_says_why(cxx):
    cache = default_cache()
    runtime = build_runtime(cache)
    with pytest.raises(KernelCompileError, match="could not compile test:") as caught:
        build_kernel(source_of(NOTHING + "#error because\n"), cache, runtime)
    assert "test.cu:3" in caught.value.log
    assert "because" in caught.value.log


@pytest.mark.slow
def test_conversions_without_the_instructions(cxx, tmp_path):
    """numeric.h converts by hand where the CPU cannot; here it is told not to, with the same results."""
    flag = "-mno-f16c"
    check = subprocess.run([*cxx, flag, "-E", "-x", "c++", os.devnull], capture_output=True, check=False)
    if check.returncode != 0:
        pytest.skip(f"the compiler has no {flag}")
    tests = str(Path(__file__).parent / "test_isa.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        tests,
        "-k",
        "convert or unpack or mma",
    ]
    environment = {**os.environ, "CXX": " ".join([*cxx, flag]), "CUPYFLASH_REQUIRE": "cxx"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed" in run.stdout
