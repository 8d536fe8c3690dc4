"""fastlm.optim against torch.optim: numbers, state dicts both ways, and what training code does with an optimizer."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from fastlm import backends, native, optim

STEPS = 24
SHAPES = [(7, 5), (33,), (2, 3, 4), (), (1, 40)]
MATRICES = [(7, 5), (4, 4), (1, 40), (6, 24)]

# Ours, torch's, and options that both take.
PAIRS = {
    "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
    "momentum": (optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}),
    "adafactor": (optim.Adafactor, torch.optim.Adafactor, {"lr": 0.1, "weight_decay": 0.1, "d": 1.5}),
    "muon": (optim.Muon, torch.optim.Muon, {"lr": 1e-2, "weight_decay": 0.1}),
    "muon as adamw": (optim.Muon, torch.optim.Muon, {"lr": 1e-2, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
    "nesterov": (optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}  # fmt: skip
BACKENDS = [
    pytest.param(name, marks=pytest.mark.backend(name))
    for name in ("reference", "cpu")
    if name == "reference" or not native.why_not("cpu")
]


def parameters(dtype=torch.float32, our=None):
    generator = torch.Generator().manual_seed(0)
    shapes = MATRICES if our is optim.Muon else SHAPES
    if our is optim.Adafactor:
        shapes = [shape for shape in SHAPES if len(shape) <= 2]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [nn.Parameter(t.bfloat16().to(dtype)) for t in drawn]  # the same numbers in every dtype


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (10.0 if step % 3 else 0.1)
        p.grad = g.bfloat16().to(p.dtype)


def train(optimizer, params, first=0, last=STEPS):
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()
    return params


def flat(params):
    return torch.cat([p.detach().double().flatten() for p in params])


def assert_within_budget(ours, theirs, exact, dtype):
    error, peer = ((flat(p) - flat(exact)).abs().max().item() for p in (ours, theirs))
    roundings = STEPS if dtype == torch.float64 else 1  # there the peer is the exact one
    assert error <= 2 * (peer + roundings * torch.finfo(dtype).eps * flat(exact).abs().max().item()), (error, peer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_steps_of_torch(name, dtype, backend):
    our, their, options = PAIRS[name]
    if backend == "cpu" and dtype in (torch.float64, torch.float16):
        pytest.skip(f"the cpu backend has no {dtype}")
    ours, theirs, exact = parameters(dtype, our), parameters(dtype, our), parameters(torch.float64, our)
    with backends.use_backend(backend):
        train(our(ours, **options), ours)
    train(their(theirs, **options), theirs)
    train(their(exact, **options), exact)
    assert all(p.dtype == dtype for p in ours)
    assert_within_budget(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_is_the_papers(dtype):
    """Algorithm 2 written out in float64, from the same bfloat16 numbers."""
    ours, exact = parameters(dtype), parameters(torch.float64)
    beta1, beta2, lr, decay = 0.9, 0.98, 2.0**-7, 0.5
    train(optim.Lion(ours, lr, (beta1, beta2), decay), ours, 0, 6)
    moments = [torch.zeros_like(p) for p in exact]
    for step in range(6):
        set_gradients(exact, step)
        for p, m in zip(exact, moments, strict=True):
            update = (beta1 * m + (1 - beta1) * p.grad).sign()
            m.copy_(beta2 * m + (1 - beta2) * p.grad)
            p.data -= lr * (update + decay * p.data)
    assert (flat(ours) - flat(exact)).abs().max().item() <= 8 * torch.finfo(dtype).eps * flat(exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_go_both_ways(name, dtype, direction):
    """Half of the steps by one, the rest by the other, through a file: as the one that never stopped."""
    our, their, options = PAIRS[name]
    one, other = (their, our) if direction == "from torch" else (our, their)
    mixed, theirs, exact = parameters(dtype, our), parameters(dtype, our), parameters(torch.float64, our)
    before = one(mixed, **options)
    train(before, mixed, 0, STEPS // 2)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = other(mixed, **options | {"lr": 7.0})  # the state's rate holds
    after.load_state_dict(torch.load(file, weights_only=True))
    assert after.param_groups[0]["lr"] == options["lr"]
    train(after, mixed, STEPS // 2)
    train(their(theirs, **options), theirs)
    train(their(exact, **options), exact)
    assert_within_budget(mixed, theirs, exact, dtype)
    again = one(mixed, **options)  # and what it has become is a state again
    again.load_state_dict(after.state_dict())
    train(again, mixed, 0, 1)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])  # None: float32
@pytest.mark.parametrize("our", [optim.AdamW, optim.SGD, optim.Lion, optim.Muon, optim.Adafactor])
def test_stochastic_rounding_resumes_bit_for_bit(our, state_dtype):
    if our is optim.Adafactor and state_dtype:
        pytest.skip("Adafactor's moments are float32")
    options = {"seed": 3, "weight_decay": 0.1} | ({"state_dtype": state_dtype} if state_dtype else {})
    options |= {"momentum": 0.9} if our is optim.SGD else {}
    whole, resumed, other = (parameters(torch.bfloat16, our) for _ in range(3))
    train(our(whole, **options), whole)
    first = our(resumed, **options)
    train(first, resumed, 0, 9)
    second = our(resumed)  # seed and dtype come with the state
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, resumed, 9)
    assert torch.equal(flat(whole), flat(resumed))
    train(our(other, **options | {"seed": 4}), other)
    assert not torch.equal(flat(whole), flat(other))


def test_stochastic_rounding_keeps_small_steps():
    """1000 steps of 1e-4 in bfloat16, where numbers near 1 are 2**-8 apart below and 2**-7 above."""
    weight = {seed: nn.Parameter(torch.ones(256, dtype=torch.bfloat16)) for seed in (None, 0)}
    for seed, p in weight.items():
        optimizer = optim.SGD([p], lr=1e-4, seed=seed)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert torch.equal(weight[None], torch.ones_like(weight[None]))
    assert abs(weight[0].double().mean().item() - 0.9) <= 0.01


def test_tensors_round_by_words_of_their_own():
    pair = [nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optim.SGD(pair, lr=2.0**-9, seed=0)
    for p in pair:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*pair)


@pytest.mark.parametrize("our", [optim.AdamW, optim.SGD, optim.Lion, optim.Muon, optim.Adafactor])
def test_max_norm_is_clip_grad_norm(our):
    """Of all groups together, and the gradients themselves stay as they are."""
    ours, theirs = parameters(torch.float64, our), parameters(torch.float64, our)
    fused = our([{"params": ours[:2]}, {"params": ours[2:], "weight_decay": 0.5}], lr=0.01, max_norm=1.5)
    plain = our([{"params": theirs[:2]}, {"params": theirs[2:], "weight_decay": 0.5}], lr=0.01)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        before = [p.grad.clone() for p in ours]
        torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        fused.step()
        plain.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-12, atol=1e-12)


def test_clip_each():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    fused, plain = optim.SGD(ours, 0.1, max_norm=0.5, clip_each=True), torch.optim.SGD(theirs, 0.1)
    set_gradients(ours, 1)
    set_gradients(theirs, 1)
    for p in theirs:
        torch.nn.utils.clip_grad_norm_([p], 0.5)
    fused.step()
    plain.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
def test_a_step_that_is_not_finite(max_norm):
    """Nothing changes in any tensor, unless no norm was asked for: then the NaN goes through, as in torch."""
    params = parameters()
    optimizer = optim.AdamW(params, max_norm=max_norm)
    train(optimizer, params, 0, 2)
    before, state = flat(params), copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(params, 2)
    params[1].grad[4] = math.nan
    optimizer.step()
    if max_norm:
        assert torch.equal(flat(params), before)
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])
    else:
        assert flat(params).isnan().sum() == 1 and not torch.equal(flat(params), before)


@pytest.mark.parametrize("our", [optim.AdamW, optim.SGD, optim.Lion, optim.Muon, optim.Adafactor])
def test_parameters_without_a_gradient_are_left_alone(our):
    params = parameters(our=our)
    optimizer = our(params, weight_decay=0.5)
    set_gradients(params, 0)
    params[2].grad = None
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before) and params[2] not in optimizer.state
    assert not torch.equal(params[0], parameters(our=our)[0])


def test_schedulers_closures_groups_and_frozen_parameters():
    """A little training loop as people write it, beside torch's."""
    losses = {}
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1)).double()
        model[0].bias.requires_grad_(False)
        optimizer = kind(model[0].parameters(), lr=0.05)
        optimizer.add_param_group({"params": model[2].parameters(), "weight_decay": 0.0, "lr": 0.02})
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        x, y = torch.randn(2, 40, 6, dtype=torch.float64)

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y[:, :1])
            loss.backward()
            return loss

        losses[kind] = []
        for _ in range(20):
            losses[kind].append(optimizer.step(closure).item())
            scheduler.step()
    assert losses[optim.AdamW][-1] < 0.8 * losses[optim.AdamW][0]
    assert losses[optim.AdamW] == pytest.approx(losses[torch.optim.AdamW], rel=1e-10)


