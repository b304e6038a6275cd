"""User arguments → `Problem` (what is asked, no arrays) and `Buffers` (the arrays in one canonical layout), and back.

All validation of user input is here.  The canonical layout has as many batch axes as the output::

    query (*batch, Hq, L, E)   key (*batch, Hk, S, E)   value (*batch, Hv, S, Ev)   out (*batch, Hq, L, Ev)

Batch axes that broadcast have stride zero.  Query head h reads key head h // (Hq / Hk) and value head h // (Hq / Hv);
heads that broadcast are the case Hk = 1.  Nothing is ever copied.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from .dtypes import DTYPES, DType, dtype_named
from .masks import Band, band, check_align, check_window
from .mods import MaskMod, ScoreMod
from .philox import check_dropout_p, check_seed
from .shapes import lead_axes, mask_shape

__all__ = ["STAGES", "Buffers", "Problem", "check_flag", "check_stage", "library_of", "normalize", "restore"]

#: What can be asked of `attention_weights`, in the order in which it is computed.
STAGES = ("raw", "modded", "capped", "biased", "softmax")
_PRECISIONS = ("ieee", "tf32", "tf32x3")
_LIBRARY_NAMES = {"numpy": "NumPy", "cupy": "CuPy"}


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

    @property
    def lead_shape(self) -> tuple[int, ...]:
        """The axes of the output before its last two, as the caller sees them."""
        return (*self.batch_shape, self.num_heads_q) if self.has_head_axis else ()

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


def normalize(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Sequence[int | None] | None = None,
    align: str | int = "top_left",
    softcap: float | None = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    seed: Any = None,
    precision: str = "ieee",
    return_lse: bool = False,
    return_weights: bool = False,
    stage: str | None = None,
    out: Any = None,
) -> tuple[Problem, Buffers]:
    """Validate a call and describe it.  With `value` None, `stage` says which weights are asked for instead."""
    library = library_of("query", query)
    query = _plain(query)
    key = _like_query("key", key, library)
    if value is None and stage is not None:
        value = key[..., :0]
    else:
        value = _like_query("value", value, library)
    dtype = _common_dtype(query, key, value)

    float_mask, bool_mask = (None, None) if attn_mask is None else _split_mask(attn_mask, library, dtype)
    if alibi_slopes is not None:
        alibi_slopes = _like_query("alibi_slopes", alibi_slopes, library)
        if alibi_slopes.dtype != np.float32:
            raise TypeError(f"alibi_slopes must be float32, but was {alibi_slopes.dtype}")
    if sinks is not None:
        sinks = _like_query("sinks", sinks, library)
        if sinks.dtype != np.float32 and sinks.dtype != query.dtype:
            raise TypeError(f"sinks must be {dtype.name} (the query's dtype) or float32, but was {sinks.dtype}")
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, but was {type(function).__name__}")

    dropout_p = check_dropout_p(dropout_p)
    seed = None if seed is None else _check_seed(seed, library)
    weights_stage = "dropout" if check_flag("return_weights", return_weights) else stage
    _check_choice("precision", precision, _PRECISIONS)

    problem, shapes = _describe(
        library,
        dtype.name,
        query.shape,
        key.shape,
        value.shape,
        None if float_mask is None else (float_mask.shape, DTYPES[float_mask.dtype].name),
        None if bool_mask is None else bool_mask.shape,
        None if alibi_slopes is None else alibi_slopes.shape,
        None if sinks is None else sinks.shape,
        score_mod is not None,
        mask_mod is not None,
        check_flag("is_causal", is_causal),
        _check_scale(scale),
        check_flag("enable_gqa", enable_gqa),
        None if window is None else check_window(window),
        check_align(align),
        _check_softcap(softcap),
        dropout_p,
        precision,
        check_flag("return_lse", return_lse),
        weights_stage,
    )
    xp = problem.namespace
    if library != "numpy":
        _check_devices(query, key, value, float_mask, bool_mask, alibi_slopes, sinks, out)
    if dropout_p and seed is None:
        seed = int(np.random.randint(0, 2**64, dtype=np.uint64))  # noqa: NPY002, so that np.random.seed decides
    if out is not None:
        inputs = {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": float_mask,
            "the bool attn_mask": bool_mask,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
        }
        _check_out(out, shapes.returned, query.dtype, library, inputs, xp)

    returned = xp.empty(shapes.returned, query.dtype) if out is None else out
    canonical_out = _plain(returned)
    if not problem.has_head_axis:
        canonical_out = canonical_out[None]
    accumulator = dtype.accumulator
    buffers = Buffers(
        query=_broadcast(query, shapes.query, xp),
        key=_broadcast(key, shapes.key, xp),
        value=_broadcast(value, shapes.value, xp),
        float_mask=None if float_mask is None else float_mask.reshape(shapes.float_mask),
        bool_mask=None if bool_mask is None else bool_mask.reshape(shapes.bool_mask),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.reshape(-1, problem.num_heads_q),
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        seed=seed,
        out=canonical_out,
        lse=xp.empty(shapes.out[:-1], accumulator) if return_lse else None,
        weights=xp.empty(shapes.weights, query.dtype if weights_stage in ("softmax", "dropout") else accumulator)
        if weights_stage
        else None,
        returned=returned,
    )
    return problem, buffers


def restore(problem: Problem, buffers: Buffers) -> Any:
    """The caller's view of filled buffers: out, (out, lse), (out, weights) or (out, lse, weights)."""
    results = [buffers.returned]
    for extra in (buffers.lse, buffers.weights):
        if extra is not None:
            results.append(extra if problem.has_head_axis else extra[0])
    return results[0] if len(results) == 1 else tuple(results)


