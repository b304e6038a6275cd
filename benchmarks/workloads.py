"""What the CPU benchmark computes: one value for each row of its table, from which the arrays follow.

A target is a ratio: another implementation's time over ours in the same run.  They were set on two cores with
AVX-512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cupyflash.testing import DTYPES

__all__ = ["WORKLOADS", "Workload"]

Array: TypeAlias = npt.NDArray[Any]
Shape: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One row of the table.

    Attributes
    ----------
    name : unique; `--cases` chooses by it
    section : "speed" (against other implementations), "feature" (against our own call without it), "small"
    query_shape : (batch, heads, L, head_dim)
    key_shape : (batch, key heads, S, head_dim), of value too
    mask : None, "random" (L × S, three quarters kept), "additive" (L × S, float32) or "padding" (batch × S)
    options : further arguments of `cupyflash.attention`
    feature : those that a "feature" row is about
    others : the implementations that it is compared with (keys of `baselines.PREPARE`)
    targets : the least ratio to each of them
    target_seconds : the most that our call may take
    torch_dtype : of the PyTorch call, where that is not ours
    note : what a reader of the row should know
    quick : part of `--quick`
    """

    name: str
    query_shape: Shape
    key_shape: Shape
    section: str = "speed"
    dtype: str = "float32"
    mask: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    feature: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ("numpy", "torch")
    targets: Mapping[str, float] = field(default_factory=dict)
    target_seconds: float | None = None
    torch_dtype: str | None = None
    note: str = ""
    quick: bool = False

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `cupyflash.attention`, with fresh arrays of always the same values."""
        rng = np.random.default_rng(list(self.name.encode()))  # rows share no data
        drawn = np.float64 if self.dtype == "float64" else np.float32
        query, key, value = (
            rng.standard_normal(shape, drawn).astype(DTYPES[self.dtype], copy=False)
            for shape in (self.query_shape, self.key_shape, self.key_shape)
        )
        operands = {"query": query, "key": key, "value": value, "attn_mask": self._draw_mask(rng)}
        return {**operands, **self.options, **self.feature}

    def as_run_by(self, implementation: str) -> Workload:
        """What that implementation computes: "plain" is our call without the feature."""
        if implementation == "plain":
            return replace(self, feature={})
        if implementation == "torch" and self.torch_dtype:
            return replace(self, dtype=self.torch_dtype)
        return self

    def _draw_mask(self, rng: np.random.Generator) -> Array | None:
        batch_size, _, seqlen_q, _ = self.query_shape
        seqlen_k = self.key_shape[2]
        if self.mask == "random":
            return (np.frombuffer(rng.bytes(seqlen_q * seqlen_k), np.uint8) < 192).reshape(seqlen_q, seqlen_k)
        if self.mask == "additive":
            return rng.standard_normal((seqlen_q, seqlen_k), np.float32)
        if self.mask == "padding":
            lengths = seqlen_k >> np.arange(batch_size)  # S, S/2, S/4, …: the sentences of a batch differ
            return (np.arange(seqlen_k) < lengths[:, None])[:, None, None, :]
        return None


def _speed(name: str, query_shape: Shape, key_shape: Shape | None = None, **others: Any) -> Workload:
    return Workload(name=name, query_shape=query_shape, key_shape=key_shape or query_shape, **others)


def _feature(name: str, **feature: Any) -> Workload:
    shape = (1, 8, 2048, 64)
    return Workload(
        name=f"{name} 1×8×2048×64",
        section="feature",
        query_shape=shape,
        key_shape=shape,
        feature=feature,
        others=("plain",),
        quick=name == "softcap",
    )


_CAUSAL = {"is_causal": True}
_DENSE_TARGETS = {"numpy": 2.3, "torch": 0.8}
_CAUSAL_TARGETS = {"numpy": 4.5, "torch": 0.8}
_DECODE_TARGETS = {"numpy": 8.0, "torch": 2.0}
_DECODE = {"query_shape": (8, 32, 1, 128), "key_shape": (8, 8, 8192, 128), "options": {"enable_gqa": True}}
_REPEATED = "NumPy repeats the key heads"

WORKLOADS: tuple[Workload, ...] = (
    _speed("dense 1×8×1024×64", (1, 8, 1024, 64), targets=_DENSE_TARGETS, quick=True),
    _speed("dense 2×8×2048×64", (2, 8, 2048, 64), targets=_DENSE_TARGETS),
    _speed("causal 2×8×2048×64", (2, 8, 2048, 64), options=_CAUSAL, targets=_CAUSAL_TARGETS, quick=True),
    _speed("additive mask 2×8×2048×64", (2, 8, 2048, 64), mask="additive", targets=_DENSE_TARGETS),
    _speed("dense 1×16×4096×128", (1, 16, 4096, 128), targets=_DENSE_TARGETS),
    _speed("causal 1×16×4096×128", (1, 16, 4096, 128), options=_CAUSAL, targets=_CAUSAL_TARGETS),
    _speed("dense 1×1×16384×64", (1, 1, 16384, 64), targets=_DENSE_TARGETS),
    _speed("causal 1×1×16384×64", (1, 1, 16384, 64), options=_CAUSAL, targets=_CAUSAL_TARGETS),
    _speed(
        "bool mask 1×1×16384×64",
        (1, 1, 16384, 64),
        mask="random",
        targets={"numpy": 2.3, "torch": 1.0},
        note="random, three quarters kept",
    ),
    _speed("BERT 32×12×128×64", (32, 12, 128, 64), quick=True),
    _speed(
        "sliding window 512 1×8×4096×64",
        (1, 8, 4096, 64),
        options={"window": (511, 0)},
        targets={"torch": 2.0},
        note="PyTorch is given a bool mask",
    ),
    _speed(
        "padding mask 4×8×2048×64",
        (4, 8, 2048, 64),
        mask="padding",
        targets={"torch": 2.0},
        note="lengths 2048, 1024, 512, 256",
    ),
    _speed("GQA decode 8×32/8×1×128, S = 8192", **_DECODE, targets=_DECODE_TARGETS, note=_REPEATED),
    _speed(
        "float16 GQA decode 8×32/8×1×128, S = 8192",
        **_DECODE,
        dtype="float16",
        targets=_DECODE_TARGETS,
        note=_REPEATED,
    ),
    _speed(
        "bfloat16 GQA decode 8×32/8×1×128, S = 8192",
        **_DECODE,
        dtype="bfloat16",
        targets=_DECODE_TARGETS,
        note=_REPEATED,
    ),
    _speed(
        "float16 2×8×2048×64",
        (2, 8, 2048, 64),
        dtype="float16",
        torch_dtype="bfloat16",
        targets={"torch": 0.8},
        note="PyTorch in bfloat16",
        quick=True,
    ),
    _speed("bfloat16 2×8×2048×64", (2, 8, 2048, 64), dtype="bfloat16", targets={"torch": 0.8}),
    _speed("float64 1×8×2048×64", (1, 8, 2048, 64), dtype="float64"),
    _feature("softcap", softcap=30.0),
    _feature("ALiBi", alibi_slopes=np.float32(2.0) ** -np.arange(1, 9, dtype=np.float32)),
    _feature("sinks", sinks=np.linspace(-1, 1, 8, dtype=np.float32)),
    _feature("dropout", dropout_p=0.1, seed=0),
    _feature("score_mod", score_mod=lambda score, b, h, q_idx, kv_idx: score - 0.01 * abs(q_idx - kv_idx)),
    _speed(
        "small 1×1×64×64",
        (1, 1, 64, 64),
        section="small",
        others=("bare", "torch"),
        target_seconds=60e-6,
        note="bare: seven NumPy calls into arrays that are there",
        quick=True,
    ),
)
