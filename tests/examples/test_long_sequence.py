"""examples/long_sequence.py: it measures what it says, on a sequence that is short enough for a test."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.examples.test_examples import EXAMPLES, find_number, run_example

PACKAGES = ("matplotlib", "psutil", "tqdm")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("long_sequence")


@pytest.mark.usefixtures("example")
def test_it_prints_and_draws(tmp_path: Path) -> None:
    printed = run_example("long_sequence.py", "--length", "5000", "--output", "made", folder=tmp_path)
    assert find_number(r"weights +([\d.]+) GiB", printed) == pytest.approx(5000**2 * 4 / 2**30, abs=0.005)
    assert 0 < find_number(r"error +(\S+) at most", printed) < 1e-6  # outputs are below 0.1, float32
    assert find_number(r"the result is ([\d.]+) MiB", printed) == pytest.approx(5000 * 64 * 4 / 2**20, abs=0.05)
    # Other things of the process may come and go; the weights would be 95 MiB.
    assert find_number(r"added +(-?[\d.]+) MiB at most", printed) < 50
    assert len(re.findall(r"^ +[\d.]+ +[\d.]+ MiB +-?[\d.]+ MiB$", printed, re.MULTILINE)) >= 2

    picture = tmp_path / "made" / "long-sequence-5000.png"
    assert f"picture   {Path('made') / picture.name}" in printed
    pixels = pytest.importorskip("matplotlib.image").imread(picture)
    assert pixels.shape[1] > 2 * pixels.shape[0]
    assert pixels.std() > 0.1


@pytest.mark.usefixtures("math_on_cuda")
def test_on_a_gpu_the_gpus_memory_counts(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--length", "300", "--backend", "cuda", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "this GPU has 4.00 GiB" in printed
    assert re.search(r"0\.0 +1024\.0 MiB +0\.0 MiB", printed)
    assert find_number(r"error +(\S+) at most", printed) < 1e-6


def test_default_length_is_too_long_for_memory(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example.Machine, "total", 16 << 20)
    example.main(["--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert find_number(r"sequence +([\d,]+)", printed) == 3072  # 36 MiB of weights; those of 2048 are 16 MiB
    assert (tmp_path / "long-sequence-3072.png").exists()


def test_errors_are_seen(example: ModuleType) -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 20, 4), dtype=np.float32)
    scores = query @ key.T / 2
    out = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) @ value
    assert example.error_of_rows(out, query, key, value, range(20)) < 1e-6
    out[7, 2] += 0.01
    assert example.error_of_rows(out, query, key, value, range(20)) == pytest.approx(0.01, rel=1e-3)


def test_wrong_numbers_are_named(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--length", "0"], ["--head-dim", "-1"]):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert " ".join(arguments) in capsys.readouterr().err
