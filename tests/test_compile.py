"""`fastlm kernels compile`: every kernel compiles for GPUs that are not here, and what must not be shipped is refused.

The command runs as a user runs it, in processes of its own, from a session in which Triton may interpret. Triton keeps
what it has compiled, so only the first run takes long.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import NO_TRITON

from fastlm import registry
from fastlm.testbed import cuda_code
from fastlm.testbed.machine_code import read_amdgcn
from fastlm.testbed.targets import TARGETS, occupancy

ROOT = Path(__file__).resolve().parent.parent
OPS = [name for name in registry.ops() if (ROOT / "kernels" / f"{name}.py").exists()]
CUDA_FILES = cuda_code.sources(ROOT)
NO_CUDA = cuda_code.why_not(ROOT)

pytestmark = pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON or "-")
long = pytest.mark.timeout(2400)  # attention takes five minutes of two idle cores
triton_compiled = pytest.mark.backend("triton-compiled")


def cuda_compiled(test):
    return pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA or "-")(pytest.mark.backend("cuda-compiled")(test))


def command(*arguments, root=ROOT, **environment):
    """The command's words, and where and with what variables it runs."""
    words = [sys.executable, "-m", "fastlm", "kernels", "compile", *map(str, arguments)]
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)} | environment
    return words, {"cwd": root, "env": os.environ | variables}


def compile(*arguments, **where):
    """The command, in a process of its own."""
    words, options = command(*arguments, **where)
    return subprocess.run(words, **options, capture_output=True, text=True, timeout=600)


def with_headers(path):
    """The text of a CUDA file and of the headers beside it that it includes."""
    text = path.read_text()
    headers = [path.with_name(name) for name in re.findall(r'#include "(\w+\.cuh)"', text)]
    return "".join([text, *map(with_headers, headers)])


def kernel_file(folder, launch="{}", extra=""):
    """dropout's kernel file with other options of its launch, and more at its end."""
    text = (ROOT / "kernels" / "dropout.py").read_text()
    assert text.count("num_warps=4") == 1
    path = folder / "mine.py"
    path.write_text(text.replace("num_warps=4", launch.format("num_warps=4")) + extra)
    return path


class Everything:
    """The command while it compiles everything, op by op, which takes a quarter of an hour.

    A test waits for the op that it reads, so what is limited in time is an op and not all of them, on a slow machine too. If
    nothing comes for long, it is ended, and the tests of what did not come fail without waiting.
    """

    LONG = 1200  # seconds; an op for a GPU takes at most 230 on two idle cores

    def __init__(self, folder):
        self.file = folder / "out" / "kernels.json"
        self.said, self.complained = folder / "said", folder / "complained"
        words, options = command("--json", self.file)
        with self.said.open("w") as said, self.complained.open("w") as complained:
            self.process = subprocess.Popen(words, **options, stdout=said, stderr=complained)

    def words(self):
        return self.said.read_text(), self.complained.read_text()

    def content(self, op=None):
        """The file once it holds all of an op; None: of all ops."""
        while True:
            ended = self.process.poll() is not None  # asked before the file is read
            assert self.file.exists() or not ended, self.words()
            if self.file.exists():
                content = json.loads(self.file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
                ops = [row["op"] for row in content["rows"]]
                if ended or (op in ops and ops[-1] != op):
                    return content
            if time.time() - self.said.stat().st_mtime > self.LONG:
                self.process.kill()
            time.sleep(1)

    def rows(self, **wanted):
        rows = self.content(wanted.get("op"))["rows"]
        return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    everything = Everything(tmp_path_factory.mktemp("compile"))
    yield everything
    everything.process.terminate()  # if it still runs
    everything.process.wait(60)


@long
@triton_compiled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_triton_kernels_compile_without_a_fault(everything, op, target):
    rows = everything.rows(op=op, target=target, language="triton")
    assert rows, "no kernel was compiled"
    faults = [f"{row['kernel']}: {row['fault']} for {row['calls'][:1]}" for row in rows if row["fault"]]
    assert not faults, "\n".join(faults)


@long
@cuda_compiled
@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.backend == "cuda"])
@pytest.mark.parametrize("op", CUDA_FILES)
def test_cuda_kernels_compile_without_a_fault(everything, op, target):
    rows = everything.rows(op=op, target=target, language="cuda")
    wanted = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", with_headers(CUDA_FILES[op])))
    assert wanted and {row["kernel"] for row in rows} == wanted
    assert all(not row["fault"] and row["registers"] > 0 and row["instructions"] > 0 for row in rows)
    assert all(row["warps"] > 0 and 0 < row["resident_warps"] <= 64 for row in rows)  # all have launch bounds


