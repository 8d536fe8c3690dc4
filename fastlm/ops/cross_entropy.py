"""Cross-entropy between logits and class indices, with every option a language model trains with.

    x = softcap * tanh(logits / softcap)  (logits if softcap is None)        lse = log(sum_c exp(x_c))
    token loss = (1 - s) * w_t * (lse - x_t) + s / V * sum_c w_c * (lse - x_c) + z * lse**2

with t the target, s label_smoothing, w the class weights (1 if none), z z_loss, V the number of classes, and

    "none": the token losses, 0 where ignored          "sum": their sum
    "mean": sum of the first two terms / sum of w_t + sum of the third / number of tokens, both over tokens
    not ignored

Gradients. With p = exp(x - lse), d lse / d x_c = p_c. For a token with upstream gradients g of the first two
terms and h of the third (both d_loss; for "mean" d_loss over the denominator of each):
    A = g * (1 - s) * w_t        B = g * s / V        D = h * 2 * z * lse        W = sum_c w_c
    d x_c = A * (p_c - [c = t]) + B * (W * p_c - w_c) + D * p_c
    d logits_c = d x_c * (1 - (x_c / softcap)**2)

Saved: logits, target and weight as given; statistics (3, ...): lse in two float32 parts whose sum it is, so
that p is as exact for logits around 1e4 as around 1 (one float32 holds 1e4 to 5e-4 only), and the token
losses without z-loss, all 0 where ignored; denominators (2): the two of the mean, on the device. float64 for
float64.

The loss is float32 (float64 for float64) whatever the dtype of the logits: a bfloat16 loss of 4 is off by up
to 0.008.

Edge cases
 1  leading dimensions, V not a power of two      9  a class weight of 0 for every target: the mean is 0
 2  no leading dimension                         10  reduction "none"
 3  ignored tokens                               11  reduction "sum" with every option
 4  label smoothing                              12  no tokens
 5  class weights and label smoothing            13  V = 1
 6  z-loss, mean over tokens and not weights     14  V wider than one block
 7  soft-capped logits                           15  logits around 1e4
 8  every token ignored: loss 0 and gradient 0   16  a logit of -inf (a masked class)
                                                 17  float32 class weights with bfloat16 logits

Sources: label smoothing, Szegedy et al. (2015), arXiv:1512.00567, section 7; z-loss, Chowdhery et al., "PaLM"
(2022), arXiv:2204.02311, section 5; soft cap, Gemma Team, "Gemma 2" (2024), arXiv:2408.00118, section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__ = ["cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def wide(t: Tensor) -> Tensor:
    """float64 as it is, else float32: the dtype of every statistic."""
    return t if t.dtype == torch.float64 else t.float()


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """x of the docstring, in the wide dtype."""
    x = wide(logits)
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def class_weights(weight: Tensor | None, like: Tensor) -> Tensor:
    """The class weights (V), ones if there are none, for x (..., V)."""
    return like.new_ones(like.shape[-1]) if weight is None else weight.to(like.dtype).contiguous()


def targets(target: Tensor, w: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """(valid, index, w_t), each like target: not ignored, a class that is safe to gather, its weight.

    A target out of range raises IndexError on a CPU; elsewhere, where reading it would stall the device, its
    weight is NaN and with it the loss.
    """
    valid = target != ignore_index
    bad = valid & ((target < 0) | (target >= w.shape[0]))
    if target.device.type == "cpu" and bool(bad.any()):
        allowed = f"0 to {w.shape[0] - 1}, or ignore_index {ignore_index}"
        raise IndexError(f"target: got {target[bad][0].item()}; allowed: {allowed}")
    index = torch.where(valid & ~bad, target, 0)
    return valid, index, torch.where(valid, torch.where(bad, math.nan, w.take(index)), 0.0)


def token_losses(x: Tensor, target: Tensor, w: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """x (..., V), capped -> statistics (3, ...)."""
    valid, index, w_t = targets(target, w, ignore_index)
    x = torch.where(valid.unsqueeze(-1), x, 0.0)
    top = x.detach().amax(-1, keepdim=True)
    log_sum = (x - top).exp().sum(-1, keepdim=True).log()
    log_p = (x - top) - log_sum
    loss = -(1.0 - label_smoothing) * w_t * log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing / x.shape[-1] * (log_p * w).sum(-1)
    top, log_sum = top.squeeze(-1), log_sum.squeeze(-1)
    lse = top + log_sum
    part = lse - top
    low = (top - (lse - part)) + (log_sum - part)  # what rounding took from lse (Knuth's two-sum)
    return torch.where(valid, torch.stack([lse, low, loss]), 0.0)


def reduce(
    statistics: Tensor, target: Tensor, w: Tensor, ignore_index: int, z_loss: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """statistics (3, ...) -> loss () or (...), denominators (2)."""
    valid, _, w_t = targets(target, w, ignore_index)
    lse, losses = statistics[0], statistics[2]
    denominators = torch.stack([w_t.sum(), valid.sum().to(w.dtype)])
    z = z_loss * lse.square() if z_loss else torch.zeros_like(lse)
    if reduction == "none":
        return losses + z, denominators
    if reduction == "sum":
        return losses.sum() + z.sum(), denominators
    scale = per_denominator(losses.new_ones(()), denominators)
    return losses.sum() * scale[0] + z.sum() * scale[1], denominators


def per_denominator(d_loss: Tensor, denominators: Tensor) -> Tensor:
    """d_loss over each denominator, 0 where that is 0: nothing counts, so nothing changes."""
    return torch.where(denominators == 0, 0.0, d_loss / denominators)


def token_gradients(
    d_loss: Tensor, logits: Tensor, target: Tensor, w: Tensor, statistics: Tensor, denominators: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
) -> Tensor:  # fmt: skip
    """Gradient of logits (..., V) in the wide dtype; d_loss a scalar, or (...) for reduction "none"."""
    valid, index, w_t = targets(target, w, ignore_index)
    lse, low = statistics[0], statistics[1]
    g, h = per_denominator(d_loss, denominators) if reduction == "mean" else (d_loss, d_loss)
    a, b, d = (
        t.expand_as(lse).unsqueeze(-1)
        for t in (
            g * (1.0 - label_smoothing) * w_t,
            g * (label_smoothing / w.shape[0]),
            h * (2.0 * z_loss) * lse,
        )
    )
    x = cap(logits, softcap)
    p = ((x - lse.unsqueeze(-1)) - low.unsqueeze(-1)).exp()
    hit = torch.zeros_like(p).scatter_(-1, index.unsqueeze(-1), 1.0)
    # d x_c = A * (p_c - [c = t]) + B * (W * p_c - w_c) + D * p_c
    dx = a * (p - hit) + b * (w.sum() * p - w) + d * p
    if softcap is not None:
        dx = dx * (1.0 - (x / softcap).square())
    return torch.where(valid.unsqueeze(-1), dx, 0.0)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float | None, reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """logits (..., V), target (...) -> loss () or (...), statistics (3, ...), denominators (2)."""
    x = cap(logits, softcap)
    w = class_weights(weight, x)
    statistics = token_losses(x, target, w, ignore_index, label_smoothing)
    loss, denominators = reduce(statistics, target, w, ignore_index, z_loss, reduction)
    return loss, statistics, denominators


def backward(
    d_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, statistics: Tensor,
    denominators: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None,
    reduction: str, needs: tuple[bool],
) -> tuple[Tensor | None]:  # fmt: skip
    """d_loss () or (...) -> d_logits like logits."""
    if not needs[0]:
        return (None,)
    w = class_weights(weight, wide(logits))
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    d_logits = token_gradients(wide(d_loss), logits, target, w, statistics, denominators, *options)
    return (d_logits.to(logits.dtype),)


def result_specs(x: Tensor, target: Tensor, reduction: str) -> tuple[Spec, ...]:
    """loss; statistics, denominators."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = tuple(target.shape)
    return Spec(shape if reduction == "none" else (), dtype), Spec((3, *shape), dtype), Spec((2,), dtype)


