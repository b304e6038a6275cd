"""The `cuda` backend without a GPU: what it compiles, loads and launches, told by a stand-in for CuPy.

Each launch is compared with the emulator's launch of the same arrays: grid, block, shared memory and every byte of the
parameters.  What the kernel then does is the emulator's tests' matter.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from types import CellType, FunctionType
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import cuda, emulated, emulator
from cupyflash.backends.tensormap import emulated_map
from cupyflash.build import rendering
from cupyflash.build.cache import Cache, default_cache
from cupyflash.build.nvrtc import compile_cubin
from cupyflash.build.params import FWD_PARAMS, MERGE_PARAMS, Block, fields_of
from cupyflash.build.rendering import render_kernel
from cupyflash.plan.device import DEVICES, EMULATOR, DeviceSpec
from cupyflash.plan.specs import FwdSpec, KernelSpec
from cupyflash.plan.tiles import TileConfig
from cupyflash.testing import DTYPES, Case, random_case
from tests import cupy_stand_in
from tests.cases import KERNELS, heads
from tests.conftest import Require
from tests.cupy_stand_in import Array, ArrayElsewhere, Device, Gpu, Launch
from tests.fuzz.test_emulator_backend import REFUSED


@pytest.fixture(autouse=True)
def nvrtc(require: Require) -> Any:
    from cupyflash.build.nvrtc import nvrtc_version

    try:
        return require("nvrtc", nvrtc_version(), "")
    except cupyflash.Unsupported as error:
        return require("nvrtc", None, str(error))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU that chooses the kernels that the emulator chooses."""
    return install(monkeypatch, EMULATOR)


def install(monkeypatch: pytest.MonkeyPatch, spec: Any) -> Gpu:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    module = cupy_stand_in.make_module(spec)
    monkeypatch.setitem(sys.modules, "cupy", module)
    gpu: Gpu = module.gpu
    return gpu


def on_gpu(arguments: dict[str, Any], kind: Any = Array) -> dict[str, Any]:
    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        if isinstance(x, FunctionType):
            found = {name: moved(value) for name, value in x.__globals__.items() if name in x.__code__.co_names}
            cells = tuple(CellType(moved(cell.cell_contents)) for cell in x.__closure__ or ())
            return FunctionType(x.__code__, found, x.__name__, x.__defaults__, cells)
        return kind(x) if isinstance(x, np.ndarray) else x

    return {name: moved(x) for name, x in arguments.items()}


def call(lengths: tuple[int, int] = (70, 90), **more: Any) -> dict[str, Any]:
    return heads(1, 2, *lengths, 64, dtype="float16", **more).arguments()


def emulated_launch(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(name, grid, block, parameters, those of mods, shared memory) of the emulator's launches, which do not run."""
    met: list[tuple[Any, ...]] = []

    class Recorder:
        def __init__(self, spec: KernelSpec) -> None:
            self.name, self.structure = rendering.entry_of(spec), rendering.structures_of(spec)[0]

        def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, options: emulator.Options) -> None:
            params, *mods = args
            met.append(
                (
                    self.name,
                    grid,
                    block,
                    fields_of(params, self.structure),
                    b"".join(one.tobytes() for one in mods),
                    shared_mem,
                )
            )

    with monkeypatch.context() as patch:
        patch.setattr(emulated, "_kernel", Recorder)
        cupyflash.attention(**arguments, backend="emulator")
    return met


