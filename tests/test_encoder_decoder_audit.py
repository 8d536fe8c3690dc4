"""EncoderDecoder's hand-written backward: the audit of every switch, mutants it must catch, and packed batches."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import BACKENDS_HERE
from models import T5, T5_V1_1, tiny_encoder_decoder, translation_batch

from fastlm import use_backend
from fastlm.engine import AdamWConfig, Engine, audit, gradients, tape
from fastlm.models import encoder_decoder_stack as stacks
from fastlm.nn import CrossAttention

DROPOUT = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "inner_pdrop": 0.1, "final_pdrop": 0.1}
VARIANTS = {
    "transformer": {},
    "smoothed": {"label_smoothing": 0.1},
    "pre-norm": {"pre_norm": True, "activation": "gelu"},
    "post-norm with a norm at the end": {"final_norm": True, "activation": "silu"},
    "learned positions": {"position": "learned", "scale_embedding": False},
    "learned positions, scaled": {"position": "learned", "n_decoder_layer": 1},
    "vocabularies of their own": {"tie_source_target": False, "target_vocab_size": 43, "vocab_size": 41},
    "untied": {"tie_source_target": False, "tie_word_embeddings": False, "logit_bias": True},
    "dropout": DROPOUT | {"label_smoothing": 0.1, "activation": "gelu_tanh"},
    "rms, swiglu, other heads": {"norm": "rms", "activation": "swiglu", "head_dim": 10, "n_inner": 36, "bias": False},
    "t5": T5,
    "t5 1.1": T5_V1_1,
    "t5 1.1 with dropout": T5_V1_1 | DROPOUT | {"label_smoothing": 0.1},
    "relative post-norm": {"position": "relative", "relative_buckets": 8, "relative_max_distance": 5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_audit_passes(backend, variant, dtype):
    if backend == "triton" and (variant != "t5 1.1 with dropout" or dtype != torch.float32):
        pytest.skip("the interpreter is slow; the other variants run on the other backends")
    options = dict(VARIANTS[variant])
    if dtype == torch.bfloat16 and options.get("activation", "relu") == "relu":
        # ReLU's derivative jumps: a rounding that carries an input over 0 changes it by 1, which no budget foresees.
        options["activation"] = "gelu"
    # A share of the budget is the ratio of two largest roundings, which at these sizes scatters around 0.7, rarely over 1;
    # what is wrong (see the mutants) takes 10 budgets and more of every seed.
    reports = (audit(tiny_encoder_decoder(s, **options), translation_batch(seed=s), dtype, backend) for s in (1, 2))
    tables = []
    for report in reports:
        if report.ok:
            return
        tables.append(report.table())
    pytest.fail("\n".join(tables))


@pytest.mark.parametrize("variant", ["dropout", "t5 1.1 with dropout"])
def test_exact_in_float64(variant):
    assert _exact(tiny_encoder_decoder(**VARIANTS[variant]), translation_batch())


def _exact(model, batch):
    """Whether the gradients equal autograd's in float64 to rounding."""
    return max(r.error for r in audit(model, batch, torch.float64, "reference").rows) <= 1e-14


@pytest.mark.parametrize("what", ["mlp", "block"])
@pytest.mark.parametrize("variant", ["dropout", "t5 1.1 with dropout"])
def test_recomputing_changes_no_gradient(variant, what):
    model, batch = tiny_encoder_decoder(**VARIANTS[variant]), translation_batch()
    expected = gradients(model, batch)[1]
    model.recompute = what
    found = gradients(model, batch)[1]
    assert all(torch.equal(g, expected[n]) for n, g in found.items())


def test_rows_without_a_source_or_a_target():
    batch = translation_batch()
    batch["lengths"][1] = 0
    batch["targets"][2] = -100
    model = tiny_encoder_decoder(**T5)
    assert _exact(model, batch) and _exact(model, translation_batch(batch=1))
    batch["targets"].fill_(-100)
    assert _exact(model, batch)


