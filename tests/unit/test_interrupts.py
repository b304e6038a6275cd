"""Ctrl-C, and errors of the user's functions, in the middle of a call: what is left behind is nothing."""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import blas, pool
from cupyflash.build.cache import Cache, digest
from cupyflash.build.host import _compile, find_compiler
from cupyflash.interrupts import settle_after
from tests.cases import heads

BIG = heads(2, 4, 600, 1100, 16)
POOL = "cupyflash"  # the name of its threads


@pytest.fixture(autouse=True)
def signals_raise() -> Iterator[None]:
    """As at a terminal: a shell has what it runs in the background ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", "3")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever a test interrupts: the settings are those of before, and a new call is right."""
    arguments = BIG.arguments()
    expected = cupyflash.attention(**arguments, backend="numpy")
    before = settings(), threads_beside_the_pool()
    yield
    assert (settings(), threads_beside_the_pool()) == before
    for result, right in zip(cupyflash.attention(**arguments, backend="numpy"), expected, strict=True):
        assert result.tobytes() == right.tobytes()


def settings() -> tuple[Any, ...]:
    control = blas.control()
    inside = len(blas.one_blas_thread._inside)
    return (control and control.get(), inside, np.geterr(), blas.one_blas_thread._lock.locked(), pool._lock.locked())


def threads_beside_the_pool() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name != POOL]


# ------------------------------------------------------------------------------------------------------------
# At every moment
# ------------------------------------------------------------------------------------------------------------


def interrupted_at(moment: int, call: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt at the n-th of the moments at which Python looks for signals; False if there are fewer.

    These are the entry of a function and the return of one written in C: what a profiler is told.
    """
    count = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_return"):
            count += 1
            if count == moment:
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def test_a_call_may_be_interrupted_at_every_moment() -> None:
    arguments = heads(1, 4, 256, 512, 16).arguments()
    expected = cupyflash.attention(**arguments, backend="numpy")
    before, moment = settings(), 1
    while interrupted_at(moment, lambda: cupyflash.attention(**arguments, backend="numpy")):
        assert settings() == before, moment
        moment += 1
    assert moment > 200
    assert cupyflash.attention(**arguments, backend="numpy")[0].tobytes() == expected[0].tobytes()


@pytest.mark.parametrize("backend", ["math", "numpy"])
def test_a_small_call_may_be_interrupted_at_every_moment(backend: str) -> None:
    arguments = heads(1, 1, 4, 4, 4).arguments()
    before, moment = settings(), 1
    while interrupted_at(moment, lambda: cupyflash.attention(**arguments, backend=backend)):
        assert settings() == before, moment
        moment += 1
    assert moment > 20


def test_merging_may_be_interrupted_at_every_moment() -> None:
    outs, lses = [np.zeros((2, 4, 8), np.float32)] * 2, [np.zeros((2, 4), np.float32)] * 2
    before, moment = settings(), 1
    while interrupted_at(moment, lambda: cupyflash.merge_attention(outs, lses)):
        assert settings() == before, moment
        moment += 1
    assert moment > 20


def test_what_is_settled_is_settled_at_every_moment() -> None:
    def settle() -> None:
        len(steps)
        steps.append("settled")

    moment, endings = 1, set()
    while True:
        steps: list[str] = []
        interrupted = interrupted_at(moment, lambda steps=steps: settle_after(lambda: steps.append("worked"), settle))
        if not interrupted:
            break
        if "worked" in steps:
            assert steps[-1] == "settled"
        endings.add(tuple(steps))
        moment += 1
    assert ("worked", "settled", "settled") in endings, "settle was interrupted once, and called again"


# ------------------------------------------------------------------------------------------------------------
# Real signals
# ------------------------------------------------------------------------------------------------------------

INTERRUPTED_CALLS = """
    import json, os, random, signal, sys, threading, time
    import numpy as np
    import cupyflash
    from cupyflash.backends import blas

    signal.signal(signal.SIGINT, signal.default_int_handler)
    how, functions = sys.argv[1], sys.argv[2] == "functions"
    random.seed(int(sys.argv[3]))
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 16, 4096, 64), dtype=np.float32)
    small = query[:2, :600]
    expected = cupyflash.attention(small, small, small).tobytes()
    control = blas.control()
    before = control and control.get(), np.geterr()
    out = np.empty_like(query)
    mods = {"score_mod": lambda s, b, h, i, j: s - 0.01 * abs(i - j)} if functions else {}

    def send():
        sent.append(time.monotonic())
        if how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            import _thread
            _thread.interrupt_main()

    waits = []
    while len(waits) < 6:
        sent = []
        timer = threading.Timer(random.uniform(0, 0.25), send)
        timer.start()
        try:
            while True:
                cupyflash.attention(query, key, value, out=out, **mods)
        except KeyboardInterrupt:
            waits.append(time.monotonic() - sent[0])
        timer.join()
        left = out.copy()
        assert (control and control.get(), np.geterr()) == before
        time.sleep(0.1)
        assert (out == left).all() or np.isnan(left).any(), "a thread went on writing"
        assert {thread.name for thread in threading.enumerate()} == {"MainThread", "cupyflash"}
        assert cupyflash.attention(small, small, small).tobytes() == expected
    print(json.dumps(waits))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name != "posix", reason="sends signals as POSIX has them")
