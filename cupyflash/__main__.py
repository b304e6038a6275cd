"""``python -m cupyflash``: what is usable here, the kernels, and what one does."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .backends.pool import num_threads
from .build.cache import default_cache
from .build.nvrtc import nvrtc_version
from .errors import CupyflashError
from .tools import doctor
from .tools.kernels import ARCHITECTURES, KernelRow, as_json, as_table, device_of, kernel_rows, specs_of
from .tools.sample import MASK_MODS, MASKS, sample_call
from .tools.trace import trace
from .tools.trace_page import as_html, as_text

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 where what was asked can't be done; argparse exits with 2."""
    given = _parser().parse_args(arguments)
    given.words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status: int = given.run(given)
    except (CupyflashError, ValueError, OSError) as error:
        print(f"cupyflash: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cupyflash", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    text = "say what is usable here, and what to type for what is not"
    command = commands.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=_doctor)

    text = "compile the kernels of an architecture and list what they take"
    command = commands.add_parser(
        "kernels",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. No GPU is needed, NVRTC is. What is compiled is kept in the cache.",
    )
    command.add_argument("--arch", required=True, help=f"one of {', '.join(ARCHITECTURES)}, or sm_90a and the like")
    command.add_argument("--match", default="", metavar="TEXT", help="only kernels whose name holds TEXT")
    command.add_argument("--jobs", type=_positive, help="processes (default: the processors there are)")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects rather than a table")
    form.add_argument("--build", action="store_true", help="only fill the cache, and print a summary")
    command.set_defaults(run=_kernels)

    text = "follow a small call through the kernel, and write a page that shows it"
    command = commands.add_parser(
        "trace",
        help=text,
        description=f"{text[0].upper()}{text[1:]}: which tiles were visited and why others were not, maximum and sum "
        "of each row step by step, bytes moved, the error. Runs the GPU's kernel under the emulator: no GPU is needed, "
        "a C++ compiler is.",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("walk.html"),
        metavar="FILE",
        help="the page to write, one HTML file (walk.html)",
    )
    add = command.add_argument_group("the call, with the names of attention's arguments").add_argument
    add("--shape", type=_shape, default=(1, 2, 300, 300, 64), metavar="B,H,L,S,E", help="(1,2,300,300,64)")
    add("--gqa", type=_positive, default=1, metavar="N", help="query heads that share a head of keys and values (1)")
    add("--causal", action="store_true", help="is_causal")
    add("--window", type=_window, metavar="LEFT,RIGHT", help="keys that take part beside the diagonal, or none for all")
    add("--align", type=_alignment, default="top_left", help="top_left, bottom_right or a number (top_left)")
    add("--mask", choices=sorted(MASKS), help="attn_mask, a bool mask of a common form")
    add("--mask-mod", choices=sorted(MASK_MODS), help="mask_mod, a function from cupyflash.mods")
    add("--softcap", type=float, default=0.0, metavar="X", help="(none)")
    add("--dtype", choices=("float16", "bfloat16"), default="float16", help="(float16)")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers in it (0)")
    add(
        "--device",
        default="A100",
        metavar="NAME",
        help="the GPU whose kernel runs (A100); not Hopper's, which are others",
    )
    command.set_defaults(run=_trace)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "int >= 1"  # argparse says: invalid int >= 1 value


def _shape(text: str) -> tuple[int, ...]:
    batch, heads, seqlen_q, seqlen_k, head_dim = map(int, text.split(","))
    return batch, heads, seqlen_q, seqlen_k, head_dim


def _window(text: str) -> tuple[int | None, ...]:
    left, right = (None if side == "none" else int(side) for side in text.split(","))
    return left, right


def _alignment(text: str) -> str | int:
    return text if text in ("top_left", "bottom_right") else int(text)


_shape.__name__ = "B,H,L,S,E"
_window.__name__ = "LEFT,RIGHT"
_alignment.__name__ = "top_left, bottom_right or int"


def _doctor(given: argparse.Namespace) -> int:
    report = doctor.examine()
    for line in doctor.as_text(report):
        print(line)
    return 0 if report.runs("numpy") else 1


def _trace(given: argparse.Namespace) -> int:
    call = sample_call(
        given.shape,
        gqa=given.gqa,
        mask=given.mask,
        mask_mod=given.mask_mod,
        dtype=given.dtype,
        seed=given.seed,
        is_causal=given.causal,
        window=given.window,
        align=given.align,
        softcap=given.softcap,
    )
    found = trace(**call, device=given.device)
    page = as_html(found, " ".join(["python -m cupyflash", *map(shlex.quote, given.words)]))
    given.out.write_text(page, encoding="utf-8")
    for line in as_text(found):
        print(line)
    print(f"{given.out}: {len(page.encode()) / 1024:.0f} KiB, open it in a browser")
    return 0


def _kernels(given: argparse.Namespace) -> int:
    specs = specs_of(device_of(given.arch), given.match)
    if not specs:
        holding = f" with {given.match!r} in its name" if given.match else ""
        raise ValueError(f"no kernel{holding} runs on {given.arch}")
    nvrtc_version()  # whether there is one, before anything is printed
    listed: list[KernelRow] = []
    compiled = kernel_rows(specs, given.arch, default_cache().folder, given.jobs or num_threads())
    # A table on the same terminal shows itself how far it is.
    is_shown = sys.stderr.isatty() and (given.build or not sys.stdout.isatty())
    rows = _reported(compiled, len(specs), listed, is_shown)
    if given.build:
        for _ in rows:
            pass
    else:
        for line in as_json(rows) if given.json else as_table(rows, max(len(str(spec)) for spec in specs)):
            print(line, flush=True)
    unclean = sum(not row.is_clean for row in listed)
    summary = f"{len(listed)} kernels for {given.arch}, {unclean} with a stack, spills or notices"
    print(summary, file=sys.stdout if given.build else sys.stderr)
    return 0


def _reported(rows: Iterable[KernelRow], total: int, listed: list[KernelRow], is_shown: bool) -> Iterator[KernelRow]:
    """The same rows, kept in `listed`, with a counter on standard error."""
    for row in rows:
        listed.append(row)
        if is_shown:
            print(f"\r{len(listed)}/{total} kernels", end="\n" if len(listed) == total else "", file=sys.stderr)
        yield row


if __name__ == "__main__":
    raise SystemExit(main())
