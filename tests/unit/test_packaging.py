"""The package as users get it: wheel, sdist, editable install in its three modes, plain checkout."""

from __future__ import annotations

import email.parser
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cupyflash
from cupyflash.build.source import kernels_folder, read_kernel
from tests.dist import try_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.relative_to(ROOT / "kernels_cu").as_posix() for path in (ROOT / "kernels_cu").rglob("*.*"))

# Run in an interpreter that sees no site-packages but the ones named here: the folder under test, whose .pth
# files count as in an environment, and behind it whatever holds NumPy and ml_dtypes.
READ_KERNELS = """
import site, sys
folder, names, *requirements = sys.argv[1:]
site.addsitedir(folder)
sys.path += requirements
import cupyflash
from cupyflash.build.source import kernels_folder, read_kernel
print(cupyflash.__file__, kernels_folder(), sep="\\n")
for name in names.split():
    print(name, len(read_kernel(name)))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree: builds leave files beside setup.cfg, which would enter the next wheel."""
    folder = tmp_path_factory.mktemp("checkout") / "cupyflash-checkout"
    left_out = shutil.ignore_patterns(
        "__pycache__", ".*_cache", ".hypothesis", ".venv", ".git", "*.egg-info", "dist", "output"
    )

    def ignore(directory: str, names: list[str]) -> set[str]:
        return left_out(directory, names) | ({"build"} if Path(directory) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def setuptools_is_recent() -> bool:
    """Whether this environment can build without the package index."""
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def run_pip(*arguments: str) -> None:
    """pip; setuptools comes from this environment where it is recent enough, else from the package index."""
    pytest.importorskip("pip", reason="the packaging tests call pip, which this environment lacks")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    if setuptools_is_recent():
        options.append("--no-build-isolation")
    command = [sys.executable, "-m", "pip", arguments[0], *options, *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"


def read_kernels(folder: Path) -> tuple[Path, Path]:
    """Reads every kernel source with the package found through folder; gives back where both were found."""
    requirements = [str(Path(file).parents[1]) for file in (np.__file__, ml_dtypes.__file__)]
    command = [sys.executable, "-I", "-S", "-c", READ_KERNELS, str(folder), " ".join(SOURCES), *requirements]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert result.returncode == 0, result.stderr
    package, kernels, *lengths = result.stdout.splitlines()
    assert lengths == [f"{name} {len((ROOT / 'kernels_cu' / name).read_text(encoding='utf-8'))}" for name in SOURCES]
    return Path(package).parent, Path(kernels)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_pip("wheel", "--wheel-dir", str(folder), str(checkout))
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_contents(wheel: Path) -> None:
    """Every module and every kernel source is in, and nothing else: no tests, no stray top-level folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "cupyflash"
    expected = {f"cupyflash/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    expected |= {f"cupyflash/kernels_cu/{name}" for name in SOURCES} | {"cupyflash/py.typed"}
    expected |= {"cupyflash/tools/trace.html"}
    assert names == expected
    assert "cupyflash/kernels_cu/philox.cuh" in names


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == cupyflash.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["numpy>=2.0", "ml_dtypes>=0.5"]
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "cuda12",
        "cuda13",
        "nvrtc",
        "test",
        "examples",
        "models",
        "bench",
        "docs",
        "dev",
    }


def test_wheel_finds_kernels(wheel: Path, tmp_path: Path) -> None:
    run_pip("install", "--target", str(tmp_path), str(wheel))
    assert read_kernels(tmp_path) == (tmp_path / "cupyflash", tmp_path / "cupyflash" / "kernels_cu")


@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_editable_install_finds_kernels(checkout: Path, tmp_path: Path, mode: str) -> None:
    options = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    run_pip("install", "--target", str(tmp_path), *options, "--editable", str(checkout))
    package, kernels = read_kernels(tmp_path)
    if mode == "strict":
        assert package.is_relative_to(checkout / "build")
        assert kernels == package / "kernels_cu"
    else:
        assert (package, kernels) == (checkout / "cupyflash", checkout / "kernels_cu")


def test_checkout_finds_kernels(checkout: Path) -> None:
    assert read_kernels(checkout) == (checkout / "cupyflash", checkout / "kernels_cu")


def test_missing_kernels_are_named(checkout: Path, tmp_path: Path) -> None:
    """Without the folder, and without a file, the error says where we looked."""
    shutil.copytree(checkout / "cupyflash", tmp_path / "cupyflash")
    with pytest.raises(AssertionError, match="FileNotFoundError") as caught:
        read_kernels(tmp_path)
    for place in (tmp_path / "cupyflash" / "kernels_cu", tmp_path / "kernels_cu"):
        assert str(place) in str(caught.value)

    with pytest.raises(FileNotFoundError, match="no_such_kernel") as missing:
        read_kernel("no_such_kernel.cu")
    assert str(kernels_folder()) in str(missing.value)


def test_sdist_carries_what_tests_need(checkout: Path, tmp_path: Path) -> None:
    """The source archive has tests, kernels, examples and benchmarks: a packager can run the tests."""
    if not setuptools_is_recent():
        pytest.skip("making a source archive without the package index needs setuptools 77")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    everything = ("tests", "kernels_cu", "examples", "benchmarks", "docs", ".github", ".ci")
    folders = [folder for folder in everything if (checkout / folder).is_dir()]
    expected = {p.relative_to(checkout).as_posix() for folder in folders for p in (checkout / folder).rglob("*.*")}
    assert expected - names == set()
    files = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    assert files | {"setup.cfg", "pyproject.toml", "Makefile"} <= names


def test_a_wheel_is_all_that_a_new_environment_needs(wheel: Path, tmp_path: Path) -> None:
    """What `make dist` tries, with the requirements of this environment."""
    try_wheel(wheel, tmp_path, offline=True)


def test_the_wheel_passes_the_index_checks(wheel: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed: pip install 'cupyflash[dev]'")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
