"""Kernels compiled for a GPU, on any machine that has NVRTC: no GPU, no driver, no CuPy.

NVRTC is called directly, not through CuPy, which cannot ask for ``sm_90a`` and does not hash included
headers.  A cubin is
asked for rather than PTX: PTX "compiles" even what the assembler will refuse.
"""

from __future__ import annotations

import collections
import ctypes
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cupyflash.build.cache import Cache, digest
from cupyflash.build.source import KernelSource
from cupyflash.errors import KernelCompileError, Unsupported

__all__ = ["Binary", "Resources", "compile_cubin", "compile_ptx", "nvrtc_path", "nvrtc_version", "read_cubin"]

_CUBIN_OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")
_PTX_OPTIONS = ("--std=c++17", "-default-device")


@dataclass(frozen=True)
class Resources:
    """What one entry of a cubin takes.

    Attributes
    ----------
    registers
        per thread.
    stack_bytes
        local memory per thread.  Not 0 means that an array is indexed by a variable, or spilled.
    spill_stores, spill_loads
        bytes of it that are spilled registers.
    shared_bytes
        static shared memory.
    opcodes
        how many of each instruction the code has; only those of `OPCODES` are told apart.
    instructions
        how many it has of all kinds, but for those that do nothing.
    """

    registers: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    opcodes: Mapping[str, int] = field(hash=False)
    instructions: int


@dataclass(frozen=True)
class Binary:
    """A compiled source.

    Attributes
    ----------
    path
        of the cubin, for ``cupy.RawModule(path=...)``.
    log
        the compiler's.
    resources
        by entry.
    notices
        lines of the log that say the code is not what was meant: spills, serialised wgmma, ignored
        requests.
    """

    path: Path
    log: str
    resources: Mapping[str, Resources] = field(hash=False)
    notices: tuple[str, ...]


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that is installed.

    Raises
    ------
    Unsupported
        there is none.
    """
    return _nvrtc().version


def nvrtc_path() -> str:
    """The library's file.  Raises as `nvrtc_version`."""
    return _nvrtc().path


def compile_cubin(source: KernelSource, arch: str, cache: Cache) -> Binary:
    """Compiles for one architecture, or finds the result of an earlier time.

    Parameters
    ----------
    source
        a flattened translation unit.
    arch
        ``"sm_80"``, ``"sm_90a"``, ...
    cache
        where the cubin and the log are kept.

    Raises
    ------
    Unsupported
        there is no NVRTC.
    KernelCompileError
        it refused; ``.log`` is its output, with lines of the original files.
    """
    nvrtc = _nvrtc()
    options = (f"-arch={arch}", *_CUBIN_OPTIONS)
    key = digest("cubin", str(nvrtc.version), *options, source.text)

    def build(workplace: Path) -> None:
        cubin, log = nvrtc.compile(source, options, "CUBIN")
        (workplace / "kernel.cubin").write_bytes(cubin)
        (workplace / "log.json").write_text(json.dumps(log), encoding="utf-8")

    entry = cache.get(key, build)
    log = json.loads((entry / "log.json").read_text(encoding="utf-8"))
    path = entry / "kernel.cubin"
    return Binary(path, log, _resources(path.read_bytes(), log), _notices(log))


def compile_ptx(source: KernelSource, arch: str) -> str:
    """The PTX of a source, for reading; ``arch`` is ``"compute_80"``, ...  Raises as `compile_cubin`."""
    ptx, _ = _nvrtc().compile(source, (f"-arch={arch}", *_PTX_OPTIONS), "PTX")
    return ptx.rstrip(b"\0").decode()


@lru_cache(maxsize=1)
def _nvrtc() -> _Nvrtc:
    try:
        # Finds the wheels' library and loads what it needs beside it; a plain CDLL misses its builtins.
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ImportError:
        reason = "cuda-pathfinder is not installed"
    else:
        try:
            path = load_nvidia_dynamic_lib("nvrtc").abs_path
            return _Nvrtc(ctypes.CDLL(path), path)
        except DynamicLibNotFoundError:
            reason = "NVRTC is not installed"
    raise Unsupported(f"kernels cannot be compiled: {reason}; pip install 'cupyflash[nvrtc]'", {"cuda": [reason]})


class _Nvrtc:
    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._library, self.path = library, path
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def compile(self, source: KernelSource, options: Sequence[str], kind: str) -> tuple[bytes, str]:
        """The compiled text, of kind CUBIN or PTX, and the log."""
        program = ctypes.c_void_p()
        text, name = source.text.encode(), f"{source.name}.cu".encode()
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), array)
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status != 0:
                reason = self._library.nvrtcGetErrorString(status).decode()
                raise KernelCompileError(f"NVRTC could not compile {source.name} ({reason})", log=log)
            return self._get(program, kind), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw[: size.value]

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"NVRTC: {self._library.nvrtcGetErrorString(status).decode()}")


