"""The forecast of a run's memory: held to what runs really take, and to what it says of what would fit."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bert_models import bert_batch, tiny_bert
from models import LLAMA, T5, lm_batch, tiny_encoder_decoder, tiny_gpt
from rich.console import Console

from fastlm import cli, native
from fastlm.engine import Engine
from fastlm.engine.dry_run import Ledger, dry_engine, dry_run, state_memory, step_memory
from fastlm.models import LSTM, LSTMConfig
from fastlm.registry import Spec
from fastlm.train import PRESETS, plan
from fastlm.train.config import (
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    TrainConfig,
    to_json,
)
from fastlm.train.families import FAMILIES
from fastlm.train.family import Facts
from fastlm.train.presets import T5_PRESETS, TRANSFORMER_PRESETS

CPU = torch.device("cpu")
KINDS = ("none", "mlp", "block")
MIB = 2**20
SHAPES = {n: Spec(t.shape, t.dtype) for n, t in lm_batch(2, 8).items()}
TEXT = "".join(f"line {i}: {i * i} is the square of {i}, and {i % 7} is left\n" for i in range(3000))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    return str(folder / "text.txt")


# --- the engine without memory


@pytest.mark.parametrize(
    ("backend", "dtype", "recompute"),
    [
        pytest.param("reference", torch.float64, "none", marks=pytest.mark.backend("reference")),
        *(
            pytest.param("cpu", dtype, recompute, marks=pytest.mark.backend("cpu"))
            for dtype in (torch.float32, torch.bfloat16)
            for recompute in ("none", "block")
            if not native.why_not("cpu")
        ),
    ],
)
def test_the_plan_is_the_engines_own(backend, dtype, recompute):
    """The arena is planned to the byte as a real step plans it, and the state is what the engine really holds."""
    real = Engine(tiny_gpt(resid_pdrop=0.1), dtype=dtype, backend=backend)
    real.model.recompute = recompute
    real.step([lm_batch(2, 8)])
    real.evaluate(lm_batch(2, 8))
    with dry_run(CPU) as ledger:
        engine = dry_engine(ledger, tiny_gpt(resid_pdrop=0.1), dtype, backend)
        engine.model.recompute = recompute
        found = step_memory(ledger, engine, SHAPES, SHAPES)
        assert sum(state_memory(engine).values()) == real.flat.nbytes()
    assert found.activations == real.arena.planned_bytes
    if backend == "reference":  # its ops make their results outside the arena
        assert found.workspace > found.activations
    assert next(engine.model.parameters()).device.type == "meta"


BERTS = ("masked", "pretraining", "sequence", "token", "question")
EVERY_MODEL = {
    "llama": lambda: tiny_gpt(**LLAMA),
    "lstm": lambda: LSTM(LSTMConfig(61, 12, 2)),
    "transformer": lambda: tiny_encoder_decoder(vocab_size=61, resid_pdrop=0.1),
    "t5": lambda: tiny_encoder_decoder(vocab_size=61, **T5),
    **{kind: partial(tiny_bert, kind) for kind in BERTS},
}


@pytest.mark.skipif(bool(native.why_not("cpu")), reason="no C++ kernels")
@pytest.mark.backend("cpu")
@pytest.mark.parametrize(
    ("kind", "recompute"), [*((kind, "none") for kind in EVERY_MODEL), ("masked", "mlp"), ("pretraining", "block")]
)
def test_the_plan_knows_every_model(kind, recompute):
    def make():
        torch.manual_seed(0)
        model = EVERY_MODEL[kind]()
        if recompute != "none":
            model.recompute = recompute
        return model

    batch = bert_batch(kind) if kind in BERTS else lm_batch(2, 8)
    shapes = {n: Spec(t.shape, t.dtype) for n, t in batch.items()}
    real = Engine(make(), backend="cpu")
    real.step([batch])
    with dry_run(CPU) as ledger:
        found = step_memory(ledger, dry_engine(ledger, make(), torch.float32, "cpu"), shapes, None)
    assert found.activations == real.arena.planned_bytes > 0


def test_what_pytorch_makes_is_counted_as_on_real_tensors():
    """The same ledger over a real step by plain PyTorch. It reads the same peak, but for the scalars."""

    def peak(ledger: Ledger, device: torch.device) -> int:
        model = tiny_gpt(attn_pdrop=0.1, n_layer=1).to(device)
        engine = Engine(model, dtype=torch.bfloat16, device=device, backend="reference")
        batch = {n: t.to(device) for n, t in lm_batch().items()}
        with ledger.peak_of() as peak:
            engine.step([batch])
        return peak[0]

    with Ledger("cpu") as ledger:
        real = peak(ledger, CPU)
    with dry_run(CPU) as ledger:
        dry = peak(ledger, torch.device("meta"))
    assert abs(dry - real) <= 0.005 * real, (dry, real)


def test_nothing_is_left_behind():
    """After a dry run: native functions run again, and the choice of backends knows where tensors are."""
    with dry_run(CPU) as ledger:
        engine = dry_engine(ledger, tiny_gpt(), torch.float32)
        step_memory(ledger, engine, SHAPES, None)
    one, two = (Engine(tiny_gpt()).step([lm_batch()]).loss.item() for _ in range(2))
    assert one == two > 0
    assert torch.zeros(3).device == CPU


# --- a run


def _config(text: str, **run) -> TrainConfig:
    config = PRESETS["tiny"]
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=(text,)),
        run=dataclasses.replace(config.run, **run),
    )


RUN = """
import json, sys
from pathlib import Path
from rich.console import Console
from fastlm.train import train
from fastlm.train.config import from_json
status = train(from_json(json.load(sys.stdin)), Console(file=sys.stderr))
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
sys.exit(status)
"""


def _python(*args: str, **more) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # beside other tests, threads that wait for each other take minutes
    done = subprocess.run([sys.executable, *args], stdout=subprocess.PIPE, text=True, timeout=600, env=env, **more)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM here")
@pytest.mark.skipif(
    bool(native.why_not("cpu")) or not hasattr(native.load("cpu"), "matmul_workspace"),
    reason="the C++ kernels that are built here do not say what workspace they take",
)
@pytest.mark.parametrize(
    ("model", "dtype", "recompute", "accumulate", "audit"),
    [("gpt", "bfloat16", "none", 1, False), ("gpt", "float32", "mlp", 2, True), ("bert", "bfloat16", "block", 1, False)],
    ids=["bfloat16", "audit", "bert"],
)
def test_a_run_takes_what_was_forecast(text, tmp_path, model, dtype, recompute, accumulate, audit):
    """The peak of the resident memory of a whole run of 19M parameters, to 5 percent; or of its audit."""
    config = TrainConfig(
        preset="small",
        data=DataOptions(
            data=(text,), seq_len=256, tokenizer=None if model == "bert" else "bytes", vocab_size=300,
            validation_fraction=0.1,
        ),
        model=ModelOptions(model=model, n_layer=6, n_embd=512, n_head=8),
        optimizer=OptimizerOptions(batch_size=8, grad_accum=accumulate, steps=2, warmup=1),
        run=RunOptions(
            out=str(tmp_path / "run"), dtype=dtype, recompute=recompute, audit=audit, eval_every=0, eval_batches=1,
            save_every=0, sample_tokens=0,
        ),
    )  # fmt: skip
    facts = FAMILIES[model].read(config, Console(file=io.StringIO())).facts
    asked = json.dumps([to_json(config), dataclasses.asdict(facts), 1 << 40])
    found = plan.Forecast(**json.loads(_python("-m", "fastlm.train.plan", input=asked))[recompute])
    measured = 1024 * int(_python("-c", RUN, input=json.dumps(to_json(config))).split()[1])
    assert abs(found.peak / measured - 1) <= 0.05, (found, measured)
    assert (found.peak == found.phases.get("audit")) == audit, found
    assert found.peak - found.held["process"] > 0.5 * measured, "the test would see little but the process"


def test_plan_prints_and_starts_nothing(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--preset", "tiny", "--data", text, "--dtype", "float32", "--batch-size", "3", "--grad-accum", "2",
               "--n-layer", "1"]  # fmt: skip
    assert cli.main(["train", "--plan", *options]) == 0
    said = capsys.readouterr().out
    for name in ("parameters", "gradients", "activations", "workspace", "batches", "process", "audit", "training"):
        assert f"\n  {name} " in said, said
    assert "micro-batches of 3 x 64, 2 an update, recompute none" in said
    assert "longest --seq-len" in said and all(f"\n  {kind} " in said for kind in KINDS)
    assert os.listdir(tmp_path) == []


def test_a_plan_of_another_model(text, capsys):
    """Of a carried state and of a model that has no recomputation; and of one that reads its own data."""
    options = ["--preset", "tiny", "--model", "lstm", "--data", text, "--dtype", "float32", "--no-audit"]
    assert cli.main(["train", "--plan", *options]) == 0
    said = capsys.readouterr().out
    assert "recompute none" in said and "\n  none " in said and "\n  mlp " not in said
    assert cli.main(["train", "--plan", *options, "--recompute", "block"]) == 2
    assert "--recompute: got block, allowed: auto or none for --model lstm" in capsys.readouterr().err
    options[3] = "bert"
    assert cli.main(["train", "--plan", *options, "--recompute", "block"]) == 0
    said = capsys.readouterr().out
    assert "micro-batches of 8 x 64, 1 an update, recompute block" in said and all(f"\n  {kind} " in said for kind in KINDS)


# --- what would fit


@pytest.mark.parametrize("limit", [0, 99, 100, 101, 1_000, 54_321, 10**9])
def test_the_largest_that_fits(limit):
    asked = []

    def need(n: int) -> int:
        asked.append(n)
        return 90 + 10 * n + 37 * (n // 64)  # workspace grows by chunks

    n = plan.largest(need, limit, 4096)
    assert 0 <= n <= 4096 and len(asked) <= 12
    if n == 0:
        assert limit < need(1)
    else:
        assert need(n) <= limit
        assert n == 4096 or need(n + max(1, n // 32)) > limit


@pytest.fixture(scope="module")
def found(text) -> dict[str, plan.Forecast]:
    """Of the tiny run, by kind of recomputation; with the audit's phase."""
    found = {k: plan.forecast(_config(text, audit=k == "none"), Facts(512), 0, k) for k in KINDS}
    audit = found["none"].phases["audit"]
    return {k: dataclasses.replace(one, phases=one.phases | {"audit": audit}) for k, one in found.items()}


