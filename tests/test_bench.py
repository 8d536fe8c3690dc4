"""How kernels are timed, and what `fastlm kernels bench` makes of it."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import backends, info, registry
from fastlm.testbed import bench, bench_report, peers, plain, roof, timing
from fastlm.testbed.contender import Contender, error_ratio, schema_arguments
from fastlm.testbed.options import BenchOptions
from fastlm.testbed.shapes import chosen_shapes, shrunk
from fastlm.train.config import OptionError


def small_caches(monkeypatch):
    monkeypatch.setattr(timing, "_SMALLEST_FLUSH", 1 << 16)
    monkeypatch.setattr(timing, "_last_level_cache", lambda: 0)


class Clock:
    """A clock that stands still but for what the candidates take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "_lost_cores", lambda: 0)
        small_caches(monkeypatch)

    def candidate(self, *durations):
        """A function that takes the durations in turn, the last one for ever."""
        left = list(durations)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def quick(monkeypatch):
    """Small roofs and caches: what is tested here is not how fast this machine is."""
    monkeypatch.setitem(roof._COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(roof._SQUARE, "cpu", 32)
    small_caches(monkeypatch)
    monkeypatch.setattr(bench, "keep_memory", lambda: True)


def test_first_call_is_timed_apart_and_median_is_of_the_others(clock):
    fast, slow = clock.candidate(9.0, 1.0), clock.candidate(5.0, 2.0)
    got = timing.interleaved({"fast": fast, "slow": slow}, device="cpu", seconds=30.0)
    assert (got["fast"].first, got["slow"].first) == (9.0, 5.0)
    assert (got["fast"].median, got["slow"].median) == (1.0, 2.0)
    assert got["fast"].rounds == got["slow"].rounds == 10  # 30 s in rounds of 3


def test_quartiles(clock):
    warm_up = 1  # one round of a quarter of no time
    t = timing.interleaved(
        {"f": clock.candidate(*[0.0] * (1 + warm_up), 5.0, 1.0, 3.0, 2.0, 4.0)},
        device="cpu", seconds=0.0, min_rounds=5,
    )["f"]  # fmt: skip
    assert t.samples == (5.0, 1.0, 3.0, 2.0, 4.0)
    assert (t.low, t.median, t.high) == (2.0, 3.0, 4.0)
    assert timing.Timing((7.0,), 1.0).low == timing.Timing((7.0,), 1.0).high == 7.0


def test_every_round_runs_all_in_a_shuffled_order(quick):
    seen = []
    names = ["a", "b", "c"]
    timing.interleaved(
        {n: lambda n=n: seen.append(n) for n in names}, device="cpu", seconds=0.0, min_rounds=60, max_rounds=60
    )  # fmt: skip
    rounds = [tuple(seen[i : i + 3]) for i in range(6, len(seen), 3)]  # after the first call and the warm-up
    assert len(rounds) == 60 and all(sorted(r) == names for r in rounds)
    assert len(set(rounds)) == 6  # all orders come
    for place in range(3):  # and nobody has a place of its own
        assert all(10 <= sum(r[place] == n for r in rounds) <= 30 for n in names)


def test_drift_hits_all_alike(clock):
    """A machine that slows down threefold while it is measured leaves the ratio of two medians alone."""

    def drifting(seconds):
        def run():
            clock.now += seconds * (1.0 + clock.now / 2000.0)

        return run

    got = timing.interleaved({"one": drifting(1.0), "two": drifting(2.0)}, device="cpu", seconds=8000.0)
    assert got["one"].samples[-1] > 2.5 * got["one"].samples[0]
    assert abs(got["two"].median / got["one"].median - 2.0) <= 0.02


def test_samples_without_the_core_are_left_out_for_all_or_for_none(clock, monkeypatch):
    lost = [0]
    monkeypatch.setattr(timing, "_lost_cores", lambda: lost[0])

    def candidate(waits):
        calls = []

        def run():
            calls.append(1)
            lost[0] += waits(len(calls))
            clock.now += 10.0 if waits(len(calls)) else 1.0

        return run

    def timed(waits, **bounds):
        both = {"f": candidate(waits), "quiet": candidate(lambda n: False)}
        return timing.interleaved(both, device="cpu", **bounds)

    got = timed(lambda n: n % 2 == 0, seconds=100.0)  # rounds take 2 and 11 in turn
    assert set(got["f"].samples) == {1.0} and abs(got["f"].rounds - got["f"].left_out) <= 1
    assert got["quiet"].rounds == got["f"].rounds + got["f"].left_out and got["quiet"].left_out == 0
    # The first call and the warm-up come before the five rounds; all but one are disturbed, so all count.
    got = timed(lambda n: n > 3, seconds=0.0, min_rounds=5)
    assert got["f"].samples == (1.0, 10.0, 10.0, 10.0, 10.0) and got["f"].left_out == 0
    assert got["quiet"].rounds == 5


def test_short_functions_are_called_several_times_when_warm(clock):
    got = timing.interleaved({"f": clock.candidate(1e-5)}, device="cpu", seconds=0.01, cold=False)["f"]
    assert got.calls in (10, 11)  # a sample lasts 0.1 ms at the least
    assert abs(got.median - 1e-5) <= 1e-12
    got = timing.interleaved({"f": clock.candidate(1e-5)}, device="cpu", seconds=0.01, cold=True)["f"]
    assert got.calls == 1


def test_cold_writes_more_than_the_cache_before_every_sample(monkeypatch):
    flushed = []
    add = torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda t, n: (flushed.append(t.nbytes), add(t, n))[1])
    timing.interleaved({"f": lambda: None}, device="cpu", seconds=0.0, min_rounds=3)
    assert len(flushed) == 3
    assert min(flushed) > timing._last_level_cache()


