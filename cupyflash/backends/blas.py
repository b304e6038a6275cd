"""The thread count of NumPy's BLAS.

The tiled backend runs one tile per thread, so BLAS must not start threads of its own: two Python threads with one BLAS
thread each are 1.4 times as fast as one Python thread with two BLAS threads, and both together are slowest of all.
The setting belongs to the process, so it is counted: the first call in sets one thread, the last one out restores.

OpenBLAS, which NumPy's wheels carry, is set through its own symbols: 0.7 µs, where a general thread-pool controller
takes 800.  With another BLAS nothing is set, and the tiled backend leaves the threads to it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..interrupts import settle_after

__all__ = ["Control", "control", "one_blas_thread"]


class Control(NamedTuple):
    """Getter and setter of the BLAS thread count, and the library they were found in."""

    library: str
    get: Callable[[], int]
    set: Callable[[int], None]


@cache
def control() -> Control | None:
    """The control of NumPy's BLAS, or None where it has no known symbols."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for prefix in ("scipy_", ""):
            for suffix in ("64_", ""):
                try:
                    getter = getattr(library, f"{prefix}openblas_get_num_threads{suffix}")
                    setter = getattr(library, f"{prefix}openblas_set_num_threads{suffix}")
                except AttributeError:
                    continue
                getter.argtypes, getter.restype = [], ctypes.c_int
                setter.argtypes, setter.restype = [ctypes.c_int], None
                return Control(path, getter, setter)
    return None


def _candidates() -> Iterator[str]:
    """OpenBLAS as NumPy's wheels carry it (Linux and Windows, then macOS), then as the process has loaded it."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        yield from sorted(map(str, folder.glob("*openblas*")))
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines())
        yield from sorted({path for path in mapped if "openblas" in os.path.basename(path)})


class _OneBlasThread:
    """BLAS has one thread while at least one call of the process is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: set[object] = set()
        self._outside_count = 1

    def run(self, work: Callable[[], None]) -> None:
        """Call `work` with one BLAS thread; whatever ends it, Ctrl-C too, leaves the setting as it was."""
        blas = control()
        if blas is None:
            work()
            return
        call = object()

        def enter_and_work() -> None:
            self._enter(blas, call)
            work()

        settle_after(enter_and_work, partial(self._leave, blas, call))

    # Ctrl-C may end each of these after any statement, and _leave is then called (again).

    def _enter(self, blas: Control, call: object) -> None:
        with self._lock:
            if not self._inside:
                self._outside_count = blas.get()
            self._inside.add(call)
            if self._outside_count != 1:
                blas.set(1)

    def _leave(self, blas: Control, call: object) -> None:
        with self._lock:
            if self._inside == {call} and self._outside_count != 1:
                blas.set(self._outside_count)
            self._inside.discard(call)

    # A child of fork has the forking thread only: whatever other threads were inside will never leave.
    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        self._lock.release()

    def after_fork_in_child(self) -> None:
        blas = control()
        if blas is not None and self._inside and self._outside_count != 1:
            blas.set(self._outside_count)
        self._inside.clear()
        self._lock.release()


one_blas_thread = _OneBlasThread()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=one_blas_thread.before_fork,
        after_in_parent=one_blas_thread.after_fork_in_parent,
        after_in_child=one_blas_thread.after_fork_in_child,
    )
