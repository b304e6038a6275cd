"""PyTorch's and JAX's arrays on a GPU: their stream, their memory.  A draft: nobody has run it on a GPU yet."""

from __future__ import annotations

from typing import Any

import pytest

import cupyflash
from cupyflash.testing import assert_attention_close
from tests.gpu.calls import CLAIMED, on_device

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch(cupy: Any) -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch


@pytest.mark.parametrize("name", ["float16-d64-causal", "bfloat16-d128-causal"])
def test_tensors_run_on_torchs_stream_in_torchs_memory(torch: Any, cupy: Any, name: str) -> None:
    case = CLAIMED[name]
    arguments = {
        key: torch.from_dlpack(value) if isinstance(value, cupy.ndarray) else value
        for key, value in on_device(case.arguments(), cupy).items()
    }
    cupyflash.attention(**arguments)  # compiled and loaded
    torch.cuda.synchronize()
    cupy.get_default_memory_pool().free_all_blocks()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        before, of_cupy = torch.cuda.memory_allocated(), cupy.get_default_memory_pool().total_bytes()
        found = cupyflash.attention(**arguments)
        assert not stream.query(), "the call waited for the stream"
        results = found if isinstance(found, tuple) else (found,)
        assert torch.cuda.memory_allocated() - before >= sum(result.nbytes for result in results)
        assert cupy.get_default_memory_pool().total_bytes() == of_cupy
    stream.synchronize()
    for result in results:
        assert isinstance(result, torch.Tensor)
        result.record_stream(stream)
    given = tuple(cupy.from_dlpack(result) for result in results)
    assert_attention_close(given if isinstance(found, tuple) else given[0], case, backend="cuda")


def test_a_graph_captured_by_torch(torch: Any) -> None:
    query, key, value = torch.randn(3, 2, 4, 64, 64, device="cuda", dtype=torch.float16)
    out = torch.empty_like(query)
    cupyflash.attention(query, key, value, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cupyflash.attention(query, key, value, out=out)
    query.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, cupyflash.attention(query, key, value))


def test_jax_arrays(cupy: Any) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    case = CLAIMED["float16-d64-causal"]
    arguments = {
        key: jax.dlpack.from_dlpack(value) if isinstance(value, cupy.ndarray) else value
        for key, value in on_device(case.arguments(), cupy).items()
    }
    found = cupyflash.attention(**arguments)
    results = found if isinstance(found, tuple) else (found,)
    assert all(isinstance(result, jax.Array) for result in results)
    given = tuple(cupy.from_dlpack(result) for result in results)
    assert_attention_close(given if isinstance(found, tuple) else given[0], case, backend="cuda")
