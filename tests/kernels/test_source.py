"""One text of several files, with every line still at home."""

from __future__ import annotations

import math
import re
import subprocess

import pytest

from cupyflash.build.rendering import render_kernel
from cupyflash.build.source import KernelSource, config, flatten, read_kernel, render
from cupyflash.plan.specs import MaskSummarySpec, MergeSpec, Mods, ModSummarySpec
from cupyflash.problem.trace import trace_mask_mod

KEEP = Mods(None, trace_mask_mod(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx).expression)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A folder of kernels of its own."""
    monkeypatch.setattr("cupyflash.build.source.kernels_folder", lambda: tmp_path)
    return tmp_path


def origins(text):
    """(file, line, text) of each line that a compiler would see there."""
    found, file, number = [], "", 0
    for line in text.splitlines():
        if match := re.fullmatch(r'#line (\d+) "([^"]+)"', line):
            file, number = match[2], int(match[1])
            continue
        found.append((file, number, line))
        number += 1
    return found


def test_lines_stay_at_home(kernels):
    (kernels / "a.cuh").write_text('#pragma once\n#include "b.cuh"\nint a;\n', encoding="utf-8")
    (kernels / "b.cuh").write_text("#pragma once\nint b;\n", encoding="utf-8")
    text = 'int first;\n#include "b.cuh"\n  #  include "a.cuh"  // twice b\n#include "emulator/x.h"\nint last;\n'
    lines = [line for line in origins(flatten(text, "top")) if line[2]]
    assert lines == [
        ("top", 1, "int first;"),
        ("kernels_cu/b.cuh", 2, "int b;"),
        ("kernels_cu/a.cuh", 3, "int a;"),
        ("top", 4, '#include "emulator/x.h"'),
        ("top", 5, "int last;"),
    ]


def test_missing_header_names_the_includer(kernels):
    (kernels / "a.cuh").write_text('\n#include "gone.cuh"\n', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"kernels_cu/a\.cuh:2 includes 'gone\.cuh'"):
        flatten('#include "a.cuh"\n', "top")


def test_config(cxx, tmp_path):
    values = {
        "kBlockM": 64,
        "kLow": -(2**31),
        "kCausal": True,
        "kOff": False,
        "kThird": 1 / 3,
        "Element": "Float16",
    }
    text = config(values)
    program = f"""
struct Float16 {{}};
{text}
template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
static_assert(Config::kBlockM == 64 && Config::kLow == -2147483647 - 1, "");
static_assert(Config::kCausal && !Config::kOff, "");
static_assert(Config::kThird == static_cast<float>({(1 / 3).hex()}), "");
static_assert(same<decltype(Config::kThird), const float> && same<Config::Element, Float16>, "");
"""
    (tmp_path / "config.cpp").write_text(program, encoding="utf-8")
    subprocess.run([*cxx, "-std=c++17", "-fsyntax-only", str(tmp_path / "config.cpp")], check=True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2**31, ValueError, "kX=2147483648 does not fit a C\\+\\+ int"),
        (math.inf, ValueError, "kX=inf is not finite"),
        (None, TypeError, "kX is a NoneType; expected bool, int, float or str"),
    ],
)
def test_config_refuses(value, error, message):
    with pytest.raises(error, match=message):
        config({"kX": value})


def test_render(kernels):
    (kernels / "types.cuh").write_text("struct Float16 {};\n", encoding="utf-8")
    (kernels / "k.cu").write_text('#include "types.cuh"\nint k = Config::kN;\n', encoding="utf-8")
    source = render("k.cu", {"kN": 3}, ["k"], "k-n3")
    assert source.name == "k-n3"
    assert source.entries == ("k",)
    code = [line for _, _, line in origins(source.text) if line]
    assert code == [
        "struct Float16 {};",
        "struct Config {",
        "  static constexpr int kN = 3;",
        "};",
        "int k = Config::kN;",
    ]


@pytest.mark.parametrize("spec", [MaskSummarySpec(), MergeSpec("float16", "float16"), ModSummarySpec(KEEP)], ids=str)
def test_what_older_nvrtc_lack_is_kept_from_them(spec):
    """They, 13.2 among them, refuse a whole file for one ``__builtin_offsetof``, and none is here to say so."""
    asked = r"!defined\(__CUDACC_RTC__\) \|\| __has_builtin\(__builtin_offsetof\)"
    guard = re.compile(rf"^#if {asked}\n(.*?)^#endif\n", re.M | re.S)
    text = render_kernel(spec).text
    assert any("__builtin_offsetof" in guarded for guarded in guard.findall(text))
    assert "__builtin_offsetof" not in guard.sub("", text)


def test_sources_are_values():
    assert hash(KernelSource("a", "b", ("c",))) == hash(KernelSource("a", "b", ("c",)))


def test_the_isa_layer_is_one_text():
    text = flatten(read_kernel("isa.cuh"), "kernels_cu/isa.cuh")
    assert text.count("mma.sync.aligned.m16n8k16.row.col.f32.f16") == 1
    assert "#pragma once" not in text
    assert re.findall(r'#include\s+"(.*)"', text) == ["emulator/isa_host.h", "emulator/observe.h"]


def test_rules_of_the_folder(kernels_files):
    """asm only in isa_*.cuh and the emulator's fibers; #if only in isa.cuh and the emulator."""
    for path, text in kernels_files.items():
        code = re.sub(r"//.*", "", text)
        if re.search(r"\basm\b", code):
            assert re.fullmatch(r"isa_\w+\.cuh|emulator/fiber\.cpp", path), path
        if re.search(r"^\s*#\s*if", code, re.MULTILINE):
            assert path == "isa.cuh" or path.startswith("emulator/"), path
        if not path.startswith("emulator/"):
            assert not re.search(r"#\s*include\s*<", code), path
            assert not re.search(r"(?<!long )\blong\b(?! long\b)", code), path


@pytest.fixture
def kernels_files():
    from cupyflash.build.source import kernels_folder

    folder = kernels_folder()
    paths = [path for path in folder.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")]
    assert len(paths) > 10
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}
