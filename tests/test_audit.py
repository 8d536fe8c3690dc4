"""The audit passes on every backend, and catches every way in which the backward is broken here on purpose."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from conftest import BACKENDS_HERE
from models import lm_batch, tiny_gpt

from fastlm import registry
from fastlm.engine import audit, core, gemm, tape
from fastlm.models import gpt
from fastlm.nn import LayerNorm, Linear

DROPOUT = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
CONFIGS = {
    "gpt2": {},
    "dropout": DROPOUT,
    "no biases": {"bias": False},
    "untied": {"tie_word_embeddings": False},
    "erf": {"activation": "gelu", "n_inner": 40},
    "one layer": {"n_layer": 1, "n_head": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_passes(backend, config, dtype):
    if backend == "triton" and config not in ("gpt2", "dropout"):
        pytest.skip("the interpreter is slow; the other configurations run on the other backends")
    report = audit(tiny_gpt(**CONFIGS[config]), lm_batch(), dtype, backend)
    assert report.ok, report.table()
    assert len(report.rows) == 6 + len(list(tiny_gpt(**CONFIGS[config]).parameters()))


def test_exact_in_float64():
    """In float64 the hand-written gradients equal autograd's to rounding, so the formulas are right, not only close."""
    report = audit(tiny_gpt(**DROPOUT), lm_batch(), torch.float64, "reference")
    assert max(r.error for r in report.rows) <= 1e-14, report.table()


def test_weights_halfway_between_two_bfloat16():
    """They are compared with the exact gradients of what the engine made of them."""
    model = tiny_gpt()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(((p.view(torch.int32) & -(1 << 16)) + (1 << 15)).view(torch.float32))
    report = audit(model, lm_batch(), torch.bfloat16)
    assert report.ok, report.table()
    beside_autograd = [row.error / row.autograd_error for row in report.rows if row.autograd_error > 0]
    assert sum(beside_autograd) < 1.2 * len(beside_autograd)  # from the other of the two numbers it is 1.7 and more


def test_one_row_and_nothing_to_learn():
    assert audit(tiny_gpt(), lm_batch(batch=1)).ok
    batch = lm_batch()
    batch["targets"].fill_(-100)
    assert audit(tiny_gpt(), batch).ok


# --- mutants: each breaks one thing by `patch`, pytest's monkeypatch


def _op(patch, name, **fields):
    """Replace functions of an op's record."""
    op = registry.get(name)
    for field, make in fields.items():
        patch.setitem(op.__dict__, field, functools.partial(make, getattr(op, field)))


def lost_accumulation(patch):
    patch.setattr(gemm, "add_linear_gradients", lambda dw, db, dy, x, one, beta=1: dw.copy_(dy.t() @ x))


def lost_layer_norm_term(patch):
    def backward(original, dy, x, weight, mean, rstd, eps, needs):
        dx, dw, db = original(dy, x, weight, mean, rstd, eps, needs)
        xhat = (x - mean[..., None]) * rstd[..., None]
        return (
            (dx + xhat * (dy * weight * xhat).mean(-1, keepdim=True) * rstd[..., None]).to(dx.dtype),
            dw,
            db,
        )

    _op(patch, "layer_norm", backward=backward)


def lost_mean_term_in_add_layer_norm(patch):
    def backward(original, dy, d_sum, weight, h, mean, rstd, *more):
        dx, *rest = original(dy, d_sum, weight, h, mean, rstd, *more)
        return ((dx + (dy * weight).mean(-1, keepdim=True) * rstd[..., None]).to(dx.dtype), *rest)

    _op(patch, "add_layer_norm", backward=backward)


def wrong_scale(patch):
    def backward(original, dy, *rest):
        grads = list(original(dy, *rest))
        grads[1] = grads[1] * 2.0  # as from a lost 1 / sqrt(head_dim)
        return tuple(grads)

    _op(patch, "attention", backward=backward)


def forgotten_bias_gradient(patch):
    patch.setattr(Linear, "backward", lambda self, dy, tape: tape.linear_backward(dy, self.weight, None))


def wrong_tied_gradient(patch):
    original = tape.Tape.backward

    def backward(self, name, *d, **kw):
        if name == "linear_cross_entropy":
            kw.pop("weight")
        return original(self, name, *d, **kw)

    patch.setattr(tape.Tape, "backward", backward)


def transposed_weight_gradient(patch):
    original = gemm.add_linear_gradients

    def add(d_weight, d_bias, dy, x, one, beta=1):
        square = d_weight.shape[0] == d_weight.shape[1]
        original(d_weight, None, *((x, dy) if square else (dy, x)), one, beta)
        if d_bias is not None:
            gemm.add_column_sums(d_bias, dy, one)

    patch.setattr(gemm, "add_linear_gradients", add)


def off_by_one_causal_mask(patch):
    module = importlib.import_module("fastlm.ops.attention_math")
    visible = module._visible

    def backward(original, *args):
        def shifted(q, k, problem):
            mask = visible(q, k, problem)
            return mask & torch.ones(mask.shape[-2:], dtype=torch.bool).tril(-1)

        module._visible = shifted
        try:
            return original(*args)
        finally:
            module._visible = visible

    _op(patch, "attention", backward=backward)


