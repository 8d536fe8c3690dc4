"""Recomputation in BERT with each of its heads: the same numbers to the last bit, and less memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from bert_models import KINDS, bert_batch, tiny_bert
from conftest import BACKENDS_HERE

import fastlm
from fastlm.engine import AdamWConfig, Engine, audit
from fastlm.engine.tape import Tape
from fastlm.models.bert import Layer

FORMS = {"post-norm": {}, "pre-norm": {"pre_norm": True, "rotary": True}}


def _model(kind: str, recompute: str, **options):
    model = tiny_bert(kind, **options)
    model.recompute = recompute
    return model


def _after_steps(model, kind: str, dtype: torch.dtype = torch.float32, backend: str = "reference", steps: int = 2):
    """Everything that steps of two micro-batches leave behind; models have dropout everywhere."""
    engine = Engine(model, AdamWConfig(lr=1e-2), dtype, backend=backend, seed=5)
    stats = []
    for i in range(steps):
        found = engine.step([bert_batch(kind, seed=i), bert_batch(kind, seed=i + 50)])
        stats.append(torch.stack(found[:2]).clone())
    return {**engine.state_dict(), "stats": torch.stack(stats)}


def _differ(a, b) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS_HERE if b.values[0] != "triton"])
def test_every_number_is_the_same_to_the_last_bit(backend, form, dtype):
    kept = _after_steps(_model("pretraining", "none", **FORMS[form]), "pretraining", dtype, backend)
    assert kept["stats"].isfinite().all() and kept["exp_avg"].any()
    for recompute in ("mlp", "block"):
        again = _model("pretraining", recompute, **FORMS[form])
        assert not _differ(kept, _after_steps(again, "pretraining", dtype, backend)), recompute


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_head(kind):
    kept, again = (_after_steps(_model(kind, r), kind, steps=1) for r in ("none", "block"))
    assert kept["exp_avg"].any() and not _differ(kept, again)


@pytest.mark.parametrize("recompute", ["mlp", "block"])
@pytest.mark.parametrize("form", FORMS)
def test_the_audit_passes(form, recompute):
    report = audit(_model("pretraining", recompute, **FORMS[form]), bert_batch("pretraining"), torch.bfloat16)
    assert report.ok, report.table(limit=5)


def _a_layer(form: str, recompute: str) -> float:
    """What a further layer costs a step, in activations of (rows, width)."""
    rows, seq, width, dtype = 4, 16, 64, torch.float32

    def planned(layers: int) -> int:
        shape = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 4 * width}
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        options = shape | no_dropout | FORMS[form] | {"num_hidden_layers": layers}
        engine = Engine(_model("token", recompute, **options), dtype=dtype)
        engine.flat.loan = None  # all activations in the arena's own memory
        engine.step([bert_batch("token", rows, seq)])
        return engine.arena.planned_bytes

    return (planned(6) - planned(4)) / 2 / (rows * seq * width * dtype.itemsize)


@pytest.mark.parametrize("form", FORMS)
def test_memory_falls_by_what_is_not_kept(form):
    """mlp: without 4 activations before and 4 behind the activation. block: with what comes in alone."""
    none, mlp, block = (_a_layer(form, r) for r in ("none", "mlp", "block"))
    assert abs(none - mlp - 8) <= 0.2, (none, mlp)
    assert block == {"post-norm": 1, "pre-norm": 2}[form]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="recompute: got 'all'; allowed: none, mlp, block"):
        tiny_bert("masked").recompute = "all"


# --- mutants


def _without_lengths(self, branch, x, lengths, tape=None, real=Layer.forward):
    again = isinstance(tape, Tape) and tape._enough is not None
    return real(self, branch, x, None if again else lengths, tape)


def _in_evaluation(self, branch, x, lengths, tape=None, real=Layer.forward):
    again = isinstance(tape, Tape) and tape._enough is not None
    self.train(not again)
    try:
        return real(self, branch, x, lengths, tape)
    finally:
        self.train()


def _never_first(self, d_branch, dx, tape, first=False, real=Layer.backward):
    return real(self, d_branch, dx, tape)


def _loses_the_branch(self, d_branch, dx, tape, first=False, real=Layer.backward):
    d_branch, dx = real(self, d_branch, dx, tape, first)
    return None if d_branch is None else torch.zeros_like(d_branch), dx


MUTANTS = [
    ("post-norm", "forward", _without_lengths), ("post-norm", "forward", _in_evaluation),
    ("pre-norm", "forward", _without_lengths), ("pre-norm", "backward", _never_first),
    ("pre-norm", "backward", _loses_the_branch),
]  # fmt: skip


@pytest.mark.parametrize(("form", "method", "mutant"), MUTANTS, ids=[f"{f}-{m.__name__.strip('_')}" for f, _, m in MUTANTS])
def test_mutants_are_caught(form, method, mutant):
    """By the comparison of bits, and by the audit."""
    kind = "masked"
    kept = _after_steps(_model(kind, "none", **FORMS[form]), kind, steps=1)
    with mock.patch.object(Layer, method, mutant), fastlm.use_backend("reference"):
        try:
            differ = _differ(kept, _after_steps(_model(kind, "block", **FORMS[form]), kind, steps=1))
            passed = audit(_model(kind, "block", **FORMS[form]), bert_batch(kind)).ok
        except RuntimeError as error:  # a pass that does not mirror the other may end there
            differ, passed = [str(error)], False
    assert differ, "the same bits"
    assert not passed
