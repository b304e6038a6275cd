"""Compiling kernels and checking them: one, or many in several processes, for threads gain nothing with NVRTC."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cupyflash.build.cache import Cache, digest
from cupyflash.build.nvrtc import compile_cubin, nvrtc_version
from cupyflash.build.rendering import render_kernel
from cupyflash.errors import KernelCompileError
from tests.compile import checks
from tests.compile.selection import Pair


class Verdict(NamedTuple):
    """What is wrong with a kernel (None: that was known) under a name for all that this follows from."""

    key: str
    faults: list[str] | None


def faults_of(pair: Pair, folder: Path) -> list[str]:
    """What is wrong with it; the cubin is kept in the cache at `folder`."""
    try:
        binary = compile_cubin(render_kernel(pair.spec), pair.arch, Cache(folder))
    except KernelCompileError as error:
        return [str(error)]
    return list(checks.faults(pair.spec, binary))


def verdicts(pairs: Sequence[Pair], known: Collection[str], jobs: int) -> Iterator[Verdict]:
    """For each pair in order what is wrong with it. Those whose key is known are not compiled; no cubin is kept."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_remember, initargs=(frozenset(known),)) as pool:
        yield from pool.map(_verdict, pairs, chunksize=4)


_known: frozenset[str] = frozenset()


def _remember(known: frozenset[str]) -> None:
    global _known
    _known = known


def _verdict(pair: Pair) -> Verdict:
    key = digest(*_tools(), pair.arch, code_of(render_kernel(pair.spec).text))
    if key in _known:
        return Verdict(key, None)
    with tempfile.TemporaryDirectory() as folder:
        return Verdict(key, faults_of(pair, Path(folder)))


def code_of(text: str) -> str:
    """Without comments, empty lines and line numbers: a kernel that is explained in other words is not a new one."""
    lines = (line.partition("//")[0].rstrip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("#line"))


@cache
def _tools() -> tuple[str, bytes]:
    return str(nvrtc_version()), Path(checks.__file__).read_bytes()
