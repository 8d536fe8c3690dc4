"""What setup.py builds, what it says when it cannot, and the border between Python and native code."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlm import info, native, registry

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)

needs_cpu = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu") or "-")
needs_cuda = pytest.mark.skipif(bool(native.why_not("cuda")), reason=native.why_not("cuda") or "-")


def variants() -> list[str]:
    """Modules of the CPU backend that were built and that this chip runs."""
    if native.why_not("cpu"):
        return []
    best = native.load("cpu").best_isa()
    built = native.build_record().get("built", {})
    return [f"_cpu_{i}" for i in native.ISAS[: native.ISAS.index(best) + 1] if f"_cpu_{i}" in built]


def exported(folder: str, pattern: str) -> dict[str, set[str]]:
    """Names that each source file of csrc/<folder> registers."""
    found = {}
    for path in (CSRC / folder).glob(pattern):
        found[path.stem] = set(re.findall(r"^FASTLM_EXPORT\((\w+)\)", path.read_text(), re.MULTILINE))
    return found


@pytest.mark.parametrize(
    ("module", "sources"),
    [
        *(pytest.param(v, ("cpu", "*.cpp"), marks=needs_cpu) for v in variants() or ["_cpu_portable"]),
        pytest.param("_cuda", ("cuda", "*.cu"), marks=needs_cuda),
    ],
)
def test_modules_hold_every_function(module, sources):
    functions = importlib.import_module(f"fastlm.{module}").functions()
    files = exported(*sources)
    assert set(functions) == set().union(*files.values())
    assert functions == sorted(functions)
    for name, op in registry.ops().items():
        # One file an op, or one for each direction: attention.cpp and attention_backward.cpp.
        own = files.get(name, set()) | files.get(f"{name}_backward", set())
        if own:
            assert f"{name}_forward" in own
            assert op.backward is None or f"{name}_backward" in own


@needs_cpu
def test_tables_of_dtypes_agree():
    tables = [importlib.import_module(f"fastlm.{v}").dtypes() for v in variants()]
    if not native.why_not("cuda"):
        tables.append(native.load("cuda").dtypes())
    assert all(t == tables[0] for t in tables)
    for name in tables[0]:
        assert isinstance(getattr(torch, name), torch.dtype)


def layer_norm(module, x, weight, bias, dy):
    """Outputs and gradients into memory poisoned with NaN (parameter gradients are added to: 1 at first)."""
    nan, rows = float("nan"), x.numel() // x.shape[-1]
    y, dx = torch.full_like(x, nan), torch.full_like(x, nan)
    mean, rstd = torch.full((rows,), nan), torch.full((rows,), nan)
    dweight, dbias = torch.ones(x.shape[-1]), torch.ones(x.shape[-1])
    native.call(module.layer_norm_forward, x, weight, bias, 1e-5, y, mean, rstd)
    native.call(module.layer_norm_backward, dy, x, weight, mean, rstd, 1e-5, dx, dweight, dbias)
    return y, dx, dweight, dbias


@needs_cpu
@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_variants_compute_the_same(name, dtype):
    """Every instruction set against float64, for row lengths that leave tails in each vector width."""
    module = importlib.import_module(f"fastlm.{name}")
    for n in (1, 3, 16, 31, 200):
        g = torch.Generator().manual_seed(n)
        x, dy = (torch.randn(9, n, generator=g).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(n, generator=g).to(dtype) for _ in range(2))
        ins = [t.double().requires_grad_() for t in (x, weight, bias)]
        exact = F.layer_norm(ins[0], (n,), ins[1], ins[2], 1e-5)
        grads = torch.autograd.grad(exact, ins, dy.double())
        y, dx, dweight, dbias = layer_norm(module, x, weight, bias, dy)
        for value, right, eps in (
            (y, exact, torch.finfo(dtype).eps),
            (dx, grads[0], torch.finfo(dtype).eps),
            (dweight - 1, grads[1], 2**-20),
            (dbias - 1, grads[2], 2**-20),
        ):
            error = (value.double() - right).abs().max().item()
            assert error <= 2 * eps * right.abs().max().item() + 1e-12, f"n = {n}"  # all but 0 with n = 1


@needs_cpu
def test_thread_count_changes_no_bit():
    x, dy = torch.randn(2, 700, 96, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(layer_norm(native.load("cpu"), x, weight, weight, dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


X = torch.zeros(2, 4)


@needs_cpu
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((X, X), r"layer_norm_forward: takes 7 arguments, got 2"),
        ((X, None, None, "x", X, None, None), r"argument 3 must be a float, got the str 'x'"),
        ((X, None, None, None, X, None, None), r"argument 3 must be a float, got None"),
        ((X, None, None, True, X, None, None), r"argument 3 must be a float, got True"),
        ((X, 3, None, 1e-5, X, None, None), r"argument 1 must be a tensor or None, got the int 3"),
        ((X, [], None, 1e-5, X, None, None), r"argument 1 must be a tensor, None, bool.*got list"),
        ((X, 2**70, None, 1e-5, X, None, None), r"argument 1: the value must be an int that fits 64 bits"),
        ((X, None, None, 1e-5, (0, 0, (2, 4), (4, 1)), None, None), r"argument 4: a null address"),
        ((X, None, None, 1e-5, (8, 99, (2, 4), (4, 1)), None, None), r"argument 4: the dtype code.*99"),
        (
            (X, None, None, 1e-5, (8, 0, (2, 4), (4,)), None, None),
            r"argument 4: the strides.*tuple of 2 ints",
        ),
        ((X, None, None, 1e-5, (8, 0, (-2,), (1,)), None, None), r"argument 4: negative size -2"),
        ((X, None, None, 1e-5, (8, 0), None, None), r"argument 4: a tensor is a tuple.*of 2"),
        ((X.to(torch.complex64), None, None, 1e-5, X, None, None), r"argument 0 has dtype torch.complex64"),
        ((X.long(), None, None, 1e-5, X, None, None), r"x must be float32 or bfloat16, got int64"),
        ((X, X, None, 1e-5, X, None, None), r"weight must have 4 elements, got 8"),
        ((X, None, None, 1e-5, X.bfloat16(), None, None), r"expected a float32 tensor, got bfloat16"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        native.call(native.load("cpu").layer_norm_forward, *arguments)


@needs_cpu
def test_int_serves_as_float():
    x, ones, twos = torch.randn(2, 8), torch.empty(2, 8), torch.empty(2, 8)
    for eps, out in ((1, ones), (1.0, twos)):
        native.call(native.load("cpu").layer_norm_forward, x, None, None, eps, out, None, None)
    assert torch.equal(ones, twos) and ones.isfinite().all()


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be"):
        native.load("tpu")


@needs_cuda
@pytest.mark.backend("cuda-compiled")
def test_cuda_code_for_each_architecture():
    """Machine code for each architecture named in _build.json, and PTX of the newest for those to come."""
    tool = shutil.which("cuobjdump")
    if spec := importlib.util.find_spec("triton"):
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(bundled) if bundled.exists() else tool
    if tool is None:
        pytest.skip("there is no cuobjdump, neither with Triton nor on PATH")
    library = native.load("cuda").__file__
    wanted = native.build_record()["built"]["_cuda"].split()
    code = subprocess.run([tool, "--list-elf", library], capture_output=True, text=True, check=True).stdout
    ptx = subprocess.run([tool, "--list-ptx", library], capture_output=True, text=True, check=True).stdout
    assert wanted and set(re.findall(r"sm_\d+", code)) == set(wanted)
    assert set(re.findall(r"sm_\d+", ptx)) == {wanted[-1]}


def test_csrc_knows_no_torch():
    files = [p for p in CSRC.rglob("*") if p.is_file()]
    assert files
    for path in files:
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
        assert not [i for i in includes if re.match(r"(torch|ATen|c10)/", i)], path
        assert "pybind11/pybind11.h" not in includes or path.name == "module.cpp"


def test_built_files_name_no_path_of_this_machine():
    files = [*(ROOT / "fastlm").glob(f"*{SUFFIX}"), *(ROOT / "fastlm").glob("_build.json")]
    for path in files:
        data = path.read_bytes()
        for place in (str(ROOT), sysconfig.get_paths()["include"], str(Path.home()) + os.sep):
            assert place.encode() not in data, f"{path.name} holds {place}"


def copied_tree(folder: Path) -> Path:
    """The source tree without what was built in it, as a fresh clone is."""
    ignore = shutil.ignore_patterns(
        ".git",
        "build",
        "dist",
        "*.so",
        "_build.json",
        "*.egg-info",
        "__pycache__",
        "runs",
        ".*cache",
        ".venv*",
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignore)
    return folder


def setup(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTLM_", "CUDA_", "CXX", "NVCC"))}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env=inherited | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A wheel and an sdist made where there is no compiler, and what the build said."""
    folder = tmp_path_factory.mktemp("bare")
    tree = copied_tree(folder / "tree")
    done = setup(tree, "bdist_wheel", "sdist", PATH=str(folder), CXX="/nonexistent")
    assert done.returncode == 0, done.stdout
    return done.stdout, next((tree / "dist").glob("*.whl")), next((tree / "dist").glob("*.tar.gz"))


