"""A gallery of score_mod and mask_mod functions, each as a user could have written it.

    >>> import numpy as np
    >>> from cupyflash import attention, mods
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 4, 16, 8), dtype=np.float32) for _ in range(3))
    >>> attention(q, k, v, mask_mod=mods.prefix_lm(5)).shape
    (2, 4, 16, 8)

Each function here takes the numbers and arrays of its formula and returns the plain function of scores and coordinates.
Several masks together are one: ``lambda *at: window(*at) & document(*at)``.

Arrays are NumPy's for NumPy inputs and CuPy's for CuPy's.  With i = q_idx, j = kv_idx:

========================  ==========================================================================================
`alibi`                   s − slope·\\|i + shift − j\\|                      Press, Smith and Lewis 2022
`relative_position_bias`  s + table[h, clip(i − j)]                       Shaw et al. 2018, Raffel et al. 2020
`distance_decay`          s + ln(decay)·\\|i − j\\|: weights by decay^\\|i − j\\|  Sun et al. 2023
`tanh_softcap`            cap·tanh(s / cap)                               Gemma 2
`soft_clipping`           s / (1 + \\|s\\| / limit)
`document_mask`           i and j lie in the same document
`prefix_lm`               j ≤ i, or j in the prefix                       Raffel et al. 2020
`sliding_window`          −left ≤ j − i ≤ right                           Beltagy, Peters and Cohan 2020
`dilated_window`          every dilation-th key of a window               Beltagy, Peters and Cohan 2020
========================  ==========================================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .problem.mods import MaskMod, ScoreMod

__all__ = [
    "alibi",
    "dilated_window",
    "distance_decay",
    "document_mask",
    "prefix_lm",
    "relative_position_bias",
    "sliding_window",
    "soft_clipping",
    "tanh_softcap",
]


def alibi(slopes: Any, shift: int = 0) -> ScoreMod:
    """Attention with linear biases.

    Parameters
    ----------
    slopes
        (Hq,) array.
    shift
        of the diagonal, S − L where queries and keys end together.
    """

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - slopes[h] * abs(q_idx + shift - kv_idx)

    return score_mod


def relative_position_bias(table: Any) -> ScoreMod:
    """A learned bias for each head and distance; distances beyond the table take its last entry.

    Parameters
    ----------
    table
        (Hq, 2·n + 1) array: the distances i − j from −n to n.
    """
    furthest = table.shape[1] // 2

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h, np.clip(q_idx - kv_idx, -furthest, furthest) + furthest]

    return score_mod


def distance_decay(decay: Any) -> ScoreMod:
    """Weights that fall by a factor for each step of distance.

    Parameters
    ----------
    decay
        (Hq,) array of factors above 0, at most 1.
    """

    rate = np.log(decay)  # once for each head, rather than for each score

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + rate[h] * abs(q_idx - kv_idx)

    return score_mod


def tanh_softcap(cap: float) -> ScoreMod:
    """Scores that saturate at ±cap."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * np.tanh(score / cap)

    return score_mod


def soft_clipping(limit: float) -> ScoreMod:
    """Scores that approach ±limit without a transcendental function."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score / (1 + abs(score) / limit)

    return score_mod


def document_mask(document: Any) -> MaskMod:
    """Packed sequences: attention within each document.

    Parameters
    ----------
    document
        (N,) array of integers: the document that each position belongs to, for queries and keys.
    """

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document[q_idx] == document[kv_idx]

    return mask_mod


def prefix_lm(prefix: int) -> MaskMod:
    """Causal, but for a prefix of so many keys that every query sees."""

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) | (kv_idx < prefix)

    return mask_mod


def sliding_window(left: int, right: int = 0) -> MaskMod:
    """So many keys to each side of the query, and the one at its place."""

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx >= q_idx - left) & (kv_idx <= q_idx + right)

    return mask_mod


def dilated_window(count: int, dilation: int) -> MaskMod:
    """So many keys to each side of the query, dilation apart, and the one at its place."""

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = abs(q_idx - kv_idx)
        return (distance % dilation == 0) & (distance <= count * dilation)

    return mask_mod
