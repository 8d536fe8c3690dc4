"""AdamW over flat buffers in place: global norm, clip, update, model-dtype copy and zeroed gradient.

With all parameters in one buffer, p the master weights and t = step + 1, element by element:

    norm, clip: see fastlm/ops/optimizer_step.py, with whether the step counts
    g = clip * grad
    m = beta1 * m + (1 - beta1) * g    v = beta2 * v + (1 - beta2) * g**2
    p = p - lr * weight_decay * p      where decay_mask is true
    p = p - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
    param = p rounded to its dtype     step = t     grad = 0 if zero_grad, else as it was (not clipped)

If the norm is not finite (a NaN or an infinity anywhere in grad), master, moments, step and param keep every
bit, skipped is 1, and only zero_grad is still done. All is decided on the device: the host never waits.

The moments may be bfloat16, and so may the master, which is then the parameter itself (no float32 copy, no param):
with a seed both are rounded stochastically, without one to nearest, where a small step is lost altogether.
With `trail` a bfloat16 master loses nothing: both together are a float32, in 4 bytes where a master beside its copy takes
6. Its upper half is the master rounded to nearest (halves away from zero, where a cast takes the even neighbour), and the
lower half, as a number with a sign, is what the float32's bits have beyond it: bits = (master's bits << 16) + trail.
The bias corrections are float64: in float32 1 - 0.999 loses 4 of its 7 digits.

Edge cases
 1  several elements, no power of two, all options     9  more than one block and one tile
 2  plain: no copy, no mask, no decay, no clipping    10  a step counted in int64
 3  the first step, from zero moments                 11  betas of 0: no memory of earlier steps
 4  norm above and below max_norm                     12  lr on the device; a decay mask in uint8
 5  an infinite gradient: nothing changes             13  bfloat16 moments, rounded stochastically and to nearest
 6  gradient zeroed                                   14  no float32 masters: everything in bfloat16
 7  no elements: norm 0, the step counts              15  the norm is given: finite, infinite
 8  one element                                       16  clipped tensor by tensor, some of them empty
                                                      17  a decay mask with a flag for each 64 elements
                                                      18  masters in two halves, with moments of either dtype

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (2019), arXiv:1711.05101, algorithm 2;
Kingma, Ba, "Adam" (2015), arXiv:1412.6980, algorithm 1; the clip is that of torch.nn.utils.clip_grad_norm_;
stochastic rounding of weights: Zamirai et al., "Revisiting BFloat16 Training" (2020), arXiv:2010.06192, section 3;
masters in halves (there the upper is truncated): Kalamkar et al., "Optimizing Deep Learning Recommender Systems' Training
on CPU Cluster Architectures" (2020), arXiv:2005.04680, section VII (Split-SGD-BF16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from . import optimizer_step as shared
from .optimizer_step import buffers, model_copy

__all__ = ["adamw"]


def forward(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, param: Tensor | None,
    decay_mask: Tensor | None, seed: Tensor | None, norm: Tensor | None, offsets: Tensor | None, lr: Tensor,
    trail: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float, max_norm: float, zero_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Flat buffers (n), changed in place -> grad_norm and skipped, 0-dimensional."""
    begun = shared.begin(master, grad, step, norm, offsets, max_norm)
    g, t = begun.grad, begun.t
    m = exp_avg.to(g.dtype).lerp(g, 1.0 - beta1)
    v = (exp_avg_sq.to(g.dtype) * beta2).addcmul(g, g, value=1.0 - beta2)
    p = shared.joined(master, trail).to(g.dtype)
    p = p - p * shared.decay_of(p, decay_mask, lr, weight_decay)
    p = p - m * (lr.double() / (1.0 - beta1**t)) / (v.sqrt() / (1.0 - beta2**t).sqrt() + eps)
    return shared.commit(
        begun, master, p, ((exp_avg, m), (exp_avg_sq, v)), step, param, seed, grad, zero_grad, trail
    )


