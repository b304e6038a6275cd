"""Tiles as data: which a kernel family has for which head dim and GPU, best first, and what each one takes.

None of them has been timed on a GPU.  They follow from counting: see the comments at the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from .device import DeviceSpec

__all__ = ["TILES", "TileConfig", "TileRow", "tiles_for"]


@dataclass(frozen=True)
class TileConfig:
    """The part of the score matrix that a block works on at a time: block_m queries by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of fwd_sm80: two tiles of K and one of V, with 16-bit elements; Q and O lie in their place."""
        return 3 * self.block_n * head_dim * 2

    def reasons(self, head_dim: int, device: DeviceSpec) -> list[str]:
        """Why the kernel can't run with this tile on that GPU; empty if it can."""
        reasons = []
        if self.block_m != 16 * self.num_warps:
            reasons.append(
                f"tile {self}: a warp owns 16 queries, so {self.num_warps} warps need m{16 * self.num_warps}"
            )
        if self.block_n % 16 or self.block_m > 2 * self.block_n:
            reasons.append(f"tile {self}: n must be a multiple of 16 and at least half of m")
        if self.shared_bytes(head_dim) > device.smem_per_block:
            reasons.append(
                f"tile {self} takes {self.shared_bytes(head_dim)} bytes of shared memory at head dim {head_dim}, "
                f"{device.name} has {device.smem_per_block} per block"
            )
        return reasons

    def __str__(self) -> str:
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}"


@dataclass(frozen=True)
class TileRow:
    """The tiles of a kernel family for a head dim on GPUs of compute capability `since` and later, best first."""

    family: str
    head_dim: int
    since: tuple[int, int]
    tiles: tuple[TileConfig, ...]


# Eight warps fetch K and V half as often as four do; four warps make twice as many blocks, for problems that would
# leave SMs idle.  At head dim 128 either takes 48 KiB and, as compiled, up to 255 registers a thread: one block of
# eight warps or two of four per SM, also in the 100 KiB of sm_86, sm_89 and sm_120.
_WIDE, _NARROW = TileConfig(128, 64, 8), TileConfig(64, 64, 4)

TILES: tuple[TileRow, ...] = (
    TileRow("fwd_sm80", 64, (8, 0), (_WIDE, _NARROW)),
    TileRow("fwd_sm80", 128, (8, 0), (_WIDE, _NARROW)),
)


def tiles_for(family: str, head_dim: int, cc: tuple[int, int]) -> tuple[TileConfig, ...]:
    """The tiles of the row that says most about a GPU: that with the latest `since`; empty where there is no row."""
    rows = [row for row in TILES if (row.family, row.head_dim) == (family, head_dim) and row.since <= cc]
    return max(rows, key=lambda row: row.since).tiles if rows else ()
