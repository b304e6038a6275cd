"""From the definition of attention to FlashAttention, one small function per step, each equal to the next.

    function                   passes over a row's scores  extra memory  what is new
    original_attention         –                           L·S           the definition
    safe_softmax_attention     3: max, sum, weights        L·S           no overflow
    online_softmax_attention   2: max and sum, weights     L·S           a growing max rescales the sum
    multi_pass_attention       2: max and sum, output      S             no matrix of weights
    flash_attention_rows       1: max, sum and output      Ev            and the output, too
    flash_attention_tiles      1, tile by tile             a few tiles   matrix products, division at the end

All take one head: query (L, E), key (S, E) and value (S, Ev), float32 or float64, S ≥ 1, and return the
output (L, Ev); the last returns the log-sum-exp of each row, too.  They are written to be read: their loops
over rows, keys and tiles are those of the algorithms, and slow in Python.  `cupyflash.attention` is for work.

In the formulas i is a query, j a key, q_i, k_j, v_j are rows, x_ij = scale · q_i · k_j is a score.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "flash_attention_rows",
    "flash_attention_tiles",
    "multi_pass_attention",
    "online_softmax_attention",
    "original_attention",
    "safe_softmax_attention",
]

Array = npt.NDArray[Any]


def original_attention(query: Array, key: Array, value: Array, scale: float | None = None) -> Array:
    """Attention as the Transformer paper defines it, with all scores and all weights at once::

        X = scale · Q Kᵀ                            (L, S)
        P_ij = exp(x_ij) / Σ_n exp(x_in)            (L, S)
        O = P V                                     (L, Ev)

    Computes: two matrix products and a softmax.  Memory: two matrices of L·S numbers.

    exp overflows from a score of about 89 in float32 and 710 in float64 on: such a row becomes ∞/∞ = NaN.  It
    underflows too, and a row with no score above about −104 (−746) becomes 0/0 = NaN.

    Reference: Vaswani et al., "Attention is all you need" (2017), equation 1; scale defaults to their 1/√E.

    >>> query, key, value = np.eye(2), np.eye(3, 2), np.array([[1.0], [2.0], [4.0]])
    >>> original_attention(query, key, value, scale=1.0).round(3)
    array([[1.848],
           [2.212]])
    """
    scale = _check(query, key, value, scale)
    scores = scale * (query @ key.T)
    weights = np.exp(scores)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ value


def safe_softmax_attention(query: Array, key: Array, value: Array, scale: float | None = None) -> Array:
    """The same quotients, extended by exp(−m), so that no exponent is positive.  Three passes over each row::

        1.  m_j = max(m_(j−1), x_ij)                  m_(−1) = −∞,  m = m_(S−1) is the row's max
        2.  l_j = l_(j−1) + exp(x_ij − m)             l_(−1) = 0,   l = l_(S−1) is the row's sum, 1 ≤ l ≤ S
        3.  P_ij = exp(x_ij − m) / l

        O = P V

    Computes: two exponentials per score.  Memory: the weights, L·S, and one row of scores; each pass reads
    that row again.  No finite score overflows; what underflows is negligible beside the max's own weight.

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), algorithm 2.

    >>> query, key, value = np.eye(2), np.eye(3, 2), np.array([[1.0], [2.0], [4.0]])
    >>> safe_softmax_attention(query, key, value, scale=1.0).round(3)
    array([[1.848],
           [2.212]])
    >>> safe_softmax_attention(query, key, value, scale=1e6)
    array([[1.],
           [2.]])
    """
    scale = _check(query, key, value, scale)
    weights = np.empty((len(query), len(key)), query.dtype)
    for i in range(len(query)):
        scores = scale * (key @ query[i])
        row_max = -np.inf
        for score in scores:
            row_max = max(row_max, score)
        row_sum = 0.0
        for score in scores:
            row_sum = row_sum + np.exp(score - row_max)
        for j, score in enumerate(scores):
            weights[i, j] = np.exp(score - row_max) / row_sum
    return weights @ value


def online_softmax_attention(query: Array, key: Array, value: Array, scale: float | None = None) -> Array:
    """Max and sum in one pass: when the max grows, the sum so far is brought to the new max.  Two passes::

        1.  m_j = max(m_(j−1), x_ij)
            l_j = l_(j−1) · exp(m_(j−1) − m_j) + exp(x_ij − m_j)
        2.  P_ij = exp(x_ij − m) / l

        O = P V

    By induction l_j = Σ_(n≤j) exp(x_in − m_j): the factor exp(m_(j−1) − m_j) replaces the old max in each
    term.

    Computes: one more exponential per score, one pass less.  Memory: the weights, L·S, and one row of scores.

    Reference: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), algorithm 3.

    >>> query, key, value = np.eye(2), np.eye(3, 2), np.array([[1.0], [2.0], [4.0]])
    >>> online_softmax_attention(query, key, value, scale=1.0).round(3)
    array([[1.848],
           [2.212]])
    """
    scale = _check(query, key, value, scale)
    weights = np.empty((len(query), len(key)), query.dtype)
    for i in range(len(query)):
        scores = scale * (key @ query[i])
        row_max, row_sum = _max_and_sum(scores)
        for j, score in enumerate(scores):
            weights[i, j] = np.exp(score - row_max) / row_sum
    return weights @ value


def multi_pass_attention(query: Array, key: Array, value: Array, scale: float | None = None) -> Array:
    """The weights are not kept: each is added into the output as soon as it is known.  Two passes::

        1.  m_j = max(m_(j−1), x_ij)
            l_j = l_(j−1) · exp(m_(j−1) − m_j) + exp(x_ij − m_j)
        2.  o_j = o_(j−1) + exp(x_ij − m) / l · v_j               o_(−1) = 0,  O_i = o_(S−1)

    Computes: as before.  Memory: one row of scores, S; with the scores computed again in pass 2, nothing.  So
    attention needs no L·S memory.

    References: Rabe and Staats, "Self-attention does not need O(n²) memory" (2021); Ye, "From Online Softmax
    to FlashAttention" (2023), "multi-pass self-attention".

    >>> query, key, value = np.eye(2), np.eye(3, 2), np.array([[1.0], [2.0], [4.0]])
    >>> multi_pass_attention(query, key, value, scale=1.0).round(3)
    array([[1.848],
           [2.212]])
    """
    scale = _check(query, key, value, scale)
    out = np.zeros((len(query), value.shape[1]), query.dtype)
    for i in range(len(query)):
        scores = scale * (key @ query[i])
        row_max, row_sum = _max_and_sum(scores)
        for j, score in enumerate(scores):
            out[i] += np.exp(score - row_max) / row_sum * value[j]
    return out


def flash_attention_rows(query: Array, key: Array, value: Array, scale: float | None = None) -> Array:
    """The output is rescaled as the sum was, whenever max or sum change, so that one pass is enough::

        m_j = max(m_(j−1), x_ij)
        l_j = l_(j−1) · exp(m_(j−1) − m_j) + exp(x_ij − m_j)
        o_j = o_(j−1) · (l_(j−1) · exp(m_(j−1) − m_j) / l_j) + exp(x_ij − m_j) / l_j · v_j

    By induction o_j = Σ_(n≤j) exp(x_in − m_j) / l_j · v_n: after each key it is the attention to the keys so
    far.

    Computes: Ev more products per score.  Memory: per row one output, one max and one sum; no score is needed
    twice.

    References: Dao, Fu, Ermon, Rudra and Ré, "FlashAttention: fast and memory-efficient exact attention with
    IO-awareness" (2022), section 3.1; Ye, "From Online Softmax to FlashAttention" (2023).

    >>> query, key, value = np.eye(2), np.eye(3, 2), np.array([[1.0], [2.0], [4.0]])
    >>> flash_attention_rows(query, key, value, scale=1.0).round(3)
    array([[1.848],
           [2.212]])
    """
    scale = _check(query, key, value, scale)
    out = np.zeros((len(query), value.shape[1]), query.dtype)
    for i in range(len(query)):
        row_max, row_sum = -np.inf, 0.0
        for j in range(len(key)):
            score = scale * (query[i] @ key[j])
            new_max = max(row_max, score)
            weight = np.exp(score - new_max)
            old_sum = row_sum * np.exp(row_max - new_max)
            row_sum = old_sum + weight
            out[i] = out[i] * (old_sum / row_sum) + weight / row_sum * value[j]
            row_max = new_max
    return out


def flash_attention_tiles(
    query: Array,
    key: Array,
    value: Array,
    scale: float | None = None,
    *,
    block_m: int = 64,
    block_n: int = 64,
) -> tuple[Array, Array]:
    """FlashAttention-2: a tile of rows meets a tile of keys at a time, and the division waits for the end.

    For each tile of block_m queries, with m, l per row, over the tiles j of block_n keys::

        X_j = scale · Q K_jᵀ                                   (block_m, block_n)
        m_j = max(m_(j−1), rowmax(X_j))                        m_(−1) = −∞
        P_j = exp(X_j − m_j)
        l_j = exp(m_(j−1) − m_j) · l_(j−1) + rowsum(P_j)       l_(−1) = 0
        O_j = exp(m_(j−1) − m_j) · O_(j−1) + P_j V_j           O_(−1) = 0

    and after the last tile::

        O = O_j / l_j,    lse = m_j + log(l_j)

    O_j is `flash_attention_rows`'s output times l_j, which spares a division per tile.  The sums Q K_jᵀ and
    P_j V_j are matrix products, for which the machine has its fastest units.  lse = log Σ_j exp(x_ij) is all
    that the backward pass, or a merge with other keys, must know of a row.

    Computes: 2·L·S·(E + Ev) operations in matrix products, L·S exponentials, L·S/block_n rescalings.  Memory:
    one tile of scores and one of the output, whatever L and S.  The last tiles may be smaller.

    Reference: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning" (2023),
    algorithm 1.

    Returns the output (L, Ev) and the natural log-sum-exp (L,).

    >>> query, key, value = np.eye(2), np.eye(3, 2), np.array([[1.0], [2.0], [4.0]])
    >>> out, lse = flash_attention_tiles(query, key, value, scale=1.0, block_m=1, block_n=2)
    >>> out.round(3)
    array([[1.848],
           [2.212]])
    >>> np.exp(lse).round(3)  # e¹ + e⁰ + e⁰
    array([4.718, 4.718])
    """
    scale = _check(query, key, value, scale)
    for name, length in (("block_m", block_m), ("block_n", block_n)):
        if length < 1:
            raise ValueError(f"{name} must be at least 1, but was {length}")
    out = np.empty((len(query), value.shape[1]), query.dtype)
    lse = np.empty(len(query), query.dtype)
    for row in range(0, len(query), block_m):
        query_tile = query[row : row + block_m]
        row_max = np.full(len(query_tile), -np.inf, query.dtype)
        row_sum = np.zeros_like(row_max)
        out_tile = np.zeros((len(query_tile), value.shape[1]), query.dtype)
        for column in range(0, len(key), block_n):
            scores = scale * (query_tile @ key[column : column + block_n].T)
            new_max = np.maximum(row_max, scores.max(axis=1))
            weights = np.exp(scores - new_max[:, None])
            rescale = np.exp(row_max - new_max)
            row_sum = rescale * row_sum + weights.sum(axis=1)
            out_tile = rescale[:, None] * out_tile + weights @ value[column : column + block_n]
            row_max = new_max
        out[row : row + block_m] = out_tile / row_sum[:, None]
        lse[row : row + block_m] = row_max + np.log(row_sum)
    return out, lse


def _max_and_sum(scores: Array) -> tuple[Any, Any]:
    """Max and sum of one row by the recurrence of `online_softmax_attention`."""
    row_max, row_sum = -np.inf, 0.0
    for score in scores:
        new_max = max(row_max, score)
        row_sum = row_sum * np.exp(row_max - new_max) + np.exp(score - new_max)
        row_max = new_max
    return row_max, row_sum


def _check(query: Array, key: Array, value: Array, scale: float | None) -> float:
    """Raise ValueError unless the shapes fit; return the scale."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions, one head, but had shape {array.shape}")
    if key.shape[1] != query.shape[1]:
        raise ValueError(f"key must have query's head dim {query.shape[1]}, but had shape {key.shape}")
    if len(key) == 0 or len(value) != len(key):
        raise ValueError(f"key and value must have the same length ≥ 1, but had shapes {key.shape} and {value.shape}")
    if scale is not None:
        return float(scale)  # a NumPy scalar would widen float32
    return 1 / math.sqrt(query.shape[1]) if query.shape[1] else 1.0
