"""Lion over flat buffers in place: norm, clip, sign update, model-dtype copy and zeroed gradient.

With all parameters in one buffer, p the master weights, element by element:

    norm, clip: see fastlm/ops/optimizer_step.py, with whether the step counts, rounding and the edges they share
    g = clip * grad
    p = p - lr * weight_decay * p                               where decay_mask is true
    p = p - lr * sign(beta1 * m + (1 - beta1) * g)              sign(0) = 0
    m = beta2 * m + (1 - beta2) * g

Edge cases
 1  several elements, all options               5  no elements
 2  plain                                       6  bfloat16 throughout; bfloat16 moments alone
 3  the first step; a gradient of 0: no step    7  clipped tensor by tensor; the norm is given
 4  an infinite gradient: nothing changes       8  more than one block and one tile

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023), arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from . import optimizer_step as shared
from .optimizer_step import buffers, model_copy

__all__ = ["lion"]


def forward(
    master: Tensor, grad: Tensor, exp_avg: Tensor, step: Tensor, param: Tensor | None, decay_mask: Tensor | None,
    seed: Tensor | None, norm: Tensor | None, offsets: Tensor | None, lr: Tensor, beta1: float, beta2: float,
    weight_decay: float, max_norm: float, zero_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flat buffers (n), changed in place -> grad_norm and skipped, 0-dimensional."""
    begun = shared.begin(master, grad, step, norm, offsets, max_norm)
    g = begun.grad
    m, p = exp_avg.to(g.dtype), master.to(g.dtype)
    p = p - p * shared.decay_of(p, decay_mask, lr, weight_decay)
    p = p - (m * beta1 + g * (1.0 - beta1)).sign() * lr
    states = ((exp_avg, m * beta2 + g * (1.0 - beta2)),)
    return shared.commit(begun, master, p, states, step, param, seed, grad, zero_grad)


def outputs(master: Tensor, *args: Any) -> tuple[Spec, ...]:
    """grad_norm, skipped."""
    return (Spec((), shared.widened(master.dtype)),) * 2


def cost(
    master: Tensor, grad: Tensor, exp_avg: Tensor, step: Tensor, *, param: Tensor | None = None,
    decay_mask: Tensor | None = None, norm: Tensor | None = None, zero_grad: bool = False, **options: Any,
) -> Cost:  # fmt: skip
    """Reads grad twice (no update before the norm is known), reads and writes master and momentum."""
    return shared.cost(13.0, master, grad, (exp_avg,), step, zero_grad, norm, param, decay_mask)


