"""Wrong gradients and numbers that released kernels give in silence, each a test by its name.

What each must give is computed here by plain PyTorch in float64, with an upstream gradient that is not 1.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE

from fastlm import backends, check, nn, ops

TOKENS, CLASSES, WIDTH = 6, 29, 8
on_each_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def targets(tokens=TOKENS, classes=CLASSES):
    target = torch.randint(0, classes, (tokens,), generator=torch.Generator().manual_seed(1))
    target[1] = -100
    return target


def leaves_of(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def assert_close(value, exact, tolerance=3e-6):
    assert check.max_error(value, exact)[0] <= tolerance * exact.abs().max().item()


FORMS = {
    "cross_entropy": (lambda x, **o: ops.cross_entropy(x, targets(), **o), [(TOKENS, CLASSES)]),
    "linear_cross_entropy": (
        lambda x, w, **o: ops.linear_cross_entropy(x, w, targets(), **o), [(TOKENS, WIDTH), (CLASSES, WIDTH)],
    ),
}  # fmt: skip
each_form = pytest.mark.parametrize("form", FORMS)


def losses(form, **options):
    """(ours and its leaves, PyTorch's in float64 and its leaves)."""
    function, shapes = FORMS[form]
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    ours, wide = leaves_of(*inputs), leaves_of(*(t.double() for t in inputs))
    exact = F.cross_entropy(wide[0] if len(wide) == 1 else F.linear(*wide), targets(), **options)
    return (function(*ours, **options), ours), (exact, wide)


@each_form
@on_each_backend
def test_second_backward_with_another_upstream_gradient(backend, form):
    """Liger scales its stored gradient in place: the second backward of one forward is wrong there."""
    with backends.use_backend(backend):
        (loss, leaves), (exact, wide) = losses(form)
    for up in (1.0, -3.7, 0.25):
        grads = torch.autograd.grad(loss, leaves, torch.tensor(up), retain_graph=True)
        right = torch.autograd.grad(exact, wide, torch.tensor(up, dtype=torch.float64), retain_graph=True)
        for grad, value in zip(grads, right, strict=True):
            assert_close(grad, value)


@each_form
@on_each_backend
def test_double_backward_is_not_dropped(backend, form):
    """A gradient penalty must not come out as if the gradient were a constant: ours says that it cannot."""
    with backends.use_backend(backend):
        (loss, leaves), _ = losses(form)
    (grad, *_) = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (loss + grad.square().sum()).backward()


@on_each_backend
def test_frozen_input_with_a_trainable_head(backend):
    """The weight's gradient does not depend on whether hidden wants one, nor the other way about."""
    hidden, weight = draw(TOKENS, WIDTH), draw(CLASSES, WIDTH, seed=1)
    wide = leaves_of(hidden.double(), weight.double())
    right = torch.autograd.grad(1.7 * F.cross_entropy(F.linear(*wide), targets()), wide)
    for frozen in (0, 1):
        leaves = [hidden.clone(), weight.clone()]
        leaves[1 - frozen].requires_grad_()
        with backends.use_backend(backend):
            (1.7 * ops.linear_cross_entropy(*leaves, targets())).backward()
        assert leaves[frozen].grad is None
        assert_close(leaves[1 - frozen].grad, right[1 - frozen])


@each_form
@on_each_backend
def test_gradients_of_reduction_none(backend, form):
    """Each token's upstream gradient is its own."""
    with backends.use_backend(backend):
        (loss, leaves), (exact, wide) = losses(form, reduction="none", label_smoothing=0.1)
    up = draw(TOKENS, seed=9)
    right = torch.autograd.grad(exact, wide, up.double())
    for grad, value in zip(torch.autograd.grad(loss, leaves, up), right, strict=True):
        assert_close(grad, value)


@each_form
@on_each_backend
def test_returned_z_loss_has_a_gradient(backend, form):
    """Elsewhere it claims to require one, and it is 0. Alone, and together with the loss that it is part of."""
    function, shapes = FORMS[form]
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    wide = leaves_of(*(t.double() for t in inputs))
    logits = wide[0] if len(wide) == 1 else F.linear(*wide)
    z = 0.02 * logits[targets() != -100].logsumexp(-1).square().mean()
    leaves = leaves_of(*inputs)
    with backends.use_backend(backend):
        loss, extras = function(*leaves, z_loss=0.02, extras=True)
    assert_close(extras.z_loss, z)
    main = F.cross_entropy(logits, targets()) + z
    for ours, exact in ((2.5 * extras.z_loss, 2.5 * z), (0.7 * loss - 3.0 * extras.z_loss, 0.7 * main - 3.0 * z)):
        grads = torch.autograd.grad(ours, leaves, retain_graph=True)
        for grad, right in zip(grads, torch.autograd.grad(exact, wide, retain_graph=True), strict=True):
            assert right.abs().max() > 1e-3
            assert_close(grad, right)


@on_each_backend
def test_weight_gradient_is_summed_in_float32_over_chunks(backend):
    """Summed in bfloat16, later chunks vanish beside the earlier ones. Here the sum of 24 chunks is as exact as of one."""
    tokens = 48
    hidden, weight = draw(tokens, WIDTH, dtype=torch.bfloat16).abs(), draw(CLASSES, WIDTH, seed=1, dtype=torch.bfloat16)
    target = torch.zeros(tokens, dtype=torch.int64)  # all chunks push the same way
    wide = weight.double().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(F.linear(hidden.double(), wide), target, reduction="sum"), wide)[0]
    errors = []
    for workspace in (2 * 6 * CLASSES / 2**20, None):
        leaf = weight.clone().requires_grad_()
        with backends.use_backend(backend):
            loss = ops.linear_cross_entropy(hidden, leaf, target, reduction="sum", workspace_mb=workspace)
            loss.backward()
        errors.append(check.max_error(leaf.grad, exact)[0] / exact.abs().max().item())
    narrow = torch.zeros_like(weight)
    p = F.linear(hidden.double(), weight.double()).softmax(-1) - F.one_hot(target, CLASSES)
    for i in range(0, tokens, 2):
        narrow += (p[i : i + 2].T @ hidden[i : i + 2].double()).bfloat16()
    assert check.max_error(narrow, exact)[0] / exact.abs().max().item() > 2.5 * 2**-8
    assert max(errors) <= 1.5 * 2**-8  # dlogits, and the gradient at the end, are rounded once each


