"""Which kernels the ordinary run compiles for which architecture: a few hundred that show every trait.

A cubin takes up to two seconds, and there are thousands. `python -m tests.compile.all` compiles them all.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple

from cupyflash.build.rendering import arch_for
from cupyflash.plan.specs import FwdSpec, KernelSpec
from cupyflash.tools.kernels import ARCHITECTURES, device_of, specs_of

LIMIT = 125


class Pair(NamedTuple):
    """A kernel, and the name of an architecture that a plan may choose it for: "sm_90a" where it needs all of it."""

    spec: KernelSpec
    arch: str

    def __str__(self) -> str:
        return f"{self.spec}-for-{self.arch}"


def every_pair() -> list[Pair]:
    devices = [device_of(arch) for arch in ARCHITECTURES]
    return [Pair(spec, arch_for(spec, device)) for device in devices for spec in specs_of(device)]


def representative(pairs: Sequence[Pair], limit: int = LIMIT) -> list[Pair]:
    """Pairs that together show every trait, and as many combinations of traits as `limit` leaves room for.

    The same for the same pairs; in their order.

    Raises
    ------
    ValueError
        `limit` does not suffice for every trait by itself.
    """
    chosen = _cover(pairs, lambda pair: set(traits(pair)), [], limit)
    if {trait for pair in pairs for trait in traits(pair)} - {trait for pair in chosen for trait in traits(pair)}:
        raise ValueError(f"{limit} cubins do not suffice to show every trait")
    chosen = _cover(pairs, lambda pair: set(combinations(pair)), chosen, limit)
    kept = set(chosen)
    return [pair for pair in pairs if pair in kept]


def traits(pair: Pair) -> Iterator[Hashable]:
    """What must be seen: every value of every field of each family, its tiles for each dtype, its architectures."""
    yield pair.spec.family, pair.arch
    yield from _traits_of(pair.spec)


def combinations(pair: Pair) -> Iterator[Hashable]:
    """What is good to be seen: everything on each architecture, and what is compiled in with each tile."""
    spec, arch = pair
    yield from ((arch, trait) for trait in _traits_of(spec))
    if isinstance(spec, FwdSpec):
        yield _row(spec), spec.features, spec.packed
        yield arch, spec.family, spec.dtype, spec.features, spec.packed


@cache
def _traits_of(spec: KernelSpec) -> tuple[Hashable, ...]:
    traits: list[Hashable] = [(spec.family, *field) for field in fields_of(spec)]
    if isinstance(spec, FwdSpec):
        traits.append((_row(spec), spec.dtype))
    return tuple(traits)


def _row(spec: FwdSpec) -> Hashable:
    return spec.family, spec.head_dim, spec.head_dim_v, spec.tile, spec.baseline


def fields_of(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each field, of fields that are dataclasses too: ("tile.block_m", 128)."""
    for field in fields(value):
        name, inner = prefix + field.name, getattr(value, field.name)
        yield name, inner
        if is_dataclass(inner):
            yield from fields_of(inner, f"{name}.")


def _cover(
    pairs: Sequence[Pair], facts_of: Callable[[Pair], set[Hashable]], chosen: Sequence[Pair], limit: int
) -> list[Pair]:
    """`chosen`, and pairs that add most facts, one after the other, until none adds any or there are `limit`."""
    chosen = list(chosen)
    facts = [facts_of(pair) for pair in pairs]
    seen: set[Hashable] = {fact for pair in chosen for fact in facts_of(pair)}
    # What a pair adds only shrinks: the one at the top, if it adds as much as it promised, adds most.
    heap = [(-len(new - seen), index) for index, new in enumerate(facts)]
    heapq.heapify(heap)
    while heap and len(chosen) < limit:
        promised, index = heapq.heappop(heap)
        adds = len(facts[index] - seen)
        if adds and -promised == adds:
            chosen.append(pairs[index])
            seen |= facts[index]
        elif adds:
            heapq.heappush(heap, (-adds, index))
    return chosen
