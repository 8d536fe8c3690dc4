"""The profile of training steps: every op is there, counted as it counts itself, and nothing is changed by looking."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from models import lm_batch, tiny_gpt

from fastlm import cli, registry
from fastlm.engine import Engine
from fastlm.engine.core import UpdateTape
from fastlm.engine.tape import Tape
from fastlm.models import GPT, GPTConfig
from fastlm.testbed.contender import schema_arguments
from fastlm.testbed.roof import Gemm, Roof
from fastlm.train.profile import LANES, WARM_UP, Profile, cost_of

LAYERS, WIDTH, VOCABULARY, TOKENS = 2, 128, 1024, 4 * 128


def profiled(engine: Engine, batches: list, steps: int = 4) -> Profile:
    profile = Profile(engine, steps)
    while not profile.done:
        with profile.step():
            engine.step(profile.data(lambda: batches))
    return profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    """Of a model that is large enough for its ops to take most of the time."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=4))
    return profiled(Engine(model), [lm_batch(4, 128, VOCABULARY)])


def test_the_spans_make_up_the_step(profile: Profile) -> None:
    assert len([s for s in profile.spans if s.lane == "step"]) == profile.steps
    calls = sum(s.seconds for s in profile.spans if s.lane != "step") / profile.steps
    assert 0.75 * profile.step_seconds() <= calls <= profile.step_seconds()
    assert profile.own < 0.2 * profile.steps * profile.step_seconds()
    rows = [line.split() for line in profile.table().splitlines()]
    shares = [float(row[-1 if row[-1].endswith("%") else -3].rstrip("%")) for row in rows[2:-1]]
    assert abs(sum(shares) - 100) < 0.1 * len(shares)


def test_every_op_appears_as_often_as_it_is_called(profile: Profile) -> None:
    seen = Counter((s.name, s.lane) for s in profile.spans)
    once = [("step", "batches", "data"), ("embedding", "embedding", "forward"), ("embedding", "embedding", "backward")]
    once += [("norm + residual", "layer_norm", lane) for lane in ("forward", "backward")]
    once += [("head + loss", "linear_cross_entropy", lane) for lane in ("forward", "backward")]
    once += [("optimizer", "adamw", "optimizer")]
    expected = {(name, lane): 1 for _, name, lane in once}
    for lane in ("forward", "backward"):
        expected["add_layer_norm", lane] = 2 * LAYERS
        for name in ("attention", "gelu", "GEMM qkv", "GEMM attn proj", "GEMM fc", "GEMM mlp proj"):
            expected[name, lane] = LAYERS
    assert {k: n / profile.steps for k, n in seen.items() if k[1] != "step"} == expected


def test_operations_are_those_of_the_model(profile: Profile) -> None:
    """6 a token for each parameter of the blocks' matrices and of the head."""
    flops = Counter()
    for s in profile.spans:
        flops[s.kind.split()[0]] += s.cost[0] / profile.steps
    assert flops["GEMM"] == 6 * TOKENS * LAYERS * 12 * WIDTH**2
    assert flops["head"] == 6 * TOKENS * VOCABULARY * WIDTH


def test_floors_are_positive_and_below_the_times(profile: Profile) -> None:
    lines = profile.lines()
    for (kind, lane), line in lines.items():
        with_forward = (kind, lane) == ("head + loss", "backward")  # its gradients came with the loss
        assert (line.floor > 0) == (lane != "data" and not with_forward), (kind, lane)
        assert line.seconds > 0 and line.calls >= 1
    assert sum(line.floor for line in lines.values()) < sum(line.seconds for line in lines.values())
    profile._roof, measured = Roof("cpu", "float32", 1e9, (Gemm(1, 1, 1, 2e-9),)), profile.roof()
    try:  # by hand: a roof of 1 GFLOP/s and 1 GB/s
        n = TOKENS * WIDTH
        qkv = profile.lines()["GEMM qkv", "forward"]
        assert qkv.floor == pytest.approx(LAYERS * 6 * n * WIDTH * 1e-9)
        norm = profile.lines()["norm + residual", "forward"]  # one norm of 2 n, and four of 4 n floats
        assert norm.floor == pytest.approx((2 + LAYERS * 2 * 4) * n * 4 * 1e-9)
    finally:
        profile._roof = measured


