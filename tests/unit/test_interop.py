"""Arrays of other libraries: the results of NumPy's arrays, bit by bit, in the caller's type; refusals by name.

Libraries that are not installed are skipped.  What is made here needs none: a class with DLPack alone, one with
``__cuda_array_interface__`` alone, and a stand-in for PyTorch's tensors on a GPU, on the stand-in for CuPy.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import cupyflash
from cupyflash import attention, attention_weights, dropout_mask, explain, interop, merge_attention
from tests import cupy_stand_in

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
RNG = np.random.default_rng(11)


def operands(dtype: Any = np.float32) -> list[np.ndarray]:
    """Query, key, value: keys shared by heads, E != Ev."""
    return [RNG.standard_normal(shape).astype(dtype) for shape in ((2, 4, 9, 8), (2, 2, 11, 8), (2, 2, 11, 6))]


# --- a library of nothing but DLPack ---------------------------------------------------------------------


class Tiny:
    """An array that can do nothing but be exchanged."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def __dlpack__(self, **options: Any) -> Any:
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.memory.__dlpack_device__()


class TinyWithNamespace(Tiny):
    def __array_namespace__(self, api_version: str | None = None) -> Any:
        def from_dlpack(array: Any) -> TinyWithNamespace:
            memory = np.from_dlpack(array)
            # NumPy 2.0 reads what DLPack gives as read-only, and gives away nothing that is.
            return TinyWithNamespace(memory if memory.flags.writeable else memory.copy())

        return types.SimpleNamespace(from_dlpack=from_dlpack)


class TinyOnGpu(TinyWithNamespace):
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


# --- how each library's arrays are made ------------------------------------------------------------------


class Library(NamedTuple):
    name: str
    array_type: Callable[[], type]
    make: Callable[[np.ndarray], Any]
    read: Callable[[Any], np.ndarray]
    dtypes: list[Any]


def torch_library() -> Library:
    torch = pytest.importorskip("torch")

    def make(array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def read(tensor: Any) -> np.ndarray:
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Library("torch.Tensor", lambda: torch.Tensor, make, read, DTYPES)


def jax_library() -> Library:
    jax = pytest.importorskip("jax")
    return Library(
        "jax.Array", lambda: jax.Array, jax.numpy.asarray, np.asarray, DTYPES[:3]
    )  # float64 is not its default


def strict_library() -> Library:
    strict = pytest.importorskip("array_api_strict")
    return Library(
        "array_api_strict.Array",
        lambda: type(strict.ones(1)),
        strict.asarray,
        np.from_dlpack,
        [np.float32, np.float64],
    )


def tiny_library() -> Library:
    return Library(
        "tests.TinyWithNamespace",
        lambda: TinyWithNamespace,
        TinyWithNamespace,
        np.from_dlpack,
        [np.float16, np.float32, np.float64],
    )


LIBRARIES = {"torch": torch_library, "jax": jax_library, "array_api_strict": strict_library, "tiny": tiny_library}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]()


def same(found: Any, expected: np.ndarray, library: Library) -> None:
    assert isinstance(found, library.array_type())
    read = library.read(found)
    assert read.dtype == expected.dtype
    np.testing.assert_array_equal(read, expected)


# --- results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_the_callers_type_comes_back_with_the_same_bits(library: Library, dtype: Any) -> None:
    if dtype not in library.dtypes:
        pytest.skip(f"{library.name} has no {np.dtype(dtype).name} by default")
    arrays = operands(dtype)
    options = {"enable_gqa": True, "return_lse": True, "return_weights": True, "is_causal": True}
    found = attention(*map(library.make, arrays), **options)
    for one, expected in zip(found, attention(*arrays, **options), strict=True):
        same(one, expected, library)


def test_every_array_argument_is_read(library: Library) -> None:
    query, key, value = operands()
    extras = {
        "attn_mask": (RNG.standard_normal((9, 11)).astype(np.float32), RNG.random((2, 1, 1, 11)) < 0.7),
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
        "sinks": RNG.standard_normal(4).astype(np.float32),
    }
    made = {
        name: tuple(map(library.make, extra)) if isinstance(extra, tuple) else library.make(extra)
        for name, extra in extras.items()
    }
    found = attention(*map(library.make, (query, key, value)), **made, enable_gqa=True, dropout_p=0.2, seed=5)
    same(found, attention(query, key, value, **extras, enable_gqa=True, dropout_p=0.2, seed=5), library)
    # Two axes only: the results are views of arrays with one head
    found, lse = attention(*(library.make(array[0, 0]) for array in (query, key, value)), return_lse=True)
    expected, expected_lse = attention(*(array[0, 0] for array in (query, key, value)), return_lse=True)
    same(found, expected, library)
    same(lse, expected_lse, library)


