"""Write docs/errors.md: the calls that cupyflash refuses, and what it says.

    python docs/errors.py [--check]

Each message on the page is what the call beside it has just raised.  `tests/unit/test_error_page.py` compares the lines
that raised with all `raise` statements of the package: one that no call reaches stands in `ELSEWHERE`, with a reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout around this file

import cupyflash

PAGE = Path(__file__).with_suffix(".md")
PACKAGE = Path(cupyflash.__file__).parent

PREAMBLE = """\
import numpy as np
import cupyflash
from cupyflash import attention, attention_weights, dropout_mask, explain, flops, merge_attention, mods

query = np.zeros((2, 3, 4, 8), np.float32)  # batch, heads, length, head dim
key = np.zeros((2, 3, 5, 8), np.float32)
value = np.zeros((2, 3, 5, 6), np.float32)
"""


class Group(NamedTuple):
    """Calls under one heading."""

    title: str
    calls: str  # one in each paragraph; its last line is the one that raises
    words: str = ""
    needs: tuple[str, ...] = ()  # modules without which the group is left as the page has it
    environment: Mapping[str, str] = MappingProxyType({})  # while it runs


GROUPS = [
    Group(
        "Query, key and value",
        """
        attention(query.tolist(), key, value)

        attention(np.ma.array(query), key, value)

        attention(query.astype(int), key, value)

        attention(query, key.astype(">f4"), value)

        attention(query, key, value.astype(np.float64))

        attention(query[0, 0, 0], key, value)

        attention(query, key[..., :7], value)

        attention(query, key, value[..., :4, :])

        attention(query, key[:1].repeat(3, axis=0), value)

        attention(query.repeat(2, axis=1), key, value)

        attention(query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2))

        attention(query.repeat(2, axis=1)[:, :5], key, value, enable_gqa=True)

        attention(query, key[0, 0], value, enable_gqa=True)

        attention(query, key[:1].repeat(3, axis=0), value, enable_gqa=True)
        """,
    ),
    Group(
        "Masks",
        """
        attention(query, key, value, attn_mask=[[True] * 5] * 4)

        attention(query, key, value, attn_mask=np.zeros((4, 5)))

        attention(query, key, value, attn_mask=np.zeros((4, 5), np.int8))

        attention(query, key, value, attn_mask=np.zeros((4, 4), bool))

        attention(query, key, value, attn_mask=np.zeros((2, 5), bool))

        attention(query, key, value, attn_mask=(np.zeros(5, bool), np.zeros(5, np.float32)))

        attention(query, key, value, attn_mask=(np.zeros(5, bool),))
        """,
    ),
    Group(
        "Causal, window, align",
        """
        attention(query, key, value, is_causal="yes")

        attention(query, key, value, window=3)

        attention(query, key, value, window=(1, 2, 3))

        attention(query, key, value, window=(1.5, 0))

        attention(query, key, value, window=(-2, 0))

        attention(query, key, value, align="middle")

        attention(query, key, value, align=1.5)

        attention(query, key, value, align=2**40)
        """,
    ),
    Group(
        "Numbers and switches",
        """
        attention(query, key, value, scale="1")

        attention(query, key, value, scale=np.nan)

        attention(query, key, value, softcap=-1)

        attention(query, key, value, dropout_p="0.1")

        attention(query, key, value, dropout_p=1.1)

        attention(query, key, value, dropout_p=0.1, seed=-1)

        attention(query, key, value, dropout_p=0.1, seed=1.0)

        attention(query, key, value, dropout_p=0.1, seed=np.zeros(2, np.uint64))

        attention(query, key, value, precision=32)

        attention(query, key, value, precision="fp8")
        """,
    ),
    Group(
        "Slopes and sinks",
        """
        attention(query, key, value, alibi_slopes=[0.5, 0.25, 0.125])

        attention(query, key, value, alibi_slopes=np.zeros(3))

        attention(query, key, value, alibi_slopes=np.zeros(4, np.float32))

        attention(query, key, value, sinks=np.zeros(3))

        attention(query, key, value, sinks=np.zeros(4, np.float32))
        """,
    ),
    Group(
        "The output's place",
        """
        attention(query, key, value, out=np.zeros((2, 3, 4, 6)))

        attention(query, key, value, out=np.zeros((2, 3, 4, 8), np.float32))

        attention(query, key, value, out=np.broadcast_to(np.float32(0), (2, 3, 4, 6)))

        attention(query, key, value, out=np.lib.stride_tricks.as_strided(query, (2, 3, 4, 6), (0, 96, 24, 4)))

        attention(query, key, value, out=query[..., :6])
        """,
    ),
    Group(
        "Score and mask functions",
        """
        attention(query, key, value, score_mod=2.0)

        attention(query, key, value, score_mod=lambda score, b, h, q_idx, kv_idx: score * 1j)

        attention(query, key, value, score_mod=lambda score, b, h, q_idx, kv_idx: score[..., :2])

        attention(query, key, value, mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx)
        """,
        words="On every backend, of what they return:",
    ),
    Group(
        "Score and mask functions in kernels",
        """
        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: score if q_idx > kv_idx else -score)

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: score * float(h))

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: score * np.arange(8)[h])

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: score[0])

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: score.mean())

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: np.sort(score))

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: None)

        cupyflash.trace_mod(lambda b, h, q_idx, kv_idx: q_idx - kv_idx)

        cupyflash.trace_mod(lambda score, b, h, q_idx, kv_idx: score / "2")

        def again(score, b, h, q_idx, kv_idx):
            return again(score, b, h, q_idx, kv_idx)
        cupyflash.trace_mod(again)

        cupyflash.trace_mod(lambda score: score)

        cupyflash.trace_mod(mods.tanh_softcap(2.0), dtype=np.float16)

        table = np.zeros(3, np.float32)
        attention(query, key, value, score_mod=lambda s, b, h, q_idx, kv_idx: s + table[kv_idx], backend="emulator")
        """,
        words="A kernel is compiled from what such a function does when it is called once with symbols; `trace_mod` "
        'shows it, and `backend="numpy"` takes the function as it is. [How to write one](howto/score_mod.md).',
    ),
    Group(
        "Backends",
        """
        attention(query, key, value, backend="torch")

        attention(query, key, value, backend=0)

        attention(query, key, value, precision="tf32", backend="numpy")

        attention(query, key, value, backend="cuda")

        attention(query.repeat(40, -1), key.repeat(40, -1), value, backend="emulator")

        cupyflash.register_backend(3, None)

        cupyflash.register_backend("", None)

        cupyflash.register_backend("mine", None)

        from cupyflash.backends.registry import MathBackend
        cupyflash.register_backend("mine", MathBackend)

        from cupyflash.backends.registry import MathBackend
        cupyflash.register_backend("numpy", MathBackend())

        many = np.zeros((2,) * 7 + (4, 8), np.float32).transpose(6, 5, 4, 3, 2, 1, 0, 7, 8)
        attention(many, many.copy(), many.copy(), backend="emulator")
        """,
        words="A backend that is named is obeyed or refused; the message says what each backend has against the call.",
    ),
    Group(
        "The other functions",
        """
        attention_weights(query, key, stage="soft")

        merge_attention(query, [query[..., 0]])

        merge_attention([], [])

        merge_attention([query, query], [query[..., 0]])

        merge_attention([query.astype(int)], [query[..., 0]])

        merge_attention([query[0, 0, 0]], [query[0, 0, 0, 0]])

        merge_attention([query], [query[..., 0].astype(np.float64)])

        merge_attention([query], [query[..., :2, 0]])

        dropout_mask([4, 5], 0.1, seed=0)

        dropout_mask((4,), 0.1, seed=0)

        merge_attention([query], [query[..., 0]], backend="cuda")

        flops((4, 8), (5, 8), (6,))

        flops((4, 8), (5, 8), (5, 8), is_causal="yes")

        explain(query, key, value, device="H300")

        explain(query, key, value, device=9)

        explain(query, key, value, device="H200", backend="numpy")

        cupyflash.tune(query, key, value, backend="numpy")

        cupyflash.tune(query, key, value)

        cupyflash.progress(3).__enter__()

        __import__("sys").modules["tqdm.auto"] = None  # as where tqdm is not installed
        cupyflash.progress().__enter__()

        cupyflash.formulas.original_attention(query, key, value)

        cupyflash.formulas.original_attention(query[0, 0], key[0, 0, :, :7], value[0, 0])

        cupyflash.formulas.original_attention(query[0, 0], key[0, 0], value[0, 0, :4])

        cupyflash.formulas.flash_attention_tiles(query[0, 0], key[0, 0], value[0, 0], block_m=0)
        """,
    ),
    Group(
        "PyTorch's tensors",
        """
        t = torch.zeros(2, 3, 4, 8)
        attention(t.requires_grad_(), t, t)

        t = torch.zeros(2, 3, 4, 8)
        attention(t, t.numpy(), t)

        t = torch.zeros(2, 3, 4, 8)
        attention(t.numpy(), t, t)

        t = torch.zeros(2, 3, 4, 8, device="meta")
        attention(t, t, t)

        t = torch.zeros(2, 3, 4, 8)
        attention(t, t.to("meta"), t)
        """,
        words="[Arrays of other libraries](howto/interop.md), after `import torch`.",
        needs=("torch",),
    ),
    Group(
        "Environment variables: threads",
        """
        attention(*np.zeros((3, 1024, 64), np.float32))
        """,
        words="`CUPYFLASH_NUM_THREADS=none`:",
        environment={"CUPYFLASH_NUM_THREADS": "none"},
    ),
    Group(
        "Environment variables: debug",
        """
        attention(query, key, value)
        """,
        words="`CUPYFLASH_DEBUG=all`:",
        environment={"CUPYFLASH_DEBUG": "all"},
    ),
    Group(
        "Environment variables: backend",
        """
        attention(query, key, value)
        """,
        words="`CUPYFLASH_BACKEND=gpu`:",
        environment={"CUPYFLASH_BACKEND": "gpu"},
    ),
    *(
        Group(
            f"Environment variables: emulator, {what}",
            """
            attention(query, key, value, backend="emulator")
            """,
            words=f"`CUPYFLASH_EMULATOR={text}`:",
            environment={"CUPYFLASH_EMULATOR": text},
        )
        for what, text in (
            ("an unknown name", "threads=4"),
            ("a wrong number", "seed=-1"),
            ("an unknown schedule", "schedule=fair"),
            ("too large a seed", "seed=99999999999999999999"),
            ("no workers", "workers=0"),
            ("an unknown device", "device=H300"),
        )
    ),
    Group(
        "No C++ compiler",
        """
        attention(query, key, value, backend="emulator")
        """,
        words="`CXX=no-such-compiler`:",
        environment={"CXX": "no-such-compiler"},
    ),
]

# Raise statements that no call on the page reaches: by module, or by module and function, and why.
ELSEWHERE = {
    # Not the words of a call, or not ours.
    "testing": "assertions of tests about results",
    "tools.doctor": "a line of `python -m cupyflash doctor`: docs/tools.md",
    "tools.trace": "printed by `python -m cupyflash trace`: tests/tools/test_trace.py",
    "tools.sample": "printed by `python -m cupyflash trace`: tests/tools/test_trace.py",
    "tools.kernels": "printed by `python -m cupyflash kernels`: tests/tools/test_kernels.py",
    "__main__": "printed by `python -m cupyflash`: tests/tools/test_kernels.py",
    "build.host._compile": "what the C++ compiler says: tests/kernels/test_host.py",
    "build.nvrtc._Nvrtc.compile": "what NVRTC says: tests/kernels/test_nvrtc.py",
    "build.nvrtc._Nvrtc._check": "what NVRTC says of a failure of its own",
    "build.host._find_compiler": "a reason of the backend emulator, as under No C++ compiler",
    "build.nvrtc._nvrtc": "a reason of the backend cuda where there are CuPy's arrays: tests/kernels/test_nvrtc.py",
    "problem.trace._Symbol.__getattr__": "AttributeError is how Python is told that there is no such method",
    "problem.trace._Array.__getattr__": "AttributeError is how Python is told that there is no such method",
    # What only kernels' authors call.
    "backends.emulator.Module": "launching a kernel by hand: tests/kernels/test_launch.py",
    "backends.emulator.Function": "launching a kernel by hand: tests/kernels/test_launch.py",
    "backends.emulator._pack": "launching a kernel by hand: tests/kernels/test_launch.py",
    "backends.emulator.guarded_array": "launching a kernel by hand: tests/kernels/test_launch.py",
    "backends.tensormap": "checks of what plans ask for: tests/unit/test_tensormap.py",
    "build.source": "checks of kernels' texts, or a damaged installation: tests/kernels/test_source.py",
    "build.nvrtc.read_cubin": "a check of what NVRTC has made",
    "build.cache.Cache.__init__": "no call sets it: tests/kernels/test_cache.py",
    # What a machine has or lacks.
    "build.cache.default_folder": "needs a user without a home: tests/kernels/test_cache.py",
    "build.cache._default_cache": "names a folder of the machine: tests/kernels/test_cache.py",
    "build.cache._require_private": "names a folder of the machine: tests/kernels/test_cache.py",
    "build.modding._check_library": "needs CuPy: tests/unit/test_cuda.py",
    "problem.checks.check_devices": "needs two GPUs: tests/unit/test_cupy_arrays.py",
    "problem.parts.check_parts": "the last one needs two GPUs: tests/unit/test_cupy_arrays.py",
    "plan.choose": "needs a GPU that has no kernel: tests/unit/test_plan.py",
    "tune": "the last one needs a GPU: tests/unit/test_tune.py",
    "interop": "needs PyTorch, JAX or another library: tests/unit/test_interop.py",
    "problem.checks.check_library": "needs an array of another library: under PyTorch's tensors",
    "integrations.transformers": "needs transformers: docs/howto/transformers.md, tests/integrations",
    # Too large for a page.
    "build.functor.mods_dtype": "needs hundreds of arrays: tests/unit/test_trace.py",
    "problem.trace.check_bounds": "one needs arrays beyond 2**30: tests/unit/test_trace.py",
}


class Raised(NamedTuple):
    """A call and what it raised."""

    code: str
    error: BaseException


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/errors.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args(arguments).check
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    text = page(before)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != before:
        print("docs/errors.md is out of date: run `python docs/errors.py`", file=sys.stderr)
        return 1
    return 0


def page(before: str) -> str:
    """The whole text; groups that can't run here are taken from the text of before."""
    parts = [HEAD, f"```python\n{PREAMBLE}```\n"]
    old = {part.partition("\n")[0]: part for part in before.split("\n## ")[1:]}
    for group in GROUPS:
        if not is_runnable(group):
            parts.append("## " + old.get(group.title, group.title + "\n").rstrip("\n") + "\n")
            continue
        lines = [f"## {group.title}", "", *([*textwrap.wrap(group.words, 140), ""] if group.words else []), "```text"]
        for raised in run(group):
            first, *rest = raised.code.splitlines()
            lines += [f">>> {first}", *(f"{'...' if line.startswith(' ') else '>>>'} {line}" for line in rest)]
            lines += [*f"{type(raised.error).__name__}: {raised.error}".splitlines(), ""]
        parts.append("\n".join([*lines[:-1], "```", ""]))
    return "\n".join(parts)


