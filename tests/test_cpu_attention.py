"""Attention in C++ beyond one tile of keys: the same bits however work is cut, and dropout across tiles."""

from __future__ import annotations

import pytest
import torch

from fastlm import backends, check, native, registry
from fastlm.ops import attention, attention_dropout_mask
from fastlm.samples import Normal, Sample

if native.why_not("cpu"):
    pytest.skip(native.why_not("cpu"), allow_module_level=True)

OP = registry.get("attention")
pytestmark = pytest.mark.backend("cpu")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def results(q, k, v, dout, **options):
    """out, dq, dk, dv by the C++ kernels, in memory that was NaN before."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with backends.use_backend("cpu"), check.poisoned_memory():
        out = attention(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def draw(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_many_tiles(dtype, causal):
    """Against float64, with a partial last tile and an odd number of queries in the last block."""
    shapes = {"q": (1, 2, 131, 24), "k": (1, 1, 1061, 24), "v": (1, 1, 1061, 17)}
    sample = Sample("many tiles", **{n: Normal(s) for n, s in shapes.items()}, causal=causal)
    check.check_budget(OP, sample, dtype, "cpu")


@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_same_bits_in_any_batch_and_for_any_number_of_threads(dtype, causal):
    """A large batch has a task for each head, a small one for each tile of keys, with partial sums of dq."""
    batch, keys = 33, 1100
    q, k, v, dout = draw(
        dtype, (batch, 1, 70, 8), (batch, 1, keys, 8), (batch, 1, keys, 8), (batch, 1, 70, 8)
    )
    lengths = torch.randint(0, keys + 1, (batch,), generator=torch.Generator().manual_seed(1))
    lengths[:3] = torch.tensor([keys, 0, 513])
    together = results(q, k, v, dout, causal=causal, key_lengths=lengths)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # also sets the OpenMP runtime that torch and the extension share
        again = results(q, k, v, dout, causal=causal, key_lengths=lengths)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(together, again, strict=True):
        assert torch.equal(a, b)
    for i in range(4):
        one = slice(i, i + 1)
        alone = results(q[one], k[one], v[one], dout[one], causal=causal, key_lengths=lengths[one])
        for name, whole, ours in zip(("out", "dq", "dk", "dv"), together, alone, strict=True):
            assert torch.equal(whole[one], ours), f"{name} of batch {i}"


@pytest.mark.parametrize("keys", [600, 1100])
def test_dropout_across_tiles(keys):
    """Bit for bit the public mask: one-hot rows of v or dout show in out or dv which weights are kept."""
    seed, p, queries = torch.tensor([-7]), 0.4, 66
    mask = attention_dropout_mask(seed, p, 1, 2, queries, keys)
    q, k, dout = draw(torch.float32, (1, 2, queries, 8), (1, 2, keys, 8), (1, 2, queries, 100))
    for first in range(0, keys, 100):
        v = torch.zeros(1, 2, keys, 100)
        v[:, :, first : first + 100] = torch.eye(100)
        out = results(q, k, v, dout, dropout_p=p, dropout_seed=seed)[0]
        assert torch.equal(out != 0, mask[..., first : first + 100])
    v = draw(torch.float32, (1, 2, keys, queries))[0]
    eye = torch.eye(queries).expand(1, 2, queries, queries)
    dv = results(q, k, v, eye, dropout_p=p, dropout_seed=seed)[3]
    assert torch.equal(dv.mT != 0, mask)
