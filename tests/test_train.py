"""The training run: schedule, guard, records, and that interruption, damage and bad luck change nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import fastlm.train.loop as loop
from fastlm.data import DataError, Tokenizer
from fastlm.engine import Engine
from fastlm.engine.tape import Tape
from fastlm.train import checkpoint
from fastlm.train.checkpoint import CheckpointError
from fastlm.train.config import OptionError, TrainConfig, from_json, to_json
from fastlm.train.device import choose_device, choose_dtype, choose_threads
from fastlm.train.durable import UNFINISHED
from fastlm.train.guard import SpikeGuard
from fastlm.train.interrupts import Interrupts
from fastlm.train.log import Metrics, StatsBuffer, plot_losses, read_metrics
from fastlm.train.presets import PRESETS
from fastlm.train.schedule import learning_rate
from fastlm.train.validate import changed_options, validate

TIMINGS = ("seconds", "tokens_per_second")
TEXT = "".join(f"line {i}: {i * i} is the square of {i}, \u00fcber alles {i % 7}\n" for i in range(400))


# --- schedule


def test_schedule_by_hand() -> None:
    rates = [learning_rate(i, peak=1.0, minimum=0.1, warmup=4, steps=13) for i in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    # from here on 8 intervals: cos(0) = 1, cos(pi/4), cos(pi/2) = 0, cos(3 pi/4), cos(pi) = -1
    half = 0.45 / math.sqrt(2)
    expected = {4: 1.0, 6: 0.55 + half, 8: 0.55, 10: 0.55 - half, 12: 0.1, 13: 0.1, 14: 0.1}
    for step, rate in expected.items():
        assert abs(rates[step] - rate) <= 1e-15, step
    assert rates[4:13] == sorted(rates[4:13], reverse=True)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 2), (1, 1), (3, 3), (2, 3), (0, 50)])
def test_schedule_at_the_edges(warmup: int, steps: int) -> None:
    rates = [learning_rate(i, peak=1.0, minimum=0.25, warmup=warmup, steps=steps) for i in range(steps)]
    assert all(0.25 <= rate <= 1.0 for rate in rates)
    assert rates[-1] == (1.0 if warmup == steps else 0.25)
    if warmup:
        assert rates[warmup - 1] == 1.0
    with pytest.raises(ValueError, match="step: got -1, allowed are 0 and more"):
        learning_rate(-1, peak=1.0, minimum=0.0, warmup=1, steps=2)


# --- guard


def test_spikes_by_hand() -> None:
    guard = SpikeGuard(deviations=5.0, window=32)
    dice = np.random.default_rng(0)
    values = (3.0 + 0.1 * dice.standard_normal(60)).tolist()
    for step, value in enumerate(values):
        assert guard.observe(step, value, 1.0, False) == []
    recent = values[-32:]
    middle = statistics.median(recent)
    spread = 1.4826 * statistics.median([abs(x - middle) for x in recent])
    assert guard.observe(60, middle + 4.99 * spread, 1.0, False) == []
    recent = [*recent[1:], middle + 4.99 * spread]
    middle = statistics.median(recent)
    spread = 1.4826 * statistics.median([abs(x - middle) for x in recent])
    (spike,) = guard.observe(61, middle + 6 * spread, 1.0, False)
    assert spike.series == "loss" and abs(spike.deviations - 6) <= 1e-9 and spike.median == middle
    assert "step 61: loss" in str(spike) and "6.0 robust deviations" in str(spike)
    (spike,) = guard.observe(62, middle, 1.2, False)  # equal norms: MAD is 0, and 20% is no noise
    assert spike.series == "gradient norm"
    assert guard.observe(63, middle - 100, 1.0005, False) == []  # down is no spike, 0.05% is noise


def test_nan_does_not_blind_the_guard() -> None:
    guard = SpikeGuard(deviations=5.0)
    for step in range(40):
        guard.observe(step, 2.0 + 0.01 * (step % 5), 1.0, False)
    for step in range(40, 60):
        assert guard.observe(step, math.nan, math.inf, True) == []
    (spike,) = guard.observe(60, 9.0, 1.0, False)
    assert spike.series == "loss" and spike.value == 9.0
    assert (guard.skipped, guard.skipped_in_a_row) == (20, 0)


def test_a_new_level_becomes_normal() -> None:
    guard = SpikeGuard(deviations=5.0, window=16)
    for step in range(16):
        guard.observe(step, 1.0 + 0.01 * (step % 3), 1.0, False)
    flagged = [bool(guard.observe(step, 2.0 + 0.01 * (step % 3), 1.0, False)) for step in range(16, 40)]
    assert flagged[0] and not any(flagged[9:])


def test_guard_is_broken_only_by_a_row() -> None:
    guard = SpikeGuard(patience=3)
    for skipped in (True, True, False, True, True):
        guard.observe(0, 1.0, 1.0, skipped)
        assert not guard.broken
    guard.observe(0, 1.0, 1.0, True)
    assert guard.broken
    never = SpikeGuard(patience=0)
    for _ in range(100):
        never.observe(0, 1.0, 1.0, True)
    assert not never.broken
    with pytest.raises(ValueError, match="window: got 3, allowed are 16 and more"):
        SpikeGuard(window=3)


def test_guard_continues_from_its_state() -> None:
    dice = np.random.default_rng(1)
    series = dice.standard_cauchy((200, 2)).tolist()
    whole, first, second = (SpikeGuard(deviations=4.0, window=20) for _ in range(3))
    expected = [whole.observe(i, *values, values[0] > 3) for i, values in enumerate(series)]
    found = [first.observe(i, *values, values[0] > 3) for i, values in enumerate(series[:77])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(77 + i, *values, values[0] > 3) for i, values in enumerate(series[77:])]
    assert found == expected and sum(map(len, expected)) > 5
    assert second.state_dict() == whole.state_dict()


# --- records


def test_stats_are_read_in_order() -> None:
    stats = StatsBuffer(3, "cpu")
    loss, norm, skipped = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for step in range(3):
        assert not stats.full
        for tensor, value in ((loss, 0.1 + step), (norm, 2.0 * step), (skipped, float(step == 1))):
            tensor.fill_(value)  # the engine's tensors are reused, so put must have copied
        stats.put(loss, norm, skipped)
    assert stats.full
    expected = [(torch.tensor(0.1 + i).item(), 2.0 * i, i == 1) for i in range(3)]
    assert stats.take() == expected and stats.take() == []
    stats.put(loss, norm, skipped)
    assert stats.take() == [expected[2]]


def test_records_resume_without_gap_or_repeat(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for step in range(10):
        metrics.write({"step": step, "loss": 1.5 * step, "grad_norm": math.nan})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    assert path.read_text().splitlines()[3] == '{"step":3,"loss":4.5,"grad_norm":null}'
    with open(path, "a") as file:
        file.write('{"step":10,"lo')  # killed here
    time.sleep(1.1)  # TensorBoard orders the files of a directory by the second that they were begun in
    metrics = Metrics(tmp_path, resume_at=6)
    for step in range(7, 12):
        metrics.write({"step": step, "loss": -1.0})
    metrics.close()
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(12))
    assert [record["loss"] for record in records] == [1.5 * i for i in range(7)] + [-1.0] * 5
    with pytest.raises(FileExistsError):
        Metrics(tmp_path)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(r["step"], r["loss"]) for r in records]
    assert "grad_norm" not in events.Tags()["scalars"]


def test_plot_shows_what_it_is_given(tmp_path: Path) -> None:
    from matplotlib.image import imread

    records = [{"step": i, "loss": 5 - 0.1 * i, "grad_norm": 1.0, "lr": 1e-3} for i in range(1, 30)]
    records[4]["loss"] = None
    for name, extra in (("without.png", None), ("with.png", 4.0)):
        plot_losses(records, tmp_path / name, extra)
    one, other = imread(tmp_path / "without.png"), imread(tmp_path / "with.png")
    assert one.shape == other.shape == (720, 1080, 4) and (one != other).any()
    plot_losses([], tmp_path / "none.png")
    assert len(list(tmp_path.iterdir())) == 3


# --- options


def test_options_survive_json() -> None:
    for preset in PRESETS.values():
        validate(preset)
        assert from_json(json.loads(json.dumps(to_json(preset)))) == preset
    stored = to_json(PRESETS["tiny"])
    for key, message in (("extra", "'extra' is unknown"), ("lr", "'lr' is missing")):
        broken = json.loads(json.dumps(stored))
        if key in broken["optimizer"]:
            del broken["optimizer"][key]
        else:
            broken["optimizer"][key] = 1
        with pytest.raises(ValueError, match=f"the options' optimizer: {message}"):
            from_json(broken)


def option(config: TrainConfig, group: str, **values: Any) -> TrainConfig:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


BAD = [
    ("optimizer", "steps", 0, "--steps: got 0, allowed: 1 and more"),
    ("optimizer", "batch_size", -1, "--batch-size: got -1, allowed: 1 and more"),
    ("optimizer", "grad_accum", 0, "--grad-accum: got 0"),
    ("optimizer", "lr", 0.0, "--lr: got 0.0, allowed: finite numbers above 0"),
    ("optimizer", "lr", math.nan, "--lr: got nan"),
    ("optimizer", "min_lr", 1.0, "--min-lr: got 1.0, allowed: 0 to --lr 0.003"),
    ("optimizer", "warmup", 61, "--warmup: got 61, allowed: 0 to --steps 60"),
    ("optimizer", "weight_decay", -0.1, "--weight-decay: got -0.1"),
    ("optimizer", "beta2", 1.0, "--beta2: got 1.0, allowed: 0 <= x < 1"),
    ("optimizer", "clip", math.inf, "--clip: got inf, allowed: finite numbers from 0"),
    ("model", "n_embd", 33, "--n-embd: got 33, allowed: multiples of --n-head 2"),
    ("model", "n_layer", 0, "--n-layer: got 0"),
    ("model", "dropout", 1.0, "--dropout: got 1.0, allowed: 0 <= x < 1"),
    ("data", "seq_len", 0, "--seq-len: got 0"),
    ("data", "vocab_size", 256, "--vocab-size: got 256, allowed: 257 and more"),
    ("data", "validation_fraction", 0.0, "--validation-fraction: got 0.0, allowed: 0 < x < 1"),
    ("run", "keep", 1, "--keep: got 1, allowed: 2 and more"),
    ("run", "seed", -1, "--seed: got -1"),
    ("run", "log_every", 0, "--log-every: got 0"),
    ("run", "save_every", -1, "--save-every: got -1, allowed: 0 and more"),
    ("run", "resume", True, "--resume: got no --out, allowed: --resume together with"),
]


@pytest.mark.parametrize(("group", "name", "value", "message"), BAD)
def test_bad_options(group: str, name: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        validate(option(PRESETS["tiny"], group, **{name: value}))


def test_what_a_resumed_run_may_change() -> None:
    stored = PRESETS["tiny"]
    given = option(option(stored, "run", out="x", resume=True, keep=5), "optimizer", lr=1e-4)
    assert changed_options(stored, given) == ["--lr 0.003 -> 0.0001", "--keep 2 -> 5"]
    for group, name, value in (("model", "n_layer", 3), ("data", "seq_len", 8), ("run", "seed", 1)):
        message = rf"--{name.replace('_', '-')}: got {value}, allowed: \d+, which the run to resume has"
        with pytest.raises(OptionError, match=message):
            changed_options(stored, option(stored, group, **{name: value}))


def test_choices_give_their_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == (torch.device("cpu"), "torch finds no GPU")
    with pytest.raises(OptionError, match="--device: got cuda, allowed: cpu, as torch finds no GPU here"):
        choose_device("cuda")
    cpu = torch.device("cpu")
    for flags, dtype, word in (
        ({"avx2"}, torch.float32, "no bfloat16 arithmetic"),
        ({"avx512_bf16"}, torch.bfloat16, "avx512_bf16"),
        ({"avx512_bf16", "amx_bf16"}, torch.bfloat16, "amx_bf16"),
    ):
        monkeypatch.setattr("fastlm.train.device._cpu_flags", lambda flags=flags: flags)
        chosen, why = choose_dtype("auto", cpu)
        assert chosen == dtype and word in why
        assert choose_dtype("float32", cpu) == (torch.float32, "as asked")


def test_threads_never_exceed_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("fastlm.train.device._cgroup_cpus", lambda: None)
    assert choose_threads() == (8, "the affinity mask")
    monkeypatch.setattr("fastlm.train.device._cgroup_cpus", lambda: 2)
    assert choose_threads() == (2, "the container's quota")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert choose_threads() == (64, "OMP_NUM_THREADS=64")


# --- whole runs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs as small as these only lose by threads, and other tests keep the number that they had."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr("fastlm.train.build.choose_threads", lambda: (1, "a test"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes as long as such a run; ``whole``, made before this applies, has one."""
    monkeypatch.setattr(loop, "plot_losses", lambda *_: None)