def peer(
    master: Tensor, grad: Tensor, exp_avg: Tensor, step: Tensor, *, param: Tensor | None = None,
    decay_mask: Tensor | None = None, seed: Tensor | None = None, norm: Tensor | None = None,
    offsets: Tensor | None = None, lr: float | Tensor, betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0, max_norm: float = 0.0, zero_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today, in torch's operations: torch has no Lion."""

    def update(p: Tensor, g: Tensor, kept: list[Tensor], decay: float, skipped: Tensor) -> None:
        direction = kept[0].mul(betas[0]).add_(g, alpha=1.0 - betas[0]).sign_()
        p.mul_(1.0 - float(lr) * decay).add_(direction, alpha=-float(lr))
        kept[0].mul_(betas[1]).add_(g, alpha=1.0 - betas[1])

    return shared.torch_step(
        update, master, grad, (exp_avg,), step, param=param, decay_mask=decay_mask, seed=seed, norm=norm,
        offsets=offsets, weight_decay=weight_decay, max_norm=max_norm, zero_grad=zero_grad,
    )  # fmt: skip


_f32, _i64 = torch.float32, torch.int64
_name = "exp_avg"
_all = {"lr": 1e-2, "weight_decay": 0.1, "max_norm": 1.0, "betas": (0.9, 0.98)}
_narrow = shared.narrow(150, _name)
_still = {"grad": Values([1.0, 0.0, -2.0], _f32)}
samples = (
    Sample("1 all options", **buffers(1003, _name), **model_copy(1003), **_all, zero_grad=True),
    Sample("2 plain", **buffers(37, _name), lr=1e-3),
    Sample("3 first step", **buffers(3, _name, first=True) | _still, param=Normal((3,)), **_all),
    Sample("4 infinite", **buffers(3, _name) | {"grad": Values([1.0, -math.inf, 0.0], _f32)}, **model_copy(3), **_all),
    Sample("5 no elements", **buffers(0, _name), **_all),
    Sample("6 stochastic", **shared.narrow(1300, _name), **_all, zero_grad=True),
    Sample("6 narrow moment", **buffers(150, _name) | {_name: _narrow[_name], "seed": _narrow["seed"]}, **_all),
    Sample("7 by tensor", **buffers(2100, _name), offsets=Values([0, 7, 7, 1500, 2100], _i64), **_all),
    Sample("7 norm given", **buffers(40, _name), norm=Values(4.0, _f32), **_all),
    Sample("8 large", **buffers(70_001, _name), **model_copy(70_001), **_all),
)

errors = (
    *shared.bad_calls(_name),
    Bad("one beta", ValueError, r"betas: .*two", **buffers(4, _name), lr=0.1, betas=(0.9,)),
    Bad("beta 1", ValueError, r"betas: .*1\.0.*\[0, 1\)", **buffers(4, _name), lr=0.1, betas=(0.9, 1.0)),
)


def random(pick: Pick) -> Sample:
    """Any size, options, dtypes; now and then a gradient that is not finite."""
    n = pick.integer(0, 600)
    given = buffers(n, _name, first=pick.one_of(True, False), scale=pick.one_of(1.0, 1e-3, 100.0, math.inf))
    if pick.one_of(False, True):
        given = shared.narrow(n, _name)
    else:
        given["param"] = pick.one_of(None, Normal((n,)))
    return Sample(
        "random", **given, lr=pick.one_of(1e-3, 0.1), betas=pick.one_of((0.9, 0.99), (0.95, 0.98), (0.0, 0.0)),
        decay_mask=pick.one_of(None, Integers((pick.one_of(n, -(-n // 64)),), 0, 2, pick.one_of(torch.bool, torch.uint8))),
        offsets=pick.one_of(None, Values([0, pick.integer(0, n), n], _i64)),
        weight_decay=pick.one_of(0.0, 0.1), max_norm=pick.one_of(0.0, 1.0), zero_grad=pick.one_of(False, True),
    )  # fmt: skip


def case(parameters: int = 25_000_000) -> Sample:
    """All options on a model of so many parameters."""
    return Sample("case", **buffers(parameters, _name), **model_copy(parameters), **_all)


shapes = {
    "default": ({"parameters": 12_300_000}, {"parameters": 50_000_000}),
    "sweep": tuple({"parameters": n} for n in (100_000, 1_000_000, 10_000_000)),
    "large": ({"parameters": 124_000_000}, {"parameters": 1_000_000_000}),
}


op = register(
    Op(
        name="lion",
        schema=f"({shared.SCHEMA_HEAD}, Tensor(c!) exp_avg, {shared.SCHEMA_SHARED}, float beta1, float beta2, "
        "float weight_decay, float max_norm, bool zero_grad) -> (Tensor grad_norm, Tensor skipped)",
        forward=forward,
        outputs=outputs,
        cost=cost,
        peer=peer,
        samples=samples,
        errors=errors,
        random=random,
        case=case,
        shapes=shapes,
        results=2,
        mutates=("master", "grad", "exp_avg", "step", "param"),
    )
)


@torch.no_grad()
def lion(
    master: Tensor, grad: Tensor, exp_avg: Tensor, step: Tensor, *, param: Tensor | None = None,
    decay_mask: Tensor | None = None, seed: Tensor | None = None, norm: Tensor | None = None,
    offsets: Tensor | None = None, lr: float | Tensor, betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0, max_norm: float = 0.0, zero_grad: bool = False, tape: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One Lion update in place, with the global norm of the gradient, clipping and the model-dtype copy.

    Args:
        master, grad, step, param, decay_mask, seed, norm, offsets, lr, max_norm, zero_grad, tape: as in `adamw`.
        exp_avg: (n,) like master, float32 or bfloat16, the moment; zeros before the first step; updated.
        betas: of the direction and of the moment, each in [0, 1).
        weight_decay: decoupled, times lr; >= 0.

    Returns:
        grad_norm, skipped: as `adamw` does.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Chen et al. (2023), arXiv:2302.06675, algorithm 2.
    """
    rate = shared.check(
        master, grad, {_name: exp_avg}, step, param=param, decay_mask=decay_mask, seed=seed, norm=norm,
        offsets=offsets, lr=lr, weight_decay=weight_decay, max_norm=max_norm,
    )  # fmt: skip
    beta1, beta2 = shared.check_betas(betas)
    grad_norm, skipped = op(
        master, grad, exp_avg, step, param, decay_mask, seed, norm, offsets, rate, beta1, beta2, float(weight_decay),
        float(max_norm), bool(zero_grad), tape=tape,
    )  # fmt: skip
    return grad_norm, skipped