# ------------------------------------------------------------------------------------------------------------
# Reading cubins and logs

# An instruction is 16 bytes; the low 9 bits of the first two name it, whatever form its operands have. Read
# off nvdisasm 13 on sm_75 to sm_120; a test compares the counts with nvdisasm's.
OPCODES = {
    # Tensor cores; matrices between shared memory and registers.
    0x03C: "HMMA",
    0x03B: "LDSM",
    0x044: "STSM",
    # Hopper: wgmma, bulk copies of tiles, setmaxnreg.
    0x1F0: "HGMMA",
    0x1B4: "UTMALDG",
    0x1B5: "UTMASTG",
    0x1C8: "USETMAXREG",
    # Arithmetic in float32 and float64; MUFU: exp2, log2, reciprocal; F2FP: two floats rounded to 16 bits each.
    0x020: "FMUL",
    0x021: "FADD",
    0x023: "FFMA",
    0x009: "FMNMX",
    0x076: "FMNMX3",
    0x028: "DMUL",
    0x029: "DADD",
    0x02B: "DFMA",
    0x108: "MUFU",
    0x03E: "F2FP",
    # Global memory, to registers and to shared memory; shared memory; local memory, which nothing should use.
    0x181: "LDG",
    0x186: "STG",
    0x1AE: "LDGSTS",
    0x184: "LDS",
    0x188: "STS",
    0x183: "LDL",
    0x187: "STL",
    # Between threads.
    0x11D: "BAR",
    0x189: "SHFL",
}
_NOP = 0x118  # fills up the end of the code

_SECTION = struct.Struct("<IIQQQQIIQQ")
_INFO_HEADER = struct.Struct("<BBH")
_INFO_WITH_SIZE = 4  # the third field is the size of what follows; otherwise it is the value itself
_INFO_REGISTERS = 0x2F
_INFO_MIN_STACK = 0x12


def read_cubin(cubin: bytes) -> dict[str, dict[str, int | dict[str, int]]]:
    """registers, stack_bytes, shared_bytes and opcodes of each entry, from the ELF file itself.

    Raises
    ------
    ValueError
        it is not a 64-bit ELF file.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: it does not begin like a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names_index = struct.unpack_from("<HH", cubin, 60)
    sections = [_SECTION.unpack_from(cubin, table + i * _SECTION.size) for i in range(count)]

    def string(section: int, offset: int) -> str:
        start = sections[section][4] + offset
        return cubin[start : cubin.index(b"\0", start)].decode()

    def body(section: tuple[int, ...]) -> bytes:
        return cubin[section[4] : section[4] + section[5]]

    named = {string(names_index, section[0]): section for section in sections}
    symbols = named[".symtab"]
    symbol_names = [string(symbols[6], name) for (name,) in struct.iter_unpack("<I20x", body(symbols))]
    entries: dict[str, dict[str, int | dict[str, int]]] = {}
    for name, section in named.items():
        if not name.startswith(".text."):
            continue
        words = [word & 0x1FF for (word,) in struct.iter_unpack("<H14x", body(section))]
        opcodes = collections.Counter(OPCODES[word] for word in words if word in OPCODES)
        shared = named.get(f".nv.shared.{name[len('.text.') :]}")
        entries[name[len(".text.") :]] = {
            "registers": 0,
            "stack_bytes": 0,
            "shared_bytes": shared[5] if shared else 0,
            "opcodes": dict(opcodes),
            "instructions": sum(word != _NOP for word in words),
        }
    info = body(named[".nv.info"])
    position = 0
    while position < len(info):
        form, attribute, value = _INFO_HEADER.unpack_from(info, position)
        position += _INFO_HEADER.size
        if form != _INFO_WITH_SIZE:
            continue
        if attribute in (_INFO_REGISTERS, _INFO_MIN_STACK):
            symbol, number = struct.unpack_from("<II", info, position)
            if symbol_names[symbol] in entries:
                what = "registers" if attribute == _INFO_REGISTERS else "stack_bytes"
                entries[symbol_names[symbol]][what] = number
        position += value
    return entries


def _resources(cubin: bytes, log: str) -> dict[str, Resources]:
    spills: dict[str, tuple[int, int]] = {}
    entry = ""
    for line in log.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            entry = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills[entry] = (int(match[1]), int(match[2]))
    resources = {}
    for name, found in read_cubin(cubin).items():
        stores, loads = spills.get(name, (0, 0))
        resources[name] = Resources(spill_stores=stores, spill_loads=loads, **found)  # type: ignore[arg-type]
    return resources


def _notices(log: str) -> tuple[str, ...]:
    # C7508 to C7519: setmaxnreg ignored, wgmma serialised and the like. C7519, an inserted fence, is
    # harmless.
    pattern = re.compile(r"\(C75\d\d\)|warning|Potential Performance Loss|ignored", re.IGNORECASE)
    return tuple(line.strip() for line in log.splitlines() if pattern.search(line) and "(C7519)" not in line)
