"""The arithmetic of cross-entropy in plain PyTorch, shared by its forms; the formulas stand in cross_entropy.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import Spec

__all__ = ["NO_CLASS", "CrossEntropyExtras"]

# A target that is none of these classes, as in a shard of a vocabulary that does not hold a token's class.
NO_CLASS = torch.iinfo(torch.int64).min


class CrossEntropyExtras(NamedTuple):
    """What a cross-entropy with ``extras=True`` returns beside the loss, from the same pass.

    z_loss: the z term alone, reduced as the loss is, of its shape. Differentiable.
    lse: (...), log(sum_c exp(x_c)) of each token, float32 (float64 for float64), 0 where ignored. Differentiable.
    correct: (...), bool: whether the target has the largest logit, the first of equal ones; for probabilities,
        whether the largest logit and the largest probability are of one class. False where ignored or where a
        logit is NaN.
    confidence: (...), the largest probability exp(x_c - lse); 0 where ignored.
    entropy: (...), -sum_c p_c log(p_c) in nats; 0 where ignored.
    """

    z_loss: Tensor
    lse: Tensor
    correct: Tensor
    confidence: Tensor
    entropy: Tensor


class Options(NamedTuple):
    """The arguments of every form of the loss that are not tensors, in the order of the schemas."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    reduction: str
    extras: bool


class Targets(NamedTuple):
    """What the tokens' targets come to."""

    valid: Tensor  # (...) bool: not ignored
    place: Tensor  # (...): a class that is safe to gather
    weight: Tensor  # (...): w_t, 0 where ignored or of no class; 1 for probabilities
    probabilities: Tensor | None  # (..., V)


def wide(t: Tensor) -> Tensor:
    """float64 as it is, else float32: the dtype of every statistic."""
    return t if t.dtype == torch.float64 else t.float()


def cap(logits: Tensor, softcap: float | None, logit_scale: float = 1.0) -> Tensor:
    """x of the docstring, in the wide dtype."""
    x = wide(logits)
    x = x if logit_scale == 1.0 else logit_scale * x
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def class_weights(weight: Tensor | None, like: Tensor) -> Tensor:
    """The class weights (V), ones if there are none, for x (..., V)."""
    return like.new_ones(like.shape[-1]) if weight is None else weight.to(like.dtype).contiguous()


def read_targets(target: Tensor, w: Tensor, ignore_index: int) -> Targets:
    """A target out of range raises IndexError on a CPU; elsewhere, where reading it would stall the device, its
    weight is NaN and with it the loss."""
    if target.is_floating_point():
        rows = target.shape[:-1]
        valid = torch.ones(rows, dtype=torch.bool, device=target.device)
        return Targets(valid, valid.long(), w.new_ones(rows), target.to(w.dtype))
    valid, absent = target != ignore_index, target == NO_CLASS
    bad = valid & ~absent & ((target < 0) | (target >= w.shape[0]))
    if target.device.type == "cpu" and bool(bad.any()):
        allowed = f"0 to {w.shape[0] - 1}, or ignore_index {ignore_index}"
        raise IndexError(f"target: got {target[bad][0].item()}; allowed: {allowed}")
    index = torch.where(valid & ~bad & ~absent, target, 0)
    return Targets(
        valid, index, torch.where(valid & ~absent, torch.where(bad, math.nan, w.take(index)), 0.0), None
    )


def token_statistics(logits: Tensor, target: Tensor, w: Tensor, o: Options) -> tuple[Tensor, ...]:
    """logits (..., V) -> statistics (3 or 4, ...); with extras also correct, confidence, entropy (...)."""
    valid, index, w_t, q = read_targets(target, w, o.ignore_index)
    x = torch.where(valid.unsqueeze(-1), cap(logits, o.softcap, o.logit_scale), 0.0)
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0.0, top)  # so that lse of nothing but -inf is -inf
    log_sum = (x - top).exp().sum(-1, keepdim=True).log()
    log_p = (x - top) - log_sum
    if q is None:
        loss = -(1.0 - o.label_smoothing) * w_t * log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    else:
        wq = w * q  # a class of probability 0 counts for nothing, also if its logit is -inf
        loss = -(1.0 - o.label_smoothing) * torch.where(wq == 0, 0.0, wq * log_p).sum(-1)
    if o.label_smoothing:
        loss = loss - o.label_smoothing / x.shape[-1] * (log_p * w).sum(-1)
    top, log_sum = top.squeeze(-1), log_sum.squeeze(-1)
    lse = top + log_sum
    part = lse - top
    low = (top - (lse - part)) + (log_sum - part)  # what rounding took from lse (Knuth's two-sum)
    rows = [lse, low, loss] if q is None else [lse, low, loss, (w * q).sum(-1)]
    statistics = torch.where(valid, torch.stack(rows), 0.0)
    if not o.extras:
        return (statistics,)
    with torch.no_grad():
        p = log_p.exp()
        hit = target if q is None else q.argmax(-1)
        correct = valid & (logits.argmax(-1) == hit) & ~p.isnan().any(-1)
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
        return statistics, correct, torch.where(valid, p.amax(-1), 0.0), torch.where(valid, entropy, 0.0)


