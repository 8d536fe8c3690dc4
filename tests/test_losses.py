"""Cross-entropy and linear cross-entropy beyond the generated tests: options in combination, extremes,
chunks, memory."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE

from fastlm import backends, check, native, ops, registry, samples
from fastlm.ops.linear_cross_entropy import row_bytes

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.15},
    "smoothing of 1": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.03},
    "softcap": {"softcap": 4.0},
    "ignore_index 5": {"ignore_index": 5},
    "everything": {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 3.0, "ignore_index": 5},
}
ROWS, CLASSES, WIDTH = 9, 37, 12


def oracle(
    logits,
    target,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
):
    """F.cross_entropy and the two terms it lacks, each token by itself, in float64."""
    x = logits.double()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    w = None if weight is None else weight.double()
    main = F.cross_entropy(
        x, target, w, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    z = [
        z_loss * torch.logsumexp(row, 0) ** 2 if t != ignore_index else 0 * row.sum()
        for row, t in zip(x, target, strict=True)
    ]
    z = torch.stack(z)
    valid = int((target != ignore_index).sum())
    return main + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / valid)


def draw(*shape, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def targets(rows, classes, seed=1):
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def assert_close(value, exact, tolerance=3e-6):
    scale = max(exact.abs().max().item(), 1e-3)
    assert check.max_error(value, exact)[0] <= tolerance * scale


# Interpreted kernels take seconds a case: they get the options that between them reach every line.
CASES = [
    pytest.param(*backend.values, options, marks=backend.marks, id=f"{backend.values[0]}-{name}")
    for backend in BACKENDS_HERE
    for name, options in OPTIONS.items()
    if backend.values[0] != "triton" or name in ("plain", "smoothing of 1", "everything")
]


@pytest.mark.parametrize(("backend", "options"), CASES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_options_and_reductions(backend, options, weighted, reduction):
    """Loss and gradient of both ops, twice from one forward with different upstream gradients."""
    hidden, matrix, bias = draw(ROWS, WIDTH), draw(CLASSES, WIDTH, seed=2), draw(CLASSES, seed=3)
    target = targets(ROWS, CLASSES)
    target[2:5] = options.get("ignore_index", -100)
    weight = draw(CLASSES, scale=0.2, seed=4) + 1.0 if weighted else None
    leaves = [t.clone().requires_grad_() for t in (hidden, matrix, bias)]
    wide = [t.double().requires_grad_() for t in (hidden, matrix, bias)]
    logits = F.linear(hidden, matrix, bias).requires_grad_()
    wide_logits = logits.detach().double().requires_grad_()
    kwargs = {**options, "reduction": reduction}
    with backends.use_backend(backend):
        mb = 3 * row_bytes(CLASSES, hidden.dtype) / 2**20
        linear = ops.linear_cross_entropy(
            leaves[0], leaves[1], target, leaves[2], class_weight=weight, workspace_mb=mb, **kwargs
        )
        plain = ops.cross_entropy(logits, target, weight=weight, **kwargs)
    exact_linear, exact_plain = (
        oracle(F.linear(*wide), target, weight, **kwargs),
        oracle(wide_logits, target, weight, **kwargs),
    )
    assert_close(linear, exact_linear)
    assert_close(plain, exact_plain)
    for seed in (5, 6):
        up = draw(*plain.shape, seed=seed)
        grads = torch.autograd.grad(linear, leaves, up, retain_graph=True)
        for grad, exact in zip(
            grads, torch.autograd.grad(exact_linear, wide, up.double(), retain_graph=True), strict=True
        ):
            assert_close(grad, exact)
        grad = torch.autograd.grad(plain, logits, up, retain_graph=True)[0]
        assert_close(grad, torch.autograd.grad(exact_plain, wide_logits, up.double(), retain_graph=True)[0])
        assert grad[2:5].abs().max() == 0 and grads[0][2:5].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_counts(backend, reduction, dtype):
    """Every token ignored: loss 0 and gradient 0, even from logits that are NaN."""
    target = torch.full((4,), -100)
    hidden, matrix = draw(4, 8, dtype=dtype), draw(10, 8, dtype=dtype)
    bad = torch.full((4, 10), math.nan, dtype=dtype)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0}
    with backends.use_backend(backend), check.poisoned_memory():
        for op, inputs in ((ops.cross_entropy, [bad]), (ops.linear_cross_entropy, [hidden, matrix])):
            leaves = [t.clone().requires_grad_() for t in inputs]
            loss = op(*leaves, target, **options)
            assert loss.dtype == torch.float32 and bool((loss == 0).all())
            for grad in torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0)):
                assert bool((grad == 0).all())


EXTREME = {
    "1e4": [[1e4, -1e4, 3.0, 0.0], [1e4, 1e4, -1e4, 1e4], [-1e4, -1e4, -1e4, 0.0]],
    "large offset": [
        [1e4, 1e4 + 1, 1e4 - 1, 1e4 + 2],
        [-3e4, -3e4, -3e4, -3e4 + 4],
        [88.0, 89.0, 90.0, 200.0],
    ],
    "-inf": [
        [-math.inf, 0.0, 1.0, 2.0],
        [0.0, -math.inf, -math.inf, -math.inf],
        [0.0, -math.inf, -math.inf, 3.0],
    ],
    "-inf at the target": [[0.0, 1.0, -math.inf, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]],
    "nothing but -inf": [[-math.inf] * 4, [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]],
    "+inf": [[math.inf, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, math.inf, 0.0]],
    "NaN": [[math.nan, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, math.nan]],
}


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits(backend, name, smoothing):
    """Values, infinities and NaN of loss and gradient are PyTorch's in float64."""
    logits = torch.tensor(EXTREME[name]).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    target = torch.tensor([2, 0, 3])
    exact = F.cross_entropy(wide, target, reduction="none", label_smoothing=smoothing)
    with backends.use_backend(backend):
        loss = ops.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-6, atol=1e-6, equal_nan=True)
    up = torch.tensor([0.7, -1.3, 2.1])
    grad, exact_grad = (
        torch.autograd.grad(loss, logits, up)[0],
        torch.autograd.grad(exact, wide, up.double())[0],
    )
    torch.testing.assert_close(grad, exact_grad.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_target_out_of_range(backend):
    """Named where the value is at hand; NaN, not a plausible number, where looking would stall the device."""
    logits, target = draw(3, 6).requires_grad_(), torch.tensor([1, 6, 2])
    with backends.use_backend(backend):
        if backend != "triton":
            with pytest.raises(IndexError, match=r"target: got 6; allowed: 0 to 5, or ignore_index -100"):
                ops.cross_entropy(logits, target)
            with pytest.raises(IndexError, match=r"target: got 6"):
                ops.linear_cross_entropy(draw(3, 4), draw(6, 4), target)
            return
        losses = ops.cross_entropy(logits, target, reduction="none")
        assert losses.isnan().tolist() == [False, True, False]
        assert torch.autograd.grad(losses, logits, torch.ones(3))[0].isnan().any(1).tolist() == [
            False,
            True,
            False,
        ]
        assert ops.cross_entropy(logits, target).isnan()
        assert ops.linear_cross_entropy(draw(3, 4), draw(6, 4), target).isnan()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_loss_of_bfloat16_is_float32(backend):
    """And not a rounded bfloat16: over these losses rounding would show."""
    logits, target = draw(64, 50, dtype=torch.bfloat16), targets(64, 50)
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    with backends.use_backend(backend):
        losses = ops.cross_entropy(logits, target, reduction="none")
        mean = ops.linear_cross_entropy(logits, torch.eye(50, dtype=torch.bfloat16), target)
    assert losses.dtype == mean.dtype == torch.float32
    assert_close(losses, exact, 5e-7)
    assert_close(mean, exact.mean(), 5e-7)
    assert check.max_error(losses.bfloat16(), exact)[0] > 100 * check.max_error(losses, exact)[0]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_do_not_matter(backend, dtype):
    """Any workspace gives what cross_entropy gives of the whole product, up to rounding."""
    op = registry.get("linear_cross_entropy")
    sample = {"hidden": (45, 20), "weight": (150, 20), "bias": (150,)}
    args = {n: samples.Normal(shape, 0.5) for n, shape in sample.items()}
    target = targets(45, 150)
    target[::4] = -100
    least = row_bytes(150, dtype) / 2**20
    for rows in (1, 2, 7, 44, 45, 1000, None):
        workspace = None if rows is None else rows * least
        case = samples.Sample(
            f"{rows} rows", **args, target=samples.Values(target.tolist(), torch.int64),
            workspace_mb=workspace, label_smoothing=0.1, z_loss=1e-2,
        )  # fmt: skip
        if backend != "triton" or rows in (7, 44, None):  # interpreted, each chunk takes a second
            check.check_budget(op, case, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_frozen_inputs(backend):
    """Either of hidden and weight frozen: the other's gradient is right, its own is not there."""
    hidden, matrix, target = draw(5, 8), draw(11, 8, seed=1), targets(5, 11)
    wide = [t.double().requires_grad_() for t in (hidden, matrix)]
    exact = torch.autograd.grad(oracle(F.linear(*wide), target), wide)
    for frozen in (0, 1):
        leaves = [hidden.clone(), matrix.clone()]
        leaves[1 - frozen].requires_grad_()
        with backends.use_backend(backend):
            ops.linear_cross_entropy(*leaves, target).backward()
        assert leaves[frozen].grad is None
        assert_close(leaves[1 - frozen].grad, exact[1 - frozen])


@pytest.mark.backend("triton")
def test_frozen_inputs_cost_nothing(monkeypatch):
    """Two products a chunk instead of three."""
    from fastlm.kernels import linear_cross_entropy as kernel

    products = []
    matmul = kernel.matmul
    monkeypatch.setattr(
        kernel, "matmul", lambda *args, **kwargs: (products.append(1), matmul(*args, **kwargs))
    )
    counts = {}
    for needs in itertools.product([False, True], repeat=2):
        leaves = [t.requires_grad_(need) for t, need in zip((draw(5, 8), draw(11, 8)), needs, strict=True)]
        with backends.use_backend("triton"):
            loss = ops.linear_cross_entropy(*leaves, targets(5, 11))
            products.clear()
            if any(needs):
                loss.backward()
        counts[needs] = len(products)
    assert counts == {(False, False): 0, (True, False): 2, (False, True): 2, (True, True): 3}


@pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu") or "-")
@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_do_not_matter(dtype):
    """Bitwise the same for one, two and five threads, over several bands, blocks of classes and chunks."""
    op = registry.get("linear_cross_entropy")
    args = {
        "hidden": draw(700, 40, dtype=dtype), "weight": draw(1700, 40, dtype=dtype), "bias": draw(1700),
        "target": targets(700, 1700), "workspace_mb": 0.5, "softcap": 8.0, "label_smoothing": 0.1,
    }  # fmt: skip
    args["target"][::5] = -100
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with backends.use_backend("cpu"):
                results.append(check.evaluate(op.function, op, args))
                plain = {"logits": draw(700, 1700, dtype=dtype), "target": args["target"]}
                other = check.evaluate(ops.cross_entropy, registry.get("cross_entropy"), plain)
                results[-1] |= {f"plain {name}": value for name, value in other.items()}
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), f"{name} depends on the number of threads"


PEAK = """
import json, sys, torch, torch.nn.functional as F
from fastlm import ops

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

def peak(step):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    step()
    return status("VmHWM") - before

torch.set_num_threads(1)
rows, width, classes, workspace = json.loads(sys.argv[1])
x, w = torch.randn(rows, width).requires_grad_(), torch.randn(classes, width).requires_grad_()
t = torch.randint(0, classes, (rows,))
ours = lambda x, w, t: torch.autograd.grad(ops.linear_cross_entropy(x, w, t, workspace_mb=workspace), (x, w))
theirs = lambda x, w, t: torch.autograd.grad(F.cross_entropy(F.linear(x, w), t), (x, w))
for step in (ours, theirs):
    step(x[:2], w[:8], t[:2] % 8)  # whatever a first call sets up
print(json.dumps([peak(lambda: ours(x, w, t)), peak(lambda: theirs(x, w, t))]))
"""


@pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu") or "-")
@pytest.mark.backend("cpu")
@pytest.mark.parametrize(("rows", "workspace", "most"), [(512, 6.0, 6.0), (1280, None, 64.0)])
def test_memory_is_bounded_by_the_workspace(rows, workspace, most):
    """The process grows by the workspace, the weight's gradient and what a thread needs for its tiles, while
    PyTorch grows by its logits and their gradient."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process reset its high-water mark of memory")
    width, classes = 32, 32768
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps([rows, width, classes, workspace])],
        env={**os.environ, "FASTLM_BACKEND": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout)
    gradient, logits = classes * width * 4 / 2**20, rows * classes * 4 / 2**20
    assert theirs >= 1.5 * logits, "the measurement sees nothing"
    assert ours <= most + gradient + 4.0
