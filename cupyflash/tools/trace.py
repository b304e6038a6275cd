"""One call of `attention` followed step by step: the kernel runs under the emulator and shows what it does.

Nothing is computed again to be shown.  `kernels_cu/fwd_sm80.cu` hands its tiles, scores, maxima, sums and output to
whoever runs it (`observe`); here they are put together to what each block did.  What is worked out behind it says so:
why a tile was not visited (from the call's band and the summaries of its masks), and the error.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..api import attention
from ..backends.emulator import Counters, Module, Observation, Options
from ..build.bulk import map_refusals
from ..build.host import find_compiler
from ..build.launch import launches
from ..build.modding import trace_mods
from ..build.operands import Operands, prepare
from ..build.rendering import entry_of, render_kernel
from ..errors import Unsupported
from ..plan.choose import choose, choose_spec, refusals, selector_of
from ..plan.device import DEVICES
from ..plan.specs import FwdSpec
from ..problem.normalize import normalize
from ..problem.problem import Buffers, Problem
from .doctor import INSTALL_COMPILER

__all__ = ["REASONS", "Launched", "Step", "TileFate", "Trace", "Walk", "trace"]

Array = np.ndarray[Any, Any]

_SIGNATURE = inspect.signature(attention)
_FAMILY = "fwd_sm80"
_SECTOR = 32  # bytes
_ALIGNMENT = 256  # of arrays on a GPU; NumPy's would cross more sectors

#: Why a tile is cut, or not visited: some of its keys, or all, are ...
REASONS = {
    "upper": "beyond the causal or window bound",
    "lower": "before the window",
    "end": "past the end of the sequence",
    "mask": "removed by the bool mask",
    "mask_mod": "removed by mask_mod",
}


class TileFate(NamedTuple):
    """What became of one tile of keys in a walk."""

    tile: int
    kind: str  # "whole": every key takes part for every row; "cut": some do not; "skipped": not visited
    why: tuple[str, ...]  # keys of REASONS; none for a whole one


@dataclass(frozen=True, eq=False)
class Step:
    """A tile of keys, as the kernel worked on it.  Rows are those of the walk.

    Attributes
    ----------
    tile : int
    is_full, is_whole : bool
        What the kernel decided: the band, and the bool mask and mask_mod, remove none of the tile's keys.
    scores : float32 (rows, keys)
        What the softmax is taken of; -inf where a key does not take part.
    row_max, row_sum : float32 (rows,)
        After the step: of all scores so far, and of their exponentials relative to the maximum.
    correction : float32 (rows,)
        By what the sum and O were multiplied, because the maximum rose.
    output : float32 (rows, Ev)
        O after the step, not yet divided by the sum.
    """

    tile: int
    is_full: bool
    is_whole: bool
    scores: Array
    row_max: Array
    row_sum: Array
    correction: Array
    output: Array


@dataclass(frozen=True, eq=False)
class Walk:
    """What one block did: a tile of rows, and its tiles of keys in the order in which it visited them.

    Attributes
    ----------
    block : int
        In the grid.
    batch, head : int
        The entry of the flattened batch; the (first) query head.
    row_begin : int
        The first row; a row is a query, or with `Trace.pack` heads in a tile query row // pack of head row % pack.
    num_rows : int
    steps : tuple of Step
    fates : tuple of TileFate
        Of all tiles of keys, by tile.
    """

    block: int
    batch: int
    head: int
    row_begin: int
    num_rows: int
    steps: tuple[Step, ...]
    fates: tuple[TileFate, ...]


@dataclass(frozen=True)
class Launched:
    """One launch and what it cost.

    Attributes
    ----------
    name : str
        Of the kernel.
    blocks, threads : int
    counters : Counters
    """

    name: str
    blocks: int
    threads: int
    counters: Counters

    @property
    def bytes_read(self) -> int:
        """From global memory, in sectors of 32 bytes."""
        return _SECTOR * (self.counters.ld_global.cost + self.counters.cp_async_global.cost)

    @property
    def bytes_written(self) -> int:
        """To global memory, in sectors of 32 bytes."""
        return _SECTOR * self.counters.st_global.cost

    @property
    def wavefronts(self) -> int:
        """Of shared memory, 128 bytes each at most."""
        return sum(kind.cost for kind in self._shared)

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts beyond the least that the same accesses take."""
        return sum(kind.cost - kind.ideal for kind in self._shared)

    @property
    def _shared(self) -> tuple[Any, ...]:
        found = self.counters
        return found.ld_shared, found.st_shared, found.ldmatrix, found.stmatrix, found.cp_async_shared


