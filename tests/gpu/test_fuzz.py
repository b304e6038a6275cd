"""What the stages of `make gpu` call, without a GPU: the random calls, the list of kernels, the main kernels."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import FwdSpec, ModSummarySpec
from cupyflash.testing import DTYPES, Case
from tests.cases import CASES, heads
from tests.gpu import build, fuzz, main_kernels
from tests.gpu.calls import on_device


def first(count: int, seed: int) -> list[Case]:
    return list(itertools.islice(fuzz.cases(seed), count))


def test_cases_are_those_of_the_seed() -> None:
    assert first(20, 1) == first(20, 1) != first(20, 2)


def test_cases_reach_tiles_splits_and_every_argument() -> None:
    drawn = first(300, 0)
    assert {case.dtype for case in drawn} == {"float16", "bfloat16", "float32", "float64"}
    assert {case.query_shape[-1] for case in drawn} == {dims[0] for dims in fuzz.HEAD_DIMS}
    assert any(case.query_shape[-2] < 5 and case.key_shape[-2] > 1000 for case in drawn)
    assert any(case.query_shape[-2] > 128 and case.key_shape[-2] > 128 for case in drawn)
    for name in ("masks", "dropout_p", "score_mod", "mask_mod", "sinks", "return_weights", "is_causal", "window"):
        assert any(getattr(case, name) for case in drawn), name
    for case in drawn:
        lengths = case.query_shape[-2] * case.key_shape[-2]
        assert np.prod(case.batch_shape, dtype=int) * lengths <= fuzz.MOST_SCORES


def ticking(step: float) -> Any:
    return itertools.count(0, step).__next__


def test_right_refused_and_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    case = heads(1, 1, 5, 7)

    def refused(case: Case) -> Any:
        raise cupyflash.Unsupported("no", {"cuda": ("it is too wide",)})

    def refused_for_nothing(case: Case) -> Any:
        raise cupyflash.Unsupported("no", {"cuda": ()})

    def crashes(case: Case) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    runs = iter(
        [
            lambda case: cupyflash.attention(**case.arguments()),
            refused,
            lambda case: tuple(2 * x for x in cupyflash.attention(**case.arguments())),
            refused_for_nothing,
            crashes,
        ]
    )
    tally = fuzz.fuzz(itertools.repeat(case), lambda case: next(runs)(case), 6, ticking(1))
    assert (tally.right, tally.refused, len(tally.wrong)) == (1, 1, 3)
    assert "attention" in tally.wrong[0]
    assert tally.wrong[1].endswith("refused without a reason")
    assert tally.wrong[2].endswith("RuntimeError: an illegal memory access was encountered")
    assert capsys.readouterr().out.splitlines() == "\n".join(tally.wrong).splitlines()


def test_it_stops_in_time_or_after_enough() -> None:
    case = heads(1, 1, 5, 7)
    tally = fuzz.fuzz(itertools.repeat(case), lambda case: cupyflash.attention(**case.arguments()), 4, ticking(1))
    assert tally.right == 3
    tally = fuzz.fuzz(itertools.repeat(case), lambda case: None, 1000, ticking(1))
    assert len(tally.wrong) == fuzz.MOST_SHOWN


def test_on_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--seconds", "0.5", "--seed", "3", "--backend", "numpy"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 wrong (seed 3)")


def test_functions_look_up_arrays_of_the_device() -> None:
    """An array that a function finds among its globals is moved, and the function of the tests stays as it is."""

    class Moved(np.ndarray):
        pass

    cupy = ModuleType("cupy")
    cupy.empty = np.empty  # type: ignore[attr-defined]
    moved: list[Any] = []

    def to_device(array: Any, cupy: Any) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        moved.append(array)
        return array.view(Moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.gpu.calls.to_device", to_device)
        for mod in ("look_up", "distance"):
            case = heads(1, 1, 5, 7, score_mod=mod)
            given = case.arguments()
            arguments = on_device(given, cupy)
            score = np.zeros((5, 7))
            indices = (0, 0, np.arange(5)[:, None], np.arange(7)[None])
            result = arguments["score_mod"](score, *indices)
            np.testing.assert_array_equal(result, given["score_mod"](score, *indices))
            assert isinstance(result, Moved) is (mod == "look_up")
            assert (arguments["score_mod"] is given["score_mod"]) is (mod == "distance")
    assert not isinstance(given["score_mod"](score, *indices), Moved)


def test_kernels_are_those_of_the_calls() -> None:
    device = DEVICES["H200"]
    case = heads(1, 2, 5, 7, 64, dtype="float16", mask_mod="document", return_weights=True)
    specs = build.kernels_for([case.arguments()] * 2, device)
    assert [spec.family for spec in specs] == ["fwd_sm80", "weights", "mod_summary"]
    assert isinstance(specs[-1], ModSummarySpec)
    split = heads(1, 1, 1, 4000, 64, dtype="float16")
    assert [spec.family for spec in build.kernels_for([split.arguments()], device)] == ["fwd_sm80", "combine"]
    assert build.kernels_for([heads(1, 1, 5, 7, 300, dtype="float16").arguments()], device) == []


def test_kernels_of_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--device", "H200", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names) > 100
    assert {"fwd_sm90-bf16-d128-m128n128w12qs2-causal", "merge-f16", "mask_summary"} <= set(names)
    assert len(names) < len(CASES)


def test_main_kernels_are_not_refused() -> None:
    """And are kernels of their own."""
    seen = []
    for name, (query, key, dtype, is_causal) in main_kernels.CALLS.items():
        arrays = [np.broadcast_to(np.zeros((), DTYPES[dtype]), shape) for shape in (query, key, key)]
        arguments = dict(zip(("query", "key", "value"), arrays, strict=True))
        call = {**arguments, "is_causal": is_causal, "enable_gqa": True}
        specs = build.kernels_for([call], DEVICES["H200"])
        assert specs, name
        assert ("combine" in [spec.family for spec in specs]) is (name == "decode")
        seen += [spec for spec in specs if isinstance(spec, FwdSpec)]
    assert len(set(seen)) == len(main_kernels.CALLS)