# --- shapes: pure functions of the arguments' shapes, remembered from call to call ---------------------------------


class _Shapes(NamedTuple):
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    out: tuple[int, ...]
    weights: tuple[int, ...]
    returned: tuple[int, ...]
    float_mask: tuple[int, ...]
    bool_mask: tuple[int, ...]


@lru_cache(maxsize=512)
def _describe(
    library: str,
    dtype: str,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    float_mask: tuple[tuple[int, ...], str] | None,
    bool_mask: tuple[int, ...] | None,
    alibi_slopes: tuple[int, ...] | None,
    sinks: tuple[int, ...] | None,
    has_score_mod: bool,
    has_mask_mod: bool,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: tuple[int | None, int | None] | None,
    align: str | int,
    softcap: float,
    dropout_p: float,
    precision: str,
    return_lse: bool,
    weights_stage: str | None,
) -> tuple[Problem, _Shapes]:
    lead, score_lead, heads = lead_axes(query, key, value, enable_gqa)
    num_heads_q, num_heads_k, num_heads_v = heads
    (seqlen_q, head_dim), (seqlen_k, head_dim_v) = query[-2:], value[-2:]
    batch = lead[:-1]
    scores = (*score_lead, seqlen_q, seqlen_k)
    rank = len(batch) + 3

    if alibi_slopes is not None and alibi_slopes not in ((num_heads_q,), (math.prod(batch), num_heads_q)):
        raise ValueError(
            f"alibi_slopes must have shape {(num_heads_q,)} or {(math.prod(batch), num_heads_q)} "
            f"([batch,] query heads), but had shape {alibi_slopes}"
        )
    if sinks is not None and sinks != (num_heads_q,):
        raise ValueError(f"sinks must have shape {(num_heads_q,)} (query heads), but had shape {sinks}")

    diagonals, shift = band(is_causal, window, align, seqlen_q, seqlen_k)
    problem = Problem(
        library=library,
        dtype=dtype,
        batch_shape=batch,
        has_head_axis=bool(lead),
        num_heads_q=num_heads_q,
        num_heads_k=num_heads_k,
        num_heads_v=num_heads_v,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        scale=scale if scale is not None else 1.0 / math.sqrt(head_dim) if head_dim else 1.0,
        band=diagonals,
        shift=shift,
        softcap=softcap,
        has_score_mod=has_score_mod,
        has_mask_mod=has_mask_mod,
        float_mask_dtype=float_mask[1] if float_mask else None,
        has_bool_mask=bool_mask is not None,
        has_alibi=alibi_slopes is not None,
        has_sinks=sinks is not None,
        dropout_p=dropout_p,
        precision=precision,
        return_lse=return_lse,
        weights_stage=weights_stage,
    )
    shapes = _Shapes(
        query=(*batch, num_heads_q, seqlen_q, head_dim),
        key=(*batch, num_heads_k, seqlen_k, head_dim),
        value=(*batch, num_heads_v, seqlen_k, head_dim_v),
        out=(*batch, num_heads_q, seqlen_q, head_dim_v),
        weights=(*batch, num_heads_q, seqlen_q, seqlen_k),
        returned=(*lead, seqlen_q, head_dim_v),
        float_mask=mask_shape(float_mask[0], scores, rank) if float_mask else (),
        bool_mask=mask_shape(bool_mask, scores, rank) if bool_mask is not None else (),
    )
    return problem, shapes