@pytest.mark.parametrize("variant", ["transformer", "t5 1.1"])
def test_drop_in_gradients_are_the_engines(variant):
    model, batch = tiny_encoder_decoder(**VARIANTS[variant]), translation_batch()
    loss, grads = gradients(model, batch)
    torch._dynamo.reset()
    compiled = [torch.compile(model, fullgraph=True, backend="aot_eager")] if variant == "t5 1.1" else []
    for run in (model, *compiled):
        model.zero_grad()
        value = run(**batch)
        value.backward()
        assert abs(value.item() - loss.item()) <= 1e-6 * loss.item()
        for name, p in model.named_parameters():
            assert _relative(grads[name], p.grad) <= 1e-5, name


def test_padding_is_never_read():
    """What stands behind a source's length, and targets behind the end, change no gradient."""
    for options in ({}, T5):
        model, batch = tiny_encoder_decoder(**options), translation_batch()
        expected = gradients(model, batch)[1]
        changed = {k: v.clone() for k, v in batch.items()}
        for row, n in enumerate(batch["lengths"]):
            changed["input_ids"][row, n:] = 7
        found = gradients(model, changed)[1]
        for name, g in found.items():
            if "wte" not in name and "lm_head" not in name:  # their rows are summed in another order
                assert _relative(g, expected[name]) <= 1e-6, name
        assert _relative(found["encoder.wte.weight"], expected["encoder.wte.weight"]) <= 1e-6


def _packed(batch, target_lengths):
    """The sequences of a padded batch one after another."""
    begins = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (batch["lengths"].tolist(), target_lengths)]
    targets, ids = batch["targets"], torch.zeros_like(batch["targets"])
    ids[:, 1:] = targets[:, :-1]
    ids[ids == -100] = 0

    def pack(t, lengths):
        return torch.cat([row[:n] for row, n in zip(t, lengths, strict=True)])

    sources = batch["lengths"].tolist()
    return {
        "input_ids": pack(batch["input_ids"], sources), "decoder_input_ids": pack(ids, target_lengths),
        "targets": pack(targets, target_lengths), "cu_seqlens": begins[0], "target_cu_seqlens": begins[1],
        "positions": torch.cat([torch.arange(n) for n in sources]),
        "target_positions": torch.cat([torch.arange(n) for n in target_lengths]),
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("variant", ["transformer", "learned positions, scaled", "t5 1.1"])
def test_packed_is_padded(variant, backend):
    if backend == "triton":
        pytest.skip("the interpreter is slow; the op's own tests have sequences of several lengths")
    model, batch = tiny_encoder_decoder(**VARIANTS[variant]), translation_batch()
    packed = _packed(batch, [11, 11, 9])  # the last row's last two targets are ignored
    with use_backend(backend):
        loss, expected = gradients(model, batch)
        packed_loss, found = gradients(model, packed)
    assert abs(packed_loss.item() - loss.item()) <= 1e-6 * loss.item()
    for name, g in found.items():
        assert _relative(g, expected[name]) <= 1e-5, name


def test_the_engine_learns_to_copy():
    torch.manual_seed(0)
    model = tiny_encoder_decoder(label_smoothing=0.1, embd_pdrop=0.05)
    engine = Engine(model, AdamWConfig(lr=3e-3, weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 41, (4, 5), generator=generator)
    batch = {"input_ids": ids, "targets": ids.clone()}
    losses = [engine.step([batch]).loss.item() for _ in range(60)]
    total, units = engine.evaluate(batch)
    assert losses[-1] < 0.5 * losses[0] and (total / units).item() < losses[-1]  # without smoothing


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"targets": None}, "targets: got None; allowed: None only with decoder_input_ids"),
        ({"input_ids": torch.zeros(3, 17, dtype=torch.int64), "lengths": None}, "got 17 tokens .* n_positions = 16"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"input_ids: got shape \(2, 4\) with \(3, 11\)"),
        ({"cu_seqlens": torch.tensor([0, 13])}, "decoder_input_ids: got None with packed sequences"),
    ],
)
def test_batches_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text):
        tiny_encoder_decoder()(**(translation_batch() | change))


