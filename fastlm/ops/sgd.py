"""SGD with momentum over flat buffers in place: norm, clip, update, model-dtype copy and zeroed gradient.

With all parameters in one buffer, p the master weights, element by element:

    norm, clip: see fastlm/ops/optimizer_step.py, with whether the step counts, rounding and the edges they share
    g = clip * grad
    g = g + weight_decay * p                                    where decay_mask is true: not decoupled, as in torch
    b = g at the first step (step = 0), else momentum * b + (1 - dampening) * g
    g = b, or with Nesterov (1 - dampening) * g + momentum * b  without momentum there is no b
    p = p - lr * g

Edge cases
 1  momentum, dampening and all options        6  zero momentum: no buffer, float32 and bfloat16
 2  plain: no momentum                         7  no elements
 3  Nesterov, also with dampening              8  bfloat16 throughout, rounded stochastically
 4  the first step: no dampening yet           9  clipped tensor by tensor; the norm is given
 5  an infinite gradient: nothing changes     10  more than one block and one tile

Source: Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning" (ICML
2013), in the form of torch.optim.SGD, whose first step and Nesterov formula these are; torch's has no dampening, and
with dampening = momentum it is the average that Muon takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from . import optimizer_step as shared
from .optimizer_step import buffers, model_copy

__all__ = ["sgd"]


def forward(
    master: Tensor, grad: Tensor, momentum_buffer: Tensor | None, step: Tensor, param: Tensor | None,
    decay_mask: Tensor | None, seed: Tensor | None, norm: Tensor | None, offsets: Tensor | None, lr: Tensor,
    momentum: float, dampening: float, nesterov: bool, weight_decay: float, max_norm: float, zero_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flat buffers (n), changed in place -> grad_norm and skipped, 0-dimensional."""
    begun = shared.begin(master, grad, step, norm, offsets, max_norm)
    p = master.to(begun.grad.dtype)
    g = begun.grad + p * shared.decay_of(p, decay_mask, None, weight_decay)
    b = g
    if momentum_buffer is not None:
        fresh = 1.0 - dampening * (begun.t != 1.0).double()
        b = momentum_buffer.to(g.dtype) * momentum + g * fresh
        g = g * fresh + b * momentum if nesterov else b
    states = ((momentum_buffer, b),)
    return shared.commit(begun, master, p - g * lr, states, step, param, seed, grad, zero_grad)


def outputs(master: Tensor, *args: Any) -> tuple[Spec, ...]:
    """grad_norm, skipped."""
    return (Spec((), shared.widened(master.dtype)),) * 2


def cost(
    master: Tensor, grad: Tensor, momentum_buffer: Tensor | None, step: Tensor, *, param: Tensor | None = None,
    decay_mask: Tensor | None = None, norm: Tensor | None = None, zero_grad: bool = False, **options: Any,
) -> Cost:  # fmt: skip
    """Reads grad twice (no update before the norm is known), reads and writes master and momentum."""
    return shared.cost(10.0, master, grad, (momentum_buffer,), step, zero_grad, norm, param, decay_mask)


