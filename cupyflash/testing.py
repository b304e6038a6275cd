"""What attention must give, and how to tell whether a result is right.

`oracle` is PyTorch's documented formula and the order of operations of this package, written out one head at
a time in the plainest NumPy: it materialises everything, shares no code with any backend and is slow.
`Case` is one call of `cupyflash.attention` as a value that prints itself; `random_case` draws one.
`assert_attention_close` is the one rule by which every result of every backend is accepted or refused.

    >>> from cupyflash.testing import Case
    >>> Case(query_shape=(2, 5, 8), key_shape=(2, 7, 8), value_shape=(2, 7, 8), is_causal=True).check("numpy")

The rule, with u the unit roundoff of the input dtype, u_acc that of the accumulation dtype (float32; float64
for float64), p_j the weights, and m_j the largest term met on the way to score j (Σ_e|q_e k_e|·scale, the
bias, …):

* An error δ_j in score j moves the output by Σ_j p_j δ_j (v_j − out), to first order.  The rounding of q·k
  and of what is added to it amounts to |δ_j| ≤ u_acc·m_j; exp, the sums and the division add a few u_acc.
  So the unit of error is  u_acc·(8·Σ_j p_j|v_j| + Σ_j p_j m_j|v_j| + Σ_j p_j m_j·Σ_j p_j|v_j|):  it has no
  scale of its own.
* float32 and float64 (FlashAttention's rule): the error is at most 2 × the largest error, in that unit, of
  the same formula computed plainly in the same precision, plus one unit.  Weights below the smallest normal
  number may be lost.
* float16 and bfloat16: at most 3·u·Σ_j p_j|v_j| + 1e-6, since P may be rounded to the input dtype before P·V.
  The scores are float32, and three times their share of the unit above is added, one for each of q·k, the mask
  and ALiBi, which round one after the other: at scores of 1e5 it exceeds the first term.
* lse: at most 1e-5 + 2⁻²⁰·(Σ_j p_j m_j + |lse|) (for float64 both times 2⁻²⁹, the ratio of the roundoffs).
* NaN and infinities stand where they must and nowhere else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

import cupyflash

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MASK_MODS",
    "SCORE_MODS",
    "Case",
    "MaskSpec",
    "Reference",
    "SinkSpec",
    "acceptance",
    "assert_attention_close",
    "oracle",
    "random_case",
]

Array: TypeAlias = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

STAGES = ("raw", "modded", "capped", "biased", "softmax")


# ------------------------------------------------------------------------------------------------------------
# The oracle
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reference:
    """The result of `oracle`, in its precision, with what is needed to judge another result.

    Attributes
    ----------
    out : (…, L, Ev)
    lse : (…, L), after masks and sinks, before dropout
    weights : (…, L, S), after dropout
    scores : (…, L, S) at "raw", "modded", "capped", "biased" and (before dropout) "softmax"
    magnitudes : (…, L, S) at each of these stages: the largest term met on the way to each score
    row_magnitude : (…, L), the mean of the last of them by the softmax, the sink included
    spread : (…, L, Ev), Σ_j weights_j·|v_j|
    moved : (…, L, Ev), what errors of this size in the scores make of the output
    lost : (…, 1, Ev), Σ_j |v_j|: times the smallest normal number, what underflow may take away
    out_specified, lse_specified, weights_specified : where the contract says what the value is
    """

    out: Array
    lse: Array
    weights: Array
    scores: Mapping[str, Array]
    magnitudes: Mapping[str, Array]
    row_magnitude: Array
    spread: Array
    moved: Array
    lost: Array
    out_specified: Array
    lse_specified: Array
    weights_specified: Array


def oracle(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    align: str | int = "top_left",
    softcap: float | None = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    seed: Any = None,
    dtype: npt.DTypeLike | None = None,
) -> Reference:
    """Attention by its definition, materialised, one head at a time.

    The arguments are those of `cupyflash.attention` and are taken to be valid.  `dtype` is the precision to
    compute in: by default float64, and `np.longdouble` for float64 input (where the platform's is no wider,
    that is float64 once more).

        s = scale · q·kᵀ  →  score_mod  →  softcap·tanh(s/softcap)  →  + float mask − ALiBi  →  removal
          →  softmax, with exp(sink) in the denominator  →  dropout  →  · v
    """
    if dtype is None:
        dtype = np.longdouble if np.dtype(query.dtype) == np.float64 else np.float64
    query, key, value = (_to_numpy(x).astype(dtype) for x in (query, key, value))
    scale = default_scale(query.shape[-1]) if scale is None else scale

    # Query head h meets key head h // (Hq / Hk) and value head h // (Hq / Hv).
    if enable_gqa:
        key = np.repeat(key, query.shape[-3] // key.shape[-3], axis=-3)
        value = np.repeat(value, query.shape[-3] // value.shape[-3], axis=-3)
    batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query, key, value = (np.broadcast_to(x, batch + x.shape[-2:]) for x in (query, key, value))
    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    num_heads = batch[-1] if batch else 1
    scores_shape = (*batch, seqlen_q, seqlen_k)

    # Which keys take part, and what is added to the scores: the same for every head but for masks.
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :]
    shift = align if not isinstance(align, str) else 0 if align == "top_left" else seqlen_k - seqlen_q
    left, right = (None if side in (None, -1) else side for side in window or (None, None))
    in_band = np.ones((seqlen_q, seqlen_k), bool)
    if is_causal:
        in_band &= j - i <= shift
    if left is not None:
        in_band &= j - i >= shift - left
    if right is not None:
        in_band &= j - i <= shift + right

    visible = np.broadcast_to(in_band, scores_shape)
    bias = None
    for mask in attn_mask if isinstance(attn_mask, tuple) else (attn_mask,):
        if mask is None:
            continue
        mask = np.broadcast_to(_to_numpy(mask), scores_shape)
        if mask.dtype == bool:
            visible = visible & mask
        else:
            bias = mask.astype(dtype)

    slopes = None
    if alibi_slopes is not None:
        slopes = _to_numpy(alibi_slopes).astype(dtype)
        slopes = np.broadcast_to(slopes, (math.prod(batch[:-1]), num_heads))
    kept = None
    if dropout_p > 0:
        seed = int(_to_numpy(seed).item()) if hasattr(seed, "dtype") else seed
        kept = cupyflash.dropout_mask(scores_shape, dropout_p, seed)

    out = np.zeros((*batch, seqlen_q, value.shape[-1]), dtype)
    lse = np.zeros((*batch, seqlen_q), dtype)
    weights = np.zeros(scores_shape, dtype)
    scores = {stage: np.zeros(scores_shape, dtype) for stage in STAGES}
    magnitudes = {stage: np.zeros(scores_shape, dtype) for stage in STAGES}
    row_magnitude = np.zeros((*batch, seqlen_q), dtype)
    lse_specified = np.ones((*batch, seqlen_q), bool)
    weights_specified = np.ones(scores_shape, bool)

    with np.errstate(all="ignore"):
        for index in np.ndindex(*batch):
            h = index[-1] if index else 0
            b = int(np.ravel_multi_index(index[:-1], batch[:-1])) if index[:-1] else 0

            s = scale * (query[index] @ key[index].T)
            size = abs(scale) * (np.abs(query[index]) @ np.abs(key[index]).T)
            scores["raw"][index], magnitudes["raw"][index] = s, size

            if score_mod is not None:
                s = np.broadcast_to(np.asarray(score_mod(s, b, h, i, j), dtype), s.shape)
                size = np.maximum(size, np.abs(s))
            scores["modded"][index], magnitudes["modded"][index] = s, size
            removed = s == -np.inf

            if softcap:
                s = np.where(removed, s, softcap * np.tanh(s / softcap))
            scores["capped"][index], magnitudes["capped"][index] = s, size

            if bias is not None:
                # A bias so large that it absorbs the score absorbs its error too: float32's finfo.min, say.
                absorbed = size + np.abs(bias[index]) == np.abs(bias[index])
                size = np.where(absorbed, 0, np.maximum(size, np.abs(bias[index])))
                removed = removed | (bias[index] == -np.inf)
                s = s + bias[index]
            if slopes is not None:
                distance = slopes[b, h] * np.abs(i + shift - j).astype(dtype)
                absorbed = np.abs(s) + np.abs(distance) == np.abs(s)
                size = np.maximum(size, np.where(absorbed, 0, np.maximum(np.abs(s), np.abs(distance))))
                s = s - distance
            removed = removed | ~visible[index]
            if mask_mod is not None:
                removed = removed | ~np.broadcast_to(mask_mod(b, h, i, j), s.shape)
            s = np.where(removed, -np.inf, s)
            scores["biased"][index], magnitudes["biased"][index] = s, size

            sink = np.array(-np.inf, dtype) if sinks is None else _to_numpy(sinks)[h].astype(dtype)
            row_max = np.maximum(s.max(axis=1, initial=-np.inf), sink)
            safe_max = np.where(row_max == -np.inf, 0, row_max)
            p = np.exp(s - safe_max[:, None])
            row_sum = p.sum(axis=1) + np.exp(sink - safe_max)
            lse[index] = safe_max + np.log(row_sum)
            p = p / np.where(row_sum == 0, 1, row_sum)[:, None]
            scores["softmax"][index] = p

            if kept is not None:
                p = np.where(kept[index], p / (1 - dropout_p), 0)
            weights[index] = p
            if np.isfinite(value[index]).all():
                out[index] = p @ value[index]
            else:  # a key without weight is left out: what 0·NaN gives is not specified
                out[index] = np.where(p[:, :, None] == 0, 0, p[:, :, None] * value[index]).sum(axis=1)

            size = np.where(np.isfinite(size), size, 0)
            magnitudes["softmax"][index] = size
            sink_share = np.exp(sink - safe_max) / row_sum * np.abs(sink) if np.isfinite(sink) else 0
            row_magnitude[index] = (scores["softmax"][index] * size).sum(axis=1) + sink_share
            # Softmax of a row with +inf is NaN; whether its log-sum-exp is NaN or +inf is nobody's contract.
            lse_specified[index] = row_max != np.inf
            weights_specified[index] = ~(np.isnan(p).any(axis=1, keepdims=True) & removed)

        size_of_value = np.where(np.isfinite(value), np.abs(value), 0)
        spread = weights @ size_of_value
        moved = (weights * magnitudes["softmax"]) @ size_of_value + row_magnitude[..., None] * spread
        lost = size_of_value.sum(axis=-2, keepdims=True)
        out_specified = ~((weights == 0).astype(dtype) @ (~np.isfinite(value)).astype(dtype) > 0)
    return Reference(
        out,
        lse,
        weights,
        scores,
        magnitudes,
        row_magnitude,
        spread,
        moved,
        lost,
        out_specified,
        lse_specified,
        weights_specified,
    )


def largest_number(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a dtype."""
    return float(ml_dtypes.finfo(dtype).max)


