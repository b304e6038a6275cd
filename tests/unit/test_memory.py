"""The numpy backend takes extra memory for its tiles, whatever the lengths: at most 4 MiB and 2 MiB for each thread.

Every call is the first of a new process: what the backend keeps for later calls counts too.

Calls of kernels allocate what grows with L or with S, and one byte for each tile of a bool mask.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import emulated

ROOT = Path(__file__).parents[2]
HEAD_DIM = 8
THREADS = 2
LIMIT = (4 + 2 * THREADS) * 2**20

FEATURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda n: {},
    "causal": lambda n: {"is_causal": True},
    "window": lambda n: {"window": (200, 200)},
    "bool mask (1, S)": lambda n: {"attn_mask": np.arange(n)[None, :] < n - 3},
    "bool mask (L, S) of stride zero": lambda n: {"attn_mask": zero_stride(n)},
    "float mask (S,)": lambda n: {"attn_mask": np.linspace(-3, 3, n, dtype=np.float32)},
    "float mask (L, 1)": lambda n: {"attn_mask": np.linspace(-3, 3, n, dtype=np.float32)[:, None]},
    "both masks": lambda n: {"attn_mask": (np.linspace(-3, 3, n, dtype=np.float32), zero_stride(n))},
    "alibi": lambda n: {"alibi_slopes": np.ones(1, np.float32)},
    "softcap": lambda n: {"softcap": 10.0},
    "sinks": lambda n: {"sinks": np.ones(1, np.float32)},
    "dropout": lambda n: {"dropout_p": 0.5, "seed": 1},
    "score_mod": lambda n: {"score_mod": lambda score, b, h, q_idx, kv_idx: score + 0.01 * (q_idx - kv_idx)},
    "mask_mod": lambda n: {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 7 != 0},
    "lse": lambda n: {"return_lse": True},
}
SLOW = {"dropout", "score_mod", "mask_mod"}


def zero_stride(n: int) -> np.ndarray:
    return np.broadcast_to(np.arange(n) < n - 3, (1, n, n))


def measure(
    feature: str, seqlen_q: int, seqlen_k: int, heads: int = 1, dtype: str = "float32", backend: str = "numpy"
) -> None:
    """Print the most bytes that a call had allocated at once."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((heads, seqlen_q, HEAD_DIM)).astype(dtype)
    key, value = (rng.standard_normal((heads, seqlen_k, HEAD_DIM)).astype(dtype) for _ in range(2))
    out, more = np.empty_like(query), FEATURES[feature](seqlen_k)
    tracemalloc.start()
    cupyflash.attention(query, key, value, out=out, backend=backend, **more)
    print(tracemalloc.get_traced_memory()[1])


def peak(*of: object) -> int:
    """What `measure` prints in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", f"from tests.unit.test_memory import measure; measure(*{of!r})"],
        cwd=ROOT,
        env={**os.environ, "CUPYFLASH_NUM_THREADS": str(THREADS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.parametrize("feature", FEATURES)
def test_extra_memory_does_not_grow_with_the_scores(feature: str) -> None:
    seqlen = 2048 if feature in SLOW else 4096
    assert peak(feature, seqlen, seqlen) <= LIMIT < 4 * seqlen**2


@pytest.mark.parametrize("feature", ["plain", "causal", "bool mask (L, S) of stride zero"])
def test_extra_memory_at_length_8192(feature: str) -> None:
    assert peak(feature, 8192, 8192) <= LIMIT


@pytest.mark.parametrize("heads", [1, 32])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_extra_memory_of_decoding(seqlen_q: int, heads: int) -> None:
    assert peak("plain", seqlen_q, 16384, heads) <= LIMIT


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_extra_memory_of_other_dtypes(dtype: str) -> None:
    assert peak("plain", 4096, 4096, 1, dtype) <= (2 if dtype == "float64" else 1) * LIMIT


def test_extra_memory_of_many_small_heads() -> None:
    assert peak("plain", 64, 64, 2000) <= LIMIT


def test_the_measure_sees_what_the_math_backend_takes() -> None:
    assert peak("plain", 2048, 2048, 1, "float32", "math") > 4 * 2048**2 > LIMIT


def unaligned_zero_stride(n: int) -> np.ndarray:
    """As (L, S): one row for all, whose elements do not lie at multiples of their size."""
    row = np.frombuffer(bytearray(4 * n + 1), np.uint8)[1:].view(np.float32)
    return np.broadcast_to(row, (1, n, n))


KERNEL_FEATURES = FEATURES | {
    "float mask (L, S) of stride zero, unaligned": lambda n: {"attn_mask": unaligned_zero_stride(n)},
    "all at once": lambda n: {
        name: argument
        for of in ("both masks", "alibi", "softcap", "sinks", "score_mod", "mask_mod", "dropout", "lse")
        for name, argument in FEATURES[of](n).items()
    },
}


def traced_kernel_call(monkeypatch: pytest.MonkeyPatch, dtype: str, lengths: tuple[int, int], **more: Any) -> int:
    """The most bytes that a call of kernels, which do not run, had allocated at once."""
    monkeypatch.setattr(emulated, "_run", lambda *_: None)
    query, key = (np.zeros((1, n, HEAD_DIM), dtype) for n in lengths)
    arguments = {"query": query, "key": key, "value": key, "out": np.empty_like(query), "backend": "emulator", **more}
    cupyflash.attention(**arguments)  # what is imported and remembered
    tracemalloc.start()
    cupyflash.attention(**arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def kernel_limit(seqlen_q: int, seqlen_k: int) -> int:
    """A row's log-sum-exp, a mask's copied row; a byte for each tile of 16 queries by 16 keys; 64 KiB."""
    return 8 * (seqlen_q + seqlen_k) + seqlen_q * seqlen_k // 256 + 2**16


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("feature", KERNEL_FEATURES)
def test_a_call_of_kernels_allocates_nothing_that_grows_with_the_scores(
    feature: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = traced_kernel_call(monkeypatch, dtype, (8192, 8192), **KERNEL_FEATURES[feature](8192))
    assert found <= kernel_limit(8192, 8192) < 8192**2 / 100


@pytest.mark.usefixtures("cxx")
def test_the_limit_of_kernels_is_broken_by_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = traced_kernel_call(monkeypatch, "float16", (2048, 2048), return_weights=True)
    assert found > 2 * 2048**2 > kernel_limit(2048, 2048)
