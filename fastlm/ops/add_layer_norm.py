"""Layer normalisation of a residual sum: what stands between two sublayers of a transformer, in one pass.

    residual_out = x + residual, rounded to their dtype
    y = layer_norm(residual_out) * weight + bias            (fastlm/ops/layer_norm.py)

The norm is of the rounded sum, so that the backward, which has nothing else, sees what the forward saw.

Gradients, with dLN the gradient of layer_norm with respect to its input:
    d = dLN(d_y) + d_residual_out          residual_out is both an output and what is normalised
    d x = d residual = d                   one tensor: it is computed and stored once
    dweight = sum over rows of d_y * xhat  dbias = sum over rows of d_y

Saved: weight as given, residual_out (an output anyway), mean and rstd in float32 (float64 for float64), one a
row. Either upstream gradient may be absent: without d_y, d = d_residual_out and the parameters' are 0.

Edge cases
 1  several rows, N not a power of two        6  N = 1
 2  no weight and no bias                     7  no rows
 3  weight without bias                       8  constant rows: x = -residual
 4  one row, three leading dimensions         9  a sum large against its deviation
 5  N wider than one block                   10  float32 parameters with a bfloat16 input

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450; the pre-norm order of sublayers by
Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020), arXiv:2002.04745.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device, check_vector
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Normal, Pick, Sample, Values
from .layer_norm import backward as norm_backward
from .layer_norm import forward as norm_forward
from .layer_norm import peer as norm_peer
from .layer_norm import shapes
from .layer_norm import terms as norm_terms

__all__ = ["add_layer_norm"]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual (..., N) -> y and residual_out like x, mean and rstd (...)."""
    residual_out = (_wide(x) + _wide(residual)).to(x.dtype)
    y, mean, rstd = norm_forward(residual_out, weight, bias, eps)
    return y, residual_out, mean, rstd


def backward(
    d_y: Tensor | None,
    d_residual_out: Tensor | None,
    weight: Tensor | None,
    residual_out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_y, d_residual_out (..., N) -> the gradient of x and of residual, dweight and dbias (N) in float32."""
    if d_y is None:
        assert d_residual_out is not None
        zeros = mean.new_zeros(residual_out.shape[-1])
        dx = d_residual_out.clone() if needs[0] else None
        return dx, zeros if needs[1] else None, zeros.clone() if needs[2] else None
    dx, dweight, dbias = norm_backward(d_y, _wide(residual_out), weight, mean, rstd, eps, needs)
    if dx is not None:
        dx = (dx if d_residual_out is None else dx + d_residual_out).to(residual_out.dtype)
    return dx, dweight, dbias


def outputs(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Spec, ...]:
    """y, residual_out; mean, rstd."""
    like_x = Spec(tuple(x.shape), x.dtype)
    statistics = Spec(tuple(x.shape[:-1]), torch.float64 if x.dtype == torch.float64 else torch.float32)
    return like_x, like_x, statistics, statistics


def gradients(
    d_y: Any,
    d_residual_out: Any,
    weight: Any,
    residual_out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Any,
) -> tuple[Spec, ...]:
    """The gradient of x and of residual, dweight, dbias."""
    parameter = Spec((residual_out.shape[-1],), mean.dtype)
    return Spec(tuple(residual_out.shape), residual_out.dtype), parameter, parameter


def cost(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Cost:
    """Forward reads two tensors and writes two; backward reads two gradients and the sum, and writes one."""
    return Cost(9.0 * x.numel(), 4.0 * x.nbytes, 15.0 * x.numel(), 4.0 * x.nbytes)


def peer(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """What a PyTorch user writes today."""
    total = x + residual
    return norm_peer(total, weight, bias, eps), total


def terms(
    upstream: list[Tensor], x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, float]:  # fmt: skip
    """layer_norm's, and the gradient that reaches the sum itself."""
    direct = upstream[1].abs().max().item() if upstream[1].numel() else 0.0
    total = norm_terms(upstream, x + residual, weight, bias, eps)["x"] + direct
    return {"x": total, "residual": total}


_f32 = torch.float32
_row = [[3.0, -1.0, 0.5, 2.0, -4.0, 0.0, 1.0, 8.0]]


def _sample(edge: str, shape: tuple[int, ...], shift: float = 0.0, **more: Any) -> Sample:
    return Sample(edge, x=Normal(shape), residual=Normal(shape, shift=shift), **more)


samples = (
    _sample("1 rows", (5, 96), weight=Normal((96,)), bias=Normal((96,))),
    _sample("2 plain", (3, 33)),
    _sample("3 weight only", (4, 40), weight=Normal((40,)), eps=1e-3),
    _sample("4 one row, 3-D", (1, 1, 64), weight=Normal((64,)), bias=Normal((64,))),
    _sample("5 wide", (3, 9000), weight=Normal((9000,)), bias=Normal((9000,))),
    _sample("6 N = 1", (4, 1), weight=Normal((1,)), bias=Normal((1,))),
    _sample("7 no rows", (0, 16), weight=Normal((16,)), bias=Normal((16,))),
    Sample("8 constant rows", x=Values(_row), residual=Values([[-v for v in _row[0]]]), weight=Normal((8,))),
    _sample("9 large mean", (4, 256), shift=30.0, weight=Normal((256,)), bias=Normal((256,))),
    _sample(
        "10 float32 parameters", (7, 48), weight=Normal((48,), dtype=_f32), bias=Normal((48,), dtype=_f32)
    ),
)

errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[1, 2]], torch.int64),
        residual=Normal((1, 2))),
    Bad("residual integer", TypeError, r"residual: .*int64", x=Normal((1, 2)),
        residual=Values([[1, 2]], torch.int64)),
    Bad("shapes", ValueError, r"residual: .*\(4,\).*\(2, 4\)", x=Normal((2, 4)), residual=Normal((4,))),
    Bad("x scalar", ValueError, r"x: .*0-dimensional", x=Values(1.0), residual=Values(1.0)),
    Bad("no columns", ValueError, r"x: .*last dimension.*0", x=Normal((3, 0)), residual=Normal((3, 0))),
    Bad("weight shape", ValueError, r"weight: .*\(3,\).*\(4,\)", x=Normal((2, 4)), residual=Normal((2, 4)),
        weight=Normal((3,))),
    Bad("bias dtype", TypeError, r"bias: .*float64", x=Normal((2, 4), dtype=_f32),
        residual=Normal((2, 4), dtype=_f32), bias=Normal((4,), dtype=torch.float64)),
    Bad("eps", ValueError, r"eps: .*-1", x=Normal((2, 4)), residual=Normal((2, 4)), eps=-1.0),
)  # fmt: skip

