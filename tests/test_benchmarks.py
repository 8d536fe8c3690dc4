"""The benchmarks' own arithmetic and honesty: what the report shows, what the train step refuses, how a plan ends."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks is a package of the source tree only

from benchmarks import (  # noqa: E402
    device,
    loss_curve,
    plain_bert,
    plain_encoder_decoder,
    plain_gpt,
    plain_lstm,
    report,
    report_sections,
    step_flops,
    step_task,
    step_turns,
    step_worker,
    train_step,
)  # fmt: skip
from benchmarks.device import Step  # noqa: E402
from fastlm import registry  # noqa: E402
from fastlm.engine import Engine  # noqa: E402
from fastlm.models import EncoderDecoderConfig  # noqa: E402
from fastlm.train.config import OptionError  # noqa: E402

# --- the report


def _peer(seconds, **more):
    return {"seconds": seconds, "low": seconds, "high": seconds, "error_ratio": 1.0, "peak_bytes": 1 << 20, **more}


def _kernel(op="gelu", seconds=1.0, peers=None, **more):
    timed = {"seconds": seconds, "low": seconds, "high": seconds, "rounds": 9, "roof_fraction": 0.5, "peak_bytes": 1 << 20}
    named = {"op": op, "dims": {"rows": 8}, "dtype": "float32", "direction": "forward", "backend": "cpu", "device": "cpu"}
    rates = {"gbytes_per_s": 1.0, "tflop_per_s": 0.1, "error_ratio": 1.0}
    return {**named, **timed, **rates, "peers": peers if peers is not None else {"eager": _peer(2.0)}, **more}


def _step(seconds=1.0, peers=None, **more):
    measured = {"tokens_per_s": 8 / seconds, "flop_per_s": 1e9, "roof_fraction": 0.5, "setup_seconds": 0.0}
    measured["losses"] = [3.0, 2.5]
    rivals = {name: {**_peer(s), **measured} for name, s in (peers or {"eager-fp32": 2.0}).items()}
    dims = {"batch_size": 2, "seq_len": 4, "accumulate": 1}
    more = {"model": "tiny", "settings": "default", "dtype": "float32", "flop_per_token": 9, "device": "cpu"} | more
    return {"dims": dims, **_peer(seconds), "rounds": 9, **measured, "peers": rivals, **more}


def _write(folder, name, rows, kind="kernels", chip="chip A", **content):
    environment = {"device": chip, "kind": "cpu", "threads": 2, "torch": "2.13.0", "commit": "abc"}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({
        "format": 1, "kind": kind, "command": ["python", "-m", name], "started": "2026-01-01T00:00:00+00:00",
        "finished": True, "environment": environment, "rows": rows, **content,
    }))  # fmt: skip
    return path


def _report(folder, *files):
    """(status, report.md, report.html, the README)"""
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text("before\n<!-- report -->\nold\n<!-- /report -->\nafter\n")
    status = report.main([*map(str, files), "--out", str(folder / "out"), "--readme", str(readme)])
    return status, *((folder / f).read_text() for f in ("out/report.md", "out/report.html", "README.md"))


def test_losing_rows_are_counted_marked_and_first(tmp_path):
    rows = [
        _kernel("gelu", 1.0, {"eager": _peer(2.0), "compile": _peer(3.0)}),  # won by 2
        _kernel("dropout", 1.0, {"eager": _peer(4.0), "compile": _peer(0.5)}),  # lost by 2 to one of two peers
        _kernel("adamw", 1.0, {"liger": {"absent": "not installed"}}),  # compared with nobody
    ]
    status, md, page, readme = _report(tmp_path, _write(tmp_path, "k", rows))
    assert status == 0
    table = md[md.index("### Every kernel row") :]
    for text in (md, readme):
        assert "**1 of 2 rows are slower than the fastest peer.** 1 rows have no peer." in text
        assert "slower: dropout (cpu) | 0.5 (0.5), 1 of 1" in text
        assert text.index("dropout (cpu)") < text.index("gelu (cpu)")
    assert table.index("slower: dropout") < table.index("| gelu") < table.index("| adamw")
    assert "slower: gelu" not in md and "slower: adamw" not in md
    assert "eager 4, compile 0.5" in table and "liger, not installed" in table
    assert "<b>1 of 2 rows are slower than the fastest peer.</b>" in page
    assert page.count("<tr class=lost>") == 2  # by op, and among the rows
    assert page.index("<tr class=lost><td>dropout</td>") < page.index("<tr><td>gelu</td>")


def test_means_are_geometric_and_the_worst_is_shown(tmp_path):
    ratios = (0.5, 2.0, 8.0)
    rows = [_kernel(peers={"eager": _peer(r)}, dims={"rows": i}) for i, r in enumerate(ratios)]
    rows.append(_kernel(dtype="bfloat16", peers={"eager": _peer(3.0)}))
    *_, readme = _report(tmp_path, _write(tmp_path, "k", rows))
    assert "| kernel | fp32: mean (worst) ratio, rows lost | bf16: mean (worst) ratio, rows lost |" in readme
    assert "| gelu (cpu) | 2 (0.5), 1 of 3 | 3 (3), 0 of 1 |" in readme


def test_devices_are_never_in_one_table_or_plot(tmp_path):
    a = _write(tmp_path, "a", [_kernel("gelu"), _kernel("adamw", device="cuda", backend="triton")], chip="H100")
    content = json.loads(a.read_text())
    content["environment"] |= {"kind": "gpu"}
    a.write_text(json.dumps(content))
    b = _write(tmp_path, "b", [_kernel("dropout")], chip="chip B")
    runs = [report.Run(i, path, report.load(path)) for i, path in enumerate((a, b))]
    ops = {d: [m.row["op"] for m in rows] for d, rows in report_sections.by_device(runs, "kernels").items()}
    assert ops == {"H100": ["adamw"], "CPU beside H100, 2 threads": ["gelu"], "chip B, 2 threads": ["dropout"]}
    *_, md, _, _ = _report(tmp_path, a, b)
    sections = {part.split("\n")[0]: part for part in md.split("\n## ")}
    assert "dropout" in sections["chip B, 2 threads"]
    assert not any(op in sections["chip B, 2 threads"] for op in ("gelu", "adamw"))
    plots = {p.stem: p.read_text() for p in (tmp_path / "out").glob("*.svg")}
    assert len(plots) == 3
    assert all(sum(op in svg for op in ("gelu", "adamw", "dropout")) == 1 for svg in plots.values())


BROKEN = {
    "not JSON": lambda c: "{",
    "another format": lambda c: json.dumps(c | {"format": 2}),
    "an unknown kind": lambda c: json.dumps(c | {"kind": "weather"}),
    "a missing field": lambda c: json.dumps(c | {"rows": [{k: v for k, v in c["rows"][0].items() if k != "dtype"}]}),
    "a NaN": lambda c: json.dumps(c | {"rows": [c["rows"][0] | {"seconds": float("nan")}]}),
    "a peer of no time": lambda c: json.dumps(c | {"rows": [c["rows"][0] | {"peers": {"eager": {}}}]}),
    "no device": lambda c: json.dumps(c | {"environment": {}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_left_out(tmp_path, capsys, name):
    good = _write(tmp_path, "good", [_kernel("gelu")])
    bad = _write(tmp_path, "bad", [_kernel("dropout")])
    bad.write_text(BROKEN[name](json.loads(bad.read_text())))
    status, md, _, _ = _report(tmp_path, bad, good)
    assert status == 1
    assert str(bad) in capsys.readouterr().err
    assert "gelu" in md and "dropout" not in md


def test_unfinished_runs_are_marked(tmp_path):
    path = _write(tmp_path, "k", [_kernel()], finished=False)
    _, md, page, readme = _report(tmp_path, path, _write(tmp_path, "whole", [_kernel("adamw")]))
    assert "k.json **UNFINISHED**" in md and "whole.json **UNFINISHED**" not in md
    assert "<b>UNFINISHED</b>" in page
    assert "k.json (2026-01-01, torch 2.13.0, triton None, commit abc, UNFINISHED)" in readme


def test_the_newest_measurement_of_a_row_counts(tmp_path):
    new = _write(tmp_path, "new", [_kernel(peers={"eager": _peer(7.0)})], started="2026-02-01T00:00:00+00:00")
    old = _write(tmp_path, "old", [_kernel(), _kernel(direction="backward")])
    _, md, _, _ = _report(tmp_path, new, old)
    table = md[md.index("### Every kernel row") :]
    assert [line.count("forward") for line in table.splitlines() if "gelu" in line] == [0, 1]
    assert "| 7 |" in table


def test_readme_is_replaced_between_its_markers_and_again_alike(tmp_path):
    path = _write(tmp_path, "k", [_kernel()])
    *_, first = _report(tmp_path, path)
    *_, second = _report(tmp_path, path)
    assert first == second
    assert first.startswith("before\n<!-- report -->\n") and first.endswith("\n<!-- /report -->\nafter\n")
    assert "old" not in first


@pytest.mark.parametrize(
    "text", ["", "<!-- report -->", "<!-- /report --><!-- report -->", 2 * "<!-- report --><!-- /report -->"]
)
def test_readme_without_proper_markers_is_left_alone(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    status, *_, readme = _report(tmp_path, _write(tmp_path, "k", [_kernel()]))
    assert status == 1 and readme == text


def test_page_is_self_contained(tmp_path):
    rows = [_kernel(peers={"eager": _peer(2.0, note="<b>&"), "cce": {"absent": "<script>"}})]
    files = _write(tmp_path, "k", rows), _write(tmp_path, "t", [_step()], kind="train_step")
    _, _, page, _ = _report(tmp_path, *files)
    assert page.count("<svg") == 2 and "<?xml" not in page
    assert "<script" not in page and "<link" not in page and "<img" not in page and "@import" not in page
    assert not any(f'{attribute}="{start}' in page for attribute in ("src", "href", "xlink:href") for start in ("http", "//"))
    assert "&lt;script&gt;" in page


def test_train_steps_show_every_candidate_and_their_losses(tmp_path):
    slow = _step(3.0, {"eager-fp32": 4.0, "compile-fp32": 2.0}, dtype="bfloat16")
    path = _write(tmp_path, "t", [_step(), slow], kind="train_step")
    _, md, _, readme = _report(tmp_path, path)
    assert "**1 of 2 rows are slower than the fastest peer.**" in md
    table = md[md.index("### Training steps") :]
    assert table.index("slower: tiny, 2 x 4 tokens | **fastlm bf16**") < table.index("| tiny, 2 x 4 tokens | **fastlm fp32**")
    assert table.count("3.0000 2.5000") == 5
    assert "slower: tiny, 2 x 4 tokens, bf16 | 3 | 50% | compile-fp32 | 0.667 | 1 |" in readme


def test_compiled_kernels_are_apart_by_target_with_faults_first(tmp_path):
    fields = {"op": "gelu", "language": "triton", "registers": 32, "spill_bytes": 0, "shared_bytes": 2048, "fault": ""}
    rows = [fields | {"target": t, "kernel": k} for t in ("sm_80", "sm_90") for k in ("_a_kernel", "_b_kernel")]
    rows[3] |= {"spill_bytes": 8, "fault": "spills 8 bytes"}
    _, md, _, _ = _report(tmp_path, _write(tmp_path, "c", rows, kind="compile"))
    newer = md[md.index("Compiled for sm_90") :]
    assert "**1 of 2 kernels have a fault.**" in newer
    assert newer.index("FAULT: gelu | _b_kernel") < newer.index("_a_kernel")
    assert "**0 of 2 kernels have a fault.**" in md[: md.index("Compiled for sm_90")]


# --- the train step

TINY = {"model": ("tiny",), "batch_size": 2, "seq_len": 16, "seconds": 0.1, "settings": ("default",), "device": "cpu"}


def _task(**options):
    return train_step._task(train_step.TrainStepOptions(**TINY | options), train_step.Case("tiny", 2, 16))


class _InProcess:
    """In place of a worker's process; `dies` says which method of which candidate ends it, and how."""

    dies: ClassVar[dict] = {}
    free: ClassVar[list] = []  # bytes that a candidate sees after its first steps, in their order; none: as it is
    closed: ClassVar[list] = []

    def __init__(self, task, name, variables):
        self.name, self.variables = name, dict(variables)
        make = {True: lambda: step_worker.GemmRoof(task), False: lambda: step_worker.Contender(task, name)}
        self.contender = make[name == "roof"]()

    def ask(self, do, *arguments):
        if (self.name, do) in self.dies:
            raise step_turns.WorkerError(self.dies[self.name, do])
        result = getattr(self.contender, do)(*arguments)
        if do == "first_steps" and self.free:
            result["free_bytes"] = self.free.pop(0)
        return json.loads(json.dumps(result))

    def close(self):
        self.closed.append(self.name)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(step_turns, "Worker", _InProcess)
    monkeypatch.setattr(step_turns, "GEMM_SECONDS", 0.0)
    for name, value in (("dies", {}), ("free", []), ("closed", [])):
        monkeypatch.setattr(_InProcess, name, value)


