"""How fast the kernels could be: a model of the GPU's pipes, not a measurement.

    python benchmarks/roofline.py                              the benchmark's cases on an H200
    python benchmarks/roofline.py --specs [--match d128]       every kernel that plans may name
    python benchmarks/roofline.py --results [FILE.json]        beside what bench_gpu.py measured
    python benchmarks/roofline.py --write [--check]            docs/roofline.md

What takes long, compiling, is kept; each line is printed as soon as it is known, and there is no bar beside them.

A kernel is a step, repeated for each tile of keys.  Its instructions are read off the compiled cubin: the loop around
the products, along its shortest way, since most tiles need no mask; with whatever stands in the loop where something
changes the scores.  Each instruction goes to a pipe of the SM, and a pipe does so many lanes or bytes in a cycle:

    tensor   block_m · block_n · (E + Ev) multiply-adds, at the rate of mma.sync or of wgmma
    xu       exp2, reciprocals, some conversions                     fma, alu    the rest of the arithmetic
    shared   bytes to and from shared memory and L1; for wgmma the operands that it reads, and the tiles that TMA writes
    issue    every instruction, four in a cycle                      fp64        double arithmetic

The pipe that needs the most cycles is the limit.  Steps are dealt out to SMs as blocks and their items would be, so
half-empty waves and the uneven rows of causal masks count.  L2 has to deliver each block's operands, DRAM each operand
once, and every launch takes `LAUNCH_SECONDS`.  Two times come of it: one in which everything overlaps, which no kernel
beats, and one in which products and softmax take turns.  Neither knows of latencies, bank conflicts or power: under
load, clocks fall.
"""

from __future__ import annotations

import argparse
import collections
import heapq
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the kernels of the checkout around this file

from gpu_workloads import CASES, EVERYTHING, FEATURES, Case

from cupyflash.build.cache import default_cache
from cupyflash.build.modding import trace_mods
from cupyflash.build.nvrtc import compile_cubin
from cupyflash.build.rendering import arch_for, render_kernel
from cupyflash.plan.choose import choose
from cupyflash.plan.device import DEVICES, DeviceSpec
from cupyflash.plan.specs import FwdSpec, Plan
from cupyflash.problem.dtypes import dtype_named
from cupyflash.problem.normalize import normalize
from cupyflash.problem.problem import Problem
from cupyflash.testing import DTYPES
from cupyflash.tools.kernels import specs_of

Report: TypeAlias = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "roofline.md"
LAUNCH_SECONDS = 2e-6  # assumed: between the end of one kernel and the first instructions of the next
ISSUED, XU_LANES, ALU_LANES = 4, 16, 64  # warp instructions, and lanes, in a cycle of an SM
PRODUCTS = {"HMMA": "tensor", "HGMMA": "tensor", "FFMA": "fma", "DFMA": "fp64"}
_COPIES = {"LDGSTS", "UTMALDG"}  # the last step has none, all others do
WGMMA_ROWS = 64  # of a warpgroup's operand


@dataclass(frozen=True)
class Rates:
    """What a GPU's data sheet promises, for each SM and cycle unless said otherwise.

    Attributes
    ----------
    clock : float
        GHz, the one with which the data sheet counts.
    mma, wgmma : float
        Multiply-adds of 16-bit numbers into float32; 0 where there is no wgmma.
    fp32, fp64 : float
        Lanes.
    shared : float
        Bytes.
    l2 : float
        Bytes, as others measured, in round numbers.
    dram : float
        TB/s.
    """

    clock: float
    mma: float
    wgmma: float
    fp32: float
    fp64: float
    shared: float
    l2: float
    dram: float


