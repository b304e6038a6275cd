"""The two values that every call becomes: `Problem`, what is asked, and `Buffers`, the arrays it is asked of."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..hashing import hash_once
from .dtypes import DType, dtype_named
from .masks import Band
from .mods import MaskMod, ScoreMod

__all__ = ["STAGES", "Buffers", "Problem"]

#: What can be asked of `attention_weights`, in the order in which it is computed.
STAGES = ("raw", "modded", "capped", "biased", "softmax")


@hash_once
@dataclass(frozen=True)
class Problem:
    """One attention call without its arrays: hashable, printable, enough to decide who can run it and how."""

    library: str  # "numpy" or "cupy"
    dtype: str
    batch_shape: tuple[int, ...]
    has_head_axis: bool  # False for 2-D output, whose one head is not an axis
    num_heads_q: int
    num_heads_k: int
    num_heads_v: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    band: Band
    shift: int
    softcap: float  # 0 is off
    has_score_mod: bool
    has_mask_mod: bool
    float_mask_dtype: str | None
    has_bool_mask: bool
    has_alibi: bool
    has_sinks: bool
    dropout_p: float
    precision: str
    return_lse: bool
    weights_stage: str | None  # one of STAGES, "dropout" for return_weights, None for no L×S array

    def with_lengths(self, seqlen_q: int, seqlen_k: int, band: Band, shift: int) -> Problem:
        """The same problem of other lengths: what `dataclasses.replace` gives, in a tenth of its time.

        Nothing that is kept beside the fields depends on lengths, but for the hash.
        """
        other = object.__new__(Problem)
        kept = {**self.__dict__}
        object.__setattr__(other, "__dict__", kept)
        kept.pop("_hash", None)
        kept["seqlen_q"], kept["seqlen_k"], kept["band"], kept["shift"] = seqlen_q, seqlen_k, band, shift
        return other

    def settled(self) -> Problem:
        """The same problem, with all that is kept, so that problems of other lengths are made with it."""
        for name, member in vars(Problem).items():
            if isinstance(member, cached_property):
                getattr(self, name)
        return self.with_lengths(self.seqlen_q, self.seqlen_k, self.band, self.shift)

    @cached_property
    def of_any_length(self) -> Problem:
        """The problem without lengths, band and shift: one object for the calls of a loop, whatever their lengths.

        Caches of what lengths do not matter to are keyed by it.
        """
        return replace(self, seqlen_q=0, seqlen_k=0, band=Band(), shift=0)

    @cached_property
    def element(self) -> DType:
        """The table's row for the inputs' dtype."""
        return dtype_named(self.dtype)

    @property
    def namespace(self) -> Any:
        """The module whose functions take the problem's arrays: numpy, or cupy where it is already imported."""
        return np if self.library == "numpy" else sys.modules[self.library]

    @cached_property
    def batch_size(self) -> int:
        """Number of entries of the flattened batch."""
        return math.prod(self.batch_shape)

    @cached_property
    def changes_scores(self) -> bool:
        """True if anything but masks changes the scores after scale · q·kᵀ."""
        return bool(self.has_score_mod or self.softcap or self.float_mask_dtype or self.has_alibi)

    @cached_property
    def has_plain_scores(self) -> bool:
        """True if weights are the softmax of scale · q·kᵀ over a band of keys, sinks or not."""
        return not (self.changes_scores or self.has_bool_mask or self.has_mask_mod or self.dropout_p)

    @cached_property
    def needs_heads(self) -> bool:
        """True if anything depends on which batch entry and head a score belongs to."""
        return bool(self.has_score_mod or self.has_mask_mod or self.has_alibi or self.has_sinks or self.dropout_p)

    @property
    def stops_at_scores(self) -> bool:
        """True if only scores are asked for: neither weights nor what is made of them."""
        return self.weights_stage not in (None, "softmax", "dropout")

    @property
    def last_position(self) -> int:
        """A bound of all |i + shift| and j."""
        return max(self.seqlen_q + abs(self.shift), self.seqlen_k)

    def __str__(self) -> str:
        """Shapes on one line, features on the next."""
        heads = f"heads {self.num_heads_q}/{self.num_heads_k}/{self.num_heads_v}"
        shape = f"L={self.seqlen_q} S={self.seqlen_k} E={self.head_dim} Ev={self.head_dim_v}"
        features = [f"scale={self.scale:.6g}"]
        if not self.band.is_full:
            features.append(f"keys j with {_bounds(self.band)}")
        if self.shift:
            features.append(f"shift={self.shift}")
        if self.softcap:
            features.append(f"softcap={self.softcap:g}")
        if self.float_mask_dtype:
            features.append(f"{self.float_mask_dtype} mask")
        for name, present in (
            ("bool mask", self.has_bool_mask),
            ("score_mod", self.has_score_mod),
            ("mask_mod", self.has_mask_mod),
            ("alibi_slopes", self.has_alibi),
            ("sinks", self.has_sinks),
            ("lse", self.return_lse),
        ):
            if present:
                features.append(name)
        if self.dropout_p:
            features.append(f"dropout_p={self.dropout_p:g}")
        if self.precision != "ieee":
            features.append(f"precision={self.precision}")
        if self.weights_stage:
            features.append(f"weights after {self.weights_stage}")
        return f"{self.library} {self.dtype} batch {self.batch_shape} {heads} {shape}\n  {', '.join(features)}"


def _bounds(diagonals: Band) -> str:
    low = "" if diagonals.lower is None else f"{diagonals.lower} <= "
    high = "" if diagonals.upper is None else f" <= {diagonals.upper}"
    return f"{low}j - i{high}"


class Buffers(NamedTuple):
    """The arrays and functions of one call, in the canonical layout.  Backends read them and fill the last three."""

    query: Any  # (*batch, Hq, L, E)
    key: Any  # (*batch, Hk, S, E)
    value: Any  # (*batch, Hv, S, Ev)
    float_mask: Any  # rank of the scores; axes of length 1 broadcast; or None
    bool_mask: Any
    alibi_slopes: Any  # (1 or B, Hq) float32, or None
    sinks: Any  # (Hq,), or None
    score_mod: ScoreMod | None
    mask_mod: MaskMod | None
    seed: Any  # int, or a uint64 array of size 1 on the device; None without dropout
    out: Any  # (*batch, Hq, L, Ev)
    lse: Any  # (*batch, Hq, L) in the accumulation dtype, or None
    weights: Any  # (*batch, Hq, L, S), or None
    returned: Any  # the object the caller gets for `out`: their own array where they gave one
