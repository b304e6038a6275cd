"""What CUPYFLASH_DEBUG=1 to 4 prints of each kernel launch on standard error; each level adds to those below it.

1  the plan's line: kernel, grid, block, shared memory
2  the parameters
3  the path of the kernel's source, all its headers in one text
4  registers, stack, spills and instructions, as compiled for the GPU's architecture
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ..environment import say
from ..errors import Unsupported
from ..plan.specs import KernelSpec, Launch
from .cache import default_cache, digest
from .nvrtc import compile_cubin
from .params import Block, fields_of
from .rendering import entry_of, render_kernel, structures_of

__all__ = ["show_launch"]


def show_launch(launch: Launch, args: tuple[Block, ...], arch: str, level: int) -> None:
    """Print what the level, at least 1, asks for."""
    say(_lines(launch, args, arch, level))


def _lines(launch: Launch, args: tuple[Block, ...], arch: str, level: int) -> Iterator[str]:
    yield str(launch)
    if level >= 2:
        for block, structure in zip(args, structures_of(launch.spec), strict=False):  # tensor maps have no fields
            params = fields_of(block, structure)
            yield from (f"  {name} = {params[name].tolist()}" for name in structure.names or ())
    if level >= 3:
        yield f"  source: {_source_path(launch.spec)}"
    if level >= 4:
        yield f"  {arch}: {_resources(launch.spec, arch)}"


def _source_path(spec: KernelSpec) -> str:
    source = render_kernel(spec)
    name = f"{source.name}.cu"

    def write(folder: Path) -> None:
        (folder / name).write_text(source.text, encoding="utf-8")

    return str(default_cache().get(digest("source", name, source.text), write) / name)


@lru_cache(maxsize=256)
def _resources(spec: KernelSpec, arch: str) -> str:
    try:
        found = compile_cubin(render_kernel(spec), arch, default_cache()).resources[entry_of(spec)]
    except Unsupported as error:
        return str(error)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(found.opcodes.items()))
    spills = found.spill_stores + found.spill_loads
    return f"{found.registers} registers, {found.stack_bytes} bytes of stack, {spills} of spills; {counts}"
