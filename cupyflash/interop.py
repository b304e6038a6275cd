"""Arrays of other libraries: read where they lie, and the results given back as what the caller holds.

The public functions ask for the type of their first array.  Unless it is in NATIVE, `call` runs them on views, which
are arrays of NumPy or CuPy, and turns what they return into arrays of the caller's library:

=====================  ===========================================  ================================================
array                  is read                                      results are
=====================  ===========================================  ================================================
torch.Tensor, CPU      by ``Tensor.numpy``                          tensors over NumPy's memory
torch.Tensor, CUDA     by DLPack, on torch's current stream         tensors: all memory is allocated by torch
jax.Array, CPU         by ``numpy.asarray``                         copied to the device of query
jax.Array, GPU         by DLPack                                    arrays over CuPy's memory
any with __dlpack__    by DLPack                                    made by ``from_dlpack`` of its namespace
any with               by ``cupy.asarray``                          made by ``as_cuda_array``, which Numba has
__cuda_array_…__
=====================  ===========================================  ================================================

Nothing is imported that the user has not imported, but for CuPy where an array lies on a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["NATIVE", "call", "is_foreign", "read_all", "read_seed", "type_name"]

#: Types of the arrays that need no turning: NumPy's, and what `is_foreign` has found to be CuPy's.
NATIVE: set[type] = {np.ndarray}

_ARRAYS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks", "seed", "out", "outs", "lses")
_HOST_DEVICES = (1, 3, 11)  # DLPack's kDLCPU, kDLCUDAHost, kDLROCMHost
_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


def is_foreign(array: Any) -> bool:
    """True for an array of a library other than NumPy and CuPy; False for these two, and for what is no array."""
    cupy = sys.modules.get("cupy")
    if isinstance(array, np.ndarray) or (cupy is not None and isinstance(array, cupy.ndarray)):
        NATIVE.add(type(array))
        return False
    return hasattr(type(array), "__dlpack__") or hasattr(type(array), "__cuda_array_interface__")


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What `function` returns for these arguments, whose arrays are of the library that the first array is of.

    Parameters
    ----------
    function : a public function of cupyflash
    arguments : its arguments by name.  The first one is an array for which `is_foreign`, or a sequence of them.

    Returns
    -------
    The function's results, as arrays of that library; `out` itself where it was given.

    Raises
    ------
    TypeError
        An array can't be read or written, the library's arrays can't be made, or libraries are mixed.
    ValueError
        Arrays lie on different devices.
    """
    library = _library_of_first(arguments)
    with library.running():
        views = _read_all(library, arguments)
        returned = function(**views)
        results = returned if isinstance(returned, tuple) else (returned,)
        out = views.get("out")
        given = tuple(
            arguments["out"] if out is not None and array is out else library.write(array) for array in results
        )
    return given if isinstance(returned, tuple) else given[0]


