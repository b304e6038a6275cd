"""`import cupyflash` stays light: NumPy and ml_dtypes, nothing else that is heavy, and fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What is loaded by the import beyond the standard library, NumPy and ml_dtypes.
LIST_FOREIGN = """
import sys
import cupyflash
names = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__spec__", None)}
print(*sorted(names - set(sys.stdlib_module_names) - before - {"cupyflash", "numpy", "ml_dtypes"}))
"""

# Processor time, which other programs on the machine do not stretch as they do the clock.
TIME_IMPORT = """
import numpy, time
start = time.process_time()
import cupyflash
print(time.process_time() - start)
"""


def run_python(code: str) -> str:
    """What a new interpreter prints, with the checkout on its path."""
    before = "import sys; before = {name.partition('.')[0] for name in sys.modules}"
    code = f"{before}; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_only_its_requirements() -> None:
    assert run_python(LIST_FOREIGN) == ""


def test_foreign_import_would_be_seen() -> None:
    assert run_python("import pytest" + LIST_FOREIGN).split().count("pytest") == 1


def test_import_time() -> None:
    seconds = min(float(run_python(TIME_IMPORT)) for _ in range(5))
    assert seconds < 0.1, f"import cupyflash took {seconds * 1e3:.0f} ms of processor time after NumPy's own"
