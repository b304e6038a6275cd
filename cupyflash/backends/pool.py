"""Threads that share out the tiles of a call.

The caller works too, and waits only for helpers that have started: calls may nest (a score_mod that calls attention)
and many threads may call at once, and none can wait for a helper that never comes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from ..interrupts import settle_after

__all__ = ["num_threads", "run_jobs"]

Job = TypeVar("Job")
Function: TypeAlias = Callable[[Job, Callable[[], None] | None], None]
_ENVIRONMENT = "CUPYFLASH_NUM_THREADS"

# Not a ThreadPoolExecutor: Ctrl-C while it starts a thread leaves one that the end of the process waits for.
_lock = threading.Lock()
_tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
_num_helpers = 0


def num_threads() -> int:
    """Threads a call may use: CUPYFLASH_NUM_THREADS, or the processors this process may use.

    Raises ValueError if the environment variable is not an int >= 1.
    """
    text = os.environ.get(_ENVIRONMENT)
    if not text:
        return _available_processors()
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{_ENVIRONMENT} must be an int >= 1, but was {text!r}")
    return count


@cache
def _available_processors() -> int:
    """Processors of the affinity mask, cut down to the control group's quota (containers)."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(count, count if quota is None else int(quota)))


def _cgroup_quota(root: Path) -> float | None:
    """Processors the control group grants (version 2, then version 1), None if it sets no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        granted = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return granted if granted > 0 else None


def run_jobs(function: Function[Job], jobs: Iterable[Job], workers: int) -> None:
    """Call function(job, checkpoint) for each job on up to `workers` threads, the caller's among them.

    After an exception, Ctrl-C's among them, no further job is started, all threads come to rest, and the exception is
    raised.  A function that takes long calls `checkpoint` now and then, which ends its job early in that case; it is
    None where one thread works alone.
    """
    if workers <= 1:
        for job in jobs:
            function(job, None)
        return
    crew = _Crew(function, jobs)
    settle_after(partial(crew.work_with, workers - 1), crew.come_to_rest)
    if crew.failures:
        try:
            raise crew.failures[0]
        finally:
            crew.failures.clear()  # their tracebacks hold the crew


class _StopWorking(Exception):
    """Raised by the checkpoint on threads whose results nobody waits for any more."""


class _Crew(Generic[Job]):
    """The threads that share the jobs of one call."""

    def __init__(self, function: Function[Job], jobs: Iterable[Job]) -> None:
        self._function, self._jobs = function, iter(jobs)
        self._lock = threading.Lock()
        self._is_closed = False  # to helpers that have not begun
        self._is_complete = False  # no job is left to begin
        self._is_cancelled = False
        self._at_work: list[threading.Lock] = []  # one for each helper, which holds it while it works
        self.failures: list[BaseException] = []  # of the helpers

    def work_with(self, helpers: int) -> None:
        """Ask so many helpers, and work: what the caller does."""
        _ask(self._help, helpers)
        try:
            self._work()
        except _StopWorking:
            return
        self._is_complete = True

    def come_to_rest(self) -> None:
        """Wait until no helper is at work any more; who has not begun never will."""
        if not self._is_complete:
            self._is_cancelled = True
        with self._lock:
            self._is_closed = True
        try:
            for busy in self._at_work:
                with busy:
                    pass
        except KeyboardInterrupt:
            self._is_cancelled = True
            raise

    def _help(self) -> None:
        with (busy := threading.Lock()):
            with self._lock:
                if self._is_closed:
                    return
                self._at_work.append(busy)
            try:
                self._work()
            except _StopWorking:
                return
            except BaseException as error:  # noqa: BLE001  # raised by the caller
                self.failures.append(error)
                self._is_cancelled = True

    def _work(self) -> None:
        while not self._is_cancelled:
            with self._lock:
                try:
                    job = next(self._jobs)
                except StopIteration:
                    return
            self._function(job, self._checkpoint)

    def _checkpoint(self) -> None:
        if self._is_cancelled:
            raise _StopWorking


def _ask(task: Callable[[], None], helpers: int) -> None:
    """Have `task` called by so many threads of this process, as soon as they are free.

    By fewer where no thread is started any more, once the interpreter ends (calls from atexit) or beyond the system's
    limit.
    """
    global _num_helpers
    with _lock:
        with contextlib.suppress(RuntimeError):
            while _num_helpers < helpers:
                # Daemons, so that the end of the process does not wait for threads that wait for tasks.
                threading.Thread(target=_serve, args=(_tasks,), name="cupyflash", daemon=True).start()
                _num_helpers += 1
        for _ in range(min(helpers, _num_helpers)):
            _tasks.put(task)


def _serve(tasks: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        tasks.get()()


def _forget_threads() -> None:
    """In a child of fork: the threads stayed behind in the parent."""
    global _lock, _tasks, _num_helpers
    _lock, _tasks, _num_helpers = threading.Lock(), SimpleQueue(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
