"""Steps that are taken from the list of their calls, on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_models import bert_batch, tiny_bert
from models import LLAMA, T5, lm_batch, tiny_encoder_decoder, tiny_gpt

from fastlm import native
from fastlm.engine import AdamWConfig, Engine, gemm
from fastlm.engine.capture import CallList
from fastlm.engine.tape import Tape
from fastlm.models import LSTM, LSTMConfig
from fastlm.tasks.sequence_to_sequence import SequenceToSequence

pytestmark = [
    pytest.mark.backend("cpu"),
    pytest.mark.skipif(bool(native.why_not("cpu")), reason="no C++ kernels"),
]


def _lstm():
    torch.manual_seed(0)
    model = LSTM(LSTMConfig(61, 12, 2, dropout=0.1))
    model.carry(3)
    return model


def _recomputing(kind):
    model = tiny_gpt(resid_pdrop=0.1)
    model.recompute = kind
    return model


def _packed(*_, seed: int = 1):
    """Pairs of other lengths each time, one after the other in rows of one size."""
    task = SequenceToSequence(61, 12, start_id=1, end_id=2, pad_id=0)
    return task.random(3, 12, torch.Generator().manual_seed(seed))


def _lengths(*_, seed: int = 1):
    batch = lm_batch(3, 9, seed=seed)
    return batch | {"lengths": torch.tensor([9 - (seed + i) % 5 for i in range(3)])}


MODELS = {
    "gpt": (lambda: tiny_gpt(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1), lm_batch),
    "recompute": (lambda: _recomputing("block"), lm_batch),
    "llama": (lambda: tiny_gpt(**LLAMA), lm_batch),
    "lstm": (_lstm, lm_batch),
    "bert": (lambda: tiny_bert("pretraining"), lambda *a, seed=1: bert_batch("pretraining", seed=seed)),
    "transformer": (lambda: tiny_encoder_decoder(vocab_size=61, resid_pdrop=0.1), lm_batch),
    "packed": (lambda: tiny_encoder_decoder(vocab_size=61, resid_pdrop=0.1), _packed),
    "lengths": (lambda: tiny_encoder_decoder(vocab_size=61), _lengths),
    "t5": (lambda: tiny_encoder_decoder(vocab_size=61, **T5), lm_batch),
}


def _calls(engine: Engine) -> list[CallList]:
    return [calls for calls, *_ in engine._captured.values()]


class _Counted:
    """How often Python ran the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(lambda *_: self._add())

    def _add(self) -> None:
        self.count += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_captured_steps_have_the_same_bits(kind, dtype):
    """New batches, rates and dropout in each, two micro-batches, evaluations and larger shapes in between."""
    make, batch = MODELS[kind]
    found = []
    for capture in (False, True):
        engine = Engine(make(), AdamWConfig(lr=1e-2), dtype, capture=capture, seed=3)
        python, said = _Counted(engine.model), []
        for s in range(9):
            stats = engine.step([batch(seed=2 * s), batch(seed=2 * s + 1)], lr=1e-2 / (s + 1))
            said += [t.item() for t in stats]
            if s in (4, 6):  # a new plan, for which the memory is given up
                said += [t.sum().item() for t in engine.evaluate(batch(3, 8 + s, seed=s))]
        found.append((said, {n: t.clone() for n, t in engine.state_dict().items()}, python.count))
        if capture:
            assert [calls.refused for calls in _calls(engine)] == [""]
    (said, state, eager), (same, captured, few) = found
    assert said == same
    for name, t in state.items():
        assert torch.equal(t, captured[name]), name
    assert eager == 2 * 9 + 2
    plans = 1 if kind in ("bert", "packed", "lengths") else 2  # their batches are all of one shape
    assert few == 2 * (3 + plans) + 2, "the third step and those after a new plan run through Python, the others do not"


@pytest.mark.parametrize("kind", ["gpt", "bert", "lstm"])
def test_captured_evaluations_have_the_same_bits(kind):
    """Of the weights as they are by then, with steps of the same memory in between."""
    make, batch = MODELS[kind]
    found = []
    for capture in (False, True):
        engine = Engine(make(), AdamWConfig(lr=1e-2), torch.bfloat16, capture=capture)
        python, said = _Counted(engine.model), []
        for s in range(8):
            said += [t.sum().item() for t in engine.evaluate(batch(seed=s))]
            said += [t.item() for t in engine.step([batch(seed=50 + s)])]
        count = python.count
        if kind == "gpt":  # another shape has calls of its own
            said += [t.item() for t in engine.evaluate(batch(2, 5))]
        found.append((said, count))
        assert engine.model.training
    assert found[0] == (found[1][0], 16)
    # the first step's plan comes between the first two evaluations, and with it new memory
    assert found[1][1] == 2 * 3


def test_what_python_decides_is_asked_for_again():
    """Other options of the optimizer, another shape, other carried tensors: each has calls of its own."""
    engines = [Engine(_lstm(), AdamWConfig(lr=1e-2), capture=capture) for capture in (True, False)]

    def same(*args) -> bool:
        return len({engine.step([lm_batch(*args)]).loss.item() for engine in engines}) == 1

    assert all(same() for _ in range(5))
    for engine in engines:
        engine.optimizer = dataclasses.replace(engine.optimizer, betas=(0.5, 0.6), max_norm=0.1, weight_decay=0.5)
    assert all(same() for _ in range(5))
    for engine in engines:
        engine.model.carry(3)
    assert all(same() for _ in range(5))
    assert all(same(2, 9) for _ in range(5)) and all(same() for _ in range(5))
    assert torch.equal(engines[0].flat.master, engines[1].flat.master)


