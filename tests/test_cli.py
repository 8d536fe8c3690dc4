"""The command: help, errors and exit statuses, real signals, sampling, the audit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlm.cli import main
from fastlm.data import Tokenizer
from fastlm.engine.tape import Tape
from fastlm.models import GPT
from fastlm.train import checkpoint
from fastlm.train.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"zeile {i}: \u00fcber \u20ac{i * i} \U0001f600 und {i % 7}\n" for i in range(300))


@pytest.fixture(scope="module", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models as small as these only lose by threads; child processes see the same setting."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def options(out: Path, text: Path, *more: str) -> list[str]:
    return [
        "train", "--preset", "tiny", "--out", str(out), "--data", str(text), "--tokenizer", "bytes",
        "--n-layer", "1", "--n-embd", "16", "--seq-len", "16", "--batch-size", "2", "--eval-batches", "2",
        "--validation-fraction", "0.1", "--dropout", "0.1", "--dtype", "float32", "--device", "cpu",
        "--no-audit", "--sample-tokens", "8", "--prompt", "zeile", *more,
    ]  # fmt: skip


def same_numbers(a: Path, b: Path) -> bool:
    def numbers(run: Path) -> list[dict[str, Any]]:
        timings = {"seconds", "tokens_per_second"}
        return [
            {k: v for k, v in record.items() if k not in timings}
            for record in read_metrics(run / "metrics.jsonl")
        ]

    return numbers(a) == numbers(b)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run of 300 steps."""
    out = tmp_path_factory.mktemp("run") / "r"
    assert main(options(out, text, "--steps", "300", "--log-every", "10")) == 0
    return out


# --- what is said and with which status


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from fastlm.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = """data out resume steps batch-size seq-len grad-accum lr warmup min-lr weight-decay clip dtype
        device backend seed eval-every eval-batches save-every keep audit-every sample-tokens max-minutes"""
    for name in names.split():
        assert re.search(rf"--{name}\b", done.stdout), name


