"""Philox's known answers, and what generated tests cannot know of dropout, gelu, embedding and norms."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import available
from torch import Tensor

from fastlm import backends, nn, ops, registry
from fastlm.philox import drop_threshold, philox, philox_lanes

# Random123's known answers (kat_vectors, philox4x32 with 10 rounds): key, counter, words.
PI = (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
KNOWN = [
    (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (-1, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(seed, counter, words):
    key = torch.tensor([seed])
    assert " ".join(f"{int(w):08x}" for w in philox(key, *counter)) == words
    as_tensors = philox(key, *(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(w):08x}" for w in as_tensors) == words


def test_philox_lanes_order():
    seed, c0 = torch.tensor(7), torch.arange(5).expand(3, 5)
    lanes = philox_lanes(seed, c0, torch.arange(3)[:, None], 1, 2)
    assert lanes.shape == (3, 20)
    for row in range(3):
        for n in range(20):
            assert lanes[row, n] == philox(seed, n >> 2, row, 1, 2)[n & 3]


def test_drop_threshold_ends():
    assert drop_threshold(0.0) == 0 and drop_threshold(1.0) == 2**32 and drop_threshold(0.5) == 2**31


def on_backends(name: str):
    """Every backend that has the op here, with the device it runs on."""
    return pytest.mark.parametrize(("backend", "device"), available(registry.get(name)))


def seeds(device: str, value: int = -0x123456789ABCDEF) -> Tensor:
    return torch.tensor([value], device=device)


@on_backends("dropout")
def test_dropout_mask_is_the_reference_mask(backend, device):
    """Bit for bit, in both dtypes and in backward; ones are far from 0, so the mask can be read off."""
    from fastlm.ops.dropout import keep_mask

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(7, 1031, dtype=dtype, device=device, requires_grad=True)
        with backends.use_backend(backend):
            y = ops.dropout(x, 0.3, seed=seeds(device))
            (dx,) = torch.autograd.grad(y, x, torch.full_like(y, -2.0))
        mask = keep_mask(seeds(device), x.shape, 0.3)
        assert torch.equal(y != 0, mask)
        assert torch.equal(dx, y * -2.0)


@on_backends("dropout")
def test_dropout_keep_rate(backend, device):
    """Within five standard deviations of 1 - p, and neighbours are independent."""
    n = 1 << 15
    x = torch.ones(n, device=device)
    for p in (0.1, 0.5, 0.9):
        with backends.use_backend(backend):
            kept = (ops.dropout(x, p, seed=seeds(device, 11)) != 0).double().cpu()
        assert abs(kept.mean().item() - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / n)
        for lag in (1, 2, 3, 4, 64):
            both = (kept[:-lag] * kept[lag:]).mean().item()
            assert abs(both - (1 - p) ** 2) <= 5 * math.sqrt((1 - p) ** 2 * (1 - (1 - p) ** 2) * 3 / n)


@on_backends("dropout")
def test_dropout_drops_what_is_not_finite(backend, device):
    """A dropped infinity or NaN is 0; p = 1 drops everything."""
    x = torch.full((64,), math.inf, device=device)
    x[1::2] = math.nan
    with backends.use_backend(backend):
        y = ops.dropout(x, 0.5, seed=seeds(device))
        everything = ops.dropout(x, 1.0, seed=seeds(device))
    kept = ops.dropout(torch.ones_like(x), 0.5, seed=seeds(device)) != 0
    assert 0 < kept.sum() < 64
    assert torch.equal(y[~kept], torch.zeros_like(y[~kept]))
    assert not y[kept].isfinite().any()
    assert torch.equal(everything, torch.zeros_like(x))


def test_dropout_draws_its_seed_from_torchs_generator():
    x = torch.ones(256)
    torch.manual_seed(5)
    first, second = ops.dropout(x, 0.5), ops.dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(ops.dropout(x, 0.5), first)
    assert not torch.equal(first, second)
    assert ops.dropout(x, 0.0).data_ptr() != x.data_ptr()


# At -inf, inf, NaN, -1e30, 1e30, -41, 41, 0, -0: value and derivative. PyTorch has NaN where 0 meets infinity in silu and gelu.
_inf, _nan = math.inf, math.nan
LIMITS = {
    "gelu": ([0, _inf, _nan, 0, 1e30, 0, 41, 0, 0], [0, 1, _nan, 0, 1, 0, 1, 0.5, 0.5]),
    "silu": (
        [0, _inf, _nan, 0, 1e30, -41 * math.exp(-41), 41, 0, 0],
        [0, 1, _nan, 0, 1, -40 * math.exp(-41), 1, 0.5, 0.5],
    ),
    "relu": ([0, _inf, _nan, 0, 1e30, 0, 41, 0, 0], [0, 1, 1, 0, 1, 0, 1, 0, 0]),
    "relu_squared": ([0, _inf, _nan, 0, _inf, 0, 1681, 0, 0], [0, _inf, _nan, 0, 2e30, 0, 82, 0, 0]),
}


@on_backends("gelu")
@pytest.mark.parametrize("form", ["gelu", "gelu tanh", "silu", "relu", "relu_squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_of_activations(backend, device, form, dtype):
    name, _, approximate = form.partition(" ")
    options = {"approximate": approximate} if approximate else {}
    values = [-math.inf, math.inf, math.nan, -1e30, 1e30, -41.0, 41.0, 0.0, -0.0]
    expected, slope = (torch.tensor([v], dtype=dtype, device=device) for v in LIMITS[name])
    x = torch.tensor([values], dtype=dtype, device=device, requires_grad=True)
    for bias in (None, torch.zeros(len(values), dtype=dtype, device=device)):
        with backends.use_backend(backend):
            y = getattr(ops, name)(x, bias, **options)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        # bfloat16 kernels use polynomials that are good to 3e-4, a tenth of its rounding error
        near = {"rtol": 1e-5 if dtype == torch.float32 else 1e-2, "atol": 0.0, "equal_nan": True}
        torch.testing.assert_close(y, expected, **near)
        torch.testing.assert_close(dx, slope, **near)
    if name == "relu":
        torch.testing.assert_close(dx, torch.autograd.grad(x.relu(), x, torch.ones_like(y))[0])


@on_backends("gelu")
@pytest.mark.parametrize("columns", [64, 67])
def test_fused_dropout_is_dropout_of_the_activation(backend, device, columns):
    """Bit for bit in float32, forward and backward: the same mask at the same places."""
    generator = torch.Generator().manual_seed(0)
    x, up, dy = (torch.randn(20, columns, generator=generator).to(device) for _ in range(3))
    bias = torch.randn(columns, generator=generator).to(device)
    x, up, bias = (t.requires_grad_() for t in (x, up, bias))
    for b in (bias, None):
        leaves = [x, up] if b is None else [x, up, b]
        with backends.use_backend(backend):
            for fused, apart in (
                (ops.silu(x, b, dropout_p=0.3, seed=seeds(device)), ops.silu(x, b)),
                (ops.geglu(x, up, b, dropout_p=0.3, seed=seeds(device)), ops.geglu(x, up, b)),
            ):
                apart = ops.dropout(apart, 0.3, seed=seeds(device))
                assert torch.equal(fused, apart) and 0 < (fused == 0).sum() < fused.numel()
                for got, wanted in zip(
                    torch.autograd.grad(fused, leaves, dy, allow_unused=True),
                    torch.autograd.grad(apart, leaves, dy, allow_unused=True), strict=True,
                ):  # fmt: skip
                    assert got is wanted is None or torch.equal(got, wanted)


@on_backends("swiglu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_split_gates_agree(backend, device, dtype):
    """Packed in either order, and the halves of a chunk, read where they lie: the same bits."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 5, 96, generator=generator).to(device, dtype)
    bias = torch.randn(96, generator=generator).to(device)
    dy = torch.randn(2, 5, 48, generator=generator).to(device, dtype)

    def run(up_first=False, **args):
        leaves = {name: a.detach().requires_grad_() for name, a in args.items()}
        with backends.use_backend(backend):
            y = ops.swiglu(**leaves, up_first=up_first)
            return y, *torch.autograd.grad(y, list(leaves.values()), dy)

    def same(a, b):  # PyTorch, which computes the reference, sums in another order for other strides
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if backend == "reference" else 0)

    (first, second), (b_first, b_second) = packed.chunk(2, -1), bias.chunk(2)
    y, d_packed, d_bias = run(gate=packed, gate_bias=bias)
    y_split, d_gate, d_up, d_gate_bias, d_up_bias = run(gate=first, up=second, gate_bias=b_first, up_bias=b_second)
    copies = run(gate=first.contiguous(), up=second.contiguous(), gate_bias=b_first, up_bias=b_second)
    other_way = torch.cat((second, first), -1), torch.cat((b_second, b_first))
    y_other, d_other, d_bias_other = run(up_first=True, gate=other_way[0], gate_bias=other_way[1])
    for a, b in zip((y, d_gate, d_up, d_gate_bias, d_up_bias), copies, strict=True):
        same(a, b)
    same(y, y_split)
    same(y, y_other)
    same(d_packed, torch.cat((d_gate, d_up), -1))
    same(d_bias, torch.cat((d_gate_bias, d_up_bias)))
    same(d_other, torch.cat((d_up, d_gate), -1))
    same(d_bias_other, torch.cat((d_up_bias, d_gate_bias)))


