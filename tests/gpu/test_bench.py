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
def baselines(bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_baselines")


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
    ("words", "message"),
    [
        (("--cases", "d5*"), "matches none"),
        (("--rounds", "0"), "at least 1"),
        (("--with", "flex,xla"), "'xla'; expected some of flex, jax"),
    ],
)
def test_bad_arguments(words: tuple[str, ...], message: str) -> None:
    answer = run(*words)
    assert answer.returncode == 2
    assert message in answer.stderr


def test_names_are_unique(bench: ModuleType) -> None:
    names = [case.name for case in bench.CASES]
    assert len(set(names)) == len(names)
    assert {"d128 causal 4096", "d128 full 4096 float16", "d128 full 4096 dropout"} <= set(names)
    assert "Llama-3 8B: d128 full 1x8192 batch 32 32/8 heads" in names


def test_the_cases_of_the_targets_are_there(bench: ModuleType) -> None:
    for head_dim, is_causal, length in itertools.product((64, 128, 256), (False, True), (2048, 4096, 8192, 16384)):
        (case,) = (
            case
            for case in bench.CASES
            if (case.head_dim, case.is_causal, case.seqlen_q, case.dtype) == (head_dim, is_causal, length, "bfloat16")
            and not case.model
            and not case.feature
        )
        assert case.batch * length == 16384
        assert case.heads[0] * head_dim == 2048


def test_who_is_compared_with_whom(bench: ModuleType) -> None:
    others = {case.name: case.others for case in bench.CASES}
    assert others["d128 full 4096"] == ("cudnn", "flash", "efficient")
    assert others["d64 full 2048 float64"] == ("math",)
    assert others["AlphaFold: d32 full 384 pair bias"] == ("cudnn", "flash", "efficient")
    assert others["d128 full 4096 softcap"] == ()


def test_work(bench: ModuleType) -> None:
    case = bench.Case(2, (4, 2), 100, 200, 64, dtype="float32")
    assert case.bytes == 4 * 2 * (2 * 4 * 100 * 64 + 2 * 2 * 200 * 64)
    assert case.operations == 4 * 2 * 4 * 100 * 200 * 64
    assert bench.work_of("flash", case) == (case.operations, case.bytes)
    assert bench.work_of("gemm", case)[0] == 2 * 4096**3
    assert bench.work_of("copy", case)[1] == 2 << 30
    windowed, causal = (bench.Case(1, (1, 1), 8192, 8192, 64, True, feature=x) for x in ("window 4096", ""))
    assert windowed.operations < causal.operations


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
        case = bench.Case(2, (4, 4), 1100, 1100, 8, dtype="float32", feature=feature)
        query, key, value = rng.standard_normal((3, 2, 4, 1100, 8), dtype=np.float32)
        rows = slice(1090, 1094)
        whole = cupyflash.attention(query, key, value, **arguments(case, -1, -1, slice(None)))
        asked = arguments(case, b, h, rows)
        part = cupyflash.attention(query[b, h, rows], key[b, h], value[b, h], **asked, align=rows.start)
        np.testing.assert_allclose(whole[b, h, rows], part, rtol=1e-4, atol=1e-6, err_msg=feature)
        if feature == "window 4096":  # as long as these are
            continue
        plain = cupyflash.attention(query, key, value)
        assert not np.allclose(whole, plain, rtol=1e-4, atol=1e-6), feature


def test_backends_of_pytorch_are_chosen_alone(bench: ModuleType, baselines: ModuleType) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    switches = {"cudnn": "cudnn", "flash": "flash", "efficient": "mem_efficient", "math": "math"}
    for name in baselines.BACKENDS:
        with bench.as_only_backend(name, torch):
            enabled = {key: getattr(torch.backends.cuda, f"{word}_sdp_enabled")() for key, word in switches.items()}
        assert enabled == {key: key == name for key in switches}


