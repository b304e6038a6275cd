"""Variables of the environment that are looked at in every call: what os.environ says at that moment."""

from __future__ import annotations

import os

import pytest

from cupyflash.environment import reader_of

NAME = "CUPYFLASH_TEST"


def test_a_variable_comes_changes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    read = reader_of(NAME)
    assert read() is None
    for value in ("", "a", "ä"):
        monkeypatch.setenv(NAME, value)
        assert read() == value
    monkeypatch.delenv(NAME)
    assert read() is None


def test_another_object_in_the_place_of_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    read = reader_of(NAME)
    monkeypatch.setattr(os, "environ", {NAME: "a"})
    assert read() == "a"
    monkeypatch.setattr(os, "environ", {})
    assert read() is None
