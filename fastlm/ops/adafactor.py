"""Adafactor on one parameter in place: factored second moments, update clipped by its root mean square.

With p the master weights (rows, columns) or (n,), t = step + 1, keep = t ** beta2_decay:

    norm, clip: see fastlm/ops/optimizer_step.py, with whether the step counts, rounding and the edges they share
    g = clip * grad                                alpha = max(eps2, rms(p)) * min(lr, 1 / sqrt(t))
    p = p - lr * weight_decay * p
    of a matrix:  r_i = (1 - keep) * r_i + keep * mean_j g_ij**2       c_j likewise, with the mean over i
                  v_ij = r_i c_j / max(mean(r), eps1)
    of a vector:  v = (1 - keep) * v + keep * g**2
    u = g / max(sqrt(v), eps1)                     p = p - alpha / max(1, rms(u) / d) * u

The sums of squares are float64, as the norm's. The order of sums depends on the sizes alone.

Edge cases
 1  a matrix, all options                    6  an infinite gradient: nothing changes
 2  a vector                                 7  a gradient of 0 from zero moments: no step but the decay
 3  the first step, of both                  8  bfloat16 weights, rounded stochastically
 4  one row, one column, one element         9  the norm is given
 5  more columns than rows                  10  more than one block and one tile, of both

Source: Shazeer, Stern, "Adafactor: adaptive learning rates with sublinear memory cost" (2018), arXiv:1804.04235,
algorithms 4 and 5, in the form of torch.optim.Adafactor: lr is the largest relative step, eps1 bounds what is divided by.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim._adafactor import adafactor as torch_adafactor

from ..checks import check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Normal, Pick, Sample, Values
from . import optimizer_step as shared

__all__ = ["adafactor"]


def forward(
    master: Tensor, grad: Tensor, row_var: Tensor | None, col_var: Tensor | None, variance: Tensor | None, step: Tensor,
    param: Tensor | None, seed: Tensor | None, norm: Tensor | None, lr: Tensor, beta2_decay: float, eps1: float,
    eps2: float, d: float, weight_decay: float, max_norm: float, zero_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Changed in place -> grad_norm and skipped, 0-dimensional."""
    begun = shared.begin(master, grad, step, norm, None, max_norm)
    g, t = begun.grad, begun.t
    p, squares = master.to(g.dtype), g.double().square()
    keep = t**beta2_decay
    alpha = _rms(p).clamp(min=eps2) * torch.minimum(lr.double(), t.rsqrt())
    states: tuple[tuple[Tensor | None, Tensor], ...]
    if row_var is not None and col_var is not None:
        rows = (row_var * (1.0 - keep) + squares.mean(1) * keep).to(g.dtype)
        columns = (col_var * (1.0 - keep) + squares.mean(0) * keep).to(g.dtype)
        states = (row_var, rows), (col_var, columns)
        v = rows[:, None] * columns / rows.mean().clamp(min=eps1)
    else:
        assert variance is not None
        v = (variance * (1.0 - keep) + squares * keep).to(g.dtype)
        states = ((variance, v),)
    u = g * v.clamp(min=eps1 * eps1).rsqrt()
    new = p - p * shared.decay_of(p, None, lr, weight_decay) - u * (alpha / (_rms(u) / d).clamp(min=1.0))
    return shared.commit(begun, master, new, states, step, param, seed, grad, zero_grad)


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt() if x.numel() else x.new_zeros((), dtype=torch.float64)


def outputs(master: Tensor, *args: Any) -> tuple[Spec, ...]:
    """grad_norm, skipped."""
    return (Spec((), shared.widened(master.dtype)),) * 2


def cost(
    master: Tensor, grad: Tensor, row_var: Tensor | None, col_var: Tensor | None, variance: Tensor | None, step: Tensor,
    *, param: Tensor | None = None, norm: Tensor | None = None, zero_grad: bool = False, **options: Any,
) -> Cost:  # fmt: skip
    """Reads grad for the norm, for the moments, for the size of the update and for the update; master twice."""
    states = (row_var, col_var, variance)
    least = shared.cost(20.0, master, grad, states, step, zero_grad, norm, param)
    return least._replace(forward_bytes=least.forward_bytes + 2.0 * grad.nbytes + master.nbytes)


