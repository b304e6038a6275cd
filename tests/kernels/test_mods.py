"""Traced functions under the emulator against the same functions called by NumPy.

What must agree, and how closely:

* Masks, and scores of float64, bit for bit: they are computed in the dtypes that NumPy would choose.
* Scores of float32, bit for bit with NumPy where every float64 is a float32 instead: `Narrow` calls the function so.
* Functions of the mathematical library within 4 units in the last place, the most that glibc and NumPy each promise.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings

from cupyflash import mods
from cupyflash.errors import Unsupported
from cupyflash.problem.trace import trace_mask_mod, trace_score_mod
from cupyflash.testing import MASK_MODS, SCORE_MODS
from tests.kernels.mods import apply, called_mask, coordinates, traced_mask, traced_scores
from tests.kernels.trees import BYTES, COMPARISONS, called_scores, mask_mod_of, masks, reals, score_mod_of

pytestmark = pytest.mark.usefixtures("cxx")

SHAPE = (2, 3, 5, 37)


def assert_same_scores(function: Any, scores: np.ndarray) -> None:
    np.testing.assert_array_equal(traced_scores(function, scores), called_scores(function, scores))


def assert_same_mask(function: Any, shape: tuple[int, ...] = SHAPE) -> None:
    with np.errstate(all="ignore"):
        expected = called_mask(function, shape)
    np.testing.assert_array_equal(traced_mask(function, shape), expected)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


# --- the functions that the package knows ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods_of_the_tests(name: str, dtype: Any, rng: np.random.Generator) -> None:
    assert_same_scores(SCORE_MODS[name], rng.standard_normal(SHAPE).astype(dtype))


@pytest.mark.parametrize("name", MASK_MODS)
def test_mask_mods_of_the_tests(name: str) -> None:
    assert_same_mask(MASK_MODS[name])


SLOPES = np.array([0.5, 0.25, 0.125], np.float32)
TABLE = np.random.default_rng(2).standard_normal((3, 9)).astype(np.float32)
GALLERY_SCORES = {
    "alibi": mods.alibi(SLOPES),
    "alibi shifted": mods.alibi(SLOPES, 32),
    "relative_position_bias": mods.relative_position_bias(TABLE),
    "soft_clipping": mods.soft_clipping(3.0),
}
GALLERY_MASKS = {
    "document_mask": mods.document_mask(np.arange(37) // 5),
    "prefix_lm": mods.prefix_lm(20),
    "sliding_window": mods.sliding_window(2, 1),
    "dilated_window": mods.dilated_window(3, 2),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", GALLERY_SCORES)
def test_score_mods_of_the_gallery(name: str, dtype: Any, rng: np.random.Generator) -> None:
    assert_same_scores(GALLERY_SCORES[name], 3 * rng.standard_normal(SHAPE).astype(dtype))


@pytest.mark.parametrize("name", GALLERY_MASKS)
def test_mask_mods_of_the_gallery(name: str) -> None:
    assert_same_mask(GALLERY_MASKS[name])


def test_both_at_once(rng: np.random.Generator) -> None:
    scores = rng.standard_normal(SHAPE).astype(np.float32)
    score, mask = GALLERY_SCORES["alibi"], GALLERY_MASKS["document_mask"]
    results, kept = apply(trace_score_mod(score), trace_mask_mod(mask), scores)
    np.testing.assert_array_equal(results, called_scores(score, scores))
    np.testing.assert_array_equal(kept, called_mask(mask, SHAPE))


# --- each operation --------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.0, 7.0, np.inf, -np.inf, np.nan, 1e-30, 1e30, 1e-44]

REAL_UNARY = [
    *(np.negative, np.positive, np.absolute, np.fabs, np.sign, np.square, np.reciprocal, np.sqrt),
    *(np.floor, np.ceil, np.trunc, np.rint),
]
LIBRARY = [
    *(np.exp, np.exp2, np.expm1, np.log, np.log2, np.log10, np.log1p, np.sin, np.cos, np.tan),
    *(np.sinh, np.cosh, np.tanh, np.arctan),
]
REAL_BINARY = [
    *(np.add, np.subtract, np.multiply, np.divide, np.floor_divide, np.remainder, np.fmod),
    *(np.minimum, np.maximum, np.fmin, np.fmax, np.copysign),
]
PREDICATES = [np.isnan, np.isinf, np.isfinite, np.signbit, np.logical_not]
LOGICAL = [np.logical_and, np.logical_or, np.logical_xor]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operations_on_floats(dtype: Any) -> None:
    """All in two kernels: h chooses the operation, and NaN, infinities and zeros of both signs meet each other."""
    x = np.array(SPECIAL, dtype)
    operations = [lambda a, b, f=f: f(a) for f in REAL_UNARY]
    operations += [lambda a, b, f=f: f(a, b) for f in REAL_BINARY]
    operations += [lambda a, b, f=f: np.where(f(a), 1.0, 0.0) for f in PREDICATES]
    operations += [lambda a, b, f=f: np.where(f(a, b), 1.0, 0.0) for f in COMPARISONS + LOGICAL]
    operations += [lambda a, b: a**2, lambda a, b: a**0.5, lambda a, b: a**-1, lambda a, b: np.clip(a, -1, 2)]
    operations += [lambda a, b: np.zeros_like(a), lambda a, b: np.round(a), lambda a, b: np.full_like(a, 3)]

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = score
        for i, operation in enumerate(operations):
            result = np.where(h == i, operation(x[q_idx], x[kv_idx]), result)
        return result

    scores = np.zeros((1, len(operations), len(x), len(x)), dtype)
    with np.errstate(all="ignore"):
        expected = called_scores(function, scores)
    np.testing.assert_array_equal(traced_scores(function, scores), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_mathematical_library(dtype: Any, rng: np.random.Generator) -> None:
    x = np.concatenate([SPECIAL, rng.standard_normal(200), 30 * rng.standard_normal(200)]).astype(dtype)

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = np.abs(score) ** 1.7
        for i, operation in enumerate(LIBRARY):
            result = np.where(h == i, operation(score), result)
        return result

    scores = np.broadcast_to(x, (1, len(LIBRARY) + 1, 1, len(x))).copy()
    found = traced_scores(function, scores)
    with np.errstate(all="ignore"):
        wide = function(scores.astype(np.longdouble), *coordinates(scores.shape)).astype(dtype)
        bound = 4 * np.spacing(np.abs(wide))
        close = (np.abs(found - wide) <= bound) | (found == wide) | (np.isnan(found) & np.isnan(wide))
    assert close.all(), [LIBRARY[h].__name__ for h in sorted({int(h) for h in np.nonzero(~close)[1]})]


INTEGER_BINARY = [
    *(np.add, np.subtract, np.multiply, np.floor_divide, np.remainder, np.fmod, np.minimum, np.maximum),
    *(np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift, np.fmin, np.fmax),
]
INTEGER_UNARY = [np.negative, np.absolute, np.sign, np.invert, np.square, np.positive, np.floor, np.trunc]


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_operations_on_integers(name: str) -> None:
    """Every pair of a dtype's awkward values: overflow, division by zero and by -1, shifts by too much."""
    info = np.iinfo(name)
    x = np.array([info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 7, 8, 31, 63, 64], name)
    if info.min < 0:
        x = np.concatenate([x, np.array([-1, -2, -3, -7, -64], name)])

    # A result is looked at through 8 of its bits at a time.
    def bits(value: Any, b: Any) -> Any:
        return (value.astype(np.int64) >> (8 * b)) & 255

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = score
        for i, operation in enumerate(INTEGER_BINARY):
            result = np.where(h == i, bits(operation(x[q_idx], x[kv_idx]), b), result)
        for i, operation in enumerate(INTEGER_UNARY):
            result = np.where(h == i + len(INTEGER_BINARY), bits(operation(x[q_idx]), b), result)
        for i, operation in enumerate(COMPARISONS):
            value = np.where(operation(x[q_idx], x[kv_idx]), 1, 0)
            result = np.where(h == i + len(INTEGER_BINARY) + len(INTEGER_UNARY), value, result)
        return result

    heads = len(INTEGER_BINARY) + len(INTEGER_UNARY) + len(COMPARISONS)
    scores = np.zeros((8, heads, len(x), len(x)), np.float64)
    with np.errstate(all="ignore"):
        expected = called_scores(function, scores)
    np.testing.assert_array_equal(traced_scores(function, scores), expected)