def dropped_residual(patch):
    original = LayerNorm.add_backward
    patch.setattr(LayerNorm, "add_backward", lambda self, dy, d_sum, tape: original(self, dy, None, tape))


def wrong_position_gradient(patch):
    def backward(original, *args):
        dw, dp, ds = original(*args)
        return dw, None if dp is None else dp.roll(1, 0), ds

    _op(patch, "embedding", backward=backward)


def clip_after_the_moments(patch):
    def forward(original, master, grad, *args):
        *rest, lr, trail, b1, b2, eps, wd, max_norm, zero = args
        clip = (max_norm / (grad.norm() + 1e-6)).clamp(max=1.0)
        return original(master, grad, *rest, lr * clip, trail, b1, b2, eps, wd, 0.0, zero)

    _op(patch, "adamw", forward=forward)


def other_activation(patch):
    def backward(original, dy, x, bias, seed, approximate, dropout_p, needs):
        return original(dy, x, bias, seed, "none", dropout_p, needs)

    _op(patch, "gelu", backward=backward)


def another_dropout_mask(patch):
    def backward(original, dy, seed, *rest):
        return original(dy, seed + 1, *rest)

    _op(patch, "dropout", backward=backward)


def another_attention_dropout_mask(patch):
    def backward(original, *args):
        at = 2 + registry.get("attention").saved.index("dropout_seed")
        return original(*args[:at], args[at] + 1, *args[at + 1 :])

    _op(patch, "attention", backward=backward)


def decay_everywhere(patch):
    original = core.Engine._update

    def update(self):
        self.flat.decay_mask.fill_(True)
        original(self)

    patch.setattr(core.Engine, "_update", update)


def mean_of_micro_batch_means(patch):
    original = gpt.GPT.backward

    def backward(self, d_loss, tape):
        original(self, d_loss * 1.25, tape)

    patch.setattr(gpt.GPT, "backward", backward)


def one_nan(patch):
    original = gpt.GPT.backward

    def backward(self, d_loss, tape):
        original(self, d_loss, tape)
        tape.gradients[self.ln_f.weight][3] = float("nan")

    patch.setattr(gpt.GPT, "backward", backward)


def stale_weights(patch):
    original = core.Engine._update

    def update(self):
        before = self.flat.param.clone()
        original(self)
        if self.flat.param is not self.flat.master:
            self.flat.param.copy_(before)
        else:
            self.flat.master.copy_(before)

    patch.setattr(core.Engine, "_update", update)


def swapped_key_and_value_gradients(patch):
    def backward(original, *args):
        dq, dk, dv, *rest = original(*args)
        return dq, dv, dk, *rest

    _op(patch, "attention", backward=backward)


def zero_gradient_of_one_layer(patch):
    original = gpt.GPT.backward

    def backward(self, d_loss, tape):
        original(self, d_loss, tape)
        tape.gradients[self.h[1].attn.c_attn.weight].zero_()

    patch.setattr(gpt.GPT, "backward", backward)


MUTANTS = [
    lost_accumulation,
    lost_layer_norm_term,
    lost_mean_term_in_add_layer_norm,
    wrong_scale,
    forgotten_bias_gradient,
    wrong_tied_gradient,
    transposed_weight_gradient,
    off_by_one_causal_mask,
    dropped_residual,
    wrong_position_gradient,
    clip_after_the_moments,
    other_activation,
    another_dropout_mask,
    another_attention_dropout_mask,
    decay_everywhere,
    mean_of_micro_batch_means,
    one_nan,
    stale_weights,
    swapped_key_and_value_gradients,
    zero_gradient_of_one_layer,
]


# The two GELUs' derivatives differ by less than bfloat16 autograd itself loses.
CASES = [
    (m, d)
    for m in MUTANTS
    for d in (torch.float32, torch.bfloat16)
    if (m, d) != (other_activation, torch.bfloat16)
]


@functools.cache
def _healthy(dtype):
    return audit(tiny_gpt(**DROPOUT), lm_batch(batch=4, seq=12), dtype, "reference")


@pytest.mark.parametrize(("mutant", "dtype"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_catches(mutant, dtype, monkeypatch):
    assert _healthy(dtype).ok, _healthy(dtype).table()
    mutant(monkeypatch)
    report = audit(tiny_gpt(**DROPOUT), lm_batch(batch=4, seq=12), dtype, "reference")
    assert not report.ok, f"{mutant.__name__} went through\n{report.table(5)}"
    assert "MISS" in report.table(1)


def test_a_backward_that_does_not_mirror_forward_is_refused(monkeypatch):
    monkeypatch.setattr(
        gpt.Block, "backward", lambda self, d_branch, dx, tape, first=False: self.ln_2.add_backward(dx, dx, tape)
    )
    with pytest.raises(RuntimeError, match="must mirror forward"):
        audit(tiny_gpt(), lm_batch())