def test_setup_runs_before_every_call_and_is_not_timed(clock):
    seen = []

    def setup(name):
        seen.append(name)
        clock.now += 100.0

    def run():
        seen.append("run")
        clock.now += 1.0

    got = timing.interleaved({"f": run}, device="cpu", seconds=0.0, setup=setup, cold=False)["f"]
    assert seen == ["f", "run"] * (len(seen) // 2)
    assert got.median == 1.0


def test_a_candidate_that_raises_is_named(quick):
    def broken():
        raise ValueError("no such tile")

    with pytest.raises(timing.CandidateError, match=r"^bad: ValueError: no such tile$") as caught:
        timing.interleaved({"good": lambda: None, "bad": broken}, device="cpu", seconds=0.0)
    assert caught.value.name == "bad" and isinstance(caught.value.__cause__, ValueError)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("candidates", "options", "text"),
    [({}, {}, "candidates: got none"), ({"f": int}, {"min_rounds": 3, "max_rounds": 2}, "min_rounds: got 3")],
)
def test_bad_arguments(candidates, options, text):
    with pytest.raises(ValueError, match=text):
        timing.interleaved(candidates, device="cpu", **options)


def test_roof_is_the_slower_of_the_two_rates():
    r = roof.Roof("cpu", "float32", 100.0, (roof.Gemm(1, 1, 1, 0.01), roof.Gemm(10, 10, 10, 1.0)))
    assert [g.flop_per_s for g in r.gemms] == [200.0, 2000.0]
    assert r.flop_per_s == 2000.0
    assert (r.floor(4000.0, 100.0), r.bound(4000.0, 100.0)) == (2.0, "flops")
    assert (r.floor(2000.0, 300.0), r.bound(2000.0, 300.0)) == (3.0, "bytes")


def test_roof_is_measured(quick):
    r = roof.measure("cpu", torch.float32, [(64, 32, 16), (8, 8, 8)], seconds=0.02)
    assert [(g.m, g.n, g.k) for g in r.gemms] == [(64, 32, 16), (8, 8, 8)]
    assert 1e8 <= r.bytes_per_s <= 1e13 and 1e5 <= r.flop_per_s <= 1e15
    assert r.as_dict()["flop_per_s"] == r.flop_per_s == max(g.flop_per_s for g in r.gemms)