def test_operations_on_bools() -> None:
    t = np.array([False, True])
    operations = [np.add, np.multiply, np.minimum, np.maximum, np.bitwise_and, np.bitwise_or, np.bitwise_xor, *LOGICAL]
    operations += [lambda a, c: ~a, lambda a, c: np.logical_not(a), lambda a, c: abs(a), *COMPARISONS]

    def function(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = q_idx < 0
        for i, operation in enumerate(operations):
            result = np.where(h == i, operation(t[q_idx], t[kv_idx]), result)
        return result

    assert_same_mask(function, (1, len(operations), 2, 2))


@pytest.mark.parametrize("target", ["bool", "int8", "uint8", "int32", "uint32", "int64", "uint64", "float32"])
def test_casts(target: str) -> None:
    values = np.array([-300, -129, -128, -1, 0, 1, 127, 128, 255, 256, 70000, 2**31 - 1, -(2**31)], np.int64)
    reals = np.array([-100.7, -1.5, -0.2, 0, 0.9, 1.5, 99.99], np.float32)
    if target.startswith("uint"):
        reals = np.abs(reals)  # a negative float as an unsigned integer is not defined

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        x = values[q_idx].astype(target).astype(np.float64)
        y = reals[kv_idx].astype(target).astype(np.float64)
        return np.where(h == 0, x, y) + np.where(h == 2, np.float32(q_idx) + np.int64(reals[kv_idx]), 0)

    scores = np.zeros((1, 3, len(values), len(reals)), np.float64)
    assert_same_scores(function, scores)


ELEMENTS = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", ml_dtypes.bfloat16),
]


