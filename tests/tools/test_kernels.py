"""`kernels`: which kernels an architecture has, what they take, and how that is printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import cupyflash.__main__ as command_line
from cupyflash.errors import Unsupported
from cupyflash.plan.choose import every_spec
from cupyflash.plan.device import DEVICES
from cupyflash.plan.specs import CombineSpec, FwdSpec
from cupyflash.plan.tiles import FAMILIES, TILES
from cupyflash.tools import kernels
from cupyflash.tools.kernels import ARCHITECTURES, KernelRow, as_json, as_table, device_of, kernel_rows, specs_of

ROW = KernelRow("fwd-d64", "sm_80", 96, 0, 0, 24576, {"FFMA": 3, "HMMA": 128}, ())
BAD = replace(ROW, name="fwd-d128", stack_bytes=8, spill_bytes=16, notices=("wgmma serialised", "ignored"))


def test_architectures() -> None:
    assert ARCHITECTURES == ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    assert [device_of(arch).arch for arch in ARCHITECTURES] == list(ARCHITECTURES)
    assert device_of("sm_90a").cc == (9, 0)
    assert device_of("sm_120a").cc == (12, 0)


@pytest.mark.parametrize("arch", ["sm_70", "sm_80a", "90", "sm_90b", ""])
def test_unknown_architecture(arch: str) -> None:
    with pytest.raises(ValueError, match=rf"arch must be one of sm_75, .*sm_120, .* but was {arch!r}"):
        device_of(arch)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_a_gpu_has_the_kernels_of_the_rows_that_count_for_it(device: Any) -> None:
    found = specs_of(device)
    assert len({str(spec) for spec in found}) == len(found)
    for spec in (spec for spec in found if isinstance(spec, FwdSpec)):
        assert spec.shared_bytes <= device.smem_per_block
        assert spec.baseline <= 10 * device.cc[0] + device.cc[1]
    reached = {(row.family, row.head_dim, row.head_dim_v) for row in TILES if row.since <= device.cc}
    listed = {(spec.family, spec.head_dim, spec.head_dim_v) for spec in found if isinstance(spec, FwdSpec)}
    assert listed <= reached
    split = {spec.dtype for spec in found if isinstance(spec, FwdSpec) and FAMILIES[spec.family].splits}
    assert {spec.dtype for spec in found if isinstance(spec, CombineSpec)} == split


def test_every_kernel_runs_on_some_gpu() -> None:
    assert {spec for device in DEVICES.values() for spec in specs_of(device)} == set(every_spec())


def test_shared_memory_counts() -> None:
    a100 = DEVICES["A100"]
    small = replace(a100, smem_per_block=min(spec.shared_bytes for spec in specs_of(a100)) - 1)
    assert [spec for spec in specs_of(small) if isinstance(spec, FwdSpec)] == []


def test_match_and_order() -> None:
    names = [str(spec) for spec in specs_of(DEVICES["A100"], "fwd_sm80-bf16")]
    assert all(name.startswith("fwd_sm80-bf16-") for name in names)
    dims = [int(name.split("-")[2][1:].partition("x")[0]) for name in names]
    assert dims == sorted(dims)
    assert len(set(dims)) > 1


def test_json_has_exactly_these_keys() -> None:
    text = "\n".join(as_json([ROW, BAD]))
    first, second = json.loads(text)
    assert list(first) == [
        "name", "arch", "registers", "stack_bytes", "spill_bytes", "smem_bytes", "opcodes", "notices",
    ]  # fmt: skip
    assert first == {field.name: getattr(ROW, field.name) for field in fields(ROW)} | {"notices": []}
    assert second["notices"] == ["wgmma serialised", "ignored"]
    assert json.loads("\n".join(as_json([ROW]))) == [first]
    assert json.loads("\n".join(as_json([]))) == []


def test_table_is_aligned_and_has_every_notice() -> None:
    heading, first, second, *notices = as_table([ROW, BAD], 12)
    assert len(heading) == len(first) == len(second)
    assert heading.split()[:5] == ["kernel", "registers", "stack", "spills", "smem"]
    assert first.split()[:6] == ["fwd-d64", "96", "0", "0", "24576", "128"]
    assert second.split()[:4] == ["fwd-d128", "96", "8", "16"]
    assert [line.strip() for line in notices] == ["wgmma serialised", "ignored"]
    assert (ROW.is_clean, BAD.is_clean) == (True, False)


@pytest.mark.slow
@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("jobs", [1, 2])
def test_kernels_are_compiled_and_measured(tmp_path: Path, jobs: int) -> None:
    specs = specs_of(DEVICES["H200"], "fwd_sm80-bf16-d64-")[:2]
    rows = list(kernel_rows(specs, "sm_90a", tmp_path / "cache", jobs))
    assert [row.name for row in rows] == [str(spec) for spec in specs]
    for row, spec in zip(rows, specs, strict=True):
        assert 64 < row.registers <= 255
        assert (row.arch, row.stack_bytes, row.spill_bytes, row.notices) == ("sm_90a", 0, 0, ())
        assert row.smem_bytes == spec.shared_bytes
        assert row.opcodes["HMMA"] > 0


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Rows that nothing was compiled for; gives back the numbers of processes asked for."""
    asked: list[int] = []

    def rows(specs: list[Any], arch: str, cache: Path, jobs: int) -> Iterator[KernelRow]:
        asked.append(jobs)
        for index, spec in enumerate(specs):
            yield replace(ROW if index else BAD, name=str(spec), arch=arch)

    monkeypatch.setenv("CUPYFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command_line, "kernel_rows", rows)
    monkeypatch.setattr(command_line, "nvrtc_version", lambda: (13, 0))
    return asked


def test_command_json(compiled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["kernels", "--arch", "sm_90a", "--json", "--match", "bf16-", "--jobs", "3"]) == 0
    out, err = capsys.readouterr()
    names = [str(spec) for spec in specs_of(device_of("sm_90a"), "bf16-")]
    assert [row["name"] for row in json.loads(out)] == names
    assert {row["arch"] for row in json.loads(out)} == {"sm_90a"}
    assert err == f"{len(names)} kernels for sm_90a, 1 with a stack, spills or notices\n"
    assert compiled == [3]


def test_command_table_and_build(compiled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["kernels", "--arch", "sm_80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(specs_of(device_of("sm_80"))) + len(BAD.notices)
    assert command_line.main(["kernels", "--arch", "sm_80", "--build"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{len(specs_of(device_of('sm_80')))} kernels for sm_80, 1 with a stack, spills or notices\n"
    assert err == ""
    assert min(compiled) >= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm_70"], "cupyflash: arch must be one of sm_75, "),
        (["--arch", "sm_80", "--match", "fwd_sm81"], "cupyflash: no kernel with 'fwd_sm81' in its name runs on sm_80"),
    ],
)
def test_command_that_can_not_be(compiled: list[int], arguments: list[str], said: str, capsys: Any) -> None:
    assert command_line.main(["kernels", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert compiled == []


def test_command_without_nvrtc(compiled: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def raises() -> None:
        raise Unsupported("kernels cannot be compiled: NVRTC is not installed; pip install 'cupyflash[nvrtc]'")

    monkeypatch.setattr(command_line, "nvrtc_version", raises)
    assert command_line.main(["kernels", "--arch", "sm_80", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install 'cupyflash[nvrtc]'" in err


@pytest.mark.parametrize("arguments", [[], ["kernels"], ["kernels", "--arch", "sm_80", "--jobs", "0"], ["cure"]])
def test_command_misspelt(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m cupyflash" in capsys.readouterr().err


def test_help(capsys: Any) -> None:
    for arguments, words in (
        (["--help"], ["doctor", "kernels"]),
        (["kernels", "--help"], ["--arch", "--match", "--json", "--build", "--jobs", "sm_75"]),
    ):
        with pytest.raises(SystemExit) as caught:
            command_line.main(arguments)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


def test_progress_is_shown_where_somebody_may_look(
    compiled: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(command_line.sys.stderr, "isatty", lambda: True)
    assert command_line.main(["kernels", "--arch", "sm_80", "--build"]) == 0
    total = len(kernels.specs_of(device_of("sm_80")))
    assert f"{total}/{total} kernels\n" in capsys.readouterr().err
