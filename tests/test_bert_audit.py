"""The audit passes for every head and switch of BERT, and catches every way in which its backward is broken here."""

from __future__ import annotations

import functools

import pytest
import torch
from bert_models import KINDS, NO_DROPOUT, bert_batch, tiny_bert
from conftest import BACKENDS_HERE

from fastlm import registry
from fastlm.engine import audit
from fastlm.engine.tape import Tape
from fastlm.models import bert, bert_heads
from fastlm.nn import LayerNorm

CONFIGS = {
    "post-norm": {},
    "no dropout": NO_DROPOUT,
    "pre-norm, rotary": {"pre_norm": True, "rotary": True},
    "pre-norm, untied": {"pre_norm": True, "tie_word_embeddings": False, **NO_DROPOUT},
    "rotary, relu": {"rotary": True, "hidden_act": "relu", "classifier_dropout": 0.3},
    "tanh, one layer": {"hidden_act": "gelu_tanh", "num_hidden_layers": 1, "num_attention_heads": 1},
}
# Every head with both kinds of norm; every other switch with one head.
CASES = [(kind, config) for kind in KINDS for config in ("post-norm", "pre-norm, rotary")]
CASES += [("pretraining", c) for c in ("no dropout", "pre-norm, untied", "tanh, one layer")]
CASES += [("sequence", "rotary, relu"), ("token", "tanh, one layer")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "config"), CASES)
@pytest.mark.parametrize("backend", [b for b in BACKENDS_HERE if b.values != ("triton",)])
def test_passes(backend, kind, config, dtype):
    model = tiny_bert(kind, **CONFIGS[config])
    report = audit(model, bert_batch(kind, rows=8), dtype, backend)
    assert report.ok, report.table()
    assert len(report.rows) == 6 + len(list(model.parameters()))


@pytest.mark.backend("triton")
def test_passes_on_triton():
    model = tiny_bert("pretraining", num_hidden_layers=1)
    report = audit(model, bert_batch("pretraining", rows=2), torch.float32, "triton")
    assert report.ok, report.table()


@pytest.mark.parametrize("kind", KINDS)
def test_exact_in_float64(kind):
    """In float64 the hand-written gradients equal autograd's to rounding, so the formulas are right, not only close."""
    report = audit(tiny_bert(kind), bert_batch(kind), torch.float64, "reference")
    vanishing = ("encoder.layers.1.ln_2.bias", "qa_outputs.bias") if kind == "question" else ()
    assert max(r.error for r in report.rows if r.name not in vanishing) <= 1e-13, report.table()


def test_terms_are_counted_apart_over_micro_batches():
    """Two halves with different numbers of masked tokens and of pairs have the gradient of the whole."""
    from fastlm.engine import gradients

    model, batch = tiny_bert("pretraining", **NO_DROPOUT).double(), bert_batch("pretraining", rows=6)
    batch["targets"][:3, 1:] = -100
    batch["next_sentence"][4:] = -100
    loss, whole = gradients(model, batch)
    expected = model(**batch)
    expected.backward()
    assert abs(loss - expected).item() <= 1e-12
    assert all((whole[n] - p.grad).abs().max() <= 1e-12 for n, p in model.named_parameters())
    assert audit(model.float(), batch).ok


# --- mutants: each breaks one thing by `patch`, pytest's monkeypatch


def lost_pooler_path(patch):
    original = bert.Pooler.backward
    patch.setattr(bert.Pooler, "backward", lambda self, dy, tape: original(self, dy, tape).zero_())


def pooler_without_tanh(patch):
    def backward(self, dy, tape):
        tape.pop("tanh")
        return self.dense.backward(dy, tape)

    patch.setattr(bert.Pooler, "backward", backward)


def detached_next_sentence(patch):
    original = Tape.backward

    def backward(self, name, *d, **more):
        found = original(self, name, *d, **more)
        return found.zero_() if name == "cross_entropy" else found

    patch.setattr(Tape, "backward", backward)


def terms_swapped(patch):
    original = bert_heads.BERTForPreTraining.backward
    patch.setattr(Tape, "term", lambda self, number: None)
    patch.setattr(bert_heads.BERTForPreTraining, "backward", lambda self, d, tape: original(self, (d[1], d[0]), tape))


def lost_segment_gradient(patch):
    op = registry.get("embedding_layer_norm")
    original = op.backward

    def backward(*args):
        found = list(original(*args))
        found[2] = found[2].zero_()
        return tuple(found)

    patch.setitem(op.__dict__, "backward", backward)


