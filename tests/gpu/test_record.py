"""Recording, with the emulator in the GPU's place: it has the same calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupyflash.backends.emulator import Module
from cupyflash.backends.tensormap import emulated_map
from tests.gpu import record
from tests.gpu.device import Gpu
from tests.kernels.conformance import PROBES, load_recording
from tests.kernels.test_conformance import replay

GPU = Gpu("A GPU", "sm_90", "580.1", "13.0", "14.2.0", "13.0", 60 << 20, 132)


class OnDevice(np.ndarray):
    @property
    def data(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        return np.array(self)


@pytest.fixture
def emulated_gpu(cxx: object, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = ModuleType("cupy")
    cupy.asarray = lambda array: np.array(array).view(OnDevice)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(record, "load", lambda source, gpu: Module(source))
    monkeypatch.setattr(record, "driver_map", emulated_map)


@pytest.mark.usefixtures("emulated_gpu")
def test_everything_is_recorded_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = record.record(GPU, tmp_path)
    assert path == tmp_path / "sm_90.npz"
    recording = load_recording(path)
    assert recording.versions == {
        "name": "A GPU",
        "arch": "sm_90",
        "driver": "580.1",
        "cuda": "13.0",
        "cupy": "14.2.0",
        "nvrtc": "13.0",
    }
    assert list(recording.outputs) == list(PROBES)
    replay(recording)
    assert f"{len(PROBES)} of {len(PROBES)} probes are in {path}" in capsys.readouterr().out


@pytest.mark.usefixtures("emulated_gpu")
def test_an_error_leaves_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record.run_on_gpu

    def fail_at_ldmatrix(probe: Any, module: Any) -> Any:
        if probe.entry == "probe_ldmatrix":
            raise RuntimeError("an illegal memory access was encountered")
        return run(probe, module)

    monkeypatch.setattr(record, "run_on_gpu", fail_at_ldmatrix)
    with pytest.raises(RuntimeError, match="illegal"):
        record.record(GPU, tmp_path)
    names = list(PROBES)
    assert list(load_recording(tmp_path / "sm_90.npz").outputs) == names[: names.index("ldmatrix")]
