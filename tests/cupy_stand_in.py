"""A stand-in for CuPy on a machine without a GPU: strict arrays that refuse what CuPy refuses.

An array of it is not a NumPy array, does not turn into one by itself, and does not mix with one.  Its module has the
functions that are named here and no others; each name was looked up in CuPy 14.2.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from cupyflash.plan.device import DEVICES, DeviceSpec

FUNCTIONS = [
    "abs",
    "arange",
    "asarray",
    "ascontiguousarray",
    "broadcast_to",
    "concatenate",
    "cos",
    "exp",
    "full",
    "greater_equal",
    "isneginf",
    "log",
    "maximum",
    "repeat",
    "sign",
    "sin",
    "sqrt",
    "tanh",
    "unique",
    "where",
    "zeros",
]
CONSTANTS = ["bool_", "inf", "uint32", "uint64"]
ATTRIBUTES = ["dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides"]
METHODS = ["any", "astype", "copy", "item", "max", "mean", "ravel", "reshape", "sum", "swapaxes"]


class Device:
    """Stands in for cupy.cuda.Device: current while it is entered."""

    current = 0

    def __init__(self, device_id: int) -> None:
        self.id = device_id
        self._outer: list[int] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return f"stand-in device {self.id}"

    def __enter__(self) -> Device:
        self._outer.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *args: object) -> None:
        Device.current = self._outer.pop()


@dataclass(frozen=True)
class Launch:
    """What a kernel was launched with."""

    name: str
    cubin: bytes
    grid: tuple[int, ...]
    block: tuple[int, ...]
    params: bytes
    mods: bytes  # what follows the parameters: for kernels that apply mods
    shared_mem: int
    device: int
    stream: str


@dataclass
class Gpu:
    """What the machine would see: modules loaded and kernels launched, in order."""

    spec: DeviceSpec
    launches: list[Launch] = field(default_factory=list)
    loaded: list[tuple[int, str]] = field(default_factory=list)  # device, entry
    stream: str = "null"
    allocator: Callable[[int], Any] | None = None  # CuPy's own unless somebody is `using_allocator`
    effect: Callable[[Launch], None] | None = None  # what a launch does to memory; nothing unless a test says so

    @contextlib.contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """Make the stream the current one, as ``with cupy.cuda.Stream()`` does."""
        outer, self.stream = self.stream, name
        yield
        self.stream = outer

    @contextlib.contextmanager
    def using_allocator(self, allocator: Callable[[int], Any]) -> Iterator[None]:
        """As cupy.cuda.using_allocator."""
        outer, self.allocator = self.allocator, allocator
        yield
        self.allocator = outer

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """As cupy.empty."""
        dtype = np.dtype(dtype)
        if self.allocator is None:
            return (Array, ArrayElsewhere)[Device.current](np.empty(shape, dtype))
        size = math.prod(shape) * dtype.itemsize
        pointer = self.allocator(size)
        assert pointer.mem.size == size
        assert pointer.mem.device_id == Device.current
        memory = (ctypes.c_byte * size).from_address(pointer.mem.ptr + pointer.offset)
        memory.pointer = pointer  # type: ignore[attr-defined]  # arrays keep it, and it its owner
        return Array(np.frombuffer(memory, np.uint8).view(dtype).reshape(shape))


class _Kernel:
    """Stands in for cupy.RawKernel.  Attributes and code are those of one device, as in CuPy."""

    def __init__(self, gpu: Gpu, name: str, cubin: bytes) -> None:
        self._gpu, self._name, self._cubin = gpu, name, cubin
        self._shared_limits: dict[int, int] = {}

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._shared_limits.get(Device.current, 48 << 10)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        assert size <= self._gpu.spec.smem_per_block
        self._gpu.loaded.append((Device.current, self._name))
        self._shared_limits[Device.current] = size

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        assert Device.current in self._shared_limits, "the limit is per device"
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        # Structures by value: in CuPy 14.0 a scalar of more than 32 bytes fails an assertion.
        assert all(isinstance(one, np.ndarray) and one.size == 1 and one.dtype.names is None for one in args)
        params, mods = args[0].tobytes(), b"".join(block.tobytes() for block in args[1:])
        launch = Launch(
            self._name, self._cubin, grid, block, params, mods, shared_mem, Device.current, self._gpu.stream
        )
        self._gpu.launches.append(launch)
        if self._gpu.effect is not None:
            self._gpu.effect(launch)


def _raw_module(gpu: Gpu) -> Any:
    def raw_module(*, path: str) -> types.SimpleNamespace:
        cubin = Path(path).read_bytes()
        return types.SimpleNamespace(get_function=lambda name: _Kernel(gpu, name, cubin))

    return raw_module


def _cuda(gpu: Gpu) -> types.SimpleNamespace:
    def properties(device_id: int) -> dict[str, Any]:
        spec = gpu.spec
        return {
            "name": spec.name.encode(),
            "major": spec.cc[0],
            "minor": spec.cc[1],
            "multiProcessorCount": spec.sms,
            "sharedMemPerBlockOptin": spec.smem_per_block,
            "sharedMemPerMultiprocessor": spec.smem_per_sm,
            "l2CacheSize": spec.l2,
        }

    def from_external(stream: Any) -> contextlib.AbstractContextManager[None]:
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return gpu.on_stream(f"external {pointer:#x} of device {Device.current}")

    return types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDeviceProperties=properties),
        Device=Device,
        Stream=types.SimpleNamespace(from_external=from_external),
        MemoryPointer=lambda mem, offset: types.SimpleNamespace(mem=mem, offset=offset),
        UnownedMemory=lambda ptr, size, owner, device_id=-1: types.SimpleNamespace(
            ptr=ptr, size=size, owner=owner, device_id=device_id
        ),
        using_allocator=gpu.using_allocator,
    )


class Array(NDArrayOperatorsMixin):
    """Stands in for cupy.ndarray."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    @property
    def device(self) -> Device:
        return Device(0)

    @property
    def data(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(ptr=self.memory.ctypes.data)

    def __bool__(self) -> bool:
        return bool(self.memory)

    def __len__(self) -> int:
        return len(self.memory)

    def get(self) -> np.ndarray:
        """A copy in the host's memory."""
        return self.memory.copy()

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _call(getattr(ufunc, method), *inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ATTRIBUTES:
            return getattr(self.memory, name)
        if name in METHODS:
            method = getattr(self.memory, name)
            return lambda *args, **kwargs: _call(method, *args, **kwargs)
        raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return _wrap(self.memory[_unwrap(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.memory[_unwrap(index)] = _unwrap(value)


class ArrayElsewhere(Array):
    """An array on the second device."""

    @property
    def device(self) -> Device:
        return Device(1)


def make_module(spec: DeviceSpec = DEVICES["A100"]) -> types.ModuleType:
    """A module to be put into sys.modules as cupy; its attribute `gpu` records what was launched."""
    module = types.ModuleType("cupy")
    gpu = Gpu(spec)
    module.gpu = gpu  # type: ignore[attr-defined]
    module.RawModule = _raw_module(gpu)  # type: ignore[attr-defined]
    module.cuda = _cuda(gpu)  # type: ignore[attr-defined]
    module.ndarray = Array  # type: ignore[attr-defined]
    for name in CONSTANTS:
        setattr(module, name, getattr(np, name))
    for name in FUNCTIONS:
        setattr(module, name, _function(getattr(np, name)))
    module.empty = gpu.empty  # type: ignore[attr-defined]
    module.from_dlpack = lambda array: Array(np.from_dlpack(array))  # type: ignore[attr-defined]
    return module


def _function(function: Any) -> Any:
    return lambda *args, **kwargs: _call(function, *args, **kwargs)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return _wrap(function(*map(_unwrap, args), **{name: _unwrap(value) for name, value in kwargs.items()}))


def _unwrap(value: Any) -> Any:
    if isinstance(value, Array):
        return value.memory
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, (tuple, list)):
        return type(value)(map(_unwrap, value))
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_wrap, value))
    return Array(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value
