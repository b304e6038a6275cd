"""A backend of kernels may refuse the calls of a test: the test has then passed, if the refusal says why.

What such a backend must run, and what it must refuse, is asserted case by case in test_case and test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

import cupyflash
from cupyflash.build.host import find_compiler
from tests.cases import KERNEL_BACKENDS
from tests.conftest import Require


@pytest.fixture(autouse=True)
def compiler(request: pytest.FixtureRequest, require: Require) -> None:
    """The emulator needs a C++ compiler."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "emulator":
        try:
            find_compiler()
        except cupyflash.Unsupported as error:
            require("cxx", None, str(error))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    backend = pyfuncitem.callspec.params.get("backend") if hasattr(pyfuncitem, "callspec") else None
    try:
        return (yield)
    except cupyflash.Unsupported as refusal:
        if backend not in KERNEL_BACKENDS or pyfuncitem.get_closest_marker("runs_on_kernels"):
            raise
        if not refusal.reasons[backend]:
            raise
        return True
