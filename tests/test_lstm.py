"""The recurrent models: audits and their mutants, torch's own layers as an oracle, carried state, resuming, generation."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE
from models import lm_batch
from rich.console import Console
from safetensors import safe_open

from fastlm import registry, use_backend
from fastlm.cli import main
from fastlm.engine import Engine, audit, gradients, tape
from fastlm.generate import beam_search, generate
from fastlm.models import LSTM, LSTMConfig, LSTMEncoder, load
from fastlm.models import lstm as module
from fastlm.train import train
from fastlm.train.presets import LSTM_PRESETS

formulas = importlib.import_module("fastlm.ops.recurrent_math")

TINY = {"vocab_size": 61, "n_embd": 12, "n_layer": 2}
CONFIGS = {
    "lstm": {},
    "gru": {"cell": "gru"},
    "rnn": {"cell": "rnn"},
    "rnn_relu": {"cell": "rnn_relu"},
    "dropout": {"dropout": 0.2},
    "untied": {"tie_word_embeddings": False, "n_hidden": 20},
    "projected": {"n_hidden": 20, "cell": "gru", "dropout": 0.1},
    "one layer": {"n_layer": 1},
}


def _moved(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tiny(seed=0, rows=None, **options):
    """A model away from its start, with a carried state that is not 0."""
    torch.manual_seed(seed)
    model = _moved(LSTM(LSTMConfig(**(TINY | options))))
    model.carry(rows)
    for t in model.carried().values():
        t.normal_(std=0.5)
    return model


def encoder(output, lengths=True, seed=0, **options):
    """(encoder, batch) with padding."""
    torch.manual_seed(seed)
    model = _moved(LSTMEncoder(LSTMConfig(**(TINY | {"bidirectional": True} | options)), 5, output))
    sizes = torch.tensor([7, 3, 5, 1])
    targets = torch.randint(0, 5, (4, 7) if output == "tokens" else (4,))
    if output == "tokens":
        targets[torch.arange(7) >= sizes[:, None]] = -100
    batch = {"input_ids": torch.randint(0, 61, (4, 7)), "targets": targets}
    return model, batch | ({"lengths": sizes} if lengths else {})


# --- the audit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_passes(backend, config, dtype):
    if backend == "triton" and config not in ("lstm", "projected"):
        pytest.skip("the interpreter is slow; the other configurations run on the other backends")
    model = tiny(rows=2, **CONFIGS[config])
    report = audit(model, lm_batch(), dtype, backend)
    assert report.ok, report.table()
    assert len(report.rows) == 6 + len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"cell": "gru", "dropout": 0.2}, {"cell": "rnn", "bidirectional": False}], ids=str)
@pytest.mark.parametrize("output", ["tokens", "sequence"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS_HERE if b.values[0] != "triton"])
def test_encoder_passes(backend, output, options, dtype):
    report = audit(*encoder(output, seed=1, **options), dtype, backend)
    assert report.ok, report.table()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_exact_in_float64(cell):
    report = audit(tiny(cell=cell, dropout=0.2, rows=2), lm_batch(), torch.float64, "reference")
    assert max(r.error for r in report.rows) <= 1e-14, report.table()


# --- mutants: each breaks one thing by `patch`, pytest's monkeypatch, and names what the audit must miss


def _broken(patch, name, change):
    """Gradients of op `name`, by name, through `change`."""
    op = registry.get(name)
    original = op.backward

    def backward(*args):
        grads = dict(zip(op.grads, original(*args), strict=True))
        saved = dict(zip(op.saved, args[op.results :], strict=False))
        change(grads, saved)
        return tuple(grads.values())

    patch.setitem(op.__dict__, "backward", backward)


def _cell(patch, name, part, make):
    """Replace a formula of the table of cells."""
    cells = formulas.CELLS
    patch.setitem(cells[name].__dict__, part, functools.partial(make, getattr(cells[name], part)))


def wrong_forget_gate(patch):
    def back(original, d, before, after, kept):
        dx, _, passed = original(d, before, after, kept)
        wrong = (dx[0], dx[1] * (1 - kept[1]), *dx[2:])  # 1 - f a second time
        return wrong, wrong, passed

    _cell(patch, "lstm", "back", back)


def lost_cell_gradient(patch):
    def back(original, d, before, after, kept):
        dx, dr, passed = original(d, before, after, kept)
        return dx, dr, (passed[0], torch.zeros_like(passed[1]))

    _cell(patch, "lstm", "back", back)


def lost_first_state_in_the_weight(patch):
    def change(grads, saved):
        first = grads["x"][0].float()  # runs forward: the first step's rows met h0
        grads["weight"] = grads["weight"] - first.t() @ saved["h0"].float()

    _broken(patch, "lstm", change)


def lost_recurrent_bias(patch):
    original = tape.Tape.backward

    def backward(self, name, *d, **kw):
        if name == "lstm":
            kw.pop("bias")
        return original(self, name, *d, **kw)

    patch.setattr(tape.Tape, "backward", backward)


def swapped_gates(patch):
    def back(original, d, before, after, kept):
        dx, _, passed = original(d, before, after, kept)
        wrong = (dx[0], dx[1], dx[3], dx[2])
        return wrong, wrong, passed

    _cell(patch, "lstm", "back", back)


def lost_layer_dropout(patch):
    original = tape.Tape.backward

    def backward(self, name, *d, **kw):
        if name == "dropout":
            self.pop(name)
            return d[0]
        return original(self, name, *d, **kw)

    patch.setattr(tape.Tape, "backward", backward)


def carried_state_not_copied(patch):
    """Backward reads the state that the next batch begins with."""

    def first(self, batch, reset, tape):
        kept = tuple(t[:, :batch] for t in self.carried().values())
        return kept

    original = module.LSTM._first_state

    def only_on_a_tape(self, batch, reset, given):
        run = first if isinstance(given, tape.Tape) else original
        return run(self, batch, reset, given)

    patch.setattr(module.LSTM, "_first_state", only_on_a_tape)


def carried_state_of_another_row(patch):
    original = module.LSTM._keep

    def keep(self, state):
        original(self, state if torch.is_grad_enabled() else tuple(s.flip(1) for s in state))

    patch.setattr(module.LSTM, "_keep", keep)


def lost_projection(patch):
    patch.setattr(module.Linear, "backward", lambda self, dy, tape: tape.linear_backward(dy, self.weight.detach(), self.bias))


@pytest.mark.parametrize(
    "mutant",
    [
        wrong_forget_gate, lost_cell_gradient, lost_first_state_in_the_weight, lost_recurrent_bias, swapped_gates,
        lost_layer_dropout, carried_state_not_copied, carried_state_of_another_row, lost_projection,
    ],
    ids=lambda m: m.__name__,
)  # fmt: skip
def test_mutants_are_caught(mutant, monkeypatch):
    model, batch = tiny(dropout=0.2, n_hidden=20, rows=2), lm_batch(batch=4)
    assert audit(model, batch, backend="reference").ok
    mutant(monkeypatch)
    assert not audit(model, batch, backend="reference").ok


def lost_reset_gate_in_the_recurrent_part(patch):
    def back(original, d, before, after, kept):
        dx, _, passed = original(d, before, after, kept)
        return dx, dx, passed

    _cell(patch, "gru", "back", back)


def lost_update_gate_path(patch):
    def back(original, d, before, after, kept):
        dx, dr, passed = original(d, before, after, kept)
        return dx, dr, (torch.zeros_like(passed[0]),)

    _cell(patch, "gru", "back", back)


def not_reversed_in_backward(patch):
    original = formulas.backward
    patch.setattr(formulas, "backward", lambda *args: original(*args[:-1], False))


def lost_second_direction(patch):
    original = tape.Tape.linear_backward
    calls = itertools.count()

    def linear_backward(self, dy, weight, bias):
        dx = original(self, dy, weight, bias)
        return dx.zero_() if next(calls) % 4 == 0 else dx  # of two layers in two directions the first to go backward

    patch.setattr(tape.Tape, "linear_backward", linear_backward)


@pytest.mark.parametrize(
    "mutant",
    [lost_reset_gate_in_the_recurrent_part, lost_update_gate_path, not_reversed_in_backward, lost_second_direction],
    ids=lambda m: m.__name__,
)
@pytest.mark.parametrize("output", ["tokens", "sequence"])
def test_mutants_of_the_encoder_are_caught(mutant, output, monkeypatch):
    model, batch = encoder(output, cell="gru")
    assert audit(model, batch, backend="reference").ok
    mutant(monkeypatch)
    assert not audit(model, batch, backend="reference").ok


# --- against torch's own layers


class Theirs(torch.nn.Module):
    """The language model in plain PyTorch, with the parameters' names of ours."""

    def __init__(self, config):
        super().__init__()
        made = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[config.cell]
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = made(config.n_embd, config.width, config.n_layer)
        self.lm_head = torch.nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, ids, targets, state):
        y, state = self.layers(self.wte(ids.t()), state)
        loss = F.cross_entropy(self.lm_head(y).flatten(0, 1), targets.t().flatten(), reduction="mean")
        return loss, state


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS_HERE if b.values[0] != "triton"])
def test_equals_torch(backend, cell):
    """Loss and every gradient, from a carried state."""
    ours = tiny(cell=cell, tie_word_embeddings=False, n_hidden=20, rows=3)
    theirs = Theirs(ours.config)
    theirs.load_state_dict(ours.state_dict())
    batch = lm_batch()
    state = tuple(t.clone() for t in ours.carried().values())
    loss, _ = theirs(*batch.values(), state if cell == "lstm" else state[0])
    loss.backward()
    with use_backend(backend):
        mine, grads = gradients(ours, batch)
    assert abs(mine.item() - loss.item()) <= 1e-5 * loss.item()
    for name, p in theirs.named_parameters():
        error = (grads[name] - p.grad).abs().max().item()
        assert error <= 1e-5 * p.grad.abs().max().item(), (name, error)


