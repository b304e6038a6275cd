"""The other half of the ISA layer: text and operand order of each instruction, read from the compiler's PTX.

No GPU is needed for that. Each wrapper is compiled alone in a kernel whose parameters are its operands; in
the PTX, every register is traced back to the parameter it was loaded from, or forward to the element of `out`
that it is stored to.
"""

from __future__ import annotations

import re

import pytest

from cupyflash.build.nvrtc import compile_ptx
from cupyflash.build.source import flatten, read_kernel
from tests.kernels.harness import HERE, source_of

pytestmark = pytest.mark.usefixtures("nvrtc")

FRAG = "u32 f0, u32 f1, u32 f2, u32 f3"


def ldmatrix(count, suffix=""):
    outs = ", ".join(f"out[{i}]" for i in range(count))
    stores = " ".join(f"out[{i}] = f[{i}];" for i in range(count))
    trans = ".trans" if suffix else ""
    return (
        "u32 row",
        f"u32 f[{count}]; isa::ldmatrix_x{count}{suffix}(f, row); {stores}",
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{outs}}}, [row];",
    )


def stmatrix(count, suffix=""):
    names = ", ".join(f"f{i}" for i in range(count))
    trans = ".trans" if suffix else ""
    return (
        f"u32 row, {FRAG}",
        f"const u32 f[{count}] = {{{names}}}; isa::stmatrix_x{count}{suffix}(row, f);",
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [row], {{{names}}};",
    )


def mma(element, name):
    return (
        "u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, float c0, float c1, float c2, float c3",
        "const u32 a[4] = {a0, a1, a2, a3}; float c[4] = {c0, c1, c2, c3}; "
        f"isa::mma_m16n8k16({element}(), c, a, b0, b1); "
        "for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(c[i]);",
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{out[0], out[1], out[2], out[3]}}, "
        "{a0, a1, a2, a3}, {b0, b1}, {out[0], out[1], out[2], out[3]};",
    )


def coordinates(count):
    names = [f"c{i}" for i in range(count)]
    return ", ".join(f"int {name}" for name in names), ", ".join(names)


def bulk_load(rank):
    parameters, names = coordinates(rank)
    return (
        f"u32 d, const TensorMap* map, u32 bar, u64 policy, {parameters}",
        f"isa::bulk_load(d, map, bar, policy, {names});",
        f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        f"[d], [map, {{{names}}}], [bar], policy;",
    )


def bulk_store(rank):
    parameters, names = coordinates(rank)
    return (
        f"const TensorMap* map, u32 s, {parameters}",
        f"isa::bulk_store(map, s, {names});",
        f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [map, {{{names}}}], [s];",
    )


def l2_policy(name):
    return (
        "u32 unused",
        f"const u64 policy = isa::l2_{name}(); out[0] = static_cast<u32>(policy);",
        f"createpolicy.fractional.L2::{name}.b64 {{any}}, 1.0;",
    )


WGMMA_SIZES = range(16, 257, 16)


