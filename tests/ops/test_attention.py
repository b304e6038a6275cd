"""What attention gives: one body for every backend, by the table of cases and by what a table cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import registry
from cupyflash.testing import DTYPES, LAYOUTS, Case, MaskSpec, SinkSpec, assert_attention_close, oracle
from tests.cases import (
    CAPABILITIES,
    CASES,
    DROPOUT,
    SCORE_ARGUMENTS,
    SHAPES,
    Capabilities,
    heads,
    on_every_backend,
    on_general_backends,
    shapes,
    single,
)


def run(arguments: dict[str, Any], backend: str, **more: Any) -> Any:
    """The result, which has passed the acceptance rule."""
    arguments = {**arguments, **more}
    result = cupyflash.attention(**arguments, backend=backend)
    assert_attention_close(result, arguments, backend=backend)
    return result


def operands(
    *shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, magnitude: float = 1.0
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(magnitude * rng.standard_normal(s)).astype(DTYPES[dtype]) for s in shape]


def named(query: np.ndarray, key: np.ndarray, value: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"query": query, "key": key, "value": value, **more}


def check(case: Case, backend: str, capabilities: Capabilities) -> None:
    """The backend answers the case rightly, or refuses what it says that it refuses."""
    if capabilities.refused_features(case):
        with pytest.raises(cupyflash.Unsupported) as refusal:
            cupyflash.attention(**case.arguments(), backend=backend)
        assert refusal.value.reasons[backend]
    else:
        case.check(backend)


@pytest.mark.runs_on_kernels
@on_every_backend
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, backend: str) -> None:
    check(CASES[name], backend, CAPABILITIES[backend])


class WithoutSoftcap:
    """Somebody else's backend."""

    def reasons(self, problem: Any) -> list[str]:
        return ["it has no softcap"] if problem.softcap else []

    def run(self, problem: Any, buffers: Any) -> None:
        registry._backends["math"].run(problem, buffers)


def test_a_backend_of_somebody_else_joins_by_a_row_that_says_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    cupyflash.register_backend("foreign", WithoutSoftcap())
    plain, capped = SCORE_ARGUMENTS["scale-2"], SCORE_ARGUMENTS["softcap-5"]
    row = Capabilities(refuses=frozenset({"softcap"}))
    check(plain, "foreign", row)
    check(capped, "foreign", row)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(capped, "math", row)
    with pytest.raises(cupyflash.Unsupported):
        check(capped, "foreign", Capabilities())


# ------------------------------------------------------------------------------------------------------------
# What is returned
# ------------------------------------------------------------------------------------------------------------


@on_every_backend
def test_extra_results_follow_the_output_in_the_order_lse_weights(backend: str) -> None:
    case = heads(2, 3, 4, 5)
    arguments = {name: x for name, x in case.arguments().items() if name not in ("return_lse", "return_weights")}
    alone = run(arguments, backend)
    assert isinstance(alone, np.ndarray)
    lse = run(arguments, backend, return_lse=True)
    weights = run(arguments, backend, return_weights=True)
    both = run(arguments, backend, return_lse=True, return_weights=True)
    assert [x.shape for x in lse] == [(2, 3, 4, 16), (2, 3, 4)]
    assert [x.shape for x in weights] == [(2, 3, 4, 16), (2, 3, 4, 5)]
    assert [x.shape for x in both] == [(2, 3, 4, 16), (2, 3, 4), (2, 3, 4, 5)]


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_the_results(dtype: str, backend: str) -> None:
    case = heads(1, 2, 4, 5, dtype=dtype, return_weights=True)
    out, lse, weights = cupyflash.attention(**case.arguments(), backend=backend)
    accumulator = "float64" if dtype == "float64" else "float32"
    assert (out.dtype, lse.dtype, weights.dtype) == (DTYPES[dtype], DTYPES[accumulator], DTYPES[dtype])


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_not_written_and_results_share_no_memory_with_them(layout: str, dtype: str, backend: str) -> None:
    case = heads(
        2,
        3,
        4,
        5,
        8,
        dtype=dtype,
        layouts=(layout, layout, layout),
        masks=(MaskSpec("float32", (2, 3, 4, 5), layout), MaskSpec("bool", (2, 1, 4, 5), layout)),
        alibi_shape=(3,),
        sinks=SinkSpec(),
        return_weights=True,
    )
    arguments = case.arguments()
    given = [x for x in arguments.values() if isinstance(x, np.ndarray)] + list(arguments["attn_mask"])
    before = [x.tobytes() for x in given]
    results = cupyflash.attention(**arguments, backend=backend)
    assert [x.tobytes() for x in given] == before
    assert not any(np.may_share_memory(result, x) for result in results for x in given)


