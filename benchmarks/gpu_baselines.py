"""Who is measured on a GPU: each implementation as a function from operands to a call, and who else can be asked.

The operands are PyTorch's tensors; CuPy sees the same memory through DLPack.  What a user would do once, such as
turning arrays into those of another library, is done before the call and outside the measured time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from gpu_workloads import EVERYTHING, FEATURES, Case

import cupyflash
from cupyflash.testing import DTYPES

__all__ = [
    "BACKENDS",
    "EXTRA",
    "OURS",
    "YARDSTICKS",
    "Call",
    "as_only_backend",
    "call_of",
    "fresh_call",
    "operands_of",
    "to_numpy",
    "why_not",
    "work_of",
]

Call: TypeAlias = Callable[[int], Any]  # of the n-th set of operands; the output, as a tensor

OURS = ("cupyflash", "plain")  # the second: without the feature that is measured
BACKENDS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
#: Others that are measured if they are named: what each needs, and what it is.
EXTRA = {
    "flex": (("triton",), "PyTorch's FlexAttention, a Triton kernel; compiled for each shape, which takes its time"),
    "jax": (
        ("jax",),
        "jax.nn.dot_product_attention on cuDNN; timed by the host's clock, since JAX has streams of its own",
    ),
    "pallas": (
        ("jax", "absl"),
        "JAX's own kernel for Hopper, jax.experimental.pallas.ops.gpu.attention_mgpu; timed as jax. It does not scale: "
        "queries come scaled",
    ),
}
#: What the machine does with nothing but products, or nothing but memory.
YARDSTICKS = ("gemm", "copy")
GEMM_SIZE = 8192
COPY_BYTES = 1 << 30
PALLAS_ROWS = 128  # two warpgroups of 64


def operands_of(case: Case, count: int, torch: Any) -> list[tuple[Any, Any, Any]]:
    """So many sets of query, key and value, normal random numbers."""
    generator = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, case.dtype)
    drawn = torch.float64 if case.dtype == "float64" else torch.float32
    query, key = case.shapes
    return [
        tuple(
            torch.randn(shape, generator=generator, device="cuda", dtype=drawn).to(dtype) for shape in (query, key, key)
        )
        for _ in range(count)
    ]


def call_of(name: str, case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    """The implementation of that name, ready to be called."""
    if name in OURS:
        return our_call(case, sets, torch)
    makers = {"flex": flex_call, "jax": jax_call, "pallas": pallas_call, "gemm": gemm_call, "copy": copy_call}
    return makers.get(name, their_call)(case, sets, torch)


def our_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    import cupy

    arrays = [[cupy.from_dlpack(tensor) for tensor in operands] for operands in sets]
    result = torch.empty_like(sets[0][0])
    out = cupy.from_dlpack(result)
    options: dict[str, Any] = {**case.options}
    if case.feature:
        asked = FEATURES[case.feature](case, *EVERYTHING)
        options |= {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in asked.items()}

    def call(number: int) -> Any:
        cupyflash.attention(*arrays[number % len(arrays)], **options, out=out, backend="cuda")
        return result

    return call


def fresh_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    """Ours as one calls it without thinking: on CuPy arrays, with a new output each time."""
    import cupy

    arrays = [[cupy.from_dlpack(tensor) for tensor in operands] for operands in sets]
    return lambda number: cupyflash.attention(*arrays[number % len(arrays)], **case.options)


def their_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    options: dict[str, Any] = {**case.options}
    if case.feature:
        mask = FEATURES[case.feature](case, *EVERYTHING)["attn_mask"]
        options["attn_mask"] = from_numpy(mask, torch).to(sets[0][0].device)
    function = torch.nn.functional.scaled_dot_product_attention

    def call(number: int) -> Any:
        return function(*sets[number % len(sets)], **options)

    return call


def flex_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    function = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"enable_gqa": case.options["enable_gqa"]}
    if case.is_causal:
        options["block_mask"] = create_block_mask(
            lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, case.seqlen_q, case.seqlen_k, device="cuda"
        )

    def call(number: int) -> Any:
        return function(*sets[number % len(sets)], **options)

    return call


def jax_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    import jax

    @jax.jit
    def function(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, is_causal=case.is_causal, implementation="cudnn")

    return on_jax_arrays(function, sets, torch)


def pallas_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(PALLAS_ROWS // 2, pallas_keys(case), 2, causal=case.is_causal)
    scaled = [(query * case.head_dim**-0.5, key, value) for query, key, value in sets]
    return on_jax_arrays(partial(attention_mgpu.attention, config=config), scaled, torch)


def pallas_keys(case: Case) -> int:
    """The keys of a tile: the most for which two of K and two of V fit into shared memory."""
    return max(64, 16384 // case.head_dim)


def on_jax_arrays(function: Callable[..., Any], sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    """A function of arrays (batch, length, head, element), called with the operands' elements in that order."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or nothing is left for the others
    import jax

    arrays = [[jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous()) for x in operands] for operands in sets]

    def call(number: int) -> Any:
        result = function(*arrays[number % len(arrays)]).block_until_ready()
        return torch.from_dlpack(result).transpose(1, 2)

    return call