def test_train_step_end_to_end(tmp_path, capsys):
    """Real processes: the engine beside eager PyTorch, in both dtypes and settings, with accumulation and memory."""
    out = tmp_path / "t.json"
    options = train_step.TrainStepOptions(
        **TINY | {"settings": ("default", "malloc")}, accumulate=2, against=("eager-fp32", "compile-graphs-bf16"), out=out
    )
    assert train_step.run(options) == 0
    content = report.load(out)
    rows = content["rows"]
    assert content["finished"]
    assert [(r["dtype"], r["settings"]) for r in rows] == [
        (d, s) for d in ("float32", "bfloat16") for s in ("default", "malloc")
    ]
    assert list(rows[0]["peers"]) == ["eager-fp32"]  # a bfloat16 peer computes less precisely
    assert rows[2]["peers"]["compile-graphs-bf16"] == {"absent": "needs a GPU"}
    assert rows[0]["peers"]["eager-fp32"]["seconds"] != rows[1]["peers"]["eager-fp32"]["seconds"]
    assert rows[0]["seconds"] == rows[1]["seconds"] and "MALLOC_TRIM_THRESHOLD_" in rows[1]["variables"]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 16 * 2 / row["seconds"])
        assert row["flop_per_s"] == pytest.approx(row["tokens_per_s"] * row["flop_per_token"])
        assert row["roof_fraction"] == pytest.approx(row["flop_per_s"] / row["roof"]["flop_per_s"])
        assert row["roof"]["flop_per_s"] == max(row["roof"]["all"].values())
        peer = row["peers"]["eager-fp32"]
        assert peer["ratio"] == pytest.approx(peer["seconds"] / row["seconds"])  # one group: the same rounds
        assert row["low"] <= row["seconds"] <= row["high"] and row["rounds"] == peer["rounds"] >= step_turns.MIN_ROUNDS
        for c in (row, peer):
            assert c["peak_bytes"] >= c["steady_bytes"] >= 0.9 * c["held_bytes"] > 1 << 26  # a process with torch in it
        assert row["losses"] == pytest.approx(peer["losses"], rel=2e-3)
        assert row["losses"][-1] < row["losses"][0]  # it learns
    printed = capsys.readouterr().out
    assert "compile-graphs-bf16: absent, needs a GPU" in printed and "losses of the first steps" in printed
    assert "ms malloc" in printed and "of the roof" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", ["no mask", "two updates", "half the learning rate"])