def outputs(master: Tensor, *args: Any) -> tuple[Spec, ...]:
    """grad_norm, skipped."""
    return (Spec((), shared.widened(master.dtype)),) * 2


def cost(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    param: Tensor | None = None, decay_mask: Tensor | None = None, norm: Tensor | None = None,
    trail: Tensor | None = None, zero_grad: bool = False, **options: Any,
) -> Cost:  # fmt: skip
    """Reads grad twice (no update before the norm is known), reads and writes master and moments."""
    return shared.cost(18.0, master, grad, (exp_avg, exp_avg_sq, trail), step, zero_grad, norm, param, decay_mask)


def peer(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    param: Tensor | None = None, decay_mask: Tensor | None = None, seed: Tensor | None = None,
    norm: Tensor | None = None, offsets: Tensor | None = None, lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    max_norm: float = 0.0, zero_grad: bool = False, trail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today: the usual clip, fused AdamW, a copy; a mask makes two groups."""

    def update(p: Tensor, g: Tensor, moments: list[Tensor], decay: float, skipped: Tensor) -> None:
        torch_adamw(
            [p], [g], [moments[0]], [moments[1]], [], [step.to(torch.float32, copy=True)], fused=True,
            found_inf=skipped.float(), lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    return shared.torch_step(
        update, master, grad, (exp_avg, exp_avg_sq), step, param=param, decay_mask=decay_mask, seed=seed, norm=norm,
        offsets=offsets, weight_decay=weight_decay, max_norm=max_norm, zero_grad=zero_grad, trail=trail,
    )  # fmt: skip


def changed(args: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Halves of a master as the float32 that they are: an error of its last bit may be any number in the lower half."""
    own = {name: args.get(name) for name in op.mutates if name != "trail"}
    return own | {"master": shared.joined(args["master"], args.get("trail"))}


_f32, _bf16, _i64 = torch.float32, torch.bfloat16, torch.int64
_names = ("exp_avg", "exp_avg_sq")
_all = {"lr": 1e-2, "weight_decay": 0.1, "max_norm": 1.0, "betas": (0.9, 0.95)}
_narrow_moments = {k: v for k, v in shared.narrow(150, *_names).items() if k in (*_names, "seed")}
_infinite = {"grad": Values([1.0, -math.inf, 0.0], _f32)}
samples = (
    Sample("1 all options", **buffers(1003, *_names), **model_copy(1003), **_all, zero_grad=True),
    Sample("2 plain", **buffers(37, *_names), lr=1e-3),
    Sample("3 first step", **buffers(130, *_names, first=True), param=Normal((130,)), lr=1e-3, weight_decay=0.01),
    Sample("4 norm above", **buffers(65, *_names, scale=100.0), lr=0.1, max_norm=0.5),
    Sample("4 norm below", **buffers(65, *_names, scale=1e-3), lr=0.1, max_norm=0.5),
    Sample("5 infinite", **buffers(3, *_names) | _infinite, **model_copy(3), **_all),
    Sample("6 zeroed", **buffers(64, *_names), lr=0.1, zero_grad=True),
    Sample("7 no elements", **buffers(0, *_names), **model_copy(0), **_all),
    Sample("8 one element", **buffers(1, *_names), **model_copy(1), **_all),
    Sample("9 large", **buffers(70_001, *_names), **model_copy(70_001), **_all),
    Sample("10 int64 step", **buffers(20, *_names) | {"step": Values(3, _i64)}, lr=0.1),
    Sample("11 betas of 0", **buffers(20, *_names), lr=0.1, betas=(0.0, 0.0)),
    Sample("12 lr tensor", **buffers(40, *_names), **model_copy(40, torch.uint8), **_all | {"lr": Values(0.01, _f32)}),
    Sample("13 stochastic moments", **buffers(150, *_names) | _narrow_moments, **model_copy(150), **_all),
    Sample("13 nearest moments", **buffers(150, *_names) | _narrow_moments | {"seed": None}, **_all),
    Sample("14 no masters", **shared.narrow(1300, *_names), **_all, zero_grad=True),
    Sample("15 norm given", **buffers(40, *_names), norm=Values(4.0, _f32), **_all),
    Sample("15 infinite norm given", **buffers(40, *_names), norm=Values(math.inf, _f32), **_all, zero_grad=True),
    Sample("16 by tensor", **buffers(2100, *_names), offsets=Values([0, 7, 7, 1500, 2100], _i64), **_all),
    Sample("17 short mask", **buffers(1350, *_names), decay_mask=Integers((22,), 0, 2, torch.bool),
           offsets=Values([0, 70, 1350], _i64), **_all),
    Sample("18 halves", **buffers(1003, *_names) | shared.halves(1003), **_all),
    Sample("18 halves, infinite", **buffers(3, *_names) | shared.halves(3) | _infinite, **_all),
    Sample("18 halves, stochastic moments", **buffers(150, *_names) | _narrow_moments | shared.halves(150), **_all,
           decay_mask=Integers((3,), 0, 2, torch.bool)),
)  # fmt: skip


def _bad(edge: str, error: type[Exception], text: str, **changed: Any) -> Bad:
    """A call that is right but for what is changed."""
    return Bad(edge, error, text, **buffers(4, *_names) | {"lr": 0.1} | changed)


errors = (
    *shared.bad_calls(*_names),
    _bad("exp_avg_sq None", TypeError, r"exp_avg_sq: .*NoneType", exp_avg_sq=None),
    _bad("beta 1", ValueError, r"betas: .*1\.0.*\[0, 1\)", betas=(0.9, 1.0)),
    _bad("three betas", ValueError, r"betas: .*two", betas=(0.9, 0.99, 0.999)),
    _bad("eps negative", ValueError, r"eps: .*-1", eps=-1.0),
    _bad("trail of float32", ValueError, r"trail: .*None.*float32", trail=Integers((4,), 0, 9, torch.int16)),
    _bad("trail dtype", TypeError, r"trail: .*int64.*int16", master=Normal((4,), dtype=_bf16), trail=Integers((4,), 0, 9)),
    _bad("trail shape", ValueError, r"trail: .*\(5,\).*\(4,\)", **shared.halves(4) | {"trail": shared.halves(5)["trail"]}),
)


def random(pick: Pick) -> Sample:
    """Any size, options, dtypes; now and then a gradient that is not finite."""
    n = pick.integer(0, 600)
    scale = pick.one_of(1.0, 1e-3, 100.0, math.inf)  # inf * N(0, 1) is not finite
    given = buffers(n, *_names, first=pick.one_of(True, False), scale=scale)
    narrow = shared.narrow(n, *_names)
    match pick.one_of("wide", "narrow moments", "narrow", "halves"):
        case "narrow moments":
            given |= {name: narrow[name] for name in (*_names, "seed")}
        case "narrow":
            given = narrow
        case "halves":
            given |= shared.halves(n)
    if given["master"].dtype == _f32:
        given["param"] = pick.one_of(None, Normal((n,)))
    cut = pick.integer(0, n)
    return Sample(
        "random", **given, lr=pick.one_of(1e-3, 0.1),
        decay_mask=pick.one_of(None, Integers((pick.one_of(n, -(-n // 64)),), 0, 2, pick.one_of(torch.bool, torch.uint8))),
        offsets=pick.one_of(None, Values([0, cut, n], _i64)),
        betas=pick.one_of((0.9, 0.999), (0.0, 0.0), (0.9, 0.95)), eps=pick.one_of(1e-8, 1e-3),
        weight_decay=pick.one_of(0.0, 0.1), max_norm=pick.one_of(0.0, 1.0), zero_grad=pick.one_of(False, True),
    )  # fmt: skip


def case(parameters: int = 25_000_000) -> Sample:
    """All options on a model of so many parameters."""
    return Sample("case", **buffers(parameters, *_names), **model_copy(parameters), **_all)


shapes = {
    "default": ({"parameters": 12_300_000}, {"parameters": 50_000_000}),
    "sweep": tuple({"parameters": n} for n in (100_000, 1_000_000, 10_000_000)),
    "large": ({"parameters": 124_000_000}, {"parameters": 1_000_000_000}),
}


op = register(
    Op(
        name="adamw",
        schema=f"({shared.SCHEMA_HEAD}, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, {shared.SCHEMA_SHARED}, "
        "Tensor(g!)? trail, float beta1, float beta2, float eps, float weight_decay, float max_norm, bool zero_grad) "
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
        mutates=("master", "grad", "exp_avg", "exp_avg_sq", "step", "param", "trail"),
        changed=changed,
    )
)


@torch.no_grad()
def adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    param: Tensor | None = None, decay_mask: Tensor | None = None, seed: Tensor | None = None,
    norm: Tensor | None = None, offsets: Tensor | None = None, lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    max_norm: float = 0.0, zero_grad: bool = False, trail: Tensor | None = None, tape: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One AdamW update in place, with the global norm of the gradient, clipping and the model-dtype copy.

    Args:
        master: (n,) weights; updated. float32 (float64 in the reference) beside a narrower param, or the parameter
            itself in float32, bfloat16 or float16, of which the last two lose steps smaller than their rounding
            unless they are bfloat16 with a seed or with `trail`.
        grad: (n,) like master, float32, bfloat16 or float16; zeroed if zero_grad, else left as it is.
        exp_avg, exp_avg_sq: (n,) like master, float32 or bfloat16, the moments; zeros before the first step; updated.
        step: 0-dimensional, float32 or int64 (or master's dtype): updates applied so far; incremented.
        param: (n,) float32, bfloat16 or float16, gets the new master; None if master is the parameter.
        decay_mask: (n,) bool or uint8, weight decay only where it is not 0; or (ceil(n / 64),), a flag for each 64
            elements; None: everywhere.
        seed: int64, one element: round bfloat16 master and moments stochastically, by seed and step alone.
        norm: 0-dimensional, float32 (float64 with such masters): the gradient's norm if it is known, for instance
            that of several buffers together; saves a pass over grad. Infinite or NaN: the step is skipped.
        offsets: (segments + 1,) int64 from 0 to n, ascending: max_norm holds for each segment's own norm.
        lr: a float, or a 0-dimensional tensor like norm, which a CUDA graph reads at each replay.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment; >= 0.
        weight_decay: decoupled, times lr; >= 0.
        max_norm: the gradient is scaled to at most this norm; 0 or inf: no clipping.
        zero_grad: write zeros to grad in the same pass.
        trail: (n,) int16 beside a bfloat16 master: the lower halves of the float32 weights whose upper halves, rounded to
            nearest, the masters are (`fastlm.ops.optimizer_step.split` and `joined`); updated.
        tape: the engine's.

    Returns:
        grad_norm: 0-dimensional float32 (float64 with such masters), before clipping, right up to the largest float32.
        skipped: like it: 1 if the norm was not finite (only zero_grad was done).

    All tensors lie on one device; buffers that change must be contiguous and are never copied. The host never
    waits, so a CUDA graph can capture the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Loshchilov, Hutter (2019), arXiv:1711.05101, algorithm 2.
    """
    rate = shared.check(
        master, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, step, param=param, decay_mask=decay_mask,
        seed=seed, norm=norm, offsets=offsets, lr=lr, eps=eps, weight_decay=weight_decay, max_norm=max_norm, trail=trail,
    )  # fmt: skip
    beta1, beta2 = shared.check_betas(betas)
    grad_norm, skipped = op(
        master, grad, exp_avg, exp_avg_sq, step, param, decay_mask, seed, norm, offsets, rate, trail, beta1, beta2,
        float(eps), float(weight_decay), float(max_norm), bool(zero_grad), tape=tape,
    )  # fmt: skip
    return grad_norm, skipped
