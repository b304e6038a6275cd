"""The `numpy` backend: tiled attention on BLAS, in O(L) extra memory, never an L×S array.

This file cuts a call into jobs and shares them out to threads; `block.py` does one job.  A *unit* is one key head with
the query heads that share it, a *job* is a block of rows of a few units::

    call  →  slices (views in which every unit has one key head and one value head)  →  jobs (slice, units, rows)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ..environment import debug_level, say
from ..interrupts import without_float_warnings
from ..problem.parts import Parts
from ..problem.problem import Buffers, Problem
from ..progress import Meter, new_meter, show_nothing_within
from .blas import control, one_blas_thread
from .block import FEW_ROWS, Block, Tiling
from .joining import join_arrays
from .pool import num_threads, run_jobs
from .slices import Slice, slice_call

__all__ = ["NumpyBackend"]

# Below this many floating-point operations (about 0.5 ms) a second thread costs more than it brings.
_FLOPS_WORTH_A_THREAD = 5e7
# The list of jobs of a call with no more rows is remembered.
_ROWS_WORTH_REMEMBERING = 2**10
# Up to this m·n·k OpenBLAS runs a product on the calling thread, whatever its thread count.
_PRODUCT_WORTH_A_THREAD = 2**18


class NumpyBackend:
    """Tiled attention on NumPy arrays."""

    def reasons(self, problem: Problem) -> list[str]:
        """See `cupyflash.backends.registry.Backend`."""
        reasons = []
        if problem.library != "numpy":
            reasons.append("it takes NumPy arrays only")
        if problem.precision != "ieee":
            reasons.append(f"it has no precision {problem.precision!r}, only 'ieee'")
        return reasons

    def run(self, problem: Problem, buffers: Buffers) -> None:
        """See `cupyflash.backends.registry.Backend`."""
        available = num_threads()
        if buffers.weights is not None:
            buffers.weights.fill(-math.inf if problem.weights_stage == "biased" else 0)
        if 0 in buffers.out.shape[:-1]:
            return
        slices = slice_call(problem, buffers)
        first = slices[0]
        tiling, few_jobs = _schedule(
            problem, first.lead_shape, len(slices), first.packs_key or first.packs_value, available
        )
        jobs: Iterable[_Job] = (
            few_jobs if few_jobs is not None else _jobs(problem, first.lead_shape, len(slices), tiling)
        )
        if level := debug_level():
            jobs = tuple(jobs)
            say(_description(problem, tiling, len(jobs), level))
        meter = new_meter()
        if meter is not None:
            jobs = tuple(jobs)
            meter.start(sum(_count(problem, tiling, slices[job.slice], job).scores for job in jobs))

        def attend(job: _Job, checkpoint: Callable[[], None] | None) -> None:
            part = slices[job.slice]
            block = Block(problem, buffers, tiling, part, job.outer, job.first_unit, job.first_row)
            if meter is not None:
                show_nothing_within()
                block.run(_counting(meter, _count(problem, tiling, part, job), checkpoint))
            else:
                block.run(checkpoint and (lambda key: checkpoint()))

        def attend_silently(job: _Job, checkpoint: Callable[[], None] | None) -> None:
            without_float_warnings(attend, job, checkpoint)

        if tiling.guards_blas:
            workers = tiling.threads if control() else 1
            one_blas_thread.run(lambda: run_jobs(attend_silently, jobs, workers))
        else:
            without_float_warnings(run_jobs, attend, jobs, 1)
        if meter is not None:
            meter.finish()

    def merge_reasons(self, parts: Parts) -> list[str]:
        """See `cupyflash.backends.registry.Merger`."""
        return [] if parts.library == "numpy" else ["it takes NumPy arrays only"]

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        """See `cupyflash.backends.registry.Merger`."""
        return join_arrays(parts)


# --- cutting a call into jobs --------------------------------------------------------------------------------------


def _description(problem: Problem, tiling: Tiling, num_jobs: int, level: int) -> Iterator[str]:
    """What CUPYFLASH_DEBUG prints of a call."""
    threads = min(tiling.threads if control() else 1, num_jobs)
    yield f"numpy: tiles of {tiling.rows} rows and {tiling.keys} keys; jobs: {num_jobs}, threads: {threads}"
    if level >= 2:
        yield from (f"  {line.strip()}" for line in str(problem).splitlines())


@lru_cache(maxsize=512)
def _schedule(
    problem: Problem, lead_shape: tuple[int, ...], num_slices: int, packs: bool, available_threads: int
) -> tuple[Tiling, tuple[_Job, ...] | None]:
    """The tiling of a call, and its jobs if they are few."""
    tiling = _tiling(problem, lead_shape[-1], packs, available_threads)
    *outer, units = lead_shape
    num_jobs = num_slices * math.prod(outer) * -(-units // tiling.units) * -(-problem.seqlen_q // tiling.rows)
    tiling = tiling._replace(threads=min(tiling.threads, num_jobs))  # a thread without a job takes time to wake
    is_short = num_slices * math.prod(lead_shape) * problem.seqlen_q <= _ROWS_WORTH_REMEMBERING
    return tiling, tuple(_jobs(problem, lead_shape, num_slices, tiling)) if is_short else None


def _tiling(problem: Problem, units: int, packs: bool, available_threads: int) -> Tiling:
    """Tile sizes, from measurements on a two-core AVX-512 machine with 1 MiB of L2 cache per core.

    Few rows (decoding) are bound by reading K and V: tiles that OpenBLAS still takes for small matrices (rows · keys ·
    E < 2^18), multiplied in one batch, read at 10 GB/s instead of 3.  Where K and V are `packed` first, the batch is
    what fits the cache.  Many rows are bound by arithmetic: the more rows share a tile of keys the better, but under a
    band tall tiles waste work on its edges.  Blocks of few scores take several units at once.
    """
    seqlen_q, seqlen_k = problem.seqlen_q, max(1, problem.seqlen_k)
    group = math.gcd(problem.num_heads_q // problem.num_heads_k, problem.num_heads_q // problem.num_heads_v)
    total_units = problem.batch_size * problem.num_heads_q // group
    width = max(1, problem.head_dim, problem.head_dim_v)
    unit_rows = group * seqlen_q
    lower, upper = problem.band.lower, problem.band.upper
    visible_keys = seqlen_k if lower is None or upper is None else min(seqlen_k, max(1, upper - lower + 1))
    flops = 2.0 * total_units * unit_rows * visible_keys * (problem.head_dim + problem.head_dim_v)
    threads = available_threads if flops > _FLOPS_WORTH_A_THREAD else 1

    if unit_rows <= FEW_ROWS:
        rows = seqlen_q
        keys = _clamp(2**17 // (unit_rows * width), 16, 256)
        keys = min(seqlen_k, 2 ** int(math.log2(keys)) if unit_rows > 1 else 2**14)
        batch_keys = (2**17 // width if packs else 2**18 // unit_rows) // keys * keys
        batch_keys = _clamp(batch_keys, keys, seqlen_k)
        job_units = 2**18 // (unit_rows * batch_keys)
        if packs:
            job_units = min(job_units, 2**17 // (width * batch_keys))
    else:
        rows, keys = 256, 512
        if problem.has_score_mod or problem.has_mask_mod or problem.has_alibi or problem.dropout_p:
            keys = 256  # the functions make temporary arrays as large as a tile, or several times that
        elif problem.band.is_full:
            enough_jobs = 4 * threads if threads > 1 else 1
            rows = next((rows for rows in (1024, 512) if total_units * unit_rows >= enough_jobs * rows), rows)
            keys = 2**18 // rows
        rows = _clamp(min(rows, 2**17 // width) // group, 1, seqlen_q)
        keys = batch_keys = _clamp(2**18 // width, 16, min(seqlen_k, keys))
        job_units = 2**17 // (unit_rows * keys) if rows == seqlen_q else 1
    if threads > 1:
        job_units = min(job_units, -(-total_units // threads))
    return Tiling(
        units=_clamp(job_units, 1, units),
        rows=rows,
        keys=keys,
        batch_keys=batch_keys,
        threads=threads,
        guards_blas=threads > 1 or group * rows * keys * width > _PRODUCT_WORTH_A_THREAD,
        longest_first=upper is not None,
    )


def _clamp(number: int, least: int, most: int) -> int:
    """`number` within [least, most]; `most` wins."""
    return min(max(number, least), most)


class _Job(NamedTuple):
    slice: int
    outer: tuple[int, ...]  # index into all leading axes but the last
    first_unit: int
    first_row: int


def _jobs(problem: Problem, lead_shape: tuple[int, ...], num_slices: int, tiling: Tiling) -> Iterator[_Job]:
    """All jobs of a call; under a causal mask the later rows, which see more keys, come first."""
    first_rows = range(0, problem.seqlen_q, tiling.rows)
    if not tiling.longest_first:
        for part, outer, first_unit in _places(lead_shape, num_slices, tiling):
            for first_row in first_rows:
                yield _Job(part, outer, first_unit, first_row)
        return
    for first_row in reversed(first_rows):
        for part, outer, first_unit in _places(lead_shape, num_slices, tiling):
            yield _Job(part, outer, first_unit, first_row)


def _places(lead_shape: tuple[int, ...], num_slices: int, tiling: Tiling) -> Iterator[tuple[int, tuple[int, ...], int]]:
    for part in range(num_slices):
        for outer in itertools.product(*map(range, lead_shape[:-1])):
            for first_unit in range(0, lead_shape[-1], tiling.units):
                yield part, outer, first_unit


# --- counting what is done -----------------------------------------------------------------------------------------


class _Count(NamedTuple):
    """The scores that a job walks over: so many of each key in [start, stop)."""

    of_a_key: int
    start: int
    stop: int

    @property
    def scores(self) -> int:
        return self.of_a_key * max(0, self.stop - self.start)


def _count(problem: Problem, tiling: Tiling, part: Slice, job: _Job) -> _Count:
    units = min(tiling.units, part.lead_shape[-1] - job.first_unit)
    last_row = min(job.first_row + tiling.rows, problem.seqlen_q)
    keys = problem.band.key_range(job.first_row, last_row, problem.seqlen_k)
    return _Count(units * part.query.shape[-3] * (last_row - job.first_row), *keys)


def _counting(meter: Meter, count: _Count, checkpoint: Callable[[], None] | None) -> Callable[[int], None]:
    """A checkpoint for one job that counts what is done for the first time."""
    seen = count.start

    def passed(key: int) -> None:
        nonlocal seen
        if checkpoint is not None:
            checkpoint()
        key = min(key, count.stop)
        if key > seen:
            scores, seen = count.of_a_key * (key - seen), key
            meter.add(scores)

    return passed
