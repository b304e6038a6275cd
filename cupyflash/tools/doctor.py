"""What of cupyflash is usable here, and what to type for what is not.

    gather()  ──▶ findings by name ──judge()──▶ Report ──as_text()──▶ lines

`gather` looks at the machine and neither raises nor hangs; `judge` is a pure function.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .. import __version__, attention, backends
from ..backends import blas, pool
from ..backends.emulated import options_from
from ..build.cache import Cache, default_folder
from ..build.source import kernels_folder
from ..environment import debug_level
from ..plan.tiles import TILES
from .probe import QUESTIONS, Finding, ask

__all__ = ["INSTALL_COMPILER", "Check", "Report", "as_text", "examine", "gather", "judge"]

_TIMEOUT = 30.0


@dataclass(frozen=True)
class Check:
    """One line: what was found, or what is missing, what to type then, and what one loses without it."""

    name: str
    is_ok: bool
    found: str
    remedy: str = ""
    loses: str = ""


@dataclass(frozen=True)
class Report:
    """The checks, and for each backend why it can't run; nothing where it can."""

    checks: tuple[Check, ...]
    backends: dict[str, tuple[str, ...]]

    def runs(self, backend: str) -> bool:
        """Whether that backend runs here."""
        return not self.backends[backend]


def examine(timeout: float = _TIMEOUT) -> Report:
    """The state of this machine.  Answers that take longer than `timeout` seconds are missing."""
    return judge(gather(timeout), sys.platform)


# ------------------------------------------------------------------------------------------------------------
# Looking at the machine


def gather(timeout: float = _TIMEOUT) -> dict[str, Finding]:
    """Everything that `judge` needs, by name."""
    here: dict[str, Callable[[], Finding]] = {
        "Python": _python,
        "cupyflash": _package,
        "kernel sources": _sources,
        "NumPy": _numpy,
        "BLAS": _blas,
        "attention": _attention,
        "kernel cache": _cache,
        "environment": _environment,
    }
    elsewhere = {name: partial(ask, name, timeout) for name in QUESTIONS}
    with ThreadPoolExecutor(len(QUESTIONS)) as threads:
        answers = {name: threads.submit(_guarded, question) for name, question in elsewhere.items()}
        found = {name: _guarded(question) for name, question in here.items()}
        return found | {name: answer.result() for name, answer in answers.items()}


def _guarded(question: Callable[[], Finding]) -> Finding:
    try:
        return question()
    except Exception as error:  # noqa: BLE001  (whatever is broken here is what the report is about)
        return Finding(f"{type(error).__name__}: {error}", False)


def _python() -> Finding:
    return Finding(f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}")


def _package() -> Finding:
    return Finding(f"{__version__}, {Path(__file__).parents[1]}")


def _sources() -> Finding:
    return Finding(str(kernels_folder()))


def _numpy() -> Finding:
    return Finding(np.__version__)


def _blas() -> Finding:
    build = np.show_config(mode="dicts") or {}
    found = build.get("Build Dependencies", {}).get("blas", {})
    name = f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()
    control = blas.control()
    if control is None:
        return Finding(f"{name}, whose threads can't be set", False)
    return Finding(f"{name}, its threads can be set; attention uses {pool.num_threads()}")


def _attention() -> Finding:
    ones = np.ones((1, 2, 5, 4), np.float32)
    out = attention(ones, ones, ones, is_causal=True, backend="numpy")
    if not np.allclose(out, 1):
        return Finding(f"attention over ones gave {out.min()} to {out.max()}", False)
    return Finding("runs on NumPy arrays")


