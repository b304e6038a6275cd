"""Runs fwd_sm80 on NumPy arrays with any tile: the launch by hand, on guarded arrays."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from cupyflash.backends.emulator import Counters, Module, Options, guarded_array, guarded_copy
from cupyflash.build.launch import render_kernel
from cupyflash.build.params import FWD_PARAMS
from cupyflash.build.source import KernelSource
from cupyflash.plan.specs import Features, FwdSpec
from cupyflash.plan.tiles import TileConfig


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel."""

    dtype: str = "float16"
    head_dim: int = 64
    block_n: int = 64
    num_warps: int = 4
    has_lower: bool = False
    has_upper: bool = False
    scale_first: bool = False

    @property
    def kernel(self) -> FwdSpec:
        tile = TileConfig(16 * self.num_warps, self.block_n, self.num_warps)
        features = Features(self.has_lower, self.has_upper, self.scale_first)
        return FwdSpec("fwd_sm80", self.dtype, self.head_dim, self.head_dim, tile, features)

    @property
    def shared_bytes(self) -> int:
        return self.kernel.shared_bytes

    def __str__(self) -> str:
        return str(self.kernel)


def source(spec: Spec) -> KernelSource:
    return render_kernel(spec.kernel)


@functools.cache
def module(spec: Spec) -> Module:
    return Module(source(spec))


def launch_arguments(spec, q, k, v, out, lse, lower=0, upper=0, scale=None):
    """The parameter block and the grid. q, k, v, out: (batch, head, row, element), elements contiguous."""
    params = np.zeros((), FWD_PARAMS)
    for name, array in (("q", q), ("k", k), ("v", v), ("out", out)):
        batch, head, row = (stride // array.itemsize for stride in array.strides[:3])
        params[name] = (array.ctypes.data, (0, 0, 0, batch), head, row)
    batch_size, num_heads_q, seqlen_q, head_dim = q.shape
    params["lse"] = lse.ctypes.data
    params["batch_shape"], params["batch_size"] = (1, 1, 1, batch_size), batch_size
    params["num_heads_q"] = num_heads_q
    params["group_size_k"], params["group_size_v"] = num_heads_q // k.shape[1], num_heads_q // v.shape[1]
    params["pack"] = params["num_splits"] = 1
    params["seqlen_q"], params["seqlen_k"] = seqlen_q, k.shape[2]
    params["head_dim"] = params["head_dim_v"] = head_dim
    params["lower"], params["upper"] = lower, upper
    params["scale"] = head_dim**-0.5 if scale is None else scale
    block_m = 16 * spec.num_warps
    return params[()], (-(-seqlen_q // block_m) * num_heads_q * batch_size,)


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