def test_a_candidate_that_computes_something_else_is_refused(in_process, monkeypatch, change, dtype):
    attention, update = plain_gpt.F.scaled_dot_product_attention, torch.optim.AdamW.step
    if change == "no mask":
        monkeypatch.setattr(plain_gpt.F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attention(q, k, v))
    elif change == "half the learning rate":
        monkeypatch.setattr(torch.optim.AdamW, "__init__", _halved(torch.optim.AdamW.__init__))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: [update(self), update(self)])
    with pytest.raises(step_turns.MismatchError, match=r"fastlm-.*(loss|gradient norm)"):
        step_turns.compare(_task(), (train_step.ENGINE[dtype],), {"default": {}}, 0.01)


def _halved(init):
    return lambda self, groups, lr, **more: init(self, groups, lr=lr / 2, **more)


@pytest.mark.parametrize("message", ["no compiler\nand more", ""])
def test_a_peer_that_cannot_run_is_absent_with_its_reason(monkeypatch, message):
    def fail(*args, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", fail)
    commands, replies = io.StringIO('{"do": "first_steps", "with": []}\n'), io.StringIO()
    step_worker.serve(_task(), "compile-fp32", commands, replies)
    reason = message.splitlines()[0] if message else "no reason given"
    assert json.loads(replies.getvalue()) == {"error": f"RuntimeError: {reason}"}


def test_the_lost_are_rows_that_say_so(in_process, tmp_path, capsys):
    """A worker that does not start, and one that dies in the middle, of PyTorch's and of ours."""
    _InProcess.dies |= {("eager-bf16-autocast", "first_steps"): "killed by signal 9", ("fastlm-fp32", "steps"): "gone"}
    out = tmp_path / "t.json"
    options = train_step.TrainStepOptions(**TINY, against=("eager-fp32", "eager-bf16-autocast"), out=out)
    assert train_step.run(options) == 1
    (row,) = report.load(out)["rows"]
    assert row["dtype"] == "bfloat16" and row["peers"]["eager-bf16-autocast"] == {"absent": "killed by signal 9"}
    assert row["peers"]["eager-fp32"]["ratio"] > 0 and "fastlm-fp32" not in row["peers"]["eager-fp32"]["ratios"]
    printed = capsys.readouterr().out
    assert "fastlm-fp32: absent, after 0 rounds: gone" in printed
    assert "eager-bf16-autocast: absent, killed by signal 9" in printed
    status, md, _, _ = _report(tmp_path, out)
    assert status == 0 and "killed by signal 9" in md


@pytest.mark.parametrize("gone", [False, True])
def test_a_killed_process_says_so(gone):
    worker = step_turns.Worker(_task(), "fastlm-fp32", {})
    worker.process.send_signal(signal.SIGKILL)
    if gone:
        worker.process.wait()
    with pytest.raises(step_turns.WorkerError, match="killed by signal 9"):
        worker.ask("first_steps")


def test_without_the_oracle_nothing_is_timed(in_process, tmp_path, capsys):
    _InProcess.dies |= {("eager-fp32", "first_steps"): "killed by signal 9"}
    assert train_step.run(train_step.TrainStepOptions(**TINY, out=tmp_path / "t.json")) == 1
    assert "REFUSED, eager-fp32, which all are compared with: killed by signal 9" in capsys.readouterr().out
    assert not (tmp_path / "t.json").exists() and sorted(_InProcess.closed) == ["roof"]


def test_what_does_not_fit_together_comes_in_groups(in_process):
    """Each group has all of ours, and a ratio is to what ours took beside that peer."""
    names = ("fastlm-fp32", "eager-fp32", "eager-bf16-autocast")
    plenty = 1 << 50
    _InProcess.free += [plenty, 0, plenty]  # after the oracle, after ours (nothing more fits), ...
    measured = step_turns.compare(_task(), names, {"default": {}, "malloc": {}}, 0.01)
    assert measured["groups"] == [
        ["eager-fp32", "fastlm-fp32"], ["fastlm-fp32", "eager-bf16-autocast", "eager-fp32 malloc", "eager-bf16-autocast malloc"]
    ]  # fmt: skip
    found = measured["candidates"]
    assert found["fastlm-fp32"]["rounds"] == found["eager-fp32"]["rounds"] + found["eager-fp32 malloc"]["rounds"]
    assert all(list(c["ratios"]) == ["fastlm-fp32"] for n, c in found.items() if n != "fastlm-fp32")


def test_nan_is_a_mismatch():
    exact = {"losses": [3.0] * 4, "grad_norms": [1.0] * 4}
    step_turns.agree({step_worker.ORACLE: exact, "fastlm-fp32": copy.deepcopy(exact)})
    with pytest.raises(step_turns.MismatchError, match="fastlm-fp32, step 2: loss nan"):
        step_turns.agree({step_worker.ORACLE: exact, "fastlm-fp32": exact | {"losses": [3.0, float("nan"), 3.0, 3.0]}})


def test_a_mismatch_fails_the_run_and_leaves_no_row(in_process, tmp_path, monkeypatch, capsys):
    out = tmp_path / "t.json"
    monkeypatch.setattr(step_turns, "TOLERANCES", dict.fromkeys(step_worker.TOLERANCES, (0.0, 0.0)))
    assert train_step.run(train_step.TrainStepOptions(**TINY, out=out)) == 1
    assert "REFUSED, the candidates do not compute the same thing" in capsys.readouterr().out
    assert not out.exists()


def test_cases_name_what_is_asked_for():
    options = train_step.TrainStepOptions(case=("gpt2-512", "gpt2-1024", "small", "transformer"), device="cpu")
    tasks = [train_step._task(options, case) for case in train_step._cases(options)]
    batches = [(t.batch_size, t.seq_len, t.target_len, t.rows) for t in tasks]
    assert batches == [(2, 512, 0, "full"), (4, 1024, 0, "full"), (8, 256, 0, "full"), (32, 32, 32, "sorted")]
    given = train_step.TrainStepOptions(model=("gpt2",), batch_size=2, seq_len=512)
    assert train_step._cases(given) == [("gpt2", 2, 512, "full")]
    assert step_flops.matmul_parameters(tasks[0]) == pytest.approx(123.6e6, rel=0.01)
    assert (tasks[0].config["n_layer"], tasks[0].config["n_embd"], tasks[0].tokens) == (12, 768, 1024)
    assert step_flops.flop_per_token(tasks[0]) == 6 * step_flops.matmul_parameters(tasks[0]) + 6 * 12 * 768 * 512


def test_every_case_is_offered_and_has_a_shape():
    offered = typing.get_args(typing.get_args(typing.get_type_hints(train_step.TrainStepOptions)["case"])[0])
    models = typing.get_args(typing.get_args(typing.get_type_hints(train_step.TrainStepOptions)["model"])[0])
    assert set(offered) == set(train_step.CASES) and set(models) == set(step_task.SHAPES)
    assert all(case.rows in step_task.SHAPES[case.model].rows for case in train_step.CASES.values())


def test_loss_curves_of_a_tiny_model(in_process, monkeypatch, tmp_path, capsys):
    """On real text from the same weights; a learning rate 2% off is beyond what is asked."""
    monkeypatch.setattr(loss_curve, "Worker", _CurveInProcess)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    text = (str(Path(plain_gpt.__file__)),)
    out = tmp_path / "c.json"
    options = train_step.TrainStepOptions(**TINY, curve=25, text=text, tokenizer="bytes", out=out)
    assert train_step.run(options) == 0
    rows = report.load(out)["rows"]
    assert [r["candidate"] for r in rows] == ["fastlm-fp32", "fastlm-bf16"]
    for row in rows:
        assert len(row["losses"]) == len(row["reference_losses"]) == 25 and row["within"]
        assert row["losses"][-1] < row["losses"][0] - 0.3
        assert row["data"]["sources"] == ["plain_gpt.py"]  # no folder of this machine
        assert 0 < row["smoothed_mean"] <= row["smoothed_worst"] <= 0.005 and row["step_worst"] >= row["smoothed_worst"]
        assert row["validated"] and row["validated_at"] == [10, 20, 25] and row["validation_tokens"] > 200
        assert row["validation"] == pytest.approx(row["reference_validation"], rel=2e-3)
        assert row["best_validation"] == min(row["validation"]) < row["validation"][0]
    assert rows[0]["step_worst"] < 1e-4 < rows[1]["step_worst"]  # float32 is nearer
    assert "asked 0.5%: within" in capsys.readouterr().out
    status, md, _, _ = _report(tmp_path, out)
    assert status == 0 and "Loss curves" in md and "MISSED" not in md
    update = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, batches, lr: update(self, batches, lr=0.7 * lr))
    assert train_step.run(options) == 1
    assert "MISSED" in capsys.readouterr().out and "MISSED: tiny" in _report(tmp_path, out)[1]


