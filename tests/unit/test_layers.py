"""The import order of the package: data moves one way, and nothing looks back.

A module may import what stands before it in ORDER, and nothing else of cupyflash. Backends stand beside one
another: they share the helpers named in SHARED and otherwise know nothing of their neighbours. Imports inside
functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cupyflash"

# Without the leading "cupyflash."; a folder's own __init__ goes by the folder's name, the package's by "".
ORDER = [
    "version",
    "errors",
    "hashing",
    "interop",
    "environment",
    "interrupts",
    "progress",
    "problem",
    "problem.dtypes",
    "problem.masks",
    "problem.mods",
    "problem.expression",
    "problem.trace",
    "problem.shapes",
    "problem.philox",
    "problem.problem",
    "problem.checks",
    "problem.normalize",
    "problem.parts",
    "plan",
    "plan.device",
    "plan.tiles",
    "plan.specs",
    "plan.choose",
    "build",
    "build.source",
    "build.params",
    "build.functor",
    "build.cache",
    "build.host",
    "build.nvrtc",
    "build.rendering",
    "build.strides",
    "build.mask_summary",
    "build.modding",
    "build.bulk",
    "build.operands",
    "build.launch",
    "build.debug",
    "build.merging",
    "backends",
    "backends.pool",
    "backends.blas",
    "backends.scratch",
    "backends.slices",
    "backends.block",
    "backends.joining",
    "backends.reference",
    "backends.tiled",
    "backends.tensormap",
    "backends.emulator",
    "backends.emulated",
    "backends.tuned",
    "backends.cuda",
    "backends.registry",
    "mods",
    "merge",
    "flops",
    "formulas",
    "api",
    "integrations",
    "integrations.transformers",
    "explain",
    "tune",
    "",
    "testing",
    "tools",
    "tools.kernels",
    "tools.probe",
    "tools.doctor",
    "tools.sample",
    "tools.trace",
    "tools.trace_page",
    "__main__",
]

# Who may import which neighbour in backends/: tiled shares helpers, and the registry names every backend.
SHARED = {
    "backends.reference": {"backends.joining"},
    "backends.tiled": {"backends.blas", "backends.block", "backends.joining", "backends.pool", "backends.slices"},
    "backends.block": {"backends.scratch", "backends.slices"},
    "backends.cuda": {"backends.tensormap", "backends.tuned"},
    "backends.emulated": {"backends.emulator", "backends.tensormap"},
    "backends.registry": {"backends.cuda", "backends.emulated", "backends.reference", "backends.tiled"},
}

# What may be imported from outside, beside the standard library.
REQUIREMENTS = {"numpy", "ml_dtypes"}
# Imported by the functions that need it, or by the one module that nobody imports without it.
OPTIONAL = {
    "api": {"typing_extensions"},  # for type checkers, which have it
    "interop": {"cupy"},
    "progress": {"tqdm"},
    "testing": {"hypothesis"},
    "build.nvrtc": {"cuda"},
    "integrations.transformers": {"torch", "transformers"},
}


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.Module, name: str, is_folder: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import; `from package import module` counts as importing the module."""
    here = ["cupyflash", *name.split(".")] if name else ["cupyflash"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the folder that the module lies in; each further dot, the folder around that.
            base = here[: len(here) + is_folder - node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner.removeprefix("cupyflash.") in known else source


def wrong_imports(package: Path) -> list[str]:
    """One sentence for each import that looks back, and for each module that has no place in ORDER."""
    paths = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    wrong = [f"{name} has no place in ORDER" for name in paths if name not in ORDER]
    for name, path in paths.items():
        if name not in ORDER:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, target in imported_modules(tree, name, path.name == "__init__.py", set(paths)):
            where = f"{path.relative_to(package.parent).as_posix()}:{line} imports {target}"
            top, _, inner = target.partition(".")
            if top != "cupyflash":
                if top not in REQUIREMENTS | OPTIONAL.get(name, set()) | sys.stdlib_module_names:
                    wrong.append(f"{where}, which cupyflash does not require")
            elif inner not in ORDER or ORDER.index(inner) >= ORDER.index(name):
                wrong.append(f"{where}, which does not stand before it")
            elif all(module.startswith("backends.") for module in (name, inner)) and inner not in SHARED.get(name, ()):
                wrong.append(f"{where}, a neighbour that it does not share")
    return wrong


def test_imports_follow_the_order() -> None:
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("problem/masks.py", "from cupyflash.backends import tiled", "imports cupyflash.backends.tiled"),
        ("problem/masks.py", "from ..api import attention", "imports cupyflash.api,"),
        ("problem/masks.py", "import cupyflash", "imports cupyflash,"),
        (
            "problem/masks.py",
            "def late():\n    import cupyflash.build.source",
            "masks.py:2 imports cupyflash.build.source",
        ),
        ("problem/__init__.py", "from .normalize import normalize", "imports cupyflash.problem.normalize"),
        ("backends/tiled.py", "from . import reference", "imports cupyflash.backends.reference, a neighbour"),
        ("backends/tiled.py", "import cupy", "imports cupy, which cupyflash does not require"),
        (
            "backends/tiled.py",
            "from cupyflash.backends import registry",
            "registry, which does not stand before",
        ),
        ("attic.py", "", "attic has no place in ORDER"),
    ],
)
def test_wrong_import_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    write_small_package(tmp_path)
    assert wrong_imports(tmp_path / "cupyflash") == []
    (tmp_path / "cupyflash" / file).write_text(text, encoding="utf-8")
    (found,) = wrong_imports(tmp_path / "cupyflash")
    assert complaint in found


def write_small_package(folder: Path) -> None:
    """A package that keeps the order, with each form of import in it."""
    files = {
        "__init__.py": "from .api import attention",
        "errors.py": "import math",
        "problem/__init__.py": '"""What is asked."""',
        "problem/masks.py": "import numpy as np\nfrom ..errors import Unsupported",
        "problem/normalize.py": "from . import masks\nfrom cupyflash.problem.masks import Mask",
        "build/__init__.py": "",
        "build/source.py": "from cupyflash import errors",
        "backends/__init__.py": "",
        "backends/blas.py": "import numpy.linalg",
        "backends/reference.py": "import cupyflash.problem.normalize",
        "backends/tiled.py": "from . import blas\nfrom ..problem import masks",
        "backends/registry.py": "def load():\n    from cupyflash.backends import reference, tiled",
        "api.py": "import cupyflash.backends.registry",
    }
    for name, text in files.items():
        path = folder / "cupyflash" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
