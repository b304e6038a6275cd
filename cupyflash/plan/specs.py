"""The values of a plan: what is compiled, what is launched, in which order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from ..hashing import hash_once
from ..problem.dtypes import dtype_named
from ..problem.expression import Expression
from .tiles import FAMILIES, TileConfig

__all__ = [
    "COMPANIONS",
    "CombineSpec",
    "Features",
    "FwdSpec",
    "KernelSpec",
    "Launch",
    "MaskSummarySpec",
    "MergeSpec",
    "ModSummarySpec",
    "Mods",
    "Plan",
    "WeightsSpec",
]

_SHORT_NAMES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}


@hash_once
@dataclass(frozen=True)
class Mods:
    """What a traced score_mod and mask_mod compute; None where there is none.

    Equal for functions of equal structure, whichever arrays and numbers they close over: a kernel is compiled once for
    all of them.
    """

    score: Expression | None = None
    mask: Expression | None = None

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(repr((self.score, self.mask)).encode()).hexdigest()[:10]

    def __str__(self) -> str:
        return f"{'score' * (self.score is not None)}{'mask' * (self.mask is not None)}mod{self._digest}"


@hash_once
@dataclass(frozen=True)
class Features:
    """What a forward kernel does beyond softmax(Q Kᵀ) V; compiled in, since each is work in the inner loop.

    Parameters
    ----------
    has_lower, has_upper : bool
        Whether the band of keys that take part may be bounded on either side.
    scale_first : bool
        Scores are multiplied by the scale before the softmax rather than within its exponent: right for any scale.
    float_mask : str or None
        The dtype of a float mask; None: there is none.
    bool_mask : bool
        There may be a bool mask.
    changed : bool
        There may be softcap or ALiBi.
    dropout : bool
    mods : Mods or None
        score_mod and mask_mod; None: there are none.
    """

    has_lower: bool = False
    has_upper: bool = False
    scale_first: bool = False
    float_mask: str | None = None
    bool_mask: bool = False
    changed: bool = False
    dropout: bool = False
    mods: Mods | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scores are scaled and bounded alone, and no weights are dropped."""
        return not (self.float_mask or self.bool_mask or self.changed or self.dropout or self.mods)

    def __str__(self) -> str:
        bounds = {(False, False): "", (False, True): "causal", (True, False): "lower", (True, True): "window"}
        named = (
            bounds[self.has_lower, self.has_upper],
            "scalefirst" if self.scale_first else "",
            f"bias{_SHORT_NAMES[self.float_mask]}" if self.float_mask else "",
            "mask" if self.bool_mask else "",
            "changed" if self.changed else "",
            "dropout" if self.dropout else "",
            str(self.mods) if self.mods else "",
        )
        return "+".join(filter(None, named))


@hash_once
@dataclass(frozen=True)
class FwdSpec:
    """What is compiled into a forward kernel.  Its str is module name, test id and benchmark row.

    Parameters
    ----------
    family : str
        The kernel file without its suffix: a key of `FAMILIES`.
    dtype : str
    head_dim, head_dim_v : int
        As padded within the kernel: at least E and Ev.
    tile : TileConfig
    features : Features
    packed : bool
        A tile's rows are all query heads that share a key head, query by query, rather than queries of one head.
    baseline : int
        The oldest GPUs whose instructions it uses, of its family's.
    """

    family: str
    dtype: str
    head_dim: int
    head_dim_v: int
    tile: TileConfig
    features: Features = Features()
    packed: bool = False
    baseline: int = 80

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        itemsize = dtype_named(self.dtype).storage.itemsize
        return FAMILIES[self.family].shared_bytes(self.tile, self.head_dim, self.head_dim_v, itemsize)

    @cached_property
    def num_threads(self) -> int:
        """Threads of a block."""
        return 32 * self.tile.num_warps

    @cached_property
    def persists(self) -> bool:
        """Whether a block may take one item of work after another.

        It may not where rows are packed or scores are changed: see fwd_sm90.cu.
        """
        return FAMILIES[self.family].persists and self.features.is_plain and not self.packed

    @property
    def mods(self) -> Mods | None:
        """The functions that are compiled in."""
        return self.features.mods

    def __str__(self) -> str:
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}x{self.head_dim_v}"
        parts = [self.family, _SHORT_NAMES[self.dtype], dims, str(self.tile), str(self.features)]
        is_for_older = self.baseline < max(FAMILIES[self.family].baselines)
        parts += ["packed" * self.packed, f"sm{self.baseline}" * is_for_older]
        return "-".join(filter(None, parts))


@hash_once
@dataclass(frozen=True)
class CombineSpec:
    """The kernel that joins the partial results of blocks that share keys: one warp for each row of the output.

    Parameters
    ----------
    dtype : str
        Of the output; the partial results are of its accumulator.
    """

    dtype: str

    family = "combine"
    mods = None
    shared_bytes = 0
    num_threads = 128
    rows_per_block = 4

    def __str__(self) -> str:
        return f"{self.family}-{_SHORT_NAMES[self.dtype]}"


