"""Traced functions as C++, and what a kernel needs to apply them.

    Expression ──render_mods()──▶ struct ModArgs, ScoreMod, MaskMod      (compile time: by structure)
    Trace ───────pack_mods()────▶ the bytes of ModArgs                   (run time: pointers, strides, numbers)

kernels_cu/mods.cuh says what the three types are to a kernel.  The text is made of the operations in that file, of
numbers and of names made up here: nothing in it is the user's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..problem.expression import COORDINATES, Expression, Node, Range, pretty, static_ranges
from ..problem.trace import Trace, TraceError, check_bounds, trace_mask_mod, trace_score_mod
from .params import Block, by_value, layout_checks

__all__ = ["NO_MODS", "PackedMods", "TracedMod", "mods_dtype", "pack_mods", "render_mods", "trace_mod"]

#: Kernels have 4 KiB of parameters, and more than mods to pass.
MAX_BYTES = 2048

_INT32 = Range(-(2**31), 2**31 - 1)
_FLOATS = {"float16": "float", "bfloat16": "float", "float32": "float", "float64": "double"}
# What an integer is brought to where it may have left the range of its dtype.
_INTEGERS = {
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
}
_ELEMENTS = {
    "bool": "Bool",
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "float32": "Float32",
    "float64": "Float64",
    **{f"int{bits}": f"Int{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"UInt{bits}" for bits in (8, 16, 32, 64)},
}
_PARAMETERS = {"int": np.int32, "long long": np.int64, "u64": np.uint64, "float": np.float32, "double": np.float64}
_COMPARISONS = {
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "equal": "==",
    "not_equal": "!=",
}
# On bools, NumPy's arithmetic is logic.
_LOGIC = {
    **dict.fromkeys(("add", "maximum", "fmax", "bitwise_or", "logical_or"), "||"),
    **dict.fromkeys(("multiply", "minimum", "fmin", "bitwise_and", "logical_and"), "&&"),
    **dict.fromkeys(("bitwise_xor", "logical_xor"), "!="),
}


# ------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def render_mods(score: Expression | None, mask: Expression | None) -> str:
    """``ModArgs``, ``ScoreMod`` and ``MaskMod``, for after ``#include "mods.cuh"``.

    Parameters
    ----------
    score, mask
        what the two compute; None: there is none, and the kernel is to ask ``kIdentity``.

    Raises
    ------
    TraceError
        they read more arrays and numbers than fit a kernel's parameters.
    """
    parts = []
    blocks = _blocks(score, mask)
    for name, expression in blocks.items():
        members = [f"  {_member_type(expression, i)} {member};" for i, member in enumerate(_members(expression))]
        parts.append("\n".join([f"struct {name.capitalize()}Args {{", *members, "};"]))
    members = ["  Coord last;", *(f"  {name.capitalize()}Args {name};" for name in blocks)]
    parts.append("\n".join(["struct ModArgs {", *members, "};"]))
    parts.append(_score_functor(score))
    parts.append(_mask_functor(mask))
    return "\n\n".join(parts) + "\n\n" + _layout_checks(score, mask)


def _score_functor(expression: Expression | None) -> str:
    lines = ["struct ScoreMod {", f"  static constexpr bool kIdentity = {str(expression is None).lower()};"]
    by_key = expression is not None and _looks_up_by_key(expression)
    lines += [f"  static constexpr bool kLooksUpByKey = {str(by_key).lower()};"]
    lines += ["  template <class Real>"]
    lines += ["  __device__ __forceinline__ static Real apply(Real score, const Coord& at, const ModArgs& args) {"]
    if expression is None:
        return "\n".join([*lines, "    return score;", "  }", "};"])
    size = np.dtype(expression.nodes[-1].dtype).itemsize
    lines.append(f'    static_assert(sizeof(Real) == {size}, "this score_mod is for another accumulator");')
    return "\n".join([*lines, *_body(expression, "score"), "  }", "};"])


def _looks_up_by_key(expression: Expression) -> bool:
    """True if it looks up another element for another key, rather than one for all of a row."""
    changing: set[int] = set()
    for i, node in enumerate(expression.nodes):
        if node.op in ("score", "kv_idx") or not changing.isdisjoint(node.operands):
            changing.add(i)
    return any(node.op == "load" and i in changing for i, node in enumerate(expression.nodes))


def _mask_functor(expression: Expression | None) -> str:
    lines = ["struct MaskMod {", f"  static constexpr bool kIdentity = {str(expression is None).lower()};"]
    lines += ["  __device__ __forceinline__ static bool apply(const Coord& at, const ModArgs& args) {"]
    body = ["    return true;"] if expression is None else _body(expression, "mask")
    return "\n".join([*lines, *body, "  }", "};"])


def _body(expression: Expression, block: str) -> list[str]:
    """The function's statements: one for each node."""
    bounds = static_ranges(expression)
    types = _types(expression)
    lines = []
    for i, node in enumerate(expression.nodes):
        value = _statement(expression, node, types, bounds, i, block)
        lines.append(f"    const {types[i]} v{i} = {value};")
    return [*lines, f"    return v{len(types) - 1};"]


