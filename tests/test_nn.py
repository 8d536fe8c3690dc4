"""Layers as drop-ins for torch's: constructor, state dict, values, gradients; and their two ways of running agree."""

from __future__ import annotations

import pytest
import torch

from fastlm import nn as fnn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import Tape


def _close(a, b, tolerance=2e-6):
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-3)
    assert error <= tolerance, error


PAIRS = {
    "LayerNorm": (lambda m: m.LayerNorm(24), (3, 5, 24)),
    "LayerNorm over two": (lambda m: m.LayerNorm((4, 6), eps=1e-3), (3, 4, 6)),
    "LayerNorm without bias": (lambda m: m.LayerNorm(24, bias=False), (2, 24)),
    "LayerNorm plain": (lambda m: m.LayerNorm(24, elementwise_affine=False), (2, 24)),
    "Linear": (lambda m: m.Linear(24, 10), (2, 3, 24)),
    "Linear without bias": (lambda m: m.Linear(24, 10, bias=False), (4, 24)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_replaces_the_torch_module(name):
    make, shape = PAIRS[name]
    torch.manual_seed(0)
    theirs = make(torch.nn)
    torch.manual_seed(0)
    ours = make(fnn)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), "the initialisation differs"
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [ours(xs[0]), theirs(xs[1])]
    up = torch.randn_like(ys[0])
    for y in ys:
        y.backward(up)
    _close(ys[0], ys[1])
    _close(xs[0].grad, xs[1].grad)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        _close(a.grad, b.grad)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3), (2, 7, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}, {"reduction": "none"}], ids=str
)
def test_cross_entropy_loss_replaces_torchs(shape, options):
    torch.manual_seed(0)
    logits = torch.randn(shape)
    target = torch.randint(0, 7, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    results = []
    for module in (fnn.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)):
        x = logits.clone().requires_grad_()
        loss = module(x, target)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    _close(results[0][0], results[1][0])
    _close(results[0][1], results[1][1])


def _both_ways(layer, inputs, up):
    """(outputs and gradients by autograd, by tape): y, input gradients, parameter gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = layer(*leaves)
    y.backward(up)
    auto = [y.detach(), leaves[0].grad, *[p.grad for p in layer.parameters()]]
    grads = {p: torch.zeros_like(p) for p in layer.parameters()}
    tape = Tape(Arena(torch.device("cpu")), grads)
    with torch.no_grad(), tape.arena.frame("layer"):
        y = layer(*inputs, tape=tape)
        dx = layer.backward(up, tape)
        tape.finish()
    return auto, [y, dx, *grads.values()]


@pytest.mark.parametrize(
    "layer",
    [
        fnn.LayerNorm(24),
        fnn.Linear(24, 24),
        fnn.MLP(24, 40, approximate="none"),
        fnn.MLP(24, 40, bias=False),
        fnn.CausalSelfAttention(24, 3),
        fnn.CausalSelfAttention(24, 1, bias=False),
    ],
    ids=repr,
)
def test_backward_equals_autograd(layer):
    torch.manual_seed(0)
    auto, manual = _both_ways(layer, [torch.randn(2, 5, 24)], torch.randn(2, 5, 24))
    for a, b in zip(auto, manual, strict=True):
        _close(b, a)


def test_linear_cross_entropy_loss_both_ways():
    torch.manual_seed(0)
    layer = fnn.LinearCrossEntropyLoss(24, 50, bias=True, label_smoothing=0.1, z_loss=1e-3)
    target = torch.randint(0, 50, (2, 5))
    hidden = torch.randn(2, 5, 24)

    class OnTarget(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = layer
            self.backward = layer.backward

        def forward(self, x, tape=None):
            return self.loss(x, target, tape=tape)

    auto, manual = _both_ways(OnTarget(), [hidden], torch.tensor(1.7))
    for a, b in zip(auto, manual, strict=True):
        _close(b, a)


def test_dropout_is_the_identity_in_evaluation_and_scales_in_training():
    layer, x = fnn.Dropout(0.25), torch.ones(100_000)
    assert layer.eval()(x) is x
    y = layer.train()(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).float().mean().item() - 0.25) <= 0.01  # 7 standard deviations
    torch.manual_seed(5)
    a = layer(x)
    torch.manual_seed(5)
    assert torch.equal(a, layer(x)), "the mask does not follow torch's generator"


def test_layer_norm_refuses_another_width():
    with pytest.raises(ValueError, match=r"x: got shape \(2, 23\); allowed: \(\.\.\., 24\)"):
        fnn.LayerNorm(24)(torch.randn(2, 23))
