"""The CUDA kernels without a GPU: they compile, what ptxas made of them, and the built module.

nvcc compiles the kernels of plain calls in float32 for sm_90, and those on tensor cores and of all
calls as far as PTX: what ptxas makes of the latter takes it three more minutes of a core. More:

    PYMETA_TEST_CUDA="plain chains every tensor float double 80 90 100 120" \\
      pytest tests/native/test_cuda_build.py

The module is looked at where it was built with CUDA; PYMETA_TEST_MODULE names another one.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import source_tree
from background import Program

from pymeta import native
from pymeta.bench.cases import CUDA_CASES

ROOT = source_tree.need("csrc/cuda", "bench/kernel_report.py", "CMakeLists.txt")
KERNELS = ROOT / "csrc" / "cuda" / "kernels.cu"
# Bytes stored to spilled registers in a kernel and what it calls. Those there are lie outside of
# the products' inner loops; as many again would be a change that somebody should look at.
SPILLS = 3000


def load_report():
    spec = importlib.util.spec_from_file_location("kernel_report", ROOT / "bench/kernel_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


report = load_report()


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
CHOSEN = os.environ.get("PYMETA_TEST_CUDA", "plain tensor.ptx every.ptx float 90").split()
REALS = [word for word in CHOSEN if word in ("float", "double")]
ARCHITECTURES = [word for word in CHOSEN if word.isdigit()]
OTHERS = [word for word in CHOSEN if word not in (*REALS, *ARCHITECTURES)]
FAMILIES = [word for word in OTHERS if not word.endswith(".ptx")]
TRANSLATED = [word.removesuffix(".ptx") for word in OTHERS if word not in FAMILIES]


# ---- the kernels --------------------------------------------------------------------------------


def options(family: str, real: str) -> list[str]:
    """nvcc's for the kernels of one family and real type; those of CMakeLists.txt."""
    found = ["-std=c++17", "-O3", "-fmad=false", "-diag-suppress=20011,20014", "-DPYMETA_BLOCK"]
    found += [f"-DPYMETA_FAMILY={family}", f"-DPYMETA_ISA=cuda_{family}_{real}"]
    return [*found, f"-DPYMETA_REAL={real}", f"-I{ROOT / 'csrc'}", str(KERNELS)]


def compiler(program: str, family: str, real: str) -> Program:
    """nvcc on kernels for all chosen architectures."""
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    words = [*options(family, real), *code, "-Xptxas=-v", "-c", "-o", "{folder}/kernels.o"]
    words += ["--keep", "--keep-dir", "{folder}"]  # the cubins, whose sections have the code
    return Program(program, *words, cwd=ROOT)


def translator(program: str, family: str, real: str) -> Program:
    """nvcc on kernels, as far as PTX for the first of the chosen architectures."""
    target = f"-arch=compute_{ARCHITECTURES[0]}"
    words = [*options(family, real), target, "-ptx", "-o", "{folder}/kernels.ptx"]
    return Program(program, *words, cwd=ROOT)


FLOAT_ONLY = "tensor"


def kinds(families: list[str]) -> list[tuple[str, str]]:
    """Those of which there are kernels."""
    both = [(family, real) for family in families for real in REALS]
    return [kind for kind in both if kind != (FLOAT_ONLY, "double")]


KINDS = kinds(FAMILIES)
COMPILERS = {kind: compiler(found, *kind) for kind in KINDS if (found := nvcc()) is not None}
PTX_KINDS = kinds(TRANSLATED)
TRANSLATORS = {
    kind: translator(found, *kind) for kind in PTX_KINDS if (found := nvcc()) is not None
}


def defined_kernels() -> list[str]:
    """The names of the kernels. A macro or a template may make more than these, but none fewer."""
    found = re.findall(r"__global__[^;{]*?\b(\w+)\s*\(\s*(?:const\s|__grid)", KERNELS.read_text())
    assert len(found) >= 3
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Of each family and real type: object file and ptxas's log."""
    folder, made = tmp_path_factory.mktemp("cuda"), {}
    for kind, program in COMPILERS.items():
        done, log = program.result(), folder / f"{'_'.join(kind)}.log"
        assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stderr[-8000:]}"
        log.write_text(done.stderr)
        made[kind] = program.folder / "kernels.o", log
    return made