def default_scale(head_dim: int) -> float:
    """1/√E, and 1 where there is nothing to scale."""
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def _to_numpy(array: Any) -> Array:
    """A NumPy array of what may lie on a device."""
    host: Array = np.asarray(array.get() if hasattr(array, "get") else array)
    return host


# ------------------------------------------------------------------------------------------------------------
# The acceptance rule
# ------------------------------------------------------------------------------------------------------------


def assert_attention_close(
    actual: Any,
    case: Case | Mapping[str, Any],
    *,
    backend: str | None = None,
    stage: str | None = None,
) -> None:
    """Raise AssertionError unless `actual` is what attention must return, by the rule at the top of the
    module.

    Parameters
    ----------
    actual : what `cupyflash.attention` returned for the case: the output alone, or the tuple that
        `return_lse` and `return_weights` ask for.  With `stage`: what `cupyflash.attention_weights` returned
        at that stage.
    case : a `Case`, or the keyword arguments of the call
    backend : who computed it; for the message only
    """
    acceptance(case, stage=stage)(actual, backend)


def acceptance(case: Case | Mapping[str, Any], *, stage: str | None = None) -> Callable[[Any, str | None], None]:
    """`assert_attention_close` for many results of one call: what they must be is computed once.

    Returns a function of the result and of who computed it.
    """
    if isinstance(case, Case):
        about = f"{case!r}"
        asked = {"return_lse": case.return_lse, "return_weights": case.return_weights}
        arguments, truth, plain = _reference_of(
            replace(case, return_lse=False, return_weights=False), stage is not None
        )
    else:
        about = _describe(case)
        asked = {name: case.get(name, False) for name in ("return_lse", "return_weights")}
        arguments, truth, plain = _reference(case, stage is not None)
    if stage is not None:
        names, limit_of = [stage], {stage: _weights_limit if stage == "softmax" else _scores_limit}
    else:
        names = [
            "out",
            *(["lse"] if asked["return_lse"] else []),
            *(["weights"] if asked["return_weights"] else []),
        ]
        limit_of = {"out": _out_limit, "lse": _lse_limit, "weights": _weights_limit}
    limits = {name: limit_of[name](truth, plain, name, arguments) for name in names}

    def judge(actual: Any, backend: str | None = None) -> None:
        who = "attention" if stage is None else f"attention_weights(stage={stage!r})"
        who += f" on backend {backend!r}" if backend else ""
        results = actual if len(names) > 1 else (actual,)
        if not isinstance(results, tuple) or len(results) != len(names):
            found = type(actual).__name__
            raise AssertionError(f"{who} must return a tuple ({', '.join(names)}), got {found}\n  {about}")
        for name, result in zip(names, results, strict=True):
            _judge(result, name, limits[name], who, about, _reproducer(case, backend))

    return judge


