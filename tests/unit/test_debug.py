"""CUPYFLASH_DEBUG: what each level prints, and that nothing is printed without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cupyflash
from cupyflash.build import debug
from cupyflash.build.rendering import render_kernel
from cupyflash.environment import debug_level
from cupyflash.plan.choose import choose
from cupyflash.plan.device import EMULATOR
from cupyflash.problem.normalize import normalize


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str) -> list[str]:
    monkeypatch.setenv("CUPYFLASH_DEBUG", level)
    ones = np.ones((1, 1, 16, 64), np.float16)
    cupyflash.attention(ones, ones, ones, scale=0.5, backend="emulator")
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.usefixtures("cxx")
def test_levels_add_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(debug, "_resources", lambda spec, arch: "168 registers")
    ones = np.ones((1, 1, 16, 64), np.float16)
    (launch,) = choose(normalize(ones, ones, ones)[0], EMULATOR).launches
    assert call(monkeypatch, capsys, "") == call(monkeypatch, capsys, "0") == []
    assert call(monkeypatch, capsys, "1") == [f"cupyflash: {launch}"]
    second = call(monkeypatch, capsys, "2")
    assert second[0] == f"cupyflash: {launch}"
    assert {"cupyflash:   scale = 0.5", "cupyflash:   seqlen_k = 16", "cupyflash:   lower = -16"} < set(second)
    third = call(monkeypatch, capsys, "3")
    label, _, path = third[-1].rpartition(" ")
    assert label == "cupyflash:   source:"
    assert Path(path).read_text(encoding="utf-8") == render_kernel(launch.spec).text
    fourth = call(monkeypatch, capsys, "4")
    assert len(fourth) == len(third) + 1 == len(second) + 2
    assert fourth[-1] == "cupyflash:   sm_80: 168 registers"


@pytest.mark.usefixtures("cxx")
def test_every_kernel_s_parameters_are_read_as_what_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUPYFLASH_DEBUG", "2")
    ones, lse = np.ones((1, 2, 16, 64), np.float16), np.zeros((1, 2, 16), np.float32)
    key = np.ones((1, 2, 300, 64), np.float16)
    cupyflash.merge_attention([ones] * 3, [lse] * 3, backend="emulator")
    assert {"cupyflash:   num_parts = 3", "cupyflash:   num_rows = 32"} < set(capsys.readouterr().err.splitlines())
    cupyflash.attention(ones, key, key, np.ones((16, 300), bool), backend="emulator")
    assert {"cupyflash:   num_columns = 300", "cupyflash:   seqlen_k = 300"} < set(capsys.readouterr().err.splitlines())
    cupyflash.attention(ones, key, key, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < 200, backend="emulator")
    assert {"cupyflash:   num_keys = 300", "cupyflash:   block_keys = 64"} < set(capsys.readouterr().err.splitlines())


def test_resources_without_nvrtc_are_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> None:
        raise cupyflash.Unsupported("kernels cannot be compiled: NVRTC is not installed")

    monkeypatch.setattr(debug, "compile_cubin", raises)
    ones = np.ones((1, 1, 16, 64), np.float16)
    (launch,) = choose(normalize(ones, ones, ones)[0], EMULATOR).launches
    assert debug._resources.__wrapped__(launch.spec, "sm_80").startswith("kernels cannot be compiled")


@pytest.mark.parametrize("text", ["5", "-1", "x"])
def test_a_wrong_level_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CUPYFLASH_DEBUG", text)
    with pytest.raises(ValueError, match=rf"CUPYFLASH_DEBUG must be an int from 0 to 4, but was '{text}'"):
        debug_level()


def lines_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, backend: str
) -> list[str]:
    monkeypatch.setenv("CUPYFLASH_DEBUG", level)
    monkeypatch.setenv("CUPYFLASH_NUM_THREADS", "1")
    ones = np.ones((2, 4, 16, 64), np.float16)
    cupyflash.attention(ones, ones, ones, scale=0.5, is_causal=True, backend=backend)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize(
    ("backend", "first"),
    [
        ("numpy", "cupyflash: numpy: tiles of 16 rows and 16 keys; jobs: 1, threads: 1"),
        ("math", "cupyflash: math: scores (2, 4, 16, 16) of float32, 0.0 MiB"),
    ],
)
def test_backends_without_kernels_say_what_they_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str, first: str
) -> None:
    assert lines_of(monkeypatch, capsys, "", backend) == lines_of(monkeypatch, capsys, "0", backend) == []
    assert lines_of(monkeypatch, capsys, "1", backend) == [first]
    second = lines_of(monkeypatch, capsys, "2", backend)
    assert second[0] == first
    assert "scale=0.5, keys j with j - i <= 0" in second[-1]
    assert lines_of(monkeypatch, capsys, "3", backend) == lines_of(monkeypatch, capsys, "4", backend) == second


@pytest.mark.parametrize("backend", ["numpy", "math"])
def test_a_wrong_level_is_refused_by_backends_without_kernels(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("CUPYFLASH_DEBUG", "all")
    ones = np.ones((4, 8), np.float32)
    with pytest.raises(ValueError, match="CUPYFLASH_DEBUG must be an int from 0 to 4, but was 'all'"):
        cupyflash.attention(ones, ones, ones, backend=backend)


@pytest.mark.usefixtures("cxx")
def test_merging_by_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUPYFLASH_DEBUG", "1")
    cupyflash.merge_attention(
        [np.ones((2, 4, 8), np.float32)] * 2, [np.ones((2, 4), np.float32)] * 2, backend="emulator"
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cupyflash: merge")
