"""Kernels with one synchronisation broken: what the emulator's checks are measured by."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from cupyflash.build.source import KernelSource

# Functions of the ISA layer that order something and do nothing else.
SYNCHRONISATION = re.compile(
    r"sync_\w+|barrier_\w+|cp_async_(?:commit|wait)|fence\w*|mbarrier_\w+|bulk_(?:commit|wait_read|wait)|"
    r"wgmma_(?:fence|commit|wait)"
)

_STATEMENT = re.compile(rf"\bisa::(?P<name>{SYNCHRONISATION.pattern})(?:<(?P<count>[^<>();]*)>)?\s*\(")
_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_LINE = re.compile(r'#line (\d+) "(?:kernels_cu/)?([^"]+)"')


@dataclass(frozen=True)
class Mutant:
    """A kernel with one statement deleted or weakened.

    Attributes
    ----------
    file, line
        Where the statement begins.
    code : str
        That line of the file, without the space around it: what an `Exemption` names.
    change : str
        ``"delete sync_threads"``, ``"weaken cp_async_wait<1>"``.
    source : KernelSource
        The whole kernel with the change; its lines keep their numbers.
    """

    file: str
    line: int
    code: str
    change: str
    source: KernelSource

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.change}"


@dataclass(frozen=True)
class Exemption:
    """A mutant that need not be caught: the line of code (unlike its number, it does not move) and the reason."""

    file: str
    code: str
    change: str
    reason: str


def mutants(source: KernelSource) -> list[Mutant]:
    """Every synchronisation of a flattened kernel, deleted; and every wait for all but N copies, off by one.

    Raises
    ------
    ValueError
        A synchronisation is not a statement of its own, so that it cannot be deleted; the message names the place.
    """
    return list(_mutants(source))


def _mutants(source: KernelSource) -> Iterator[Mutant]:
    code = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source.text)
    lines = source.text.splitlines()
    for match in _STATEMENT.finditer(code):
        index = code.count("\n", 0, match.start())
        file, number = _origin(lines, index)
        end = _closing(code, match.end())
        rest = re.match(r"\s*;", code[end:])
        if rest is None or not re.search(r"(?:[;{})]|\belse|^)\s*$", code[: match.start()]):
            raise ValueError(f"{file}:{number}: isa::{match['name']} is not a statement of its own")
        end += rest.end()
        # Inside an `if` without braces a lone semicolon still is a statement; line breaks keep the numbers of lines.
        deleted = ";" + "\n" * code.count("\n", match.start(), end)
        changes = [(f"delete {match['name']}", match.start(), end, deleted)]
        if match["count"] is not None:
            weaker = f"({match['count']}) + 1"
            changes.append(
                (f"weaken {match['name']}<{match['count']}>", match.start("count"), match.end("count"), weaker)
            )
        for change, start, stop, new in changes:
            text = source.text[:start] + new + source.text[stop:]
            name = f"{source.name}-{change.replace(' ', '-')}-{file}-{number}"
            yield Mutant(file, number, lines[index].strip(), change, KernelSource(name, text, source.entries))


def _closing(code: str, start: int) -> int:
    """The place after the parenthesis that closes the one before ``start``."""
    depth = 1
    for place in range(start, len(code)):
        depth += (code[place] == "(") - (code[place] == ")")
        if depth == 0:
            return place + 1
    raise ValueError("a parenthesis is not closed")


def _origin(lines: Sequence[str], index: int) -> tuple[str, int]:
    """File and number of a line of the flattened text."""
    for i in range(index, -1, -1):
        if match := _LINE.fullmatch(lines[i]):
            return match[2], int(match[1]) + index - i - 1
    raise ValueError(f"no #line stands before line {index + 1}")


def exempt(mutant: Mutant, exemptions: Collection[Exemption]) -> bool:
    """Whether the mutant need not be caught."""
    return (mutant.file, mutant.code, mutant.change) in {(e.file, e.code, e.change) for e in exemptions}


def assert_exemptions_hold(found: Sequence[Mutant], exemptions: Sequence[Exemption]) -> None:
    """Exemptions name one mutant each, say why, and are fewer than a tenth of the mutants."""
    for exemption in exemptions:
        named = [mutant for mutant in found if exempt(mutant, [exemption])]
        assert len(named) == 1, f"{exemption} names {len(named)} mutants, expected one"
        assert len(exemption.reason.split()) >= 3, f"{exemption} does not say why it is harmless"
    assert 10 * len(exemptions) < max(1, len(found)), f"{len(exemptions)} of {len(found)} mutants are exempt"