def test_presets_fill_in_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, steps, embedding in (
        (["train", "--help"], 400, 384),
        (["train", "--preset", "tiny", "--help"], 60, 32),
        (["train", "--help", "--preset=gpt2"], 20000, 768),
    ):
        with pytest.raises(SystemExit) as status:
            main(arguments)
        assert not status.value.code
        said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
        assert re.search(rf"Optimizer updates in the whole run. \(default: {steps}\)", said)
        assert re.search(rf"Width; a multiple of n-head. \(default: {embedding}\)", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--lr", "fast"], "--lr"),
        (["train", "--dtype", "int8"], "'float32', 'bfloat16'"),
        (
            ["train", "--backend", "abacus"],
            "invalid choice 'abacus' for argument '--backend'. Expected one of",
        ),
        (["train", "--preset", "huge"], "'tiny', 'mini', 'small'"),
        (["train", "--larning-rate", "1"], "Unrecognized options: --larning-rate"),
        (["sample"], "Missing from fastlm sample"),
        (["trian"], "Available subcommands: train, generate, sample, translate, audit, kernels, info"),
        (["kernels", "chek"], "Available subcommands: list, check, compile, explain, bench, new"),
        ([], "Expected one of {train, generate, sample, translate, audit, kernels, info}"),
    ],
)
def test_mistyped(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --lr -1", "--lr: got -1.0, allowed: finite numbers above 0"),
        (
            "train --resume",
            "--resume: got no --out, allowed: --resume together with the run directory in --out",
        ),
        ("train --resume --out nowhere", "--resume: got nowhere, allowed: a directory that holds a run ("),
        ("train --data nowhere --out NEW", "no such file or folder: nowhere"),
        ("train --data SMALL --out NEW --tokenizer bytes", "too few"),
        ("sample nowhere", "--model: got nowhere, allowed: a directory with a whole model ("),
        ("sample RUN --temperature -1", "--temperature: got -1.0, allowed: finite numbers from 0"),
        ("sample RUN --top-k 0", "--top-k: got 0, allowed: 1 and more"),
        ("sample RUN --top-p 1.5", "--top-p: got 1.5, allowed: 0 < x <= 1"),
        ("sample RUN --num 0", "--num: got 0, allowed: 1 and more"),
        ("generate RUN --beams 2 --num 3", "--num: got 3, allowed: 1 to --beams 2"),
        ("generate RUN --beams 2 --top-k 3", "--top-k: got 3, allowed: none with --beams, which does not sample"),
        ("generate RUN --no-repeat-ngram -1", "--no-repeat-ngram: got -1, allowed: 0 and more"),
        ("generate RUN --file nowhere", "--file: got nowhere, allowed: a text file of prompts ("),
        ("audit --seq-len 65", "--seq-len: got 65, allowed: 1 to 64, the model's longest context"),
        ("audit --model-dir nowhere", "--model: got nowhere, allowed: a directory with a whole model"),
    ],
)
def test_unusable(
    arguments: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.txt").write_text("x")
    places = {"RUN": run, "NEW": tmp_path / "new", "SMALL": tmp_path / "small.txt"}
    status = main([str(places.get(word, word)) for word in arguments.split()])
    error = capsys.readouterr().err
    assert error.startswith("fastlm: error: ") and message in error
    assert status == (2 if message.startswith("--") else 1)
    if "NEW" in arguments:  # nothing is in the way of a second try
        assert not [path for path in (tmp_path / "new").iterdir() if not path.name.startswith(".")]


def test_a_run_is_not_overwritten(run: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    assert main(options(run, text)) == 2
    assert "allowed: a new or empty directory; with --resume, one that holds a run" in capsys.readouterr().err
    assert main(["train", "--out", str(run), "--resume", "--n-embd", "32"]) == 2
    assert "--n-embd: got 32, allowed: 16, which the run to resume has" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    (broken := run.parent / "broken").mkdir()
    (broken / "config.json").write_text('{"preset": "tiny"}')
    assert main(["train", "--out", str(broken), "--resume"]) == 2
    assert "config.json: the options: 'data' is missing" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"torch      {torch.__version__}" in said and re.search(r"^reference +yes", said, re.MULTILINE)


# --- signals, to a process of its own


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(
    number: signal.Signals, run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    arguments = options(out, text, "--steps", "300", "--log-every", "10", "--save-every", "0")
    child = subprocess.Popen(
        [sys.executable, "-m", "fastlm", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(
        lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out / "metrics.jsonl")) > 20, child
    )
    child.send_signal(number)
    said, error = child.communicate(timeout=60)
    assert child.returncode == 128 + number, error
    assert f"{number.name}: finishing this step, then saving; once more stops at once" in error
    step, command = re.findall(rf"{number.name}: saved at step (\d+); resume with:\n  (.*)\n", said)[0]
    assert 20 <= int(step) < 300
    python = shutil.which(shlex.split(command)[0])
    assert python and os.path.samefile(python, sys.executable)
    assert command.endswith(f" -m fastlm train --out {shlex.quote(str(out))} --resume")
    assert checkpoint.list_checkpoints(out / "checkpoints")[0].name == f"step-{int(step):08d}"
    assert main(shlex.split(command)[3:]) == 0
    assert f"resumed at step {step}" in capsys.readouterr().out
    last = "checkpoints/step-00000300/state.safetensors"
    assert (out / last).read_bytes() == (run / last).read_bytes()
    assert same_numbers(out, run)


def test_a_second_signal_stops_at_once() -> None:
    code = (
        "import os, signal, time\nfrom fastlm.train.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert interrupts.received == signal.SIGINT\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "still here\n")


def wait_for(condition: Any, child: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.005)


def test_killed_at_random_moments() -> None:
    """A few of the kills of the tool beside this file; run it with --kills 20 for more."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTLM_CACHE"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kill_and_resume.py"), "--kills", "4", "--steps", "40", "--slow-writes", "0.05"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout.splitlines()[-1]
    assert done.stdout.count("bitwise equal to the undisturbed one") >= 1


# --- sampling


def sample(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["sample", *arguments]) == 0
    return capsys.readouterr().out


def test_every_form_of_a_model_samples_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        sample(capsys, str(path), "--prompt", "zeile", "--tokens", "30", "--seed", "5")
        for path in (run, run / "model", run / "checkpoints/step-00000300")
    }
    assert len(texts) == 1 and texts.pop().startswith("zeile")


def test_a_run_without_its_end_samples_from_the_newest_good_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    shutil.copytree(run, out, symlinks=True)
    shutil.rmtree(out / "model")
    expected = sample(capsys, str(run / "checkpoints/step-00000280"), "--tokens", "20")
    assert sample(capsys, str(out), "--tokens", "20") == sample(capsys, str(run), "--tokens", "20")
    (out / "checkpoints/step-00000300/model.safetensors").write_bytes(b"")
    assert sample(capsys, str(out), "--tokens", "20") == expected
    for path in checkpoint.list_checkpoints(out / "checkpoints"):
        (path / "SHA256SUMS").write_bytes(b"x")
    assert main(["sample", str(out)]) == 1
    error = capsys.readouterr().err
    assert "holds no checkpoint that can be used" in error and error.count("truncated") >= 2
    assert main(["sample", str(out / "checkpoints/best")]) == 1


def test_seed_and_temperature(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(*more: str) -> str:
        return sample(capsys, str(run), "--prompt", "zeile 1", "--tokens", "40", *more)

    assert draw("--seed", "1") == draw("--seed", "1") != draw("--seed", "2")
    greedy = draw("--temperature", "0", "--seed", "1")
    assert (
        greedy == draw("--temperature", "0", "--seed", "2") == draw("--top-k", "1") == draw("--top-p", "1e-9")
    )
    two = draw("--num", "2", "--seed", "1")
    one, other = draw("--seed", "1"), draw("--seed", "2")
    assert two == f"--- 1 of 2\n{one}--- 2 of 2\n{other}"


def test_greedy_text_is_the_argmax_of_the_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written out by hand, past the end of the context of 16, with all bytes decoded together."""
    model, tokenizer = GPT.from_pretrained(run / "model").eval(), Tokenizer.load(run / "model")
    prompt = "zeile 7: \u00fcber \u20ac"
    ids = tokenizer.encode(prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids[-16:]]))[0, -1].argmax()))
    assert tokenizer.separator_id not in ids
    found = sample(capsys, str(run), "--prompt", prompt, "--tokens", "40", "--temperature", "0")
    assert found == prompt + tokenizer.decode(ids[start:]) + "\n"


