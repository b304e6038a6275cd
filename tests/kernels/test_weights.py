"""The kernel for scores and weights, under the emulator: right at every stage, whoever shares the keys, race-free."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends.emulator import Options
from cupyflash.testing import DTYPES, Case, MaskSpec, SinkSpec, assert_attention_close
from tests.cases import heads, shapes
from tests.kernels import weights
from tests.kernels.harness import ALL_OPTIONS

pytestmark = pytest.mark.usefixtures("cxx")

STAGES = ("raw", "modded", "capped", "biased", "softmax")
on_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def scores_of(case: Case, stage: str) -> dict[str, Any]:
    return {**case.score_arguments(), "value": None, "stage": stage}


def everything(seqlen_q: int, seqlen_k: int, dtype: str = "float16", **more: Any) -> Case:
    return heads(
        2,
        2,
        seqlen_q,
        seqlen_k,
        20,
        dtype=dtype,
        masks=(MaskSpec("float32", (seqlen_k,)), MaskSpec("bool", (seqlen_q, seqlen_k))),
        softcap=2.0,
        alibi_shape=(2, 2),
        sinks=SinkSpec(),
        window=(60, 5),
        **more,
    )


def check_weights(case: Case, **how: Any) -> np.ndarray:
    """Of attention: after dropout."""
    arguments = {name: x for name, x in case.arguments().items() if name != "return_lse"}
    actual, _ = weights.run(arguments | {"stage": "dropout"}, **how)
    _judged(actual, case)
    return actual


def _judged(actual: np.ndarray, case: Case) -> None:
    arguments = case.arguments() | {"return_lse": False, "return_weights": True}
    out, _ = cupyflash.attention(**arguments, backend="math")
    assert_attention_close((out, actual), arguments, backend="emulator")


@on_every_dtype
@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage: str, dtype: str) -> None:
    for lengths in ((64, 64), (1, 1), (65, 130), (130, 77)):
        case = everything(*lengths, dtype)
        actual, _ = weights.run(scores_of(case, stage))
        assert_attention_close(actual, case, backend="emulator", stage=stage)


@on_every_dtype
def test_weights_with_dropout(dtype: str) -> None:
    check_weights(everything(70, 150, dtype, dropout_p=0.3, seed=5))
    check_weights(heads(1, 1, 10, 20, 8, dtype=dtype, dropout_p=1.0, seed=5))


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_parts_of_the_keys(parts: int) -> None:
    """Five tiles of keys: equal parts, a shorter last one, empty ones."""
    case = everything(70, 300, dropout_p=0.3, seed=5)
    whole = check_weights(case)
    assert check_weights(case, parts=parts).tobytes() == whole.tobytes()
    for stage in ("raw", "biased"):
        actual, _ = weights.run(scores_of(case, stage), parts=parts)
        assert_attention_close(actual, case, stage=stage)


@on_every_dtype
@pytest.mark.parametrize("parts", [1, 3])
def test_rows_of_coarse_log_sum_exps(dtype: str, parts: int) -> None:
    """A bias far from 0 on all keys leaves weights as they were, whatever is lost in the log-sum-exp."""
    case = heads(1, 2, 70, 200, 20, dtype=dtype, masks=(MaskSpec("float32", (70, 200), values="minimum"),))
    check_weights(case, parts=parts)
    level = np.zeros((70, 1), np.float32)
    level[3::7] = -(2.0**60)
    arguments = heads(1, 2, 70, 200, 20, dtype=dtype).score_arguments() | {"attn_mask": level, "scale": 0.0}
    actual, _ = weights.run(arguments | {"value": None, "stage": "softmax"}, parts=parts)
    np.testing.assert_allclose(actual.astype(np.float64), 1 / 200, rtol=2.0**-8)


def test_sinks_of_coarse_rows() -> None:
    case = heads(1, 2, 70, 100, 20, scale=0.0, masks=(MaskSpec("float32", (1,)),), sinks=SinkSpec())
    arguments = case.score_arguments() | {"value": None, "stage": "softmax"}
    arguments["attn_mask"] = np.full(1, 3000, np.float32)
    arguments["sinks"] = np.full(2, 3000, np.float32)
    actual, _ = weights.run(arguments)
    np.testing.assert_allclose(actual, 1 / 101, rtol=1e-6)


@on_every_dtype
def test_rows_that_see_nothing(dtype: str) -> None:
    case = heads(1, 2, 70, 90, 20, dtype=dtype, masks=(MaskSpec("bool", (70, 90), values="dead_rows"),), is_causal=True)
    actual = check_weights(case)
    assert not np.isnan(actual.astype(np.float64)).any()
    arguments = case.score_arguments() | {"value": None, "align": -200, "stage": "softmax"}
    actual, counters = weights.run(arguments)
    assert not actual.any()
    assert counters.ld_shared.instructions == 0, "what the band removes whole is not computed"
    actual, _ = weights.run(arguments | {"stage": "biased"})
    assert (actual == -np.inf).all()


def test_a_nan_in_a_query_stays_in_its_row() -> None:
    case = heads(1, 2, 70, 90, 20)
    expected, _ = weights.run(scores_of(case, "softmax"))
    arguments = scores_of(case, "softmax")
    arguments["query"] = arguments["query"].copy()
    arguments["query"][0, 1, 35, 3] = np.nan
    actual, _ = weights.run(arguments)
    assert np.isnan(actual[0, 1, 35]).all()
    np.testing.assert_array_equal(np.delete(actual[0, 1], 35, 0), np.delete(expected[0, 1], 35, 0))


def test_heads_share_keys_by_index() -> None:
    for stage in STAGES:
        of = {"enable_gqa": True, "is_causal": True, "dtype": "float16"}
        case = shapes((2, 6, 40, 20), (2, 2, 70, 20), (2, 3, 70, 20), **of)
        actual, _ = weights.run(scores_of(case, stage))
        assert_attention_close(actual, case, stage=stage)


def test_four_batch_axes_that_broadcast() -> None:
    case = shapes((2, 1, 2, 1, 2, 5, 8), (1, 2, 1, 2, 1, 7, 8), (7, 8), return_weights=True)
    check_weights(case)
    for stage in STAGES:
        actual, _ = weights.run(scores_of(case, stage))
        assert_attention_close(actual, case, stage=stage)


@on_every_dtype
def test_no_option_changes_a_bit(dtype: str) -> None:
    case = everything(70, 140, dtype, dropout_p=0.3, seed=5)
    expected = check_weights(case, parts=2)
    for options in ALL_OPTIONS:
        assert check_weights(case, parts=2, options=options).tobytes() == expected.tobytes(), options


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_bank_conflicts(dtype: str) -> None:
    _, counters = weights.run(scores_of(heads(1, 1, 64, 64, 64, dtype=dtype), "raw"), options=Options(counters=True))
    for kind in ("ld_shared", "st_shared"):
        traffic = getattr(counters, kind)
        assert traffic.cost == traffic.ideal > 0, kind
