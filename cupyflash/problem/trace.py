"""Turns a user's score_mod or mask_mod into an `Expression`, by calling it once with symbols.

    score_mod(score, b, h, q_idx, kv_idx)  ──trace──▶  Trace(expression, arrays, numbers)

The symbols stand for numbers: operators, NumPy's ufuncs and a few of its functions on them write down what they would
do.  An array can't be told to do so when a symbol indexes it, hence the function that is called is a copy of the
user's, in which arrays are stand-ins too.  The copy finds them where the function finds its arrays: in its closure,
globals, defaults, in tuples, lists and dicts there, and in functions that it reaches in these ways.  Everything else is
the user's own object; an array reached through it works as long as no symbol indexes it, and is refused then.

A function is traced for every call, which takes some tenths of a millisecond: it may depend on whatever it likes, and
its arrays and numbers are those of the call.  What is slow, rendering and compiling, goes by the structure of the
expression.

Only what is named in this file gets into an expression, so no text, no name and no object of the user does.
"""

from __future__ import annotations

import functools
import linecache
import operator
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..errors import Unsupported
from .expression import (
    COORDINATES,
    MAX_LENGTH,
    OPERATORS,
    Expression,
    Lookup,
    Node,
    Number,
    Range,
    exact_int,
    ranges,
    size_class,
    write_node,
)

__all__ = ["Trace", "TraceError", "check_bounds", "trace_mask_mod", "trace_score_mod"]

_HALVES = ("float16", "bfloat16")
_DTYPES = {
    np.dtype(name): name
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
} | {np.dtype(ml_dtypes.bfloat16): "bfloat16"}

# What moves or compares a value without rounding it.
_EXACT = {
    *("negative", "absolute", "positive", "minimum", "maximum", "fmin", "fmax", "copysign", "signbit", "sign"),
    *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal", "isnan", "isinf", "isfinite"),
    *("logical_and", "logical_or", "logical_xor", "logical_not"),
}
_UFUNCS: dict[Any, str] = {getattr(np, name): name for name in OPERATORS} | {np.positive: "positive", np.fabs: "fabs"}
_COMPARISONS = {"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"}
# CuPy's functions take no symbols.  NumPy's of the same name do, and hand CuPy's arrays to CuPy.
_CUPY_NAMES = {ufunc.__name__ for ufunc in _UFUNCS} | {"abs", "where", "clip", "round", "around"}
_CUPY_NAMES |= {"zeros_like", "ones_like", "full_like"}
# On integers they return what they get.
_ROUNDINGS = {"floor", "ceil", "trunc", "rint"}

#: So many values a function may compute; a loop over a long range runs into it.
MAX_NODES = 4096


class TraceError(Unsupported):
    """A score_mod or mask_mod that can't become part of a kernel.

    Attributes
    ----------
    filename, lineno
        the line of the user's function; "" and 0 if it is not known.
    """

    def __init__(self, message: str, filename: str = "", lineno: int = 0) -> None:
        self.filename, self.lineno = filename, lineno
        if filename:
            line = linecache.getline(filename, lineno).strip()
            message += f"\n  {filename}:{lineno}" + (f"\n    {line}" if line else "")
        message += '\nbackend="math" calls the function instead of tracing it'
        super().__init__(message, {"cuda": (message,), "emulator": (message,)})


@dataclass(frozen=True, eq=False)
class Trace:
    """What a call of the function would compute.

    Attributes
    ----------
    expression
        its structure, which can be compared and hashed.
    arrays, numbers
        what the expression's lookups and numbers are in this call.
    names
        what the function calls the arrays, for messages.
    places
        the file and line of every node.
    """

    expression: Expression
    arrays: tuple[Any, ...]
    numbers: tuple[int | float, ...]
    names: tuple[str, ...]
    places: tuple[tuple[str, int], ...]


def trace_score_mod(function: Callable[..., Any], accumulator: Any = np.float32) -> Trace:
    """Trace a function of (score, b, h, q_idx, kv_idx).

    Parameters
    ----------
    function
        the user's.
    accumulator
        dtype of the scores: float32 or float64.  What NumPy would compute in float64 is computed in it.

    Raises
    ------
    TraceError
        it does what can't be traced; the message says what, where and what to write instead.
    TypeError
        it returns no real number.
    """
    dtype = np.dtype(accumulator).name
    tracer = _Tracer("score_mod", dtype)
    result = tracer.call(function, [tracer.leaf("score", dtype), *(tracer.leaf(name, "int64") for name in COORDINATES)])
    return tracer.finish(tracer.cast(tracer.symbol(result, returned=True), dtype))


