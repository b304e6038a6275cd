"""The kernels that a plan may name, compiled for GPUs without one: NVRTC is enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cupyflash.build.nvrtc import Binary, Resources
from cupyflash.build.rendering import _constants, entry_of
from cupyflash.plan.choose import every_spec
from cupyflash.plan.specs import COMPANIONS, FwdSpec, KernelSpec
from cupyflash.plan.tiles import FAMILIES
from cupyflash.tools.kernels import ARCHITECTURES
from tests.compile.checks import faults
from tests.compile.compiling import faults_of
from tests.compile.selection import Pair, every_pair, representative
from tests.conftest import COUNTED

EVERY = every_pair()
PAIRS = representative(EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_registers_alone_and_tensor_cores(
    pair: Pair, nvrtc: tuple[int, int], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    assert faults_of(pair, tmp_path) == []
    pytestconfig.stash[COUNTED][f"NVRTC: {{}} cubins of {len(EVERY)} that plans may choose"] += 1


@pytest.mark.slow
@pytest.mark.parametrize("spec", COMPANIONS, ids=str)
def test_companions_need_registers_alone(spec: KernelSpec, nvrtc: tuple[int, int], tmp_path: Path) -> None:
    found = {arch: faults_of(Pair(spec, arch), tmp_path) for arch in ARCHITECTURES}
    assert {arch: faults for arch, faults in found.items() if faults} == {}


def test_every_spec_has_other_constants() -> None:
    # Not other texts: a text has the spec's name in it.
    specs = [*every_spec(), *COMPANIONS]
    assert len({(entry_of(spec), *_constants(spec).items()) for spec in specs}) == len(specs)


# ------------------------------------------------------------------------------------------------------------
# The checks themselves

FORWARD = [spec for spec in every_spec() if isinstance(spec, FwdSpec)]
SPEC = next(spec for spec in FORWARD if spec.family == "fwd_sm80" and spec.head_dim == 64)
STEPS, COLUMNS = SPEC.head_dim // 16, SPEC.tile.block_n // 8
GOOD = Resources(168, 0, 0, 0, 1024, {"HMMA": 2 * STEPS * COLUMNS, "LDSM": STEPS * COLUMNS + STEPS}, 999)


def faults_with(resources: Resources, notices: tuple[str, ...] = (), spec: FwdSpec = SPEC) -> list[str]:
    return list(faults(spec, Binary(Path("x"), "", {entry_of(spec): resources}, notices)))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"stack_bytes": 8}, "it has 8 bytes of stack"),
        ({"spill_stores": 4}, "it has 4 bytes of spill stores"),
        ({"spill_loads": 4}, "it has 4 bytes of spill loads"),
        ({"opcodes": {**GOOD.opcodes, "STL": 1}}, "it has 1 stores to local memory"),
        ({"opcodes": {**GOOD.opcodes, "LDL": 2}}, "it has 2 loads from local memory"),
        ({"shared_bytes": 2048}, "it has 2048 bytes of static shared memory"),
        ({"registers": 65536 // SPEC.num_threads + 1}, "registers do not fit on an SM"),
        ({"opcodes": {**GOOD.opcodes, "HMMA": 1}}, "it has 1 HMMA, expected 64"),
        ({"opcodes": {"HMMA": GOOD.opcodes["HMMA"]}}, "it has 0 LDSM, expected 36"),
    ],
)
def test_faults_are_found(changes: dict[str, object], fault: str) -> None:
    assert faults_with(GOOD) == []
    (found,) = faults_with(replace(GOOD, **changes))
    assert fault in found


def test_notices_are_faults() -> None:
    assert faults_with(GOOD, ("serialised",)) == ["the compiler said: serialised"]


def test_sm75_takes_twice_as_many_products() -> None:
    turing = replace(SPEC, baseline=75)
    assert faults_with(GOOD, spec=turing) == ["it has 64 HMMA, expected 128"]


def test_a_kernel_that_is_refused_is_a_fault(nvrtc: tuple[int, int], tmp_path: Path) -> None:
    (fault,) = faults_of(Pair(SPEC, "sm_1"), tmp_path)
    assert "NVRTC could not compile" in fault


def test_families_are_known_to_the_checks() -> None:
    assert {pair.spec.family for pair in EVERY} <= {*FAMILIES, "combine", "weights"}


HOPPER = next(spec for spec in FORWARD if spec.family == "fwd_sm90")
HOPPER_OPCODES = {"HGMMA": 2 * (64 // 16 + 128 // 16), "UTMALDG": 13, "UTMASTG": 1, "USETMAXREG": 2}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"HGMMA": 23}, "it has 23 HGMMA, expected 24"),
        ({"UTMALDG": 3}, "it has 3 UTMALDG, expected 4 or more"),
        ({"UTMASTG": 0}, "it has 0 UTMASTG, expected 1"),
        ({"USETMAXREG": 0}, "it has 0 USETMAXREG, expected 2"),
        ({"HMMA": 8}, "it has 8 HMMA, expected 0"),
    ],
)
def test_faults_of_hopper_are_found(changes: dict[str, int], fault: str) -> None:
    good = replace(GOOD, opcodes=HOPPER_OPCODES)
    assert str(HOPPER) == "fwd_sm90-f16-d64-m128n128w12qs2e8"
    assert faults_with(good, spec=HOPPER) == []
    assert faults_with(replace(good, opcodes={**HOPPER_OPCODES, **changes}), spec=HOPPER) == [fault]
