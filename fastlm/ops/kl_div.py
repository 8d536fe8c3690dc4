"""The Kullback-Leibler divergence as ``torch.nn.functional.kl_div`` takes it: log-probabilities against probabilities.

    element = t (log t - x)        with x = input, t = target, 0 where t = 0
            = exp(t) (t - x)       with log_target

    "none": the elements        "sum": their sum        "mean": that over their number
    "batchmean": the sum over the size of the first dimension

Gradients, with g = d_loss over what the reduction divides by:
    d input = -g t              d target = g (log t - x + 1), which is infinite at t = 0 (PyTorch's is NaN)
    log_target: -g exp(t)                  g exp(t) (t - x + 1)

Saved: input and target as given. The arithmetic is float32 (float64 for float64), the result of input's dtype, as
PyTorch's. For logits use distillation_loss, which needs no softmax in memory; this one is for code that has
probabilities, and has no kernels of its own.

Edge cases
 1  batchmean of rows          5  log-targets, "none"
 2  log-targets                6  no elements, "sum"
 3  "none"                     7  one element without dimension
 4  three dimensions, "mean"   8  many elements

Source: Kullback and Leibler, "On information and sufficiency" (1951); torch.nn.functional.kl_div.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample
from .cross_entropy_math import wide
from .distillation_loss import REDUCTIONS

__all__ = ["kl_div"]


def _scale(input: Tensor, reduction: str) -> float:
    """What the sum of the elements is multiplied by; NaN over nothing, as PyTorch's."""
    count = input.numel() if reduction == "mean" else input.shape[0] if reduction == "batchmean" and input.dim() else 1
    return 1.0 / count if count else float("nan")


def forward(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> tuple[Tensor]:
    """input, target of one shape -> the loss, () or of that shape."""
    x, t = wide(input), wide(target)
    elements = t.exp() * (t - x) if log_target else torch.special.xlogy(t, t) - t * x
    loss = elements if reduction == "none" else elements.sum() * _scale(input, reduction)
    return (loss.to(input.dtype),)


def backward(
    d_loss: Tensor, input: Tensor, target: Tensor, reduction: str, log_target: bool, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """d_loss () or (...) -> the gradients of input and of target, like them."""
    x, t, g = wide(input), wide(target), wide(d_loss)
    if reduction != "none":
        g = g * _scale(input, reduction)
    p = t.exp() if log_target else t
    d_input = (-g * p).to(input.dtype) if needs[0] else None
    if not needs[1]:
        return d_input, None
    d = p * (t - x + 1.0) if log_target else t.log() - x + 1.0
    return d_input, (g * d).to(target.dtype)


def outputs(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> tuple[Spec]:
    """loss."""
    return (Spec(tuple(input.shape) if reduction == "none" else (), input.dtype),)


def gradients(d_loss: Any, input: Tensor, target: Tensor, *rest: Any) -> tuple[Spec, Spec]:
    """d_input, d_target."""
    return Spec(tuple(input.shape), input.dtype), Spec(tuple(target.shape), target.dtype)


def cost(input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False) -> Cost:
    """Forward reads both; backward reads target and writes input's gradient."""
    n, out = float(input.numel()), input.nbytes if reduction == "none" else 0
    return Cost(4.0 * n, float(input.nbytes + target.nbytes + out), n, float(target.nbytes + input.nbytes))


def peer(input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """What a PyTorch user writes today."""
    return F.kl_div(input, target, reduction=reduction, log_target=log_target)


def _pair(*shape: int, log_target: bool = False) -> dict[str, Any]:
    x = Normal(shape, 1.0, -2.0)
    return {"input": x, "target": x if log_target else Normal(shape, 0.05, 0.5), "log_target": log_target}


samples = (
    Sample("1 batchmean", **_pair(5, 33), reduction="batchmean"),
    Sample("2 log-targets", **_pair(4, 40, log_target=True), reduction="batchmean"),
    Sample("3 none", **_pair(2, 3), reduction="none"),
    Sample("4 mean", **_pair(2, 3, 17)),
    Sample("5 log-targets, none", **_pair(2, 9, log_target=True), reduction="none"),
    Sample("6 nothing", **_pair(0, 4), reduction="sum"),
    Sample("7 scalar", **_pair(), reduction="batchmean"),
    Sample("8 many", **_pair(5, 1025, log_target=True), reduction="mean"),
)

_two = {"input": Normal((2, 4)), "target": Normal((2, 4))}
errors = (
    Bad("input integer", TypeError, r"input: .*int64", **_two | {"input": Integers((2, 4), 0, 4)}),
    Bad("dtypes", TypeError, r"target: .*float64.*float32", **_two | {"target": Normal((2, 4), dtype=torch.float64)}),
    Bad("shapes", ValueError, r"target: .*\(3,\).*\(2, 4\)", **_two | {"target": Normal((3,))}),
    Bad("reduction", ValueError, r"reduction: got 'avg'; allowed: mean, batchmean, sum, none", **_two, reduction="avg"),
)


def random(pick: Pick) -> Sample:
    """Any shape and reduction, probabilities or their logarithms."""
    shape = tuple(pick.integer(1, 12) for _ in range(pick.integer(0, 3)))
    pair = _pair(*shape, log_target=pick.one_of(False, True))
    return Sample("random", **pair, reduction=pick.one_of(*REDUCTIONS))


def case(rows: int = 1024, classes: int = 50304) -> Sample:
    """Log-probabilities (rows, classes) of both."""
    return Sample("case", **_pair(rows, classes, log_target=True), reduction="batchmean")


shapes = {
    "default": ({"rows": 1024, "classes": 50304}, {"rows": 2048, "classes": 4096}),
    "sweep": tuple({"rows": 2**22 // v, "classes": v} for v in (1024, 4096, 16384)),
    "large": ({"rows": 8192, "classes": 50304},),
}


op = register(
    Op(
        name="kl_div",
        schema="(Tensor input, Tensor target, str reduction, bool log_target) -> Tensor loss",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=peer,
        samples=samples,
        errors=errors,
        random=random,
        case=case,
        shapes=shapes,
        grads=("input", "target"),
        saved=("input", "target"),
    )
)


def kl_div(
    input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False, *, tape: Any = None
) -> Tensor:
    """``torch.nn.functional.kl_div``: the divergence of target from the log-probabilities input, element by element.

    Args:
        input: log-probabilities, any shape, floating-point.
        target: probabilities, or their logarithms with log_target, of input's dtype; the two shapes broadcast.
        reduction: "mean" over all elements, "batchmean" over the first dimension, "sum", or "none".
        log_target: whether target holds logarithms.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, of input's dtype, () or of the broadcast shape for "none".

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    check_floating("input", input)
    check_floating("target", target)
    if target.dtype != input.dtype:
        raise TypeError(f"target: got dtype {target.dtype}; allowed: input's, {input.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; allowed: {', '.join(REDUCTIONS)}")
    check_same_device(input=input, target=target)
    try:
        input, target = torch.broadcast_tensors(input, target)
    except RuntimeError:
        given = tuple(target.shape)
        raise ValueError(f"target: got shape {given}; allowed: one that broadcasts with {tuple(input.shape)}") from None
    loss: Tensor = op(input, target, reduction, bool(log_target), tape=tape)[0]
    return loss
