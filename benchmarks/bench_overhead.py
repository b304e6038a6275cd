"""Measure the Python time of a call on CuPy arrays: from entering `attention` to the launch, and back.

    python benchmarks/bench_overhead.py [--cases GLOB] [--quick] [--out FILE.json]

No GPU is needed, and none is used: a stand-in takes CuPy's place, whose arrays answer at once and whose kernels do
nothing.  So the figures are the time of this library alone.  What CuPy takes for itself is not in them: attributes of
its arrays, allocation, the launch.  The rows of the emulator's path are NumPy's arrays, whose attributes and
allocations do count.

A sample is a run of calls, each with arrays of its own that were made before; a row's time is the least of all samples
per call.  A loop over growing lengths never repeats a length.  The rows of the first call are each one call of a fresh
process, NumPy and cupyflash imported: with an empty cache of compiled kernels, and with a filled one.

A complete run writes benchmarks/results/overhead-<machine>.json; `tables.py` puts it into the docs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measure the checkout around this file

from bench_cpu import BUSY_LOAD, RESULTS, describe_machine, format_seconds, git, short_name, summarize

from cupyflash import attention, mods
from cupyflash.backends import cuda, emulated
from cupyflash.backends.tensormap import emulated_map
from cupyflash.plan.device import DEVICES

Report: TypeAlias = dict[str, Any]

CALLS = 40  # of one sample: less than a millisecond, in which a busy machine may leave it alone
SAMPLES, QUICK_SAMPLES = 400, 10
FIRST_ROUNDS = 3
NOT_IN_IT = (
    "what CuPy itself takes, for its arrays' attributes, allocation and the launch, and the driver for new tensor "
    "maps, is not in these figures"
)


# --- a CuPy that costs nothing ---------------------------------------------------------------------------


class Device:
    """The one device, current always."""

    id = 0

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *args: object) -> None:
        pass


DEVICE = Device()


class Array:
    """A contiguous array without memory.  Its attributes are ready."""

    __slots__ = ("data", "device", "dtype", "flags", "itemsize", "ndim", "shape", "size", "strides")

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype, self.itemsize, self.ndim = shape, dtype, dtype.itemsize, len(shape)
        strides, step = [], dtype.itemsize
        for length in reversed(shape):
            strides.append(step)
            step *= length
        self.strides, self.size = tuple(reversed(strides)), step // dtype.itemsize
        self.flags, self.data, self.device = FLAGS, DATA, DEVICE


FLAGS, DATA = types.SimpleNamespace(writeable=True), types.SimpleNamespace(ptr=1 << 20)
OUT_DATA = types.SimpleNamespace(ptr=1 << 40)  # apart from all inputs


def install() -> None:
    """Put the stand-in into sys.modules as cupy: an H200 whose kernels do nothing, without a driver."""
    cuda.driver_map = emulated_map
    spec = DEVICES["H200"]
    properties = {
        "name": spec.name.encode(),
        "major": spec.cc[0],
        "minor": spec.cc[1],
        "multiProcessorCount": spec.sms,
        "sharedMemPerBlockOptin": spec.smem_per_block,
        "sharedMemPerMultiprocessor": spec.smem_per_sm,
        "l2CacheSize": spec.l2,
    }
    made: dict[tuple[Any, ...], Array] = {}

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        found = made.get((shape, dtype))
        if found is None:
            found = made[shape, dtype] = Array(shape, np.dtype(dtype))
        return found

    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty = Array, empty
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceProperties=lambda device_id: properties))
    cupy.RawModule = lambda path: types.SimpleNamespace(get_function=lambda name: NullKernel())
    sys.modules["cupy"] = cupy


class NullKernel:
    """A kernel whose launch does nothing."""

    max_dynamic_shared_size_bytes = 0

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, options: Any = None) -> None:
        pass


# --- rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes
    ----------
    name : unique; `--cases` chooses by it
    calls : the keyword arguments of one call after the other, without end
    target_seconds : the most that a call may take
    emulated : on NumPy arrays, through the emulator's path
    """

    name: str
    calls: Callable[[Callable[..., Any]], Iterator[dict[str, Any]]]
    target_seconds: float | None = None
    emulated: bool = False


