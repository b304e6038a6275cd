"""Who judges the judge: the oracle by hand and against PyTorch; the acceptance rule against wrong results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.testing import (
    DTYPES,
    LAYOUTS,
    MASK_MODS,
    SCORE_MODS,
    Case,
    MaskSpec,
    SinkSpec,
    assert_attention_close,
    oracle,
    random_case,
)
from tests.cases import heads, shapes

# ------------------------------------------------------------------------------------------------------------
# By hand.  One query, three keys, E = 1, scale 1: the scores are the keys, ln 1, ln 2 and ln 4.
# ------------------------------------------------------------------------------------------------------------

QUERY = np.array([[[1.0]]])
KEY = np.log(np.array([[[1.0], [2.0], [4.0]]]))
VALUE = np.array([[[7.0, 0.0], [14.0, 0.0], [21.0, 7.0]]])


@pytest.mark.parametrize(
    ("arguments", "weights", "out", "total"),
    [
        ({}, [1 / 7, 2 / 7, 4 / 7], [1 + 4 + 12, 4], 7),
        ({"is_causal": True}, [1, 0, 0], [7, 0], 1),
        ({"is_causal": True, "align": 1}, [1 / 3, 2 / 3, 0], [7 / 3 + 28 / 3, 0], 3),
        ({"is_causal": True, "align": "bottom_right"}, [1 / 7, 2 / 7, 4 / 7], [17, 4], 7),
        ({"window": (1, 0), "align": 2}, [0, 1 / 3, 2 / 3], [14 / 3 + 14, 14 / 3], 6),
        ({"attn_mask": np.array([True, False, True])}, [1 / 5, 0, 4 / 5], [7 / 5 + 84 / 5, 28 / 5], 5),
        ({"attn_mask": np.log(np.array([8.0, 1, 1]))}, [8 / 14, 2 / 14, 4 / 14], [4 + 2 + 6, 2], 14),
        ({"attn_mask": np.array([0, 0, -np.inf])}, [1 / 3, 2 / 3, 0], [7 / 3 + 28 / 3, 0], 3),
        ({"sinks": np.array([math.log(7)])}, [1 / 14, 2 / 14, 4 / 14], [8.5, 2], 14),
        ({"scale": 0}, [1 / 3] * 3, [14, 7 / 3], 3),
        ({"scale": 2}, [1 / 21, 4 / 21, 16 / 21], [7 / 21 + 56 / 21 + 16, 16 / 3], 21),
        ({"scale": -1}, [4 / 7, 2 / 7, 1 / 7], [4 + 4 + 3, 1], 7 / 4),
        ({"alibi_slopes": np.array([math.log(2)])}, [1 / 3] * 3, [14, 7 / 3], 3),
        (
            {"alibi_slopes": np.array([math.log(2)]), "align": "bottom_right"},
            [1 / 21, 4 / 21, 16 / 21],
            [7 / 21 + 56 / 21 + 16, 16 / 3],
            21 / 4,
        ),
        ({"score_mod": lambda s, b, h, i, j: 0.0 * s}, [1 / 3] * 3, [14, 7 / 3], 3),
        ({"mask_mod": lambda b, h, i, j: j == 1}, [0, 1, 0], [14, 0], 2),
        ({"mask_mod": lambda b, h, i, j: j > 9}, [0, 0, 0], [0, 0], 0),
    ],
)
def test_three_keys_by_hand(arguments: dict[str, Any], weights: list[float], out: list[float], total: float) -> None:
    result = oracle(QUERY, KEY, VALUE, **{"scale": 1, **arguments})
    np.testing.assert_allclose(result.weights[0, 0].astype(float), weights, rtol=1e-14)
    np.testing.assert_allclose(result.out[0, 0].astype(float), out, rtol=1e-14)
    expected = math.log(total) if total else -math.inf
    np.testing.assert_allclose(float(result.lse[0, 0]), expected, rtol=1e-14)


def test_softcap_by_hand() -> None:
    result = oracle(QUERY, KEY, VALUE, scale=1, softcap=math.log(2))
    capped = [math.log(2) * math.tanh(x) for x in (0, 1, 2)]
    np.testing.assert_allclose(result.scores["capped"][0, 0].astype(float), capped, rtol=1e-14)
    np.testing.assert_allclose(float(result.lse[0, 0]), math.log(sum(map(math.exp, capped))), rtol=1e-14)


def test_default_scale_by_hand() -> None:
    result = oracle(np.full((1, 4), 3.0), np.full((2, 4), 5.0), np.ones((2, 1)))
    assert result.scores["raw"].tolist() == [[3 * 5 * 4 / 2] * 2]


def test_grouped_heads_by_hand() -> None:
    """12 query heads, 4 key heads, 6 value heads: query head 7 meets key head 2 and value head 3."""
    key = np.zeros((4, 2, 1))
    key[:, 1, 0] = np.log([1, 2, 3, 4])
    value = np.zeros((6, 2, 1))
    value[:, 1, 0] = 10.0 ** np.arange(6)
    result = oracle(np.ones((12, 1, 1)), key, value, enable_gqa=True)
    expected = [10 ** (h // 2) * (n := h // 3 + 1) / (n + 1) for h in range(12)]
    np.testing.assert_allclose(result.out[:, 0, 0].astype(float), expected, rtol=1e-14)
    assert expected[7] == 10**3 * 3 / 4


def test_order_of_operations_by_hand() -> None:
    """scale, then score_mod, then softcap, then the mask and ALiBi, then removal; sinks are not scaled."""
    result = oracle(
        np.array([[[2.0]], [[2.0]]]),
        np.array([[[3.0], [5.0]]]),
        np.ones((1, 2, 1)),
        (np.array([[10.0, 20.0]]), np.array([True, False])),
        scale=0.5,
        score_mod=lambda s, b, h, i, j: s + h,
        softcap=8.0,
        alibi_slopes=np.array([0.0, 100.0]),
        sinks=np.array([0.25, 0.5]),
        align=1,
    )
    raw, modded = np.array([3.0, 5.0]), np.array([[3.0, 5.0], [4.0, 6.0]])
    capped = 8 * np.tanh(modded / 8)
    for h in range(2):
        assert result.scores["raw"][h, 0].tolist() == raw.tolist()
        assert result.scores["modded"][h, 0].tolist() == modded[h].tolist()
        np.testing.assert_allclose(result.scores["capped"][h, 0].astype(float), capped[h], rtol=1e-15)
        biased = [capped[h, 0] + 10 - 100 * h * 1, -np.inf]
        np.testing.assert_allclose(result.scores["biased"][h, 0].astype(float), biased, rtol=1e-14)
        lse = np.logaddexp(biased[0], [0.25, 0.5][h])
        np.testing.assert_allclose(float(result.lse[h, 0]), lse, rtol=1e-14)


def test_dropout_by_hand() -> None:
    kept = cupyflash.dropout_mask((1, 1, 3), 0.5, 3)
    result = oracle(QUERY, KEY, VALUE, scale=1, dropout_p=0.5, seed=3)
    expected = np.array([2 / 7, 4 / 7, 8 / 7]) * kept[0, 0]
    np.testing.assert_allclose(result.weights[0, 0].astype(float), expected, rtol=1e-14)
    np.testing.assert_allclose(float(result.lse[0, 0]), math.log(7), rtol=1e-14)


def test_float64_is_judged_in_a_wider_type_where_there_is_one() -> None:
    assert oracle(QUERY, KEY, VALUE).out.dtype == np.longdouble
    assert oracle(*(x.astype(np.float32) for x in (QUERY, KEY, VALUE))).out.dtype == np.float64


# ------------------------------------------------------------------------------------------------------------
# Against PyTorch
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        heads(2, 3, 6, 9, dtype="float64"),
        heads(2, 3, 6, 9, dtype="float64", is_causal=True),
        heads(2, 3, 9, 6, dtype="float64", is_causal=True),
        heads(2, 3, 6, 9, dtype="float64", scale=0.3),
        heads(2, 3, 6, 9, 8, 5, dtype="float64", masks=(MaskSpec("bool", (2, 1, 6, 9), values="dead_rows"),)),
        heads(2, 3, 6, 9, dtype="float64", masks=(MaskSpec("float64", (3, 6, 9), values="dead_rows"),)),
        heads(2, 3, 6, 9, 0, 5, dtype="float64", scale=1.0),
        shapes((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), dtype="float64", enable_gqa=True),
        shapes((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8), dtype="float64", enable_gqa=True),
        shapes((2, 1, 5, 8), (1, 3, 7, 8), (3, 7, 8), dtype="float64"),
    ],
    ids=repr,
)
def test_the_oracle_agrees_with_pytorch(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare the oracle with")
    arguments = case.arguments()
    tensors = {
        name: torch.from_numpy(arguments[name])
        for name in ("query", "key", "value", "attn_mask")
        if arguments[name] is not None
    }
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(
            **tensors, is_causal=case.is_causal, scale=case.scale, enable_gqa=case.enable_gqa
        )
    actual = oracle(**{name: x for name, x in arguments.items() if not name.startswith("return_")})
    # PyTorch's formula without the replacement of dead rows gives NaN; its function, and ours, zero.
    np.testing.assert_allclose(actual.out.astype(np.float64), expected.numpy(), rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------
# The acceptance rule refuses what is wrong
# ------------------------------------------------------------------------------------------------------------

SMALL = heads(2, 3, 6, 9, 8, return_weights=True, masks=(MaskSpec("bool", (6, 9), values="dead_rows"),))


def right(case: Case) -> list[np.ndarray]:
    """The truth, rounded to the dtypes that attention returns."""
    truth = oracle(**{name: x for name, x in case.arguments().items() if not name.startswith("return_")})
    dtype, accumulator = DTYPES[case.dtype], DTYPES["float64" if case.dtype == "float64" else "float32"]
    return [truth.out.astype(dtype), truth.lse.astype(accumulator), truth.weights.astype(dtype)]


def one_element_off(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    out[1, 2, 3, 4] *= 1.05


def one_element_nan(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    out[1, 2, 3, 4] = np.nan


def one_element_infinite(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    out[1, 2, 3, 4] = np.inf


def dead_row_not_zero(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    out[1, 2, 4, 4] = 1e-4


def two_heads_swapped(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    out[:, [0, 1]] = out[:, [1, 0]]


def two_batches_swapped(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    out[[0, 1]] = out[[1, 0]]


def lse_off(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    lse[1, 2, 3] += 1e-3


def lse_of_base_two(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    lse *= math.log2(math.e)


def lse_of_a_dead_row_finite(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    lse[1, 2, 4] = np.finfo(lse.dtype).min


def weight_of_a_removed_key(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    weights[1, 2, 4, 4] = 1e-7


def two_weights_swapped(out: np.ndarray, lse: np.ndarray, weights: np.ndarray) -> None:
    i = np.flatnonzero(weights[0, 0, 0])[:2]
    weights[0, 0, 0, i] = weights[0, 0, 0, i[::-1]]


BREAKS = [
    one_element_off,
    one_element_nan,
    one_element_infinite,
    dead_row_not_zero,
    two_heads_swapped,
    two_batches_swapped,
    lse_off,
    lse_of_base_two,
    lse_of_a_dead_row_finite,
    weight_of_a_removed_key,
    two_weights_swapped,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_result_is_accepted(dtype: str) -> None:
    case = replace(SMALL, dtype=dtype)
    assert_attention_close(tuple(right(case)), case)
    assert_attention_close(tuple(right(case)), case.arguments())


@pytest.mark.parametrize("break_it", BREAKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_result_is_refused(dtype: str, break_it: Callable[..., None]) -> None:
    case = replace(SMALL, dtype=dtype)
    results = right(case)
    break_it(*results)
    with pytest.raises(AssertionError, match="is wrong at"):
        assert_attention_close(tuple(results), case)
    with pytest.raises(AssertionError, match="is wrong at"):
        assert_attention_close(tuple(results), case.arguments())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_of_a_few_roundoffs_is_refused(dtype: str) -> None:
    """The bound is no wider than it must be: 100 roundoffs of the largest value are too many everywhere."""
    case = heads(1, 2, 20, 30, 16, dtype=dtype, return_lse=False)
    (out, *_) = right(case)
    arguments = case.arguments()
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}[dtype]
    wrong = out.astype(np.longdouble)
    wrong[0, 1, 7, 3] += 100 * u * np.abs(arguments["value"].astype(np.float64)).max()
    with pytest.raises(AssertionError, match=r"= \(0, 1, 7, 3\)"):
        assert_attention_close(wrong.astype(out.dtype), case)


@pytest.mark.parametrize(("dtype", "computed_in"), [("float32", "float16"), ("float64", "float32")])
def test_a_result_of_lower_precision_is_refused(dtype: str, computed_in: str) -> None:
    case = heads(2, 3, 6, 9, 8, dtype=dtype)
    arguments = {name: x for name, x in case.arguments().items() if not name.startswith("return_")}
    result = oracle(**arguments, dtype=DTYPES[computed_in])
    results = (result.out.astype(DTYPES[dtype]), result.lse.astype(DTYPES[dtype]))
    with pytest.raises(AssertionError, match="is wrong at"):
        assert_attention_close(results, case)


def test_a_result_of_tf32_is_refused() -> None:
    """TensorFloat-32 rounds operands to 11 bits."""
    case = heads(2, 3, 20, 30, 64)
    arguments = {name: x for name, x in case.arguments().items() if not name.startswith("return_")}
    for name in ("query", "key"):
        arguments[name] = (arguments[name].view(np.int32) & ~0x1FFF).view(np.float32)
    rough = oracle(**arguments)
    with pytest.raises(AssertionError, match="is wrong at"):
        assert_attention_close((rough.out.astype(np.float32), rough.lse.astype(np.float32)), case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out, lse, weights: (out, lse), r"must return a tuple \(out, lse, weights\)"),
        (lambda out, lse, weights: out, r"must return a tuple \(out, lse, weights\), got ndarray"),
        (lambda out, lse, weights: (out[:1], lse, weights), r"out has shape \(1, 3, 6, 8\), expected \(2, 3, 6, 8\)"),
        (lambda out, lse, weights: (out, lse[..., None], weights), r"lse has shape \(2, 3, 6, 1\)"),
        (lambda out, lse, weights: (out.astype(np.float64), lse, weights), "out has dtype float64, expected float32"),
        (lambda out, lse, weights: (out, lse.astype(np.float64), weights), "lse has dtype float64"),
        (lambda out, lse, weights: (out, lse, weights.astype(np.float16)), "weights has dtype float16"),
        (lambda out, lse, weights: (out, weights, lse), "lse has shape"),
    ],
)
def test_a_result_of_wrong_kind_is_refused(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_attention_close(change(*right(SMALL)), SMALL)


def test_a_value_that_must_be_nan_is_not_accepted_as_a_number() -> None:
    arguments = heads(1, 1, 4, 5, 8).arguments()
    result = cupyflash.attention(**arguments, backend="math")
    arguments["query"][0, 0, 2] = np.nan
    with pytest.raises(AssertionError, match=r"out is wrong at .* = \(0, 0, 2, "):
        assert_attention_close(result, arguments)


@pytest.mark.parametrize("stage", ["raw", "modded", "capped", "biased", "softmax"])
def test_a_wrong_score_is_refused(stage: str) -> None:
    case = replace(SMALL, softcap=2.0, score_mod="look_up")
    truth = oracle(**{name: x for name, x in case.arguments().items() if not name.startswith("return_")})
    scores = truth.scores[stage].astype(np.float32)
    assert_attention_close(scores, case, stage=stage)
    index = tuple(np.argwhere(np.isfinite(scores) & (scores != 0))[5])
    for wrong in (scores[index] * 1.001, np.nan, -np.inf):
        broken = scores.copy()
        broken[index] = wrong
        with pytest.raises(AssertionError, match=f"{stage} is wrong at"):
            assert_attention_close(broken, case, stage=stage)


def test_the_message_says_where_what_and_how_to_repeat_it() -> None:
    case = shapes((2, 2, 3, 6, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8), return_lse=False, is_causal=True)
    out = right(case)[0]
    out[1, 0, 2, 4, 5] += 1
    with pytest.raises(AssertionError) as raised:
        assert_attention_close(out, case, backend="numpy")
    message = str(raised.value)
    assert "attention on backend 'numpy': out is wrong at (b, h, q, d) = (2, 2, 4, 5)" in message
    assert f"got {out[1, 0, 2, 4, 5]!s}, expected " in message
    assert "the bound is " in message
    assert "(1 of 576 elements are wrong)" in message
    assert f"reproduce: from cupyflash.testing import *; {case!r}.check('numpy')" in message


def test_a_bound_holds_for_every_row_by_itself() -> None:
    """One row of large values does not excuse errors in the others."""
    case = heads(1, 1, 6, 9, 8, return_lse=False)
    arguments = case.arguments() | {"attn_mask": np.tri(6, 9, 3, dtype=bool)}
    arguments["value"][0, 0, 8] *= 1e6
    arguments["key"][0, 0, 0] *= 1e3
    out = oracle(**{name: x for name, x in arguments.items() if not name.startswith("return_")}).out.astype(np.float32)
    assert_attention_close(out, arguments)
    out[0, 0, 0, 0] += 0.01
    with pytest.raises(AssertionError, match=r"= \(0, 0, 0, 0\)"):
        assert_attention_close(out, arguments)


# ------------------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (5,), (1,), (4, 5), (2, 3, 4, 5), (2, 0, 5), (1, 1, 1)], ids=str)
def test_layouts_keep_shape_and_dtype_and_most_keep_the_values(layout: str, shape: tuple[int, ...]) -> None:
    for dtype in (*DTYPES.values(), np.dtype(bool)):
        values = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        laid_out = LAYOUTS[layout](values)
        assert (laid_out.shape, laid_out.dtype) == (shape, dtype)
        if layout not in ("repeated_rows", "repeated_columns", "overlapping"):
            assert laid_out.tobytes() == values.tobytes()


def test_layouts_are_what_their_names_say() -> None:
    x = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    strides = {name: layout(x).strides for name, layout in LAYOUTS.items()}
    assert strides["contiguous"] == (240, 80, 20, 4)
    assert strides["fortran"] == (4, 8, 24, 96)
    assert strides["swapped_heads"] == (240, 20, 60, 4)
    assert strides["transposed"] == (240, 80, 4, 16)
    assert strides["strided"] == (3840, 640, 80, 8)
    assert strides["reversed"] == (-240, -80, -20, -4)
    assert strides["repeated_rows"][-2] == 0
    assert strides["repeated_columns"][-1] == 0
    assert strides["overlapping"] == (4, 4, 4, 4)
    assert not LAYOUTS["unaligned"](x).flags.aligned
    assert not LAYOUTS["read_only"](x).flags.writeable


def test_random_cases_need_no_hypothesis_and_are_valid() -> None:
    rng = np.random.default_rng(0)
    for case in [random_case(rng) for _ in range(200)] + [random_case(rng, large=True) for _ in range(3)]:
        case.check("math")
    assert random_case(np.random.default_rng(1)) == random_case(np.random.default_rng(1))


def test_random_cases_reach_every_argument() -> None:
    rng = np.random.default_rng(0)
    drawn = [random_case(rng) for _ in range(1000)]
    assert {case.dtype for case in drawn} == DTYPES.keys()
    assert {case.score_mod for case in drawn} == {None, *SCORE_MODS}
    assert {case.mask_mod for case in drawn} == {None, *MASK_MODS}
    assert {layout for case in drawn for layout in case.layouts} == LAYOUTS.keys()
    assert {len(case.masks) for case in drawn} == {0, 1, 2}
    assert {len(spec.shape) for case in drawn for spec in case.masks} >= {0, 1, 2, 3, 4}
    for name in ("is_causal", "enable_gqa", "dropout_p", "softcap", "window", "sinks", "alibi_shape", "return_weights"):
        assert any(getattr(case, name) for case in drawn), name
    for axis in (-1, -2):
        assert any(case.query_shape[axis] == 0 for case in drawn)
        assert any(case.value_shape[axis] == 0 for case in drawn)
    assert all(case.data_seed == 7 for case in (random_case(rng, data_seed=7) for _ in range(5)))


def test_a_case_tells_only_what_was_given() -> None:
    assert repr(shapes((4, 8), (5, 8), (5, 8))) == "Case(query_shape=(4, 8), key_shape=(5, 8), value_shape=(5, 8))"
    case = shapes((1, 4, 8), (1, 5, 8), (1, 5, 8), sinks=SinkSpec(), scale=0.0, return_lse=False)
    assert repr(case).endswith("scale=0.0, sinks=SinkSpec(dtype='float32', offset=0.0, holes=False), return_lse=False)")