class _CurveInProcess(_InProcess):
    def __init__(self, task, name, variables):
        self.name, self.contender = name, step_worker.Curve(task, name)


def test_an_lstm_is_validated_beside_torchs(in_process, monkeypatch, tmp_path):
    """Both carry their state in training and not in validation, take turns, and what is worse on held-out text is MISSED."""
    monkeypatch.setattr(loss_curve, "Worker", _CurveInProcess)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    shape = step_task.SHAPES["lstm"]
    monkeypatch.setitem(step_task.SHAPES, "lstm", dataclasses.replace(
        shape, config=dataclasses.replace(shape.config, n_embd=16), batch_size=2, seq_len=16))  # fmt: skip
    text = (str(Path(plain_lstm.__file__)),)
    out = tmp_path / "c.json"
    options = train_step.TrainStepOptions(
        case=("lstm",), device="cpu", curve=30, text=text, tokenizer="bytes", dtype=("float32",), validation_windows=4, out=out
    )
    assert train_step.run(options) == 0
    (row,) = report.load(out)["rows"]
    assert row["losses"] == pytest.approx(row["reference_losses"], rel=1e-4)
    assert row["validation"] == pytest.approx(row["reference_validation"], rel=1e-5) and row["validation_tokens"] <= 4 * 16
    assert row["ratio"] == pytest.approx(row["reference_seconds_per_step"] / row["seconds_per_step"])
    assert 30 * row["seconds_per_step"] <= 2 * row["seconds"]
    best = f"{row['best_validation']:.5g} | {row['reference_best_validation']:.5g} | {row['ratio']:.3g}"
    assert best in _report(tmp_path, out)[1]
    validate = Engine.evaluate
    monkeypatch.setattr(Engine, "evaluate", lambda self, batch: (1.002 * validate(self, batch)[0], validate(self, batch)[1]))
    assert train_step.run(options) == 1
    assert "MISSED: lstm" in _report(tmp_path, out)[1]


