"""Layer normalisation of a residual sum: what stands between two sublayers of a transformer, in one pass.

    residual_out = residual + dropout(x + x_bias), rounded to their dtype       (fastlm/ops/residual_sum.py)
    y = layer_norm(residual_out) * weight + bias                                (fastlm/ops/layer_norm.py)

x_bias, if there is one, is that of the projection which made x, and dropout the one that follows it. The norm is of
the rounded sum, so that the backward, which has nothing else, sees what the forward saw.

Gradients, with dLN the gradient of layer_norm with respect to its input:
    d = dLN(d_y) + d_residual_out          residual_out is both an output and what is normalised
    d residual = d                         d x = mask * d / (1 - p); without dropout one tensor, stored once
    d x_bias = sum over rows of d x        the mask is drawn again from the seed
    dweight = sum over rows of d_y * xhat  dbias = sum over rows of d_y

Saved: weight as given, residual_out (an output anyway), mean and rstd in float32 (float64 for float64), one a
row, and the seed. Either upstream gradient may be absent: without d_y, d = d_residual_out and the parameters' are 0.

Edge cases
 1  several rows, N not a power of two        9  a sum large against its deviation
 2  no weight and no bias                    10  float32 parameters with a bfloat16 input
 3  weight without bias                      11  dropout and a bias
 4  one row, three leading dimensions        12  dropout, rows that start inside a group of four random words
 5  N wider than one block                   13  a bias alone
 6  N = 1                                    14  all dropped
 7  no rows                                  15  dropout, N wider than one block
 8  constant rows: x = -residual             16  dropout of no rows

Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), arXiv:1607.06450; the pre-norm order of sublayers by
Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020), arXiv:2002.04745; dropout: Srivastava
et al. (JMLR 2014).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_same_device, check_vector
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from .layer_norm import backward as norm_backward
from .layer_norm import forward as norm_forward
from .layer_norm import peer as norm_peer
from .layer_norm import shapes
from .layer_norm import terms as norm_terms
from .residual_sum import (
    bad_sums,
    check_sum,
    peer_sum,
    residual_sum,
    shares_gradient,
    split_gradient,
    sum_terms,
    wide,
)  # fmt: skip

__all__ = ["add_layer_norm"]


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, x_bias: Tensor | None,
    seed: Tensor | None, eps: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual (..., N) -> y and residual_out like x, mean and rstd (...)."""
    residual_out = residual_sum(x, residual, x_bias, seed, dropout_p)
    y, mean, rstd = norm_forward(residual_out, weight, bias, eps)
    return y, residual_out, mean, rstd


