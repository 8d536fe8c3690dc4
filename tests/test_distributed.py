"""The losses over a vocabulary cut among processes: value and every gradient are those of one process.

Two and three gloo processes on the CPU run all cases in one start; each compares its own shard with the whole.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from covering import covering_rows

from fastlm import backends, check, native, ops, registry
from fastlm.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

CLASSES, WIDTH, LEAD = 23, 6, (2, 4)
SIZES = {2: [9, 14], 3: [1, 15, 7]}
OPTIONS = {
    "class weights": {"class_weight": True},
    "ignore_index": {"ignore_index": 5},
    "label_smoothing": {"label_smoothing": 0.15},
    "smoothing alone": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.03},
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 1.7},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "token_weight": {"token_weight": True},
    "bias": {"bias": True},
    "given sizes": {"sizes": True},
}
CLASHES = [{"label_smoothing", "smoothing alone"}, {"sum", "none"}]
ROWS = covering_rows(list(OPTIONS), lambda a, b: {a, b} in CLASHES)


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def case(row, dtype):
    """(tensors of the whole vocabulary, options)."""
    given = {k: v for name in row for k, v in OPTIONS[name].items()}
    tensors = {"hidden": draw(*LEAD, WIDTH), "weight": draw(CLASSES, WIDTH, seed=1), "logits": draw(*LEAD, CLASSES, seed=2)}
    if given.pop("bias", False):
        tensors["bias"] = draw(CLASSES, seed=3)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if given.pop("class_weight", False):
        given["class_weight"] = draw(CLASSES, seed=4, scale=0.2).add(1.0).to(dtype)
    if given.pop("token_weight", False):
        given["token_weight"] = draw(*LEAD, seed=5, scale=0.3).add(1.0).to(dtype)
    target = torch.tensor([[0, 22, 5, 8], [9, 5, 1, 16]])  # in every shard, and at its first and last class
    target[0, 3] = given.get("ignore_index", -100)
    return tensors, target, given


def gradients(loss, leaves):
    up = draw(*loss.shape, seed=6).add(2.0).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, up)]


def compare(rank, ranks, group, row, dtype, tolerance, backend):
    sizes = SIZES[ranks]
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    tensors, target, given = case(row, dtype)
    more = {"sizes": sizes} if given.pop("sizes", False) else {}
    class_weight = given.pop("class_weight", None)
    part = None if class_weight is None else class_weight[own]
    wide = {name: t.double().requires_grad_() for name, t in tensors.items()}
    exact_options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    exact_weight = None if class_weight is None else class_weight.double()
    with backends.use_backend("reference"):
        exact = gradients(
            ops.cross_entropy(wide["logits"], target, weight=exact_weight, **exact_options), [wide["logits"]]
        )
        inputs = [wide["hidden"], wide["weight"], *([wide["bias"]] if "bias" in wide else [])]
        linear = ops.linear_cross_entropy(
            *inputs[:2], target, *inputs[2:], class_weight=exact_weight, **exact_options
        )
        exact_linear = gradients(linear, inputs)
    exact[1] = exact[1][..., own]
    exact_linear[2:] = [g[own] for g in exact_linear[2:]]

    logits = tensors["logits"][..., own].clone().requires_grad_()
    leaves = [tensors["hidden"].clone(), tensors["weight"][own].clone()]
    leaves += [tensors["bias"][own].clone()] if "bias" in tensors else []
    leaves = [t.requires_grad_() for t in leaves]
    with backends.use_backend(backend):
        ours = gradients(
            vocab_parallel_cross_entropy(logits, target, group, weight_shard=part, **given, **more), [logits]
        )
        linear = vocab_parallel_linear_cross_entropy(
            *leaves[:2], target, *(leaves[2:] or [None]), group, class_weight_shard=part, workspace_mb=0.001, **given,
            **more,
        )  # fmt: skip
        ours_linear = gradients(linear, leaves)
    names = ["loss", "d_logits", "loss", "d_hidden", "d_weight", "d_bias"]
    for name, a, b in zip(names, [*ours, *ours_linear], [*exact, *exact_linear], strict=False):
        limit = tolerance * b.abs().max().item()
        error = check.max_error(a, b)[0]
        assert error <= limit, f"{name} of {row} on rank {rank} of {ranks} in {dtype} by {backend}: {error} > {limit}"


def special_cases(rank, ranks, group):
    own = slice(sum(SIZES[ranks][:rank]), sum(SIZES[ranks][: rank + 1]))
    tensors, target, _ = case([], torch.float32)
    whole = tensors["logits"]

    # A frozen input gets no gradient and asks for no exchange of one.
    weight = tensors["weight"][own].clone().requires_grad_()
    vocab_parallel_linear_cross_entropy(tensors["hidden"], weight, target, None, group).backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0

    # A shard that is -inf throughout, large logits, and nothing that counts.
    masked = whole.clone()
    masked[..., : SIZES[ranks][0]] = -torch.inf
    masked[..., SIZES[ranks][0] :] += 1e4
    kept = torch.where(target < SIZES[ranks][0], -100, target)
    for logits, goal in ((masked, kept), (whole, torch.full_like(target, -100)), (whole[:0], target[:0])):
        leaf = logits[..., own].clone().requires_grad_()
        exact_leaf = logits.double().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf, goal, group)
        exact = ops.cross_entropy(exact_leaf, goal)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(1.7))
        (right,) = torch.autograd.grad(exact, exact_leaf, torch.tensor(1.7, dtype=torch.float64))
        torch.testing.assert_close(grad.double(), right[..., own], rtol=1e-5, atol=1e-8)

    # What cannot be is refused, on every rank alike.
    shard = whole[..., own]
    for error, text, arguments, options in (
        (IndexError, "target: got 23; allowed: 0 to 22", (shard, target + 1, group), {}),
        (TypeError, "target: got dtype torch.float32", (shard, target.float(), group), {}),
        (ValueError, r"sizes: got \[1\]", (shard, target, group), {"sizes": [1]}),
    ):
        with pytest.raises(error, match=text):
            vocab_parallel_cross_entropy(*arguments, **options)
    hidden = tensors["hidden"].clone().requires_grad_()
    weight = tensors["weight"][own]
    logits = shard.clone().requires_grad_()
    for leaf, loss in (
        (logits, vocab_parallel_cross_entropy(logits, target, group)),
        (hidden, vocab_parallel_linear_cross_entropy(hidden, weight, target, None, group)),
    ):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            (loss + grad.square().sum()).backward()


def process(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    kinds = [(torch.float64, 1e-11, "reference")]
    kinds.append((torch.float32, 6e-6, "reference" if native.why_not("cpu") else "cpu"))
    for ranks, group in ((3, None), (2, pair)):
        if rank < ranks:
            for row, kind in itertools.product(ROWS, kinds):
                compare(rank, ranks, group, row, *kind)
            special_cases(rank, ranks, group)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_and_three_processes(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path / "store"),), nprocs=3)


def test_rows_cover_all_pairs():
    together = {frozenset(p) for row in ROWS for p in itertools.combinations(row, 2)}
    missing = set(map(frozenset, itertools.combinations(OPTIONS, 2))) - together
    assert missing == set(map(frozenset, CLASHES))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_target_of_no_class(smoothing):
    """What a shard relies on: only smoothing, z-loss and lse are left of a token whose class is elsewhere."""
    logits, w = draw(3, 11).requires_grad_(), draw(11, seed=1).abs()
    target = torch.tensor([ops.NO_CLASS, 4, ops.NO_CLASS])
    up = draw(3, seed=2)
    x = logits.detach().requires_grad_()
    log_p = x.log_softmax(-1)
    exact = -smoothing / 11 * (w * log_p).sum(-1) - (1 - smoothing) * w[4] * log_p[:, 4] * torch.tensor([0.0, 1.0, 0.0])
    exact = exact + 0.02 * x.logsumexp(-1).square()
    right = torch.autograd.grad(exact, x, up)[0]
    for backend in ("reference", "triton", "cpu"):
        if backends.why_not(registry.get("cross_entropy"), backend, [logits.float()]):
            continue
        dtype = torch.float64 if backend == "reference" else torch.float32
        leaf = logits.detach().to(dtype).requires_grad_()
        with backends.use_backend(backend):
            loss = ops.cross_entropy(
                leaf, target, weight=w.to(dtype), label_smoothing=smoothing, z_loss=0.02, reduction="none"
            )
            grad = torch.autograd.grad(loss, leaf, up.to(dtype))[0]
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(grad.double(), right, rtol=1e-5, atol=1e-6)