def peer(
    master: Tensor, grad: Tensor, row_var: Tensor | None, col_var: Tensor | None, variance: Tensor | None, step: Tensor,
    *, param: Tensor | None = None, seed: Tensor | None = None, norm: Tensor | None = None, lr: float | Tensor,
    beta2_decay: float = -0.8, eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0,
    weight_decay: float = 0.0, max_norm: float = 0.0, zero_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today: the usual clip, torch's Adafactor, a copy."""

    def update(p: Tensor, g: Tensor, kept: list[Tensor], decay: float, skipped: Tensor) -> None:
        if not p.numel():
            return
        factored = len(kept) == 2
        torch_adafactor(
            [p], [g], [kept[0][:, None]] if factored else [None], [kept[1][None]] if factored else [None],
            [None] if factored else [kept[0]], [step.to(torch.float32, copy=True)], foreach=False, d=d, lr=float(lr),
            beta2_decay=beta2_decay, weight_decay=decay, eps1=eps[0],  # type: ignore[arg-type]
            eps2=eps[1], maximize=False,
        )  # fmt: skip

    states = [t for t in (row_var, col_var, variance) if t is not None]
    return shared.torch_step(
        update, master, grad, states, step, param=param, decay_mask=None, seed=seed, norm=norm, offsets=None,
        weight_decay=weight_decay, max_norm=max_norm, zero_grad=zero_grad,
    )  # fmt: skip


_f32, _bf16 = torch.float32, torch.bfloat16


def _given(*shape: int, first: bool = False, scale: float = 1.0, dtype: torch.dtype = _f32) -> dict[str, Any]:
    """A parameter, its gradient, its moments (zero at the first step) and the count."""

    def moment(*size: int) -> Normal:
        return Normal(size, 0.0 if first else 0.1, 0.0 if first else 1.0, _f32)

    matrix = len(shape) == 2
    return {
        "master": Normal(shape, dtype=dtype), "grad": Normal(shape, scale, dtype=dtype),
        "row_var": moment(shape[0]) if matrix else None, "col_var": moment(shape[1]) if matrix else None,
        "variance": None if matrix else moment(*shape), "step": Values(0.0 if first else 7.0, _f32),
    }  # fmt: skip


_all = {"lr": 1e-2, "weight_decay": 0.1, "max_norm": 1.0, "eps": (1e-6, 1e-3), "beta2_decay": -0.7, "d": 1.5}
_few = {"lr": 0.5, "eps": (1e-6, 1e-3)}
_zeros = Values([[0.0] * 5] * 3, _f32)
_seed = Values([77], torch.int64)
samples = (
    Sample("1 all options", **_given(37, 29), param=Normal((37, 29)), **_all, zero_grad=True),
    Sample("2 vector", **_given(133), param=Normal((133,)), **_all, zero_grad=True),
    Sample("3 first step", **_given(17, 40, first=True), **_all),
    Sample("3 first step of a vector", **_given(40, first=True), **_few),
    Sample("4 one row", **_given(1, 65), **_few),
    Sample("4 one column", **_given(65, 1), **_few),
    Sample("4 one element", **_given(1), **_few),
    Sample("5 wide", **_given(7, 300), **_few),
    Sample("6 infinite", **_given(3) | {"grad": Values([1.0, -math.inf, 0.0], _f32)}, param=Normal((3,)), **_all),
    Sample("7 no gradient", **_given(3, 5, first=True) | {"grad": _zeros}, **_all),
    Sample("8 stochastic", **_given(40, 50, dtype=_bf16), seed=_seed, **_all, zero_grad=True),
    Sample("8 stochastic vector", **_given(300, dtype=_bf16), seed=_seed, **_all),
    Sample("9 norm given", **_given(6, 7), norm=Values(4.0, _f32), **_all),
    Sample("10 large", **_given(300, 1100), param=Normal((300, 1100)), **_all),
    Sample("10 large vector", **_given(70_001), param=Normal((70_001,)), **_all),
)


def _bad(edge: str, error: type[Exception], text: str, **changed: Any) -> Bad:
    """A call that is right but for what is changed."""
    return Bad(edge, error, text, **_given(2, 3) | {"lr": 0.1} | changed)


errors = (
    _bad("master 3-D", ValueError, r"master: .*\(2, 3, 1\).*\(rows, columns\)", master=Normal((2, 3, 1), dtype=_f32)),
    _bad("grad shape", ValueError, r"grad: .*\(6,\).*\(2, 3\)", grad=Normal((6,), dtype=_f32)),
    _bad("row_var shape", ValueError, r"row_var: .*\(3,\).*\(2,\)", row_var=Normal((3,), dtype=_f32)),
    _bad("col_var dtype", TypeError, r"col_var: .*bfloat16.*float32", col_var=Normal((3,), dtype=_bf16)),
    _bad("variance of a matrix", ValueError, r"variance: .*None", variance=Normal((2, 3), dtype=_f32)),
    _bad("no col_var", TypeError, r"col_var: .*NoneType", col_var=None),
    _bad("beta2_decay", ValueError, r"beta2_decay: .*0\.5.*<= 0", beta2_decay=0.5),
    _bad("d", ValueError, r"d: .*0\.5.*>= 1", d=0.5),
    _bad("eps negative", ValueError, r"eps2: .*-1", eps=(None, -1.0)),
    _bad("lr negative", ValueError, r"lr: .*-0.1", lr=-0.1),
    _bad("weight_decay negative", ValueError, r"weight_decay: .*-0.01", weight_decay=-0.01),
    _bad("step number", TypeError, r"step: .*int.*tensor", step=3),
)


def random(pick: Pick) -> Sample:
    """Matrices and vectors of any size, dtypes; now and then a gradient that is not finite."""
    shape = (pick.integer(1, 40), pick.integer(1, 40)) if pick.one_of(True, False) else (pick.integer(1, 600),)
    given = _given(
        *shape, first=pick.one_of(True, False), scale=pick.one_of(1.0, 1e-3, 100.0, math.inf),
        dtype=pick.one_of(_f32, _bf16),
    )  # fmt: skip
    narrow = given["master"].dtype == _bf16
    return Sample(
        "random", **given, seed=pick.one_of(None, _seed), param=None if narrow else pick.one_of(None, Normal(shape)),
        lr=pick.one_of(1e-2, 1.0), eps=(1e-6, 1e-3), d=pick.one_of(1.0, 2.0), weight_decay=pick.one_of(0.0, 0.1),
        max_norm=pick.one_of(0.0, 1.0), zero_grad=pick.one_of(False, True),
    )  # fmt: skip


def case(rows: int = 3072, columns: int = 768) -> Sample:
    """All options on one matrix."""
    return Sample("case", **_given(rows, columns), param=Normal((rows, columns)), **_all)


shapes = {
    "default": ({"rows": 3072, "columns": 768}, {"rows": 50304, "columns": 768}),
    "sweep": tuple({"rows": n, "columns": 1024} for n in (64, 512, 4096)),
    "large": ({"rows": 50304, "columns": 2048},),
}


op = register(
    Op(
        name="adafactor",
        schema="(Tensor(a!) master, Tensor(b!) grad, Tensor(c!)? row_var, Tensor(d!)? col_var, Tensor(e!)? variance, "
        "Tensor(f!) step, Tensor(g!)? param, Tensor? seed, Tensor? norm, Tensor lr, float beta2_decay, float eps1, "
        "float eps2, float d, float weight_decay, float max_norm, bool zero_grad) "
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
        mutates=("master", "grad", "row_var", "col_var", "variance", "step", "param"),
    )
)


@torch.no_grad()
def adafactor(
    master: Tensor, grad: Tensor, row_var: Tensor | None, col_var: Tensor | None, variance: Tensor | None, step: Tensor,
    *, param: Tensor | None = None, seed: Tensor | None = None, norm: Tensor | None = None, lr: float | Tensor,
    beta2_decay: float = -0.8, eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0,
    weight_decay: float = 0.0, max_norm: float = 0.0, zero_grad: bool = False, tape: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One Adafactor update of one parameter in place, with clipping and the model-dtype copy.

    Args:
        master: (rows, columns), whose second moments are factored, or (n,); dtypes as in `adamw`; updated.
        grad, step, param, seed, norm, lr, max_norm, zero_grad, tape: as in `adamw`, in the shape of master.
        row_var, col_var: (rows,) and (columns,) float32 (float64 with such masters), of a matrix; None of a vector.
        variance: (n,) like them, of a vector; None of a matrix.
        beta2_decay: the moments of step t keep 1 - t ** beta2_decay of what they were; <= 0.
        eps: the least of what the gradient is divided by (None: eps of master's dtype) and of the weights' size.
        d: the root mean square from which on an update is scaled down; >= 1.
        weight_decay: decoupled, times lr; >= 0.

    Returns:
        grad_norm, skipped: as `adamw` does.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Shazeer, Stern (2018), arXiv:1804.04235; torch.optim.Adafactor.
    """
    eps1, eps2 = torch.finfo(master.dtype).eps if eps[0] is None else eps[0], eps[1]
    rate = shared.check(
        master, grad, {}, step, param=param, decay_mask=None, seed=seed, norm=norm, offsets=None, lr=lr, matrix=True,
        eps1=eps1, eps2=eps2, weight_decay=weight_decay, max_norm=max_norm,
    )  # fmt: skip
    sizes: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
        "row_var": (row_var, (master.shape[0],) if master.dim() == 2 else None),
        "col_var": (col_var, (master.shape[1],) if master.dim() == 2 else None),
        "variance": (variance, tuple(master.shape) if master.dim() == 1 else None),
    }
    for name, (t, size) in sizes.items():
        if size is not None:
            shared.check_buffer(name, t, size, (rate.dtype,))
        elif t is not None:
            raise ValueError(f"{name}: got a tensor; allowed: None with a master of shape {tuple(master.shape)}")
    if not beta2_decay <= 0.0:
        raise ValueError(f"beta2_decay: got {beta2_decay}; allowed: <= 0")
    if not d >= 1.0:
        raise ValueError(f"d: got {d}; allowed: >= 1")
    check_same_device(master=master, row_var=row_var, col_var=col_var, variance=variance)
    grad_norm, skipped = op(
        master, grad, row_var, col_var, variance, step, param, seed, norm, rate, float(beta2_decay), float(eps1),
        float(eps2), float(d), float(weight_decay), float(max_norm), bool(zero_grad), tape=tape,
    )  # fmt: skip
    return grad_norm, skipped