# --- fastlm kernels bench

TINY = {
    "layer_norm": {"rows": 8, "columns": 16},
    "rms_norm": {"rows": 8, "columns": 16},
    "add_layer_norm": {"rows": 8, "columns": 16},
    "add_rms_norm": {"rows": 8, "columns": 16},
    "gelu": {"rows": 8, "columns": 16},
    "silu": {"rows": 8, "columns": 16},
    "relu": {"rows": 8, "columns": 16},
    "relu_squared": {"rows": 8, "columns": 16},
    "swiglu": {"rows": 8, "columns": 16},
    "geglu": {"rows": 8, "columns": 16},
    "reglu": {"rows": 8, "columns": 16},
    "rotary_embedding": {"batch": 1, "heads": 2, "seq": 8, "head_dim": 8},
    "dropout": {"rows": 8, "columns": 16},
    "cross_entropy": {"tokens": 8, "classes": 33},
    "linear_cross_entropy": {"tokens": 8, "width": 16, "classes": 33},
    "distillation_loss": {"tokens": 8, "classes": 33},
    "kl_div": {"rows": 8, "classes": 33},
    "linear_distillation_loss": {"tokens": 8, "student": 16, "teacher": 24, "classes": 33},
    "attention": {"batch": 1, "heads": 2, "seq": 16, "head_dim": 8},
    "embedding": {"batch": 2, "seq": 8, "width": 16, "words": 30},
    "embedding_layer_norm": {"batch": 2, "seq": 8, "width": 16, "words": 30},
    "adafactor": {"rows": 8, "columns": 16},
    "adamw": {"parameters": 100},
    "sgd": {"parameters": 100},
    "lion": {"parameters": 100},
}


def options(op="gelu", shapes="rows=8,columns=16", **more):
    defaults = {"against": ("eager",), "dtype": ("float32",), "backend": ("reference",), "seconds": 0.01}
    return BenchOptions(ops=(op,) if isinstance(op, str) else op, shapes=shapes, **(defaults | more))


def broken_forward(monkeypatch, name, wrong):
    """`wrong(*args, *outputs)` computes the forward of an op instead of its own implementation."""
    real = backends.implementation

    def implementation(op, direction, args):
        return wrong if op.name == name and direction == "forward" else real(op, direction, args)

    monkeypatch.setattr(backends, "implementation", implementation)


