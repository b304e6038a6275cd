"""Measure cupyflash on a GPU against the backends of PyTorch's SDPA: cuDNN, flash, efficient.

    python benchmarks/bench_gpu.py [--cases GLOB] [--rounds 9] [--seconds N] [--with flex,jax,pallas] [--out FILE.json]

A draft: what needs no GPU is tested, but nobody has run it on one yet.

All run in one process, on one stream, on the same memory (CuPy sees PyTorch's tensors through DLPack), and take turns
(A-B-C-D, D-C-B-A…), so that what the clocks do meets all of them; at least 0.3 s of work comes before the first
sample.  A yardstick takes turns with them: a large product of PyTorch's in the same dtype, or a large copy.  Inputs
are normal random numbers: zeros use less power and run faster.  A sample is the time between two events around as many
calls as take about 20 ms, so it includes what a host that cannot keep up costs; the clock and the power are read while
the GPU works on it.  Where a case reads each byte about once, the operands rotate over more memory than twice the L2
cache, and replays of a CUDA graph of all those calls are timed.  A ratio is the other's time over ours in the same
round; its median and quartiles are kept.

A line for each row tells how far it is; a bar would have the host do something else while it is timed.

Before it is timed, each result is checked: some rows of the first and the last head against the float64 formula by
the rule of `cupyflash.testing`, and all of it for NaN.  An implementation that refuses a case or fails the check is
left out of it, with the reason; if it is ours, the exit status is 1.

Last comes the host: the time until a call of small operands returns to Python, ours on CuPy arrays and PyTorch's, and
the time of replaying it as a graph.

benchmarks/results/gpu-<device>.json is rewritten after each case, and at the end a plot is laid beside it; `tables.py`
puts them into the docs, `roofline.py --results` compares them with what the pipes would allow.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measure the checkout around this file

from clocks import Clocks, summarize_clocks
from gpu_baselines import (
    EXTRA,
    OURS,
    YARDSTICKS,
    Call,
    as_only_backend,
    call_of,
    fresh_call,
    operands_of,
    to_numpy,
    why_not,
    work_of,
)
from gpu_workloads import CASES, FEATURES, HOST_CASES, UNCHECKED, Case

import cupyflash
from cupyflash.testing import acceptance
from tests.gpu.device import NO_GPU, Gpu, find_gpu

Report: TypeAlias = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WARM_SECONDS = 0.1  # of each; there are three at least
SAMPLE_SECONDS = 0.02
ROUNDS = 9
CHECKED_ROWS = 4  # the first of the first head, the last of the last
HOST_CALLS = 200  # in flight at once: the driver takes about a thousand launches before it makes the host wait
HOST_ROUNDS = 15
# What any of the libraries raises where it can't, and what a check does.
FAILURES = (RuntimeError, ValueError, TypeError, MemoryError, AssertionError, cupyflash.CupyflashError)


# --- measuring, of anything that has a clock -----------------------------------------------------------------


def take_turns(
    samplers: Mapping[str, Callable[[], float]], rounds: int, ours: str = "cupyflash"
) -> tuple[dict[str, list[float]], dict[str, Report]]:
    """Samples of each, taken in turns, forwards and backwards; and of each other one the ratio to ours by round.

    Parameters
    ----------
    samplers : dict of str to callable
        A call takes one sample: seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for number in range(rounds):
        for name in list(samplers)[:: 1 if number % 2 == 0 else -1]:
            samples[name].append(samplers[name]())
    ratios = {
        name: summarize([theirs / mine for theirs, mine in zip(taken, samples[ours], strict=True)])
        for name, taken in samples.items()
        if ours in samples and name not in (ours, *YARDSTICKS)
    }
    return samples, ratios


def summarize(values: Sequence[float]) -> Report:
    """Median, quartiles and number."""
    low, median, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    return {"median": median, "low": low, "high": high, "samples": len(values)}


