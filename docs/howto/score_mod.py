"""Write the table of docs/howto/score_mod.md: what each function of the gallery costs in a kernel, for each score.

    python docs/howto/score_mod.py            rewrites the table; needs NVRTC
    python docs/howto/score_mod.py --check    says whether it is up to date: exit status 0 or 1

The forward kernel is compiled with the function and without any, the loop over its scores unrolled; the difference,
divided by the scores that a thread has of each tile, is the function's.  Counts are those of one version of NVRTC: by
another one the check compares the functions' names only.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # what the checkout around this file compiles

import numpy as np

from cupyflash import mods
from cupyflash.build.cache import default_cache
from cupyflash.build.nvrtc import Resources, compile_cubin, nvrtc_version
from cupyflash.build.rendering import entry_of, render_kernel
from cupyflash.build.source import KernelSource
from cupyflash.plan.specs import Features, FwdSpec, Mods
from cupyflash.plan.tiles import TileConfig
from cupyflash.problem.trace import trace_mask_mod, trace_score_mod

PAGE = Path(__file__).with_name("score_mod.md")
ARCH = "sm_90"
MARKED = re.compile(r"(<!-- generated: costs -->\n).*?(<!-- end: costs -->)", re.DOTALL)

_SLOPES = np.ones(8, np.float32)
SCORE_MODS: dict[str, Any] = {
    "alibi": mods.alibi(_SLOPES),
    "relative_position_bias": mods.relative_position_bias(np.ones((8, 65), np.float32)),
    "distance_decay": mods.distance_decay(_SLOPES),
    "tanh_softcap": mods.tanh_softcap(30.0),
    "soft_clipping": mods.soft_clipping(30.0),
}
MASK_MODS: dict[str, Any] = {
    "document_mask": mods.document_mask(np.zeros(64, np.int32)),
    "prefix_lm": mods.prefix_lm(100),
    "sliding_window": mods.sliding_window(128),
    "dilated_window": mods.dilated_window(8, 4),
}
#: Where set_where in score.cuh asks mask_mod.
ROLLED = "#pragma unroll 1\n    for (int n = 0; n < num_tiles; ++n)"
#: The columns, and the instructions that they count.
COLUMNS = {
    "float32": ("FADD", "FMUL", "FFMA", "FMNMX"),
    "exp2, reciprocal …": ("MUFU",),
    "loads": ("LDG",),
}


def spec_with(found: Mods | None) -> FwdSpec:
    """The kernel that the page speaks of: float16, head dim 64."""
    features = Features(has_lower=True, has_upper=True, scale_first=True, mods=found)
    return FwdSpec("fwd_sm80", "float16", 64, 64, TileConfig(64, 64, 4), features)


def resources(found: Mods | None) -> Resources:
    spec = spec_with(found)
    source = render_kernel(spec)
    if found is not None and found.mask is not None:
        text = source.text.replace(ROLLED, ROLLED.replace("unroll 1", "unroll"))
        assert text != source.text
        source = KernelSource(source.name, text, source.entries)
    return compile_cubin(source, ARCH, default_cache()).resources[entry_of(spec)]


def table() -> str:
    """The generated part of the page."""
    plain = resources(None)
    tile, threads = spec_with(None).tile, spec_with(None).num_threads
    scores = tile.block_m * tile.block_n // threads

    def row(name: str, found: Mods) -> str:
        ours = resources(found)
        counts = [ours.instructions - plain.instructions]
        counts += [
            sum(ours.opcodes.get(op, 0) - plain.opcodes.get(op, 0) for op in opcodes) for opcodes in COLUMNS.values()
        ]
        return f"| {' | '.join([f'`{name}`', *(f'{n / scores:.1f}' for n in counts)])} |"

    nvrtc = ".".join(map(str, nvrtc_version()))
    lines = [
        f"| function | instructions | {' | '.join(COLUMNS)} |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 1),
        *(row(name, Mods(trace_score_mod(function).expression, None)) for name, function in SCORE_MODS.items()),
        *(row(name, Mods(None, trace_mask_mod(function).expression)) for name, function in MASK_MODS.items()),
        "",
        f"Counted in `{spec_with(None)}`, which has {plain.instructions} instructions without any function, for {ARCH} "
        f"by NVRTC {nvrtc}.",
    ]
    return "\n".join(lines) + "\n"


def rewritten(text: str, made: str) -> str:
    """The page with another table; ValueError if there is no place for it."""
    if len(MARKED.findall(text)) != 1:
        raise ValueError(f"{PAGE.name} must have one pair of <!-- generated: costs --> and <!-- end: costs -->")
    return MARKED.sub(lambda found: f"{found[1]}\n{made}\n{found[2]}", text)


def is_up_to_date(text: str) -> bool:
    version = ".".join(map(str, nvrtc_version()))
    if f"by NVRTC {version}." in text:
        return rewritten(text, table()) == text
    found = MARKED.search(text)
    names = re.findall(r"^\| `(\w+)` \|", found[0], re.MULTILINE) if found else []
    return names == [*SCORE_MODS, *MASK_MODS]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the table of docs/howto/score_mod.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    given = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    if not given.check:
        PAGE.write_text(rewritten(text, table()), encoding="utf-8")
    elif not is_up_to_date(text):
        print("docs/howto/score_mod.md is out of date: run `python docs/howto/score_mod.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
