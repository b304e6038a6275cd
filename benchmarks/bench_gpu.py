"""Measure cupyflash on a GPU against the backends of PyTorch's SDPA: cuDNN, flash, efficient.

    python benchmarks/bench_gpu.py [--cases GLOB] [--rounds 9] [--out FILE.json]

A draft: what needs no GPU is tested, but nobody has run it on one yet.

All run in one process, on one stream, on the same memory (CuPy sees PyTorch's tensors through DLPack), and take turns
(A-B-C-D, D-C-B-A…), so that what the clocks do meets all of them; at least 0.3 s of work comes before the first
sample.  Inputs are normal random numbers: zeros use less power and run faster.  Where a case reads each byte about
once, the operands rotate over more memory than twice the L2 cache.  A sample is the time between two events around
as many calls as take about 20 ms, so it includes what a host that cannot keep up costs.  A ratio is the other's time
over ours in the same round; its median and quartiles are kept.

Before it is timed, each result is checked: some rows of the first and the last head against the float64 formula by
the rule of `cupyflash.testing`, and all of it for NaN.  An implementation that refuses a case or fails the check is
left out of it, with the reason; if it is ours, the exit status is 1.

benchmarks/results/gpu-<device>.json is rewritten after each case; `tables.py` puts it into the README.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measure the checkout around this file

import cupyflash
from cupyflash import mods
from cupyflash.testing import DTYPES, assert_attention_close
from tests.gpu.device import NO_GPU, Gpu, find_gpu, nvidia_smi

Report: TypeAlias = dict[str, Any]
Call: TypeAlias = Callable[[int], Any]  # of the n-th set of operands; the output, as a tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WARM_SECONDS = 0.3
SAMPLE_SECONDS = 0.02
ROUNDS = 9
CHECKED_ROWS = 4  # at each end of the first and the last head
OURS = ("cupyflash", "plain")  # the second: without the feature that is measured
BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@dataclass(frozen=True)
class Case:
    """One forward pass.

    Attributes
    ----------
    heads : (int, int)
        Query heads and key-value heads.
    reads_once : bool
        Whether memory is what it waits for, so that the operands have to rotate.
    feature : str
        A key of `FEATURES`: then it is compared with our own call without it.
    """

    batch: int
    heads: tuple[int, int]
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "bfloat16"
    reads_once: bool = False
    feature: str = ""

    @property
    def name(self) -> str:
        """``"d128 causal 4096"``, with what is unusual about it."""
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        grouped = "" if self.heads[0] == self.heads[1] else f" {self.heads[0]}/{self.heads[1]} heads"
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        feature = f" {self.feature}" if self.feature else ""
        return f"d{self.head_dim} {'causal' if self.is_causal else 'full'} {length}{grouped}{dtype}{feature}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of queries, and of keys and values."""
        return (
            (self.batch, self.heads[0], self.seqlen_q, self.head_dim),
            (self.batch, self.heads[1], self.seqlen_k, self.head_dim),
        )

    @property
    def operations(self) -> int:
        query, key = self.shapes
        return cupyflash.flops(query, key, is_causal=self.is_causal, enable_gqa=self.heads[0] != self.heads[1])

    @property
    def bytes(self) -> int:
        """Of query, key, value and output: what must be moved at least."""
        return 2 * 2 * sum(math.prod(shape) for shape in self.shapes)

    def sets(self, l2_bytes: int) -> int:
        """How many sets of operands there must be."""
        return math.ceil(2 * l2_bytes / self.bytes) + 1 if self.reads_once else 1


