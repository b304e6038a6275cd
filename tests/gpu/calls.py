"""Calls that the GPU kernels claim, and how a NumPy call becomes one on a GPU."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupyflash.testing import Case


def heads(seqlen_q: int, seqlen_k: int, head_dim: int = 64, dtype: str = "float16", **more: Any) -> Case:
    """Two batch entries of two heads, unless ``more`` has other shapes."""
    shapes = {
        "query_shape": (2, 2, seqlen_q, head_dim),
        "key_shape": (2, 2, seqlen_k, head_dim),
        "value_shape": (2, 2, seqlen_k, head_dim),
    }
    return Case(**{**shapes, "dtype": dtype, **more})  # type: ignore[arg-type]


def grouped(num_heads_q: int, num_heads_k: int, num_heads_v: int) -> Case:
    return heads(
        70,
        90,
        query_shape=(2, num_heads_q, 70, 64),
        key_shape=(2, num_heads_k, 90, 64),
        value_shape=(2, num_heads_v, 90, 64),
        enable_gqa=True,
        is_causal=True,
    )


# None of these may be refused on a GPU of sm_80 or later.
CLAIMED: dict[str, Case] = {
    **{
        f"{dtype}-d{head_dim}-{name}": heads(seqlen_q, seqlen_k, head_dim, dtype, **more)
        for dtype in ("float16", "bfloat16")
        for head_dim in (64, 128)
        for name, seqlen_q, seqlen_k, more in (
            ("full", 128, 128, {}),
            ("tails", 77, 130, {}),
            ("causal", 200, 200, {"is_causal": True}),
            ("bottom-right", 70, 200, {"is_causal": True, "align": "bottom_right"}),
            ("empty-rows", 200, 80, {"is_causal": True, "align": "bottom_right"}),
            ("window", 150, 300, {"window": (40, 20)}),
            ("one-query", 1, 300, {}),
        )
    },
    "grouped": grouped(6, 2, 2),
    "grouped-keys-and-values-differ": grouped(6, 3, 2),
    "one-head-of-keys": heads(70, 90, key_shape=(2, 1, 90, 64), value_shape=(2, 1, 90, 64)),
    "six-axes": Case(
        query_shape=(2, 1, 3, 2, 2, 70, 64),
        key_shape=(1, 2, 3, 1, 2, 90, 64),
        value_shape=(2, 2, 1, 2, 2, 90, 64),
        dtype="float16",
    ),
    "two-axes": Case(query_shape=(70, 64), key_shape=(90, 64), value_shape=(90, 64), dtype="float16"),
    "swapped-heads": heads(70, 90, layouts=("swapped_heads",) * 3, is_causal=True),
    "large-scores": heads(70, 300, magnitude=20.0),
    "rising-scores": heads(70, 300, values="rising"),
    "long": heads(2049, 2049, 128, "bfloat16", is_causal=True),
}


def to_device(array: Any, cupy: Any) -> Any:
    """A NumPy array as a CuPy array of the same strides, over a copy of the memory that it spans."""
    if not isinstance(array, np.ndarray):
        return array
    if array.size == 0:
        return cupy.empty(array.shape, array.dtype)
    low, high = np.lib.array_utils.byte_bounds(array)
    span = np.frombuffer((ctypes.c_ubyte * (high - low)).from_address(low), np.uint8)
    start = cupy.asarray(span).data + (array.__array_interface__["data"][0] - low)
    return cupy.ndarray(array.shape, array.dtype, start, array.strides)


def function_to_device(function: Any, cupy: Any) -> Any:
    """A score_mod or mask_mod whose global arrays lie on the GPU: it may look up no others there."""
    named = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    arrays = {name: to_device(value, cupy) for name, value in named.items() if isinstance(value, np.ndarray)}
    if not arrays:
        return function
    return types.FunctionType(
        function.__code__,
        {**function.__globals__, **arrays},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def on_device(arguments: Mapping[str, Any], cupy: Any) -> dict[str, Any]:
    """The keyword arguments of `cupyflash.attention` with their arrays on the GPU, those of functions too."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(to_device(part, cupy) for part in value)
        return function_to_device(value, cupy) if isinstance(value, types.FunctionType) else to_device(value, cupy)

    return {name: moved(value) for name, value in arguments.items()}


NOT_WRITTEN = 0x7FFF  # a NaN in both formats of 16 bits


def not_written(shape: tuple[int, ...], dtype: Any, cupy: Any) -> Any:
    """An output of NaN."""
    return cupy.full(shape, NOT_WRITTEN, np.uint16).view(dtype)


def is_not_written(out: Any) -> bool:
    """Whether nobody has touched it, as far as the current stream can see."""
    return bool((out.view(np.uint16) == NOT_WRITTEN).all())