def test_chunks_are_read_without_a_copy():
    """By the launchers of both native backends."""
    pytest.importorskip("triton")
    from fastlm.kernels.activation import _rows
    from fastlm.registry import _readable

    x = torch.randn(2, 5, 96)
    gate, up = x.chunk(2, -1)
    assert _readable(registry.get("swiglu"), "gate", gate) is gate
    for chunk, rows in zip((gate, up), _rows((gate, up), False), strict=True):
        assert rows.data_ptr() == chunk.data_ptr() and rows.shape == (10, 48) and rows.stride() == (96, 1)


@on_backends("gelu")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_left_tail_is_relatively_accurate(backend, device, approximate):
    """Where 1 + erf cancels: relative to float64, down to -12."""
    x = torch.linspace(-12.0, -1.0, 3000, device=device)
    if approximate == "none":
        exact = x.double() * 0.5 * torch.erfc(x.double() * -math.sqrt(0.5))
    else:
        z = math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
        exact = x.double() * torch.sigmoid(2 * z)
    keep = exact.abs() > 1e-36
    assert keep.sum() > 2000
    with backends.use_backend(backend):
        y = ops.gelu(x, None, approximate).double()
    # the exponent's own rounding, up to 87 units of eps
    assert ((y - exact) / exact)[keep].abs().max().item() <= 128 * torch.finfo(torch.float32).eps