def _types(expression: Expression) -> list[str]:
    """The C++ type of every node: the narrowest that holds its range."""
    return [
        _FLOATS.get(node.dtype) or _integer_type(node.dtype, bound)
        for node, bound in zip(expression.nodes, static_ranges(expression), strict=True)
    ]


def _integer_type(dtype: str, bound: Range | None) -> str:
    if dtype == "bool":
        return "bool"
    if bound is not None and _INT32.covers(bound):
        return "int"
    return "u64" if dtype == "uint64" else "long long"


def _statement(
    expression: Expression, node: Node, types: Sequence[str], bounds: Sequence[Range | None], i: int, block: str
) -> str:
    """C++ for the value of node `i`."""
    op, mine = node.op, types[i]
    if op == "score":
        return "score"
    if op in COORDINATES:
        # Beyond the end of a sequence nothing may be read, so a look-up's coordinates stay within.
        return f"mods::clamp_to(at.{op}, args.last.{op})" if expression.lookups else f"at.{op}"
    if op == "const":
        return str(node.value).lower() if node.dtype == "bool" else str(int(node.value))
    if op == "number":
        return f"args.{block}.n{node.value}"
    if op == "load":
        indices = []
        for axis, operand in enumerate(node.operands):
            bound = bounds[operand]
            from_end = bound is None or bound.low < 0
            size = f"args.{block}.a{node.value}.sizes[{axis}]"
            indices.append(f"mods::from_end(v{operand}, {size})" if from_end else f"v{operand}")
        element = "" if node.dtype in ("float16", "bfloat16") else "mods::"
        return (
            f"mods::load({', '.join([f'{element}{_ELEMENTS[node.dtype]}()', f'args.{block}.a{node.value}', *indices])})"
        )

    operands = [f"v{operand}" for operand in node.operands]
    operand_types = [types[operand] for operand in node.operands]
    operand_dtype = expression.nodes[node.operands[-1]].dtype
    if op == "cast":
        if node.dtype == "bool":
            return f"{operands[0]} != 0"
        if mine in _FLOATS.values():
            return _cast(operands[0], operand_types[0], mine)
        return _wrapped(operands[0], operand_types[0], node.dtype, mine)
    if op == "where":
        x, y = (_cast(*operand, mine) for operand in list(zip(operands, operand_types, strict=True))[1:])
        return f"{operands[0]} ? {x} : {y}"
    if operand_dtype == "bool" and node.dtype == "bool":
        if op in _LOGIC:
            return f"{operands[0]} {_LOGIC[op]} {operands[1]}"
        if op in ("invert", "logical_not"):
            return f"!{operands[0]}"
    if operand_dtype in _FLOATS:
        if op in _COMPARISONS:
            return f"{operands[0]} {_COMPARISONS[op]} {operands[1]}"
        return f"mods::{op}({', '.join(operands)})"

    # Integers. Operands and result are computed in one type that holds them all.
    if op in ("isnan", "isinf", "isfinite"):
        return str(op == "isfinite").lower()
    involved = operand_types if node.dtype == "bool" else [*operand_types, mine]
    common = "u64" if "u64" in involved else "long long" if "long long" in involved else "int"
    operands = [_cast(*operand, common) for operand in zip(operands, operand_types, strict=True)]
    if op in _COMPARISONS:
        return f"{operands[0]} {_COMPARISONS[op]} {operands[1]}"
    width = f"<{8 * np.dtype(node.dtype).itemsize}>" if op in ("left_shift", "right_shift") else ""
    return _wrapped(f"mods::{op}{width}({', '.join(operands)})", common, node.dtype, mine)