class _Limit(NamedTuple):
    """What a result must have: its dtype, its values, how far off each may lie, and where anything goes."""

    dtype: np.dtype[Any]
    truth: Array
    bound: Array
    specified: Array


def _reference(arguments: Mapping[str, Any], scores_alone: bool) -> tuple[Mapping[str, Any], Reference, Reference]:
    """The oracle's arguments, its result, and that of the same formula in the precision a backend accumulates in."""
    arguments = {name: x for name, x in arguments.items() if name in _ORACLE_ARGUMENTS}
    if scores_alone:
        key = _to_numpy(arguments["key"])
        arguments = {**arguments, "value": np.zeros((*key.shape[:-1], 0), key.dtype), "dropout_p": 0.0}
    return arguments, oracle(**arguments), oracle(**arguments, dtype=_accumulator(arguments))


# Tests judge several backends, or several stages, by one case after the other.
@functools.lru_cache(maxsize=1)
def _reference_of(case: Case, scores_alone: bool) -> tuple[Mapping[str, Any], Reference, Reference]:
    return _reference(case.arguments(), scores_alone)


def _accumulator(arguments: Mapping[str, Any]) -> np.dtype[Any]:
    return DTYPES["float64" if np.dtype(arguments["query"].dtype) == np.float64 else "float32"]


