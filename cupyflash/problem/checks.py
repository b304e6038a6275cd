"""Checks of single arguments.  Each returns the argument in its plain form, or raises an error that names it."""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..interop import is_foreign, type_name
from .dtypes import DTYPES, DType
from .philox import check_seed
from .problem import STAGES

__all__ = [
    "array_like_query",
    "check_callable",
    "check_devices",
    "check_flag",
    "check_library",
    "check_out",
    "check_per_head",
    "check_precision",
    "check_scale",
    "check_seed_array",
    "check_softcap",
    "check_stage",
    "common_dtype",
    "library_of",
    "plain_array",
    "split_mask",
]

_PRECISIONS = ("ieee", "tf32", "tf32x3")
_LIBRARY_NAMES = {"numpy": "NumPy", "cupy": "CuPy"}


def check_stage(stage: str) -> str:
    """Return `stage` if it is one of STAGES, or raise a TypeError or ValueError that says so."""
    _check_choice("stage", stage, STAGES)
    return stage


def library_of(name: str, array: Any) -> str:
    """Return "numpy" or "cupy", or raise a TypeError that names the argument."""
    if type(array) is np.ndarray:
        return "numpy"
    if isinstance(array, np.ndarray):
        if isinstance(array, (np.ma.MaskedArray, np.matrix)):
            found, hint = type(array).__name__, f"pass numpy.asarray({name})"
            if isinstance(array, np.ma.MaskedArray):  # asarray alone would count in what the mask leaves out
                hint += ", which drops its mask, and as attn_mask which keys take part"
            raise TypeError(f"{name} must be a plain array, but was a {found}: {hint}")
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return "cupy"
    found = "None" if array is None else f"of type {type(array).__name__}"
    hint = f": pass numpy.asarray({name})" if isinstance(array, (list, tuple)) or hasattr(array, "__array__") else ""
    raise TypeError(f"{name} must be an array of NumPy, CuPy or a library with DLPack, but was {found}{hint}")


def device_of(array: Any) -> AbstractContextManager[Any]:
    """Makes a CuPy array's device the current one: CuPy allocates and launches there, wherever the arrays are."""
    if isinstance(array, np.ndarray):
        return _HOST
    cupy = sys.modules.get("cupy")
    device: AbstractContextManager[Any] = array.device if cupy and isinstance(array, cupy.ndarray) else _HOST
    return device


_HOST = nullcontext()


def plain_array(array: Any) -> Any:
    """The array without an ndarray subclass (memmap, say) around it."""
    return array.view(np.ndarray) if isinstance(array, np.ndarray) and type(array) is not np.ndarray else array


def check_precision(precision: str) -> str:
    """Return `precision` if it is known, or raise a TypeError or ValueError that says so."""
    _check_choice("precision", precision, _PRECISIONS)
    return precision if type(precision) is str else str(precision)


def array_like_query(name: str, array: Any, query: Any) -> Any:
    """Return the array without a subclass around it, or raise a TypeError if it is not of query's library.

    query is plain already.
    """
    if type(array) is type(query):
        return array
    check_library(name, array, library_of("query", query), "query")
    return plain_array(array)


def check_library(name: str, array: Any, library: str, first: str) -> None:
    """Raise a TypeError if the array is not of that library, which is the one of the argument `first`."""
    if is_foreign(array):
        found = type_name(array)
    else:
        found = f"{_LIBRARY_NAMES[library_of(name, array)]} array"
    if found != f"{_LIBRARY_NAMES[library]} array":
        raise TypeError(f"{name} must be a {_LIBRARY_NAMES[library]} array like {first}, but was a {found}")


def check_callable(name: str, function: Any) -> bool:
    """Return whether there is a function; raise a TypeError if it is not one."""
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be callable, but was of type {type(function).__name__}")
    return function is not None


def common_dtype(query: Any, key: Any, value: Any) -> DType:
    """Return the table's row of the one dtype of all three, or raise a TypeError that names the odd one."""
    element = DTYPES.get(query.dtype)
    if element is not None and key.dtype == query.dtype == value.dtype:
        return element
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.dtype not in DTYPES:
            hint = f": pass {name}.astype(np.float32)" if array.dtype.kind in "iub" else _native_hint(name, array)
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but was {_named(array)}{hint}")
    for name, array in (("key", key), ("value", value)):
        if array.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, but was {array.dtype}")
    return DTYPES[query.dtype]


def _named(array: Any) -> str:
    """The dtype in words: the byte order counts where it is what was wrong."""
    dtype = array.dtype
    return dtype.name if dtype.isnative else f"{dtype.name} in non-native byte order ({dtype.str})"


def split_mask(attn_mask: Any, query: Any, dtype: DType) -> tuple[Any, Any]:
    """attn_mask as (float mask or None, bool mask or None)."""
    if isinstance(attn_mask, tuple):
        if len(attn_mask) != 2:
            raise ValueError(f"attn_mask as a tuple must be (float_mask, bool_mask), but had length {len(attn_mask)}")
        float_mask, bool_mask = (array_like_query(f"attn_mask[{i}]", attn_mask[i], query) for i in range(2))
        if bool_mask.dtype != bool or float_mask.dtype == bool:
            raise TypeError(
                f"attn_mask as a tuple must be (float_mask, bool_mask), but was ({float_mask.dtype}, {bool_mask.dtype})"
            )
        _check_float_mask("attn_mask[0]", float_mask, dtype)
        return float_mask, bool_mask
    mask = array_like_query("attn_mask", attn_mask, query)
    if mask.dtype == bool:
        return None, mask
    _check_float_mask("attn_mask", mask, dtype)
    return mask, None


