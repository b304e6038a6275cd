"""The tracer: what it follows, what it refuses and in which words, and what it keeps out of the generated text."""

from __future__ import annotations

import enum
import functools
import gc
import math
import re
import sys
import threading
import types
import weakref
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash import mods, trace_mod
from cupyflash.build.functor import mods_dtype, pack_mods, render_mods
from cupyflash.build.params import fields_of
from cupyflash.problem.trace import MAX_NODES, Trace, TraceError, check_bounds, trace_mask_mod, trace_score_mod
from tests import cupy_stand_in

SLOPES = np.array([1.0, 0.5, 0.25], np.float32)
TABLES = {"slopes": SLOPES, "deep": [(SLOPES,)]}


def score_mod(body: Any) -> Any:
    return lambda score, b, h, q_idx, kv_idx: body(score, b, h, q_idx, kv_idx)


def written(function: Any) -> str:
    return trace_mod(function).expression


# --- what is followed ------------------------------------------------------------------------------------


def test_an_expression_reads_like_numpy() -> None:
    text = written(lambda score, b, h, q_idx, kv_idx: np.where(kv_idx <= q_idx, score * 2 + SLOPES[h], -np.inf))
    assert text == "where(kv_idx <= q_idx, (score * 2.0) + SLOPES[h], -inf)"