def _cast(value: str, source: str, target: str) -> str:
    return value if source == target else f"static_cast<{target}>({value})"


def _wrapped(value: str, source: str, dtype: str, target: str) -> str:
    """An integer brought to the range of NumPy's dtype, in a type that holds it."""
    exact = _INTEGERS[dtype]
    if exact == "long long" and source in ("int", "long long"):  # there is nothing to bring back
        return _cast(value, source, target)
    return _cast(_cast(value, source, exact), exact, target)


# ------------------------------------------------------------------------------------------------------------
# Bytes
# ------------------------------------------------------------------------------------------------------------


class PackedMods(NamedTuple):
    """A launch's second parameter.  The arrays must live until the kernel has run."""

    args: Block
    arrays: tuple[Any, ...]


def _blocks(score: Expression | None, mask: Expression | None) -> dict[str, Expression]:
    """What has parameters."""
    both = {"score": score, "mask": mask}
    return {name: x for name, x in both.items() if x is not None and (x.lookups or x.numbers)}


def _members(expression: Expression) -> list[str]:
    return [f"a{i}" for i in range(len(expression.lookups))] + [f"n{i}" for i in range(len(expression.numbers))]


def _member_type(expression: Expression, i: int) -> str:
    if i < len(expression.lookups):
        return f"mods::Lookup<{expression.lookups[i].ndim}>"
    place = i - len(expression.lookups)
    types = _types(expression)
    return next(types[n] for n, node in enumerate(expression.nodes) if node.op == "number" and node.value == place)


def _lookup_dtype(ndim: int) -> np.dtype[np.void]:
    fields: list[Any] = [("data", np.uintp)]
    if ndim:
        fields += [("sizes", np.int64, (ndim,)), ("strides", np.int64, (ndim,))]
    return np.dtype(fields, align=True)


_COORD = np.dtype([(name, np.int32) for name in COORDINATES], align=True)


def _block_dtype(expression: Expression) -> np.dtype[np.void]:
    fields: list[Any] = [(f"a{i}", _lookup_dtype(lookup.ndim)) for i, lookup in enumerate(expression.lookups)]
    for i in range(len(expression.numbers)):
        fields.append((f"n{i}", _PARAMETERS[_member_type(expression, len(expression.lookups) + i)]))
    return np.dtype(fields, align=True)


@lru_cache(maxsize=256)
def mods_dtype(score: Expression | None, mask: Expression | None) -> np.dtype[np.void]:
    """``ModArgs`` as NumPy sees it.

    Raises
    ------
    TraceError
        it is larger than a kernel's parameters may be.
    """
    blocks = [(name, _block_dtype(expression)) for name, expression in _blocks(score, mask).items()]
    dtype = np.dtype([("last", _COORD), *blocks], align=True)
    if dtype.itemsize > MAX_BYTES:
        raise TraceError(
            f"score_mod and mask_mod read so many arrays and numbers that they need {dtype.itemsize} bytes of "
            f"parameters, and kernels have {MAX_BYTES}; put the numbers into an array"
        )
    return dtype


def _layout_checks(score: Expression | None, mask: Expression | None) -> str:
    blocks = _blocks(score, mask)
    ranks = sorted({lookup.ndim for expression in blocks.values() for lookup in expression.lookups})
    checks = [layout_checks(f"mods::Lookup<{ndim}>", _lookup_dtype(ndim)) for ndim in ranks]
    checks += [layout_checks(f"{name.capitalize()}Args", _block_dtype(x)) for name, x in blocks.items()]
    return "".join([layout_checks("Coord", _COORD), *checks, layout_checks("ModArgs", mods_dtype(score, mask))])