def outputs(logits: Tensor, target: Tensor, weight: Any, *options: Any) -> tuple[Spec, ...]:
    """loss; statistics, denominators."""
    return result_specs(logits, target, options[-1])


def gradients(d_loss: Tensor, logits: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """d_logits."""
    return (Spec(tuple(logits.shape), logits.dtype),)


def cost(logits: Tensor, target: Tensor, **options: Any) -> Cost:
    """Forward reads the logits, backward reads them and writes as much; about 5 operations an element."""
    return Cost(5.0 * logits.numel(), 1.0 * logits.nbytes, 5.0 * logits.numel(), 2.0 * logits.nbytes)


def peer(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """What a PyTorch user writes today, and 0 where PyTorch's mean over nothing is NaN."""
    classes = logits.shape[-1]
    x, flat = logits.reshape(target.numel(), classes), target.reshape(-1)
    if softcap is not None or z_loss:
        x = cap(x, softcap)
    if weight is not None:
        weight = weight.to(x.dtype)
    valid = flat != ignore_index
    counted = flat[valid].numel() if weight is None else weight[flat[valid]].sum()
    if reduction == "mean" and counted == 0:
        loss = (x * 0.0).sum()
    else:
        loss = F.cross_entropy(
            x, flat, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    if z_loss:
        z = z_loss * torch.logsumexp(x, -1).square() * valid
        if reduction != "none":
            z = z.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)
        loss = loss + z
    return loss.reshape(target.shape) if reduction == "none" else loss


def _target(*values: int) -> Values:
    return Values(list(values), torch.int64)


_f32, _i64 = torch.float32, torch.int64
_every = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
samples = (
    Sample("1 leading dimensions", logits=Normal((2, 3, 67)), target=Integers((2, 3), 0, 67)),
    Sample("11 sum, every option", logits=Normal((6, 50), 3.0), target=_target(3, -100, 49, 0, 7, 7),
           reduction="sum", weight=Normal((50,), 0.2, 1.0), **_every),
    Sample("2 no leading dimension", logits=Normal((33,)), target=Values(4, _i64), z_loss=1e-3),
    Sample("3 ignored", logits=Normal((5, 40)), target=_target(1, 7, 39, 7, 0), ignore_index=7),
    Sample("4 smoothing", logits=Normal((4, 40), 2.0), target=_target(1, -100, 39, 0), label_smoothing=0.2),
    Sample("5 weights and smoothing", logits=Normal((4, 40)), target=_target(1, -100, 39, 0),
           weight=Normal((40,), 0.3, 1.0), label_smoothing=0.1),
    Sample("6 z-loss", logits=Normal((4, 24), 2.0), target=_target(1, 3, -100, 0),
           weight=Normal((24,), 0.3, 1.0), z_loss=0.1),
    Sample("7 softcap", logits=Normal((4, 40), 8.0), target=_target(1, 3, 5, 0), softcap=10.0),
    Sample("8 all ignored", logits=Normal((3, 20)), target=_target(-100, -100, -100), **_every),
    Sample("9 weights of 0", logits=Normal((2, 4)), target=_target(1, 1),
           weight=Values([1.0, 0.0, 2.0, 1.0]), z_loss=0.1),
    Sample("10 none, every option", logits=Normal((2, 3, 50), 3.0),
           target=Values([[3, -100, 49], [0, 7, 7]], _i64), weight=Normal((50,), 0.2, 1.0), reduction="none",
           **_every),
    Sample("12 no tokens", logits=Normal((0, 16)), target=Integers((0,), 0, 16), **_every),
    Sample("13 V = 1", logits=Normal((3, 1)), target=_target(0, -100, 0), **_every),
    Sample("14 wide", logits=Normal((3, 9001), 2.0), target=_target(9000, 0, 4096),
           weight=Normal((9001,), 0.2, 1.0), **_every),
    Sample("15 large", logits=Normal((4, 30), 1.0, 1e4), target=_target(0, 3, -100, 29), label_smoothing=0.1),
    Sample("16 masked class", logits=Values([[0.5, -math.inf, 1.0, 2.0], [-math.inf, 0.1, -math.inf, 3.0]]),
           target=_target(3, 1)),
    Sample("17 float32 weights", logits=Normal((6, 48)), target=Integers((6,), 0, 48),
           weight=Normal((48,), 0.2, 1.0, _f32)),
)  # fmt: skip

_two = {"logits": Normal((2, 4)), "target": Integers((2,), 0, 4)}
errors = (
    Bad(
        "logits integer", TypeError, r"logits: .*int64.*floating", **_two | {"logits": Integers((2, 4), 0, 4)}
    ),
    Bad("logits scalar", ValueError, r"logits: .*\(\).*V >= 1", **_two | {"logits": Values(1.0)}),
    Bad("no classes", ValueError, r"logits: .*\(2, 0\).*V >= 1", **_two | {"logits": Normal((2, 0))}),
    Bad(
        "target dtype",
        TypeError,
        r"target: .*int32.*int64",
        **_two | {"target": Integers((2,), 0, 4, torch.int32)},
    ),
    Bad("target shape", ValueError, r"target: .*\(3,\).*\(2,\)", **_two | {"target": Integers((3,), 0, 4)}),
    Bad("target range", IndexError, r"target: got 4.*0 to 3.*-100", **_two | {"target": _target(1, 4)}),
    Bad("target negative", IndexError, r"target: got -1.*0 to 3.*-100", **_two | {"target": _target(-1, 2)}),
    Bad("weight shape", ValueError, r"weight: .*\(2,\).*\(4,\)", **_two, weight=Normal((2,))),
    Bad("weight dtype", TypeError, r"weight: .*float64", **_two, weight=Normal((4,), dtype=torch.float64)),
    Bad("smoothing", ValueError, r"label_smoothing: .*1.5.*0 to 1", **_two, label_smoothing=1.5),
    Bad("z-loss", ValueError, r"z_loss: .*nan.*>= 0", **_two, z_loss=math.nan),
    Bad("softcap", ValueError, r"softcap: .*0.*> 0", **_two, softcap=0.0),
    Bad("reduction", ValueError, r"reduction: .*'avg'.*mean, sum, none", **_two, reduction="avg"),
)

def random(pick: Pick) -> Sample:
    """Every option at once or none, with ignored targets among the others."""
    classes = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 2)))
    return Sample(
        "random", logits=Normal((*lead, classes), scale=pick.one_of(1.0, 5.0)), target=Integers(lead, 0, classes),
        weight=pick.one_of(None, Normal((classes,), 0.2, 1.0, pick.one_of(None, _f32))),
        ignore_index=pick.one_of(-100, 0), label_smoothing=pick.one_of(0.0, 0.2), z_loss=pick.one_of(0.0, 1e-2),
        softcap=pick.one_of(None, 5.0), reduction=pick.one_of("mean", "sum", "none"),
    )  # fmt: skip