def check_launches(case: Case, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments()
    shape = (*case.batch_shape, case.query_shape[-2], case.value_shape[-1])
    arguments["out"] = np.empty(shape, arguments["query"].dtype)
    gpu.launches.clear()
    cupyflash.attention(**on_gpu(arguments))
    expected = emulated_launch(arguments, monkeypatch)
    assert len(gpu.launches) == len(expected)
    for launch, (name, grid, block, params, mods, shared_mem) in zip(gpu.launches, expected, strict=True):
        assert (launch.name, launch.grid, launch.block, launch.shared_mem) == (name, grid, block, shared_mem)
        assert launch.mods == mods
        met = np.frombuffer(launch.params, params.dtype)[0]
        for field in params.dtype.names or ():
            if field in ("partial_out", "partial_lse", "weights", "summary"):  # each call makes its own
                assert (met[field] != 0) == (params[field] != 0)
            elif field == "lse":
                has_lse = case.return_lse or case.return_weights
                assert (met[field] != 0) == has_lse == (params[field] != 0)
            elif field in ("q", "k", "v", "out"):
                check_tensor(met[field], params[field])
            elif field == "scores":
                check_scores(met[field], params[field])
            else:
                assert (met[field] == params[field]).all(), field


def check_scores(met: np.void, expected: np.void) -> None:
    for name in met.dtype.names or ():
        if name in ("summary", "mod_marks"):
            assert (met[name]["data"] != 0) == (expected[name]["data"] != 0)
            assert all((met[name][step] == expected[name][step]).all() for step in met[name].dtype.names[1:])
        else:
            assert (met[name] == expected[name]).all(), name


def check_tensor(met: np.void, expected: np.void) -> None:
    for name in ("batch_strides", "head_stride", "row_stride"):
        assert (met[name] == expected[name]).all(), name
    assert met["data"] != 0


@pytest.mark.parametrize("name", KERNELS)
def test_a_launch_is_that_of_the_emulator(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    check_launches(KERNELS[name], gpu, monkeypatch)


SLOPES = np.array([0.5, 0.25], np.float32)


def test_mods_are_the_second_parameter(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays that they look up are found by address, as the emulator's are."""
    for score_mod, mask_mod in (("look_up", "document"), ("look_up", None), (None, "checkers")):
        check_launches(
            heads(1, 2, 70, 200, 64, dtype="float16", score_mod=score_mod, mask_mod=mask_mod), gpu, monkeypatch
        )
        assert all(len(launch.mods) > 16 for launch in gpu.launches) == (score_mod is not None)
        assert [launch.name for launch in gpu.launches] == [
            *["flash_mod_summary"] * (mask_mod is not None),
            "flash_fwd_sm80",
        ]


def test_a_mod_looks_up_arrays_of_the_query_s_library_and_device(gpu: Gpu) -> None:
    slopes = SLOPES.copy()
    for kind, error, words in (
        (lambda array: array, TypeError, "must look up cupy arrays as query is one, but one was a numpy array"),
        (ArrayElsewhere, ValueError, "on the device of query, stand-in device 0, but one was on stand-in device 1"),
    ):
        looked_up = kind(slopes)
        with pytest.raises(error, match=words):
            cupyflash.attention(**on_gpu(call()) | {"score_mod": lambda score, b, h, i, j, x=looked_up: score - x[h]})
    assert not gpu.launches
    looked_up = Array(slopes)
    with pytest.raises(TypeError, match="must look up numpy arrays as query is one, but one was a "):
        cupyflash.attention(
            **call() | {"score_mod": lambda score, b, h, i, j: score - looked_up[h]}, backend="emulator"
        )


def test_a_mod_that_cannot_be_traced_says_where_it_can_run(gpu: Gpu) -> None:
    with pytest.raises(cupyflash.Unsupported, match="decides an `if`") as caught:
        cupyflash.attention(**on_gpu(call()) | {"score_mod": lambda score, b, h, i, j: score if i > j else -score})
    assert f"{__file__}:" in str(caught.value)
    assert 'backend="math"' in str(caught.value)
    assert not gpu.launches


@pytest.mark.parametrize("seqlen_q", [1, 200])
def test_launches_for_weights_are_those_of_the_emulator(
    seqlen_q: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for return_lse in (False, True):
        case = heads(2, 3, seqlen_q, 900, 64, return_weights=True, return_lse=return_lse, dtype="float16")
        check_launches(case, gpu, monkeypatch)
        assert gpu.launches[-1].name == "flash_weights"


@pytest.mark.parametrize(
    ("stage", "names"), [("raw", ["weights"]), ("biased", ["weights"]), ("softmax", ["fwd_sm80", "weights"])]
)
def test_scores_need_no_forward_pass(stage: str, names: list[str], gpu: Gpu) -> None:
    arguments = on_gpu(heads(1, 2, 70, 90, 64, dtype="float16").score_arguments())
    scores = cupyflash.attention_weights(**arguments, stage=stage)
    assert scores.shape == (1, 2, 70, 90)
    assert scores.dtype == (np.float16 if stage == "softmax" else np.float32)
    assert [launch.name for launch in gpu.launches] == [f"flash_{name}" for name in names]
    met = [np.frombuffer(launch.params, FWD_PARAMS)[0] for launch in gpu.launches]
    assert len({int(params["lse"]) for params in met}) == 1, "weights read what the forward pass left"
    assert (met[-1]["lse"] != 0) == (stage == "softmax")


def test_pointers_are_those_of_the_arrays(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no operand is copied, all bytes are equal."""
    arguments = call(return_lse=False)
    arguments["query"] = arguments["query"][..., ::-1, :]
    arguments["out"] = np.empty((1, 2, 70, 64), np.float16)
    cupyflash.attention(**on_gpu(arguments))
    ((*_, params, _, _),) = emulated_launch(arguments, monkeypatch)
    (launch,) = gpu.launches
    assert launch.params == params.tobytes()
    met = np.frombuffer(launch.params, params.dtype)[0]
    for field, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        assert met[field]["data"] == arguments[name].ctypes.data
    assert met["q"]["row_stride"] == -64


@pytest.mark.parametrize("seed", range(30))
def test_random_launches(seed: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(np.random.default_rng(seed), dtype="float16", **REFUSED)
    names = ("query_shape", "key_shape", "value_shape")
    check_launches(replace(case, **{name: (*getattr(case, name)[:-1], 64) for name in names}), gpu, monkeypatch)


def test_the_current_stream_and_the_arrays_device(gpu: Gpu) -> None:
    arguments = call()
    cupyflash.attention(**on_gpu(arguments))
    with gpu.on_stream("mine"):
        cupyflash.attention(**on_gpu(arguments, ArrayElsewhere))
    assert [(launch.device, launch.stream) for launch in gpu.launches] == [(0, "null"), (1, "mine")]
    assert Device.current == 0


@pytest.mark.parametrize("backend", ["cuda", "math"])
def test_results_are_on_the_arrays_device(gpu: Gpu, backend: str) -> None:
    """Which need not be the current one."""
    arguments = on_gpu(call(), ArrayElsewhere) | {"return_lse": True, "return_weights": True, "backend": backend}
    assert [array.device.id for array in cupyflash.attention(**arguments)] == [1, 1, 1]
    assert Device.current == 0


def test_a_kernel_is_loaded_once_for_each_device(gpu: Gpu) -> None:
    arguments = call()
    for kind in (Array, ArrayElsewhere, Array, ArrayElsewhere):
        cupyflash.attention(**on_gpu(arguments, kind))
    assert gpu.loaded == [(0, "flash_fwd_sm80"), (1, "flash_fwd_sm80")]


def test_the_cubin_is_the_compilers_for_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(cuda, "driver_map", emulated_map)
    sm80 = FwdSpec("fwd_sm80", "float16", 64, 64, TileConfig(64, 64, 4))
    sm90 = FwdSpec("fwd_sm90", "float16", 64, 64, TileConfig(128, 128, 12, False, 2, exp2_by_fma=8), baseline=90)
    for device, spec, arch in (("A100", sm80, "sm_80"), ("H200", sm90, "sm_90a"), ("RTX 5090", sm80, "sm_120")):
        gpu = install(monkeypatch, DEVICES[device])
        cupyflash.attention(**on_gpu(call()))
        expected = compile_cubin(render_kernel(spec), arch, Cache(tmp_path))
        assert gpu.launches[0].cubin == expected.path.read_bytes()


def test_tensor_maps_are_those_of_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "driver_map", emulated_map)
    gpu = install(monkeypatch, DEVICES["H200"])
    arguments = call(return_lse=False) | {"out": np.empty((1, 2, 70, 64), np.float16)}
    cupyflash.attention(**on_gpu(arguments))
    monkeypatch.setenv("CUPYFLASH_EMULATOR", "device=H200")
    met: list[tuple[Any, ...]] = []
    monkeypatch.setattr(emulated, "_run", lambda launch, args: met.append(args))
    cupyflash.attention(**arguments, backend="emulator")
    (launch,) = gpu.launches
    ((params, *others),) = met
    assert (launch.name, launch.block, len(others)) == ("flash_fwd_sm90", (384,), 1 + 4)
    assert launch.params == params.tobytes()
    assert launch.mods == b"".join(argument.tobytes() for argument in others)


def parts(number: int, dtype: Any = np.float16) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(number)
    outs = [rng.standard_normal((2, 5, 3, 40)).astype(dtype).swapaxes(1, 2) for _ in range(number)]
    return outs, [rng.standard_normal((2, 3, 5)).astype(np.float32) for _ in range(number)]


@pytest.mark.parametrize(("number", "launches"), [(1, 1), (3, 1), (32, 1), (33, 3), (70, 4)])
def test_a_merge_launches_what_the_emulator_launches(
    number: int, launches: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs, lses = parts(number)
    expected: list[tuple[Any, Block]] = []
    with monkeypatch.context() as patch:
        patch.setattr(emulated, "_run", lambda launch, args: expected.append((launch, *args)))
        cupyflash.merge_attention(outs, lses, backend="emulator")
    out, lse = cupyflash.merge_attention(list(map(Array, outs)), list(map(Array, lses)))
    assert isinstance(out, Array)
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (np.float16, (2, 3, 5, 40), np.float32, (2, 3, 5))
    assert len(gpu.launches) == len(expected) == launches
    for met, (launch, params) in zip(gpu.launches, expected, strict=True):
        assert (met.name, met.grid, met.block, met.shared_mem) == ("flash_merge", launch.grid, launch.block, 0)
        assert met.cubin == compile_cubin(render_kernel(launch.spec), EMULATOR.arch, default_cache()).path.read_bytes()
        check_merge_params(np.frombuffer(met.params, MERGE_PARAMS)[0], fields_of(params, MERGE_PARAMS))
    last = np.frombuffer(gpu.launches[-1].params, MERGE_PARAMS)[0]
    assert (last["out"], last["lse"]) == (out.data.ptr, lse.data.ptr)
    first = np.frombuffer(gpu.launches[0].params, MERGE_PARAMS)[0]["parts"][0]
    assert (first["out"], first["lse"]) == (outs[0].ctypes.data, lses[0].ctypes.data)
    assert [str(launch.spec) for launch, _ in expected[-2:]][-1] == ("merge-f16" if number < 33 else "merge-f32-to-f16")


def check_merge_params(met: np.void, expected: np.void) -> None:
    """All but the addresses of what each call makes itself."""
    for field in ("shape", "num_rows", "head_dim_v", "num_parts"):
        assert (met[field] == expected[field]).all(), field
    for field in ("out_strides", "out_column_stride", "lse_strides"):
        assert (met["parts"][field] == expected["parts"][field]).all(), field


def test_a_merge_runs_on_the_current_stream_and_the_arrays_device(gpu: Gpu) -> None:
    outs, lses = parts(2)
    with gpu.on_stream("mine"):
        cupyflash.merge_attention(list(map(ArrayElsewhere, outs)), list(map(ArrayElsewhere, lses)))
    assert [(launch.device, launch.stream) for launch in gpu.launches] == [(1, "mine")]
    with pytest.raises(ValueError, match=r"outs\[1\] must be on outs\[0\]'s device stand-in device 0, but was on .* 1"):
        cupyflash.merge_attention([Array(outs[0]), ArrayElsewhere(outs[1])], list(map(Array, lses)))


def test_merging_needs_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    outs, lses = parts(2, DTYPES["bfloat16"])
    gpu = install(monkeypatch, DEVICES["T4"])
    cupyflash.merge_attention(list(map(Array, outs)), list(map(Array, lses)))
    assert len(gpu.launches) == 1
    install(monkeypatch, replace(DEVICES["T4"], name="V100", cc=(7, 0)))
    with pytest.raises(cupyflash.Unsupported, match=r"it merges on compute capability 7\.5 or later, V100 has 7\.0"):
        cupyflash.merge_attention(list(map(Array, outs)), list(map(Array, lses)))


def test_a_gpu_without_kernels_names_math(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DeviceSpec("V100", (7, 0), 80, 96 << 10, 96 << 10, 6 << 20))
    arguments = heads(1, 2, 70, 90, 64, dtype="bfloat16").arguments()
    with pytest.raises(cupyflash.Unsupported, match=r"no kernel runs on V100.*backend=\"math\""):
        cupyflash.attention(**on_gpu(arguments))


def test_nothing_to_compute_launches_nothing(gpu: Gpu) -> None:
    out, lse = cupyflash.attention(**on_gpu(call((0, 5))))
    assert (out.shape, lse.shape) == ((1, 2, 0, 64), (1, 2, 0))
    assert not gpu.launches


def test_an_out_that_kernels_cannot_write_gets_a_copy(gpu: Gpu) -> None:
    memory = np.full((1, 2, 70, 128), 7, np.float16)
    arguments = on_gpu(call(return_lse=False)) | {"out": Array(memory[..., ::2])}

    def write_threes(launch: Launch) -> None:
        threes = np.full((1, 2, 70, 64), 3, np.float16)
        ctypes.memmove(
            int(np.frombuffer(launch.params, FWD_PARAMS)[0]["out"]["data"]), threes.ctypes.data, threes.nbytes
        )

    gpu.effect = write_threes
    assert cupyflash.attention(**arguments) is arguments["out"]
    met = np.frombuffer(gpu.launches[0].params, FWD_PARAMS)[0]
    assert met["out"]["data"] != memory.ctypes.data
    assert met["out"]["row_stride"] == 64
    assert (memory[..., ::2] == 3).all()
    assert (memory[..., 1::2] == 7).all()


def test_without_nvrtc_the_error_says_what_to_install(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise cupyflash.Unsupported("kernels cannot be compiled: …; pip install 'cupyflash[nvrtc]'", {"cuda": ["…"]})

    monkeypatch.setattr(cuda, "nvrtc_version", missing)
    with pytest.raises(cupyflash.Unsupported, match=r"cuda: kernels cannot be compiled: …; pip install .*") as caught:
        cupyflash.attention(**on_gpu(call()))
    assert 'math: it can run this: pass backend="math"' in str(caught.value)