def test_companions(library: Library) -> None:
    query, key, value = operands()
    weights = attention_weights(library.make(query), library.make(key), stage="biased", enable_gqa=True, window=(2, 0))
    same(weights, attention_weights(query, key, stage="biased", enable_gqa=True, window=(2, 0)), library)

    parts = [
        attention(query, key[:, :, s], value[:, :, s], enable_gqa=True, return_lse=True)
        for s in (slice(5), slice(5, None))
    ]
    outs, lses = zip(*parts, strict=True)
    merged = merge_attention([library.make(out) for out in outs], [library.make(lse) for lse in lses])
    for found, expected in zip(merged, merge_attention(outs, lses), strict=True):
        same(found, expected, library)


def test_explain_takes_them(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    query, key, value = operands()
    found = explain(*map(library.make, (query, key, value)), enable_gqa=True, device="H200")
    assert capsys.readouterr().out == f"{found}\n"
    assert found.problem == explain(query, key, value, enable_gqa=True, device="H200").problem


def test_score_functions_get_numpy_arrays(library: Library) -> None:
    kinds = set()

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kinds.update(map(type, (score, q_idx)))
        return score - 0.5 * abs(q_idx - kv_idx)

    arrays = operands()
    found = attention(*map(library.make, arrays), enable_gqa=True, score_mod=score_mod)
    assert kinds == {np.ndarray}
    same(found, attention(*arrays, enable_gqa=True, score_mod=score_mod), library)


def test_other_libraries_are_refused_by_name(library: Library) -> None:
    query, key, value = operands()
    made = [library.make(array) for array in (query, key, value)]
    with pytest.raises(TypeError, match=f"key must be a {library.name} like query, but was a numpy.ndarray"):
        attention(made[0], key, made[2])
    with pytest.raises(TypeError, match=rf"attn_mask\[1\] must be a {library.name} like query, but was a numpy"):
        attention(*made, attn_mask=(library.make(value[0, 0]), np.ones((9, 11), bool)))
    with pytest.raises(TypeError, match=r"key must be a NumPy array like query, but was a \w+\.\w+"):
        attention(query, made[1], value)
    with pytest.raises(TypeError, match=rf"lses\[0\] must be a {library.name} like outs, but was a numpy.ndarray"):
        merge_attention([made[0]], [query[..., 0]])
    with pytest.raises(TypeError, match=r"lses\[0\] must be a NumPy array like outs\[0\], but was a \w+\.\w+"):
        merge_attention([query], [made[0]])


def test_what_is_no_array_is_said_to_be_none(library: Library) -> None:
    query, _, value = map(library.make, operands())
    for key in (None, [[1.0]]):
        with pytest.raises(TypeError, match="key must be an array of NumPy, CuPy or a library with DLPack, but was"):
            attention(query, key, value)


# --- PyTorch on the host ---------------------------------------------------------------------------------


def test_torch_memory_is_read_and_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    seen: list[Any] = []
    normalize = sys.modules["cupyflash.api"].normalize

    def spy(*args: Any, **options: Any) -> Any:
        given = inspect.signature(normalize).bind(*args, **options).arguments
        seen[:] = (given[name] for name in ("query", "key", "value", "out"))
        return normalize(*args, **options)

    monkeypatch.setattr("cupyflash.api.normalize", spy)
    for dtype in (torch.float32, torch.bfloat16):
        # As models hold them: (batch, length, heads, dim), heads swapped to the front
        query, key, value, out = (torch.randn(2, 9, 4, 8).to(dtype).transpose(1, 2) for _ in range(4))
        assert attention(query, key, value, out=out) is out
        for view, tensor in zip(seen, (query, key, value, out), strict=True):
            assert view.ctypes.data == tensor.data_ptr()
            assert view.shape == tensor.shape
            assert view.strides == tuple(stride * tensor.itemsize for stride in tensor.stride())
        assert torch.equal(out, attention(query, key, value))


def test_torch_refusals_say_what_to_do() -> None:
    torch = pytest.importorskip("torch")
    plain = torch.randn(3, 4)
    asking = plain.clone().requires_grad_()
    with pytest.raises(
        TypeError, match=r"key must not require gradients.*pass key\.detach\(\), or call under torch.no_grad"
    ):
        attention(plain, asking, plain)
    with torch.no_grad():
        assert torch.equal(attention(asking, asking, asking), attention(plain, plain, plain))
    with pytest.raises(
        TypeError, match=r"query must be on a device of type cpu or cuda, but was on meta: pass query\.cpu"
    ):
        attention(plain.to("meta"), plain, plain)
    with pytest.raises(ValueError, match="key must be on the first tensor's device cpu, but was on meta"):
        attention(plain, plain.to("meta"), plain)
    with pytest.raises(TypeError, match=r"value must be a dense tensor.* of layout torch.sparse_coo.*to_dense"):
        attention(plain, plain, plain.to_sparse())
    with pytest.raises(TypeError, match=r"query must be float16, bfloat16, float32 or float64.*but was int64"):
        attention(plain.long(), plain.long(), plain.long())
    with pytest.raises(ValueError, match="out must have shape"):
        attention(plain, plain, plain, out=torch.empty(3, 5))
    with pytest.raises(ValueError, match="out must not share memory with query"):
        attention(plain, plain, plain, out=plain)


def test_torch_parameters_and_seeds() -> None:
    torch = pytest.importorskip("torch")
    query = torch.nn.Parameter(torch.randn(5, 8), requires_grad=False)
    assert type(attention(query, query, query)) is torch.Tensor
    seed = torch.tensor([2024], dtype=torch.uint64)
    np.testing.assert_array_equal(dropout_mask((5, 5), 0.5, seed), dropout_mask((5, 5), 0.5, 2024))
    found = attention(query, query, query, dropout_p=0.5, seed=seed)
    assert torch.equal(found, attention(query, query, query, dropout_p=0.5, seed=2024))


# --- JAX -------------------------------------------------------------------------------------------------


def test_jax_refusals_say_what_to_do() -> None:
    jax = pytest.importorskip("jax")
    array = jax.numpy.ones((3, 4))
    with pytest.raises(TypeError, match="out must be None with JAX, whose arrays can't be written"):
        attention(array, array, array, out=array)
    for transformation in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(TypeError, match=r"query must have its values, but was traced.*jax.pure_callback"):
            transformation(lambda x: attention(x, x, x))(array[None])


# --- protocols -------------------------------------------------------------------------------------------


def test_dlpack_alone_can_be_read_but_not_made() -> None:
    query = Tiny(np.ones((3, 4), np.float32))
    with pytest.raises(
        TypeError, match=r"query must be of a library that can take the results back, but was a tests.Tiny"
    ):
        attention(query, query, query)
    with pytest.raises(TypeError, match=r"pass numpy\.from_dlpack\(query\)"):
        attention(query, query, query)


def test_dlpack_with_the_packages_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no namespace, the package of the type may have from_dlpack."""
    monkeypatch.setattr(sys.modules["tests"], "from_dlpack", lambda a: Tiny(np.from_dlpack(a)), raising=False)
    query = np.ones((3, 4), np.float32)
    found = attention(Tiny(query), Tiny(query), Tiny(query))
    assert type(found) is Tiny
    np.testing.assert_array_equal(found.memory, attention(query, query, query))


NUMPY_2_0 = np.lib.NumpyVersion(np.__version__) < "2.1.0"


@pytest.mark.skipif(NUMPY_2_0, reason="NumPy 2.0 reads what DLPack gives as read-only")
def test_dlpack_out_is_written_where_that_is_allowed() -> None:
    query = np.ones((3, 4), np.float32)
    out = TinyWithNamespace(np.zeros((3, 4), np.float32))
    assert attention(*(TinyWithNamespace(query),) * 3, out=out) is out
    np.testing.assert_array_equal(out.memory, query)
    out.memory.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writable, but was read-only"):
        attention(*(TinyWithNamespace(query),) * 3, out=out)


def test_dlpack_that_numpy_cannot_read_is_refused() -> None:
    query = TinyWithNamespace(np.ones((3, 4), ml_dtypes.bfloat16))
    with pytest.raises(TypeError, match="query must be readable by DLPack, but was not"):
        attention(query, query, query)


def test_arrays_on_a_gpu_without_cupy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    query = TinyOnGpu(np.ones((3, 4), np.float32))
    with pytest.raises(TypeError, match=r"query must be in the host's memory unless CuPy is there.*pip install"):
        attention(query, query, query)


def test_nothing_is_imported_that_the_user_has_not_imported() -> None:
    code = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import cupyflash
class Tiny:
    def __init__(self, memory): self.memory = memory
    def __dlpack__(self, **options): return self.memory.__dlpack__(**options)
    def __dlpack_device__(self): return (1, 0)
    def __array_namespace__(self): return self
    def from_dlpack(self, array): return Tiny(array)
query = Tiny(np.ones((3, 4), np.float32))
cupyflash.attention(query, query, query)
print({"torch", "jax", "cupy", "numba"} & set(sys.modules))
"""
    root = str(Path(__file__).parents[2])
    assert subprocess.check_output([sys.executable, "-c", code, root], text=True).strip() == "set()"


# --- on a GPU, by stand-ins ------------------------------------------------------------------------------


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    module = cupy_stand_in.make_module()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_dlpack_on_a_gpu_goes_through_cupy(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy.from_dlpack = lambda array: cupy_stand_in.Array(array.memory)
    monkeypatch.setattr(cupy_stand_in.Array, "__dlpack__", None, raising=False)
    given: list[Any] = []
    namespace = types.SimpleNamespace(from_dlpack=lambda array: given.append(array) or TinyOnGpu(array.memory))
    monkeypatch.setattr(TinyOnGpu, "__array_namespace__", lambda self: namespace)
    arrays = operands()
    found = attention(*map(TinyOnGpu, arrays), enable_gqa=True, backend="math")
    assert type(found) is TinyOnGpu
    assert type(given[0]) is cupy_stand_in.Array
    np.testing.assert_array_equal(found.memory, attention(*arrays, enable_gqa=True, backend="math"))


class CudaInterface:
    """An array with __cuda_array_interface__ alone, as Numba's older ones."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.memory.__array_interface__


def test_cuda_array_interface(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy.asarray = lambda array: cupy_stand_in.Array(array.memory)
    arrays = operands()
    made = [CudaInterface(array) for array in arrays]
    with pytest.raises(
        TypeError, match=r"query must be of a library .*but was a tests.CudaInterface.*pass cupy\.asarray\(query\)"
    ):
        attention(*made, enable_gqa=True, backend="math")
    extension = types.ModuleType("tests.cuda")
    extension.as_cuda_array = lambda array: CudaInterface(array.memory)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests.cuda", extension)
    found = attention(*made, enable_gqa=True, backend="math")
    assert type(found) is CudaInterface
    np.testing.assert_array_equal(found.memory, attention(*arrays, enable_gqa=True, backend="math"))


class FakeDevice(NamedTuple):
    type: str
    index: int

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class FakeTensor:
    """As much of torch.Tensor as there is to a tensor on the second GPU."""

    requires_grad = False
    layout = "strided"
    __dlpack__ = None  # as all tensors it has one; the stand-in for CuPy does not call it

    def __init__(self, memory: np.ndarray, device: FakeDevice = FakeDevice("cuda", 1)) -> None:  # noqa: B008
        self.memory, self.device, self.dtype = memory, device, memory.dtype

    def detach(self) -> FakeTensor:
        return self

    def data_ptr(self) -> int:
        return self.memory.ctypes.data

    def view(self, dtype: Any) -> FakeTensor:
        return FakeTensor(self.memory.view(dtype), self.device)

    def as_strided(self, shape: tuple[int, ...], strides: list[int]) -> FakeTensor:
        steps = [stride * self.memory.itemsize for stride in strides]
        return FakeTensor(np.lib.stride_tricks.as_strided(self.memory, shape, steps), self.device)


@pytest.fixture
def fake_torch(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A torch of nothing but tensors on GPUs, in sys.modules; `allocated` lists the sizes it was asked for."""
    torch: Any = types.ModuleType("torch")
    torch.Tensor, torch.allocated, torch.uint8 = FakeTensor, [], np.uint8
    torch.float16, torch.float32, torch.bfloat16 = np.float16, np.float32, ml_dtypes.bfloat16
    torch.is_grad_enabled = lambda: True
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=0xABC0 + device.index)
    )

    def empty(size: int, dtype: Any, device: FakeDevice) -> FakeTensor:
        torch.allocated.append(size)
        return FakeTensor(np.empty(size, dtype), device)

    def from_dlpack(array: Any) -> FakeTensor:
        return FakeTensor(array.memory)

    torch.empty, torch.from_dlpack = empty, from_dlpack
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(cupy, "from_dlpack", lambda tensor: cupy_stand_in.ArrayElsewhere(tensor.memory))
    return torch


