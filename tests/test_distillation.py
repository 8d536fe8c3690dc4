"""What generated tests cannot know of distillation: known values, limits, masks, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import available

from fastlm import backends, ops, registry
from fastlm import nn as fnn

PLACES = available(registry.get("distillation_loss"))


def _logits(*shape, device="cpu", scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * scale).to(device) for _ in range(2)]


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_known_values(backend, device):
    """p = (1/2, 1/2), q = (3/4, 1/4): by hand."""
    teacher = torch.zeros(1, 2, device=device)
    student = torch.tensor([[math.log(3.0), 0.0]], device=device)
    forward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    m = (0.625, 0.375)
    js = 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    js += 0.5 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    with backends.use_backend(backend):
        for divergence, value in (("forward_kl", forward), ("reverse_kl", reverse), ("js", js)):
            loss = ops.distillation_loss(student, teacher, divergence=divergence)
            assert abs(loss.item() - value) <= 1e-6, divergence


@pytest.mark.parametrize(("divergence", "near"), [("forward_kl", 1e-4), ("reverse_kl", 1 - 1e-4)])
def test_jensen_shannon_tends_to_both_kls(divergence, near):
    student, teacher = (t.double() for t in _logits(5, 11))
    limit = ops.distillation_loss(student, teacher, divergence=divergence)
    js = ops.distillation_loss(student, teacher, divergence="js", beta=near) / min(near, 1 - near)
    assert abs(js.item() / limit.item() - 1) <= 1e-2


def test_temperature_keeps_the_gradients_size():
    """Hinton's: with tau**2 and a large temperature the gradient tends to (z - v) / V of centred logits."""
    student, teacher = (t.double() - t.double().mean(-1, keepdim=True) for t in _logits(4, 9))
    student.requires_grad_()
    ops.distillation_loss(student, teacher, temperature=1e4, reduction="sum").backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 9, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_masked_tokens_count_nowhere(backend, device, divergence):
    """NaN and infinities where masked change nothing, and the mean is over the others."""
    student, teacher = _logits(3, 4, 13, device=device)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]], device=device).bool()
    spoilt = [torch.where(mask.unsqueeze(-1), t, float("nan")).requires_grad_() for t in (student, teacher)]
    clean = [t[mask].requires_grad_() for t in (student, teacher)]
    with backends.use_backend(backend):
        loss = ops.distillation_loss(*spoilt, token_weight=mask, divergence=divergence)
        expected = ops.distillation_loss(*clean, divergence=divergence)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
    for a, b in zip(spoilt, clean, strict=True):
        torch.testing.assert_close(a.grad[mask], b.grad)
        assert torch.equal(a.grad[~mask], torch.zeros_like(a.grad[~mask]))


def test_forward_kl_is_torchs():
    """What fastlm.nn.DistillationLoss replaces: log_softmax, softmax and F.kl_div."""
    student, teacher = _logits(6, 31)
    loss = fnn.DistillationLoss(temperature=2.0, reduction="batchmean")(student, teacher)
    right = F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean") * 4
    torch.testing.assert_close(loss, right)


LINEAR = {"forward_kl": {}, "js": {"divergence": "js", "beta": 0.2, "temperature": 2.0, "reduction": "none"}}


@pytest.mark.parametrize(("backend", "device"), available(registry.get("linear_distillation_loss")))
@pytest.mark.parametrize("options", LINEAR.values(), ids=list(LINEAR))
def test_linear_form_is_the_logits_form(backend, device, options):
    """In any workspace: a token a chunk, a few, all."""
    torch.manual_seed(0)
    s, t = torch.randn(7, 12, device=device), torch.randn(7, 20, device=device)
    w, b, v = (torch.randn(shape, device=device) for shape in ((40, 12), (40,), (40, 20)))
    up = torch.randn((7,) if options.get("reduction") == "none" else (), device=device)
    leaves = [x.requires_grad_() for x in (s, w, b)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = F.linear(exact[0], exact[1], exact[2])
    loss = ops.distillation_loss(logits, F.linear(t.double(), v.double()), **options)
    expected = [loss, *torch.autograd.grad(loss, exact, up.double())]
    row = 40 * 8 / 2**20
    for workspace_mb in (row, 3.5 * row, None):
        with backends.use_backend(backend):
            loss = ops.linear_distillation_loss(
                *leaves[:2], t, v, student_bias=b, workspace_mb=workspace_mb, **options
            )
            got = [loss, *torch.autograd.grad(loss, leaves, up)]
        for a, right in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), right, rtol=1e-4, atol=1e-5)


def test_linear_form_refuses_a_teacher_that_learns():
    s, w, t, v = (torch.randn(shape) for shape in ((3, 4), (9, 4), (3, 5), (9, 5)))
    with pytest.raises(ValueError, match=r"teacher_weight: got a tensor that requires a gradient"):
        ops.linear_distillation_loss(s, w, t, v.requires_grad_())
    with torch.no_grad():
        assert ops.linear_distillation_loss(s, w, t, v).item() > 0


def test_kl_div_with_targets_of_zero_and_broadcasting():
    x = torch.tensor([[-0.5, -1.0, -3.0], [-2.0, -0.2, -4.0]], requires_grad=True)
    t = torch.tensor([[0.0, 0.25, 0.75]])
    for reduction in ("none", "sum", "mean"):
        ours, theirs = ops.kl_div(x, t, reduction), F.kl_div(x, t, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        ups = torch.randn_like(ours)
        torch.testing.assert_close(torch.autograd.grad(ours, x, ups), torch.autograd.grad(theirs, x, ups))
