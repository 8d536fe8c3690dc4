"""PyTorch's own sample and error inputs for the functions that ours replace.

Each sample that PyTorch draws for its function goes through ours, translated where the signatures differ, forward and
backward. What ours does not take is listed in `LEFT_OUT`, with the reason, and must raise; an entry that no longer
matches any sample fails.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE

from fastlm import backends, check, nn, ops

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_methods_invocations import op_db

OPINFO = {info.name: info for info in op_db if not info.variant_test_name}
QUICK = [b for b in BACKENDS_HERE if b.values[0] != "triton"]  # the kernels have their own samples


def normed(module, x, normalized_shape, eps, **parameters):
    """The drop-in module with these parameters: theirs is a function over the last few dimensions, our op is over one."""
    given = {name: p for name, p in parameters.items() if p is not None}
    norm = module(normalized_shape, **({} if eps is None else {"eps": eps}), elementwise_affine=bool(given))
    return torch.func.functional_call(norm, given, (x,))


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=None):
    return normed(nn.LayerNorm, x, normalized_shape, eps, weight=weight, bias=bias)


def rms_norm(x, normalized_shape, weight=None, eps=None):
    return normed(nn.RMSNorm, x, normalized_shape, eps, weight=weight)


def cross_entropy(logits, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if logits.dim() > 1:
        logits = logits.movedim(1, -1)
        target = target.movedim(1, -1) if target.is_floating_point() else target
    return ops.cross_entropy(logits, target, reduction=reduction, **options)


def embedding(weight, ids, **options):
    return ops.embedding(ids, weight, **options)


OURS = {
    "nn.functional.layer_norm": layer_norm,
    "nn.functional.rms_norm": rms_norm,
    "nn.functional.cross_entropy": cross_entropy,
    "nn.functional.gelu": ops.gelu,
    "nn.functional.silu": ops.silu,
    "nn.functional.relu": ops.relu,
    "nn.functional.kl_div": ops.kl_div,
    "nn.functional.embedding": embedding,
}
THEIRS = {"nn.functional.embedding": lambda weight, ids, **options: F.embedding(ids, weight, **options)}

NEGATIVE_EPS = ("it makes the root of a negative number for small inputs", lambda s: s.kwargs.get("eps", 0.0) < 0)
LEFT_OUT = {
    "nn.functional.layer_norm": [("eps", *NEGATIVE_EPS)],
    "nn.functional.rms_norm": [("eps", *NEGATIVE_EPS)],
    "nn.functional.embedding": [
        ("max_norm", "it scales rows of the weight in place, and an op does not write to its inputs",
         lambda s: "max_norm" in s.kwargs),
        ("scale_grad_by_freq", "a gradient divided by how often a word occurs; no language model uses it",
         lambda s: "scale_grad_by_freq" in s.kwargs),
        ("sparse", "a sparse gradient; ours are dense buffers that are added to",
         lambda s: "sparse" in s.kwargs),
    ],
}  # fmt: skip


def left_out(name, sample):
    """The arguments that ours refuses."""
    return [argument for argument, _, applies in LEFT_OUT.get(name, ()) if applies(sample)]


def run(function, sample):
    """The result and the gradients of every floating-point argument that is not a target."""
    arguments = [sample.input, *sample.args, *sample.kwargs.values()]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    out = function(sample.input, *sample.args, **sample.kwargs)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, upstream, allow_unused=True) if leaves else ()
    return out, [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def with_gradients(name, sample):
    """Every floating-point tensor requires a gradient, except a target: ours has none for it, and says so."""
    made = sample.transform(
        lambda t: t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, torch.Tensor) else t
    )
    if name in ("nn.functional.cross_entropy",):
        made.args = tuple(t.detach() for t in made.args)
        made.kwargs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in made.kwargs.items()}
    return made


def widened(sample):
    def wide(t):
        if not (isinstance(t, torch.Tensor) and t.is_floating_point()):
            return t
        return t.detach().double().requires_grad_(t.requires_grad)

    return sample.transform(wide)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_samples(name, dtype, backend):
    op = name.removeprefix("nn.functional.")
    if backend != "reference" and (why := backends.missing(op, "forward", backend)):
        pytest.skip(why)
    torch.manual_seed(0)
    theirs = THEIRS.get(name, OPINFO[name].op)
    seen = set()
    for number, sample in enumerate(OPINFO[name].sample_inputs("cpu", dtype, requires_grad=False)):
        sample = with_gradients(name, sample)
        with backends.use_backend(backend):
            if refused := left_out(name, sample):
                with pytest.raises((TypeError, ValueError), match="|".join(refused)):
                    run(OURS[name], sample)
                seen.update(refused)
                continue
            ours = run(OURS[name], sample)
        exact, peer = run(theirs, widened(sample)), run(theirs, sample)
        for what, a, b, c in zip(
            ("output", *(f"gradient {i}" for i in range(9))), (ours[0], *ours[1]), (peer[0], *peer[1]),
            (exact[0], *exact[1]), strict=False,
        ):  # fmt: skip
            if math.isnan(c.sum()):  # PyTorch's mean over nothing; ours is 0
                assert not a.any()
                continue
            # cancelling terms have no scale of their own: the largest gradient of all has
            terms = max(g.abs().max().item() if g.numel() else 0.0 for g in (exact[0], *exact[1]))
            row = check.compare(f"{name} {number} {what}", a, b, c, dtype, terms=terms)
            assert row.ok, f"{row}\n{sample}"
    assert seen == {argument for argument, _, _ in LEFT_OUT.get(name, ())}, "LEFT_OUT lists what no sample has"


@pytest.mark.parametrize("name", [n for n in OURS if OPINFO[n].error_inputs_func is not None])
def test_error_inputs(name):
    """Where PyTorch raises, ours does, and names an argument."""
    for case in OPINFO[name].error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises((TypeError, ValueError, IndexError), match=r"\w+: got |unexpected keyword"):
            OURS[name](sample.input, *sample.args, **sample.kwargs)