def _out_limit(truth: Reference, plain: Reference, name: str, arguments: Mapping[str, Any]) -> _Limit:
    dtype = np.dtype(arguments["query"].dtype)
    scaled = _dropout_scale(arguments)
    bound = _bound(dtype, truth.out, plain.out, truth.spread, truth.moved, scaled * truth.lost, scaled)
    if np.shape(arguments["query"])[-1] == 0:
        # All weights are the same. Where values repeat too, every addition rounds in the same direction, by half a unit
        # of a sum that grows; NumPy's pairwise sums, which the bound follows, do not.
        accumulator = DTYPES["float64" if dtype == np.float64 else "float32"]
        bound = bound + ROUNDOFF[accumulator.name] * np.shape(arguments["key"])[-2] / 2 * truth.spread
    return _Limit(dtype, truth.out, bound, truth.out_specified)


def _weights_limit(truth: Reference, plain: Reference, name: str, arguments: Mapping[str, Any]) -> _Limit:
    """A weight is the output for a one-hot V, and has its bound."""
    dtype = np.dtype(arguments["query"].dtype)
    exact, rounded = (truth.weights, plain.weights) if name == "weights" else (truth.scores[name], plain.scores[name])
    with np.errstate(all="ignore"):
        moved = exact * (truth.magnitudes["softmax"] + truth.row_magnitude[..., None])
    scaled = _dropout_scale(arguments) if name == "weights" else 1.0
    bound = _bound(dtype, exact, rounded, exact, moved, np.full_like(exact, scaled), scaled)
    # What does not take part, and what is dropped, is zero and nothing else.
    return _Limit(dtype, exact, np.where(exact == 0, 0, bound), truth.weights_specified)


def _dropout_scale(arguments: Mapping[str, Any]) -> float:
    """By what kept weights are multiplied: what underflows or is rounded to 0 is so before that."""
    dropout_p = float(arguments.get("dropout_p", 0.0))
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _bound(
    dtype: np.dtype[Any], truth: Array, plain: Array, spread: Array, moved: Array, lost: Array, scaled: float
) -> Array:
    accumulator = DTYPES["float64" if dtype == np.float64 else "float32"]
    u, u_acc = ROUNDOFF[dtype.name], ROUNDOFF[accumulator.name]
    with np.errstate(all="ignore"):
        unit = u_acc * (8 * spread + moved)
        underflow = np.finfo(accumulator).tiny * lost
        bound = (2 * _largest(np.abs(plain - truth) - underflow, unit) + 1) * unit + underflow
        if dtype.itemsize == 2:
            bound = 3 * u * spread + 3 * u_acc * moved + 1e-6 * max(1, scaled)
    return bound


def _largest(error: Array, unit: Array) -> float:
    """The largest error in units, over the places where both are finite."""
    ratio = error / unit
    return float(ratio.max(where=np.isfinite(ratio), initial=0))


def _lse_limit(truth: Reference, plain: Reference, name: str, arguments: Mapping[str, Any]) -> _Limit:
    accumulator = _accumulator(arguments)
    with np.errstate(all="ignore"):
        relative = 2.0**-20 * (truth.row_magnitude + np.nan_to_num(np.abs(truth.lse), posinf=0))
    bound = (1e-5 + relative) * (ROUNDOFF[accumulator.name] / ROUNDOFF["float32"])
    return _Limit(accumulator, truth.lse, bound, truth.lse_specified)


def _scores_limit(truth: Reference, plain: Reference, name: str, arguments: Mapping[str, Any]) -> _Limit:
    """A score may be off by a few roundings of the largest term met on the way to it."""
    accumulator = _accumulator(arguments)
    exact = truth.scores[name]
    with np.errstate(all="ignore"):
        unit = ROUNDOFF[accumulator.name] * 4 * np.maximum(truth.magnitudes[name], np.abs(exact))
        unit = unit + np.finfo(accumulator).tiny
        bound = (2 * _largest(np.abs(plain.scores[name] - exact), unit) + 1) * unit
    return _Limit(accumulator, exact, bound, np.ones(exact.shape, bool))


