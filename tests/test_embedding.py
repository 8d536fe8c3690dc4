"""What generated tests cannot know of the embeddings: padding, torch's module, BertEmbeddings, accumulation."""

from __future__ import annotations

import pytest
import torch
from conftest import available

from fastlm import backends, check, ops, registry
from fastlm import nn as fnn
from fastlm.engine.arena import Arena
from fastlm.engine.tape import Tape

PLACES = available(registry.get("embedding"))


def _bert(dropout=0.0):
    transformers = pytest.importorskip("transformers")
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = transformers.BertConfig(
        vocab_size=97, hidden_size=36, max_position_embeddings=20, type_vocab_size=3, pad_token_id=5,
        hidden_dropout_prob=dropout, num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = BertEmbeddings(config)
    with torch.no_grad():
        for p in module.parameters():  # the padding row and the norm's parameters too
            p.copy_(torch.randn_like(p))
    return module


def _ours(bert, ids, positions, segments, **options):
    return ops.embedding_layer_norm(
        ids, bert.word_embeddings.weight, positions, bert.position_embeddings.weight, segments=segments,
        segment_weight=bert.token_type_embeddings.weight, norm_weight=bert.LayerNorm.weight,
        norm_bias=bert.LayerNorm.bias, eps=bert.LayerNorm.eps, padding_idx=bert.word_embeddings.padding_idx, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("given", [True, False])
def test_bert_embeddings(backend, device, given):
    """Output and all five gradients of transformers' module with random weights, padding among the tokens."""
    bert = _bert().to(device)
    ids = torch.randint(0, 97, (3, 11), device=device)
    ids[:, -3:] = 5
    positions = torch.randint(0, 20, (3, 11), device=device) if given else None
    segments = torch.randint(0, 3, (3, 11), device=device) if given else None
    up = torch.randn(3, 11, 36, device=device)
    exact, parameters = bert.double(), list(bert.parameters())
    y = exact(ids, segments, positions)
    expected = [y, *torch.autograd.grad(y, parameters, up.double())]
    bert.float()
    parameters = list(bert.parameters())
    with backends.use_backend(backend):
        y = _ours(bert, ids, positions, segments)
        got = [y, *torch.autograd.grad(y, parameters, up)]
    names = ["y", *(name for name, _ in bert.named_parameters())]
    for name, a, b in zip(names, got, expected, strict=True):
        assert check.max_error(a, b)[0] <= 1e-5 * b.abs().max().item(), name
    assert torch.equal(got[1][5], torch.zeros(36, device=device)), "the padding row has a gradient"


def test_bert_drops_after_the_norm():
    """What is dropped is an output, so the rest is BertEmbeddings' in evaluation over 1 - p."""
    bert = _bert(0.25).eval()
    ids = torch.randint(0, 97, (40, 20))
    y = _ours(bert, ids, None, None, dropout_p=0.25, seed=torch.tensor([3]))
    kept = y != 0
    torch.testing.assert_close(y[kept], (bert(ids) / 0.75)[kept], rtol=1e-5, atol=1e-5)
    assert abs(kept.double().mean().item() - 0.75) <= 0.02  # 7 standard deviations


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("padding_idx", [0, 2, -1])
def test_padding_row_keeps_its_gradient(backend, device, padding_idx):
    """In a fresh gradient it is 0, and in a buffer that is added to it stays what it was, whatever the run's length."""
    ids = torch.tensor([[0, 2, 4, 2], [4, 4, 1, 0]], device=device).repeat(20, 1)
    weight = torch.randn(5, 12, device=device, requires_grad=True)
    up = torch.randint(-4, 5, (40, 4, 12), device=device).float()
    theirs = torch.nn.functional.embedding(ids, weight, padding_idx)
    (expected,) = torch.autograd.grad(theirs, weight, up)
    op, row = registry.get("embedding"), padding_idx % 5
    with backends.use_backend(backend):
        y = ops.embedding(ids, weight, padding_idx=padding_idx)
        (grad,) = torch.autograd.grad(y, weight, up)
        buffer = torch.full((5, 12), 3.0, device=device)
        saved = (ids, weight.detach(), None, None, None, None)
        op.run_backward((up,), saved, (row,), (True, False, False), into={"weight": buffer})
    assert torch.equal(y, theirs), "the padding row is looked up as any other"
    assert torch.equal(grad, expected) and torch.equal(buffer, expected + 3.0)
    assert torch.equal(grad[row], torch.zeros(12, device=device))


@pytest.mark.parametrize("padding_idx", [None, 3, -2])
def test_module_replaces_torchs(padding_idx):
    made = []
    for cls in (torch.nn.Embedding, fnn.Embedding):
        torch.manual_seed(0)
        made.append(cls(11, 6, padding_idx))
    theirs, ours = made
    assert ours.padding_idx == theirs.padding_idx
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.weight, theirs.weight), "the initialisation differs"
    ids, up = torch.randint(0, 11, (4, 7)), torch.randn(4, 7, 6)
    for module in made:
        module(ids).backward(up)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    tape = Tape(Arena(torch.device("cpu")), {ours.weight: torch.zeros_like(ours.weight)})
    with torch.no_grad(), tape.arena.frame("embedding"):
        y = ours(ids, tape=tape)
        ours.backward(up, tape)
        tape.finish()
    assert torch.equal(y, theirs(ids))
    torch.testing.assert_close(tape.gradients[ours.weight], theirs.weight.grad)


def test_module_from_pretrained():
    table = torch.randn(5, 3)
    frozen = fnn.Embedding.from_pretrained(table, padding_idx=1)
    assert not frozen.weight.requires_grad and frozen.padding_idx == 1
    assert torch.equal(frozen(torch.tensor([4, 1])), table[[4, 1]])
    assert fnn.Embedding.from_pretrained(table, freeze=False).weight.requires_grad


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"max_norm": 1.0}, r"max_norm: got 1\.0; allowed: None"),
        ({"sparse": True}, "sparse: got True; allowed: False"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq: got True"),
    ],
    ids=["max_norm", "sparse", "scale_grad_by_freq"],
)
def test_module_refuses(option, text):
    with pytest.raises(ValueError, match=text):
        fnn.Embedding(4, 3, **option)