def read_all(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `call` with NumPy's or CuPy's views in place of arrays."""
    library = _library_of_first(arguments)
    with library.running():
        return _read_all(library, arguments)


def read_seed(seed: Any) -> Any:
    """The seed, or NumPy's or CuPy's view of it where it is an array of another library."""
    return read_all({"seed": seed})["seed"] if type(seed) is not int and is_foreign(seed) else seed


class _Library:
    """The arrays of one library, on one device: that of the call's first array."""

    def __init__(self, name: str) -> None:
        self.name = name  # as an error calls its arrays

    def owns(self, array: Any) -> bool:
        """Whether the array is of this library."""
        raise NotImplementedError

    def read(self, name: str, array: Any) -> Any:
        """A view of NumPy or CuPy, over the same memory."""
        raise NotImplementedError

    def write(self, array: Any) -> Any:
        """An array of this library with the contents of a new one of NumPy or CuPy."""
        raise NotImplementedError

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """What holds while arrays are read, the function runs and its results are written."""
        return contextlib.nullcontext()


def _library_of_first(arguments: Mapping[str, Any]) -> _Library:
    name, array = next(iter(arguments.items()))
    if isinstance(array, (tuple, list)):
        name, array = f"{name}[0]", array[0]
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(array, torch.Tensor):
        return _torch(torch, name, array)
    if jax is not None and isinstance(array, jax.Array):
        return _Jax(jax, name, array)
    if hasattr(type(array), "__dlpack__"):
        return _DLPack(name, array)
    return _CudaArrayInterface(name, array)


def _read_all(library: _Library, arguments: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(arguments))

    def read(name: str, value: Any) -> Any:
        if library.owns(value):
            return library.read(name, value)
        if isinstance(value, (tuple, list)):
            return type(value)(read(f"{name}[{i}]", item) for i, item in enumerate(value))
        if isinstance(value, np.ndarray) or is_foreign(value) or type(value) in NATIVE:
            raise TypeError(f"{name} must be a {library.name} like {first}, but was a {type_name(value)}")
        return value  # a seed, or what is no array at all, which the function will say

    return {
        name: value if value is None or name not in _ARRAYS else read(name, value) for name, value in arguments.items()
    }


def type_name(array: Any) -> str:
    """The array's type as errors call it: with its package."""
    return f"{_root(array)}.{type(array).__qualname__}"


def _root(array: Any) -> str:
    """The package in which the array's type is defined."""
    return type(array).__module__.partition(".")[0]


def _cupy(name: str, what: str) -> Any:
    """CuPy, imported where it was not yet: arrays on a GPU need it."""
    try:
        import cupy
    except (ImportError, OSError) as error:  # OSError: it finds no folder to write its cache to
        raise TypeError(
            f"{name} must be in the host's memory unless CuPy is there, but was {what}, and CuPy could not be imported "
            f"({error}): pip install 'cupyflash[cuda13]', or [cuda12]"
        ) from error
    return cupy


# --- PyTorch -------------------------------------------------------------------------------------------------------


def _torch(torch: Any, name: str, tensor: Any) -> _Library:
    kind = tensor.device.type
    if kind == "cpu":
        return _TorchOnHost(torch, tensor)
    if kind == "cuda":
        return _TorchOnCuda(torch, tensor, _cupy(name, f"on {tensor.device}"))
    raise TypeError(f"{name} must be on a device of type cpu or cuda, but was on {tensor.device}: pass {name}.cpu()")


class _Torch(_Library):
    def __init__(self, torch: Any, tensor: Any) -> None:
        super().__init__("torch.Tensor")
        self._torch, self._device = torch, tensor.device

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._torch.Tensor)

    def read(self, name: str, array: Any) -> Any:
        if array.requires_grad and self._torch.is_grad_enabled():
            raise TypeError(
                f"{name} must not require gradients, since there is no backward pass, but requires_grad was True: "
                f"pass {name}.detach(), or call under torch.no_grad()"
            )
        if array.device != self._device:
            raise ValueError(f"{name} must be on the first tensor's device {self._device}, but was on {array.device}")
        try:
            return self._view(array.detach())
        except (RuntimeError, TypeError, BufferError) as error:
            raise TypeError(
                f"{name} must be a dense tensor of ordinary numbers, but was {array.dtype} of layout {array.layout}, "
                f"which can't be read in place: {error}"
            ) from error

    def _view(self, tensor: Any) -> Any:
        raise NotImplementedError


