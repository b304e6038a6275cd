"""`explain` says what `attention` would do: the same plan, the same copies, the same refusals."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cupyflash
from cupyflash import explain
from cupyflash.backends import cuda
from cupyflash.backends.emulated import EmulatorBackend
from cupyflash.build.operands import prepare
from cupyflash.plan.choose import choose
from cupyflash.plan.device import DEVICES, EMULATOR
from cupyflash.plan.specs import FwdSpec, Mods
from cupyflash.problem.normalize import normalize
from cupyflash.problem.trace import trace_mask_mod, trace_score_mod
from cupyflash.testing import LAYOUTS
from tests import cupy_stand_in

PAGE = Path(__file__).parents[2] / "docs" / "explain.py"


def half(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)


def test_what_is_printed_is_the_str(capsys: pytest.CaptureFixture[str]) -> None:
    found = explain(half(1, 8, 512, 64), half(1, 8, 512, 64), half(1, 8, 512, 64), device="H200")
    assert capsys.readouterr().out == f"{found}\n"
    assert repr(found) == "<Explanation: cuda on H200, fwd_sm90-f16-d64-m128n128w12qs2e8>"


@pytest.mark.parametrize("device", [name for name, device in DEVICES.items() if device.cc >= (8, 0)])
@pytest.mark.parametrize("lengths", [(1, 4096), (2048, 2048)])
def test_the_plan_is_that_of_the_backend(device: str, lengths: tuple[int, int]) -> None:
    query, key = half(1, 8, lengths[0], 128), half(1, 2, lengths[1], 128)
    found = explain(query, key, key, is_causal=True, enable_gqa=True, device=device)
    problem, _ = normalize(query, key, key, is_causal=True, enable_gqa=True)
    assert found.plan == choose(problem, DEVICES[device])
    assert (found.backend, found.device, found.refusals) == ("cuda", DEVICES[device], ())
    for launch in found.plan.launches:
        assert f"  {launch.spec}: {launch.grid[0]} blocks of {launch.block[0]} threads" in str(found)
    spec = found.plan.launches[0].spec
    assert isinstance(spec, FwdSpec)
    assert [c.spec for c in found.candidates if not c.reasons and not c.behind] == [spec]


def test_devices_are_named_as_one_types() -> None:
    x = half(2, 7, 64)
    for name in ("RTX 4090", "rtx4090", "rtx 4090"):
        assert explain(x, x, x, device=name).device is DEVICES["RTX 4090"]


def test_the_emulators_device_is_the_one_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPYFLASH_EMULATOR", "device=T4,seed=3")
    x = half(2, 7, 64)
    assert explain(x, x, x, backend="emulator").device == DEVICES["T4"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_those_that_are_made(layout: str) -> None:
    key = LAYOUTS[layout](np.zeros((2, 3, 5, 64), np.float16))
    found = explain(half(2, 3, 7, 64), key, half(2, 3, 5, 64), backend="emulator")
    problem, buffers = normalize(half(2, 3, 7, 64), key, half(2, 3, 5, 64))
    operands = prepare(problem, choose(problem, EMULATOR), buffers, lambda array: array.ctypes.data)
    assert [copy.operand for copy in found.copies] == ["key"] * (operands.key is not buffers.key)


@pytest.mark.parametrize(
    ("key", "reason", "nbytes"),
    [
        (half(2, 5, 128)[..., ::2], "rows are not contiguous: 4 bytes between elements of 2", 2 * 5 * 128),
        (half(2, 5, 65)[..., 1:], "rows do not all begin at multiples of 16 bytes (strides (650, 130, 2))", 1280),
        (half(2, 5, 72)[..., 1:65], "it does not begin at a multiple of 16 bytes", 1280),
        (np.broadcast_to(half(5, 128)[..., ::2], (2, 5, 64)), "rows are not contiguous: 4 bytes", 5 * 128),
    ],
)
def test_why_an_operand_is_copied(key: np.ndarray, reason: str, nbytes: int) -> None:
    found = explain(half(2, 7, 64), key, half(2, 5, 64), device="A100")
    (copy,) = found.copies
    assert (copy.operand, copy.nbytes) == ("key", nbytes)
    assert copy.reason.startswith(reason)
    assert f"  key: {copy.reason}; " in str(found)


def test_an_out_that_gets_a_copy() -> None:
    x = half(2, 7, 64)
    found = explain(x, x, x, out=half(2, 7, 128)[..., ::2], device="A100")
    assert [(copy.operand, copy.nbytes) for copy in found.copies] == [("out", 2 * 7 * 128)]


def test_numpy_arrays_without_a_device() -> None:
    x = half(2, 7, 64)
    found = explain(x, x, x)
    assert (found.backend, found.device, found.plan, found.refusals) == ("numpy", None, None, ())
    assert 'no kernel: tiles of the scores on NumPy and BLAS; device="H200"' in str(found)
    assert explain(x, x, x, backend="math").backend == "math"


def test_cupy_arrays_are_explained_for_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", cupy_stand_in.make_module(DEVICES["L4"]))
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 0))
    x = cupy_stand_in.Array(half(2, 7, 64))
    found = explain(x, x, x)
    assert (found.backend, found.device) == ("cuda", DEVICES["L4"])
    assert sys.modules["cupy"].gpu.launches == []


def test_nothing_is_run_and_no_seed_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatorBackend, "run", None)
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    explain(half(2, 7, 64), half(2, 7, 64), half(2, 7, 64), dropout_p=0.5, backend="emulator")
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002


def test_all_reasons_and_the_way_out() -> None:
    x = half(2, 7, 64)
    wide = half(2, 7, 300)
    found = explain(wide, wide, wide, device="H200")
    assert [reason.split(" 32,")[0] for reason in found.refusals] == ["it has the head dims"]
    assert found.plan is None
    assert 'can run it\n  math: pass backend="math"' in str(found)
    full = np.zeros((2, 7, 64), np.float32)
    assert str(explain(full, full, full, precision="tf32", device="H200")).endswith("can run it\n  no backend")
    tiny = replace(DEVICES["A100"], name="tiny", smem_per_block=8 << 10)
    found = explain(x, x, x, device=tiny)
    assert len(found.refusals) == len(found.candidates) > 2
    assert "tiny has 8192 per block" in found.refusals[0]
    x = np.zeros((2, 7, 64), ml_dtypes.bfloat16)
    volta = replace(DEVICES["T4"], name="V100", cc=(7, 0))
    assert explain(x, x, x, device=volta).refusals == ("bfloat16 needs compute capability 7.5 or later, V100 has 7.0",)


def test_mods_are_traced() -> None:
    x, slopes = half(2, 300, 64), np.ones(2, np.float32)
    mods = {"score_mod": lambda score, b, h, i, j: score - slopes[h], "mask_mod": lambda b, h, i, j: i >= j}
    found = explain(x, x, x, **mods, device="H200")
    assert found.plan is not None
    (forward,) = [launch.spec for launch in found.plan.launches if isinstance(launch.spec, FwdSpec)]
    assert forward.features.mods == Mods(
        trace_score_mod(mods["score_mod"]).expression, trace_mask_mod(mods["mask_mod"]).expression
    )
    assert f"{forward}: " in str(found)

    found = explain(x, x, x, score_mod=lambda score, b, h, i, j: score if i > j else -score, device="H200")
    assert found.plan is None
    (reason,) = found.refusals
    assert "(q_idx > kv_idx) decides an `if`" in reason
    assert f"{__file__}:" in reason
    assert 'can run it\n  math: pass backend="math"' in str(found)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": np.ones((1, 2, 100, 300), bool)},
        {"attn_mask": np.ones((300,), bool)},
        {"attn_mask": np.ones((100, 300), np.float32)},
        {"mask_mod": lambda b, h, i, j: i >= j},
        {"attn_mask": np.ones((300,), bool), "mask_mod": lambda b, h, i, j: i - h >= j},
        {"is_causal": True},
    ],
    ids=["bool", "padding", "float", "mod", "both", "none"],
)
def test_summaries_are_those_that_are_launched(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], cxx: object
) -> None:
    query, key = half(1, 2, 100, 32), half(1, 2, 300, 32)
    found = explain(query, key, key, **options, backend="emulator")
    monkeypatch.setenv("CUPYFLASH_DEBUG", "1")
    cupyflash.attention(query, key, key, **options, backend="emulator")
    launched = re.findall(r"^cupyflash: (\S+) grid=(\d+)", capfd.readouterr().err, re.MULTILINE)
    assert found.plan is not None
    expected = [*(summary.launch for summary in found.summaries), *found.plan.launches]
    assert launched == [(str(launch.spec), str(launch.grid[0])) for launch in expected]
    is_bool = options.get("attn_mask", np.float32(0)).dtype == np.bool_
    assert len(found.summaries) == ("mask_mod" in options) + is_bool
    for summary in found.summaries:
        assert f"  {summary.launch.spec}: {summary.launch.grid[0]} blocks of 128 threads; which tiles" in str(found)


def test_a_batch_of_too_many_axes_is_refused_as_by_the_backend() -> None:
    query, key = half(2, 1, 2, 1, 2, 1, 5, 64), half(1, 2, 1, 2, 1, 1, 7, 64)
    found = explain(query, key, key, backend="emulator")
    with pytest.raises(cupyflash.Unsupported) as caught:
        cupyflash.attention(query, key, key, backend="emulator")
    assert found.refusals == caught.value.reasons["emulator"]
    x = half(2, 2, 2, 2, 2, 1, 5, 64)
    assert explain(x, x, x, backend="emulator").refusals == ()
    # A mask counts too; and an array that is copied for another reason lies as its copy does.
    mask = np.ones((2, 1, 2, 1, 2, 1, 1, 5), bool)
    found = explain(x, x, x, mask, backend="emulator")
    with pytest.raises(cupyflash.Unsupported) as caught:
        cupyflash.attention(x, x, x, mask, backend="emulator")
    assert found.refusals == caught.value.reasons["emulator"]
    spread = half(4, 4, 4, 4, 4, 1, 5, 128)[::2, ::2, ::2, ::2, ::2]
    found = explain(spread[..., ::2], x, x, backend="emulator")
    assert (found.refusals, [copy.operand for copy in found.copies]) == ((), ["query"])
    cupyflash.attention(spread[..., ::2], x, x, backend="emulator")
    assert explain(spread[..., :64], x, x, backend="emulator").refusals


@pytest.mark.parametrize("empty", [(0, 5, 64), (2, 0, 64)])
def test_nothing_to_compute(empty: tuple[int, ...]) -> None:
    assert "none: there is nothing to compute" in str(
        explain(half(*empty), half(2, 5, 64)[: empty[0]], half(5, 64), device="H200")
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "H20"}, ValueError, "device must be one of T4, A100, .*, or a .*DeviceSpec, but was 'H20'"),
        ({"device": 90}, TypeError, "device must be a name or a DeviceSpec, but was 90"),
        (
            {"device": "H200", "backend": "numpy"},
            ValueError,
            "backend must be \"cuda\" or None where a device is named, but was 'numpy'",
        ),
        ({"backend": "nowhere"}, ValueError, "backend must be one of .* but was 'nowhere'"),
        ({"is_causal": 3}, TypeError, "is_causal must be a bool, but was 3"),
        ({"stage": "raw"}, TypeError, "unexpected keyword argument 'stage'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = half(2, 5, 64)
    with pytest.raises(error, match=message):
        explain(x, x, x, **options)


def test_weights_are_a_launch_behind_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    query = np.zeros((1, 2, 512, 64), np.float16)
    found = explain(query, query, query, return_weights=True, device="H200")
    assert "  weights-f16-softmax-window: 128 blocks of 256 threads, 18 KiB of shared memory each" in str(found)


def test_docstring_example() -> None:
    module = sys.modules["cupyflash.explain"]
    assert doctest.testmod(module) == (0, 5)


@pytest.fixture
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("explain_page", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_in_the_docs_is_up_to_date(
    writer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    assert writer.main(["--check"]) == 0, "run `python docs/explain.py`"
    old = tmp_path / "explain.md"
    old.write_text("something else")
    assert writer.main(["--check", "--page", str(old)]) == 1
    assert "out of date" in capsys.readouterr().err
    assert writer.main(["--page", str(old)]) == 0
    assert old.read_text() == PAGE.with_suffix(".md").read_text()