@hash_once
@dataclass(frozen=True)
class WeightsSpec:
    """The kernel that writes the L×S scores at one stage, or the weights: a block has 64 queries and
    all keys, or a part of them.

    Parameters
    ----------
    dtype : str
        Of the query.
    stage : str
        "raw", "modded", "capped", "biased", or "softmax": dropped weights are a feature.
    features : Features
        Of the scores up to that stage, and dropout.
    """

    dtype: str
    stage: str
    features: Features = Features()

    family = "weights"
    # As fwd_simt's; P takes no shared memory here, so double may have as many keys.
    tile = TileConfig(64, 64, 8)
    # Panels of 128 bytes of Q and K, with 16 of padding at each row.
    shared_bytes = (64 + 64) * 144
    num_threads = 256

    @property
    def mods(self) -> Mods | None:
        """The functions that are compiled in."""
        return self.features.mods

    def __str__(self) -> str:
        return "-".join(filter(None, [self.family, _SHORT_NAMES[self.dtype], self.stage, str(self.features)]))


@dataclass(frozen=True)
class MaskSummarySpec:
    """The kernel that tells of each tile of a bool mask whether none, some or all of it is true: one warp for each."""

    family = "mask_summary"
    mods = None
    shared_bytes = 0
    num_threads = 128
    tiles_per_block = 4

    def __str__(self) -> str:
        return self.family


@hash_once
@dataclass(frozen=True)
class ModSummarySpec:
    """The kernel that tells of each tile of scores whether mask_mod keeps none, some or all of its keys.

    Parameters
    ----------
    mods : Mods
        With a mask alone.
    """

    mods: Mods

    family = "mod_summary"
    shared_bytes = 0
    num_threads = 128
    tiles_per_block = 4

    def __str__(self) -> str:
        return f"{self.family}-{self.mods}"


@dataclass(frozen=True)
class MergeSpec:
    """The kernel that joins attention outputs over disjoint sets of keys: one warp for each row of the output.

    Parameters
    ----------
    dtype, out_dtype : str
        Of the parts' outputs and of the joint one: the same, or one of the two is the accumulator of the other.
    """

    dtype: str
    out_dtype: str

    family = "merge"
    mods = None
    shared_bytes = 0
    num_threads = 128
    rows_per_block = 4

    def __str__(self) -> str:
        to = "" if self.out_dtype == self.dtype else f"-to-{_SHORT_NAMES[self.out_dtype]}"
        return f"{self.family}-{_SHORT_NAMES[self.dtype]}{to}"


KernelSpec = FwdSpec | CombineSpec | WeightsSpec | MaskSummarySpec | ModSummarySpec | MergeSpec

#: The kernels that no plan of `attention` names.
COMPANIONS: tuple[KernelSpec, ...] = (
    MaskSummarySpec(),
    *[MergeSpec(dtype, dtype) for dtype in _SHORT_NAMES],
    *[MergeSpec(dtype, "float32") for dtype in ("float16", "bfloat16")],
    *[MergeSpec("float32", dtype) for dtype in ("float16", "bfloat16")],
)


@hash_once
@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything but the parameters.

    Parameters
    ----------
    spec : KernelSpec
    grid : (int,)
        Blocks.
    items : int
        Items of work that the blocks take one after another; 0: a block has one.
    """

    spec: KernelSpec
    grid: tuple[int]
    items: int = 0

    @cached_property
    def block(self) -> tuple[int]:
        """Threads of a block."""
        return (self.spec.num_threads,)

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.spec.shared_bytes

    def __str__(self) -> str:
        items = f" items={self.items}" if self.items else ""
        return f"{self.spec} grid={self.grid[0]}{items} block={self.block[0]} shared={self.shared_bytes}"


@hash_once
@dataclass(frozen=True)
class Plan:
    """Launches in the order in which they run; none where there is nothing to compute.

    Parameters
    ----------
    launches : tuple of Launch
    num_splits : int
        Parts into which the keys of each tile of queries are divided; with more than one, each leaves a partial result
        for `combine`.
    pack : int
        Query heads in one tile of rows.
    row_alignment : int
        Bytes at whose multiples the kernels need rows to begin: at least an element's, since strides count elements.
    weights_parts : int
        Blocks that share the keys of each tile of weights.
    section : int
        Heads, or groups of heads that share tiles, whose tiles of queries are taken together: kernels_cu/work.cuh.
    """

    launches: tuple[Launch, ...]
    num_splits: int = 1
    pack: int = 1
    row_alignment: int = 1
    weights_parts: int = 1
    section: int = 1

    @cached_property
    def takes_maps(self) -> bool:
        """Whether its forward kernel, which comes first, finds its operands by tensor maps."""
        family = FAMILIES.get(self.launches[0].spec.family) if self.launches else None
        return family is not None and family.takes_maps

    def __str__(self) -> str:
        return "\n".join(map(str, self.launches)) or "nothing to compute"