def doubled_gather_gradient(patch):
    original = bert_heads.MaskedLMHead.backward

    def backward(self, d_loss, table, d_hidden, tape):
        original(self, d_loss, table, d_hidden, tape)
        d_hidden.mul_(2)

    patch.setattr(bert_heads.MaskedLMHead, "backward", backward)


def lost_decoder_bias(patch):
    original = Tape.backward

    def backward(self, name, *d, **more):
        if name == "linear_cross_entropy":
            more.pop("bias")
        return original(self, name, *d, **more)

    patch.setattr(Tape, "backward", backward)


def wrong_rows_gathered(patch):
    original = bert_heads._rows
    back = bert_heads.MaskedLMHead.backward

    def rows(positions, seq, tape):
        found = original(positions, seq, tape)
        if isinstance(tape, Tape):
            tape.shifted = found
        return found

    def backward(self, d_loss, table, d_hidden, tape):
        tape.shifted.copy_(tape.shifted.roll(1, 1))  # what backward scatters by
        back(self, d_loss, table, d_hidden, tape)

    patch.setattr(bert_heads, "_rows", rows)
    patch.setattr(bert_heads.MaskedLMHead, "backward", backward)


def lost_residual_of_post_norm(patch):
    original = LayerNorm.add_backward

    def add_backward(self, dy, d_sum, tape, x_bias=None):
        found = original(self, dy, d_sum, tape, x_bias)
        return found if not isinstance(found, tuple) else (found[0], found[1].mul_(0.5))

    patch.setattr(LayerNorm, "add_backward", add_backward)


def mean_pooling_without_lengths(patch):
    original = Tape.backward

    def backward(self, name, *d, **more):
        if name == "attention" and set(more.get("into", {})) == {"v"}:
            _, (saved, options) = self._entries[-1]
            at = registry.get("attention").saved.index("key_lengths")
            self._entries[-1] = name, ((*saved[:at], None, *saved[at + 1 :]), options)
        return original(self, name, *d, **more)

    patch.setattr(Tape, "backward", backward)


def normalisation_without_its_scale(patch):
    original = bert_heads.BERTForSentenceEmbedding._embed_backward

    def embed_backward(self, d, tape):
        original(self, d * 1.5, tape)

    patch.setattr(bert_heads.BERTForSentenceEmbedding, "_embed_backward", embed_backward)


def lost_other_of_a_pair(patch):
    original = torch.mm

    def mm(a, b, *, out=None):
        return original(a, b, out=out).zero_() if out is not None else original(a, b)

    patch.setattr(torch, "mm", mm)


def answer_ends_swapped(patch):
    original = bert_heads._new

    def backward(self, d_loss, tape):
        d = tape.backward("cross_entropy", d_loss).flip(1).transpose(1, 2)
        self.encoder.backward(self.qa_outputs.backward(original(d, tape).copy_(d), tape), tape)

    patch.setattr(bert_heads.BERTForQuestionAnswering, "backward", backward)


def lost_classifier_bias(patch):
    original = Tape.linear_backward

    def linear_backward(self, dy, weight, bias, *more):
        return original(self, dy, weight, None if weight.shape[0] == 3 else bias, *more)

    patch.setattr(Tape, "linear_backward", linear_backward)


MUTANTS = {
    lost_pooler_path: "sequence",
    pooler_without_tanh: "sequence",
    lost_classifier_bias: "sequence",
    detached_next_sentence: "pretraining",
    terms_swapped: "pretraining",
    lost_segment_gradient: "masked",
    doubled_gather_gradient: "pretraining",
    lost_decoder_bias: "masked",
    wrong_rows_gathered: "masked",
    lost_residual_of_post_norm: "token",
    mean_pooling_without_lengths: "embedding",
    normalisation_without_its_scale: "embedding",
    lost_other_of_a_pair: "embedding",
    answer_ends_swapped: "question",
}


@functools.cache
def _healthy(kind, dtype):
    return audit(tiny_bert(kind), bert_batch(kind, rows=8), dtype, "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_catches(mutant, dtype, monkeypatch):
    kind = MUTANTS[mutant]
    assert _healthy(kind, dtype).ok, _healthy(kind, dtype).table()
    mutant(monkeypatch)
    report = audit(tiny_bert(kind), bert_batch(kind, rows=8), dtype, "reference")
    assert not report.ok, f"{mutant.__name__} went through\n{report.table(5)}"
