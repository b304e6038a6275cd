"""The kernels that GPUs of one architecture can run, compiled, with what each takes of the GPU.

No GPU is needed, NVRTC is.  Compiled kernels go into the cache, where `attention` finds them.
"""

from __future__ import annotations

import json
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..build.cache import Cache
from ..build.nvrtc import compile_cubin
from ..build.rendering import arch_for, entry_of, render_kernel
from ..plan.choose import every_spec
from ..plan.device import DEVICES, DeviceSpec
from ..plan.specs import CombineSpec, FwdSpec, KernelSpec, WeightsSpec
from ..plan.tiles import FAMILIES, rows_for
from ..problem.dtypes import dtype_named

__all__ = ["ARCHITECTURES", "KernelRow", "as_json", "as_table", "device_of", "kernel_rows", "specs_of"]

#: Those of the known GPUs, oldest first.
ARCHITECTURES: tuple[str, ...] = tuple(
    dict.fromkeys(device.arch for device in sorted(DEVICES.values(), key=lambda device: device.cc))
)
_FIRST_WITH_SUFFIX = (9, 0)  # sm_90a: instructions of that architecture alone


@dataclass(frozen=True)
class KernelRow:
    """A compiled kernel.  The fields are the keys of the JSON form.

    Parameters
    ----------
    name : str
        Of the spec.
    arch : str
    registers, stack_bytes, spill_bytes : int
        Of a thread; neither stack nor spills are wanted.
    smem_bytes : int
        Dynamic shared memory of a block, given at the launch.
    opcodes : dict of str to int
        How many of each instruction the code has, of those in `cupyflash.build.nvrtc.OPCODES`.
    notices : tuple of str
        Lines of the compiler's log that say the code is not what was meant.
    """

    name: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int
    opcodes: dict[str, int]
    notices: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether it keeps everything in registers, and the compiler had nothing to say."""
        return not (self.stack_bytes or self.spill_bytes or self.notices)


def device_of(arch: str) -> DeviceSpec:
    """A known GPU of that architecture.

    Parameters
    ----------
    arch : str
        "sm_80", or from sm_90 on also with the suffix: "sm_90a".

    Raises
    ------
    ValueError
        No known GPU is one.
    """
    for device in DEVICES.values():
        if arch in (device.arch, f"{device.arch}a" if device.cc >= _FIRST_WITH_SUFFIX else device.arch):
            return device
    raise ValueError(
        f"arch must be one of {', '.join(ARCHITECTURES)}, from sm_90 on also with an a behind it, but was {arch!r}"
    )


def specs_of(device: DeviceSpec, match: str = "") -> list[KernelSpec]:
    """Every kernel that a plan may name for that GPU and whose name holds `match`, by name."""
    found = [spec for spec in every_spec() if isinstance(spec, FwdSpec) and _runs_on(spec, device)]
    partial_results = {spec.dtype for spec in found if FAMILIES[spec.family].splits}
    combines = [spec for spec in every_spec() if isinstance(spec, CombineSpec) and spec.dtype in partial_results]
    # A forward pass comes before weights.
    dtypes = {spec.dtype for spec in found}
    weights = [spec for spec in every_spec() if isinstance(spec, WeightsSpec) and spec.dtype in dtypes]
    specs: list[KernelSpec] = [*found, *combines, *weights]
    return sorted((spec for spec in specs if match in str(spec)), key=_by_name)


def _runs_on(spec: FwdSpec, device: DeviceSpec) -> bool:
    itemsize = dtype_named(spec.dtype).storage.itemsize
    dims = (spec.head_dim, spec.head_dim_v)
    return any(
        (row.family, row.head_dim, row.head_dim_v) == (spec.family, *dims)
        and row.baseline == spec.baseline
        and spec.tile in row.tiles
        and not row.reasons(spec.tile, itemsize, device)
        for row in rows_for(spec.dtype, *dims, device.cc)
    )


def _by_name(spec: KernelSpec) -> tuple[tuple[str, int], ...]:
    """d64 before d128."""
    return tuple((word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d*)", str(spec)))


def kernel_rows(specs: Sequence[KernelSpec], arch: str, cache: Path, jobs: int = 1) -> Iterator[KernelRow]:
    """The kernels in their order, each as soon as it and those before it are compiled.

    Parameters
    ----------
    specs : sequence of KernelSpec
    arch : str
    cache : Path
        The folder of a `Cache`.
    jobs : int
        Processes that compile; NVRTC gains nothing from threads.

    Raises
    ------
    Unsupported
        There is no NVRTC.
    KernelCompileError
        It refused a kernel.
    """
    row = partial(_row, arch=arch, cache=cache)
    if jobs == 1 or len(specs) < 2:
        yield from map(row, specs)
        return
    pool = ProcessPoolExecutor(min(jobs, len(specs)), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(row, specs)
    finally:  # what has not begun is not wanted where the caller stops early, or after an error
        pool.shutdown(cancel_futures=True)


def _row(spec: KernelSpec, arch: str, cache: Path) -> KernelRow:
    arch = max(arch, arch_for(spec, device_of(arch)), key=len)  # with the suffix where it was asked for or is needed
    binary = compile_cubin(render_kernel(spec), arch, Cache(cache))
    found = binary.resources[entry_of(spec)]
    return KernelRow(
        name=str(spec),
        arch=arch,
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        spill_bytes=found.spill_stores + found.spill_loads,
        smem_bytes=spec.shared_bytes,
        opcodes=dict(sorted(found.opcodes.items())),
        notices=binary.notices,
    )


# ------------------------------------------------------------------------------------------------------------
# Text

_COUNTED = ("HMMA", "HGMMA", "FFMA", "DFMA", "MUFU", "LDSM", "LDGSTS", "LDG", "BAR")


def as_table(rows: Iterable[KernelRow], name_width: int) -> Iterator[str]:
    """Lines of aligned columns; what the compiler said stands under its kernel."""
    yield f"{'kernel':{name_width}}  registers  stack  spills    smem" + "".join(f"{name:>8}" for name in _COUNTED)
    for row in rows:
        numbers = f"{row.registers:>9}  {row.stack_bytes:>5}  {row.spill_bytes:>6}  {row.smem_bytes:>6}"
        yield f"{row.name:{name_width}}  {numbers}" + "".join(f"{row.opcodes.get(name, 0):>8}" for name in _COUNTED)
        for notice in row.notices:
            yield f"    {notice}"


def as_json(rows: Iterable[KernelRow]) -> Iterator[str]:
    """Lines of one JSON list, an object each."""
    before = "["
    for row in rows:
        yield before + json.dumps(asdict(row))
        before = "," if before == "[" else before
    yield "[]" if before == "[" else "]"
