"""Environment variables that are looked at in every call; what CUPYFLASH_DEBUG asks for is said here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

__all__ = ["debug_level", "reader_of", "say"]


def reader_of(name: str) -> Callable[[], str | None]:
    """A function that gives the variable's value at that moment, None where it is not set.

    That is ``os.environ.get(name)``, which takes most of a microsecond to find nothing: it raises and catches KeyError.
    So the dict behind os.environ is asked first, where there is one as in CPython.
    """
    encoded = os.environ.encodekey(name)

    def read() -> str | None:
        environ = os.environ
        try:
            if encoded not in environ._data:  # type: ignore[attr-defined]  # CPython's, and no more than a short cut
                return None
        except AttributeError:
            pass
        return environ.get(name)

    return read


_DEBUG = "CUPYFLASH_DEBUG"
_read_debug = reader_of(_DEBUG)


def debug_level() -> int:
    """The level that CUPYFLASH_DEBUG asks for, 0 where it is not set.

    Raises
    ------
    ValueError
        It is no int from 0 to 4.
    """
    text = _read_debug()
    if not text:
        return 0
    if text not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"{_DEBUG} must be an int from 0 to 4, but was {text!r}")
    return int(text)


def say(lines: Iterable[str]) -> None:
    """Print lines on standard error, each with the library's name before it."""
    for line in lines:
        print(f"cupyflash: {line}", file=sys.stderr)