def test_rate_as_a_tensor():
    by_number, by_tensor = parameters(), parameters()
    train(optim.AdamW(by_number, lr=0.125), by_number, 0, 3)
    train(optim.AdamW(by_tensor, lr=torch.tensor([0.125], dtype=torch.float64)), by_tensor, 0, 3)
    assert torch.equal(flat(by_number), flat(by_tensor))


def test_gaps_and_other_strides():
    """Transposed, sliced and channels-last parameters and gradients give what contiguous ones give."""
    for make in (
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        plain = [nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))]
        strided = [nn.Parameter(make(plain[0].detach().clone()))]
        assert not strided[0].is_contiguous()
        for params in (plain, strided):
            optimizer = optim.AdamW(params, lr=0.1)
            for step in range(3):
                set_gradients(params, step)
                if params is strided:
                    params[0].grad = make(params[0].grad)
                optimizer.step()
        assert torch.equal(plain[0], strided[0])


def test_grad_scaler():
    """It unscales, and leaves out a step that overflowed; then the scale is halved."""
    (weight,) = params = [nn.Parameter(torch.ones(5))]
    optimizer, scaler = optim.SGD(params, lr=0.5), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for slope, expected in ((1.0, 0.5), (math.inf, 0.5), (1.0, 0.0)):
        optimizer.zero_grad()
        scaler.scale((weight * slope).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, torch.full_like(weight, expected))
    assert scaler.get_scale() == 512.0


