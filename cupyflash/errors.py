"""The exceptions cupyflash raises besides TypeError (wrong kind of argument) and ValueError (wrong value)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["CupyflashError", "Unsupported"]


class CupyflashError(Exception):
    """Base of the errors that only cupyflash raises."""


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