def _judge(actual: Any, name: str, limit: _Limit, who: str, about: str, reproducer: str) -> None:
    actual = _to_numpy(actual)
    for what, got, expected in (
        ("shape", actual.shape, limit.truth.shape),
        ("dtype", actual.dtype, limit.dtype),
    ):
        if got != expected:
            raise AssertionError(f"{who}: {name} has {what} {got}, expected {expected}\n  {about}\n  {reproducer}")

    wide = actual.astype(limit.truth.dtype)
    with np.errstate(all="ignore"):
        error = np.abs(wide - limit.truth)
        close = np.isfinite(limit.truth) & (error <= limit.bound)
        close |= (wide == limit.truth) | (np.isnan(wide) & np.isnan(limit.truth))
        # Beyond the largest finite number of its dtype a value may be rounded to infinity.
        reach = np.abs(limit.truth) + limit.bound
        overflows = np.isfinite(limit.truth) & (reach >= largest_number(limit.dtype))
        close |= overflows & np.isinf(wide) & (np.sign(wide) == np.sign(limit.truth))
    wrong = ~close & limit.specified
    if not wrong.any():
        return

    with np.errstate(all="ignore"):
        excess = np.where(wrong, np.nan_to_num(error / limit.bound, nan=np.inf), -1)
    worst = tuple(int(x) for x in np.unravel_index(np.argmax(excess), excess.shape))
    raise AssertionError(
        f"{who}: {name} is wrong at {_coordinates(worst, limit.truth.shape, name)}\n"
        f"  got {actual[worst]!s}, expected {limit.truth[worst]!s}: "
        f"off by {float(error[worst]):.3g}, the bound is {float(limit.bound[worst]):.3g} "
        f"({np.count_nonzero(wrong)} of {wrong.size} elements are wrong)\n"
        f"  {about}\n"
        f"  {reproducer}"
    )


def _coordinates(index: tuple[int, ...], shape: tuple[int, ...], name: str) -> str:
    """`(b, h, q, d) = (…)`, with the batch flattened; lse has no last one, and scores count keys there."""
    tail = {"out": ("q", "d"), "lse": ("q",)}.get(name, ("q", "k"))
    lead, lead_shape = index[: -len(tail)], shape[: -len(tail)]
    b = int(np.ravel_multi_index(lead[:-1], lead_shape[:-1])) if lead[:-1] else 0
    named = {"b": b, "h": lead[-1] if lead else 0, **dict(zip(tail, index[-len(tail) :], strict=True))}
    return f"({', '.join(named)}) = ({', '.join(map(str, named.values()))})"


def _describe(arguments: Mapping[str, Any]) -> str:
    def show(x: Any) -> str:
        if isinstance(x, tuple):
            return f"({', '.join(map(show, x))})"
        return f"{x.dtype.name}{list(x.shape)}" if hasattr(x, "shape") else repr(x)

    return f"attention({', '.join(f'{name}={show(x)}' for name, x in arguments.items() if x is not None)})"


def _reproducer(case: Case | Mapping[str, Any], backend: str | None) -> str:
    if not isinstance(case, Case):
        return "reproduce: call attention with the arguments given to assert_attention_close"
    return f"reproduce: from cupyflash.testing import *; {case!r}.check({backend!r})"


# ------------------------------------------------------------------------------------------------------------
# Layouts: the same values (or, where memory is shared between elements, other ones) behind other strides
# ------------------------------------------------------------------------------------------------------------


def _swapped_heads(x: Array) -> Array:
    """The (B, L, H, E) layout, seen as (B, H, L, E)."""
    return x.swapaxes(-2, -3).copy().swapaxes(-2, -3) if x.ndim >= 3 else x


def _transposed(x: Array) -> Array:
    """The last two axes are stored in the other order: the stride of the last one is not the item size."""
    return x.swapaxes(-1, -2).copy().swapaxes(-1, -2) if x.ndim >= 2 else x


def _strided(x: Array) -> Array:
    """Every second element of every axis."""
    buffer = np.zeros([2 * n for n in x.shape], x.dtype)
    every_second: tuple[Any, ...] = (..., *(slice(None, None, 2),) * x.ndim)
    view = buffer[every_second]
    view[...] = x
    return view


def _reversed(x: Array) -> Array:
    """Every stride is negative."""
    backwards: tuple[Any, ...] = (..., *(slice(None, None, -1),) * x.ndim)
    return x[backwards].copy()[backwards]


def _repeated_rows(x: Array) -> Array:
    """Stride zero along the last axis but one: all rows are the first."""
    return np.broadcast_to(x[..., :1, :], x.shape) if x.ndim >= 2 else x


def _repeated_columns(x: Array) -> Array:
    """Stride zero along the last axis."""
    return np.broadcast_to(x[..., :1], x.shape) if x.ndim >= 1 else x


def _overlapping(x: Array) -> Array:
    """Each index along each axis moves one element on: windows that overlap."""
    flat = np.ascontiguousarray(x).reshape(-1)
    return np.lib.stride_tricks.as_strided(flat, x.shape, (x.itemsize,) * x.ndim) if x.size else x


