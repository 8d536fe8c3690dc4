"""Root-mean-square normalisation of a residual sum, in one pass: what add_layer_norm is to layer_norm.

    residual_out = residual + dropout(x + x_bias), rounded to their dtype       (fastlm/ops/residual_sum.py)
    y = rms_norm(residual_out) * (weight + offset)                              (fastlm/ops/rms_norm.py)

The norm is of the rounded sum, so that the backward, which has nothing else, sees what the forward saw. Transformers'
Llama blocks compute the same: the sum in the residual's dtype, then its norm.

Gradients, with dRMS the gradient of rms_norm with respect to its input:
    d = dRMS(d_y) + d_residual_out         residual_out is both an output and what is normalised
    d residual = d                         d x = mask * d / (1 - p); without dropout one tensor, stored once
    d x_bias = sum over rows of d x        the mask is drawn again from the seed
    dweight = sum over rows of d_y * xhat  in Llama's order of the rounded xhat

Saved: weight as given, residual_out (an output anyway), rstd in float32 (float64 for float64), one a row, and the
seed. Either upstream gradient may be absent: without d_y, d = d_residual_out and dweight is 0.

Edge cases
 1  several rows, N not a power of two         7  rows of 0: x = -residual
 2  no weight                                  8  a float32 weight with a bfloat16 input, Gemma's offset
 3  one row, three leading dimensions          9  dropout and a bias
 4  N wider than one block, Llama's order     10  dropout, rows that start inside a group of four random words
 5  N = 1                                     11  a bias alone, Llama's order
 6  no rows                                   12  dropout, N wider than one block

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467; dropout: Srivastava et al.
(JMLR 2014).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_same_device, check_vector
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
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
from .rms_norm import check_scale, shapes, unrounded_backward
from .rms_norm import forward as norm_forward
from .rms_norm import peer as norm_peer
from .rms_norm import terms as norm_terms

__all__ = ["add_rms_norm"]


def forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, x_bias: Tensor | None, seed: Tensor | None, eps: float,
    offset: float, casting: str, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual (..., N) -> y and residual_out like x, rstd (...)."""
    residual_out = residual_sum(x, residual, x_bias, seed, dropout_p)
    y, rstd = norm_forward(residual_out, weight, eps, offset, casting)
    return y, residual_out, rstd


