"""CUPYFLASH_DEBUG: what each level prints, and that nothing is printed without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cupyflash
from cupyflash.build import debug
from cupyflash.build.rendering import render_kernel
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
        debug.debug_level()
