"""Environment variables that are looked at in every call."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["reader_of"]


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
