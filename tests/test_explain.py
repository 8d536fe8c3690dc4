"""`fastlm kernels explain`: its numbers against hand-computed ones."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import backends, native, registry
from fastlm.testbed import explain as explain_file
from fastlm.testbed import launches, roof
from fastlm.testbed.chips import CHIPS
from fastlm.testbed.contender import Contender
from fastlm.testbed.explain import explain
from fastlm.testbed.options import ExplainOptions
from fastlm.testbed.targets import TARGETS
from fastlm.train.config import OptionError

ROOT = Path(__file__).parent.parent


def options(op, *shape, dtype="bfloat16", device="h100", json=False):
    return ExplainOptions(op=op, shape=shape, dtype=dtype, device=device, json=json)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setitem(roof._COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(roof._SQUARE, "cpu", 32)


def outside_the_interpreter(*arguments):
    """The JSON of `fastlm kernels explain` in a process where Triton compiles."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastlm", "kernels", "explain", *arguments, "--json"],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_work_of_layer_norm():
    work = explain(options("layer_norm", "rows=8192", "columns=4096"))["work"]
    elements = 8192 * 4096
    # bfloat16: forward reads x and writes y, backward reads x and dy and writes dx
    for direction, tensors, operations in (("forward", 2, 8), ("backward", 3, 14), ("both", 5, 22)):
        assert work[direction]["bytes"] == tensors * 2 * elements
        assert work[direction]["flops"] == operations * elements
        assert work[direction]["intensity"] == operations / (2 * tensors)
        assert work[direction]["bound"] == "bytes"
        assert abs(work[direction]["floor_seconds"] / (tensors * 2 * elements / 3.35e12) - 1) <= 1e-12


def test_work_of_attention():
    work = explain(
        options("attention", "batch=2", "heads=16", "seq=8192", "head_dim=128", "causal=false")
    )["work"]  # fmt: skip
    pairs = 2 * 16 * 8192**2
    assert work["forward"]["flops"] == 4 * 128 * pairs  # two products
    assert work["backward"]["flops"] == 10 * 128 * pairs  # five
    assert work["forward"]["bound"] == work["backward"]["bound"] == "flops"
    assert abs(work["forward"]["floor_seconds"] / (4 * 128 * pairs / 989.4e12) - 1) <= 1e-12
    q = 2 * 16 * 8192 * 128 * 2
    assert work["forward"]["bytes"] == 4 * q + 2 * 16 * 8192 * 4  # q, k, v, out; lse in float32
    causal = explain(
        options("attention", "batch=2", "heads=16", "seq=8192", "head_dim=128", "causal=true")
    )["work"]  # fmt: skip
    assert causal["forward"]["flops"] == 4 * 128 * 2 * 16 * 8192 * 8193 // 2
    narrow = explain(options("attention", "seq=8192", dtype="float32", device="a100"))
    assert narrow["device"]["flop_per_s"] == 19.5e12


def test_memory_of_layer_norm_and_of_bfloat16_parameters():
    memory = explain(options("layer_norm", "rows=8192", "columns=4096"))["memory"]
    x, statistics, parameters = 8192 * 4096 * 2, 2 * 8192 * 4, 2 * 4096 * 4
    assert memory["inputs"] == x + parameters
    assert (memory["outputs"], memory["statistics"]) == (x, statistics)
    assert (memory["gradients"], memory["gradient_copies"]) == (x + parameters, 0)
    memory = explain(options("linear_cross_entropy", "tokens=8", "width=16", "classes=100"))["memory"]
    assert memory["gradients"] == 8 * 16 * 2 + 100 * 16 * 4  # hidden's in bfloat16, the weight's in float32
    assert memory["gradient_copies"] == 100 * 16 * 2


@pytest.fixture
def small_pages():
    """No pages of 2 MiB meanwhile: they count as resident whole, also where a call touches a part."""
    if sys.platform != "linux":
        yield  # nothing there asks for large pages
        return
    prctl, disable = ctypes.CDLL(None).prctl, 41  # PR_SET_THP_DISABLE
    prctl(disable, 1, 0, 0, 0)
    yield
    prctl(disable, 0, 0, 0, 0)



@pytest.mark.parametrize("op", ["layer_norm", "gelu", "attention", "adamw"])
def test_memory_is_what_a_call_takes(op, here, small_pages, monkeypatch):
    """Held against the peak that is measured: the cpu backend has no workspace worth the name for these."""
    if native.why_not("cpu"):
        pytest.skip(native.why_not("cpu"))
    shape = {
        "layer_norm": ("rows=4096", "columns=1024"), "gelu": ("rows=2048", "columns=2048"),
        "attention": ("batch=4", "heads=8", "seq=512"), "adamw": ("parameters=1000000",),
    }[op]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    about = explain(options(op, *shape, dtype="float32", device="here"))
    assert about["device"]["type"] == "cpu" and about["backends"]["forward"]["backend"] == "cpu"
    record = registry.get(op)
    contender = Contender(record, record.function, record.case(**about["dims"]).build(torch.float32))
    with backends.use_backend("cpu"):
        for direction in ("forward", "backward", "both") if record.backward else ("forward",):
            measured = contender.peak_bytes(direction)
            if measured is None:
                pytest.skip("no resident-memory counters on this system")
            assert abs(measured - about["memory"][direction]) <= 1 << 20, direction


