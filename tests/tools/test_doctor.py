"""`doctor` where things are missing, broken, slow or in the way: it reports, and never raises or hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cupyflash.tools import doctor, probe
from cupyflash.tools.doctor import Check, Report, as_text, judge
from cupyflash.tools.probe import Finding, ask

ROOT = Path(__file__).parents[2]

FOUND = {
    name: Finding(f"{name} is here")
    for name in ("Python", "cupyflash", "kernel sources", "NumPy", "BLAS", "attention", "kernel cache", "environment")
}
FOUND |= {name: Finding(f"{name} is here") for name in ("NVRTC", "C++ compiler")}
FOUND["CuPy"] = Finding("14.2; it finds 1 GPU", data={"devices": 1})
FOUND["driver"] = Finding("for CUDA up to 13.0", data={"version": 13000, "devices": [["NVIDIA H200", 9, 0, 132]]})
LACKING = Finding("it lacks", False)


def check_of(report: Report, name: str) -> Check:
    (found,) = (check for check in report.checks if check.name == name)
    return found


def test_with_everything_there_every_backend_runs() -> None:
    report = judge(FOUND, "linux")
    assert all(check.is_ok for check in report.checks)
    assert report.backends == {"numpy": (), "math": (), "emulator": (), "cuda": ()}
    assert check_of(report, "GPU").found.startswith("NVIDIA H200, sm_90, 132 SMs: kernels for float16, bfloat16")
    assert not any("type:" in line for line in as_text(report))


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("name", sorted(FOUND.keys() - {"Python", "cupyflash"}))
def test_each_lack_has_a_line_to_type_and_says_what_is_lost(name: str, system: str) -> None:
    report = judge({**FOUND, name: LACKING}, system)
    (check,) = (check for check in report.checks if not check.is_ok)
    assert (check.name, check.found) == (name, "it lacks")
    assert check.remedy
    assert check.loses
    text = "\n".join(as_text(report))
    assert f"type: {check.remedy}" in text
    assert f"without it: {check.loses}" in text


@pytest.mark.parametrize(
    ("lacking", "stopped"),
    [
        ("CuPy", {"cuda"}),
        ("driver", {"cuda"}),
        ("NVRTC", {"cuda"}),
        ("C++ compiler", {"emulator"}),
        ("kernel sources", {"cuda", "emulator"}),
        ("attention", {"numpy"}),
        ("BLAS", set()),
        ("kernel cache", set()),
    ],
)
def test_which_backends_a_lack_stops(lacking: str, stopped: set[str]) -> None:
    report = judge({**FOUND, lacking: LACKING}, "linux")
    assert {name for name in report.backends if not report.runs(name)} == stopped


@pytest.mark.parametrize(
    ("changes", "name", "remedy"),
    [
        ({"CuPy": LACKING}, "CuPy", "pip install 'cupyflash[cuda13]'"),
        ({"CuPy": LACKING, "driver": Finding("", data={"version": 12080, "devices": [["A100", 8, 0, 108]]})}, "CuPy",
         "pip install 'cupyflash[cuda12]'"),
        ({"NVRTC": LACKING, "driver": LACKING}, "NVRTC", "pip install 'cupyflash[nvrtc]'"),
        ({"NVRTC": LACKING}, "NVRTC", "pip install 'cupyflash[cuda13]'"),
        ({"driver": Finding("", data={"version": 13000, "devices": []})}, "GPU", "echo $CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_the_line_to_type_fits_the_machine(changes: dict[str, Finding], name: str, remedy: str) -> None:
    assert check_of(judge({**FOUND, **changes}, "linux"), name).remedy == remedy


def test_a_gpu_that_is_too_old_is_no_gpu() -> None:
    old = Finding("", data={"version": 12080, "devices": [["Tesla P100", 6, 0, 56]]})
    report = judge({**FOUND, "driver": old}, "linux")
    assert check_of(report, "GPU").found == "Tesla P100, sm_60, 56 SMs: no kernels"
    assert report.backends["cuda"] == ("no GPU that there are kernels for",)
    newer = Finding("", data={"version": 12080, "devices": [["Tesla P100", 6, 0, 56], ["A100", 8, 0, 108]]})
    assert judge({**FOUND, "driver": newer}, "linux").runs("cuda")


def test_cupy_that_finds_no_gpu_does_not_run() -> None:
    blind = Finding("14.2; it finds no GPU: no driver", data={"devices": 0})
    assert judge({**FOUND, "CuPy": blind}, "linux").backends["cuda"] == ("CuPy: 14.2; it finds no GPU: no driver",)


# ------------------------------------------------------------------------------------------------------------
# On this machine, bent in many ways


def run_doctor(**environment: str) -> dict[str, str]:
    """The lines of a real run by the check's name, each with its status in front; it must succeed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CUPYFLASH_", "CXX"))}
    run = subprocess.run(
        [sys.executable, "-m", "cupyflash", "doctor"],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    found, name = {}, ""
    for line in run.stdout.splitlines():
        if line and not line.startswith(" "):
            status, name = line[:9].strip(), line[9:25].strip()
            found[name] = f"{status} {line[25:]}"
        elif line:
            found[name] += f" {line.strip()}"
    return found


def test_doctor_here() -> None:
    found = run_doctor()
    assert found["attention"] == "ok runs on NumPy arrays"
    assert found["NumPy"].startswith("ok 2")
    assert found["kernel sources"] == f"ok {ROOT / 'kernels_cu'}"
    assert found["backend numpy"].startswith("runs")


@pytest.mark.usefixtures("nvrtc", "cxx")
def test_nvrtc_and_compiler_are_found() -> None:
    found = run_doctor()
    assert "libnvrtc" in found["NVRTC"]
    assert found["C++ compiler"].startswith("ok /")
    assert found["backend emulator"].startswith("runs")


def broken_module(folder: Path, name: str, text: str) -> str:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")
    return str(folder)


def test_empty_path() -> None:
    found = run_doctor(PATH="")
    assert found["C++ compiler"].startswith("missing none of c++, g++, clang++ is on the path")
    assert "type: sudo apt install g++" in found["C++ compiler"]
    assert found["backend emulator"].startswith("no C++ compiler: none of c++")


def test_hidden_nvrtc(tmp_path: Path) -> None:
    found = run_doctor(PYTHONPATH=broken_module(tmp_path, "cuda", ""))
    assert found["NVRTC"].startswith("missing cuda-pathfinder is not installed type: pip install 'cupyflash[")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('no home')", "OSError: no home"),
        ("import lacking_of_cupy", "ModuleNotFoundError: No module named 'lacking_of_cupy'"),
        ("import os; os.abort()", "the process was ended by signal 6"),
        ("raise SystemExit(3)", "the process ended with status 3"),
        ("", "AttributeError: module 'cupy' has no attribute '__version__'"),
    ],
)
def test_broken_cupy(tmp_path: Path, text: str, said: str) -> None:
    found = run_doctor(PYTHONPATH=broken_module(tmp_path, "cupy", text))
    assert found["CuPy"].startswith(f"missing {said}")
    assert f"CuPy: {said}" in found["backend cuda"]


