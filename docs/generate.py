"""Write docs/tools.md: what `python -m cupyflash` prints.

    python docs/generate.py            rewrites the file; needs NVRTC
    python docs/generate.py --check    says whether it is up to date: exit status 0 or 1

What `doctor` prints is made from two described machines, so it is the same everywhere and compared word for word.
Registers and instructions are those of one version of NVRTC: of the table of kernels the check compares the heading and
the kernels' names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the checkout around this file prints

from cupyflash.build.cache import default_cache
from cupyflash.build.nvrtc import nvrtc_version
from cupyflash.tools.doctor import as_text, judge
from cupyflash.tools.kernels import as_table, device_of, kernel_rows, specs_of
from cupyflash.tools.probe import Finding

PAGE = Path(__file__).with_name("tools.md")
ARCH, MATCH = "sm_90a", "fwd_sm80-bf16-d128-m128n64w8"

COMMON = {
    "Python": Finding("3.12.3 on Linux x86_64, /home/me/venv/bin/python"),
    "cupyflash": Finding("0.1.0, /home/me/cupyflash/cupyflash"),
    "kernel sources": Finding("/home/me/cupyflash/kernels_cu"),
    "NumPy": Finding("2.4.6"),
    "BLAS": Finding("scipy-openblas 0.3.31.188.0, its threads can be set; attention uses 8"),
    "attention": Finding("runs on NumPy arrays"),
    "C++ compiler": Finding("/usr/bin/c++: c++ (Debian 12.2.0-14+deb12u1) 12.2.0"),
    "kernel cache": Finding("/home/me/.cache/cupyflash: 12 entries, 0.9 MiB"),
    "environment": Finding("nothing is set"),
}
LAPTOP = COMMON | {
    "CuPy": Finding("not installed", False),
    "driver": Finding("libcuda.so.1 was not found", False),
    "NVRTC": Finding("cuda-pathfinder is not installed", False),
}
SERVER = COMMON | {
    "CuPy": Finding("14.2.0, /home/me/venv/lib/python3.12/site-packages/cupy; it finds 1 GPU", data={"devices": 1}),
    "driver": Finding("for CUDA up to 13.0", data={"version": 13000, "devices": [["NVIDIA H200", 9, 0, 132]]}),
    "NVRTC": Finding("13.0, /home/me/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libnvrtc.so.13"),
}

TEXT = """\
# What is here, and what kernels take

Written by `python docs/generate.py`.

## `python -m cupyflash doctor`

It says what of cupyflash is usable on a machine, what to type for what is missing, and what one loses without it.
Whatever may hang or crash, CuPy, the driver, NVRTC and the C++ compiler, is asked in a process of its own, for 30
seconds at most. The exit status is 0 where `attention` runs on NumPy arrays.

Two machines, described rather than run, so that this page is the same wherever it is written. A laptop without a GPU:

```text
{laptop}
```

A server with one:

```text
{server}
```

## `python -m cupyflash kernels`

It compiles the kernels that plans may choose for an architecture, and lists what each takes. NVRTC is needed, a GPU
is not; what is compiled stays in the cache, where `attention` finds it. `--match` keeps those whose name holds a text,
`--json` gives a list of objects, `--build` only fills the cache, `--jobs` is the number of processes.

`python -m cupyflash kernels --arch {arch} --match {match}`, by NVRTC {nvrtc}:

```text
{kernels}
```

Registers, stack and spills are of a thread, stack and spills in bytes and not wanted; `smem` is a block's dynamic
shared memory in bytes; the rest counts instructions in the code.

## `python -m cupyflash trace`

It runs a small call through `fwd_sm80.cu` under the emulator and writes what happened as one HTML page that needs
nothing else, no network either: which tiles of scores were visited, in which order, and why others were not; each
block's walk over its tiles of keys, with scores, running maximum and sum, the factor that corrects them, and the
output; bytes moved, bank conflicts, and the error. A C++ compiler is needed, a GPU is not.

```sh
python -m cupyflash trace --causal --out walk.html
python -m cupyflash trace --window 100,0 --mask document --gqa 2 --out walk.html
```

![A page of trace: the tiles of two heads of a causal call, and one block's third step](images/walk.png)

Options have the names of `attention`'s arguments; `--help` lists them. `--device` takes the kernel of another GPU than
an A100, but not Hopper's, which does not show its steps. The numbers are the kernel's own: it hands them out while it
runs. For your own arrays, and as values rather than a page:

```python
import numpy as np
from cupyflash.tools.trace import trace
from cupyflash.tools.trace_page import as_html

query = key = value = np.random.default_rng(0).standard_normal((1, 2, 150, 64)).astype(np.float16)
found = trace(query, key, value, is_causal=True)  # the arguments of attention; float16 or bfloat16
[step.tile for step in found.walks[-1].steps]  # -> [2, 1, 0]
page = as_html(found)
```

`docs/walk.py` made the picture; it needs Chromium.

## `CUPYFLASH_DEBUG`

Printed on standard error, each level with all of those before; on every path, also of `merge_attention` by a kernel:

| level | `cuda`, `emulator`: for each kernel launch | `numpy`, `math`: for each call |
|---|---|---|
| 1 | kernel, grid, block, shared memory | tiles, jobs and threads; shape and size of the scores |
| 2 | the kernel's parameters | the call as it is understood: shapes, dtype, scale, mask |
| 3 | the path of its source, all its headers in one text | |
| 4 | registers, stack, spills and instructions, compiled for the GPU's architecture | |

0, or nothing, prints nothing; anything else is refused with a ValueError. What the plan for a GPU would be, and why,
`explain` says.
"""


def page(kernels: Sequence[str], nvrtc: str) -> str:
    """The whole text."""
    laptop, server = ("\n".join(as_text(judge(found, "linux"))) for found in (LAPTOP, SERVER))
    return TEXT.format(laptop=laptop, server=server, arch=ARCH, match=MATCH, nvrtc=nvrtc, kernels="\n".join(kernels))


def compiled_table() -> list[str]:
    specs = specs_of(device_of(ARCH), MATCH)
    rows = kernel_rows(specs, ARCH, default_cache().folder)
    return list(as_table(rows, max(len(str(spec)) for spec in specs)))


def is_up_to_date(text: str) -> bool:
    """Whether all but the kernels' numbers is as it would be written."""
    nvrtc = re.search(r"by NVRTC ([\d.]+):\n\n```text\n(.*?)\n```", text, re.DOTALL)
    if nvrtc is None:
        return False
    table = nvrtc[2].splitlines()
    specs = specs_of(device_of(ARCH), MATCH)
    (heading,) = as_table([], max(len(str(spec)) for spec in specs))
    names = [line.split()[0] for line in table[1:]]
    return table[0] == heading and names == [str(spec) for spec in specs] and page(table, nvrtc[1]) == text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/tools.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    if not parser.parse_args(arguments).check:
        PAGE.write_text(page(compiled_table(), ".".join(map(str, nvrtc_version()))), encoding="utf-8")
    elif not is_up_to_date(PAGE.read_text(encoding="utf-8")):
        print("docs/tools.md is out of date: run `python docs/generate.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
