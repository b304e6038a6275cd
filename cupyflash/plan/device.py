"""What the choice of a kernel needs to know about a GPU, and the GPUs that are known by name.

A plan is made from a `DeviceSpec` alone, so the plan for an H200 can be made, and tested, on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hashing import hash_once

__all__ = ["DEVICES", "EMULATOR", "DeviceSpec"]


@hash_once
@dataclass(frozen=True)
class DeviceSpec:
    """A GPU in numbers.  Sizes are in bytes.

    Parameters
    ----------
    name : str
    cc : (int, int)
        Compute capability, (9, 0) for Hopper.
    sms : int
        Streaming multiprocessors.
    smem_per_block : int
        Dynamic shared memory that one block can ask for (the opt-in maximum).
    smem_per_sm : int
    l2 : int
        Size of the second-level cache.
    """

    name: str
    cc: tuple[int, int]
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2: int

    @property
    def arch(self) -> str:
        """What the compiler calls it: "sm_90"."""
        return f"sm_{self.cc[0]}{self.cc[1]}"


_KIB, _MIB = 1 << 10, 1 << 20

#: By name.  Shared memory from the CUDA programming guide's table of compute capabilities, the rest from data sheets.
DEVICES: dict[str, DeviceSpec] = {
    device.name: device
    for device in (
        DeviceSpec("T4", (7, 5), 40, 64 * _KIB, 64 * _KIB, 4 * _MIB),
        DeviceSpec("A100", (8, 0), 108, 163 * _KIB, 164 * _KIB, 40 * _MIB),
        DeviceSpec("A10G", (8, 6), 80, 99 * _KIB, 100 * _KIB, 6 * _MIB),
        DeviceSpec("RTX 3090", (8, 6), 82, 99 * _KIB, 100 * _KIB, 6 * _MIB),
        DeviceSpec("L4", (8, 9), 58, 99 * _KIB, 100 * _KIB, 48 * _MIB),
        DeviceSpec("RTX 4090", (8, 9), 128, 99 * _KIB, 100 * _KIB, 72 * _MIB),
        DeviceSpec("L40S", (8, 9), 142, 99 * _KIB, 100 * _KIB, 96 * _MIB),
        DeviceSpec("H100", (9, 0), 132, 227 * _KIB, 228 * _KIB, 50 * _MIB),
        DeviceSpec("H200", (9, 0), 132, 227 * _KIB, 228 * _KIB, 50 * _MIB),
        DeviceSpec("B200", (10, 0), 148, 227 * _KIB, 228 * _KIB, 126 * _MIB),
        DeviceSpec("RTX 5090", (12, 0), 170, 99 * _KIB, 100 * _KIB, 96 * _MIB),
    )
}

#: What the emulator stands for: an sm_80 so small that problems of a test's size fill it.
EMULATOR = DeviceSpec("emulator", (8, 0), 4, 163 * _KIB, 164 * _KIB, 40 * _MIB)