def test_elements_of_every_dtype(rng: np.random.Generator) -> None:
    arrays = [(10 * rng.standard_normal((5, 37))).astype(np.int64 if d != "bool" else bool) for d in ELEMENTS]
    arrays = [array.astype(dtype) for array, dtype in zip(arrays, ELEMENTS, strict=True)]
    for array in arrays[-4:]:
        array *= array.dtype.type(0.7)

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = score
        for i, array in enumerate(arrays):
            result = np.where(h == i, array[q_idx, kv_idx].astype(np.float64), result)
        return result

    assert_same_scores(function, np.zeros((1, len(arrays), 5, 37), np.float64))
    assert_same_scores(function, np.zeros((1, len(arrays), 5, 37), np.float32))


LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T.copy().T,
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "steps": lambda a: np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    "a field": lambda a: np.rec.fromarrays([a, a.astype(np.int8)]).f0,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, rng: np.random.Generator) -> None:
    values = LAYOUTS[layout](rng.standard_normal((5, 37)).astype(np.float32))
    assert_same_scores(lambda s, b, h, q_idx, kv_idx: s * values[q_idx, kv_idx], np.ones(SHAPE, np.float32))


def test_negative_indices_count_from_the_end() -> None:
    values = np.arange(41, dtype=np.float32)
    assert_same_scores(lambda s, b, h, q_idx, kv_idx: s + values[q_idx - kv_idx], np.zeros(SHAPE, np.float32))
    assert_same_scores(lambda s, b, h, q_idx, kv_idx: s + values[-1 - kv_idx], np.zeros(SHAPE, np.float32))
    assert_same_scores(lambda s, b, h, q_idx, kv_idx: s + values[-1] + values[3:][0], np.zeros(SHAPE, np.float32))


INSIDE = [
    lambda q, kv: kv,
    lambda q, kv: q - kv + 36,
    lambda q, kv: np.abs(q - kv),
    lambda q, kv: kv // 1,
    lambda q, kv: (7 * kv + 3 * q) % 37,
    lambda q, kv: np.minimum(kv * kv, 36),
    lambda q, kv: np.clip(-kv, -37, 0),
    lambda q, kv: kv & 31,
    lambda q, kv: (kv * 32) >> 5,
    lambda q, kv: np.where(kv > q, kv, q),
    lambda q, kv: (kv + 0.0 * q).astype(int) % 37,
    lambda q, kv: np.sign(q - kv),
    lambda q, kv: -kv // -1,
]


def test_an_index_that_stays_inside_is_read() -> None:
    values = np.arange(41, dtype=np.float32)

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for i, index in enumerate(INSIDE):
            score = np.where(h == i, values[index(q_idx, kv_idx)], score)
        return score

    assert_same_scores(function, np.zeros((1, len(INSIDE), 5, 37), np.float32))


