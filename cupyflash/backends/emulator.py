"""The kernels on a CPU: compiled by the host's C++ compiler, run by the emulator in kernels_cu/emulator.

    module = Module(source)  # a KernelSource, compiled or found in the cache
    kernel = module.get_function("flash_fwd_sm80")
    kernel((num_blocks,), (num_threads,), (params,), shared_mem=49152)

mirrors ``cupy.RawModule``, with NumPy arrays for device arrays.  The emulator does not only run a kernel, it tries to
break it: see `Options`.  What it finds is raised as `EmulatorError` with the kernel's file and line.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cupyflash.build.cache import default_cache
from cupyflash.build.host import build_kernel, build_runtime
from cupyflash.build.source import KernelSource
from cupyflash.errors import CupyflashError
from cupyflash.interrupts import settle_after

__all__ = [
    "Counters",
    "EmulatorError",
    "Function",
    "Module",
    "Observation",
    "Options",
    "Traffic",
    "guarded_array",
    "guarded_copy",
]

# Positions of Schedule in kernels_cu/emulator/block.h.
_SCHEDULES = ("fifo", "random", "priority")


class EmulatorError(CupyflashError):
    """A kernel did what no GPU guarantees: a race, a deadlock, divergence, an access out of bounds.

    The message begins with the kernel's file and line, the block and the thread.
    """


@dataclass(frozen=True)
class Options:
    """How a launch is run.  No choice may change a correct kernel's result by a bit.

    Attributes
    ----------
    schedule
        the order of warps: "fifo", in turn; "random", any that can run; "priority", by random
        priorities that now and then change.  The last two also preempt warps and shuffle blocks.
    seed
        of the schedule.
    race_detector
        report accesses to shared memory that nothing orders.
    late_landing
        asynchronous copies arrive as late as is allowed, their destinations hold NaNs until
        then; otherwise they arrive at once, as early as is allowed.
    counters
        count bank conflicts and sectors (slow); instructions are always counted.
    workers
        OS threads that run blocks.
    """

    schedule: str = "fifo"
    seed: int = 0
    race_detector: bool = True
    late_landing: bool = True
    counters: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, but was {self.schedule!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), but was {self.seed}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, but was {self.workers}")


@dataclass(frozen=True)
class Traffic:
    """What one kind of access cost: in wavefronts of shared memory or sectors of global memory.

    ``ideal`` is the least that the same bytes could have cost.
    """

    instructions: int
    cost: int
    ideal: int


@dataclass(frozen=True)
class Counters:
    """Sums over a launch, see kernels_cu/emulator/counters.h.  Costs need ``Options(counters=True)``."""

    blocks: int
    switches: int
    collectives: int
    mma: int
    wgmma: int
    bulk: int
    ld_shared: Traffic
    st_shared: Traffic
    ldmatrix: Traffic
    stmatrix: Traffic
    cp_async_shared: Traffic
    ld_global: Traffic
    st_global: Traffic
    cp_async_global: Traffic


@dataclass(frozen=True)
class Observation:
    """What one thread showed: a call of ``observe`` in a kernel, see kernels_cu/emulator/observe.h.

    ``data`` holds the bytes of its values, one behind the other.
    """

    event: str
    block: int
    thread: int
    data: bytes


class _LaunchOptions(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("schedule", ctypes.c_int32),
        ("race_detector", ctypes.c_int32),
        ("late_landing", ctypes.c_int32),
        ("counters", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("stop", ctypes.POINTER(ctypes.c_int32)),
    )


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("run", ctypes.c_void_p),
        ("num_arguments", ctypes.c_int),
        ("argument_bytes", ctypes.POINTER(ctypes.c_size_t)),
    )


_Observer = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_OBSERVATION = struct.Struct("=III20s")  # ObservationHeader in kernels_cu/emulator/block.h

_NUM_SCALARS = 6
_NUM_COUNTERS = _NUM_SCALARS + 3 * 8
_REPORT_BYTES = 16384


@lru_cache(maxsize=4)
def _runtime(portable_fibers: bool) -> tuple[Path, ctypes.CDLL]:
    path = build_runtime(default_cache(), portable_fibers=portable_fibers)
    library = ctypes.CDLL(str(path))
    library.cupyflash_emulator_allocate.restype = ctypes.c_void_p
    library.cupyflash_emulator_allocate.argtypes = (
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_char_p,
    )
    library.cupyflash_emulator_free.argtypes = (ctypes.c_void_p,)
    library.cupyflash_emulator_free.restype = None
    return path, library


def _default_runtime() -> tuple[Path, ctypes.CDLL]:
    return _runtime(os.environ.get("CUPYFLASH_EMULATOR_FIBERS") == "portable")


class Module:
    """A compiled kernel file.

    Parameters
    ----------
    source
        what to compile.
    options
        how its launches run, unless a launch says otherwise.

    Raises
    ------
    cupyflash.Unsupported
        there is no C++ compiler.
    cupyflash.KernelCompileError
        the source does not compile.
    """

    def __init__(self, source: KernelSource, options: Options | None = None) -> None:
        self.source = source
        self.options = options or Options()
        runtime_path, self._runtime = _default_runtime()
        path = build_kernel(source, default_cache(), runtime_path)
        self._library = ctypes.CDLL(str(path))

    def get_function(self, name: str) -> Function:
        """The entry ``name``.

        Raises
        ------
        ValueError
            the source has no such entry; the message lists those it has.
        """
        if name not in self.source.entries:
            entries = ", ".join(self.source.entries)
            raise ValueError(f"name={name!r} is no entry of {self.source.name}; it has {entries}")
        kernel = _Kernel.in_dll(self._library, f"cupyflash_kernel_{name}")
        return Function(name, kernel, self._runtime, self.options)


class Function:
    """A kernel that can be launched."""

    def __init__(self, name: str, kernel: _Kernel, runtime: ctypes.CDLL, options: Options) -> None:
        self.name = name
        self._kernel = kernel
        self._runtime = runtime
        self._options = options

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        options: Options | None = None,
        observed: list[Observation] | None = None,
    ) -> Counters:
        """Runs the kernel to its end.

        Parameters
        ----------
        grid
            1 to 3 numbers of blocks.
        block
            the number of threads, a multiple of 32; further dimensions are 1.
        args
            NumPy arrays (their data pointer is passed), NumPy scalars (passed as they are,
            structured ones by value), int (as a 64-bit integer), float (as a double), None (a null
            pointer).
        shared_mem
            bytes of dynamic shared memory.
        options
            instead of the module's.
        observed
            gets what the kernel's threads show, a thread's observations in order; without it they cost nothing.

        Raises
        ------
        EmulatorError
            the kernel is wrong, or cannot be launched like this.
        TypeError, ValueError
            an argument is of the wrong kind, number or size.
        """
        if len(block) == 0 or any(size != 1 for size in block[1:]):
            raise ValueError(f"block={tuple(block)}: kernels run in one dimension of threads, (n,)")
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid={tuple(grid)} has {len(grid)} dimensions; expected 1 to 3")
        if any(not 0 <= size < 2**31 for size in grid):
            raise ValueError(f"grid={tuple(grid)}: every number of blocks is between 0 and 2**31 - 1")
        values = [_pack(self.name, index, value) for index, value in enumerate(args)]
        expected = [int(self._kernel.argument_bytes[i]) for i in range(self._kernel.num_arguments)]
        if len(values) != len(expected):
            raise ValueError(f"{self.name} takes {len(expected)} arguments, args has {len(values)}")
        for index, (value, size) in enumerate(zip(values, expected, strict=True)):
            if ctypes.sizeof(value) != size:
                raise ValueError(
                    f"{self.name}: args[{index}] is {args[index]!r} of {ctypes.sizeof(value)} bytes, "
                    f"the kernel's parameter has {size}"
                )
        options = options or self._options
        launch_options = _LaunchOptions(
            seed=options.seed,
            schedule=_SCHEDULES.index(options.schedule),
            race_detector=options.race_detector,
            late_landing=options.late_landing,
            counters=options.counters,
            workers=options.workers,
        )
        stop = ctypes.c_int32(0)
        launch_options.stop = ctypes.pointer(stop)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        numbers = (ctypes.c_uint64 * _NUM_COUNTERS)()
        chunks: list[bytes] = []
        observer = _Observer(lambda data, size: chunks.append(ctypes.string_at(data, size)))
        report = ctypes.create_string_buffer(_REPORT_BYTES)
        failed = _call_with_ear_for_signals(
            self._runtime.cupyflash_emulator_launch,
            stop,
            ctypes.byref(self._kernel),
            (ctypes.c_uint32 * 3)(*grid, *([1] * (3 - len(grid)))),
            ctypes.c_uint32(block[0]),
            ctypes.c_uint32(shared_mem),
            pointers,
            ctypes.byref(launch_options),
            numbers,
            _Observer() if observed is None else observer,
            report,
            ctypes.c_size_t(_REPORT_BYTES),
        )
        if failed:
            raise EmulatorError(report.value.decode(errors="replace"))
        if observed is not None:
            observed.extend(observation for chunk in chunks for observation in _observations(chunk))
        traffic = (Traffic(*numbers[i : i + 3]) for i in range(_NUM_SCALARS, _NUM_COUNTERS, 3))
        blocks, switches, collectives, mma, wgmma, bulk = numbers[:_NUM_SCALARS]
        return Counters(blocks, switches, collectives, mma, wgmma, bulk, *traffic)


def _observations(chunk: bytes) -> Iterator[Observation]:
    start = 0
    while start < len(chunk):
        size, block, thread, event = _OBSERVATION.unpack_from(chunk, start)
        start += _OBSERVATION.size + size
        yield Observation(event.rstrip(b"\0").decode(), block, thread, chunk[start - size : start])


def _call_with_ear_for_signals(function: Callable[..., int], stop: ctypes.c_int32, *arguments: Any) -> int:
    """What the function of the runtime returns.  Ctrl-C sets `stop`, and is raised when the function has come back.

    Signals are handled between steps of Python in the main thread, which a call of many seconds is none of: so another
    thread makes it.
    """
    if threading.current_thread() is not threading.main_thread():
        return function(*arguments)
    failed: list[int] = []
    busy = threading.Lock()

    def work() -> None:
        with busy:
            if not stop.value:
                failed.append(function(*arguments))

    thread = threading.Thread(target=work, name="cupyflash-emulator", daemon=True)

    def wait() -> None:
        try:
            thread.start()
        except RuntimeError:  # no thread is started any more: a call from atexit, say
            work()
        else:
            thread.join()

    def settle() -> None:
        if not failed:
            stop.value = 1
        with busy:
            pass

    settle_after(wait, settle)
    return failed[0]


def _pack(name: str, index: int, value: Any) -> ctypes.Array[ctypes.c_char]:
    """The bytes that a kernel's parameter gets."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.dtype.type is np.void):
        data = value.tobytes()  # of an array of raw bytes too: a parameter block
    elif isinstance(value, np.ndarray):
        data = value.ctypes.data.to_bytes(8, "little")
    elif value is None:
        data = bytes(8)
    elif isinstance(value, int):  # bool too, as CuPy does
        data = np.int64(value).tobytes()
    elif isinstance(value, float):
        data = np.float64(value).tobytes()
    else:
        raise TypeError(
            f"{name}: args[{index}] is a {type(value).__name__}; expected a NumPy array or scalar, int, float or None"
        )
    return (ctypes.c_char * len(data)).from_buffer_copy(data)