def pack_mods(
    score: Trace | None, mask: Trace | None, lengths: Sequence[int], address: Callable[[Any], int]
) -> PackedMods:
    """``ModArgs`` of one call.

    Parameters
    ----------
    lengths
        batch size, number of query heads, queries and keys: all at least 1.
    address
        gives an array's first element; raises for an array of another library.

    Raises
    ------
    TraceError
        a look-up may leave its array.
    """
    arrays: list[Any] = []
    values: list[Any] = [tuple(length - 1 for length in lengths)]
    for trace in (score, mask):
        if trace is None:
            continue
        check_bounds(trace, lengths)
        if not trace.arrays and not trace.numbers:
            continue
        fitting = [_fitting(array) for array in trace.arrays]
        arrays += fitting
        values.append((*(_pack_lookup(array, address) for array in fitting), *trace.numbers))
    expressions = [None if trace is None else trace.expression for trace in (score, mask)]
    block = np.array([tuple(values)], mods_dtype(*expressions))
    return PackedMods(by_value(block), tuple(arrays))


#: The second parameter of a kernel without mods.
NO_MODS = by_value(np.zeros(1, mods_dtype(None, None)))


def _fitting(array: Any) -> Any:
    """The array, or a copy of one whose elements do not lie at multiples of their size."""
    itemsize = array.dtype.itemsize
    if all(stride % itemsize == 0 for stride in array.strides) and getattr(array.flags, "aligned", True):
        return array
    return array.copy()


def _pack_lookup(array: Any, address: Callable[[Any], int]) -> tuple[Any, ...]:
    strides = tuple(stride // array.dtype.itemsize for stride in array.strides)
    return (address(array), array.shape, strides) if array.ndim else (address(array),)


# ------------------------------------------------------------------------------------------------------------
# To look at
# ------------------------------------------------------------------------------------------------------------


class TracedMod:
    """A score_mod or mask_mod as kernels would have it; its str is the expression and the C++.

    Attributes
    ----------
    kind
        "score_mod" or "mask_mod".
    trace
        what was traced.
    expression
        its structure as NumPy would write it.
    functor
        the generated C++.
    """

    def __init__(self, kind: str, trace: Trace) -> None:
        self.kind, self.trace = kind, trace
        self.expression = pretty(trace.expression, trace.names, trace.numbers)
        is_score = kind == "score_mod"
        self.functor = (_score_functor if is_score else _mask_functor)(trace.expression)

    def __str__(self) -> str:
        return f"{self.kind}:\n{_indented(self.expression)}\n\n{self.functor}"

    def __repr__(self) -> str:
        return f"<TracedMod {self.kind} of {len(self.trace.expression.nodes)} values>"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def trace_mod(function: Callable[..., Any], *, dtype: npt.DTypeLike = np.float32) -> TracedMod:
    """Shows what becomes of a score_mod or mask_mod in a kernel.

        >>> print(trace_mod(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).expression)
        kv_idx <= q_idx

    Parameters
    ----------
    function
        of (score, b, h, q_idx, kv_idx) or (b, h, q_idx, kv_idx): which of the two it is, is told by its number of
        arguments.
    dtype
        what a score_mod's scores are: float32, or float64 as for inputs of float64.

    Raises
    ------
    TraceError
        the function can't become part of a kernel; the message has the expression and the line.
    TypeError
        it takes another number of arguments, or returns what a mod may not.
    """
    accumulator = np.dtype(dtype)
    if accumulator not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, as scores are, but was {accumulator}")
    signature = inspect.signature(function)
    for count, kind in ((5, "score_mod"), (4, "mask_mod")):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        trace = trace_score_mod(function, accumulator) if kind == "score_mod" else trace_mask_mod(function)
        return TracedMod(kind, trace)
    raise TypeError(
        "function must take (score, b, h, q_idx, kv_idx) as a score_mod or (b, h, q_idx, kv_idx) as a mask_mod, "
        f"but takes {signature}"
    )
