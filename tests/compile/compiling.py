"""Compiling many kernels, in several processes: threads gain nothing with NVRTC."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import compile_cubin
from cupyflash.build.rendering import render_kernel
from cupyflash.errors import KernelCompileError
from tests.compile.checks import faults
from tests.compile.selection import Pair


def found_faults(pairs: Sequence[Pair], folder: Path, jobs: int) -> Iterator[list[str]]:
    """For each pair in order what is wrong with it; cubins are kept in the cache at `folder`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(partial(_faults_of, folder=folder), pairs, chunksize=4)


def _faults_of(pair: Pair, folder: Path) -> list[str]:
    try:
        binary = compile_cubin(render_kernel(pair.spec), pair.arch, Cache(folder))
    except KernelCompileError as error:
        return [str(error)]
    return list(faults(pair.spec, binary))
