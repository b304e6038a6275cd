"""Short ways to compile and launch a kernel in a test."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from cupyflash.backends.emulator import Module, Options
from cupyflash.build.source import KernelSource, flatten

HERE = Path(__file__).parent

# Every way to run a kernel that a correct one must not notice.
ALL_OPTIONS = [
    Options(),
    Options(late_landing=False),
    Options(race_detector=False),
    *(Options(schedule="random", seed=seed) for seed in range(3)),
    *(Options(schedule="priority", seed=seed) for seed in range(3)),
    Options(schedule="priority", seed=7, late_landing=False, workers=2),
]

_ENTRY = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(')


def source_of(text: str, label: str = "test.cu") -> KernelSource:
    """A test's kernel text, all its entries included; reports call it ``label``."""
    return KernelSource(label.removesuffix(".cu"), flatten(text, label), tuple(_ENTRY.findall(text)))


@functools.cache
def compiled(text: str, label: str = "test.cu") -> Module:
    """The same text is compiled once per run of the tests."""
    return Module(source_of(text, label))


def probes(file: str) -> Module:
    """A file of this folder."""
    return compiled((HERE / file).read_text(encoding="utf-8"), file)


def line_of(text: str, mark: str) -> int:
    """The number of the one line of ``text`` that holds the word or words ``mark``."""
    word = re.compile(re.escape(mark) + r"\b")
    numbers = [number for number, line in enumerate(text.splitlines(), 1) if word.search(line)]
    assert len(numbers) == 1, f"{mark!r} is on lines {numbers}"
    return numbers[0]
