"""What the compiler made of fwd_sm90's loop over whole tiles: that its order is kept, and how long it is.

The softmax of a tile has the time of the products that are under way only if its exponentials stand between the two
waits. Read off the disassembly, which needs no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import compile_cubin
from cupyflash.build.rendering import render_kernel
from cupyflash.plan.specs import Features, FwdSpec
from cupyflash.plan.tiles import TileConfig
from tests.conftest import Require

pytestmark = pytest.mark.slow

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop, in their order."""

    code: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.code)

    def between_waits(self, pattern: str) -> int:
        """How many come after the wait for all products but the last, and before the wait for that."""
        found, pending = 0, ""
        for line in self.code:
            if wait := _WAIT.search(line):
                pending = wait[1]
            found += pending == "1" and re.search(pattern, line) is not None
        return found


def disassembler() -> str | None:
    found = shutil.which("nvdisasm")
    if found is None:
        import nvidia

        found = next((str(path) for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/nvdisasm")), None)
    return found


def innermost_loops(text: str) -> list[Loop]:
    """From every label to the last branch back to it, if no other such stretch lies within."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.search(line):
            branch = _BRANCH.search(instruction[1])
            if branch and branch[1] in labels:
                ends[labels[branch[1]]] = len(lines)
            lines.append(instruction[1])
    stretches = list(ends.items())
    return [
        Loop(tuple(lines[first : last + 1]))
        for first, last in stretches
        if not any(first < other and end <= last for other, end in stretches)
    ]


def steps_of(spec: FwdSpec, require: Require, folder: Path) -> list[Loop]:
    """The loops over tiles of keys, in the order of the text."""
    program = require("nvrtc", disassembler(), "nvdisasm is not installed")
    binary = compile_cubin(render_kernel(spec), "sm_90a", Cache(folder))
    assert binary.notices == ()
    run = subprocess.run([program, "-c", str(binary.path)], capture_output=True, text=True, check=True)
    return [loop for loop in innermost_loops(run.stdout) if loop.count("HGMMA") > 1]


def spec_of(head_dim: int, block_m: int, block_n: int, exp2_by_fma: int = 0, **features: bool) -> FwdSpec:
    tile = TileConfig(block_m, block_n, block_m // 16 + 4, False, 2, exp2_by_fma=exp2_by_fma)
    return FwdSpec("fwd_sm90", "bfloat16", head_dim, head_dim, tile, Features(**features), baseline=90)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        (spec_of(64, 128, 128), 1),
        (spec_of(64, 128, 128, exp2_by_fma=8), 1),
        (spec_of(64, 192, 128), 1),
        (spec_of(128, 128, 128), 1),
        (spec_of(128, 128, 176), 1),
        (spec_of(128, 128, 128, has_upper=True), 2),
        (spec_of(192, 128, 112), 1),
        (spec_of(256, 128, 64, has_lower=True, has_upper=True), 3),
    ],
    ids=str,
)
def test_exponentials_stand_between_the_waits(spec: FwdSpec, kinds: int, require: Require, tmp_path: Path) -> None:
    steps = steps_of(spec, require, tmp_path)
    assert len(steps) == kinds
    for step in steps:
        scores = spec.tile.block_n // 2  # of a thread
        by_fma = scores // spec.tile.exp2_by_fma if spec.tile.exp2_by_fma else 0
        exponentials = scores - by_fma + 2  # and of two corrections
        assert step.count(r"FMNMX\.NAN") == by_fma
        assert step.between_waits(r"FMNMX\.NAN") == by_fma
        assert step.count(r"MUFU\.EX2") == exponentials
        assert step.between_waits(r"MUFU\.EX2") >= 0.95 * exponentials
        assert step.count("HGMMA") == spec.head_dim // 16 + spec.tile.block_n // 16


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("has_upper", [False, True])
def test_instructions_of_a_whole_tile(has_upper: bool, require: Require, tmp_path: Path) -> None:
    """cuDNN's open kernel has 573 at these sizes; the softmax alone takes about 330."""
    step = steps_of(spec_of(128, 128, 128, has_upper=has_upper), require, tmp_path)[-1]
    assert len(step.code) <= 480
    assert step.count(r"\bFMUL\b") >= 64
    assert len(step.code) - 64 <= 420  # where no row's maximum has grown by much, O is not multiplied


def test_loops_are_found() -> None:
    text = """
.L_x_1:
        /*0000*/                   HGMMA.64x128x16.F32 R24 ;
.L_x_2:
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0020*/                   MUFU.EX2 R3, R4 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
"""
    (loop,) = innermost_loops(text)
    assert (len(loop.code), loop.count("MUFU"), loop.between_waits("MUFU")) == (5, 2, 1)
