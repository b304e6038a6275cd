"""merge_attention joins attention over disjoint sets of keys; attention_weights shows the scores on their way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.testing import DTYPES, LAYOUTS, Case, MaskSpec, SinkSpec, assert_attention_close, oracle
from tests.cases import BANDS, GQA, MASKS, SCORE_ARGUMENTS, SHAPES, heads, on_every_backend, single

# ------------------------------------------------------------------------------------------------------------
# merge_attention
# ------------------------------------------------------------------------------------------------------------


# A refusal of kernels is a failure here: they merge whatever is merged.
MERGERS = ["numpy", "math", "emulator"]


def on_every_merger(test: Any) -> Any:
    return pytest.mark.runs_on_kernels(pytest.mark.parametrize("backend", MERGERS)(test))


def parts(case: Case, cuts: list[int], backend: str = "math") -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Attention over the keys between each two cuts."""
    arguments = case.arguments()
    sinks = arguments.pop("sinks")
    outs, lses = [], []
    for n, (start, stop) in enumerate(zip(cuts, [*cuts[1:], case.key_shape[-2]], strict=True)):
        part = arguments | {name: arguments[name][..., start:stop, :] for name in ("key", "value")}
        if arguments["attn_mask"] is not None:
            part["attn_mask"] = arguments["attn_mask"][..., start:stop]
        out, lse = cupyflash.attention(**part, sinks=sinks if n == 0 else None, backend=backend)
        outs.append(out)
        lses.append(lse)
    return outs, lses


@on_every_merger
@pytest.mark.parametrize("cuts", [[0], [0, 5], [0, 1, 29], [0, 0, 11, 30], [0, 7, 7, 7, 20]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_joined_equal_the_whole(dtype: str, cuts: list[int], backend: str) -> None:
    check_joined(heads(2, 3, 6, 30, 8, dtype=dtype), cuts, backend)


def check_joined(case: Case, cuts: list[int], backend: str) -> None:
    joined = cupyflash.merge_attention(*parts(case, cuts), backend=backend)
    if case.dtype in ("float32", "float64"):
        assert_attention_close(joined, case, backend=backend)
        return
    # Every part was rounded to 16 bits before: one more rounding than the rule for one call allows.
    out, lse = joined
    assert (out.dtype, lse.dtype) == (DTYPES[case.dtype], np.float32)
    whole = oracle(**{name: x for name, x in case.arguments().items() if not name.startswith("return_")})
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[case.dtype]
    assert (np.abs(out.astype(np.float64) - whole.out) <= 5 * u * whole.spread + 1e-6).all()
    np.testing.assert_allclose(lse, whole.lse, atol=2e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backend_joins_its_own_parts(dtype: str, backend: str) -> None:
    case = heads(2, 3, 6, 30, 64, dtype=dtype)
    outs, lses = parts(case, [0, 11], backend)
    out, lse = cupyflash.merge_attention(outs, lses, backend=backend)
    expected, expected_lse = cupyflash.merge_attention(*parts(case, [0, 11], "math"), backend="math")
    whole = oracle(**{name: x for name, x in case.arguments().items() if not name.startswith("return_")})
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype, 2.0**-22)
    assert (np.abs(out.astype(np.float64) - expected.astype(np.float64)) <= 5 * u * whole.spread + 1e-6).all()
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


@on_every_merger
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [31, 32, 33, 70])
def test_any_number_of_parts(number: int, dtype: str, backend: str) -> None:
    """More than one launch of a kernel joins: nothing may be rounded in between."""
    check_joined(heads(1, 2, 3, 140, 8, dtype=dtype), list(range(0, 2 * number, 2)), backend)


@on_every_merger
def test_parts_joined_equal_the_whole_whatever_the_level_of_their_scores(backend: str) -> None:
    for values in ("rising", "falling", "jumping"):
        case = single(20, 700, 8, values=values)
        check_joined(case, [0, 100, 350], backend)


@on_every_merger
def test_one_part_may_carry_sinks(backend: str) -> None:
    check_joined(heads(2, 3, 6, 30, 8, sinks=SinkSpec(holes=True)), [0, 10], backend)


@on_every_merger
def test_rows_that_see_nothing_in_one_part_or_in_all(backend: str) -> None:
    check_joined(heads(1, 2, 9, 30, 8, masks=(MaskSpec("bool", (9, 30), values="dead_rows"),)), [0, 10], backend)
    check_joined(heads(1, 2, 9, 30, 8, masks=(MaskSpec("bool", (30,), values="left_padding"),)), [0, 5, 8], backend)
    case = heads(1, 2, 9, 30, 8, masks=(MaskSpec("bool", (30,), values="none"),))
    out, lse = cupyflash.merge_attention(*parts(case, [0, 10]), backend=backend)
    assert not out.any()
    assert (lse == -np.inf).all()


@on_every_merger
def test_a_dead_part_changes_nothing(backend: str) -> None:
    outs, lses = parts(heads(2, 3, 6, 30, 8), [0])
    dead = np.zeros_like(outs[0]), np.full_like(lses[0], -np.inf)
    out, lse = cupyflash.merge_attention([*outs, dead[0]], [*lses, dead[1]], backend=backend)
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(lse, lses[0])


@on_every_merger
def test_the_order_of_the_parts_does_not_matter(backend: str) -> None:
    case = heads(2, 3, 6, 30, 8)
    outs, lses = parts(case, [0, 10, 20])
    assert_attention_close(cupyflash.merge_attention(outs[::-1], lses[::-1], backend=backend), case)


@on_every_merger
def test_merging_is_associative(backend: str) -> None:
    case = heads(2, 3, 6, 30, 8)
    outs, lses = parts(case, [0, 10, 20])
    out, lse = cupyflash.merge_attention(outs[:2], lses[:2], backend=backend)
    assert_attention_close(cupyflash.merge_attention([out, outs[2]], [lse, lses[2]], backend=backend), case)


@on_every_merger
def test_nan_in_one_part_is_nan_in_the_row_of_the_whole(backend: str) -> None:
    outs, lses = parts(heads(1, 1, 3, 30, 8), [0, 10])
    outs[1][0, 0, 1] = np.nan
    lses[1][0, 0, 1] = np.nan
    for order in (1, -1):
        out, lse = cupyflash.merge_attention(outs[::order], lses[::order], backend=backend)
        assert np.isnan(out).all(axis=-1).tolist() == [[[False, True, False]]]
        assert np.isnan(lse).tolist() == [[[False, True, False]]]


@on_every_merger
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 3, 0), (1, 1), (5, 257), (2, 1, 3, 1, 2, 3, 4, 40)], ids=str)
def test_shapes(shape: tuple[int, ...], backend: str) -> None:
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((3, *shape)), rng.standard_normal((3, *shape[:-1]))
    check_against_the_formula(list(outs), list(lses), backend)


