"""Options, hypothesis profiles and the fixtures that every test may use."""

from __future__ import annotations

import collections
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator
from typing import Any, Protocol, TypeVar

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before NumPy is imported: there is a process for every core, and threads of BLAS spin while they wait.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

T = TypeVar("T")

COUNTED = pytest.StashKey[collections.Counter[str]]()
REQUIREMENTS = ("cxx", "nvrtc", "gpu")

# No deadlines anywhere: a busy machine is not a bug.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "nightly", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


class Require(Protocol):
    def __call__(self, name: str, found: T | None, reason: str) -> T: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cupyflash")
    for name in REQUIREMENTS:
        group.addoption(f"--require-{name}", action="store_true", help=f"fail instead of skipping where {name} lacks")


def required_names(config: pytest.Config) -> Collection[str]:
    """What may not lack in this run: the options, and the comma-separated CUPYFLASH_REQUIRE."""
    named = {name.strip() for name in os.environ.get("CUPYFLASH_REQUIRE", "").split(",") if name.strip()}
    if unknown := named.difference(REQUIREMENTS):
        raise pytest.UsageError(f"CUPYFLASH_REQUIRE names {sorted(unknown)}; expected some of {list(REQUIREMENTS)}")
    return named.union(name for name in REQUIREMENTS if config.getoption(f"--require-{name}"))


def pytest_configure(config: pytest.Config) -> None:
    required_names(config)  # a misspelt name must stop the run, not weaken it
    config.stash[COUNTED] = collections.Counter()


@pytest.fixture(scope="session")
def require(pytestconfig: pytest.Config) -> Require:
    """``require(name, found, reason)`` gives back what was found; None skips, or fails if required."""
    required = required_names(pytestconfig)

    def check(name: str, found: T | None, reason: str) -> T:
        if name not in REQUIREMENTS:
            raise ValueError(f"require: name={name!r}, expected one of {REQUIREMENTS}")
        if found is not None:
            return found
        if name in required:
            pytest.fail(f"{name} is required in this run: {reason}", pytrace=False)
        pytest.skip(f"{name}: {reason}")

    return check


@pytest.fixture(scope="session")
def cxx(require: Require) -> list[str]:
    """The command of the host's C++ compiler: CXX where it is set, else the first of c++, g++ and clang++."""
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        found = command if command and shutil.which(command[0]) else None
        return require("cxx", found, f"CXX={os.environ['CXX']!r} is not a program on PATH")
    found = next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return require("cxx", found, "none of c++, g++ and clang++ is on PATH, and CXX is not set")


@pytest.fixture(scope="session")
def nvrtc(require: Require) -> tuple[int, int]:
    """The version of the compiler for GPUs."""
    from cupyflash.build.nvrtc import nvrtc_version  # some tests run where cupyflash is not on the path yet
    from cupyflash.errors import Unsupported

    try:
        return require("nvrtc", nvrtc_version(), "")
    except Unsupported as error:
        return require("nvrtc", None, str(error))


@pytest.fixture(scope="session", autouse=True)
def emulated_launches(pytestconfig: pytest.Config) -> Iterator[None]:
    """Counts the kernel launches of the emulator; the run's summary names the number."""
    emulator = sys.modules.get("cupyflash.backends.emulator")  # not there where no test imports cupyflash
    if emulator is None:
        yield
        return
    plain = emulator.Function.__call__

    @functools.wraps(plain)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        pytestconfig.stash[COUNTED]["emulator: {} kernel launches"] += 1
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.Function, "__call__", counting)
        yield


# What is counted is text with a place for the number. Processes of pytest-xdist hand their counts to the one that
# writes the summary.


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counted"] = dict(session.config.stash[COUNTED])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # A worker that crashed has no output.
    node.config.stash[COUNTED].update(getattr(node, "workeroutput", {}).get("counted", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for text, number in sorted(config.stash[COUNTED].items()):
        terminalreporter.write_line(text.format(number))
