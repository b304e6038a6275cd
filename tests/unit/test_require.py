"""A requirement that is not met skips, and fails where the run asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
LACKING = """
def test_lacking(require):
    require("nvrtc", None, "not on this machine")

def test_found(require):
    assert require("nvrtc", "a library", "not on this machine") == "a library"
"""


def run_pytest(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "test_lacking.py").write_text(LACKING, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if name != "CUPYFLASH_REQUIRE"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_lacking_requirement_skips_with_its_reason(tmp_path: Path) -> None:
    result = run_pytest(tmp_path)
    assert result.returncode == 0, result.stdout
    assert "1 passed, 1 skipped" in result.stdout
    assert "nvrtc: not on this machine" in result.stdout


@pytest.mark.parametrize("by", ["option", "environment"])
def test_lacking_requirement_fails_where_required(tmp_path: Path, by: str) -> None:
    if by == "option":
        result = run_pytest(tmp_path, "--require-nvrtc")
    else:
        result = run_pytest(tmp_path, CUPYFLASH_REQUIRE="cxx, nvrtc")
    assert result.returncode == 1, result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert "nvrtc is required in this run: not on this machine" in result.stdout


def test_misspelt_requirement_stops_the_run(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, CUPYFLASH_REQUIRE="ccx")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CUPYFLASH_REQUIRE names ['ccx']" in result.stderr
