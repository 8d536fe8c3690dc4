"""What the generated tests do not know of attention: mask, tiles, invariances; on every backend."""

from __future__ import annotations

import importlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastlm import backends, check, registry
from fastlm.ops import attention, attention_dropout_mask
from fastlm.samples import Normal, Sample

OP = registry.get("attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _backends(*names):
    """Each test on each backend; one that cannot run here is a visible skip."""
    cases = []
    for name in names:
        device = torch.device("cpu" if name == "cpu" else DEVICE)
        marks = [pytest.mark.backend(name)]
        if why := backends.why_not(OP, name, [torch.empty(1, device=device)]):
            marks = [pytest.mark.skip(reason=f"attention on {name}: {why}")]
        cases.append(pytest.param((name, device), id=name, marks=marks))
    return pytest.mark.parametrize("backend", cases, indirect=True)


every_backend = _backends("reference", "triton", "cpu")
native_backends = _backends("triton", "cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def backend(request):
    """The backend's device, with every op run by the backend."""
    name, device = request.param
    with backends.use_backend(name):
        yield device


def _draw(device, *shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def _terms(causal=False, scale=1.0, dropout_p=0.0, key_lengths=None, dropout_seed=None):
    """The arguments of the op's schema after q, k and v."""
    given = {
        "right": 0 if causal else -1, "left": -1, "top_left": False, "scale": scale, "softcap": 0.0,
        "bidirectional": True, "max_distance": 128, "dropout_p": dropout_p, "key_lengths": key_lengths,
        "dropout_seed": dropout_seed,
    }  # fmt: skip
    return tuple(given.get(name) for name, _, _ in OP.arguments[3:])


def _with_gradients(q, k, v, dout, **options):
    """out, dq, dk, dv."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _close(actual, exact, tolerance):
    error = check.max_error(actual, exact)
    largest = exact.abs().max().item() if exact.numel() else 0.0
    assert error[0] <= tolerance * max(largest, 1.0), f"error {error[0]:.3g} at {error[2]}"


# Sizes that are no multiple of any tile, one longer than the other by far, and of one row or column.
SIZES = [(127, 513), (113, 203), (1, 239), (239, 17), (3, 799)]


@dtypes
@every_backend
@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_many_tiles(queries, keys, causal, backend, dtype):
    shapes = {"q": (1, 1, queries, 24), "k": (1, 1, keys, 24), "v": (1, 1, keys, 16)}
    sample = Sample("many tiles", **{n: Normal(s) for n, s in shapes.items()}, causal=causal)
    # The contract saves the log-sum-exp, about log(keys), in float32: its rounding is a relative error of every weight.
    roundings = 1.0 if dtype != torch.float32 else max(1.0, math.log(keys) / 2)
    check.check_budget(OP, sample, dtype, None, backend.type, roundings=roundings)


@dtypes
@every_backend
def test_one_key(backend, dtype):
    """Its weight is 1: out is v, dv the sum of dout; dq and dk are 0 up to the rounding of out in delta."""
    shapes = ((1, 1, 239, 24), (1, 1, 1, 24), (1, 1, 1, 16), (1, 1, 239, 16))
    q, k, v, dout = _draw(backend, *shapes, dtype=dtype)
    out, dq, dk, dv = _with_gradients(q, k, v, dout)
    _close(out, v.expand_as(out), 2 * torch.finfo(dtype).eps)
    _close(dv, dout.double().sum(2, keepdim=True), 4 * torch.finfo(dtype).eps)
    rounding = 8 * torch.finfo(dtype).eps * (dout.double().abs() @ v.double().abs().mT)
    assert (dq.double().abs() <= rounding * k.abs().double()).all()
    assert (dk.double().abs() <= rounding.mT @ q.abs().double()).all()


@every_backend
@pytest.mark.parametrize("width", [2, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256])
def test_head_dims(width, backend):
    shapes = {"q": (1, 1, 5, width), "k": (1, 1, 20, width), "v": (1, 1, 20, 258 - width)}
    sample = Sample("head dim", **{n: Normal(s, 0.5) for n, s in shapes.items()}, causal=True)
    check.check_budget(OP, sample, torch.bfloat16, None, backend.type)


@pytest.mark.backend("triton")
@pytest.mark.skipif(DEVICE == "cuda", reason="these tiles are for the interpreter; a GPU has its own")
@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16), (128, 64)])
@pytest.mark.parametrize("edge", ["2", "4", "5", "11", "15", "20", "21", "22", "23", "26"])
def test_result_does_not_depend_on_tiles(tile, edge, monkeypatch):
    """Mask, dropout and the sections of heads hold for tiles of any shape."""
    tiles = importlib.import_module("fastlm.kernels.attention_tiles")
    for name in ("attention", "attention_backward"):
        module = importlib.import_module(f"fastlm.kernels.{name}")
        monkeypatch.setattr(module, "choose_tile", lambda *_: tiles.Tile(*tile, 1, 1))
        monkeypatch.setattr(module, "heads_in_l2", lambda *_: 3)
    sample = next(s for s in OP.samples if s.edge.split()[0] == edge)
    check.check_budget(OP, sample, torch.float32, "triton")


@pytest.mark.parametrize("tensor_memory", [False, True])
@pytest.mark.parametrize("room", [48 << 10, 64 << 10, 99 << 10, 163 << 10, 227 << 10])
def test_there_is_a_tile_for_every_chip(room, tensor_memory, monkeypatch):
    """Whatever the shared memory, head dim, dtype and options: powers of two from 16, and as much as fits."""
    pytest.importorskip("triton")
    tiles = importlib.import_module("fastlm.kernels.attention_tiles")
    monkeypatch.setattr(tiles, "INTERPRETING", SimpleNamespace(value=False))
    monkeypatch.setattr(tiles, "_shared_memory", lambda device: room)
    monkeypatch.setattr(tiles, "_tensor_memory", lambda: tensor_memory)
    for kernel, dtype, width, rows, extras in itertools.product(
        ("fwd", "dkdv", "dq"), (torch.float32, torch.bfloat16), (16, 32, 64, 128, 256), (1, 40, 5000), range(6)
    ):
        t = torch.empty(1, dtype=dtype)
        own, step, stages, warps = tiles.choose_tile(kernel, t, width, rows, extras)
        assert all(n >= 16 and n & (n - 1) == 0 for n in (own, step)) and stages >= 1 and warps in (4, 8)
        operands = 2 * (own + stages * step) * width * t.element_size()
        assert operands <= room or (own, step, stages) == (16, 16, 1)


@every_backend
@pytest.mark.parametrize("p", [0.17, 0.6])
def test_dropout_mask_is_the_same_in_forward_and_backward(p, backend):
    """Bit for bit: with v the identity, out shows which weights are kept; with dout the identity, dv does."""
    batch, heads, queries, keys = 2, 2, 37, 54
    seed = torch.tensor([0x0123456789ABCDEF], device=backend)
    mask = attention_dropout_mask(seed, p, batch, heads, queries, keys)
    q, k = _draw(backend, (batch, heads, queries, 16), (batch, heads, keys, 16))
    eye = torch.eye(keys, device=backend).expand(batch, heads, keys, keys)
    out = attention(q, k, eye, dropout_p=p, dropout_seed=seed)
    assert torch.equal(out != 0, mask)
    weights = (q @ k.mT / 4).softmax(-1)
    _close(out, weights * mask / (1 - p), 1e-5)

    v = torch.randn(batch, heads, keys, queries, device=backend)
    eye = torch.eye(queries, device=backend).expand(batch, heads, queries, queries)
    dv = _with_gradients(q, k, v, eye, dropout_p=p, dropout_seed=seed)[3]
    assert torch.equal(dv.mT != 0, mask)


def test_dropout_mask_is_random():
    """Kept as often as it should be along every axis; another seed, another mask; a longer one extends it."""
    p, shape = 0.3, (3, 4, 64, 80)
    seed = torch.tensor([5])
    mask = attention_dropout_mask(seed, p, *shape).double()
    for dim in range(4):
        others = [d for d in range(4) if d != dim]
        count = mask.numel() / shape[dim]
        assert (mask.mean(others) - (1 - p)).abs().max() <= 5 * (p * (1 - p) / count) ** 0.5
    agree = (mask == attention_dropout_mask(seed + 2**32, p, *shape)).double().mean()
    assert abs(agree - (p * p + (1 - p) ** 2)) <= 0.01
    assert torch.equal(mask[:2, :1, :7, :33].bool(), attention_dropout_mask(seed, p, 2, 1, 7, 33))


def test_dropout_gradients_by_finite_differences():
    """Every element, in float64, with grouped heads and a query that sees no key."""
    shapes = ((1, 4, 5, 3), (1, 2, 4, 3), (1, 2, 4, 2))
    inputs = [t.requires_grad_() for t in _draw("cpu", *shapes, dtype=torch.float64)]
    options = {"causal": True, "dropout_p": 0.4, "dropout_seed": torch.tensor([3])}
    mask = attention_dropout_mask(options["dropout_seed"], 0.4, 1, 4, 5, 4)
    assert mask.any() and not mask.all()
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **options), inputs, atol=1e-7, rtol=1e-5)


def test_reference_is_differentiable_by_autograd():
    """The reference's forward itself, with queries that see no key: no NaN, and twice differentiable."""
    shapes = ((1, 2, 5, 3), (1, 1, 3, 3), (1, 1, 3, 2))
    inputs = [t.requires_grad_() for t in _draw("cpu", *shapes, dtype=torch.float64)]

    def run(*t):
        return OP.forward(*t, *_terms(causal=True, scale=0.5))[0]

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@every_backend
def test_drawn_seed_follows_torch(backend):
    q, k, v = _draw(backend, (1, 2, 9, 16), (1, 2, 40, 16), (1, 2, 40, 16))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(attention(q, k, v, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_tape_needs_a_seed():
    q, k, v = _draw("cpu", (1, 1, 2, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"dropout_seed: .*None.*tape"):
        attention(q, k, v, dropout_p=0.5, tape=object())


@every_backend
@pytest.mark.parametrize("lengths", [(40, 17), (1, 0), (33, 32)])
def test_key_lengths_are_shorter_keys(lengths, backend):
    """As if the keys beyond were not there, gradients included, and NaN that stands there is not read."""
    q, k, v, dout = _draw(backend, (2, 2, 21, 16), (2, 1, 40, 16), (2, 1, 40, 16), (2, 2, 21, 16))
    padded_k, padded_v = k.clone(), v.clone()
    for b, n in enumerate(lengths):
        padded_k[b, :, n:] = padded_v[b, :, n:] = torch.nan
    key_lengths = torch.tensor(lengths, device=backend)
    out, dq, dk, dv = _with_gradients(q, padded_k, padded_v, dout, key_lengths=key_lengths)
    for b, n in enumerate(lengths):
        exact = _with_gradients(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], dout[b : b + 1])
        for ours, theirs in zip((out, dq, dk[:, :, :n], dv[:, :, :n]), exact, strict=True):
            _close(ours[b : b + 1], theirs, 1e-5)
        assert (dk[b, :, n:] == 0).all() and (dv[b, :, n:] == 0).all()


@every_backend
@pytest.mark.parametrize(("queries", "keys"), [(20, 50), (50, 20), (33, 33)])
def test_causal_ends_in_the_corner(queries, keys, backend):
    """PyTorch's own attention with the mask written out; blind queries give 0 and have gradient 0."""
    q, k, v, dout = _draw(backend, (1, 2, queries, 16), (1, 2, keys, 16), (1, 2, keys, 8), (1, 2, queries, 8))
    i, j = torch.arange(queries, device=backend)[:, None], torch.arange(keys, device=backend)
    visible = j <= i + keys - queries
    sees = visible.any(-1)
    assert int((~sees).sum()) == max(queries - keys, 0)
    leaves = [t[:, :, sees].double() if t is q else t.double() for t in (q, k, v)]
    leaves = [t.requires_grad_() for t in leaves]
    exact = F.scaled_dot_product_attention(*leaves, attn_mask=visible[sees])
    gradients = torch.autograd.grad(exact, leaves, dout[:, :, sees].double())
    out, dq, dk, dv = _with_gradients(q, k, v, dout, causal=True)
    for ours, theirs in zip((out[:, :, sees], dq[:, :, sees], dk, dv), (exact, *gradients), strict=True):
        _close(ours, theirs, 1e-5)
    assert (out[:, :, ~sees] == 0).all() and (dq[:, :, ~sees] == 0).all()


@every_backend
def test_grouped_heads_are_repeated_heads(backend):
    q, k, v, dout = _draw(backend, (1, 6, 19, 16), (1, 2, 37, 16), (1, 2, 37, 8), (1, 6, 19, 8))
    seed = torch.tensor([9], device=backend)
    options = {"causal": True, "dropout_p": 0.2, "dropout_seed": seed}
    grouped = _with_gradients(q, k, v, dout, **options)
    repeated = _with_gradients(q, *(t.repeat_interleave(3, 1) for t in (k, v)), dout, **options)
    repeated[2:] = [t.unflatten(1, (2, 3)).sum(2) for t in repeated[2:]]
    for ours, theirs in zip(grouped, repeated, strict=True):
        _close(ours, theirs, 1e-5)


@dtypes
@native_backends
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_batch_composition_changes_no_bit(backend, dtype, causal):
    """A sequence gives the same bits alone, among others, and with more padding where its length is given."""
    shapes = ((4, 2, 33, 16), (4, 1, 45, 16), (4, 1, 45, 16), (4, 2, 33, 16))
    q, k, v, dout = _draw(backend, *shapes, dtype=dtype)
    lengths = torch.tensor([45, 20, 0, 33], device=backend)
    together = _with_gradients(q, k, v, dout, causal=causal, key_lengths=lengths)
    for chosen in ([0], [1], [2], [3], [3, 1], [2, 0, 1]):
        part = [t[chosen] for t in (q, k, v, dout)]
        alone = _with_gradients(*part, causal=causal, key_lengths=lengths[chosen])
        for whole, ours in zip(together, alone, strict=True):
            assert torch.equal(whole[chosen], ours)
    full = torch.full((4,), 45, device=backend)
    for with_lengths, without in zip(
        _with_gradients(q, k, v, dout, causal=causal, key_lengths=full),
        _with_gradients(q, k, v, dout, causal=causal),
        strict=True,
    ):
        assert torch.equal(with_lengths, without)


@every_backend
def test_scores_in_the_thousands(backend):
    """exp would overflow from 89 on. A weight errs by a few roundings of its score and of lse, no more."""
    q, k, v, dout = _draw(backend, (1, 1, 40, 16), (1, 1, 70, 16), (1, 1, 70, 16), (1, 1, 40, 16))
    exact_args = [t.double().requires_grad_() for t in (q * 1000, k, v)]
    exact = OP.peer(*exact_args)
    gradients = torch.autograd.grad(exact, exact_args, dout.double())
    scores = (q * 1000) @ k.mT / 4
    assert scores.abs().max() > 2000
    bound = 16 * torch.finfo(torch.float32).eps * scores.abs().max().item()
    out, dq, dk, dv = _with_gradients(q * 1000, k, v, dout)
    _close(out, exact, bound)
    _close(dv, gradients[2], bound)
    assert dq.isfinite().all() and dk.isfinite().all()


@every_backend
def test_nan_is_not_hidden(backend):
    """A NaN in a query is in its row of the output and of dq, and in no other."""
    q, k, v, dout = _draw(backend, (1, 1, 20, 16), (1, 1, 37, 16), (1, 1, 37, 16), (1, 1, 20, 16))
    q[0, 0, 5, 3] = torch.nan
    out, dq, _, _ = _with_gradients(q, k, v, dout)
    others = [i for i in range(20) if i != 5]
    assert out[0, 0, 5].isnan().all() and dq[0, 0, 5].isnan().all()
    assert out[0, 0, others].isfinite().all() and dq[0, 0, others].isfinite().all()


@every_backend
def test_lse(backend):
    """The log-sum-exp of the scores, without dropout; -inf for a query that sees no key."""
    q, k, v = _draw(backend, (2, 2, 30, 16), (2, 1, 25, 16), (2, 1, 25, 16))
    lengths, seed = torch.tensor([25, 9], device=backend), torch.tensor([1], device=backend)
    terms = _terms(causal=True, scale=0.3, dropout_p=0.4, key_lengths=lengths, dropout_seed=seed)
    lse = OP.run_forward((q, k, v, *terms))[1]
    i, j = torch.arange(30, device=backend)[:, None], torch.arange(25, device=backend)
    visible = (j <= i - 5) & (j < lengths[:, None, None, None])
    scores = (0.3 * q.double() @ k.double().mT).masked_fill(~visible, -torch.inf)
    exact = scores.logsumexp(-1)
    blind = exact == -torch.inf
    assert int(blind.sum()) == 2 * 2 * 5
    assert (lse[blind] == -torch.inf).all()
    _close(lse[~blind], exact[~blind], 1e-6)
    assert lse.dtype == torch.float32


@every_backend
def test_heads_merge_without_a_copy(backend):
    """Projections come as (batch, seq, heads, head_dim), and so do the output and the gradients."""
    q, k, v, dout = (
        t.transpose(1, 2)
        for t in _draw(backend, (2, 20, 4, 16), (2, 33, 2, 16), (2, 33, 2, 8), (2, 20, 4, 8))
    )
    results = _with_gradients(q, k, v, dout)
    for t in results:
        assert t.transpose(1, 2).is_contiguous()
    contiguous = _with_gradients(*(t.contiguous() for t in (q, k, v, dout)))
    for a, b in zip(results, contiguous, strict=True):
        assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize(
    "needs",
    [n for n in itertools.product([True, False], repeat=3) if any(n)],
    ids=lambda needs: "".join(name for name, need in zip("qkv", needs, strict=True) if need),
)
def test_only_the_gradients_wanted(needs, backend):
    """Any subset of dq, dk and dv, with dropout, bitwise what the full backward gives."""
    q, k, v, dout = _draw(backend, (1, 4, 11, 8), (1, 2, 35, 8), (1, 2, 35, 8), (1, 4, 11, 8))
    seed = torch.tensor([4], device=backend)
    args = (q, k, v, *_terms(causal=True, scale=0.25, dropout_p=0.3, dropout_seed=seed))
    out = OP.run_forward(args)
    saved, options = OP.pick_saved(args, out)
    none = (False,) * 3
    full = OP.run_backward((dout, None), saved, options, (True,) * 3 + none)
    part = OP.run_backward((dout, None), saved, options, needs + none)
    for need, a, b in zip(needs, part[:3], full[:3], strict=True):
        assert a is None if not need else torch.equal(a, b)
