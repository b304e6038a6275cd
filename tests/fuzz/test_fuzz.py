"""Properties that hold for every call, and random calls against the oracle.

The hypothesis profile says how many examples there are; every test here takes its share of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cupyflash
from cupyflash.testing import (
    DTYPES,
    LAYOUTS,
    Case,
    MaskSpec,
    SinkSpec,
    assert_attention_close,
    oracle,
    random_case,
)
from tests.cases import BACKENDS, examples

QUIET: dict[str, Any] = {"dropout_p": 0.0, "seed": None}  # no dropout: it depends on where a key stands
PLAIN: dict[str, Any] = {  # nothing depends on where a key or a query stands
    **QUIET,
    "is_causal": False,
    "window": None,
    "alibi_shape": None,
    "score_mod": None,
    "mask_mod": None,
}


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    return random_case(draw, **fixed)


def results(case: Case, backend: str, **other: Any) -> tuple[np.ndarray, ...]:
    arguments = case.arguments() | {"return_lse": True, "return_weights": False} | other
    return cupyflash.attention(**arguments, backend=backend)


def assert_same(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...], case: Case, backend: str) -> None:
    """Both pass the acceptance rule for the case: as close to each other as two right answers are."""
    case = replace(case, return_lse=True, return_weights=False)
    assert_attention_close(one, case, backend=backend)
    assert_attention_close(other, case, backend=backend)


def capable(backend: str, case: Case) -> bool:
    return not BACKENDS[backend].refused_features(case)


every_backend = pytest.mark.parametrize("backend", BACKENDS)


@example(  # the mask rounds at 65504, and ALiBi rounds there once more
    case=Case(
        query_shape=(1, 3, 29, 0),
        key_shape=(1, 3, 13, 0),
        value_shape=(1, 3, 13, 2),
        dtype="float16",
        masks=(MaskSpec(dtype="float16", shape=(1, 3, 29, 13), layout="contiguous", values="minimum"),),
        alibi_shape=(3,),
    )
)
@examples(20)
@given(case=cases())
def test_any_call_gives_what_the_oracle_gives(case: Case) -> None:
    for backend in BACKENDS:
        if capable(backend, case):
            case.check(backend)


@examples(2)
@given(case=cases(large=True))
def test_any_call_over_several_tiles(case: Case) -> None:
    for backend in BACKENDS:
        if capable(backend, case):
            case.check(backend)


@examples(1.5)
@given(case=cases())
def test_scores_at_every_stage(case: Case) -> None:
    for backend in BACKENDS:
        if capable(backend, case) and case.alibi_shape is case.sinks is None:
            for stage in ("raw", "modded", "capped", "biased", "softmax"):
                actual = cupyflash.attention_weights(**case.score_arguments(), stage=stage, backend=backend)
                assert_attention_close(actual, case, backend=backend, stage=stage)


@every_backend
@examples(1.5)
@given(case=cases(masks=(), **PLAIN), data=st.data())
def test_permuting_the_keys_with_their_mask_changes_nothing(backend: str, case: Case, data: st.DataObject) -> None:
    arguments = replace(case, return_weights=False).arguments()
    seqlen_k = case.key_shape[-2]
    order = data.draw(st.permutations(range(seqlen_k)))
    mask = np.random.default_rng(case.data_seed).standard_normal((case.query_shape[-2], seqlen_k))
    mask = mask.astype(np.float32)
    permuted = {name: arguments[name][..., order, :] for name in ("key", "value")} | {"attn_mask": mask[:, order]}
    for one in ({"attn_mask": mask}, permuted):
        whole = arguments | one
        assert_attention_close(cupyflash.attention(**whole, backend=backend), arguments | {"attn_mask": mask})


@every_backend
@examples(1.5)
@given(case=cases(), data=st.data())
def test_permuting_the_queries_permutes_the_rows(backend: str, case: Case, data: st.DataObject) -> None:
    case = replace(case, **PLAIN, masks=(), return_weights=False)
    arguments = case.arguments()
    order = data.draw(st.permutations(range(case.query_shape[-2])))
    out, lse = results(case, backend)
    permuted = cupyflash.attention(**arguments | {"query": arguments["query"][..., order, :]}, backend=backend)
    assert_same((out, lse), restored_rows(permuted, order), case, backend)


def restored_rows(result: tuple[np.ndarray, ...], order: list[int]) -> tuple[np.ndarray, ...]:
    back = np.argsort(np.array(order, int))
    return result[0][..., back, :], result[1][..., back]


@every_backend
@examples(1.5)
@given(case=cases(**QUIET, sinks=None, mask_mod=None, score_mod=None), cut=st.floats(0, 1))
def test_two_halves_of_the_keys_merged_equal_the_whole(backend: str, case: Case, cut: float) -> None:
    case = replace(case, dtype={"float16": "float32", "bfloat16": "float32"}.get(case.dtype, case.dtype))
    case = replace(
        case, masks=(), is_causal=False, window=None, alibi_shape=None, return_weights=False, return_lse=True
    )
    arguments = case.arguments()
    middle = round(cut * case.key_shape[-2])
    halves = [
        cupyflash.attention(
            **arguments | {name: arguments[name][..., part, :] for name in ("key", "value")}, backend=backend
        )
        for part in (slice(None, middle), slice(middle, None))
    ]
    merged = cupyflash.merge_attention(*zip(*halves, strict=True))
    assert_attention_close(merged, case, backend=backend)


@every_backend
@examples(1.5)
@given(case=cases(softcap=0.0, sinks=None), constant=st.floats(-50, 50, width=32))
def test_a_constant_added_to_all_scores_changes_lse_alone(backend: str, case: Case, constant: float) -> None:
    def added(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + constant

    case = replace(case, score_mod=None, return_weights=False)
    out, lse = results(case, backend, score_mod=added)
    shifted = case.arguments() | {"score_mod": added, "return_lse": True}
    assert_attention_close((out, lse), shifted, backend=backend)
    _, plain = results(case, backend)
    alive = np.isfinite(plain)
    np.testing.assert_allclose(lse[alive], plain[alive] + constant, rtol=1e-4, atol=1e-3)


@every_backend
@examples(1.5)
@given(case=cases(**QUIET, sinks=None))
def test_where_v_is_one_the_output_is_one(backend: str, case: Case) -> None:
    arguments = case.arguments()
    arguments["value"] = np.ones_like(arguments["value"])
    out, lse = cupyflash.attention(**arguments | {"return_lse": True, "return_weights": False}, backend=backend)
    alive = np.broadcast_to((lse != -np.inf)[..., None], out.shape)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 2e-6, "float64": 1e-14}[case.dtype]
    np.testing.assert_allclose(out.astype(np.float64), alive.astype(np.float64), atol=tolerance)


@every_backend
@examples(1.5)
@given(case=cases(**QUIET))
def test_the_output_lies_between_the_smallest_and_the_largest_value_and_zero(backend: str, case: Case) -> None:
    arguments = case.arguments()
    out, _ = results(case, backend)
    value = arguments["value"].astype(np.float64)
    slack = 1 + {"float16": 2e-3, "bfloat16": 2e-2}.get(case.dtype, 2e-6)
    if value.size:
        largest = slack * np.maximum(value.max(initial=0), 0) + 1e-6
        smallest = slack * np.minimum(value.min(initial=0), 0) - 1e-6
        assert ((out.astype(np.float64) >= smallest) & (out.astype(np.float64) <= largest)).all()
    else:
        assert not out.any()


@every_backend
@examples(1.5)
@given(case=cases(window=None), align=st.sampled_from(["top_left", "bottom_right", 3]))
def test_an_unbounded_window_is_no_window(backend: str, case: Case, align: str | int) -> None:
    case = replace(case, align=align)
    wide = case.query_shape[-2] + case.key_shape[-2] + 3
    none = results(case, backend)
    for window in ((None, None), (-1, -1), (wide, wide), (2**62, None)):
        assert_same(results(case, backend, window=window), none, case, backend)


@every_backend
@examples(1.5)
@given(case=cases(is_causal=True))
def test_causal_is_a_window_without_a_right_side_and_a_triangle_as_mask(backend: str, case: Case) -> None:
    case = replace(case, window=None, masks=())
    seqlen_q, seqlen_k = case.query_shape[-2], case.key_shape[-2]
    align = case.align
    shift = align if isinstance(align, int) else seqlen_k - seqlen_q if align == "bottom_right" else 0
    triangle = np.arange(seqlen_k) <= np.arange(seqlen_q)[:, None] + shift
    expected = results(case, backend)
    free = replace(case, is_causal=False)
    assert_same(results(free, backend, window=(None, 0)), expected, case, backend)
    assert_same(results(free, backend, attn_mask=triangle), expected, case, backend)


@every_backend
@examples(1.5)
@given(case=cases(**QUIET), data=st.data())
def test_nan_in_a_removed_key_does_not_leak(backend: str, case: Case, data: st.DataObject) -> None:
    seqlen_k = case.key_shape[-2]
    if seqlen_k == 0:
        return
    hidden = data.draw(st.integers(0, seqlen_k - 1))
    bad = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    case = replace(case, masks=(), layouts=(case.layouts[0], "contiguous", case.layouts[2]))
    mask = np.arange(seqlen_k) != hidden
    arguments = case.arguments() | {"attn_mask": mask}
    clean = cupyflash.attention(**arguments, backend=backend)
    arguments["key"][..., hidden, :] = bad
    spoilt = cupyflash.attention(**arguments, backend=backend)
    assert_attention_close(spoilt, arguments, backend=backend)
    for one, other in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(other))


@every_backend
@examples(1.5)
@given(
    case=cases(),
    layouts=st.tuples(*[st.sampled_from([x for x in LAYOUTS if x[:3] not in ("rep", "ove")])] * 3),
)
def test_strides_change_nothing(backend: str, case: Case, layouts: tuple[str, str, str]) -> None:
    case = replace(case, layouts=("contiguous",) * 3)
    assert_same(results(replace(case, layouts=layouts), backend), results(case, backend), case, backend)


@every_backend
@examples(1.5)
@given(case=cases(enable_gqa=False, mask_mod=None, score_mod=None), data=st.data())
def test_a_slice_of_the_batch_gives_a_slice_of_the_result(backend: str, case: Case, data: st.DataObject) -> None:
    case = replace(case, **QUIET, masks=(), sinks=None, alibi_shape=None, return_weights=False)
    if not case.batch_shape:
        return
    arguments = case.arguments()
    lead = case.batch_shape
    whole = {x: np.broadcast_to(arguments[x], lead + arguments[x].shape[-2:]) for x in ("query", "key", "value")}
    index = tuple(data.draw(st.integers(0, n - 1)) for n in lead)
    out, lse = results(case, backend)
    part = cupyflash.attention(**arguments | {name: x[index] for name, x in whole.items()}, backend=backend)
    truth = arguments | {name: x[index] for name, x in whole.items()}
    assert_attention_close(part, truth, backend=backend)
    assert_attention_close((out[index], lse[index]), truth, backend=backend)


@every_backend
@examples(1.5)
@given(case=cases(enable_gqa=False, mask_mod=None, score_mod=None), data=st.data())
def test_permuting_the_heads_permutes_the_result(backend: str, case: Case, data: st.DataObject) -> None:
    case = replace(case, **QUIET, masks=(), alibi_shape=None, return_weights=False)
    if not case.batch_shape:
        return
    arguments = case.arguments()
    lead = case.batch_shape
    order = data.draw(st.permutations(range(lead[-1])))
    names = ("query", "key", "value")
    permuted = {x: np.broadcast_to(arguments[x], lead + arguments[x].shape[-2:])[..., order, :, :] for x in names}
    if arguments["sinks"] is not None:
        permuted["sinks"] = arguments["sinks"][order]
    out, lse = results(case, backend)
    result = cupyflash.attention(**arguments | permuted, backend=backend)
    back = np.argsort(order)
    assert_same((result[0][..., back, :, :], result[1][..., back, :]), (out, lse), case, backend)


@every_backend
@examples(1.5)
@given(case=cases(), layout=st.sampled_from(["fresh", "swapped", "strided", "reversed"]))
def test_out_is_what_would_have_been_returned(backend: str, case: Case, layout: str) -> None:
    expected = results(case, backend)
    shape = expected[0].shape
    dtype = DTYPES[case.dtype]
    out = np.full(shape, 7, dtype)
    if layout == "swapped":
        out = np.full((*shape[:-2], shape[-1], shape[-2]), 7, dtype).swapaxes(-1, -2)
    elif layout == "strided":
        out = np.full([2 * n for n in shape], 7, dtype)[(slice(1, None, 2),) * len(shape)]
    elif layout == "reversed":
        out = out[(slice(None, None, -1),) * len(shape)]
    actual = results(case, backend, out=out)
    assert actual[0] is out
    assert [x.tobytes() for x in actual] == [x.tobytes() for x in expected]


@examples(1.5)
@given(case=cases(dropout_p=0.5), seed=st.integers(0, 2**64 - 1), p=st.floats(0.01, 0.99))
def test_the_dropout_mask_is_the_same_on_every_backend(case: Case, seed: int, p: float) -> None:
    case = replace(case, dropout_p=p, seed=seed, return_weights=True)
    shape = (*case.batch_shape, case.query_shape[-2], case.key_shape[-2])
    kept = cupyflash.dropout_mask(shape, p, seed)
    assert kept.shape == shape
    for backend in BACKENDS:
        weights = cupyflash.attention(**case.arguments(), backend=backend)[-1]
        assert not weights[~kept].any()
        assert_attention_close(cupyflash.attention(**case.arguments(), backend=backend), case, backend=backend)


@every_backend
@examples(1.5)
@given(case=cases())
def test_the_same_call_gives_the_same_bits_and_leaves_its_inputs(backend: str, case: Case) -> None:
    arguments = case.arguments()
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    before = {name: x.tobytes() for name, x in arrays.items()}
    first, second = (cupyflash.attention(**arguments, backend=backend) for _ in range(2))
    assert [x.tobytes() for x in first] == [x.tobytes() for x in second]
    assert {name: x.tobytes() for name, x in arrays.items()} == before


@every_backend
@examples(1.5)
@given(case=cases(enable_gqa=True, dropout_p=0.0))
def test_grouped_heads_are_repeated_heads(backend: str, case: Case) -> None:
    case = replace(case, seed=None, return_weights=False)
    arguments = case.arguments()
    heads = case.query_shape[-3]
    repeated = {
        name: np.repeat(arguments[name], heads // arguments[name].shape[-3], axis=-3) for name in ("key", "value")
    }
    expected = results(case, backend)
    actual = cupyflash.attention(**arguments | repeated | {"enable_gqa": False, "return_lse": True}, backend=backend)
    assert_same(actual, expected, case, backend)


@examples(1.5)
@given(case=cases())
def test_a_case_prints_itself(case: Case) -> None:
    names = {"Case": Case, "MaskSpec": MaskSpec, "SinkSpec": SinkSpec}
    assert eval(repr(case), names) == case, "the text of a case must build the case"
    one, other = case.arguments(), case.arguments()
    for name, x in one.items():
        if isinstance(x, np.ndarray):
            assert x.tobytes() == other[name].tobytes()


@examples(0.5)
@given(case=cases(dropout_p=0.0))
def test_the_oracle_weighs_by_a_distribution(case: Case) -> None:
    arguments = replace(case, sinks=None, seed=None).arguments()
    truth = oracle(**{name: x for name, x in arguments.items() if not name.startswith("return_")})
    total = truth.weights.sum(axis=-1)
    np.testing.assert_allclose(total, np.where(truth.lse == -np.inf, 0, 1), atol=1e-12)
