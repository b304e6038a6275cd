"""What is measured on a GPU: each row of the benchmark as a value, in the order in which they are run.

The shapes are those of FlashAttention's tables and of models that people run; what a row asks of a call beside queries,
keys and values is a function of `FEATURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import cupyflash
from cupyflash import mods
from cupyflash.testing import DTYPES

__all__ = ["AS_MASK", "CASES", "EVERYTHING", "FEATURES", "HOST_CASES", "UNCHECKED", "Case"]

WINDOWS = {"window 4096": (4095, 0)}  # these lower the count of operations, other masks do not


@dataclass(frozen=True)
class Case:
    """One forward pass.

    Attributes
    ----------
    heads : (int, int)
        Query heads and key-value heads.
    reads_once : bool
        Whether memory is what it waits for: the operands rotate, the rate is one of bytes, and replays of a CUDA graph
        are timed, for such calls are over before Python has made the next.
    feature : str
        A key of `FEATURES`: then it is compared with our own call without it; or one of `AS_MASK`, with PyTorch's.
    model : str
        Whose shape it is.
    """

    batch: int
    heads: tuple[int, int]
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "bfloat16"
    reads_once: bool = False
    feature: str = ""
    model: str = ""

    @property
    def name(self) -> str:
        """``"d128 causal 4096"``, with what is unusual about it."""
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        batch = f" batch {self.batch}" if self.reads_once else ""
        grouped = "" if self.heads[0] == self.heads[1] else f" {self.heads[0]}/{self.heads[1]} heads"
        dtype = "" if self.dtype == "bfloat16" else f" {self.dtype}"
        feature = f" {self.feature}" if self.feature else ""
        model = f"{self.model}: " if self.model else ""
        direction = "causal" if self.is_causal else "full"
        return f"{model}d{self.head_dim} {direction} {length}{batch}{grouped}{dtype}{feature}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of queries, and of keys and values."""
        return (
            (self.batch, self.heads[0], self.seqlen_q, self.head_dim),
            (self.batch, self.heads[1], self.seqlen_k, self.head_dim),
        )

    @property
    def options(self) -> dict[str, bool]:
        """Keywords that PyTorch's SDPA and we have in common."""
        return {"is_causal": self.is_causal, "enable_gqa": self.heads[0] != self.heads[1]}

    @property
    def others(self) -> tuple[str, ...]:
        """The backends of PyTorch's SDPA that may hold this dtype; none for what PyTorch has no argument for."""
        if self.feature and self.feature not in AS_MASK:
            return ()
        return {"float64": ("math",), "float32": ("efficient", "math")}.get(self.dtype, ("cudnn", "flash", "efficient"))

    @property
    def operations(self) -> int:
        query, key = self.shapes
        return cupyflash.flops(query, key, **self.options, window=WINDOWS.get(self.feature))

    @property
    def bytes(self) -> int:
        """Of query, key, value and output: what must be moved at least."""
        return DTYPES[self.dtype].itemsize * 2 * sum(math.prod(shape) for shape in self.shapes)

    def sets(self, l2_bytes: int) -> int:
        """How many sets of operands there must be."""
        return math.ceil(2 * l2_bytes / self.bytes) + 1 if self.reads_once else 1