def test_rows_are_complete(quick, tmp_path, capsys):
    path = tmp_path / "out" / "kernels.json"
    asked = ("eager", "sdpa", "liger")
    assert bench.run(options(against=asked, out=path, plot=tmp_path / "plot.png")) == 0
    content = json.loads(path.read_text())
    assert content["finished"] and content["kind"] == "kernels" and content["environment"]["torch"]
    assert [r["direction"] for r in content["rows"]] == ["forward", "backward", "both"]
    x_bytes = 8 * 16 * 4
    for row, tensors, operations in zip(content["rows"], (2, 3, 5), (20, 30, 50), strict=True):
        assert row["op"] == "gelu" and row["dims"] == {"rows": 8, "columns": 16, "approximate": "tanh"}
        assert (row["dtype"], row["backend"], row["device"]) == ("float32", "reference", "cpu")
        assert 0 < row["low"] <= row["seconds"] <= row["high"] and row["rounds"] >= 5
        moved, flops = tensors * x_bytes, operations * 8 * 16
        assert math.isclose(row["gbytes_per_s"], moved / row["seconds"] / 1e9)
        assert math.isclose(row["tflop_per_s"], flops / row["seconds"] / 1e12)
        by_bytes, by_flops = moved / row["roof"]["bytes_per_s"], flops / row["roof"]["flop_per_s"]
        assert math.isclose(row["roof_fraction"], max(by_bytes, by_flops) / row["seconds"])
        assert row["bound"] == ("bytes" if by_bytes >= by_flops else "flops")
        assert list(row["peers"]) == list(asked)
        eager = row["peers"]["eager"]
        assert math.isclose(eager["ratio"], eager["seconds"] / row["seconds"])
        assert eager["low"] <= eager["seconds"] <= eager["high"]
        assert 0 < row["error_ratio"] <= 10 and 0 <= eager["error_ratio"] <= 10
        assert row["peak_bytes"] >= 0 and eager["peak_bytes"] >= 0
        assert row["peers"]["sdpa"]["absent"] == "it has attention only"
        assert row["checked"] == row["dims"] and row["cold"] is True
    text = capsys.readouterr().out
    assert "3 rows, 3 comparisons" in text and "absent: sdpa: it has attention only" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_kernel_is_refused_and_the_others_are_timed(quick, monkeypatch, tmp_path, capsys):
    def no_gelu(x, bias, seed, approximate, dropout_p, y):
        y.copy_(x)

    broken_forward(monkeypatch, "gelu", no_gelu)
    path = tmp_path / "kernels.json"
    status = bench.run(options(("gelu", "layer_norm"), direction=("forward",), out=path))
    assert status == 1
    content = json.loads(path.read_text())
    assert [r["op"] for r in content["rows"]] == ["layer_norm"]
    (entry,) = content["refused"]
    assert entry["op"] == "gelu" and "does not pass its contract" in entry["why"] and "max error" in entry["why"]
    assert "gelu float32 reference: REFUSED, not timed" in capsys.readouterr().out


def test_kernel_that_is_wrong_at_the_timed_size_only_is_refused(quick, monkeypatch, capsys):
    op = registry.get("gelu")

    def forgets_the_last_row(x, bias, seed, approximate, dropout_p, y):
        y.copy_(op.forward(x, bias, seed, approximate, dropout_p)[0])
        if x.shape[0] >= 128:  # more rows than any sample has
            y[-1] = 0

    broken_forward(monkeypatch, "gelu", forgets_the_last_row)
    assert bench.run(options(shapes="rows=64,columns=16", direction=("forward",))) == 0
    assert bench.run(options(shapes="rows=128,columns=16", direction=("forward",))) == 1
    text = capsys.readouterr().out
    assert "gelu rows=128 columns=16 approximate=tanh float32 reference: REFUSED" in text and "(127, " in text


def test_nan_and_an_exception_are_refused(quick, monkeypatch, capsys):
    broken_forward(monkeypatch, "gelu", lambda *args: args[-1].fill_(math.nan))
    assert bench.run(options()) == 1

    def raises(*args):
        raise RuntimeError("no such tile")

    broken_forward(monkeypatch, "gelu", raises)
    assert bench.run(options()) == 1
    assert "RuntimeError: no such tile" in capsys.readouterr().out


def test_shape_without_room_is_refused_before_it_is_made(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "available_memory", lambda: 2000)  # x and its float64 draw fit for 8 rows, not for 64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "kernels.json"
    op = registry.get("gelu")
    monkeypatch.setitem(op.shapes, "both", ({"rows": 64, "columns": 16}, {"rows": 4, "columns": 16}))
    assert bench.run(options(shapes="both", direction=("forward",), out=path)) == 1
    content = json.loads(path.read_text())
    assert [r["dims"]["rows"] for r in content["rows"]] == [4]
    (entry,) = content["refused"]
    assert entry["dims"]["rows"] == 64 and "MemoryError: it needs about" in entry["why"]