def _cache() -> Finding:
    folder = default_folder()
    try:
        Cache(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(f"{folder} can't be written: {error}", False)
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    size = sum(file.stat().st_size for entry in entries for file in entry.iterdir())
    return Finding(f"{folder}: {len(entries)} entries, {size / 2**20:.1f} MiB")


# What we read, with what finds fault with a value; then what others read that decides how we run.
_OURS: dict[str, Callable[[str], object]] = {
    "CUPYFLASH_BACKEND": lambda text: _one_of(text, backends()),
    "CUPYFLASH_CACHE": lambda text: None,  # the line above says whether it is usable
    "CUPYFLASH_DEBUG": lambda text: debug_level(),
    "CUPYFLASH_EMULATOR": options_from,
    "CUPYFLASH_EMULATOR_FIBERS": lambda text: _one_of(text, ("portable",)),
    "CUPYFLASH_NUM_THREADS": lambda text: pool.num_threads(),
    "CUPYFLASH_REQUIRE": lambda text: None,  # of the tests
}
_OTHERS = ("CXX", "XDG_CACHE_HOME", "CUDA_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OPENBLAS_NUM_THREADS")


def _one_of(text: str, allowed: tuple[str, ...]) -> None:
    if text not in allowed:
        raise ValueError(f"{text!r} is none of {', '.join(allowed)}")


def _environment() -> Finding:
    wrong = []
    for name, text in os.environ.items():
        if not name.startswith("CUPYFLASH_"):
            continue
        if name not in _OURS:
            wrong.append(f"{name} is none of {', '.join(_OURS)}")
            continue
        try:
            if text:  # empty is as good as not set
                _OURS[name](text)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        return Finding("; ".join(wrong), False)
    names = sorted(name for name in os.environ if name in _OURS or name in _OTHERS)
    return Finding(", ".join(f"{name}={os.environ[name]}" for name in names) or "nothing is set")


# ------------------------------------------------------------------------------------------------------------
# Judging it

#: What to type for a C++ compiler.
INSTALL_COMPILER = "sudo apt install g++  (dnf install gcc-c++; conda install -c conda-forge gxx)"
_MAC = "nothing: NVIDIA has no GPUs for macOS"


def judge(found: Mapping[str, Finding], system: str) -> Report:
    """The report on what `gather` found, on a system as `sys.platform` calls it."""
    driver = found["driver"]
    devices = driver.data.get("devices", [])
    extra = "cuda12" if driver.is_there and driver.data["version"] < 13000 else "cuda13"
    is_mac, is_linux = system == "darwin", system.startswith("linux")
    reinstall = ("pip install --force-reinstall cupyflash", "the backends cuda and emulator")
    remedies = {
        "Python": ("report a bug with this output", "nothing else"),
        "cupyflash": reinstall,
        "kernel sources": reinstall,
        "NumPy": ("pip install 'numpy>=2.0'", "everything"),
        "BLAS": ("pip install --force-reinstall numpy", "attention on NumPy runs tile after tile, on BLAS's threads"),
        "attention": ("unset CUPYFLASH_NUM_THREADS, or report a bug with this output", "the backend numpy"),
        "CuPy": (_MAC if is_mac else f"pip install 'cupyflash[{extra}]'", "attention on CuPy arrays"),
        "driver": (
            _MAC if is_mac else "sudo ubuntu-drivers install  (others: https://www.nvidia.com/drivers)",
            "the backend cuda",
        ),
        "NVRTC": (
            _MAC if is_mac else f"pip install 'cupyflash[{extra if devices else 'nvrtc'}]'",
            "the backend cuda; compiling kernels without a GPU",
        ),
        "C++ compiler": (
            INSTALL_COMPILER if is_linux else "nothing here: the emulator runs on Linux",
            "the backend emulator",
        ),
        "kernel cache": (
            "export CUPYFLASH_CACHE=$HOME/cupyflash-cache  (a folder of your own)",
            "compiled kernels last only as long as a process, or can't be kept at all",
        ),
        "environment": ("unset the variable, or give it such a value", "calls that read it raise"),
    }

    def check(name: str) -> Check:
        finding = found[name]
        return Check(name, finding.is_there, finding.text, *(() if finding.is_there else remedies[name]))

    first = ["Python", "cupyflash", "kernel sources", "NumPy", "BLAS", "attention", "CuPy", "driver"]
    last = ["NVRTC", "C++ compiler", "kernel cache", "environment"]
    gpus = [_gpu(*device) for device in devices]
    if driver.is_there and not devices:
        gpus = [Check("GPU", False, "the driver finds none", "echo $CUDA_VISIBLE_DEVICES", "the backend cuda")]
    checks = (*map(check, first), *gpus, *map(check, last))

    def lacks(*names: str) -> tuple[str, ...]:
        return tuple(f"{name}: {found[name].text}" for name in names if not found[name].is_there)

    cuda = lacks("kernel sources", "CuPy", "driver", "NVRTC")
    if found["CuPy"].is_there and not found["CuPy"].data.get("devices"):
        cuda += (f"CuPy: {found['CuPy'].text}",)
    if driver.is_there and not any(gpu.is_ok for gpu in gpus):
        cuda += ("no GPU that there are kernels for",)
    runs = {
        "numpy": lacks("NumPy", "attention"),
        "math": lacks("NumPy"),
        "emulator": lacks("kernel sources", "C++ compiler"),
        "cuda": cuda,
    }
    return Report(checks, runs)


def _gpu(name: str, major: int, minor: int, sms: int) -> Check:
    dtypes = dict.fromkeys(dtype for row in TILES if row.since <= (major, minor) for dtype in row.dtypes)
    text = f"{name}, sm_{major}{minor}, {sms} SMs: "
    if dtypes:
        return Check("GPU", True, f"{text}kernels for {', '.join(dtypes)}")
    since = min(row.since for row in TILES)
    return Check(
        "GPU",
        False,
        f"{text}no kernels",
        f"a GPU of compute capability {since[0]}.{since[1]} or later",
        "the backend cuda",
    )


# ------------------------------------------------------------------------------------------------------------
# Text


def as_text(report: Report) -> Iterator[str]:
    """Lines: a check each, under a missing one what to type and what is lost; at last the backends."""
    for check in report.checks:
        yield from _wrapped(f"{'ok' if check.is_ok else 'missing':8} {check.name:15} {check.found}", 25)
        if not check.is_ok:
            yield f"{'':25}type: {check.remedy}"
            yield f"{'':25}without it: {check.loses}"
    yield ""
    for name, reasons in report.backends.items():
        yield from _wrapped(f"{'runs' if not reasons else 'no':8} backend {name:8}{'; '.join(reasons)}".rstrip(), 25)


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, 118, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
