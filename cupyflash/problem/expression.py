"""Expressions over scores and coordinates: what a traced function computes, as a value.

An `Expression` is a list of `Node`, each of which names earlier ones, so that a shared sub-expression is one node.  It
is frozen and equal to every expression of the same structure: arrays are in it by dtype and rank, numbers by dtype and
size class.  Their contents are not, so that a function that closes over another slope is the same expression.

Integer nodes have ranges, by interval arithmetic: `static_ranges` from what holds for every call, and `ranges` from
the lengths and numbers of one call.  The first decide which integers 32 bits can hold, the second that no look-up
leaves its array.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = [
    "COORDINATES",
    "MAX_LENGTH",
    "Expression",
    "Lookup",
    "Node",
    "Number",
    "Range",
    "exact_int",
    "pretty",
    "ranges",
    "size_class",
    "static_ranges",
]

COORDINATES = ("b", "h", "q_idx", "kv_idx")

#: Batches, numbers of heads and sequences of calls with mods are no longer.  Far from 2³¹, so that a sum of a few
#: coordinates still fits 32 bits.
MAX_LENGTH = 2**27


class Node(NamedTuple):
    """One value.  What `op` may be, and its operands:

    ========================  ==========================================================================================
    "score", a coordinate     no operands
    "const"                   `value` is the bool or the small int
    "number"                  `value` is its place in `Expression.numbers`
    "load"                    `value` is the place in `Expression.lookups`, operands are the indices, one for each axis
    "cast"                    the operand in another dtype, as `astype` does
    "where"                   condition, value, other value
    a key of `OPERATORS`      the ufunc of that name, on operands of equal dtype (shifts and logic too)
    ========================  ==========================================================================================
    """

    op: str
    dtype: str  # of NumPy, by name
    operands: tuple[int, ...] = ()
    value: int | bool = 0


class Lookup(NamedTuple):
    """An array that is read element by element."""

    dtype: str
    ndim: int


class Range(NamedTuple):
    """Integers from `low` to `high`, both included; none where high < low."""

    low: int
    high: int

    def covers(self, other: Range) -> bool:
        """True if every integer of the other range is in this one."""
        return other.high < other.low or self.low <= other.low <= other.high <= self.high


class Number(NamedTuple):
    """A number that is read when the kernel runs.  An integer's `size` bounds its values: see `size_class`."""

    dtype: str
    size: int = 0


@dataclass(frozen=True)
class Expression:
    """What a function computes.

    Attributes
    ----------
    nodes
        operands before what uses them; the last one is the result, and every one is needed for it.
    lookups
        the arrays read, in the order of their first use.
    numbers
        the numbers read, likewise.
    """

    nodes: tuple[Node, ...]
    lookups: tuple[Lookup, ...]
    numbers: tuple[Number, ...]

    @property
    def reads_score(self) -> bool:
        """True if the result depends on the score."""
        return any(node.op == "score" for node in self.nodes)


#: ufunc name → how `pretty` writes it: an operator with spaces, a prefix operator without, or "" for a call.
OPERATORS = {
    "add": " + ",
    "subtract": " - ",
    "multiply": " * ",
    "divide": " / ",
    "floor_divide": " // ",
    "remainder": " % ",
    "bitwise_and": " & ",
    "bitwise_or": " | ",
    "bitwise_xor": " ^ ",
    "left_shift": " << ",
    "right_shift": " >> ",
    "less": " < ",
    "less_equal": " <= ",
    "greater": " > ",
    "greater_equal": " >= ",
    "equal": " == ",
    "not_equal": " != ",
    "negative": "-",
    "invert": "~",
    **dict.fromkeys(
        (
            *("absolute", "sign", "square", "reciprocal", "sqrt", "power", "fmod", "copysign", "signbit"),
            *("minimum", "maximum", "fmin", "fmax", "floor", "ceil", "trunc", "rint"),
            *("logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isinf", "isfinite"),
            *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh"),
            *("arctan",),
        ),
        "",
    ),
}


# ------------------------------------------------------------------------------------------------------------
# Ranges of integers
# ------------------------------------------------------------------------------------------------------------


# Below this an integer is part of the structure, so that compilers can make a division by 2 a shift.
_SMALL = 16
_SIZES = (8, 16, 24, 30, 64)


def exact_int(value: int) -> bool:
    """True if an integer is part of the structure."""
    return abs(value) <= _SMALL


def size_class(value: int) -> int:
    """So many bits bound |value|, negative for a negative value.  One kernel serves all integers of one class."""
    bits = next(bits for bits in _SIZES if abs(value) <= 2**bits)
    return -bits if value < 0 else bits


def _of_dtype(name: str) -> Range:
    if name == "bool":
        return Range(0, 1)
    info = np.iinfo(name)
    return Range(int(info.min), int(info.max))


@lru_cache(maxsize=256)
def static_ranges(expression: Expression) -> tuple[Range | None, ...]:
    """The range of every integer node in whatever call; None for floats."""
    coordinates = [Range(0, MAX_LENGTH - 1)] * 4
    numbers = [Range(0, 2**n.size) if n.size >= 0 else Range(-(2**-n.size), 0) for n in expression.numbers]
    return ranges(expression, coordinates, numbers)