def test_times_and_validation_losses_of_a_run_by_hand():
    task = dataclasses.replace(_task(), data={"steps": 35})
    assert loss_curve._step_seconds({"turns": [9.0, 2.0, 3.0, 0.1]}, task) == pytest.approx(0.25)
    assert loss_curve._step_seconds({"turns": [9.0]}, dataclasses.replace(_task(), data={"steps": 3})) == pytest.approx(3.0)
    assert loss_curve._best({"validation": [2.0, 1.5, 1.7]}) == 1.5
    assert math.isnan(loss_curve._best({"validation": [2.0, math.nan, 1.7]}))


def test_deviations_by_hand():
    ours, theirs = [2.0, 2.2, 1.0], [2.0, 2.0, 1.0]
    found = loss_curve.deviations(ours, theirs)
    assert found["step_worst"] == pytest.approx(0.1) and found["step_mean"] == pytest.approx(0.1 / 3)
    assert found["smoothed_worst"] == pytest.approx(0.05) and found["smoothed_mean"] == pytest.approx((0.05 + 0.04) / 3)
    assert loss_curve.smoothed(list(range(40)))[39] == pytest.approx(29.5)
    assert all(math.isnan(v) for v in loss_curve.deviations([2.0, math.nan, 1.0], theirs).values())


# --- the families

