"""Measure cupyflash on the CPU against NumPy that materialises the scores and, where installed, PyTorch.

    python benchmarks/bench_cpu.py [--cases GLOB] [--quick] [--no-torch] [--out FILE.json]

Figures are ratios within one run.  Two BLAS or OpenMP thread pools in one process disturb each other, so
every implementation has a process of its own, on the same cores, and they take turns (A-B-C-A-B-C…): what
else the machine does meets all of them.  A row's time is the least of all samples; the spread is kept.
`taskset` chooses the cores.  On a busy machine the figures mean nothing: a thread that waits for a core which
another program holds can make a call of 20 µs take 8 ms in every sample of a run, whoever's call it is.

Before it is timed, each result is checked: some rows of it, against the float64 formula, by the rule of
`cupyflash.testing`.  Extra memory is what the first call of a fresh process allocates at its peak besides the
result, as tracemalloc sees it; PyTorch's allocations it does not see.

A complete run writes benchmarks/results/cpu-<machine>.json and .png; `tables.py` puts them into the docs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measure the checkout around this file

from baselines import PREPARE, count_cores
from workloads import WORKLOADS, Workload

from cupyflash.backends import blas
from cupyflash.testing import assert_attention_close, oracle

Array: TypeAlias = npt.NDArray[Any]
Report: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 3
TURN_SECONDS, QUICK_TURN_SECONDS = 0.5, 0.2
SAMPLE_SECONDS = 1e-3  # calls shorter than this are timed several at a time
PAUSE_SECONDS = 0.05  # until the threads of the one whose turn is over have stopped spinning
BUSY_LOAD = 0.5  # threads that ran on average of the minute before the run
CHECKED_ROWS = 8  # the first of the first batch entry, and the last of the last


# --- in the worker ---------------------------------------------------------------------------------------


def serve(workload: Workload, implementation: str) -> None:
    """Check and weigh one call, and tell stdout; then answer each number of seconds on stdin with samples."""
    workload = workload.as_run_by(implementation)
    arguments = workload.arguments()
    call = PREPARE[implementation](**arguments)
    tracemalloc.start()
    out = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    extra = None if implementation == "torch" else peak - out.nbytes
    print(json.dumps({"extra_bytes": extra, "error": check(out, **arguments)}), flush=True)
    del out
    for line in sys.stdin:
        print(json.dumps(take_samples(call, float(line))), flush=True)


def check(out: Array, **arguments: Any) -> float:
    """Raise AssertionError if `out` is wrong; return the largest error against float64 of the rows looked at.

    A few query rows with all keys are a small attention of their own; its diagonal is shifted by their start.
    """
    batch_size, _, seqlen_q, _ = arguments["query"].shape
    last = max(0, seqlen_q - CHECKED_ROWS)
    places = {(0, 0), (batch_size - 1, last)}
    if arguments.get("dropout_p"):
        places = {(0, 0)}  # its mask hangs on the place, which only the first rows keep
    error = 0.0
    for b, start in places:
        rows = slice(start, start + CHECKED_ROWS)
        part = {**arguments, "query": arguments["query"][b : b + 1, :, rows], "align": start}
        part |= {name: arguments[name][b : b + 1] for name in ("key", "value")}
        part["attn_mask"] = rows_of_mask(arguments["attn_mask"], b, rows)
        if "score_mod" in arguments:
            part["score_mod"] = shift_queries(arguments["score_mod"], start)
        result = out[b : b + 1, :, rows]
        blas.one_blas_thread.run(partial(assert_attention_close, result, part))  # all workers check at the same time
        exact = oracle(**part).out
        error = max(error, float(np.abs(result.astype(exact.dtype) - exact).max()))
    return error


def rows_of_mask(mask: Array | None, b: int, rows: slice) -> Array | None:
    """The part of an (L, S) or (batch, 1, 1, S) mask for some rows of one batch entry."""
    if mask is None:
        return None
    return mask[rows] if mask.ndim == 2 else mask[b : b + 1]


def shift_queries(score_mod: Callable[..., Any], start: int) -> Callable[..., Any]:
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx + start, kv_idx)


def take_samples(call: Callable[[], Array], seconds: float) -> list[float]:
    """Return seconds per call, sample by sample, for about so many seconds."""
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    if first >= seconds:
        return [first]
    # A short call's first run finds cold caches, and only says how many make a sample.
    number = math.ceil(SAMPLE_SECONDS / first)
    samples = []
    until = started + seconds
    while not samples or time.perf_counter() < until:
        started = time.perf_counter()
        for _ in range(number):
            call()
        samples.append((time.perf_counter() - started) / number)
    return samples


# --- in the parent ---------------------------------------------------------------------------------------


class Worker:
    """A process of its own for one implementation of one workload."""

    def __init__(self, workload: Workload, implementation: str) -> None:
        self.implementation = implementation
        self.samples: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", workload.name, implementation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate()

    def read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.implementation}: the worker ended with status {self._process.wait()}")
        return json.loads(line)

    def take_turn(self, seconds: float) -> None:
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self.samples += self.read()
        time.sleep(PAUSE_SECONDS)


def measure(workload: Workload, with_torch: bool, seconds: float) -> Report:
    """Return one row of the report."""
    others = [name for name in workload.others if with_torch or name != "torch"]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(workload, name)) for name in ("cupyflash", *others)]
        first = {worker.implementation: worker.read() for worker in workers}
        for _ in range(ROUNDS):
            for worker in workers:
                worker.take_turn(seconds)
    least = {worker.implementation: min(worker.samples) for worker in workers}
    return {
        "name": workload.name,
        "section": workload.section,
        "note": workload.note,
        "seconds": {worker.implementation: summarize(worker.samples) for worker in workers},
        "ratios": {name: least[name] / least["cupyflash"] for name in others},
        "targets": dict(workload.targets),
        "target_seconds": workload.target_seconds,
        "extra_bytes": {name: told["extra_bytes"] for name, told in first.items()},
        "error": {name: told["error"] for name, told in first.items()},
    }


def summarize(samples: Sequence[float]) -> Report:
    return {
        "min": min(samples),
        "median": statistics.median(samples),
        "max": max(samples),
        "samples": len(samples),
    }


def describe_row(row: Report) -> str:
    """One line: our time and spread, each ratio with its target, extra memory, largest error."""
    ours = row["seconds"]["cupyflash"]
    target = f" (target ≤ {1e6 * row['target_seconds']:.0f} µs)" if row["target_seconds"] else ""
    cells = [f"{format_seconds(ours['min']):>9}{target} … {format_seconds(ours['median'])} median"]
    for name, ratio in row["ratios"].items():
        target = row["targets"].get(name)
        cells.append(f"{name} {ratio:.2f}×" + (f" ({verdict(ratio, target)} {target})" if target else ""))
    mebibytes = {name: size / 2**20 for name, size in row["extra_bytes"].items() if size is not None}
    cells.append("MiB " + ", ".join(f"{name} {size:.1f}" for name, size in mebibytes.items()))
    cells.append(f"error {row['error']['cupyflash']:.1e}")
    return f"{row['name']:<44}" + " | ".join(cells)


def verdict(ratio: float, target: float) -> str:
    return "≥" if ratio >= target else "MISSES"


def format_seconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def describe_machine() -> Report:
    blas_of_numpy = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index, call-overload]
    control = blas.control()
    return {
        "cpu": cpu_model(),
        "cores": count_cores(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas_of_numpy['name']} {blas_of_numpy['version']}",
        "blas_threads_set_by": Path(control.library).name if control else None,
        "simd": np.show_config(mode="dicts")["SIMD Extensions"]["found"],  # type: ignore[index, call-overload]
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": importlib.metadata.version("torch") if importlib.util.find_spec("torch") else None,
    }


def short_name(machine: Report) -> str:
    """The machine in a file's name: "amd-epyc-2-cores"."""
    cpu = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{cpu}-{machine['cores']}-cores"


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """What git says about the checkout; None where it is not one."""
    try:
        return subprocess.check_output(
            ["git", "-C", str(ROOT), *arguments], text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plot(report: Report, path: Path) -> None:
    """Write the ratios as bars, with a tick at each target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["results"] if row["section"] == "speed"][::-1]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    height = 0.38
    for offset, name, label, color in (
        (height / 2, "numpy", "NumPy, materialising", "#4878a8"),
        (-height / 2, "torch", "PyTorch CPU", "#e08a3c"),
    ):
        places = [(y, row) for y, row in enumerate(rows) if name in row["ratios"]]
        if not places:
            continue
        axes.barh(
            [y + offset for y, _ in places],
            [row["ratios"][name] - 1 for _, row in places],
            height,
            left=1,
            label=label,
            color=color,
        )
        for y, row in places:
            if target := row["targets"].get(name):
                axes.plot([target] * 2, [y + offset - height / 2, y + offset + height / 2], "k-", lw=1.5)
    axes.plot([], [], "k-", lw=1.5, label="target")
    axes.axvline(1, color="k", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("time of the other / time of cupyflash (right of 1×: cupyflash is faster)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")
    machine = report["machine"]
    axes.set_title(f"{machine['cpu']}, {machine['cores']} cores, NumPy {machine['numpy']}", fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure cupyflash on the CPU.")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="rows whose name matches")
    parser.add_argument("--quick", action="store_true", help="fewer rows and samples: under a minute")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go; the plot beside it")
    parser.add_argument("--worker", nargs=2, metavar=("ROW", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        name, implementation = given.worker
        serve(next(workload for workload in WORKLOADS if workload.name == name), implementation)
        return

    chosen = [w for w in WORKLOADS if fnmatch(w.name, given.cases) and (w.quick or not given.quick)]
    if not chosen:
        parser.error(f"--cases {given.cases}: matches none of {[w.name for w in WORKLOADS]}")
    machine = describe_machine()
    with_torch = machine["torch"] is not None and not given.no_torch
    seconds = QUICK_TURN_SECONDS if given.quick else TURN_SECONDS
    report: Report = {
        "machine": machine,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/bench_cpu.py", *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "cupyflash", "benchmarks", ":!benchmarks/results")),
        "rounds": ROUNDS,
        "turn_seconds": seconds,
        "results": [],
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items() if name != "simd"))
    print("ratio = time of the other / time of cupyflash; least of all samples")
    if machine["load_average"] and machine["load_average"] > BUSY_LOAD:
        print(f"the machine is busy (load average {machine['load_average']:.2f}): do not publish these figures")
    with tqdm(chosen, unit="row") as progress:
        for workload in progress:
            progress.set_postfix_str(workload.name)
            report["results"].append(measure(workload, with_torch, seconds))
            progress.write(describe_row(report["results"][-1]))

    out = given.out
    if out is None and len(chosen) == len(WORKLOADS) and with_torch:
        out = RESULTS / f"cpu-{short_name(machine)}.json"
    if out is None:
        print("not written: --out was not given, and this was not a complete run")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plot(report, out.with_suffix(".png"))
    print(f"written: {out} and {out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