def row_of(
    case: Case,
    samples: Mapping[str, list[float]],
    ratios: Report,
    refused: Mapping[str, str],
    clocks: Mapping[str, float] | None = None,
) -> Report:
    """One row of the report."""
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    unit = "GB/s" if case.reads_once else "TFLOP/s"
    rates = {
        "TFLOP/s": {name: work_of(name, case)[0] / seconds / 1e12 for name, seconds in medians.items()},
        "GB/s": {name: work_of(name, case)[1] / seconds / 1e9 for name, seconds in medians.items()},
    }
    yardstick = next((name for name in YARDSTICKS if name in medians), None)
    return {
        "name": case.name,
        "section": "feature" if case.feature and not case.model else "speed",
        "shapes": case.shapes,
        "dtype": case.dtype,
        "seconds": {name: summarize(taken) for name, taken in samples.items()},
        "unit": unit,
        **rates,
        "yardstick": yardstick,
        "of_yardstick": {
            name: rate / rates[unit][yardstick] for name, rate in rates[unit].items() if yardstick and name != yardstick
        },
        "ratios": dict(ratios),
        "clocks": dict(clocks or {}),
        "refused": dict(refused),
    }


def describe_row(row: Report) -> str:
    """One line: the rates of all, ours as a part of the yardstick's; ratios with their quartiles."""
    unit = row["unit"]
    rates = ", ".join(f"{name} {value:.0f}" for name, value in row[unit].items())
    share = row["of_yardstick"].get("cupyflash")
    part = "" if share is None else f" ({share:.0%} of {row['yardstick']})"
    ratios = ", ".join(
        f"{name} {r['median']:.2f}× ({r['low']:.2f} to {r['high']:.2f})" for name, r in row["ratios"].items()
    )
    clock = f"; {row['clocks']['sm_mhz']:.0f} MHz" if "sm_mhz" in row["clocks"] else ""
    refused = "".join(f"\n    {name} is left out: {reason}" for name, reason in row["refused"].items())
    return f"{row['name']:<40} {rates} {unit}{part}; {ratios}{clock}{refused}"


# --- on the GPU ----------------------------------------------------------------------------------------------


def check(out: Any, case: Case, operands: tuple[Any, Any, Any], torch: Any) -> None:
    """Raises AssertionError if the output is wrong where we look."""
    checker(case, operands, torch)(out)