def test_torch_on_a_gpu_runs_on_its_stream_in_its_memory(fake_torch: Any, cupy: Any) -> None:
    arrays = operands()
    tensors = [FakeTensor(array) for array in arrays]
    options = {"enable_gqa": True, "return_lse": True, "return_weights": True, "backend": "math"}
    streams: list[str] = []
    devices: list[int] = []

    def score_mod(score: Any, *where: Any) -> Any:
        streams.append(cupy.gpu.stream)
        devices.append(cupy_stand_in.Device.current)
        return score

    found = attention(*tensors, score_mod=score_mod, **options)
    assert set(streams) == {"external 0xabc1 of device 1"}
    assert set(devices) == {1}
    assert (cupy.gpu.stream, cupy.gpu.allocator, cupy_stand_in.Device.current) == ("null", None, 0)
    expected = attention(*arrays, score_mod=lambda score, *where: score, **options)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is FakeTensor
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.memory, other)
    # torch's own memory, all three
    assert sorted(fake_torch.allocated[:3]) == sorted(array.nbytes for array in expected)


def test_what_is_only_worked_with_goes_back_to_torch_at_once(fake_torch: Any, cupy: Any) -> None:
    made: list[weakref.ref[Any]] = []
    empty = fake_torch.empty

    def watched(*args: Any, **options: Any) -> FakeTensor:
        tensor = empty(*args, **options)
        made.append(weakref.ref(tensor))
        return tensor

    def score_mod(score: Any, *where: Any) -> Any:
        cupy.gpu.empty((1000,), np.float32)
        assert made[-1]() is None
        return score

    fake_torch.empty = watched
    attention(*map(FakeTensor, operands()), enable_gqa=True, score_mod=score_mod, backend="math")
    assert len(made) == 2  # out, and what score_mod made


