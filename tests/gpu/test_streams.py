"""The `cuda` backend and time: streams, graphs, memory.  A draft: nobody has run it on a GPU yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.testing import assert_attention_close
from tests.gpu.calls import CLAIMED, is_not_written, not_written, on_device
from tests.gpu.device import Gpu, load
from tests.kernels.harness import source_of

pytestmark = pytest.mark.gpu

SPIN = r"""
#include "isa.cuh"
extern "C" __global__ void spin(long long nanoseconds) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < static_cast<unsigned long long>(nanoseconds));
}
"""


@pytest.fixture(scope="session")
def spin(gpu: Gpu) -> Any:
    """``spin(seconds)`` keeps the current stream busy."""
    kernel = load(source_of(SPIN), gpu).get_function("spin")
    return lambda seconds: kernel((1,), (1,), (np.int64(seconds * 1e9),))


def call(case: Any, cupy: Any) -> tuple[dict[str, Any], Any]:
    """The arguments on the GPU with an output of NaN, and the kernel compiled and loaded."""
    arguments = on_device(case.arguments(), cupy)
    cupyflash.attention(**arguments, backend="cuda")
    arguments["out"] = not_written(case.query_shape, arguments["query"].dtype, cupy)
    cupy.cuda.Device().synchronize()
    return arguments, arguments["out"]


def test_current_stream_without_waiting(cupy: Any, spin: Any) -> None:
    case = CLAIMED["float16-d64-causal"]
    arguments, out = call(case, cupy)
    busy, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with busy:
        spin(0.3)
        result = cupyflash.attention(**arguments, backend="cuda")
    assert not busy.done, "the call waited for the stream"
    with other:
        assert is_not_written(out), "the kernel ran on another stream"
    busy.synchronize()
    assert_attention_close(result, case, backend="cuda")


def test_graph(cupy: Any) -> None:
    """Captured after one call of its kind, a graph computes from what its inputs hold at each launch."""
    case = CLAIMED["bfloat16-d128-causal"]
    arguments, out = call(case, cupy)
    del arguments["return_lse"]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cupyflash.attention(**arguments, backend="cuda")
        graph = stream.end_capture()
    assert is_not_written(out), "capturing must not run it"
    for seed in range(3):
        given = {**case.arguments(), "return_lse": False}
        rng = np.random.default_rng(seed)
        for name in ("query", "key", "value"):
            given[name] = rng.standard_normal(given[name].shape).astype(given[name].dtype)
            arguments[name].set(given[name], stream=stream)
        graph.launch(stream)
        stream.synchronize()
        assert_attention_close(out, given, backend="cuda, replayed")


def test_nothing_is_allocated_beside_the_results(cupy: Any) -> None:
    case = CLAIMED["float16-d64-causal"]
    arguments, _ = call(case, cupy)
    pool = cupy.get_default_memory_pool()
    requested = []

    class Watch(cupy.cuda.MemoryHook):
        name = "watch"

        def alloc_preprocess(self, **what: Any) -> None:
            requested.append(what["mem_size"])

        def malloc_preprocess(self, **what: Any) -> None:
            requested.append(what["size"])

    used = pool.used_bytes()
    with Watch():
        _, lse = cupyflash.attention(**arguments, backend="cuda")
    assert pool.used_bytes() - used == -(-lse.nbytes // 512) * 512
    del lse
    del arguments["return_lse"]
    requested.clear()
    with Watch():
        cupyflash.attention(**arguments, backend="cuda")
    assert requested == []