@long
@triton_compiled
def test_the_status_says_whether_there_is_a_fault(everything):
    faults = [row for row in everything.rows() if row["fault"]]
    said, complained = everything.words()
    assert everything.process.returncode == (1 if faults else 0), said[-2000:] + complained
    assert len(re.findall(r"^FAULT ", said, re.M)) == len(faults)
    assert complained == ""


def kernels_of(path):
    """The kernels in a file, as its source defines them."""
    definitions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [node for node in definitions if node.name.endswith("_kernel") and node.decorator_list]


@long
@triton_compiled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", [p.stem for p in sorted((ROOT / "kernels").glob("*.py")) if kernels_of(p)])
def test_every_kernel_and_both_sides_of_every_switch_are_compiled(everything, file, target):
    """Nothing that a launcher may start is forgotten."""
    for kernel in kernels_of(ROOT / "kernels" / f"{file}.py"):
        values = defaultdict(set)
        for row in everything.rows(source=file, kernel=kernel.name, target=target, language="triton"):
            for name, value in row["configuration"].items():
                values[name.partition(".")[0]].add(value)
        assert set(values) == {argument.arg for argument in kernel.args.args}, f"{kernel.name} is not compiled"
        one_sided = {name: seen for name, seen in values.items() if seen in ({"True"}, {"False"})}
        assert not one_sided, f"{kernel.name}: {one_sided}"


@long
@triton_compiled
def test_products_run_on_tensor_cores_and_only_they(everything):
    for target in TARGETS:
        for op, kernels in {
            "attention": ("_fwd_kernel", "_dkdv_kernel", "_dq_kernel", "_dbias_kernel", "_near_kernel"),
            "linear_cross_entropy": ("_matmul_kernel",),
        }.items():
            for row in everything.rows(op=op, target=target, language="triton"):
                dtype = row["configuration"].get("q.ptr", row["configuration"].get("a", ""))
                product = row["kernel"] in kernels and dtype.startswith("*bf16")
                if target != "gfx942" or product:  # whose matrix cores take float32 too
                    assert (row["tensor_core"] > 0) == product, row
        assert not any(row["tensor_core"] for row in everything.rows(op="layer_norm", target=target))


@long
@triton_compiled
@pytest.mark.parametrize("head_dim", ["64", "128"])
@pytest.mark.parametrize("op", ["attention", "varlen_attention"])
def test_attention_runs_on_wgmma(everything, op, head_dim):
    """All products of all its kernels on sm_90, with and without biases and dropout."""
    rows = [row for row in everything.rows(op=op, target="sm_90") if row["configuration"].get("BLOCK_D") == head_dim]
    rows = [row for row in rows if row["configuration"]["q.ptr"].startswith("*bf16")]
    kernels = {"_fwd_kernel", "_dkdv_kernel", "_dq_kernel", "_near_kernel"}
    kernels |= {"_dbias_kernel"} if op == "attention" else set()
    assert {row["kernel"] for row in rows} == kernels
    few = [row for row in rows if not 0 < row["warpgroup"] == row["tensor_core"]]
    assert not few, few[0]


@long
@triton_compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_norms_move_16_bytes_a_thread(everything, op, target):
    """Wherever rows are a multiple of 16 bytes. What is narrower are statistics, a number a row, dropout's seed, and where
    narrow rows share a program the sums over a few rows."""
    rows = [
        row for row in everything.rows(op=op, target=target, language="triton")
        if row["kernel"] in ("_fwd_kernel", "_bwd_kernel")
    ]  # fmt: skip
    bytes_of_unit = {
        id(row): int(row["configuration"]["UNIT"]) * (2 if row["configuration"]["x"].startswith("*bf16") else 4)
        for row in rows
    }
    aligned = [row for row in rows if bytes_of_unit[id(row)] >= 16]
    assert {row["kernel"] for row in aligned} == {"_fwd_kernel", "_bwd_kernel"} and len(aligned) < len(rows)

    def narrow(configuration):
        return (2 if configuration["ROWS"] == "1" else 9) + (configuration.get("seed", "None") != "None")

    few = [row for row in aligned if not (row["wide"] > 0 and row["narrow"] <= narrow(row["configuration"]))]
    assert not few, few[0]


