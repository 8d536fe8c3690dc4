"""fastlm.nn.MultiheadAttention beside torch's, on a tape beside itself; and PyTorch's attention function by our op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import check
from fastlm import nn as fnn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import Tape
from fastlm.ops import scaled_dot_product_attention

N, L, S, E, H = 2, 5, 7, 12, 3


def _close(a, b, tolerance=1e-5):
    error, _, worst = check.max_error(a, b)
    assert error <= tolerance * max(1.0, b.abs().max().item()), f"error {error} at {worst}"


def _pair(**options):
    """Ours and torch's, with the same parameters, after a check that they begin with the same."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(0)
    ours = fnn.MultiheadAttention(E, H, **options)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(name)), f"the initialisation of {name} differs"
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _compare(ours, theirs, inputs, **call):
    """Outputs, weights, and the gradients of inputs and parameters."""
    results = []
    for module in (ours, theirs):
        leaves = {id(t): t.clone().requires_grad_() for t in inputs}
        out, weights = module(*(leaves[id(t)] for t in inputs), **call)
        generator = torch.Generator().manual_seed(3)
        loss = (out * torch.randn(out.shape, generator=generator)).sum()
        if weights is not None:
            loss = loss + (weights * torch.randn(weights.shape, generator=generator)).sum()
        wanted = [*leaves.values(), *module.parameters()]
        results.append((out, weights, torch.autograd.grad(loss, wanted)))
    (out, weights, grads), (exact, exact_weights, exact_grads) = results
    _close(out, exact)
    assert (weights is None) == (exact_weights is None)
    if weights is not None:
        _close(weights, exact_weights)
    for a, b in zip(grads, exact_grads, strict=True):
        _close(a, b, 3e-5)


def _inputs(kind, batch_first, kdim=E, vdim=E):
    def draw(length, width):
        return torch.randn((N, length, width) if batch_first else (length, N, width))

    query = draw(L, E)
    if kind == "self":
        return [query] * 3
    key = draw(S, kdim)
    return [query, key, key if kind == "memory" else draw(S, vdim)]


@pytest.mark.parametrize("need_weights", [False, True], ids=["out", "weights"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["seq first", "batch first"])
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_replaces_torchs(options, kind, batch_first, need_weights):
    ours, theirs = _pair(batch_first=batch_first, **options)
    _compare(ours, theirs, _inputs(kind, batch_first), need_weights=need_weights, average_attn_weights=False)


def test_other_widths_of_keys_and_values():
    ours, theirs = _pair(kdim=5, vdim=9, batch_first=True)
    _compare(ours, theirs, _inputs("three", True, 5, 9))


@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.parametrize("extra", [False, True], ids=["", "add_bias_kv"])
def test_masks(mask, padding, extra):
    ours, theirs = _pair(batch_first=True, add_bias_kv=extra, add_zero_attn=extra)
    call = {}
    if mask is not None:
        hidden = torch.rand(L, S) < 0.3
        hidden[:, 0] = False
        call["attn_mask"] = {
            "bool": hidden, "float": torch.randn(L, S).masked_fill(hidden, -torch.inf),
            "per head": hidden.expand(N * H, L, S).clone(),
        }[mask]  # fmt: skip
    if padding is not None:
        absent = torch.tensor([[False] * S, [False] * 3 + [True] * (S - 3)])
        call["key_padding_mask"] = absent if padding == "bool" else torch.zeros(N, S).masked_fill(absent, -torch.inf)
    if mask is not None and padding is not None and (mask == "float") != (padding == "float"):
        kinds = {"bool": torch.zeros(L, S), "per head": torch.zeros(N * H, L, S)}
        if mask != "float":  # torch wants masks of one kind
            theirs_call = call | {"attn_mask": kinds[mask].masked_fill(call["attn_mask"], -torch.inf)}
        else:
            theirs_call = call | {"key_padding_mask": torch.zeros(N, S).masked_fill(absent, -torch.inf)}
        inputs = _inputs("memory", True)
        for a, b in zip(ours(*inputs, **call), theirs(*inputs, **theirs_call), strict=True):
            _close(a, b)
        return
    for need_weights in (False, True):
        _compare(ours, theirs, _inputs("memory", True), need_weights=need_weights, **call)


@pytest.mark.parametrize("need_weights", [False, True])
def test_is_causal(need_weights):
    ours, theirs = _pair()
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    _compare(ours, theirs, _inputs("self", False), attn_mask=mask, is_causal=True, need_weights=need_weights)


def test_without_a_batch():
    ours, theirs = _pair()
    query, key = torch.randn(L, E), torch.randn(S, E)
    _compare(ours, theirs, [query, key, key], key_padding_mask=torch.arange(S) > 4)
    _compare(ours, theirs, [query, query, query])


def test_a_query_without_keys_is_finite():
    """torch gives NaN; ours the bias of the output projection, weights of 0 and finite gradients."""
    ours, _ = _pair(batch_first=True)
    x = torch.randn(N, L, E, requires_grad=True)
    padding = torch.tensor([[False] * L, [True] * L])
    out, weights = ours(x, x, x, key_padding_mask=padding)
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E)) and (weights[1] == 0).all()
    for g in torch.autograd.grad(out.square().sum() + weights.square().sum(), [x, *ours.parameters()]):
        assert g.isfinite().all()


