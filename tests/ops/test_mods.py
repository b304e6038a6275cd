"""score_mod and mask_mod in kernels: what they compute, through `attention`, is what NumPy computes.

The functor by itself, operation by operation, is the matter of tests/kernels/test_mods.py, and results by the rule of
acceptance that of the cases of test_attention.py.  Here are bits: kernels that differ in how they came by a score are
given the same scores.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import cupyflash
from cupyflash import mods
from cupyflash.backends import emulated, emulator
from cupyflash.build.rendering import render_kernel
from cupyflash.plan.specs import KernelSpec
from cupyflash.testing import DTYPES, Case
from tests.cases import heads, on_kernel_backends
from tests.kernels.mods import called_mask
from tests.kernels.trees import called_scores, integers, mask_mod_of, masks, reals, score_mod_of
from tests.ops.test_attention import run
from tests.unit.test_trace import HOSTILE, HostileEnum, HostileFloat, HostileInt

pytestmark = [pytest.mark.usefixtures("cxx"), pytest.mark.runs_on_kernels]

LENGTHS = (2, 3, 70, 150)
DEAD = -np.inf

on_dtypes = pytest.mark.parametrize("dtype", DTYPES)
dtypes = st.sampled_from(list(DTYPES))
# An example compiles three kernels.
quick = settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@functools.cache
def given_arrays(dtype: str) -> dict[str, Any]:
    arguments = heads(*LENGTHS, 8, dtype=dtype, return_lse=False).arguments()
    return {name: arguments[name] for name in ("query", "key", "value")}


def attention(dtype: str, backend: str, **more: Any) -> np.ndarray:
    out: np.ndarray = cupyflash.attention(**given_arrays(dtype), **more, backend=backend)
    return out


def scores(stage: str, dtype: str, backend: str, **more: Any) -> np.ndarray:
    query, key, _ = given_arrays(dtype).values()
    found: np.ndarray = cupyflash.attention_weights(query, key, stage=stage, **more, backend=backend)
    return found


def looked_up(table: np.ndarray) -> Any:
    """What a function computes, as an array."""
    return lambda b, h, q_idx, kv_idx: table[b, h, q_idx, kv_idx]


# --- random expressions ----------------------------------------------------------------------------------


@pytest.mark.slow
@on_kernel_backends
@quick
@given(tree=masks, dtype=dtypes)
@example(tree=lambda at: (at["q_idx"] // 64 + at["kv_idx"] // 64 + at["b"]) % 3 == 0, dtype="float16")
def test_random_masks_remove_the_same_keys(tree: Any, dtype: str, backend: str) -> None:
    mask_mod = mask_mod_of(tree)
    with np.errstate(all="ignore"):
        keep = called_mask(mask_mod, LENGTHS)
    np.testing.assert_array_equal(scores("biased", dtype, backend, mask_mod=mask_mod) != DEAD, keep)
    by_table = attention(dtype, backend, mask_mod=looked_up(keep))
    np.testing.assert_array_equal(attention(dtype, backend, mask_mod=mask_mod), by_table)


@pytest.mark.slow
@on_kernel_backends
@quick
@given(tree=reals, dtype=dtypes)
def test_random_scores_are_those_of_numpy(tree: Any, dtype: str, backend: str) -> None:
    score_mod = score_mod_of(tree)
    expected = called_scores(score_mod, scores("raw", dtype, backend))
    assume(not np.isnan(expected).all())
    np.testing.assert_array_equal(scores("modded", dtype, backend, score_mod=score_mod), expected)


@pytest.mark.slow
@on_kernel_backends
@quick
@given(tree=integers, dtype=dtypes)
def test_random_biases_are_those_of_numpy(tree: Any, dtype: str, backend: str) -> None:
    """Of the forward kernels: they are given the same numbers from an array."""
    bias = score_mod_of(lambda at: (tree(at) % 1024).astype(np.float32) * np.float32(1 / 64))
    table = called_scores(bias, np.zeros(LENGTHS, np.float32))
    computed = attention(dtype, backend, score_mod=lambda score, *at: score + bias(score, *at))
    by_table = attention(dtype, backend, score_mod=lambda score, *at: score + looked_up(table)(*at))
    np.testing.assert_array_equal(computed, by_table)


# --- what a function is given ----------------------------------------------------------------------------


@on_kernel_backends
@on_dtypes
def test_what_a_score_mod_is_given(dtype: str, backend: str) -> None:
    """2 × 3 batches, flattened; query heads; queries from 0 whatever the alignment.  It is called once."""
    called = []

    def place(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        called.append((score.dtype, kv_idx.dtype))
        return ((b * 6 + h) * 4 + q_idx) * 5 + kv_idx + 0 * score

    case = Case(
        query_shape=(2, 1, 6, 4, 8), key_shape=(1, 3, 2, 5, 8), value_shape=(3, 5, 8), enable_gqa=True, dtype=dtype
    )
    arguments = case.arguments()
    query, key = arguments["query"], arguments["key"]
    found = cupyflash.attention_weights(
        query, key, stage="modded", enable_gqa=True, align="bottom_right", score_mod=place, backend=backend
    )
    np.testing.assert_array_equal(found, np.arange(2 * 3 * 6 * 4 * 5).reshape(2, 3, 6, 4, 5))
    assert called == [(np.float64 if dtype == "float64" else np.float32, np.int64)]


# --- expressions of awkward shapes -----------------------------------------------------------------------


@on_kernel_backends
@on_dtypes
def test_deep_and_shared_expressions(dtype: str, backend: str) -> None:
    """Three hundred levels, each of which uses the one before twice: 2³⁰⁰ operations, were they not shared."""

    def halves(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for _ in range(300):
            score = score * 0.5 + score * 0.5
        return score

    same = attention(dtype, backend, score_mod=lambda score, b, h, q_idx, kv_idx: score)
    np.testing.assert_array_equal(attention(dtype, backend, score_mod=halves), same)


CONSTANTS = [
    *(True, 3, -3, 0.1, 2**40, np.bool_(True), np.int8(-3), np.uint8(200), np.int16(-300), np.uint16(60000)),
    *(np.int32(-70000), np.uint32(2**31 + 1), np.int64(2**35), np.uint64(2**50), np.float32(0.1), np.float64(0.1)),
    *(np.array(7, np.int16), np.array(0.1), np.float16(0.1)),
]


@on_kernel_backends
@on_dtypes
def test_constants_of_every_type(dtype: str, backend: str) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        for i, constant in enumerate(CONSTANTS):
            score = np.where(kv_idx % 32 == i, score + 2.0**-10 * np.sqrt(abs(constant * np.float32(1))), score)
        return score

    run(given_arrays(dtype), backend, score_mod=score_mod)


@on_kernel_backends
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_array_is_read_up_to_its_edges_and_not_beyond(dtype: str, backend: str) -> None:
    """One element less is refused; the keys and queries that fill up a tile are looked up too, but within the array."""
    batch, num_heads, seqlen_q, seqlen_k = LENGTHS
    indices: dict[str, tuple[int, Callable[..., Any]]] = {
        "kv_idx": (seqlen_k, lambda b, h, q, kv: kv),
        "-1 - kv_idx": (seqlen_k, lambda b, h, q, kv: -1 - kv),
        "q_idx - kv_idx + S - 1": (seqlen_q + seqlen_k - 1, lambda b, h, q, kv: q - kv + (seqlen_k - 1)),
        "(b · H + h) · L + q_idx": (
            batch * num_heads * seqlen_q,
            lambda b, h, q, kv: (b * num_heads + h) * seqlen_q + q,
        ),
    }
    for index, (size, at) in indices.items():
        table = emulator.guarded_copy(np.linspace(-1, 1, size, dtype=np.float32), index)
        run(given_arrays(dtype), backend, score_mod=lambda s, *c, t=table, at=at: s + t[at(*c)])
        with pytest.raises(cupyflash.Unsupported, match=f"size {size - 1}; keep the index inside") as caught:
            attention(dtype, backend, score_mod=lambda s, *c, t=table[1:], at=at: s + t[at(*c)])
        assert f"{__file__}:" in str(caught.value)


@on_kernel_backends
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_empty_arrays(dtype: str, backend: str) -> None:
    empty = np.zeros(0, np.float32)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + empty[kv_idx]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return empty[kv_idx] == 0

    for lengths in ((0, 0), (5, 0)):
        arguments = heads(2, 3, *lengths, 8, dtype=dtype).arguments()
        out, _ = run(arguments, backend, score_mod=score_mod, mask_mod=mask_mod)
        assert not out.any()
    for keyword in ({"score_mod": score_mod}, {"mask_mod": mask_mod}):
        with pytest.raises(cupyflash.Unsupported, match="size 0"):
            attention(dtype, backend, **keyword)


# --- from call to call -----------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """The kernels that are compiled, or taken from the cache on disk, while this test runs."""
    met: list[KernelSpec] = []
    plain = emulated._kernel.__wrapped__
    monkeypatch.setattr(emulated, "_kernel", functools.cache(lambda spec: met.append(spec) or plain(spec)))
    return met


@on_kernel_backends
def test_equal_expressions_are_one_kernel(backend: str, compiled: list[KernelSpec]) -> None:
    """Whichever arrays and numbers they are of, and whatever they are called."""

    def another_name(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        weaker = table[c]
        return a - weaker * abs(d - e) * 0.75

    table = np.ones((5, 2), np.float64)[:, 0].astype(np.float32)

    def decay(slope: float) -> Any:
        slopes = np.float32(slope) * np.arange(3, dtype=np.float32)
        return lambda s, b, h, q, kv: s - slopes[h] * abs(q - kv) * slope

    functions = [decay(0.1), decay(0.2), decay(0.3), another_name]
    for window, function in zip((20, 30, 40, 50), functions, strict=True):
        run(given_arrays("float16"), backend, score_mod=function, mask_mod=mods.sliding_window(window))
    assert sorted(spec.family for spec in compiled) == ["fwd_sm80", "mod_summary"]
    # Another structure is another kernel; for the mask there is still the one.
    run(given_arrays("float16"), backend, score_mod=mods.tanh_softcap(2.0), mask_mod=mods.sliding_window(60))
    assert sorted(spec.family for spec in compiled) == ["fwd_sm80", "fwd_sm80", "mod_summary"]


@on_kernel_backends
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_arrays_are_read_at_each_call(dtype: str, backend: str) -> None:
    slopes, document = np.array([1, 2, 3], np.float32), np.arange(150) // 40
    score_mod, mask_mod = mods.alibi(slopes), mods.document_mask(document)
    before = run(given_arrays(dtype), backend, score_mod=score_mod, mask_mod=mask_mod)
    slopes /= 50
    document[:] = np.arange(150) // 70
    after = run(given_arrays(dtype), backend, score_mod=score_mod, mask_mod=mask_mod)
    assert (before != after).any()


@on_kernel_backends
def test_arrays_are_let_go_after_the_call(backend: str) -> None:
    """Those of a function that is no more are gone, and another function of that structure has its own."""
    results, gone = [], []
    for sign in (1, -1, 1):
        slopes = sign * np.array([1, 2, 3], np.float32)
        results.append(attention("float32", backend, score_mod=mods.alibi(slopes)))
        gone.append(weakref.ref(slopes))
        del slopes
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)
    np.testing.assert_array_equal(results[0], results[2])
    assert (results[0] != results[1]).any()


@on_kernel_backends
def test_threads_with_functions_of_their_own(backend: str) -> None:
    def call(which: int) -> bytes:
        slopes = np.full(3, which / 16, np.float32)
        score_mod = mods.alibi(slopes) if which % 2 else mods.soft_clipping(1.0 + which)
        arguments = heads(1, 2, 20, 150, 8, return_lse=False).arguments()
        arguments |= {"score_mod": score_mod, "mask_mod": mods.sliding_window(10 * which)}
        return cupyflash.attention(**arguments, backend=backend).tobytes()

    serial = [call(which) for which in range(1, 7)]
    assert len(set(serial)) == 6
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, [*range(1, 7), *range(6, 0, -1)])) == serial + serial[::-1]


# --- what can't be traced --------------------------------------------------------------------------------


def has_a_branch(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score if kv_idx <= q_idx else -np.inf


def changes_in_place(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    score += 0.1 * kv_idx
    return score


def raises(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    raise KeyError("of the user")


@on_kernel_backends
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (has_a_branch, r"\(kv_idx <= q_idx\) decides an `if`"),
        (changes_in_place, r"changed in place; write x = x \+ y"),
        (raises, "it raised KeyError: 'of the user'"),
    ],
)
def test_a_refusal_has_the_line_and_the_way_out(function: Any, words: str, backend: str) -> None:
    with pytest.raises(cupyflash.Unsupported, match=words) as caught:
        attention("float16", backend, score_mod=function)
    line = function.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}" in str(caught.value)
    assert 'backend="math"' in str(caught.value)
    assert caught.value.reasons[backend] == (str(caught.value),)
    assert isinstance(caught.value.__cause__, KeyError) == (function is raises)


# --- nothing of the user reaches the compiler ------------------------------------------------------------

ARRAY = np.array([1.0, 0.5, 0.25], np.float32)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.just(HOSTILE)


def specs_of(function: Any, backend: str) -> list[KernelSpec]:
    """The kernels that a call with this score_mod would compile; none is."""
    met: list[KernelSpec] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulated, "_run", lambda launch, args: met.append(launch.spec))
        attention("float16", backend, score_mod=function)
    return met


@on_kernel_backends
@settings(max_examples=50, deadline=None)
@given(
    named=st.tuples(names, names, names, names, names),
    number=st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.just(5),
    hostile=st.booleans(),
)
def test_names_and_objects_are_not_in_the_text(
    named: tuple[str, ...], number: Any, hostile: bool, backend: str
) -> None:
    """Names of functions, files, variables and keys, and numbers that speak: the text is that of plain ones."""
    name, file, variable, key, document = named
    reference = specs_of(lambda s, b, h, q, kv: s * number + ARRAY[h], backend)
    spoken = number
    if hostile:
        spoken = (HostileInt if isinstance(number, int) else HostileFloat)(number)
        if number == HostileEnum.VALUE and isinstance(number, int):
            spoken = HostileEnum.VALUE
    tables = {key: ARRAY}

    def function(s: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return s * spoken + tables[key][h]

    function.__name__ = function.__qualname__ = name
    function.__doc__, function.__module__ = document, name
    function.__code__ = function.__code__.replace(
        co_name=name, co_filename=file, co_varnames=(variable, *function.__code__.co_varnames[1:])
    )
    found = specs_of(function, backend)
    assert [render_kernel(spec).text for spec in found] == [render_kernel(spec).text for spec in reference]
    assert [str(spec) for spec in found] == [str(spec) for spec in reference]