def same(make: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The same prefill again."""
    arrays = operands(make, (2, 16, 2048, 128), (2, 16, 2048, 128))
    while True:
        yield {**arrays, "is_causal": True}


def elsewhere(make: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The same prefill on arrays that no call has seen: only their addresses are new."""
    address = 1 << 20
    while True:
        arrays = operands(make, (2, 16, 2048, 128), (2, 16, 2048, 128))
        for array in arrays.values():
            address += 1 << 24
            array.data = types.SimpleNamespace(ptr=address)
        yield {**arrays, "is_causal": True}


def modded(make: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The same prefill again, with a score_mod and a mask_mod that are new objects of a known structure."""
    arrays = operands(make, (2, 16, 2048, 128), (2, 16, 2048, 128))
    slopes = make((16,), np.dtype(np.float32))
    while True:
        yield {**arrays, "score_mod": mods.alibi(slopes), "mask_mod": mods.sliding_window(256)}


def decode(out: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Iterator[dict[str, Any]]]:
    """One token after another: 32 query heads share 8 key heads, and there is one key more at each call."""

    def calls(make: Callable[..., Any]) -> Iterator[dict[str, Any]]:
        seqlen_k = 1000
        while True:
            seqlen_k += 1
            arrays = operands(make, (4, 32, 1, 128), (4, 8, seqlen_k, 128))
            if out:
                arrays["out"] = make((4, 32, 1, 128), np.dtype(np.float16))
                arrays["out"].data = OUT_DATA
            yield {**arrays, "is_causal": True, "align": "bottom_right", "enable_gqa": True, **options}

    return calls


def prefill(make: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Prompts of different lengths."""
    length = 500
    while True:
        length += 1
        yield {**operands(make, (1, 16, length, 128), (1, 16, length, 128)), "is_causal": True}


def operands(make: Callable[..., Any], query: tuple[int, ...], key: tuple[int, ...]) -> dict[str, Any]:
    dtype = np.dtype(np.float16)
    return {"query": make(query, dtype), "key": make(key, dtype), "value": make(key, dtype)}


ROWS = (
    Row("same call again", same, 15e-6),
    Row("the same on other arrays", elsewhere),
    Row("decode, S + 1 each call", decode(), 15e-6),
    Row("decode, S + 1 each call, out= and lse", decode(out=True, return_lse=True)),
    Row("prefill, another L each call", prefill),
    Row("prefill with a score_mod and a mask_mod", modded),
    Row("emulator's path: same call again", same, emulated=True),
    Row("emulator's path: decode, S + 1 each call", decode(), emulated=True),
)
FIRST_CALLS = {"first call, kernel compiled": 1.0, "first call, kernel on disk": 50e-3}


def measure(row: Row, samples: int) -> Report:
    """Return one row of the report."""
    backend = "emulator" if row.emulated else None
    arguments = row.calls(np.empty if row.emulated else Array)
    for _ in range(20):
        attention(**next(arguments), backend=backend)
    seconds = []
    for _ in range(samples):
        sample = [{**next(arguments), "backend": backend} for _ in range(CALLS)]
        started = time.perf_counter()
        for keywords in sample:
            attention(**keywords)
        seconds.append((time.perf_counter() - started) / CALLS)
    return describe(row.name, seconds, row.target_seconds)


def describe(name: str, seconds: Sequence[float], target: float | None) -> Report:
    return {"name": name, "section": "overhead", "seconds": summarize(seconds), "target_seconds": target}


def measure_first_calls(names: Sequence[str]) -> list[Report]:
    """The first call of a process that finds nothing, and of the next one, which finds a compiled kernel."""
    seconds: dict[str, list[float]] = {name: [] for name in FIRST_CALLS}
    for _ in range(FIRST_ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            for taken in seconds.values():
                told = subprocess.check_output(
                    [sys.executable, __file__, "--worker"], env={**os.environ, "CUPYFLASH_CACHE": folder}, text=True
                )
                taken.append(float(told))
    return [describe(name, seconds[name], target) for name, target in FIRST_CALLS.items() if name in names]


def first_call() -> float:
    install()
    arguments = next(decode()(Array))
    started = time.perf_counter()
    attention(**arguments)
    return time.perf_counter() - started


def describe_row(row: Report) -> str:
    """One line: time with its target, and the median."""
    ours, target = row["seconds"], row["target_seconds"]
    judged = f" ({'≤' if ours['min'] <= target else 'MISSES'} {format_seconds(target)})" if target else ""
    return f"{row['name']:<44}{format_seconds(ours['min']):>9}{judged} … {format_seconds(ours['median'])} median"


def measure_rows(chosen: Sequence[str], samples: int) -> Iterator[Report]:
    for row in ROWS:
        if row.name in chosen:
            yield measure(row, samples)
    if any(name in chosen for name in FIRST_CALLS):
        yield from measure_first_calls(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the Python time of a call on CuPy arrays, without a GPU.")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="rows whose name matches")
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(first_call())
        return

    names = [row.name for row in ROWS] + list(FIRST_CALLS)
    chosen = [name for name in names if fnmatch(name, given.cases)]
    if not chosen:
        parser.error(f"--cases {given.cases}: matches none of {names}")
    machine = describe_machine()
    report: Report = {
        "machine": machine,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/bench_overhead.py", *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "cupyflash", "benchmarks", ":!benchmarks/results")),
        "not_in_it": NOT_IN_IT,
        "results": [],
    }
    print(f"Python time of a call with kernels that do nothing; {NOT_IN_IT}")
    if machine["load_average"] and machine["load_average"] > BUSY_LOAD:
        print(f"the machine is busy (load average {machine['load_average']:.2f}): do not publish these figures")
    install()
    emulated._kernel = lambda spec: NullKernel()  # type: ignore[assignment]  # nothing is compiled or run
    samples = QUICK_SAMPLES if given.quick else SAMPLES
    with tqdm(total=len(chosen), unit="row", disable=None) as progress:
        for measured in measure_rows(chosen, samples):
            report["results"].append(measured)
            progress.update()
            progress.write(describe_row(measured))

    out = given.out
    if out is None and chosen == names and not given.quick:
        out = RESULTS / f"overhead-{short_name(machine)}.json"
    if out is None:
        print("not written: --out was not given, and this was not a complete run")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
