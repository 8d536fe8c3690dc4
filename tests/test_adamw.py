"""adamw beyond the generated tests: steps of torch.optim, skipped steps, clipping, masks, huge gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import _cannot_run

from fastlm import backends, registry
from fastlm.ops import adamw
from fastlm.ops.optimizer_step import joined, split

OP = registry.get("adamw")
N = 2600  # more than two tiles of the kernels, and no multiple of a vector


@pytest.fixture(params=[pytest.param(b, marks=pytest.mark.backend(b)) for b in backends.BACKENDS])
def device(request):
    """The device of a backend, which serves every call of the test."""
    name = request.param
    where = "cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu"
    if why := _cannot_run(OP, name, where):
        pytest.skip(f"adamw on {name}: {why}")
    with backends.use_backend(name):
        yield torch.device(where)


def state(device, n=N, step=0.0, param_dtype=torch.bfloat16, dtype=torch.float32, seed=0):
    """Buffers as the optimizer sees them after some steps: no gradient."""
    generator = torch.Generator().manual_seed(seed)
    master = torch.randn(n, generator=generator).to(device, dtype)
    noise = torch.randn(n, generator=generator).to(device, dtype) * 0.1 if step else torch.zeros_like(master)
    return {
        "master": master,
        "exp_avg": noise.clone(),
        "exp_avg_sq": noise.square(),
        "step": torch.tensor(float(step), device=device),
        "param": master.to(param_dtype, copy=True),
    }


def gradient(device, n=N, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 + seed)
    return (torch.randn(n, generator=generator, dtype=torch.float64) * scale).to(device, dtype)


def copy_of(buffers):
    return {k: v.clone() for k, v in buffers.items()}


def assert_same_bits(one, two):
    for name in one:
        assert torch.equal(*(t[name].contiguous().flatten().view(torch.uint8) for t in (one, two))), (
            f"{name} differs"
        )


def torch_steps(dtype, steps):
    """Masters and norms of torch.optim.AdamW and clip_grad_norm_, the first half of the weights decayed."""
    halves = state("cpu", dtype=dtype)["master"].chunk(2)
    parameters = [torch.nn.Parameter(h.clone()) for h in halves]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.3},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, foreach=False)
    norms = []
    for i, (lr, scale) in enumerate(steps):
        grads = gradient("cpu", seed=i, scale=scale, dtype=dtype).chunk(2)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
    return torch.cat([p.detach() for p in parameters]), torch.stack(norms)


# Rates and gradient scales: clipped (norm 50), not clipped (norm 0.5), and by turns.
STEPS = [(1e-2 * (i + 1), 1.0 if i % 3 else 1e-2) for i in range(10)]


def our_steps(device, dtype):
    buffers = state(device, dtype=dtype)
    mask = torch.arange(N, device=device) < N // 2
    norms = []
    for i, (lr, scale) in enumerate(STEPS):
        grad = gradient(device, seed=i, scale=scale, dtype=dtype)
        norm, skipped = adamw(
            grad=grad,
            **buffers,
            decay_mask=mask,
            lr=lr,
            betas=(0.9, 0.95),
            eps=1e-6,
            weight_decay=0.3,
            max_norm=1.0,
        )
        assert skipped.item() == 0.0
        norms.append(norm)
    assert buffers["step"].item() == len(STEPS)
    return buffers["master"].cpu(), torch.stack(norms).cpu()


def test_ten_steps_of_torch_in_float32(device):
    exact = torch_steps(torch.float64, STEPS)
    theirs = torch_steps(torch.float32, STEPS)
    ours = our_steps(device, torch.float32)
    for name, value, peer, truth in zip(("master", "norm"), ours, theirs, exact, strict=True):
        error, peer_error = (v.double().sub(truth).abs().max().item() for v in (value, peer))
        limit = 2 * (peer_error + torch.finfo(torch.float32).eps * truth.abs().max().item())
        assert error <= limit, f"{name}: error {error}, torch's {peer_error}"


@pytest.mark.backend("reference")
def test_ten_steps_of_torch_in_float64():
    ours = our_steps(torch.device("cpu"), torch.float64)
    for value, truth in zip(ours, torch_steps(torch.float64, STEPS), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1029, N - 1])
@pytest.mark.parametrize("zero_grad", [False, True])
def test_non_finite_gradient_changes_nothing(device, bad, place, zero_grad):
    options = {"lr": 0.1, "weight_decay": 0.1, "max_norm": 1.0, "zero_grad": zero_grad}
    buffers = state(device, step=3)
    before = copy_of(buffers)
    grad = gradient(device)
    grad[place] = bad
    given = grad.clone()
    norm, skipped = adamw(grad=grad, **buffers, **options)
    assert skipped.item() == 1.0
    assert not norm.isfinite().item()
    assert_same_bits(buffers, before)
    assert_same_bits({"grad": grad}, {"grad": torch.zeros_like(given) if zero_grad else given})

    norm, skipped = adamw(grad=gradient(device, seed=1), **buffers, **options)
    adamw(grad=gradient(device, seed=1), **before, **options)
    assert skipped.item() == 0.0
    assert buffers["step"].item() == 4.0
    assert_same_bits(buffers, before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_decay_only_where_the_mask_says(device, dtype):
    """With no gradient and no moments, decay is all that is left."""
    buffers = state(device)
    before = buffers["master"].clone()
    mask = (torch.arange(N, device=device) % 3 * 100).to(dtype)
    adamw(grad=torch.zeros_like(before), **buffers, decay_mask=mask, lr=0.5, weight_decay=0.25)
    assert torch.equal(buffers["master"][mask == 0], before[mask == 0])
    torch.testing.assert_close(buffers["master"][mask != 0], before[mask != 0] * 0.875, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_param_is_the_rounded_master(device, dtype):
    buffers = state(device, param_dtype=dtype)
    buffers["param"].fill_(math.nan)
    if why := backends.why_not(OP, backends.requested(), list(buffers.values())):
        assert dtype == torch.float16
        with pytest.raises(backends.BackendError, match=r"cannot serve.*float16"):
            adamw(grad=gradient(device), **buffers, lr=0.1)
        pytest.skip(why)
    adamw(grad=gradient(device), **buffers, lr=0.1)
    assert torch.equal(buffers["param"], buffers["master"].to(dtype))


def test_masters_in_halves_are_the_float32_masters_bit_for_bit(device):
    """Ten steps of both, one of them skipped; the upper half is the weight rounded to nearest."""
    whole = state(device, step=3)
    whole["master"][:4] = torch.tensor([1.0 + 2**-8, -1.0 - 2**-8, 3.38953139e38, 1e-40])  # halfway, the largest, denormal
    upper, lower = split(whole["master"])
    halves = whole | {"master": upper, "trail": lower, "param": None}
    halves |= {name: whole[name].clone() for name in ("exp_avg", "exp_avg_sq", "step")}
    for i in range(10):
        grad = gradient(device, seed=i)
        grad[:4] = 0.0  # these stay what they are
        grad[9] = math.nan if i == 4 else 1.0
        for buffers in (whole, halves):
            _, skipped = adamw(grad=grad, **buffers, lr=1e-2, weight_decay=0.0, max_norm=1.0)
            assert skipped.item() == (i == 4)
        assert torch.equal(joined(halves["master"], halves["trail"]), whole["master"])
    assert_same_bits({"m": halves["exp_avg"], "v": halves["exp_avg_sq"]}, {"m": whole["exp_avg"], "v": whole["exp_avg_sq"]})
    apart = halves["master"] != whole["param"]
    assert not (apart & (lower != -(2**15))).any(), "only halves are rounded otherwise than by a cast"
    assert (halves["master"].float() - whole["master"]).abs().le((whole["param"].float() - whole["master"]).abs()).all()


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.0 + 1e-5, 2.0, math.inf, 0.0])
def test_clip_factor(device, scale):
    """With betas of 0 the first moment is the clipped gradient; the norm is 5."""
    grad = torch.zeros(N, device=device)
    grad[7], grad[-1] = 3.0, -4.0
    buffers = state(device)
    norm, _ = adamw(grad=grad, **buffers, lr=0.1, betas=(0.0, 0.0), max_norm=5.0 * scale)
    assert norm.item() == 5.0
    assert grad[7].item() == 3.0  # clipped on the way, not in place
    factor = min(1.0, 5.0 * scale / (5.0 + 1e-6)) if scale else 1.0
    if factor == 1.0:
        assert torch.equal(buffers["exp_avg"], grad)
    else:
        torch.testing.assert_close(buffers["exp_avg"], grad * factor, rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("size", [1e30, 1e19, 1e-19, 1e-30])
def test_norm_of_huge_and_tiny_gradients(device, size):
    """Squares that float32 cannot hold; the clipped step is that of the same direction with norm 1."""
    grad = torch.full((N,), size, device=device)
    buffers = state(device)
    norm, skipped = adamw(grad=grad, **buffers, lr=0.1, betas=(0.0, 0.0), max_norm=1.0)
    expected = grad[0].item() * math.sqrt(N)
    assert skipped.item() == 0.0
    assert abs(norm.item() - expected) <= 2e-7 * expected
    clipped = buffers["exp_avg"].double().norm().item()
    wanted = expected * min(1.0, 1.0 / (expected + 1e-6))
    assert abs(clipped - wanted) <= 1e-6 * wanted
    assert buffers["master"].isfinite().all()


def test_norm_beyond_float32_is_skipped(device):
    buffers = state(device)
    norm, skipped = adamw(grad=torch.full((N,), 3e38, device=device), **buffers, lr=0.1, max_norm=1.0)
    assert norm.item() == math.inf
    assert skipped.item() == 1.0


def test_norm_loses_nothing_over_many_elements(device):
    grad = gradient(device, n=100_003)
    norm, _ = adamw(grad=grad, **state(device, n=100_003), lr=0.1)
    exact = grad.double().norm().item()
    assert abs(norm.item() - exact) <= torch.finfo(torch.float32).eps * exact


def narrow_state(device, n=N, step=3.0):
    """Everything in bfloat16, and a seed."""
    buffers = {k: v.bfloat16() if v.dim() else v for k, v in state(device, n=n, step=step).items() if k != "param"}
    return buffers | {"seed": torch.tensor([-5], device=device)}


def test_stochastic_rounding_is_the_same_bits_on_every_backend(device):
    """With numbers that make every product exact, nothing but the rounding can differ."""
    buffers = narrow_state(device)
    expected = copy_of(buffers)
    options = {"lr": 0.0, "betas": (0.5, 0.5)}
    adamw(grad=gradient(device).bfloat16(), **buffers, **options)
    with backends.use_backend("reference"):
        adamw(grad=gradient(device).bfloat16(), **expected, **options)
    assert_same_bits(buffers, expected)


def test_stochastic_rounding_has_the_right_mean(device):
    """1 + 2**-10 lies an eighth of the way from 1 to the next bfloat16: an eighth of the elements go up."""
    n = 8192
    value = 1.0 + 2.0**-10
    buffers = narrow_state(device, n=n)
    for name in ("exp_avg", "exp_avg_sq", "master"):
        buffers[name].fill_(1.0)
    # betas of 1/2: m = (1 + g) / 2 and v = (1 + g**2) / 2 are the value
    adamw(grad=torch.full((n,), 1.0 + 2.0**-9, device=device), **buffers, lr=2.0**-10, betas=(0.5, 0.0), eps=0.0)
    for name, truth in (("exp_avg", value), ("exp_avg_sq", (1.0 + 2.0**-9) ** 2)):
        values = buffers[name].double()
        spread = 2.0**-7 * math.sqrt(0.25 / n)  # at most: that of a fair coin
        assert abs(values.mean().item() - truth) <= 5.0 * spread, name
        assert values.unique().tolist() == [1.0, 1.0078125], name
    moved = (1.0 - buffers["master"].double()).mean().item()
    assert abs(moved - 2.0**-10) <= 0.1 * 2.0**-10


def test_small_steps_are_lost_by_rounding_to_nearest_and_kept_stochastically(device):
    """100 steps of 2**-12 from 1, where bfloat16 numbers are 2**-8 apart, end at 1 - 100 * 2**-12."""
    ends = {}
    for seed in (None, torch.tensor([1], device=device)):
        buffers = narrow_state(device, n=512, step=0.0) | {"seed": seed}
        buffers["master"].fill_(1.0)
        buffers["exp_avg_sq"] = torch.zeros(512, device=device)
        buffers["exp_avg"] = torch.zeros(512, device=device)
        for _ in range(100):
            adamw(grad=torch.ones(512, device=device).bfloat16(), **buffers, lr=2.0**-12)
        ends[seed is not None] = buffers["master"].double().mean().item()
    assert ends[False] == 1.0
    assert abs(ends[True] - (1.0 - 100 * 2.0**-12)) <= 2e-3


def test_a_resumed_run_rounds_as_one_that_never_stopped(device):
    """Rounding depends on nothing but the seed and the step; other seeds, steps and buffers round otherwise."""

    def steps(buffers, first, last):
        for i in range(first, last):
            adamw(grad=gradient(device, seed=i).bfloat16(), **buffers, lr=0.01, weight_decay=0.1, max_norm=1.0)

    whole, halves = narrow_state(device), narrow_state(device)
    steps(whole, 0, 4)
    steps(halves, 0, 2)
    restored = copy_of(halves)
    steps(restored, 2, 4)
    assert_same_bits(restored, whole)

    for change in ({"seed": torch.tensor([-6], device=device)}, {"step": torch.tensor(8.0, device=device)}):
        one, other = narrow_state(device), narrow_state(device) | change
        for buffers in (one, other):
            adamw(grad=gradient(device).bfloat16(), **buffers, lr=0.0, betas=(0.9, 0.9))
        for name in ("exp_avg", "exp_avg_sq"):
            assert not torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("given", [2.5, math.inf, math.nan])
def test_a_norm_that_is_given_decides(device, given):
    buffers, before = state(device), state(device)
    grad = gradient(device)
    grad[3] = math.nan if given == 2.5 else 1.0
    norm = torch.tensor(given, device=device)
    got, skipped = adamw(grad=grad, **buffers, norm=norm, lr=0.1, betas=(0.0, 0.0), max_norm=1.0)
    assert torch.equal(got, norm) or (math.isnan(given) and got.isnan())
    assert skipped.item() == float(given != 2.5)
    if given == 2.5:  # what the gradient holds is not looked at
        assert buffers["exp_avg"].isnan().nonzero().tolist() == [[3]]
        torch.testing.assert_close(buffers["exp_avg"][4:], grad[4:] / 2.5, rtol=1e-6, atol=0.0)
    else:
        assert_same_bits(buffers, before)


def test_each_tensor_is_clipped_by_its_own_norm(device):
    offsets = [0, 64, 64, 100, 2000, N]
    scales = [100.0, 1.0, 1e-3, 1.0, 5.0]
    grad = gradient(device)
    for scale, (begin, end) in zip(scales, itertools.pairwise(offsets), strict=True):
        grad[begin:end] *= scale
    buffers = state(device)
    norm, _ = adamw(
        grad=grad, **buffers, offsets=torch.tensor(offsets, device=device), lr=0.1, betas=(0.0, 0.0), max_norm=2.0
    )
    exact = grad.double()
    assert abs(norm.item() - exact.norm().item()) <= 1e-6 * exact.norm().item()
    for begin, end in itertools.pairwise(offsets):
        part = exact[begin:end]
        clip = min(1.0, 2.0 / (part.norm().item() + 1e-6))
        torch.testing.assert_close(buffers["exp_avg"][begin:end].double(), part * clip, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("step", [0, 1, 10, 10_000])
def test_bias_correction_is_exact(device, step):
    """A constant gradient since the first step gives an update of lr, whatever its size."""
    beta1, beta2 = 0.9, 0.999
    buffers = state(device)
    buffers["master"].zero_()
    buffers["step"].fill_(step)
    grad = torch.full((N,), 0.5, device=device)
    for name, beta, g in (("exp_avg", beta1, 0.5), ("exp_avg_sq", beta2, 0.25)):
        buffers[name].fill_((1 - beta**step) * g)
    adamw(grad=grad, **buffers, lr=1.0, betas=(beta1, beta2), eps=0.0)
    assert (buffers["master"] + 1.0).abs().max().item() <= 1e-6


def test_rate_is_read_on_the_device(device):
    by_number, by_tensor = state(device), state(device)
    rate = torch.tensor(0.1, device=device)
    for value in (0.1, 0.01):
        rate.fill_(value)
        adamw(grad=gradient(device), **by_number, lr=value)
        adamw(grad=gradient(device), **by_tensor, lr=rate)
    assert_same_bits(by_number, by_tensor)


@pytest.mark.parametrize("name", ["master", "grad", "exp_avg", "exp_avg_sq", "param", "trail"])
def test_a_buffer_that_changes_is_never_copied(device, name):
    args = state(device) | {"grad": gradient(device)}
    if name == "trail":
        args["master"], args["trail"] = split(args["master"])
        del args["param"]
    args[name] = args[name].repeat_interleave(2)[::2]
    before = copy_of(args)
    with pytest.raises(ValueError, match=rf"{name}: .*\(2,\).*contiguous"):
        adamw(**args, lr=0.1)
    assert_same_bits(args, before)


def test_autograd_notices_the_change(device):
    buffers = state(device)
    weight = buffers["master"].requires_grad_()
    loss = weight.square().sum()
    adamw(grad=gradient(device), **buffers, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.backend("cpu")
def test_any_number_of_threads_gives_the_same_bits():
    if why := _cannot_run(OP, "cpu", "cpu"):
        pytest.skip(f"adamw on cpu: {why}")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            buffers = state("cpu", n=300_001)
            with backends.use_backend("cpu"):
                norm, _ = adamw(grad=gradient("cpu", n=300_001), **buffers, lr=0.1, max_norm=1.0)
            results.append(buffers | {"norm": norm})
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.backend(b)) for b in ("reference", "triton", "cuda")]
)
def test_cuda_graph_replays_with_a_new_rate(backend):
    device = torch.device("cuda")
    if why := _cannot_run(OP, backend, "cuda"):
        pytest.skip(f"adamw on {backend}: {why}")
    captured, eager, rate = state(device), state(device), torch.tensor(0.0, device=device)
    grad, options = gradient(device), {"weight_decay": 0.1, "max_norm": 1.0}
    with backends.use_backend(backend):
        warm, stream = copy_of(captured), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            adamw(grad=grad, **warm, lr=rate, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm, skipped = adamw(grad=grad, **captured, lr=rate, **options)
        for i, value in enumerate((0.1, 0.2, 0.05)):
            fresh = gradient(device, seed=i)
            if i == 1:
                fresh[5] = math.nan
            grad.copy_(fresh)
            rate.fill_(value)
            graph.replay()
            eager_norm, eager_skipped = adamw(grad=fresh, **eager, lr=rate, **options)
            assert skipped.item() == eager_skipped.item() == float(i == 1)
            assert torch.equal(norm, eager_norm) or i == 1
            assert_same_bits(captured, eager)
