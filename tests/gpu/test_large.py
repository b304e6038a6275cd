"""Arrays whose offsets do not fit into 31 bits.  A draft: nobody has run it on a GPU yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.testing import assert_attention_close
from tests.gpu.calls import not_written

pytestmark = pytest.mark.gpu

FAR = 2**31 + 2**10  # elements


def require_memory(nbytes: int, cupy: Any) -> None:
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 1.1 * nbytes:
        pytest.skip(f"gpu: {free / 2**30:.0f} GiB are free, the test needs {1.1 * nbytes / 2**30:.0f}")


@pytest.fixture(autouse=True)
def give_back(cupy: Any) -> Any:
    yield
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strides(cupy: Any, axis: int, dtype: str) -> None:
    """Batch entries, heads or rows that lie more than 2**31 elements apart, as in one buffer of many layers."""
    shape, itemsize = [2, 2, 70, 64], np.dtype(dtype).itemsize
    if axis == 2:
        shape = [1, 1, 3, 64]
    rng = np.random.default_rng(0)
    near = {name: rng.standard_normal(shape).astype(dtype) for name in ("query", "key", "value")}
    strides = [step // itemsize for step in near["query"].strides]
    strides[axis] = FAR
    elements = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    require_memory(elements * itemsize, cupy)
    # One far array at a time and one buffer for it: four would be 34 GiB.
    buffer = cupy.empty(elements, dtype)
    far = cupy.ndarray(tuple(shape), dtype, buffer.data, tuple(itemsize * step for step in strides))
    device = {name: cupy.asarray(array) for name, array in near.items()}
    for name in near:
        far[...] = device[name]
        result = cupyflash.attention(**{**device, name: far}, is_causal=True, backend="cuda")
        assert_attention_close(result, {**near, "is_causal": True}, backend=f"cuda, {name} far apart")
    far[...] = np.nan
    assert cupyflash.attention(**device, is_causal=True, out=far, backend="cuda") is far
    assert_attention_close(cupy.ascontiguousarray(far), {**near, "is_causal": True}, backend="cuda, out far apart")


def test_many_rows(cupy: Any) -> None:
    """Queries and output of more than 2**31 elements, one behind another: the last rows are as right as the first."""
    seqlen_q, seqlen_k, head_dim = FAR // 64 + 100, 40, 64
    require_memory(2 * 2 * seqlen_q * head_dim, cupy)
    rng = np.random.default_rng(0)
    block = rng.standard_normal((1 << 12, head_dim)).astype(np.float16)
    key, value = rng.standard_normal((2, 1, 1, seqlen_k, head_dim)).astype(np.float16)
    query = cupy.empty((1, 1, seqlen_q, head_dim), np.float16)
    pattern = cupy.asarray(block)
    for start in range(0, seqlen_q, len(block)):
        rows = query[0, 0, start : start + len(block)]
        rows[...] = pattern[: len(rows)]
    out = not_written(query.shape, np.float16, cupy)
    cupyflash.attention(query, cupy.asarray(key), cupy.asarray(value), out=out, backend="cuda")
    for start in (0, 2**31 // head_dim - 4, seqlen_q - 8):
        rows = slice(start, start + 8)
        part = {"query": query[:, :, rows].get(), "key": key, "value": value}
        assert_attention_close(out[:, :, rows].get(), part, backend=f"cuda, rows from {start}")


def test_many_keys(cupy: Any) -> None:
    """Keys and values of more than 2**31 elements, shared out among blocks; almost all weight is on the last key."""
    seqlen_k, head_dim = FAR // 64 + 77, 64
    require_memory(2 * 2 * seqlen_k * head_dim, cupy)
    query = cupy.ones((1, 1, 1, head_dim), np.float16)
    key, value = (cupy.zeros((1, 1, seqlen_k, head_dim), np.float16) for _ in range(2))
    key[0, 0, -1], value[0, 0, -1] = 10, 3
    out, lse = cupyflash.attention(query, key, value, return_lse=True, backend="cuda")
    # The last score is 10 · 64 / 8 = 80, all others are 0: their weights, exp(-80) each, round to nothing.
    assert_attention_close(
        (out.get(), lse.get()),
        {"query": query.get(), "key": key[:, :, -64:].get(), "value": value[:, :, -64:].get(), "return_lse": True},
        backend="cuda, the last of many keys",
    )