# --- truncated back-propagation through time


def _stream(rows, seq, batches, seed=3):
    ids = torch.randint(0, 61, (rows, seq * batches + 1), generator=torch.Generator().manual_seed(seed))
    windows = [slice(i * seq, (i + 1) * seq) for i in range(batches)]
    return [{"input_ids": ids[:, w], "targets": ids[:, w.start + 1 : w.stop + 1]} for w in windows]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_state_is_carried_through_batches_and_micro_batches(cell):
    """Without updates the losses of windows are those of one long sequence, also by micro-batches of one step."""
    model = tiny(cell=cell)
    model.carry(3)
    parts = _stream(3, 5, 4)
    whole = {k: torch.cat([p[k] for p in parts], 1) for k in parts[0]}
    right = tiny(cell=cell).eval()(**whole).item()
    model.train()
    with torch.no_grad():
        losses = [model(**p).item() for p in parts]
        again = model(**parts[0]).item()
        model.carry(3)
        losses_after_reset = model(**parts[0]).item()
    assert abs(sum(losses) / 4 - right) <= 1e-5 * right
    assert losses_after_reset == losses[0] != again
    engine = Engine(tiny(cell=cell), device="cpu")
    engine.model.carry(3)
    stats = engine.step(parts, lr=0.0)
    assert abs(stats.loss.item() - right) <= 1e-5 * right


