"""Finds the kernels' sources, wherever the package was installed.

The sources live in ``kernels_cu/`` beside the package in the tree, and in ``cupyflash/kernels_cu/`` once a
wheel (or setuptools' strict editable mode) has laid them out.
"""

from pathlib import Path


def kernels_folder() -> Path:
    """The folder that holds the kernels' sources.

    Raises:
        FileNotFoundError: neither of the two places is a folder; the message names both.
    """
    # Not resolved: setuptools' strict editable mode links the files into a folder laid out like a wheel.
    package = Path(__file__).parents[1]
    candidates = (package / "kernels_cu", package.parent / "kernels_cu")
    for folder in candidates:
        if folder.is_dir():
            return folder
    tried = " nor ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(
        f"cupyflash's kernel sources were not found: neither {tried} is a folder; reinstall cupyflash"
    )


def read_kernel(name: str) -> str:
    """The text of one source file.

    Args:
        name: path relative to the folder of kernels, with forward slashes: ``"philox.cuh"``.

    Raises:
        FileNotFoundError: there is no such file; the message names the folder that was looked in.
    """
    folder = kernels_folder()
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"kernel source name={name!r} is not a file in {folder}")
    return path.read_text(encoding="utf-8")
