"""The GPU, where there is one; and what tests measure on it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Require
from tests.gpu.device import Gpu, find_gpu

MEASURED = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def gpu(require: Require) -> Gpu:
    """What the machine has."""
    return require("gpu", *find_gpu())


@pytest.fixture(scope="session")
def cupy(gpu: Gpu) -> Any:
    import cupy

    return cupy


@pytest.fixture
def measured(pytestconfig: pytest.Config, gpu: Gpu) -> Callable[[str, str], None]:
    """``measured(what, value)``: printed at the end of the run, and written to the file $CUPYFLASH_MEASURED at once."""
    values = pytestconfig.stash.setdefault(MEASURED, {})

    def note(what: str, value: str) -> None:
        values[what] = value
        if file := os.environ.get("CUPYFLASH_MEASURED"):
            Path(file).write_text(json.dumps({**gpu.versions, **values}, indent=1), encoding="utf-8")

    return note


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if values := config.stash.get(MEASURED, None):
        terminalreporter.section("measured on the GPU")
        for what, value in values.items():
            terminalreporter.write_line(f"{what}: {value}")