def backward(
    d_y: Tensor | None, d_residual_out: Tensor | None, weight: Tensor | None, residual_out: Tensor, mean: Tensor,
    rstd: Tensor, seed: Tensor | None, eps: float, dropout_p: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """d_y, d_residual_out (..., N) -> d x and d residual like them, dweight, dbias, d x_bias (N) in float32."""
    of_x, of_residual, of_weight, of_bias, of_x_bias = needs
    d: Tensor | None
    if d_y is None:
        assert d_residual_out is not None
        zeros = mean.new_zeros(residual_out.shape[-1])
        d, dweight, dbias = wide(d_residual_out), zeros if of_weight else None, zeros if of_bias else None
    else:
        want_d = of_x or of_residual or of_x_bias
        wanted = (want_d, of_weight, of_bias)
        d, dweight, dbias = norm_backward(d_y, wide(residual_out), weight, mean, rstd, eps, wanted)
        if d is not None and d_residual_out is not None:
            d = d + d_residual_out
    if d is None:
        return None, None, dweight, dbias, None
    split = (of_x, of_residual, of_x_bias)
    dx, d_residual, d_x_bias = split_gradient(d, residual_out.dtype, seed, dropout_p, split)
    return dx, d_residual, dweight, dbias, d_x_bias


def outputs(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """y, residual_out; mean, rstd."""
    like_x = Spec(tuple(x.shape), x.dtype)
    statistics = Spec(tuple(x.shape[:-1]), torch.float64 if x.dtype == torch.float64 else torch.float32)
    return like_x, like_x, statistics, statistics


def gradients(
    d_y: Any, d_residual_out: Any, weight: Any, residual_out: Tensor, mean: Tensor, *rest: Any
) -> tuple[Spec, ...]:
    """d x, d residual, dweight, dbias, d x_bias."""
    like_x = Spec(tuple(residual_out.shape), residual_out.dtype)
    parameter = Spec((residual_out.shape[-1],), mean.dtype)
    return like_x, like_x, parameter, parameter, parameter


def cost(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Cost:  # fmt: skip
    """Forward reads two tensors and writes two; backward reads two gradients and the sum, and writes one gradient, with
    dropout two."""
    more = 1.0 if dropout_p else 0.0
    return Cost(9.0 * x.numel(), 4.0 * x.nbytes, 15.0 * x.numel(), (4.0 + more) * x.nbytes)


def peer(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today."""
    total = peer_sum(x, residual, x_bias, dropout_p, seed)
    return norm_peer(total, weight, bias, eps), total


def terms(
    upstream: list[Tensor], x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """layer_norm's, and the gradient that reaches the sum itself."""
    total = peer_sum(x, residual, x_bias, dropout_p, seed)
    return sum_terms(upstream, norm_terms(upstream, total, weight, bias, eps)["x"], dropout_p)


_f32 = torch.float32
_key = Values([0x1234_5678_9ABC_DEF0], torch.int64)
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
    _sample("11 dropout and bias", (2, 9, 72), weight=Normal((72,)), bias=Normal((72,)), x_bias=Normal((72,)),
            dropout_p=0.3, seed=_key),
    _sample("12 dropout, odd rows", (5, 37), weight=Normal((37,)), x_bias=Normal((37,), dtype=_f32), dropout_p=0.5,
            seed=Values(-2, torch.int64)),
    _sample("13 bias alone", (6, 20), weight=Normal((20,)), bias=Normal((20,)), x_bias=Normal((20,))),
    _sample("14 all dropped", (3, 8), weight=Normal((8,)), x_bias=Normal((8,)), dropout_p=1.0, seed=_key),
    _sample("15 dropout, wide", (2, 8201), bias=Normal((8201,)), dropout_p=0.1, seed=_key),
    _sample("16 dropout of no rows", (0, 8), x_bias=Normal((8,)), dropout_p=0.1, seed=_key),
)  # fmt: skip

errors = (
    *bad_sums,
    Bad("x scalar", ValueError, r"x: .*0-dimensional", x=Values(1.0), residual=Values(1.0)),
    Bad("bias dtype", TypeError, r"bias: .*float64", x=Normal((2, 4), dtype=_f32),
        residual=Normal((2, 4), dtype=_f32), bias=Normal((4,), dtype=torch.float64)),
)  # fmt: skip


def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, with and without parameters of either dtype, with and without dropout."""
    n = pick.integer(1, 300)
    shape = (*(pick.integer(0, 5) for _ in range(pick.integer(0, 3))), n)
    parameter = Normal((n,), dtype=pick.one_of(None, _f32))
    return _sample(
        "random", shape, shift=pick.one_of(0.0, 3.0), weight=pick.one_of(None, parameter),
        bias=pick.one_of(None, parameter), eps=pick.one_of(1e-5, 1e-3), x_bias=pick.one_of(None, parameter),
        dropout_p=pick.one_of(0.0, 0.1, 0.5, 1.0), seed=Integers((1,), -(2**63), 2**63 - 1),
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 768, dropout_p: float = 0.0) -> Sample:
    """Activations and residual (rows, columns) with float32 parameters; with dropout also a bias of x."""
    parameter = Normal((columns,), dtype=_f32)
    more: dict[str, Any] = {"x_bias": parameter, "dropout_p": dropout_p, "seed": _key} if dropout_p else {}
    return _sample("case", (rows, columns), weight=parameter, bias=parameter, **more)


op = register(
    Op(
        name="add_layer_norm",
        schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor? seed, float eps, "
        "float dropout_p)"
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
        grads=("x", "residual", "weight", "bias", "x_bias"),
        shared=(("residual", "x"),),
        shared_when=lambda eps, dropout_p: shares_gradient(dropout_p),
        accumulates=("weight", "bias", "x_bias"),
        saved=("weight", "residual_out", "mean", "rstd", "seed"),
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
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    tape: Any = None,
) -> tuple[Tensor, Tensor]:
    """residual + dropout(x + x_bias), and its layer normalisation over the last dimension.

    Args:
        x, residual: (..., N), floating-point, N >= 1, of one shape. Of two dtypes, both are first converted
            to the one that PyTorch promotes them to (bfloat16 and float32 to float32).
        weight, bias: (N,), of that dtype or float32; None for 1 and 0.
        eps: added to the variance; >= 0.
        x_bias: (N,), of that dtype or float32, added to x before dropout; None for 0.
        dropout_p: 0 to 1, the probability that an element of x + x_bias counts as 0; the others are divided by
            1 - dropout_p. The mask is the one of `dropout` with the same seed.
        seed: int64, one element, on x's device; None draws one from PyTorch's generator of that device. Not looked at
            without dropout.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        (y, residual_out), both of x's shape: the normalised sum, and the sum, rounded to its dtype before it
        is normalised. Statistics and parameter gradients are computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Ba, Kiros, Hinton (2016), arXiv:1607.06450; Srivastava et al. (JMLR 2014) for dropout.
    """
    x, residual, seed = check_sum(x, residual, x_bias, dropout_p, seed)
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    check_same_device(x=x, weight=weight, bias=bias)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    y, residual_out = op(x, residual, weight, bias, x_bias, seed, float(eps), float(dropout_p), tape=tape)
    return y, residual_out
