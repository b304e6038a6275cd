"""The kernels that only the GPU tests have, compiled without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cupyflash.build.cache import Cache
from cupyflash.build.nvrtc import compile_cubin
from tests.gpu import test_streams, test_unknowns
from tests.kernels.harness import source_of


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("text", "arch"),
    [
        (test_streams.SPIN, "sm_80"),
        (test_unknowns.EMPTY, "sm_80"),
        (test_unknowns.TENSOR_MAP, "sm_90"),
        (test_unknowns.DEPENDENT, "sm_90"),
    ],
    ids=["spin", "empty", "tensor_map", "dependent"],
)
def test_compiles(text: str, arch: str, tmp_path: Path) -> None:
    binary = compile_cubin(source_of(text), arch, Cache(tmp_path))
    assert binary.notices == ()
