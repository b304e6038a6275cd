"""What attention gives on the `cuda` backend.  A draft: nobody has run it on a GPU yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.testing import assert_attention_close
from tests.cases import CASES
from tests.gpu.calls import CLAIMED, not_written, on_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CLAIMED)
def test_claimed(cupy: Any, name: str) -> None:
    result = cupyflash.attention(**on_device(CLAIMED[name].arguments(), cupy), backend="cuda")
    assert all(isinstance(array, cupy.ndarray) for array in result)
    assert_attention_close(result, CLAIMED[name], backend="cuda")


def test_right_or_refused(cupy: Any) -> None:
    """Every case of the contract: a right result, or an error that says why."""
    findings = []
    for name, case in CASES.items():
        arguments = on_device(case.arguments(), cupy)
        try:
            assert_attention_close(cupyflash.attention(**arguments, backend="cuda"), case, backend="cuda")
        except cupyflash.Unsupported as refusal:
            if not refusal.reasons["cuda"]:
                findings.append(f"{name}: refused without a reason")
        except AssertionError as error:
            findings.append(f"{name}: {error}")
    assert not findings, "\n\n".join(findings)


def test_cuda_is_the_default(cupy: Any) -> None:
    case = CLAIMED["float16-d64-tails"]
    arguments = on_device(case.arguments(), cupy)
    chosen, named = (cupyflash.attention(**arguments, backend=backend)[0] for backend in (None, "cuda"))
    assert (chosen.view(np.uint16) == named.view(np.uint16)).all()


@pytest.mark.parametrize("name", ["float16-d64-causal", "bfloat16-d128-window", "long"])
def test_the_same_call_gives_the_same_bits(cupy: Any, name: str) -> None:
    arguments = on_device(CLAIMED[name].arguments(), cupy)
    out, lse = cupyflash.attention(**arguments, backend="cuda")
    for _ in range(5):
        again, again_lse = cupyflash.attention(**arguments, backend="cuda")
        assert (again.view(np.uint16) == out.view(np.uint16)).all()
        assert (again_lse.view(np.uint32) == lse.view(np.uint32)).all()


def test_out_is_written_whole(cupy: Any) -> None:
    case = CLAIMED["float16-d64-empty-rows"]
    arguments = on_device(case.arguments(), cupy)
    out = not_written(case.query_shape, np.float16, cupy)
    result, lse = cupyflash.attention(**arguments, out=out, backend="cuda")
    assert result is out
    assert_attention_close((out, lse), case, backend="cuda")


def test_many_calls_in_flight(cupy: Any) -> None:
    """All are launched before the first result is looked at."""
    names = [name for name in CLAIMED if name != "long"]
    arguments = {name: on_device(CLAIMED[name].arguments(), cupy) for name in names}
    results = {name: cupyflash.attention(**arguments[name], backend="cuda") for name in names * 2}
    for name, result in results.items():
        assert_attention_close(result, CLAIMED[name], backend="cuda")


def test_every_device(cupy: Any) -> None:
    count = cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip("gpu: this machine has one GPU, the test needs two")
    case = CLAIMED["float16-d64-causal"]
    for device in range(count):
        with cupy.cuda.Device(device):
            arguments = on_device(case.arguments(), cupy)
        # Called with another device current: the arrays say where.
        result = cupyflash.attention(**arguments, backend="cuda")
        assert result[0].device.id == device
        assert_attention_close(result, case, backend="cuda")