@needs_nvcc
def test_options_are_those_of_the_build():
    """What is compiled here is what CMake compiles."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    options = ("PYMETA_BLOCK", "PYMETA_FAMILY", "-fmad=false", "-diag-suppress=20011,20014")
    for word in ("csrc/cuda/kernels.cu", *options):
        assert word in cmake, word


@needs_nvcc
@pytest.mark.background(*COMPILERS.values())
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_kernel_is_there_and_none_spills_much(kind, compiled):
    _, log = compiled[kind]
    kernels = report.collect([], [log])
    for arch in ARCHITECTURES:
        own = [k for k in kernels if k.arch == f"sm_{arch}"]
        missing = [name for name in defined_kernels() if not any(name in k.symbol for k in own)]
        assert not missing, f"sm_{arch}: {missing} are not in {[k.name for k in own]}"
    assert not report.spilling(kernels, SPILLS)
    for k in kernels:
        assert 0 < k.registers <= 255 and k.static_shared_bytes == 0, k


def documented() -> tuple[str, dict[str, list[int]]]:
    """By bench/README.md: for which nvcc, and {kernel: registers, stack, spills stored, code}."""
    text = (ROOT / "bench" / "README.md").read_text()
    (release,) = set(re.findall(r"\(nvcc (\d+\.\d+), .*sm_90, float32\)", text))
    rows = re.findall(
        r"^\| (.+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE
    )
    return release, {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in rows}


DOCUMENTED = {
    "plain": "`run_tasks_kernel` of plain calls, with all it calls",
    "tensor": "that of plain calls with products on tensor cores",
    "chains": "that of linear chains' other calls",
    "every": "that of everything",
}
OTHERS_OF_PLAIN = ("pack_start_kernel", "reduce_sums_kernel")


def code_sizes(folder: Path, arch: str) -> dict[str, int]:
    """{symbol: bytes} of the kernels in a cubin that nvcc kept, whose name has the architecture.

    Where there is only one, it may not.
    """
    (cubin,) = (p for p in folder.glob("*.cubin") if p.stem.endswith((f"_{arch}", "kernels")))
    said = subprocess.run(["readelf", "-SW", str(cubin)], capture_output=True, text=True).stdout
    found = re.findall(r"\.text\.(\w+) +PROGBITS +\w+ \w+ (\w+)", said)
    return {symbol: int(size, 16) for symbol, size in found}


@needs_nvcc
@pytest.mark.background(*COMPILERS.values())
@pytest.mark.skipif("90" not in ARCHITECTURES, reason="figures are those of sm_90")
@pytest.mark.parametrize("kind", [k for k in KINDS if k[1] == "float"], ids="-".join)
def test_kernels_are_what_the_documentation_says(kind, compiled):
    """To the byte by the compiler that it names. Another one may take a fifth more."""
    release, known = documented()
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    more = 1.0 if f"release {release}," in said else 1.2
    family = kind[0]
    wanted = {"run_tasks_kernel": known[DOCUMENTED[family]]}
    if family == "plain":
        wanted |= {name: known[f"`{name}`"] for name in OTHERS_OF_PLAIN}
    target, log = compiled[kind]
    code = code_sizes(target.parent, "90")
    kernels = [k for k in report.collect([], [log]) if k.arch == "sm_90"]
    for name, (registers, *bytes_) in wanted.items():
        (k,) = [k for k in kernels if name in k.symbol]
        found = [k.stack_bytes, k.spill_store_bytes, code[k.symbol]]
        what = f"{name} of {family} calls: {k.registers} registers; stack, spills, code: {found}"
        if more == 1.0:
            assert [k.registers, *found] == [registers, *bytes_], f"{what}; bench/README.md differs"
        else:
            assert k.registers <= registers * more, what
            assert all(f <= more * b + 64 for f, b in zip(found, bytes_, strict=True)), what


def test_the_documentation_has_one_figure_for_each_thing():
    """docs/gpu.md says again what bench/README.md has, and what follows from it."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    _, known = documented()
    stack = {family: known[name][1] for family, name in DOCUMENTED.items()}
    code = {family: known[name][3] for family, name in DOCUMENTED.items()}

    def row(begins: str) -> tuple[str, str]:
        (found,) = re.findall(rf"^\| {begins}[^|]*\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
        return found

    goal, now = row("stack of the kernels for plain calls and for other calls of chains")
    assert now == f"{stack['plain']}, {stack['chains']}"
    assert max(stack["plain"], stack["chains"]) <= int(goal)
    goal, now = row("code of the former, KB")
    assert now == f"{code['plain'] / 1e3:.0f}" and code["plain"] <= 1000 * int(goal)
    assert f"{stack['every']:,} bytes of stack and {code['every'] / 1e6:.1f} MB" in page
    # a stack for each of the 2,048 threads of a multiprocessor
    megabytes = {family: round(bytes_ * 2048 * 132 / 1e6) for family, bytes_ in stack.items()}
    said = re.sub(r"\s+", " ", page)
    plain, chains, every = (megabytes[family] for family in ("plain", "chains", "every"))
    assert f"{plain} MB on a device with 132 multiprocessors for plain calls" in said
    assert f"{chains} MB for other calls of chains, and {every} MB for the rest" in said


@needs_nvcc
@pytest.mark.background(*TRANSLATORS.values())
@pytest.mark.parametrize("kind", PTX_KINDS, ids="-".join)
def test_every_kernel_is_translated(kind):
    done = TRANSLATORS[kind].result()
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stderr[-8000:]}"
    entries = re.findall(r"\.entry (\w+)", (TRANSLATORS[kind].folder / "kernels.ptx").read_text())
    missing = [name for name in defined_kernels() if not any(name in entry for entry in entries)]
    assert not missing, f"{missing} are not in {entries}"


