"""The examples run as a reader runs them, from a checkout, and what they print is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cupyflash import mods

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(name: str, *arguments: str, folder: Path) -> str:
    """What the script prints.  It runs elsewhere, with no path set: it has to find the package itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def find_number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1].replace(",", ""))


def test_quickstart(tmp_path: Path) -> None:
    printed = run_example("quickstart.py", "1024", folder=tmp_path)
    assert "out (1, 8, 1024, 64) float32" in printed
    # Outputs are averages of standard normal numbers, and float32 is off by some 1e-7 of each.
    assert 0 <= find_number(r'difference from backend="math": (\S+)', printed) < 1e-5
    tiled, materialised = (
        find_number(rf'backend="{name}": .* ms, +([\d.]+) MiB', printed) for name in ("numpy", "math")
    )
    assert materialised >= 8 * 1024**2 * 4 / 2**20  # its scores
    assert tiled < materialised / 2


def test_denoise_photo_gains_five_decibels(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    output = tmp_path / "made"
    printed = run_example("denoise_photo.py", "--size", "96", "--output", str(output), folder=tmp_path)

    before = find_number(r"PSNR +([\d.]+) dB", printed)
    after = find_number(r"-> ([\d.]+) dB", printed)
    assert before == pytest.approx(20, abs=0.1)  # sigma 0.1 is 20 dB
    assert after - before >= 5
    assert find_number(r"tokens +([\d,]+)", printed) == 96**2
    assert find_number(r"memory +([\d.]+) MiB", printed) < 96**4 * 4 / 2**20 / 10

    path = Path(re.search(r"picture (.+)", printed)[1])
    assert path.parent == output
    pixels = image.imread(path)
    assert pixels.ndim == 3
    assert pixels.shape[1] > 2 * pixels.shape[0]  # three squares side by side
    assert pixels.std() > 0.1  # and something on them


def test_denoise_photo_in_blocks_is_the_same(tmp_path: Path) -> None:
    """Above ONE_CALL tokens the queries go in blocks; the filter is the same."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import denoise_photo as example, numpy as np\n"
        "rng = np.random.default_rng(0)\n"
        "operands = example.make_operands(rng.random((20, 20, 3), np.float32), 0.1)\n"
        "whole = example.denoise(*operands)\n"
        "example.ONE_CALL = example.BLOCK = 150\n"
        "print(np.abs(example.denoise(*operands) - whole).max())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(EXAMPLES)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-6
    assert "400/400" in result.stderr  # the bar reaches the end


def test_denoise_photo_says_what_is_wrong_with_a_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "denoise_photo.py"), "--size", "10000"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode != 0
    assert "--size 10000" in result.stderr
    assert "600 × 512" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("emulate", [False, True])
def test_score_mod(emulate: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    options, backends, names = ["--length", "256"], ["numpy"], mods.__all__
    if emulate:
        request.getfixturevalue("cxx")
        options = ["--length", "70", "--cases", "*[ik]", "--emulate"]
        backends, names = ["numpy", "emulator"], ["alibi", "document_mask"]
    printed = run_example("score_mod.py", *options, "--heads", "2", "--output", str(tmp_path / "made"), folder=tmp_path)
    for backend in backends:
        assert f'(1, 2, {options[1]}, 64) float32, backend="{backend}"' in printed
    rows = re.findall(r"^  (\w+) .*? ([\d.e-]+) +([\d.]+) ms +([\d.]+)×$", printed, re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(["plain", *names] * len(backends))
    assert all(float(error) < 1e-5 for _, error, *_ in rows)
    path = Path(re.search(r"picture (.+)", printed)[1])
    assert path.parent == tmp_path / "made"
    assert image.imread(path).std() > 0.1
