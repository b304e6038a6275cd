"""Runs fwd_sm80 and fwd_sm90 on NumPy arrays with any tile: the launch by hand, on guarded arrays."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from cupyflash.backends.emulator import Counters, Module, Options, guarded_array
from cupyflash.backends.tensormap import emulated_map
from cupyflash.build.bulk import make_maps
from cupyflash.build.functor import NO_MODS
from cupyflash.build.params import FWD_PARAMS
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.build.source import KernelSource
from cupyflash.merge import merge_attention
from cupyflash.plan.specs import Features, FwdSpec
from cupyflash.plan.tiles import TileConfig


@dataclass(frozen=True)
class Spec:
    """What is compiled into a kernel; head_dim_v 0 stands for head_dim."""

    dtype: str = "float16"
    head_dim: int = 64
    head_dim_v: int = 0
    block_n: int = 64
    num_warps: int = 4
    q_in_registers: bool = True
    has_lower: bool = False
    has_upper: bool = False
    scale_first: bool = False
    packed: bool = False
    baseline: int = 80
    stages: int = 0  # of fwd_sm90, if not 0: then four more warps copy
    ping_pong: bool = False
    exp2_by_fma: int = 0

    @property
    def kernel(self) -> FwdSpec:
        family = "fwd_sm90" if self.stages else "fwd_sm80"
        num_warps = self.num_warps + 4 * (self.stages > 0)
        ring = (self.q_in_registers, self.stages, self.ping_pong, self.exp2_by_fma)
        tile = TileConfig(16 * self.num_warps, self.block_n, num_warps, *ring)
        features = Features(self.has_lower, self.has_upper, self.scale_first)
        dims = (self.head_dim, self.head_dim_v or self.head_dim)
        return FwdSpec(family, self.dtype, *dims, tile, features, self.packed, self.baseline)

    @property
    def entry(self) -> str:
        return entry_of(self.kernel)

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


def guarded_rows(shape, dtype, name):
    """(a guarded array full of NaN whose rows begin at multiples of 16 bytes, its part of that shape)."""
    step = 16 // np.dtype(dtype).itemsize
    whole = guarded_array((*shape[:-1], -(-shape[-1] // step) * step), dtype, name)
    whole[...] = np.nan
    return whole, whole[..., : shape[-1]]


def launch_arguments(
    spec, q, k, v, out, lse, lower=0, upper=0, scale=None, num_splits=1, partial=None, section=2, blocks=None
):
    """The parameter block and the grid. q, k, v, out: (batch, head, row, element), elements contiguous.

    With `spec.packed` all heads that share a key and a value head are packed; `partial` is (partial_out, partial_lse).
    Sections of two leave some short, and most problems several. At most so many `blocks`, each of which takes several
    items; None: a block for each.
    """
    params = np.zeros((), FWD_PARAMS)
    for name, array in (("q", q), ("k", k), ("v", v), ("out", out)):
        batch, head, row = (stride // array.itemsize for stride in array.strides[:3])
        params[name] = (array.ctypes.data, (0, 0, 0, batch), head, row)
    batch_size, num_heads_q, seqlen_q, head_dim = q.shape
    group_sizes = num_heads_q // k.shape[1], num_heads_q // v.shape[1]
    pack = math.gcd(*group_sizes) if spec.packed else 1
    params["lse"] = lse.ctypes.data
    if partial is not None:
        params["partial_out"], params["partial_lse"] = (array.ctypes.data for array in partial)
    params["batch_shape"], params["batch_size"] = (1, 1, 1, batch_size), batch_size
    params["num_heads_q"] = num_heads_q
    params["group_size_k"], params["group_size_v"] = group_sizes
    params["pack"], params["num_splits"] = pack, num_splits
    params["section"] = section
    params["seqlen_q"], params["seqlen_k"] = seqlen_q, k.shape[2]
    params["head_dim"], params["head_dim_v"] = head_dim, v.shape[3]
    params["lower"], params["upper"] = lower, upper
    params["scale"] = max(head_dim, 1) ** -0.5 if scale is None else scale
    block_m = 16 * spec.num_warps
    num_tiles = -(-seqlen_q * pack // block_m) * (num_heads_q // pack) * batch_size
    num_items = num_tiles * num_splits
    return params[()], (num_items if blocks is None else min(blocks, num_items),)


def maps(spec, *arrays):
    """The tensor maps of q, k, v and out, for the kernel that takes them."""
    if not spec.stages:
        return ()
    return make_maps(spec.kernel, arrays, [array.ctypes.data for array in arrays], emulated_map)


def forward(spec, q, k, v, *, kernel=None, options: Options | None = None, num_splits=1, **keywords):
    """(out, lse, counters) of one launch, on guarded copies; outputs are filled with NaN before.

    What lies between rows is NaN too, and has to stay so in `out`.

    With splits they are the parts, joined.
    """
    operands = []
    for name, array in (("q", q), ("k", k), ("v", v)):
        operands.append(guarded_rows(array.shape, array.dtype, name)[1])
        operands[-1][...] = array
    q, k, v = operands
    shape = (*q.shape[:3], v.shape[3])
    whole_out, out = guarded_rows(shape, q.dtype, "out")
    lse = guarded_array(shape[:3], np.float32, "lse")
    partial = None
    if num_splits > 1:
        partial = (
            guarded_array((num_splits, *shape), np.float32, "partial_out"),
            guarded_array((num_splits, *shape[:3], 2), np.float32, "partial_lse"),
        )
    for array in (lse, *(partial or ())):
        array[...] = np.nan
    params, grid = launch_arguments(spec, q, k, v, out, lse, num_splits=num_splits, partial=partial, **keywords)
    kernel = kernel or module(spec).get_function(spec.entry)
    arguments = (params, NO_MODS, *maps(spec, q, k, v, out))
    counters: Counters = kernel(
        grid, (spec.kernel.num_threads,), arguments, shared_mem=spec.shared_bytes, options=options
    )
    assert np.isnan(whole_out[..., shape[3] :].astype(np.float32)).all(), "something was written between rows"
    if partial is None:
        return out, lse, counters
    assert np.isnan(out.astype(np.float32)).all(), "a split's blocks leave partial results only"
    assert np.isnan(lse).all()
    for array in partial:
        assert not np.isnan(array).any(), "every block writes all of its part"
    outs, sums = partial
    with np.errstate(divide="ignore"):  # a part without keys: -inf, and nothing
        lses = sums[..., 0] + np.log(sums[..., 1])
    joined, joined_lse = merge_attention(list(outs), list(lses))
    return joined.astype(q.dtype), joined_lse, counters