def test_the_trace_is_in_the_trace_event_format(profile: Profile, tmp_path: Path) -> None:
    profile.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert tuple(names[i] for i in range(len(LANES))) == LANES
    calls = [e for e in events if e["ph"] == "X"]
    assert len(calls) == len(profile.spans)
    for e in calls:
        assert e["ts"] >= 0 and e["dur"] >= 0 and e["pid"] == 1 and e["tid"] in names and isinstance(e["args"], dict)
    steps = [e for e in calls if names[e["tid"]] == "step"]
    for e in calls:
        assert any(s["ts"] <= e["ts"] and e["ts"] + e["dur"] <= s["ts"] + s["dur"] + 1e-3 for s in steps)
    work = sorted((e["ts"], e["dur"]) for e in calls if names[e["tid"]] != "step")
    assert all(a + took <= b + 1e-3 for (a, took), (b, _) in pairwise(work))  # one at a time
    attention = next(e for e in calls if e["name"] == "attention")
    assert attention["args"]["q"] == "float32[4, 4, 128, 32]" and attention["args"]["flops"] > 0
    assert next(e for e in calls if e["name"] == "GEMM qkv")["args"] | {"flops": 0, "bytes": 0} == {
        "m": TOKENS, "n": 3 * WIDTH, "k": WIDTH, "flops": 0, "bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_looking_changes_nothing(recompute: str) -> None:
    engines = []
    for _ in range(2):
        model = tiny_gpt(resid_pdrop=0.1, attn_pdrop=0.1)
        model.recompute = recompute
        engines.append(Engine(model, dtype=torch.bfloat16, seed=3))
    batches = [lm_batch(seed=1), lm_batch(seed=2)]
    profile = profiled(engines[0], batches, 2)
    for _ in range(WARM_UP + 2):
        engines[1].step(batches)
    for (name, a), b in zip(engines[0].state_dict().items(), engines[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert engines[0].tape_class is Tape and engines[0].update_class is UpdateTape
    again = Counter(s.name for s in profile.spans if s.kind == "recomputed")
    micro_steps = profile.steps * len(batches)
    if recompute == "none":
        assert not again
    else:
        assert again["gelu"] == 2 * micro_steps and ("attention" in again) == (recompute == "block")
        # The last of a segment is not run again: the projection behind the activation, the dropout behind the block.
        assert again["dropout"] == (2 * micro_steps if recompute == "block" else 0)
        assert again["GEMM mlp proj"] == (2 * micro_steps if recompute == "block" else 0)
    assert all(s.lane == "backward" for s in profile.spans if s.kind == "recomputed")
    counts = Counter((s.name, s.lane) for s in profile.spans if s.kind != "recomputed")
    for name in ("attention", "gelu", "add_layer_norm"):
        assert counts[name, "forward"] == counts[name, "backward"] > 0


def test_without_a_profile_no_step_is_noted() -> None:
    engine = Engine(tiny_gpt())
    profile = Profile(engine, 1, warm_up=2)
    for _ in range(2):
        with profile.step():
            assert engine.tape_class is Tape
            engine.step(profile.data(lambda: [lm_batch()]))
        assert profile.spans == [] and not profile.done


@pytest.mark.parametrize("op", registry.ops().values(), ids=registry.ops())
def test_an_op_is_counted_as_it_counts_itself(op: registry.Op) -> None:
    for sample in op.samples[:4]:
        args = sample.build(torch.float32)
        assert cost_of(op, schema_arguments(op, args)) == op.cost(**args)


def test_roles_by_the_names_of_parameters() -> None:
    layer = torch.nn.ModuleDict({"cross": torch.nn.MultiheadAttention(8, 2), "gate": torch.nn.Linear(8, 8)})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(8, 8), layer])})
    profile = Profile(Engine(model), 1)
    cross, gate = layer["cross"], layer["gate"]
    assert profile.role(cross.in_proj_weight) == profile.role(cross.in_proj_weight[8:16]) == "GEMM qkv"
    assert profile.role(cross.out_proj.weight) == "GEMM cross proj"
    assert profile.role(gate.weight) == "GEMM layers.gate" and profile.role(model["layers"][0].weight) == "GEMM layers"


def test_the_option_may_stand_alone() -> None:
    for given, full in (
        ("train --profile", "train --profile 10"), ("train --profile 3 --lr 1", "train --profile 3 --lr 1"),
        ("train --profile --lr 1", "train --profile 10 --lr 1"), ("train --lr 1", "train --lr 1"),
    ):  # fmt: skip
        assert cli._with_value(given.split(), "--profile", "10") == full.split()
