"""The choice of kernels: candidates → reasons against them → the choice.

`choose` turns a `Problem` into a `Plan`.  Which kernel it names depends on the `Selector` alone, not on exact lengths,
so that a loop over growing keys finds it again: see `choose_spec`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ..errors import Unsupported
from ..problem.problem import Problem
from .device import DeviceSpec
from .tiles import TILES, TileConfig, tiles_for

__all__ = ["KernelSpec", "Launch", "Plan", "Selector", "choose", "choose_spec", "every_spec", "refusals"]

# The kernel's indices are int32: the sum of two lengths, and of the rows that fill up a tile, has to fit.
_MAX_LENGTH = 2**30 - 2**8
_MAX_BLOCKS = 2**31 - 1
# Where scale · log2(e) and the scores keep far from float32's ends, it is folded into the exponent.
_FOLDED_SCALES = (2.0**-64, 2.0**64)

_SHORT_NAMES = {"float16": "f16", "bfloat16": "bf16"}

# (has_lower, has_upper, scale_first) of the kernels that there are.  What is rare shares the one that is bounded on
# both sides: a window that is open to the right, and a scale that can't be folded.
_FEATURES = (_FULL, _CAUSAL, _WINDOW, _ANY_SCALE) = (
    (False, False, False),
    (False, True, False),
    (True, True, False),
    (True, True, True),
)


@dataclass(frozen=True)
class Selector:
    """What selects a kernel."""

    dtype: str
    head_dim: int
    features: tuple[bool, bool, bool]  # has_lower, has_upper, scale_first of the KernelSpec
    fills_device: bool  # the wide tile makes at least one block for each SM


@dataclass(frozen=True)
class KernelSpec:
    """What is compiled into a kernel.  Its str is module name, test id and benchmark row.

    Parameters
    ----------
    family : str
        The kernel file without its suffix.
    dtype : str
        "float16" or "bfloat16".
    head_dim : int
    tile : TileConfig
    has_lower, has_upper : bool
        Whether the band of keys that take part may be bounded on either side.
    scale_first : bool
        Scores are multiplied by the scale before the softmax rather than within its exponent: right for any scale.
    """

    family: str
    dtype: str
    head_dim: int
    tile: TileConfig
    has_lower: bool = False
    has_upper: bool = False
    scale_first: bool = False

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.tile.shared_bytes(self.head_dim)

    def __str__(self) -> str:
        bounds = {(False, False): "", (False, True): "-causal", (True, False): "-lower", (True, True): "-window"}
        features = bounds[self.has_lower, self.has_upper] + ("-scalefirst" if self.scale_first else "")
        return f"{self.family}-{_SHORT_NAMES[self.dtype]}-d{self.head_dim}-{self.tile}{features}"


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything but the parameters."""

    spec: KernelSpec
    grid: tuple[int]
    block: tuple[int]
    shared_bytes: int

    def __str__(self) -> str:
        return f"{self.spec} grid={self.grid[0]} block={self.block[0]} shared={self.shared_bytes}"


#: Launches in the order in which they run; empty where there is nothing to compute.
Plan = tuple[Launch, ...]


def refusals(problem: Problem) -> list[str]:
    """What the problem asks and no kernel does, one sentence each; empty if some kernel can run it."""
    reasons = []
    if problem.dtype not in _SHORT_NAMES:
        reasons.append(f"it has no {problem.dtype}, only float16 and bfloat16")
    head_dims = sorted({row.head_dim for row in TILES})
    if problem.head_dim != problem.head_dim_v:
        reasons.append(f"it has no E ≠ Ev, but E was {problem.head_dim} and Ev was {problem.head_dim_v}")
    elif problem.head_dim not in head_dims:
        reasons.append(f"it has the head dims {', '.join(map(str, head_dims))}, but E was {problem.head_dim}")
    for name, asked in (
        ("float mask", problem.float_mask_dtype),
        ("bool mask", problem.has_bool_mask),
        ("score_mod", problem.has_score_mod),
        ("mask_mod", problem.has_mask_mod),
        ("softcap", problem.softcap),
        ("alibi_slopes", problem.has_alibi),
        ("sinks", problem.has_sinks),
        ("dropout", problem.dropout_p),
        (f"precision {problem.precision!r}", problem.precision != "ieee"),
        ("weights", problem.weights_stage),
    ):
        if asked:
            reasons.append(f"it has no {name}")
    for name, length in (("L", problem.seqlen_q), ("S", problem.seqlen_k)):
        if length > _MAX_LENGTH:
            reasons.append(f"it takes lengths up to {_MAX_LENGTH}, but {name} was {length}")
    if _num_blocks(problem, min(tile.block_m for row in TILES for tile in row.tiles)) > _MAX_BLOCKS:
        reasons.append(f"it takes up to {_MAX_BLOCKS} tiles of queries, and these are more")
    return reasons


def choose(problem: Problem, device: DeviceSpec) -> Plan:
    """The plan for a problem that `refusals` has nothing against.

    Raises
    ------
    Unsupported
        No kernel runs on the device; with a reason for each candidate.
    """
    if 0 in (problem.batch_size, problem.num_heads_q, problem.seqlen_q):
        return ()
    widest = max(tile.block_m for row in TILES for tile in row.tiles)
    selector = Selector(
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        features=_features(problem),
        fills_device=_num_blocks(problem, widest) >= device.sms,
    )
    spec, reasons = choose_spec(selector, device)
    if spec is None:
        raise Unsupported(
            f'no kernel runs on {device.name}: {"; ".join(reasons)}; pass backend="math"', {"cuda": reasons}
        )
    grid = (_num_blocks(problem, spec.tile.block_m),)
    return (Launch(spec, grid, (32 * spec.tile.num_warps,), spec.shared_bytes),)


@lru_cache(maxsize=512)
def choose_spec(selector: Selector, device: DeviceSpec) -> tuple[KernelSpec | None, tuple[str, ...]]:
    """The kernel for what `selector` says, or None and why each candidate falls out."""
    candidates = tiles_for("fwd_sm80", selector.head_dim, device.cc)
    if not candidates:
        return None, (f"it needs compute capability 8.0 or later, {device.name} has {device.cc[0]}.{device.cc[1]}",)
    refused = {tile: tile.reasons(selector.head_dim, device) for tile in candidates}
    legal = [tile for tile in candidates if not refused[tile]]
    if not legal:
        return None, tuple(reason for reasons in refused.values() for reason in reasons)
    # Best first; where the best would leave SMs idle, the one that makes the most blocks.
    tile = legal[0] if selector.fills_device else min(legal, key=lambda tile: tile.block_m)
    return KernelSpec("fwd_sm80", selector.dtype, selector.head_dim, tile, *selector.features), ()


def every_spec() -> Iterator[KernelSpec]:
    """Every kernel that `choose` may name on some device."""
    for row in TILES:
        for tile in row.tiles:
            for dtype in _SHORT_NAMES:
                for features in _FEATURES:
                    yield KernelSpec(row.family, dtype, row.head_dim, tile, *features)


def _features(problem: Problem) -> tuple[bool, bool, bool]:
    if not _FOLDED_SCALES[0] <= problem.scale <= _FOLDED_SCALES[1]:
        return _ANY_SCALE
    if problem.band.lower is not None:
        return _WINDOW
    return _FULL if problem.band.upper is None else _CAUSAL


def _num_blocks(problem: Problem, block_m: int) -> int:
    return math.ceil(problem.seqlen_q / block_m) * problem.num_heads_q * problem.batch_size
