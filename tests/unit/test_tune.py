"""`tune` without a GPU: a stand-in launches, and says how long each kernel would have taken."""

from __future__ import annotations

import dataclasses
import doctest
import json
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cupyflash
from cupyflash.backends import tuned
from cupyflash.build.cache import Cache
from cupyflash.plan import choose
from cupyflash.plan.device import DEVICES, DeviceSpec
from cupyflash.plan.specs import FwdSpec
from cupyflash.problem.normalize import normalize
from tests import cupy_stand_in
from tests.cases import heads
from tests.conftest import Require
from tests.cupy_stand_in import Array, Launch

DEVICE = dataclasses.replace(DEVICES["A100"], name="NVIDIA A100, imagined")


@pytest.fixture(autouse=True)
def nvrtc(require: Require) -> Any:
    from cupyflash.build.nvrtc import nvrtc_version

    try:
        return require("nvrtc", nvrtc_version(), "")
    except cupyflash.Unsupported as error:
        return require("nvrtc", None, str(error))


class Clock:
    """The time of the stand-in's GPU: launches take some, and those of a graph when it is launched."""

    def __init__(self, gpu: Any, seconds_of: Callable[[Launch], float]) -> None:
        self.now, self.gpu, self.seconds_of = 0.0, gpu, seconds_of
        self.captured: list[Launch] | None = None
        self.calls: list[int] = []  # of each graph
        gpu.effect = self.take

    def take(self, launch: Launch) -> None:
        if self.captured is None:
            self.now += self.seconds_of(launch)
        else:
            self.captured.append(launch)