def trace_mask_mod(function: Callable[..., Any]) -> Trace:
    """Trace a function of (b, h, q_idx, kv_idx).  It computes what NumPy would, in float64 too.

    Raises
    ------
    TraceError
        as `trace_score_mod`.
    TypeError
        it does not return a bool.
    """
    tracer = _Tracer("mask_mod", "float64")
    result = tracer.symbol(tracer.call(function, [tracer.leaf(name, "int64") for name in COORDINATES]), returned=True)
    if result.dtype != bool:
        raise TypeError(f"mask_mod must return a bool array, but returned dtype {result.dtype}")
    return tracer.finish(result)


def check_bounds(trace: Trace, lengths: Sequence[int]) -> None:
    """Refuse a look-up that may leave its array.

    Parameters
    ----------
    lengths
        batch size, number of query heads, queries and keys.

    Raises
    ------
    TraceError
        a look-up may; the message has the index, its range, the array and the line.
    """
    expression = trace.expression
    if max(lengths) > MAX_LENGTH:
        raise TraceError(f"mods in kernels take lengths up to {MAX_LENGTH}, these are {tuple(lengths)}")
    if 0 in lengths or not expression.lookups:
        return
    numbers = [Range(int(x), int(x)) if isinstance(x, int) else Range(0, 0) for x in trace.numbers]
    bounds = ranges(expression, [Range(0, length - 1) for length in lengths], numbers)
    for i, node in enumerate(expression.nodes):
        if node.op != "load":
            continue
        for axis, operand in enumerate(node.operands):
            size = trace.arrays[node.value].shape[axis]
            bound = bounds[operand]
            if bound is not None and not Range(-size, size - 1).covers(bound):
                text = _describe(expression, operand, trace.names, trace.numbers)
                raise TraceError(
                    f"index {text} of axis {axis} of {trace.names[node.value]} is known to lie in {bound.low} … "
                    f"{bound.high} only, and the axis has size {size}; keep the index inside, by np.clip for example",
                    *trace.places[i],
                )


def _describe(expression: Expression, index: int, names: Sequence[str], numbers: Sequence[Any], depth: int = 5) -> str:
    node = expression.nodes[index]
    if depth == 0 and node.operands:
        return "…"
    texts = [_describe(expression, operand, names, numbers, depth - 1) for operand in node.operands]
    return write_node(node, texts, names, numbers)


# ------------------------------------------------------------------------------------------------------------
# Symbols: what the user's function computes with
# ------------------------------------------------------------------------------------------------------------


class _Symbol(NDArrayOperatorsMixin):
    """A number that a kernel will compute."""

    __slots__ = ("_index", "_tracer", "dtype")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tracer: _Tracer, index: int, dtype: np.dtype[Any]) -> None:
        self._tracer, self._index, self.dtype = tracer, index, dtype

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return self._tracer.ufunc(ufunc, method, inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return self._tracer.function(function, args, options)

    def astype(self, dtype: Any, copy: bool = True) -> _Symbol:
        return self._tracer.cast(self, self._tracer.dtype_named(dtype))

    def __pow__(self, exponent: Any) -> Any:
        # As NumPy's operator, which has its own ways for these.
        if type(exponent) in (int, float):
            if exponent == 2:
                return np.square(self)
            if exponent == 1:
                return self
            if self.dtype.kind == "f" and exponent in (0.5, -1):
                return np.sqrt(self) if exponent == 0.5 else np.reciprocal(self)
        return np.power(self, exponent)

    def __abs__(self) -> Any:
        return np.absolute(self)

    def __bool__(self) -> NoReturn:
        self._refuse(
            "decides an `if`, `while`, `and`, `or`, `not`, `in`, `min`, `max` or chained comparison, "
            "but it is another number for every score; write np.where(condition, a, b), &, |, ~, np.minimum, np.maximum"
        )

    def _is_no_number(self, *args: Any) -> NoReturn:
        self._refuse("would have to be a Python number while tracing; use NumPy's functions, and .astype to convert")

    __int__ = __float__ = __complex__ = __round__ = __floor__ = __ceil__ = __trunc__ = _is_no_number

    def __array__(self, *args: Any, **options: Any) -> NoReturn:
        self._refuse(
            "is used as an index or an array where it can't be followed. To index an array by it, let the array be a "
            "variable of the function's closure or module, not an attribute or made inside (`slopes = self.slopes` "
            "outside of the function); to convert it, write .astype(dtype)"
        )

    __index__ = __array__

    def _has_no_items(self, *args: Any) -> NoReturn:
        self._refuse("is one number for the kernel: it has no items, no length and no shape")

    __getitem__ = __len__ = __iter__ = __contains__ = _has_no_items

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        self._refuse("is written to; write np.where(condition, value, x) instead of x[condition] = value")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"has no attribute {_word(name)!r} while tracing, only dtype and astype")

    def __str__(self) -> str:
        return "<a number of the kernel>"

    __repr__ = __str__

    def __format__(self, specification: str) -> str:
        return str(self)

    def _refuse(self, why: str) -> NoReturn:
        self._tracer.refuse(f"{self._tracer.describe(self)} {why}")