class _TorchOnHost(_Torch):
    def _view(self, tensor: Any) -> Any:
        if tensor.dtype is self._torch.bfloat16:  # which Tensor.numpy does not know
            return tensor.view(self._torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def write(self, array: Any) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return self._torch.from_numpy(array.view(np.uint16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)


class _Stream:
    """A stream of another library, by CUDA's stream protocol, which older ones lack."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class _TorchOnCuda(_Torch):
    """On torch's current stream, and with memory that torch allocates, for results and for what is only worked with.

    A result is then an ordinary tensor, which `Tensor.record_stream` and memory statistics know, and CuPy holds no pool
    of its own beside torch's.
    """

    def __init__(self, torch: Any, tensor: Any, cupy: Any) -> None:
        super().__init__(torch, tensor)
        self._cupy = cupy
        # By address: what was allocated in this call and is still in use.
        self._made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        cuda = self._cupy.cuda
        stream = _Stream(self._torch.cuda.current_stream(self._device).cuda_stream)
        with (
            cuda.Device(self._device.index),
            cuda.Stream.from_external(stream),
            cuda.using_allocator(self._allocate),
        ):
            yield

    def _allocate(self, size: int) -> Any:
        memory = self._torch.empty(size, dtype=self._torch.uint8, device=self._device)
        address = memory.data_ptr()
        self._made[address] = memory
        cuda = self._cupy.cuda
        return cuda.MemoryPointer(cuda.UnownedMemory(address, size, memory, self._device.index), 0)

    def _view(self, tensor: Any) -> Any:
        return self._cupy.from_dlpack(tensor)

    def write(self, array: Any) -> Any:
        memory = self._made.get(array.data.ptr)
        if memory is None:  # it begins inside an allocation
            return self._torch.from_dlpack(array)
        elements = memory.view(getattr(self._torch, array.dtype.name))
        return elements.as_strided(array.shape, [stride // array.itemsize for stride in array.strides])


# --- JAX -----------------------------------------------------------------------------------------------------------


class _Jax(_Library):
    def __init__(self, jax: Any, name: str, array: Any) -> None:
        super().__init__("jax.Array")
        self._jax = jax
        self._device = self._device_of(name, array)
        self._cupy = None if self._device.platform == "cpu" else _cupy(name, f"on {self._device}")

    def _device_of(self, name: str, array: Any) -> Any:
        if isinstance(array, self._jax.core.Tracer):
            raise TypeError(
                f"{name} must have its values, but was traced by a transformation of JAX, such as jit, grad or vmap: "
                "call outside of it, or through jax.pure_callback"
            )
        devices = array.devices()
        if len(devices) != 1:
            raise TypeError(f"{name} must be on one device, but was on {len(devices)}")
        (device,) = devices
        if device.platform not in ("cpu", "gpu", "cuda"):
            raise TypeError(f"{name} must be on a CPU or an NVIDIA GPU, but was on {device}")
        return device

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._jax.Array)

    def read(self, name: str, array: Any) -> Any:
        if name == "out":
            raise TypeError("out must be None with JAX, whose arrays can't be written, but was a jax.Array")
        device = self._device_of(name, array)
        if device != self._device:
            raise ValueError(f"{name} must be on the first array's device {self._device}, but was on {device}")
        return np.asarray(array) if self._cupy is None else self._cupy.from_dlpack(array)

    def write(self, array: Any) -> Any:
        if self._cupy is None:
            return self._jax.device_put(array, self._device)
        return self._jax.dlpack.from_dlpack(array)


# --- protocols -----------------------------------------------------------------------------------------------------


class _Protocol(_Library):
    """Arrays of a library that is not known by name: those whose types come from one package."""

    def __init__(self, array: Any) -> None:
        super().__init__(type_name(array))
        self._package = _root(array)

    def owns(self, array: Any) -> bool:
        return _root(array) == self._package and is_foreign(array)


class _DLPack(_Protocol):
    def __init__(self, name: str, array: Any) -> None:
        super().__init__(array)
        namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else None
        namespace = namespace or sys.modules.get(self._package)
        self._from_dlpack = getattr(namespace, "from_dlpack", None)
        if self._from_dlpack is None:
            raise TypeError(
                f"{name} must be of a library that can take the results back, but was a {self.name}, which has no "
                f"__array_namespace__ and no {self._package}.from_dlpack: pass numpy.from_dlpack({name}), or "
                f"cupy.from_dlpack({name})"
            )
        self._device = self._device_of(array)
        self._cupy = _cupy(name, "on a CUDA device") if self._device[0] in _CUDA_DEVICES else None

    def _device_of(self, array: Any) -> tuple[int, int]:
        kind, number = array.__dlpack_device__()
        return (1, 0) if kind in _HOST_DEVICES else (int(kind), int(number))

    def running(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._cupy is None else self._cupy.cuda.Device(self._device[1])

    def read(self, name: str, array: Any) -> Any:
        device = self._device_of(array)
        if device != self._device:
            raise ValueError(f"{name} must be on the first array's DLPack device {self._device}, but was on {device}")
        try:
            return (np if self._cupy is None else self._cupy).from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} must be readable by DLPack, but was not: {error}") from error

    def write(self, array: Any) -> Any:
        assert self._from_dlpack is not None
        return self._from_dlpack(array)


class _CudaArrayInterface(_Protocol):
    def __init__(self, name: str, array: Any) -> None:
        super().__init__(array)
        self._cupy = _cupy(name, "on a CUDA device")
        self._as_cuda_array = getattr(sys.modules.get(f"{self._package}.cuda"), "as_cuda_array", None)
        if self._as_cuda_array is None:
            raise TypeError(
                f"{name} must be of a library that can take the results back, but was a {self.name}, and there is no "
                f"{self._package}.cuda.as_cuda_array: pass cupy.asarray({name})"
            )

    def read(self, name: str, array: Any) -> Any:
        return self._cupy.asarray(array)

    def write(self, array: Any) -> Any:
        assert self._as_cuda_array is not None
        return self._as_cuda_array(array)
