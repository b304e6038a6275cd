"""User arguments → `Problem` (what is asked, no arrays) and `Buffers` (the arrays in one canonical layout), and back.

The canonical layout has as many batch axes as the output::

    query (*batch, Hq, L, E)   key (*batch, Hk, S, E)   value (*batch, Hv, S, Ev)   out (*batch, Hq, L, Ev)

Batch axes that broadcast have stride zero.  Query head h reads key head h // (Hq / Hk) and value head h // (Hq / Hv);
heads that broadcast are the case Hk = 1.  Nothing is ever copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .checks import (
    array_like_query,
    check_callable,
    check_devices,
    check_flag,
    check_out,
    check_per_head,
    check_precision,
    check_scale,
    check_seed_array,
    check_softcap,
    common_dtype,
    library_of,
    plain_array,
    split_mask,
)
from .dtypes import DTYPES
from .masks import Band, check_align, check_window, checked_band
from .mods import MaskMod, ScoreMod
from .philox import check_dropout_p
from .problem import Buffers, Problem
from .shapes import check_lengths, lead_axes, mask_shape

__all__ = ["normalize", "restore"]


def normalize(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
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
    out: Any = None,
    *,
    stage: str | None = None,
) -> tuple[Problem, Buffers]:
    """Validate a call and describe it.  With `value` None, `stage` says which weights are asked for instead.

    The arguments are in the order of `attention`'s.  What most calls leave at its default is looked at in place: a
    function call for each argument would take as long as all the rest.
    """
    library = library_of("query", query)
    if library == "numpy":
        query = plain_array(query)
    kind = type(query)
    if type(key) is not kind:
        key = array_like_query("key", key, query)
    if type(value) is not kind:
        if value is None and stage is not None:
            value = key[..., :0] if key.ndim else key
        else:
            value = array_like_query("value", value, query)
    dtype = common_dtype(query, key, value)

    is_plain = attn_mask is None and alibi_slopes is None and sinks is None and out is None and seed is None
    float_mask, bool_mask = (None, None) if attn_mask is None else split_mask(attn_mask, query, dtype)
    if alibi_slopes is not None:
        alibi_slopes = array_like_query("alibi_slopes", alibi_slopes, query)
        check_per_head("alibi_slopes", alibi_slopes, None)
    if sinks is not None:
        sinks = array_like_query("sinks", sinks, query)
        check_per_head("sinks", sinks, dtype)

    if seed is not None:
        seed = check_seed_array(seed, query)
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if len(query_shape) < 2 or len(key_shape) < 2 or len(value_shape) < 2 or value_shape[-2] != key_shape[-2]:
        check_lengths(query_shape, key_shape, value_shape)  # raises
    seqlen_q, seqlen_k = query_shape[-2], key_shape[-2]
    if not type(is_causal) is type(enable_gqa) is type(return_lse) is type(return_weights) is bool:
        is_causal, enable_gqa = check_flag("is_causal", is_causal), check_flag("enable_gqa", enable_gqa)
        return_lse, return_weights = check_flag("return_lse", return_lse), check_flag("return_weights", return_weights)
    asked = (
        library,
        dtype.name,
        query_shape[:-2],
        key_shape[:-2],
        value_shape[:-2],
        query_shape[-1],
        key_shape[-1],
        value_shape[-1],
        None if float_mask is None else DTYPES[float_mask.dtype].name,
        bool_mask is not None,
        None if alibi_slopes is None else alibi_slopes.shape,
        None if sinks is None else sinks.shape,
        score_mod is not None and check_callable("score_mod", score_mod),
        mask_mod is not None and check_callable("mask_mod", mask_mod),
        is_causal,
        None if scale is None else check_scale(scale),
        enable_gqa,
        None if window is None else check_window(window),
        check_align(align),
        check_softcap(softcap) if type(softcap) is not float or softcap else 0.0,
        check_dropout_p(dropout_p) if type(dropout_p) is not float or dropout_p else 0.0,
        check_precision(precision),
        return_lse,
        "dropout" if return_weights else stage,
    )
    described = _KNOWN.get(asked)
    if described is None:
        described = _describe(_Asked(*asked), query_shape, key_shape, value_shape)
    last = described.last
    if last is not None and last.seqlen_q == seqlen_q and last.seqlen_k == seqlen_k:
        problem = last
    else:
        problem = described.last = _with_lengths(described, seqlen_q, seqlen_k)
    out_shape = (*described.query_lead, seqlen_q, value_shape[-1])
    returned_shape = out_shape if problem.has_head_axis else out_shape[1:]
    if float_mask is not None:
        float_mask = float_mask.reshape(_mask_shape(float_mask.shape, described, problem))
    if bool_mask is not None:
        bool_mask = bool_mask.reshape(_mask_shape(bool_mask.shape, described, problem))
    xp = problem.namespace
    if library != "numpy" and not (is_plain and query.device == key.device == value.device):
        seed_array = None if isinstance(seed, int) else seed
        check_devices(query, key, value, float_mask, bool_mask, alibi_slopes, sinks, out, seed_array)
    if seed is None and problem.dropout_p:
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
        check_out(out, returned_shape, query, inputs)

    returned = xp.empty(returned_shape, query.dtype) if out is None else out
    canonical_out = returned if out is None else plain_array(out)
    if not problem.has_head_axis:
        canonical_out = canonical_out[None]
    if not described.is_canonical:
        query = _broadcast(query, described.query_lead, xp)
        key = _broadcast(key, described.key_lead, xp)
        value = _broadcast(value, described.value_lead, xp)
    weights = None
    if problem.weights_stage:
        written = dtype.accumulator if problem.stops_at_scores else query.dtype
        weights = xp.empty((*out_shape[:-1], problem.seqlen_k), written)
    buffers = Buffers(
        query,
        key,
        value,
        float_mask,
        bool_mask,
        alibi_slopes[None] if alibi_slopes is not None and alibi_slopes.ndim == 1 else alibi_slopes,
        sinks,
        score_mod,
        mask_mod,
        seed,
        canonical_out,
        xp.empty(out_shape[:-1], dtype.accumulator) if return_lse else None,
        weights,
        returned,
    )
    return problem, buffers


def restore(problem: Problem, buffers: Buffers) -> Any:
    """The caller's view of filled buffers: out, (out, lse), (out, weights) or (out, lse, weights)."""
    if buffers.lse is None and buffers.weights is None:
        return buffers.returned
    results = [buffers.returned]
    for extra in (buffers.lse, buffers.weights):
        if extra is not None:
            results.append(extra if problem.has_head_axis else extra[0])
    return tuple(results)