def _unaligned(x: Array) -> Array:
    """The data begin one byte past an aligned address."""
    view = np.ndarray(x.shape, x.dtype, buffer=bytearray(x.nbytes + 1), offset=1)
    view[...] = x
    return view


def _read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda x: x.copy(order="C"),
    "fortran": lambda x: x.copy(order="F"),
    "swapped_heads": _swapped_heads,
    "transposed": _transposed,
    "strided": _strided,
    "reversed": _reversed,
    "repeated_rows": _repeated_rows,
    "repeated_columns": _repeated_columns,
    "overlapping": _overlapping,
    "unaligned": _unaligned,
    "read_only": _read_only,
}


# ------------------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------------------

_TABLE = np.linspace(-2, 2, 16, dtype=np.float32)
_DOCUMENT = np.arange(1 << 14) // 5

SCORE_MODS: dict[str, Callable[..., Any]] = {
    "distance": lambda score, b, h, q_idx, kv_idx: score - 0.05 * abs(q_idx - kv_idx),
    "per_head": lambda score, b, h, q_idx, kv_idx: score * (1 + 0.5 * h) + 0.25 * b,
    "look_up": lambda score, b, h, q_idx, kv_idx: score + _TABLE[(q_idx + 3 * kv_idx + h) % 16],
    "remove_far": lambda score, b, h, q_idx, kv_idx: np.where(abs(q_idx - kv_idx) > 3, -np.inf, score),
    "constant": lambda score, b, h, q_idx, kv_idx: np.float32(1.5),
}
MASK_MODS: dict[str, Callable[..., Any]] = {
    "document": lambda b, h, q_idx, kv_idx: _DOCUMENT[q_idx] == _DOCUMENT[kv_idx],
    "checkers": lambda b, h, q_idx, kv_idx: (q_idx + kv_idx + h + b) % 2 == 0,
    "prefix": lambda b, h, q_idx, kv_idx: (kv_idx < 4) | (kv_idx <= q_idx),
    "nothing": lambda b, h, q_idx, kv_idx: kv_idx < 0,
    "first_keys": lambda b, h, q_idx, kv_idx: kv_idx <= 5 + b,
}