def _broadcast(array: Any, shape: tuple[int, ...], xp: Any) -> Any:
    if array.shape == shape:
        return array
    missing = len(shape) - array.ndim
    if shape == (1,) * missing + array.shape:
        return array.reshape(shape)
    return xp.broadcast_to(array, shape)


# --- checks of single arguments ------------------------------------------------------------------------------------


def check_stage(stage: str) -> str:
    """Return `stage` if it is one of STAGES, or raise a TypeError or ValueError that says so."""
    _check_choice("stage", stage, STAGES)
    return stage


def library_of(name: str, array: Any) -> str:
    """Return "numpy" or "cupy", or raise a TypeError that names the argument."""
    if type(array) is np.ndarray:
        return "numpy"
    if isinstance(array, np.ndarray):
        if isinstance(array, (np.ma.MaskedArray, np.matrix)):
            raise TypeError(f"{name} must be a plain array, but was a {type(array).__name__}, which is not supported")
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return "cupy"
    raise TypeError(f"{name} must be a NumPy or CuPy array, but was {type(array).__name__}")


def _plain(array: Any) -> Any:
    """The array without an ndarray subclass (memmap, say) around it."""
    return array.view(np.ndarray) if isinstance(array, np.ndarray) and type(array) is not np.ndarray else array


def _like_query(name: str, array: Any, library: str) -> Any:
    found = library_of(name, array)
    if found != library:
        raise TypeError(
            f"{name} must be a {_LIBRARY_NAMES[library]} array like query, but was a {_LIBRARY_NAMES[found]} array"
        )
    return _plain(array)


def _common_dtype(query: Any, key: Any, value: Any) -> DType:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64 in native byte order, but was {_named(array)}"
            )
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, but was {array.dtype}")
    return DTYPES[query.dtype]


def _named(array: Any) -> str:
    """The dtype in words: the byte order counts where it is what was wrong."""
    dtype = array.dtype
    return dtype.name if dtype.isnative else f"{dtype.name} in non-native byte order ({dtype.str})"


def _split_mask(attn_mask: Any, library: str, dtype: DType) -> tuple[Any, Any]:
    """attn_mask as (float mask or None, bool mask or None)."""
    if isinstance(attn_mask, tuple):
        if len(attn_mask) != 2:
            raise ValueError(f"attn_mask as a tuple must be (float_mask, bool_mask), but had {len(attn_mask)} items")
        float_mask, bool_mask = (_like_query(f"attn_mask[{i}]", attn_mask[i], library) for i in range(2))
        if bool_mask.dtype != bool or float_mask.dtype == bool:
            raise TypeError(
                f"attn_mask as a tuple must be (float_mask, bool_mask), but was ({float_mask.dtype}, {bool_mask.dtype})"
            )
        _check_float_mask("attn_mask[0]", float_mask, dtype)
        return float_mask, bool_mask
    mask = _like_query("attn_mask", attn_mask, library)
    if mask.dtype == bool:
        return None, mask
    _check_float_mask("attn_mask", mask, dtype)
    return mask, None


