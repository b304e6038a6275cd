"""What must agree before a release: versions, the pages about it, and what continuous integration runs."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import cupyflash

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_there_is_one_version() -> None:
    version = cupyflash.__version__
    assert settings()["metadata"]["version"] == "attr: cupyflash.version.__version__"
    assert re.search(r"^version: (.*)$", read("CITATION.cff"), re.MULTILINE)[1] == version
    newest = re.search(r"^## \[([^\]]+)\] - (unreleased|\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_the_support_page_says_what_is_required() -> None:
    page, options = read("docs/support.md"), settings()["options"]
    oldest = options["python_requires"].removeprefix(">=")
    assert f"| Python | {oldest} or later |" in page
    for line in options["install_requires"].split():
        name, _, version = line.partition(">=")
        assert re.search(rf"\| {name} \| {re.escape(version)} or later \|", page, re.IGNORECASE), line
    cupy = settings()["options.extras_require"]["cuda13"].split()[0]
    assert cupy == "cupy-cuda13x>=14.0.1,!=14.1.0"
    assert "| CuPy | 14.0.1 or later, not 14.1.0 |" in page
    assert f'target-version = "py{oldest.replace(".", "")}"' in read(".ruff.toml")


def test_an_extra_with_nvrtc_has_what_finds_it() -> None:
    """CuPy's wheels bring cuda-pathfinder; "pip install 'cupyflash[nvrtc]'" is what we say where it is missing."""
    extras = settings()["options.extras_require"]
    assert {"cuda-pathfinder"} < set(extras["nvrtc"].split())
    for name in ("cuda12", "cuda13", "nvrtc"):
        assert re.search(r"^cuda-toolkit\[.*\bnvrtc\b.*\]==", extras[name], re.MULTILINE), name


def test_classifiers_begin_with_the_oldest_python() -> None:
    text, oldest = settings()["metadata"]["classifiers"], settings()["options"]["python_requires"].removeprefix(">=")
    versions = [tuple(map(int, found.split("."))) for found in re.findall(r"Python :: (3\.\d+)", text)]
    assert versions == sorted(versions)
    assert ".".join(map(str, versions[0])) == oldest


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    called = re.findall(r"make PYTHON=python ([a-z-]+)", text)
    assert called
    assert set(called) <= targets
    # Nothing is run but installations, make, the README's command, and the comparison of a tag with the version.
    for command in re.findall(r"- run: (.*)", text):
        assert command.startswith(("python -m pip install -e ", "make PYTHON=python ", ".ci/run", 'test "v$(')), command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_no_secrets_and_few_rights(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "secrets" not in text.replace("there is no secret", "")
    assert "\npermissions:\n  contents: read\n" in text
    assert set(re.findall(r"([a-z-]+): write", text)) <= ({"id-token"} if path.name == "release.yml" else set())
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "pull_request_target" not in text


def test_ci_runs_where_the_support_page_says() -> None:
    text = read(".github/workflows/ci.yml")
    rows = set(re.findall(r'\{os: ([a-z0-9.-]+), python: "([0-9.]+)"', text))
    systems = {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"}
    assert rows == {(system, python) for system in systems for python in ("3.10", "3.14")}
    assert 'numpy: "2.0.0"' in text
    assert "the quick tests by CI on 3.10 and 3.14" in read("docs/support.md")
