"""A hash that is computed once, for the frozen values that are keys of caches at every call."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["hash_once"]

_T = TypeVar("_T")


def hash_once(cls: type[_T]) -> type[_T]:
    """Let each instance of a frozen dataclass keep its hash, which it would compute from all fields each time."""
    compute = cls.__hash__

    def __hash__(self: _T) -> int:
        try:
            return self._hash  # type: ignore[attr-defined]
        except AttributeError:
            found = self.__dict__["_hash"] = compute(self)
            return found

    def __getstate__(self: _T) -> dict[str, object]:
        # Strings have other hashes in another process.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    cls.__hash__ = __hash__  # type: ignore[method-assign, assignment]
    cls.__getstate__ = __getstate__  # type: ignore[method-assign, assignment]
    return cls