def peer(
    master: Tensor, grad: Tensor, momentum_buffer: Tensor | None, step: Tensor, *, param: Tensor | None = None,
    decay_mask: Tensor | None = None, seed: Tensor | None = None, norm: Tensor | None = None,
    offsets: Tensor | None = None, lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0,
    nesterov: bool = False, weight_decay: float = 0.0, max_norm: float = 0.0, zero_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today: the usual clip, fused SGD, a copy; a mask makes two groups."""

    def update(p: Tensor, g: Tensor, kept: list[Tensor], decay: float, skipped: Tensor) -> None:
        if nesterov and dampening:  # which torch refuses
            fresh = 1.0 if step == 0 else 1.0 - dampening
            g = g.add(p, alpha=decay) * fresh
            p.sub_(g.add(kept[0].mul_(momentum).add_(g), alpha=momentum), alpha=float(lr))
            return
        momenta: list[Tensor | None] = [kept[0] if kept and step > 0 else None]
        torch_sgd(
            [p], [g], momenta, fused=True, weight_decay=decay, momentum=momentum, lr=float(lr), dampening=dampening,
            nesterov=nesterov, maximize=False,
        )  # fmt: skip
        if kept and momenta[0] is not None:
            kept[0].copy_(momenta[0])

    states = [] if momentum_buffer is None else [momentum_buffer]
    return shared.torch_step(
        update, master, grad, states, step, param=param, decay_mask=decay_mask, seed=seed, norm=norm, offsets=offsets,
        weight_decay=weight_decay, max_norm=max_norm, zero_grad=zero_grad,
    )  # fmt: skip


_f32, _i64 = torch.float32, torch.int64
_name = "momentum_buffer"
_all = {"lr": 1e-2, "weight_decay": 0.1, "max_norm": 1.0, "momentum": 0.9}
_none = {_name: None}
samples = (
    Sample("1 all options", **buffers(1003, _name), **model_copy(1003), **_all, dampening=0.3, zero_grad=True),
    Sample("2 plain", **buffers(37) | _none, lr=1e-3),
    Sample("3 Nesterov", **buffers(130, _name), param=Normal((130,)), **_all, nesterov=True),
    Sample("3 Nesterov with dampening", **buffers(130, _name), **_all, nesterov=True, dampening=0.9),
    Sample("4 first step", **buffers(65, _name, first=True), **_all, dampening=0.3),
    Sample("5 infinite", **buffers(3, _name) | {"grad": Values([1.0, -math.inf, 0.0], _f32)}, **model_copy(3), **_all),
    Sample("6 no momentum", **shared.narrow(65) | _none, lr=0.1, weight_decay=0.1),
    Sample("7 no elements", **buffers(0, _name), **_all),
    Sample("8 stochastic", **shared.narrow(1300, _name), **_all, zero_grad=True),
    Sample("9 by tensor", **buffers(2100, _name), offsets=Values([0, 7, 7, 1500, 2100], _i64), **_all),
    Sample("9 norm given", **buffers(40, _name), norm=Values(4.0, _f32), **_all),
    Sample("10 large", **buffers(70_001, _name), **model_copy(70_001), **_all),
)


def _bad(edge: str, error: type[Exception], text: str, **changed: Any) -> Bad:
    """A call that is right but for what is changed."""
    return Bad(edge, error, text, **buffers(4, _name) | {"lr": 0.1, "momentum": 0.9} | changed)


errors = (
    *(Bad(b.edge, b.error, b.text, **b.args | {"momentum": 0.9}) for b in shared.bad_calls(_name)),
    _bad("buffer missing", ValueError, r"momentum_buffer: .*None.*momentum", momentum_buffer=None),
    _bad("buffer unused", ValueError, r"momentum_buffer: .*momentum", momentum=0.0),
    _bad("momentum negative", ValueError, r"momentum: .*-1", momentum=-1.0),
    _bad("Nesterov without momentum", ValueError, r"nesterov: ", momentum_buffer=None, momentum=0.0, nesterov=True),
)


def random(pick: Pick) -> Sample:
    """Any size, options, dtypes; now and then a gradient that is not finite."""
    n = pick.integer(0, 600)
    momentum = pick.one_of(0.0, 0.9)
    kept = (_name,) if momentum else ()
    given = buffers(n, *kept, first=pick.one_of(True, False), scale=pick.one_of(1.0, 1e-3, 100.0, math.inf))
    if pick.one_of(False, True):
        given = shared.narrow(n, *kept)
    else:
        given["param"] = pick.one_of(None, Normal((n,)))
    return Sample(
        "random", **_none | given, lr=pick.one_of(1e-3, 0.1), momentum=momentum,
        decay_mask=pick.one_of(None, Integers((pick.one_of(n, -(-n // 64)),), 0, 2, pick.one_of(torch.bool, torch.uint8))),
        offsets=pick.one_of(None, Values([0, pick.integer(0, n), n], _i64)),
        dampening=pick.one_of(0.0, 0.5), nesterov=momentum > 0.0 and pick.one_of(False, True),
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
        name="sgd",
        schema=f"({shared.SCHEMA_HEAD}, Tensor(c!)? momentum_buffer, {shared.SCHEMA_SHARED}, float momentum, "
        "float dampening, bool nesterov, float weight_decay, float max_norm, bool zero_grad) "
        "-> (Tensor grad_norm, Tensor skipped)",
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
        mutates=("master", "grad", "momentum_buffer", "step", "param"),
    )
)


@torch.no_grad()
def sgd(
    master: Tensor, grad: Tensor, momentum_buffer: Tensor | None, step: Tensor, *, param: Tensor | None = None,
    decay_mask: Tensor | None = None, seed: Tensor | None = None, norm: Tensor | None = None,
    offsets: Tensor | None = None, lr: float | Tensor, momentum: float = 0.0, dampening: float = 0.0,
    nesterov: bool = False, weight_decay: float = 0.0, max_norm: float = 0.0, zero_grad: bool = False, tape: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One SGD update in place, with the global norm of the gradient, clipping and the model-dtype copy.

    Args:
        master, grad, step, param, decay_mask, seed, norm, offsets, lr, max_norm, zero_grad, tape: as in `adamw`.
        momentum_buffer: (n,) like master, float32 or bfloat16; zeros before the first step; updated. None if and only
            if momentum is 0.
        momentum: of the buffer; >= 0.
        dampening: of the gradient in the buffer after the first step; >= 0.
        nesterov: look ahead; needs momentum.
        weight_decay: added to the gradient, times the weight, after clipping (not decoupled); >= 0.

    Returns:
        grad_norm, skipped: as `adamw` does.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: torch.optim.SGD; Sutskever et al. (ICML 2013).
    """
    states: dict[str, Tensor | None] = {} if momentum_buffer is None else {_name: momentum_buffer}
    rate = shared.check(
        master, grad, states, step, param=param, decay_mask=decay_mask, seed=seed, norm=norm, offsets=offsets, lr=lr,
        momentum=momentum, dampening=dampening, weight_decay=weight_decay, max_norm=max_norm,
    )  # fmt: skip
    if nesterov and momentum == 0.0:
        raise ValueError("nesterov: got True with momentum 0.0; allowed: False, or a momentum above 0")
    if (momentum_buffer is None) != (momentum == 0.0):
        given = "None" if momentum_buffer is None else "a tensor"
        raise ValueError(f"{_name}: got {given} with momentum {momentum}; allowed: None if and only if momentum is 0")
    grad_norm, skipped = op(
        master, grad, momentum_buffer, step, param, decay_mask, seed, norm, offsets, rate, float(momentum),
        float(dampening), bool(nesterov), float(weight_decay), float(max_norm), bool(zero_grad), tape=tape,
    )  # fmt: skip
    return grad_norm, skipped