_BERT, _T5 = step_task.SHAPES["bert"].config, step_task.SHAPES["t5"].config
_NARROW = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "gpt": step_task.SHAPES["tiny"],
    "bert": step_task.Shape("bert", dataclasses.replace(
        _BERT, vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2), 2, 32),
    "transformer": step_task._translation(EncoderDecoderConfig(**_NARROW, label_smoothing=0.1), 6, 12),
    "t5": step_task.Shape("encoder-decoder", dataclasses.replace(_T5, **_NARROW, head_dim=16, n_inner=48), 2, 64, 16),
}  # fmt: skip
KINDS = [("bert", "full"), ("transformer", "full"), ("transformer", "sorted"), ("transformer", "random"), ("t5", "full")]


def _family_task(monkeypatch, name, rows="full", **options):
    monkeypatch.setitem(step_task.SHAPES, name, FAMILIES[name])
    options = train_step.TrainStepOptions(device="cpu", **options)
    return train_step._task(options, train_step.Case(name, *((2, 16) if name == "gpt" else (None, None)), rows=rows))


def _first_steps(task, names):
    return {name: step_worker.Contender(task, name).first_steps() for name in names}


@pytest.mark.parametrize(("name", "rows"), KINDS)
def test_every_family_computes_what_its_peer_does(monkeypatch, name, rows):
    """Two micro-batches, which count alike; float32 to its own rounding."""
    task = _family_task(monkeypatch, name, rows, accumulate=2)
    found = _first_steps(task, (step_worker.ORACLE, "fastlm-fp32", *(("fastlm-bf16",) if rows == "full" else ())))
    step_turns.agree(found)
    oracle, ours = found[step_worker.ORACLE], found["fastlm-fp32"]
    assert ours["losses"] == pytest.approx(oracle["losses"], rel=2e-6)
    assert ours["grad_norms"] == pytest.approx(oracle["grad_norms"], rel=2e-5)
    assert oracle["losses"][-1] < oracle["losses"][0]


def _changed_attention(monkeypatch, module, change):
    attention = module.F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *args, **more: attention(*args, **change(more)))


def _no_label_smoothing(monkeypatch):
    loss = plain_encoder_decoder.F.cross_entropy
    monkeypatch.setattr(plain_encoder_decoder.F, "cross_entropy", lambda *args, label_smoothing: loss(*args))


def _shifted_positions(monkeypatch):
    forward = plain_bert.PlainBERT.forward
    monkeypatch.setattr(plain_bert.PlainBERT, "forward",
                        lambda self, positions, **more: forward(self, positions=(positions + 1) % 32, **more))  # fmt: skip


def _next_sentence_lost(monkeypatch):
    forward = plain_bert.PlainPooler.forward
    monkeypatch.setattr(plain_bert.PlainPooler, "forward", lambda self, hidden: forward(self, hidden).detach())