@needs_nvcc
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_object_and_log_say_the_same(kind, compiled):
    """The kernels by cuobjdump, which has their code as well."""
    if shutil.which("cuobjdump") is None:
        pytest.skip("there is no cuobjdump")
    target, log = compiled[kind]
    whole, logged = report.collect([target], [log]), report.collect([], [log])
    read = report.collect([target], [])
    for both, a, b in zip(whole, logged, read, strict=True):
        assert (a.symbol, a.arch, a.registers) == (b.symbol, b.arch, b.registers)
        assert (a.stack_bytes, a.static_shared_bytes) == (b.stack_bytes, b.static_shared_bytes)
        assert both.code_bytes == b.code_bytes > 0 and both.spill_load_bytes is not None


# ---- the built module ---------------------------------------------------------------------------


def built_module() -> Path | None:
    """The native module, where it has CUDA code in it."""
    if "PYMETA_TEST_MODULE" in os.environ:
        return Path(os.environ["PYMETA_TEST_MODULE"]).resolve(strict=True)
    found = importlib.util.find_spec("pymeta._native")
    if found is None or found.origin is None or sys.platform != "linux":
        return None
    path = Path(found.origin)
    return path if b".nv_fatbin" in path.read_bytes() else None


MODULE = built_module()
needs_module = pytest.mark.skipif(MODULE is None, reason="the module was built without CUDA")