def test_no_compiler_says_what_is_missing(bare):
    output, wheel, _ = bare
    reason = "no C++ compiler was found at install (CXX=/nonexistent)"
    assert f"fastlm: fastlm._cpu_portable was NOT built: {reason}" in output
    assert f"fastlm: fastlm._cuda was NOT built: {reason}" in output
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("fastlm/_build.json"))
        assert not [n for n in archive.namelist() if n.endswith(".so")]
    assert record["built"] == {} and record["skipped"]["_cpu_portable"] == reason


def test_no_compiler_is_explained_at_run_time(bare, tmp_path):
    with zipfile.ZipFile(bare[1]) as archive:
        archive.extractall(tmp_path)
    code = (
        # An editable installation would lend this one its modules.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "import torch, fastlm; from fastlm import info, native, ops;"
        "print(info.report()); print(fastlm.explain('layer_norm', torch.ones(1, 4)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^cpu +no: .*no C\+\+ compiler was found.*install g\+\+ or clang\+\+", done.stdout, re.M
    )
    assert re.search(r"^reference +yes", done.stdout, re.M)
    assert "layer_norm: reference (not cpu: fastlm._cpu_portable was not built: no C++" in done.stdout


def test_wheel_holds_the_kernels_under_fastlm(bare):
    with zipfile.ZipFile(bare[1]) as archive:
        names = archive.namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastlm"}
    sources = {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert {Path(n).name for n in names if n.startswith("fastlm/kernels/")} == sources
    assert sources


def test_sdist_holds_what_a_build_needs(bare):
    with tarfile.open(bare[2]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    for path in [
        *CSRC.rglob("*"),
        *(ROOT / "kernels").glob("*.py"),
        ROOT / "constraints.txt",
        ROOT / "setup.py",
    ]:
        relative = path.relative_to(ROOT)
        if path.is_file():
            assert str(relative) in names or str("fastlm" / relative) in names, relative


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_failed_compile_is_an_error(tmp_path):
    """A compiler that refuses our source stops the installation, and its words are shown."""
    tree = copied_tree(tmp_path / "tree")
    shutil.rmtree(tree / "csrc" / "cpu")
    (tree / "csrc" / "module.cpp").write_text("int f() { return undeclared_name; }\n")
    done = setup(tree, "build_ext", "--inplace", FASTLM_CUDA="0", FASTLM_CPU_ISAS="portable")
    assert done.returncode != 0
    assert "undeclared_name" in done.stdout and "the native kernels failed to compile" in done.stdout
    assert not (tree / "fastlm" / "_build.json").exists()


@pytest.mark.parametrize(
    ("env", "text"),
    [
        (
            {"FASTLM_CUDA": "1", "NVCC": "/nonexistent"},
            "FASTLM_CUDA=1 was asked for, but .*nvcc was not found",
        ),
        ({"FASTLM_CUDA": "maybe"}, "FASTLM_CUDA must be one of 0, 1, auto; got 'maybe'"),
        ({"FASTLM_CPU_ISAS": "mmx"}, "FASTLM_CPU_ISAS may name portable.*; got mmx"),
    ],
)
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_bad_switches(env, text):
    done = setup(ROOT, "--version", **env)
    assert done.returncode != 0 and re.search(text, done.stdout), done.stdout


def test_report_survives_anything(monkeypatch):
    """Each line stands for itself: what breaks is named and the rest is still there."""

    def broken(*_):
        raise OSError("no such thing")

    whole = info.report()
    assert re.search(r"^torch +" + re.escape(torch.__version__), whole, re.M)
    for name in ("reference", "triton", "cpu", "cuda"):
        assert re.search(rf"^{name} +(yes|no)", whole, re.M), whole
    for name in ("_cpuinfo", "version", "_cpu", "_cuda", "_triton", "_gpus", "_cuda_version"):
        monkeypatch.setattr(info, name, broken)
    report = info.report()
    assert report.count("unknown (OSError: no such thing)") == 8
    assert re.search(r"^reference +yes", report, re.M)


def test_a_chip_whose_name_is_hidden_is_told_by_family_and_model(monkeypatch):
    x86 = {"model name": "AMD EPYC", "cpu family": "25", "model": "17", "flags": "fpu avx2 fma sse"}
    monkeypatch.setattr(info, "_cpuinfo", lambda: x86)
    assert re.fullmatch(r"AMD EPYC, family 25 model 17 \(\w+; avx2 fma\)", info.chip())
    monkeypatch.setattr(info, "_cpuinfo", lambda: {"Model": "Raspberry Pi 5", "Features": "fp asimd"})
    assert re.fullmatch(r"Raspberry Pi 5 \(\w+; .*\)", info.chip())
