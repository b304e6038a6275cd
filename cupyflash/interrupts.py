"""Work that has to be tidied up after, whatever ends it.

Ctrl-C raises KeyboardInterrupt in the main thread between any two steps of Python code: also on entry to the
``__exit__`` of a context manager written in Python, or to the first function that a ``finally`` block calls, and then
neither is run.  (The ``with`` of a lock, which is written in C, has no such gap.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

import numpy as np

__all__ = ["settle_after", "without_float_warnings"]

Result = TypeVar("Result")


def settle_after(work: Callable[[], Result], settle: Callable[[], object]) -> Result:
    """What `work` returns or raises, after `settle` ran to its end.

    Parameters
    ----------
    work
        May have done any part of what it does when an exception ends it.
    settle
        Called again if Ctrl-C comes in the middle of it, so doing it twice, or half and then whole, must do no harm;
        the KeyboardInterrupt is raised afterwards.
    """
    failure: BaseException | None = None
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001  # raised below
        failure = error
    while True:
        try:
            settle()
            break
        except KeyboardInterrupt as error:
            failure = failure or error
    if failure is None:
        return result
    try:
        raise failure
    finally:
        del failure  # its traceback holds this frame


def without_float_warnings(work: Callable[..., Result], *arguments: Any) -> Result:
    """What ``work(*arguments)`` returns, with NumPy silent about overflow, NaN and the like.

    The setting is one of a context made for this, and ends with it: `np.errstate` alone could be left behind.
    """
    return copy_context().run(_silently, work, arguments)


def _silently(work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    with np.errstate(all="ignore"):
        return work(*arguments)