def check_against_the_formula(outs: list[np.ndarray], lses: list[np.ndarray], backend: str) -> None:
    """Of float64, so that nothing but the order of sums differs."""
    out, lse = cupyflash.merge_attention(outs, lses, backend=backend)
    weights = np.exp(lses) / np.exp(lses).sum(axis=0)
    assert (out.dtype, lse.dtype, out.shape) == (np.float64, np.float64, outs[0].shape)
    np.testing.assert_allclose(out, (weights[..., None] * np.array(outs)).sum(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(lse, np.log(np.exp(lses).sum(axis=0)), rtol=1e-13, atol=1e-13)


@on_every_merger
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_may_have_its_own_strides(layout: str, backend: str) -> None:
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((2, 2, 3, 5, 40)), rng.standard_normal((2, 2, 3, 5))
    for laid in (0, 1):
        check_against_the_formula(
            [LAYOUTS[layout](outs[laid]), outs[1 - laid]], [LAYOUTS[layout](lses[laid]), lses[1 - laid]], backend
        )


@on_every_merger
def test_seven_axes_that_do_not_join(backend: str) -> None:
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((2, *(4,) * 7, 3)), rng.standard_normal((2, *(4,) * 7))
    halves = (slice(None, None, 2),) * 7
    check_against_the_formula([out[halves] for out in outs], [lse[halves] for lse in lses], backend)


@on_every_merger
def test_rows_that_repeat_and_elements_off_their_places(backend: str) -> None:
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((4, 5, 9)), rng.standard_normal((4, 5))
    bytes_of = np.zeros(out.nbytes + 1, np.uint8)
    odd = np.ndarray(out.shape, out.dtype, bytes_of, offset=1)
    odd[...] = out
    repeated = np.broadcast_to(out[:1, :1, ::-1], out.shape), np.broadcast_to(lse[:, :1], lse.shape)
    check_against_the_formula([odd, repeated[0]], [lse[::-1, ::-1], repeated[1]], backend)


@on_every_merger
def test_merging_writes_none_of_its_inputs_and_shares_no_memory_with_them(backend: str) -> None:
    outs, lses = parts(heads(2, 3, 6, 30, 8), [0])
    before = [x.tobytes() for x in outs + lses]
    out, lse = cupyflash.merge_attention(outs, lses, backend=backend)
    assert [x.tobytes() for x in outs + lses] == before
    assert not np.may_share_memory(out, outs[0])
    assert not np.may_share_memory(lse, lses[0])


def test_a_backend_that_cannot_merge_is_named_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    outs, lses = parts(heads(1, 1, 3, 30, 8), [0, 10])
    with pytest.raises(cupyflash.Unsupported, match="cuda: it takes CuPy arrays only") as caught:
        cupyflash.merge_attention(outs, lses, backend="cuda")
    assert caught.value.reasons["numpy"] == ()
    with pytest.raises(ValueError, match=r"backend must be one of .* but was 'gpu'"):
        cupyflash.merge_attention(outs, lses, backend="gpu")
    with pytest.raises(TypeError, match=r"backend must be one of .* but was 3"):
        cupyflash.merge_attention(outs, lses, backend=3)  # type: ignore[arg-type]
    monkeypatch.setenv("CUPYFLASH_BACKEND", "cuda")
    with pytest.raises(cupyflash.Unsupported, match=r"backend 'cuda' can't run this call:\n  2 numpy parts float32"):
        cupyflash.merge_attention(outs, lses)
    far = np.lib.stride_tricks.as_strided(outs[0], (2**16, 2**15, 8), (0, 0, 4))
    with pytest.raises(cupyflash.Unsupported, match="it merges up to 2147483647 rows, but outs had 2147483648"):
        cupyflash.merge_attention([far], [far[..., 0]], backend="emulator")


# ------------------------------------------------------------------------------------------------------------
# attention_weights
# ------------------------------------------------------------------------------------------------------------

WEIGHED = {
    name: case
    for table in (SHAPES, GQA, MASKS, SCORE_ARGUMENTS, dict(list(BANDS.items())[::7]))
    for name, case in table.items()
    if not name.startswith("value-alone")
}


@on_every_backend
@pytest.mark.parametrize("stage", ["raw", "modded", "capped", "biased", "softmax"])
def test_scores_at_every_stage(stage: str, backend: str) -> None:
    for case in WEIGHED.values():
        actual = cupyflash.attention_weights(**case.score_arguments(), stage=stage, backend=backend)
        assert_attention_close(actual, case, backend=backend, stage=stage)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["raw", "modded", "capped", "biased", "softmax"])
def test_scores_have_the_accumulation_dtype_and_weights_that_of_the_query(stage: str, dtype: str, backend: str) -> None:
    case = heads(2, 3, 6, 9, 8, dtype=dtype, softcap=3.0, score_mod="remove_far", masks=(MaskSpec("float32", (6, 9)),))
    actual = cupyflash.attention_weights(**case.score_arguments(), stage=stage, backend=backend)
    assert_attention_close(actual, case, backend=backend, stage=stage)
    scores = "float64" if dtype == "float64" else "float32"
    assert actual.dtype == DTYPES[dtype if stage == "softmax" else scores]


@on_every_backend
def test_what_each_stage_shows(backend: str) -> None:
    query, key = np.full((1, 2), 2.0, np.float32), np.array([[1, 1], [2, 2], [3, 3]], np.float32)

    def at(stage: str, **more: Any) -> list[float]:
        return cupyflash.attention_weights(
            query,
            key,
            np.array([0.5, -np.inf, 0.25], np.float32),
            stage=stage,
            scale=0.5,
            softcap=4.0,
            score_mod=lambda score, b, h, q_idx, kv_idx: score + kv_idx,
            backend=backend,
            **more,
        )[0].tolist()

    assert at("raw") == [2, 4, 6]
    assert at("modded") == [2, 5, 8]
    capped = [4 * np.tanh(x / 4) for x in (2, 5, 8)]
    np.testing.assert_allclose(at("capped"), capped, rtol=1e-6)
    biased = [capped[0] + 0.5, -np.inf, capped[2] + 0.25]
    np.testing.assert_allclose(at("biased"), biased, rtol=1e-6)
    weights = np.exp(biased) / np.exp(biased).sum()
    np.testing.assert_allclose(at("softmax"), weights, rtol=1e-6)
    assert at("softmax", is_causal=True) == [1, 0, 0]


@on_every_backend
def test_weights_at_softmax_are_those_that_attention_returns(backend: str) -> None:
    for name in ("sinks", "alibi-per-batch-and-head", "softcap-with-removal", "mask-mod-checkers"):
        case = SCORE_ARGUMENTS[name]
        arguments = case.arguments() | {"return_weights": True, "return_lse": False}
        expected = cupyflash.attention(**arguments, backend=backend)[1]
        actual = cupyflash.attention_weights(**case.score_arguments(), stage="softmax", backend=backend)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@on_every_backend
def test_nan_in_a_removed_key_shows_at_raw_and_not_at_biased(backend: str) -> None:
    case = heads(1, 1, 4, 5, 8)
    arguments = case.score_arguments()
    arguments["key"][..., 4, :] = np.nan
    arguments["attn_mask"] = np.arange(5) < 4
    for stage in ("raw", "biased", "softmax"):
        actual = cupyflash.attention_weights(**arguments, stage=stage, backend=backend)
        assert_attention_close(actual, arguments, backend=backend, stage=stage)
    assert not np.isnan(actual).any()
