"""The GPU benchmark as far as it goes without a GPU."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupyflash
from tests.gpu.device import NO_GPU, Gpu, find_gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_gpu")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_without_a_gpu() -> None:
    gpu, reason = find_gpu()
    if gpu is not None:
        pytest.skip(f"there is a GPU: {gpu.name}")
    answer = run()
    assert answer.returncode == NO_GPU
    assert answer.stderr.startswith("nothing can be measured: ")
    assert reason.split("(")[0] in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"), [(("--cases", "d5*"), "matches none"), (("--rounds", "0"), "at least 1")]
)
def test_bad_arguments(words: tuple[str, ...], message: str) -> None:
    answer = run(*words)
    assert answer.returncode == 2
    assert message in answer.stderr


def test_names_are_unique(bench: ModuleType) -> None:
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names)
    assert {"d128 causal 4096", "d128 full 4096 float16", "d128 full 1x8192 32/8 heads"} <= set(names)


def test_everything_takes_turns(bench: ModuleType) -> None:
    order = []
    # A clock that slows down from sample to sample disturbs a ratio within a round little, across rounds a lot.
    drift = itertools.count(1)

    def sampler(name: str, seconds: float) -> float:
        order.append(name)
        return seconds * (1 + next(drift) / 1000)

    samplers = {"cupyflash": lambda: sampler("cupyflash", 1.0), "cudnn": lambda: sampler("cudnn", 2.0)}
    samples, ratios = bench.take_turns(samplers, 4)
    assert order == ["cupyflash", "cudnn", "cudnn", "cupyflash"] * 2
    assert [len(taken) for taken in samples.values()] == [4, 4]
    assert list(ratios) == ["cudnn"]
    assert ratios["cudnn"]["samples"] == 4
    assert ratios["cudnn"]["low"] <= ratios["cudnn"]["median"] <= ratios["cudnn"]["high"]
    assert ratios["cudnn"]["median"] == pytest.approx(2.0, rel=2e-3)


def test_memory_bound_cases_rotate_over_twice_the_cache(bench: ModuleType) -> None:
    l2_bytes = 60 << 20
    for case in bench.CASES:
        if case.reads_once:
            assert (case.sets(l2_bytes) - 1) * case.bytes >= 2 * l2_bytes
        else:
            assert case.sets(l2_bytes) == 1
    small = bench.Case(1, (8, 8), 1, 1024, 128, reads_once=True)
    assert (small.sets(l2_bytes) - 1) * small.bytes >= 2 * l2_bytes


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_wrong_results_are_refused(bench: ModuleType, dtype: str, is_causal: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    case = bench.Case(2, (4, 2), 40, 40, 16, is_causal, dtype)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(shape).to(getattr(torch, dtype)) for shape in (case.shapes[0], *[case.shapes[1]] * 2)
    )
    wide = [x.double().repeat_interleave(case.heads[0] // x.shape[1], dim=1) for x in (query, key, value)]
    right = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=is_causal).to(query.dtype)
    bench.check(right, case, (query, key, value), torch)
    for place in ((0, 0, 0, 3), (1, 3, 39, 15)):
        wrong = right.clone()
        wrong[place] += 0.1
        with pytest.raises(AssertionError, match="attention"):
            bench.check(wrong, case, (query, key, value), torch)
    right[1, 1, 20, 5] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        bench.check(right, case, (query, key, value), torch)


@pytest.mark.parametrize("b_and_h", [(0, 0), (1, 3)])
def test_a_feature_for_some_rows_is_that_for_all(bench: ModuleType, b_and_h: tuple[int, int]) -> None:
    b, h = b_and_h
    rng = np.random.default_rng(0)
    for feature, arguments in bench.FEATURES.items():
        if feature in bench.UNCHECKED:
            continue
        case = bench.Case(2, (4, 4), 1100, 1100, 8, feature=feature)
        query, key, value = rng.standard_normal((3, 2, 4, 1100, 8), dtype=np.float32)
        rows = slice(1090, 1094)
        whole = cupyflash.attention(query, key, value, **arguments(case, *bench.EVERYTHING))
        asked = arguments(case, b, h, rows)
        part = cupyflash.attention(query[b, h, rows], key[b, h], value[b, h], **asked, align=rows.start)
        np.testing.assert_allclose(whole[b, h, rows], part, rtol=1e-4, atol=1e-6, err_msg=feature)
        plain = cupyflash.attention(query, key, value)
        assert not np.allclose(whole, plain, rtol=1e-4, atol=1e-6), feature


def test_backends_of_pytorch_are_chosen_alone(bench: ModuleType) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    switches = {"cudnn": "cudnn", "flash": "flash", "efficient": "mem_efficient", "math": "math"}
    for name in bench.BACKENDS:
        with bench.as_only_backend(name, torch):
            enabled = {key: getattr(torch.backends.cuda, f"{word}_sdp_enabled")() for key, word in switches.items()}
        assert enabled == {key: key == name for key in switches}


def report(bench: ModuleType) -> dict[str, Any]:
    compute, memory = bench.Case(4, (16, 16), 4096, 4096, 128), bench.Case(32, (32, 8), 1, 8192, 128, reads_once=True)
    samples = {"cupyflash": [1e-3, 1.1e-3, 0.9e-3], "cudnn": [0.8e-3, 0.9e-3, 0.7e-3]}
    ratios = {"cudnn": {"median": 0.8, "low": 0.78, "high": 0.83, "samples": 3}}
    rows = [
        bench.row_of(compute, samples, ratios, {"flash": "it does not like this"}),
        bench.row_of(memory, {}, {}, {"cupyflash": "refused"}),
    ]
    machine = dict.fromkeys(("name", "driver", "cuda", "cupy", "nvrtc", "torch", "cudnn"), "1.2")
    clocks = {"after": {"clocks.sm": "1980 MHz"}}
    about = {"commit": "0123456789abcdef", "dirty": True, "date": "2030-01-02T03:04:05", "command": "python bench"}
    return {"machine": {**machine, "name": "A GPU"}, "clocks": clocks, **about, "results": rows}


def test_rates(bench: ModuleType) -> None:
    row, lacking = report(bench)["results"]
    assert row["TFLOP/s"]["cupyflash"] == pytest.approx(4 * 4 * 16 * 4096 * 4096 * 128 / 1e-3 / 1e12)
    assert row["GB/s"]["cupyflash"] == pytest.approx(4 * 4 * 16 * 4096 * 128 * 2 / 1e-3 / 1e9)
    assert row["seconds"]["cudnn"]["median"] == 0.8e-3
    line = bench.describe_row(row)
    assert "cupyflash 550, cudnn 687 TFLOP/s; cudnn 0.80× (0.78 to 0.83)" in line
    assert "flash is left out: it does not like this" in line
    assert "cupyflash is left out: refused" in bench.describe_row(lacking)


def test_readme_table(bench: ModuleType, tables: ModuleType) -> None:
    text = tables.gpu_table([report(bench)])
    lines = text.splitlines()
    assert lines[0] == "| case | cupyflash | vs cuDNN | vs FlashAttention-2 | vs memory-efficient |"
    assert lines[2] == "| d128 full 4096 | 550 TFLOP/s | 0.80× (0.78 to 0.83) | – | – |"
    assert lines[3] == "| d128 full 1x8192 32/8 heads | – | – | – | – |"
    assert "A GPU at 1980 MHz" in text
    assert "commit 0123456789 with changes, 2030-01-02; `python bench`" in text
    assert tables.gpu_table([]) == tables.NOT_MEASURED


@pytest.fixture
def without_gpu(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with everything that touches a GPU put in the CPU's place, and constant times."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    gpu = Gpu("NVIDIA A-1 (2)", "sm_90", "580.1", "13.0", "14.2.0", "13.0", 1 << 20, 8)
    seconds = {"cupyflash": 1e-3, "cudnn": 2e-3, "flash": 3e-3}
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(ExternalStream=lambda pointer: nullcontext())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(bench, "CASES", (bench.Case(1, (2, 2), 20, 20, 16), bench.Case(1, (2, 1), 9, 20, 16, True)))
    monkeypatch.setattr(bench, "what_is_missing", lambda: (gpu, ""))

    def operands(case: Any, count: int, torch: Any) -> list[tuple[Any, ...]]:
        shapes = (case.shapes[0], *[case.shapes[1]] * 2)
        return [tuple(torch.randn(shape).to(getattr(torch, case.dtype)) for shape in shapes) for _ in range(count)]

    def ours(case: Any, sets: Any, torch: Any) -> Any:
        def call(number: int) -> Any:
            arrays = [bench.to_numpy(x, torch) for x in sets[number % len(sets)]]
            out = cupyflash.attention(*arrays, is_causal=case.is_causal, enable_gqa=case.heads[0] != case.heads[1])
            return torch.from_numpy(out.view(np.int16)).view(sets[0][0].dtype)

        return call

    @contextmanager
    def backend(name: str, torch: Any) -> Iterator[None]:
        if name == "efficient":
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        yield

    monkeypatch.setattr(bench, "operands_of", operands)
    monkeypatch.setattr(bench, "our_call", ours)
    monkeypatch.setattr(bench, "as_only_backend", backend)
    monkeypatch.setattr(bench, "warm_up", lambda name, call, torch: 1)
    monkeypatch.setattr(bench, "sampler", lambda name, call, calls, torch: lambda: seconds[name])
    return bench


def test_a_run_writes_its_report(without_gpu: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu-test.json"
    assert without_gpu.main(["--out", str(out), "--rounds", "3"]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in report["results"]] == ["d16 full 20", "d16 causal 9x20 2/1 heads"]
    for row in report["results"]:
        assert row["refused"] == {"efficient": "No available kernel. Aborting execution."}
        assert row["ratios"]["cudnn"] == {"median": 2.0, "low": 2.0, "high": 2.0, "samples": 3}
        assert row["ratios"]["flash"]["median"] == pytest.approx(3.0)
    assert report["machine"]["driver"] == "580.1"
    assert report["command"] == f"python benchmarks/bench_gpu.py --out {out} --rounds 3"
    assert "| d16 full 20 | 0 TFLOP/s | 2.00× (2.00 to 2.00) | 3.00× (3.00 to 3.00) | – |" in tables.gpu_table([report])


def test_our_wrong_result_is_a_failure(
    without_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = without_gpu.our_call
    monkeypatch.setattr(without_gpu, "our_call", lambda *given: lambda number: right(*given)(number) * 2)
    monkeypatch.setattr(without_gpu, "RESULTS", tmp_path)
    assert without_gpu.main(["--cases", "*full*"]) == 1
    (row,) = json.loads((tmp_path / "gpu-nvidia-a-1-2.json").read_text(encoding="utf-8"))["results"]
    assert row["refused"]["cupyflash"].startswith("attention")
    assert set(row["seconds"]) == {"cudnn", "flash"}
    assert row["ratios"] == {}