@long
@cuda_compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("op, statistics", [("layer_norm", 2), ("rms_norm", 1)])
def test_cuda_norms_move_16_bytes_a_thread(everything, op, statistics, target):
    """Wherever rows are a multiple of 16 bytes; what is narrower are a row's statistics."""
    rows = [
        row for row in everything.rows(op=op, target=target, language="cuda")
        if row["kernel"] in ("forward_kernel", "backward_kernel")
    ]  # fmt: skip
    aligned = [row for row in rows if list(row["configuration"].values())[-2] != "1"]  # VEC
    assert {row["kernel"] for row in aligned} == {"forward_kernel", "backward_kernel"} and len(aligned) < len(rows)
    few = [row for row in aligned if not (row["wide"] > 0 and row["narrow"] <= statistics)]
    assert not few, few[0]


@long
@triton_compiled
def test_rows_are_well_formed_and_consistent(everything):
    content = everything.content()
    assert (content["format"], content["kind"], content["finished"]) == (1, "compile", True)
    assert "commit" in content["environment"]
    for row in content["rows"]:
        target = TARGETS[row["target"]]
        assert row["op"] in registry.ops() and row["registers"] > 0
        assert (row["language"] == "triton") == bool(row["calls"])
        if target.backend == "cuda":  # spilled registers are read back, and nothing else is in local memory
            assert (row["spill_bytes"] > 0) == (row["local_memory"] > 0), row
        if row["warps"]:
            assert row["resident_warps"] % row["warps"] == 0 and 0 < row["resident_warps"] <= target.warps
    # Rows of bfloat16 at a width of 16-byte vectors move by them, and by nothing narrower but statistics.
    (row,) = [
        row for row in everything.rows(op="layer_norm", target="sm_90", kernel="_fwd_kernel", language="triton")
        if "default bfloat16 rows=8192 columns=1024" in row["calls"]
    ]  # fmt: skip
    assert row["wide"] >= 6 and row["narrow"] <= 2, row


@long
@triton_compiled
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_logits_move_by_16_bytes(everything, target):
    """In every kernel over rows of a multiple of 16 classes, whatever the options; of 50257 no two rows are aligned alike."""
    kernels = everything.rows(op="cross_entropy", target=target, language="triton")
    rows = [row for row in kernels if row["kernel"] in ("_fwd_kernel", "_bwd_kernel")]
    aligned = [row for row in rows if row["configuration"]["V"] == "16*i32"]
    assert {(row["kernel"], row["configuration"]["SOFT"]) for row in aligned} == {
        (kernel, soft) for kernel in ("_fwd_kernel", "_bwd_kernel") for soft in ("False", "True")
    }
    for row in aligned:
        tensors = 1 + (row["kernel"] == "_bwd_kernel") + (row["configuration"]["SOFT"] == "True")
        assert row["wide"] >= tensors and row["narrow"] <= 10, row
    assert all(row["wide"] == 0 for row in rows if row["configuration"]["V"] != "16*i32")


@long
@triton_compiled
@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.backend == "cuda"])
def test_activations_move_by_16_bytes(everything, target):
    """All tensors of rows of a multiple of 16 columns; only biases, their partial sums, seeds and positions by less."""
    rows = everything.rows(source="activation", target=target, language="triton")
    aligned = [row for row in rows if row["configuration"]["N"] == "16*i32"]
    assert {row["op"] for row in aligned} == {"gelu", "silu", "relu", "relu_squared", "geglu", "swiglu", "reglu"}
    for row in aligned:
        on = {name for name, value in row["configuration"].items() if value == "True"}
        moved = 2 + ("GATED" in on)  # gate, up, y
        if row["kernel"] == "_bwd_kernel":  # dy, gate, up unless d_gate is nobody's, and the gradients
            moved = 2 + ("GATED" in on and bool({"WANT_GATE", "SUM_GATE"} & on)) + len({"WANT_GATE", "WANT_UP"} & on)
        assert row["wide"] >= moved and row["narrow"] <= 4, row
    for row in everything.rows(op="rotary_embedding", target=target, language="triton"):
        assert row["wide"] >= 8 and row["narrow"] <= 2, row


