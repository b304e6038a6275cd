"""The emulator held to hardware: the ISA layer's tiny kernels on seeded inputs, what a GPU gave, and how to compare.

A GPU's raw outputs are kept, with the inputs they belong to, in ``recorded/<arch>.npz``; ``python -m tests.gpu.record``
writes them.  Where the PTX ISA defines every bit of a result, every bit must agree.  Where it does not:

===============  =====================================================================================================
`ex2_close`      ``ex2.approx.ftz.f32`` promises a relative error of 2⁻²², and zeros, infinities and NaN where the power
                 is one: each side is held to that, so the two may lie 2⁻²¹ apart.
`mma_close`      ``mma`` leaves order, width and rounding of its sums open.  Of 17 terms (16 products and the
                 accumulator) the emulator rounds each float addition to nearest: 17 · 2⁻²⁴ of the sum of magnitudes.
                 Tensor cores align the terms to the largest and cut what sticks out, in one or two blocks: at most
                 20 · 2⁻²³ (Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores").
                 Together less than 2⁻¹⁸ of the sum of magnitudes.  Where all sums are small integers no order or
                 width can matter, so there every bit must agree: that pins the fragments' layout.
`wgmma_close`    The same for each of the steps of ``wgmma``, which add to one accumulator.
`serial_sums`    Atomic additions come in any order: what each lane got must be the sum of those before it in one.
`one_elected`    The PTX ISA leaves open which lane `elect_one` names: one, and the same in each warp.
`same_values`    A NaN may carry another payload; all other values, signs of zeros included, must agree.
===============  =====================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from cupyflash.backends.emulator import guarded_copy
from cupyflash.backends.tensormap import emulated_map
from tests.kernels.harness import probes
from tests.kernels.hopper import OPERAND_SWIZZLE, a_fragments, accumulator_places, operand_offsets, wgmma_operands

Array: TypeAlias = npt.NDArray[Any]
# rule(ours, recorded, inputs) raises AssertionError
Rule: TypeAlias = Callable[[Array, Array, Mapping[str, Array]], None]

RECORDED = Path(__file__).parent / "recorded"
LANES = 32
NOT_WRITTEN = np.uint32(0xFFFFFFFF)  # outputs hold it before a launch


def same_bits(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
    np.testing.assert_array_equal(ours, recorded)


def same_values(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
    nan = np.isnan(recorded.view(np.float32))
    np.testing.assert_array_equal(np.isnan(ours.view(np.float32)), nan)
    np.testing.assert_array_equal(ours[~nan], recorded[~nan])


def one_elected(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
    for who, elected in (("emulator", ours), ("GPU", recorded)):
        warps = elected.reshape(-1, LANES)
        assert (np.isin(warps, (0, 1)).all(1) & (warps.sum(1) == 1)).all(), f"{who}: not one lane of each warp"
        assert (warps == warps[0]).all(), f"{who}: not the same lane in each warp"


def ex2_close(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
    exponent = inputs["in"][:, 0].view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        exact = np.exp2(exponent)
    exact = np.where(exact < 2.0**-126, 0.0, np.where(exact >= 2.0**128, np.inf, exact))
    for who, result in (("emulator", ours), ("GPU", recorded)):
        np.testing.assert_allclose(result.view(np.float32), exact, rtol=2.0**-22, atol=0, err_msg=who)


def gather_mma(a: Array, b: Array, acc: Array) -> tuple[Array, Array, Array, Any]:
    """The matrices that the lanes' fragments stand for, by the PTX ISA's formulas for mma.m16n8k16.

    Parameters
    ----------
    a, b, acc : (32, 8), (32, 4) and (32, 4) arrays
        The elements a0..a7, b0..b3 and c0..c3 of each lane.

    Returns
    -------
    (16, 16), (16, 8) and (16, 8) arrays of float64, and the place of each lane's c0..c3 in the last.
    """
    lane = np.arange(LANES)[:, None]
    group, thread = lane >> 2, lane % 4
    matrix_a, matrix_b, matrix_c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    i = np.arange(8)
    row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    matrix_a[row, thread * 2 + (i & 1) + np.where(i < 4, 0, 8)] = a
    i = np.arange(4)
    matrix_b[thread * 2 + (i & 1) + np.where(i < 2, 0, 8), group + 0 * i] = b
    place_c = (np.where(i < 2, group, group + 8), thread * 2 + (i & 1))
    matrix_c[place_c] = acc
    return matrix_a, matrix_b, matrix_c, place_c


def mma_close(dtype: npt.DTypeLike) -> Rule:
    def rule(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
        words = np.ascontiguousarray(inputs["in"])
        a, b = (np.ascontiguousarray(words[:, columns]).view(dtype) for columns in (slice(4), slice(4, 6)))
        matrix_a, matrix_b, matrix_c, place = gather_mma(a, b, np.ascontiguousarray(words[:, 6:]).view(np.float32))
        bound = 2.0**-18 * (np.abs(matrix_c) + np.abs(matrix_a) @ np.abs(matrix_b))[place]
        exact = (matrix_c + matrix_a @ matrix_b)[place]
        for who, result in (("emulator", ours), ("GPU", recorded)):
            assert (np.abs(result.view(np.float32) - exact) <= bound).all(), f"{who}: far from the exact product"
        apart = np.abs(ours.view(np.float32).astype(np.float64) - recorded.view(np.float32))
        assert (apart <= bound).all(), (
            f"emulator and GPU are {(apart / bound).max() / 2**18:.2e} of the magnitude apart"
        )

    return rule


def wgmma_close(dtype: npt.DTypeLike, n: int, transposed: str, steps: int) -> Rule:
    """Of `steps` products of the same operands, added to zeros."""

    def operand(inputs: Mapping[str, Array], rows: int, start: int, numbers: Array, transposed: bool) -> Array:
        leading, stride, mode = map(int, numbers)
        swizzle = {number: span for span, number in OPERAND_SWIZZLE.items()}[mode]
        offsets = operand_offsets(rows, start, leading, stride, swizzle, transposed)
        elements = np.ascontiguousarray(inputs["shared"]).view(np.uint16)[offsets // 2].view(dtype)
        return elements.astype(np.float64)

    def rule(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
        numbers = inputs["numbers"]
        a = operand(inputs, 64, 0, numbers[1:4], transposed[0] == "t")
        b = operand(inputs, n, int(numbers[0]), numbers[4:7], transposed[1] == "t")
        places = accumulator_places(n)
        exact, bound = steps * (a @ b.T)[places], steps * 2.0**-18 * (np.abs(a) @ np.abs(b).T)[places]
        for who, result in (("emulator", ours), ("GPU", recorded)):
            far = np.abs(result.view(np.float32) - exact) > bound
            assert not far.any(), f"{who}: far from the exact product"
        apart = np.abs(ours.view(np.float32).astype(np.float64) - recorded.view(np.float32))
        assert (apart <= bound).all(), "emulator and GPU are far apart"

    return rule


def serial_sums(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
    added = inputs["in"][:, 0].astype(np.int64)
    for who, before in (("emulator", ours), ("GPU", recorded)):
        order = np.argsort(before, kind="stable")
        expected = np.concatenate([[0], np.cumsum(added[order])[:-1]])
        np.testing.assert_array_equal(before[order], expected, err_msg=f"{who}: no order of additions gives this")


@dataclass(frozen=True)
class TileMap:
    """A tensor map of one of a probe's arrays, which the kernel reaches by it alone.

    Attributes
    ----------
    array : str
        The name of the input or output, whose words are the tensor's float16 elements in C order.
    shape, box, swizzle
        See `cupyflash.backends.tensormap.emulated_map`.
    """

    array: str
    shape: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def make(self, address: int, encode: Callable[..., np.ndarray]) -> np.ndarray:
        """`encode` is `emulated_map` or `driver_map`."""
        strides = tuple(2 * int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape)))
        return encode(address, self.shape, strides, "float16", self.box, self.swizzle)


@dataclass(frozen=True, eq=False)
class Probe:
    """One launch of a tiny kernel.

    Attributes
    ----------
    file, entry : str
        Of the kernel.
    inputs, outputs : dict of str to array of 32-bit words
        The kernel's parameters: first the inputs, then the outputs with what they hold before the launch.
    scalars : tuple of NumPy scalars
        Parameters after those.
    tile_map : TileMap, optional
        The parameter before them all; the array that it stands for is none.
    threads, grid, shared_mem
        Of the launch.
    rules : dict of str to rule
        How to compare an output, other than by `same_bits`.
    arch : int
        The least compute capability, 80 or 90.
    exact : bool
        Runs on no other, and is compiled for ``sm_90a`` and the like.
    """

    file: str
    entry: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    threads: int = LANES
    grid: tuple[int, ...] = (1,)
    shared_mem: int = 0
    rules: Mapping[str, Rule] = field(default_factory=dict)
    arch: int = 80
    exact: bool = False
    scalars: tuple[Any, ...] = ()
    tile_map: TileMap | None = None

    def arguments(
        self, arrays: Mapping[str, Any], address: Callable[[Any], int], encode: Callable[..., np.ndarray]
    ) -> list[Any]:
        """Of the kernel, for inputs and outputs on a device; `address` of an array there."""
        if self.tile_map is None:
            return [*arrays.values(), *self.scalars]
        mapped = arrays[self.tile_map.array]
        others = [array for name, array in arrays.items() if name != self.tile_map.array]
        return [self.tile_map.make(address(mapped), encode), *others, *self.scalars]

    def compare(self, ours: Mapping[str, Array], recorded: Mapping[str, Array], inputs: Mapping[str, Array]) -> None:
        """Raises AssertionError where the emulator does not do what the GPU did."""
        assert set(ours) == set(recorded) == set(self.outputs)
        for name in self.outputs:
            self.rules.get(name, same_bits)(ours[name], recorded[name], inputs)


def run_emulated(probe: Probe, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a launch under the emulator."""
    outputs = {name: guarded_copy(before, name) for name, before in probe.outputs.items()}
    arrays = {**{name: guarded_copy(array, name) for name, array in inputs.items()}, **outputs}
    arguments = probe.arguments(arrays, lambda array: int(array.ctypes.data), emulated_map)
    kernel = probes(probe.file).get_function(probe.entry)
    kernel(probe.grid, (probe.threads,), arguments, shared_mem=probe.shared_mem)
    return {name: np.array(array) for name, array in outputs.items()}


