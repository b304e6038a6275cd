"""One call of attention on a sequence whose matrix of weights would not fit into this machine's memory.

The weights of L queries and S keys are L·S numbers.  By default the sequence is as long as it takes for them to fill
the machine's memory one and a half times over.  `attention` makes them tile by tile and forgets each tile at once (Dao
et al., "FlashAttention", 2022), so what it needs beside its result is a few MiB at any length.

A thread reads the memory of this process ten times a second during the call; what it read is printed and drawn.  Some
rows are computed once more by the formula, in float64, to show that the result is right.

Run it:  python examples/long_sequence.py [--length L] [--head-dim 64] [--backend NAME] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout works without an install

from cupyflash import attention, flops

INTERVAL = 0.1  # seconds between two looks at the memory
FULL = 1.5  # the weights of the default length, in memories of the machine
CHECKED = 8  # rows computed once more
MIB, GIB = 2**20, 2**30


class Machine:
    """Where the arrays lie, and how much memory is there and in use: this process's, or the GPU's."""

    def __init__(self, backend: str | None) -> None:
        self.name = "GPU" if backend == "cuda" else "machine"
        if backend == "cuda":
            import cupy

            self.xp: Any = cupy
        else:
            self.xp = np

    @property
    def total(self) -> int:
        """Bytes."""
        return self.xp.cuda.runtime.memGetInfo()[1] if self.xp is not np else psutil.virtual_memory().total

    @property
    def in_use(self) -> int:
        """Bytes."""
        if self.xp is np:
            return psutil.Process().memory_info().rss
        free, total = self.xp.cuda.runtime.memGetInfo()
        return total - free

    def wait(self) -> None:
        """Until the GPU is done; the CPU is."""
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()


class Watch:
    """Reads the memory in use from a thread of its own, while it is entered, and moves a bar along."""

    def __init__(self, machine: Machine, expected_seconds: float) -> None:
        self.times: list[float] = []
        self.bytes: list[int] = []
        self._machine = machine
        self._bar = tqdm(total=expected_seconds, unit="s", bar_format="{l_bar}{bar}| {n:.0f} of about {total:.0f} s")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._started = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()
            self._bar.update(min(self.times[-1], self._bar.total) - self._bar.n)

    def _look(self) -> None:
        self.times.append(time.perf_counter() - self._started)
        self.bytes.append(self._machine.in_use)


def seconds_of(call: Callable[[], Any], machine: Machine) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    machine.wait()
    return time.perf_counter() - started


def error_of_rows(out: Any, query: Any, key: Any, value: Any, rows: Any) -> float:
    """The largest difference of some rows of `out` from softmax(q Kᵀ / √E) V in float64."""
    largest = 0.0
    for row in rows:
        scores = key.astype(np.float64) @ query[row].astype(np.float64) / query.shape[1] ** 0.5
        weights = np.exp(scores - scores.max())
        exact = weights @ value.astype(np.float64) / weights.sum()
        largest = max(largest, float(abs(out[row] - exact).max()))
    return largest


def save_figure(
    watch: Watch, added: npt.NDArray[np.float64], machine: Machine, weights: int, result: int, path: Path
) -> None:
    """Draw the memory in use beside what there is and what the weights would take; and what the call added."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.semilogy(watch.times, np.divide(watch.bytes, GIB), label="in use during the call")
    left.axhline(machine.total / GIB, color="black", label=f"this {machine.name}'s memory")
    left.axhline(weights / GIB, color="tab:red", linestyle="--", label="the weights alone")
    left.set(xlabel="seconds", ylabel="GiB", title="Memory", ylim=(None, 4 * max(weights, machine.total) / GIB))
    left.legend(loc="center right")
    right.plot(watch.times, added, label="added by the call")
    right.axhline(result / MIB, color="tab:green", linestyle="--", label="the result")
    right.set(xlabel="seconds", ylabel="MiB", title="What the call added", ylim=(0, None))
    right.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Attention on a sequence whose weights would not fit into memory.")
    parser.add_argument("--length", type=int, metavar="L", help="queries and keys (weights of 1.5 memories)")
    parser.add_argument("--head-dim", type=int, metavar="E", default=64, help="(64)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the numbers (0)")
    parser.add_argument("--backend", metavar="NAME", help='of attention; "cuda" works on the GPU, on CuPy arrays')
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path(__file__).parent / "output",
        help="of the PNG (examples/output)",
    )
    given = parser.parse_args(arguments)
    for name in ("length", "head_dim"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected 1 or more")

    machine = Machine(given.backend)
    length = given.length or 1024 * int(-(-((FULL * machine.total / 4) ** 0.5) // 1024))
    weights = 4 * length**2
    print(f"sequence  {length:,} queries and keys of {given.head_dim} numbers, float32")
    print(f"weights   {weights / GIB:,.2f} GiB; this {machine.name} has {machine.total / GIB:,.2f} GiB")

    rng = np.random.default_rng(given.seed)
    on_host = [rng.standard_normal((length, given.head_dim), dtype=np.float32) for _ in range(3)]
    query, key, value = (machine.xp.asarray(array) for array in on_host)

    before = machine.in_use
    # A part of the queries tells how long all will take.
    part = query[: max(1, length // 64)]
    attention(part, key, value, backend=given.backend)
    expected = seconds_of(lambda: attention(part, key, value, backend=given.backend), machine) * length / len(part)
    with Watch(machine, expected) as watch:
        out = attention(query, key, value, backend=given.backend)
        machine.wait()
    added = np.subtract(watch.bytes, before) / MIB  # the calls on a part have already made what threads work with
    seconds = watch.times[-1]

    out = out if machine.xp is np else out.get()
    error = error_of_rows(out, *on_host, rng.integers(length, size=CHECKED))
    path = given.output / f"long-sequence-{length}.png"
    save_figure(watch, added, machine, weights, out.nbytes, path)
    print(f"time      {seconds:.2f} s, {flops(query.shape, key.shape) / seconds / 1e9:.0f} GFLOP/s")
    print("memory    second       in use      added")
    for index in np.unique(np.linspace(0, len(added) - 1, 9).round().astype(int)):
        print(f"          {watch.times[index]:6.1f} {watch.bytes[index] / MIB:8.1f} MiB {added[index]:6.1f} MiB")
    print(f"added     {added.max():.1f} MiB at most, of which the result is {out.nbytes / MIB:.1f} MiB")
    print(f"error     {error:.1e} at most in {CHECKED} rows, from the formula in float64")
    print(f"picture   {path}")


if __name__ == "__main__":
    main()
