"""What the kernel tests need from the machine: a C++ compiler for most, NVRTC for some.

A test without it is skipped with the reason.  ``CUPYFLASH_REQUIRE=cxx,nvrtc`` turns such a skip into a failure, so that a
run that has to have them cannot be green without.
"""

from __future__ import annotations

import os

import pytest

from cupyflash.build.host import find_compiler
from cupyflash.build.nvrtc import nvrtc_version
from cupyflash.errors import Unsupported


def _need(what: str, find: object) -> None:
    assert callable(find)
    try:
        find()
    except Unsupported as error:
        if what in os.environ.get("CUPYFLASH_REQUIRE", "").split(","):
            pytest.fail(f"CUPYFLASH_REQUIRE names {what}, but: {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cxx() -> None:
    """Only where kernels can be compiled for the CPU."""
    _need("cxx", find_compiler)


@pytest.fixture(scope="session")
def nvrtc() -> None:
    """Only where kernels can be compiled for a GPU."""
    _need("nvrtc", nvrtc_version)