class _GuardedMemory:
    """Owns one allocation of the runtime; NumPy reaches it through the array interface."""

    def __init__(self, library: ctypes.CDLL, address: int, num_bytes: int) -> None:
        self._library = library
        self._address = address
        self.__array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
        }

    def __del__(self) -> None:
        self._library.cupyflash_emulator_free(self._address)


def guarded_array(
    shape: int | Sequence[int],
    dtype: np.typing.DTypeLike,
    name: str,
    *,
    flush: str = "end",
    alignment: int | None = None,
) -> np.ndarray[Any, Any]:
    """An array of zeros between inaccessible pages, so that what a kernel does outside it is reported with
    its name.

    Parameters
    ----------
    shape
        of the array, in C order.
    dtype
        of the array.
    name
        what reports call it.
    flush
        "end": the first byte after the array is inaccessible; "start": the last one before it.
    alignment
        of the first element, in bytes, a power of two up to 4096; None: 16, or the element's
        own size where that would leave room between the array and its end.

    Raises
    ------
    MemoryError
        there is none.
    """
    if flush not in ("start", "end"):
        raise ValueError(f"flush={flush!r}; expected 'start' or 'end'")
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if alignment is None:
        alignment = 16 if num_bytes % 16 == 0 else dtype.itemsize & -dtype.itemsize
    _, library = _default_runtime()
    address = library.cupyflash_emulator_allocate(num_bytes, alignment, flush == "start", name.encode())
    if address is None:
        raise MemoryError(f"no memory for array {name!r} of {num_bytes} bytes")
    memory = np.asarray(_GuardedMemory(library, address, num_bytes))
    return memory.view(dtype).reshape(shape)


def guarded_copy(array: np.ndarray[Any, Any], name: str, *, flush: str = "end") -> np.ndarray[Any, Any]:
    """A copy of ``array`` in C order in a `guarded_array`."""
    copy = guarded_array(array.shape, array.dtype, name, flush=flush)
    copy[...] = array
    return copy