def install(monkeypatch: pytest.MonkeyPatch, seconds_of: Callable[[Launch], float], spec: DeviceSpec = DEVICE) -> Clock:
    module = cupy_stand_in.make_module(spec)
    clock = Clock(module.gpu, seconds_of)

    class Stream:
        def __init__(self, non_blocking: bool) -> None:
            assert non_blocking

        def __enter__(self) -> Stream:
            self.outer, clock.gpu.stream = clock.gpu.stream, "tuning"
            return self

        def __exit__(self, *args: object) -> None:
            clock.gpu.stream = self.outer

        def begin_capture(self) -> None:
            clock.captured = []

        def end_capture(self) -> Any:
            captured, clock.captured = clock.captured or [], None
            clock.calls.append(len(captured))

            def launch(stream: Any) -> None:
                assert stream is self
                clock.now += sum(map(clock.seconds_of, captured))

            return SimpleNamespace(launch=launch)

    class Event:
        def record(self, stream: Any) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            assert self.at <= clock.now

    module.cuda.Stream, module.cuda.Event = Stream, Event
    module.cuda.get_elapsed_time = lambda start, end: 1e3 * (end.at - start.at)
    monkeypatch.setattr(cupy_stand_in.Device, "synchronize", lambda self: None, raising=False)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.delenv("CUPYFLASH_BACKEND", raising=False)
    return clock


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A folder of its own for what is found, and nothing that is kept in the process."""
    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(tuned, "default_cache", lambda: cache)
    yield
    for device in list(choose._TIMED):
        choose.use_timed(device, {})
        del choose._TIMED[device]


def arrays(seqlen_q: int = 4096, seqlen_k: int = 4096, batch: int = 4) -> list[Any]:
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return [Array(np.zeros((batch, 16, length, 64), np.float16)) for length in lengths]


def small_is_fast(launch: Launch) -> float:
    return {128: 10e-6, 256: 15e-6}.get(launch.block[0], 1e-6)


def launched(clock: Clock, *operands: Any, **options: Any) -> list[int]:
    """Threads of the blocks of each launch of a call."""
    clock.gpu.launches.clear()
    cupyflash.attention(*operands, **options)
    return [launch.block[0] for launch in clock.gpu.launches]


def test_the_fastest_is_used_from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, small_is_fast)
    assert launched(clock, *arrays(), is_causal=True) == [256]
    found = cupyflash.tune(*arrays(), is_causal=True)
    assert [str(spec) for spec in found.seconds] == [
        "fwd_sm80-f16-d64-m64n64w4-causal",
        "fwd_sm80-f16-d64-m128n64w8-causal",
    ]
    assert list(found.seconds.values()) == pytest.approx([10e-6, 15e-6])
    assert str(found.chosen) == "fwd_sm80-f16-d64-m64n64w4-causal"
    assert str(found.before) == "fwd_sm80-f16-d64-m128n64w8-causal"
    assert set(clock.calls) == {200}
    assert launched(clock, *arrays(), is_causal=True) == [128]
    # Of the same kind: enough rows for the GPU. Of another: no causal mask, few rows.
    assert launched(clock, *arrays(8192, 3000, 2), is_causal=True) == [128]
    assert launched(clock, *arrays()) == [256]
    assert str(found).splitlines()[0].startswith("NVIDIA A100, imagined: cupy float16 batch (4,)")
    assert str(found).splitlines()[-2:] == [
        "fwd_sm80-f16-d64-m64n64w4-causal       10.0 µs  chosen",
        "fwd_sm80-f16-d64-m128n64w8-causal      15.0 µs  the table's choice",
    ]


class Foreign:
    """An array of another library on the GPU."""

    __dlpack__ = None  # as all such arrays it has one; the stand-in for CuPy does not call it

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=Foreign)


def test_arrays_of_other_libraries_are_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, small_is_fast)
    module = sys.modules["cupy"]
    monkeypatch.setattr(module, "from_dlpack", lambda array: array.array)
    found = cupyflash.tune(*map(Foreign, arrays()), is_causal=True)
    assert str(found.chosen) == "fwd_sm80-f16-d64-m64n64w4-causal"
    assert launched(clock, *arrays(), is_causal=True) == [128]


def test_it_is_found_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, small_is_fast)
    cupyflash.tune(*arrays())
    choose.use_timed(DEVICE, {})
    # As in another process: another module for CuPy, asked for its device anew.
    assert launched(install(monkeypatch, small_is_fast), *arrays()) == [128]
    told = json.loads(tuned.path_for(DEVICE).read_text(encoding="utf-8"))
    assert (told["version"], told["device"]) == (cupyflash.__version__, "NVIDIA A100, imagined")
    (entry,) = told["found"].values()
    assert entry["kernel"] == "fwd_sm80-f16-d64-m64n64w4"
    assert entry["seconds"]["fwd_sm80-f16-d64-m128n64w8"] == pytest.approx(15e-6)
    # Another GPU has its own.
    other = dataclasses.replace(DEVICE, name="another")
    assert launched(install(monkeypatch, small_is_fast, other), *arrays()) == [256]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"found": 3}',
        '{"found": {"key": {}}}',
        '{"found": {"KEY": {"kernel": "fwd_sm80-f16-d64-m8n8w1"}}}',
    ],
)
def test_what_cannot_be_used_is_passed_over(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    clock = install(monkeypatch, small_is_fast)
    cupyflash.tune(*arrays())
    path = tuned.path_for(DEVICE)
    (key,) = json.loads(path.read_text(encoding="utf-8"))["found"]
    path.write_text(text.replace("KEY", key), encoding="utf-8")
    assert launched(install(monkeypatch, small_is_fast), *arrays()) == [256]
    assert clock.gpu.launches


def test_a_kernel_that_cannot_run_is_not_taken() -> None:
    device = dataclasses.replace(DEVICES["L40S"], name="imagined")
    problem, _ = normalize(**heads(1, 2, 200, 64, 256, dtype="float16").arguments())
    selector = choose.selector_of(problem, device)
    (refused,) = (one.spec for one in choose.candidates(selector, device) if one.reasons)
    chosen = choose.choose(problem, device)
    choose.use_timed(device, {choose.key_of(selector): str(refused)})
    assert choose.choose(problem, device) == chosen


def test_another_version_has_found_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, small_is_fast)
    cupyflash.tune(*arrays())
    monkeypatch.setattr(tuned, "__version__", "99")
    assert launched(install(monkeypatch, small_is_fast), *arrays()) == [256]


def test_timed_again_it_is_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, small_is_fast)
    cupyflash.tune(*arrays())
    cupyflash.tune(*arrays(), is_causal=True)
    clock.seconds_of = lambda launch: 1e-6 * launch.block[0] ** -1
    found = cupyflash.tune(*arrays())
    assert found.chosen == found.before
    assert launched(clock, *arrays()) == [256]
    assert launched(clock, *arrays(), is_causal=True) == [128]  # what else was found stays
    assert len(json.loads(tuned.path_for(DEVICE).read_text(encoding="utf-8"))["found"]) == 2


def test_nothing_is_lost_where_several_find_something_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = tuned._read

    def slowly(path: Path) -> Any:
        found = read(path)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(tuned, "_read", slowly)
    keys = [f"key {n}" for n in range(6)]
    with ThreadPoolExecutor(len(keys)) as pool:
        list(pool.map(lambda key: tuned.save(DEVICE, key, f"kernel of {key}", {}), keys))
    assert tuned.load(DEVICE) == {key: f"kernel of {key}" for key in keys}


def test_the_table_wins_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda launch: 10e-6 if launch.block[0] == 128 else 10.05e-6)
    found = cupyflash.tune(*arrays())
    assert found.chosen == found.before == list(found.seconds)[1]


def test_long_calls_are_not_repeated_often(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, lambda launch: 3e-3 if launch.block[0] == 128 else 1.0)
    cupyflash.tune(*arrays())
    assert clock.calls == [1, 2]
    assert {launch.stream for launch in clock.gpu.launches} == {"tuning"}


def test_splits_follow_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate is timed with all of its launches: where blocks share keys, with the one that joins them."""
    names: list[str] = []

    def seconds_of(launch: Launch) -> float:
        names.append(launch.name)
        return 1e-6

    install(monkeypatch, seconds_of)
    cupyflash.tune(*arrays(1, 8192, batch=1))
    assert names[:2] == ["flash_fwd_sm80", "flash_combine"]