def backward(
    d_y: Tensor | None, d_residual_out: Tensor | None, weight: Tensor | None, residual_out: Tensor, rstd: Tensor,
    seed: Tensor | None, eps: float, offset: float, casting: str, dropout_p: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """d_y, d_residual_out (..., N) -> d x and d residual like them, dweight, d x_bias (N) in float32."""
    of_x, of_residual, of_weight, of_x_bias = needs
    d: Tensor | None
    if d_y is None:
        assert d_residual_out is not None
        d = wide(d_residual_out)
        dweight = rstd.new_zeros(residual_out.shape[-1]) if of_weight else None
    else:
        wanted = (of_x or of_residual or of_x_bias, of_weight)
        d, dweight = unrounded_backward(d_y, residual_out, weight, rstd, offset, casting, wanted)
        if d is not None and d_residual_out is not None:
            d = d + d_residual_out
    if d is None:
        return None, None, dweight, None
    split = (of_x, of_residual, of_x_bias)
    dx, d_residual, d_x_bias = split_gradient(d, residual_out.dtype, seed, dropout_p, split)
    return dx, d_residual, dweight, d_x_bias


def outputs(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """y, residual_out; rstd."""
    like_x = Spec(tuple(x.shape), x.dtype)
    return like_x, like_x, Spec(tuple(x.shape[:-1]), torch.float64 if x.dtype == torch.float64 else torch.float32)


def gradients(
    d_y: Any, d_residual_out: Any, weight: Any, residual_out: Tensor, rstd: Tensor, *rest: Any
) -> tuple[Spec, ...]:
    """d x, d residual, dweight, d x_bias."""
    like_x = Spec(tuple(residual_out.shape), residual_out.dtype)
    parameter = Spec((residual_out.shape[-1],), rstd.dtype)
    return like_x, like_x, parameter, parameter


def cost(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0,
    casting: str = "gemma", x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Cost:  # fmt: skip
    """Forward reads two tensors and writes two; backward reads two gradients and the sum, and writes one gradient, with
    dropout two."""
    more = 1.0 if dropout_p else 0.0
    return Cost(5.0 * x.numel(), 4.0 * x.nbytes, 10.0 * x.numel(), (4.0 + more) * x.nbytes)


def peer(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0,
    casting: str = "gemma", x_bias: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today."""
    total = peer_sum(x, residual, x_bias, dropout_p, seed)
    return norm_peer(total, weight, eps, offset=offset, casting=casting), total


def terms(
    upstream: list[Tensor], x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *,
    offset: float = 0.0, casting: str = "gemma", x_bias: Tensor | None = None, dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """rms_norm's, and the gradient that reaches the sum itself."""
    total = peer_sum(x, residual, x_bias, dropout_p, seed)
    of_norm = norm_terms(upstream, total, weight, eps, offset=offset, casting=casting)["x"]
    return sum_terms(upstream, of_norm, dropout_p)


_f32 = torch.float32
_key = Values([0x1234_5678_9ABC_DEF0], torch.int64)
_row = [[3.0, -1.0, 0.5, 2.0, -4.0, 0.0, 1.0, 8.0]]


def _sample(edge: str, shape: tuple[int, ...], shift: float = 0.0, **more: Any) -> Sample:
    return Sample(edge, x=Normal(shape), residual=Normal(shape, shift=shift), **more)


samples = (
    _sample("1 rows", (5, 96), weight=Normal((96,))),
    _sample("2 plain", (3, 33), eps=1e-3),
    _sample("3 one row, 3-D", (1, 1, 64), weight=Normal((64,))),
    _sample("4 wide, Llama", (3, 8300), weight=Normal((8300,)), casting="llama"),
    _sample("5 N = 1", (4, 1), weight=Normal((1,))),
    _sample("6 no rows", (0, 16), weight=Normal((16,)), x_bias=Normal((16,)), dropout_p=0.1, seed=_key),
    Sample("7 rows of 0", x=Values(_row), residual=Values([[-v for v in _row[0]]]), weight=Normal((8,))),
    _sample("8 float32 weight, offset", (7, 48), weight=Normal((48,), dtype=_f32), offset=1.0),
    _sample("9 dropout and bias", (2, 9, 72), weight=Normal((72,)), x_bias=Normal((72,)), dropout_p=0.3, seed=_key),
    _sample("10 dropout, odd rows", (5, 37), weight=Normal((37,)), dropout_p=0.5, seed=Values(-2, torch.int64)),
    _sample("11 bias alone, Llama", (6, 20), weight=Normal((20,)), x_bias=Normal((20,), dtype=_f32), casting="llama"),
    _sample("12 dropout, wide", (2, 8201), dropout_p=0.1, seed=_key),
)  # fmt: skip

errors = (
    *bad_sums,
    Bad("casting", ValueError, r"casting: .*'mistral'.*gemma, llama", x=Normal((2, 4)), residual=Normal((2, 4)),
        casting="mistral"),
    Bad("offset alone", ValueError, r"offset: .*1\.0 without a weight", x=Normal((2, 4)), residual=Normal((2, 4)),
        offset=1.0),
)  # fmt: skip


def random(pick: Pick) -> Sample:
    """Any number of leading dimensions, with and without parameters of either dtype, with and without dropout."""
    n = pick.integer(1, 300)
    shape = (*(pick.integer(0, 5) for _ in range(pick.integer(0, 3))), n)
    parameter = Normal((n,), dtype=pick.one_of(None, _f32))
    weight = pick.one_of(None, parameter)
    return _sample(
        "random", shape, shift=pick.one_of(0.0, 3.0), weight=weight, eps=pick.one_of(1e-6, 1e-3),
        offset=pick.one_of(0.0, 1.0) if weight is not None else 0.0, casting=pick.one_of("gemma", "llama"),
        x_bias=pick.one_of(None, parameter), dropout_p=pick.one_of(0.0, 0.1, 0.5, 1.0),
        seed=Integers((1,), -(2**63), 2**63 - 1),
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 768, dropout_p: float = 0.0) -> Sample:
    """Activations and residual (rows, columns) with a float32 weight; with dropout also a bias of x."""
    parameter = Normal((columns,), dtype=_f32)
    more: dict[str, Any] = {"x_bias": parameter, "dropout_p": dropout_p, "seed": _key} if dropout_p else {}
    return _sample("case", (rows, columns), weight=parameter, **more)


op = register(
    Op(
        name="add_rms_norm",
        schema="(Tensor x, Tensor residual, Tensor? weight, Tensor? x_bias, Tensor? seed, float eps, float offset, "
        "str casting, float dropout_p) -> (Tensor y, Tensor residual_out, Tensor rstd)",
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
        grads=("x", "residual", "weight", "x_bias"),
        shared=(("residual", "x"),),
        shared_when=lambda eps, offset, casting, dropout_p: shares_gradient(dropout_p),
        accumulates=("weight", "x_bias"),
        saved=("weight", "residual_out", "rstd", "seed"),
        results=2,
    )
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: str = "gemma",
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    tape: Any = None,
) -> tuple[Tensor, Tensor]:
    """residual + dropout(x + x_bias), and its root-mean-square normalisation over the last dimension.

    Args:
        x, residual: (..., N), floating-point, N >= 1, of one shape. Of two dtypes, both are first converted
            to the one that PyTorch promotes them to (bfloat16 and float32 to float32).
        weight: (N,), of that dtype or float32; None for 1.
        eps: added to the mean square; >= 0.
        offset: added to weight in float32, as Gemma adds 1; only with a weight.
        casting: "gemma" or "llama", the order of rounding, as for `rms_norm`.
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

    Source: Zhang, Sennrich (2019), arXiv:1910.07467; Srivastava et al. (JMLR 2014) for dropout.
    """
    x, residual, seed = check_sum(x, residual, x_bias, dropout_p, seed)
    check_vector("weight", weight, x)
    check_same_device(x=x, weight=weight)
    check_scale(weight, offset, casting)
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; allowed: >= 0")
    y, residual_out = op(
        x, residual, weight, x_bias, seed, float(eps), float(offset), casting, float(dropout_p), tape=tape
    )
    return y, residual_out