class MaskSpec(NamedTuple):
    """One mask: its dtype, shape, layout (a key of `LAYOUTS`) and values.

    Values of a bool mask: "random", "padding" (the last third is False), "left_padding", "dead_rows" (every
    third row is False), "all", "none".  Of a float mask: "finite", "random" (a third is −inf), "large",
    "minimum" (a third, and every third row, is the lowest number of the dtype), "dead_rows" (every third row
    is −inf).
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    values: str = "random"

    def build(self, rng: np.random.Generator) -> Array:
        # One index array per axis; a mask without rows has row 0 alone.
        indices = [np.zeros((), int)] * (2 - min(2, len(self.shape))) + list(np.indices(self.shape))
        row, column = indices[-2:]
        seqlen_k = self.shape[-1] if self.shape else 1
        chosen = rng.random(self.shape) < 1 / 3
        third_row = row % 3 == 1
        normal = rng.standard_normal(self.shape)
        if self.dtype == "bool":
            dtype = np.dtype(bool)
            values = {
                "random": ~chosen,
                "padding": column < max(1, 2 * seqlen_k // 3),
                "left_padding": column >= seqlen_k // 3,
                "dead_rows": ~chosen & ~third_row,
                "all": True,
                "none": False,
            }
        else:
            dtype = DTYPES[self.dtype]
            values = {
                "finite": normal,
                "random": np.where(chosen, -np.inf, normal),
                "large": 60 * normal,
                "minimum": np.where(chosen | third_row, -largest_number(dtype), normal),
                "dead_rows": np.where(third_row, -np.inf, normal),
            }
        return LAYOUTS[self.layout](np.broadcast_to(values[self.values], self.shape).astype(dtype))


class SinkSpec(NamedTuple):
    """Sinks: normal numbers around `offset`; where `holes` is set, −inf for every second head."""

    dtype: str = "float32"
    offset: float = 0.0
    holes: bool = False

    def build(self, num_heads: int, rng: np.random.Generator) -> Array:
        values = self.offset + rng.standard_normal(num_heads)
        if self.holes:
            values[1::2] = -np.inf
        return values.astype(DTYPES[self.dtype])


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """One call of attention: a value made of plain numbers and names, from which the arrays follow.

    Attributes
    ----------
    query_shape, key_shape, value_shape, dtype : of the operands
    layouts : for query, key and value, a key of `LAYOUTS`
    values : "normal" (standard normal numbers), or, so that the largest score moves as the keys go by,
        "rising" (from 0 to 90), "falling", or "jumping" (another level, between −200 and 200, in each
        stretch of 100 keys)
    magnitude : what query, key and value are multiplied by
    masks : the specs of `attn_mask`; two make a tuple
    alibi_shape : of `alibi_slopes`; alibi_factor : the largest slope
    score_mod, mask_mod : keys of `SCORE_MODS` and `MASK_MODS`
    data_seed : seeds the values of all arrays
    Every other attribute is the argument of `cupyflash.attention` of that name.
    """

    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    dtype: str = "float32"
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    values: str = "normal"
    magnitude: float = 1.0
    masks: tuple[MaskSpec, ...] = ()
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    window: tuple[int | None, int | None] | None = None
    align: str | int = "top_left"
    softcap: float | None = 0.0
    alibi_shape: tuple[int, ...] | None = None
    alibi_factor: float = 0.5
    sinks: SinkSpec | None = None
    score_mod: str | None = None
    mask_mod: str | None = None
    seed: int | None = None
    return_lse: bool = True
    return_weights: bool = False
    data_seed: int = 0

    def __repr__(self) -> str:
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The one line that hypothesis and IPython print."""
        printer.text(repr(self))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The leading dims of the output."""
        if not self.enable_gqa:
            return np.broadcast_shapes(self.query_shape[:-2], self.key_shape[:-2], self.value_shape[:-2])
        lead = np.broadcast_shapes(self.query_shape[:-3], self.key_shape[:-3], self.value_shape[:-3])
        return (*lead, self.query_shape[-3])

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `cupyflash.attention`, with fresh arrays of always the same values."""
        rng = np.random.default_rng(self.data_seed)
        query, key, value = (
            LAYOUTS[layout](x.astype(DTYPES[self.dtype]))
            for layout, x in zip(self.layouts, self._operands(rng), strict=True)
        )
        masks = tuple(spec.build(rng) for spec in self.masks)
        slopes = None
        if self.alibi_shape is not None:
            slopes = (self.alibi_factor * rng.random(self.alibi_shape)).astype(np.float32)
        return {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": masks if len(masks) > 1 else masks[0] if masks else None,
            "dropout_p": self.dropout_p,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
            "window": self.window,
            "align": self.align,
            "softcap": self.softcap,
            "alibi_slopes": slopes,
            "sinks": None if self.sinks is None else self.sinks.build(self.batch_shape[-1], rng),
            "score_mod": None if self.score_mod is None else SCORE_MODS[self.score_mod],
            "mask_mod": None if self.mask_mod is None else MASK_MODS[self.mask_mod],
            "seed": self.seed,
            "return_lse": self.return_lse,
            "return_weights": self.return_weights,
        }

    def score_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `cupyflash.attention_weights`, but for the stage."""
        others = ("value", "dropout_p", "seed", "return_lse", "return_weights")
        return {name: x for name, x in self.arguments().items() if name not in others}

    def check(self, backend: str | None = None) -> None:
        """Run the case and assert that the result is right."""
        assert_attention_close(cupyflash.attention(**self.arguments(), backend=backend), self, backend=backend)

    def _operands(self, rng: np.random.Generator) -> list[Array]:
        shapes = (self.query_shape, self.key_shape, self.value_shape)
        query, key, value = (self.magnitude * rng.standard_normal(shape) for shape in shapes)
        if self.values != "normal":
            # Element 0 of every query is 1 and that of key j is the level that its score is to have.
            seqlen_k = self.key_shape[-2]
            rising = np.linspace(0, 90, seqlen_k)
            levels = {
                "rising": rising,
                "falling": rising[::-1],
                "jumping": rng.integers(-200, 200, seqlen_k // 100 + 1).repeat(100)[:seqlen_k],
            }[self.values]
            scale = default_scale(self.query_shape[-1]) if self.scale is None else self.scale
            query[..., 0] = 1
            key[..., 0] = levels / scale
        return [query, key, value]


_ORACLE_ARGUMENTS = (
    *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    *("window", "align", "softcap", "alibi_slopes", "sinks", "score_mod", "mask_mod", "seed"),
)


# ------------------------------------------------------------------------------------------------------------
# Random cases
# ------------------------------------------------------------------------------------------------------------


class _Chooser:
    """Draws from a NumPy generator or from hypothesis, which shrinks what it drew."""

    def __init__(self, source: np.random.Generator | Callable[[Any], Any]) -> None:
        self._source = source

    def integer(self, low: int, high: int) -> int:
        """low ≤ result ≤ high"""
        if isinstance(self._source, np.random.Generator):
            return int(self._source.integers(low, high, endpoint=True))
        from hypothesis import strategies

        return int(self._source(strategies.integers(low, high)))

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options: the first is the simplest."""
        return options[self.integer(0, len(options) - 1)]

    def rarely(self, value: Any, otherwise: Any) -> Any:
        """`value()` one time in four, else `otherwise`."""
        return value() if self.integer(0, 3) == 3 else otherwise


