"""What must hold of every compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator

from cupyflash.build.nvrtc import Binary, Resources
from cupyflash.build.rendering import entry_of
from cupyflash.plan.specs import FwdSpec, KernelSpec


def faults(spec: KernelSpec, binary: Binary) -> Iterator[str]:
    """What is wrong with it, a sentence each."""
    found = binary.resources[entry_of(spec)]
    yield from (f"the compiler said: {notice}" for notice in binary.notices)
    # An array that is indexed by a variable is a stack without spills.
    for name, number in (
        ("bytes of stack", found.stack_bytes),
        ("bytes of spill stores", found.spill_stores),
        ("bytes of spill loads", found.spill_loads),
        ("stores to local memory", found.opcodes.get("STL", 0)),
        ("loads from local memory", found.opcodes.get("LDL", 0)),
    ):
        if number:
            yield f"it has {number} {name}"
    if found.shared_bytes not in (0, 1024):  # none of ours: from sm_90 on the system keeps 1 KiB
        yield f"it has {found.shared_bytes} bytes of static shared memory"
    if found.registers * spec.num_threads > 65536:
        yield f"{spec.num_threads} threads of {found.registers} registers do not fit on an SM"
    if isinstance(spec, FwdSpec) and spec.family == "fwd_sm80":
        yield from _tensor_core_faults(spec, found)
    if isinstance(spec, FwdSpec) and spec.family == "fwd_sm90":
        yield from _warpgroup_faults(spec, found)


def _tensor_core_faults(spec: FwdSpec, found: Resources) -> Iterator[str]:
    """The step is there once: Q Kᵀ and P V, unrolled, of a warp's 16 rows."""
    tile = spec.tile
    steps_q_k, steps_p_v = spec.head_dim // 16, tile.block_n // 16
    products = steps_q_k * tile.block_n // 8 + steps_p_v * spec.head_dim_v // 8
    # mma.m16n8k16; sm_75 has m16n8k8 alone.
    products *= 2 if spec.baseline == 75 else 1
    # ldmatrix gives four 8 by 8 matrices: two of K's or V's operands of a product, or Q's for a step.
    loads = steps_q_k * tile.block_n // 16 + steps_p_v * spec.head_dim_v // 16 + steps_q_k
    for opcode, expected in (("HMMA", products), ("LDSM", loads)):
        if found.opcodes.get(opcode, 0) != expected:
            yield f"it has {found.opcodes.get(opcode, 0)} {opcode}, expected {expected}"


def _warpgroup_faults(spec: FwdSpec, found: Resources) -> Iterator[str]:
    """Q Kᵀ before the first step, P V after the last; both in every kind of step: whole, cut on the right, on the left.

    Where scores are changed there is one kind, which always applies the mask.  Else, with an upper bound, the first two
    steps are there once more, for a tile of which half the keys are needed, and so is a last P V for it alone.
    """
    tile, features = spec.tile, spec.features
    changed = bool(features.float_mask or features.bool_mask or features.changed or features.mods)
    steps = 2 if changed else 2 + features.has_lower + features.has_upper
    products = steps * (spec.head_dim // 16 + tile.block_n // 16)
    if features.has_upper and features.is_plain:
        half_the_keys = -(-tile.block_n // 2 // 16)
        products += 2 * (spec.head_dim // 16 + half_the_keys)
    # Of panels: Q for each warpgroup that computes, K, V.
    panels_q, panels_v = (dim // (64 if dim % 64 == 0 else 32) for dim in (spec.head_dim, spec.head_dim_v))
    loads = (0 if spec.packed else tile.block_m // 64 * panels_q) + panels_q + panels_v
    stores = 0 if spec.packed else panels_v
    if found.opcodes.get("UTMALDG", 0) < loads:  # the compiler may unroll the loop that copies
        yield f"it has {found.opcodes.get('UTMALDG', 0)} UTMALDG, expected {loads} or more"
    expected = {"HGMMA": products, "UTMASTG": stores, "USETMAXREG": 2, "HMMA": 0, "LDSM": 0}
    for opcode, number in expected.items():
        if found.opcodes.get(opcode, 0) != number:
            yield f"it has {found.opcodes.get(opcode, 0)} {opcode}, expected {number}"