def test_arrays_are_found_wherever_functions_keep_them() -> None:
    closed = SLOPES + 1

    def helper(h: Any) -> Any:
        return closed[h] + SLOPES[h]

    def bound(self: Any, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + helper(h)

    def with_default(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, x: Any = closed, *, y: Any = SLOPES) -> Any:
        return score + x[h] + y[h]

    def inside(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        def inner(i: Any) -> Any:
            return SLOPES[i]

        return score + inner(h) + sum([closed[i] for i in [h]])

    class Callable:
        def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score + closed[h] + SLOPES[h]

    for function in (
        lambda score, b, h, q_idx, kv_idx: score + helper(h),
        types.MethodType(bound, object()),
        with_default,
        inside,
        Callable(),
        functools.partial(lambda x, score, b, h, q_idx, kv_idx: score + x[h] + SLOPES[h], closed),
        lambda score, b, h, q_idx, kv_idx: score + closed[h] + TABLES["slopes"][h],
        lambda score, b, h, q_idx, kv_idx: score + closed[h] + TABLES["deep"][0][0][h],
    ):
        trace = trace_score_mod(function)
        assert {array.ctypes.data for array in trace.arrays} == {SLOPES.ctypes.data, closed.ctypes.data}
    assert SLOPES.flags.writeable


def test_the_function_itself_is_left_alone() -> None:
    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, x: Any = SLOPES) -> Any:
        return score + SLOPES[h] + x[h]

    trace_score_mod(function)
    assert function.__defaults__[0] is SLOPES
    assert function(1.0, 0, 1, 2, 3) == 2.0


def test_whole_arrays_may_be_prepared_and_asked() -> None:
    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        negative = -SLOPES.astype(np.float64)
        assert len(SLOPES) == 3
        assert SLOPES.shape == (3,)
        assert SLOPES[1] == 0.5
        if SLOPES.max() > 0.9:
            score = score + np.where(SLOPES > 0.3, 1.0, negative)[h]
        return score

    (array,) = trace_score_mod(function).arrays
    np.testing.assert_array_equal(array, [1, 1, -0.25])


def test_functions_and_arrays_of_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = cupy_stand_in.make_module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    slopes = cupy_stand_in.Array(SLOPES.copy())

    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        weaker = cupy.exp(slopes)
        return cupy.where(kv_idx <= q_idx, score + slopes[h] + weaker[h], -cupy.inf)

    trace = trace_score_mod(function)
    same = trace_score_mod(lambda s, b, h, q, kv: np.where(kv <= q, s + SLOPES[h] + np.exp(SLOPES)[h], -np.inf))
    assert trace.expression == same.expression
    assert all(isinstance(array, cupy.ndarray) for array in trace.arrays)
    packed = pack_mods(trace, None, (1, 3, 4, 4), lambda array: array.data.ptr)
    assert fields_of(packed.args, mods_dtype(trace.expression, None))["score"]["a0"]["data"] == slopes.data.ptr
    with pytest.raises(TraceError, match="whole CuPy array"):
        trace_score_mod(lambda s, b, h, q, kv: s + cupy.where(slopes > 0, slopes, 0)[h])


def test_recursion_that_ends_is_followed() -> None:
    def power(x: Any, n: int) -> Any:
        return x if n == 1 else power(x, n - 1) * x

    nodes = trace_score_mod(score_mod(lambda s, b, h, q, kv: power(s, 5))).expression.nodes
    assert [node.op for node in nodes] == ["score", *["multiply"] * 4]


def test_shared_values_are_computed_once() -> None:
    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for _ in range(1000):
            score = score + score
        return score

    trace = trace_score_mod(function)
    assert len(trace.expression.nodes) == 1001
    text = str(trace_mod(function))
    assert text.count("mods::add") == 1000
    assert len(text) < 100_000


def test_deep_expressions_do_not_recurse() -> None:
    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for i in range(3000):
            score = -score + (q_idx & i % 16)
        return score

    with pytest.raises(TraceError, match=f"more than {MAX_NODES} values"):
        trace_score_mod(function)
    function.__code__ = function.__code__.replace(
        co_consts=tuple(1500 if constant == 3000 else constant for constant in function.__code__.co_consts)
    )
    check_bounds(trace_score_mod(function), (1, 1, 5, 5))
    assert render_mods(trace_score_mod(function).expression, None)


def test_numpy_chooses_the_dtypes() -> None:
    half = SLOPES.astype(np.float16)
    narrow = trace_score_mod(lambda s, b, h, q, kv: s + q / 2)
    assert {node.dtype for node in narrow.expression.nodes} == {"float32", "int64"}
    wide = trace_score_mod(lambda s, b, h, q, kv: s + q / 2, np.float64)
    assert {node.dtype for node in wide.expression.nodes} == {"float64", "int64"}
    mask = trace_mask_mod(lambda b, h, q, kv: q / 2 > kv)
    assert "float64" in {node.dtype for node in mask.expression.nodes}
    assert trace_score_mod(lambda s, b, h, q, kv: s + half[h]).expression.lookups[0].dtype == "float16"


# --- structure -------------------------------------------------------------------------------------------


def test_equal_structure_is_one_kernel() -> None:
    def make(slopes: Any, window: int, shift: float) -> Trace:
        return trace_score_mod(
            lambda s, b, h, q, kv: np.where(abs(q - kv) < window, s - slopes[h] * abs(q - kv), s * shift)
        )

    first, second = make(SLOPES, 100, 0.1), make(np.ones(7, np.float32), 200, 1e9)
    assert first.expression == second.expression
    assert hash(first.expression) == hash(second.expression)
    assert render_mods(first.expression, None) is render_mods(second.expression, None)
    assert first.numbers != second.numbers
    for other in (make(SLOPES.astype(np.float64), 100, 0.1), make(SLOPES, 3, 0.1), make(SLOPES, 2**20, 0.1)):
        assert other.expression != first.expression


def test_a_number_that_is_used_again_is_one_number() -> None:
    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for _ in range(1000):
            score = score * 0.25 + kv_idx * scale
        return score

    scale = 100.5
    assert len(trace_score_mod(function).numbers) == 2

    def pair(x: float, y: float) -> Trace:
        return trace_score_mod(lambda s, b, h, q, kv: s * x + kv * y)

    # Equal numbers that are not one are two: they may differ the next time.
    assert pair(float("0.3"), float("0.3")).expression == pair(0.3, 0.4).expression


def test_unused_values_are_no_part_of_it() -> None:
    def function(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        np.exp(SLOPES[h] * 3.5)
        return score * 2.5

    expression = trace_score_mod(function).expression
    assert [node.op for node in expression.nodes] == ["score", "number", "multiply"]
    assert expression.lookups == ()


def test_arrays_are_kept_for_the_call_only() -> None:
    function = mods.alibi(np.ones(3, np.float32))
    trace = trace_score_mod(function)
    render_mods(trace.expression, None)
    packed = pack_mods(trace, None, (1, 3, 2, 2), lambda array: array.ctypes.data)
    (slopes,) = packed.arrays
    assert fields_of(packed.args, mods_dtype(trace.expression, None))["score"]["a0"]["data"] == slopes.ctypes.data
    gone = weakref.ref(slopes.base)
    del function, slopes, trace, packed
    gc.collect()
    assert gone() is None


def test_two_threads_at_once() -> None:
    found: list[tuple[int, Any]] = []
    start = threading.Barrier(2)

    def work(which: int) -> None:
        table = np.full(3, which, np.float32)
        start.wait()
        for _ in range(50):
            trace = trace_score_mod(lambda s, b, h, q, kv: s * table[h] if which else s + table[h] * 1.5)
            render_mods(trace.expression, None)
            found.append((which, (trace.expression.nodes[-1].op, trace.arrays[0][0], len(trace.arrays))))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100
    assert {result for which, result in found if which == 1} == {("multiply", 1.0, 1)}
    assert {result for which, result in found if which == 0} == {("add", 0.0, 1)}


# --- what is refused -------------------------------------------------------------------------------------


class Holder:
    slopes = SLOPES

    def bias(self, h: Any) -> Any:
        return self.slopes[h]


HOLDER = Holder()
COUNT = 0


def assigns_global(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    global COUNT
    COUNT = 1
    return score


def writes_in_place(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    score += 1
    return score


def writes_to_array(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    SLOPES[0] = 3
    return score


def writes_items(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    score[q_idx > 3] = 0
    return score


def swallows(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    try:
        return score if q_idx > 3 else -score
    except Exception:  # noqa: BLE001
        return score


def endless(score: Any, *at: Any) -> Any:
    return endless(score, *at)


REFUSED = {
    "if": (lambda s, b, h, q, kv: s if q > kv else -s, r"q_idx > kv_idx\) decides an `if`.*np.where"),
    "and": (lambda s, b, h, q, kv: np.where(q > 1 and kv > 1, s, 0), r"decides .*&"),
    "chain": (lambda s, b, h, q, kv: np.where(1 < q < 3, s, 0), "chained comparison"),
    "max": (lambda s, b, h, q, kv: max(q, kv) * s, r"np\.minimum"),
    "int": (lambda s, b, h, q, kv: s * int(q), r"q_idx would have to be a Python number"),
    "math": (lambda s, b, h, q, kv: math.exp(s), "would have to be a Python number"),
    "range": (lambda s, b, h, q, kv: sum(range(q)) + s, "q_idx is used as an index"),
    "function": (lambda s, b, h, q, kv: np.linalg.norm(s), r"no np\.norm"),
    "ufunc": (lambda s, b, h, q, kv: np.arctan2(s, q), r"no np\.arctan2"),
    "reduction": (lambda s, b, h, q, kv: np.add.reduce(s), r"no np\.add\.reduce|np\.add is called"),
    "divmod": (lambda s, b, h, q, kv: divmod(q, kv)[0], r"no np\.divmod"),
    "keyword": (lambda s, b, h, q, kv: np.add(s, 1, where=q > 1), "called with where"),
    "out": (lambda s, b, h, q, kv: np.add(s, 1, out=SLOPES), "in place"),
    "in place": (writes_in_place, r"x = x \+ y"),
    "array item": (writes_to_array, "SLOPES is written to"),
    "item": (writes_items, "written to"),
    "copyto": (lambda s, b, h, q, kv: np.copyto(SLOPES, 3), "read-only"),
    "fill": (lambda s, b, h, q, kv: SLOPES.fill(3), r"SLOPES\.fill can't be traced"),
    "global": (assigns_global, "global, nonlocal"),
    "float index": (lambda s, b, h, q, kv: s + SLOPES[h / 2], "not an integer"),
    "bool index": (lambda s, b, h, q, kv: s + SLOPES[h > 2], "not an integer"),
    "too few indices": (lambda s, b, h, q, kv: s + np.zeros((3, 3))[h], "used as an index"),
    "slice": (lambda s, b, h, q, kv: s + SLOPES.reshape(3, 1)[h, :], "indexed by a slice"),
    "axes": (lambda s, b, h, q, kv: s + SLOPES.reshape(3, 1)[h], "an index for every axis at once"),
    "bounds": (lambda s, b, h, q, kv: s + SLOPES.reshape(3, 1)[h, 1], "out of bounds for axis 1"),
    "whole": (lambda s, b, h, q, kv: s + SLOPES, r"SLOPES of shape \(3,\) is used as a whole"),
    "attribute": (lambda s, b, h, q, kv: s + HOLDER.slopes[h], "slopes = self.slopes"),
    "method": (lambda s, b, h, q, kv: s + HOLDER.bias(h), "slopes = self.slopes"),
    "made inside": (lambda s, b, h, q, kv: s + np.asarray(SLOPES)[h], "not an attribute or made inside"),
    "masked array": (lambda s, b, h, q, kv: s + MASKED[h], "used as an index"),
    "shape": (lambda s, b, h, q, kv: s * s.shape[0], "no attribute 'shape'"),
    "items": (lambda s, b, h, q, kv: s[0], "it has no items"),
    "swallowed": (swallows, "decides an `if`"),
    "error": (lambda s, b, h, q, kv: s + 1 / 0, "raised ZeroDivisionError"),
    "endless": (endless, "recurses without end"),
    "half": (lambda s, b, h, q, kv: s + HALF[h] * 2, r"np\.multiply would round to a 16-bit"),
    "to half": (lambda s, b, h, q, kv: s.astype(np.float16), "rounded to float16"),
    "complex": (lambda s, b, h, q, kv: s * 1j, "computes with a complex"),
    "string": (lambda s, b, h, q, kv: s + "x", "computes with a str"),
    "dtype": (lambda s, b, h, q, kv: s + COMPLEX[h], "complex128"),
    "integer power": (lambda s, b, h, q, kv: 2**q * s, "constant exponent"),
    "negative power": (lambda s, b, h, q, kv: q**-1 * s, "negative integer powers"),
    "large constant": (lambda s, b, h, q, kv: s + BYTES[h] * 300, "300 is out of bounds for uint8"),
    "decimals": (lambda s, b, h, q, kv: np.round(s, 2), "no decimals"),
    "bool minus": (lambda s, b, h, q, kv: s * ((q > 1) - (kv > 1)), "no loop"),
}
HALF, COMPLEX, BYTES = SLOPES.astype(np.float16), SLOPES.astype(complex), np.arange(3, dtype=np.uint8)
MASKED = np.ma.masked_array(SLOPES, mask=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_cause_and_the_line(name: str) -> None:
    function, pattern = REFUSED[name]
    before = SLOPES.copy()
    with pytest.raises(TraceError, match=pattern) as caught:
        trace_score_mod(function)
    np.testing.assert_array_equal(SLOPES, before)
    assert isinstance(caught.value, cupyflash.Unsupported)
    if name != "global":
        assert caught.value.filename == __file__
        assert f"{__file__}:{caught.value.lineno}\n    " in str(caught.value)
        with open(__file__, encoding="utf-8") as file:
            assert file.readlines()[caught.value.lineno - 1].strip() in str(caught.value)


@pytest.mark.parametrize("result", [None, "x", [1], 1j, np.array(["x"])])
def test_results_that_are_no_scores(result: Any) -> None:
    with pytest.raises((TypeError, TraceError)):
        trace_score_mod(lambda s, b, h, q, kv: result)


def test_a_mask_is_bool() -> None:
    with pytest.raises(TypeError, match="mask_mod must return a bool array, but returned dtype int64"):
        trace_mask_mod(lambda b, h, q, kv: q + kv)


def test_symbols_do_not_outlive_their_call() -> None:
    holder = types.SimpleNamespace(symbol=None)

    def keep(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        holder.symbol = score
        return score

    trace_score_mod(keep)
    with pytest.raises(TraceError, match="symbol of another call"):
        trace_score_mod(lambda s, b, h, q, kv: s + holder.symbol)


def test_what_is_no_function() -> None:
    with pytest.raises(TraceError, match="kernels take functions written with def"):
        trace_score_mod(np.add)
    with pytest.raises(TypeError, match=r"must take \(score, b, h, q_idx, kv_idx\) .* but takes \(a\)"):
        trace_mod(lambda a: a)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, as scores are, but was float16"):
        trace_mod(lambda b, h, q, kv: q > kv, dtype=np.float16)


def test_too_many_parameters() -> None:
    numbers = list(np.linspace(0.1, 1, 1000))
    expression = trace_score_mod(lambda s, b, h, q, kv: sum(s * x for x in numbers)).expression
    with pytest.raises(TraceError, match="put the numbers into an array"):
        mods_dtype(expression, None)


def test_lengths_are_bounded() -> None:
    trace = trace_mask_mod(lambda b, h, q, kv: q > kv)
    with pytest.raises(TraceError, match="lengths up to"):
        check_bounds(trace, (1, 1, 2**30, 5))


# --- what reaches the compiler ---------------------------------------------------------------------------

HOSTILE = '"; } #error hostile\n /* ?>'


class HostileInt(int):
    def __str__(self) -> str:
        return HOSTILE

    __repr__ = __format__ = __str__

    def __index__(self) -> Any:
        raise RuntimeError(HOSTILE)

    __int__ = __add__ = __abs__ = __neg__ = __index__


class HostileFloat(float):
    def __str__(self) -> str:
        return HOSTILE

    __repr__ = __str__


class HostileEnum(enum.IntEnum):
    VALUE = 5

    def __str__(self) -> str:
        return HOSTILE


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError(HOSTILE)


class HostileArray(np.ndarray):
    @property
    def dtype(self) -> Any:
        return HOSTILE

    def __str__(self) -> str:
        return HOSTILE


def test_nothing_of_the_user_is_in_the_text() -> None:
    reference = render_mods(trace_score_mod(lambda s, b, h, q, kv: s * 5 + SLOPES[h]).expression, None)
    function = eval(f"lambda s, b, h, q, kv: s * n + {'x' * 500}[h]", {"n": HostileInt(5), "x" * 500: SLOPES})
    function.__name__ = function.__qualname__ = HOSTILE
    function.__code__ = function.__code__.replace(co_name=HOSTILE, co_filename=HOSTILE)
    assert render_mods(trace_score_mod(function).expression, None) == reference

    for number in (HostileFloat(0.3), HostileEnum.VALUE, HostileInt(2**40)):  # as numbers, they are numbers
        trace = trace_score_mod(lambda s, b, h, q, kv, n=number: s * n)
        assert "hostile" not in render_mods(trace.expression, None)
        assert all(type(number) in (int, float) for number in trace.numbers)

    hostile = SLOPES.view(HostileArray)
    for refused in (
        lambda s, b, h, q, kv: s + hostile[h],
        lambda s, b, h, q, kv: getattr(s, HOSTILE),
        lambda s, b, h, q, kv: s.astype(HOSTILE),
        lambda s, b, h, q, kv: s + np.zeros(3, [(HOSTILE, "f4")])[0],
    ):
        with pytest.raises(TraceError):
            trace_score_mod(refused)

    def raises(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        raise HostileError

    with pytest.raises(TraceError, match="HostileError"):
        trace_score_mod(raises)


def test_what_is_looked_up_by_key_is_told_from_what_is_by_row() -> None:
    table = np.ones((40, 40), np.float32)
    for by_key, function in (
        (False, mods.alibi(SLOPES)),
        (False, lambda s, b, h, q, kv: s * table[h, q] + kv),
        (True, lambda s, b, h, q, kv: s + table[q, np.where(q > 1, kv, 0)]),
        (True, lambda s, b, h, q, kv: s + table[h, np.where(s > 1, 1, 0)]),
        (False, lambda s, b, h, q, kv: s + kv),
    ):
        assert f"kLooksUpByKey = {str(by_key).lower()};" in trace_mod(function).functor


def test_the_text_is_made_of_known_words() -> None:
    words = set()
    for function in (mods.alibi(SLOPES), mods.relative_position_bias(np.ones((3, 5), np.float16))):
        words |= set(re.findall(r"[A-Za-z_]\w*", trace_mod(function).functor))
    known = {"struct", "ScoreMod", "static", "constexpr", "bool", "kIdentity", "kLooksUpByKey", "true", "false"}
    known |= {"template", "class", "Real"}
    known |= {"__device__", "__forceinline__", "apply", "score", "const", "Coord", "at", "ModArgs", "args", "sizeof"}
    known |= {"static_assert", "this", "score_mod", "is", "for", "another", "accumulator", "float", "int", "return"}
    known |= {"mods", "clamp_to", "last", "h", "q_idx", "kv_idx", "load", "Float32", "Float16", "static_cast", "long"}
    known |= {"subtract", "absolute", "multiply", "add", "minimum", "maximum", "negative", "f"}
    assert {word for word in words if not re.fullmatch(r"[van]\d+", word)} <= known
