"""Scaled-dot-product attention for NumPy and CuPy arrays.

`attention` is the library, `explain` says what it would do, and `tune` chooses its kernel by the clock.
`attention_weights`, `merge_attention`, `dropout_mask` and `flops` go with it; `mods` is a gallery of score and mask
functions, and `trace_mod` shows one as C++.  `progress` shows how far a call is.  `formulas` derives the algorithm step
by step, and `register_backend` adds implementations.  `cupyflash.testing` has what its tests compare with.
"""

from __future__ import annotations

from . import formulas, mods
from .api import attention, attention_weights
from .backends.registry import backends, register_backend
from .build.functor import trace_mod
from .errors import CupyflashError, Unsupported
from .explain import explain
from .flops import flops
from .merge import merge_attention
from .problem.philox import dropout_mask
from .progress import progress
from .tune import tune
from .version import __version__

__all__ = [
    "CupyflashError",
    "Unsupported",
    "__version__",
    "attention",
    "attention_weights",
    "backends",
    "dropout_mask",
    "explain",
    "flops",
    "formulas",
    "merge_attention",
    "mods",
    "progress",
    "register_backend",
    "trace_mod",
    "tune",
]