def small(out: Path, text: Path, **run: Any) -> TrainConfig:
    """A run of 12 steps that takes about a second."""
    base = PRESETS["tiny"]
    base = option(base, "data", data=(str(text),), tokenizer="bytes", seq_len=16, validation_fraction=0.1)
    base = option(base, "model", n_layer=1, n_embd=16, dropout=0.1)
    base = option(base, "optimizer", steps=12, batch_size=2, grad_accum=2, warmup=3)
    settings = {
        "out": str(out), "dtype": "float32", "device": "cpu", "eval_every": 4, "eval_batches": 2,
        "save_every": 3, "log_every": 5, "sample_tokens": 0, "audit": False,
    }  # fmt: skip
    return option(base, "run", **(settings | run))


def train(config: TrainConfig) -> tuple[int, str]:
    out = io.StringIO()
    status = loop.train(config, Console(file=out, width=200))
    return status, out.getvalue()


def interrupt_at(step: int) -> type:
    """In place of ``Interrupts``: Ctrl-C during step number ``step``."""

    class Fake:
        def __init__(self) -> None:
            self.polls = -1

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def received(self) -> signal.Signals | None:
            self.polls += 1
            return signal.SIGINT if self.polls >= step else None

    return Fake


def numbers(out: Path) -> list[dict[str, Any]]:
    records = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def weights(out: Path, step: int = 12) -> bytes:
    return (out / f"checkpoints/step-{step:08d}/state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(small(out, text))[0] == 0
    return out


def test_what_a_run_leaves(whole: Path, text: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    expected = {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "loss.png",
        "report.json",
        "tensorboard",
    }
    assert names == expected | {".lock"}
    records = numbers(whole)
    assert [record["step"] for record in records] == list(range(13))
    assert [record["step"] for record in records if "val_loss" in record] == [0, 4, 8, 12]
    for record in records[1:]:
        step = record["step"]
        assert record["lr"] == learning_rate(step - 1, peak=3e-3, minimum=3e-4, warmup=3, steps=12)
        assert record["tokens"] == step * 2 * 2 * 16
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["skipped"] is False
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    saved = checkpoint.list_checkpoints(whole / "checkpoints")
    assert [path.name for path in saved] == ["step-00000012", "step-00000009"]
    assert not list(whole.rglob(f"{UNFINISHED}*"))
    found = checkpoint.load(saved[0])
    assert found.progress["score"] == records[-1]["val_loss"] == found.progress["best"]["score"]
    assert found.progress["loader"]["next_sample"] == 48
    assert found.config["optimizer"]["steps"] == 12 and found.versions["torch"] == torch.__version__


def test_report_agrees_with_an_independent_model(whole: Path, text: Path) -> None:
    """Loss, entropy and bits per byte of the held-out text, from the exported model by transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(whole / "model").eval()
    tokenizer = Tokenizer.load(whole / "model")
    # All documents are this one file, so its tail is held out: the tokens after the training part.
    report = json.loads((whole / "report.json").read_text())
    from fastlm.data import ValidationLoader, prepare

    held_out = prepare([text], tokenizer="bytes", validation_fraction=0.1).validation
    nats, targets = 0.0, []
    for batch in ValidationLoader(held_out, 2, 16, windows=4):
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits.double()
        wanted = batch["targets"]
        picked = torch.log_softmax(logits, -1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        nats -= picked[wanted != -100].sum().item()
        targets += wanted[wanted != -100].tolist()
    counts = Counter(targets)
    entropy = -sum(n / len(targets) * math.log(n / len(targets)) for n in counts.values())
    said = tokenizer.decode([t for t in targets if t != tokenizer.separator_id], "surrogateescape")
    size = len(said.encode("utf-8", "surrogateescape"))
    assert report["val_tokens"] == len(targets) == 64
    assert abs(report["val_loss"] - nats / len(targets)) <= 1e-5 * report["val_loss"]
    assert abs(report["unigram_entropy"] - entropy) <= 1e-12
    assert abs(report["bits_per_byte"] - nats / math.log(2) / size) <= 1e-5 * report["bits_per_byte"]
    assert report["nats_under_unigram"] == report["unigram_entropy"] - report["val_loss"]


@pytest.mark.parametrize("steps", [(1,), (5, 9), (3, 4, 11)])
def test_interrupted_runs_end_the_same(
    steps: tuple[int, ...], whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "run", 0
    for step in steps:
        monkeypatch.setattr(loop, "Interrupts", interrupt_at(step - done))
        status, said = train(small(out, text, resume=done > 0))
        assert status == 130
        assert f"SIGINT: saved at step {step}; resume with:" in said
        assert f"train --out {out} --resume" in said
        torch.manual_seed(step)  # what happens to the process's generators in between must not matter
        done = step
    monkeypatch.setattr(loop, "Interrupts", Interrupts)
    status, said = train(small(out, text, resume=True))
    assert status == 0 and f"resumed at step {done}" in said
    assert weights(out) == weights(whole)
    assert numbers(out) == numbers(whole)
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_block_size_and_saving_change_nothing(whole: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = small(out, text, log_every=1, save_every=0, eval_every=0)
    assert train(config)[0] == 0
    assert weights(out) == weights(whole)
    training = [{k: v for k, v in r.items() if not k.startswith("val_")} for r in numbers(whole)]
    assert [{k: v for k, v in r.items() if not k.startswith("val_")} for r in numbers(out)] == training
    assert [path.name for path in checkpoint.list_checkpoints(out / "checkpoints")] == ["step-00000012"]


def test_a_profiled_run_is_the_same_run(whole: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, said = train(small(out, text, profile=4))
    assert status == 0 and weights(out) == weights(whole)
    assert "mean of 4 steps, float32 on cpu; roofs measured now" in said and "GEMM qkv" in said
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "step"] == ["step 4", "step 5", "step 6", "step 7"]
    assert json.loads((out / "config.json").read_text())["run"]["profile"] == 0  # a resumed run is not profiled again


def test_low_precision_resumes_too(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16; and audits in between, which compute a lot, leave no trace."""
    status, said = train(small(tmp_path / "one", text, dtype="bfloat16", audit=True, audit_every=5))
    assert status == 0 and said.count("0 misses: passed") == 3
    monkeypatch.setattr(loop, "Interrupts", interrupt_at(7))
    assert train(small(tmp_path / "two", text, dtype="bfloat16"))[0] == 130
    monkeypatch.setattr(loop, "Interrupts", Interrupts)
    assert train(small(tmp_path / "two", text, dtype="bfloat16", resume=True))[0] == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    tensors = checkpoint.load(tmp_path / "one/checkpoints/step-00000012").tensors
    assert tensors["engine.param"].dtype == torch.bfloat16 and tensors["engine.trail"].dtype == torch.int16
    assert tensors["engine.trail"].any()


def test_records_are_on_disk_before_their_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against losing power, when what was not fsynced is gone."""
    out = tmp_path / "run"
    durable = [-1]
    fsync, rename = os.fsync, os.rename

    def seen_fsync(fd: int) -> None:
        fsync(fd)
        if os.readlink(f"/proc/self/fd/{fd}") == str(out / "metrics.jsonl"):
            durable.append(read_metrics(out / "metrics.jsonl")[-1]["step"])

    def seen_rename(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-"):
            assert durable[-1] >= int(Path(target).name[5:])  # the steps have gone on
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    assert train(small(out, text))[0] == 0
    assert durable == [-1, 3, 4, 6, 8, 9, 12]


def copy_of(whole: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    return out


def test_a_damaged_checkpoint_is_passed_over(whole: Path, text: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    file = out / "checkpoints/step-00000012/state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    status, said = train(small(out, text, resume=True))
    assert status == 0
    assert re.search(
        r"WARNING: passing over step-00000012: .*truncated, \d+ bytes where \d+ were written", said
    )
    assert "WARNING: step-00000012.bad is set aside" in said and "resumed at step 9" in said
    assert weights(out) == weights(whole) and numbers(out) == numbers(whole)
    assert checkpoint.load(out / "checkpoints/step-00000012").step == 12


FOREIGN: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda progress: progress.pop("guard"), r"its progress cannot be restored: KeyError\('guard'\)"),
    (lambda progress: progress.update(seconds="soon"), "its progress cannot be restored: ValueError"),
    (lambda progress: progress.update(guard=[]), "its progress cannot be restored: TypeError"),
    (lambda progress: progress["generators"].pop("numpy"), "its progress cannot be restored: KeyError"),
]


@pytest.mark.parametrize(("edit", "message"), FOREIGN)
def test_progress_that_does_not_fit(
    edit: Callable[[dict[str, Any]], object], message: str, whole: Path, text: Path, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path)
    found = checkpoint.load(out / "checkpoints/step-00000012")
    edit(found.progress)
    shutil.rmtree(out / "checkpoints")
    checkpoint.save(
        out / "checkpoints", 12, found.tensors, config=found.config, progress=found.progress, versions={}
    )
    warnings = io.StringIO()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        loop.train(small(out, text, resume=True), Console(file=warnings, width=1000))
    assert re.search(message, warnings.getvalue())


def test_a_checkpoint_of_another_model(whole: Path, text: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    warnings = io.StringIO()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):
        loop.train(
            option(small(out, text, resume=True), "model", n_embd=32), Console(file=warnings, width=1000)
        )
    assert re.search(
        r"tensor engine\.?\w* is float32 \(\d+,\), the run has|tensor \w+ is", warnings.getvalue()
    )


def test_changed_data_is_refused(whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("square", "SQUARE"))
    with pytest.raises(DataError, match="the data position cannot be restored: tokens_sha256 was"):
        train(small(out, other, resume=True))


def test_a_finished_run_can_be_longer(whole: Path, text: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    shutil.rmtree(out / "model")
    status, said = train(small(out, text, resume=True))  # killed before its last words, so it says them again
    assert status == 0 and "resumed at step 12" in said and (out / "model/config.json").exists()
    assert numbers(out) == numbers(whole)
    config = option(small(out, text, resume=True), "optimizer", steps=14)
    assert train(config)[0] == 0
    assert [record["step"] for record in numbers(out)] == list(range(15))


def test_one_process_at_a_time_and_new_directories_only(whole: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"--out: got .*run, allowed: a new or empty directory; with --resume"
    ):
        train(small(whole, text))
    first = loop.RunDirectory(small(tmp_path / "run", text))
    with pytest.raises(OptionError, match="a directory that no other process is training in"):
        train(small(tmp_path / "run", text))
    first.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--out: got .*file, allowed: a directory that can be written"):
        train(small(tmp_path / "file", text))


def test_time_limit_saves(text: Path, tmp_path: Path) -> None:
    status, said = train(small(tmp_path / "run", text, max_minutes=1e-9))
    assert status == 0 and "1e-09 minutes are over: saved at step 0; resume with:" in said
    assert train(small(tmp_path / "run", text, resume=True))[0] == 0


def test_directories_without_a_name(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/tiny", "runs/tiny-2", "runs/tiny-3"):
        status, said = train(option(small(Path(), text, max_minutes=1e-9), "run", out=None))
        assert status == 0 and f"train --out {expected} --resume" in said


def test_steps_that_are_not_finite_stop_the_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.build

    def poisoned(*arguments: Any) -> Any:
        parts = original(*arguments)
        name = "h.0.mlp.c_fc.bias"
        parts.engine.flat.view(parts.engine.flat.master, name).fill_(math.inf)
        return parts

    monkeypatch.setattr(loop, "build", poisoned)
    status, said = train(small(tmp_path / "run", text, max_skipped=4, log_every=1, eval_every=0))
    assert status == 1
    assert "stopped at step 4: 4 steps in a row were not finite; the gradient is not finite in" in said
    assert said.count(": skipped, gradient norm nan; skipped so far: ") == 4
    records = numbers(tmp_path / "run")
    assert [(r["step"], r["loss"], r["skipped"]) for r in records[1:]] == [
        (i, None, True) for i in range(1, 5)
    ]
    found = checkpoint.load(tmp_path / "run/checkpoints/step-00000004")
    assert found.progress["guard"]["skipped_in_a_row"] == 4 and found.tensors["engine.updates"] == 0


def test_spikes_are_reported(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = Engine.step, []

    def step(self: Engine, *arguments: Any, **options: Any) -> Any:
        stats = original(self, *arguments, **options)
        calls.append(0)
        if len(calls) == 30:
            stats.loss.fill_(1000.0)
        return stats

    monkeypatch.setattr(Engine, "step", step)
    config = option(small(tmp_path / "run", text), "optimizer", steps=32)
    status, said = train(config)
    assert status == 0
    assert re.findall(r"spike: step (\d+): (\w+) 1000 is", said) == [("30", "loss")]


def test_a_wrong_gradient_stops_the_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tape.linear_backward
    monkeypatch.setattr(Tape, "linear_backward", lambda *arguments: 1.001 * original(*arguments))
    status, said = train(small(tmp_path / "wrong", text, audit=True))
    assert status == 1 and "MISS" in said and "the audit failed" in said
    assert not (tmp_path / "wrong/metrics.jsonl").exists()


def test_full_disk_during_training(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    original = checkpoint.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    status, said = train(small(out, text, eval_every=0))
    assert status == 0  # room again by step 9
    message = (
        r"WARNING: cannot write the checkpoint of step 6 to .*: No space left on device; the last good one is"
    )
    assert re.search(message + r" .*step-00000003", said)
    assert [p.name for p in checkpoint.list_checkpoints(out / "checkpoints")] == [
        "step-00000012",
        "step-00000009",
    ]


def slow_at(monkeypatch: pytest.MonkeyPatch, step: int, further: int) -> list[int]:
    """The checkpoint of that step is written only once so many further steps are done. Returns the steps as they are saved."""
    taken, ended = list[int](), list[int]()
    changed = threading.Condition()
    write, train_step = checkpoint.write_tensors, Engine.step

    def slow(path: Path, tensors: Any) -> Any:
        now = int(path.parent.name.split("-")[2])
        with changed:
            wanted = step + further if now == step else 0
            assert changed.wait_for(lambda: len(taken) >= wanted, 30), "the steps wait for the checkpoint"
        written = write(path, tensors)
        ended.append(now)
        return written

    def counted(self: Engine, *arguments: Any, **options: Any) -> Any:
        stats = train_step(self, *arguments, **options)
        with changed:
            taken.append(1)
            changed.notify()
        return stats

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    monkeypatch.setattr(Engine, "step", counted)
    return ended


def test_steps_go_on_while_a_checkpoint_is_written(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = slow_at(monkeypatch, 3, further=2)
    out = tmp_path / "run"
    status, said = train(small(out, text, eval_every=0, keep=9))
    assert status == 0 and ended == [3, 6, 9, 12]
    assert weights(out) == weights(whole) and weights(out, 9) == weights(whole, 9)
    third = checkpoint.load(out / "checkpoints/step-00000003")
    assert third.tensors["engine.updates"].item() == 3 and third.progress["loader"]["next_sample"] == 12
    assert [int(step) for step in re.findall(r"step (\d+): saved", said)] == [3, 6, 9, 12]
    report = json.loads((out / "report.json").read_text())
    assert set(report["beside_steps"]) == {"data", "logging", "validation", "checkpoints"}
    assert all(0 < share < math.inf for name, share in report["beside_steps"].items())


def test_a_save_waits_for_the_one_before(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is being written is not overwritten: every step saved, each write held up by the step after it."""
    for step in range(1, 12):
        slow_at(monkeypatch, step, further=1)
    out = tmp_path / "run"
    assert train(small(out, text, eval_every=0, save_every=1, keep=12))[0] == 0
    for step in range(1, 13):
        tensors = checkpoint.load(out / f"checkpoints/step-{step:08d}").tensors
        assert tensors["engine.updates"].item() == step
    assert weights(out) == weights(whole) and weights(out, 9) == weights(whole, 9)


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
import test_train
from fastlm.train import checkpoint

write, patch = checkpoint.write_tensors, pytest.MonkeyPatch()
patch.setattr("fastlm.train.build.choose_threads", lambda: (1, "a test"))

def cut_off(path, tensors):
    written = write(path, tensors)
    if "-00000006" in str(path):
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return written

patch.setattr(checkpoint, "write_tensors", cut_off)
test_train.slow_at(patch, 6, further=2)
test_train.train(test_train.small(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_killed_while_a_checkpoint_is_written(whole: Path, text: Path, tmp_path: Path) -> None:
    """In the middle of its largest file, two steps on: the run goes on from the checkpoint before, to the same end."""
    out, tests = tmp_path / "run", Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(text)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (out / "checkpoints").glob(f"{UNFINISHED}*")
    assert (left / "state.safetensors").exists() and numbers(out)[-1]["step"] >= 6
    status, said = train(small(out, text, resume=True))
    assert status == 0 and "resumed at step 4" in said
    assert weights(out) == weights(whole) and numbers(out) == numbers(whole)
    assert not list(out.rglob(f"{UNFINISHED}*"))


@pytest.mark.parametrize("interrupted", [False, True])
def test_full_disk_at_the_end(
    interrupted: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, last, original = tmp_path / "run", 8 if interrupted else 12, checkpoint.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        if f"step-{last:08d}" in str(path):
            raise OSError(28, "No space left on device")
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    if interrupted:
        monkeypatch.setattr(loop, "Interrupts", interrupt_at(8))
    status, said = train(small(out, text, eval_every=0))
    before = "step-00000006" if interrupted else "step-00000009"
    assert status == 1 and not (out / "model").exists()
    assert re.search(rf"WARNING: cannot write the checkpoint of step {last} to .*; the last good one is .*{before}", said)
    assert ("SIGINT: NOT saved at step 8; resume with:" in said) == interrupted
    assert checkpoint.list_checkpoints(out / "checkpoints")[0].name == before
    assert not list(out.rglob(f"{UNFINISHED}*"))


def test_full_disk_under_the_records(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Metrics.flush

    def flush(self: Metrics) -> None:
        original(self)
        if len(read_metrics(tmp_path / "run/metrics.jsonl")) > 6:
            raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(Metrics, "flush", flush)
    with pytest.raises(
        CheckpointError, match=r"No space left .*the last checkpoint is .*step-00000004; resume with"
    ):
        train(small(tmp_path / "run", text))
    monkeypatch.setattr(Metrics, "flush", original)
    assert train(small(tmp_path / "run", text, resume=True))[0] == 0
    assert [record["step"] for record in numbers(tmp_path / "run")] == list(range(13))
