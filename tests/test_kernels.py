"""`fastlm kernels list`, `check` and `new`: what they find wrong, and that they find it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import NO_TRITON

from fastlm import check, registry
from fastlm.cli import main
from fastlm.samples import Normal, Sample
from fastlm.testbed.check import load_function

ROOT = Path(__file__).resolve().parent.parent

# rms_norm's forward in Triton, as an author might bring it, with places to break it.
KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def _fwd(x, weight, y, stride, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    m = {mask}
    b_x = tl.load(x + row * {stride} + cols, mask=m, other=0.0).to(tl.float32)
    b_y = b_x / tl.sqrt(tl.sum(b_x * b_x, 0) / N + eps)
    b_y = b_y * tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + cols, b_y, mask=cols < N)

def norm(x, weight=None, eps=1e-6, *, offset=0.0, casting="gemma"):  # of float32, where both orders are one
    n = x.shape[-1]
    rows = torch.zeros(x.numel() + 2 ** 15, dtype=x.dtype)  # so that a missing mask reads our own memory
    rows[: x.numel()] = x.reshape(-1)
    rows[x.numel() :] = 3.0
    weight = torch.ones(n) if weight is None else weight.contiguous() + offset
    y = {make}(x.shape, dtype=x.dtype)
    if x.numel():
        _fwd[({programs},)](rows, weight, y, n, n, eps, BLOCK=triton.next_power_of_2(n))
    return y{after}
"""
RIGHT = {
    "mask": "cols < N",
    "stride": "stride",
    "make": "torch.empty",
    "programs": "x.numel() // n",
    "after": "",
}


def checked(tmp_path, capsys, op, source, function, *more):
    """(exit status, output) of `fastlm kernels check OP --file` on a file."""
    path = tmp_path / "mine.py"
    path.write_text(source)
    status = main(["kernels", "check", op, "--file", f"{path}:{function}", "--dtype", "float32", *more])
    out = capsys.readouterr()
    return status, out.out + out.err


@pytest.mark.backend("triton")
class TestSomebodysKernel:
    """A Triton kernel from a file, run in the interpreter where there is no GPU."""

    pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are on the CPU")

    def test_a_right_one_passes_without_gradients(self, tmp_path, capsys):
        status, out = checked(tmp_path, capsys, "rms_norm", KERNEL.format(**RIGHT), "norm", "--random", "10")
        assert status == 0, out
        assert "outputs only: the result carries no gradients" in out

    @pytest.mark.parametrize(
        ("broken", "seen"),
        [
            ({"mask": "cols < BLOCK"}, "output: max error"),
            ({"stride": "(stride + 1)"}, "output: max error"),
            (
                {"make": "torch.empty", "programs": "max(1, x.numel() // n - 1)"},
                "max error inf",
            ),  # rows not written
            ({"after": " + 0 * torch.tensor(float('nan'))"}, "max error inf"),
        ],
        ids=["missing mask", "wrong stride", "row not written", "NaN"],
    )
    def test_a_broken_one_is_refused(self, tmp_path, capsys, broken, seen):
        status, out = checked(tmp_path, capsys, "rms_norm", KERNEL.format(**RIGHT | broken), "norm")
        assert status == 1
        assert "FAILS: errors" in out and seen in out, out

    def test_a_sum_in_the_order_of_arrival_is_refused(self, tmp_path, capsys):
        """Atomic additions of floats: right within the budget, and different with every order of the programs."""
        source = """
import torch, triton, triton.language as tl

@triton.jit
def _sum(x, total, n):
    tl.atomic_add(total, tl.load(x + tl.program_id(0)))

class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x)
        ctx.eps = eps
        x, r = x.float(), torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return x * r if weight is None else x * r * weight

    @staticmethod
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        products = (dy * x * r).reshape(-1, x.shape[-1])
        dw = torch.zeros(x.shape[-1])
        for column in range(x.shape[-1] if len(products) else 0):
            _sum[(len(products),)](products[:, column].contiguous(), dw[column:], len(products))
        return None, dw, None

def norm(x, weight=None, eps=1e-6, *, offset=0.0, casting="gemma"):
    return Norm.apply(x, weight, eps)
"""
        path = tmp_path / "racing.py"
        path.write_text(source)
        norm, op = load_function(f"{path}:norm"), registry.get("rms_norm")
        sample = Sample("rows", x=Normal((40, 24)), weight=Normal((24,)))
        args = sample.build(torch.float32)
        weight = args["weight"].requires_grad_()

        def dweight():
            return torch.autograd.grad(norm(**args), weight, check.upstream((args["x"],))[0])[0]

        with check.reversed_programs():
            backward = dweight()
        forward = dweight()
        torch.testing.assert_close(forward, backward)
        assert not torch.equal(forward, backward), "the order of the programs must matter in this kernel"
        only_weight = dataclasses.replace(op, grads=("weight",), terms=None)
        with pytest.raises(AssertionError, match="d_weight is not repeatable"):
            check.check_repeatable(only_weight, sample, torch.float32, None, function=norm)


def test_functions_of_all_kinds(tmp_path, capsys):
    right = """
import torch
def norm(x, weight=None, eps=1e-6, *, offset=0.0, casting="gemma"):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight if weight is None else weight + offset, eps)
"""
    assert checked(tmp_path, capsys, "rms_norm", right, "norm", "--random", "5")[0] == 0
    for source, function, seen in (
        (right, "nrom", "mine.py has norm"),
        (right.replace("return ", "x.data.add_(1.0); return "), "norm", "changed its argument x"),
        (right.replace("return ", "return 2 * "), "norm", "d_x: max error"),
        (right.replace("return ", "return None and "), "norm", "FAILS"),
        (right.replace("eps)", "eps).double()"), "norm", "FAILS"),
        (right.replace("weight + offset, eps)", "weight.detach() + offset, eps)"), "norm", "FAILS"),
    ):
        status, out = checked(tmp_path, capsys, "rms_norm", source, function, "--random", "0")
        assert status != 0 and seen in out, out


