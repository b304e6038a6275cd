"""The shared cases on Hopper's forward kernel, also those with so few rows that a plan leaves them to another.

What kernels of 16 bits may run is run in float16 if it was for float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cupyflash.backends import emulated
from cupyflash.build.bulk import map_refusals
from cupyflash.plan import choose as choosing
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import FwdSpec, Launch
from cupyflash.plan.tiles import FAMILIES
from cupyflash.problem.normalize import normalize
from tests.cases import BANDS, DROPOUT, DTYPE_CASES, GQA, KERNELS, LAYOUT_CASES, MASKS, SCORE_ARGUMENTS, heads

HALF = {
    name: case if case.dtype == "bfloat16" else replace(case, dtype="float16")
    for table in (KERNELS, LAYOUT_CASES, DTYPE_CASES, GQA, MASKS, SCORE_ARGUMENTS, DROPOUT)
    for name, case in table.items()
    if case.dtype != "float64" and not (table is LAYOUT_CASES and case.dtype == "float32")
}
HALF["bands-masks-and-mask-mod"] = replace(BANDS["causal-window-tuple-mask-and-mask-mod"], dtype="float16")
# Several tiles both ways, some of them empty and some whole.
HALF |= {
    f"hopper-{score_mod}-{mask_mod}": heads(
        1, 2, 200, 400, 64, dtype="bfloat16", score_mod=score_mod, mask_mod=mask_mod, return_lse=True
    )
    for score_mod, mask_mod in (("distance", None), (None, "document"), (None, "first_keys"), ("per_head", "checkers"))
}


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch, cxx: None) -> Iterator[list[str]]:
    """Of the forward kernels that run, in order; on an H200 so small that problems of a test's size fill it."""
    monkeypatch.setitem(DEVICES, "H200", replace(DEVICES["H200"], sms=4))
    monkeypatch.setenv("CUPYFLASH_EMULATOR", "device=H200")
    monkeypatch.setitem(FAMILIES, "fwd_sm90", replace(FAMILIES["fwd_sm90"], least_rows=1))
    clear_caches()
    found: list[str] = []
    run = emulated._run

    def record(launch: Launch, args: tuple[Any, ...]) -> None:
        if isinstance(launch.spec, FwdSpec):
            found.append(launch.spec.family)
        run(launch, args)

    monkeypatch.setattr(emulated, "_run", record)
    yield found
    monkeypatch.undo()
    clear_caches()


def clear_caches() -> None:
    for function in vars(choosing).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_case(name: str, families: list[str]) -> None:
    HALF[name].check("emulator")
    unmapped = map_refusals(*normalize(**HALF[name].arguments()), DEVICES["H200"])
    assert set(families) <= {"fwd_sm80" if unmapped else "fwd_sm90"}
