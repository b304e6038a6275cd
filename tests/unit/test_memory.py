"""The numpy backend takes extra memory for its tiles, whatever the lengths: at most 4 MiB and 2 MiB for each thread."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import cupyflash

HEAD_DIM = 8
THREADS = 2
LIMIT = (4 + 2 * THREADS) * 2**20


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once during the call, over those before it."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    call()
    return tracemalloc.get_traced_memory()[1] - before


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", str(THREADS))
    tracemalloc.start()
    yield
    tracemalloc.stop()


def operands(seqlen_q: int, seqlen_k: int, dtype: str = "float32", heads: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((heads, seqlen_q, HEAD_DIM)).astype(dtype)
    key, value = (rng.standard_normal((heads, seqlen_k, HEAD_DIM)).astype(dtype) for _ in range(2))
    return {"query": query, "key": key, "value": value, "out": np.empty_like(query)}


def zero_stride(seqlen_q: int, seqlen_k: int) -> np.ndarray:
    return np.broadcast_to(np.arange(seqlen_k) < seqlen_k - 3, (1, seqlen_q, seqlen_k))


FEATURES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda n, m: {},
    "causal": lambda n, m: {"is_causal": True},
    "window": lambda n, m: {"window": (200, 200)},
    "bool mask (1, S)": lambda n, m: {"attn_mask": np.arange(m)[None, :] < m - 3},
    "bool mask (L, S) of stride zero": lambda n, m: {"attn_mask": zero_stride(n, m)},
    "float mask (S,)": lambda n, m: {"attn_mask": np.linspace(-3, 3, m, dtype=np.float32)},
    "float mask (L, 1)": lambda n, m: {"attn_mask": np.linspace(-3, 3, n, dtype=np.float32)[:, None]},
    "both masks": lambda n, m: {"attn_mask": (np.linspace(-3, 3, m, dtype=np.float32), zero_stride(n, m))},
    "alibi": lambda n, m: {"alibi_slopes": np.ones(1, np.float32)},
    "softcap": lambda n, m: {"softcap": 10.0},
    "sinks": lambda n, m: {"sinks": np.ones(1, np.float32)},
    "dropout": lambda n, m: {"dropout_p": 0.5, "seed": 1},
    "score_mod": lambda n, m: {"score_mod": lambda score, b, h, q_idx, kv_idx: score + 0.01 * (q_idx - kv_idx)},
    "mask_mod": lambda n, m: {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 7 != 0},
    "lse": lambda n, m: {"return_lse": True},
}
# What a user's function allocates for a tile is the user's: int64 coordinates and float64 products, say.
OF_THE_USER = {"score_mod", "mask_mod"}
# These are slow; the scores of the longer length would still take far more than the limit.
LENGTHS = {"dropout": (1024, 2048), "score_mod": (1024, 3072), "mask_mod": (1024, 3072)}


@pytest.mark.parametrize("feature", FEATURES)
def test_extra_memory_does_not_grow_with_the_scores(feature: str) -> None:
    for seqlen in LENGTHS.get(feature, (1024, 4096)):
        arguments = operands(seqlen, seqlen) | FEATURES[feature](seqlen, seqlen)
        call = partial(cupyflash.attention, **arguments, backend="numpy")
        call()  # thread pools and cached triangles are made by the first call
        assert peak(call) <= (2 if feature in OF_THE_USER else 1) * LIMIT, f"{seqlen=}"


@pytest.mark.parametrize("feature", ["plain", "causal", "bool mask (1, S)", "bool mask (L, S) of stride zero", "alibi"])
def test_extra_memory_at_length_8192(feature: str) -> None:
    seqlen = 8192
    arguments = operands(seqlen, seqlen) | FEATURES[feature](seqlen, seqlen)
    assert peak(lambda: cupyflash.attention(**arguments, backend="numpy")) <= LIMIT


@pytest.mark.parametrize("heads", [1, 32])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_extra_memory_of_decoding(seqlen_q: int, heads: int) -> None:
    arguments = operands(seqlen_q, 16384, heads=heads)
    call = partial(cupyflash.attention, **arguments, backend="numpy")
    call()
    assert peak(call) <= LIMIT


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_extra_memory_of_other_dtypes(dtype: str) -> None:
    seqlen = 4096
    arguments = operands(seqlen, seqlen, dtype)
    call = partial(cupyflash.attention, **arguments, backend="numpy")
    call()
    # 16-bit K and V are widened once for each head that is being worked on.
    widened = 8 * seqlen * HEAD_DIM * THREADS if dtype == "float16" else 0
    # A tile of float64 is twice as large.
    assert peak(call) <= (2 if dtype == "float64" else 1) * LIMIT + widened


def test_extra_memory_of_many_small_heads() -> None:
    arguments = operands(64, 64, heads=2000)
    call = partial(cupyflash.attention, **arguments, backend="numpy")
    call()
    assert peak(call) <= LIMIT


def test_the_measure_sees_what_the_math_backend_takes() -> None:
    arguments = operands(2048, 2048)
    assert peak(lambda: cupyflash.attention(**arguments, backend="math")) > 2048 * 2048 * 4 > LIMIT