@pytest.fixture
def choose(text, found, monkeypatch):
    """(the kind chosen, what was said) on a machine with so much memory, by the forecasts above."""

    def run(available: int, total: int | None = None, audit: bool = False, **options) -> tuple[str, str]:
        def forecast(config, facts, process, kind):
            phases = {n: size for n, size in found[kind].phases.items() if n != "audit" or config.run.audit}
            return dataclasses.replace(found[kind], phases=phases)

        limit = plan.Limit("this test", total or available, available)
        monkeypatch.setattr(plan, "memory_limit", lambda device: limit)
        monkeypatch.setattr(plan, "_process", lambda config, facts: 0)
        monkeypatch.setattr(plan, "forecast", forecast)
        monkeypatch.setattr(
            plan, "_forecasts_elsewhere",
            lambda config, facts, limit: plan.forecasts(config, facts, limit.available),
        )  # fmt: skip
        said = io.StringIO()
        config = _config(text, dtype="float32", audit=audit, **options)
        return plan.choose_recompute(config, Facts(512), Console(file=said, width=400)), said.getvalue()

    return run


def test_auto_recomputes_only_what_it_must(found, choose):
    needs = {k: found[k].without_audit for k in KINDS}
    assert needs["none"] > needs["mlp"] > needs["block"] > 0
    assert choose(1 << 40) == ("none", "")
    assert choose(needs["none"]) == ("none", "")
    kind, said = choose(needs["none"] - 1)
    assert kind == "mlp" and "recompute mlp: without it the run would take" in said and "WARNING" not in said
    kind, said = choose(needs["mlp"] - 1)
    assert kind == "block" and "WARNING" not in said
    kind, said = choose(needs["block"] - 1)
    assert kind == "block" and "WARNING" in said and "a smaller --batch-size" in said


