"""Self- and cross-attention layers: against attention written out, on a tape against autograd, and with their caches."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import BACKENDS_HERE

import fastlm
from fastlm import nn as fnn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import AutogradTape, Tape

BATCH, SEQ, MEMORY, WIDTH, HEADS = 2, 6, 5, 24, 4
BUCKETS = {"relative_bidirectional": True, "relative_max_distance": 5}


def _close(a, b, tolerance=2e-6):
    error = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-3)
    assert error <= tolerance, error


def _norm(width):
    return fnn.RMSNorm(width, 1e-6)


LAYERS = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"n_kv_head": 2, "causal": True, "qkv_bias": False},
    "one key head": {"n_kv_head": 1, "head_dim": 10, "bias": False, "scale": 1.0},
    "rotary": {"rotary": (6, False), "causal": True, "out_bias": False},
    "rotary interleaved": {"rotary": (4, True), "n_kv_head": 2},
    "qk norm": {"qk_norm": _norm, "bias": False},
    "qwen3": {"qk_norm": _norm, "rotary": (8, False), "n_kv_head": 2, "head_dim": 8, "causal": True, "bias": False},
}


def _layer(name, dtype=torch.float64):
    """A layer whose parameters are all random."""
    options = dict(LAYERS[name])
    if "rotary" in options:
        width, interleaved = options["rotary"]
        options["rotary"] = fnn.RotaryEmbedding(width, 32, interleaved=interleaved)
    torch.manual_seed(0)
    layer = fnn.SelfAttention(WIDTH, HEADS, **options).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def _turned(x, layer, positions):
    """Rotary by complex numbers: x (batch, heads, seq, head_dim)."""
    if layer.rotary is None:
        return x
    r, interleaved = layer.rotary.rotary_dim, layer.rotary.interleaved
    angles = positions[:, None, :, None] * 10000.0 ** -(torch.arange(0, r, 2, dtype=x.dtype) / r)
    first, second = (x[..., 0:r:2], x[..., 1:r:2]) if interleaved else (x[..., : r // 2], x[..., r // 2 : r])
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((turned, x[..., r:]), -1)


def _written_out(layer, x, seen, bias=0.0, positions=None):
    """The layer in plain PyTorch; seen: bool, broadcast to (batch, heads, seq, seq)."""
    d, kv = layer.head_dim, layer.n_kv_head
    q, k, v = layer.c_attn(x).split((HEADS * d, kv * d, kv * d), -1)
    q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
    if layer.q_norm is not None:
        q, k = (
            t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) * n.weight
            for t, n in ((q, layer.q_norm), (k, layer.k_norm))
        )
    positions = torch.arange(x.shape[1]).expand(x.shape[:2]) if positions is None else positions
    q, k = (_turned(t, layer, positions) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // kv, 1) for t in (k, v))
    s = q @ k.transpose(-1, -2) * (d**-0.5 if layer.scale is None else layer.scale) + bias
    if layer.causal:
        seen = seen & torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    p = s.masked_fill(~seen, -torch.inf).softmax(-1)
    return layer.c_proj((p @ v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("name", LAYERS)
def test_is_attention_written_out(name):
    layer = _layer(name)
    x = torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64)
    lengths = torch.tensor([SEQ, 3])
    seen = (torch.arange(SEQ) < lengths[:, None])[:, None, None]
    bias = torch.randn(HEADS, SEQ, SEQ, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 9, 2, 0, 1, 30]])
    everything = torch.tensor(True)
    _close(layer(x), _written_out(layer, x, everything), 1e-12)
    _close(layer(x, key_lengths=lengths), _written_out(layer, x, seen), 1e-12)
    _close(layer(x, bias=seen), _written_out(layer, x, seen), 1e-12)
    _close(layer(x, bias=bias, positions=positions), _written_out(layer, x, everything, bias, positions), 1e-12)


def _tape(parameters):
    return Tape(Arena(torch.device("cpu")), {p: torch.zeros_like(p) for p in parameters})


CALLS = {"": {}, "padded": {"key_lengths": torch.tensor([SEQ, 3])}, "relative": BUCKETS, "bias": {}}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_backward_equals_autograd(name, call):
    layer, options = _layer(name), dict(CALLS[call])
    x, up = (torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64) for _ in range(2))
    table = torch.nn.Parameter(torch.randn(8, HEADS, dtype=torch.float64))
    bias = torch.randn(HEADS, SEQ, SEQ, dtype=torch.float64, requires_grad=True)
    extra = {"relative": {"relative_bias": table}, "bias": {"bias": bias}}.get(call, {})
    leaf = x.clone().requires_grad_()
    layer(leaf, **options, **extra).backward(up)
    parameters = [*layer.parameters(), table]
    tape, d_bias = _tape(parameters), torch.ones_like(bias)
    with torch.no_grad(), tape.arena.frame("layer"):
        layer(x, tape=tape, **options, **extra)
        more = {"relative": {"relative_bias": table}, "bias": {"d_bias": d_bias}}.get(call, {})
        dx = layer.backward(up, tape, **more)
        tape.finish()
    _close(dx, leaf.grad, 1e-12)
    for p in layer.parameters():
        _close(tape.gradients[p], p.grad, 1e-12)
    if call == "relative":
        _close(tape.gradients[table], table.grad, 1e-12)
    if call == "bias":
        _close(d_bias - 1.0, bias.grad, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("name", ["qwen3", "rotary interleaved"])
def test_backends_agree(name, backend):
    """In float32, with gradients made in place in one strided buffer."""
    layer = _layer(name, torch.float32)
    exact = copy.deepcopy(layer).double()
    x, up = torch.randn(BATCH, SEQ, WIDTH), torch.randn(BATCH, SEQ, WIDTH)
    leaf = x.double().requires_grad_()
    expected = exact(leaf, tape=AutogradTape())
    expected.backward(up.double())
    tape = _tape(layer.parameters())
    with torch.no_grad(), fastlm.use_backend(backend), tape.arena.frame("layer"):
        y = layer(x, tape=tape)
        dx = layer.backward(up, tape)
        _close(y, expected, 5e-6)
        _close(dx, leaf.grad, 5e-6)
    for (n, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        if n != "c_attn.bias":  # whose part of the keys is 0 but for rounding
            _close(tape.gradients[p], q.grad, 5e-6)


@pytest.mark.parametrize("name", ["causal", "qwen3"])
def test_packed_sequences_are_rows_without_padding(name):
    layer, lengths = _layer(name), [6, 2, 3]
    rows = [torch.randn(n, WIDTH, dtype=torch.float64) for n in lengths]
    begins = torch.tensor([0, 6, 8, 11])
    positions = torch.cat([torch.arange(n) for n in lengths]) if layer.rotary is not None else None
    x = torch.cat(rows)
    y = layer(x, packed=fnn.Packed(begins, 6), positions=positions)
    _close(y, torch.cat([layer(r[None])[0] for r in rows]), 1e-12)
    leaf, up = x.clone().requires_grad_(), torch.randn_like(x)
    layer(leaf, packed=fnn.Packed(begins, 6), positions=positions).backward(up)
    tape = _tape(layer.parameters())
    with torch.no_grad(), tape.arena.frame("layer"):
        layer(x, tape=tape, packed=fnn.Packed(begins, 6), positions=positions)
        _close(layer.backward(up, tape), leaf.grad, 1e-12)
        tape.finish()
    for p in layer.parameters():
        _close(tape.gradients[p], p.grad, 1e-12)
    if layer.rotary is not None:
        with pytest.raises(ValueError, match="positions: got None with packed sequences"):
            layer(x, packed=fnn.Packed(begins, 6))


def _cross(dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = fnn.CrossAttention(WIDTH, HEADS, **options).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_head": 2, "memory_width": 10, "bias": False, "scale": 1.0}, {"head_dim": 5}], ids=str
)
def test_cross_attention(options):
    layer = _cross(**options)
    x, up = (torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64) for _ in range(2))
    memory = torch.randn(BATCH, MEMORY, options.get("memory_width", WIDTH), dtype=torch.float64)
    lengths = torch.tensor([2, MEMORY])
    leaves = [t.clone().requires_grad_() for t in (x, memory)]
    y = layer(*leaves, key_lengths=lengths)
    y.backward(up)
    d, kv = layer.head_dim, layer.n_kv_head
    q = layer.c_q(x).unflatten(-1, (-1, d)).transpose(1, 2)
    k, v = (
        t.unflatten(-1, (-1, d)).transpose(1, 2).repeat_interleave(HEADS // kv, 1)
        for t in layer.c_kv(memory).split(kv * d, -1)
    )
    mask = (torch.arange(MEMORY) < lengths[:, None])[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=options.get("scale"))
    _close(y, layer.c_proj(out.transpose(1, 2).flatten(-2)), 1e-12)
    assert not leaves[1].grad[0, 2:].any() and leaves[1].grad[0, :2].all()

    tape = _tape(layer.parameters())
    with torch.no_grad(), tape.arena.frame("layer"):
        layer(x, memory, tape=tape, key_lengths=lengths)
        layer(x, memory, tape=tape, key_lengths=lengths)
        total = layer.backward(up, tape)[1]
        dx, both = layer.backward(up, tape, d_memory=total)
        tape.finish()
        assert both is total
    _close(dx, leaves[0].grad, 1e-12)
    _close(both, 2 * leaves[1].grad, 1e-12)
    for p in layer.parameters():
        _close(tape.gradients[p], 2 * p.grad, 1e-12)


def test_cross_attention_of_packed_sequences():
    layer, lengths, memory_lengths = _cross(), [3, 4], [5, 2]
    xs = [torch.randn(n, WIDTH, dtype=torch.float64) for n in lengths]
    memories = [torch.randn(n, WIDTH, dtype=torch.float64) for n in memory_lengths]
    packed = fnn.Packed(torch.tensor([0, 3, 7]), 4), fnn.Packed(torch.tensor([0, 5, 7]), 5)
    x, memory = torch.cat(xs), torch.cat(memories)
    leaves, up = [t.clone().requires_grad_() for t in (x, memory)], torch.randn_like(x)
    y = layer(*leaves, packed=packed)
    _close(y, torch.cat([layer(a[None], m[None])[0] for a, m in zip(xs, memories, strict=True)]), 1e-12)
    y.backward(up)
    tape = _tape(layer.parameters())
    with torch.no_grad(), tape.arena.frame("layer"):
        layer(x, memory, tape=tape, packed=packed)
        for ours, leaf in zip(layer.backward(up, tape), leaves, strict=True):
            _close(ours, leaf.grad, 1e-12)
        tape.finish()


@pytest.mark.parametrize("name", ["causal", "grouped", "qwen3"])
def test_cache_continues_rows_of_different_length(name):
    layer, lengths, steps = _layer(name), [2, 5, 1], 3
    rows = [torch.randn(n + steps, WIDTH, dtype=torch.float64) for n in lengths]
    whole = [layer(r[None])[0] for r in rows]
    cache = fnn.KVCache(1, 5 + steps)
    prompt = torch.full((3, 5, WIDTH), torch.nan, dtype=torch.float64)  # what pads must not matter
    for row, r, n in zip(prompt, rows, lengths, strict=True):
        row[:n] = r[:n]
    y = layer(prompt.nan_to_num(7.0), cache=cache.layers[0])
    cache.advance(lengths, 3, y.device)
    for b, n in enumerate(lengths):
        _close(y[b, :n], whole[b][:n], 1e-12)
    order = [0, 1, 2]
    for step in range(steps):
        if step == 1:  # rows move, then two of them go
            cache.reorder(torch.tensor([2, 0, 1]))
            order = [2, 0, 1]
        if step == 2:
            cache.reorder(torch.tensor([1, 1]))
            order = [0, 0]
        x = torch.stack([rows[b][lengths[b] + step] for b in order])[:, None]
        positions = cache.positions(len(order), 1, x.device)
        assert positions.flatten().tolist() == [lengths[b] + step for b in order]
        y = layer(x, cache=cache.layers[0], positions=positions)
        cache.advance(1, len(order), y.device)
        for i, b in enumerate(order):
            _close(y[i, 0], whole[b][lengths[b] + step], 1e-12)
    with pytest.raises(ValueError, match="cache: got 9 tokens in a row; allowed: its capacity, 8"):
        layer(x, cache=cache.layers[0])


def test_cache_of_equal_rows_takes_chunks_and_a_relative_bias():
    layer = _layer("causal")
    table = torch.randn(8, HEADS, dtype=torch.float64)
    options = {"relative_bias": table, "relative_bidirectional": False, "relative_max_distance": 16}
    x = torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64)
    whole, cache, done = layer(x, **options), fnn.KVCache(1, SEQ), 0
    for tokens in (2, 3, 1):
        y = layer(x[:, done : done + tokens], cache=cache.layers[0], **options)
        cache.advance(tokens, BATCH, y.device)
        _close(y, whole[:, done : done + tokens], 1e-12)
        done += tokens
    cache = fnn.KVCache(1, SEQ)
    layer(x[:, :3], cache=cache.layers[0])
    cache.advance([3, 2], BATCH, x.device)
    with pytest.raises(ValueError, match="cache: got relative_bias for rows of different length"):
        layer(x[:, 3:4], cache=cache.layers[0], **options)
    with pytest.raises(ValueError, match="cache: got 2 tokens at once for rows of different length"):
        layer(x[:, 3:5], cache=cache.layers[0])


def test_memory_is_projected_once():
    layer, x = _cross(), torch.randn(BATCH, 2, WIDTH, dtype=torch.float64)
    memory = torch.randn(BATCH, MEMORY, WIDTH, dtype=torch.float64)
    expected, cache = layer(x, memory), fnn.MemoryCache()
    _close(layer(x[:, :1], memory, cache=cache), expected[:, :1], 1e-12)
    _close(layer(x[:, 1:], memory * torch.nan, cache=cache), expected[:, 1:], 1e-12)
    cache.reorder(torch.tensor([1, 1, 0]))
    _close(layer(x[[1, 1, 0]], memory, cache=cache), expected[[1, 1, 0]], 1e-12)


def test_dropout_acts_in_training_only_and_is_the_seeds():
    layer = fnn.SelfAttention(WIDTH, HEADS, dropout=0.5)
    x = torch.randn(BATCH, SEQ, WIDTH)
    torch.manual_seed(3)
    a = layer(x)
    torch.manual_seed(3)
    assert torch.equal(a, layer(x)) and not torch.equal(a, layer(x))
    _close(layer.eval()(x), _written_out(layer, x, torch.tensor(True)))


def test_compiles_whole():
    layer = _layer("qwen3", torch.float32)
    x = torch.randn(BATCH, SEQ, WIDTH)
    torch._dynamo.reset()
    _close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_head": 5}, "n_head: got 5; allowed: a divisor of n_embd = 24"),
        ({"n_kv_head": 3}, "n_kv_head: got 3; allowed: a divisor of n_head = 4"),
        ({"dropout": 1.0}, r"dropout: got 1.0; allowed: \[0, 1\)"),
        ({"rotary": fnn.RotaryEmbedding(8, 4)}, "rotary: got rotary_dim 8; allowed: up to head_dim = 6"),
    ],
)
def test_options_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        fnn.SelfAttention(WIDTH, **({"n_head": HEADS} | options))
