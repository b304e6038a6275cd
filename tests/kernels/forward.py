"""Runs fwd_sm80 on NumPy arrays: what a plan and its launch will do, by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cupyflash.backends.emulator import Counters, Module, Options, guarded_array, guarded_copy
from cupyflash.build.params import FWD_PARAMS, layout_checks
from cupyflash.build.source import KernelSource, render

ELEMENTS = {"float16": "Float16", "bfloat16": "BFloat16"}


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel."""

    dtype: str = "float16"
    head_dim: int = 64
    block_n: int = 64
    num_warps: int = 4
    has_lower: bool = False
    has_upper: bool = False

    @property
    def shared_bytes(self) -> int:
        return 3 * self.block_n * self.head_dim * 2

    def __str__(self) -> str:
        mask = ("-lower" if self.has_lower else "") + ("-upper" if self.has_upper else "")
        return f"fwd_sm80-{self.dtype}-d{self.head_dim}-m{16 * self.num_warps}n{self.block_n}{mask}"


def source(spec: Spec) -> KernelSource:
    constants: dict[str, bool | int | float | str] = {
        "Element": ELEMENTS[spec.dtype],
        "kHeadDim": spec.head_dim,
        "kBlockM": 16 * spec.num_warps,
        "kBlockN": spec.block_n,
        "kNumWarps": spec.num_warps,
        "kSharedBytes": spec.shared_bytes,
        "kHasLower": spec.has_lower,
        "kHasUpper": spec.has_upper,
    }
    rendered = render("fwd_sm80.cu", constants, ["flash_fwd_sm80"], str(spec))
    checks = layout_checks("FwdParams", FWD_PARAMS)
    return KernelSource(rendered.name, rendered.text + checks, rendered.entries)


@functools.cache
def module(spec: Spec) -> Module:
    return Module(source(spec))


def launch_arguments(spec, q, k, v, out, lse, lower=0, upper=0, scale=None):
    """The parameter block and the grid. q, k, v, out: (batch, head, row, element), elements contiguous."""
    params = np.zeros((), FWD_PARAMS)
    for name, array in (("q", q), ("k", k), ("v", v), ("out", out)):
        strides = [stride // array.itemsize for stride in array.strides[:3]]
        params[name] = (array.ctypes.data, *strides)
    batch_size, num_heads_q, seqlen_q, head_dim = q.shape
    params["lse"] = lse.ctypes.data
    params["num_heads_q"], params["group_size"] = num_heads_q, num_heads_q // k.shape[1]
    params["seqlen_q"], params["seqlen_k"] = seqlen_q, k.shape[2]
    params["lower"], params["upper"] = lower, upper
    params["scale"] = head_dim**-0.5 if scale is None else scale
    block_m = 16 * spec.num_warps
    return params[()], (-(-seqlen_q // block_m), num_heads_q, batch_size)


def forward(spec, q, k, v, *, kernel=None, options: Options | None = None, **keywords):
    """(out, lse, counters) of one launch, on guarded copies; outputs are filled with NaN before."""
    q, k, v = (guarded_copy(array, name) for array, name in ((q, "q"), (k, "k"), (v, "v")))
    out = guarded_array(q.shape, q.dtype, "out")
    lse = guarded_array(q.shape[:3], np.float32, "lse")
    out[...] = np.nan
    lse[...] = np.nan
    params, grid = launch_arguments(spec, q, k, v, out, lse, **keywords)
    kernel = kernel or module(spec).get_function("flash_fwd_sm80")
    counters: Counters = kernel(grid, (32 * spec.num_warps,), (params,), shared_mem=spec.shared_bytes, options=options)
    return out, lse, counters