def test_backends_and_reasons(here, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("FASTLM_BACKEND", raising=False)
    about = explain(options("gelu", device="h100"))
    assert about["backends"]["forward"]["backend"] == about["backends"]["backward"]["backend"] == "triton"
    assert about["backends"]["forward"]["others"]["cpu"] == "the tensors are on 'cuda'"
    with backends.use_backend("reference"):
        about = explain(options("gelu", device="h100"))
    assert about["backends"]["forward"]["reason"] == "asked for" and about["launches"] == {}
    if native.why_not("cpu") or torch.cuda.is_available():
        return
    about = explain(options("gelu", device="here"))
    forward = about["backends"]["forward"]
    assert (forward["backend"], forward["threads"]) == ("cpu", torch.get_num_threads())
    assert forward["variant"] in native.ISAS
    assert forward["others"]["cuda"] == "the tensors are on 'cpu'"
    assert about["device"]["bytes_per_s"] > 0 and "measured now" in about["device"]["rates"]


def test_launches_are_those_of_the_launchers():
    pytest.importorskip("triton")
    about = outside_the_interpreter("layer_norm", "--shape", "rows=1000", "columns=4096", "--device", "h100")
    (forward,) = about["launches"]["forward"]
    assert forward["kernel"] == "_fwd_kernel" and forward["grid"] == [1000]  # a program a row
    assert forward["warps"] == 8 and forward["constants"]["BLOCK"] == 4096
    assert forward["constants"]["ONE_TILE"] is True and forward["constants"]["CENTRE"] is True
    backward = about["launches"]["backward"]
    assert [x["kernel"] for x in backward] == ["_bwd_kernel", "_sum_rows_kernel", "_sum_rows_kernel"]
    (programs,) = backward[0]["grid"]
    assert programs == 4 * TARGETS["sm_90"].multiprocessors
    assert about["memory"]["workspace_backward"] == 2 * programs * 4096 * 4  # a partial row each, weight and bias


def test_launches_depend_on_the_chip():
    pytest.importorskip("triton")
    shape = ("attention", "--shape", "batch=1", "heads=8", "seq=1024", "head_dim=64")
    h100 = outside_the_interpreter(*shape, "--device", "h100")
    (forward,) = h100["launches"]["forward"]
    assert forward["grid"] == [8 * 1024 // forward["constants"]["BLOCK_M"]]
    mi300x = outside_the_interpreter(*shape, "--device", "mi300x")
    assert mi300x["launches"]["backward"] != h100["launches"]["backward"]  # 64 KiB of shared memory, not 227


def test_launches_are_not_made_up_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    about = explain(options("gelu"))
    assert about["launches"]["forward"].startswith("TRITON_INTERPRET=1 is set")
    assert about["memory"]["workspace_backward"] == 0


def test_workspace_counts_what_is_held_at_once():
    memory = launches._Memory()
    given = torch.empty(100, device="meta")
    with memory:
        view = given[:50]  # no memory of its own
        first = torch.empty(10, device="meta")
        part = first.view(2, 5)
        del first
        second = torch.empty(20, device="meta")  # the first lives on in its view
        del part
        third = torch.empty(5, device="meta")
    assert memory.peak == 4 * 30
    assert memory.now == 4 * 25
    del view, second, third


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (options("gelo"), r"--op: got gelo, allowed: adafactor, adamw"),
        (options("gelu", "width=3"), r"--shape: got width=3, allowed: dimensions of gelu: rows, columns"),
        (options("gelu", "rows"), r"--shape: got rows, allowed: a whole number"),
        (options("gelu", device="v100"), r"--device: got v100, allowed: here, a100, h100"),
    ],
)
def test_bad_options(bad, text):
    with pytest.raises(OptionError, match=text):
        explain(bad)


def test_text_and_json(capsys):
    assert explain_file.run(options("layer_norm", "rows=8192", "columns=4096")) == 0
    text = capsys.readouterr().out
    assert "layer_norm rows=8192 columns=4096 bfloat16 on NVIDIA H100 SXM" in text
    assert "floor 40.06us, by bytes: 0.2684 GFLOP, 134.2 MB, 2 FLOP a byte" in text
    assert explain_file.run(options("layer_norm", "rows=8192", "columns=4096", json=True)) == 0
    assert json.loads(capsys.readouterr().out)["work"]["forward"]["bound"] == "bytes"


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_plausible(name):
    """Dense rates: half of TF32 to bfloat16, matrix units beyond ordinary ones; every target is one we compile for."""
    chip = CHIPS[name]
    rates = chip.flop_per_s
    assert rates["bfloat16"] == rates["float16"] > rates["tfloat32"] > rates["float32"]
    assert 1.95 <= rates["bfloat16"] / rates["tfloat32"] <= 2.1
    assert 1e12 <= chip.bytes_per_s <= 1e13 and chip.target in TARGETS and chip.source


@pytest.mark.parametrize("op", list(registry.ops()))
def test_every_op_is_explained(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    about = explain(options(op, device="b200"))
    assert about["work"]["forward"]["floor_seconds"] > 0 and about["memory"]["inputs"] > 0
    json.dumps(about, allow_nan=False)
