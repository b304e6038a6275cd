"""Runs neighbour.cu under the emulator, which finds what is wrong with it."""

from pathlib import Path

import numpy as np

from cupyflash.backends.emulator import Module, guarded_array, guarded_copy
from cupyflash.build.source import KernelSource, flatten

path = Path(__file__).with_suffix(".cu")
source = KernelSource("neighbour", flatten(path.read_text(encoding="utf-8"), path.name), ("neighbour",))
x, out = guarded_copy(np.arange(64, dtype=np.uint32), "x"), guarded_array(64, np.uint32, "out")
Module(source).get_function("neighbour")((1,), (64,), (x, out), shared_mem=256)
print(out)