def random_case(source: np.random.Generator | Callable[[Any], Any], *, large: bool = False, **given: Any) -> Case:
    """A case with all arguments at once.

    Parameters
    ----------
    source : a NumPy generator, or the `draw` function of hypothesis (`st.composite`, or `data.draw`)
    large : few heads, but so many queries and keys that backends take them in several tiles
    given : attributes that are not to be drawn
    """
    choose = _Chooser(source)
    dtype = given.get("dtype", choose.pick(("float32", "float16", "bfloat16", "float64")))

    # Every operand has its own part of the batch: dims of 1, and missing ones.
    batch = tuple(choose.integer(1, 3) for _ in range(choose.integer(0, 3)))
    seqlen_q, seqlen_k = (choose.pick((choose.integer(0, 12), choose.integer(13, 70))) for _ in range(2))
    head_dim, head_dim_v = (choose.pick((choose.integer(0, 8), choose.integer(9, 40))) for _ in range(2))
    heads = choose.pick((4, 6, 12))
    if large:
        batch, heads = (choose.integer(1, 2),), 2
        seqlen_q, seqlen_k = choose.integer(1, 400), choose.integer(500, 1300)

    def own_part(dims: tuple[int, ...]) -> tuple[int, ...]:
        kept = tuple(choose.rarely(lambda: 1, n) for n in dims)
        return kept[choose.rarely(lambda: choose.integer(0, len(dims)), 0) :]

    enable_gqa = given.get("enable_gqa", choose.rarely(lambda: True, False))
    if enable_gqa:
        heads_k, heads_v = (choose.pick([n for n in range(1, heads + 1) if heads % n == 0]) for _ in range(2))
        leads = [(*own_part(batch[:-1]), n) for n in (heads, heads_k, heads_v)]
        scores_lead = (*np.broadcast_shapes(leads[0][:-1], leads[1][:-1]), heads)
    else:
        leads = [own_part(batch) for _ in range(3)]
        scores_lead = np.broadcast_shapes(*leads[:2])

    def mask(dtypes: Sequence[str]) -> MaskSpec:
        kind = choose.pick(dtypes)
        values: tuple[str, ...] = ("random", "finite", "minimum", "dead_rows", "large")
        if kind == "bool":
            values = ("random", "padding", "left_padding", "dead_rows", "all", "none")
        return MaskSpec(
            kind,
            own_part((*scores_lead, seqlen_q, seqlen_k)),
            choose.pick(tuple(LAYOUTS)),
            choose.pick(values),
        )

    floats = ("float32", dtype) if dtype != "float64" else ("float64", "float32")
    masks = tuple(mask(dtypes) for dtypes in choose.pick(((), (("bool",),), (floats,), (floats, ("bool",)))))

    def side() -> int | None:
        drawn_side: int | None = choose.rarely(lambda: choose.pick((None, -1)), choose.integer(0, 20))
        return drawn_side

    drawn: dict[str, Any] = {
        "query_shape": (*leads[0], seqlen_q, head_dim),
        "key_shape": (*leads[1], seqlen_k, head_dim),
        "value_shape": (*leads[2], seqlen_k, head_dim_v),
        "dtype": dtype,
        "layouts": tuple(choose.rarely(lambda: choose.pick(tuple(LAYOUTS)), "contiguous") for _ in range(3)),
        "magnitude": choose.pick((1.0, 0.01, 4.0)),
        "masks": masks,
        "is_causal": choose.rarely(lambda: True, False),
        "scale": choose.rarely(lambda: choose.pick((0, 1, -0.5, 0.25)), None),
        "enable_gqa": enable_gqa,
        "window": choose.rarely(lambda: (side(), side()), None),
        "align": choose.pick(("top_left", "bottom_right", choose.integer(-20, 20))),
        "softcap": choose.rarely(lambda: choose.pick((5.0, 0.5, 30, None)), 0.0),
        "score_mod": choose.rarely(lambda: choose.pick(tuple(SCORE_MODS)), None),
        "mask_mod": choose.rarely(lambda: choose.pick(tuple(MASK_MODS)), None),
        "return_weights": choose.rarely(lambda: True, False),
        "data_seed": choose.integer(0, 9),
    }
    if choose.rarely(lambda: True, False):
        drawn |= {"dropout_p": choose.pick((0.5, 0.1, 0.9, 1)), "seed": choose.pick((0, 1, 2**64 - 1, 2**32))}
    case = Case(**{**drawn, **given})

    # ALiBi and sinks have one number for each head of the output.
    lead = case.batch_shape
    extra: dict[str, Any] = {}
    if lead and "alibi_shape" not in given:
        shapes = ((lead[-1],), (math.prod(lead[:-1]), lead[-1]))
        extra["alibi_shape"] = choose.rarely(lambda: choose.pick(shapes), None)
        extra["alibi_factor"] = choose.pick((0.5, -0.5))
    if lead and "sinks" not in given:
        holes = choose.pick((False, True))
        extra["sinks"] = choose.rarely(lambda: SinkSpec(choose.pick(floats), choose.pick((0.0, 20.0)), holes), None)
    return replace(case, **extra)