def test_explain_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, small_is_fast)
    cupyflash.tune(*arrays())
    capsys.readouterr()
    found = cupyflash.explain(*arrays())
    assert found.plan is not None
    assert str(found.plan.launches[0].spec) == "fwd_sm80-f16-d64-m64n64w4"
    text = capsys.readouterr().out
    assert "fwd_sm80-f16-d64-m64n64w4: chosen" in text
    assert "fwd_sm80-f16-d64-m128n64w8: fwd_sm80-f16-d64-m64n64w4 was the fastest when they were timed" in text


def test_mods_have_a_key_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = install(monkeypatch, small_is_fast)

    def decay(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - 0.1 * abs(q_idx - kv_idx)

    found = cupyflash.tune(*arrays(), score_mod=decay)
    assert isinstance(found.chosen, FwdSpec)
    assert found.chosen.features.mods is not None
    assert launched(clock, *arrays(), score_mod=decay) == [128]
    assert launched(clock, *arrays()) == [256]


def test_keys_tell_selectors_apart() -> None:
    problems = [{}, {"is_causal": True}, {"softcap": 3.0}, {"window": (5, 5)}, {"enable_gqa": True}]
    keys = set()
    for options in problems:
        case = heads(1, 2, 200, 64, 64, dtype="float16", **options)
        arguments = {name: value for name, value in case.arguments().items() if value is not None}
        problem, _ = normalize(**arguments)
        keys.add(choose.key_of(choose.selector_of(problem, DEVICE)))
    assert len(keys) == len(problems) - 1  # with as many key heads, enable_gqa changes nothing


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": "numpy"},
            ValueError,
            r"backend must be \"cuda\" or None, since tune times its kernels, but was 'numpy'",
        ),
        ({"window": 3}, TypeError, "window"),
        ({"precision": "tf32"}, cupyflash.Unsupported, "this call can't be timed: it has no precision 'tf32'"),
    ],
)
def test_what_cannot_be_timed(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    install(monkeypatch, small_is_fast)
    with pytest.raises(error, match=message):
        cupyflash.tune(*arrays(), **options)


def test_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, small_is_fast)
    with pytest.raises(ValueError, match="tune needs a call that computes something"):
        cupyflash.tune(*arrays(seqlen_q=0))


def test_without_a_gpu() -> None:
    query = np.zeros((1, 8, 64, 64), np.float16)
    with pytest.raises(cupyflash.Unsupported, match="this call can't be timed: it takes CuPy arrays only") as refusal:
        cupyflash.tune(query, query, query)
    assert refusal.value.reasons["cuda"]


def test_the_example() -> None:
    assert doctest.testmod(sys.modules["cupyflash.tune"]) == (0, 4)  # cupyflash.tune is the function


def test_a_cache_that_cannot_be_used_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(tuned, "default_cache", lambda: Cache(blocked / "cache"))
    assert tuned.load(DEVICE) == {}
    with pytest.raises(OSError, match="file"):
        tuned.save(DEVICE, "key", "kernel", {})


def test_random_numbers_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, small_is_fast)
    before = pickle.dumps(np.random.get_state())  # noqa: NPY002  the generator that seeds come from
    cupyflash.tune(*arrays(), dropout_p=0.1)
    assert pickle.dumps(np.random.get_state()) == before  # noqa: NPY002