def test_resuming_is_bitwise():
    """The carried state is part of the engine's: a run that is interrupted goes on as one that is not."""
    parts = _stream(2, 5, 6)
    engine = Engine(tiny(rows=2, dropout=0.3), device="cpu", seed=1)
    for part in parts[:3]:
        engine.step([part])
    state = {k: t.clone() for k, t in engine.state_dict().items()}
    assert {"model.carried_0", "model.carried_1"} <= state.keys()
    losses = [engine.step([part]).loss.item() for part in parts[3:]]
    other = Engine(tiny(seed=7, rows=2, dropout=0.3), device="cpu", seed=2)
    other.load_state_dict(state)
    assert [other.step([part]).loss.item() for part in parts[3:]] == losses
    for name, t in other.state_dict().items():
        assert torch.equal(t, engine.state_dict()[name]), name


def test_reset_evaluation_and_fewer_rows():
    model = tiny(rows=3)
    before = {k: t.clone() for k, t in model.carried().items()}
    batch = lm_batch()
    with torch.no_grad():
        model.eval()
        right = model(batch["input_ids"])
        assert all(torch.equal(t, before[k]) for k, t in model.carried().items())
        model.train()
        fewer = model(batch["input_ids"][:2])
        assert all(torch.equal(t[:, 2], before[k][:, 2]) for k, t in model.carried().items())
        for k, t in model.carried().items():
            t.copy_(before[k])
        mine = model(batch["input_ids"], reset=torch.tensor([False, True, False]))
    torch.testing.assert_close(mine[1], right[1])
    torch.testing.assert_close(mine[0], fewer[0])
    assert (mine[0] - right[0]).abs().max().item() > 1e-3
    with pytest.raises(ValueError, match=r"input_ids: got 4 rows; allowed: the 3 that carry"):
        model(torch.zeros(4, 2, dtype=torch.int64))


def test_audits_a_reset():
    batch = lm_batch() | {"reset": torch.tensor([True, False, True])}
    assert audit(tiny(rows=2), batch).ok


# --- generation and directories


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_steps_equal_the_whole_sequence(cell):
    """Prompts of different lengths, steps, and a reordering of rows as beam search makes it."""
    model = tiny(cell=cell).eval()
    prompts = [[3, 4, 5], [7], [8, 9, 1, 2]]
    logits, state = model.prefill(prompts, 10)
    texts = [list(p) for p in prompts]
    for step in range(3):
        for row, text in enumerate(texts):
            right = model(torch.tensor([text]))[0, -1]
            torch.testing.assert_close(logits[row], right, rtol=1e-4, atol=1e-5)
        if step == 1:
            rows = torch.tensor([2, 2, 0, 1])
            state.reorder(rows)
            texts = [list(texts[r]) for r in rows]
            logits = logits[rows]
        tokens = logits.argmax(-1) if step else torch.tensor([11, 12, 13])
        texts = [[*t, int(i)] for t, i in zip(texts, tokens, strict=True)]
        logits = model.step(state, tokens)


