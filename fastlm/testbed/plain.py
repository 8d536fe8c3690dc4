"""The ops as models write them in plain PyTorch: the quickest way to write each, with the op's signature.

Not the oracles that results are held against (Op.peer): those follow the contract into every corner, at a price that no
user pays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

__all__ = [
    "adamw", "adamw_formula", "add_layer_norm", "add_rms_norm", "attention", "cross_entropy", "dropout", "gelu", "layer_norm",
    "linear_cross_entropy", "rms_norm",
]  # fmt: skip


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "gemma"
) -> Tensor:
    scale = weight + offset if weight is not None and offset else weight
    if casting == "gemma" or scale is None:
        return F.rms_norm(x, x.shape[-1:], scale, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * scale


def _sum(x: Tensor, residual: Tensor, x_bias: Tensor | None, dropout_p: float) -> Tensor:
    branch = x if x_bias is None else x + x_bias
    return (F.dropout(branch, dropout_p) if dropout_p else branch) + residual


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = _sum(x, residual, x_bias, dropout_p)
    return F.layer_norm(total, x.shape[-1:], weight, bias, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0,
    casting: str = "gemma", x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = _sum(x, residual, x_bias, dropout_p)
    return rms_norm(total, weight, eps, offset=offset, casting=casting), total


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    return F.dropout(x, p)


def cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss = F.cross_entropy(logits.reshape(target.numel(), -1), target.reshape(-1), **options)
    return loss.reshape(target.shape) if options.get("reduction") == "none" else loss


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    class_weight: Tensor | None = None, workspace_mb: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    return cross_entropy(F.linear(hidden, weight, bias), target, weight=class_weight, **options)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **nothing: Any
) -> Tensor:
    """Written out, with no more masks than the call needs."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        above = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu(s.shape[-1] - s.shape[-2] + 1)
        s = s.masked_fill(above, -torch.inf)
    return s.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _clipped(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """(norm, gradient): the arithmetic of clip_grad_norm_."""
    norm = torch.linalg.vector_norm(grad)
    clipping = 0.0 < max_norm < math.inf
    return norm, grad * (max_norm / (norm + 1e-6)).clamp(max=1.0) if clipping else grad


def adamw(decayed: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Clip, the fused optimizer over the two groups, then the model's copy; `decayed` elements come first."""

    def step(
        master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
        param: Tensor | None = None, decay_mask: Tensor | None = None, lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        max_norm: float = 0.0, zero_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        norm, g = _clipped(grad, max_norm)
        skipped = (~norm.isfinite()).float()
        for part, decay in ((slice(decayed), weight_decay), (slice(decayed, None), 0.0)):
            count = step.float() + 0.0  # each group counts for itself
            if master[part].numel():
                torch_adamw(
                    [master[part]], [g[part]], [exp_avg[part]], [exp_avg_sq[part]], [], [count], fused=True,
                    found_inf=skipped, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps,
                    amsgrad=False, maximize=False,
                )  # fmt: skip
        step += 1.0 - skipped
        if param is not None:
            param.copy_(master)
        if zero_grad:
            grad.zero_()
        return norm, skipped

    return step


def adamw_formula(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    param: Tensor | None = None, decay_mask: Tensor | None = None, lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    max_norm: float = 0.0, zero_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The update element by element, for a compiler to fuse."""
    norm, g = _clipped(grad, max_norm)
    t = step + 1
    decay = weight_decay if decay_mask is None else (decay_mask != 0) * weight_decay
    exp_avg.lerp_(g, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
    root = exp_avg_sq.sqrt() / (1.0 - betas[1] ** t).sqrt() + eps
    master.copy_(master * (1.0 - lr * decay) - lr / (1.0 - betas[0] ** t) * exp_avg / root)
    step.copy_(t)
    if param is not None:
        param.copy_(master)
    if zero_grad:
        grad.zero_()
    return norm, torch.zeros_like(norm)