@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_gradient_in_the_weights_dtype_is_the_float32_sum_rounded_once(backend, device):
    """Autograd gets bfloat16 from the kernel itself; runs of hundreds of tokens would drown in a bfloat16 sum."""
    torch.manual_seed(0)
    ids = torch.randint(0, 3, (1, 600), device=device)
    weight = torch.randn(7, 24, device=device).bfloat16().requires_grad_()
    places = torch.randn(600, 24, device=device).bfloat16().requires_grad_()
    up = torch.randn(1, 600, 24, device=device).bfloat16()
    op = registry.get("embedding")
    with backends.use_backend(backend):
        grads = torch.autograd.grad(ops.embedding(ids, weight, None, places), (weight, places), up)
        saved = (ids, weight.detach(), None, places.detach(), None, None)
        own = op.run_backward((up,), saved, (None,), (True, True, False), own=True)
        wide = op.run_backward((up,), saved, (None,), (True, True, False))
    for grad, a, b in zip(grads, own, wide, strict=False):
        assert a.dtype == torch.bfloat16 and b.dtype == torch.float32
        assert torch.equal(grad, a)
        if backend == "triton" and backends.interpreting():  # which cuts float32 off instead of rounding it
            assert bool(((a - b).abs() <= 2**-7 * b.abs()).all())
        else:
            assert torch.equal(a, b.bfloat16())
    exact = torch.zeros(7, 24, dtype=torch.float64).index_add_(0, ids.cpu()[0], up.cpu()[0].double())
    assert check.max_error(grads[0], exact)[0] <= 2**-7 * exact.abs().max().item()