def ranges(expression: Expression, coordinates: Sequence[Range], numbers: Sequence[Range]) -> tuple[Range | None, ...]:
    """The range of every integer node; None for floats.

    Parameters
    ----------
    coordinates
        of b, h, q_idx and kv_idx.
    numbers
        of the expression's numbers; those of floats are not looked at.
    """
    found: list[Range | None] = []
    for node in expression.nodes:
        if not _is_integer(node.dtype):
            found.append(None)
            continue
        whole = _of_dtype(node.dtype)
        operands = [found[i] for i in node.operands]
        if node.op in COORDINATES:
            result = coordinates[COORDINATES.index(node.op)]
        elif node.op == "const":
            result = Range(int(node.value), int(node.value))
        elif node.op == "number":
            result = numbers[node.value]
        elif node.op == "load" or None in operands[node.op == "where" :]:
            result = whole
        else:
            result = _result(node, [operand for operand in operands if operand is not None]) or whole
        # What does not fit wraps around.
        found.append(result if whole.covers(result) else whole)
    return tuple(found)


def _is_integer(dtype: str) -> bool:
    return np.dtype(dtype).kind in "biu" if dtype != "bfloat16" else False


def _result(node: Node, operands: list[Range]) -> Range | None:
    """The range of an operation before it wraps; None if nothing is known."""
    if any(operand.high < operand.low for operand in operands):
        return Range(0, -1)
    op, a, b = node.op, operands[0], operands[-1]
    if op == "cast":
        # To bool a number is 0 or not.
        return a if node.dtype != "bool" else None
    if op == "where":
        first, second = operands[-2:]
        return Range(min(first.low, second.low), max(first.high, second.high))
    if node.dtype == "bool":
        return None
    if op == "add":
        return Range(a.low + b.low, a.high + b.high)
    if op == "subtract":
        return Range(a.low - b.high, a.high - b.low)
    if op == "multiply":
        return _hull(x * y for x in a for y in b)
    if op == "negative":
        return Range(-a.high, -a.low)
    if op == "absolute":
        low, high = sorted((abs(a.low), abs(a.high)))
        return Range(0 if a.low <= 0 <= a.high else low, high)
    if op == "square":
        low, high = sorted((a.low**2, a.high**2))
        return Range(0 if a.low <= 0 <= a.high else low, high)
    if op == "sign":
        return Range((a.low > 0) - (a.low < 0), (a.high > 0) - (a.high < 0))
    if op in ("minimum", "fmin"):
        return Range(min(a.low, b.low), min(a.high, b.high))
    if op in ("maximum", "fmax"):
        return Range(max(a.low, b.low), max(a.high, b.high))
    if op == "floor_divide":
        if b.low <= 0 <= b.high:
            most = max(abs(a.low), abs(a.high))
            return Range(-most, most)
        return _hull(x // y for x in a for y in b)
    if op == "remainder":  # of a division by zero: 0
        if a.low >= 0 and a.high < b.low:
            return a
        return Range(min(0, b.low + 1), max(0, min(b.high - 1, a.high) if a.low >= 0 else b.high - 1))
    if op == "bitwise_and" and (a.low >= 0 or b.low >= 0):
        return Range(0, min(x.high for x in (a, b) if x.low >= 0))
    if op == "right_shift" and b.low >= 0:
        return _hull(x >> min(y, 64) for x in a for y in b)
    if op == "left_shift" and b.low >= 0 and b.high < 64:
        return _hull(x << y for x in a for y in b)
    return None


def _hull(values: Iterator[int]) -> Range:
    listed = list(values)
    return Range(min(listed), max(listed))


# ------------------------------------------------------------------------------------------------------------
# Text for people
# ------------------------------------------------------------------------------------------------------------


def pretty(
    expression: Expression, lookups: Sequence[str] | None = None, numbers: Sequence[object] | None = None
) -> str:
    """The expression in the words of NumPy, one line for each value that is used more than once and one for the result.

    Parameters
    ----------
    lookups, numbers
        what to call the arrays, and the numbers' values; by default array0, … and number0, ….
    """
    uses = [0] * len(expression.nodes)
    for node in expression.nodes:
        for operand in node.operands:
            uses[operand] += 1
    lines: list[str] = []
    texts: list[str] = []
    depths: list[int] = []
    for i, node in enumerate(expression.nodes):
        is_last = i == len(expression.nodes) - 1
        text = write_node(node, [texts[operand] for operand in node.operands], lookups, numbers)
        depth = 1 + max((depths[operand] for operand in node.operands), default=0)
        if node.operands and not is_last and (uses[i] > 1 or depth > 8):
            lines.append(f"t{len(lines)} = {_bare(text)}")
            text, depth = f"t{len(lines) - 1}", 0
        texts.append(text)
        depths.append(depth)
    return "\n".join([*lines, _bare(texts[-1])])


def write_node(
    node: Node, operands: Sequence[str], lookups: Sequence[str] | None = None, numbers: Sequence[object] | None = None
) -> str:
    """One node, given the text of its operands."""
    if node.op == "const":
        return str(node.value)
    if node.op == "number":
        return f"number{node.value}" if numbers is None else str(numbers[node.value])
    if node.op == "load":
        name = f"array{node.value}" if lookups is None else lookups[node.value]
        return f"{name}[{', '.join(map(_bare, operands)) or '()'}]"
    if node.op == "cast":
        return f"{operands[0]}.astype({node.dtype})"
    if node.op in ("score", *COORDINATES):
        return node.op
    symbol = OPERATORS.get(node.op, "")
    if not symbol:
        return f"{node.op}({', '.join(map(_bare, operands))})"
    return f"({symbol.join(operands)})" if len(operands) == 2 else f"({symbol}{operands[0]})"


def _bare(text: str) -> str:
    """Without the parentheses that enclose all of it."""
    if not text.startswith("("):
        return text
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 else text
    return text
