"""Try a wheel as a user gets it: in a new virtual environment, outside of the tree.

    python -m tests.dist dist/cupyflash-0.1.0-py3-none-any.whl [--offline]

NumPy and ml_dtypes come from the package index, or with --offline from this environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

# What a first hour needs.  The folder that it runs in is empty, so the wheel is what is imported.
TRY = """
import sys
import numpy as np
import cupyflash

assert cupyflash.__file__.startswith(sys.prefix), cupyflash.__file__
query, key, value = np.random.default_rng(0).standard_normal((3, 2, 40, 16), dtype=np.float32)
exact = cupyflash.attention(query, key, value, is_causal=True, backend="math")
for backend in sys.argv[1:]:
    out = cupyflash.attention(query, key, value, is_causal=True, backend=backend)
    assert np.abs(out - exact).max() < 1e-5, backend
    print(f"{cupyflash.__version__} runs backend {backend}")
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try a wheel in a new virtual environment.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--offline", action="store_true", help="take NumPy and ml_dtypes from this environment")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cupyflash-dist-") as name:
        try_wheel(given.wheel.resolve(), Path(name), offline=given.offline)
    return 0


def try_wheel(wheel: Path, folder: Path, *, offline: bool) -> None:
    """Install the wheel in a new environment within the folder, and run it; CalledProcessError if that fails."""
    home, place = folder / "venv", folder / "elsewhere"
    venv.create(home, with_pip=True)
    place.mkdir()
    python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "CUPYFLASH_"))}
    environment["CUPYFLASH_CACHE"] = str(folder / "cache")

    def run(*command: str) -> None:
        subprocess.run([python, *command], cwd=place, env=environment, check=True)

    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *(["--no-deps"] * offline), str(wheel))
    if offline:
        requirements = "\n".join(sorted({str(Path(module.__file__ or "").parents[1]) for module in (np, ml_dtypes)}))
        (packages,) = home.glob("lib/python*/site-packages") or home.glob("Lib/site-packages")
        (packages / "requirements.pth").write_text(requirements, encoding="utf-8")
    has_compiler = sys.platform.startswith("linux") and shutil.which(os.environ.get("CXX", "c++")) is not None
    run("-c", TRY, "numpy", *(["emulator"] * has_compiler))
    run("-m", "cupyflash", "doctor")


if __name__ == "__main__":
    raise SystemExit(main())