def test_what_was_asked_for_is_kept_and_warned_about(found, choose):
    needs = found["none"].without_audit
    kind, said = choose(needs - 1, recompute="none")
    assert kind == "none" and "WARNING: " in said and "--recompute block" in said
    with pytest.raises(plan.MemoryNeeded, match=r"the run needs \d+ MiB; .* that this test has are free; try"):
        choose(needs // 2, recompute="none")
    kind, _ = choose(needs // 2, total=needs, recompute="none")  # it might, once others have ended
    assert kind == "none"


def test_an_audit_that_would_not_fit_is_named(found, choose):
    assert found["none"].peak == found["none"].phases["audit"] > found["none"].without_audit
    kind, said = choose(found["none"].peak - 1, audit=True)
    assert kind == "none" and "WARNING: audit takes" in said and "--no-audit would fit" in said


def test_limits_of_machine_and_container(monkeypatch):
    files = {"/proc/meminfo": ["MemTotal: 8000 kB", "MemAvailable:    1000 kB"], "/proc/self/status": ["VmRSS: 200 kB"]}
    monkeypatch.setattr(plan, "_lines", lambda path: files.get(path, []))
    limit = plan.memory_limit(CPU)
    assert limit.what == "this machine" and limit.available == 1200 * 1024
    files |= {"/sys/fs/cgroup/memory.max": ["1000000"], "/sys/fs/cgroup/memory.current": ["300000"]}
    limit = plan.memory_limit(CPU)
    assert limit.total == 1_000_000 and limit.available == 700_000 + 200 * 1024
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert plan.memory_limit(CPU).what == "this machine"


def test_forecasts_come_back_whole_from_their_own_process(text):
    config = _config(text, dtype="float32", audit=False)
    facts = Facts(512, ("a", "b"), held=1000)
    asked = json.dumps([to_json(config), dataclasses.asdict(facts), 1 << 40])
    found = json.loads(_python("-m", "fastlm.train.plan", input=asked))
    assert list(found) == ["none"]
    here = plan.forecast(config, facts, found["none"]["held"]["process"], "none")
    assert plan.Forecast(**found["none"]) == here
    assert found["none"]["held"]["process"] > 100 * MIB


@pytest.mark.parametrize("presets", [T5_PRESETS, TRANSFORMER_PRESETS], ids=["t5", "transformer"])
def test_the_toy_of_a_forecast_takes_any_special_ids(presets):
    """Those of T5's own tokenizer are the last of its vocabulary, of which the toy has a small part."""
    small = presets["small"]
    config = dataclasses.replace(small, run=dataclasses.replace(small.run, audit=False, device="cpu", dtype="float32"))
    assert plan._process(config, Facts(4197, end_id=4095, start_id=4096)) > 0


def test_a_run_may_change_recomputation_when_it_resumes(text, tmp_path):
    """It changes no number: half the steps with, half without, end where a run without ends."""
    from fastlm.train.log import read_metrics

    options = ["--preset", "tiny", "--data", text, "--no-audit", "--dropout", "0.1", "--sample-tokens", "0"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for out, *more in (
        (whole, "--steps", "6", "--recompute", "none"),
        (halves, "--steps", "6", "--recompute", "block", "--save-every", "3", "--max-minutes", "0"),
    ):
        assert cli.main(["train", *options, "--warmup", "2", "--out", str(out), *more]) == 0
    for path in (halves / "checkpoints").glob("step-00000006"):
        path.rename(tmp_path / "gone")
    assert cli.main(["train", "--out", str(halves), "--resume", "--recompute", "mlp"]) == 0
    one, two = ([r["loss"] for r in read_metrics(d / "metrics.jsonl") if r["step"]] for d in (whole, halves))
    assert one == two and len(one) == 6
    assert json.loads((halves / "config.json").read_text())["run"]["recompute"] == "mlp"
