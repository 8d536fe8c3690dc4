"""Losses over a vocabulary that is cut into shards, one on each process of a tensor-parallel group.

Rank r holds classes a_r to b_r, the same tokens as every other rank, and no process ever holds all the logits. With
lse_r the log-sum-exp of a rank's own x, all that is exchanged for a token is

    M = max_r lse_r                                                                 all_reduce of the maximum
    sum_r exp(lse_r - M), sum_r loss_r - k_r (lse_r - M), sum_r k_r, sum_r w_t      one all_reduce of the sums

where loss_r is what the rank's shard gives by the op of one process, with lse_r for lse, and k_r is the coefficient of
lse in it: (1 - s) w_t on the rank that holds t, and s / V sum_c w_c over its c. Then lse = M + log(sum of the first)
and a token's loss is the sum of the second + (lse - M) * the sum of the third, on every rank the same.

Backward needs nothing from the others but lse: with it instead of lse_r, the op's own backward gives
A (q_r p_c - q_c) + B (W_r p_c - w_c) + D p_c of the shard's classes, and what is missing of the whole vocabulary's Q and
W is a multiple of p_c, as D is, and goes in with it. Only the gradient of hidden is then summed over the ranks.

A second derivative is refused by the op's backward, which is what a gradient here comes from.

The op sees label_smoothing s' and its losses are multiplied by f, with (1 - s') f = 1 - s and s' f / V_r = s / V.

Source: Shoeybi et al., "Megatron-LM" (2019), arXiv:1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .checks import check_floating, check_same_device
from .ops.cross_entropy_arguments import (
    check_class_vector,
    check_options,
    check_targets,
    check_token_weight,
)
from .ops.cross_entropy_math import NO_CLASS, Options, per_denominator, wide
from .ops.linear_cross_entropy import workspace_bytes

__all__ = ["vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"]


class _Shard(NamedTuple):
    """What a rank knows of the vocabulary without looking at logits."""

    group: Any
    start: int  # its first class
    size: int  # its classes
    classes: int  # of all ranks

    @classmethod
    def of(cls, size: int, sizes: Sequence[int] | None, group: Any, device: torch.device) -> _Shard:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("group: got one that this process is not in; allowed: one of its own")
        if sizes is None:
            own = torch.tensor([size], device=device)
            every = [torch.empty_like(own) for _ in range(ranks)]
            dist.all_gather(every, own, group=group)
            sizes = torch.cat(every).tolist()
        elif len(sizes) != ranks or sizes[rank] != size:
            raise ValueError(
                f"sizes: got {list(sizes)}; allowed: the classes of each of {ranks} ranks, {size} for rank {rank}"
            )
        return cls(group, sum(sizes[:rank]), size, sum(sizes))

    def smoothing(self, o: Options) -> tuple[float, float]:
        """(s', f) of the module's docstring."""
        part = o.label_smoothing * self.size
        whole = part + (1.0 - o.label_smoothing) * self.classes
        return part / whole, whole / self.classes


class _Targets(NamedTuple):
    """The targets as the shard sees them; each (...)."""

    valid: Tensor  # not ignored
    here: Tensor  # of a class of this shard
    wrong: Tensor  # of no class of any
    local: Tensor  # for the op


def _targets(target: Tensor, shard: _Shard, o: Options) -> _Targets:
    valid = target != o.ignore_index
    wrong = valid & ((target < 0) | (target >= shard.classes))
    if target.device.type == "cpu" and bool(wrong.any()):
        allowed = f"0 to {shard.classes - 1}, or ignore_index {o.ignore_index}"
        raise IndexError(f"target: got {target[wrong][0].item()}; allowed: {allowed}")
    local = target - shard.start
    here = valid & ~wrong & (local >= 0) & (local < shard.size)
    return _Targets(valid, here, wrong, local.where(here, NO_CLASS).where(valid, -100))


class _Loss(NamedTuple):
    """A token's share of the whole, and what backward needs; each (...) but the sums."""

    loss: Tensor  # () or (...)
    statistics: Tensor  # (3, ...): of the whole vocabulary, as the ops keep them
    elsewhere: Tensor  # Q of the other shards
    denominators: Tensor  # (2)
    beyond: Tensor  # (): W of the other shards


def _combine(
    statistics: Tensor, class_weight: Tensor | None, token_weight: Tensor | None, t: _Targets, shard: _Shard,
    o: Options,
) -> _Loss:  # fmt: skip
    """statistics (3, ...) of the shard by itself -> the loss over all shards."""
    lse, low, loss = statistics
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    w = None if class_weight is None else wide(class_weight).to(lse.dtype)
    own = lse.new_full((), shard.size) if w is None else w.sum()
    w_t = t.here.to(lse.dtype)
    if w is not None:
        w_t = w_t * w.take(t.local.where(t.here, 0))
    rise = torch.where(top == lse, 0.0, lse - top) + torch.where(lse.isfinite(), low, 0.0)
    k = (1.0 - o.label_smoothing) * w_t + o.label_smoothing / shard.classes * own
    # A shard that is -inf throughout has nothing to say of a token whose class is elsewhere.
    main = torch.where(k == 0, 0.0, shard.smoothing(o)[1] * loss - k * rise)
    packed = torch.cat([torch.stack([rise.exp(), main, k, w_t]).flatten(), own.reshape(1)])
    dist.all_reduce(packed, group=shard.group)
    total, main, k, every_w_t = packed[:-1].view(4, *lse.shape)
    log = total.log()
    whole = top + log
    part = whole - top
    low = (top - (whole - part)) + (log - part)  # what rounding took from lse (Knuth's two-sum)
    main = torch.where(t.wrong, torch.nan, torch.where(t.valid, main + k * log, 0.0))
    whole, low = (torch.where(t.valid, v, 0.0) for v in (whole, low))
    u = torch.ones_like(lse) if token_weight is None else token_weight.to(lse.dtype)
    u = torch.where(t.valid, u, 0.0)
    denominators = torch.stack([(u * every_w_t).sum(), u.sum()])
    main, z = u * main, u * (o.z_loss * whole.square())
    if o.reduction == "none":
        value = main + z
    else:
        scale = torch.ones_like(denominators)
        if o.reduction == "mean":
            scale = per_denominator(scale, denominators)
        value = main.sum() * scale[0] + z.sum() * scale[1]
    return _Loss(value, torch.stack([whole, low, main]), every_w_t - w_t, denominators, packed[-1] - own)


def _upstream(
    d_loss: Tensor, token_weight: Tensor | None, t: _Targets, statistics: Tensor, elsewhere: Tensor,
    denominators: Tensor, beyond: Tensor, shard: _Shard, o: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of the op's losses, gradient of its lse), (...), of the shard."""
    lse = statistics[0]
    g = h = wide(d_loss).to(lse.dtype)
    if o.reduction == "mean":
        g, h = per_denominator(g, denominators)
    u = torch.ones_like(lse) if token_weight is None else token_weight.to(lse.dtype)
    g, h = (torch.where(t.valid, d * u, 0.0) for d in (g, h))
    d_lse = h * (2.0 * o.z_loss) * lse + g * (
        (1.0 - o.label_smoothing) * elsewhere + o.label_smoothing / shard.classes * beyond
    )
    d_lse = torch.where(t.wrong, torch.nan, d_lse)
    return shard.smoothing(o)[1] * g, d_lse


def _local(o: Options, shard: _Shard) -> Options:
    """The options with which the op runs on a shard: what a token's losses have in common is done here."""
    return Options(-100, shard.smoothing(o)[0], 0.0, o.softcap, o.logit_scale, "none", False)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None,
        shard: _Shard, o: Options,
    ) -> Tensor:  # fmt: skip
        t = _targets(target, shard, o)
        out = torch.ops.fastlm.cross_entropy(logits, t.local, weight, None, *_local(o, shard))
        whole = _combine(out[-2], weight, token_weight, t, shard, o)
        ctx.save_for_backward(logits, weight, token_weight, *t, *whole[1:])
        ctx.shard, ctx.options, ctx.backend = shard, o, backends.requested()
        return whole.loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Any, ...]:
        logits, weight, token_weight, *rest = ctx.saved_tensors
        t, (statistics, elsewhere, denominators, beyond) = _Targets(*rest[:4]), rest[4:]
        up = _upstream(
            d_loss, token_weight, t, statistics, elsewhere, denominators, beyond, ctx.shard, ctx.options
        )
        options = _local(ctx.options, ctx.shard)._replace(extras=True)
        saved = (logits, t.local, weight, None, statistics, denominators)
        with backends.use_backend(ctx.backend):
            d_logits = torch.ops.fastlm.cross_entropy_backward(up[0], None, up[1], *saved, *options, [True])
        return d_logits, None, None, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
        token_weight: Tensor | None, shard: _Shard, o: Options, workspace: int,
    ) -> Tensor:  # fmt: skip
        t = _targets(target, shard, o)
        tensors = (hidden, weight, t.local, bias, class_weight, None)
        out = torch.ops.fastlm.linear_cross_entropy(*tensors, *_local(o, shard), workspace)
        whole = _combine(out[-2], class_weight, token_weight, t, shard, o)
        ctx.save_for_backward(hidden, weight, bias, class_weight, token_weight, *t, *whole[1:])
        ctx.shard, ctx.options, ctx.workspace, ctx.backend = shard, o, workspace, backends.requested()
        return whole.loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, class_weight, token_weight, *rest = ctx.saved_tensors
        t, (statistics, elsewhere, denominators, beyond) = _Targets(*rest[:4]), rest[4:]
        up = _upstream(
            d_loss, token_weight, t, statistics, elsewhere, denominators, beyond, ctx.shard, ctx.options
        )
        options = _local(ctx.options, ctx.shard)._replace(extras=True)
        needs = list(ctx.needs_input_grad[:3])
        saved = (hidden, weight, t.local, bias, class_weight, None, statistics, denominators)
        with backends.use_backend(ctx.backend):
            grads = torch.ops.fastlm.linear_cross_entropy_backward(
                up[0], None, up[1], *saved, *options, ctx.workspace, needs
            )
        if needs[0]:
            with torch.no_grad():
                dist.all_reduce(grads[0], group=ctx.shard.group)
        like = zip(grads, (hidden, weight, bias), needs, strict=True)
        return *(g.to(x.dtype) if need else None for g, x, need in like), None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_shard: Tensor, target: Tensor, group: Any = None, *, weight_shard: Tensor | None = None,
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    reduction: str = "mean", logit_scale: float = 1.0, token_weight: Tensor | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """`fastlm.ops.cross_entropy` of logits whose classes are cut among the ranks of a group, in their order.

    Every rank calls it with the same target and options and gets the same loss; the gradient of its shard needs no
    exchange. The whole backward must start from the same d_loss on every rank. A second derivative is refused.

    Args:
        logits_shard: (..., V_r), the rank's classes; shards may differ in size, V_r >= 1.
        target: (...), int64, of the whole vocabulary; one out of range is as in `cross_entropy`.
        group: of torch.distributed; None for all processes.
        weight_shard: (V_r,), the class weights of the rank's classes.
        sizes: V_r of every rank. None asks the others, which waits for the device: give them in a training step.
        ignore_index, label_smoothing, z_loss, softcap, reduction, logit_scale, token_weight: as in `cross_entropy`.

    Returns:
        The loss, () or (...) for "none", float32 (float64 for float64).

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was given and what is allowed.
    """
    _check("logits_shard", logits_shard)
    size = logits_shard.shape[-1]
    _check_targets("logits_shard", logits_shard, target)
    check_class_vector("weight_shard", weight_shard, size, logits_shard.dtype)
    check_token_weight(token_weight, logits_shard)
    check_same_device(
        logits_shard=logits_shard, target=target, weight_shard=weight_shard, token_weight=token_weight
    )
    o = check_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, False)
    shard = _Shard.of(size, sizes, group, logits_shard.device)
    loss: Tensor = _CrossEntropy.apply(logits_shard, target, weight_shard, token_weight, shard, o)
    return loss


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor, weight_shard: Tensor, target: Tensor, bias_shard: Tensor | None = None, group: Any = None, *,
    class_weight_shard: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean", logit_scale: float = 1.0,
    token_weight: Tensor | None = None, workspace_mb: float | None = None, sizes: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """`fastlm.ops.linear_cross_entropy` of a projection whose classes are cut among the ranks of a group.

    hidden is the same on every rank, and so is its gradient, which is summed over the ranks in hidden's dtype; either
    every rank wants it or none. No rank holds the logits, not even its own.

    Args:
        hidden: (..., H); weight_shard: (V_r, H), bias_shard: (V_r,), class_weight_shard: (V_r,) of the rank's classes.
        workspace_mb: as in `linear_cross_entropy`, for the rank's classes.
        The rest, the result and what is raised: as in `vocab_parallel_cross_entropy`.
    """
    _check("hidden", hidden)
    check_floating("weight_shard", weight_shard)
    if weight_shard.dim() != 2 or weight_shard.shape[0] == 0 or weight_shard.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight_shard: got shape {tuple(weight_shard.shape)}; allowed: (V_r, {hidden.shape[-1]}) with V_r >= 1"
        )
    if weight_shard.dtype != hidden.dtype:
        raise TypeError(f"weight_shard: got dtype {weight_shard.dtype}; allowed: hidden's dtype {hidden.dtype}")
    size = weight_shard.shape[0]
    _check_targets("hidden", hidden, target)
    check_class_vector("bias_shard", bias_shard, size, hidden.dtype)
    check_class_vector("class_weight_shard", class_weight_shard, size, hidden.dtype)
    check_token_weight(token_weight, hidden)
    check_same_device(
        hidden=hidden, weight_shard=weight_shard, target=target, bias_shard=bias_shard,
        class_weight_shard=class_weight_shard, token_weight=token_weight,
    )  # fmt: skip
    o = check_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, False)
    workspace = workspace_bytes(workspace_mb, size, hidden.dtype)
    shard = _Shard.of(size, sizes, group, hidden.device)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden, weight_shard, bias_shard, target, class_weight_shard, token_weight, shard, o, workspace
    )
    return loss


def _check(name: str, x: Tensor) -> None:
    check_floating(name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; allowed: (..., N) with N >= 1")


def _check_targets(name: str, x: Tensor, target: Tensor) -> None:
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"target: got dtype {target.dtype}; allowed: an int64 tensor of class indices")
    check_targets(name, x, target, 0)