def _check_float_mask(name: str, mask: Any, dtype: DType) -> None:
    if mask.dtype in (dtype.storage, np.dtype(np.float32)) and mask.dtype.isnative:
        return
    hint = f": pass {name}.astype(bool) if 1 takes part" if mask.dtype.kind in "iu" else _hint(name, mask)
    raise TypeError(f"{name} must be bool or {_or_float32(dtype)}, but was {_named(mask)}{hint}")


def check_per_head(name: str, array: Any, dtype: DType | None) -> None:
    """Raise a TypeError if the array is not float32, or in the query's dtype, which None says it may not be."""
    if array.dtype != np.float32 and (dtype is None or array.dtype != dtype.storage):
        allowed = "float32" if dtype is None else _or_float32(dtype)
        raise TypeError(f"{name} must be {allowed}, but was {_named(array)}{_hint(name, array)}")


def _or_float32(dtype: DType) -> str:
    return "float32" if dtype.name == "float32" else f"{dtype.name} (the query's dtype) or float32"


def _hint(name: str, array: Any) -> str:
    if array.dtype == np.float64:
        return f", which NumPy makes by default: pass {name}.astype(np.float32)"
    return _native_hint(name, array)


def _native_hint(name: str, array: Any) -> str:
    return "" if array.dtype.isnative else f": pass {name}.astype(np.{array.dtype.name})"


def check_seed_array(seed: Any, query: Any) -> Any:
    if not isinstance(seed, np.generic) and hasattr(seed, "dtype"):
        seed = array_like_query("seed", seed, query)
    return check_seed(seed)


def check_flag(name: str, flag: Any) -> bool:
    if flag is True or flag is False:
        return flag
    if isinstance(flag, np.bool_):
        return bool(flag)
    raise TypeError(f"{name} must be a bool, but was {flag!r}")


def _check_choice(name: str, choice: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(choice, str):
        raise TypeError(f"{name} must be one of {choices}, but was {choice!r}")
    if choice not in choices:
        raise ValueError(f"{name} must be one of {choices}, but was {choice!r}")


def _check_number(name: str, number: Any) -> float:
    if type(number) is not float and (isinstance(number, (bool, np.bool_)) or not isinstance(number, Real)):
        raise TypeError(f"{name} must be a real number, but was {number!r}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, but was {number}")
    return number or 0.0  # equal numbers are one: not -0.0


def check_scale(scale: Any) -> float | None:
    return None if scale is None else _check_number("scale", scale)


def check_softcap(softcap: Any) -> float:
    if softcap is None:
        return 0.0
    softcap = _check_number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0 (0 is off), but was {softcap}")
    return softcap


def check_devices(query: Any, *others: Any) -> None:
    device = query.device
    for array in others:
        if array is not None and array.device != device:
            raise ValueError(f"all arrays must be on query's device {device}, but one was on {array.device}")


def check_out(out: Any, shape: tuple[int, ...], query: Any, inputs: dict[str, Any]) -> None:
    plain = array_like_query("out", out, query)
    if plain.dtype != query.dtype:
        raise TypeError(f"out must have query's dtype {query.dtype}, but was {plain.dtype}")
    if plain.shape != shape:
        raise ValueError(f"out must have shape {shape}, but had shape {plain.shape}")
    if not getattr(plain.flags, "writeable", True):
        raise ValueError("out must be writable, but was read-only")
    if _overlaps_itself(plain):
        raise ValueError(f"out must not overlap itself, but had shape {plain.shape} and strides {plain.strides}")
    place = None if isinstance(plain, np.ndarray) else _byte_range(plain)
    for name, array in inputs.items():
        if array is None or (place is not None and not _meet(place, _byte_range(array))):
            continue
        if _shares_memory(_on_host(plain), _on_host(array)):
            raise ValueError(f"out must not share memory with {name}, but did")


def _shares_memory(a: Any, b: Any) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        # The exact answer is exponential in the worst case; interleaved views, which users have, are quick.
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # the stubs know -1 and 0 only
    except np.exceptions.TooHardError:
        return True


def _byte_range(array: Any) -> tuple[int, int]:
    """Where the first byte of a device's array lies, and the end of the last."""
    low = high = array.data.ptr
    for n, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (n - 1) * stride
        else:
            high += (n - 1) * stride
    return low, high + array.itemsize


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _on_host(array: Any) -> Any:
    """The array, or one of NumPy at a device array's addresses, at which nobody looks.

    CuPy's own answer sorts the addresses of all elements and waits for the device, and arrays that came by DLPack from
    one allocation are two to it.
    """
    if isinstance(array, np.ndarray):
        return array
    place = {"data": (array.data.ptr, True), "shape": array.shape, "strides": array.strides}
    described = {"version": 3, "typestr": f"|V{array.itemsize}", **place}
    return np.asarray(SimpleNamespace(__array_interface__=described)) if array.size else np.empty(0)


def _overlaps_itself(array: Any) -> bool:
    """True if two different indices of the array share a byte."""
    if array.size < 2:
        return False
    axes = sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True) if n > 1)
    extent = array.itemsize
    for stride, n in axes:
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return False  # each axis steps over all that the finer axes cover
    if axes[0][0] < array.itemsize:
        return True
    offsets = np.zeros(1, np.int64)
    for stride, n in axes:
        offsets = np.add.outer(offsets, stride * np.arange(n, dtype=np.int64)).ravel()
    offsets.sort()
    return bool((np.diff(offsets) < array.itemsize).any())