@long
@cuda_compiled
@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.backend == "cuda"])
def test_embedding_in_cuda_moves_by_16_bytes(everything, target):
    """Rows of tables, of dy and of gradients where they are aligned; ids, places and partial sums may come by less."""
    rows = [row for row in everything.rows(op="embedding", target=target, language="cuda") if row["configuration"]]
    aligned = [row for row in rows if list(row["configuration"].values())[-1] != "1"]
    assert {row["kernel"] for row in aligned} == {"forward_kernel", "sum_kernel", "join_kernel"}
    assert len(aligned) == len(rows) / 2
    for row in aligned:
        least = {"forward_kernel": 4, "sum_kernel": 12, "join_kernel": 9}[row["kernel"]]
        assert row["wide"] >= least, row


@long
@triton_compiled
def test_the_table_fits_its_page(everything):
    rows = everything.rows(language="triton")
    lines = everything.words()[0].splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith(("FAULT", "    FAULT"))] == []
    assert sum(line.startswith("  _") for line in lines) == len(rows)


@triton_compiled
def test_a_spill_is_refused_and_named(tmp_path):
    path = kernel_file(tmp_path, "{}, maxnreg=24")
    run = compile("dropout", "--arch", "sm_90", "--file", path)
    assert run.returncode == 1
    assert re.search(r"FAULT: SPILLS \d+ BYTES A THREAD, 0 ALLOWED", run.stdout)
    assert re.search(r"^FAULT dropout sm_90 _fwd_kernel: spills \d+ bytes", run.stdout, re.M)
    allowed = compile("dropout", "--arch", "sm_90", "--file", path, "--max-spill", 100_000)
    assert allowed.returncode == 0 and "no fault" in allowed.stdout


@triton_compiled
def test_too_much_shared_memory_is_refused(tmp_path):
    extra = """
@triton.jit
def _greedy_kernel(x, N: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], tl.trans(b_x))

def backward(dy, seed, p, dx):
    _greedy_kernel[(1,)](dy, 512, num_warps=32)
"""
    run = compile("dropout", "--arch", "sm_80", "--file", kernel_file(tmp_path, extra=extra), "--max-spill", 100_000)
    assert run.returncode == 1
    assert re.search(r"_greedy_kernel: needs \d{6} bytes of shared memory, sm_80 has 166912", run.stdout)


@triton_compiled
def test_members_of_a_tuple_are_arguments(tmp_path):
    extra = """
from typing import NamedTuple

class Sizes(NamedTuple):
    rows: int
    width: int

@triton.jit
def _tuple_kernel(x, n, FLAG: tl.constexpr):
    tl.store(x + n.rows, n.width)

def backward(dy, seed, p, dx):
    for rows in (1, 3, 32):
        _tuple_kernel[(1,)](dy, Sizes(rows, 32), FLAG=rows == 3)
"""
    file = tmp_path / "rows.json"
    compile("dropout", "--arch", "sm_80", "--file", kernel_file(tmp_path, extra=extra), "--json", file)
    rows = [row["configuration"] for row in json.loads(file.read_text())["rows"] if row["kernel"] == "_tuple_kernel"]
    rows = [row for row in rows if row["x"] == "*bf16"]
    assert [(row["n.rows"], row["n.width"], row["FLAG"]) for row in rows] == [
        ("1", "16*i32", "False"), ("i32", "16*i32", "True"), ("16*i32", "16*i32", "False"),
    ]  # fmt: skip


BROKEN = """
@triton.jit
def _broken_kernel(x):
    tl.store(x, no_such_name)

def backward(dy, seed, p, dx):
    _broken_kernel[(1,)](dy)
    forward(dy, seed, p, dx)
"""