@dataclass(frozen=True, eq=False)
class Trace:
    """A call, followed.

    Attributes
    ----------
    problem : Problem
    device : str
        The GPU whose kernel it is.
    spec : FwdSpec
    pack : int
        Query heads in one tile of rows.
    walks : tuple of Walk
        By batch entry, head and row, not in the order of blocks.
    launches : tuple of Launched
        In order: summaries of masks, then the forward kernel.
    out, lse : array (*batch, Hq, L, Ev), (*batch, Hq, L)
        What the kernel wrote.
    error : float
        The largest error of `out` against `math` in float64.
    error_units : float
        The largest error in units of u·Σ_j p_j|v_j|, u the dtype's unit roundoff; 3 is allowed.
    lse_error : float
        The largest error of `lse`.
    """

    problem: Problem
    device: str
    spec: FwdSpec
    pack: int
    walks: tuple[Walk, ...]
    launches: tuple[Launched, ...]
    out: Array
    lse: Array
    error: float
    error_units: float
    lse_error: float

    @property
    def bytes_moved(self) -> int:
        """Of global memory, read and written, by all launches."""
        return sum(launch.bytes_read + launch.bytes_written for launch in self.launches)

    @property
    def matrix_bytes(self) -> int:
        """One L×S matrix for every head, in the dtype."""
        problem = self.problem
        heads = problem.batch_size * problem.num_heads_q
        return heads * problem.seqlen_q * problem.seqlen_k * problem.element.storage.itemsize

    @property
    def bytes_of_formula(self) -> int:
        """What three steps would move: Q, K, V and O once; scores and weights, L×S each, written and read."""
        problem = self.problem
        dims = problem.head_dim + problem.head_dim_v
        rows = problem.num_heads_q * problem.seqlen_q * dims
        keys = problem.seqlen_k * (problem.num_heads_k * problem.head_dim + problem.num_heads_v * problem.head_dim_v)
        return problem.batch_size * (rows + keys) * problem.element.storage.itemsize + 4 * self.matrix_bytes


def trace(*args: Any, device: str = "A100", **kwargs: Any) -> Trace:
    """Run a call of `attention` on NumPy arrays under the emulator, and return what the kernel did.

    Keys are not divided among blocks, as in a call that is large enough to fill the device.

    Parameters
    ----------
    *args, **kwargs
        The arguments of `attention`; float16 or bfloat16.
    device : str
        The GPU whose kernel is to run, a name in `cupyflash.plan.device.DEVICES` for which that is ``fwd_sm80.cu``.

    Raises
    ------
    TypeError, ValueError
        As `attention`; ValueError for a device or a call with another kernel, and where there is nothing to compute.
    Unsupported
        No kernel runs the call, or there is no C++ compiler.
    """
    arguments = {"seed": 0, **_SIGNATURE.bind(*args, **kwargs).arguments}
    arguments.pop("backend", None)
    arguments |= {"return_lse": True, "return_weights": False, "out": None}
    problem, buffers = normalize(**arguments)
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, but was {device!r}")
    if problem.library != "numpy":
        raise ValueError(f"query must be a NumPy array: the emulator reads no {problem.library} arrays")
    if reasons := refusals(problem):
        raise Unsupported(f"no kernel runs the call: {'; '.join(reasons)}", {"emulator": reasons})
    if 0 in (problem.batch_size, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k):
        raise ValueError(f"there are no tiles to visit: {str(problem).splitlines()[0]}")
    spec = _spec(problem, buffers, device)
    try:
        find_compiler()
    except Unsupported as error:
        remedy = f"; type: {INSTALL_COMPILER}" if sys.platform.startswith("linux") else ""
        raise Unsupported(f"{error}{remedy}", error.reasons) from None

    named: dict[str, Any] = buffers._asdict()
    aligned: dict[str, Any] = {name: _aligned(one) for name, one in named.items() if isinstance(one, np.ndarray)}
    buffers = buffers._replace(**aligned)
    mods = trace_mods(problem, buffers)
    on = replace(DEVICES[device], sms=1)  # its keys are not divided
    plan = choose(problem, on, mods and mods.structure, spec)
    operands = prepare(problem, plan, buffers, _address, mods)
    launched, observed = [], list[Observation]()
    for launch, params in launches(problem, plan, operands):
        function = Module(render_kernel(launch.spec)).get_function(entry_of(launch.spec))
        counters = function(
            launch.grid,
            launch.block,
            params,
            shared_mem=launch.shared_bytes,
            options=Options(counters=True),
            observed=observed if launch.spec is spec else None,
        )
        launched.append(Launched(str(launch.spec), launch.grid[0], launch.block[0], counters))
    if operands.out is not buffers.out:
        buffers.out[...] = operands.out
    walks = _walks(problem, spec, plan.pack, operands, observed)
    return Trace(
        problem,
        device,
        spec,
        plan.pack,
        walks,
        tuple(launched),
        buffers.out,
        buffers.lse,
        *_errors(arguments, problem, buffers),
    )