#: By name, as in `cupyflash.plan.device.DEVICES`.  mma.sync on Hopper gives about 0.63 of what wgmma does (arXiv
#: 2402.13499); for Blackwell's data center chips Ampere's rate stands in, for want of a source.
RATES: dict[str, Rates] = {
    "T4": Rates(1.59, 512, 0, 64, 2, 64, 16, 0.32),
    "A100": Rates(1.41, 1024, 0, 64, 32, 128, 32, 2.04),
    "A10G": Rates(1.71, 256, 0, 128, 2, 128, 16, 0.6),
    "RTX 3090": Rates(1.695, 256, 0, 128, 2, 128, 16, 0.936),
    "L4": Rates(2.04, 512, 0, 128, 2, 128, 16, 0.3),
    "RTX 4090": Rates(2.52, 256, 0, 128, 2, 128, 16, 1.01),
    "L40S": Rates(2.52, 512, 0, 128, 2, 128, 16, 0.864),
    "H100": Rates(1.83, 1290, 2048, 128, 64, 128, 32, 3.35),
    "H200": Rates(1.83, 1290, 2048, 128, 64, 128, 32, 4.8),
    "B200": Rates(1.85, 1024, 0, 128, 64, 128, 32, 8.0),
    "RTX 5090": Rates(2.41, 256, 0, 128, 2, 128, 16, 1.79),
}


# --- what the compiler made of a kernel ----------------------------------------------------------------------


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: "LDS.128"
    target: int | None  # of a branch: the index of the instruction that it leads to
    is_conditional: bool

    @property
    def name(self) -> str:
        """ "LDS"."""
        return self.opcode.partition(".")[0]


def find_nvdisasm() -> str | None:
    """The program: on the path, or in its wheel."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        import nvidia
    except ImportError:
        return None
    wheels = (path for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/nvdisasm"))
    return next(map(str, wheels), None)


def disassemble(cubin: Path) -> list[Instruction]:
    """The code of a cubin with one entry.  Raises RuntimeError where there is no nvdisasm."""
    program = find_nvdisasm()
    if program is None:
        raise RuntimeError("nvdisasm is not installed: pip install 'cupyflash[nvrtc]'")
    answer = subprocess.run([program, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return parse(answer.stdout)


_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@\S+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"(\.L_\w+):")


def parse(text: str) -> list[Instruction]:
    """The instructions of nvdisasm's text, in order."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str | None]] = []
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _LINE.match(line):
            found.append((match[2], match[3], match[1]))
    code = []
    for opcode, operands, predicate in found:
        target = re.search(r"`\((\.L_\w+)\)", operands) if opcode.partition(".")[0] == "BRA" else None
        # A second predicate, or a uniform one, may stand among the operands: "BRA P1, `(.L_x_5)".
        bare = target is not None and not operands[: target.start()].strip()
        code.append(Instruction(opcode, labels.get(target[1]) if target else None, predicate is not None or not bare))
    return code


def loops_of(code: Sequence[Instruction], product: str) -> list[tuple[int, int]]:
    """The innermost loops that hold the product's instruction, each as its first instruction and the branch back."""
    loops = {
        (instruction.target, place)
        for place, instruction in enumerate(code)
        if instruction.target is not None and instruction.target <= place
    }
    holding = [loop for loop in loops if any(one.name == product for one in code[loop[0] : loop[1] + 1])]
    return sorted(
        loop
        for loop in holding
        if not any(inner != loop and loop[0] <= inner[0] and inner[1] <= loop[1] for inner in holding)
    )


def shortest_way(code: Sequence[Instruction], begin: int, end: int, product: str) -> list[Instruction]:
    """From `begin` to the branch back at `end`: of the ways with the most products and copies, the shortest."""
    kept = {product, *_COPIES}
    cost = {end: (0, 1)}  # products and copies, negative, and instructions
    follows: dict[int, int] = {}
    for place in range(end - 1, begin - 1, -1):
        instruction = code[place]
        ways = [place + 1]
        if instruction.target is not None and place < instruction.target <= end:
            ways = [instruction.target, *(ways if instruction.is_conditional else ())]
        follows[place] = min(ways, key=lambda way: cost[way])
        found, length = cost[follows[place]]
        cost[place] = (found - (instruction.name in kept), length + 1)
    way, place = [code[begin]], begin
    while place != end:
        place = follows[place]
        way.append(code[place])
    return way