HEAD = """\
# What is refused, and the words

Written by `python docs/errors.py`, which makes these calls: what they say here is what they say.

A wrong kind of argument is a `TypeError`, a wrong value a `ValueError`; a valid call that a backend can't serve is
`cupyflash.Unsupported` (also a `NotImplementedError`), whose attribute `reasons` has what each backend said. A message
names the argument, what was expected and what it was. All calls come after
"""


def is_runnable(group: Group) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in group.needs)


def run(group: Group) -> Iterator[Raised]:
    """Make the calls of a group, each with variables of its own."""
    with environment(group.environment):
        for paragraph in textwrap.dedent(group.calls).strip().split("\n\n"):
            variables: dict[str, Any] = {}
            exec(PREAMBLE, variables)
            for name in group.needs:
                variables[name] = importlib.import_module(name)
            yield Raised(paragraph, error_of(paragraph, variables))


def error_of(code: str, variables: dict[str, Any]) -> BaseException:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "<your code>", "exec"), variables)
    except Exception as error:  # noqa: BLE001  # whatever it is, the page shows it
        return error
    raise AssertionError(f"nothing was raised by {code}")


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """The settings in place of all that this library reads, and no CuPy."""
    before = dict(os.environ)
    modules = {name: sys.modules.get(name) for name in ("cupy", "tqdm.auto")}
    for name in [name for name in os.environ if name.startswith("CUPYFLASH_") and name != "CUPYFLASH_CACHE"]:
        del os.environ[name]
    os.environ.update(settings)
    sys.modules["cupy"] = None  # type: ignore[assignment]  # the page is that of a machine without it
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for name, module in modules.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


