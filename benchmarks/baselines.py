"""Who is measured on the CPU: each implementation as a function from arguments to a call without arguments.

The arguments are those of `cupyflash.attention` (`Workload.arguments`).  What a user would do once, such as
wrapping arrays as tensors, is done before the call and outside the measured time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

import cupyflash

__all__ = ["PREPARE", "count_cores", "materialize"]

Array: TypeAlias = npt.NDArray[Any]
Call: TypeAlias = Callable[[], Array]


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def materialize(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Attention as one writes it in NumPy: the formula, line by line, with all scores at once.

    16-bit operands are computed in float32, and bool masks are `np.where(mask, scores, -np.inf)`.  Working in place and
    dividing after the product with V makes it up to 4.5 times as fast (docs/performance.md); this is what people write.
    """
    dtype = query.dtype
    compute = np.float64 if dtype == np.float64 else np.float32
    query, key, value = (x.astype(compute, copy=False) for x in (query, key, value))
    if enable_gqa:
        group_size = query.shape[1] // key.shape[1]
        key, value = np.repeat(key, group_size, axis=1), np.repeat(value, group_size, axis=1)
    scores = query @ key.swapaxes(-1, -2) * compute(1 / math.sqrt(query.shape[-1]))
    for mask in (attn_mask, structural_mask(query.shape[-2], key.shape[-2], is_causal, window)):
        if mask is not None:
            scores = np.where(mask, scores, compute(-np.inf)) if mask.dtype == bool else scores + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return (weights @ value).astype(dtype, copy=False)


def structural_mask(
    seqlen_q: int, seqlen_k: int, is_causal: bool = False, window: tuple[int, int] | None = None
) -> Array | None:
    """The bool mask (L, S) of causal and window, top-left aligned; None where every key takes part."""
    if not is_causal and window is None:
        return None
    distance = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None]
    left, right = window or (seqlen_q, seqlen_k)
    return (distance >= -left) & (distance <= (min(right, 0) if is_causal else right))


def prepare_cupyflash(**arguments: Any) -> Call:
    return lambda: cupyflash.attention(**arguments)


def prepare_numpy(**arguments: Any) -> Call:
    return lambda: materialize(**arguments)


def prepare_bare(**arguments: Any) -> Call:
    """The NumPy calls that no implementation can do without, for one head: the floor of a small call."""
    query, key, value = (arguments[name][0, 0] for name in ("query", "key", "value"))
    query = query * np.float32(1 / math.sqrt(query.shape[-1]))
    key_t = key.T
    scores = np.empty((len(query), len(key)), np.float32)
    out = np.empty((1, 1, *query.shape[:-1], value.shape[-1]), np.float32)
    out_head = out[0, 0]
    row = np.empty((len(query), 1), np.float32)

    def call() -> Array:
        np.matmul(query, key_t, out=scores)
        np.max(scores, axis=1, keepdims=True, out=row)
        np.subtract(scores, row, out=scores)
        np.exp(scores, out=scores)
        np.matmul(scores, value, out=out_head)
        np.sum(scores, axis=1, keepdims=True, out=row)
        np.divide(out_head, row, out=out_head)
        return out

    return call


def prepare_torch(**arguments: Any) -> Call:
    import torch

    torch.set_num_threads(count_cores())

    def tensor(array: Array) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    query, key, value = (tensor(arguments[name]) for name in ("query", "key", "value"))
    mask = arguments["attn_mask"]
    if "window" in arguments:  # PyTorch has no argument for it
        mask = structural_mask(query.shape[-2], key.shape[-2], window=arguments["window"])
    options = {
        "attn_mask": None if mask is None else tensor(mask),
        "is_causal": arguments.get("is_causal", False),
        "enable_gqa": arguments.get("enable_gqa", False),
    }

    def call() -> Array:
        with torch.inference_mode():
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        if out.dtype == torch.bfloat16:
            return out.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return out.numpy()

    return call


PREPARE: dict[str, Callable[..., Call]] = {
    "cupyflash": prepare_cupyflash,
    "numpy": prepare_numpy,
    "torch": prepare_torch,
    "plain": prepare_cupyflash,
    "bare": prepare_bare,
}