_WIDTH = re.compile(r"\.(64|128)\b")
_MATRICES = re.compile(r"\.M88\.(\d)|\.MT88\.(\d)|\.x?(\d)$")
_THROUGH_SHARED = {"LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDG", "STG", "SHFL", "ATOMS", "LD", "ST"}
_XU = {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO"}
_FP64 = {"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"}
_FMA = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FSWZADD"}
_CONTROL = {
    *("BRA", "BSSY", "BSYNC", "BAR", "EXIT", "NOP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS", "WARPGROUP"),
    *("ELECT", "CALL", "RET", "BREAK", "YIELD", "NANOSLEEP", "MEMBAR", "ERRBAR", "FENCE", "VOTE", "VOTEU", "R2UR"),
    *("S2R", "S2UR", "CS2R", "LDC", "LDCU", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "USETMAXREG", "PLOP3"),
}


def pipe_of(name: str) -> str | None:
    """Which pipe an instruction goes to beside the issue; None: it counts there alone."""
    if name in ("HMMA", "HGMMA"):
        return "tensor"
    for pipe, names in (("xu", _XU), ("fp64", _FP64), ("fma", _FMA), ("shared", _THROUGH_SHARED)):
        if name in names:
            return pipe
    return None if name in _CONTROL or name.startswith("U") else "alu"


def bytes_of(opcode: str) -> int:
    """What one warp's instruction moves through shared memory or L1; lanes that read the same word count each."""
    if opcode.startswith(("LDSM", "STSM")):
        found = _MATRICES.search(opcode)
        return 128 * int(next(filter(None, found.groups())) if found else 1)
    width = _WIDTH.search(opcode)
    return 32 * (int(width[1]) // 8 if width else 4)


@dataclass(frozen=True)
class Step:
    """What a warp does for one tile of keys.

    Attributes
    ----------
    product : str
        The instruction that multiplies: a key of `PRODUCTS`.
    instructions : float
    lanes : dict of str to float
        Of each pipe but "tensor" and "shared", for all 32 threads.
    shared_bytes : float
    """

    product: str
    instructions: float
    lanes: Mapping[str, float]
    shared_bytes: float


@lru_cache(maxsize=1024)
def step_of(spec: FwdSpec, arch: str) -> Step:
    """Reads a kernel's step off its cubin, which is compiled if it is not in the cache.

    Raises
    ------
    RuntimeError
        There is no nvdisasm, or no loop that holds products.
    """
    return read_step(disassemble(compile_cubin(render_kernel(spec), arch, default_cache()).path), spec)


def read_step(code: Sequence[Instruction], spec: FwdSpec) -> Step:
    """`step_of` for code that is there already."""
    names = {instruction.name for instruction in code}
    product = next((name for name in ("HGMMA", "HMMA") if name in names), None)
    if product is None:
        product = "DFMA" if spec.dtype == "float64" else "FFMA"
    loops = loops_of(code, product)
    if not loops:
        raise RuntimeError(f"{spec}: no loop holds {product}")
    ways = [
        shortest_way(code, begin, end, product) if spec.features.is_plain else list(code[begin : end + 1])
        for begin, end in loops
    ]
    if PRODUCTS[product] == "tensor":
        # A loop for tiles with a mask and one for the others: that which does the same with less.
        way = min(ways, key=lambda way: len(way) / _count(way, product))
    else:
        # The loops over head dims and over keys of a tile; the softmax between them is small beside them.
        way = [instruction for way in ways for instruction in way]
    scale = _products_of(spec, product) / _count(way, product)
    lanes: collections.Counter[str] = collections.Counter()
    shared = 0
    for instruction in way:
        pipe = pipe_of(instruction.name)
        if pipe == "shared":
            shared += bytes_of(instruction.opcode)
        elif pipe is not None and pipe != "tensor":
            lanes[pipe] += 32
    counted = {pipe: number * scale for pipe, number in lanes.items()}
    if PRODUCTS[product] != "tensor":
        counted["xu"] = spec.tile.block_m * spec.tile.block_n / spec.tile.num_warps
    return Step(product, len(way) * scale, counted, shared * scale)


def _count(way: Sequence[Instruction], name: str) -> int:
    return sum(instruction.name == name for instruction in way)


def _products_of(spec: FwdSpec, product: str) -> float:
    """How many such instructions a warp executes for a tile of keys."""
    tile, dim, dim_v = spec.tile, spec.head_dim, spec.head_dim_v
    if product == "HGMMA":  # m64 nN k16, N up to 256; each warp of the group executes it
        return math.ceil(tile.block_n / 256) * dim / 16 + math.ceil(dim_v / 256) * tile.block_n / 16
    rows = tile.block_m / tile.num_warps
    if product == "HMMA":
        return rows * tile.block_n * (dim + dim_v) / (16 * 8 * (16 if spec.baseline >= 80 else 8))
    return rows * tile.block_n * (dim + dim_v) / 32


# --- what the pipes make of it -------------------------------------------------------------------------------


def cycles_of(spec: FwdSpec, step: Step, rates: Rates) -> dict[str, float]:
    """Cycles of each pipe of an SM for one tile of keys of one block."""
    tile, dim, dim_v = spec.tile, spec.head_dim, spec.head_dim_v
    is_wgmma = step.product == "HGMMA"
    # With wgmma a warpgroup has 64 rows; those that only copy are not counted.
    warps = 4 * tile.block_m // WGMMA_ROWS if is_wgmma else tile.num_warps
    cycles = {
        "xu": step.lanes.get("xu", 0) / XU_LANES,
        "fma": step.lanes.get("fma", 0) / rates.fp32,
        "alu": step.lanes.get("alu", 0) / ALU_LANES,
        "fp64": step.lanes.get("fp64", 0) / rates.fp64,
        "issue": step.instructions / ISSUED,
        "shared": step.shared_bytes / rates.shared,
    }
    cycles = {pipe: warps * number for pipe, number in cycles.items()}
    if PRODUCTS[step.product] == "tensor":
        rate = rates.wgmma if is_wgmma else rates.mma
        cycles["tensor"] = tile.block_m * tile.block_n * (dim + dim_v) / rate if rate else math.inf
    if is_wgmma:
        itemsize = dtype_named(spec.dtype).storage.itemsize
        # Each warpgroup reads K and V, and Q for every tile of keys; P stays in registers.  TMA writes K and V.
        k_and_v = tile.block_n * (dim + dim_v) * itemsize
        read = tile.block_m // WGMMA_ROWS * k_and_v + tile.block_m * dim * itemsize
        cycles["shared"] += (read + k_and_v) / rates.shared
    return cycles


class Limit(NamedTuple):
    """The times of one tile of keys, in cycles of an SM."""

    pipe: str  # that needs the most
    overlapped: float  # everything at once
    in_turn: float  # products, then softmax


def limit_of(cycles: Mapping[str, float]) -> Limit:
    """What limits a step."""
    pipe = max(cycles, key=lambda name: cycles[name])
    products = {name for name in ("tensor", "shared") if name in cycles}
    if "tensor" not in cycles:  # all on the same pipes
        return Limit(pipe, cycles[pipe], cycles[pipe])
    softmax = max(number for name, number in cycles.items() if name not in products)
    return Limit(pipe, cycles[pipe], max(cycles[name] for name in products) + softmax)


def tiles_of_keys(problem: Problem, spec: FwdSpec, pack: int) -> list[int]:
    """For each tile of queries of a head, or of heads that are packed, how many tiles of keys it visits."""
    tile, lower = spec.tile, problem.band.lower
    counts = []
    for first in range(0, problem.seqlen_q * pack, tile.block_m):
        start = 0 if lower is None else max(0, first // pack + lower)
        stop = _end_of_keys(problem, pack, first + tile.block_m)
        counts.append(max(0, math.ceil(stop / tile.block_n) - start // tile.block_n))
    return counts


def tiles_multiplied(problem: Problem, spec: FwdSpec, pack: int) -> list[float]:
    """`tiles_of_keys`, less what warpgroups leave out where the keys of their own rows end: tiles, and a half."""
    visited = tiles_of_keys(problem, spec, pack)
    if spec.family != "fwd_sm90" or not spec.features.has_upper or not spec.features.is_plain:
        return [float(count) for count in visited]
    tile = spec.tile
    half = 16 * math.ceil(tile.block_n / 32)
    multiplied = []
    for number, count in enumerate(visited):
        last_row = (number + 1) * tile.block_m
        end = math.ceil(_end_of_keys(problem, pack, last_row) / tile.block_n)
        left_out = []
        for row in range(last_row, last_row - tile.block_m, -WGMMA_ROWS):
            stop = _end_of_keys(problem, pack, row)
            # In turns every tile is taken.
            own = end if tile.ping_pong else math.ceil(stop / tile.block_n)
            needs_half = stop <= (own - 1) * tile.block_n + half
            left_out.append(min(count, end - own + needs_half * (1 - half / tile.block_n)))
        multiplied.append(count - sum(left_out) / len(left_out))
    return multiplied


def _end_of_keys(problem: Problem, pack: int, row: int) -> int:
    """Of the rows before that one."""
    end = min(problem.seqlen_q, math.ceil(row / pack))
    return problem.seqlen_k if problem.band.upper is None else max(0, min(problem.seqlen_k, end + problem.band.upper))


def in_order(per_tile: Sequence[float], heads: int, section: int) -> list[float]:
    """The tiles of keys of every tile of queries, in the order of FwdWork::of_tile with an upper bound."""
    found: list[float] = []
    firsts = range(0, heads, section)
    for first in firsts:
        begins_with_longest = (firsts[-1] - first) // section % 2 == 0
        for count in reversed(per_tile) if begins_with_longest else per_tile:
            found += [count] * min(section, heads - first)
    return found


def longest_sm(items: Sequence[float], sms: int, blocks: int | None = None) -> float:
    """The most tiles of keys that an SM gets, if each item in turn goes to the SM that has the fewest.

    With so many blocks for all of them, if each takes those that Items (kernels_cu/work.cuh) says.
    """
    loads = [0.0] * min(sms, max(1, len(items)))
    for number, item in enumerate(items):
        if blocks is None:
            heapq.heapreplace(loads, loads[0] + item)
        else:
            turn, place = divmod(number, blocks)
            loads[(place if turn % 2 == 0 else blocks - 1 - place) % sms] += item
    return max(loads)


@dataclass(frozen=True)
class Prediction:
    """Of one call.

    Attributes
    ----------
    spec : FwdSpec
    limit : str
        The pipe, "L2", "DRAM" or "launch".
    seconds, in_turn : float
        If everything overlaps; if products and softmax take turns.
    share : dict of str to float
        Of each pipe, the part of `seconds` that it works.
    """

    spec: FwdSpec
    limit: str
    seconds: float
    in_turn: float
    share: Mapping[str, float]


def predict(problem: Problem, plan: Plan, device: DeviceSpec, rates: Rates) -> Prediction:
    """The times of a call on that GPU, by the model at the top of this file."""
    spec = plan.launches[0].spec
    assert isinstance(spec, FwdSpec)
    cycles = cycles_of(spec, step_of(spec, arch_for(spec, device)), rates)
    limit = limit_of(cycles)

    visited = tiles_of_keys(problem, spec, plan.pack)
    heads = problem.batch_size * problem.num_heads_q // plan.pack
    per_item = visited if plan.num_splits > 1 else tiles_multiplied(problem, spec, plan.pack)
    tiles = in_order(per_item, heads, plan.section) if spec.features.has_upper else per_item * heads
    if plan.num_splits > 1:
        tiles = [math.ceil(count / plan.num_splits) for count in tiles for _ in range(plan.num_splits)]
    forward = plan.launches[0]
    steps = longest_sm(tiles, device.sms, forward.grid[0] if forward.items else None)

    itemsize = dtype_named(spec.dtype).storage.itemsize
    dims = problem.head_dim + problem.head_dim_v
    rows = problem.batch_size * problem.num_heads_q * problem.seqlen_q
    keys = problem.batch_size * problem.seqlen_k
    kept = keys * (problem.num_heads_k * problem.head_dim + problem.num_heads_v * problem.head_dim_v) * itemsize
    partial = 2 * plan.num_splits * rows * problem.head_dim_v * 4 if plan.num_splits > 1 else 0
    copied = heads * plan.num_splits * sum(math.ceil(count / plan.num_splits) for count in visited)
    delivered = copied * spec.tile.block_n * dims * itemsize + rows * dims * itemsize + partial
    hertz = rates.clock * 1e9
    times = {pipe: steps * number / hertz for pipe, number in cycles.items()}
    times["L2"] = delivered / (rates.l2 * device.sms * hertz)
    times["DRAM"] = (rows * dims * itemsize + kept) / (rates.dram * 1e12)
    busiest = max(times, key=lambda name: times[name])
    launched = LAUNCH_SECONDS * len(plan.launches)
    seconds = times[busiest] + launched
    in_turn = max(steps * limit.in_turn / hertz, times["L2"], times["DRAM"]) + launched
    share = {pipe: time / seconds for pipe, time in times.items()} | {"launch": launched / seconds}
    return Prediction(spec, max(share, key=lambda name: share[name]), seconds, in_turn, share)


def planned(case: Case, device: DeviceSpec) -> tuple[Problem, Plan]:
    """The case as the plan sees it, without any memory for its operands; and its plan, with a score_mod's kernel."""
    query, key = (np.broadcast_to(np.zeros((), DTYPES[case.dtype]), shape) for shape in case.shapes)
    asked = FEATURES[case.feature](case, *EVERYTHING) if case.feature else {}
    problem, buffers = normalize(query, key, key, **case.options, **asked)
    mods = trace_mods(problem, buffers)
    return problem, choose(problem, device, mods.structure if mods else None)


# --- tables --------------------------------------------------------------------------------------------------

COLUMNS = ("tensor", "xu", "fma", "alu", "fp64", "shared", "issue", "L2", "DRAM", "launch")


def spec_lines(device: DeviceSpec, match: str) -> Iterator[str]:
    """For each kernel its limiting pipe, and cycles of every pipe for a tile of keys."""
    rates = RATES[device.name]
    specs = [spec for spec in specs_of(device, match) if isinstance(spec, FwdSpec)]
    if not specs:
        raise ValueError(f"no kernel with {match!r} in its name runs on {device.name}")
    pipes = COLUMNS[:7]
    width = max(len(str(spec)) for spec in specs)
    yield f"{'kernel':{width}}  limit    {''.join(f'{pipe:>8}' for pipe in pipes)}  cycles for a tile of keys"
    for spec in specs:
        cycles = cycles_of(spec, step_of(spec, arch_for(spec, device)), rates)
        numbers = "".join(f"{cycles.get(pipe, 0):>8.0f}" for pipe in pipes)
        yield f"{spec!s:{width}}  {limit_of(cycles).pipe:8} {numbers}"


def case_rows(cases: Sequence[Case], device: DeviceSpec, rates: Rates) -> Iterator[tuple[Case, Prediction]]:
    """Every case with what is predicted."""
    for case in cases:
        yield case, predict(*planned(case, device), device, rates)


def format_rate(case: Case, seconds: float) -> str:
    return f"{case.bytes / seconds / 1e9:.0f} GB/s" if case.reads_once else f"{case.operations / seconds / 1e12:.0f}"


def case_table(cases: Sequence[Case], device: DeviceSpec) -> str:
    """Markdown: the cases, their kernels, the limiting pipe, both predicted rates."""
    lines = [
        "| case | kernel | limit | its next | all at once, TFLOP/s | in turn |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for case, found in case_rows(cases, device, RATES[device.name]):
        others = sorted(found.share.items(), key=lambda item: -item[1])
        nearest = f"{others[1][0]} {others[1][1]:.0%}"
        rates = " | ".join(format_rate(case, seconds) for seconds in (found.seconds, found.in_turn))
        lines.append(f"| {case.name} | `{found.spec}` | {found.limit} | {nearest} | {rates} |")
    return "\n".join(lines)


def compared_lines(report: Report, device: DeviceSpec) -> Iterator[str]:
    """What was measured beside what is predicted at the clock that was seen, case by case.

    A measured time below the prediction is an error of the model, far above both predictions something that the model
    leaves out: latencies, bank conflicts, an SM that waits.
    """
    cases = {case.name: case for case in CASES}
    yield f"{'case':34} {'clock':>6} {'measured':>10} {'at once':>10} {'in turn':>10}  of it  limit"
    for row in report["results"]:
        case, taken = cases.get(row["name"]), row["seconds"].get("cupyflash")
        if case is None or taken is None:
            continue
        clock = (row.get("clocks") or {}).get("sm_mhz")
        rates = RATES[device.name]
        if clock:
            rates = replace(rates, clock=clock / 1e3)
        found = predict(*planned(case, device), device, rates)
        times = "".join(f" {1e6 * seconds:>7.1f} µs" for seconds in (taken["median"], found.seconds, found.in_turn))
        part = found.seconds / taken["median"]
        yield f"{case.name:34} {rates.clock:>6.2f}{times} {part:>6.0%}  {found.limit}"


def newest(path: Path) -> Path:
    """The file itself, or of a folder's results the last.  Raises ValueError where there are none."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("gpu-*.json"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ValueError(f"{path} has no results of a GPU: run benchmarks/bench_gpu.py")
    return found[-1]


def device_of_report(report: Report) -> DeviceSpec:
    """The known GPU of a result file.  Raises ValueError where it is not known."""
    name = report["machine"]["name"]
    for known in sorted(RATES, key=len, reverse=True):
        if known in name:
            return DEVICES[known]
    raise ValueError(f"{name} is none of the GPUs whose rates are known: {', '.join(RATES)}")


TEXT = """\
# How fast the kernels could be

Written by `python benchmarks/roofline.py --write`. **A model, not a measurement**: what the pipes of an {device} would
allow if nothing ever waited. `benchmarks/roofline.py` says how it counts; `--results FILE.json` sets it beside what
`benchmarks/bench_gpu.py` measured, `--specs` lists the pipes of every kernel, `--device` takes another GPU.

*All at once* is a bound that no kernel passes: every pipe works all the time, and the one that is named is full. *In
turn* lets products and softmax of an SM wait for one another. A kernel that lies below both loses its time to what is
not counted: latencies, bank conflicts, barriers; and to power, which lowers clocks under load.

{table}

Rates of the data sheet at {clock} GHz; instructions as compiled by NVRTC {nvrtc}, along the shortest way through the
loop over tiles of keys; where something changes the scores, all that stands in the loop, needed or not: the kernel of
ALiBi is that of softcap, and its tanh counts for both. In *its next* stands the pipe that comes second, and the
part of the time that it works.
"""


def page() -> str:
    """The text of docs/roofline.md."""
    from cupyflash.build.nvrtc import nvrtc_version

    device = DEVICES["H200"]
    nvrtc = ".".join(map(str, nvrtc_version()))
    return TEXT.format(device=device.name, clock=RATES[device.name].clock, table=case_table(CASES, device), nvrtc=nvrtc)


def names_of(text: str) -> list[str]:
    """The cases of the page's table, which do not hang on the compiler's version as the rest does."""
    return re.findall(r"^\| (d\d.*?|[A-Z].*?) \| `", text, re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predict the kernels' times: a model, not a measurement.")
    parser.add_argument("--device", default="H200", choices=RATES, metavar="NAME", help=f"one of {', '.join(RATES)}")
    parser.add_argument("--specs", action="store_true", help="every kernel rather than the benchmark's cases")
    parser.add_argument("--match", default="", metavar="TEXT", help="only kernels or cases whose name holds TEXT")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE.json",
        help="compare with what bench_gpu.py wrote (default: the newest)",
    )
    parser.add_argument("--write", action="store_true", help="write docs/roofline.md")
    parser.add_argument("--check", action="store_true", help="only say whether docs/roofline.md has every case")
    given = parser.parse_args(arguments)
    if given.check:
        if names_of(PAGE.read_text(encoding="utf-8")) == [case.name for case in CASES]:
            return 0
        print("docs/roofline.md is out of date: run `python benchmarks/roofline.py --write`", file=sys.stderr)
        return 1
    if given.write:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    try:
        if given.results is not None:
            report = json.loads(newest(given.results).read_text(encoding="utf-8"))
            lines: Iterator[str] = compared_lines(report, device_of_report(report))
        elif given.specs:
            lines = spec_lines(DEVICES[given.device], given.match)
        else:
            cases = [case for case in CASES if given.match in case.name]
            lines = iter([case_table(cases, DEVICES[given.device])])
        for line in lines:
            print(line, flush=True)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
