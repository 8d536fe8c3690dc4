"""AdamW over flat buffers in place: global norm, clip, update, model-dtype copy and zeroed gradient.

With all parameters in one buffer, p the master weights and t = step + 1, element by element:

    norm = sqrt(sum(grad**2))          clip = min(1, max_norm / (norm + 1e-6)), 1 without clipping
    g = clip * grad
    m = beta1 * m + (1 - beta1) * g    v = beta2 * v + (1 - beta2) * g**2
    p = p - lr * weight_decay * p      where decay_mask is true
    p = p - lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
    param = p rounded to its dtype     step = t     grad = 0 if zero_grad, else as it was (not clipped)

If the norm is not finite (a NaN or an infinity anywhere in grad), master, moments, step and param keep every
bit, skipped is 1, and only zero_grad is still done. All is decided on the device: the host never waits.

The squares are summed in float64, in two stages of an order that depends on n alone: a gradient of 1e30,
whose square float32 cannot hold, has the right norm, and a run repeats bit for bit. The bias corrections are
float64 too: in float32 1 - 0.999 loses 4 of its 7 digits. All else is float32 (float64 for a float64 master).

Edge cases
 1  several elements, no power of two, all options     7  no elements: norm 0, the step counts
 2  plain: no copy, no mask, no decay, no clipping      8  one element
 3  the first step, from zero moments                   9  more than one block and one tile
 4  norm above and below max_norm                      10  a step counted in int64
 5  an infinite gradient: nothing changes              11  betas of 0: no memory of earlier steps
 6  gradient zeroed                                    12  lr on the device; a decay mask in uint8

Source: Loshchilov, Hutter, "Decoupled Weight Decay Regularization" (2019), arXiv:1711.05101, algorithm 2;
Kingma, Ba, "Adam" (2015), arXiv:1412.6980, algorithm 1; the clip is that of torch.nn.utils.clip_grad_norm_.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__ = ["adamw"]


def forward(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    param: Tensor | None,
    decay_mask: Tensor | None,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    zero_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Flat buffers (n), changed in place -> grad_norm and skipped, 0-dimensional."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.float64).to(master.dtype)
    applied = norm.isfinite()
    g = grad * (max_norm / (norm + 1e-6)).clamp(max=1.0) if 0.0 < max_norm < math.inf else grad
    t = step.double() + 1.0
    m = exp_avg.lerp(g, 1.0 - beta1)
    v = (exp_avg_sq * beta2).addcmul(g, g, value=1.0 - beta2)
    decay = lr.double() * weight_decay  # 0-dimensional, so float64 here does not widen what it multiplies
    p = master - master * (decay if decay_mask is None else (decay_mask != 0) * decay.to(master.dtype))
    p = p - m * (lr.double() / (1.0 - beta1**t)) / (v.sqrt() / (1.0 - beta2**t).sqrt() + eps)
    for old, new in ((master, p), (exp_avg, m), (exp_avg_sq, v), (step, t), (param, p)):
        if old is not None:
            old.copy_(torch.where(applied, new.to(old.dtype), old))
    if zero_grad:
        grad.zero_()
    return norm, (~applied).to(master.dtype)


def outputs(master: Tensor, *args: Any) -> tuple[Spec, ...]:
    """grad_norm, skipped."""
    return Spec((), master.dtype), Spec((), master.dtype)


def cost(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    param: Tensor | None = None, decay_mask: Tensor | None = None, zero_grad: bool = False, **options: Any,
) -> Cost:  # fmt: skip
    """Reads grad twice (no update before the norm is known), reads and writes master and moments."""
    others = sum(t.nbytes for t in (step, step, param, decay_mask) if t is not None)
    return Cost(
        18.0 * max(master.numel(), 1), 8.0 * master.nbytes + (grad.nbytes if zero_grad else 0) + others
    )


def peer(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *,
    param: Tensor | None = None, decay_mask: Tensor | None = None, lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    max_norm: float = 0.0, zero_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today: the usual clip, fused AdamW, a copy; a mask makes two groups."""
    norm = torch.linalg.vector_norm(grad)
    skipped = (~norm.isfinite()).to(master.dtype)
    g = grad * (max_norm / (norm + 1e-6)).clamp(max=1.0) if 0.0 < max_norm < math.inf else grad
    rows: list[Any] = [slice(None)] if decay_mask is None else [decay_mask != 0, decay_mask == 0]
    for row, decay in zip(rows, (weight_decay, 0.0), strict=False):
        count = step.to(torch.float32, copy=True)
        old = [master, exp_avg, exp_avg_sq]
        new = [t[row] for t in old]
        torch_adamw(
            [new[0]], [g[row]], [new[1]], [new[2]], [], [count], fused=True, found_inf=skipped.float(), lr=lr,
            beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        if decay_mask is not None:
            for whole, part in zip(old, new, strict=True):
                whole[row] = part
    step.copy_(count)
    if param is not None:
        param.copy_(torch.where(skipped > 0, param, master.to(param.dtype)))
    if zero_grad:
        grad.zero_()
    return norm, skipped


_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16


def _buffers(n: int, first: bool = False, scale: float = 1.0) -> dict[str, Any]:
    """Masters, a gradient of that scale, moments (zero at the first step) and the count."""
    return {
        "master": Normal((n,), dtype=_f32),
        "grad": Normal((n,), scale, dtype=_f32),
        "exp_avg": Normal((n,), 0.0 if first else 0.1, dtype=_f32),
        "exp_avg_sq": Normal((n,), 0.0 if first else 0.1, 0.0 if first else 1.0, _f32),
        "step": Values(0.0 if first else 7.0, _f32),
    }


def _copy(n: int, mask: torch.dtype = torch.bool) -> dict[str, Any]:
    """The model-dtype copy, and a mask that holds for half of the elements."""
    return {"param": Normal((n,)), "decay_mask": Integers((n,), 0, 2, mask)}


_all = {"lr": 1e-2, "weight_decay": 0.1, "max_norm": 1.0, "betas": (0.9, 0.95)}
samples = (
    Sample("1 all options", **_buffers(1003), **_copy(1003), **_all, zero_grad=True),
    Sample("2 plain", **_buffers(37), lr=1e-3),
    Sample("3 first step", **_buffers(130, first=True), param=Normal((130,)), lr=1e-3, weight_decay=0.01),
    Sample("4 norm above", **_buffers(65, scale=100.0), lr=0.1, max_norm=0.5),
    Sample("4 norm below", **_buffers(65, scale=1e-3), lr=0.1, max_norm=0.5),
    Sample("5 infinite", **_buffers(3) | {"grad": Values([1.0, -math.inf, 0.0], _f32)}, **_copy(3), **_all),
    Sample("6 zeroed", **_buffers(64), lr=0.1, zero_grad=True),
    Sample("7 no elements", **_buffers(0), **_copy(0), **_all),
    Sample("8 one element", **_buffers(1), **_copy(1), **_all),
    Sample("9 large", **_buffers(70_001), **_copy(70_001), **_all),
    Sample("10 int64 step", **_buffers(20) | {"step": Values(3, torch.int64)}, lr=0.1),
    Sample("11 betas of 0", **_buffers(20), lr=0.1, betas=(0.0, 0.0)),
    Sample("12 lr tensor", **_buffers(40), **_copy(40, torch.uint8), **_all | {"lr": Values(0.01, _f32)}),
)


def _bad(edge: str, error: type[Exception], text: str, **changed: Any) -> Bad:
    """A call that is right but for what is changed."""
    return Bad(edge, error, text, **_buffers(4) | {"lr": 0.1} | changed)


errors = (
    _bad("master dtype", TypeError, r"master: .*bfloat16.*float32", master=Normal((4,), dtype=_bf16)),
    _bad("master 2-D", ValueError, r"master: .*\(2, 2\).*\(n,\)", master=Normal((2, 2), dtype=_f32)),
    _bad("grad shape", ValueError, r"grad: .*\(3,\).*\(4,\)", grad=Normal((3,), dtype=_f32)),
    _bad("exp_avg dtype", TypeError, r"exp_avg: .*bfloat16.*float32", exp_avg=Normal((4,), dtype=_bf16)),
    _bad("exp_avg_sq None", TypeError, r"exp_avg_sq: .*NoneType", exp_avg_sq=None),
    _bad("step shape", ValueError, r"step: .*\(1,\).*0-dimensional", step=Values([1.0], _f32)),
    _bad("step dtype", TypeError, r"step: .*int32.*int64", step=Values(1, torch.int32)),
    _bad("step number", TypeError, r"step: .*int.*tensor", step=3),
    _bad("param dtype", TypeError, r"param: .*int32", param=Values([1, 2, 3, 4], torch.int32)),
    _bad("param shape", ValueError, r"param: .*\(5,\).*\(4,\)", param=Normal((5,))),
    _bad("mask dtype", TypeError, r"decay_mask: .*float32.*bool", decay_mask=Normal((4,), dtype=_f32)),
    _bad(
        "mask shape", ValueError, r"decay_mask: .*\(2,\).*\(4,\)", decay_mask=Integers((2,), 0, 2, torch.bool)
    ),
    _bad("lr negative", ValueError, r"lr: .*-0.1", lr=-0.1),
    _bad("lr tensor dtype", TypeError, r"lr: .*float16.*float32", lr=Values(0.1, torch.float16)),
    _bad("lr tensor shape", ValueError, r"lr: .*\(2,\).*0-dimensional", lr=Values([0.1, 0.1], _f32)),
    _bad("beta 1", ValueError, r"betas: .*1\.0.*\[0, 1\)", betas=(0.9, 1.0)),
    _bad("three betas", ValueError, r"betas: .*two", betas=(0.9, 0.99, 0.999)),
    _bad("eps negative", ValueError, r"eps: .*-1", eps=-1.0),
    _bad("weight_decay negative", ValueError, r"weight_decay: .*-0.01", weight_decay=-0.01),
    _bad("max_norm NaN", ValueError, r"max_norm: .*nan", max_norm=math.nan),
)

_MUTATED = ("master", "grad", "exp_avg", "exp_avg_sq", "step", "param")

def random(pick: Pick) -> Sample:
    """Any size, options, dtype of the copy and of the mask; now and then a gradient that is not finite."""
    n = pick.integer(0, 600)
    scale = pick.one_of(1.0, 1e-3, 100.0, math.inf)  # inf * N(0, 1) is not finite
    return Sample(
        "random", **_buffers(n, first=pick.one_of(True, False), scale=scale),
        param=pick.one_of(None, Normal((n,))), lr=pick.one_of(1e-3, 0.1),
        decay_mask=pick.one_of(None, Integers((n,), 0, 2, pick.one_of(torch.bool, torch.uint8))),
        betas=pick.one_of((0.9, 0.999), (0.0, 0.0), (0.9, 0.95)), eps=pick.one_of(1e-8, 1e-3),
        weight_decay=pick.one_of(0.0, 0.1), max_norm=pick.one_of(0.0, 1.0), zero_grad=pick.one_of(False, True),
    )  # fmt: skip


def case(parameters: int = 25_000_000) -> Sample:
    """All options on a model of so many parameters."""
    return Sample("case", **_buffers(parameters), **_copy(parameters), **_all)


shapes = {
    "default": ({"parameters": 12_300_000}, {"parameters": 50_000_000}),
    "sweep": tuple({"parameters": n} for n in (100_000, 1_000_000, 10_000_000)),
    "large": ({"parameters": 124_000_000}, {"parameters": 1_000_000_000}),
}


op = register(
    Op(
        name="adamw",
        schema="(Tensor(a!) master, Tensor(b!) grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
        "Tensor(e!) step, Tensor(f!)? param, Tensor? decay_mask, Tensor lr, float beta1, float beta2, "
        "float eps, float weight_decay, float max_norm, bool zero_grad) "
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
        mutates=_MUTATED,
    )
)


def _check_buffer(name: str, t: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; allowed: a tensor")
    if t.shape != shape:
        allowed = f"{shape}, the shape of master" if shape else "a 0-dimensional tensor"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: {allowed}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {t.dtype}; allowed: {', '.join(map(str, dict.fromkeys(dtypes)))}")
    if name in _MUTATED and not t.is_contiguous():
        raise ValueError(
            f"{name}: got strides {t.stride()}; allowed: contiguous, since it is changed in place"
        )


@torch.no_grad()
def adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    param: Tensor | None = None,
    decay_mask: Tensor | None = None,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    zero_grad: bool = False,
    tape: Any = None,
) -> tuple[Tensor, Tensor]:
    """One AdamW update in place, with the global norm of the gradient, clipping and the model-dtype copy.

    Args:
        master: (n,) float32 weights (float64 in the reference); updated.
        grad: (n,) like master; zeroed if zero_grad, else left as it is.
        exp_avg, exp_avg_sq: (n,) like master, the moments; zeros before the first step; updated.
        step: 0-dimensional, float32 or int64 (or master's dtype): updates applied so far; incremented.
        param: (n,) float32, bfloat16 or float16, gets the new master; None if master is the parameter.
        decay_mask: (n,) bool or uint8, weight decay only where it is not 0; None: everywhere.
        lr: a float, or a 0-dimensional tensor of master's dtype, which a CUDA graph reads at each replay.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment; >= 0.
        weight_decay: decoupled, times lr; >= 0.
        max_norm: the gradient is scaled to at most this norm; 0 or inf: no clipping.
        zero_grad: write zeros to grad in the same pass.
        tape: the engine's.

    Returns:
        grad_norm: 0-dimensional of master's dtype, before clipping, right up to the largest float32.
        skipped: 0-dimensional of master's dtype: 1 if the norm was not finite (only zero_grad was done).

    All tensors lie on one device; buffers that change must be contiguous and are never copied. The host never
    waits, so a CUDA graph can capture the call.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Loshchilov, Hutter (2019), arXiv:1711.05101, algorithm 2.
    """
    check_floating("master", master)
    if master.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"master: got dtype {master.dtype}; allowed: torch.float32, torch.float64 (reference)"
        )
    if master.dim() != 1:
        raise ValueError(f"master: got shape {tuple(master.shape)}; allowed: (n,), one flat buffer")
    shape, dtype = tuple(master.shape), master.dtype
    for name, t in (("master", master), ("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_buffer(name, t, shape, (dtype,))
    _check_buffer("step", step, (), (dtype, torch.float32, torch.int64))
    if param is not None:
        _check_buffer("param", param, shape, (dtype, _f32, _bf16, _f16))
    if decay_mask is not None:
        _check_buffer("decay_mask", decay_mask, shape, (torch.bool, torch.uint8))
    if isinstance(lr, Tensor):
        _check_buffer("lr", lr, (), (dtype,))
    elif not 0.0 <= lr < math.inf:
        raise ValueError(f"lr: got {lr}; allowed: a finite number >= 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas: got {betas}; allowed: two numbers in [0, 1)")
    for name, value in (("eps", eps), ("weight_decay", weight_decay), ("max_norm", max_norm)):
        if not value >= 0.0:
            raise ValueError(f"{name}: got {value}; allowed: >= 0")
    rate = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=dtype, device=master.device)
    check_same_device(
        master=master, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=step, param=param,
        decay_mask=decay_mask, lr=rate,
    )  # fmt: skip
    beta1, beta2 = map(float, betas)
    grad_norm, skipped = op(
        master, grad, exp_avg, exp_avg_sq, step, param, decay_mask, rate, beta1, beta2, float(eps),
        float(weight_decay), float(max_norm), bool(zero_grad), tape=tape,
    )  # fmt: skip
    return grad_norm, skipped
