"""Layers as drop-ins for torch's: constructor, state dict, values, gradients; and their two ways of running agree."""

from __future__ import annotations

import math

import pytest
import torch

from fastlm import nn as fnn
from fastlm import ops as fops
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
    "RMSNorm": (lambda m: m.RMSNorm(24), (3, 5, 24)),
    "RMSNorm over two": (lambda m: m.RMSNorm((4, 6), eps=1e-3), (3, 4, 6)),
    "RMSNorm plain": (lambda m: m.RMSNorm(24, elementwise_affine=False), (2, 24)),
    "Linear": (lambda m: m.Linear(24, 10), (2, 3, 24)),
    "Linear without bias": (lambda m: m.Linear(24, 10, bias=False), (4, 24)),
    "GELU": (lambda m: m.GELU(), (3, 5, 24)),
    "GELU tanh": (lambda m: m.GELU("tanh"), (24,)),
    "SiLU": (lambda m: m.SiLU(), (3, 24)),
    "ReLU": (lambda m: m.ReLU(), (3, 24)),
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
        fnn.LayerNorm((5, 24)),
        fnn.RMSNorm(24),
        fnn.RMSNorm((5, 24), eps=1e-5, offset=1.0),
        fnn.Linear(24, 24),
        fnn.MLP(24, 40, approximate="none"),
        fnn.MLP(24, 40, bias=False),
        fnn.MLP(24, 40, activation="relu_squared"),
        fnn.MLP(24, 40, activation="swiglu"),
        fnn.MLP(24, 40, bias=False, activation="geglu"),
        fnn.GELU("tanh"),
        fnn.SiLU(),
        fnn.ReLU(),
        fnn.SwiGLU(up_first=True),
        fnn.GEGLU(approximate="tanh"),
        fnn.ReGLU(),
        fnn.RotaryEmbedding(8, 5),
        fnn.CausalSelfAttention(24, 3),
        fnn.CausalSelfAttention(24, 1, bias=False),
    ],
    ids=repr,
)
def test_backward_equals_autograd(layer):
    torch.manual_seed(0)
    up = torch.randn(2, 5, 12 if isinstance(layer, (fnn.SwiGLU, fnn.GEGLU, fnn.ReGLU)) else 24)
    auto, manual = _both_ways(layer, [torch.randn(2, 5, 24)], up)
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


@pytest.mark.parametrize("module", [fnn.SiLU, fnn.ReLU])
def test_in_place_activations_are_refused(module):
    with pytest.raises(ValueError, match="inplace: got True; allowed: False"):
        module(inplace=True)


def test_gated_layers_of_two_tensors():
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(3, 5, 12) for _ in range(3))
    layer = fnn.SwiGLU()
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    layer(*leaves).backward(dy)
    tape = Tape(Arena(torch.device("cpu")), {})
    with torch.no_grad(), tape.arena.frame("layer"):
        y = layer(gate, up, tape=tape)
        d_gate, d_up = layer.backward(dy, tape)
        tape.finish()
        _close(y, torch.nn.functional.silu(gate) * up)
        _close(d_gate, leaves[0].grad)
        _close(d_up, leaves[1].grad)


def test_gated_layers_drop_in_training_only():
    layer, x = fnn.ReGLU(dropout=0.25), torch.ones(100, 2000)
    assert torch.equal(layer.eval()(x), torch.ones(100, 1000))
    y = layer.train()(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).float().mean().item() - 0.25) <= 0.01  # 7 standard deviations


def test_gated_mlp_is_llamas():
    """Against transformers' LlamaMLP, whose two projections are the halves of ours."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    theirs = LlamaMLP(transformers.LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=3))
    ours = fnn.MLP(24, 40, bias=False, activation="swiglu")
    with torch.no_grad():
        ours.c_fc.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
        ours.c_proj.weight.copy_(theirs.down_proj.weight)
    x = torch.randn(2, 5, 24)
    _close(ours(x), theirs(x))


def test_inner_dropout_of_the_mlp_is_its_activations():
    torch.manual_seed(0)
    layer, x = fnn.MLP(24, 40, activation="reglu", inner_dropout=0.5), torch.randn(2, 5, 24)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    h = fops.dropout(fops.reglu(layer.c_fc(x), gate_bias=layer.c_fc.bias), 0.5, seed=seed)
    _close(y, layer.c_proj(h))
    assert (layer.eval()(x) - y).abs().max() > 0.01


def test_rotary_tables_stay_wide():
    layer = fnn.RotaryEmbedding(8, 300)
    cos = layer.cos.clone()
    assert layer.to(torch.bfloat16).cos.dtype == torch.float32 and torch.equal(layer.cos, cos)
    assert layer.double().cos.dtype == torch.float64 and layer.state_dict() == {}
    restored = fnn.RotaryEmbedding(8, 300).to("meta").to_empty(device="cpu")
    assert torch.equal(restored.cos, cos)
    exact = math.sin(299.0 / 100.0)
    assert abs(fnn.RotaryEmbedding(8, 300).sin[299, 2].item() - exact) <= 6e-8


def test_rotary_of_heads_inside_both_ways():
    torch.manual_seed(0)
    layer, x, dy = fnn.RotaryEmbedding(6, 9, interleaved=True), *(torch.randn(2, 5, 3, 8) for _ in range(2))
    positions = torch.randint(0, 9, (2, 5))
    leaf = x.clone().requires_grad_()
    layer(leaf, positions, -3).backward(dy)
    tape = Tape(Arena(torch.device("cpu")), {})
    with torch.no_grad(), tape.arena.frame("layer"):
        _close(layer(x, positions, -3, tape=tape), layer(x, positions, -3))
        _close(layer.backward(dy, tape, -3), leaf.grad)
        tape.finish()
