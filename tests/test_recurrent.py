"""LSTM, GRU and RNN as drop-ins for torch's: constructor, state dict, values, every gradient; both ways of running."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastlm import native, use_backend
from fastlm import nn as fnn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import Tape

BACKENDS = [
    pytest.param(b, marks=pytest.mark.backend(b)) for b in ("reference", "cpu") if b != "cpu" or not native.why_not("cpu")
]
SEQ, BATCH, INPUT, HIDDEN = 6, 4, 5, 7
KINDS = {"LSTM": {}, "GRU": {}, "RNN": {}, "RNN relu": {"nonlinearity": "relu"}}
SHAPES = [
    {"num_layers": layers, "bidirectional": both, "bias": bias, "batch_first": batch_first}
    for layers, both, bias, batch_first in [
        (1, False, True, False), (2, False, False, True), (1, True, True, True), (3, True, True, False),
    ]
]  # fmt: skip


def _pair(kind, seed=0, **options):
    """Ours and torch's with the same weights, away from their start."""
    made = []
    for module in (fnn, torch.nn):
        torch.manual_seed(seed)
        made.append(getattr(module, kind.split()[0])(INPUT, HIDDEN, **KINDS[kind], **options))
    ours, theirs = made
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), "the initialisation differs"
    return ours, theirs


def _leaves(layer, batch=BATCH):
    """x and the first state, as torch.nn takes it, with gradients."""
    g = torch.Generator().manual_seed(1)
    shape = (batch, SEQ, INPUT) if layer.batch_first else (SEQ, batch, INPUT)
    n = layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(shape, generator=g).requires_grad_()
    state = [torch.randn(n, batch, HIDDEN, generator=g).requires_grad_() for _ in range(1 + (layer.mode == "LSTM"))]
    return x, state


def _hx(state):
    return tuple(state) if len(state) == 2 else state[0]


def _states(last):
    return list(last) if isinstance(last, tuple) else [last]


def _upstream(tensors):
    g = torch.Generator().manual_seed(2)
    return [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in tensors]


def _everything(layer, run):
    """Outputs, last states and gradients of x, of the first state and of every parameter, by name."""
    x, state = _leaves(layer)
    y, last = run(layer, x, _hx(state))
    out = [y, *_states(last)]
    leaves = {"x": x, **{f"start {i}": s for i, s in enumerate(state)}, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), _upstream(out))
    results = {f"out {i}": o.detach() for i, o in enumerate(out)}
    return results | {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, b in theirs.items():
        a = ours[name]
        assert a.shape == b.shape, name
        error = (a - b).abs().max().item() / b.abs().max().item()
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_replaces_the_torch_module(backend, kind, options):
    ours, theirs = _pair(kind, **options)

    def run(layer, x, hx):
        return layer(x, hx)

    with use_backend(backend):
        mine = _everything(ours, run)
    _assert_close(mine, _everything(theirs, run))


@pytest.mark.parametrize("sorted_rows", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_and_lengths(backend, kind, sorted_rows):
    """A PackedSequence in and out, as torch's layer; and padded rows with their lengths, which give the same."""
    ours, theirs = _pair(kind, num_layers=2, bidirectional=True)
    lengths = torch.tensor([6, 4, 3, 1] if sorted_rows else [3, 6, 1, 4])

    def packed(layer, x, hx):
        again, last = layer(pack_padded_sequence(x, lengths, enforce_sorted=sorted_rows), hx)
        return pad_packed_sequence(again)[0], last

    def padded(layer, x, hx):
        return layer(x, hx, lengths)

    right = _everything(theirs, packed)
    with use_backend(backend):
        _assert_close(_everything(ours, packed), right)
        _assert_close(_everything(ours, padded), right)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_without_a_batch_or_a_state(kind):
    ours, theirs = _pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(SEQ, INPUT)
    hx = [s[:, 0].detach() for s in _leaves(ours)[1]]
    for start in ((), (_hx(hx),)):
        (y, last), (right, right_last) = ours(x, *start), theirs(x, *start)
        torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6)
        for a, b in zip(_states(last), _states(right_last), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _tape(layer, seeds=None):
    return Tape(Arena(torch.device("cpu")), {p: torch.zeros_like(p) for p in layer.parameters()}, seeds)


@pytest.mark.parametrize(
    ("options", "lengths", "given"),
    [(o, lengths, given) for o, lengths, given in itertools.product(SHAPES, (False, True), (False, True)) if lengths or given],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_manual_equals_autograd(kind, options, lengths, given):
    """forward and backward on a tape, with dropout between the layers, against autograd through the same forward."""
    ours, _ = _pair(kind, dropout=0.3 if options["num_layers"] > 1 else 0.0, **options)
    ours.double()
    x, state = (t for t in _leaves(ours))
    x, state = x.detach().double().requires_grad_(), [s.detach().double().requires_grad_() for s in state]
    size = torch.tensor([3, 6, 0, 4]) if lengths else None
    seeds = torch.tensor([3, 5])

    from fastlm.engine.tape import AutogradTape

    y, last = ours(x, _hx(state) if given else None, size, tape=AutogradTape(seeds))
    out = [y, *_states(last)]
    ups = _upstream(out)
    leaves = [x, *(state if given else []), *ours.parameters()]
    right = torch.autograd.grad(out, leaves, ups)
    tape = _tape(ours, seeds)
    with torch.no_grad(), use_backend("reference"):
        y2, last2 = ours(x.detach(), _hx([s.detach() for s in state]) if given else None, size, tape=tape)
        dx, d_hx = ours.backward(ups[0], tape, _hx(ups[1:]))
        tape.finish()
    assert (d_hx is None) == (not given)
    mine = [dx, *(_states(d_hx) if given else []), *(tape.gradients[p] for p in ours.parameters())]
    for a, b in zip([y2, *_states(last2), *mine], [*out, *right], strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= 1e-12 * b.abs().max().item()


def test_backward_without_gradients_of_the_output():
    """A classifier reads the last state only."""
    ours, _ = _pair("LSTM", num_layers=2)
    x, _ = _leaves(ours)
    _, (h, _) = ours(x)
    up = torch.randn_like(h)
    right = torch.autograd.grad(h, [x, *ours.parameters()], up)
    tape = _tape(ours)
    with torch.no_grad():
        ours(x.detach(), tape=tape)
        dx, _ = ours.backward(None, tape, (up, torch.zeros_like(up)))
    for a, b in zip([dx, *(tape.gradients[p] for p in ours.parameters())], right, strict=True):
        assert (a - b).abs().max().item() <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiles_whole_and_casts(kind):
    ours, _ = _pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(SEQ, BATCH, INPUT)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], ours(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ours(x)
    assert y.dtype == torch.bfloat16
    assert (y - ours(x)[0]).abs().max().item() <= 0.03


def test_refuses():
    with pytest.raises(ValueError, match=r"proj_size: got 3; allowed: 0"):
        fnn.LSTM(4, 6, proj_size=3)
    layer = fnn.LSTM(INPUT, HIDDEN)
    x = torch.randn(SEQ, BATCH, INPUT)
    with pytest.raises(ValueError, match=r"input: .*\(6, 4, 3\).*5"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match=r"h0: .*\(2, 4, 7\).*\(1, batch, 7\)"):
        layer(x, (torch.zeros(2, BATCH, HIDDEN), torch.zeros(1, BATCH, HIDDEN)))
    packed = pack_padded_sequence(x, torch.tensor([6, 4, 3, 1]))
    with pytest.raises(ValueError, match=r"tape: .*PackedSequence"):
        layer(packed, tape=_tape(layer))
