"""The losses as modules: torch's constructor, layouts and state dict; the extras by autograd and by tape."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastlm import check, nn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import Tape

CLASSES = 7
SHAPES = [(CLASSES,), (5, CLASSES), (2, CLASSES, 3), (2, CLASSES, 3, 4)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(value, exact):
    assert check.max_error(value, exact)[0] <= 3e-6 * max(exact.abs().max().item(), 1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_replaces_torchs(shape, reduction, weighted, kind):
    dim = 1 if len(shape) > 1 else 0
    tokens = shape[:dim] + shape[dim + 1 :]
    weight = draw(CLASSES, seed=1).abs() + 0.5 if weighted else None
    target = torch.randint(0, CLASSES, tokens, generator=torch.Generator().manual_seed(2))
    if kind == "probabilities":
        target = draw(*shape, seed=3).softmax(dim)
    up = draw(*tokens if reduction == "none" else (), seed=4)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    ours, theirs = (module(weight, **options) for module in (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss))
    ours.load_state_dict(theirs.state_dict())
    x, wide = draw(*shape).requires_grad_(), draw(*shape).double().requires_grad_()
    loss, exact = ours(input=x, target=target), theirs.double()(wide, target if kind == "indices" else target.double())
    assert_close(loss, exact)
    assert_close(torch.autograd.grad(loss, x, up)[0], torch.autograd.grad(exact, wide, up.double())[0])


def test_takes_all_that_torchs_takes():
    names = [list(inspect.signature(f).parameters) for f in (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)]
    assert names[0][: len(names[1])] == names[1]
    assert nn.CrossEntropyLoss(size_average=False).reduction == "sum"
    forward = [list(inspect.signature(m.forward).parameters) for m in (nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)]
    assert forward[0][: len(forward[1])] == forward[1]


def test_extras_have_the_shape_of_the_indices():
    logits = draw(2, CLASSES, 3).requires_grad_()
    target = torch.randint(0, CLASSES, (2, 3), generator=torch.Generator().manual_seed(2))
    module = nn.CrossEntropyLoss(z_loss=0.02, softcap=5.0, logit_scale=0.5, extras=True)
    loss, extras = module(logits, target, token_weight=torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.5]]))
    assert loss.shape == () and {t.shape for t in extras[1:]} == {(2, 3)}
    x = 5.0 * torch.tanh(0.5 * logits.double() / 5.0)
    assert_close(extras.lse, x.logsumexp(1))
    assert torch.equal(extras.correct, logits.argmax(1) == target)
    (loss + extras.lse.sum()).backward()
    assert logits.grad[0, :, 1].abs().max() > 0  # by lse alone: its weight is 0


def test_linear_with_every_option_both_ways():
    """Autograd and the tape give the same, of the loss and of the extras."""
    torch.manual_seed(0)
    layer = nn.LinearCrossEntropyLoss(
        12, 30, bias=True, class_weight=torch.rand(30) + 0.5, label_smoothing=0.1, z_loss=1e-2, softcap=4.0,
        logit_scale=1.5, extras=True, workspace_mb=0.01,
    )  # fmt: skip
    assert list(layer.state_dict()) == ["weight", "bias", "class_weight"]
    hidden, target, u = draw(2, 5, 12), torch.randint(0, 30, (2, 5)), torch.rand(2, 5)
    up = [torch.tensor(1.7), torch.tensor(-0.6), draw(2, 5, seed=5)]
    leaf = hidden.clone().requires_grad_()
    loss, extras = layer(leaf, target, u)
    auto = torch.autograd.grad([loss, extras.z_loss, extras.lse], [leaf, *layer.parameters()], up)
    grads = {p: torch.zeros_like(p) for p in layer.parameters()}
    tape = Tape(Arena(torch.device("cpu")), grads)
    with torch.no_grad(), tape.arena.frame("layer"):
        manual, more = layer(hidden, target, u, tape=tape)
        assert torch.equal(manual, loss) and all(map(torch.equal, more, extras))
        d_hidden = layer.backward(up[0], tape, *up[1:])
        tape.finish()
        for a, b in zip(auto, [d_hidden, *grads.values()], strict=True):
            assert_close(b, a)