def test_backend_that_cannot_serve_is_refused(quick, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.run(options(backend=("triton",))) == 1
    assert "its speed means nothing" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert bench.run(options(backend=("cuda",))) == 1
        assert "there is no GPU" in capsys.readouterr().out


def test_peer_that_computes_something_else_shows_its_error(quick, monkeypatch, tmp_path):
    def quick_gelu(x, bias=None, approximate="none"):
        return (x + bias) * torch.sigmoid(1.702 * (x + bias))

    monkeypatch.setitem(peers._BUILDERS, "eager", lambda *_: peers.Peer(quick_gelu))
    path = tmp_path / "kernels.json"
    assert bench.run(options(direction=("forward", "both"), out=path)) == 0
    for row in json.loads(path.read_text())["rows"]:
        assert row["peers"]["eager"]["error_ratio"] > 1000 > 10 > row["error_ratio"]


def test_peer_that_raises_is_shown_with_its_reason(quick, monkeypatch, tmp_path):
    def not_here(*args, **kwargs):
        raise RuntimeError("no such device")

    calls = []

    def later(x, bias=None, approximate="none"):
        calls.append(1)
        if len(calls) > 4:  # while it is timed
            raise RuntimeError("out of patience")
        return plain.gelu(x, bias, approximate)

    monkeypatch.setitem(peers._BUILDERS, "sdpa", lambda *_: peers.Peer(not_here))
    monkeypatch.setitem(peers._BUILDERS, "flex", lambda *_: peers.Peer(later))
    path = tmp_path / "kernels.json"
    asked = ("eager", "sdpa", "flex")
    assert bench.run(options(against=asked, direction=("forward",), out=path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["peers"]["sdpa"] == {"absent": "failed: RuntimeError: no such device"}
    assert row["peers"]["flex"] == {"absent": "failed: RuntimeError: out of patience"}
    assert row["peers"]["eager"]["ratio"] > 0


def test_interrupted_run_keeps_its_rows(quick, monkeypatch, tmp_path, capsys):
    real, seen = bench.interleaved, []

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(bench, "interleaved", interrupted)
    path = tmp_path / "kernels.json"
    with pytest.raises(KeyboardInterrupt):
        bench.run(options(out=path, plot=tmp_path / "plot.png"))
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 2 and content["finished"] is False
    assert "2 rows" in capsys.readouterr().out and (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", registry.ops().values(), ids=list(registry.ops()))
def test_every_op_can_be_timed_with_peers_that_compute_the_same(op, dtype):
    args = op.case(**TINY.get(op.name, {})).build(dtype)
    before = {k: v.clone() for k, v in args.items() if isinstance(v, torch.Tensor)}
    names = ["eager", "sdpa", "torch-linear-ce"]
    there = []
    for name in names:
        try:
            peer = peers.find(name, op, args, "both")
        except peers.Absent:
            continue
        there.append(name)
        given = peer.prepare(args)
        contender = Contender(op, peer.function, given)
        for direction in ("forward", "backward", "both") if op.backward else ("forward",):
            contender.setup(direction)
            contender.call(direction)()
        values = Contender(op, peer.function, given).evaluate()  # of fresh state: AdamW's has moved on
        if peer.comparable:  # PyTorch's own quicker ways may lose a little more than the oracle's way
            limit = 200 if op.name.endswith("layer_norm") and dtype == torch.bfloat16 else 8
            assert error_ratio(values, *reversed(bench._truth(op, given))) <= limit, name
    assert "eager" in there and ("sdpa" in there) == (op.name == "attention")
    assert all(torch.equal(args[k], v) for k, v in before.items())


def test_peers_that_would_compute_something_else_are_absent(monkeypatch):
    attention, lce = registry.get("attention"), registry.get("linear_cross_entropy")

    def why(name, op, direction="both", **args):
        with pytest.raises(peers.Absent) as caught:
            peers.find(name, op, args, direction)
        return str(caught.value)

    def call(**dims):
        return attention.case(**({"batch": 1, "heads": 2, "seq": 8, "head_dim": 4} | dims)).build(torch.float32)

    assert "aligned top-left" in why("sdpa", attention, **call(seq_k=12, causal=True))
    assert "sees no key" in why("sdpa", attention, **call(seq_k=4, causal=True))
    assert "dropout mask" in why("sdpa", attention, **call(dropout_p=0.5))
    assert why("flex", attention, **call(), key_lengths=torch.tensor([3])) == "it has no key_lengths"
    assert why("sdpa", attention, **call(), softcap=30.0) == "it has no softcap"  # nor what is yet to come
    assert peers.find("eager", attention, call() | {"softcap": 30.0}, "both").function is attention.peer
    assert "no backward on a CPU" in why("flex", attention, **call())
    peers.find("sdpa", attention, call(seq_k=12, causal=False), "both")
    args = lce.case(**TINY["linear_cross_entropy"]).build(torch.bfloat16)
    assert "see both" in why("torch-linear-ce", lce, "backward", **args)
    assert "no z_loss" in why("torch-linear-ce", lce, **args, z_loss=1e-4)
    monkeypatch.setattr(info, "installed", lambda package: "")
    assert why("liger", lce, **args) == "liger-kernel is not installed"
    assert why("cce", lce, **args) == "cut-cross-entropy is not installed"
    monkeypatch.setattr(info, "installed", lambda package: "1.0")
    assert why("cce", lce, **args) == "it needs a GPU"
    assert why("liger", attention, **call()) == "it has no attention"
    with pytest.raises(ValueError, match=r"no peer named 'numpy'; there are eager, compile"):
        peers.find("numpy", lce, args, "both")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"op": "gelo"}, r"--op: got gelo, allowed: adafactor, adamw.*gelu"),
        ({"shapes": "huge"}, r"--shapes: got huge for gelu, allowed: default, sweep, large, or .*rows="),
        ({"shapes": "rows=8,width=3"}, r"--shapes: got width=3, allowed: dimensions of gelu: rows, columns"),
        ({"shapes": "rows=many"}, r"--shapes: got rows=many, allowed: a whole number"),
        ({"shapes": "rows=-1"}, r"--shapes: got rows=-1, allowed: .*not negative"),
        ({"against": ("numpy",)}, r"--against: got numpy, allowed: eager"),
        ({"direction": ("sideways",)}, r"--direction: got sideways, allowed: forward, backward, both"),
        ({"seconds": math.nan}, r"--seconds: got nan"),
    ],
)
def test_bad_options(bad, text):
    with pytest.raises(OptionError, match=text):
        bench.run(options(**bad))


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench_report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(bench_report.MissingPackage, match="--plot needs the package matplotlib"):
        bench.run(options(plot=tmp_path / "plot.png"))