@on_every_backend
def test_one_key_gives_a_copy_of_v_not_v_itself(backend: str) -> None:
    query, key, value = operands((2, 1, 8), (2, 1, 8), (2, 1, 8))
    out = run(named(query, key, value), backend)
    assert not np.may_share_memory(out, value)
    out[...] = 0
    assert value.all()


@on_every_backend
@pytest.mark.parametrize("name", ["all-at-once-over-tiles", "many-tiny-heads", "decode-float16", "gqa-over-tiles"])
def test_the_same_call_gives_the_same_bits(name: str, backend: str) -> None:
    arguments = CASES[name].arguments()
    first = cupyflash.attention(**arguments, backend=backend)
    for _ in range(3):
        again = cupyflash.attention(**arguments, backend=backend)
        assert [x.tobytes() for x in again] == [x.tobytes() for x in first]


# ------------------------------------------------------------------------------------------------------------
# out=
# ------------------------------------------------------------------------------------------------------------


def swapped_heads(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A (B, H, L, E) view of a (B, L, H, E) array."""
    batch, num_heads, seqlen, head_dim = shape
    return np.full((batch, seqlen, num_heads, head_dim), np.nan, dtype).swapaxes(1, 2)


def every_second(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.full([2 * n for n in shape], np.nan, dtype)[::2, 1::2, ::2, ::-2]


def transposed(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.full((*shape[:-2], shape[-1], shape[-2]), np.nan, dtype).swapaxes(-1, -2)


def unaligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.ndarray(shape, dtype, buffer=bytearray(int(np.prod(shape)) * dtype.itemsize + 1), offset=1)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [np.empty, swapped_heads, every_second, transposed, unaligned])
def test_out_is_filled_and_returned(layout: Callable[..., np.ndarray], dtype: str, backend: str) -> None:
    shape = (2, 3, 70, 8)
    arguments = heads(2, 3, 70, 90, 8, dtype=dtype, is_causal=True).arguments()
    out = layout(shape, DTYPES[dtype])
    result, lse = run(arguments, backend, out=out)
    assert result is out
    fresh, fresh_lse = run(arguments, backend)
    assert (out.tobytes(), lse.tobytes()) == (fresh.tobytes(), fresh_lse.tobytes())


@on_every_backend
def test_out_leaves_what_lies_between_its_elements(backend: str) -> None:
    arguments = heads(2, 3, 6, 9, 8, return_lse=False).arguments()
    buffer = np.full((2, 3, 6, 16), 7, np.float32)
    run(arguments, backend, out=buffer[..., ::2])
    assert (buffer[..., 1::2] == 7).all()


@on_every_backend
def test_out_may_interleave_with_an_input_without_sharing_elements(backend: str) -> None:
    buffer = np.zeros((2, 3, 6, 16), np.float32)
    arguments = heads(2, 3, 6, 6, 8, return_lse=False).arguments()
    buffer[..., ::2] = arguments["query"]
    arguments["query"], out = buffer[..., ::2], buffer[..., 1::2]
    expected = cupyflash.attention(**arguments, backend=backend)
    assert run(arguments, backend, out=out) is out
    assert out.tobytes() == expected.tobytes()


@on_every_backend
@pytest.mark.parametrize("name", ["no-keys", "no-queries", "no-heads", "value-dim-0", "one-key"])
def test_out_of_empty_problems(name: str, backend: str) -> None:
    case = SHAPES[name]
    out = np.full((*case.batch_shape, case.query_shape[-2], case.value_shape[-1]), np.nan, np.float32)
    result = run(case.arguments(), backend, out=out)
    assert result[0] is out


@on_every_backend
def test_out_of_rows_that_see_nothing_is_zeroed(backend: str) -> None:
    out = np.full((1, 5, 8), np.nan, np.float32)
    run(single(5, 7, 8, mask_mod="nothing").arguments(), backend, out=out)
    assert not out.any()


# ------------------------------------------------------------------------------------------------------------
# NaN, infinities, and numbers near the ends of the range
# ------------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 7), (300, 1100), (1, 1100)])
def test_nan_in_a_query_spoils_its_row_only(seqlen_q: int, seqlen_k: int, dtype: str, backend: str) -> None:
    arguments = heads(2, 2, seqlen_q, seqlen_k, 8, dtype=dtype).arguments()
    arguments["query"][1, 0, seqlen_q // 2, 3] = np.nan
    out, _ = run(arguments, backend)
    rows = np.isnan(out.astype(np.float64)).all(axis=-1)
    assert np.argwhere(rows).tolist() == [[1, 0, seqlen_q // 2]]


@on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_k", [7, 1100])
def test_non_finite_operands(seqlen_k: int, dtype: str, operand: str, bad: float, backend: str) -> None:
    arguments = heads(1, 2, 6, seqlen_k, 8, dtype=dtype, magnitude=0.3).arguments()
    arguments[operand][0, 1, 4, 2] = bad
    run(arguments, backend)


REMOVALS: dict[str, Callable[[int, int, int], dict[str, Any]]] = {
    # How key `hidden` is removed for the queries below 4 (all of them where the removal has no rows).
    "bool mask": lambda n, m, hidden: {"attn_mask": np.arange(m) != hidden},
    "bool mask with rows": lambda n, m, hidden: {"attn_mask": (np.arange(m) != hidden) | (np.arange(n)[:, None] >= 4)},
    "float mask": lambda n, m, hidden: {"attn_mask": np.where(np.arange(m) == hidden, -np.inf, 0.5).astype(np.float32)},
    "float mask with rows": lambda n, m, hidden: {
        "attn_mask": np.where((np.arange(m) == hidden) & (np.arange(n)[:, None] < 4), -np.inf, 0.5).astype(np.float32)
    },
    "bool mask of a pair": lambda n, m, hidden: {"attn_mask": (np.ones((n, m), np.float32), np.arange(m) != hidden)},
    "causal": lambda n, m, hidden: {"is_causal": True, "align": hidden - 4},
    "window": lambda n, m, hidden: {"window": (None, 0), "align": hidden - 4},
    "window on the left": lambda n, m, hidden: {"window": (0, None), "align": hidden + 1},
    "mask_mod": lambda n, m, hidden: {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx != hidden},
    "score_mod": lambda n, m, hidden: {
        "score_mod": lambda score, b, h, q_idx, kv_idx: np.where(kv_idx == hidden, -np.inf, score)
    },
    "score_mod under softcap": lambda n, m, hidden: {
        "score_mod": lambda score, b, h, q_idx, kv_idx: np.where(kv_idx == hidden, -np.inf, score),
        "softcap": 3.0,
    },
}


@on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", REMOVALS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "hidden"), [(6, 9, 5), (40, 1100, 3), (40, 1100, 1050), (1, 9, 5)])
def test_a_removed_key_does_not_leak(
    seqlen_q: int, seqlen_k: int, hidden: int, how: str, bad: float, backend: str
) -> None:
    arguments = heads(1, 2, seqlen_q, seqlen_k, 8).arguments()
    arguments |= REMOVALS[how](seqlen_q, seqlen_k, hidden)
    arguments["key"][..., hidden, :] = bad
    out, lse = run(arguments, backend)
    assert np.isfinite(out[..., :4, :]).all()
    assert not np.isnan(lse[..., :4]).any()


@on_every_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("how", ["bool mask with rows", "float mask", "causal", "mask_mod"])
def test_a_removed_key_does_not_leak_in_other_dtypes(how: str, dtype: str, backend: str) -> None:
    arguments = heads(1, 2, 6, 600, 8, dtype=dtype).arguments() | REMOVALS[how](6, 600, 5)
    arguments["key"][..., 5, 0] = np.nan
    out, _ = run(arguments, backend)
    assert np.isfinite(out[..., :4, :].astype(np.float64)).all()


@on_every_backend
@pytest.mark.parametrize("how", REMOVALS)
def test_v_at_a_removed_key_may_be_anything_in_its_own_column_alone(how: str, backend: str) -> None:
    arguments = heads(1, 2, 4, 9, 8).arguments() | REMOVALS[how](4, 9, 5)
    arguments["value"][..., 5, 2] = np.nan
    out, lse = run(arguments, backend)
    assert np.isfinite(np.delete(out, 2, axis=-1)).all()
    assert not np.isnan(lse).any()


@on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("seqlen_k", "spoilt"), [(9, 2), (1100, 1050)])
def test_nan_or_infinity_in_a_float_mask_spoils_its_row_only(
    seqlen_k: int, spoilt: int, bad: float, backend: str
) -> None:
    mask = np.zeros((6, seqlen_k), np.float32)
    mask[3, spoilt] = bad
    out, lse = run(heads(1, 2, 6, seqlen_k, 8).arguments(), backend, attn_mask=mask)
    assert np.isnan(out).all(axis=-1).tolist() == [[[i == 3 for i in range(6)]] * 2]
    assert np.isfinite(np.delete(lse, 3, axis=-1)).all()


@on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_infinity_in_a_float_mask_at_a_removed_key_is_ignored(bad: float, backend: str) -> None:
    mask = np.zeros((6, 9), np.float32)
    mask[3, 7] = bad
    out, _ = run(heads(1, 2, 6, 9, 8).arguments(), backend, attn_mask=mask, is_causal=True)
    assert np.isfinite(out).all()
    visible = np.ones((6, 9), bool)
    visible[3, 7] = False
    out, _ = run(heads(1, 2, 6, 9, 8).arguments(), backend, attn_mask=(mask, visible))
    assert np.isfinite(out).all()


@on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("how", ["mask_mod", "score_mod", "score_mod under softcap", "window on the left"])
def test_nan_or_infinity_in_a_float_mask_does_not_undo_a_removal(how: str, bad: float, backend: str) -> None:
    mask = np.where(np.arange(9) == 5, bad, 0.5).astype(np.float32)
    arguments = heads(1, 2, 4, 9, 8).arguments() | REMOVALS[how](4, 9, 5)
    out, lse = run(arguments, backend, attn_mask=mask)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()


@on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_minus_infinity_in_a_float_mask_removes_over_any_score(bad: float, backend: str) -> None:
    arguments = heads(1, 1, 4, 9, 8).arguments()
    arguments["key"][0, 0, 6, 0] = bad
    arguments["query"][..., 0] = 1
    mask = np.where(np.arange(9) == 6, -np.inf, 0).astype(np.float32)
    out, _ = run(arguments, backend, attn_mask=mask)
    assert np.isfinite(out).all()


DEAD = {
    "bool mask": {"attn_mask": np.zeros((6, 9), bool)},
    "0-d bool mask": {"attn_mask": np.zeros((), bool)},
    "float mask": {"attn_mask": np.full(9, -np.inf, np.float32)},
    "causal": {"is_causal": True, "align": -6},
    "window": {"window": (2, 2), "align": 100},
    "mask_mod": {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx > 100},
    "score_mod": {"score_mod": lambda score, b, h, q_idx, kv_idx: np.full_like(score, -np.inf)},
    "score_mod under softcap": {
        "score_mod": lambda score, b, h, q_idx, kv_idx: np.full_like(score, -np.inf),
        "softcap": 2.0,
    },
}


@on_every_backend
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("how", DEAD)
def test_a_row_that_sees_nothing_is_zero_even_where_q_is_nan(how: str, with_sinks: bool, backend: str) -> None:
    arguments = heads(2, 3, 6, 9, 8, return_weights=True).arguments() | DEAD[how]
    arguments["query"][:, :, 1] = np.nan
    sinks = np.array([0.5, -np.inf, 300.0], np.float32) if with_sinks else None
    out, lse, weights = run(arguments, backend, sinks=sinks)
    assert not out.any()
    assert not weights.any()
    expected = sinks if with_sinks else np.full(3, -np.inf, np.float32)
    np.testing.assert_array_equal(lse, np.broadcast_to(expected[:, None], lse.shape))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_whose_computed_scores_are_all_minus_infinity_is_zero(dtype: str, backend: str) -> None:
    query, key, value = operands((1, 3, 4), (1, 9, 4), (1, 9, 4), dtype=dtype)
    key[...] = -abs(key) - 1
    query[...] = 1
    query[0, 1] = np.inf
    out, lse = run(named(query, key, value, return_lse=True), backend)
    assert not out[0, 1].any()
    assert lse[0, 1] == -np.inf


@on_every_backend
@pytest.mark.parametrize("seqlen_k", [9, 1100])
def test_a_mask_row_of_the_lowest_float_gives_the_mean_of_v(seqlen_k: int, backend: str) -> None:
    arguments = heads(1, 2, 4, seqlen_k, 8).arguments()
    mask = np.zeros((4, seqlen_k), np.float32)
    mask[2] = np.finfo(np.float32).min
    out, lse = run(arguments, backend, attn_mask=mask)
    np.testing.assert_allclose(out[:, :, 2], arguments["value"].astype(np.float64).mean(axis=-2), atol=2e-6)
    assert (lse[:, :, 2] == np.finfo(np.float32).min).all()


@on_every_backend
def test_the_lowest_float_beside_an_ordinary_bias_weighs_nothing(backend: str) -> None:
    arguments = heads(1, 2, 4, 9, 8, return_weights=True).arguments()
    mask = np.where(np.arange(9) < 5, np.finfo(np.float32).min, 0).astype(np.float32)
    _, _, weights = run(arguments, backend, attn_mask=mask)
    assert not weights[..., :5].any()
    assert weights[..., 5:].all()


@on_every_backend
def test_the_lowest_float16_is_an_ordinary_bias(backend: str) -> None:
    arguments = heads(1, 2, 4, 9, 8, dtype="float16", return_weights=True).arguments()
    mask = np.full((4, 9), -65504, np.float16)
    _, _, weights = run(arguments, backend, attn_mask=mask)
    # float32 resolves 1/128 at 65504: the order of the scores survives.
    plain = cupyflash.attention(**{**arguments, "return_weights": True}, backend=backend)[2]
    np.testing.assert_allclose(weights.astype(np.float32), plain.astype(np.float32), rtol=0.02)


@on_every_backend
def test_enormous_scores_choose_their_key(backend: str) -> None:
    query, key, value = operands((1, 3, 4), (1, 1200, 4), (1, 1200, 4), magnitude=1e17)
    out, lse = cupyflash.attention(query, key, value, return_lse=True, backend=backend)
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) / 2
    np.testing.assert_array_equal(out[0], value[0, scores[0].argmax(axis=-1)])
    np.testing.assert_allclose(lse, scores.max(axis=-1), rtol=1e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_operands(dtype: str, backend: str) -> None:
    import ml_dtypes

    tiny = float(ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal)
    query, key, value = (
        (np.random.default_rng(i).integers(-9, 9, (1, n, 8)) * tiny).astype(DTYPES[dtype])
        for i, n in enumerate((5, 700, 700))
    )
    out, lse = run(named(query, key, value, return_lse=True), backend)
    np.testing.assert_allclose(lse, np.log(700), rtol=1e-6)
    assert np.abs(out.astype(np.float64)).max() <= 9 * tiny


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_values_of_any_size_keep_their_relative_accuracy(magnitude: float, dtype: str, backend: str) -> None:
    arguments = heads(1, 2, 20, 700, 8, dtype=dtype).arguments()
    arguments["value"] = (arguments["value"].astype(np.float64) * magnitude).astype(DTYPES[dtype])
    run(arguments, backend)


@on_every_backend
@pytest.mark.parametrize("magnitude", [1e-30, 1e24])
def test_float32_values_far_from_one(magnitude: float, backend: str) -> None:
    for case in (
        single(40, 1700, 8),
        single(40, 1700, 8, values="rising"),
        single(40, 1700, 8, is_causal=True),
    ):
        arguments = case.arguments()
        arguments["value"] = (arguments["value"] * magnitude).astype(np.float32)
        run(arguments, backend)


@on_every_backend
def test_a_softcap_beyond_the_range_of_float32_caps_nothing_and_one_below_it_everything(backend: str) -> None:
    query, key, value = operands((2, 5, 8), (2, 7, 8), (2, 7, 3))
    query[0, 0] = 0
    np.testing.assert_array_equal(
        cupyflash.attention(query, key, value, softcap=1e39, backend=backend),
        cupyflash.attention(query, key, value, backend=backend),
    )
    mean = np.broadcast_to(value.mean(axis=1, keepdims=True), (2, 5, 3))
    capped = cupyflash.attention(query, key, value, softcap=1e-46, backend=backend)
    np.testing.assert_allclose(capped, mean, rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("level", [15.0, -15.0, 70.0])
def test_values_near_the_largest_float32_do_not_overflow_on_the_way(level: float, backend: str) -> None:
    """exp(15)·1e32 would: nothing but weights, which are at most 1, may be multiplied by V."""
    query, key, value = operands((1, 300, 4), (1, 1100, 4), (1, 1100, 4))
    query, key = 0.1 * query, 0.1 * key
    query[..., 0], key[..., 0] = 2, level
    run(named(query, key, value * np.float32(1e32)), backend)


# ------------------------------------------------------------------------------------------------------------
# Masks and bands
# ------------------------------------------------------------------------------------------------------------

TRIANGLES = {
    # (L, S), align: what a causal query may see, drawn.
    ((3, 5), "top_left"): ["1....", "11...", "111.."],
    ((3, 5), "bottom_right"): ["111..", "1111.", "11111"],
    ((5, 3), "top_left"): ["1..", "11.", "111", "111", "111"],
    ((5, 3), "bottom_right"): ["...", "...", "1..", "11.", "111"],
    ((3, 5), 1): ["11...", "111..", "1111."],
    ((3, 5), -1): [".....", "1....", "11..."],
    ((1, 5), "top_left"): ["1...."],
    ((1, 5), "bottom_right"): ["11111"],
}


def seen(size: tuple[int, int], backend: str, **arguments: Any) -> list[str]:
    """Which keys have weight, drawn."""
    query, key, value = operands((1, size[0], 4), (1, size[1], 4), (1, size[1], 4))
    weights = cupyflash.attention(query, key, value, **arguments, return_weights=True, backend=backend)[1]
    return ["".join("1" if w else "." for w in row) for row in weights[0]]


@on_every_backend
@pytest.mark.parametrize(("size", "align"), TRIANGLES)
def test_causal_triangles(size: tuple[int, int], align: str | int, backend: str) -> None:
    assert seen(size, backend, is_causal=True, align=align) == TRIANGLES[size, align]


@on_every_backend
@pytest.mark.parametrize(
    ("window", "align", "drawn"),
    [
        ((1, 0), "top_left", ["1....", "11...", ".11.."]),
        ((1, 0), "bottom_right", [".11..", "..11.", "...11"]),
        ((0, 1), 1, [".11..", "..11.", "...11"]),
        ((0, 0), -1, [".....", "1....", ".1..."]),
        ((None, 1), "top_left", ["11...", "111..", "1111."]),
        ((-1, 1), "top_left", ["11...", "111..", "1111."]),
        ((0, -1), "top_left", ["11111", ".1111", "..111"]),
    ],
)
def test_windows(window: tuple[int | None, int | None], align: str | int, drawn: list[str], backend: str) -> None:
    assert seen((3, 5), backend, window=window, align=align) == drawn


@on_every_backend
def test_causal_and_window_and_masks_all_apply(backend: str) -> None:
    drawn = seen(
        (4, 5),
        backend,
        is_causal=True,
        window=(2, 2),
        attn_mask=(np.where(np.arange(5) == 1, -np.inf, 0).astype(np.float32), np.arange(4)[:, None] != 2),
        mask_mod=lambda b, h, q_idx, kv_idx: (q_idx != 3) | (kv_idx != 3),
    )
    assert drawn == ["1....", "1....", ".....", "..1.."]


@on_every_backend
def test_a_mask_is_aligned_with_the_last_dims_of_the_scores_whatever_the_batch_of_v(backend: str) -> None:
    query, key, value = operands((3, 5, 8), (3, 7, 8), (2, 3, 7, 8))
    mask = np.random.default_rng(1).standard_normal((3, 1, 7)).astype(np.float32)
    out = run(named(query, key, value), backend, attn_mask=mask)
    for b in range(2):
        part = cupyflash.attention(query, key, value[b], mask, backend=backend)
        np.testing.assert_allclose(out[b], part, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# User functions
# ------------------------------------------------------------------------------------------------------------


# Kernels call a function once, with symbols: what they make of it is in test_mods.py.
@on_general_backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_score_mod_is_given(dtype: str, backend: str) -> None:
    met: set[tuple[int, int, int, int]] = set()
    problems: list[str] = []

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if score.dtype != (np.float64 if dtype == "float64" else np.float32):
            problems.append(f"score is {score.dtype}")
        for x in (b, h, q_idx, kv_idx):
            if np.asarray(x).dtype.kind not in "iu":
                problems.append(f"coordinate is {np.asarray(x).dtype}")
        coordinates = [np.broadcast_to(x, score.shape).ravel().tolist() for x in (b, h, q_idx, kv_idx)]
        met.update(zip(*coordinates, strict=True))
        return score

    case = Case(
        query_shape=(2, 1, 6, 4, 8),
        key_shape=(1, 3, 2, 5, 8),
        value_shape=(3, 5, 8),
        enable_gqa=True,
        dtype=dtype,
    )
    arguments = case.arguments() | {"score_mod": score_mod, "align": "bottom_right"}
    cupyflash.attention(**arguments, backend=backend)
    assert not problems
    # 2 × 3 batches, flattened; query heads; queries from 0 whatever the alignment.
    assert met == {(b, h, i, j) for b in range(6) for h in range(6) for i in range(4) for j in range(5)}


@pytest.mark.runs_on_kernels
@on_every_backend
def test_coordinates_of_2_d_operands_are_zero_for_batch_and_head(backend: str) -> None:
    query, key, value = operands((4, 8), (5, 8), (5, 8))
    run(
        named(query, key, value),
        backend,
        score_mod=lambda score, b, h, q_idx, kv_idx: score + 100 * b + 1000 * h + 0 * q_idx,
        mask_mod=lambda b, h, q_idx, kv_idx: (b == 0) & (h == 0) & (kv_idx >= 0) & (q_idx >= 0),
    )


@pytest.mark.runs_on_kernels
@on_every_backend
def test_mods_look_up_arrays_by_every_coordinate(backend: str) -> None:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((2, 3, 6, 9)).astype(np.float32)
    mask = rng.random((2, 3, 6, 9)) < 0.7
    arguments = heads(2, 3, 6, 9, 8).arguments()
    by_mods = run(
        arguments,
        backend,
        score_mod=lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx],
        mask_mod=lambda b, h, q_idx, kv_idx: mask[b, h, q_idx, kv_idx],
    )
    by_masks = run(arguments, backend, attn_mask=(bias, mask))
    for one, other in zip(by_mods, by_masks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.runs_on_kernels
@on_every_backend
@pytest.mark.parametrize("seqlen_k", [9, 1100])
def test_a_mod_may_return_less_than_the_shape_of_the_scores(seqlen_k: int, backend: str) -> None:
    arguments = heads(2, 3, 6, seqlen_k, 8).arguments()
    run(arguments, backend, score_mod=lambda score, b, h, q_idx, kv_idx: 0.01 * kv_idx)
    run(arguments, backend, score_mod=lambda score, b, h, q_idx, kv_idx: 0.5)
    run(arguments, backend, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0)
    run(arguments, backend, mask_mod=lambda b, h, q_idx, kv_idx: q_idx != 3)
    run(arguments, backend, mask_mod=lambda b, h, q_idx, kv_idx: np.True_)


@on_general_backends
def test_an_error_in_a_mod_reaches_the_caller(backend: str) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        raise KeyError("of the user")

    for case in (heads(1, 2, 6, 9), heads(2, 4, 600, 1100)):
        with pytest.raises(KeyError, match="of the user"):
            cupyflash.attention(**case.arguments() | {"score_mod": score_mod}, backend=backend)


@on_general_backends
def test_score_mod_may_change_its_score_in_place(backend: str) -> None:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        score += 0.1 * kv_idx
        return score

    arguments = heads(1, 2, 6, 1100, 8).arguments()
    expected = run(arguments, backend, score_mod=lambda score, b, h, q_idx, kv_idx: score + 0.1 * kv_idx)
    actual = cupyflash.attention(**arguments | {"score_mod": score_mod}, backend=backend)
    np.testing.assert_allclose(actual[0], expected[0], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# ALiBi, sinks
# ------------------------------------------------------------------------------------------------------------


@on_every_backend
def test_alibi_is_a_bias_of_minus_slope_times_distance(backend: str) -> None:
    arguments = heads(2, 3, 6, 9, 8).arguments()
    slopes = np.array([[0.5, 0.25, 1.0], [0.0, -0.5, 2.0]], np.float32)
    distance = abs(np.arange(6)[:, None] + 3 - np.arange(9)[None, :])
    bias = (-slopes[:, :, None, None] * distance).astype(np.float32)
    by_slopes = run(arguments, backend, alibi_slopes=slopes, align="bottom_right")
    by_mask = run(arguments, backend, attn_mask=bias)
    for one, other in zip(by_slopes, by_mask, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_k", [9, 1100])
def test_a_sink_is_a_key_with_that_score_and_no_value(seqlen_k: int, dtype: str, backend: str) -> None:
    query, key, value = operands((2, 3, 6, 8), (2, 3, seqlen_k, 8), (2, 3, seqlen_k, 8), dtype=dtype)
    sinks = np.array([0.5, -1.0, 3.0], DTYPES[dtype])
    out, lse = run(named(query, key, value, sinks=sinks, return_lse=True), backend)

    def add_column(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.zeros_like(x[..., :1, :])], axis=-2)

    mask = np.zeros((3, 1, seqlen_k + 1), np.float32)
    mask[..., -1] = sinks[:, None]
    expected = oracle(query, add_column(key), add_column(value), mask)
    np.testing.assert_allclose(out.astype(np.float64), expected.out, atol={"bfloat16": 2e-2}.get(dtype, 2e-3))
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Dropout
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_the_same_on_every_backend_and_is_that_of_dropout_mask(name: str) -> None:
    case = DROPOUT[name]
    arguments = case.arguments() | {"return_weights": True, "return_lse": False}
    kept = np.ones((*case.batch_shape, case.query_shape[-2], case.key_shape[-2]), bool)
    if case.dropout_p:
        kept = cupyflash.dropout_mask(kept.shape, case.dropout_p, case.seed)
    plain = oracle(**{name: x for name, x in arguments.items() if not name.startswith("return_")} | {"dropout_p": 0})
    for backend, capabilities in CAPABILITIES.items():
        if not capabilities.refused_features(case):
            weights = cupyflash.attention(**arguments, backend=backend)[1]
            np.testing.assert_array_equal(weights != 0, kept & (plain.weights != 0), err_msg=backend)


@on_every_backend
def test_dropout_differs_between_batches_heads_queries_and_keys(backend: str) -> None:
    _, _, weights = run(heads(2, 3, 40, 60, 8, dropout_p=0.5, seed=1, return_weights=True).arguments(), backend)
    kept = weights != 0
    assert 0.45 < kept.mean() < 0.55
    for axis in range(4):
        assert 0.4 < (np.diff(kept, axis=axis) != 0).mean() < 0.6


@on_every_backend
def test_kept_weights_are_scaled_up_and_lse_is_not_touched(backend: str) -> None:
    arguments = heads(2, 3, 6, 9, 8).arguments() | {"return_weights": True}
    _, plain_lse, plain = run(arguments, backend)
    _, lse, weights = run(arguments, backend, dropout_p=0.75, seed=3)
    kept = weights != 0
    np.testing.assert_allclose(weights[kept], 4 * plain[kept], rtol=1e-6)
    assert lse.tobytes() == plain_lse.tobytes()


@on_every_backend
def test_dropout_of_everything_gives_zeros(backend: str) -> None:
    out, lse, weights = run(heads(2, 3, 6, 9, dropout_p=1.0, seed=1, return_weights=True).arguments(), backend)
    assert not out.any()
    assert not weights.any()
    assert np.isfinite(lse).all()


@on_every_backend
@pytest.mark.parametrize("seed", [7, np.uint64(7), np.int64(7), np.array(7, np.uint64), np.array([7], np.uint64)])
def test_kinds_of_seed(seed: Any, backend: str) -> None:
    arguments = heads(2, 3, 6, 9, dropout_p=0.5).arguments()
    expected = run(arguments, backend, seed=7)
    actual = run(arguments, backend, seed=seed)
    assert actual[0].tobytes() == expected[0].tobytes()


@on_every_backend
def test_without_a_seed_every_call_drops_others(backend: str) -> None:
    arguments = heads(2, 3, 20, 30, dropout_p=0.5).arguments()
    first, second = (cupyflash.attention(**arguments, backend=backend)[0] for _ in range(2))
    assert first.tobytes() != second.tobytes()


@on_every_backend
def test_without_dropout_no_random_number_is_drawn(backend: str) -> None:
    arguments = heads(2, 3, 6, 9).arguments()
    before = repr(np.random.get_state())  # noqa: NPY002
    run(arguments, backend)
    run(arguments, backend, dropout_p=0.5, seed=1)
    assert repr(np.random.get_state()) == before  # noqa: NPY002


# ------------------------------------------------------------------------------------------------------------
# Which backend
# ------------------------------------------------------------------------------------------------------------


def test_the_backend_named_by_the_caller_comes_before_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = single(5, 7).arguments()
    math = cupyflash.attention(**arguments, backend="math")
    monkeypatch.setenv("CUPYFLASH_BACKEND", "math")
    assert [x.tobytes() for x in cupyflash.attention(**arguments)] == [x.tobytes() for x in math]
    monkeypatch.setenv("CUPYFLASH_BACKEND", "no such backend")
    assert [x.tobytes() for x in cupyflash.attention(**arguments, backend="math")] == [x.tobytes() for x in math]


def test_numpy_arrays_go_to_numpy_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    arguments = CASES["all-at-once-over-tiles"].arguments()
    tiled = cupyflash.attention(**arguments, backend="numpy")
    assert [x.tobytes() for x in cupyflash.attention(**arguments)] == [x.tobytes() for x in tiled]


def test_every_backend_under_test_is_registered() -> None:
    assert CAPABILITIES.keys() <= set(cupyflash.backends())


def test_shapes_follow_gqa_and_broadcasting() -> None:
    assert shapes((1, 3, 6, 5, 8), (2, 1, 2, 7, 8), (3, 7, 8), enable_gqa=True).batch_shape == (2, 3, 6)
    assert shapes((5, 8), (7, 8), (4, 7, 8)).batch_shape == (4,)
