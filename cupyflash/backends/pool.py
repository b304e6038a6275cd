"""Threads that share out the tiles of a call.

The caller works too, and waits only for helpers that have started: calls may nest (a score_mod that calls attention)
and many threads may call at once, and none can wait for a helper that never comes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["num_threads", "run_jobs"]

Job = TypeVar("Job")
_ENVIRONMENT = "CUPYFLASH_NUM_THREADS"

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_executor_size = 0


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


def run_jobs(function: Callable[[Job], None], jobs: Iterable[Job], workers: int) -> None:
    """Call function(job) for each job on up to `workers` threads, the caller's among them; first come, first served.

    After an exception no further job is started, all threads come to rest, and the exception is raised.
    """
    if workers <= 1:
        for job in jobs:
            function(job)
        return

    queue, queue_lock = iter(jobs), threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            with queue_lock:
                try:
                    job = next(queue)
                except StopIteration:
                    return
            try:
                function(job)
            except BaseException as error:
                failures.append(error)
                raise

    helpers = []
    # No thread is started any more once the interpreter ends (calls from atexit), nor beyond the system's limit: then
    # the caller does it all.
    with contextlib.suppress(RuntimeError):
        for _ in range(workers - 1):
            helpers.append(_submit(work, workers - 1))
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.exception()
    if failures:
        raise failures[0]


def _submit(work: Callable[[], None], size: int):  # type: ignore[no-untyped-def]
    global _executor, _executor_size
    with _lock:
        if _executor is None or _executor_size < size:
            from concurrent.futures import ThreadPoolExecutor  # on first use: it takes 10 ms to import

            if _executor is not None:
                _executor.shutdown(wait=False)
            _executor, _executor_size = ThreadPoolExecutor(size, thread_name_prefix="cupyflash"), size
        return _executor.submit(work)


def _forget_threads() -> None:
    """In a child of fork: the threads stayed behind in the parent."""
    global _lock, _executor, _executor_size
    _lock, _executor, _executor_size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