@needs_module
def test_the_module_needs_nothing_of_cuda():
    """The runtime is linked in, and the driver is opened when it is first asked for."""
    readelf = shutil.which("readelf")
    assert readelf, "no readelf: binutils from the system"
    said = subprocess.run([readelf, "-d", str(MODULE)], capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    assert needed and not [name for name in needed if "cuda" in name or "nv" in name], needed


LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("pymeta._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(json.dumps([native.cuda_reason(), native.devices()]))
"""


@needs_module
def test_the_module_loads_without_a_device_and_says_why_it_has_none():
    """No driver, or a driver whose devices are all hidden."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(MODULE)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reason, devices = json.loads(done.stdout)
    assert reason and devices == []


# ---- the report itself --------------------------------------------------------------------------

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3app5floatL4workILi2EEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN3app5floatL4workILi2EEEvPf
    288 bytes stack frame, 136 bytes spill stores, 448 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 304 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compile time = 7686.323 ms
ptxas info    : Function properties for _ZN3app4tileEv
    0 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Compiling entry function '_Z4packv' for 'sm_90'
ptxas info    : Function properties for _Z4packv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 37 registers, used 0 barriers
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "ptxas.log"
    path.write_text(text)
    return path


def test_report_reads_what_ptxas_says(tmp_path):
    pack, work = report.collect([], [write(tmp_path, LOG)])
    assert (work.registers, work.stack_bytes, work.static_shared_bytes) == (128, 304, 512)
    assert (work.spill_store_bytes, work.spill_load_bytes) == (156, 472)  # its own and tile's
    assert (pack.registers, pack.stack_bytes, pack.spill_store_bytes) == (37, 0, 0)
    assert work.code_bytes is None and work.arch == "sm_90"


def test_report_reads_what_cuobjdump_says():
    said = " Function _Z4packv:\n  REG:37 STACK:8 SHARED:{} LOCAL:0 CONSTANT[0]:5568 TEXTURE:0\n"
    for arch, shared, own in (("sm_90", 1536, 512), ("sm_80", 1536, 1536), ("sm_120", 1024, 0)):
        (kernel,) = report.read_usage(said.format(shared), arch).values()
        assert kernel.registers == 37 and kernel.stack_bytes == 8
        assert kernel.static_shared_bytes == own, arch


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("void lib::cuda::(anonymous namespace)::run<(lib::Job)0>(lib::Frame)", "cuda::run<0>"),
        ("void run<float>(Frame<float>, float*)", "run<float>"),
        ("lib::_GLOBAL__N__6331_10_kernels_cu::pack(lib::Frame)", "lib::pack"),
        ("_Z4packv", "_Z4packv"),
    ],
)
def test_report_shortens_names(name, wanted):
    assert report.short(name) == wanted


def test_report_judges_spills(tmp_path, capsys):
    log = write(tmp_path, LOG)
    rows = tmp_path / "rows.json"
    assert report.main(["--log", str(log), "--fail-on-spills", "156", "--json", str(rows)]) == 0
    assert len(json.loads(rows.read_text())) == 2
    assert report.main(["--log", str(log), "--fail-on-spills", "155"]) == 1
    assert "stores 156 bytes" in capsys.readouterr().err


def test_report_is_not_content_with_nothing(tmp_path, capsys):
    assert report.main(["--log", str(write(tmp_path, "no kernels here"))]) == 2
    assert report.main(["--log", str(tmp_path / "missing")]) == 2
    assert report.main([str(tmp_path / "missing.o")]) == 2
    known = report.read_log(LOG)
    for kernel in known.values():
        kernel.spill_store_bytes = None
    with pytest.raises(report.Unusable, match="nothing is known of the spills"):
        report.spilling(list(known.values()), 0)


# ---- bench/gpu.sh -------------------------------------------------------------------------------


def test_gpu_script_asks_for_cases_that_there_are():
    asked = re.findall(r'"(W\d[^"]*K=\d+)"', (ROOT / "bench" / "gpu.sh").read_text())
    assert len(asked) >= 9 and set(asked) <= set(CUDA_CASES)
    assert "W5 fine-tuning T=100000 K=20" in asked


def test_gpu_script_is_bash_and_refuses_unknown_parts(tmp_path):
    script = str(ROOT / "bench" / "gpu.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    folder = tmp_path / "results"
    done = subprocess.run(["bash", script, str(folder), "flash"], capture_output=True, text=True)
    assert done.returncode == 2 and "no part 'flash'" in done.stderr
    assert not folder.exists()


REHEARSAL = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import gpu_calls
gpu_calls.DEVICE = torch.device("cpu")
torch.cuda.synchronize = lambda: None
sys.exit(gpu_calls.main(["all"]))
"""


def test_gpu_calls_can_be_made():
    """Those for the tools that watch a GPU, here on emulated blocks, or on the CPU."""
    blocks = {"PYMETA_EXECUTOR": "emulated"} if native.emulates() else {}
    done = subprocess.run(
        [sys.executable, "-c", REHEARSAL, str(ROOT / "bench")],
        capture_output=True, text=True, timeout=600, env={**os.environ, **blocks},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "gpu_calls: all calls made" in done.stdout