def test_shapes_by_name_and_by_dimension():
    op = registry.get("attention")
    assert len(chosen_shapes(op, "default")) == len(op.shapes["default"])
    (dims,) = chosen_shapes(op, "seq=128,causal=false,dropout_p=0.1")
    given = {"seq": 128, "causal": False, "dropout_p": 0.1}
    assert dims | given == dims and (dims["batch"], dims["heads"], dims["head_dim"]) == (2, 12, 64)


def test_real_size_check_shrinks_what_float64_cannot_afford():
    op = registry.get("linear_cross_entropy")
    dims = {"tokens": 1024, "width": 768, "classes": 50304}
    checked = shrunk(op, dims, torch.float32, flops=2e10, elements=1e8)
    assert checked["tokens"] == 1024 and checked["width"] == 768 and checked["classes"] < 50304
    cost = op.cost(**op.case(**checked).build(torch.float32, "meta"))
    assert 1e10 <= cost.forward_flops + cost.backward_flops <= 2e10
    assert shrunk(op, checked, torch.float32, flops=2e10, elements=1e8) == checked
    few = shrunk(op, dims, torch.float32, flops=2e10, elements=1e5)
    tensors = op.case(**few).build(torch.float32, "meta").values()
    assert 2e4 <= sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)) <= 1e5