def _spec(problem: Problem, buffers: Buffers, device: str) -> FwdSpec:
    traced = trace_mods(problem, buffers)
    on = DEVICES[device]
    unmapped = map_refusals(problem, buffers, on)
    spec = choose_spec(selector_of(problem, on, traced and traced.structure, unmapped), on)
    if spec.family != _FAMILY:
        raise ValueError(
            f"only the kernel {_FAMILY} shows its steps, which takes float16 and bfloat16 on GPUs from A100 on but "
            f"for Hopper's; {problem.dtype} on {device} is for {spec.family}: try dtype float16, device A100"
        )
    return spec


def _aligned(array: Array) -> Array:
    """A copy that begins where an array on a GPU may begin; another layout than C's is left alone."""
    if not array.flags.c_contiguous:
        return array
    whole = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _address(array: Any) -> int:
    address: int = array.ctypes.data
    return address


# --- from observations to walks ------------------------------------------------------------------------------------


class _Work(NamedTuple):
    """FwdWork and KeyTiles, as the kernel shows them."""

    batch: int
    head: int
    row_begin: int
    split: int
    begin: int
    end: int
    full_begin: int
    full_end: int


def _walks(
    problem: Problem, spec: FwdSpec, pack: int, operands: Operands, observed: Sequence[Observation]
) -> tuple[Walk, ...]:
    shown: dict[int, dict[str, dict[int, list[bytes]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for one in observed:
        shown[one.block][one.event][one.thread].append(one.data)
    walks = [_walk(problem, spec, pack, operands, block, events) for block, events in shown.items()]
    return tuple(sorted(walks, key=lambda walk: (walk.batch, walk.head, walk.row_begin)))


def _walk(
    problem: Problem,
    spec: FwdSpec,
    pack: int,
    operands: Operands,
    block: int,
    events: dict[str, dict[int, list[bytes]]],
) -> Walk:
    work = _Work(*np.frombuffer(events["block"][0][0], np.int32).tolist())
    num_rows = min(spec.tile.block_m, problem.seqlen_q * pack - work.row_begin)
    steps = tuple(_steps(problem, spec, num_rows, events))
    rows = (work.row_begin // pack, (work.row_begin + num_rows - 1) // pack)
    marks = _marks(operands, work, spec.tile.block_m, pack)
    by_tile = {step.tile: step for step in steps}
    num_tiles = -(-problem.seqlen_k // spec.tile.block_n)
    fates = tuple(_fate(problem, spec, rows, tile, by_tile.get(tile), marks) for tile in range(num_tiles))
    return Walk(block, work.batch, work.head, work.row_begin, num_rows, steps, fates)


def _steps(problem: Problem, spec: FwdSpec, num_rows: int, events: dict[str, dict[int, list[bytes]]]) -> Iterator[Step]:
    """A block's steps.  A warp has 16 rows; of a fragment lane 4 g + c holds rows g and g + 8, columns 2 c and 2 c + 1
    of each eight."""
    block_n, threads = spec.tile.block_n, range(spec.num_threads)
    scale = np.float32(1 if spec.features.scale_first else problem.scale)

    def fragments(event: str, index: int) -> Array:
        """(warps, g, c, values) of all threads."""
        data = b"".join(events[event][thread][index] for thread in threads)
        return np.frombuffer(data, np.float32).reshape(len(threads) // 32, 8, 4, -1)

    def matrix(event: str, index: int) -> Array:
        held = fragments(event, index)
        held = held.reshape(*held.shape[:3], -1, 2, 2)  # ..., eights of columns, rows g and g + 8, pairs of columns
        return held.transpose(0, 4, 1, 3, 2, 5).reshape(spec.tile.block_m, -1)[:num_rows]

    for index, shown in enumerate(events["tile"].get(0, ())):
        tile, is_full, is_whole = np.frombuffer(shown, "i4, ?, ?")[0].tolist()
        state = fragments("softmax", index).reshape(-1, 8, 4, 3, 2).transpose(3, 2, 0, 4, 1)  # value, c, warp, half, g
        row_max, sums, correction = state.reshape(3, 4, -1)[..., :num_rows]
        scores = matrix("scores", index)[:, : min(block_n, problem.seqlen_k - tile * block_n)]
        yield Step(
            tile,
            is_full,
            is_whole,
            scores * scale,
            row_max[0] * scale,
            (sums[0] + sums[1]) + (sums[2] + sums[3]),  # each lane has its own part
            correction[0],
            matrix("output", index)[:, : problem.head_dim_v],
        )


def _marks(operands: Operands, work: _Work, block_m: int, pack: int) -> dict[str, Array]:
    """What the summaries of the bool mask and of mask_mod say of the block's tiles of keys: see mask_summary.cu."""
    row_tile, found = work.row_begin // block_m, {}
    if operands.summary is not None:
        array = operands.summary.array  # (*batch, heads, tiles of rows, tiles of keys), axes of 1 broadcast
        batch = np.broadcast_to(array, (*operands.query.shape[:-3], *array.shape[-3:])).reshape(-1, *array.shape[-3:])
        found["mask"] = _row(batch[work.batch], work.head, row_tile)
    if operands.mod_summary is not None:
        array = operands.mod_summary.array
        found["mask_mod"] = _row(array[work.batch % len(array)], work.head // pack, row_tile)
    return found


def _row(marks: Array, head: int, row_tile: int) -> Array:
    return marks[head % marks.shape[0], row_tile % marks.shape[1]]


def _fate(
    problem: Problem,
    spec: FwdSpec,
    rows: tuple[int, int],
    tile: int,
    step: Step | None,
    marks: dict[str, Array],
) -> TileFate:
    if step is not None and step.is_full and step.is_whole:
        return TileFate(tile, "whole", ())
    block_n, band = spec.tile.block_n, problem.band
    first, last = tile * block_n, min((tile + 1) * block_n, problem.seqlen_k) - 1
    why = []
    if step is None:  # nothing of it for anybody
        if band.upper is not None and first > rows[1] + band.upper:
            why.append("upper")
        if band.lower is not None and last < rows[0] + band.lower:
            why.append("lower")
        why += [name for name, of_tile in marks.items() if not why and of_tile[tile % len(of_tile)] == 0]
        return TileFate(tile, "skipped", tuple(why))
    if band.upper is not None and last > rows[0] + band.upper:
        why.append("upper")
    if band.lower is not None and first < rows[1] + band.lower:
        why.append("lower")
    if first + block_n > problem.seqlen_k:
        why.append("end")
    if not step.is_whole:
        # Without a summary nothing is known of a tile, and the mask is looked at.
        present = {"mask": problem.has_bool_mask, "mask_mod": problem.has_mask_mod}
        why += [name for name, exists in present.items() if exists and (name not in marks or marks[name][tile] != 2)]
    return TileFate(tile, "cut", tuple(why))


def _errors(arguments: dict[str, Any], problem: Problem, buffers: Buffers) -> tuple[float, float, float]:
    """The largest errors of out, absolute and in units, and of lse, against `math` in float64."""
    exact = dict(arguments, backend="math")
    for name in ("query", "key", "value"):
        exact[name] = np.asarray(arguments[name]).astype(np.float64)
    out, lse = attention(**exact)
    spread = attention(**exact | {"value": np.abs(exact["value"])})[0]
    error = np.abs(buffers.out.reshape(out.shape).astype(np.float64) - out)
    roundoff = float(ml_dtypes.finfo(problem.element.storage).eps) / 2
    unit = roundoff * spread
    units = np.divide(error, unit, out=np.zeros_like(error), where=unit > 0)
    both = np.isfinite(lse)
    lse_error = np.abs(buffers.lse.reshape(lse.shape)[both] - lse[both])
    return float(error.max(initial=0)), float(units.max(initial=0)), float(lse_error.max(initial=0))