@triton_compiled
@pytest.mark.parametrize(
    ("extra", "name", "why"),
    [
        (BROKEN, "_broken_kernel", "no_such_name is not defined"),
        ("\ndef backward(dy, seed, p, dx):\n    return dy.no_such_method()\n", "launcher", "no_such_method"),
        ("\ndef backward(dy, seed, p, dx):\n    import os\n    os.abort()\n", "launcher", "ended by signal 6"),
        ("\nimport no_such_module\n", "launcher", "No module named 'no_such_module'"),
    ],
)
def test_what_does_not_compile_is_named(tmp_path, extra, name, why):
    run = compile("dropout", "--arch", "sm_90", "--file", kernel_file(tmp_path, extra=extra))
    assert run.returncode == 1, run.stderr
    assert re.search(rf"^FAULT dropout sm_90 {name}: does not compile: .*{why}", run.stdout, re.M), run.stdout
    if extra == BROKEN:  # and hides no other
        assert re.search(r"^  _fwd_kernel +\d+ +0 ", run.stdout, re.M)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A source tree of its own in git, whose dropout then changes."""
    root = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("fastlm", "kernels", "csrc"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-C", str(root)]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"], ["tag", "before"]):
        subprocess.run([*git, *command], check=True)
    kernel = root / "kernels" / "dropout.py"
    kernel.write_text(kernel.read_text().replace("_BLOCK = 2048", "_BLOCK = 4096"))
    return root


@triton_compiled
def test_against_a_revision(tree, tmp_path):
    file = tmp_path / "changes.json"
    run = compile("dropout", "--arch", "sm_90", "--against", "before", "--json", file, root=tree)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.partition("against before (")[2].splitlines()[1:]
    assert len(lines) == 2 and all("dropout sm_90 _fwd_kernel: " in line for line in lines), run.stdout
    assert all("BLOCK 2048 -> 4096" in line and re.search(r"registers \d+ -> \d+", line) for line in lines)
    changes = json.loads(file.read_text())["against"]["changes"]
    assert [change["differences"]["BLOCK"] for change in changes] == [["2048", "4096"]] * 2
    same = compile("gelu", "--arch", "sm_90", "--against", "before", root=tree)
    assert same.stdout.endswith("no kernel differs\n"), same.stdout


@triton_compiled
def test_against_shows_what_is_new_and_gone(tree):
    kernel = tree / "kernels" / "embedding.py"
    text = kernel.read_text()
    kernel.write_text(text.replace("def _fwd_kernel(", "def _forward_kernel(").replace("_fwd_kernel[", "_forward_kernel["))
    run = compile("embedding", "--arch", "sm_90", "--against", "before", root=tree)
    kernel.write_text(text)
    assert re.search(r"^embedding sm_90 _forward_kernel: new: \d+ registers", run.stdout, re.M), run.stdout
    assert re.search(r"^embedding sm_90 _fwd_kernel: gone: \d+ registers", run.stdout, re.M), run.stdout
    assert "_bwd_kernel: " not in run.stdout.partition("against before")[2]


@cuda_compiled
def test_a_cuda_file_that_does_not_compile_is_named(tree):
    source = tree / "csrc" / "cuda" / "adamw.cu"
    text = source.read_text()
    source.write_text(text + "int f() { return undeclared_name; }\n")
    run = compile("adamw", "--arch", "sm_90", root=tree)
    source.write_text(text)
    assert run.returncode == 1
    assert re.search(r'^FAULT adamw sm_90 adamw.cu: does not compile: .*"undeclared_name"', run.stdout, re.M)
    assert re.search(r"^  _sweep_kernel +\d+ +0 ", run.stdout, re.M)


SPILLING = """
__global__ void spilling_kernel(float* x, int n) {
  float held[100];
  for (int i = 0; i < 100; ++i) held[i] = x[i * n];
  for (int i = 0; i < n; ++i) x[i] = held[i % 100];
}
"""


@cuda_compiled
def test_a_cuda_kernel_that_spills_is_refused(tree):
    source = tree / "csrc" / "cuda" / "adamw.cu"
    text = source.read_text()
    source.write_text(text + SPILLING)
    run = compile("adamw", "--arch", "sm_90", root=tree)
    source.write_text(text)
    assert run.returncode == 1
    assert re.search(r"^FAULT adamw sm_90 spilling_kernel: spills 4\d\d bytes", run.stdout, re.M), run.stdout[-3000:]


@triton_compiled
def test_without_nvcc_it_says_so_and_goes_on():
    run = compile("adamw", "--arch", "sm_90", NVCC="/nonexistent")
    assert run.returncode == 0
    assert "CUDA C++ kernels are NOT compiled: nvcc was not found" in run.stdout
    assert "_sweep_kernel" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no_such_op"], "--ops: got no_such_op, allowed: adafactor, adamw, "),
        (["adamw", "--max-spill", "-1"], "--max-spill: got -1, allowed: 0 and more"),
        (["adamw", "--file", "/nonexistent.py"], "--file: got /nonexistent.py, allowed: a file"),
        (["--file", __file__], "--ops: got none, allowed: with --file the one op"),
        (["adamw", "--against", "no-such-revision"], "--against: got no-such-revision, allowed: a revision of"),
        (["adamw", "--against", "--upload-pack=x"], "--against"),
    ],
)
def test_options_that_cannot_be_used(tree, arguments, text):
    run = compile(*arguments, root=tree)
    assert run.returncode == 2
    assert text in run.stderr and "Traceback" not in run.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_an_interrupt_ends_all_its_processes(tmp_path):
    """Also in the middle of a compilation that takes long."""
    path = kernel_file(tmp_path, extra="\nimport time\nprint('loading')\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlm", "kernels", "compile", "dropout", "--file", str(path)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip

    def children():
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        return {int(pid) for task in tasks for pid in task.read_text().split()}

    deadline = time.monotonic() + 60
    while len(children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children()
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


# --- the arithmetic and the reading, by themselves


def test_occupancy_agrees_with_nvidia(tmp_path):
    """With cuda_occupancy.h, which comes with the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), Path(shutil.which("nvcc") or "/").resolve().parent.parent]
    headers = [path for home in homes if (path := Path(home) / "include" / "cuda_occupancy.h").exists()]
    if not headers or shutil.which("c++") is None:
        pytest.skip("there is no cuda_occupancy.h or no C++ compiler")
    targets = {name: target for name, target in TARGETS.items() if target.backend == "cuda"}
    draw = random.Random(0)
    cases = [
        (name, draw.choice((1, 2, 4, 8, 16, 32)), draw.randint(16, 255), draw.choice((0, draw.randint(0, 227 << 10))))
        for name in targets
        for _ in range(400)
    ]
    cases = [case for case in cases if case[3] <= targets[case[0]].program_shared]
    source = tmp_path / "occupancy.cpp"
    source.write_text(
        """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, warps, registers, shared, per_program, of_all;
  while (scanf("%d %d %d %d %d %d %d", &major, &minor, &warps, &registers, &shared, &per_program, &of_all) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = major; device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = 65536; device.regsPerMultiprocessor = 65536; device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10; device.sharedMemPerMultiprocessor = of_all; device.numSms = 100;
    device.sharedMemPerBlockOptin = per_program; device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF; kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = per_program; kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_SHARED;
    cudaOccResult result;
    int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, warps * 32, shared);
    printf("%d\\n", status ? -status : result.activeBlocksPerMultiprocessor * warps);
  }
}
"""
    )
    program = tmp_path / "occupancy"
    subprocess.run(["c++", f"-I{headers[0].parent}", "-o", str(program), str(source)], check=True)
    lines = [
        f"{t.arch // 10} {t.arch % 10} {warps} {registers} {shared} {t.program_shared} {t.shared}"
        for name, warps, registers, shared in cases
        for t in [targets[name]]
    ]
    wanted = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    ours = [occupancy(targets[name], *rest).warps for name, *rest in cases]
    assert len(set(ours)) > 8
    assert ours == list(map(int, wanted.split()))


def test_occupancy_of_other_limits():
    assert occupancy(TARGETS["sm_100"], 4, 32, 0, tensor_columns=256) == (8, "tensor memory")
    assert occupancy(TARGETS["gfx942"], 4, 128, 0) == (16, "registers")
    assert occupancy(TARGETS["gfx942"], 4, 24, 33 << 10) == (4, "shared")
    assert occupancy(TARGETS["gfx942"], 1, 24, 0) == (32, "warps")


def test_reading_amd_assembly():
    text = (
        "\tglobal_load_dwordx4 v[0:3], v0, s[0:1]\n\tbuffer_load_ushort v0\n\tglobal_store_dword v0\n"
        "\tv_mfma_f32_32x32x8_bf16 a[0:15]\n\tscratch_store_dword off, v1\n\ts_endpgm\n"
        "    .vgpr_count:     72\n    .vgpr_spill_count: 3\n    .sgpr_spill_count: 1\n"
        "    .group_segment_fixed_size: 512\n    .max_flat_workgroup_size: 256\n"
    )
    assert read_amdgcn(text) == (72, 16, 512, 256, 6, 1, 0, 1, 1, 2)