def test_packed_batches_that_cannot_be():
    packed = _packed(translation_batch(), [11, 11, 9])
    for missing, text in (
        ("positions", "positions: got None with packed"),
        ("target_cu_seqlens", "cu_seqlens: allowed with target_cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=text):
            tiny_encoder_decoder()(**{k: v for k, v in packed.items() if k != missing})


# --- mutants: each breaks one thing by `patch`, pytest's monkeypatch


def _relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def _replace(patch, owner, name, make):
    patch.setattr(owner, name, functools.partialmethod(make, getattr(owner, name)))


def memory_gradient_of_one_layer_lost(patch):
    def backward(self, original, dy, tape, *, d_memory=None, **rest):
        dx, own = original(self, dy, tape, **rest)
        return dx, own if d_memory is None else d_memory

    _replace(patch, CrossAttention, "backward", backward)


def relative_bias_gradient_of_one_layer_lost(patch):
    def backward(self, original, d_branch, dx, tape, first=False, relative_bias=None, d_memory=None):
        return original(self, d_branch, dx, tape, first, None if first else relative_bias, d_memory)

    _replace(patch, stacks.Block, "backward", backward)


def encoders_final_norm_passed_by(patch):
    def backward(self, original, dy, tape):
        norm, dx = self.ln_f, dy.clone()
        if not self.is_decoder and norm is not None:
            patch.setattr(norm, "add_backward", lambda *args: (type(norm).add_backward(norm, *args), dx)[1])
        return original(self, dy, tape)

    _replace(patch, stacks.Stack, "backward", backward)


def _sources_gradient(patch, change):
    def backward(self, original, dx, tape):
        buffer = tape.gradients[self.wte.weight]
        before = buffer.clone()
        original(self, dx, tape)
        if not self.is_decoder:
            change(buffer, before)

    _replace(patch, stacks.Stack, "_embed_backward", backward)


def tied_embeddings_source_part_lost(patch):
    _sources_gradient(patch, lambda buffer, before: buffer.copy_(before))


def tied_embeddings_target_part_overwritten(patch):
    _sources_gradient(patch, lambda buffer, before: buffer.sub_(before))


def embeddings_scale_lost(patch):
    def backward(self, original, dx, tape):
        scale, self.scale = self.scale, 1.0
        original(self, dx, tape)
        self.scale = scale

    _replace(patch, stacks.Stack, "_embed_backward", backward)


def residual_gradient_lost(patch):
    def around(self, original, norm, d_branch, dx, layer, tape, first=False):
        if norm is self.ln_cross:
            return None, layer(stacks._both(norm.add_backward(dx, None, tape))[0])
        return original(self, norm, d_branch, dx, layer, tape, first)

    _replace(patch, stacks.Block, "_around_backward", around)


def branch_takes_the_gradient_before_dropout(patch):
    patch.setattr(stacks, "_both", lambda found: (found[1], found[1]) if isinstance(found, tuple) else (found, found))


def _loss_with(patch, option, value):
    """The loss's gradient is that of another value of an option."""

    def forward(self, original, op, args):
        if op.name != "linear_cross_entropy":
            return original(self, op, args)
        d_loss, self.d_loss = self.d_loss, None
        out = original(self, op, args)
        self.pop(op.name)
        other = list(args)
        other[op.position[option]] = value
        original(self, op, tuple(other))
        self.d_loss = d_loss
        return out

    _replace(patch, tape.Tape, "forward", forward)


def label_smoothing_lost(patch):
    _loss_with(patch, "label_smoothing", 0.0)


def logit_scale_lost(patch):
    _loss_with(patch, "logit_scale", 1.0)


MUTANTS = {  # and the variant that has what it breaks
    memory_gradient_of_one_layer_lost: "transformer",
    relative_bias_gradient_of_one_layer_lost: "t5 1.1",
    encoders_final_norm_passed_by: "t5",
    tied_embeddings_source_part_lost: "transformer",
    tied_embeddings_target_part_overwritten: "transformer",
    embeddings_scale_lost: "transformer",
    residual_gradient_lost: "transformer",
    branch_takes_the_gradient_before_dropout: "dropout",
    label_smoothing_lost: "smoothed",
    logit_scale_lost: "t5",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    model = tiny_encoder_decoder(**VARIANTS[MUTANTS[mutant]])
    mutant(monkeypatch)
    report = audit(model, translation_batch(), torch.float32, "reference")
    assert not report.ok, mutant.__name__
    assert report.worst.share > 10 and report.worst.name != "loss"