def case(tokens: int = 1024, classes: int = 50304) -> Sample:
    """Logits (tokens, classes), mean."""
    return Sample("case", logits=Normal((tokens, classes)), target=Integers((tokens,), 0, classes))


shapes = {
    "default": ({"tokens": 1024, "classes": 50304}, {"tokens": 2048, "classes": 4096}),
    "sweep": tuple({"tokens": 2**24 // v, "classes": v} for v in (1024, 4096, 16384, 65536, 262144)),
    "large": tuple({"tokens": 2**29 // v, "classes": v} for v in (4096, 32768, 65536, 131072)),
}


op = register(
    Op(
        name="cross_entropy",
        schema="(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
        "float z_loss, float? softcap, str reduction) -> (Tensor loss, Tensor statistics, Tensor denominators)",
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
        grads=("logits",),
        saved=("logits", "target", "weight", "statistics", "denominators"),
    )
)


def check_targets(name: str, x: Tensor, target: object) -> None:
    """target must be int64, of x's leading dimensions."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        given = f"dtype {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: got {given}; allowed: an int64 tensor of class indices")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}; allowed: {tuple(x.shape[:-1])}, "
            f"that of {name} without its last dimension"
        )


def check_class_vector(name: str, v: Tensor | None, classes: int, dtype: torch.dtype) -> None:
    """v must be None or (V,), of the given dtype or float32."""
    if v is None:
        return
    check_floating(name, v)
    if v.shape != (classes,):
        raise ValueError(f"{name}: got shape {tuple(v.shape)}; allowed: ({classes},), one for each class")
    if v.dtype not in (dtype, torch.float32) or (dtype == torch.float64 and v.dtype != dtype):
        raise TypeError(
            f"{name}: got dtype {v.dtype}; allowed: {dtype}"
            + (" or torch.float32" if dtype != torch.float64 else "")
        )


def check_options(label_smoothing: float, z_loss: float, softcap: float | None, reduction: str) -> None:
    """The options that are numbers and names."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}; allowed: 0 to 1")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: got {z_loss}; allowed: finite and >= 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}; allowed: finite and > 0, or None")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; allowed: {', '.join(REDUCTIONS)}")


def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean",
    tape: Any = None,
) -> Tensor:  # fmt: skip
    """``torch.nn.functional.cross_entropy`` of logits with classes last and class indices, and more.

    Args:
        logits: (..., V), floating-point, V >= 1; never written to.
        target: (...), int64, in [0, V) or ignore_index. One out of range raises IndexError on a CPU; on a GPU,
            where looking would stall the device, it makes the loss NaN.
        weight: (V,), of logits' dtype or float32: a weight for each class; None for 1. It has no gradient.
        ignore_index: tokens with this target add nothing to the loss and have gradient 0, whatever their
            logits.
        label_smoothing: in [0, 1]; weighted as in PyTorch.
        z_loss: adds z_loss * lse**2, of the capped logits, for every token not ignored, never weighted by class.
        softcap: c > 0 replaces logits by c * tanh(logits / c); None leaves them.
        reduction: "mean" divides by the sum of the targets' weights, and the z-loss by the number of tokens not
            ignored; "sum"; or "none".
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, () or (...) for "none"; float32 (float64 for float64) whatever the dtype of logits.
        A mean over nothing (every token ignored, or every target of weight 0) is 0 with gradient 0, where
        PyTorch gives NaN.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was given and what is allowed.
    """
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}; allowed: (..., V) with V >= 1")
    check_targets("logits", logits, target)
    check_class_vector("weight", weight, logits.shape[-1], logits.dtype)
    check_same_device(logits=logits, target=target, weight=weight)
    check_options(label_smoothing, z_loss, softcap, reduction)
    cap_at = None if softcap is None else float(softcap)
    options = (int(ignore_index), float(label_smoothing), float(z_loss), cap_at, reduction)
    loss: Tensor = op(logits, target, weight, *options, tape=tape)[0]
    return loss