def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, with and without parameters of either dtype."""
    n = pick.integer(1, 300)
    shape = (*(pick.integer(0, 5) for _ in range(pick.integer(0, 3))), n)
    parameter = Normal((n,), dtype=pick.one_of(None, _f32))
    return _sample(
        "random", shape, shift=pick.one_of(0.0, 3.0), weight=pick.one_of(None, parameter),
        bias=pick.one_of(None, parameter), eps=pick.one_of(1e-5, 1e-3),
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 768) -> Sample:
    """Activations and residual (rows, columns) with float32 parameters."""
    parameter = Normal((columns,), dtype=_f32)
    return _sample("case", (rows, columns), weight=parameter, bias=parameter)


op = register(
    Op(
        name="add_layer_norm",
        schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
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
        terms=terms,
        grads=("x", "weight", "bias"),
        shared=(("residual", "x"),),
        accumulates=("weight", "bias"),
        saved=("weight", "residual_out", "mean", "rstd"),
        results=2,
    )
)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    tape: Any = None,
) -> tuple[Tensor, Tensor]:
    """x + residual, and its layer normalisation over the last dimension.

    Args:
        x, residual: (..., N), floating-point, N >= 1, of one shape. Of two dtypes, both are first converted
            to the one that PyTorch promotes them to (bfloat16 and float32 to float32).
        weight, bias: (N,), of that dtype or float32; None for 1 and 0.
        eps: added to the variance; >= 0.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (y, residual_out), both of x's shape: the normalised sum, and the sum, rounded to its dtype before it
        is normalised. Statistics and parameter gradients are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Ba, Kiros, Hinton (2016), arXiv:1607.06450.
    """
    check_floating("x", x)
    check_floating("residual", residual)
    if x.shape != residual.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}; allowed: x's, {tuple(x.shape)}")
    if x.dim() == 0 or x.shape[-1] == 0:
        given = "a 0-dimensional tensor" if x.dim() == 0 else "a last dimension of 0"
        raise ValueError(f"x: got {given}; allowed: (..., N) with N >= 1")
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    y, residual_out = op(x, residual, weight, bias, float(eps), tape=tape)
    return y, residual_out