def _check_float_mask(name: str, mask: Any, dtype: DType) -> None:
    if mask.dtype in (dtype.storage, np.dtype(np.float32)) and mask.dtype.isnative:
        return
    allowed = "float32" if dtype.name == "float32" else f"{dtype.name} (the query's dtype), float32"
    hint = "; NumPy makes float64 by default: pass .astype(np.float32)" if mask.dtype == np.float64 else ""
    raise TypeError(f"{name} must be bool, {allowed} in native byte order, but was {_named(mask)}{hint}")


def _check_seed(seed: Any, library: str) -> Any:
    if not isinstance(seed, np.generic) and hasattr(seed, "dtype"):
        seed = _like_query("seed", seed, library)
    return check_seed(seed)


def check_flag(name: str, flag: Any) -> bool:
    if flag is True or flag is False:
        return flag
    if isinstance(flag, np.bool_):
        return bool(flag)
    raise TypeError(f"{name} must be a bool, but was {flag!r}")


def _check_choice(name: str, choice: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(choice, str):
        raise TypeError(f"{name} must be one of {choices}, but was {choice!r}")
    if choice not in choices:
        raise ValueError(f"{name} must be one of {choices}, but was {choice!r}")


def _check_number(name: str, number: Any) -> float:
    if type(number) is not float and (isinstance(number, (bool, np.bool_)) or not isinstance(number, Real)):
        raise TypeError(f"{name} must be a real number, but was {number!r}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, but was {number}")
    return number


def _check_scale(scale: Any) -> float | None:
    return None if scale is None else _check_number("scale", scale)


def _check_softcap(softcap: Any) -> float:
    if softcap is None:
        return 0.0
    softcap = _check_number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0 (0 is off), but was {softcap}")
    return softcap


def _check_devices(query: Any, *others: Any) -> None:
    for array in others:
        if array is not None and array.device != query.device:
            raise ValueError(f"all arrays must be on query's device {query.device}, but one was on {array.device}")


def _check_out(out: Any, shape: tuple[int, ...], dtype: Any, library: str, inputs: dict[str, Any], xp: Any) -> None:
    plain = _like_query("out", out, library)
    if plain.dtype != dtype:
        raise TypeError(f"out must have query's dtype {dtype}, but was {plain.dtype}")
    if plain.shape != shape:
        raise ValueError(f"out must have shape {shape}, but had shape {plain.shape}")
    if not getattr(plain.flags, "writeable", True):
        raise ValueError("out must be writable, but was read-only")
    if _overlaps_itself(plain):
        raise ValueError(f"out must not overlap itself, but had shape {plain.shape} and strides {plain.strides}")
    for name, array in inputs.items():
        if array is not None and _shares_memory(plain, array, xp):
            raise ValueError(f"out must not share memory with {name}, but did")


def _shares_memory(a: Any, b: Any, xp: Any) -> bool:
    if not xp.may_share_memory(a, b):
        return False
    try:
        # The exact answer is exponential in the worst case; interleaved views, which users have, are quick.
        return bool(xp.shares_memory(a, b, max_work=100_000))
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: Any) -> bool:
    """True if two different indices of the array share a byte."""
    if array.size < 2:
        return False
    axes = sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True) if n > 1)
    extent = array.itemsize
    for stride, n in axes:
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return False  # each axis steps over all that the finer axes cover
    if axes[0][0] < array.itemsize:
        return True
    offsets = np.zeros(1, np.int64)
    for stride, n in axes:
        offsets = np.add.outer(offsets, stride * np.arange(n, dtype=np.int64)).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < array.itemsize).any())
