"""``python -m cupyflash``: what is usable here, and the kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from .backends.pool import num_threads
from .build.cache import default_cache
from .build.nvrtc import nvrtc_version
from .errors import CupyflashError
from .tools import doctor
from .tools.kernels import ARCHITECTURES, KernelRow, as_json, as_table, device_of, kernel_rows, specs_of

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 where what was asked can't be done; argparse exits with 2."""
    given = _parser().parse_args(arguments)
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
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "int >= 1"  # argparse says: invalid int >= 1 value


def _doctor(given: argparse.Namespace) -> int:
    report = doctor.examine()
    for line in doctor.as_text(report):
        print(line)
    return 0 if report.runs("numpy") else 1


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