def test_torch_on_a_gpu_launches_the_kernels_there(fake_torch: Any, cupy: Any, nvrtc: object) -> None:
    arrays = [array.astype(np.float16) for array in operands()]
    out = FakeTensor(np.empty((2, 4, 9, 6), np.float16))
    assert attention(*map(FakeTensor, arrays), enable_gqa=True, out=out) is out
    (launch,) = cupy.gpu.launches
    assert (launch.stream, launch.device) == ("external 0xabc1 of device 1", 1)


def test_torch_on_two_devices_is_refused(fake_torch: Any) -> None:
    query, key, value = map(FakeTensor, operands())
    with pytest.raises(ValueError, match="key must be on the first tensor's device cuda:1, but was on cuda:0"):
        attention(query, FakeTensor(key.memory, FakeDevice("cuda", 0)), value, enable_gqa=True)


# --- what NumPy's and CuPy's arrays pay ------------------------------------------------------------------


def test_native_types_are_remembered(cupy: Any) -> None:
    assert np.ndarray in interop.NATIVE
    assert not interop.is_foreign(cupy_stand_in.Array(np.ones(1)))
    assert cupy_stand_in.Array in interop.NATIVE
    assert not interop.is_foreign([1.0])
    assert list not in interop.NATIVE


def test_numpy_arrays_are_asked_for_their_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(array: Any) -> bool:
        raise AssertionError("is_foreign was asked")

    monkeypatch.setattr("cupyflash.api.is_foreign", fail)
    monkeypatch.setattr("cupyflash.merge.is_foreign", fail)
    query = np.ones((3, 4), np.float32)
    cupyflash.merge_attention(*zip(cupyflash.attention(query, query, query, return_lse=True), strict=True))