def test_copies_and_pickles_go_on():
    params = parameters()
    optimizer = optim.AdamW(params, max_norm=0.5, seed=1)
    train(optimizer, params, 0, 2)
    twin_params, twin = copy.deepcopy((params, optimizer))
    assert (twin.max_norm, twin.clip_each) == (0.5, False)
    train(optimizer, params, 2, 4)
    train(twin, twin_params, 2, 4)
    assert torch.equal(flat(params), flat(twin_params))


def test_autograd_notices_the_step():
    (weight,) = params = [nn.Parameter(torch.ones(3))]
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    optim.SGD(params, lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"AdamW: got a sparse gradient; allowed: dense"):
        optim.AdamW(table.parameters()).step()
    state = torch.optim.AdamW(parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match=r"AdamW: amsgrad: got True.*allowed: False"):
        optim.AdamW(parameters()).load_state_dict(state)
    for make, text in (
        (lambda: optim.AdamW(parameters(), lr=-1.0), r"AdamW: lr: got -1\.0; allowed: >= 0"),
        (lambda: optim.AdamW(parameters(), betas=(0.9, 1.0)), r"AdamW: betas: .*\[0, 1\)"),
        (lambda: optim.AdamW(parameters(), eps=math.nan), r"AdamW: eps: got nan"),
        (lambda: optim.Lion(parameters(), weight_decay=-0.1), r"Lion: weight_decay: got -0\.1"),
        (lambda: optim.SGD(parameters(), nesterov=True), r"SGD: nesterov: .*momentum 0"),
        (lambda: optim.SGD(parameters(), max_norm=-1.0), r"SGD: max_norm: got -1"),
        (lambda: optim.Muon(parameters()), r"Muon: params: got shape \(33,\); allowed: matrices"),
        (lambda: optim.Adafactor(parameters()), r"Adafactor: params: got shape \(2, 3, 4\); allowed: up to two"),
        (lambda: optim.Adafactor([nn.Parameter(torch.ones(2))], d=0.5), r"Adafactor: d: got 0\.5; allowed: >= 1"),
        (lambda: optim.Adafactor([nn.Parameter(torch.ones(2))], eps=(None, -1.0)), r"Adafactor: eps: "),
        (lambda: optim.SGD(parameters(), state_dtype=torch.float16), r"SGD: state_dtype: .*float16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            make()


@pytest.mark.parametrize("backend", BACKENDS)
def test_muon_over_one_flat_buffer(backend):
    """Matrices with a gap between them as each by itself; the copy is the rounded master; a NaN changes nothing."""
    from fastlm.ops import muon

    generator = torch.Generator().manual_seed(2)
    shapes, starts, n = [(7, 5), (3, 8)], [0, 40], 70
    master, grad = torch.randn(2, n, generator=generator)
    buffers = {"master": master, "momentum_buffer": torch.zeros(n), "step": torch.zeros(())}
    param = master.bfloat16()
    alone = [nn.Parameter(master[i : i + r * c].view(r, c).clone()) for i, (r, c) in zip(starts, shapes, strict=True)]
    optimizer = optim.Muon(alone, lr=0.02)
    gap = torch.ones(n, dtype=torch.bool)
    with backends.use_backend(backend):
        for _ in range(3):
            for p, i in zip(alone, starts, strict=True):
                p.grad = grad[i : i + p.numel()].view(p.shape).clone()
            given = grad.clone()
            options = {"shapes": shapes, "starts": starts, "lr": 0.02, "param": param}
            norm, skipped = muon(grad=given, **buffers, **options, zero_grad=True)
            optimizer.step()
            assert skipped == 0.0 and not given.any()
            assert abs(norm.item() - grad.norm().item()) <= 1e-5 * grad.norm().item()
        for p, i in zip(alone, starts, strict=True):
            assert torch.equal(master[i : i + p.numel()].view(p.shape), p)
            assert torch.equal(param[i : i + p.numel()].view(p.shape), p.bfloat16())
            gap[i : i + p.numel()] = False
        assert buffers["step"] == 3.0 and gap.sum() == n - 35 - 24
        before = {k: t.clone() for k, t in buffers.items()} | {"param": param.clone()}
        given[50] = math.inf
        _, skipped = muon(grad=given, **buffers, **options)
        assert skipped == 1.0
        assert all(torch.equal(before[k], t) for k, t in (buffers | {"param": param}).items())


def test_newton_schulz_moves_singular_values_to_one():
    from fastlm.ops import newton_schulz

    for shape in ((20, 60), (60, 20), (30, 30)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        before, after = (torch.linalg.svdvals(t.float()) for t in (x / x.norm(), newton_schulz(x)))
        held = before > 0.01  # five steps lift no more than that to the plateau
        assert after[held].min() >= 0.6 and after.max() <= 1.3
    with pytest.raises(ValueError, match=r"x: got shape \(3,\); allowed: \(rows, columns\)"):
        newton_schulz(torch.ones(3))


def test_muon_refusals():
    from fastlm.ops import muon

    given = {"master": torch.ones(6), "grad": torch.ones(6), "momentum_buffer": torch.ones(6), "step": torch.zeros(())}
    for text, changed in {
        r"adjust_lr_fn: got 'other'; allowed: None, 'original'": {"adjust_lr_fn": "other"},
        r"momentum: got 1\.0; allowed: 0 < momentum < 1": {"momentum": 1.0},
        r"weight_decay: got -1\.0": {"weight_decay": -1.0},
        r"shapes: got \[\(2, 4\)\].*6 elements": {"shapes": [(2, 4)]},
        r"starts: got 2; allowed: one for each of 1": {"starts": [0, 1]},
    }.items():
        with pytest.raises(ValueError, match=text):
            muon(**given, **{"shapes": [(2, 3)], "lr": 0.1} | changed)
    assert torch.equal(given["master"], torch.ones(6)) and given["step"] == 0.0
