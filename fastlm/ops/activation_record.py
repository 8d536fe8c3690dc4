"""The records of the activations `act(x + bias)`: what gelu, silu, relu and relu_squared share beside the formula.

Schema: (x, bias, seed, <form>, dropout_p) -> y, where <form> is gelu's `approximate` and nothing for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dropout, check_floating, check_same_device, check_vector
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from . import activation_math as math_of
from .dropout import keep_mask

__all__: list[str] = []

_f32 = torch.float32
KEY = Values([0x1234_5678_9ABC_DEF0], torch.int64)
TAILS = Values([[-1e4, -30.0, -12.0, -10.0, -6.0, -3.0, 0.01, 3.0, 6.0, 13.0, 1e4]])


def form_of(name: str, options: Sequence[Any]) -> str:
    """The row of activation_math's table for an op's name and what it was called with."""
    return f"{name}_{options[0]}" if len(options) > 1 else name


def samples_of(**more: Any) -> tuple[Sample, ...]:
    """Edge cases 1 to 9 of every activation. more: what a form needs."""
    return (
        Sample("1 rows", x=Normal((5, 37), scale=2.0), bias=Normal((37,)), **more),
        Sample("2 no bias, 3-D", x=Normal((2, 3, 20)), **more),
        Sample("3 blocks", x=Normal((70, 300)), bias=Normal((300,)), **more),
        Sample("4 one element", x=Normal((1,)), bias=Normal((1,)), **more),
        Sample("5 no rows", x=Normal((0, 16)), bias=Normal((16,)), **more),
        Sample("6 float32 bias", x=Normal((7, 48)), bias=Normal((48,), dtype=_f32), **more),
        Sample("7 tails", x=TAILS, **more),
        Sample("8 dropout", x=Normal((5, 67)), bias=Normal((67,)), dropout_p=0.3, seed=KEY, **more),
        Sample("8 dropout, aligned", x=Normal((9, 520)), bias=Normal((520,)), dropout_p=0.5, seed=KEY, **more),
        Sample("9 all dropped", x=Normal((3, 8)), dropout_p=1.0, seed=KEY, **more),
    )


errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([1, 2], torch.int64)),
    Bad("bias shape", ValueError, r"bias: .*\(3,\).*\(4,\)", x=Normal((2, 4)), bias=Normal((3,))),
    Bad("bias dtype", TypeError, r"bias: .*float64", x=Normal((2, 4)), bias=Normal((4,), dtype=torch.float64)),
    Bad("scalar and bias", ValueError, r"x: .*0-dimensional.*bias", x=Values(1.0), bias=Values(1.0)),
    Bad("dropout_p", ValueError, r"dropout_p: .*1\.5.*0 to 1", x=Normal((4,)), dropout_p=1.5),
    Bad("seed float", TypeError, r"seed: .*float32.*int64", x=Normal((4,)), dropout_p=0.5, seed=Values([1.0])),
)


def random_of(pick: Pick, **more: Any) -> Sample:
    """Any number of leading dimensions, with and without a bias of either dtype and dropout."""
    n = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 3)))
    dropout = {"dropout_p": pick.real(0.05, 1.0), "seed": Integers((1,), -(2**63), 2**63 - 1)}
    return Sample(
        "random", x=Normal((*lead, n), pick.one_of(1.0, 6.0)),
        bias=pick.one_of(None, Normal((n,), dtype=pick.one_of(None, _f32))), **pick.one_of({}, dropout), **more,
    )  # fmt: skip


def case(rows: int = 2048, columns: int = 3072) -> Sample:
    """Activations (rows, columns), no bias."""
    return Sample("case", x=Normal((rows, columns)))


shapes: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "default": ({"rows": 2048, "columns": 768}, {"rows": 8192, "columns": 1024}, {"rows": 512, "columns": 4096}),
    "sweep": tuple({"rows": rows, "columns": 3072} for rows in (64, 512, 4096, 16384)),
    "large": ({"rows": 2**16, "columns": 3072},),
}


def register_activation(
    name: str, plain: Callable[..., Tensor], option: str = "", *, samples: Sequence[Sample] | None = None,
    bad: Sequence[Bad] = (), flops: tuple[float, float] = (10.0, 15.0), **fields: Any,
) -> Op:  # fmt: skip
    """The op `name`.

    plain: PyTorch's own function of (x, **<form>).
    option: the schema's text of <form>, e.g. "str approximate"; empty for none.
    samples, fields: of the record, where they are not the common ones; bad: errors beside the common ones.
    flops: operations an element, forward and backward.
    """

    def forward(x: Tensor, bias: Tensor | None, seed: Tensor | None, *options: Any) -> tuple[Tensor]:
        y = math_of.act(form_of(name, options), math_of.biased(x, bias))
        return (math_of.dropped(y, seed, options[-1]).to(x.dtype),)

    def backward(
        dy: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        *options, needs = rest
        slope = math_of.derivative(form_of(name, options), math_of.biased(x, bias))
        dx = math_of.dropped(dy.to(slope.dtype), seed, options[-1]) * slope
        return dx.to(x.dtype) if needs[0] else None, math_of.row_sum(dx) if needs[1] else None

    def outputs(x: Tensor, *rest: Any) -> tuple[Spec]:
        return (Spec(tuple(x.shape), x.dtype),)

    def gradients(dy: Tensor, x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Spec, Spec]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return Spec(tuple(x.shape), x.dtype), Spec(() if bias is None else tuple(bias.shape), dtype)

    def cost(x: Tensor, *args: Any, **options: Any) -> Cost:
        """Reads x, writes y; reads x and dy, writes dx."""
        return Cost(flops[0] * x.numel(), 2.0 * x.nbytes, flops[1] * x.numel(), 3.0 * x.nbytes)

    def peer(
        x: Tensor, bias: Tensor | None = None, *form: Any, dropout_p: float = 0.0, seed: Tensor | None = None,
        **named: Any,
    ) -> Tensor:  # fmt: skip
        """What a PyTorch user writes today, with our mask."""
        y = plain(x if bias is None else x + bias, *form, **named).to(x.dtype)
        if dropout_p == 0.0 or seed is None:
            return y
        return y.masked_fill(~keep_mask(seed, y.shape, dropout_p), 0.0) * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)

    record: dict[str, Any] = {
        "samples": samples_of() if samples is None else samples,
        "errors": (*errors, *bad),
        "random": random_of,
        "case": case,
        "shapes": shapes,
    }
    schema = ", ".join(["Tensor x, Tensor? bias, Tensor? seed", *filter(None, [option]), "float dropout_p"])
    return register(
        Op(
            name=name,
            schema=f"({schema}) -> Tensor y",
            forward=forward,
            backward=backward,
            outputs=outputs,
            gradients=gradients,
            cost=cost,
            peer=peer,
            grads=("x", "bias"),
            accumulates=("bias",),
            saved=("x", "bias", "seed"),
            contiguous=False,
            **(record | fields),
        )
    )


def activate(
    op: Op, x: Tensor, bias: Tensor | None, form: tuple[Any, ...], dropout_p: float, seed: Tensor | None, tape: Any
) -> Tensor:
    """Validate once and apply."""
    check_floating("x", x)
    if bias is not None and x.dim() == 0:
        raise ValueError("x: got a 0-dimensional tensor; allowed: (..., N) with a bias, any shape without")
    check_vector("bias", bias, x)
    seed = check_dropout(dropout_p, seed, x, tape)
    check_same_device(x=x, bias=bias, seed=seed)
    y: Tensor = op(x, bias, seed, *form, float(dropout_p), tape=tape)[0]
    return y