# --- what was asked, remembered from call to call -------------------------------------------------------------------
#
# In two steps, so that a call of other lengths than before finds most of its description made: all that does not depend
# on lengths, then the lengths.


class _Asked(NamedTuple):
    """A call without its arrays, and without lengths."""

    library: str
    dtype: str
    query_lead: tuple[int, ...]
    key_lead: tuple[int, ...]
    value_lead: tuple[int, ...]
    head_dim: int
    head_dim_k: int
    head_dim_v: int
    float_mask_dtype: str | None
    has_bool_mask: bool
    alibi_slopes: tuple[int, ...] | None
    sinks: tuple[int, ...] | None
    has_score_mod: bool
    has_mask_mod: bool
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    window: tuple[int | None, int | None] | None
    align: str | int
    softcap: float
    dropout_p: float
    precision: str
    return_lse: bool
    weights_stage: str | None


@dataclass(eq=False)
class _Described:
    """What follows from `asked`, whatever the lengths."""

    asked: _Asked
    problem: Problem  # but for its lengths, band and shift
    query_lead: tuple[int, ...]  # leading axes in the canonical layout
    key_lead: tuple[int, ...]
    value_lead: tuple[int, ...]
    score_lead: tuple[int, ...]  # of the scores, as the caller sees them
    is_canonical: bool  # query, key and value come in the canonical layout
    last: Problem | None = None  # of the call before: a loop repeats its lengths, or never sees them again


_KNOWN: dict[tuple[Any, ...], _Described] = {}
_MOST_KNOWN = 512


def _describe(asked: _Asked, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> _Described:
    """Check how the shapes meet.  They are those of the arrays, for the words of an error."""
    lead, score_lead, heads = lead_axes(query, key, value, asked.enable_gqa)
    num_heads_q, num_heads_k, num_heads_v = heads
    batch = lead[:-1]
    head_dim, head_dim_v = asked.head_dim, asked.head_dim_v
    slopes, sinks, scale = asked.alibi_slopes, asked.sinks, asked.scale
    problem = Problem(
        library=asked.library,
        dtype=asked.dtype,
        batch_shape=batch,
        has_head_axis=bool(lead),
        num_heads_q=num_heads_q,
        num_heads_k=num_heads_k,
        num_heads_v=num_heads_v,
        seqlen_q=0,
        seqlen_k=0,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        scale=scale if scale is not None else 1.0 / math.sqrt(head_dim) if head_dim else 1.0,
        band=Band(),
        shift=0,
        softcap=asked.softcap,
        has_score_mod=asked.has_score_mod,
        has_mask_mod=asked.has_mask_mod,
        float_mask_dtype=asked.float_mask_dtype,
        has_bool_mask=asked.has_bool_mask,
        has_alibi=slopes is not None,
        has_sinks=sinks is not None,
        dropout_p=asked.dropout_p,
        precision=asked.precision,
        return_lse=asked.return_lse,
        weights_stage=asked.weights_stage,
    )
    if slopes is not None and slopes not in ((num_heads_q,), (problem.batch_size, num_heads_q)):
        raise ValueError(
            f"alibi_slopes must have shape {(num_heads_q,)} or {(problem.batch_size, num_heads_q)} "
            f"([batch,] query heads), but had shape {slopes}"
        )
    if sinks is not None and sinks != (num_heads_q,):
        raise ValueError(f"sinks must have shape {(num_heads_q,)} (query heads), but had shape {sinks}")

    problem = problem.settled()
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    leads = (*batch, num_heads_q), (*batch, num_heads_k), (*batch, num_heads_v)
    is_canonical = leads == (asked.query_lead, asked.key_lead, asked.value_lead)
    described = _KNOWN[asked] = _Described(asked, problem, *leads, score_lead, is_canonical)
    return described


def _with_lengths(described: _Described, seqlen_q: int, seqlen_k: int) -> Problem:
    asked = described.asked
    window = (None, None) if asked.window is None else asked.window
    diagonals, shift = checked_band(asked.is_causal, window, asked.align, seqlen_q, seqlen_k)
    return described.problem.with_lengths(seqlen_q, seqlen_k, diagonals, shift)


def _mask_shape(shape: tuple[int, ...], described: _Described, problem: Problem) -> tuple[int, ...]:
    scores = (*described.score_lead, problem.seqlen_q, problem.seqlen_k)
    return mask_shape(shape, scores, len(described.query_lead) + 2)


def _broadcast(array: Any, lead: tuple[int, ...], xp: Any) -> Any:
    """The array with those leading axes."""
    shape = array.shape
    if shape[:-2] == lead:
        return array
    shape = (*lead, *shape[-2:])
    missing = len(shape) - array.ndim
    if shape == (1,) * missing + array.shape:
        return array.reshape(shape)
    return xp.broadcast_to(array, shape)
