"""Finds the kernels' sources, wherever the package was installed, and makes one text of them for the
compilers.

The sources live in ``kernels_cu/`` beside the package in the tree, and in ``cupyflash/kernels_cu/`` once a
wheel (or setuptools' strict editable mode) has laid them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ConfigValue", "KernelSource", "config", "flatten", "kernels_folder", "read_kernel", "render"]


def kernels_folder() -> Path:
    """The folder that holds the kernels' sources.

    Raises
    ------
    FileNotFoundError
        neither of the two places is a folder; the message names both.
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

    Parameters
    ----------
    name
        path relative to the folder of kernels, with forward slashes: ``"philox.cuh"``.

    Raises
    ------
    FileNotFoundError
        there is no such file; the message names the folder that was looked in.
    """
    folder = kernels_folder()
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"kernel source name={name!r} is not a file in {folder}")
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class KernelSource:
    """One translation unit, complete but for the system's headers and the emulator's.

    Attributes
    ----------
    name
        what it is, for file names and messages: ``"fwd_sm80-bf16-d128"``.
    text
        the flattened source.  The same text goes to NVRTC, to nvcc and to a host compiler.
    entries
        the ``extern "C"`` functions that can be launched.
    """

    name: str
    text: str
    entries: tuple[str, ...]


ConfigValue = bool | int | float | str


def config(constants: Mapping[str, ConfigValue]) -> str:
    """``struct Config``, through which a kernel gets its compile-time constants.

    Parameters
    ----------
    constants
        by C++ name.  bool, int and float become ``static constexpr`` members of that type; a
        str names a C++ type and becomes an alias, ``{"Element": "BFloat16"}``.

    Raises
    ------
    TypeError, ValueError
        a value of another type, or an int that does not fit a C++ int; the message
        names it.
    """
    lines = ["struct Config {"]
    for name, value in constants.items():
        if isinstance(value, bool):
            lines.append(f"  static constexpr bool {name} = {str(value).lower()};")
        elif isinstance(value, int):
            if not -(2**31) <= value < 2**31:
                raise ValueError(f"constant {name}={value} does not fit a C++ int")
            lines.append(f"  static constexpr int {name} = {value};")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"constant {name}={value} is not finite")
            lines.append(f"  static constexpr float {name} = {value.hex()}f;")  # exact, unlike decimals
        elif isinstance(value, str):
            lines.append(f"  using {name} = {value};")
        else:
            raise TypeError(f"constant {name} is a {type(value).__name__}; expected bool, int, float or str")
    lines.append("};")
    return "\n".join(lines)


def render(
    file: str, constants: Mapping[str, ConfigValue], entries: Sequence[str], name: str, types: str = ""
) -> KernelSource:
    """A kernel file over a `Config`.

    Parameters
    ----------
    file
        path relative to the folder of kernels: ``"fwd_sm80.cu"``.
    constants
        see `config`.
    entries
        the file's ``extern "C"`` functions.
    name
        see `KernelSource`.
    types
        further text that stands before the file.
    """
    text = f'#include "types.cuh"\n{config(constants)}\n{types}#include "{file}"\n'
    return KernelSource(name, flatten(text, f"config of {name}"), tuple(entries))


_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def flatten(text: str, label: str) -> str:
    """``text`` with the kernels' headers in place of its ``#include "..."`` lines, each once.

    ``#line`` directives keep every compiler's messages at the original file and line.  Headers of
    ``emulator/`` stay
    includes: only a host compiler reads them, and it is given the folder of kernels to search.

    Parameters
    ----------
    text
        a kernel source.
    label
        what ``#line`` calls it.

    Raises
    ------
    FileNotFoundError
        a header that is not in the folder of kernels; the message names the includer.
    """
    seen: set[str] = set()

    def expand(text: str, label: str) -> list[str]:
        lines = [f'#line 1 "{label}"']
        for number, line in enumerate(text.splitlines(), 1):
            match = _INCLUDE.match(line)
            if match is None or match[1].startswith("emulator/"):
                lines.append("" if _PRAGMA_ONCE.match(line) else line)
                continue
            header = match[1]
            if header not in seen:
                seen.add(header)
                try:
                    included = read_kernel(header)
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{label}:{number} includes {header!r}: {error}") from None
                lines += expand(included, f"kernels_cu/{header}")
            lines.append(f'#line {number + 1} "{label}"')
        return lines

    return "\n".join(expand(text, label)) + "\n"