def gemm_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    """A square product in the case's dtype; of random numbers, for zeros use less power."""
    size = GEMM_SIZE if case.dtype in ("float16", "bfloat16") else GEMM_SIZE // 2
    drawn = torch.float64 if case.dtype == "float64" else torch.float32
    left, right = (
        torch.randn((size, size), device="cuda", dtype=drawn).to(getattr(torch, case.dtype)) for _ in range(2)
    )
    out = torch.empty_like(left)
    return lambda number: torch.matmul(left, right, out=out)


def copy_call(case: Case, sets: Sequence[tuple[Any, Any, Any]], torch: Any) -> Call:
    source = torch.randint(0, 256, (COPY_BYTES,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda number: target.copy_(source)


def work_of(name: str, case: Case) -> tuple[float, float]:
    """Operations and bytes of a call of that name."""
    if name == "gemm":
        size = GEMM_SIZE if case.dtype in ("float16", "bfloat16") else GEMM_SIZE // 2
        return 2.0 * size**3, 3.0 * size**2 * DTYPES[case.dtype].itemsize
    if name == "copy":
        return 0.0, 2.0 * COPY_BYTES
    return float(case.operations), float(case.bytes)


@contextmanager
def as_only_backend(name: str, torch: Any) -> Iterator[None]:
    """PyTorch's SDPA with one backend; everything else runs as it is."""
    if name not in BACKENDS:
        yield
        return
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, BACKENDS[name])):
        yield


def why_not(name: str, case: Case) -> str:
    """Why one of `EXTRA` can't be asked for this case; "" if it can."""
    modules, _ = EXTRA[name]
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        return f"{' and '.join(missing)} not installed"
    if case.feature or case.reads_once:
        return "it is asked for plain calls outside of graphs only"
    if case.dtype not in ("float16", "bfloat16"):
        return f"it is not asked for {case.dtype}"
    if name == "pallas":
        keys = pallas_keys(case)
        if case.head_dim % 64 or case.seqlen_q % PALLAS_ROWS or case.seqlen_k % keys:
            return (
                f"it takes head dims in steps of 64, lengths in steps of {PALLAS_ROWS} and {keys}, but they were "
                f"{case.head_dim}, {case.seqlen_q}, {case.seqlen_k}"
            )
        if case.is_causal and case.seqlen_q != case.seqlen_k:
            return f"its causal mask is for as many queries as keys, but there were {case.seqlen_q} and {case.seqlen_k}"
    return ""


def from_numpy(array: np.ndarray, torch: Any) -> Any:
    """A tensor; of bfloat16 too, which PyTorch does not take from NumPy."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    """An array; of bfloat16 too, which PyTorch does not hand to NumPy."""
    tensor = tensor.contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"])
    return tensor.numpy()