def test_text_of_many_bytes_arrives_whole(run: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastlm",
            "sample",
            str(run),
            "--prompt",
            "\U0001f600\u20ac",
            "--tokens",
            "60",
        ],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").startswith("\U0001f600\u20ac")


def test_reader_that_has_seen_enough(run: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m fastlm sample {shlex.quote(str(run))} --tokens 60 --num 3"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout) == 1


def test_tokenizer_of_another_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    Tokenizer.train([TEXT], 300).save(tmp_path / "model/tokenizer.json")
    assert main(["sample", str(tmp_path / "model")]) == 1
    assert re.search(r"the tokenizer has \d+ tokens, the model 257; they do not", capsys.readouterr().err)
    (tmp_path / "model/tokenizer.json").unlink()
    assert main(["sample", str(tmp_path / "model")]) == 1
    assert "no tokenizer at" in capsys.readouterr().err


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["generate", *arguments, "--jsonl"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_generate_continues_every_prompt(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the command line and of a file, alone or together, as `sample` would."""
    (tmp_path / "prompts.txt").write_text("zeile 7: \u00fc\nz\n", encoding="utf-8")
    shared = [str(run), "--tokens", "12", "--seed", "3"]
    lines = generated(capsys, *shared, "--file", str(tmp_path / "prompts.txt"), "--prompt", "zeile 1", "a", "--num", "2")
    assert [line["prompt"] for line in lines] == [p for p in ("zeile 1", "a", "zeile 7: \u00fc", "z") for _ in range(2)]
    one = sample(capsys, *shared, "--prompt", "zeile 1", "--num", "2")
    assert one == "".join(f"--- {i + 1} of 2\nzeile 1{lines[i]['text']}\n" for i in range(2))
    assert generated(capsys, *shared, "--prompt", "zeile 1", "a", "--num", "2", "--batch-size", "3") == lines[:4]
    greedy = generated(capsys, *shared, "--temperature", "0", "--prompt", "zeile 1", "a")
    assert [f"{g['prompt']}{g['text']}\n" for g in greedy] == [
        sample(capsys, *shared, "--temperature", "0", "--prompt", prompt) for prompt in ("zeile 1", "a")
    ]
    capsys.readouterr()
    assert main(["generate", *shared, "--prompt", "z", "a"]) == 0
    headed = capsys.readouterr().out
    assert headed.startswith("--- prompt 1 of 2, text 1 of 1\nz") and "\n--- prompt 2 of 2, text 1 of 1\na" in headed


def test_generate_by_beam_search(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [str(run), "--tokens", "8", "--prompt", "zeile", "9", "--beams", "3", "--length-penalty", "0"]
    lines = generated(capsys, *shared, "--num", "3")
    scores = [line["score"] for line in lines]
    assert scores[:3] == sorted(scores[:3], reverse=True) and scores[3:] == sorted(scores[3:], reverse=True)
    assert len({(line["prompt"], line["text"]) for line in lines}) == 6
    model, tokenizer = GPT.from_pretrained(run / "model").eval(), Tokenizer.load(run / "model")
    ids, start = tokenizer.encode("zeile" + lines[0]["text"]), len(tokenizer.encode("zeile"))
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert abs(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))) - scores[0]) <= 1e-4
    apart = generated(capsys, *shared, "--num", "3", "--batch-size", "1")
    assert [line["text"] for line in apart] == [line["text"] for line in lines]
    assert max(abs(a["score"] - b["score"]) for a, b in zip(apart, lines, strict=True)) <= 1e-5
    capsys.readouterr()
    assert main(["generate", *shared]) == 0
    assert f"--- prompt 1 of 2, text 1 of 1, score {scores[0]:.4f}\nzeile" in capsys.readouterr().out


# --- audit


def audit(*arguments: str) -> list[str]:
    return ["audit", "--seq-len", "12", "--device", "cpu", *arguments]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_audit_passes(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(audit("--dtype", dtype)) == 0
    said = capsys.readouterr().out
    assert "0 misses: passed" in said and "h.1.mlp.c_proj.weight" in said and f"torch.{dtype}" in said


def test_audit_of_a_trained_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--dtype", "bfloat16", "--model-dir", str(run), "--rows", "2", "--backend", "reference")
    assert main(audit(*arguments)) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 5 and "backend reference" in said and "0 misses: passed" in said


def test_audit_fails_on_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Tape.linear_backward
    monkeypatch.setattr(Tape, "linear_backward", lambda *arguments: 1.001 * original(*arguments))
    assert main(audit()) == 1
    said = capsys.readouterr().out
    assert "MISS" in said and re.search(r"\d+ tensors, [1-9]\d* misses", said)


def test_presets_are_audited_away_from_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With norm weights of 1 nobody would notice that a backward forgets them."""
    from fastlm.nn import LayerNorm

    original = LayerNorm.backward

    def forgets_its_weight(self: Any, dy: Any, tape: Any, *more: Any) -> Any:
        with torch.no_grad():
            kept = self.weight.clone()
            self.weight.fill_(1.0)
            out = original(self, dy, tape, *more)
            self.weight.copy_(kept)
        return out

    monkeypatch.setattr(LayerNorm, "backward", forgets_its_weight)
    assert main(audit()) == 1


def test_report_is_json(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 300 and report["tokens"] == 300 * 2 * 16
    assert (run / "sample.txt").read_text().startswith("zeile")
