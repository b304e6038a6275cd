"""What must be refused, and that each message names the argument, what it was and what was expected."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import cupyflash
from cupyflash.errors import KernelCompileError
from cupyflash.problem.trace import TraceError
from tests.cases import on_general_backends


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def of(dtype: Any, *shape: int) -> np.ndarray:
    return np.zeros(shape, dtype)


def read_only(*shape: int) -> np.ndarray:
    array = f32(*shape)
    array.flags.writeable = False
    return array


def overlapping(*shape: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(f32(sum(shape)), shape, (4,) * len(shape))


def repeated(*shape: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(f32(int(np.prod(shape))), shape, (0, 96, 24, 4))


# Query (2, 3, 4, 8), key (2, 3, 5, 8), value (2, 3, 5, 6): scores (2, 3, 4, 5), output (2, 3, 4, 6).
SHAPES = {"query": (2, 3, 4, 8), "key": (2, 3, 5, 8), "value": (2, 3, 5, 6)}


class Refusal(NamedTuple):
    """The arguments that differ from a valid call, the exception, and what its message must say."""

    arguments: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]


def all_of(dtype: Any) -> dict[str, Any]:
    return {name: of(dtype, *shape) for name, shape in SHAPES.items()}


SIX_HEADS = {"query": f32(2, 6, 4, 8), "enable_gqa": True}
HALF = all_of(np.float16)

OPERANDS = {
    **{
        f"{name} is a list": Refusal(
            {name: f32(*shape).tolist()}, TypeError, (name, "list", f"pass numpy.asarray({name})")
        )
        for name, shape in SHAPES.items()
    },
    **{f"{name} is None": Refusal({name: None}, TypeError, (name, "None", "array")) for name in SHAPES},
    **{
        f"{name} is a masked array": Refusal(
            {name: np.ma.array(f32(*shape))}, TypeError, (name, "MaskedArray", "drops its mask", "attn_mask")
        )
        for name, shape in SHAPES.items()
    },
    **{f"{name} has one dim": Refusal({name: f32(8)}, ValueError, (name, "(8,)", "2")) for name in SHAPES},
    **{f"{name} has no dims": Refusal({name: f32()}, ValueError, (name, "()", "2")) for name in SHAPES},
    **{
        f"{name} has another byte order": Refusal({name: f32(*shape).astype(">f4")}, TypeError, (name, "byte order"))
        for name, shape in SHAPES.items()
    },
    **{
        f"all are {np.dtype(dtype).name}": Refusal(all_of(dtype), TypeError, ("query", np.dtype(dtype).name, "float32"))
        for dtype in (np.int64, np.int8, np.uint8, bool, np.complex64, np.complex128, np.longdouble, object)
    },
    "all are float8": Refusal(all_of(ml_dtypes.float8_e4m3fn), TypeError, ("query", "float8_e4m3fn", "float32")),
    **{
        f"{name} is {np.dtype(dtype).name} among float32": Refusal(
            {name: of(dtype, *SHAPES[name])}, TypeError, (name, np.dtype(dtype).name, "float32")
        )
        for name in ("key", "value")
        for dtype in (np.float64, np.float16, ml_dtypes.bfloat16)
    },
    "query is float16 among float32": Refusal(
        {"query": of(np.float16, 2, 3, 4, 8)}, TypeError, ("key", "query", "float16", "float32")
    ),
    "query is a matrix": Refusal(
        {"query": f32(4, 8).view(np.matrix), "key": f32(5, 8), "value": f32(5, 6)}, TypeError, ("query", "matrix")
    ),
    "head dims differ": Refusal({"key": f32(2, 3, 5, 7)}, ValueError, ("key", "query", "8", "(2, 3, 5, 7)")),
    "lengths differ": Refusal({"value": f32(2, 3, 6, 6)}, ValueError, ("value", "key", "5", "(2, 3, 6, 6)")),
    "batches differ": Refusal(
        {"key": f32(3, 3, 5, 8)}, ValueError, ("query", "key", "(2, 3, 4, 8)", "(3, 3, 5, 8)", "broadcast")
    ),
    "batch of value differs": Refusal({"value": f32(3, 1, 5, 6)}, ValueError, ("value", "(3, 1, 5, 6)", "broadcast")),
    "heads differ without the flag": Refusal(
        {"query": f32(2, 6, 4, 8)}, ValueError, ("(2, 6, 4, 8)", "(2, 3, 5, 8)", "enable_gqa")
    ),
    "key heads do not divide": Refusal(
        {"query": f32(2, 4, 4, 8), "enable_gqa": True}, ValueError, ("key", "3", "4", "divi")
    ),
    "length before heads": Refusal(
        {"query": f32(2, 4, 3, 8), "key": f32(2, 5, 3, 8), "value": f32(2, 5, 3, 6)},
        ValueError,
        ("broadcast", ".swapaxes(-3, -2)"),
    ),
    "value heads do not divide": Refusal(
        {**SIX_HEADS, "value": f32(2, 4, 5, 6)}, ValueError, ("value", "4", "6", "divi")
    ),
    "more key heads than query heads": Refusal(
        {"query": f32(2, 1, 4, 8), "enable_gqa": True}, ValueError, ("key", "3", "1", "divi")
    ),
    "batches differ under the flag": Refusal(
        {"query": f32(3, 6, 4, 8), "enable_gqa": True}, ValueError, ("(3, 6, 4, 8)", "(2, 3, 5, 8)", "broadcast")
    ),
    **{
        f"{name} is 2-D under the flag": Refusal(
            {name: f32(*SHAPES[name][-2:]), "enable_gqa": True}, ValueError, (name, "enable_gqa", "head")
        )
        for name in SHAPES
    },
    **{
        f"{name} is no bool": Refusal({name: "no"}, TypeError, (name, "'no'", "bool"))
        for name in ("enable_gqa", "is_causal", "return_lse", "return_weights")
    },
}

MASKS = {
    **{
        f"mask of {np.dtype(dtype).name}": Refusal(
            {"attn_mask": of(dtype, 4, 5)}, TypeError, ("attn_mask", np.dtype(dtype).name, "bool", "float32")
        )
        for dtype in (np.int64, np.int8, np.uint8, np.float16, ml_dtypes.bfloat16, np.complex64, object)
    },
    "mask of 0 and 1": Refusal({"attn_mask": of(np.uint8, 4, 5)}, TypeError, ("uint8", "attn_mask.astype(bool)")),
    **{
        f"mask of shape {shape} for the batch": Refusal(
            {"attn_mask": of(bool, *shape)}, ValueError, ("broadcast", f"attn_mask[:{axes}]")
        )
        for shape, axes in (((2, 5), ", None, None"), ((2, 4, 5), ", None"), ((2, 1, 5), ", None"))
    },
    "mask of float64": Refusal(
        {"attn_mask": of(np.float64, 4, 5)}, TypeError, ("attn_mask", "float64", ".astype(np.float32)")
    ),
    "mask of float64 for float16": Refusal(
        {**HALF, "attn_mask": of(np.float64, 4, 5)}, TypeError, ("attn_mask", "float64", ".astype(np.float32)")
    ),
    "mask of float64 in a pair": Refusal(
        {"attn_mask": (of(np.float64, 4, 5), of(bool, 5))},
        TypeError,
        ("attn_mask", "float64", ".astype(np.float32)"),
    ),
    "mask of bfloat16 for float16": Refusal(
        {**HALF, "attn_mask": of(ml_dtypes.bfloat16, 4, 5)}, TypeError, ("attn_mask", "bfloat16", "float16")
    ),
    "mask of another byte order": Refusal({"attn_mask": of(">f4", 4, 5)}, TypeError, ("attn_mask", "byte order")),
    "mask is a list": Refusal({"attn_mask": [[True] * 5] * 4}, TypeError, ("attn_mask", "list")),
    "mask is a bool": Refusal({"attn_mask": True}, TypeError, ("attn_mask", "bool", "array")),
    "mask is a masked array": Refusal({"attn_mask": np.ma.array(f32(4, 5))}, TypeError, ("attn_mask", "MaskedArray")),
    **{
        f"mask of shape {shape}": Refusal(
            {"attn_mask": f32(*shape)}, ValueError, ("attn_mask", str(shape), "(2, 3, 4, 5)", "broadcast")
        )
        for shape in ((6,), (4, 6), (4, 4), (3, 5), (2, 4, 5), (3, 3, 4, 5), (1, 2, 3, 4, 5), (1, 1, 1, 1, 1))
    },
    "mask widens the batch": Refusal(
        {"query": f32(1, 3, 4, 8), "key": f32(1, 3, 5, 8), "attn_mask": of(bool, 2, 3, 4, 5)},
        ValueError,
        ("attn_mask", "(2, 3, 4, 5)", "(1, 3, 4, 5)"),
    ),
    "mask widens the queries": Refusal(
        {"query": f32(2, 3, 1, 8), "attn_mask": of(bool, 4, 5)}, ValueError, ("attn_mask", "(4, 5)", "(2, 3, 1, 5)")
    ),
    "mask widens the keys": Refusal(
        {"key": f32(2, 3, 1, 8), "value": f32(2, 3, 1, 6), "attn_mask": of(bool, 4, 5)},
        ValueError,
        ("attn_mask", "(4, 5)", "(2, 3, 4, 1)"),
    ),
    "mask has the batch of value": Refusal(
        {"query": f32(3, 4, 8), "key": f32(3, 5, 8), "attn_mask": of(bool, 2, 3, 4, 5)},
        ValueError,
        ("attn_mask", "(2, 3, 4, 5)", "(3, 4, 5)"),
    ),
    "mask has the key heads": Refusal(
        {**SIX_HEADS, "attn_mask": of(bool, 3, 4, 5)}, ValueError, ("attn_mask", "(3, 4, 5)", "(2, 6, 4, 5)")
    ),
    "bool mask of a pair has a wrong shape": Refusal(
        {"attn_mask": (f32(5), of(bool, 6))}, ValueError, ("attn_mask", "(6,)", "(2, 3, 4, 5)")
    ),
    "pair the wrong way round": Refusal(
        {"attn_mask": (of(bool, 5), f32(5))}, TypeError, ("attn_mask", "float", "bool")
    ),
    "pair of bool masks": Refusal({"attn_mask": (of(bool, 5), of(bool, 5))}, TypeError, ("attn_mask", "float", "bool")),
    "pair of float masks": Refusal({"attn_mask": (f32(5), f32(5))}, TypeError, ("attn_mask", "float", "bool")),
    "three masks": Refusal({"attn_mask": (f32(5), of(bool, 5), f32(5))}, ValueError, ("attn_mask", "3")),
    "no masks": Refusal({"attn_mask": ()}, ValueError, ("attn_mask", "0")),
    "pair as a list": Refusal({"attn_mask": [f32(5), of(bool, 5)]}, TypeError, ("attn_mask", "list")),
}

BANDS = {
    "window is an int": Refusal({"window": 3}, TypeError, ("window", "3", "left", "right")),
    "window is a text": Refusal({"window": "ab"}, TypeError, ("window", "'ab'")),
    "window of one side": Refusal({"window": (1,)}, ValueError, ("window", "1", "left", "right")),
    "window of three sides": Refusal({"window": (1, 2, 3)}, ValueError, ("window", "3", "left", "right")),
    "left side below -1": Refusal({"window": (-2, 0)}, ValueError, ("window", "left", "-2")),
    "right side below -1": Refusal({"window": (0, -7)}, ValueError, ("window", "right", "-7")),
    "left side is a float": Refusal({"window": (1.5, 0)}, TypeError, ("window", "left", "1.5")),
    "right side is a bool": Refusal({"window": (0, True)}, TypeError, ("window", "right", "True")),
    "unknown align": Refusal({"align": "middle"}, ValueError, ("align", "'middle'", "top_left", "bottom_right")),
    "align is a float": Refusal({"align": 1.5}, TypeError, ("align", "1.5", "int")),
    "align is None": Refusal({"align": None}, TypeError, ("align", "None", "int")),
    "align is a bool": Refusal({"align": True}, TypeError, ("align", "True", "int")),
}

NUMBERS = {
    "scale is NaN": Refusal({"scale": np.nan}, ValueError, ("scale", "nan", "finite")),
    "scale is infinite": Refusal({"scale": -np.inf}, ValueError, ("scale", "-inf", "finite")),
    "scale is a text": Refusal({"scale": "x"}, TypeError, ("scale", "'x'", "number")),
    "scale is complex": Refusal({"scale": 1j}, TypeError, ("scale", "1j", "number")),
    "scale is an array": Refusal({"scale": f32(2)}, TypeError, ("scale", "array", "number")),
    "softcap is negative": Refusal({"softcap": -1}, ValueError, ("softcap", "-1", "0")),
    "softcap is NaN": Refusal({"softcap": np.nan}, ValueError, ("softcap", "nan")),
    "softcap is a text": Refusal({"softcap": "x"}, TypeError, ("softcap", "'x'", "number")),
    "dropout_p below 0": Refusal({"dropout_p": -0.1}, ValueError, ("dropout_p", "-0.1", "[0, 1]")),
    "dropout_p above 1": Refusal({"dropout_p": 1.1}, ValueError, ("dropout_p", "1.1", "[0, 1]")),
    "dropout_p is NaN": Refusal({"dropout_p": np.nan}, ValueError, ("dropout_p", "nan", "[0, 1]")),
    "dropout_p is infinite": Refusal({"dropout_p": np.inf}, ValueError, ("dropout_p", "inf", "[0, 1]")),
    "dropout_p is a text": Refusal({"dropout_p": "x"}, TypeError, ("dropout_p", "'x'", "number")),
    "dropout_p is None": Refusal({"dropout_p": None}, TypeError, ("dropout_p", "None", "number")),
    "seed is negative": Refusal({"seed": -1}, ValueError, ("seed", "-1", "2**64")),
    "seed is 2**64": Refusal({"seed": 2**64}, ValueError, ("seed", "18446744073709551616", "2**64")),
    "seed is a NumPy int below 0": Refusal({"seed": np.int64(-1)}, ValueError, ("seed", "-1", "2**64")),
    "seed is a bool": Refusal({"seed": True}, TypeError, ("seed", "True", "int")),
    "seed is a NumPy bool": Refusal({"seed": np.True_}, TypeError, ("seed", "bool", "int")),
    "seed is a float": Refusal({"seed": 1.0}, TypeError, ("seed", "1.0", "int")),
    "seed is a text": Refusal({"seed": "x"}, TypeError, ("seed", "'x'", "int")),
    "seed is two numbers": Refusal({"seed": of(np.uint64, 2)}, ValueError, ("seed", "(2,)", "uint64")),
    "seed is an int64 array": Refusal({"seed": of(np.int64, 1)}, TypeError, ("seed", "int64", "uint64")),
    "seed is a float array": Refusal({"seed": of(np.float64, 1)}, TypeError, ("seed", "float64", "uint64")),
    "unknown precision": Refusal({"precision": "fp8"}, ValueError, ("precision", "'fp8'", "ieee", "tf32")),
    "precision is a number": Refusal({"precision": 3}, TypeError, ("precision", "3", "ieee")),
}
for refusal in NUMBERS.values():
    if "seed" in refusal.arguments:
        refusal.arguments["dropout_p"] = 0.5

PER_HEAD = {
    **{
        f"alibi_slopes of shape {shape}": Refusal(
            {"alibi_slopes": f32(*shape)}, ValueError, ("alibi_slopes", str(shape), "(3,)", "(2, 3)")
        )
        for shape in ((), (1,), (4,), (3, 3), (3, 2), (1, 2, 3))
    },
    "alibi_slopes of the key heads": Refusal(
        {**SIX_HEADS, "alibi_slopes": f32(3)}, ValueError, ("alibi_slopes", "(3,)", "(6,)")
    ),
    **{
        f"alibi_slopes of {np.dtype(dtype).name}": Refusal(
            {"alibi_slopes": of(dtype, 3)}, TypeError, ("alibi_slopes", np.dtype(dtype).name, "float32")
        )
        for dtype in (np.float64, np.float16, np.int64)
    },
    "alibi_slopes of float16 for float16": Refusal(
        {**HALF, "alibi_slopes": of(np.float16, 3)}, TypeError, ("alibi_slopes", "float16", "float32")
    ),
    "alibi_slopes is a list": Refusal({"alibi_slopes": [0.5] * 3}, TypeError, ("alibi_slopes", "list")),
    "alibi_slopes is a number": Refusal({"alibi_slopes": 0.5}, TypeError, ("alibi_slopes", "float")),
    **{
        f"sinks of shape {shape}": Refusal({"sinks": f32(*shape)}, ValueError, ("sinks", str(shape), "(3,)"))
        for shape in ((), (1,), (4,), (2, 3), (3, 1))
    },
    **{
        f"sinks of {np.dtype(dtype).name}": Refusal(
            {"sinks": of(dtype, 3)}, TypeError, ("sinks", np.dtype(dtype).name, "float32")
        )
        for dtype in (np.float64, np.float16, np.int64)
    },
    "sinks of bfloat16 for float16": Refusal(
        {**HALF, "sinks": of(ml_dtypes.bfloat16, 3)}, TypeError, ("sinks", "bfloat16", "float16")
    ),
    "sinks is a list": Refusal({"sinks": [0.5] * 3}, TypeError, ("sinks", "list")),
}

MODS = {
    "score_mod cannot be called": Refusal({"score_mod": 3}, TypeError, ("score_mod", "int", "callable")),
    "mask_mod cannot be called": Refusal({"mask_mod": "x"}, TypeError, ("mask_mod", "str", "callable")),
    "score_mod returns another shape": Refusal(
        {"score_mod": lambda score, b, h, q_idx, kv_idx: f32(7, 9)}, ValueError, ("score_mod", "(7, 9)", "broadcast")
    ),
    "mask_mod returns another shape": Refusal(
        {"mask_mod": lambda b, h, q_idx, kv_idx: of(bool, 7, 9)}, ValueError, ("mask_mod", "(7, 9)", "broadcast")
    ),
    "score_mod returns complex numbers": Refusal(
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score * 1j}, TypeError, ("score_mod", "complex64", "real")
    ),
    "score_mod returns nothing": Refusal(
        {"score_mod": lambda score, b, h, q_idx, kv_idx: None}, TypeError, ("score_mod", "object")
    ),
    "mask_mod returns numbers": Refusal(
        {"mask_mod": lambda b, h, q_idx, kv_idx: q_idx - kv_idx}, TypeError, ("mask_mod", "int64", "bool")
    ),
}

VALUE_BUFFER = f32(2, 3, 5, 6)
QUERY_BUFFER = f32(2, 3, 4, 8)
MASK_BUFFER = f32(2, 3, 4, 6)

OUT = {
    **{
        f"out of shape {shape}": Refusal({"out": f32(*shape)}, ValueError, ("out", str(shape), "(2, 3, 4, 6)"))
        for shape in ((2, 3, 4, 5), (6, 4, 6), (1, 2, 3, 4, 6), (2, 1, 4, 6), (4, 6))
    },
    **{
        f"out of {np.dtype(dtype).name}": Refusal(
            {"out": of(dtype, 2, 3, 4, 6)}, TypeError, ("out", np.dtype(dtype).name, "float32")
        )
        for dtype in (np.float64, np.float16, np.int32)
    },
    "out of another byte order": Refusal({"out": of(">f4", 2, 3, 4, 6)}, TypeError, ("out", "float32")),
    "out is read-only": Refusal({"out": read_only(2, 3, 4, 6)}, ValueError, ("out", "read-only", "writ")),
    "out overlaps itself": Refusal({"out": overlapping(2, 3, 4, 6)}, ValueError, ("out", "overlap", "(4, 4, 4, 4)")),
    "out repeats itself": Refusal({"out": repeated(2, 3, 4, 6)}, ValueError, ("out", "overlap", "(0, 96, 24, 4)")),
    "out is a list": Refusal({"out": [1.0]}, TypeError, ("out", "list")),
    "out is a masked array": Refusal({"out": np.ma.array(f32(2, 3, 4, 6))}, TypeError, ("out", "MaskedArray")),
    "out is part of value": Refusal(
        {"value": VALUE_BUFFER, "out": VALUE_BUFFER[:, :, :4]}, ValueError, ("out", "memory", "value")
    ),
    "out is part of query": Refusal(
        {"query": QUERY_BUFFER, "out": QUERY_BUFFER[..., 2:]}, ValueError, ("out", "memory", "query")
    ),
    "out is the mask": Refusal(
        {"attn_mask": MASK_BUFFER[..., :5], "out": MASK_BUFFER}, ValueError, ("out", "memory", "attn_mask")
    ),
    "out holds the sinks": Refusal(
        {"sinks": MASK_BUFFER[0, 0, 0, :3], "out": MASK_BUFFER}, ValueError, ("out", "memory", "sinks")
    ),
    "out holds the slopes": Refusal(
        {"alibi_slopes": MASK_BUFFER[0, 0, 0, :3], "out": MASK_BUFFER}, ValueError, ("out", "memory", "alibi_slopes")
    ),
}

REFUSALS = {**OPERANDS, **MASKS, **BANDS, **NUMBERS, **PER_HEAD, **MODS, **OUT}


def refused(call: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        call(**arguments)
    assert type(raised.value) is error, f"{raised.type.__name__}: {raised.value}"
    lacking = [text for text in says if text not in str(raised.value)]
    assert not lacking, f"{lacking} not in {raised.value}"


def valid() -> dict[str, Any]:
    return {name: f32(*shape) for name, shape in SHAPES.items()}


@on_general_backends
def test_the_call_that_the_others_differ_from_is_valid(backend: str) -> None:
    assert cupyflash.attention(**valid(), backend=backend).shape == (2, 3, 4, 6)


@on_general_backends
@pytest.mark.parametrize("name", REFUSALS)
def test_attention_refuses(name: str, backend: str) -> None:
    refusal = REFUSALS[name]
    refused(cupyflash.attention, valid() | refusal.arguments | {"backend": backend}, refusal.error, refusal.says)


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": f32(3, 3, 4, 8)},  # another batch
        {"query": f32(2, 4, 4, 8)},  # heads that don't divide
        {"query": f32(4, 8), "key": f32(2, 5, 8), "value": f32(3, 5, 6)},
        {"attn_mask": of(bool, 2, 6)},
        {"attn_mask": of(bool, 5, 4, 5)},
        {"query": of(complex, 2, 3, 4, 8)},
    ],
)
def test_no_remedy_is_named_that_would_not_help(arguments: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        cupyflash.attention(**valid() | arguments)
    assert "pass" not in str(raised.value)


NOT_OF_WEIGHTS = {"value", "dropout_p", "seed", "out", "return_lse", "return_weights"}
OF_WEIGHTS = [
    name
    for name, refusal in REFUSALS.items()
    if not NOT_OF_WEIGHTS & refusal.arguments.keys() and "(2, 3, 4, 6)" not in refusal.says
]


@on_general_backends
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_attention_weights_refuses(name: str, backend: str) -> None:
    refusal = REFUSALS[name]
    operands = {name: x for name, x in valid().items() if name != "value"}
    arguments = operands | refusal.arguments | {"stage": "softmax", "backend": backend}
    refused(cupyflash.attention_weights, arguments, refusal.error, refusal.says)


@on_general_backends
@pytest.mark.parametrize(
    ("stage", "error", "says"),
    [
        ("soft", ValueError, ("stage", "'soft'", "raw", "modded", "capped", "biased", "softmax")),
        (None, TypeError, ("stage", "None", "softmax")),
        (3, TypeError, ("stage", "3", "softmax")),
    ],
)
def test_stages_that_do_not_exist(stage: Any, error: type[Exception], says: tuple[str, ...], backend: str) -> None:
    arguments = {"query": f32(4, 8), "key": f32(5, 8), "stage": stage, "backend": backend}
    refused(cupyflash.attention_weights, arguments, error, says)


@pytest.mark.parametrize(
    ("backend", "error", "says"),
    [
        ("nope", ValueError, ("backend", "'nope'", "'numpy'", "'math'")),
        ("", ValueError, ("backend", "''", "'numpy'")),
        (3, TypeError, ("backend", "3", "'numpy'")),
    ],
)
def test_backends_that_do_not_exist(backend: Any, error: type[Exception], says: tuple[str, ...]) -> None:
    refused(cupyflash.attention, valid() | {"backend": backend}, error, says)
    refused(
        cupyflash.attention_weights,
        {"query": f32(4, 8), "key": f32(5, 8), "stage": "raw", "backend": backend},
        error,
        says,
    )


def test_the_environment_names_a_backend_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_BACKEND", "nope")
    refused(cupyflash.attention, valid(), ValueError, ("CUPYFLASH_BACKEND", "'nope'", "'numpy'", "'math'"))


@on_general_backends
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_a_precision_that_a_backend_lacks_is_refused_with_its_reasons(precision: str, backend: str) -> None:
    with pytest.raises(cupyflash.Unsupported) as raised:
        cupyflash.attention(**valid(), precision=precision, backend=backend)
    assert isinstance(raised.value, NotImplementedError)
    assert isinstance(raised.value, cupyflash.CupyflashError)
    assert any(precision in reason for reason in raised.value.reasons[backend])
    assert backend in str(raised.value)
    assert precision in str(raised.value)


@on_general_backends
def test_out_is_not_touched_by_a_call_that_is_refused(backend: str) -> None:
    out = np.full((2, 3, 4, 6), 7, np.float32)
    with pytest.raises(ValueError, match="attn_mask"):
        cupyflash.attention(**valid(), attn_mask=f32(9), out=out, backend=backend)
    assert (out == 7).all()


@on_general_backends
@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": of(np.float64, 4, 5), **all_of(np.float64)},
        {"attn_mask": f32(4, 5), **all_of(np.float64)},
        {"attn_mask": f32(4, 5), **HALF},
        {"attn_mask": of(np.float16, 4, 5), **HALF},
        {"sinks": of(np.float64, 3), **all_of(np.float64)},
        {"sinks": f32(3), **HALF},
        {"softcap": None},
        {"scale": 0},
        {"scale": np.float32(2)},
        {"window": (None, -1)},
        {"window": (np.int64(1), np.int32(2))},
        {"align": np.int64(3)},
        {"dropout_p": 1, "seed": 0},
        {"dropout_p": np.float32(0.5), "seed": np.uint64(3)},
        {"is_causal": np.True_},
        {"precision": "ieee"},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_what_must_not_be_refused(arguments: dict[str, Any], backend: str) -> None:
    assert cupyflash.attention(**valid() | arguments, backend=backend).shape == (2, 3, 4, 6)


# ------------------------------------------------------------------------------------------------------------
# merge_attention, dropout_mask, register_backend
# ------------------------------------------------------------------------------------------------------------

OUTS, LSES = f32(2, 4, 8), f32(2, 4)

MERGE = {
    "no parts": Refusal({"outs": [], "lses": []}, ValueError, ("outs", "empty")),
    "fewer lses": Refusal({"outs": [OUTS, OUTS], "lses": [LSES]}, ValueError, ("lses", "1", "2")),
    "more lses": Refusal({"outs": [OUTS], "lses": [LSES, LSES]}, ValueError, ("lses", "1", "2")),
    "parts of two shapes": Refusal(
        {"outs": [OUTS, f32(2, 5, 8)], "lses": [LSES, f32(2, 5)]}, ValueError, ("outs[1]", "(2, 5, 8)", "(2, 4, 8)")
    ),
    "lse of another shape": Refusal({"outs": [OUTS], "lses": [f32(2, 5)]}, ValueError, ("lses[0]", "(2, 5)", "(2, 4)")),
    "parts of two dtypes": Refusal(
        {"outs": [OUTS, OUTS.astype(np.float64)], "lses": [LSES, LSES]}, TypeError, ("outs[1]", "float64", "float32")
    ),
    "lse of float64": Refusal(
        {"outs": [OUTS], "lses": [LSES.astype(np.float64)]}, TypeError, ("lses[0]", "float64", "float32")
    ),
    "lse of float32 for float64": Refusal(
        {"outs": [OUTS.astype(np.float64)], "lses": [LSES]}, TypeError, ("lses[0]", "float32", "float64")
    ),
    "lse of float16": Refusal(
        {"outs": [OUTS.astype(np.float16)], "lses": [LSES.astype(np.float16)]},
        TypeError,
        ("lses[0]", "float16", "float32"),
    ),
    "outs is one array": Refusal({"outs": OUTS, "lses": [LSES]}, TypeError, ("outs", "ndarray")),
    "lses is one array": Refusal({"outs": [OUTS], "lses": LSES}, TypeError, ("lses", "ndarray")),
    "a part is a list": Refusal({"outs": [[1.0]], "lses": [LSES]}, TypeError, ("outs[0]", "list")),
    "parts of int": Refusal({"outs": [OUTS.astype(int)], "lses": [LSES]}, TypeError, ("outs[0]", "int64", "float32")),
}


@pytest.mark.parametrize("name", MERGE)
def test_merge_attention_refuses(name: str) -> None:
    refused(cupyflash.merge_attention, *MERGE[name])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"shape": 5}, TypeError, ("shape", "5")),
        ({"shape": (5,)}, ValueError, ("shape", "(5,)", "two")),
        ({"shape": (2, -1)}, ValueError, ("shape", "-1")),
        ({"shape": (2.0, 3)}, TypeError, ("shape", "2.0")),
        ({"dropout_p": 1.5}, ValueError, ("dropout_p", "1.5", "[0, 1]")),
        ({"dropout_p": np.nan}, ValueError, ("dropout_p", "nan", "[0, 1]")),
        ({"dropout_p": "x"}, TypeError, ("dropout_p", "'x'")),
        ({"seed": -1}, ValueError, ("seed", "-1", "2**64")),
        ({"seed": 2**64}, ValueError, ("seed", "2**64")),
        ({"seed": True}, TypeError, ("seed", "True")),
        ({"seed": 0.5}, TypeError, ("seed", "0.5")),
    ],
)
def test_dropout_mask_refuses(arguments: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    refused(cupyflash.dropout_mask, {"shape": (2, 3), "dropout_p": 0.5, "seed": 1} | arguments, error, says)


class Silent:
    """A backend that could be registered."""

    def reasons(self, *of_a_problem: Any) -> list[str]:
        return ["it never answers"]

    def run(self, *a_problem: Any) -> None:
        raise AssertionError("it said that it never answers")


def test_a_backend_is_not_replaced_by_accident() -> None:
    refused(cupyflash.register_backend, {"name": "numpy", "backend": Silent()}, ValueError, ("numpy", "overwrite"))


def test_what_is_no_backend_is_not_registered() -> None:
    refused(cupyflash.register_backend, {"name": "mine", "backend": 3}, TypeError, ("backend", "3", "run"))
    refused(cupyflash.register_backend, {"name": 3, "backend": Silent()}, TypeError, ("name", "3"))
    assert "mine" not in cupyflash.backends()


@pytest.mark.parametrize(
    "error",
    [
        cupyflash.Unsupported("why", {"cuda": ["because"]}),
        KernelCompileError("NVRTC could not compile it", log="line 7"),
        TraceError("score_mod can't be traced", __file__, 1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_whole_from_another_process(error: cupyflash.CupyflashError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
