"""The benchmark runs, refuses wrong results and writes what it measured.  No test asks how fast it is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import cupyflash
from cupyflash.build.nvrtc import nvrtc_version
from tests.conftest import Require

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_cpu")


def test_smallest_row_is_measured_and_written(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    out = tmp_path / "small.json"
    result = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "bench_cpu.py"), "--quick", "--no-torch"),
            *("--cases", "small*", "--out", str(out)),
        ],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    (row,) = report["results"]
    assert row["name"].startswith("small")
    for implementation in ("cupyflash", "bare"):
        seconds = row["seconds"][implementation]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert seconds["samples"] > 1
    assert row["ratios"]["bare"] == row["seconds"]["bare"]["min"] / row["seconds"]["cupyflash"]["min"]
    assert report["machine"]["numpy"] == np.__version__
    assert row["name"] in result.stdout
    assert image.imread(out.with_suffix(".png")).ndim == 3


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        ("random", {}),
        ("additive", {"is_causal": True}),
        ("padding", {"window": (5, 0)}),
        (None, {"alibi_slopes": np.float32([0.5, 0.25, 0.1, 0.05])}),
        (None, {"score_mod": lambda score, b, h, q_idx, kv_idx: score - 0.1 * abs(q_idx - kv_idx)}),
        (None, {"dropout_p": 0.5, "seed": 1}),
    ],
)
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 3, 39)])
def test_wrong_rows_are_refused(
    bench: ModuleType, mask: str | None, options: dict[str, object], place: tuple[int, int, int]
) -> None:
    """The rows that are looked at are judged by their place in the whole problem."""
    if "dropout_p" in options:
        place = (0, 0, 0)
    shape = (3, 4, 40, 16)
    workload = bench.Workload(name="test", query_shape=shape, key_shape=shape, mask=mask, options=options)
    arguments = workload.arguments()
    out = bench.PREPARE["cupyflash"](**arguments)()
    assert 0 <= bench.check(out, **arguments) < 1e-5
    out[place] += 1e-3
    with pytest.raises(AssertionError, match="attention"):
        bench.check(out, **arguments)


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {"is_causal": True}),
        ("padding", {}),
        ("random", {"window": (5, 0)}),
        (None, {"enable_gqa": True}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_materialising_numpy_is_right(
    bench: ModuleType, mask: str | None, options: dict[str, object], dtype: str
) -> None:
    """What we call slower must at least be correct."""
    heads = 2 if "enable_gqa" in options else 4
    workload = bench.Workload(
        name="test",
        query_shape=(3, 4, 40, 16),
        key_shape=(3, heads, 40, 16),
        mask=mask,
        options=options,
        dtype=dtype,
    )
    arguments = workload.arguments()
    bench.check(bench.PREPARE["numpy"](**arguments)(), **arguments)


def test_every_row_can_be_chosen_by_its_name(bench: ModuleType) -> None:
    names = [workload.name for workload in bench.WORKLOADS]
    assert len(set(names)) == len(names)
    for workload in bench.WORKLOADS:
        assert set(workload.others) <= set(bench.PREPARE)
        assert set(workload.targets) <= set(workload.others)


def test_overhead_is_measured_and_written(tmp_path: Path, require: Require) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    try:
        require("nvrtc", nvrtc_version(), "")
    except cupyflash.Unsupported as error:
        require("nvrtc", None, str(error))
    out = tmp_path / "overhead.json"
    result = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "bench_overhead.py"), "--quick"),
            *("--cases", "*decode*", "--out", str(out)),
        ],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert len(report["results"]) == 3
    for row in report["results"]:
        assert 0 < row["seconds"]["min"] <= row["seconds"]["median"]
        assert row["name"] in result.stdout
    assert report["not_in_it"] in result.stdout


def test_every_call_of_the_overhead_has_other_lengths(bench: ModuleType) -> None:
    overhead = importlib.import_module("bench_overhead")
    for row in overhead.ROWS:
        calls = row.calls(overhead.Array)
        keys = [next(calls)["key"] for _ in range(5)]
        is_repeated = row.calls in (overhead.same, overhead.modded, overhead.elsewhere)
        assert len({key.shape[-2] for key in keys}) == (1 if is_repeated else 5)
        assert len({key.data.ptr for key in keys}) == (5 if row.calls is overhead.elsewhere else 1)