def wgmma(element, name, n, registers_of_a, transposed):
    """Accumulators come from `in`, so that one parameter stands for all of them; their order is another test's."""
    parameters, operands, flags = (
        ("u32 a0, u32 a1, u32 a2, u32 a3, u64 b", "{a0, a1, a2, a3}, b", transposed[1])
        if registers_of_a
        else ("u64 a, u64 b", "a, b", f"{transposed[0]}, {transposed[1]}")
    )
    call = (
        f"const u32 a[4] = {{a0, a1, a2, a3}}; isa::wgmma_rs<{transposed[1]}>({element}(), acc, a, b, keep);"
        if registers_of_a
        else f"isa::wgmma_ss<{transposed[0]}, {transposed[1]}>({element}(), acc, a, b, keep);"
    )
    accumulators = ", ".join(["{any}"] * (n // 2))
    return (
        f"{parameters}, const float* in, u32 keep",
        f"float acc[{n // 2}]; for (int i = 0; i < {n // 2}; ++i) acc[i] = in[i]; {call} "
        f"for (int i = 0; i < {n // 2}; ++i) out[i] = __float_as_uint(acc[i]);",
        "{ .reg .pred accumulate; setp.ne.u32 accumulate, {any}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} {{{accumulators}}}, {operands}, accumulate, 1, 1, "
        f"{flags}; }}",
    )


# name of the wrapper: (parameters, statements, the instruction); {any} stands for any register
WRAPPERS = {
    "ex2": ("float x", "out[0] = __float_as_uint(isa::ex2(x));", "ex2.approx.ftz.f32 out[0], x;"),
    "max_nan": ("float x, float y", "out[0] = __float_as_uint(isa::max_nan(x, y));", "max.NaN.f32 out[0], x, y;"),
    "pack_f16x2": (
        "float lo, float hi",
        "out[0] = isa::pack_f16x2(lo, hi);",
        "cvt.rn.f16x2.f32 out[0], hi, lo;",
    ),
    "pack_bf16x2": (
        "float lo, float hi",
        "out[0] = isa::pack_bf16x2(lo, hi);",
        "cvt.rn.bf16x2.f32 out[0], hi, lo;",
    ),
    "pack_f16x2_sm75": (
        "float lo, float hi",
        "out[0] = isa::pack_f16x2_sm75(lo, hi);",
        "{\n.reg .b16 lower, upper;\ncvt.rn.f16.f32 lower, lo;\ncvt.rn.f16.f32 upper, hi;\n"
        "mov.b32 out[0], {lower, upper}; }",
    ),
    "unpack_f16": ("u16 x", "out[0] = __float_as_uint(isa::unpack_f16(x));", "cvt.f32.f16 out[0], x;"),
    "sync_warp": ("", "isa::sync_warp();", "bar.warp.sync 0xffffffff;"),
    "sync_threads": ("", "isa::sync_threads();", "bar.sync 0;"),
    "barrier_sync": ("int id, int n", "isa::barrier_sync(id, n);", "bar.sync id, n;"),
    "barrier_arrive": ("int id, int n", "isa::barrier_arrive(id, n);", "bar.arrive id, n;"),
    "shuffle_xor": (
        "u32 x, int n",
        "out[0] = isa::shuffle_xor(x, n);",
        "shfl.sync.bfly.b32 out[0], x, n, 0x1f, 0xffffffff;",
    ),
    "shuffle_idx": (
        "u32 x, int n",
        "out[0] = isa::shuffle_idx(x, n);",
        "shfl.sync.idx.b32 out[0], x, n, 0x1f, 0xffffffff;",
    ),
    "shuffle_down": (
        "u32 x, int n",
        "out[0] = isa::shuffle_down(x, n);",
        "shfl.sync.down.b32 out[0], x, n, 0x1f, 0xffffffff;",
    ),
    "mul_rn float": ("float x, float y", "out[0] = __float_as_uint(isa::mul_rn(x, y));", "mul.rn.f32 out[0], x, y;"),
    "mul_rn double": (
        "double x, double y",
        "*reinterpret_cast<double*>(out) = isa::mul_rn(x, y);",
        "mul.rn.f64 out[0], x, y;",
    ),
    "ldg_1": ("const u32* p", "out[0] = isa::ldg_1(p);", "ld.global.u8 out[0], [p];"),
    "ldg_2": ("const u32* p", "out[0] = isa::ldg_2(p);", "ld.global.u16 out[0], [p];"),
    "ldg_4": ("const u32* p", "out[0] = isa::ldg_4(p);", "ld.global.u32 out[0], [p];"),
    "ldg_8": (
        "const u32* p",
        "const uint2 v = isa::ldg_8(p); out[0] = v.x; out[1] = v.y;",
        "ld.global.v2.u32 {out[0], out[1]}, [p];",
    ),
    "ldg_16": (
        "const u32* p",
        "const uint4 v = isa::ldg_16(p); out[0] = v.x; out[1] = v.y; out[2] = v.z; out[3] = v.w;",
        "ld.global.v4.u32 {out[0], out[1], out[2], out[3]}, [p];",
    ),
    "stg_1": ("u32* p, u32 x", "isa::stg_1(p, x);", "st.global.u8 [p], x;"),
    "stg_2": ("u32* p, u32 x", "isa::stg_2(p, x);", "st.global.u16 [p], x;"),
    "stg_4": ("u32* p, u32 x", "isa::stg_4(p, x);", "st.global.u32 [p], x;"),
    "stg_8": ("u32* p, u32 x, u32 y", "isa::stg_8(p, uint2{x, y});", "st.global.v2.u32 [p], {x, y};"),
    "stg_16": (
        f"u32* p, {FRAG}",
        "isa::stg_16(p, uint4{f0, f1, f2, f3});",
        "st.global.v4.u32 [p], {f0, f1, f2, f3};",
    ),
    "atomic_add": ("u32* p, u32 x", "out[0] = isa::atomic_add(p, x);", "atom.global.add.u32 out[0], [p], x;"),
    "atomic_add float": (
        "float* p, float x",
        "out[0] = __float_as_uint(isa::atomic_add(p, x));",
        "atom.global.add.f32 out[0], [p], x;",
    ),
    "atomic_max": ("u32* p, u32 x", "out[0] = isa::atomic_max(p, x);", "atom.global.max.u32 out[0], [p], x;"),
    "ld_shared_4": ("u32 p", "out[0] = isa::ld_shared_4(p);", "ld.shared.u32 out[0], [p];"),
    "ld_shared_8": (
        "u32 p",
        "const uint2 v = isa::ld_shared_8(p); out[0] = v.x; out[1] = v.y;",
        "ld.shared.v2.u32 {out[0], out[1]}, [p];",
    ),
    "ld_shared_16": (
        "u32 p",
        "const uint4 v = isa::ld_shared_16(p); out[0] = v.x; out[1] = v.y; out[2] = v.z; out[3] = v.w;",
        "ld.shared.v4.u32 {out[0], out[1], out[2], out[3]}, [p];",
    ),
    "st_shared_4": ("u32 p, u32 x", "isa::st_shared_4(p, x);", "st.shared.u32 [p], x;"),
    "st_shared_8": (
        "u32 p, u32 x, u32 y",
        "isa::st_shared_8(p, uint2{x, y});",
        "st.shared.v2.u32 [p], {x, y};",
    ),
    "st_shared_16": (
        f"u32 p, {FRAG}",
        "isa::st_shared_16(p, uint4{f0, f1, f2, f3});",
        "st.shared.v4.u32 [p], {f0, f1, f2, f3};",
    ),
    "cp_async_16": (
        "u32 d, const u32* s, u32 n",
        "isa::cp_async_16(d, s, n);",
        "cp.async.cg.shared.global [d], [s], 16, n;",
    ),
    "cp_async_commit": ("", "isa::cp_async_commit();", "cp.async.commit_group;"),
    "cp_async_wait": ("", "isa::cp_async_wait<3>();", "cp.async.wait_group 3;"),
    "ldmatrix_x1": ldmatrix(1),
    "ldmatrix_x2": ldmatrix(2),
    "ldmatrix_x4": ldmatrix(4),
    "ldmatrix_x1_trans": ldmatrix(1, "_trans"),
    "ldmatrix_x2_trans": ldmatrix(2, "_trans"),
    "ldmatrix_x4_trans": ldmatrix(4, "_trans"),
    "mma_m16n8k16 f16": mma("Float16", "f16"),
    "mma_m16n8k16 bf16": mma("BFloat16", "bf16"),
    "mma_m16n8k8 f16": (
        "u32 a0, u32 a1, u32 b0, float c0, float c1, float c2, float c3",
        "float c[4] = {c0, c1, c2, c3}; isa::mma_m16n8k8(Float16(), c, a0, a1, b0); "
        "for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(c[i]);",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {out[0], out[1], out[2], out[3]}, {a0, a1}, {b0}, "
        "{out[0], out[1], out[2], out[3]};",
    ),
    "stmatrix_x1": stmatrix(1),
    "stmatrix_x2": stmatrix(2),
    "stmatrix_x4": stmatrix(4),
    "stmatrix_x1_trans": stmatrix(1, "_trans"),
    "stmatrix_x2_trans": stmatrix(2, "_trans"),
    "stmatrix_x4_trans": stmatrix(4, "_trans"),
    "mbarrier_init": ("u32 bar, u32 n", "isa::mbarrier_init(bar, n);", "mbarrier.init.shared::cta.b64 [bar], n;"),
    "mbarrier_arrive": ("u32 bar", "isa::mbarrier_arrive(bar);", "mbarrier.arrive.shared::cta.b64 _, [bar];"),
    "mbarrier_arrive_expect_tx": (
        "u32 bar, u32 n",
        "isa::mbarrier_arrive_expect_tx(bar, n);",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], n;",
    ),
    "mbarrier_wait": (
        "u32 bar, u32 parity",
        "isa::mbarrier_wait(bar, parity);",
        "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [bar], parity; @!done bra wait; }",
    ),
    "fence_mbarrier_init": ("", "isa::fence_mbarrier_init();", "fence.mbarrier_init.release.cluster;"),
    "fence_proxy_async": ("", "isa::fence_proxy_async();", "fence.proxy.async.shared::cta;"),
    "prefetch_tensor_map": (
        "const TensorMap* map",
        "isa::prefetch_tensor_map(map);",
        "prefetch.tensormap [map];",
    ),
    **{f"l2_{name}": l2_policy(name) for name in ("evict_first", "evict_normal", "evict_last")},
    **{f"bulk_load {rank}": bulk_load(rank) for rank in (3, 4, 5)},
    **{f"bulk_store {rank}": bulk_store(rank) for rank in (3, 4, 5)},
    "bulk_commit": ("", "isa::bulk_commit();", "cp.async.bulk.commit_group;"),
    "bulk_wait": ("", "isa::bulk_wait<3>();", "cp.async.bulk.wait_group 3;"),
    "bulk_wait_read": ("", "isa::bulk_wait_read<2>();", "cp.async.bulk.wait_group.read 2;"),
    "nanosleep": ("u32 n", "isa::nanosleep(n);", "nanosleep.u32 n;"),
    "wgmma_fence": ("", "isa::wgmma_fence();", "wgmma.fence.sync.aligned;"),
    "wgmma_commit": ("", "isa::wgmma_commit();", "wgmma.commit_group.sync.aligned;"),
    "wgmma_wait": ("", "isa::wgmma_wait<1>();", "wgmma.wait_group.sync.aligned 1;"),
    "setmaxnreg_dec": ("", "isa::setmaxnreg_dec<24>();", "setmaxnreg.dec.sync.aligned.u32 24;"),
    "setmaxnreg_inc": ("", "isa::setmaxnreg_inc<240>();", "setmaxnreg.inc.sync.aligned.u32 240;"),
    **{
        f"wgmma_{'rs' if in_registers else 'ss'} {name} {n}": wgmma(element, name, n, in_registers, flags)
        for n in WGMMA_SIZES
        for in_registers in (False, True)
        for (element, name), flags in zip(
            (("Float16", "f16"), ("BFloat16", "bf16")), ((0, 1), (0 if in_registers else 1, 0)), strict=True
        )
    },
}
# Functions of several instructions; test_isa.py runs them.
COMPOSED = {
    "ballot",
    "any",
    "all",
    "atomic_max",
    "unpack_bf16",
    "float_bits",
    "bits_float",
    "double_bits",
    "bits_double",
    "pack",
    "shared_base",
    "elect_one",
}
INDICES = {"thread_index", "warp_index", "lane_index"} | {
    f"{what}_{axis}" for what in ("block_index", "grid_size") for axis in "xyz"
}


def entry_name(wrapper):
    return "golden_" + wrapper.replace(" ", "_")


DEVICE_HEADERS = ("isa_sm80.cuh", "isa_sm90.cuh", "isa_sm90a.cuh")


def device_texts():
    """What stands in the headers, macros' line ends taken out."""
    return "".join(map(read_kernel, DEVICE_HEADERS)).replace("\\\n", "\n")


@pytest.fixture(scope="module")
def ptx():
    """The PTX of every wrapper's kernel, by wrapper."""
    text = '#include "isa.cuh"\n'
    for wrapper, (parameters, statements, _) in WRAPPERS.items():
        signature = f"{entry_name(wrapper)}(u32* out{', ' if parameters else ''}{parameters})"
        text += f'extern "C" __global__ void {signature} {{ {statements} }}\n'
    whole = compile_ptx(source_of(text, "golden.cu"), "compute_90a")
    bodies = {}
    for wrapper in WRAPPERS:
        start = whole.index(f".entry {entry_name(wrapper)}(")
        bodies[wrapper] = whole[start : whole.index("\tret;\n", start)]
    return bodies


def instructions(body, parameters):
    """The inline assembly of a kernel, registers replaced by what they mean."""
    names = ["out", *(parameter.split()[-1] for parameter in parameters.split(",") if parameter.strip())]
    meaning = {}
    for register, index in re.findall(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\];", body):
        meaning[register] = names[int(index)]
    outside = re.sub(r"// begin inline asm.*?// end inline asm", "", body, flags=re.DOTALL)
    # Copies and conversions of address space do not change what a value is; stores to `out` name results.
    for target, origin in re.findall(r"(?:mov|cvta\.to\.global)\.\w+\s+(%\w+), (%\w+);", outside):
        if origin in meaning:
            meaning[target] = meaning[origin]
    copies = re.findall(r"mov\.\w+\s+(%\w+), (%\w+);", outside)
    for address, offset, stored in re.findall(r"st\.global\.\w+\s+\[(%\w+)(?:\+(\d+))?\], (%\w+);", outside):
        assert meaning[address] == "out"
        name = f"out[{int(offset or 0) // 4}]"
        meaning[stored] = name
        for target, origin in copies:
            if target == stored:
                meaning[origin] = name
    found = re.findall(r"// begin inline asm\s*(.*?)\s*// end inline asm", body, flags=re.DOTALL)
    return [re.sub(r"%\w+", lambda match: meaning.get(match[0], match[0]), text) for text in found]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_instruction(ptx, wrapper):
    parameters, _, expected = WRAPPERS[wrapper]
    (found,) = instructions(ptx[wrapper], parameters)
    pattern = re.escape(" ".join(expected.split())).replace(re.escape("{any}"), r"(?:%\w+|out\[\d+\]|\w+)")
    assert re.fullmatch(pattern, " ".join(found.split())), f"{found}\n{expected}"


def test_accumulators_go_in_and_come_out(ptx):
    """`+f` operands have one register; it must hold c0..c3 before the mma, in order."""
    for wrapper, first in (("mma_m16n8k16 f16", 7), ("mma_m16n8k16 bf16", 7), ("mma_m16n8k8 f16", 4)):
        body = ptx[wrapper]
        before = body[: body.index("// begin inline asm")]
        loaded = dict(re.findall(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\];", before))
        held = {target: loaded[origin] for target, origin in re.findall(r"mov\.\w+\s+(%\w+), (%\w+);", before)}
        registers = re.search(r"f32 \{(.*?)\}", body)
        assert registers is not None
        found = [int({**loaded, **held}[register]) for register in registers[1].split(", ")]
        assert found == [*range(first, first + 4)]


@pytest.mark.parametrize("n", WGMMA_SIZES)
def test_accumulators_of_wgmma_are_in_order(ptx, n):
    """Register i of the instruction is loaded from in[i] and stored to out[i]."""
    for wrapper in (f"wgmma_ss f16 {n}", f"wgmma_rs bf16 {n}"):
        before, text, after = re.split(r"// begin inline asm|// end inline asm", ptx[wrapper])
        found = re.search(r"m64n\d+k16\S+ \{(.*?)\}", text)
        assert found is not None
        registers = found[1].split(", ")
        assert len(registers) == n // 2
        moves = dict(re.findall(r"mov\.\w+\s+(%\w+), (%\w+);", before))
        loaded = re.findall(r"ld\.global\.\w+\s+(%\w+), \[%\w+(?:\+(\d+))?\];", before)
        offsets = {register: int(offset or 0) for register, offset in loaded}
        assert [offsets[moves.get(register, register)] for register in registers] == [4 * i for i in range(n // 2)]
        moves = {origin: target for target, origin in re.findall(r"mov\.\w+\s+(%\w+), (%\w+);", after)}
        stored = re.findall(r"st\.global\.\w+\s+\[%\w+(?:\+(\d+))?\], (%\w+);", after)
        offsets = {register: int(offset or 0) for offset, register in stored}
        assert [offsets[moves.get(register, register)] for register in registers] == [4 * i for i in range(n // 2)]


def test_every_wrapper_is_here():
    functions = set(re.findall(r"__forceinline__ \w+ (\w+)\(", device_texts()))
    assert functions == {wrapper.split()[0] for wrapper in WRAPPERS} | COMPOSED | INDICES


def test_both_homes_have_the_same_functions():
    """A kernel that compiles against one header compiles against the other: same names, same parameters."""

    def signatures(text, pattern):
        code = " ".join(re.sub(r"//.*", "", text).split())
        found = set()
        for name, parameters in re.findall(pattern, code):
            parameters = re.sub(r",? ?Site site = Site::here\(\)", "", parameters)
            found.add((name, parameters.replace(" (&", "(&")))
        return found

    device = device_texts()
    host = read_kernel("emulator/isa_host.h")
    pattern = r"{} [\w]+ (\w+)\(((?:[^()]|\([^()]*\)(?! \{{))*)\) \{{"
    of_device = signatures(device, pattern.format("__device__ __forceinline__"))
    of_host = signatures(host[host.index("namespace isa {") :], pattern.format("inline"))
    assert len(of_device) > 50
    assert of_device == of_host


@pytest.mark.parametrize(
    ("file", "arch"),
    [
        ("probes.cu", "compute_80"),
        ("probes.cu", "compute_90"),
        ("probes_sm90.cu", "compute_90"),
        ("probes_sm90.cu", "compute_100"),
        ("probes_sm90.cu", "compute_120"),
        ("probes_sm90a.cu", "compute_90a"),
    ],
)
def test_probes_compile_for_the_device(file, arch):
    text = (HERE / file).read_text(encoding="utf-8")
    assert ".entry probe_" in compile_ptx(source_of(text, file), arch)


def test_flattened_text_has_no_emulator_for_the_device():
    assert "namespace emulator" not in flatten(read_kernel("isa.cuh"), "isa.cuh")