# --- which lines raised --------------------------------------------------------------------------------------------


class Site(NamedTuple):
    """A raise statement."""

    module: str  # without the leading "cupyflash."
    function: str  # dotted, with its class
    first: int
    last: int


def all_sites() -> list[Site]:
    """Every raise statement of the package that makes an exception (a bare one, or `raise error`, passes one on)."""
    sites = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        _collect(ast.parse(path.read_text(encoding="utf-8")), module, (), sites)
    return sites


def _collect(node: ast.AST, module: str, names: tuple[str, ...], sites: list[Site]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            _collect(child, module, (*names, child.name), sites)
            continue
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            sites.append(Site(module, ".".join(names), child.lineno, child.end_lineno or child.lineno))
        _collect(child, module, names, sites)


def lines_that_raised() -> set[tuple[str, int]]:
    """(module, line) of every frame of what the page's calls raise."""
    found = set()
    for group in filter(is_runnable, GROUPS):
        for raised in run(group):
            for frame, line in traceback.walk_tb(raised.error.__traceback__):
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(PACKAGE):
                    found.add((".".join(path.relative_to(PACKAGE).with_suffix("").parts), line))
    return found


def sites_without_a_call() -> list[Site]:
    """Raise statements that no call reaches and that `ELSEWHERE` does not excuse."""
    raised = lines_that_raised()
    return [
        site
        for site in all_sites()
        if not any((site.module, line) in raised for line in range(site.first, site.last + 1))
        and not any(excuses(name, site) for name in ELSEWHERE)
    ]


def excuses(name: str, site: Site) -> bool:
    """Whether an entry of `ELSEWHERE` names the site, its class or its module."""
    return f"{site.module}.{site.function}.".startswith(f"{name}.")


if __name__ == "__main__":
    raise SystemExit(main())
