"""Backends by name, and the choice among them.

A name given by the user (the argument `backend`, or the environment variable CUPYFLASH_BACKEND) is obeyed or refused
with reasons, never replaced.  Without one the arrays decide.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from ..environment import reader_of
from ..errors import Unsupported
from ..problem.parts import Parts
from ..problem.problem import Buffers, Problem
from .reference import MathBackend
from .tiled import NumpyBackend

__all__ = ["Backend", "Merger", "backends", "name_of", "reasons_of", "register_backend", "select", "select_merger"]

_ENVIRONMENT = "CUPYFLASH_BACKEND"
_read_environment = reader_of(_ENVIRONMENT)
_DEFAULTS = {"numpy": "numpy", "cupy": "cuda"}


@runtime_checkable
class Backend(Protocol):
    """What a backend provides."""

    def reasons(self, problem: Problem) -> Sequence[str]:
        """Why this backend can't run the problem, one sentence each; empty if it can."""

    def run(self, problem: Problem, buffers: Buffers) -> None:
        """Fill `buffers.out`, and `buffers.lse` and `buffers.weights` where they are not None.

        The device of the arrays is the current one.
        """


@runtime_checkable
class Merger(Protocol):
    """What a backend provides for `merge_attention` if it can merge at all."""

    def merge_reasons(self, parts: Parts) -> Sequence[str]:
        """Why this backend can't merge the parts, one sentence each; empty if it can."""

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        """New arrays: the joint output and its log-sum-exp."""


class _Both(Backend, Merger, Protocol):
    """A backend that merges, as all of ours do."""


class _Late:
    """A backend that is made when it is first asked: the modules behind the kernels take long to import."""

    def __init__(self, make: Callable[[], _Both]) -> None:
        self._make = make

    @cached_property
    def made(self) -> _Both:
        return self._make()

    def reasons(self, problem: Problem) -> Sequence[str]:
        return self.made.reasons(problem)

    def run(self, problem: Problem, buffers: Buffers) -> None:
        self.made.run(problem, buffers)

    def merge_reasons(self, parts: Parts) -> Sequence[str]:
        return self.made.merge_reasons(parts)

    def merge(self, parts: Parts) -> tuple[Any, Any]:
        return self.made.merge(parts)


def _make_cuda() -> _Both:
    from .cuda import CudaBackend

    return CudaBackend()


def _make_emulator() -> _Both:
    from .emulated import EmulatorBackend

    return EmulatorBackend()


_lock = threading.Lock()
_backends: dict[str, Backend] = {
    "numpy": NumpyBackend(),
    "math": MathBackend(),
    "cuda": _Late(_make_cuda),
    "emulator": _Late(_make_emulator),
}


def register_backend(name: str, backend: Backend, *, overwrite: bool = False) -> None:
    """Make a backend available as ``attention(…, backend=name)``.

    Parameters
    ----------
    name : str
    backend : Backend
        An object with the methods ``reasons(problem)`` and ``run(problem, buffers)``; see
        `cupyflash.backends.registry.Backend` and, for what they are given, `cupyflash.problem.problem`.
        With the methods of `cupyflash.backends.registry.Merger` it serves `merge_attention` too.
    overwrite : bool
        Replace a backend of the same name.

    Raises
    ------
    TypeError
        name is not a str, or backend lacks a method.
    ValueError
        name is empty, or taken and overwrite is False.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, but was {name!r}")
    if not name:
        raise ValueError("name must have at least one character, but was empty")
    if isinstance(backend, type):
        raise TypeError(f"backend must be an object with the methods reasons and run, but was the class {backend!r}")
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must have the methods reasons and run, but was {backend!r}")
    with _lock:
        if name in _backends and not overwrite:
            raise ValueError(f"name must be new unless overwrite=True, but {name!r} is registered already")
        _backends[name] = backend


def backends() -> tuple[str, ...]:
    """Names of the registered backends."""
    return tuple(_backends)


def select(problem: Problem, name: str | None) -> Backend:
    """The backend to run the problem: the named one, that of the environment, or the default of the arrays.

    Raises
    ------
    TypeError, ValueError
        the name is no str, or unknown.
    Unsupported
        that backend can't run the problem; the message holds the problem and every backend's reasons.
    """
    chosen = name_of(problem, name)
    backend = _backends.get(chosen)
    if isinstance(backend, _Late):
        backend = backend.made  # every call comes this way
    if backend is None or backend.reasons(problem):
        raise _unsupported(problem, chosen, reasons_of(problem))
    return backend


def select_merger(parts: Parts, name: str | None) -> Merger:
    """The backend to merge the parts, chosen and refused as by `select`."""
    chosen = name_of(parts, name)
    backend = _backends.get(chosen)
    if not isinstance(backend, Merger) or backend.merge_reasons(parts):
        reasons = {name: _merge_reasons(backend, parts) for name, backend in _backends.items()}
        raise _unsupported(parts, chosen, reasons)
    return backend


def _merge_reasons(backend: Backend, parts: Parts) -> tuple[str, ...]:
    if isinstance(backend, Merger):
        return tuple(backend.merge_reasons(parts))
    return ("it can't merge: it has no methods merge_reasons and merge",)


def name_of(call: Problem | Parts, name: str | None) -> str:
    """The name of the backend that `select` or `select_merger` asks; raises TypeError and ValueError as they do."""
    source = "backend"
    if name is None:
        name = _read_environment() or None
        source = _ENVIRONMENT
    if name is None:
        return _DEFAULTS[call.library]
    if not isinstance(name, str):
        raise TypeError(f"backend must be one of {backends()} or None, but was {name!r}")
    if name not in _backends:
        raise ValueError(f"{source} must be one of {backends()}, but was {name!r}")
    return name


def reasons_of(problem: Problem) -> dict[str, tuple[str, ...]]:
    """For each backend why it can't run the problem; empty where it can."""
    return {name: tuple(backend.reasons(problem)) for name, backend in _backends.items()}


def _unsupported(call: Problem | Parts, chosen: str, reasons: Mapping[str, tuple[str, ...]]) -> Unsupported:
    if chosen not in reasons:
        reasons = {chosen: ("it has no kernels in this version",), **reasons}
    lines = [f"backend {chosen!r} can't run this call:", f"  {call}".replace("\n", "\n  "), "Reasons:"]
    for name, why in reasons.items():
        usable = f'it can run this: pass backend="{name}"'
        lines.append(f"  {name}: {'; '.join(why) or usable}")
    return Unsupported("\n".join(lines), reasons)
