"""How far a call is: shown on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["Meter", "new_meter", "progress", "show_nothing_within"]

Show = Callable[[int, int], object]

_show: ContextVar[Show | None] = ContextVar("cupyflash.progress", default=None)

# Calls that are over by then draw no bar.
_SECONDS_BEFORE_A_BAR = 0.5


@contextmanager
def progress(show: Show | None = None) -> Iterator[None]:
    """Show how far each call of `attention` on the CPU is, while this context lasts.

    Parameters
    ----------
    show : callable, optional
        ``show(done, total)`` is called by the calling thread: with done = 0, after each tile, and with done = total
        when the call is over.  Both count scores, one for each query and key that are not skipped by causal or window,
        of all heads.  What it raises ends the call.  Default: a bar of `tqdm` on standard error, for calls that take
        longer than half a second.

    Raises
    ------
    TypeError
        show cannot be called.
    ImportError
        There is no `show`, and tqdm is not installed.

    Notes
    -----
    It holds for the calls of this thread (of this asyncio task) with the backend "numpy", which walks over tiles.  The
    others have nothing to tell on the way, and calls within a score_mod or mask_mod are part of the call around them.

    Examples
    --------
    >>> import numpy as np
    >>> import cupyflash
    >>> query, key, value = np.zeros((3, 2048, 64), np.float32)
    >>> with cupyflash.progress():  # doctest: +SKIP
    ...     out = cupyflash.attention(query, key, value)
    attention:  42%|███████▌          | 1.76M/4.19M [00:00<00:00, 98.2Mscore/s]
    >>> seen = []
    >>> with cupyflash.progress(lambda done, total: seen.append(done / total)):
    ...     out = cupyflash.attention(query, key, value)
    >>> seen[0], seen[-1]
    (0.0, 1.0)
    """
    if show is not None and not callable(show):
        raise TypeError(f"show must be a callable show(done, total) or None, but was {show!r}")
    bar = None if show is not None else _Bar()
    token = _show.set(show or bar)
    try:
        yield
    finally:
        _show.reset(token)
        if bar is not None:
            bar.close()


def new_meter() -> Meter | None:
    """The meter of the call that begins, None where nobody wants to see it."""
    show = _show.get()
    return None if show is None else Meter(show)


def show_nothing_within() -> None:
    """In the context of a call: calls within it are part of it."""
    _show.set(None)


class Meter:
    """Scores done of one call, counted by all its threads and shown by the one that made it."""

    def __init__(self, show: Show) -> None:
        self._show, self._owner = show, threading.get_ident()
        self._lock = threading.Lock()
        self._done = self._total = 0

    def start(self, total: int) -> None:
        """Begin, with so many scores to do; where there are none, nothing is shown."""
        self._total = total
        if total:
            self._show(0, total)

    def add(self, scores: int) -> None:
        """So many more are done."""
        with self._lock:
            self._done += scores
            done = self._done
        if done < self._total and threading.get_ident() == self._owner:
            self._show(done, self._total)

    def finish(self) -> None:
        """The call is over."""
        if self._total:
            self._show(self._total, self._total)


class _Bar:
    """`show` as a bar of tqdm, a new one for each call."""

    def __init__(self) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError(
                "progress() draws its bar with tqdm, which is not installed: pip install tqdm, "
                "or pass a callable show(done, total)"
            ) from error
        self._tqdm: Any = tqdm
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self.close()
            self._bar = self._tqdm(
                total=total,
                desc="attention",
                unit="score",
                unit_scale=True,
                delay=_SECONDS_BEFORE_A_BAR,
                leave=False,
            )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
