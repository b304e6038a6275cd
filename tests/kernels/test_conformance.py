"""What GPUs gave, replayed by the emulator; and whether the comparison would notice."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.conformance import (
    PROBES,
    RECORDED,
    Probe,
    Recording,
    load_recording,
    make_probes,
    probes_of,
    run_emulated,
    same_values,
    save_recording,
)
from tests.kernels.harness import HERE

FILES = sorted(RECORDED.glob("*.npz"))
nothing = pytest.param(
    None, id="nothing", marks=pytest.mark.skip("no GPU has recorded its outputs yet: `make gpu` does")
)


@pytest.mark.usefixtures("cxx")
@pytest.mark.parametrize("path", [*FILES] or [nothing], ids=lambda path: path and path.stem)
def test_replay(path: Path) -> None:
    replay(load_recording(path))


def test_recordings_are_complete() -> None:
    for recording in map(load_recording, FILES):
        if lacking := sorted(set(probes_of(recording.arch)) - set(recording.outputs)):
            pytest.skip(f"no {recording.arch} GPU has recorded {', '.join(lacking)} yet: `make gpu` does")


def replay(recording: Recording) -> None:
    """Compares everything before it fails, since each difference is a finding."""
    assert recording.outputs, "the recording is empty"
    findings = []
    for name, recorded in recording.outputs.items():
        assert name in PROBES, f"{name} is recorded on {recording.arch}, but there is no such probe"
        inputs = recording.inputs[name]
        try:
            PROBES[name].compare(run_emulated(PROBES[name], inputs), recorded, inputs)
        except AssertionError as error:
            findings.append(f"{name} on {recording.arch} ({recording.versions}):\n{error}")
    assert not findings, "\n\n".join(findings)


def emulated(names: list[str]) -> Recording:
    """A recording whose GPU is the emulator."""
    inputs = {name: PROBES[name].inputs for name in names}
    return Recording(
        "sm_90", {"driver": "none"}, inputs, {name: run_emulated(PROBES[name], inputs[name]) for name in names}
    )


@pytest.fixture(scope="module")
def recording(cxx: object) -> Recording:
    return emulated(list(PROBES))


def test_every_kernel_is_probed() -> None:
    entries = {
        (file, entry)
        for file in ("probes.cu", "probes_sm90.cu", "probes_sm90a.cu")
        for entry in re.findall(r"__global__ void[^;{]*?\b(probe_\w+)\(", (HERE / file).read_text(encoding="utf-8"))
    }
    assert entries == {(probe.file, probe.entry) for probe in PROBES.values()}


def test_inputs_are_seeded() -> None:
    again = make_probes()
    assert list(again) == list(PROBES)
    for name, probe in PROBES.items():
        for key, array in probe.inputs.items():
            np.testing.assert_array_equal(again[name].inputs[key], array)


def test_round_trip(recording: Recording, tmp_path: Path) -> None:
    loaded = load_recording(save_recording(recording, tmp_path))
    assert (loaded.arch, loaded.versions) == ("sm_90", {"driver": "none"})
    assert set(loaded.outputs) == set(PROBES) == set(probes_of("sm_90"))
    replay(loaded)


def test_older_gpus_run_fewer_probes() -> None:
    files = {name: PROBES[name].file for name in PROBES}
    assert {files[name] for name in probes_of("sm_80")} == {"probes.cu"}
    assert {files[name] for name in probes_of("sm_90")} == {"probes.cu", "probes_sm90.cu", "probes_sm90a.cu"}


def test_later_gpus_lack_what_one_has_alone() -> None:
    missing = set(PROBES) - set(probes_of("sm_120"))
    assert {PROBES[name].file for name in missing} == {"probes_sm90a.cu"}


@pytest.mark.parametrize("name", PROBES)
def test_one_wrong_result_is_noticed(recording: Recording, name: str) -> None:
    """Each output word that the kernel writes, wrong by its lowest bit or by far, as the rule has it."""
    probe, inputs = PROBES[name], recording.inputs[name]
    right = recording.outputs[name]
    probe.compare(right, right, inputs)
    for output, words in right.items():
        written = np.flatnonzero(words.ravel() != probe.outputs[output].ravel())
        if probe.rules.get(output) is same_values:
            written = written[~np.isnan(words.ravel()[written].view(np.float32))]
        floats = [place for place in written if is_float(probe, output, place)]
        if len(floats) == len(written):  # sums that nearly cancel may move far within the rule
            sizes = np.abs(words.ravel()[written].view(np.float32))
            written = written[sizes >= np.median(sizes)]
        assert written.size, f"{output} is not written"
        for place in (written[0], written[-1]):
            wrong = {**right, output: words.copy()}
            # A float moved by 2⁻¹¹ of itself is far from what any rule allows; 1 is enough for all others.
            wrong[output].ravel()[place] ^= 1 << (12 if is_float(probe, output, place) else 0)
            with pytest.raises(AssertionError):
                probe.compare(right, wrong, inputs)
            with pytest.raises(AssertionError):
                probe.compare(wrong, right, inputs)


def is_float(probe: Probe, output: str, place: int) -> bool:
    return probe.entry.startswith(("probe_mma", "probe_wgmma")) or (probe.entry == "probe_convert" and place % 4 == 0)


def test_replay_tells_all_differences(recording: Recording) -> None:
    outputs = {
        name: {key: array.copy() for key, array in recording.outputs[name].items()} for name in ("cp_async", "ldmatrix")
    }
    for named in outputs.values():
        named["out"].ravel()[0] ^= 1
    with pytest.raises(AssertionError, match=r"(?s)cp_async on sm_90 .*ldmatrix on sm_90"):
        replay(Recording("sm_90", {"driver": "none"}, recording.inputs, outputs))


def test_unknown_probe_is_refused(recording: Recording) -> None:
    with pytest.raises(AssertionError, match="gone is recorded on sm_80, but there is no such probe"):
        replay(Recording("sm_80", {}, {"gone": {}}, {"gone": recording.outputs["vote-00000000"]}))
