"""Which kernel is the fastest for a call on this GPU: timed, and remembered."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .api import attention
from .errors import Unsupported
from .interop import NATIVE, is_foreign, read_all
from .problem.checks import device_of
from .problem.normalize import normalize
from .problem.problem import Problem

if TYPE_CHECKING:  # what knows of kernels takes long to import: `tune` does so when it is called
    from .plan.choose import Candidate
    from .plan.device import DeviceSpec
    from .plan.specs import FwdSpec

__all__ = ["Tuning", "tune"]

_SIGNATURE = inspect.signature(attention)
_ROUNDS = 9
_SAMPLE_SECONDS = 5e-3
_MOST_CALLS = 200
# Another kernel has to be faster than the table's choice by more than two runs of the same one differ.
_MARGIN = 1.01


@dataclass(frozen=True)
class Tuning:
    """What `tune` found; its str is a table.

    Attributes
    ----------
    problem : Problem
        The call without its arrays.
    device : DeviceSpec
    seconds : dict of FwdSpec to float
        Of a call with each kernel, the fastest first: the median of all samples.
    before : FwdSpec
        What the table of tiles would have chosen.
    chosen : FwdSpec
        What `attention` uses from now on for calls of this kind: the fastest, or `before` if that is less than one per
        cent slower.
    """

    problem: Problem
    device: DeviceSpec
    seconds: dict[FwdSpec, float]
    before: FwdSpec
    chosen: FwdSpec

    def __str__(self) -> str:
        width = max(len(str(spec)) for spec in self.seconds)
        lines = []
        for spec, taken in self.seconds.items():
            notes = ["chosen"] * (spec == self.chosen) + ["the table's choice"] * (spec == self.before)
            lines.append(f"{spec!s:{width}} {1e6 * taken:9.1f} µs  {', '.join(notes)}".rstrip())
        return "\n".join([f"{self.device.name}: {self.problem}", *lines])


def tune(*args: Any, **kwargs: Any) -> Tuning:
    """Time the kernels that can run a call of `attention`, and use the fastest for calls of its kind from now on.

    Without it a table decides, which was made by counting, not by timing.  What is found is kept in the cache, for this
    GPU and this version of the library, and later processes use it.  It holds for calls that differ in their batch,
    their heads and their lengths alone, as long as there are as many queries in a tile and enough of them to fill the
    GPU, or too few, as here: what `Selector` in cupyflash.plan.choose says.  To forget it all, delete the files
    ``tuned-*.json`` in the cache's folder.

    It takes about a second for each kernel, most of it to compile it.  The same arrays are read again and again, so
    what fits into the L2 cache is found there.  The GPU should have nothing else to do.

    Parameters
    ----------
    *args, **kwargs
        The arguments of `attention`, with arrays on a GPU.  `out` is overwritten.

    Returns
    -------
    Tuning
        The times; print it.

    Raises
    ------
    TypeError, ValueError
        As `attention`; ValueError for a backend other than "cuda", and where there is nothing to compute.
    Unsupported
        There is no GPU that could run the call, with the reasons.
    OSError
        The cache can't be written.

    Examples
    --------
    On a machine with a GPU::

        query, key, value = (cupy.random.standard_normal((4, 16, 4096, 128)).astype(cupy.float16) for _ in range(3))
        print(cupyflash.tune(query, key, value, is_causal=True))
        out = cupyflash.attention(query, key, value, is_causal=True)  # with the kernel that was the fastest

    Without one it says so:

    >>> import numpy as np
    >>> from cupyflash import tune
    >>> query = np.zeros((1, 8, 64, 64), np.float16)
    >>> tune(query, query, query)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    cupyflash.errors.Unsupported: this call can't be timed: it takes CuPy arrays only, and CuPy is not installed: …
    """
    from .backends.cuda import CudaBackend, device_spec
    from .backends.tuned import load, save
    from .build.bulk import map_refusals
    from .build.modding import trace_mods
    from .plan.choose import candidates, choose, key_of, selector_of, use_timed

    arguments = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
    name = arguments.pop("backend", None)
    if name not in (None, "cuda"):
        raise ValueError(f'backend must be "cuda" or None, since tune times its kernels, but was {name!r}')
    if type(arguments["query"]) not in NATIVE and is_foreign(arguments["query"]):
        arguments = read_all(arguments)
    if arguments.get("seed") is None:
        arguments["seed"] = 0  # one that is drawn would move the caller's generator on
    with device_of(arguments["query"]):
        problem, buffers = normalize(**arguments)
    backend = CudaBackend()
    if reasons := tuple(backend.reasons(problem)):
        raise Unsupported(f"this call can't be timed: {'; '.join(reasons)}", {"cuda": reasons})

    cupy = problem.namespace
    with buffers.query.device as on:
        device = device_spec(cupy, on.id)
        mods = trace_mods(problem, buffers)
        structure = mods and mods.structure
        unmapped = map_refusals(problem, buffers, device)
        if not choose(problem, device, structure, unmapped=unmapped).launches:
            raise ValueError("tune needs a call that computes something, but the arrays have an axis of length 0")
        selector = selector_of(problem, device, structure, unmapped)
        specs = [one.spec for one in _worth_timing(candidates(selector, device))]
        runs = [backend.prepared(problem, buffers, choose(problem, device, structure, spec), mods) for spec in specs]
        on.synchronize()  # what was copied to prepare them is there
        samples = _samples(runs, cupy)
    medians = [statistics.median(taken) for taken in samples]
    before, least = specs[0], min(medians)
    chosen = before if medians[0] <= _MARGIN * least else specs[medians.index(least)]
    seconds = dict(sorted(zip(specs, medians, strict=True), key=lambda item: item[1]))
    times = {str(spec): taken for spec, taken in seconds.items()}
    save(device, key_of(selector), str(chosen), {"asked": str(problem), "seconds": times})
    use_timed(device, load(device))
    return Tuning(problem, device, seconds, before, chosen)


def _worth_timing(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that can run, but for those that pad the head dims more than another one of their family."""
    legal = [candidate for candidate in found if not candidate.reasons]
    first: dict[str, tuple[int, int]] = {}
    for candidate in legal:
        first.setdefault(candidate.spec.family, (candidate.spec.head_dim, candidate.spec.head_dim_v))
    return [one for one in legal if (one.spec.head_dim, one.spec.head_dim_v) == first[one.spec.family]]


def _samples(runs: Sequence[Callable[[], None]], cupy: Any) -> list[list[float]]:
    """For each run seconds of a call, sample by sample; they take turns, so that what clocks do meets all of them.

    Graphs of several calls are timed: launched one by one, short kernels would all take the time of a launch.
    """
    with cupy.cuda.Stream(non_blocking=True) as stream:
        graphs: list[tuple[Any, int]] = []
        for run in runs:
            run()  # compiles and loads
            once = _seconds(run, stream, cupy)
            calls = min(_MOST_CALLS, max(1, round(_SAMPLE_SECONDS / max(once, 1e-7))))
            stream.begin_capture()
            for _ in range(calls):
                run()
            graphs.append((stream.end_capture(), calls))
        samples: list[list[float]] = [[] for _ in runs]
        for _ in range(1 + _ROUNDS):
            for taken, (graph, calls) in zip(samples, graphs, strict=True):
                taken.append(_seconds(partial(graph.launch, stream), stream, cupy) / calls)
    return [taken[1:] for taken in samples]  # the first round warms up


def _seconds(run: Callable[[], None], stream: Any, cupy: Any) -> float:
    """The time on the stream."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    milliseconds: float = cupy.cuda.get_elapsed_time(start, end)
    return 1e-3 * milliseconds