CHANGES = {
    "BERT masked": ("bert", "full", lambda m: _changed_attention(m, plain_bert, lambda o: o | {"is_causal": True})),
    "BERT's places": ("bert", "full", _shifted_positions),
    "pooler without gradient": ("bert", "full", _next_sentence_lost),
    "decoder sees ahead": ("transformer", "full", lambda m: _changed_attention(
        m, plain_encoder_decoder, lambda o: o | {"is_causal": False})),
    "padding is seen": ("transformer", "random", lambda m: _changed_attention(
        m, plain_encoder_decoder, lambda o: o | {"attn_mask": None})),
    "no label smoothing": ("transformer", "full", _no_label_smoothing),
    "scaled scores": ("t5", "full", lambda m: _changed_attention(m, plain_encoder_decoder, lambda o: o | {"scale": None})),
    "buckets of one side": ("t5", "full", lambda m: m.setattr(
        plain_encoder_decoder, "_buckets", lambda n, buckets, far, both, made=plain_encoder_decoder._buckets: made(
            n, buckets, far, False))),
    "buckets that end early": ("t5", "full", lambda m: m.setattr(
        plain_encoder_decoder, "_buckets", lambda n, buckets, far, both, made=plain_encoder_decoder._buckets: made(
            n, buckets, far // 4, both))),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_peer_that_computes_something_else_is_refused(monkeypatch, change):
    name, rows, apply = CHANGES[change]
    task = _family_task(monkeypatch, name, rows)
    ours = _first_steps(task, ("fastlm-fp32",))
    apply(monkeypatch)
    with pytest.raises(step_turns.MismatchError, match="fastlm-fp32"):
        step_turns.agree(_first_steps(task, (step_worker.ORACLE,)) | ours)


def test_padded_and_packed_hold_the_same_pairs(monkeypatch):
    packed, alike, full = (_family_task(monkeypatch, "transformer", rows) for rows in ("random", "sorted", "full"))
    assert packed.padding > alike.padding > full.padding == 0.0
    batch = step_task.batches(packed)[0]
    padded = step_task.for_peer(batch)
    assert packed.tokens == batch["input_ids"].numel() + batch["targets"].numel()
    sizes = [t.numel() for t in (padded["input_ids"], padded["targets"])]
    assert packed.padding == pytest.approx(1 - packed.tokens / sum(sizes))
    seen = padded["source_mask"][:, 0, 0]
    assert torch.equal(padded["input_ids"][seen], batch["input_ids"])
    assert torch.equal(padded["targets"][padded["targets"] != -100], batch["targets"])
    assert torch.equal(seen.sum(1), batch["cu_seqlens"].diff())
    assert (padded["decoder_input_ids"][:, 0] == 0).all()
    assert torch.equal(padded["decoder_input_ids"][:, 1:3], padded["targets"][:, :2].clamp(min=0))


def test_lengths_are_drawn_as_they_are_described():
    config = dataclasses.asdict(EncoderDecoderConfig(n_positions=10**6))
    task = step_task.Task("encoder-decoder", config, 4000, 1000, 1, "cpu", 0, {}, 500, "random")
    source, target = (torch.tensor(side, dtype=torch.float64) for side in task.lengths)
    assert source.mean().item() == pytest.approx(1000, rel=0.03) and source.log().std().item() == pytest.approx(0.6, rel=0.03)
    ratio = (target / source).log()
    assert ratio.mean().exp().item() == pytest.approx(0.5, rel=0.01) and ratio.std().item() == pytest.approx(0.17, rel=0.03)
    alike, _ = dataclasses.replace(task, batch_size=32, rows="sorted").lengths
    assert max(alike) < 1.2 * min(alike)


def test_translation_row_says_how_much_was_padding(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step_task.SHAPES, "transformer", FAMILIES["transformer"])
    out = tmp_path / "t.json"
    options = train_step.TrainStepOptions(
        case=("transformer-random",), device="cpu", seconds=0.01, settings=("default",), dtype=("float32",),
        against=("eager-fp32",), out=out,
    )  # fmt: skip
    assert train_step.run(options) == 0
    (row,) = report.load(out)["rows"]
    task = _family_task(monkeypatch, "transformer", "random")
    assert row["tokens_per_s"] == pytest.approx(task.tokens / row["seconds"])
    assert row["flop_per_s"] == pytest.approx(row["tokens_per_s"] * row["flop_per_token"])
    d = row["dims"]
    name = f"transformer, 6 x ({d['seq_len']} + {d['target_len']}) tokens, random rows, {task.padding:.0%} padding"
    assert name in _report(tmp_path, out)[1]
    assert f"of which {task.padding:.0%} padding" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_model_flops_are_those_that_torch_counts(monkeypatch, name):
    """Against torch's own counter: matrices exactly, attention twice ours where it is causal, without padding."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    task = _family_task(monkeypatch, name)
    c, contender = task.config, step_worker.Contender(task, step_worker.ORACLE)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        contender.trainer.model(**contender.batches[0]).backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "bmm" in op)
    linear = sum(counts.values()) - attention
    matrices, pairs = step_flops.work(task)
    assert linear == 6 * sum(elements * rows for elements, rows in matrices.values())
    rows, seq, target = task.batch_size, task.seq_len, task.target_len
    halved = {"gpt": seq, "bert": 0, "transformer": target, "t5": target}[name]
    width = c["n_head"] * (c.get("head_dim") or c["n_embd"] // c["n_head"]) if halved else 0
    assert attention == 12 * pairs + 6 * width * c.get("n_layer", 0) * rows * halved**2
    assert linear + 12 * pairs == step_flops.flop_per_step(task) == step_flops.flop_per_token(task) * task.tokens


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"seq_len": 0}, {"accumulate": 0}, {"seconds": 0.0}, {"dtype": ()},
                                   {"curve": -1}, {"rows": "sorted"}])  # fmt: skip
def test_bad_options_are_named(wrong):
    with pytest.raises(OptionError, match=next(iter(wrong)).replace("_", "-")):
        train_step.run(train_step.TrainStepOptions(**TINY | wrong))


# --- the plan for a GPU


def _python(code):
    return [sys.executable, "-c", code]


def _wait_for(path, process):
    """Until there is something in a file that the process should write."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


WRITES = "import json, sys; from pathlib import Path; Path('PART').write_text({!r}); "


def _writing(op, more="", finished=True, kind="kernels"):
    content = {
        "format": 1, "kind": kind, "command": [], "started": "", "finished": finished, "environment": {"device": "x"},
        "rows": [_kernel(op)],
    }  # fmt: skip
    return _python(WRITES.format(json.dumps(content)) + more)


def test_budget_is_shared_by_weight_and_what_is_left_goes_on():
    a, b, c = (Step(name, [], share, 10.0) for name, share in (("a", 60), ("b", 30), ("c", 10)))
    assert device.time_for(a, [b, c], 100.0) == pytest.approx(60)
    assert device.time_for(b, [c], 95.0) == pytest.approx(71.25)  # a took 5 only
    assert device.time_for(c, [], 40.0) == pytest.approx(40)
    assert device.time_for(c, [a], 20.0) == 10.0  # at least what it needs
    assert device.time_for(c, [], 9.9) == 0.0  # or nothing
    remaining = total = 300.0
    steps = device.plan()
    for i, step in enumerate(steps):
        remaining -= device.time_for(step, steps[i + 1 :], remaining)
        assert 0 <= remaining <= total


def test_a_hanging_step_is_killed_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "GRACE", 0.3)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)"
    )
    with (tmp_path / "log").open("w+") as log:
        status, taken = device.execute(_python(code), 2.0, log)
        pid = int(device._since(log, 0))
    assert status == "timed out" and 1.5 < taken < 10
    for _ in range(100):  # until whoever adopts it has reaped it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the process that the step had started lives on")


def test_a_plan_goes_on_after_failures_and_keeps_all_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "GRACE", 0.5)
    monkeypatch.setattr(device, "CLOSING", 0.0)
    steps = [
        Step("one", _writing("gelu"), 1, 0.1, "kernels"),
        Step("broken", _python("print('what went wrong'); raise SystemExit(3)"), 1, 0.1, "kernels"),
        Step("hangs", _writing("adamw", "import time; time.sleep(60)", finished=False), 1, 0.1, "kernels"),
        Step("step", _writing("", kind="train_step"), 1, 0.1, "train_step"),
        Step("greedy", _python(""), 1, 1e9),
    ]
    with (tmp_path / "x.log").open("w+") as log:
        summary = device.run_plan(steps, 12.0, tmp_path / "x", log)
    assert [r["status"] for r in summary.rows] == ["done", "failed (status 3)", "timed out", "done", "not reached"]
    assert "what went wrong" in summary.rows[1]["why"] and "what went wrong" in capsys.readouterr().out
    kernels = json.loads((tmp_path / "x-kernels.json").read_text())
    assert [r["op"] for r in kernels["rows"]] == ["gelu", "adamw"] and not kernels["finished"]
    assert json.loads((tmp_path / "x-train_step.json").read_text())["finished"]
    content = report.load(tmp_path / "x-device.json")
    assert content["finished"] and content["plan"] == [s.name for s in steps]
    assert not (tmp_path / "x-part.json").exists()


