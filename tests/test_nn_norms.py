"""LayerNorm and RMSNorm with the bias and dropout before the residual sum, by autograd and by the tape."""

from __future__ import annotations

import pytest
import torch

from fastlm import nn as fnn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import Tape
from fastlm.ops.dropout import keep_mask


def _close(a, b, tolerance=2e-6):
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-3)
    assert error <= tolerance, error


class _Sublayer(torch.nn.Module):
    """h = norm(residual + dropout(x + bias)), and y + 2 sum of it, with the hand-written backward of both inputs."""

    def __init__(self, norm, p):
        super().__init__()
        self.norm, self.p = norm, p
        self.bias = torch.nn.Parameter(torch.randn(tuple(norm.normalized_shape)))

    def forward(self, x, residual, tape=None):
        y, total = self.norm(x, residual, tape=tape, x_bias=self.bias, dropout_p=self.p)
        return y + 2.0 * total

    def backward(self, dy, tape):
        return self.norm.add_backward(dy, 2.0 * dy, tape, x_bias=self.bias)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(24,), (4, 6)], ids=str)
@pytest.mark.parametrize("make", [fnn.LayerNorm, fnn.RMSNorm])
def test_fused_bias_and_dropout_both_ways(make, shape, p):
    """By autograd and by the tape alike, and like the same in PyTorch with the same mask."""
    torch.manual_seed(0)
    layer = _Sublayer(make(shape, eps=1e-5), p)
    x, residual, dy = (torch.randn(3, 5, *shape) for _ in range(3))
    seeds = torch.tensor([11])
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    mask = keep_mask(seeds, x.shape, p) / (1.0 - p)
    total = leaves[1] + mask * (leaves[0] + layer.bias)
    torch_norm = torch.nn.LayerNorm if make is fnn.LayerNorm else torch.nn.RMSNorm
    plain = torch_norm(shape, eps=1e-5)
    out = plain(total) + 2.0 * total
    wanted = torch.autograd.grad(out, [*leaves, *plain.parameters(), layer.bias], dy)

    grads = {q: torch.zeros_like(q) for q in layer.parameters()}
    tape = Tape(Arena(torch.device("cpu")), grads, seeds)
    with torch.no_grad(), tape.arena.frame("layer"):
        y = layer(x, residual, tape=tape)
        d = layer.backward(dy, tape)
        tape.finish()
        d = d if isinstance(d, tuple) else (d, d)
        for a, b in zip((y, *d, *(grads[q] for q in layer.norm.parameters()), grads[layer.bias]), (out, *wanted), strict=True):
            _close(a, b, 4e-6)
    torch.manual_seed(3)
    first = layer(x, residual)
    torch.manual_seed(3)
    autograd = torch.autograd.grad(layer(x, leaves[1]), [leaves[1], layer.bias], dy)
    assert torch.equal(first, layer(x, residual)) == (p == 0)  # another seed
    if p == 0:
        _close(autograd[0], wanted[1], 4e-6)
        _close(autograd[1], wanted[-1], 4e-6)
    layer.eval()
    assert torch.equal(layer(x, residual), layer(x, residual))


def test_norms_refuse_what_cannot_be():
    norm = fnn.RMSNorm((4, 6))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 24\); allowed: \(\.\.\., 4, 6\)"):
        norm(torch.randn(2, 24))
    with pytest.raises(ValueError, match=r"residual: got None; x_bias and dropout_p need one"):
        norm(torch.randn(2, 4, 6), dropout_p=0.1)
    with pytest.raises(ValueError, match=r"casting: got 'mistral'"):
        fnn.RMSNorm(4, casting="mistral")
    with pytest.raises(ValueError, match=r"offset: got 1\.0 without a weight"):
        fnn.RMSNorm(4, elementwise_affine=False, offset=1.0)


def test_rms_norm_begins_at_a_scale_of_one_and_has_torchs_epsilon():
    x = torch.randn(5, 24) * 1e-3
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = torch.nn.RMSNorm(24, dtype=dtype)(x.to(dtype))
        for ours in (fnn.RMSNorm(24, dtype=dtype), fnn.RMSNorm(24, dtype=dtype, offset=1.0)):
            _close(ours(x.to(dtype)).double(), y.double(), 2 * torch.finfo(dtype).eps)
