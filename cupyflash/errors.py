"""The exceptions cupyflash raises besides TypeError (wrong kind of argument) and ValueError (wrong value)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CupyflashError", "KernelCompileError", "Unsupported"]


class CupyflashError(Exception):
    """Base of the errors that only cupyflash raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by way of __init__, which takes other arguments than `args` and adds to the message.
        return _unpickled, (type(self), self.args), self.__dict__


def _unpickled(kind: type[CupyflashError], args: tuple[Any, ...]) -> CupyflashError:
    return kind.__new__(kind, *args)


class Unsupported(CupyflashError, NotImplementedError):
    """A valid call that a backend cannot serve.

    Attributes
    ----------
    reasons : dict[str, tuple[str, ...]]
        For each backend that was asked, why it refused.  Empty for a backend that could serve the call.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(message)
        self.reasons = {name: tuple(why) for name, why in (reasons or {}).items()}


class KernelCompileError(CupyflashError):
    """A compiler refused a kernel.

    Attributes
    ----------
    log : str
        What the compiler said, with the lines of the original files.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}:\n{log}" if log else message)
        self.log = log
