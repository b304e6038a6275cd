"""What a call of `attention` would do, and why: kernel, tile, grid, splits, memory and copies, without doing it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .api import attention
from .backends.registry import name_of, reasons_of
from .errors import Unsupported
from .interop import NATIVE, is_foreign, read_all
from .problem.normalize import normalize
from .problem.problem import Buffers, Problem

if TYPE_CHECKING:  # what knows of kernels takes long to import: `explain` does so when it is called
    from .build.modding import CallMods
    from .build.operands import Copy, Summary
    from .plan.choose import Candidate
    from .plan.device import DeviceSpec
    from .plan.specs import Plan

__all__ = ["Explanation", "explain"]

_SIGNATURE = inspect.signature(attention)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found; its str is the text.

    Attributes
    ----------
    problem : Problem
        The call without its arrays.
    backend : str
        The backend that is asked.
    device : DeviceSpec or None
        What its kernels run on; None for a backend without kernels.
    plan : Plan or None
        The launches, in order; None where nothing is launched, or nothing can be.
    copies : tuple of Copy
        Operands that kernels can't take as they are: name, reason, bytes.
    candidates : tuple of Candidate
        Kernels that hold the dtype and head dims on that device, the choice among them.
    refusals : tuple of str
        Why the backend can't run the call; empty if it can.
    others : dict[str, tuple of str]
        For each other backend why it can't; empty where it can.
    summaries : tuple of Summary
        Launches ahead of the plan's, which tell what is known of tiles of a bool mask or a mask_mod: launch, bytes.
    """

    problem: Problem
    backend: str
    device: DeviceSpec | None = None
    plan: Plan | None = None
    copies: tuple[Copy, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    refusals: tuple[str, ...] = ()
    others: dict[str, tuple[str, ...]] | None = None
    summaries: tuple[Summary, ...] = ()

    def __repr__(self) -> str:
        where = f" on {self.device.name}" if self.device else ""
        launched = ", ".join(str(launch.spec) for launch in self.plan.launches) if self.plan else ""
        return f"<Explanation: {self.backend}{where}{launched and f', {launched}'}>"

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(*args: Any, device: str | DeviceSpec | None = None, **kwargs: Any) -> Explanation:
    """Print and return what a call of `attention` would do, and why: nothing is computed, no GPU is needed.

    Parameters
    ----------
    *args, **kwargs
        The arguments of `attention`.
    device : str or DeviceSpec, optional
        The GPU on which to explain the backend "cuda": a name in `cupyflash.plan.device.DEVICES`, such as "H200" or
        "RTX 4090", in capitals or not; for another GPU a `DeviceSpec` with its numbers.
        NumPy arrays then stand for CuPy arrays of the same layout.  Default: the arrays' own device; for NumPy arrays
        the backend that `attention` would take.

    Returns
    -------
    Explanation
        What was printed, as values.

    Raises
    ------
    TypeError, ValueError
        As `attention`; ValueError for a device or backend that is not known, and for a device with a backend other than
        "cuda".

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import explain
    >>> query = np.zeros((1, 8, 2048, 64), np.float16)
    >>> key = np.zeros((1, 8, 2048, 128), np.float16)[..., ::2]
    >>> _ = explain(query, key, query, is_causal=True, device="H200")  # doctest: +ELLIPSIS
    cuda on H200: sm_90, 132 SMs, 227 KiB of shared memory per block
      cupy float16 batch (1,) heads 8/8/8 L=2048 S=2048 E=64 Ev=64
      scale=0.125, keys j with j - i <= 0
    launches
      fwd_sm90-f16-d64-m128n128w12qs2e8-causal: 128 blocks of 384 threads, 80.09 KiB of shared memory each
    ...
    copies
      key: rows are not contiguous: 4 bytes between elements of 2; 2 MiB
    ...
    """
    arguments = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
    name = arguments.pop("backend", None)
    if type(arguments["query"]) not in NATIVE and is_foreign(arguments["query"]):
        arguments = read_all(arguments)
    if arguments.get("seed") is None:
        arguments["seed"] = 0  # one that is drawn would move the caller's generator on
    problem, buffers = normalize(**arguments)
    if device is not None and name not in (None, "cuda"):
        raise ValueError(f'backend must be "cuda" or None where a device is named, but was {name!r}')
    if device is not None:
        found = _explain_kernels(replace(problem, library="cupy"), buffers, "cuda", _device(device))
    else:
        chosen = name_of(problem, name)
        reasons = reasons_of(problem).get(chosen, ("it has no kernels in this version",))
        on = _device_of(chosen, problem, buffers)
        if reasons or on is None:
            found = Explanation(problem, chosen, on, refusals=reasons, others=_others(problem, chosen))
        else:
            found = _explain_kernels(problem, buffers, chosen, on)
    print(found)
    return found


def _device(device: str | DeviceSpec) -> DeviceSpec:
    from .plan.device import DEVICES, DeviceSpec

    if isinstance(device, DeviceSpec):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device must be a name or a DeviceSpec, but was {device!r}")
    known = {_spelled(name): found for name, found in DEVICES.items()}
    if _spelled(device) not in known:
        raise ValueError(
            f"device must be one of {', '.join(DEVICES)}, or a cupyflash.plan.device.DeviceSpec, but was {device!r}"
        )
    return known[_spelled(device)]


def _spelled(name: str) -> str:
    """As it is typed: "rtx4090"."""
    return name.replace(" ", "").casefold()


def _device_of(backend: str, problem: Problem, buffers: Buffers) -> DeviceSpec | None:
    """What a backend's kernels run on; None if it has none, or no arrays on one."""
    if backend == "emulator":
        from .backends.emulated import chosen_device

        return chosen_device()
    if backend == "cuda" and problem.library == "cupy":
        from .backends.cuda import device_spec

        return device_spec(problem.namespace, buffers.query.device.id)
    return None


def _explain_kernels(problem: Problem, buffers: Buffers, backend: str, device: DeviceSpec) -> Explanation:
    from .build.bulk import map_refusals
    from .build.modding import trace_mods
    from .build.operands import batch_refusals, copies_of
    from .plan.choose import candidates, choose, refusals, selector_of

    others = _others(problem, backend)
    reasons = tuple(refusals(problem))
    plan, mods, traced = None, None, None
    unmapped = map_refusals(problem, buffers, device)
    if not reasons:
        try:
            traced = trace_mods(problem, buffers)
            mods = traced and traced.structure
            plan = choose(problem, device, mods, unmapped=unmapped)
        except Unsupported as error:
            reasons = error.reasons["cuda"]
        else:
            reasons = tuple(batch_refusals(problem, buffers, plan.row_alignment, _address))
    if plan is not None and not plan.launches:
        return Explanation(problem, backend, device, plan, others=others)
    found = tuple(candidates(selector_of(problem, device, mods, unmapped), device))
    if plan is None or reasons:
        return Explanation(problem, backend, device, None, (), found, reasons, others)
    copies = tuple(copies_of(plan, buffers, _address))
    return Explanation(
        problem, backend, device, plan, copies, found, (), others, _summaries(problem, plan, buffers, traced)
    )


def _summaries(problem: Problem, plan: Plan, buffers: Buffers, mods: CallMods | None) -> tuple[Summary, ...]:
    from .build.operands import summaries_of

    # Arrays that stand for CuPy's are NumPy's for what allocates.
    library = "numpy" if isinstance(buffers.query, np.ndarray) else problem.library
    return tuple(summaries_of(replace(problem, library=library), plan, buffers, _address, mods))


def _others(problem: Problem, backend: str) -> dict[str, tuple[str, ...]]:
    return {name: reasons for name, reasons in reasons_of(problem).items() if name != backend}


def _address(array: Any) -> int:
    address: int = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
    return address


# --- as text -------------------------------------------------------------------------------------------------------


def _lines(found: Explanation) -> list[str]:
    lines = [_heading(found), *(f"  {line.strip()}" for line in str(found.problem).splitlines())]
    if found.refusals:
        lines += ["can't run this call", *(f"  {reason}" for reason in found.refusals)]
        able = [name for name, reasons in (found.others or {}).items() if not reasons]
        lines += ["can run it", *([f'  {name}: pass backend="{name}"' for name in able] or ["  no backend"])]
    elif found.device is None:
        lines += ["launches", "  no kernel" + _INSTEAD.get(found.backend, "")]
    elif found.plan is not None:
        lines += [*_launches(found, found.plan, found.device), *_copies(found)]
    if found.candidates and not found.refusals:
        lines += ["candidates", *(f"  {line}" for line in _candidates(found))]
    return lines


_INSTEAD = {
    "numpy": ': tiles of the scores on NumPy and BLAS; device="H200", say, explains kernels for a GPU',
    "math": ": the formula as it reads, with all scores in memory",
}


def _heading(found: Explanation) -> str:
    device = found.device
    if device is None:
        return found.backend
    return (
        f"{found.backend} on {device.name}: {device.arch}, {device.sms} SMs, {_size(device.smem_per_block)} of shared "
        "memory per block"
    )


def _launches(found: Explanation, plan: Plan, device: DeviceSpec) -> list[str]:
    from .plan.choose import blocks_per_sm
    from .plan.specs import FwdSpec
    from .plan.tiles import FAMILIES

    lines = ["launches"]
    for launch, nbytes in found.summaries:
        lines.append(
            f"  {launch.spec}: {launch.grid[0]} blocks of {launch.block[0]} threads; which tiles of scores are empty, "
            f"which whole: {_size(nbytes)}"
        )
    for launch in plan.launches:
        shared = f", {_size(launch.shared_bytes)} of shared memory each" if launch.shared_bytes else ""
        lines.append(f"  {launch.spec}: {launch.grid[0]} blocks of {launch.block[0]} threads{shared}")
    if not plan.launches:
        return [*lines, "  none: there is nothing to compute"]
    forward = plan.launches[0]
    spec = forward.spec
    assert isinstance(spec, FwdSpec)
    tile, family = spec.tile, FAMILIES[spec.family]
    per_sm = blocks_per_sm(spec, device)
    at_once = f"{per_sm} block{'s' * (per_sm > 1)} at once on an SM"
    waves = (forward.items or forward.grid[0]) / (per_sm * device.sms)
    rounds = f"{forward.grid[0]} blocks, {forward.items} items in {waves:.2f} rounds"
    grid = rounds if forward.items else f"{waves:.2f} waves of blocks"
    together = f"{plan.section} {'groups of ' * (plan.pack > 1)}heads"
    order = f"; tiles of {together} in the order of their lengths" if plan.section > 1 else ""
    splits = f"the keys of a tile of queries are divided among {plan.num_splits} blocks"
    if plan.num_splits > 1:
        problem = found.problem
        rows = plan.num_splits * problem.batch_size * problem.num_heads_q * problem.seqlen_q
        partial = rows * (problem.head_dim_v + 2) * problem.element.accumulator.itemsize
        splits += f", which leave {_size(partial)} of partial results"
    else:
        splits = "1, the keys of a tile of queries are not divided"
        splits += "" if family.splits else f": {spec.family} cannot"
    packing = f"{plan.pack} query heads share a tile" if plan.pack > 1 else "a tile holds queries of one head"
    return [
        *lines,
        f"  tile: {tile.block_m} queries by {tile.block_n} keys at a time, {tile.num_warps} warps; {packing}",
        f"  grid: {at_once}, {grid}{order}",
        f"  splits: {splits}",
    ]


def _copies(found: Explanation) -> list[str]:
    lines = [f"  {copy.operand}: {copy.reason}; {_size(copy.nbytes)}" for copy in found.copies]
    return ["copies", *(lines or ["  none: the kernels take all operands as they are"])]


def _candidates(found: Explanation) -> list[str]:
    """One line each down to the choice and its like; one for all that pad the head dims more, or of another family."""
    chosen = next(one.spec for one in found.candidates if not one.reasons and not one.behind)
    lines: list[str] = []
    rest: dict[str, dict[str, None]] = {}
    reached = False
    for candidate in found.candidates:
        spec = candidate.spec
        is_like = (spec.family, spec.head_dim, spec.head_dim_v) == (chosen.family, chosen.head_dim, chosen.head_dim_v)
        reached = reached or is_like
        if is_like or not reached:
            lines.append(f"{spec}: {'; '.join(candidate.reasons) or candidate.behind or 'chosen'}")
        else:
            dims = rest.setdefault(spec.family, {})
            dims[f"{spec.head_dim} and {spec.head_dim_v}"] = None
    for family, dims in rest.items():
        why = "larger than need be" if family == chosen.family else f"{chosen.family} is preferred"
        lines.append(f"{family} for the head dims {', '.join(dims)}: {why}")
    return lines


def _size(nbytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} bytes"