@pytest.mark.parametrize("functions", ["plain", "functions"])
@pytest.mark.parametrize("how", ["signal", "interrupt_main"])
def test_ctrl_c_in_a_long_call(how: str, functions: str) -> None:
    paths = [str(Path(cupyflash.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED_CALLS), how, functions, "0"],
        env={**os.environ, "CUPYFLASH_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    waits = json.loads(result.stdout)
    assert len(waits) == 6
    assert max(waits) < 2, "a tile takes some milliseconds, on a busy machine several times that"


def test_the_end_of_a_process_does_not_wait_for_the_pool() -> None:
    code = "import numpy as np, cupyflash; x = np.zeros((8, 1024, 64), np.float32); cupyflash.attention(x, x, x)"
    paths = [str(Path(cupyflash.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True).returncode == 0


# ------------------------------------------------------------------------------------------------------------
# Errors in the user's functions
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["caller", "helper"])
@pytest.mark.parametrize("error", [RuntimeError("of the user"), KeyboardInterrupt()])
def test_no_thread_writes_after_an_error_in_score_mod(where: str, error: BaseException) -> None:
    caller, calls = threading.get_ident(), []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        calls.append(threading.get_ident())
        time.sleep(0.005)
        if len(calls) > 6 and (threading.get_ident() == caller) == (where == "caller"):
            raise error
        return score

    arguments = heads(4, 4, 600, 1100, 16).arguments() | {"return_lse": False, "return_weights": False}
    out = np.full((4, 4, 600, 16), 7, np.float32)
    with pytest.raises(type(error)) as raised:
        cupyflash.attention(**arguments | {"score_mod": score_mod, "out": out}, backend="numpy")
    assert raised.value is error
    left, calls_until_then = out.copy(), len(calls)
    time.sleep(0.1)
    np.testing.assert_array_equal(out, left)
    assert len(calls) == calls_until_then
    assert (out == 7).any(), "it ended early"


def test_helpers_stop_at_the_next_tile() -> None:
    """A job of a thousand tiles does not go on to its end when another thread has failed."""
    barrier, tiles = threading.Barrier(2), []

    def function(job: int, checkpoint: Callable[[], None] | None) -> None:
        assert checkpoint is not None
        barrier.wait(60)
        if threading.current_thread() is threading.main_thread():
            _thread.interrupt_main()
            time.sleep(0.01)
        for tile in range(100_000):
            checkpoint()
            tiles.append(tile)
            time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        pool.run_jobs(function, range(2), 2)
    assert len(tiles) < 1000


def test_jobs_that_have_begun_are_finished_where_nothing_fails() -> None:
    """The caller has no job left, and waits for those of the helpers."""
    done = []

    def function(job: int, checkpoint: Callable[[], None] | None) -> None:
        assert checkpoint is not None
        if threading.current_thread() is not threading.main_thread():
            for _ in range(50):
                time.sleep(0.001)
                checkpoint()
        done.append(job)

    pool.run_jobs(function, range(40), 3)
    assert sorted(done) == list(range(40))


# ------------------------------------------------------------------------------------------------------------
# Compiling
# ------------------------------------------------------------------------------------------------------------


# A file that Python's own code was just opening is closed by the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_build_may_be_interrupted_at_every_moment(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path / "cache"), digest("what is built")

    def build(folder: Path) -> None:
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")

    moment = 1
    while interrupted_at(moment, lambda: cache.get(key, build)):
        left = {path.name for path in cache.folder.iterdir() if not path.name.startswith(".lock-")}
        assert left <= {key}, moment
        if left:  # the entry was in place before the interrupt
            break
        moment += 1
    assert moment > 20
    assert (cache.get(key, build) / "two").read_text() == "2"
    assert {path.name for path in cache.folder.iterdir()} == {key, f".lock-{key[:2]}"}


@pytest.mark.usefixtures("cxx")
def test_an_interrupted_compiler_is_gone_with_its_files(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    # Takes seconds: a table of templates, one deeper than the other.
    text = "template <int N> struct T { enum { v = T<N - 1>::v + N }; char x[T<N - 1>::v % 7 + 1]; };\n"
    text += "template <> struct T<0> { enum { v = 0 }; };\n"
    text += "\n".join(
        f"template <int N> struct U{i} : T<N> {{}}; int f{i}() {{ return U{i}<{800 + i % 90}>::v; }}"
        for i in range(3000)
    )
    started = []

    def build(folder: Path) -> None:
        unit = folder / "unit.cpp"
        unit.write_text(text)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        started.append(time.monotonic())
        _compile(find_compiler(), ("-shared", "-fPIC", "-O2", str(unit)), folder / "unit.so", "a long text")

    with pytest.raises(KeyboardInterrupt):
        cache.get(digest(text), build)
    assert time.monotonic() - started[0] < 2
    assert [path.name for path in cache.folder.iterdir() if not path.name.startswith(".lock-")] == []
    assert compilers_on(cache.folder) == []


def compilers_on(folder: Path) -> list[str]:
    """Command lines of running programs that name the folder (Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command and "pytest" not in command:
            found.append(command)
    return found


# ------------------------------------------------------------------------------------------------------------
# The emulator
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cxx")
def test_a_launch_of_the_emulator_ends_with_its_block() -> None:
    """One of hundreds of blocks; all of them would take many seconds."""
    query = np.zeros((1, 8, 2048, 64), np.float16)
    cupyflash.attention(query[:, :1, :64], query[:, :1], query[:, :1], backend="emulator")  # compiled
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.5, send)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        cupyflash.attention(query, query, query, backend="emulator")
    assert time.monotonic() - sent[0] < 5
    timer.join()
    result = cupyflash.attention(query[:, :1, :64], query[:, :1], query[:, :1], backend="emulator")
    assert not result.any()
