"""`observe`: what kernels show under the emulator, and that a GPU gets nothing of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cupyflash.backends.emulator import Observation, Options
from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import compile_cubin, compile_ptx
from cupyflash.build.rendering import render_kernel
from cupyflash.build.source import KernelSource
from cupyflash.plan.specs import Features, FwdSpec
from cupyflash.plan.tiles import TileConfig
from tests.kernels.harness import compiled

# Threads of a warp take turns at the barrier, and show what they have before and after it.
KERNEL = r"""
#include "isa.cuh"
struct Pair {
  float left;
  short right;
};
extern "C" __global__ void show(u32* out) {
  const int thread = isa::thread_index();
  const float row[2][2] = {{0.5f, 1.0f * thread}, {-1.0f, 2.0f}};
  observe("before", thread, row);
  isa::sync_threads();
  const Pair pair = {3.0f, 4};
  if (thread == 40) observe("after", pair, true);
  isa::stg_4(out + 64 * isa::block_index_x() + thread, 1);
}
"""


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("options", [Options(), Options(schedule="random", seed=3, workers=2)])
def test_values_arrive(options: Options) -> None:
    out = np.zeros(192, np.uint32)
    show = compiled(KERNEL).get_function("show")
    observed: list[Observation] = []
    show((3,), (64,), (out,), options=options, observed=observed)
    before = {(one.block, one.thread): one.data for one in observed if one.event == "before"}
    assert len(before) == 192
    for (_, thread), data in before.items():
        assert np.frombuffer(data, np.int32, 1) == thread
        assert np.frombuffer(data, np.float32, offset=4).tolist() == [0.5, thread, -1, 2]
    after = [one for one in observed if one.event == "after"]
    assert sorted((one.block, one.thread) for one in after) == [(0, 40), (1, 40), (2, 40)]
    fields = np.dtype({"names": ["left", "right", "flag"], "formats": ["f4", "i2", "?"], "offsets": [0, 4, 8]})
    assert {len(one.data) for one in after} == {9}
    assert [np.frombuffer(one.data, fields)[0].tolist() for one in after] == [(3.0, 4, True)] * 3
    assert len(observed) == 195
    # A thread's observations are in order.
    assert [one.event for one in observed if (one.block, one.thread) == (1, 40)] == ["before", "after"]


@pytest.mark.usefixtures("cxx")
def test_each_launch_has_its_own() -> None:
    out = np.zeros(64, np.uint32)
    show = compiled(KERNEL).get_function("show")
    first: list[Observation] = []
    second: list[Observation] = []
    counted = show((1,), (64,), (out,), observed=first)
    assert show((1,), (64,), (out,)) == counted
    show((1,), (64,), (out,), observed=second)
    assert first == second
    assert len(first) == 65


SPECS = [
    FwdSpec("fwd_sm80", "float16", 64, 64, TileConfig(64, 64, 4), Features(has_upper=True)),
    FwdSpec("fwd_sm80", "bfloat16", 128, 128, TileConfig(128, 64, 8), Features(True, True, True, bool_mask=True)),
    FwdSpec("fwd_sm80", "float16", 64, 64, TileConfig(64, 64, 4), Features(has_upper=True), packed=True, baseline=75),
]


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_gpu_gets_nothing_of_it(spec: FwdSpec, tmp_path: Path) -> None:
    source = render_kernel(spec)
    silent, count = re.subn(r"^ +observe\(.*\);$", "", source.text, flags=re.MULTILINE)
    assert count == 5
    other = KernelSource(source.name, silent, source.entries)
    arch = str(spec.baseline)
    assert compile_ptx(source, f"compute_{arch}") == compile_ptx(other, f"compute_{arch}")
    cache = Cache(tmp_path)
    shown, hidden = (compile_cubin(one, f"sm_{arch}", cache).path for one in (source, other))
    assert shown != hidden
    assert shown.read_bytes() == hidden.read_bytes()