def test_dropout_acts_on_the_weights_that_are_returned():
    ours, _ = _pair(batch_first=True, dropout=0.4)
    x = torch.randn(N, L, E)
    torch.manual_seed(1)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert (weights == 0).any() and (weights > 0).any()
    v = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]).unflatten(-1, (H, E // H)).transpose(1, 2)
    _close(out, ours.out_proj((weights @ v).transpose(1, 2).reshape(N, L, E)))
    ours.eval()
    _, weights = ours(x, x, x)
    _close(weights.sum(-1), torch.ones(N, L))


@pytest.mark.parametrize("batch_first", [False, True], ids=["seq first", "batch first"])
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
def test_tape(kind, batch_first):
    """The hand-written backward gives what autograd gives through the same module."""
    ours, _ = _pair(batch_first=batch_first)
    inputs = _inputs(kind, batch_first)
    call = {"need_weights": False, "key_padding_mask": torch.arange(inputs[1].shape[int(batch_first)]).repeat(N, 1) > 3}
    leaves = {id(t): t.clone().requires_grad_() for t in inputs}
    out, _ = ours(*(leaves[id(t)] for t in inputs), **call)
    up = torch.randn_like(out)
    wanted = [*leaves.values(), *ours.parameters()]
    exact = torch.autograd.grad(out, wanted, up)
    gradients = {p: torch.zeros_like(p) for p in ours.parameters()}
    tape = Tape(Arena("cpu"), gradients)
    with torch.no_grad():
        manual, _ = ours(*inputs, **call, tape=tape)
        grads = ours.backward(up, tape)
    tape.finish()
    _close(manual, out)
    if kind == "self":
        grads = [grads]
    elif kind == "memory":
        assert (grads[2] == 0).all()
        grads = grads[:2]
    for ours_one, theirs_one in zip([*grads, *gradients.values()], exact, strict=True):
        _close(ours_one, theirs_one)


@pytest.mark.parametrize(
    ("shapes", "call"),
    [
        (((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {}),
        (((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {"is_causal": True}),
        (((2, 4, 7, 8), (2, 2, 5, 8), (2, 2, 5, 6)), {"is_causal": True, "enable_gqa": True, "scale": 0.3}),
        (((4, 5, 8), (4, 7, 8), (4, 7, 6)), {"attn_mask": "bool"}),
        (((5, 8), (7, 8), (7, 6)), {"attn_mask": "float"}),
        (((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 6)), {"attn_mask": "float"}),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else str(v[0]),
)
def test_scaled_dot_product_attention(shapes, call):
    q, k, v = (torch.randn(s) for s in shapes)
    call = dict(call)
    if call.get("attn_mask") == "bool":
        call["attn_mask"] = torch.rand(5, 7) < 0.7
        call["attn_mask"][:, 0] = True
    elif call.get("attn_mask") == "float":
        call["attn_mask"] = torch.randn(5, 7)
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        mask = call.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            leaves.append(mask.clone().requires_grad_())
        out = function(*leaves[:3], **(call | ({"attn_mask": leaves[3]} if len(leaves) > 3 else {})))
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad(out, leaves, up)])
    for a, b in zip(*results, strict=True):
        _close(a, b)


def test_scaled_dot_product_attention_errors():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"attn_mask: .*is_causal"):
        scaled_dot_product_attention(q, q, q, torch.ones(3, 3), is_causal=True)
    with pytest.raises(ValueError, match=r"key: got 1 heads.*enable_gqa"):
        scaled_dot_product_attention(q, q[:, :1], q[:, :1])
    with pytest.raises(ValueError, match=r"value: .*leading"):
        scaled_dot_product_attention(q, q, q[0])