def test_random_arguments_find_what_samples_miss(tmp_path, capsys):
    """Right for every sample, wrong for 100 to 199 columns; the report names the simplest arguments that show it."""
    source = """
import torch
def norm(x, weight=None, eps=1e-6, *, offset=0.0, casting="gemma"):
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight if weight is None else weight + offset, eps)
    return y * 2 if 100 <= x.shape[-1] < 200 else y
"""
    assert checked(tmp_path, capsys, "rms_norm", source, "norm", "--random", "0")[0] == 0
    status, out = checked(tmp_path, capsys, "rms_norm", source, "norm", "--random", "100")
    assert status == 1 and "random" in out and "x=Normal(shape=(100,)" in out, out


def test_bad_options_are_named(tmp_path, capsys):
    for arguments, seen in (
        (["check", "layer_nrom"], "--ops: got layer_nrom, allowed: adafactor, adamw, add_layer_norm"),
        (["check", "layer_norm", "--random", "-1"], "--random: got -1, allowed: 0 and more"),
        (["check", "--file", "x.py:f"], "--file: got x.py:f, allowed: one op"),
        (["check", "layer_norm", "--file", "nothing.py:f"], "a function in a Python file"),
        (["new", "No"], "--op: got No"),
        (["new", "layer_norm", "--root", str(ROOT)], "layer_norm.py is"),
        (["new", "fresh", "--root", str(tmp_path)], "the source tree of fastlm"),
    ):
        assert main(["kernels", *arguments]) == 2
        assert seen in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["kernels", "check", "layer_norm", "--backend", "cuda"]) == 1
        assert "layer_norm: cuda cannot serve: the tensors are on" in capsys.readouterr().err


def test_compile_says_that_it_needs_triton(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else there(name))
    assert main(["kernels", "compile", "layer_norm"]) == 1
    assert "kernels compile needs the package triton" in capsys.readouterr().err


def test_check_as_json(capsys):
    assert main(["kernels", "check", "rms_norm", "--backend", "reference", "--random", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tensors = [r for r in rows if "tensor" in r]
    assert {r["tensor"] for r in tensors} == {"output", "d_x", "d_weight"}
    assert all(0 <= r["budget_share"] <= 1 and r["max_error"] >= r["rms_error"] >= 0 for r in tensors)
    assert [(r["dtype"], r["ok"]) for r in rows if "ok" in r] == [("float32", True), ("bfloat16", True)]


def test_list(capsys):
    assert main(["kernels", "list", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table.keys() == registry.ops().keys()
    for name, row in table.items():
        assert row["reference"] == {"state": "serves", "why": ""}
        kernels = name != "kl_div" and not NO_TRITON  # of probabilities: plain PyTorch; of logits there is distillation_loss
        assert (row["triton"]["state"] in ("serves", "there")) == kernels, name
        assert row["cuda"]["state"] == "serves" or row["cuda"]["why"]
    assert main(["kernels", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in table)
    assert all(place["why"] in out for row in table.values() for place in row.values())


@pytest.mark.backend("triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is asked for")
def test_a_new_op_fails_until_it_is_filled_in(tmp_path):
    """In a copy of the tree, in fresh processes."""
    shutil.copytree(
        ROOT / "fastlm",
        tmp_path / "fastlm",
        symlinks=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))

    def kernels(*arguments):
        command = [sys.executable, "-m", "fastlm", "kernels", *arguments]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    done = kernels("new", "double")
    assert done.returncode == 0, done.stderr
    files = [tmp_path / f for f in ("fastlm/ops/double.py", "kernels/double.py", "csrc/cpu/double.cpp")]
    assert all(f.name in done.stdout and f.exists() for f in files)
    written = [f.read_text() for f in files]
    assert kernels("new", "double").returncode == 2
    assert [f.read_text() for f in files] == written, "nothing is overwritten"

    done = kernels("check", "double", "--random", "2")
    assert done.returncode == 1, done.stderr
    for backend, file in (("reference", "fastlm/ops/double.py"), ("triton", "kernels/double.py")):
        assert f"double on {backend} in float32" in done.stdout
        assert f"in {file}" in done.stdout, done.stdout

    text = written[0]
    for name, body in (
        ("forward", "return ((x + x).to(x.dtype),)"),
        ("backward", "return (dy * 2,)"),
        ("cost", "return Cost(x.numel(), 2 * x.nbytes, x.numel(), 2 * x.nbytes)"),
        ("peer", "return 2 * x"),
    ):
        stub = f'raise NotImplementedError("double: write {name} in fastlm/ops/double.py")'
        assert stub in text
        text = text.replace(stub, body)
    files[0].write_text(text)
    text = written[1].replace("b_x.to(y", "(b_x * 2).to(y")
    for name, source, target in (("forward", "x", "y"), ("backward", "dy", "dx")):
        stub = f'raise NotImplementedError("double: write {name} in kernels/double.py")'
        assert stub in text
        launch = f"_fwd_kernel[(triton.cdiv({source}.numel(), 64),)]({source}, {target}, {source}.numel(), BLOCK=64)"
        text = text.replace(stub, f"if {source}.numel():\n        {launch}")
    files[1].write_text(text)
    done = kernels("check", "double", "--random", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "double on triton in bfloat16" in done.stdout