@each_form
@on_each_backend
def test_loss_of_bfloat16_is_not_rounded_to_bfloat16(backend, form):
    function, shapes = FORMS[form]
    inputs = [draw(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
    wide = [t.double() for t in inputs]
    exact = F.cross_entropy(wide[0] if len(wide) == 1 else F.linear(*wide), targets())
    with backends.use_backend(backend):
        loss = function(*inputs)
    assert loss.dtype == torch.float32
    assert check.max_error(loss.bfloat16(), exact)[0] > 1e-4 * exact.item()
    assert_close(loss, exact, 1e-6)


@each_form
@on_each_backend
def test_inputs_are_not_the_workspace(backend, form):
    """Elsewhere the gradient is written over the caller's logits in forward, or in backward."""
    with backends.use_backend(backend):
        (loss, leaves), _ = losses(form)
        copies = [t.detach().clone() for t in leaves]
        up = torch.tensor(2.0)
        torch.autograd.grad(loss, leaves, up)
    assert all(torch.equal(t, copy) for t, copy in zip(leaves, copies, strict=True)) and up == 2.0


@each_form
@on_each_backend
def test_an_empty_batch(backend, form):
    """Loss and gradients of 0, not an error and not NaN."""
    shapes = [(0, CLASSES)] if form == "cross_entropy" else [(0, WIDTH), (CLASSES, WIDTH)]
    leaves = leaves_of(*(draw(*shape) for shape in shapes))
    op = getattr(ops, form)
    with backends.use_backend(backend):
        loss = op(*leaves, torch.empty(0, dtype=torch.int64))
        grads = torch.autograd.grad(loss, leaves, torch.tensor(1.7))
    assert loss == 0
    assert [g.shape for g in grads] == [t.shape for t in leaves] and all((g == 0).all() for g in grads)


NORMS = {
    "layer_norm": (ops.layer_norm, lambda x, w: F.layer_norm(x, (WIDTH,), w)),
    "rms_norm": (ops.rms_norm, lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6)),
}
each_norm = pytest.mark.parametrize("norm", NORMS)


def norm_and_exact(norm):
    """(ours and its leaves, PyTorch's in float64 and its leaves)."""
    function, exact = NORMS[norm]
    inputs = [draw(TOKENS, WIDTH), draw(WIDTH, seed=1)]
    ours, wide = leaves_of(*inputs), leaves_of(*(t.double() for t in inputs))
    return (function(*ours), ours), (exact(*wide), wide)


@each_norm
@on_each_backend
def test_second_backward_of_a_norm(backend, norm):
    """The upstream gradient is not the workspace: the same backward twice, and the caller's gradient as it was."""
    with backends.use_backend(backend):
        (y, leaves), (exact, wide) = norm_and_exact(norm)
        for seed in (5, 6):
            up = draw(TOKENS, WIDTH, seed=seed)
            copy = up.clone()
            right = torch.autograd.grad(exact, wide, up.double(), retain_graph=True)
            for _ in range(2):
                for grad, value in zip(torch.autograd.grad(y, leaves, up, retain_graph=True), right, strict=True):
                    assert_close(grad, value)
            assert torch.equal(up, copy), "dY was written to"


@each_norm
@on_each_backend
def test_gradient_penalty_of_a_norm_is_not_dropped(backend, norm):
    with backends.use_backend(backend):
        (y, leaves), _ = norm_and_exact(norm)
        grad = torch.autograd.grad(y, leaves[0], draw(TOKENS, WIDTH, seed=7), create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.square().sum().backward()


@each_norm
@on_each_backend
def test_gradient_of_a_norm_when_the_sum_is_taken(backend, norm):
    """`.sum().backward()` sends an expanded gradient of ones; with unequal weights dx is not 0."""
    with backends.use_backend(backend):
        (y, leaves), (exact, wide) = norm_and_exact(norm)
        y.sum().backward()
    for leaf, value in zip(leaves, torch.autograd.grad(exact.sum(), wide), strict=True):
        assert value.abs().max() > 1e-2
        assert_close(leaf.grad, value)


@pytest.mark.parametrize("module", [nn.LayerNorm, nn.RMSNorm])
def test_norm_is_not_zero_under_compile(module):
    norm, x = module(WIDTH), draw(TOKENS, WIDTH)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    y = compiled(x.requires_grad_())
    assert y.abs().max() > 0.5 and torch.equal(y, norm(x))
    y.backward(draw(TOKENS, WIDTH, seed=5))
    assert x.grad.abs().max() > 0.1 and norm.weight.grad.abs().max() > 0.1


@on_each_backend
@pytest.mark.parametrize("module", [nn.LayerNorm, nn.RMSNorm])
def test_norm_weights_train(backend, module):
    """A step of gradient descent moves every weight, also where the input is frozen."""
    norm = module(WIDTH)
    before = norm.weight.detach().clone()
    with backends.use_backend(backend):
        norm(draw(TOKENS, WIDTH)).backward(draw(TOKENS, WIDTH, seed=5))
    torch.optim.SGD(norm.parameters(), lr=0.1).step()
    assert (norm.weight != before).all()
