"""What generated tests cannot know of the norms: transformers' modules, dropout's mask in the fused sums, wide rows."""

from __future__ import annotations

import pytest
import torch
from conftest import available

from fastlm import backends, check, ops, registry
from fastlm.ops.dropout import keep_mask
from fastlm.samples import Normal, Sample

SUMS = ("add_layer_norm", "add_rms_norm")


def on_backends(*names):
    """Every backend that has the ops here, with the device it runs on."""
    return pytest.mark.parametrize(("backend", "device"), available(registry.get(names[0])))


def seed_on(device, value=-0x123456789ABCDEF):
    return torch.tensor([value], device=device)


def half(backend):
    """Triton's interpreter cuts a bfloat16 off where the chip rounds it; its float16 is right."""
    return torch.float16 if backend == "triton" and backends.interpreting() else torch.bfloat16


def transformers_norm(casting, n, dtype):
    if casting == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        return LlamaRMSNorm(n, eps=1e-6).to(dtype)
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    return GemmaRMSNorm(n, eps=1e-6).to(dtype)


@on_backends("rms_norm")
@pytest.mark.parametrize(("casting", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_rms_norm_is_that_of_transformers(backend, device, casting, offset):
    """In half precision forward within one unit in the last place, and bit for bit almost everywhere; gradients by budget."""
    torch.manual_seed(0)
    dtype = half(backend)
    theirs = transformers_norm(casting, 200, dtype).to(device)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(200) * 0.3 + 1.0 - offset)
    x, dy = (torch.randn(40, 200, dtype=dtype, device=device) for _ in range(2))

    def gradients(function, x, weight, dy):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    def of_theirs(x, weight):
        return torch.func.functional_call(theirs, {"weight": weight}, (x,))

    def exactly(x, weight):
        xhat = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return xhat * (weight + offset)

    with backends.use_backend(backend):
        ours = gradients(
            lambda x, w: ops.rms_norm(x, w, 1e-6, offset=offset, casting=casting), x, theirs.weight, dy
        )
    peer = gradients(of_theirs, x, theirs.weight, dy)
    exact = gradients(exactly, x.double(), theirs.weight.double(), dy.double())
    apart = (ours[0].view(torch.int16).int() - peer[0].view(torch.int16).int()).abs()
    assert apart.max() <= 1 and (apart != 0).float().mean() <= 0.01
    for name, a, b, c in zip(("y", "dx", "dweight"), ours, peer, exact, strict=True):
        row = check.compare(name, a, b, c, dtype)
        assert row.ok, str(row)


@on_backends("rms_norm")
def test_the_two_orders_differ_and_agree_in_float32(backend, device):
    """The rounding of xhat is there; and dweight in Llama's order is made of the rounded xhat."""
    torch.manual_seed(0)
    x = torch.randn(64, 96, device=device)
    weight = torch.randn(96, device=device)
    results = {}
    low = half(backend)
    for dtype in (torch.float32, low):
        for casting in ("gemma", "llama"):
            w = weight.clone().requires_grad_()
            with backends.use_backend(backend):
                y = ops.rms_norm(x.to(dtype), w, casting=casting)
                (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
            results[dtype, casting] = y.detach(), dw
    for a, b in zip(results[torch.float32, "gemma"], results[torch.float32, "llama"], strict=True):
        assert torch.equal(a, b)
    gemma, llama = results[low, "gemma"], results[low, "llama"]
    assert not torch.equal(gemma[0], llama[0])
    xb = x.to(low).double()
    xhat = xb * torch.rsqrt(xb.square().mean(-1, keepdim=True) + 1e-6)
    sums = {"gemma": xhat.sum(0), "llama": xhat.to(low).double().sum(0)}
    for casting, (_, dw) in (("gemma", gemma), ("llama", llama)):
        other = sums["llama" if casting == "gemma" else "gemma"]
        assert (dw - sums[casting]).abs().mean() < 0.02 * (dw - other).abs().mean()


def run(name, backend, x, residual, dy, d_sum, **options):
    """(y, residual_out, gradients of x, residual and x_bias) of a fused sum."""
    leaves = {"x": x, "residual": residual, **{k: v for k, v in options.items() if k == "x_bias"}}
    leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    with backends.use_backend(backend):
        y, total = getattr(ops, name)(**(options | leaves))
        outputs = [(o, d) for o, d in ((y, dy), (total, d_sum)) if d is not None]
        grads = torch.autograd.grad([o for o, _ in outputs], list(leaves.values()), [d for _, d in outputs])
    return y.detach(), total.detach(), *grads


@on_backends(*SUMS)
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("shape", [(3, 5, 36), (7, 37), (9, 6), (5, 1), (2, 1100)], ids=str)
def test_the_mask_is_that_of_dropout(backend, device, name, shape):
    """Bit for bit at every place, in forward and again in backward, whatever place in a group of words a row starts at."""
    mask = keep_mask(seed_on(device), torch.Size(shape), 0.3)
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    dy = torch.full(shape, -2.0, device=device)
    options = {"dropout_p": 0.3, "seed": seed_on(device), "x_bias": torch.ones(shape[-1], device=device)}
    _, total, dx, d_residual, d_bias = run(name, backend, ones, zeros, None, dy, **options)
    scale = torch.tensor(1.0 / (1.0 - 0.3)).item()
    assert torch.equal(total, mask * (2.0 * scale))
    assert torch.equal(dx, mask * (-2.0 * scale)) and torch.equal(d_residual, dy)
    assert torch.allclose(d_bias, dx.reshape(-1, shape[-1]).sum(0), rtol=1e-6, atol=0)


@on_backends(*SUMS)
@pytest.mark.parametrize("name", SUMS)
def test_dropout_drops_what_is_not_finite(backend, device, name):
    x = torch.full((4, 64), torch.inf, device=device)
    mask = keep_mask(seed_on(device), x.shape, 0.5)
    with backends.use_backend(backend):
        _, total = getattr(ops, name)(x, torch.ones_like(x), dropout_p=0.5, seed=seed_on(device))
    assert torch.equal(total, torch.where(mask, torch.inf, 1.0))


@on_backends(*SUMS)
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_either_gradient_alone(backend, device, name, p):
    """The gradient is linear in the two upstream ones."""
    torch.manual_seed(0)
    x, residual, dy, d_sum = (torch.randn(6, 40, device=device) for _ in range(4))
    options = {"x_bias": torch.randn(40, device=device), "dropout_p": p, "seed": seed_on(device)}
    both = run(name, backend, x, residual, dy, d_sum, **options)[2:]
    first, second = (
        run(name, backend, x, residual, dy, None, **options)[2:],
        run(name, backend, x, residual, None, d_sum, **options)[2:],
    )
    for whole, a, b in zip(both, first, second, strict=True):
        assert (whole - (a + b)).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", SUMS)
def test_one_gradient_without_dropout_and_two_with_it(name):
    op = registry.get(name)

    class Recorder:
        def forward(self, op, args):
            self.args, self.out = args, op.run_forward(args)
            return self.out[: op.results]

    for p, shared in ((0.0, True), (0.5, False)):
        tape, x = Recorder(), torch.randn(3, 8)
        op.function(x, x.clone(), dropout_p=p, tape=tape)
        _, options = op.pick_saved(tape.args, tape.out)
        assert (op.sharing(options) == {"residual": "x"}) == shared


def test_a_seed_is_drawn_only_for_dropout():
    x = torch.randn(4, 8)
    for name in SUMS:
        state = torch.get_rng_state()
        getattr(ops, name)(x, x)
        assert torch.equal(torch.get_rng_state(), state)
        getattr(ops, name)(x, x, dropout_p=0.5)
        assert not torch.equal(torch.get_rng_state(), state)


@on_backends("add_layer_norm")
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_no_ceiling_of_columns(backend, device, name):
    """70 000 columns, forward and backward."""
    if backend == "reference":
        pytest.skip("the reference is PyTorch, which has none")
    n = 70_000
    args = {"x": Normal((1, n), 1.0, 0.5), "weight": Normal((n,))}
    if name in SUMS:
        args |= {"residual": Normal((1, n)), "dropout_p": 0.1, "seed": torch.tensor([7], device=device)}
    check.check_budget(registry.get(name), Sample("wide", **args), torch.float32, backend, device)


@on_backends("layer_norm")
def test_layer_norm_of_rows_that_start_far_from_their_mean(backend, device):
    """The deviation is not lost where a row's first elements tell nothing of its mean."""
    torch.manual_seed(0)
    x = torch.randn(6, 512, device=device)
    x[0, :64] += 1e4
    x[1, :] += 1e4
    x[2, :16] = 0.0
    x[2, 16:] += 1e5
    x[3, 0] = torch.nan
    x[4, 300] = torch.inf
    with backends.use_backend(backend):
        y = ops.layer_norm(x)
    exact = torch.nn.functional.layer_norm(x.double(), (512,))
    peer = torch.nn.functional.layer_norm(x, (512,))
    assert y[3:5].isnan().all()
    for row in (0, 1, 2, 5):
        largest = (x[row].abs().max() / x[row].std()).item()  # a rounding of x, which the mean's may be
        compared = check.compare("y", y[row], peer[row], exact[row], torch.float32, terms=largest)
        assert compared.ok, (row, str(compared))
