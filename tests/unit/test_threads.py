"""Threads: many at once, BLAS's own setting, fork, and CUPYFLASH_NUM_THREADS."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import pool, tiled
from cupyflash.testing import assert_attention_close
from tests.cases import CASES, heads, on_general_backends

# ------------------------------------------------------------------------------------------------------------
# Many threads at once
# ------------------------------------------------------------------------------------------------------------

BUSY = (
    "causal-(513,255)",
    "all-at-once-over-tiles",
    "decode-float16",
    "many-tiny-heads-with-everything",
    "gqa-over-tiles",
    "dropout-over-tiles",
    "jumping-bool-mask",
)


def as_bytes(results: tuple[np.ndarray, ...]) -> list[bytes]:
    return [x.tobytes() for x in results]


@on_general_backends
def test_calls_from_many_threads_give_the_bits_of_serial_calls(backend: str) -> None:
    calls = [CASES[name].arguments() for name in BUSY] * 3
    serial = [as_bytes(cupyflash.attention(**arguments, backend=backend)) for arguments in calls]
    start = threading.Barrier(6)

    def work(share: int) -> list[tuple[int, list[bytes]]]:
        start.wait()
        return [(n, as_bytes(cupyflash.attention(**calls[n], backend=backend))) for n in range(share, len(calls), 6)]

    with ThreadPoolExecutor(6) as pool:
        for results in pool.map(work, range(6)):
            for n, result in results:
                assert result == serial[n], BUSY[n % len(BUSY)]


@on_general_backends
def test_threads_may_share_their_inputs(backend: str) -> None:
    arguments = CASES["all-at-once-over-tiles"].arguments()
    expected = as_bytes(cupyflash.attention(**arguments, backend=backend))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: as_bytes(cupyflash.attention(**arguments, backend=backend)), range(8)))
    assert results == [expected] * 8


@on_general_backends
def test_a_call_within_score_mod(backend: str) -> None:
    inner = heads(1, 2, 300, 600, 8).arguments() | {"return_lse": False}
    expected = cupyflash.attention(**inner, backend=backend)
    met = []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        met.append(cupyflash.attention(**inner, backend=backend).tobytes() == expected.tobytes())
        return score

    case = heads(1, 2, 600, 1100, 8)
    result = cupyflash.attention(**case.arguments() | {"score_mod": score_mod}, backend=backend)
    assert_attention_close(result, case, backend=backend)
    assert met
    assert all(met)


# ------------------------------------------------------------------------------------------------------------
# BLAS's own number of threads: whatever it was before a call, it is after it
# ------------------------------------------------------------------------------------------------------------


class Blas(NamedTuple):
    get: Callable[[], int]
    set: Callable[[int], None]


def find_blas() -> Blas | None:
    """The OpenBLAS that lies beside a NumPy wheel, or whichever is already loaded (Linux)."""
    np.ones((2, 2)) @ np.ones((2, 2))
    root = Path(np.__file__).parent
    paths = [*(root.parent / "numpy.libs").glob("*openblas*"), *(root / ".dylibs").glob("*openblas*")]
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths += [Path(path) for path in re.findall(r"/\S*openblas\S*", maps.read_text())]
    for path in paths:
        library = ctypes.CDLL(str(path))
        for prefix in ("", "scipy_"):
            for suffix in ("", "64_", "_64"):
                name = f"{prefix}openblas_%s_num_threads{suffix}"
                if hasattr(library, name % "get") and hasattr(library, name % "set"):
                    return Blas(getattr(library, name % "get"), getattr(library, name % "set"))
    return None


@pytest.fixture
def blas() -> Any:
    """OpenBLAS, set to three threads: a number that nobody else sets."""
    found = find_blas()
    if found is None:
        pytest.skip("NumPy's BLAS is not an OpenBLAS with a thread count that can be read")
    before = found.get()
    found.set(3)
    if found.get() != 3:
        pytest.skip("this OpenBLAS does not keep the number of threads that it is told")
    yield found
    found.set(before)


BIG = heads(2, 4, 600, 1100, 16)


def test_blas_threads_are_restored_after_a_call(blas: Blas) -> None:
    during = []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        during.append(blas.get())
        return score

    for arguments in (BIG.arguments(), BIG.arguments() | {"score_mod": score_mod}, heads(1, 1, 4, 4).arguments()):
        cupyflash.attention(**arguments, backend="numpy")
        assert blas.get() == 3
    assert set(during) == {1}, "within a call, BLAS works on one thread"


def test_blas_threads_are_restored_after_an_error_in_score_mod(blas: Blas) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        raise RuntimeError("of the user")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="of the user"):
            cupyflash.attention(**BIG.arguments() | {"score_mod": score_mod}, backend="numpy")
        assert blas.get() == 3


def test_blas_threads_are_restored_after_nested_calls(blas: Blas) -> None:
    inner = BIG.arguments()
    after_inner = []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if len(after_inner) < 3:
            cupyflash.attention(**inner, backend="numpy")
            after_inner.append(blas.get())
        return score

    cupyflash.attention(**BIG.arguments() | {"score_mod": score_mod}, backend="numpy")
    assert after_inner
    assert set(after_inner) == {1}, "the outer call is not over"
    assert blas.get() == 3


def test_blas_threads_are_restored_after_concurrent_calls(blas: Blas) -> None:
    small, big = heads(1, 2, 100, 100, 8).arguments(), BIG.arguments()
    with ThreadPoolExecutor(6) as pool:
        for _ in pool.map(lambda n: cupyflash.attention(**(small if n % 2 else big), backend="numpy"), range(24)):
            pass
    assert blas.get() == 3


def test_blas_threads_are_restored_where_calls_of_two_threads_overlap(blas: Blas) -> None:
    """A begins, B begins, A ends, B ends: the setting comes back with the last of them, and only then."""
    a_is_in, a_may_go, seen = threading.Event(), threading.Event(), []

    def wait(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        a_is_in.set()
        assert a_may_go.wait(60)
        return score

    def let_go(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if not a_may_go.is_set():
            a_may_go.set()
            thread.join(60)
            seen.append((thread.is_alive(), blas.get()))
        return score

    arguments = BIG.arguments()
    thread = threading.Thread(target=lambda: cupyflash.attention(**arguments | {"score_mod": wait}, backend="numpy"))
    thread.start()
    assert a_is_in.wait(60)
    cupyflash.attention(**arguments | {"score_mod": let_go}, backend="numpy")
    assert set(seen) == {(False, 1)}
    assert blas.get() == 3


# ------------------------------------------------------------------------------------------------------------
# fork
# ------------------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")


def in_forked_child(work: Callable[[], bool], seconds: float = 60) -> str:
    """What became of `work` in a child made by fork: "right", "wrong", "raised" or "hangs"."""
    with warnings.catch_warnings():
        # Python ≥ 3.12 warns of a fork where other threads exist: that is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {0: "right", 1: "wrong"}.get(os.waitstatus_to_exitcode(status), "raised")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@needs_fork
def test_a_child_made_by_fork_computes() -> None:
    arguments = BIG.arguments()
    expected = as_bytes(cupyflash.attention(**arguments, backend="numpy"))

    def computes() -> bool:
        return as_bytes(cupyflash.attention(**arguments, backend="numpy")) == expected

    assert in_forked_child(computes) == "right"
    assert in_forked_child(lambda: in_forked_child(computes, 30) == "right") == "right"
    assert computes()


@needs_fork
def test_a_child_made_by_fork_within_a_call_computes_and_so_does_its_parent() -> None:
    arguments = BIG.arguments()
    expected = as_bytes(cupyflash.attention(**arguments, backend="numpy"))
    first, became = threading.Lock(), []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if first.acquire(blocking=False):
            became.append(
                in_forked_child(lambda: as_bytes(cupyflash.attention(**arguments, backend="numpy")) == expected)
            )
        return score

    result = cupyflash.attention(**arguments | {"score_mod": score_mod}, backend="numpy")
    assert became == ["right"]
    assert_attention_close(result, BIG, backend="numpy")


@needs_fork
def test_fork_leaves_the_blas_threads_of_parent_and_child(blas: Blas) -> None:
    cupyflash.attention(**BIG.arguments(), backend="numpy")

    def keeps() -> bool:
        cupyflash.attention(**BIG.arguments(), backend="numpy")
        return blas.get() == 3

    assert in_forked_child(keeps) == "right"
    assert blas.get() == 3


@needs_fork
def test_a_child_made_by_fork_within_a_call_has_the_blas_threads_of_before_it(blas: Blas) -> None:
    first, became = threading.Lock(), []

    def as_in_a_new_process() -> bool:
        before, during = blas.get(), set()

        def look(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            during.add(blas.get())
            return score

        cupyflash.attention(**BIG.arguments() | {"score_mod": look}, backend="numpy")
        return (before, during, blas.get()) == (3, {1}, 3)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if first.acquire(blocking=False):
            became.append(in_forked_child(as_in_a_new_process))
        return score

    cupyflash.attention(**BIG.arguments() | {"score_mod": score_mod}, backend="numpy")
    assert became == ["right"]
    assert blas.get() == 3


# ------------------------------------------------------------------------------------------------------------
# CUPYFLASH_NUM_THREADS
# ------------------------------------------------------------------------------------------------------------

COUNT_THREADS = textwrap.dedent(
    """
    import threading, time
    import numpy as np
    import cupyflash

    met = set()

    def score_mod(score, b, h, q_idx, kv_idx):
        met.add(threading.get_ident())
        time.sleep(0.002)
        return score

    query, key, value = np.random.default_rng(0).standard_normal((3, 8, 1024, 16)).astype(np.float32)
    cupyflash.attention(query, key, value, score_mod=score_mod, backend="numpy")
    print(len(met))
    """
)


def threads_met(number: str) -> int:
    paths = [str(Path(cupyflash.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "CUPYFLASH_NUM_THREADS": number, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS], env=environment, capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_more_threads_than_asked_for(number: int) -> None:
    met = threads_met(str(number))
    assert met == 1 if number == 1 else 2 <= met <= number


def test_no_more_threads_than_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of many cores a call of a few jobs wakes a few threads."""
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", "1000000")
    met: list[tuple[int, int]] = []

    def run_jobs(function: Callable[[Any], None], jobs: Any, workers: int) -> None:
        jobs = list(jobs)
        met.append((workers, len(jobs)))
        pool.run_jobs(function, jobs, 1)

    monkeypatch.setattr(tiled, "run_jobs", run_jobs)
    cupyflash.attention(**BIG.arguments(), backend="numpy")
    ((workers, num_jobs),) = met
    assert workers == num_jobs > 1


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_numbers_of_threads_that_are_refused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", number)
    with pytest.raises(ValueError, match="CUPYFLASH_NUM_THREADS") as raised:
        cupyflash.attention(**BIG.arguments(), backend="numpy")
    assert repr(number) in str(raised.value)


def test_the_number_of_threads_does_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for number in ("1", "2", "5"):
        monkeypatch.setenv("CUPYFLASH_NUM_THREADS", number)
        results.append([as_bytes(cupyflash.attention(**CASES[name].arguments(), backend="numpy")) for name in BUSY])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("before", ["", "cupyflash.attention(x, x, x)"], ids=["first call", "after a call"])
def test_a_call_while_the_interpreter_ends(before: str) -> None:
    """When no thread can be started any more."""
    code = f"""
import atexit, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import cupyflash
x = np.ones((1, 8, 1024, 64), np.float32)
atexit.register(lambda: print(np.allclose(cupyflash.attention(x, x, x), 1)))
{before}
"""
    environment = {**os.environ, "CUPYFLASH_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