# ------------------------------------------------------------------------------------------------------------
# The probes


def _words(*columns: Array) -> Array:
    """Columns of 32-bit values of any type, one row per lane."""
    return np.stack([np.ascontiguousarray(column).view(np.uint32) for column in columns], axis=1)


def _blank(*shape: int) -> Array:
    return np.full(shape, NOT_WRITTEN)


def _any_word(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def _convert(rng: np.random.Generator) -> dict[str, Probe]:
    lower = rng.standard_normal(LANES) * 2.0 ** rng.integers(-24, 15, LANES)
    # Zeros, infinities, NaN, the largest float16 and what rounds to it and over it, the smallest ones, a float32 that
    # flushes to zero, an exponent whose power does; then ties of both formats.
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2.0**-14, 2.0**-24, 2.0**-25, 1e-40, -130]
    ties = [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    lower[: len(special) + len(ties)] = special + ties
    lower = lower.astype(np.float32)
    both = _words(lower, lower[::-1])

    def rule(ours: Array, recorded: Array, inputs: Mapping[str, Array]) -> None:
        ex2_close(ours[:, 0].copy(), recorded[:, 0].copy(), inputs)
        same_bits(ours[:, 1:], recorded[:, 1:], inputs)

    # Exponents of softmax: at most 0.
    exponents = _words(-np.abs(20 * rng.standard_normal(LANES)).astype(np.float32), lower)
    return {
        f"convert-{name}": Probe(
            "probes.cu", "probe_convert", {"in": inputs}, {"out": _blank(LANES, 4)}, rules={"out": rule}
        )
        for name, inputs in (("special", both), ("softmax", exponents))
    }


def _max() -> Probe:
    """Each of these with itself, and with the first, the second and the third one beside it."""
    special = np.array([0.0, -0.0, np.nan, -np.inf, np.inf, 1.5, -1.5, 1e-40], np.float32)
    inputs = _words(np.tile(special, 4), np.concatenate([np.roll(special, shift) for shift in range(4)]))
    return Probe("probes.cu", "probe_max", {"in": inputs}, {"out": _blank(LANES)})


def _unpack() -> Probe:
    patterns = np.arange(65536, dtype=np.uint32)
    # One lane reads one pattern of its block's 1024: a stride over all of them, so that every exponent is there.
    return Probe(
        "probes.cu",
        "probe_unpack",
        {"in": patterns[:: 65536 // 1024] + np.arange(1024, dtype=np.uint32) % 64},
        {"out": _blank(1024, 2)},
        threads=1024,
        rules={"out": same_values},
    )


def _multiply_add(rng: np.random.Generator) -> Probe:
    a, b, c = rng.standard_normal((3, LANES)).astype(np.float32)
    c[: LANES // 2] = -(a * b)[: LANES // 2]
    words = np.stack([a, b, c], axis=1).view(np.uint32)
    return Probe("probes.cu", "probe_multiply_add", {"in": words}, {"out": _blank(LANES, 1)})


def _mma(rng: np.random.Generator) -> dict[str, Probe]:
    probes = {}
    for name, dtype in (("f16", np.dtype(np.float16)), ("bf16", np.dtype(ml_dtypes.bfloat16))):
        for kind in ("integers", "normal", "cancelling"):
            if kind == "integers":
                a, b, acc = (rng.integers(-8, 9, (LANES, n)) for n in (8, 4, 4))
            else:
                a, b, acc = (rng.standard_normal((LANES, n)) for n in (8, 4, 4))
            if kind == "cancelling":  # magnitudes far apart: what is cut off shows
                a, b = (x * 2.0 ** rng.integers(-6, 7, x.shape) for x in (a, b))
            operands = [np.ascontiguousarray(x.astype(dtype)).view(np.uint32) for x in (a, b)]
            words = np.concatenate([*operands, acc.astype(np.float32).view(np.uint32)], axis=1)
            rules = {} if kind == "integers" else {"out": mma_close(dtype)}
            entry = f"probe_mma_{name}"
            probes[f"mma-{name}-{kind}"] = Probe(
                "probes.cu", entry, {"in": words}, {"out": _blank(LANES, 4)}, rules=rules
            )
    # m16n8k8, of small integers: sums are exact in any order.
    a, b = (rng.integers(-8, 9, (LANES, n)).astype(np.float16) for n in (4, 2))
    acc = rng.integers(-8, 9, (LANES, 4)).astype(np.float32)
    words = np.concatenate([a.view(np.uint32), b.view(np.uint32), acc.view(np.uint32)], axis=1)
    probes["mma-k8"] = Probe("probes.cu", "probe_mma_k8", {"in": words}, {"out": _blank(LANES, 4)})
    return probes


def _stmatrix(rng: np.random.Generator) -> dict[str, Probe]:
    probes = {}
    for suffix in ("x1", "x2", "x4", "x1_trans", "x2_trans", "x4_trans"):
        rows = rng.permutation(64)[:LANES].astype(np.uint32)
        probes[f"stmatrix_{suffix}"] = Probe(
            "probes_sm90.cu",
            f"probe_stmatrix_{suffix}",
            {"in": _any_word(rng, LANES, 4), "rows": rows},
            {"out": _blank(256)},
            shared_mem=1024,
            arch=90,
        )
    return probes


def _tiles(rng: np.random.Generator) -> dict[str, Probe]:
    """Bulk loads and stores: inside, past the end and before the start of an array, in every swizzle."""
    cases = {
        "3-inside": ((3, 20, 64), (1, 16, 64), (1, 0, 0), 128),
        "3-past": ((3, 20, 64), (1, 16, 64), (2, 10, 0), 128),
        "3-before": ((3, 20, 64), (1, 16, 64), (0, -5, -8), 128),
        "3-plain": ((3, 20, 40), (2, 16, 24), (1, 1, 24), 0),
        "4-panel": ((2, 3, 9, 128), (1, 1, 8, 64), (1, 2, 1, 64), 128),
        "4-narrow": ((2, 3, 9, 128), (2, 3, 8, 32), (0, 0, 0, 16), 64),
        "5-narrow": ((2, 2, 3, 9, 64), (2, 1, 3, 8, 16), (0, 1, 0, -3, 8), 32),
    }
    probes = {}
    for name, (shape, box, at, swizzle) in cases.items():
        rank = len(shape)
        num_words = int(np.prod(box)) // 2
        coordinates = np.array(at[::-1], np.int32).view(np.uint32)
        tile_map = TileMap("tensor", shape, box, swizzle)
        tensor = _any_word(rng, int(np.prod(shape)) // 2)
        common: dict[str, Any] = {"scalars": (np.int32(num_words),), "tile_map": tile_map, "arch": 90}
        probes[f"bulk_load-{name}"] = Probe(
            "probes_sm90.cu",
            f"probe_bulk_load_{rank}",
            {"tensor": tensor, "at": coordinates},
            {"out": _blank(num_words)},
            shared_mem=1024 + 4 * num_words,
            **common,
        )
        probes[f"bulk_store-{name}"] = Probe(
            "probes_sm90.cu",
            f"probe_bulk_store_{rank}",
            {"at": coordinates, "in": _any_word(rng, num_words)},
            {"tensor": _blank(tensor.size)},
            shared_mem=4 * num_words,
            **common,
        )
    return probes


def _wgmma(rng: np.random.Generator) -> dict[str, Probe]:
    """Small integers, where every bit must agree, in every layout; random numbers in one of each format."""
    probes = {}
    dtypes = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
    common: dict[str, Any] = {"threads": 128, "arch": 90, "exact": True}
    shapes = [("f16", 64, "nn"), ("f16", 64, "nt"), ("bf16", 64, "tn"), ("bf16", 64, "tt"), ("bf16", 16, "nn")]
    shapes += [("f16", 176, "nn"), ("f16", 256, "nt")]
    layouts = [(128, 0), (128, 1024), (64, 0), (32, 0), (0, 0)]
    for name, n, transposed in shapes:
        for swizzle, gap in layouts:
            for kind in ("integers", "normal"):
                # What is not swizzled is not modelled transposed; one layout is enough for numbers that round.
                if (swizzle == 0 and "t" in transposed) or (kind == "normal" and (swizzle, gap) != (128, 0)):
                    continue
                draw = (lambda *s: rng.integers(-8, 9, s)) if kind == "integers" else lambda *s: rng.standard_normal(s)
                a, b = (draw(rows, 16).astype(dtypes[name]) for rows in (64, n))
                shared, numbers = wgmma_operands(rng, a, b, transposed[0] == "t", transposed[1] == "t", swizzle, gap)
                acc = rng.integers(-8, 9, (128, n // 2)).astype(np.float32)
                integers = kind == "integers"
                label = f"wgmma_ss-{name}-n{n}-{transposed}-{swizzle}{'-apart' if gap else ''}-{kind}"
                probes[label] = Probe(
                    "probes_sm90a.cu",
                    f"probe_wgmma_ss_{name}_n{n}_{transposed}",
                    {"shared": shared.view(np.uint32), "numbers": numbers, "acc": acc.view(np.uint32)},
                    {"out": _blank(128, n // 2)},
                    shared_mem=shared.size,
                    scalars=(np.int32(shared.size // 4), np.uint32(integers)),
                    rules={} if integers else {"out": wgmma_close(dtypes[name], n, transposed, 2)},
                    **common,
                )
    for name, n, transposed in (("f16", 64, "n"), ("f16", 128, "t"), ("bf16", 80, "n"), ("bf16", 64, "t")):
        a, b = (rng.integers(-8, 9, (rows, 16)).astype(dtypes[name]) for rows in (64, n))
        shared, numbers = wgmma_operands(rng, a, b, False, transposed == "t", 128)
        probes[f"wgmma_rs-{name}-n{n}-{transposed}"] = Probe(
            "probes_sm90a.cu",
            f"probe_wgmma_rs_{name}_n{n}_{transposed}",
            {"shared": shared.view(np.uint32), "numbers": numbers, "a": a_fragments(a)},
            {"out": _blank(128, n // 2)},
            shared_mem=shared.size,
            scalars=(np.int32(shared.size // 4),),
            **common,
        )
    return probes


def _sm90(rng: np.random.Generator) -> dict[str, Probe]:
    file = "probes_sm90.cu"
    words = rng.integers(0, 1000, LANES).astype(np.uint32)
    return {
        "elect_one": Probe(
            file, "probe_elect_one", {}, {"out": _blank(64)}, threads=64, arch=90, rules={"out": one_elected}
        ),
        "mbarrier": Probe(
            file, "probe_mbarrier", {"in": words}, {"out": _blank(LANES)}, threads=64, shared_mem=256, arch=90
        ),
        "nanosleep": Probe(file, "probe_nanosleep", {}, {"out": _blank(LANES)}, arch=90),
        **_tiles(rng),
        **_wgmma(rng),
        "setmaxnreg": Probe(
            "probes_sm90a.cu", "probe_setmaxnreg", {}, {"out": _blank(384)}, threads=384, arch=90, exact=True
        ),
    }


def _shuffles(rng: np.random.Generator) -> dict[str, Probe]:
    operands = {"mixed": rng.integers(0, LANES, LANES), **{str(n): np.full(LANES, n) for n in (0, 1, 2, 16, 31)}}
    return {
        f"shuffle-{name}": Probe(
            "probes.cu",
            "probe_shuffle",
            {"in": _words(_any_word(rng, LANES), operand.astype(np.uint32))},
            {"out": _blank(LANES, 6)},
        )
        for name, operand in operands.items()
    }


def _votes() -> dict[str, Probe]:
    return {
        f"vote-{bits:08x}": Probe(
            "probes.cu",
            "probe_vote",
            {"in": (np.uint32(bits) >> np.arange(LANES, dtype=np.uint32)) & np.uint32(1)},
            {"out": _blank(LANES, 3)},
        )
        for bits in (0, 1, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x12345678)
    }


def _atomics(rng: np.random.Generator) -> Probe:
    integers = rng.integers(1, 1000, LANES).astype(np.uint32)
    # Small integers as floats: their sum is exact in any order.  The maximum starts below all of them.
    floats = rng.integers(-1000, 1000, LANES).astype(np.float32)
    totals = np.array([0, 0, 0, np.float32(-np.inf).view(np.uint32)], np.uint32)
    return Probe(
        "probes.cu",
        "probe_atomics",
        {"in": _words(integers, floats)},
        {"totals": totals, "out": _blank(LANES)},
        rules={"out": serial_sums},
    )


def make_probes() -> dict[str, Probe]:
    """All of them, by name; the same inputs every time with one version of NumPy."""
    rng = np.random.default_rng(20)
    sizes = (np.arange(LANES) % 17).astype(np.uint32)
    rows = rng.permutation(64)[:LANES].astype(np.uint32)
    return {
        "identity": Probe("probes.cu", "probe_identity", {}, {"out": _blank(12, 64, 9)}, threads=64, grid=(3, 2, 2)),
        **_convert(rng),
        "max": _max(),
        "unpack": _unpack(),
        **_shuffles(rng),
        "shuffle-double": Probe(
            "probes.cu",
            "probe_shuffle_double",
            {"in": np.concatenate([_any_word(rng, LANES, 2), rng.integers(0, LANES, (LANES, 1), np.uint32)], axis=1)},
            {"out": _blank(LANES, 2)},
        ),
        **_votes(),
        # The eighth word of a lane's output is not written.
        "memory": Probe(
            "probes.cu", "probe_memory", {"in": _any_word(rng, LANES, 8)}, {"out": _blank(LANES, 8)}, shared_mem=1024
        ),
        # The last byte, or half, of a lane's output is not written.
        "halves": Probe("probes.cu", "probe_halves", {"in": _any_word(rng, LANES, 2)}, {"out": _blank(LANES, 2)}),
        "multiply_add": _multiply_add(rng),
        "atomics": _atomics(rng),
        "cp_async": Probe(
            "probes.cu",
            "probe_cp_async",
            {"in": _any_word(rng, LANES, 4), "sizes": sizes},
            {"out": _blank(LANES, 4)},
            shared_mem=512,
        ),
        "ldmatrix": Probe(
            "probes.cu",
            "probe_ldmatrix",
            {"in": _any_word(rng, 64, 4), "rows": rows},
            {"out": _blank(LANES, 14)},
            shared_mem=1024,
        ),
        **_mma(rng),
        "named_barrier": Probe(
            "probes.cu", "probe_named_barrier", {}, {"out": _blank(2, LANES)}, threads=128, shared_mem=512
        ),
        "sync_warp": Probe("probes.cu", "probe_sync_warp", {}, {"out": _blank(LANES)}, shared_mem=128),
        **_stmatrix(rng),
        # The last byte of a lane's output is not written.
        "bytes": Probe("probes.cu", "probe_bytes", {"in": _any_word(rng, LANES, 2)}, {"out": _blank(LANES, 2)}),
        **_sm90(rng),
    }


PROBES = make_probes()


# ------------------------------------------------------------------------------------------------------------
# Recordings


@dataclass(frozen=True, eq=False)
class Recording:
    """What one GPU gave.

    Attributes
    ----------
    arch : str
        ``"sm_90"``.
    versions : dict of str to str
        Of the device, the driver, CuPy and NVRTC.
    inputs, outputs : dict of str to (dict of str to array)
        By the name of the probe and of its parameter.
    """

    arch: str
    versions: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, Array]]
    outputs: Mapping[str, Mapping[str, Array]]


def save_recording(recording: Recording, folder: Path = RECORDED) -> Path:
    """Writes ``<folder>/<arch>.npz``."""
    about = json.dumps({"arch": recording.arch, "versions": dict(recording.versions)})
    arrays: dict[str, Any] = {"about": np.array(about)}
    for kind, launches in (("in", recording.inputs), ("out", recording.outputs)):
        for probe, named in launches.items():
            arrays |= {f"{probe}/{kind}/{name}": array for name, array in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{recording.arch}.npz"
    np.savez_compressed(path, **arrays)
    return path


def load_recording(path: Path) -> Recording:
    """Reads what `save_recording` wrote."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        found: dict[str, dict[str, dict[str, Array]]] = {"in": {}, "out": {}}
        for key in file.files:
            if key != "about":
                probe, kind, name = key.split("/")
                found[kind].setdefault(probe, {})[name] = file[key]
    inputs = {probe: found["in"].get(probe, {}) for probe in found["out"]}
    return Recording(about["arch"], about["versions"], inputs, found["out"])


def probes_of(arch: str) -> dict[str, Probe]:
    """Those that a GPU of this architecture can run."""
    capability = int(arch.removeprefix("sm_").rstrip("a"))
    return {
        name: probe
        for name, probe in PROBES.items()
        if (probe.arch == capability if probe.exact else probe.arch <= capability)
    }