def token_weights(token_weight: Tensor | None, targets: Targets) -> Tensor:
    """u (...): 1 if there are none, 0 where ignored."""
    u = torch.ones_like(targets.weight) if token_weight is None else token_weight.to(targets.weight.dtype)
    return torch.where(targets.valid, u, 0.0)


def reduce(
    statistics: Tensor, target: Tensor, w: Tensor, token_weight: Tensor | None, o: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """statistics (3 or 4, ...) -> loss and its z term, () or (...), denominators (2)."""
    targets = read_targets(target, w, o.ignore_index)
    u = token_weights(token_weight, targets)
    denominators = torch.stack([(u * targets.weight).sum(), u.sum()])
    losses, z = u * statistics[2], u * (o.z_loss * statistics[0].square())
    if o.reduction == "none":
        return losses + z, z, denominators
    loss, z = losses.sum(), z.sum()
    if o.reduction == "mean":
        scale = per_denominator(loss.new_ones(()), denominators)
        loss, z = loss * scale[0], z * scale[1]
    return loss + z, z, denominators


def results(loss: Tensor, z: Tensor, statistics: Tensor, marks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What forward returns before its statistics; the extras are empty if there are no marks."""
    if marks:
        return loss, z, statistics[0].clone(), *marks
    none = loss.new_empty(0)
    return loss, none, none.clone(), none.bool(), none.clone(), none.clone()


def result_specs(x: Tensor, target: Tensor, o: Options) -> tuple[Spec, ...]:
    """loss; the extras; statistics, denominators."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = tuple(x.shape[:-1])
    loss = shape if o.reduction == "none" else ()
    z, token = (loss, shape) if o.extras else ((0,), (0,))
    marks = (Spec(token, torch.bool), Spec(token, dtype), Spec(token, dtype))
    rows = 4 if target.is_floating_point() else 3
    return Spec(loss, dtype), Spec(z, dtype), Spec(token, dtype), *marks, Spec((rows, *shape), dtype), Spec((2,), dtype)


def per_denominator(d_loss: Tensor, denominators: Tensor) -> Tensor:
    """d_loss over each denominator, 0 where that is 0: nothing counts, so nothing changes."""
    return torch.where(denominators == 0, 0.0, d_loss / denominators)


class Upstream(NamedTuple):
    """The gradients of a token's first two terms, of its z term and of its lse: G, H and L of the docstring, (...)."""

    main: Tensor
    z: Tensor
    lse: Tensor

    def flat(self) -> Upstream:
        """With the tokens in one dimension."""
        return Upstream(*(t.reshape(-1) for t in self))

    def of(self, rows: slice) -> Upstream:
        """That of some of the tokens."""
        return Upstream(self.main[rows], self.z[rows], self.lse[rows])


def upstream(
    d_loss: Tensor | None, d_z: Tensor | None, d_lse: Tensor | None, target: Tensor, w: Tensor,
    token_weight: Tensor | None, denominators: Tensor, o: Options,
) -> Upstream:  # fmt: skip
    """Of the gradients of the results, None for 0; without extras there is none but d_loss."""
    targets = read_targets(target, w, o.ignore_index)
    zero = w.new_zeros(())
    g = zero if d_loss is None else wide(d_loss)
    h = g if d_z is None or not o.extras else g + wide(d_z)
    if o.reduction == "mean":
        g, h = per_denominator(g, denominators)[0], per_denominator(h, denominators)[1]
    u = token_weights(token_weight, targets)
    d = zero if d_lse is None or not o.extras else wide(d_lse)
    return Upstream(g * u, h * u, d.expand_as(u))


def token_gradients(
    up: Upstream, logits: Tensor, target: Tensor, w: Tensor, statistics: Tensor, o: Options
) -> Tensor:
    """Gradient of logits (..., V) in the wide dtype."""
    valid, index, w_t, q = read_targets(target, w, o.ignore_index)
    lse, low = statistics[0], statistics[1]
    a, b, d = (
        t.unsqueeze(-1)
        for t in (
            up.main * (1.0 - o.label_smoothing) * w_t,
            up.main * (o.label_smoothing / w.shape[0]),
            up.z * (2.0 * o.z_loss) * lse + up.lse,
        )
    )
    x = cap(logits, o.softcap, o.logit_scale)
    p = ((x - lse.unsqueeze(-1)) - low.unsqueeze(-1)).exp()
    # d x_c = A * (Q * p_c - q_c) + B * (W * p_c - w_c) + D * p_c
    if q is None:  # A holds w_t, which is 0 for NO_CLASS
        away = p - torch.zeros_like(p).scatter_(-1, index.unsqueeze(-1), 1.0)
    else:
        away = statistics[3].unsqueeze(-1) * p - w * q
    dx = a * away + b * (w.sum() * p - w) + d * p
    if o.softcap is not None:
        dx = dx * (1.0 - (x / o.softcap).square())
    return torch.where(valid.unsqueeze(-1), dx * o.logit_scale, 0.0)