def report(bench: ModuleType) -> dict[str, Any]:
    compute, memory = bench.Case(4, (16, 16), 4096, 4096, 128), bench.Case(32, (32, 8), 1, 8192, 128, reads_once=True)
    samples = {
        "cupyflash": [1e-3, 1.1e-3, 0.9e-3],
        "cudnn": [0.8e-3, 0.9e-3, 0.7e-3],
        "gemm": [2 * 8192**3 / 800e12] * 3,
    }
    ratios = {"cudnn": {"median": 0.8, "low": 0.78, "high": 0.83, "samples": 3}}
    rows = [
        bench.row_of(compute, samples, ratios, {"flash": "it does not like this"}, {"sm_mhz": 1700.0, "watts": 690.0}),
        bench.row_of(memory, {"copy": [1e-3]}, {}, {"cupyflash": "refused"}),
        {
            "name": "a call",
            "section": "host",
            "seconds": {"cupyflash": {"median": 20e-6}, "torch": {"median": 12e-6}, "graph replay": {"median": 5e-6}},
            "until_done": {
                "cupyflash": {"median": 21e-6},
                "torch": {"median": 13e-6},
                "graph replay": {"median": 6e-6},
            },
            "ratios": {},
            "refused": {},
        },
    ]
    machine = dict.fromkeys(("name", "driver", "cuda", "cupy", "nvrtc", "torch", "cudnn"), "1.2")
    clocks = {"after": {"sm_mhz": 1980.0}}
    about = {"commit": "0123456789abcdef", "dirty": True, "date": "2030-01-02T03:04:05", "command": "python bench"}
    return {"machine": {**machine, "name": "A GPU"}, "clocks": clocks, **about, "results": rows}


def test_rates(bench: ModuleType) -> None:
    row, lacking, host = report(bench)["results"]
    assert row["TFLOP/s"]["cupyflash"] == pytest.approx(4 * 4 * 16 * 4096 * 4096 * 128 / 1e-3 / 1e12)
    assert row["GB/s"]["cupyflash"] == pytest.approx(4 * 4 * 16 * 4096 * 128 * 2 / 1e-3 / 1e9)
    assert row["TFLOP/s"]["gemm"] == pytest.approx(800)
    assert row["of_yardstick"] == {
        "cupyflash": pytest.approx(550 / 800, rel=1e-2),
        "cudnn": pytest.approx(0.86, rel=1e-2),
    }
    assert row["seconds"]["cudnn"]["median"] == 0.8e-3
    line = bench.describe_row(row)
    assert "cupyflash 550, cudnn 687, gemm 800 TFLOP/s (69% of gemm); cudnn 0.80× (0.78 to 0.83); 1700 MHz" in line
    assert "flash is left out: it does not like this" in line
    assert "cupyflash is left out: refused" in bench.describe_row(lacking)
    assert lacking["GB/s"] == {"copy": pytest.approx(2147.483648)}
    assert "cupyflash 20.0 µs (21.0 until done), torch 12.0 µs" in bench.describe_host(host)


def test_readme_table(bench: ModuleType, tables: ModuleType) -> None:
    text = tables.gpu_table([report(bench)])
    lines = text.splitlines()
    assert lines[0] == "| case | cupyflash | of GEMM or copy | vs cuDNN | vs FlashAttention-2 | vs memory-efficient |"
    assert lines[2] == "| d128 full 4096 | 550 TFLOP/s | 69 % | 0.80× (0.78 to 0.83) | – | – |"
    assert lines[3] == "| d128 full 1x8192 batch 32 32/8 heads | – | – | – | – | – |"
    assert "A GPU at 1700 MHz and 690 W" in text
    assert "commit 0123456789 with changes, 2030-01-02; `python bench`" in text
    assert tables.gpu_table([]) == tables.NOT_MEASURED


def test_host_table(bench: ModuleType, tables: ModuleType) -> None:
    lines = tables.host_table([report(bench)]).splitlines()
    assert lines[0] == "| call | cupyflash | with out= | PyTorch's SDPA | graph replay |"
    assert lines[2] == "| a call | 20 µs | – | 12 µs | 5 µs |"
    assert tables.host_table([]) == tables.NOT_MEASURED