def test_row_says_where_it_was_checked(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench._EXACT_ELEMENTS, "cpu", 200)
    path = tmp_path / "kernels.json"
    assert bench.run(options(shapes="rows=16,columns=16", direction=("forward",), out=path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["dims"]["rows"] == 16 and row["checked"]["rows"] == 8 and row["peers"]["eager"]["error_ratio"] < 10
    assert "checked at rows=8" in capsys.readouterr().out


def test_error_ratio():
    exact = {"output": torch.tensor([1.0, 2.0], dtype=torch.float64), "d_x": torch.zeros(2, dtype=torch.float64)}
    off = {"output": torch.tensor([1.0, 2.0 + 3e-5])}
    torch_own = {"output": torch.tensor([1.0 + 1e-5, 2.0]), "d_x": torch.zeros(2)}
    assert abs(error_ratio(off, torch_own, exact) - 3.0) <= 0.1
    exactly_right = {"output": exact["output"].float(), "d_x": torch.zeros(2)}
    half_rounding = torch.finfo(torch.float32).eps / 2 * 2.0
    assert abs(error_ratio(off, exactly_right, exact) - 3e-5 / half_rounding) <= 5
    assert error_ratio(exactly_right, torch_own, exact) == 0.0
    assert error_ratio({"output": torch.tensor([1.0, math.nan])}, torch_own, exact) == math.inf
    assert error_ratio({"d_x": torch.ones(2)}, torch_own, exact) == math.inf


def test_backward_has_a_graph_of_its_own_each_time():
    op = registry.get("gelu")
    contender = Contender(op, op.function, op.case(rows=4, columns=8).build(torch.float32))
    for _ in range(2):
        contender.setup("backward")
        dx, dbias = contender.call("backward")()
        assert dx.shape == (4, 8) and dbias.shape == (8,)
    with pytest.raises(RuntimeError, match="second time"):
        contender.call("backward")()


def test_overwritten_arguments_are_put_back():
    op = registry.get("cross_entropy")
    args = op.case(tokens=4, classes=8).build(torch.float32)
    seen = []

    def overwrites(logits, target):
        seen.append(logits.detach().clone())
        with torch.no_grad():
            logits.zero_()
        return logits.sum()

    contender = Contender(op, overwrites, args, spoils=("logits",))
    for _ in range(3):
        contender.setup("forward")
        contender.call("forward")()
    assert all(torch.equal(s, args["logits"]) for s in seen) and args["logits"].abs().sum() > 0


def test_peak_memory_counts_what_is_held_at_once():
    op = registry.get("gelu")
    args = op.case(rows=1024, columns=2048).build(torch.float32)  # x: 8 MiB

    def eight_copies(x, bias=None, approximate="none"):
        return x.repeat(8, 1)[:1024] + 1.0  # they are gone when the result is handed back

    contender = Contender(op, eight_copies, args)
    peak = contender.peak_bytes("forward")
    if peak is None:
        pytest.skip("no resident-memory counters on this system")
    assert abs(peak - (72 << 20)) <= 1 << 20


def test_schema_arguments_are_those_of_the_call():
    op = registry.get("gelu")
    args = op.case(rows=2, columns=4).build(torch.float32, "meta")
    assert schema_arguments(op, args) == (args["x"], args["bias"], None, "tanh", 0.0)


def test_pytest_benchmarks_are_generated_and_run():
    """`pytest benchmarks` on one op: every backend is there, run or skipped with the reason, and eager beside them."""
    pytest.importorskip("pytest_benchmark")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_", "FASTLM_EXPECT"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", "--benchmark-disable", "-v", "-k", "gelu-float32"],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for direction in ("forward", "backward", "both"):
        for who in (*backends.BACKENDS, "eager"):
            assert f"test_op[gelu-float32-{direction}-{who}]" in done.stdout
        assert re.search(rf"gelu-float32-{direction}-(reference|eager)\] PASSED", done.stdout)
    if not torch.cuda.is_available():
        assert "gelu on cuda: the tensors are on 'cpu'" in done.stdout
