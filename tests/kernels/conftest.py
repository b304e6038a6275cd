"""What some kernel tests need from the machine beside a C++ compiler."""

from __future__ import annotations

import pytest

from cupyflash.build.nvrtc import nvrtc_version
from cupyflash.errors import Unsupported
from tests.conftest import Require


@pytest.fixture(scope="session")
def nvrtc(require: Require) -> tuple[int, int]:
    """The version of the compiler for GPUs."""
    try:
        return require("nvrtc", nvrtc_version(), "")
    except Unsupported as error:
        return require("nvrtc", None, str(error))