def _lengths(case: Case) -> np.ndarray:
    """Keys of each batch entry: from all down to a quarter of them."""
    return np.linspace(case.seqlen_k, case.seqlen_k // 4, case.batch).astype(np.int64)


def _padding(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    keep = np.arange(case.seqlen_k) < _lengths(case)[:, None, None, None]
    return {"attn_mask": keep[b, 0] if b >= 0 else keep}


def _checkers(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """Three quarters of the keys, and of the tiles none empty or whole."""
    q_idx, kv_idx = np.ogrid[: case.seqlen_q, : case.seqlen_k]
    return {"attn_mask": ((q_idx + kv_idx) % 4 != 0)[rows]}


def _blocks(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """Documents of 512 tokens, as a bool mask: most tiles are empty, the others whole."""
    q_idx, kv_idx = np.ogrid[: case.seqlen_q, : case.seqlen_k]
    return {"attn_mask": (q_idx // 512 == kv_idx // 512)[rows]}


def _bias(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """The same for all heads: a gigabyte less of random numbers."""
    bias = np.random.default_rng(0).standard_normal((case.seqlen_q, case.seqlen_k), dtype=np.float32)
    return {"attn_mask": bias[rows]}


def _pair_bias(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """AlphaFold's: one for each head, shared by the batch, in the query's dtype."""
    shape = (case.heads[0], case.seqlen_q, case.seqlen_k)
    bias = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(DTYPES[case.dtype])
    return {"attn_mask": bias[h, rows] if h >= 0 else bias}


def _window(window: tuple[int, int]) -> Callable[[Case, int, int, slice], dict[str, Any]]:
    return lambda case, b, h, rows: {"window": window}


def _per_head(name: str, values: Callable[[int], np.ndarray]) -> Callable[[Case, int, int, slice], dict[str, Any]]:
    def arguments(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
        every = values(case.heads[0]).astype(np.float32)
        return {name: every[h : h + 1] if h >= 0 else every}

    return arguments


def _documents_mod(case: Case, b: int, h: int, rows: slice) -> dict[str, Any]:
    """The mask of `_blocks` as a function."""
    start = rows.start or 0
    return {"mask_mod": lambda b, h, q_idx, kv_idx: (q_idx + start) // 512 == kv_idx // 512}


#: What is asked of a call beside queries, keys and values, as NumPy arrays: for all of it if b and h are -1, else for
#: some rows of one head.
FEATURES: dict[str, Callable[[Case, int, int, slice], dict[str, Any]]] = {
    "padding mask": _padding,
    "bool mask": _checkers,
    "document mask": _blocks,
    "float32 bias": _bias,
    "pair bias": _pair_bias,
    "softcap": lambda case, b, h, rows: {"softcap": 50.0},
    **{name: _window(window) for name, window in WINDOWS.items()},
    "ALiBi": _per_head("alibi_slopes", lambda heads: 2.0 ** -np.linspace(1, 8, heads)),
    "softcap as a score_mod": lambda case, b, h, rows: {"score_mod": mods.tanh_softcap(50.0)},
    "document mask as a mask_mod": _documents_mod,
    "sinks": _per_head("sinks", lambda heads: np.linspace(-1, 1, heads)),
    "dropout": lambda case, b, h, rows: {"dropout_p": 0.1, "seed": 0},
}
EVERYTHING = (-1, -1, slice(None))
# A few rows of it are no small call of their own: a weight is dropped by its place in the whole.
UNCHECKED = {"dropout"}
# What a mask in the query's dtype says, and PyTorch takes one.  Its price is not asked for by the call without it.
AS_MASK = {"pair bias"}

TOKENS = 16384  # in a batch, as in FlashAttention's tables
_SHORT_FEATURES = (
    *("padding mask", "bool mask", "document mask", "float32 bias", "softcap", "ALiBi", "sinks", "dropout"),
    *("softcap as a score_mod", "document mask as a mask_mod"),
)

#: In the order in which they are measured: if time runs out, the last are missing.
CASES: tuple[Case, ...] = (
    *(
        Case(TOKENS // length, (2048 // head_dim,) * 2, length, length, head_dim, is_causal)
        for head_dim in (128, 64, 256)
        for is_causal in (False, True)
        for length in (2048, 4096, 8192, 16384)
    ),
    Case(1, (64, 8), 8192, 8192, 128, is_causal=True, model="Llama-3 70B"),
    Case(1, (32, 8), 8192, 8192, 128, is_causal=True, model="Llama-3 8B"),
    Case(32, (32, 8), 1, 8192, 128, reads_once=True, model="Llama-3 8B"),
    Case(1, (32, 8), 1, 16384, 128, reads_once=True, model="Llama-3 8B"),
    Case(1, (32, 8), 1, 1024, 128, reads_once=True, model="Llama-3 8B"),
    Case(32, (16, 16), 512, 512, 64, dtype="float16", model="BERT large"),
    Case(64, (16, 16), 577, 577, 64, dtype="float16", model="ViT-L/14"),
    Case(128, (8, 8), 384, 384, 32, feature="pair bias", model="AlphaFold"),
    Case(1, (16, 8), 8192, 8192, 256, is_causal=True, feature="softcap", model="Gemma-2 9B"),
    Case(1, (16, 8), 8192, 8192, 256, is_causal=True, feature="window 4096", model="Gemma-2 9B"),
    Case(4, (16, 16), 4096, 4096, 128, dtype="float16"),
    Case(1, (16, 16), 4096, 4096, 64, dtype="float32"),
    Case(1, (16, 16), 2048, 2048, 64, dtype="float64"),
    *(Case(4, (16, 16), 4096, 4096, 128, feature=feature) for feature in _SHORT_FEATURES),
)

#: Calls whose time is Python's: the GPU is done before the next one comes.
HOST_CASES: dict[str, Case] = {
    "the same decode step again": Case(4, (32, 8), 1, 1024, 128, dtype="float16"),
    "the same small prefill again": Case(1, (8, 8), 128, 128, 64, is_causal=True, dtype="float16"),
}