@pytest.mark.parametrize(
    "index",
    [
        lambda q, kv: kv + 1,
        lambda q, kv: kv - 38,
        lambda q, kv: q * kv,
        lambda q, kv: kv * 2,
        lambda q, kv: np.int8(kv * 100),
        lambda q, kv: ~kv - 1,
        lambda q, kv: kv << 1,
        lambda q, kv: (kv + 0.0).astype(int),
        lambda q, kv: 37 // kv + kv,
        lambda q, kv: q % -40 - 1,
    ],
)
def test_an_index_that_may_leave_is_refused(index: Any) -> None:
    values = np.zeros(37, np.float32)
    with pytest.raises(Unsupported, match=r"known to lie in .* size 37.*\n.*test_mods.py:\d+"):
        traced_scores(lambda s, b, h, q_idx, kv_idx: s + values[index(q_idx, kv_idx)], np.zeros(SHAPE, np.float32))


def test_empty_arrays() -> None:
    empty = np.zeros(0, np.float32)
    with pytest.raises(Unsupported, match="size 0"):
        traced_scores(lambda s, b, h, q_idx, kv_idx: s + empty[kv_idx], np.zeros(SHAPE, np.float32))
    # Not looked at: no part of the kernel.
    assert_same_scores(lambda s, b, h, q_idx, kv_idx: s + len(empty), np.zeros(SHAPE, np.float32))


CONSTANTS = [
    *(True, 3, -3, 0.1, -0.0, 2**40, np.bool_(True), np.int8(-3), np.uint8(200), np.int16(-300), np.uint16(60000)),
    *(np.int32(-70000), np.uint32(2**31 + 1), np.int64(2**35), np.uint64(2**50), np.float32(0.1), np.float64(0.1)),
    *(np.float32(np.inf), float("nan"), np.array(7, np.int16), np.array(0.1), np.float16(0.1)),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constants_of_every_type(dtype: Any) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = score
        for i, constant in enumerate(CONSTANTS):
            result = np.where((h == i) & (b == 0), score * constant, result)
            result = np.where((h == i) & (b == 1), np.where(kv_idx > q_idx, score, constant), result)
        return result

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        result = b < 0
        for i, constant in enumerate(CONSTANTS):
            result = result | (h == i) & (b == 0) & (kv_idx * 1.5 > constant)
            result = result | (h == i) & (b == 1) & (kv_idx.astype(np.float32) > constant)
        return result

    shape = (2, len(CONSTANTS), 5, 37)
    assert_same_scores(score_mod, np.linspace(-2, 2, np.prod(shape)).reshape(shape).astype(dtype))
    assert_same_mask(mask_mod, shape)


def test_unsigned_integers_against_any_python_integer() -> None:
    x = np.arange(37).astype(np.uint8) * np.uint8(7)
    for constant in (-1, 300, 255, 0):
        assert_same_mask(lambda b, h, q_idx, kv_idx, c=constant: x[kv_idx] > c)
        assert_same_mask(lambda b, h, q_idx, kv_idx, c=constant: c == x[kv_idx])


# --- contents are those of the call ----------------------------------------------------------------------


def test_arrays_are_read_at_each_call() -> None:
    slopes = np.array([1, 2, 3], np.float32)
    function = lambda s, b, h, q_idx, kv_idx: s + slopes[h] * slopes[0]  # noqa: E731
    first = traced_scores(function, np.zeros(SHAPE, np.float32))
    slopes[:] *= 2
    np.testing.assert_array_equal(traced_scores(function, np.zeros(SHAPE, np.float32)), 4 * first)


# --- random expressions ----------------------------------------------------------------------------------

quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.slow
@quick
@given(masks)
@example(lambda at: (at["kv_idx"] - 2**40) // (at["q_idx"] - 2) > 3)
@example(lambda at: (BYTES[at["column"]] << 7) < BYTES[at["column"]])
def test_random_masks(tree: Any) -> None:
    assert_same_mask(mask_mod_of(tree))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@quick
@given(tree=reals)
@example(tree=lambda at: np.sqrt(at["q_idx"] * np.float32(15.5)) ** 2)
def test_random_scores(dtype: Any, tree: Any) -> None:
    score_mod = score_mod_of(tree)
    scores = np.random.default_rng(6).standard_normal(SHAPE).astype(dtype)
    assume(not np.isnan(called_scores(score_mod, scores)).all())
    assert_same_scores(score_mod, scores)