@pytest.mark.parametrize("variables", [{"HOME": "/dev/null"}, {"CUPYFLASH_CACHE": "/dev/null/here"}])
def test_unwritable_cache(variables: dict[str, str]) -> None:
    found = run_doctor(**variables)
    assert found["kernel cache"].startswith("missing /dev/null/")
    assert "type: export CUPYFLASH_CACHE=" in found["kernel cache"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CUPYFLASH_BACKEND": "numby"}, "missing CUPYFLASH_BACKEND: 'numby' is none of numpy, math"),
        ({"CUPYFLASH_BACKEND": "math"}, "ok CUPYFLASH_BACKEND=math"),
        ({"CUPYFLASH_BACKEND": ""}, "ok CUPYFLASH_BACKEND="),
        ({"CUPYFLASH_BACKENDS": "math"}, "missing CUPYFLASH_BACKENDS is none of CUPYFLASH_BACKEND,"),
        ({"CUPYFLASH_EMULATOR": "seed=x"}, "missing CUPYFLASH_EMULATOR: CUPYFLASH_EMULATOR must set seed"),
        ({"CUPYFLASH_DEBUG": "9"}, "missing CUPYFLASH_DEBUG: CUPYFLASH_DEBUG must be an int from 0"),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    for name in [name for name in os.environ if name.startswith("CUPYFLASH_") or name in doctor._OTHERS]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = doctor._environment()
    assert f"{'ok' if found.is_there else 'missing'} {found.text}".startswith(said)


def test_every_variable_that_the_package_reads_is_known() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "cupyflash").rglob("*.py")]
    read = {name for text in texts for name in re.findall(r"\"(CUPYFLASH_[A-Z_]+[A-Z])\"", text)}
    assert read - set(doctor._OURS) == set()


def test_what_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 60\n", encoding="utf-8")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    start = time.monotonic()
    assert ask("C++ compiler", 3.0) == Finding("no answer within 3 seconds", False)
    assert time.monotonic() - start < 20
    # A signal may take a moment to arrive where cores are busy. What was ended stays as a zombie until its parent, or
    # whoever inherits it, has looked.
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/status")

    def is_running() -> bool:
        try:
            return "State:\tZ" not in status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    while is_running() and time.monotonic() - start < 30:
        time.sleep(0.05)
    assert not is_running()


def test_a_question_that_raises_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Finding:
        raise RuntimeError("out of order")

    for name in ("_python", "_package", "_sources", "_numpy", "_blas", "_attention", "_cache", "_environment", "ask"):
        monkeypatch.setattr(doctor, name, raises)
    report = doctor.examine()
    assert {check.found for check in report.checks} == {"RuntimeError: out of order"}
    assert not report.runs("numpy")
    assert list(as_text(report))


def test_driver_is_asked_for_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDriverGetVersion(self, version: Any) -> None:
            version._obj.value = 13010

        def cuDeviceGetCount(self, count: Any) -> None:
            count._obj.value = 2

        def cuDeviceGet(self, device: Any, index: int) -> None:
            device._obj.value = 40 + index

        def cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
            assert size == 256
            name.value = f"GPU {device.value}".encode()

        def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> None:
            number._obj.value = {75: 9, 76: 0, 16: device.value}[attribute]

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: Driver())
    found = probe._driver()
    assert found.text == "for CUDA up to 13.1"
    assert found.data["devices"] == [["GPU 40", 9, 0, 40], ["GPU 41", 9, 0, 41]]
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)
    assert probe._driver() == Finding("cuInit fails with status 100", False)