_READ_ATTRIBUTES = ("shape", "size", "ndim", "dtype", "itemsize", "nbytes")
_METHODS = (
    *("astype", "reshape", "ravel", "transpose", "swapaxes", "copy", "squeeze", "item", "tolist"),
    *("sum", "min", "max", "mean", "any", "all"),
)


class _Array(NDArrayOperatorsMixin):
    """An array of the user's.  What no symbol has a part in is computed at once."""

    __slots__ = ("_name", "_tracer", "_values")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tracer: _Tracer, values: Any, name: str) -> None:
        self._tracer, self._name = tracer, name
        if isinstance(values, np.ndarray):
            values = values.view(np.ndarray)
            values.flags.writeable = False
        self._values = values

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return self._tracer.ufunc(ufunc, method, inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return self._tracer.function(function, args, options)

    def __getitem__(self, key: Any) -> Any:
        return self._tracer.load(self, key)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        self._tracer.refuse(f"{self._name} is written to; a mod reads its arrays, and returns its result")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._values, dtype)

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self._values)

    def __int__(self) -> int:
        return int(self._values)

    def __float__(self) -> float:
        return float(self._values)

    def __index__(self) -> int:
        return operator.index(self._values.item() if self._values.ndim == 0 else self._values)

    def __abs__(self) -> Any:
        return np.absolute(self)

    @property
    def T(self) -> _Array:
        return _Array(self._tracer, self._values.T, f"{self._name}.T")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _READ_ATTRIBUTES:
            return getattr(self._values, name)
        if name not in _METHODS:
            self._tracer.refuse(f"{self._name}.{_word(name)} can't be traced")

        def method(*args: Any, **options: Any) -> Any:
            args, options = self._tracer.plain((args, options), f"{self._name}.{name}")
            return self._tracer.wrap(getattr(self._values, name)(*args, **options), f"{self._name}.{name}(…)")

        return method

    def __str__(self) -> str:
        return f"<array {self._name}>"

    __repr__ = __str__


class _Cast:
    """A scalar type like np.float32, which converts symbols too."""

    def __init__(self, tracer: _Tracer, kind: type[np.generic]) -> None:
        self._tracer, self._kind, self.dtype = tracer, kind, np.dtype(kind)

    def __call__(self, *args: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], _Symbol):
            return args[0].astype(self._kind)
        if len(args) == 1 and isinstance(args[0], _Array):
            return args[0].astype(self._kind)
        return self._kind(*args)

    def __eq__(self, other: object) -> bool:
        kind = other._kind if isinstance(other, _Cast) else other
        return bool(self._kind == kind)

    def __hash__(self) -> int:
        return hash(self._kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)


class _Numpy:
    """The module numpy or cupy, with what symbols can take in place of the scalar types and of CuPy's functions."""

    def __init__(self, tracer: _Tracer, module: ModuleType) -> None:
        self._tracer, self._module = tracer, module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if self._module.__name__ == "cupy" and name in _CUPY_NAMES:
            return getattr(np, name)
        return self._tracer.wrap(value, name)


# ------------------------------------------------------------------------------------------------------------
# The tracer
# ------------------------------------------------------------------------------------------------------------


