"""What a run counts stands in its summary, whether one process ran the tests or several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
COUNTING = """
import os
import pytest
from conftest import COUNTED

@pytest.mark.parametrize("i", range(6))
def test_counting(i, pytestconfig):
    pytestconfig.stash[COUNTED]["made: {} things of 9"] += 1

def test_threads_of_blas():
    assert os.environ.get("OPENBLAS_NUM_THREADS") == ("1" if "PYTEST_XDIST_WORKER" in os.environ else None)
"""


@pytest.mark.parametrize("options", [["-n", "2", "--dist", "worksteal"], ["-p", "no:xdist"]], ids=["two", "one"])
def test_counts_of_all_processes_are_added_up(tmp_path: Path, options: list[str]) -> None:
    if "-n" in options:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_counting.py").write_text(COUNTING, encoding="utf-8")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTEST_XDIST") and name != "OPENBLAS_NUM_THREADS"
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 passed" in result.stdout
    assert "\nmade: 6 things of 9\n" in result.stdout