def test_generates():
    """Greedy text and beams of prompts of different lengths, against reading the whole text anew for every token."""
    model = tiny().eval()
    prompts = [[3, 4, 5], [7], [8, 9, 1, 2]]
    right = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(6):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        right.append(text[len(prompt) :])
    assert generate(model, prompts, 6, temperature=0.0) == right
    assert [h[0].tokens for h in beam_search(model, prompts, 6, beams=1)] == right
    for prompt, found in zip(prompts, beam_search(model, prompts, 4, beams=3, n_best=3), strict=True):
        for tokens, score in found:
            logp = model(torch.tensor([[*prompt, *tokens]]))[0].log_softmax(-1)
            right_score = sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(tokens)) / len(tokens)
            assert abs(score - right_score) <= 1e-5


def test_directories(tmp_path):
    model = tiny(cell="gru", n_hidden=20).eval()
    model.save_pretrained(tmp_path)
    again = LSTM.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    ids = lm_batch()["input_ids"]
    assert torch.equal(model(ids), again(ids))
    assert again.lm_head.weight is again.wte.weight


# --- the command line


def _config(tmp_path, name, **model):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(300)))
    preset = LSTM_PRESETS["tiny"]
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, data=(str(text),), tokenizer="bytes", seq_len=16, validation_fraction=0.1),
        model=dataclasses.replace(preset.model, n_embd=16, **model),
        optimizer=dataclasses.replace(preset.optimizer, steps=8, batch_size=3, grad_accum=2, warmup=2),
        run=dataclasses.replace(
            preset.run, out=str(tmp_path / name), eval_every=4, save_every=4, eval_batches=2, sample_tokens=5, keep=3
        ),
    )


def test_a_run_from_its_middle_ends_the_same(tmp_path):
    """Carried state and contiguous rows are restored: a resumed run writes the same bytes."""
    said = io.StringIO()
    config = _config(tmp_path, "run", dropout=0.2)
    assert train(config, Console(file=said, width=500)) == 0
    assert "0 misses: passed" in said.getvalue()
    out = tmp_path / "run"
    last = out / "checkpoints" / "step-00000008"
    whole = [(last / name).read_bytes() for name in ("model.safetensors", "state.safetensors")]
    with safe_open(last / "state.safetensors", "pt") as file:
        carried = [file.get_tensor(f"engine.model.carried_{i}") for i in range(2)]
    assert all(t.shape == (2, 3, 16) and t.abs().max() > 1e-3 for t in carried)
    shutil.rmtree(last)
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    assert train(resumed, Console(file=said, width=500)) == 0
    assert "resumed at step 4" in said.getvalue()
    assert [(last / name).read_bytes() for name in ("model.safetensors", "state.safetensors")] == whole
    assert isinstance(load(out / "model"), LSTM)


def test_commands(tmp_path, capsys):
    """Shuffled windows without a carried state; text from the run; the audit; options of another model are refused."""
    assert train(_config(tmp_path, "run", cell="gru", carry=False), Console(file=io.StringIO())) == 0
    assert main(["generate", str(tmp_path / "run"), "--prompt", "line 3", "--tokens", "4", "--beams", "2"]) == 0
    assert main(["audit", "--model", "lstm", "--cell", "gru", "--seq-len", "5", "--dtype", "float32"]) == 0
    assert main(["audit", "--model-dir", str(tmp_path / "run"), "--seq-len", "5", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.count("0 misses: passed") == 2
    for bad, text in [
        (["train", "--model", "lstm", "--norm", "rms"], "--norm: got rms, allowed: layer for --model lstm"),
        (["train", "--cell", "gru"], "--cell: got gru, allowed: lstm for --model gpt"),
        (["train", "--model", "lstm", "--preset", "gpt2"], "--preset: got gpt2, allowed: small, tiny for --model lstm"),
    ]:
        assert main(bad) != 0
        assert text in capsys.readouterr().err


def test_refuses():
    for bad, text in [
        ({"cell": "qrnn"}, r"LSTMConfig.cell: got 'qrnn'; allowed: lstm, gru"),
        ({"dropout": 1.0}, r"LSTMConfig.dropout"), ({"n_hidden": 0}, r"LSTMConfig.n_hidden"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            LSTMConfig(**bad)
    with pytest.raises(ValueError, match="bidirectional: got True for a language model"):
        LSTM(LSTMConfig(bidirectional=True))
    with pytest.raises(ValueError, match=r"output: got 'words'; allowed: tokens, sequence"):
        LSTMEncoder(LSTMConfig(), 3, "words")