class _Tracer:
    """Writes down the nodes of one call."""

    def __init__(self, argument: str, accumulator: str) -> None:
        self.argument = argument
        self.accumulator = accumulator
        self.nodes: list[Node] = []
        self.places: list[tuple[str, int]] = []
        self.lookups: list[_Array] = []
        self.numbers: list[tuple[Number, int | float]] = []
        self._known: dict[Node, int] = {}
        self._slots: dict[Any, int] = {}
        self._constants: dict[tuple[int, str], tuple[Any, int]] = {}  # the object too, so that its id stays its own
        self._wrapped: dict[int, tuple[Any, Any]] = {}  # the object too, so that its id stays its own
        self._failure: TraceError | None = None

    def call(self, function: Any, arguments: Sequence[_Symbol]) -> Any:
        """The function's result on symbols."""
        try:
            if not isinstance(function, FunctionType | MethodType | functools.partial):
                function = getattr(function, "__call__", function)  # noqa: B004 - the method that it is called by
            traced = self.wrap(function, "function")
            if not isinstance(traced, FunctionType | MethodType | functools.partial):
                self.refuse(
                    f"{self.argument} is a {_word(type(function).__name__)}; kernels take functions written with def "
                    "or lambda, their methods and functools.partial of them"
                )
            result = traced(*arguments)
        except TraceError as error:
            # The first refusal is the cause, whatever the function made of it.
            raise self._failure or error from None
        except RecursionError as error:
            raise TraceError(f"{self.argument} can't be traced: it recurses without end", *_user_line(error)) from error
        except Exception as error:
            failure = self._failure or TraceError(
                f"{self.argument} can't be traced: it raised {traceback.format_exception_only(error)[-1].strip()}",
                *_user_line(error),
            )
            raise failure from error
        if self._failure is not None:
            raise self._failure
        return result

    def finish(self, result: _Symbol) -> Trace:
        """The expression of what the result needs."""
        needed = {result._index}
        for i in range(result._index, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].operands)
        order = sorted(needed)
        place = {old: new for new, old in enumerate(order)}
        nodes, lookups, numbers = [], list[int](), list[int]()
        for old in order:
            node = self.nodes[old]
            value = node.value
            for op, used in (("load", lookups), ("number", numbers)):
                if node.op == op:
                    if value not in used:
                        used.append(value)
                    value = used.index(value)
            nodes.append(node._replace(operands=tuple(place[i] for i in node.operands), value=value))
        arrays = [self.lookups[i] for i in lookups]
        return Trace(
            Expression(
                tuple(nodes),
                tuple(Lookup(_DTYPES[array.dtype], array.ndim) for array in arrays),
                tuple(self.numbers[i][0] for i in numbers),
            ),
            tuple(array._values for array in arrays),
            tuple(self.numbers[i][1] for i in numbers),
            tuple(array._name for array in arrays),
            tuple(self.places[i] for i in order),
        )

    def refuse(self, why: str) -> NoReturn:
        failure = TraceError(f"{self.argument} can't be traced: {why}", *_user_line(None))
        if self._failure is None:
            self._failure = failure
        raise failure

    # --- nodes -----------------------------------------------------------------------------------------------------

    def node(self, op: str, dtype: str, operands: tuple[int, ...] = (), value: int | bool = 0) -> _Symbol:
        node = Node(op, dtype, operands, value)
        if node not in self._known:
            if len(self.nodes) >= MAX_NODES:
                self.refuse(f"it computes more than {MAX_NODES} values; is there a loop that an array could replace?")
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
            self.places.append(_user_line(None))
        return _Symbol(self, self._known[node], _dtype(dtype))

    def leaf(self, name: str, dtype: str) -> _Symbol:
        return self.node(name, dtype)

    def computed(self, dtype: np.dtype[Any]) -> str:
        """The name of the dtype that stands in for NumPy's: float64 is the accumulator's business."""
        if dtype == np.float64:
            return self.accumulator
        if dtype not in _DTYPES:
            self.refuse(f"dtype {_word(dtype.name)} can't be used in a kernel")
        return _DTYPES[dtype]

    def dtype_named(self, dtype: Any) -> str:
        kind = dtype._kind if isinstance(dtype, _Cast) else dtype
        try:
            return self.computed(np.dtype(kind))
        except TypeError:
            self.refuse("astype takes a NumPy dtype")

    def cast(self, symbol: _Symbol, dtype: str) -> _Symbol:
        source = self.nodes[symbol._index]
        if source.dtype == dtype:
            return symbol
        if dtype in _HALVES:
            self.refuse(
                f"{self.describe(symbol)} would be rounded to {dtype}; in kernels 16-bit floats are read and compared, "
                "and computed with in float32"
            )
        if source.op == "const" and dtype != "bool" and _dtype(dtype).kind in "iu" and source.value >= 0:
            return self.node("const", dtype, value=int(source.value))
        return self.node("cast", dtype, (symbol._index,))

    def constant(self, value: Any, dtype: str) -> _Symbol:
        """A Python or NumPy number as a value of `dtype`."""
        if dtype == "bool":
            return self.node("const", dtype, value=bool(value))
        # An object that is used again, a literal in a loop for example, is one number. Equal ones may be another time's
        # different ones, and the structure must not depend on that.
        if (id(value), dtype) in self._constants:
            return self.node("number", dtype, value=self._constants[id(value), dtype][1])
        number: int | float
        if _dtype(dtype).kind in "iu":
            number, info = int(value), np.iinfo(dtype)
            if not info.min <= number <= info.max:
                self.refuse(f"the Python integer {number} is out of bounds for {dtype}")
            if exact_int(number):
                return self.node("const", dtype, value=number)
            self.numbers.append((Number(dtype, size_class(number)), number))
        else:
            with np.errstate(over="ignore"):  # a number too large is infinite, as in NumPy
                number = float(np.asarray(value).astype(_dtype(dtype)))
            self.numbers.append((Number(dtype), number))
        self._constants[id(value), dtype] = value, len(self.numbers) - 1
        return self.node("number", dtype, value=len(self.numbers) - 1)

    def operand(self, value: Any) -> _Symbol | int | float:
        """What a ufunc got: a symbol, or a Python number, whose dtype follows its neighbour."""
        if type(value) is _Symbol:
            if value._tracer is not self:
                self.refuse("it uses a symbol of another call, kept in a variable")
            return value
        if isinstance(value, _Array):
            if value.ndim:
                self.refuse(f"{value._name} of shape {value.shape} is used as a whole; index it by the coordinates")
            return self.load(value, ())
        if type(value) in (int, float):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool | np.generic):
            # A subclass: the number that it is, whatever its methods say.
            return int.__add__(value, 0) if isinstance(value, int) else float.__pos__(value)
        if type(value) is bool:
            return self.constant(value, "bool")
        if isinstance(value, np.generic) and value.dtype in _DTYPES:
            name = self.computed(value.dtype)
            return self.constant(value, name)
        if _is_array(value):
            return self.operand(_Array(self, value, "an array"))
        self.refuse(
            f"it computes with a {_word(type(value).__name__)}; expected numbers, coordinates and looked-up values"
        )

    def symbol(self, value: Any, *, returned: bool = False) -> _Symbol:
        """An operand that has no neighbour."""
        if returned and not isinstance(value, _Symbol | _Array | int | float | np.generic) and not _is_array(value):
            kind = "real scores" if self.argument == "score_mod" else "a bool array"
            raise TypeError(f"{self.argument} must return {kind}, but returned a {_word(type(value).__name__)}")
        found = self.operand(value)
        if isinstance(found, _Symbol):
            return found
        return self.constant(found, "int64" if isinstance(found, int) else self.accumulator)

    def describe(self, symbol: _Symbol) -> str:
        expression = Expression(tuple(self.nodes), (), ())
        return _describe(expression, symbol._index, [x._name for x in self.lookups], [x for _, x in self.numbers])

    # --- what NumPy asks for ---------------------------------------------------------------------------------------

    def ufunc(self, ufunc: Any, method: str, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
        if not _has_symbol((inputs, options)):
            inputs, options = self.plain((inputs, options), "the operation")
            if options.get("out") is not None:
                self.refuse("an array is written to; a mod reads its arrays, and returns its result")
            return self.wrap(getattr(ufunc, method)(*inputs, **options), "a computed array")
        name = _UFUNCS.get(ufunc)
        if name is None or method != "__call__":
            self.refuse(f"kernels have no np.{_word(ufunc.__name__)}" + ("" if method == "__call__" else f".{method}"))
        if options:
            if "out" in options:
                self.refuse("a value is changed in place; write x = x + y, not x += y, and leave out= away")
            self.refuse(f"np.{name} is called with {', '.join(map(_word, options))}; only the operands are expected")
        return self.operation(name, ufunc, [self.operand(value) for value in inputs])

    def operation(self, name: str, ufunc: Any, operands: list[_Symbol | int | float]) -> _Symbol:
        symbols = [x for x in operands if isinstance(x, _Symbol)]
        if not symbols:
            operands = [self.symbol(x) for x in operands]
        base, exponent = operands[0], operands[-1]
        if name == "power" and isinstance(exponent, int) and isinstance(base, _Symbol) and base.dtype.kind in "iu":
            return self.integer_power(base, exponent)
        types = [x.dtype if isinstance(x, _Symbol) else type(x) for x in operands]
        try:
            *loop, out = ufunc.resolve_dtypes((*types, None))
        except TypeError as error:
            self.refuse(f"np.{name} has no loop for {', '.join(str(x) for x in types)}: {error}")
        if name in _COMPARISONS and any(isinstance(x, int) for x in operands):
            # NumPy compares with any Python integer, whatever the neighbour's dtype holds.
            loop = [
                np.dtype(np.int64) if _too_large(x, loop[0]) else dtype for x, dtype in zip(operands, loop, strict=True)
            ]
            if loop[0] != loop[1]:
                loop = [np.dtype(np.int64)] * 2
                if any(isinstance(x, _Symbol) and x.dtype == np.uint64 for x in operands):
                    self.refuse("a uint64 is compared with a negative number; use .astype")
        names = [self.computed(dtype) for dtype in loop]
        result = self.computed(out)
        if name not in ("logical_and", "logical_or", "logical_xor", "logical_not") and len(set(names)) > 1:
            self.refuse(f"np.{name} of {' and '.join(names)} is ambiguous; use .astype")
        if not {*names, result}.isdisjoint(_HALVES) and name not in _EXACT:
            self.refuse(
                f"np.{name} would round to a 16-bit float; read with .astype(np.float32), for example "
                "bias.astype(np.float32)[h] or bias[h].astype(np.float32)"
            )
        converted = [
            self.cast(x, dtype) if isinstance(x, _Symbol) else self.constant(x, dtype)
            for x, dtype in zip(operands, names, strict=True)
        ]
        if name == "positive" or (name in _ROUNDINGS and out.kind in "biu"):
            return converted[0]
        name = "absolute" if name == "fabs" else name
        if name == "absolute" and loop[0].kind in "bu":
            return converted[0]
        if name.startswith("logical"):
            converted = [self.cast(x, "bool") for x in converted]
        if name in ("power", "reciprocal") and out.kind in "iu":
            self.refuse(f"np.{name} of integers needs a constant exponent of at least 0; use .astype(np.float32)")
        return self.node(name, result, tuple(x._index for x in converted))

    def integer_power(self, base: _Symbol, exponent: int) -> _Symbol:
        if exponent < 0:
            self.refuse("integers to negative integer powers are not allowed")
        if exponent > 64:
            self.refuse(f"an integer to the power of {exponent} overflows; use .astype(np.float32)")
        result = self.constant(1, base.dtype.name)
        for bit in bin(exponent)[2:]:
            result = self.node("multiply", base.dtype.name, (result._index, result._index))
            if bit == "1":
                result = self.node("multiply", base.dtype.name, (result._index, base._index))
        return result

    def function(self, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A function of NumPy's that is no ufunc."""
        name = _word(getattr(function, "__name__", "function"))
        if not _has_symbol((args, options)):
            if any(not isinstance(x._values, np.ndarray) for x in _flat((args, options)) if isinstance(x, _Array)):
                self.refuse(f"np.{name} of a whole CuPy array can't be traced; call it outside of the function")
            args, options = self.plain((args, options), f"np.{name}")
            return self.wrap(function(*args, **options), f"np.{name}(…)")
        known: dict[Any, Callable[..., Any]] = {
            np.where: self.where,
            np.clip: self.clip,
            np.round: self.round,
            np.around: self.round,
            np.zeros_like: lambda x: self.constant(0, self.symbol(x).dtype.name),
            np.ones_like: lambda x: self.constant(1, self.symbol(x).dtype.name),
            np.full_like: lambda x, fill_value: self.cast(self.symbol(fill_value), self.symbol(x).dtype.name),
        }
        if function not in known:
            self.refuse(f"kernels have no np.{name}; use operators, np.where and ufuncs such as np.minimum or np.exp")
        try:
            return known[function](*args, **options)
        except TypeError as error:
            self.refuse(f"np.{name} is called in a way that can't be traced: {error}")

    def where(self, condition: Any, x: Any, y: Any) -> _Symbol:
        test = self.cast(self.symbol(condition), "bool")
        operands = [self.operand(value) for value in (x, y)]
        if not any(isinstance(value, _Symbol) for value in operands):
            operands = [self.symbol(value) for value in operands]
        try:
            # A Python number follows its neighbour.
            common = np.result_type(*(np.zeros((1,), v.dtype) if isinstance(v, _Symbol) else v for v in operands))
        except (TypeError, OverflowError) as error:
            self.refuse(f"np.where has no common dtype: {error}")
        dtype = self.computed(common)
        branches = [self.cast(v, dtype) if isinstance(v, _Symbol) else self.constant(v, dtype) for v in operands]
        return self.node("where", dtype, (test._index, *(v._index for v in branches)))

    def clip(self, a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
        low, high = (a_min if min is None else min), (a_max if max is None else max)
        if low is not None:
            a = np.maximum(a, low)
        return a if high is None else np.minimum(a, high)

    def round(self, a: Any, decimals: int = 0) -> Any:
        if decimals != 0:
            self.refuse("np.round takes no decimals in kernels; write np.rint(x * 100) / 100")
        return a if self.symbol(a).dtype.kind in "biu" else np.rint(a)

    def load(self, array: _Array, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if not _has_symbol(keys):
            (plain,) = self.plain((keys,), array._name)
            if not any(_is_array(k) or isinstance(k, list) for k in plain) and Ellipsis not in plain:
                plain = (*plain, Ellipsis)  # an element stays an array, which is read when the kernel runs
            item = _Array(self, array._values[plain], f"{array._name}[…]" if keys else array._name)
            if item.ndim or keys:
                return item
            return self.read(item, ())
        if len(keys) != array.ndim:
            self.refuse(
                f"{array._name} has {array.ndim} axes and is indexed by {len(keys)}; "
                "give an index for every axis at once, x[h, q_idx]"
            )
        chosen: list[Any] = []
        indices: list[int] = []
        for axis, index in enumerate(keys):
            if isinstance(index, _Array) and index.ndim == 0:
                index = self.operand(index)
            if isinstance(index, _Symbol):
                if self.operand(index).dtype.kind not in "iu":  # type: ignore[union-attr]
                    self.refuse(f"{array._name} is indexed by {self.describe(index)} of {index.dtype}, not an integer")
                indices.append(index._index)
                chosen.append(slice(None))
            elif isinstance(index, int | np.integer) and not isinstance(index, bool):
                size = array.shape[axis]
                fixed = int.__add__(index, 0) if isinstance(index, int) else int(index)
                if not -size <= fixed < size:
                    self.refuse(f"index {fixed} is out of bounds for axis {axis} of {array._name} with size {size}")
                chosen.append(fixed)
            else:
                self.refuse(
                    f"{array._name} is indexed by a {_word(type(index).__name__)} beside coordinates; expected integers"
                )
        # Integers beside coordinates choose a part of the array; the part, not the whole, is the kernel's argument.
        whole = all(isinstance(c, slice) for c in chosen)
        part = array if whole else _Array(self, array._values[(*chosen, ...)], array._name)
        return self.read(part, tuple(indices))

    def read(self, array: _Array, indices: tuple[int, ...]) -> _Symbol:
        if array.dtype not in _DTYPES:
            self.refuse(f"{array._name} has dtype {_word(array.dtype.name)}, which kernels can't read")
        values = array._values
        address = values.__array_interface__["data"][0] if isinstance(values, np.ndarray) else values.data.ptr
        identity = (address, values.shape, values.strides, values.dtype)
        if identity not in self._slots:
            self._slots[identity] = len(self.lookups)
            self.lookups.append(array)
        loaded = self.node("load", _DTYPES[array.dtype], indices, self._slots[identity])
        return self.cast(loaded, self.computed(array.dtype))

    # --- the copy of the user's function ---------------------------------------------------------------------------

    def plain(self, values: Any, what: str) -> Any:
        """Tuples, lists and dicts with the user's arrays in place of the stand-ins."""
        if isinstance(values, _Symbol):
            self.refuse(f"{what} is given {self.describe(values)}")
        if isinstance(values, _Array):
            return values._values
        if isinstance(values, _Cast):
            return values._kind
        if type(values) in (tuple, list):
            return type(values)(self.plain(value, what) for value in values)
        if type(values) is dict:
            return {key: self.plain(value, what) for key, value in values.items()}
        return values

    def wrap(self, value: Any, name: str) -> Any:
        """The stand-in for something that the function can reach; most things stand for themselves."""
        if id(value) in self._wrapped:
            return self._wrapped[id(value)][1]
        stand_in = self._stand_in(value, name)
        if stand_in is not value:
            self._wrapped[id(value)] = (value, stand_in)
        return stand_in

    def _stand_in(self, value: Any, name: str) -> Any:
        kind = type(value)
        if _is_array(value):
            # Masked arrays and matrices have other rules: they stand for themselves, and no symbol can index them.
            is_plain = not isinstance(value, np.ndarray) or kind in (np.ndarray, np.memmap)
            return _Array(self, value, _word(name)) if is_plain else value
        if kind in (tuple, list) or (isinstance(value, tuple) and hasattr(kind, "_make")):
            items = [self.wrap(item, f"{name}[{i}]") for i, item in enumerate(value)]
            if all(item is old for item, old in zip(items, value, strict=True)):
                return value
            return tuple(items) if kind in (tuple, list) else kind._make(items)
        if kind is dict:
            entries = {key: self.wrap(item, f"{name}[…]") for key, item in value.items()}
            return value if all(entries[key] is value[key] for key in value) else MappingProxyType(entries)
        if kind is FunctionType:
            return self._copy(value)
        if kind is MethodType and type(value.__func__) is FunctionType:
            return MethodType(self.wrap(value.__func__, name), value.__self__)
        if kind is functools.partial:
            options = {key: self.wrap(x, key) for key, x in value.keywords.items()}
            return functools.partial(self.wrap(value.func, name), *(self.wrap(x, name) for x in value.args), **options)
        if kind is ModuleType and value.__name__ in ("numpy", "cupy"):
            return _Numpy(self, value)
        if isinstance(value, type) and issubclass(value, np.generic):
            return _Cast(self, value)
        if _top_module(kind) == "cupy" or (callable(value) and _top_module(value) == "cupy"):
            known = getattr(value, "__name__", "")
            return getattr(np, known) if known in _CUPY_NAMES else value
        return value

    def _copy(self, function: FunctionType) -> FunctionType:
        if _top_module(function) in ("numpy", "cupy"):
            return function
        code = function.__code__
        names, stores = _global_names(code)
        if stores:
            self.refuse("it assigns to a variable outside of itself (global, nonlocal)")
        space: dict[str, Any] = {"__builtins__": function.__globals__.get("__builtins__", __builtins__)}
        cells = tuple(CellType() for _ in function.__closure__ or ())
        copy = FunctionType(code, space, function.__name__, None, cells)
        self._wrapped[id(function)] = (function, copy)  # before looking further: functions may call themselves
        for name in names & function.__globals__.keys():
            space[name] = self.wrap(function.__globals__[name], name)
        for cell, old, name in zip(cells, function.__closure__ or (), code.co_freevars, strict=True):
            try:
                contents = old.cell_contents
            except ValueError:  # not yet assigned
                continue
            cell.cell_contents = self.wrap(contents, name)
        copy.__defaults__ = self.wrap(function.__defaults__, "default") if function.__defaults__ else None
        if function.__kwdefaults__:
            copy.__kwdefaults__ = {name: self.wrap(x, name) for name, x in function.__kwdefaults__.items()}
        return copy


@functools.lru_cache(maxsize=256)
def _global_names(code: CodeType) -> tuple[frozenset[str], bool]:
    """The global names that a function and those inside it may use, and whether it assigns outside of itself."""
    import dis

    names: set[str] = set()
    stores = False
    free = set(code.co_freevars)
    codes = [code]
    while codes:
        current = codes.pop()
        codes += [constant for constant in current.co_consts if isinstance(constant, CodeType)]
        for instruction in dis.get_instructions(current):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.add(str(instruction.argval))
            elif instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                stores = True
            elif instruction.opname in ("STORE_DEREF", "DELETE_DEREF"):
                stores |= instruction.argval in free and instruction.argval in current.co_freevars
    return frozenset(names), stores


# ------------------------------------------------------------------------------------------------------------
# Small helpers
# ------------------------------------------------------------------------------------------------------------


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def _flat(values: Any) -> list[Any]:
    if type(values) is dict:
        values = tuple(values.values())
    if type(values) in (tuple, list):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]


def _has_symbol(values: Any) -> bool:
    return any(isinstance(value, _Symbol) for value in _flat(values))


def _too_large(value: Any, dtype: np.dtype[Any]) -> bool:
    return isinstance(value, int) and dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def _top_module(value: Any) -> str:
    module = getattr(value, "__module__", None)
    return module.partition(".")[0] if type(module) is str else ""


def _word(name: Any) -> str:
    """A name for a message: short and printable."""
    text = name if type(name) is str else "?"
    return "".join(c if c.isprintable() else "?" for c in text[:60])


def _user_line(error: BaseException | None) -> tuple[str, int]:
    """File and line of the innermost frame that is neither ours nor NumPy's."""
    frames: list[tuple[Any, int]] = []
    if error is not None:
        step = error.__traceback__
        while step is not None:
            frames.append((step.tb_frame, step.tb_lineno))
            step = step.tb_next
        frames.reverse()
    else:
        frame: Any = sys._getframe(1)
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            if frame.f_code is _Tracer.call.__code__:
                break  # beyond it nothing is the mod's
            frame = frame.f_back
    for frame, line in frames:
        file = frame.f_code.co_filename
        if file != __file__ and frame.f_globals.get("__name__", "").partition(".")[0] != "numpy":
            return file, line
        if frame.f_code is _Tracer.call.__code__:
            break
    return "", 0
