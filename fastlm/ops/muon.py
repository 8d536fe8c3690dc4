"""Muon: momentum made orthogonal, over flat buffers that hold matrices.

For each matrix G of gradients (clipped), p its master weights, mu the momentum:

    b = mu * b + (1 - mu) * G
    X = (1 - mu) * G + mu * b with Nesterov, else b            in bfloat16 from here on
    X = X / max(|X|, eps), transposed if it has more rows than columns
    ns_steps times: A = X X^T,  X = a X + (b A + c A A) X       Newton-Schulz: the singular values come close to 1
    p = p - lr * weight_decay * p - lr * ratio * X
    ratio = sqrt(max(1, rows / columns)) ("original"), 0.2 sqrt(max(rows, columns)) ("match_rms_adamw")

Both elementwise parts are steps of `sgd`: the momentum is one from weights of 0, with dampening = mu and a rate of 1,
whose result is -X; the update is one without momentum, whose decay is weight_decay / ratio. So clipping, skipping,
rounding, the model-dtype copy and zero_grad are those of `sgd`. The products are PyTorch's.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), whose coefficients these are;
Liu et al., "Muon is scalable for LLM training" (2025), arXiv:2502.16982, for the second ratio; torch.optim.Muon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .sgd import sgd

__all__ = ["muon", "newton_schulz"]

_RATIOS = (None, "original", "match_rms_adamw")


@torch.no_grad()
def newton_schulz(
    x: Tensor, coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315), steps: int = 5, eps: float = 1e-7
) -> Tensor:  # fmt: skip
    """x (rows, columns) with singular values moved towards 1 (to about 0.7 to 1.2), in bfloat16, as Muon takes them.

    Raises:
        ValueError: x is no matrix.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}; allowed: (rows, columns)")
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    y = x.bfloat16().T if tall else x.bfloat16()
    y = y / y.norm().clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


@torch.no_grad()
def muon(
    master: Tensor, grad: Tensor, momentum_buffer: Tensor, step: Tensor, *, shapes: Sequence[tuple[int, int]],
    starts: Sequence[int] | None = None, param: Tensor | None = None, seed: Tensor | None = None,
    norm: Tensor | None = None, offsets: Tensor | None = None, lr: float | Tensor, momentum: float = 0.95,
    nesterov: bool = True, weight_decay: float = 0.1, eps: float = 1e-7,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315), ns_steps: int = 5,
    adjust_lr_fn: str | None = None, max_norm: float = 0.0, zero_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One Muon update in place of matrices in flat buffers; the host never waits.

    Args:
        master, grad, momentum_buffer, step, param, seed, norm, offsets, lr, max_norm, zero_grad: as in `sgd`, of n
            elements; the rounding of a bfloat16 momentum and of bfloat16 weights takes seed and seed + 1.
        shapes: (rows, columns) of each matrix.
        starts: where each begins; None: one after the other from 0. Elements of no matrix keep their weights.
        momentum: mu, in (0, 1).
        nesterov: look ahead.
        weight_decay: decoupled, times lr; >= 0.
        eps, ns_coefficients, ns_steps: of `newton_schulz`.
        adjust_lr_fn: the ratio: None or "original", or "match_rms_adamw", with which AdamW's rates serve.

    Returns:
        grad_norm, skipped: as `adamw` does.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Jordan et al. (2024); torch.optim.Muon.
    """
    if adjust_lr_fn not in _RATIOS:
        raise ValueError(f"adjust_lr_fn: got {adjust_lr_fn!r}; allowed: {', '.join(map(repr, _RATIOS))}")
    if not 0.0 < momentum < 1.0:
        raise ValueError(f"momentum: got {momentum}; allowed: 0 < momentum < 1")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay: got {weight_decay}; allowed: >= 0")
    places = _places(master, shapes, starts)
    # A count of at least 1: the buffer has no first step of its own.
    count = step.detach() + 1
    direction = torch.zeros_like(master, dtype=torch.float64 if master.dtype == torch.float64 else torch.bfloat16)
    grad_norm, skipped = sgd(
        direction, grad, momentum_buffer, count, seed=seed if momentum_buffer.dtype == torch.bfloat16 else None,
        norm=norm, offsets=offsets, lr=1.0, momentum=momentum, dampening=momentum, nesterov=nesterov,
        max_norm=max_norm, zero_grad=zero_grad,
    )  # fmt: skip
    decided = torch.where(skipped > 0, math.inf, 0.0).to(grad_norm.dtype)
    for (start, end), (rows, columns) in zip(places, shapes, strict=True):
        if start == end:
            continue
        update = newton_schulz(direction[start:end].view(rows, columns).neg(), ns_coefficients, ns_steps, eps)
        ratio = 0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
        sgd(
            master[start:end], update.contiguous().view(-1).to(direction.dtype), None, step.detach().clone(),
            param=None if param is None else param[start:end], seed=None if seed is None else seed + 1, norm=decided,
            lr=lr * ratio, weight_decay=weight_decay / ratio,
        )  # fmt: skip
    step.copy_(count - 1)
    return grad_norm, skipped


def _places(
    master: Tensor, shapes: Sequence[tuple[int, int]], starts: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Where each matrix begins and ends."""
    sizes = [rows * columns for rows, columns in shapes]
    begins = [sum(sizes[:i]) for i in range(len(sizes))] if starts is None else list(starts)
    if len(begins) != len(sizes):
        raise ValueError(f"starts: got {len(begins)}; allowed: one for each of {len(sizes)} shapes")
    places = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
    if any(begin < 0 or end > master.numel() for begin, end in places):
        raise ValueError(f"shapes: got {list(shapes)} at {begins}; allowed: within the {master.numel()} elements of master")
    return places