def test_a_cut_off_plan_loses_nothing(tmp_path):
    """Killed outright in its second step: the first step's rows and those of the second are there, and can be reported."""
    part, pid = tmp_path / "x-part.json", tmp_path / "pid"
    hang = f"import os, time; Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "from pathlib import Path; from benchmarks import device; from benchmarks.device import Step\n"
        f"steps = [Step('one', {_writing('gelu')!r}, 1, 1, 'kernels'),\n"
        f"         Step('two', {_writing('adamw', hang, finished=False)!r}, 1, 1, 'kernels')]\n"
        f"with open({str(tmp_path / 'x.log')!r}, 'w+') as log: device.run_plan(steps, 100, Path({str(tmp_path / 'x')!r}), log)"
    )
    process = subprocess.Popen(_python(code), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        _wait_for(pid, process)
    finally:
        process.kill()
        process.wait()
    os.kill(int(pid.read_text()), signal.SIGKILL)  # nobody else is left to end it
    assert [r["op"] for r in report.load(tmp_path / "x-kernels.json")["rows"]] == ["gelu"]
    assert [r["op"] for r in report.load(part)["rows"]] == ["adamw"]
    assert [r["step"] for r in report.load(tmp_path / "x-device.json")["rows"]] == ["one"]
    files = [tmp_path / f"x-{name}.json" for name in ("kernels", "part", "device")]
    _, md, _, _ = _report(tmp_path, *files)
    assert md.count("**UNFINISHED**") == 3 and "| two | not reached: the run was cut off |" in md


def test_an_interrupted_plan_ends_its_step(tmp_path):
    pid_file = tmp_path / "pid"
    step = f"import os, time; from pathlib import Path; Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import signal; from pathlib import Path; from benchmarks import device\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"with open({str(tmp_path / 'x.log')!r}, 'w+') as log: device.execute({_python(step)!r}, 60, log)"
    )
    process = subprocess.Popen(_python(code), cwd=ROOT, stderr=subprocess.DEVNULL)
    _wait_for(pid_file, process)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.parametrize("rehearse", [False, True])
def test_plan_has_every_op_and_its_commands_are_well_formed(rehearse):
    steps = device.plan(rehearse)
    names = [s.name for s in steps]
    for op in registry.ops():
        assert names.index("tests") < names.index(f"kernels/{op}") < names.index("train_step/eager")
        assert f"compare/{op}" in names
    for step in steps:
        if step.kind:
            setup, call = step.command[2].split("raise SystemExit(run(")
            scope: dict = {}
            exec(setup.replace("from fastlm.testbed.bench import run; ", ""), scope)
            options = eval(call.removesuffix("))"), scope)
            assert options.out == Path(device.PART)


def test_plan_and_its_commands_need_no_command_line_package():
    """A lent machine has torch and triton, and little of what fastlm[train] installs."""
    missing = "import sys; sys.modules |= dict.fromkeys(('tyro', 'matplotlib', 'tensorboard', 'tokenizers')); "
    code = missing + "import benchmarks.device, benchmarks.step_worker, fastlm.testbed.bench; "
    code += "from fastlm.testbed.options import BenchOptions; print(BenchOptions(ops=('gelu',)).ops)"
    done = subprocess.run(_python(code), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "('gelu',)", done.stderr


def test_dry_run_prints_each_command_with_its_share(capsys, tmp_path):
    assert device.main(["--dry-run", "--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert all(f"kernels/{op}\n" in said for op in registry.ops())
    assert not (tmp_path / "none").exists()
    if not torch.cuda.is_available():
        assert "There is no GPU here" in said and "no figure of it is a GPU's" in said


def test_only_takes_known_steps(capsys):
    with pytest.raises(SystemExit):
        device.main(["--dry-run", "--only", "kernles"])
    assert "--only: got kernles; allowed: " in capsys.readouterr().err


def test_outcomes_of_pytest_are_read_with_and_without_workers():
    log = """
tests/test_ops.py::test_a[1 - no rows] PASSED            [ 10%]
tests/test_ops.py::test_a[2 rows] PASSED                 [ 11%]
tests/test_ops.py::test_b FAILED                         [ 20%]
[gw1] [ 30%] PASSED tests/test_nn.py::test_c[1 row]
[gw0] [ 40%] SKIPPED tests/test_nn.py::test_d
[gw0] [100%] PASSED tests/test_nn.py::test_e
[gw0] [100%] ERROR tests/test_nn.py::test_e
E   assert 'tests/test_ops.py::test_z PASSED' == ''
FAILED tests/test_ops.py::test_b - AssertionError: PASSED
PASSED tests/test_ops.py::test_b
"""
    found = device._outcomes(log)
    names = ["tests/test_ops.py::test_b", "tests/test_nn.py::test_e"]
    assert found == {"passed": 3, "failed": 1, "skipped": 1, "error": 1, "names": names}