class _Wrapped(torch.nn.Module):
    """A model with something of the user's before it."""

    def __init__(self, before):
        super().__init__()
        self.inner, self.before = tiny_gpt(), before

    def forward(self, input_ids, targets, **options):
        return self.inner(self.before(input_ids), targets, **options)

    def units(self, batch, tape):
        return self.inner.units(batch, tape)

    def backward(self, d_loss, tape):
        return self.inner.backward(d_loss, tape)


@pytest.mark.parametrize(
    ("before", "most", "why"),
    [
        (lambda ids: ids.clamp(max=int(ids.max().item()) - 1), None, "values of tensors"),
        (lambda ids: (ids + ids.flatten().tolist()[0]) % 61, None, "values of tensors"),
        (lambda ids: (ids + int(ids.numpy().max())) % 61, None, "values of tensors"),
        (lambda ids: (ids + int(np.asarray(ids).max())) % 61, None, "values of tensors"),
        (lambda ids: (ids + 7) % 61, None, ""),
        (lambda ids: (ids + 7) % 61, 200, "more than 200 bytes"),
        (lambda ids: ids.flip(0).contiguous().clamp_(max=30), None, ""),
    ],
    ids=["item", "tolist", "numpy", "asarray", "makes", "makes much", "writes"],
)
def test_what_pytorch_does_in_a_model_is_done_again_or_all_of_it_runs_as_it_comes(monkeypatch, before, most, why):
    if most is not None:
        monkeypatch.setattr("fastlm.engine.capture._MOST", most)
    engine, plain = Engine(_Wrapped(before)), Engine(_Wrapped(before), capture=False)
    python = _Counted(engine.model)
    for s in range(6):
        assert engine.step([lm_batch(seed=s)]).loss.item() == plain.step([lm_batch(seed=s)]).loss.item()
    (calls,) = _calls(engine)
    assert why in calls.refused if why else not calls.refused
    assert (python.count, len(calls) == 0) == ((6, True) if why else (3, False))


def test_steps_of_plain_pytorch_run_as_they_come():
    engine = Engine(tiny_gpt(n_embd=96, n_head=3), backend="reference")
    python = _Counted(engine.model)
    for s in range(5):
        engine.step([lm_batch(8, 16, seed=s)])
    (calls,) = _calls(engine)
    assert calls.refused and python.count == 5


def test_an_error_is_the_same_and_leaves_the_engine_usable():
    engines = [Engine(tiny_gpt(), AdamWConfig(lr=1e-2), capture=capture) for capture in (True, False)]
    bad = lm_batch()
    bad["targets"][1, 1] = 99
    for s in range(8):
        texts = set()
        for engine in engines:
            if s in (0, 5):
                with pytest.raises(IndexError, match="target: got 99") as raised:
                    engine.step([copy.deepcopy(bad)])
                texts.add(str(raised.value))
                for memory in (engine.arena.buffer, engine.flat.grad.view(torch.uint8)):
                    if memory is not None:
                        memory.fill_(0xAB)
                gemm.product(torch.ones(50, 60), torch.ones(60, 70), torch.empty(50, 70))
                assert engine.arena.buffer is None or engine.arena.buffer.eq(0xAB).all()
                assert engine.flat.grad.view(torch.uint8).eq(0xAB).all(), "kernels still work in the step's memory"
                engine.flat.grad.zero_()
            else:
                texts.add(str(engine.step([lm_batch(seed=s)]).loss.item()))
        assert len(texts) == 1
    assert torch.equal(engines[0].flat.master, engines[1].flat.master)


def test_many_shapes_are_not_all_kept(monkeypatch):
    monkeypatch.setattr("fastlm.engine.core._MOST_CAPTURED", 2)
    engine, plain = Engine(tiny_gpt()), Engine(tiny_gpt(), capture=False)
    for s in range(16):
        batch = lm_batch(2, 6 + s % 4, seed=s)
        assert engine.step([batch]).loss.item() == plain.step([batch]).loss.item()
    assert len(_calls(engine)) == 2


def test_memory_is_that_of_one_buffer():
    """Calls on memory that was given up are given up with it."""
    engine = Engine(tiny_gpt())
    for _ in range(3):
        engine.step([lm_batch()])
    assert len(_calls(engine)) == 1
    engine.evaluate(lm_batch(4, 12))
    assert not _calls(engine)


def test_a_profile_sees_every_call():
    engine = Engine(tiny_gpt())
    python = _Counted(engine.model)
    for _ in range(4):
        engine.step([lm_batch()])
    seen = python.count
    engine.tape_class = type("Watching", (Tape,), {})
    engine.step([lm_batch()])
    assert (seen, python.count) == (3, 4)


def test_capturing_loads_no_compiler():
    """PyTorch would load its own to keep it out of what watches operations: 146 MiB."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from models import lm_batch, tiny_gpt
from fastlm.engine import Engine
engine = Engine(tiny_gpt())
for _ in range(5):
    engine.step([lm_batch()])
assert len(engine._captured) == 1
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], check=True, timeout=300)