@on_backends("add_layer_norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_layer_norm_either_gradient_alone(backend, device, dtype):
    """With one upstream gradient absent, the result is that of a gradient of zeros."""
    torch.manual_seed(0)
    x, residual = (torch.randn(6, 40, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(40, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    leaves = (x, residual, weight, bias)
    with backends.use_backend(backend):
        out = ops.add_layer_norm(x, residual, weight, bias)
        ups = [torch.randn_like(o) for o in out]
        for i in range(2):
            alone = torch.autograd.grad(out[i], leaves, ups[i], retain_graph=True, allow_unused=True)
            zeros = [u if j == i else torch.zeros_like(u) for j, u in enumerate(ups)]
            for a, b in zip(alone, torch.autograd.grad(out, leaves, zeros, retain_graph=True), strict=True):
                assert torch.equal(a, b)


@on_backends("add_layer_norm")
def test_add_layer_norm_gradients_do_not_alias(backend, device):
    """x and residual share one gradient, but their .grad are two tensors, neither the upstream one."""
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    with backends.use_backend(backend):
        total = ops.add_layer_norm(x, residual)[1]
        upstream = torch.randn_like(total)
        total.backward(upstream)
    assert torch.equal(x.grad, upstream) and torch.equal(residual.grad, upstream)
    assert len({x.grad.data_ptr(), residual.grad.data_ptr(), upstream.data_ptr()}) == 3


@on_backends("add_layer_norm")
def test_add_layer_norm_normalises_the_rounded_sum(backend, device):
    x = (torch.randn(4, 64) * 100).to(device, torch.bfloat16)
    residual = torch.randn(4, 64).to(device, torch.bfloat16)
    with backends.use_backend(backend):
        y, total = ops.add_layer_norm(x, residual)
        # Triton's interpreter rounds to bfloat16 towards zero
        slack = 2.0**-7 if backend == "triton" and device == "cpu" else 0.0
        torch.testing.assert_close(total, x + residual, rtol=slack, atol=0.0)
        assert torch.equal(y, ops.layer_norm(total))


def test_add_layer_norm_promotes():
    """A bfloat16 branch joins a float32 stream: a float32 sum, and each gradient in its input's dtype."""
    x = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(3, 8, requires_grad=True)
    y, total = ops.add_layer_norm(x, residual)
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + residual)
    total.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == torch.float32


@on_backends("embedding")
@pytest.mark.parametrize("tokens", [1, 257, 1000])
@pytest.mark.parametrize("words", [1, 3, 2000])
def test_embedding_sums_runs_of_any_length(backend, device, tokens, words):
    """Small integers sum exactly in float32, so the gradient must be exact, wherever the blocks end."""
    generator = torch.Generator().manual_seed(words + tokens)
    ids = torch.randint(0, words, (tokens,), generator=generator).to(device)
    weight = torch.zeros(words, 5, device=device, requires_grad=True)
    dy = torch.randint(-8, 9, (tokens, 5), generator=generator).float().to(device)
    with backends.use_backend(backend):
        ops.embedding(ids, weight).backward(dy)
    expected = torch.zeros(words, 5).index_add_(0, ids.cpu(), dy.cpu())
    assert torch.equal(weight.grad.cpu(), expected)


@on_backends("embedding")
def test_embedding_places_are_the_default_positions(backend, device):
    ids = torch.randint(0, 9, (2, 3, 5), device=device)
    weight = torch.randn(9, 12, device=device, requires_grad=True)
    table = torch.randn(6, 12, device=device, requires_grad=True)
    dy = torch.randint(-8, 9, (2, 3, 5, 12), device=device).float()
    results = []
    with backends.use_backend(backend):
        for positions in (None, torch.arange(5, device=device).expand(2, 3, 5)):
            y = ops.embedding(ids, weight, positions, table)
            results.append((y, *torch.autograd.grad(y, (weight, table), dy)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][2][5], torch.zeros(12, device=device)), "no token stands at the last place"


@pytest.mark.parametrize(
    ("backend", "device"),
    [c for c in available(registry.get("embedding")) if c.values[0] in ("triton", "cuda")],
)
def test_embedding_bad_ids_on_a_gpu(backend, device):
    """Where raising would have to wait for the device: NaN rows, no gradient, nothing else touched."""
    ids = torch.tensor([2, -1, 0, 5, 2, 2**40], device=device)
    weight = torch.randn(5, 8, device=device, requires_grad=True)
    with backends.use_backend(backend):
        y = ops.embedding(ids, weight)
        y.backward(torch.ones_like(y))
    bad = torch.tensor([False, True, False, True, False, True], device=device)
    assert y[bad].isnan().all() and torch.equal(y[~bad], weight[ids[~bad]])
    counts = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0], device=device)
    assert torch.equal(weight.grad, counts[:, None].expand(5, 8))


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("name", ["dropout", "gelu", "swiglu", "embedding", "add_layer_norm"])
def test_bits_do_not_depend_on_threads(name):
    """Large enough for many blocks of work."""
    if why := backends.why_not(registry.get(name), "cpu", [torch.empty(1)]):
        pytest.skip(why)
    torch.manual_seed(0)
    x, weight = torch.randn(300, 400), torch.randn(400)
    calls = {
        "dropout": lambda leaves: ops.dropout(leaves[0], 0.3, seed=seeds("cpu")),
        "gelu": lambda leaves: ops.gelu(leaves[0], leaves[1]),
        "swiglu": lambda leaves: ops.swiglu(x * 2, leaves[0], leaves[1], dropout_p=0.2, seed=seeds("cpu")),
        "embedding": lambda leaves: ops.embedding(torch.arange(3000) % 37, leaves[0]),
        "add_layer_norm": lambda leaves: ops.add_layer_norm(leaves[0], x * 2, leaves[1])[0],
    }
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with backends.use_backend("cpu"):
                y = calls[name](leaves)
                grads = torch.autograd.grad(
                    y, leaves, torch.sin(torch.arange(y.numel())).view_as(y), allow_unused=True
                )
            results.append([y, *(g for g in grads if g is not None)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_cache_holds_is_written_whole(dtype):
    """Outputs of more than 16 MiB, which the C++ kernels write past the caches: whole, partial and unaligned vectors."""
    if why := backends.why_not(registry.get("relu"), "cpu", [torch.empty(1)]):
        pytest.skip(why)
    elements = (16 << 20) // dtype.itemsize + 37
    x = torch.randn(elements, dtype=dtype).requires_grad_()
    packed = torch.randn(elements // 1000 + 1, 2 * 1001, dtype=dtype).requires_grad_()
    with backends.use_backend("cpu"):
        for ours, theirs, leaf in (
            (ops.relu(x), x.relu(), x),
            (ops.reglu(packed), packed[:, :1001].relu() * packed[:, 1001:], packed),
        ):
            assert ours.nbytes > 16 << 20
            assert torch.equal(ours, theirs)
            dy = torch.randn_like(ours)
            (d_ours,), (d_theirs,) = (torch.autograd.grad(y, leaf, dy) for y in (ours, theirs))
            assert torch.equal(d_ours, d_theirs)


SCALINGS = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@on_backends("rotary_embedding")
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_embedding_is_llamas(backend, device, scaling):
    """Values and gradients of transformers' own, in both memory layouts."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_type": "default", "rope_theta": 500.0} | SCALINGS[scaling]
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=3, max_position_embeddings=256, rope_parameters=parameters
    )
    table = nn.RotaryEmbedding(32, 256, base=500.0, scaling=SCALINGS[scaling]).to(device)
    positions = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0)).to(device)
    q, dy = (torch.randn(2, 7, 3, 32, device=device) for _ in range(2))
    leaf = q.clone().requires_grad_()
    cos, sin = LlamaRotaryEmbedding(config).to(device)(q, positions)
    exact = apply_rotary_pos_emb(leaf, leaf, cos, sin, unsqueeze_dim=2)[0]
    exact.backward(dy)
    for layout in ("heads inside", "view"):
        ours = q.clone().requires_grad_()
        with backends.use_backend(backend):
            if layout == "view":
                y = table(ours.transpose(1, 2), positions).transpose(1, 2)
            else:
                y = table(ours, positions, seq_dim=-3)
            y.backward(dy)
        assert y.is_contiguous(), "y does not lie in memory as x does"
        # transformers rounds its angles, of up to 256, to float32
        torch.testing.assert_close(y, exact, rtol=0, atol=2e-4)
        torch.testing.assert_close(ours.grad, leaf.grad, rtol=0, atol=2e-4)


@on_backends("rotary_embedding")
def test_rotary_embedding_is_gpt_js(backend, device):
    """Interleaved pairs of a part of the columns, against transformers' GPT-J."""
    pytest.importorskip("transformers")
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    sin, cos = create_sinusoidal_positions(20, 12)[3:9].chunk(2, -1)
    x = torch.randn(2, 6, 3, 20, device=device)
    turned = apply_rotary_pos_emb(x[..., :12], sin[None].to(device), cos[None].to(device))
    table = nn.RotaryEmbedding(12, 20, interleaved=True).to(device)
    with backends.use_backend(backend):
        y = table(x, torch.arange(3, 9, device=device), seq_dim=-3)
    torch.testing.assert_close(y, torch.cat((turned, x[..., 12:]), -1), rtol=0, atol=1e-5)


@on_backends("rotary_embedding")
def test_rotary_scores_depend_on_distances_alone(backend, device):
    table = nn.RotaryEmbedding(16, 64).to(device)
    q, k = (torch.randn(1, 1, 5, 24, device=device) for _ in range(2))
    at = torch.arange(5, device=device)
    with backends.use_backend(backend):
        near, far = ((table(q, at + shift) @ table(k, at + shift).mT) for shift in (0, 40))
    torch.testing.assert_close(near, far, rtol=0, atol=2e-5)


@on_backends("rotary_embedding")
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_backward_may_overwrite_its_upstream_gradient(backend, device, interleaved):
    """A buffer of the caller's choice: the engine's own."""
    op = registry.get("rotary_embedding")
    table = nn.RotaryEmbedding(12, 6).to(device)
    saved = table.cos, table.sin, None
    dy = torch.randn(2, 3, 6, 20, device=device)
    with backends.use_backend(backend):
        (dx,) = op.run_backward((dy,), saved, (interleaved,), (True,))
        buffer = dy.clone()
        (same,) = op.run_backward((buffer,), saved, (interleaved,), (True,), into={"x": buffer})
    assert same is buffer and torch.equal(buffer, dx) and not torch.equal(dx, dy)


@pytest.mark.backend("triton")
def test_rotary_bad_positions_on_a_gpu():
    """Where raising would have to wait for the device: NaN in the turned columns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = nn.RotaryEmbedding(8, 6).to(device)
    with backends.use_backend("triton"):
        y = table(torch.ones(3, 10, device=device), torch.tensor([5, 6, -1], device=device))
    assert y[0].isfinite().all() and y[1:, :8].isnan().all() and torch.equal(y[:, 8:], torch.ones_like(y[:, 8:]))