def checker(case: Case, operands: tuple[Any, Any, Any], torch: Any) -> Callable[[Any], None]:
    """`check` for the outputs of several implementations: what they must be is computed once.

    A few query rows with all keys are a small attention of their own; its diagonal is shifted by their start.
    """
    group = case.heads[0] // case.heads[1]
    last = max(0, case.seqlen_q - CHECKED_ROWS)
    judges: list[tuple[tuple[int, int, slice], Callable[[Any, str | None], None]]] = []
    for b, h, start in [] if case.feature in UNCHECKED else {(0, 0, 0), (case.batch - 1, case.heads[0] - 1, last)}:
        rows = slice(start, start + CHECKED_ROWS)
        query, key, value = (
            to_numpy(x, torch) for x in (operands[0][b, h, rows], *(x[b, h // group] for x in operands[1:]))
        )
        part = {"query": query, "key": key, "value": value, "is_causal": case.is_causal, "align": start}
        if case.feature:
            part |= FEATURES[case.feature](case, b, h, rows)
        judges.append(((b, h, rows), acceptance(part)))

    def judge(out: Any) -> None:
        if not bool(torch.isfinite(out).all()):
            raise AssertionError(f"{case.name}: the output has NaN or infinities")
        for place, accept in judges:
            accept(to_numpy(out[place], torch), None)

    return judge


class CudaStream(NamedTuple):
    """A stream by CUDA's protocol, which not every release of PyTorch speaks."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def in_graph(call: Call, count: int, torch: Any) -> Call:
    """Replays so many calls, of one set of operands each, as one graph."""
    import cupy

    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), cupy.cuda.Stream.from_external(CudaStream(stream.cuda_stream)):
        for number in range(count):  # what a first call on a stream allocates can't be allocated in a capture
            call(number)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for number in range(count):
                call(number)
    torch.cuda.synchronize()
    return lambda number: graph.replay()


def warm_up(name: str, call: Call, torch: Any, seconds: float = WARM_SECONDS) -> int:
    """Keeps the GPU busy for so long; returns how many calls make a sample."""
    with as_only_backend(name, torch):
        started = time.perf_counter()
        calls = 0
        while time.perf_counter() - started < seconds:
            call(calls)
            calls += 1
            torch.cuda.synchronize()
        each = (time.perf_counter() - started) / calls
    return max(1, round(SAMPLE_SECONDS / each))


def sampler(name: str, call: Call, calls: int, torch: Any, watch: Callable[[], None]) -> Callable[[], float]:
    """Takes a sample: seconds for a call.  `watch` is called while the GPU works."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        with as_only_backend(name, torch):
            call(0)  # the first after another's turn finds the instruction cache cold
            start.record()
            for number in range(calls):
                call(number)
            end.record()
            watch()
            end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    return sample


def measure(case: Case, gpu: Gpu, rounds: int, torch: Any, clocks: Clocks, extra: Sequence[str] = ()) -> Report:
    """One row of the report."""
    sets = operands_of(case, case.sets(gpu.l2_bytes), torch)
    refused: dict[str, str] = {}
    samplers: dict[str, Callable[[], float]] = {}
    seen: list[dict[str, float]] = []
    names = ["cupyflash", *case.others] if case.others else list(OURS)
    bare = replace(case, feature="")
    right = {"plain": checker(bare, sets[0], torch)} if "plain" in names else {}
    right_for_all = checker(case, sets[0], torch)
    for name in [*names, *extra, "copy" if case.reads_once else "gemm"]:
        if name in EXTRA and (reason := why_not(name, case)):
            refused[name] = reason
            continue
        try:
            call, count = call_of(name, bare if name == "plain" else case, sets, torch), 1
            with as_only_backend(name, torch):
                if name not in YARDSTICKS:
                    right.get(name, right_for_all)(call(0))
                if case.reads_once and name not in YARDSTICKS:
                    call, count = in_graph(call, len(sets), torch), len(sets)
        except FAILURES as error:
            refused[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        calls = warm_up(name, call, torch)
        timed = sampler(name, call, calls, torch, lambda: seen.append(clocks.sample()))
        samplers[name] = _shared(timed, count)
    samples, ratios = take_turns(samplers, rounds)
    return row_of(case, samples, ratios, refused, summarize_clocks(seen))


def _shared(timed: Callable[[], float], count: int) -> Callable[[], float]:
    """The time of one of `count` calls."""
    return lambda: timed() / count


def measure_host(name: str, case: Case, rounds: int, torch: Any) -> Report:
    """One row of the report: the time until a call returns, and until all of many calls are done."""
    sets = operands_of(case, 1, torch)
    calls = {
        "cupyflash": fresh_call(case, sets, torch),
        "cupyflash, out=": call_of("cupyflash", case, sets, torch),
        "torch": call_of("torch", case, sets, torch),
    }
    calls["graph replay"] = in_graph(calls["cupyflash, out="], 1, torch)
    done: dict[str, list[float]] = {which: [] for which in calls}

    def timer(which: str) -> Callable[[], float]:
        def sample() -> float:
            returned, finished = time_host(calls[which], HOST_CALLS, torch.cuda.synchronize)
            done[which].append(finished)
            return returned

        return sample

    samples, ratios = take_turns({which: timer(which) for which in calls}, rounds)
    return {
        "name": name,
        "section": "host",
        "shapes": case.shapes,
        "dtype": case.dtype,
        "seconds": {which: summarize(taken) for which, taken in samples.items()},
        "until_done": {which: summarize(taken) for which, taken in done.items()},
        "ratios": ratios,
        "refused": {},
    }


def time_host(
    call: Call, calls: int, synchronize: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds for a call: until it returns, and until the GPU has done all of them."""
    call(0)
    synchronize()
    started = clock()
    for number in range(calls):
        call(number)
    returned = clock()
    synchronize()
    return (returned - started) / calls, (clock() - started) / calls


def describe_host(row: Report) -> str:
    """One line: microseconds for a call, until it returns and until it is done."""
    times = ", ".join(
        f"{which} {1e6 * told['median']:.1f} µs ({1e6 * row['until_done'][which]['median']:.1f} until done)"
        for which, told in row["seconds"].items()
    )
    return f"host, {row['name']}: {times}"


def describe_machine(gpu: Gpu, torch: Any) -> Report:
    return {
        **gpu.versions,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


def git(*words: str) -> str:
    answer = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def what_is_missing() -> tuple[Gpu | None, str]:
    """The GPU and "", or None and the reason."""
    gpu, reason = find_gpu()
    if gpu is None:
        return None, reason
    try:
        import torch
    except ImportError as error:
        return None, f"PyTorch, which is compared with, cannot be imported ({error})"
    if not torch.cuda.is_available():
        return None, f"PyTorch {torch.__version__} cannot use the GPU"
    if "cuda" not in cupyflash.backends():
        return None, f"this cupyflash has no backend 'cuda', only {', '.join(cupyflash.backends())}"
    return gpu, ""


def plot(report: Report, path: Path) -> None:
    """Write the ratios as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["results"] if row["section"] == "speed" and row["ratios"]][::-1]
    figure = Figure(figsize=(9, 1.6 + 0.45 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    height = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        places = [
            (y + 0.4 - height * (number + 0.5), row["ratios"][name])
            for y, row in enumerate(rows)
            if name in row["ratios"]
        ]
        medians = np.array([ratio["median"] for _, ratio in places])
        spread = np.array([[ratio["median"] - ratio["low"], ratio["high"] - ratio["median"]] for _, ratio in places])
        axes.barh([y for y, _ in places], medians - 1, height, left=1, xerr=spread.T, label=name)
    axes.axvline(1, color="k", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("time of the other / time of cupyflash (right of 1×: cupyflash is faster)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if names:
        axes.legend(loc="lower right")
    axes.set_title(f"{report['machine']['name']}, PyTorch {report['machine']['torch']}", fontsize=10)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure attention on a GPU.")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="only the cases whose name matches")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no case after so long")
    extra = "; ".join(f"{name}: {what}" for name, (_, what) in EXTRA.items())
    parser.add_argument("--with", dest="extra", default="", metavar="NAMES", help=f"others beside SDPA's. {extra}")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    given = parser.parse_args(arguments)
    cases = [case for case in CASES if fnmatch(case.name, given.cases)]
    hosts = {name: case for name, case in HOST_CASES.items() if fnmatch(f"host: {name}", given.cases)}
    if not cases and not hosts:
        names = [*(case.name for case in CASES), *(f"host: {name}" for name in HOST_CASES)]
        parser.error(f"--cases {given.cases!r} matches none of: {'; '.join(names)}")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: at least 1 is needed")
    named = [name for name in given.extra.split(",") if name]
    if unknown := [name for name in named if name not in EXTRA]:
        parser.error(f"--with names {', '.join(map(repr, unknown))}; expected some of {', '.join(EXTRA)}")
    gpu, reason = what_is_missing()
    if gpu is None:
        print(f"nothing can be measured: {reason}", file=sys.stderr)
        return NO_GPU
    import cupy
    import torch

    out = given.out or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    clocks = Clocks(cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id))
    report: Report = {
        "machine": describe_machine(gpu, torch),
        "clocks": {"before": clocks.sample()},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--", "cupyflash", "kernels_cu", "benchmarks", ":!benchmarks/results")
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(
            ["python", "benchmarks/bench_gpu.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "not_reached": [],
        "results": [],
    }

    def keep(row: Report, line: str) -> None:
        report["results"].append(row)
        report["clocks"]["after"] = clocks.sample()
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(line, flush=True)

    started = time.monotonic()
    stream = torch.cuda.current_stream()
    with cupy.cuda.Stream.from_external(CudaStream(stream.cuda_stream)):
        for name, case in hosts.items():
            row = measure_host(name, case, HOST_ROUNDS, torch)
            keep(row, describe_host(row))
        for case in cases:
            if given.seconds is not None and time.monotonic() - started > given.seconds:
                report["not_reached"].append(case.name)
                continue
            row = measure(case, gpu, given.rounds, torch, clocks, named)
            keep(row, describe_row(row))
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if report["not_reached"]:
        print(f"not reached in {given.seconds:g} s: {'; '.join(report['not_reached'])}")
    try:
        plot(report, out.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"written to {out}")
    return 1 if any("cupyflash" in row["refused"] for row in report["results"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
