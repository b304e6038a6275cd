"""Every kernel that a plan may name, compiled for every architecture: no GPU needed, NVRTC is."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import cupyflash
from cupyflash.build.cache import Cache
from cupyflash.build.launch import entry_of, render_kernel
from cupyflash.build.nvrtc import Binary, compile_cubin, nvrtc_version
from cupyflash.plan.choose import every_spec
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import KernelSpec
from tests.conftest import Require

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
ALL_ARCHITECTURES = ("sm_75", *ARCHITECTURES)
SPECS = [spec for spec in every_spec() if spec.family == "fwd_sm80"]
WITHOUT_TENSOR_CORES = [spec for spec in every_spec() if spec.family != "fwd_sm80"]


@pytest.fixture(scope="module")
def cache(require: Require, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """With everything compiled: two processes do it in half the time, threads would not."""
    try:
        require("nvrtc", nvrtc_version(), "")
    except cupyflash.Unsupported as error:
        require("nvrtc", None, str(error))
    folder = tmp_path_factory.mktemp("cubins")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_everything, [folder] * len(ARCHITECTURES), ARCHITECTURES))
    return Cache(folder)


def compile_everything(folder: Path, arch: str) -> None:
    for spec in SPECS:
        compiled(spec, arch, Cache(folder))


def compiled(spec: KernelSpec, arch: str, cache: Cache) -> Binary:
    return compile_cubin(render_kernel(spec), arch, cache)


def test_the_architectures_are_those_of_the_known_gpus() -> None:
    assert set(ARCHITECTURES) == {device.arch for device in DEVICES.values() if device.cc >= (8, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_registers_alone_and_tensor_cores(spec: KernelSpec, arch: str, cache: Cache) -> None:
    binary = compiled(spec, arch, cache)
    resources = binary.resources[entry_of(spec)]
    assert binary.notices == ()
    assert resources.stack_bytes == resources.spill_stores == resources.spill_loads == 0
    assert "STL" not in resources.opcodes
    assert "LDL" not in resources.opcodes
    assert resources.shared_bytes in (0, 1024)  # none of ours: from sm_90 on the system keeps 1 KiB
    assert resources.registers * 32 * spec.tile.num_warps <= 65536
    # The step is there twice, masked and not: two products each, of head_dim / 16 by block_n / 8 instructions.
    steps, columns = spec.head_dim // 16, spec.tile.block_n // 8
    assert resources.opcodes["HMMA"] == 2 * 2 * steps * columns
    assert resources.opcodes["LDSM"] == 2 * 2 * steps * columns // 2 + steps


@pytest.mark.slow
@pytest.mark.parametrize("arch", ALL_ARCHITECTURES)
@pytest.mark.parametrize("spec", WITHOUT_TENSOR_CORES, ids=str)
def test_registers_alone(spec: KernelSpec, arch: str, cache: Cache) -> None:
    binary = compiled(spec, arch, cache)
    resources = binary.resources[entry_of(spec)]
    assert binary.notices == ()
    assert resources.stack_bytes == resources.spill_stores == resources.spill_loads == 0
    assert not {"STL", "LDL", "HMMA"} & {name for name, count in resources.opcodes.items() if count}
    assert resources.shared_bytes in (0, 1024)
    assert resources.registers * spec.num_threads <= 65536


def test_every_spec_is_another_text() -> None:
    specs = list(every_spec())
    assert len({render_kernel(spec).text for spec in specs}) == len(specs)