def test_plot(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for results in (report(bench), {**report(bench), "results": []}):
        bench.plot(results, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class Library:
    """Stands in for NVML: it knows one GPU, and nothing of its power."""

    def __init__(self, works: bool = True) -> None:
        self.status = 0 if works else 999

    def nvmlInit_v2(self) -> int:
        return self.status

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: bytes, handle: Any) -> int:
        return 0 if bus_id == b"0000:01:00.0" else 6

    def nvmlDeviceGetClockInfo(self, device: Any, kind: int, value: Any) -> int:
        value._obj.value = {1: 1700, 2: 3201}[kind]
        return 0

    def nvmlDeviceGetPowerUsage(self, device: Any, value: Any) -> int:
        return 3

    def nvmlDeviceGetTemperature(self, device: Any, kind: int, value: Any) -> int:
        value._obj.value = 61
        return 0


def test_clocks(bench: ModuleType) -> None:
    told = {"sm_mhz": 1700, "memory_mhz": 3201, "celsius": 61}
    assert bench.Clocks("0000:01:00.0", Library()).sample() == told
    assert bench.Clocks("0000:02:00.0", Library()).sample() == {}
    assert bench.Clocks("0000:01:00.0", Library(works=False)).sample() == {}
    samples: list[dict[str, float]] = [{"sm_mhz": 1.0}, {"sm_mhz": 3.0, "watts": 5.0}, {"sm_mhz": 2.0}, {}]
    assert bench.summarize_clocks(samples) == {"sm_mhz": 2, "watts": 5}
    assert bench.summarize_clocks([]) == {}


def test_host_times(bench: ModuleType) -> None:
    """A call takes 2 s until it returns; the first is not counted; the GPU needs 10 s more for all."""
    now = [0.0]

    def call(number: int) -> None:
        now[0] += 2

    def synchronize() -> None:
        now[0] += 10

    assert bench.time_host(call, 5, synchronize, lambda: now[0]) == (2.0, 4.0)


def test_a_sample(bench: ModuleType) -> None:
    """Two events around the calls, and a look at the clocks while they run."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 12.0  # ms

    torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event))
    sample = bench.sampler("cupyflash", lambda n: order.append(f"call {n}"), 3, torch, lambda: order.append("clocks"))
    assert sample() == pytest.approx(4e-3)
    assert order == ["call 0", "event", "call 0", "call 1", "call 2", "event", "clocks", "wait"]


def test_extra_ones_say_why_not(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.Case(1, (2, 2), 20, 20, 16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else object())
    assert bench.why_not("flex", plain) == "triton not installed"
    assert bench.why_not("jax", plain) == ""
    assert "float64" in bench.why_not("jax", bench.Case(1, (2, 2), 20, 20, 16, dtype="float64"))
    assert bench.why_not("pallas", bench.Case(1, (2, 2), 128, 256, 64)) == ""
    assert "steps of 64" in bench.why_not("pallas", bench.Case(1, (2, 2), 128, 256, 96))
    assert "steps of 128 and 256" in bench.why_not("pallas", bench.Case(1, (2, 2), 128, 320, 64))
    assert "as many queries" in bench.why_not("pallas", bench.Case(1, (2, 2), 128, 256, 64, is_causal=True))
    assert "plain calls" in bench.why_not("jax", bench.Case(1, (2, 2), 20, 20, 16, feature="softcap"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_pytorch_gets_what_we_get(bench: ModuleType, baselines: ModuleType, dtype: str) -> None:
    """The calls that are compared with are right by our own check: PyTorch runs here on the CPU."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    biased = bench.Case(2, (4, 4), 40, 40, 16, dtype=dtype, feature="pair bias")
    for case in (biased, bench.Case(2, (4, 2), 40, 40, 16, True, dtype)):
        torch.manual_seed(0)
        shapes = (case.shapes[0], *[case.shapes[1]] * 2)
        sets = [tuple(torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes)]
        out = baselines.call_of("math", case, sets, torch)(0)
        bench.check(out, case, sets[0], torch)


@pytest.mark.parametrize("feature", ["", "ALiBi", "pair bias"])
def test_our_calls(baselines: ModuleType, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """With CuPy's part played by NumPy: operands in turns, the output in place, features as arrays."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    cupy = ModuleType("cupy")
    cupy.from_dlpack = lambda tensor: tensor.numpy()  # type: ignore[attr-defined]
    cupy.asarray = np.asarray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    attention = cupyflash.attention
    asked: list[str | None] = []

    def on_numpy(*arrays: Any, backend: str | None = None, **options: Any) -> Any:
        asked.append(backend)
        return attention(*arrays, **options)

    monkeypatch.setattr(cupyflash, "attention", on_numpy)
    case = bench.Case(2, (4, 2 if feature == "" else 4), 30, 30, 16, True, "float16", feature=feature)
    shapes = (case.shapes[0], *[case.shapes[1]] * 2)
    sets = [tuple(torch.randn(shape).half() for shape in shapes) for _ in range(2)]
    call = baselines.call_of("cupyflash", case, sets, torch)
    first = call(0).clone()
    bench.check(first, case, sets[0], torch)
    bench.check(call(1), case, sets[1], torch)
    assert not torch.equal(first, call(1))
    assert torch.equal(first, call(2))
    if not feature:
        fresh = baselines.fresh_call(case, sets, torch)
        np.testing.assert_array_equal(fresh(0), first.numpy())
        assert fresh(0) is not fresh(0)
    assert set(asked[:4]) == {"cuda"}


def test_graphs_are_captured_after_a_call(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def noted(what: str) -> Iterator[None]:
        order.append(what)
        yield
        order.append(f"end of {what}")

    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: order.append("stream waits"))
    torch = SimpleNamespace(
        cuda=SimpleNamespace(
            synchronize=lambda: order.append("device waits"),
            Stream=lambda: stream,
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: order.append("replay")),
            stream=lambda given: noted("torch's stream"),
            graph=lambda graph, stream: noted("capture"),
        )
    )
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        Stream=SimpleNamespace(from_external=lambda stream: noted(f"stream {stream.__cuda_stream__()[1]}"))
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    replay = bench.in_graph(lambda number: order.append(f"call {number}"), 2, torch)
    calls = ["call 0", "call 1"]
    assert order == [
        *("device waits", "torch's stream", "stream 7", *calls, "stream waits"),
        *("capture", *calls, "end of capture", "end of stream 7", "end of torch's stream", "device waits"),
    ]
    order.clear()
    replay(0)
    assert order == ["replay"]


def stand_in(torch: Any) -> ModuleType:
    """Of CuPy what the benchmark asks of it, on NumPy arrays and PyTorch's CPU tensors."""
    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(deviceGetPCIBusId=lambda device: "0000:01:00.0")
    cupy.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        Stream=SimpleNamespace(from_external=lambda stream: nullcontext()),
        runtime=runtime,
        Device=lambda: SimpleNamespace(id=0),
    )
    return cupy


@pytest.fixture
def without_gpu(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with everything that touches a GPU put in the CPU's place, and constant times."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    gpu = Gpu("NVIDIA A-1 (2)", "sm_90", "580.1", "13.0", "14.2.0", "13.0", 1 << 20, 8)
    seconds = {"cupyflash": 1e-3, "cudnn": 2e-3, "flash": 3e-3, "gemm": 5e-3, "copy": 5e-3}
    monkeypatch.setitem(sys.modules, "cupy", stand_in(torch))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cases = (bench.Case(1, (2, 2), 20, 20, 16), bench.Case(1, (2, 1), 9, 400, 16, True, reads_once=True))
    monkeypatch.setattr(bench, "CASES", cases)
    monkeypatch.setattr(bench, "HOST_CASES", {"a call": cases[0]})
    monkeypatch.setattr(bench, "HOST_ROUNDS", 2)
    monkeypatch.setattr(bench, "HOST_CALLS", 2)
    monkeypatch.setattr(bench, "what_is_missing", lambda: (gpu, ""))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "Clocks", lambda bus_id: SimpleNamespace(sample=lambda: {"sm_mhz": 1700.0}))

    def operands(case: Any, count: int, torch: Any) -> list[tuple[Any, ...]]:
        shapes = (case.shapes[0], *[case.shapes[1]] * 2)
        return [tuple(torch.randn(shape).to(getattr(torch, case.dtype)) for shape in shapes) for _ in range(count)]

    def ours(name: str, case: Any, sets: Any, torch: Any) -> Any:
        if name == "jax":
            raise RuntimeError("it does not start")

        def call(number: int) -> Any:
            arrays = [bench.to_numpy(x, torch) for x in sets[number % len(sets)]]
            out = cupyflash.attention(*arrays, **case.options)
            return torch.from_numpy(out.view(np.int16)).view(sets[0][0].dtype)

        return call

    @contextmanager
    def backend(name: str, torch: Any) -> Iterator[None]:
        if name == "efficient":
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        yield

    def timed(name: str, call: Any, calls: int, torch: Any, watch: Any) -> Any:
        def sample() -> float:
            call(0)
            watch()
            return seconds[name]

        return sample

    monkeypatch.setattr(bench, "operands_of", operands)
    monkeypatch.setattr(bench, "call_of", ours)
    monkeypatch.setattr(bench, "fresh_call", lambda *given: ours("cupyflash", *given))
    monkeypatch.setattr(bench, "as_only_backend", backend)
    monkeypatch.setattr(bench, "in_graph", lambda call, count, torch: lambda n: [call(n) for n in range(count)])
    monkeypatch.setattr(bench, "warm_up", lambda name, call, torch: 1)
    monkeypatch.setattr(bench, "sampler", timed)
    return bench


def test_a_run_writes_its_report(without_gpu: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu-test.json"
    assert without_gpu.main(["--out", str(out), "--rounds", "3"]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    names = [row["name"] for row in report["results"]]
    assert names == ["a call", "d16 full 20", "d16 causal 9x400 batch 1 2/1 heads"]
    host, plain, memory = report["results"]
    for row in (plain, memory):
        assert row["refused"] == {"efficient": "No available kernel. Aborting execution."}
        assert row["ratios"]["cudnn"] == {"median": 2.0, "low": 2.0, "high": 2.0, "samples": 3}
        assert row["ratios"]["flash"]["median"] == pytest.approx(3.0)
        assert row["clocks"] == {"sm_mhz": 1700.0}
    assert (plain["yardstick"], memory["yardstick"]) == ("gemm", "copy")
    assert set(plain["ratios"]) == {"cudnn", "flash"}  # a yardstick is no rival
    # A replay is of all sets, so a call takes its part of the time.
    sets = without_gpu.CASES[1].sets(1 << 20)
    assert sets > 10
    assert memory["seconds"]["cupyflash"]["median"] == pytest.approx(1e-3 / sets)
    assert memory["seconds"]["copy"]["median"] == 5e-3
    assert set(host["seconds"]) == {"cupyflash", "cupyflash, out=", "torch", "graph replay"}
    assert host["until_done"]["torch"]["median"] >= host["seconds"]["torch"]["median"] > 0
    assert report["machine"]["driver"] == "580.1"
    assert report["not_reached"] == []
    assert report["command"] == f"python benchmarks/bench_gpu.py --out {out} --rounds 3"
    assert "| d16 full 20 | 0 TFLOP/s | 0 % | 2.00× (2.00 to 2.00) | 3.00× (3.00 to 3.00) | – |" in tables.gpu_table(
        [report]
    )
    assert out.with_suffix(".png").exists()


def test_time_runs_out(without_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu-test.json"
    assert without_gpu.main(["--out", str(out), "--seconds", "0", "--rounds", "1"]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [row["section"] for row in report["results"]] == ["host"]
    assert report["not_reached"] == [case.name for case in without_gpu.CASES]
    assert "not reached in 0 s: d16 full 20; " in capsys.readouterr().out


def test_others_are_named(without_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(without_gpu, "why_not", lambda name, case: "it is too new" if name == "flex" else "")
    out = tmp_path / "gpu-test.json"
    assert without_gpu.main(["--out", str(out), "--cases", "*full*", "--rounds", "1", "--with", "flex,jax"]) == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert row["refused"]["flex"] == "it is too new"
    assert row["refused"]["jax"] == "it does not start"


def test_our_wrong_result_is_a_failure(
    without_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = without_gpu.call_of

    def wrong(name: str, *given: Any) -> Any:
        return lambda number: right(name, *given)(number) * (2 if name == "cupyflash" else 1)

    monkeypatch.setattr(without_gpu, "call_of", wrong)
    monkeypatch.setattr(without_gpu, "RESULTS", tmp_path)
    assert without_gpu.main(["--cases", "*full*", "--rounds", "1"]) == 1
    (row,) = json.loads((tmp_path / "gpu-nvidia-a-1-2.json").read_text(encoding="utf-8"))["results"]
    assert row["refused"]["cupyflash"].startswith("attention")
    assert set(row["seconds"]) == {"cudnn", "flash", "gemm"}
    assert row["ratios"] == {}