def _lengths(case: Case) -> np.ndarray:
    """Keys of each batch entry: from all down to a quarter of them."""
    return np.linspace(case.seqlen_k, case.seqlen_k // 4, case.batch).astype(np.int64)


def _padding(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    keep = np.arange(case.seqlen_k) < _lengths(case)[:, None, None, None]
    return {"attn_mask": keep[b, 0] if b >= 0 else keep}


def _checkers(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """Three quarters of the keys, and of the tiles none empty or whole."""
    q_idx, kv_idx = np.ogrid[: case.seqlen_q, : case.seqlen_k]
    return {"attn_mask": ((q_idx + kv_idx) % 4 != 0)[rows]}


def _blocks(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """Documents of 512 tokens, as a bool mask: most tiles are empty, the others whole."""
    q_idx, kv_idx = np.ogrid[: case.seqlen_q, : case.seqlen_k]
    return {"attn_mask": (q_idx // 512 == kv_idx // 512)[rows]}


def _bias(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    bias = np.random.default_rng(0).standard_normal((case.heads[0], case.seqlen_q, case.seqlen_k), dtype=np.float32)
    return {"attn_mask": bias[h, rows] if h >= 0 else bias}


def _per_head(name: str, values: Callable[[int], np.ndarray]) -> Callable[[Case, int, int, slice], dict[str, Any]]:
    def arguments(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
        every = values(case.heads[0]).astype(np.float32)
        return {name: every[h : h + 1] if h >= 0 else every}

    return arguments


def _documents_mod(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """The mask of `_blocks` as a function."""
    start = rows.start or 0
    return {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx + start) // 512 == kv_idx // 512}


#: What is asked of a call beside queries, keys and values, as NumPy arrays: for all of it if b and h are -1, else for
#: some rows of one head.
FEATURES: dict[str, Callable[[Case, int, int, slice], dict[str, Any]]] = {
    "padding mask": _padding,
    "bool mask": _checkers,
    "document mask": _blocks,
    "float32 bias": _bias,
    "softcap": lambda case, b, h, rows: {"softcap": 30.0},
    "ALiBi": _per_head("alibi_slopes", lambda heads: 2.0 ** -np.linspace(1, 8, heads)),
    "softcap as a score_mod": lambda case, b, h, rows: {"score_mod": mods.tanh_softcap(30.0)},
    "document mask as a mask_mod": _documents_mod,
    "sinks": _per_head("sinks", lambda heads: np.linspace(-1, 1, heads)),
    "dropout": lambda case, b, h, rows: {"dropout_p": 0.1, "seed": 0},
}
# A few rows of it are no small call of their own: a weight is dropped by its place in the whole.
UNCHECKED = {"dropout"}
EVERYTHING = (-1, -1, slice(None))

TOKENS = 16384  # in a batch, as in FlashAttention's tables

CASES = (
    *(
        Case(TOKENS // length, (2048 // head_dim,) * 2, length, length, head_dim, is_causal)
        for head_dim in (64, 128)
        for is_causal in (False, True)
        for length in (1024, 4096, 16384)
    ),
    Case(4, (16, 16), 4096, 4096, 128, dtype="float16"),
    Case(4, (32, 8), 4096, 4096, 128, is_causal=True),
    Case(32, (32, 8), 1, 8192, 128, reads_once=True),
    *(Case(4, (16, 16), 4096, 4096, 128, feature=feature) for feature in FEATURES),
)


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
        if ours in samples and name != ours
    }
    return samples, ratios


def summarize(values: Sequence[float]) -> Report:
    """Median, quartiles and number."""
    low, median, high = (float(x) for x in np.percentile(values, [25, 50, 75]))
    return {"median": median, "low": low, "high": high, "samples": len(values)}


def row_of(case: Case, samples: Mapping[str, list[float]], ratios: Report, refused: Mapping[str, str]) -> Report:
    """One row of the report."""
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    return {
        "name": case.name,
        "section": "feature" if case.feature else "speed",
        "shapes": case.shapes,
        "dtype": case.dtype,
        "seconds": {name: summarize(taken) for name, taken in samples.items()},
        "unit": "GB/s" if case.reads_once else "TFLOP/s",
        "TFLOP/s": {name: case.operations / seconds / 1e12 for name, seconds in medians.items()},
        "GB/s": {name: case.bytes / seconds / 1e9 for name, seconds in medians.items()},
        "ratios": dict(ratios),
        "refused": dict(refused),
    }


def describe_row(row: Report) -> str:
    """One line: the rates of all; ratios with their quartiles."""
    unit = row["unit"]
    rates = ", ".join(f"{name} {value:.0f}" for name, value in row[unit].items())
    ratios = ", ".join(
        f"{name} {r['median']:.2f}× ({r['low']:.2f} to {r['high']:.2f})" for name, r in row["ratios"].items()
    )
    refused = "".join(f"\n    {name} is left out: {reason}" for name, reason in row["refused"].items())
    return f"{row['name']:<28} {rates} {unit}; {ratios}{refused}"


# --- on the GPU ----------------------------------------------------------------------------------------------


def operands_of(case: Case, count: int, torch: Any) -> list[tuple[Any, Any, Any]]:
    """So many sets of query, key and value, normal random numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, case.dtype)
    query, key = case.shapes
    return [
        tuple(
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
            for shape in (query, key, key)
        )
        for _ in range(count)
    ]


def our_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    import cupy

    arrays = [[cupy.from_dlpack(tensor) for tensor in operands] for operands in sets]
    result = torch.empty_like(sets[0][0])
    out = cupy.from_dlpack(result)
    options: dict[str, Any] = {"is_causal": case.is_causal, "enable_gqa": case.heads[0] != case.heads[1]}
    if case.feature:
        asked = FEATURES[case.feature](case, *EVERYTHING)
        options |= {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in asked.items()}

    def call(number: int) -> Any:
        cupyflash.attention(*arrays[number % len(arrays)], **options, out=out, backend="cuda")
        return result

    return call


def their_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    options: dict[str, Any] = {"is_causal": case.is_causal, "enable_gqa": case.heads[0] != case.heads[1]}
    function = torch.nn.functional.scaled_dot_product_attention

    def call(number: int) -> Any:
        return function(*sets[number % len(sets)], **options)

    return call


@contextmanager
def as_only_backend(name: str, torch: Any) -> Iterator[None]:
    """PyTorch's SDPA with one backend; ours runs as it is."""
    if name in OURS:
        yield
        return
    backend = getattr(torch.nn.attention.SDPBackend, BACKENDS[name])
    with torch.nn.attention.sdpa_kernel(backend):
        yield


def to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    """bfloat16 too, which PyTorch does not hand to NumPy."""
    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    return tensor.contiguous().view(torch.int16).cpu().numpy().view(dtype)


def check(out: Any, case: Case, operands: tuple[Any, Any, Any], torch: Any) -> None:
    """Raises AssertionError if the output is wrong where we look.

    A few query rows with all keys are a small attention of their own; its diagonal is shifted by their start.
    """
    if not bool(torch.isfinite(out).all()):
        raise AssertionError(f"{case.name}: the output has NaN or infinities")
    if case.feature in UNCHECKED:
        return
    group = case.heads[0] // case.heads[1]
    last = max(0, case.seqlen_q - CHECKED_ROWS)
    for b, h in {(0, 0), (case.batch - 1, case.heads[0] - 1)}:
        for start in {0, last}:
            rows = slice(start, start + CHECKED_ROWS)
            query, key, value = (
                to_numpy(x, torch) for x in (operands[0][b, h, rows], *(x[b, h // group] for x in operands[1:]))
            )
            part = {"query": query, "key": key, "value": value, "is_causal": case.is_causal, "align": start}
            if case.feature:
                part |= FEATURES[case.feature](case, b, h, rows)
            assert_attention_close(to_numpy(out[b, h, rows], torch), part)


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


def sampler(name: str, call: Call, calls: int, torch: Any) -> Callable[[], float]:
    """Takes a sample: seconds for a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        with as_only_backend(name, torch):
            call(0)  # the first after another's turn finds the instruction cache cold
            start.record()
            for number in range(calls):
                call(number)
            end.record()
            end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    return sample


def measure(case: Case, gpu: Gpu, rounds: int, torch: Any) -> Report:
    """One row of the report."""
    sets = operands_of(case, case.sets(gpu.l2_bytes), torch)
    refused: dict[str, str] = {}
    samplers: dict[str, Callable[[], float]] = {}
    # What PyTorch makes of a mask or a bias is another subject; a feature's price is told by the call without it.
    for name in OURS if case.feature else ("cupyflash", *BACKENDS):
        computed = replace(case, feature="") if name == "plain" else case
        call = (our_call if name in OURS else their_call)(computed, sets, torch)
        try:
            with as_only_backend(name, torch):
                check(call(0), computed, sets[0], torch)
        except (RuntimeError, AssertionError, cupyflash.errors.CupyflashError) as error:
            refused[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        samplers[name] = sampler(name, call, warm_up(name, call, torch), torch)
    samples, ratios = take_turns(samplers, rounds)
    return row_of(case, samples, ratios, refused)


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure attention on a GPU.")
    parser.add_argument("--cases", default="*", metavar="GLOB", help="only the cases whose name matches")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    given = parser.parse_args(arguments)
    cases = [case for case in CASES if fnmatch(case.name, given.cases)]
    if not cases:
        parser.error(f"--cases {given.cases!r} matches none of: {'; '.join(case.name for case in CASES)}")
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: at least 1 is needed")
    gpu, reason = what_is_missing()
    if gpu is None:
        print(f"nothing can be measured: {reason}", file=sys.stderr)
        return NO_GPU
    import cupy
    import torch

    out = given.out or RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report: Report = {
        "machine": describe_machine(gpu, torch),
        "clocks": {"before": nvidia_smi(*CLOCKS)},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--", "cupyflash", "kernels_cu", "benchmarks", ":!benchmarks/results")
        ),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(
            ["python", "benchmarks/bench_gpu.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "results": [],
    }
    stream = torch.cuda.current_stream()
    with cupy.cuda.ExternalStream(stream.cuda_stream):
        for case in cases:
            report["results"].append(measure(case, gpu, given.rounds, torch))
            report["clocks"]["after"] = nvidia_smi(*CLOCKS)
            out.write_text(json.dumps(report, indent=1), encoding="utf-8")
            print(describe_row(report["results"][-1]), flush=True)
    print(f"written to {out}")
    return 1 if any("cupyflash" in row["refused"] for row in report["results"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
