"""The `math` backend: attention as its formula reads, with the whole L×S score matrix in memory.

This is the specification.  Every other backend is compared with it, so each line is one step of

    S = score_mod(scale · Q Kᵀ),  softcap,  + bias + ALiBi,  −inf where removed
    P = softmax(S), with the sinks in its denominator             (Vaswani et al. 2017, eq. 1)
    O = dropout(P) V,    lse = log Σ exp S

It computes in the accumulation dtype, on NumPy and CuPy arrays alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..environment import debug_level, say
from ..interrupts import without_float_warnings
from ..problem.mods import Coordinates, add_alibi, apply_mask_mod, apply_score_mod, cap_scores
from ..problem.parts import Parts
from ..problem.philox import keep_tile
from ..problem.problem import Buffers, Problem
from .joining import join_arrays

__all__ = ["MathBackend"]


class MathBackend:
    """Materialises the scores; runs everything but reduced-precision float32."""

    def reasons(self, problem: Problem) -> list[str]:
        """See `cupyflash.backends.registry.Backend`."""
        return [] if problem.precision == "ieee" else [f"it has no precision {problem.precision!r}, only 'ieee'"]

    def run(self, problem: Problem, buffers: Buffers) -> None:
        """See `cupyflash.backends.registry.Backend`."""
        if level := debug_level():
            say(_description(problem, level))
        without_float_warnings(_run, problem, buffers)

    def merge_reasons(self, parts: Parts) -> list[str]:
        """See `cupyflash.backends.registry.Merger`."""
        return []

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        """See `cupyflash.backends.registry.Merger`."""
        return join_arrays(parts)


def _description(problem: Problem, level: int) -> Iterator[str]:
    """What CUPYFLASH_DEBUG prints of a call."""
    shape = (*problem.batch_shape, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k)
    dtype = problem.element.accumulator
    yield f"math: scores {shape} of {dtype.name}, {math.prod(shape) * dtype.itemsize / 2**20:.1f} MiB"
    if level >= 2:
        yield from (f"  {line.strip()}" for line in str(problem).splitlines())


def _run(problem: Problem, buffers: Buffers) -> None:
    if problem.weights_stage in (None, "softmax", "dropout"):
        _attend(problem, buffers)
    else:
        buffers.weights[...] = _scores(problem, buffers, problem.weights_stage)


def _attend(problem: Problem, buffers: Buffers) -> None:
    xp, (probabilities, lse) = problem.namespace, _softmax(problem, buffers)
    if buffers.lse is not None:
        buffers.lse[...] = lse
    if problem.weights_stage == "softmax":
        buffers.weights[...] = probabilities
    if problem.dropout_p:
        kept = keep_tile(
            buffers.seed,
            problem.dropout_p,
            xp.arange(problem.batch_size * problem.num_heads_q),
            (0, problem.seqlen_q),
            (0, problem.seqlen_k),
            xp,
        ).reshape(probabilities.shape)
        keep_scale = 0.0 if problem.dropout_p == 1 else 1 / (1 - problem.dropout_p)
        probabilities = xp.where(kept, probabilities * keep_scale, 0)
    if problem.weights_stage == "dropout":
        buffers.weights[...] = probabilities
    buffers.out[...] = probabilities @ _accumulated(buffers.value, problem)


def _softmax(problem: Problem, buffers: Buffers) -> tuple[Any, Any]:
    """softmax over the keys, and its natural log-sum-exp.  A row without keys has weights 0 and lse −inf."""
    xp, scores = problem.namespace, _scores(problem, buffers, "biased")
    row_max = xp.full((*scores.shape[:-1], 1), -math.inf, scores.dtype)
    if problem.seqlen_k:
        row_max = scores.max(axis=-1, keepdims=True)
    sinks = None
    if buffers.sinks is not None:
        sinks = buffers.sinks.astype(scores.dtype)[:, None, None]
        row_max = xp.maximum(row_max, sinks)
    shift = xp.where(xp.isneginf(row_max), 0, row_max)
    weights = xp.exp(scores - shift)
    row_sum = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        row_sum = row_sum + xp.exp(sinks - shift)
    lse = (shift + xp.log(row_sum))[..., 0]
    return weights / xp.where(row_sum == 0, 1, row_sum), lse


def _scores(problem: Problem, buffers: Buffers, stage: str) -> Any:
    """The scores (*batch, Hq, L, S) after the given stage; removed ones are −inf at "biased"."""
    xp = problem.namespace
    query, key = _accumulated(buffers.query, problem), _accumulated(buffers.key, problem)
    scores = query @ key.swapaxes(-1, -2) * problem.scale
    if stage == "raw":
        return scores

    at = _coordinates(problem)
    if buffers.score_mod is not None:
        apply_score_mod(buffers.score_mod, scores, at, xp)
    if stage == "modded":
        return scores
    if problem.softcap:
        cap_scores(scores, problem.softcap, xp)
    if stage == "capped":
        return scores

    keep = problem.band.materialize(at.q_idx, at.kv_idx)
    removed = xp.isneginf(scores) | ~keep
    if buffers.float_mask is not None:
        bias = buffers.float_mask.astype(scores.dtype, copy=False)
        scores += bias
        removed |= xp.isneginf(bias)
    if buffers.alibi_slopes is not None:
        slopes = buffers.alibi_slopes
        batch = problem.batch_shape if slopes.shape[0] == problem.batch_size else (1,) * len(problem.batch_shape)
        slopes = slopes.reshape(*batch, problem.num_heads_q, 1, 1)
        add_alibi(scores, slopes, at.q_idx, at.kv_idx, problem.shift, problem.last_position, xp)
    if buffers.bool_mask is not None:
        removed |= ~buffers.bool_mask
    if buffers.mask_mod is not None:
        removed |= ~apply_mask_mod(buffers.mask_mod, at, scores.shape, xp)
    scores[removed] = -math.inf
    return scores


def _coordinates(problem: Problem) -> Coordinates:
    xp = problem.namespace
    return Coordinates(
        b=xp.arange(problem.batch_size).reshape(*problem.batch_shape, 1, 1, 1),
        h=xp.arange(problem.num_heads_q)[:, None, None],
        q_idx=xp.arange(problem.seqlen_q)[:, None],
        kv_idx=xp.arange(problem.seqlen_k),
    )


def _accumulated(operand: Any, problem: Problem) -> Any:
    """The operand in the accumulation dtype, with its heads repeated to the query's."""
    xp, num_heads = problem.namespace, operand.shape[-3]
    operand = operand.astype(problem.element.accumulator, copy=False)
    if num_heads == problem.num_heads_q:
        return operand
    return xp.repeat(operand, problem.num_heads_q // num_heads, axis=-3)
