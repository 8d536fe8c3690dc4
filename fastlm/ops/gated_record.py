"""The records of the gated units `act(gate) * up`: what swiglu, geglu and reglu share beside the activation.

    g = gate + gate_bias        w = up + up_bias        (neither rounded)
    y = dropout(act(g) * w), see dropout.py; the elements are numbered as y's in contiguous order

Gradients, with da = dropout(dy) by the same mask:
    d_gate = da * w * act'(g)        d_gate_bias = sum over rows of d_gate, in float32
    d_up   = da * act(g)             d_up_bias   = sum over rows of d_up, in float32

Saved: the inputs as given and the seed; act(g), its derivative and the mask are computed again.

Schema: (gate, up, gate_bias, up_bias, seed, <form>, up_first, dropout_p) -> y. Without `up`, gate is packed (..., 2 N),
gate_bias is (2 N), and so are their gradients: one tensor, written once. <form> is geglu's `approximate`.
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
from .activation_math import Halves
from .activation_record import KEY
from .dropout import keep_mask

__all__: list[str] = []

_f32 = torch.float32
_FORMS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
_TAILS = [[-1e4, -30.0, -12.0, -6.0, -3.0, 0.01, 3.0, 6.0, 13.0, 1e4]]


def _form(name: str, options: Sequence[Any]) -> str:
    """The row of activation_math's table."""
    return f"{_FORMS[name]}_{options[0]}" if len(options) > 2 else _FORMS[name]


def _split(edge: str, shape: tuple[int, ...], bias: Normal | None = None, **more: Any) -> Sample:
    return Sample(edge, gate=Normal(shape, scale=2.0), up=Normal(shape), gate_bias=bias, up_bias=bias, **more)


def samples_of(**more: Any) -> tuple[Sample, ...]:
    """Edge cases 1 to 9 of every gated unit. more: what a form needs."""
    return (
        _split("1 split, rows", (5, 37), Normal((37,)), **more),
        Sample("2 packed, 3-D", gate=Normal((2, 3, 40), scale=2.0), gate_bias=Normal((40,)), **more),
        Sample("3 packed, up first", gate=Normal((4, 66)), gate_bias=Normal((66,), dtype=_f32), up_first=True, **more),
        _split("4 split, no bias", (3, 20), **more),
        Sample("5 blocks", gate=Normal((40, 600)), gate_bias=Normal((600,)), **more),
        Sample("6 one bias", gate=Normal((6, 16)), up=Normal((6, 16)), up_bias=Normal((16,), dtype=_f32), **more),
        _split("7 no rows", (0, 16), Normal((16,)), **more),
        Sample("8 tails", gate=Values(_TAILS), up=Normal((1, 10)), **more),
        _split("9 dropout", (5, 67), Normal((67,)), dropout_p=0.3, seed=KEY, **more),
        Sample("9 dropout, packed", gate=Normal((5, 1040)), dropout_p=0.5, seed=KEY, **more),
    )


errors = (
    Bad("gate integer", TypeError, r"gate: .*int64.*floating", gate=Values([1, 2], torch.int64)),
    Bad("odd", ValueError, r"gate: .*\(2, 5\).*even", gate=Normal((2, 5))),
    Bad("scalar", ValueError, r"gate: .*0-dimensional", gate=Values(1.0), up=Values(1.0)),
    Bad("up shape", ValueError, r"up: .*\(4,\).*\(2, 4\)", gate=Normal((2, 4)), up=Normal((4,))),
    Bad("up dtype", TypeError, r"up: .*float64.*float32", gate=Normal((2, 4)), up=Normal((2, 4), dtype=torch.float64)),
    Bad("gate_bias shape", ValueError, r"gate_bias: .*\(2,\).*\(4,\)", gate=Normal((2, 4)), gate_bias=Normal((2,))),
    Bad("up_bias packed", ValueError, r"up_bias: .*packed.*gate_bias", gate=Normal((2, 4)), up_bias=Normal((2,))),
    Bad("up_first split", ValueError, r"up_first: .*up", gate=Normal((2, 4)), up=Normal((2, 4)), up_first=True),
    Bad("dropout_p", ValueError, r"dropout_p: .*-1.*0 to 1", gate=Normal((2, 4)), dropout_p=-1.0),
)


def random_of(pick: Pick, **more: Any) -> Sample:
    """Packed in both orders and split, any number of leading dimensions, biases of either dtype, dropout."""
    n = pick.integer(1, 200)
    shape = (*(pick.integer(0, 4) for _ in range(pick.integer(0, 3))), n)
    bias = pick.one_of(None, Normal((n,), dtype=pick.one_of(None, _f32)))
    args: dict[str, Any]
    if pick.one_of(True, False):
        args = {"gate": Normal(shape, scale=3.0), "up": Normal(shape), "gate_bias": bias,
                "up_bias": pick.one_of(None, bias)}  # fmt: skip
    else:
        packed = None if bias is None else Normal((2 * n,), dtype=bias.dtype)
        args = {"gate": Normal((*shape[:-1], 2 * n)), "gate_bias": packed, "up_first": pick.one_of(False, True)}
    dropout = {"dropout_p": pick.real(0.05, 1.0), "seed": Integers((1,), -(2**63), 2**63 - 1)}
    return Sample("random", **args, **pick.one_of({}, dropout), **more)


def case(rows: int = 2048, columns: int = 3072, packed: bool = True) -> Sample:
    """gate and up of (rows, columns) each, no bias."""
    if packed:
        return Sample("case", gate=Normal((rows, 2 * columns)))
    return Sample("case", gate=Normal((rows, columns)), up=Normal((rows, columns)))


shapes: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "default": (
        {"rows": 2048, "columns": 768}, {"rows": 8192, "columns": 1024},
        {"rows": 512, "columns": 4096}, {"rows": 512, "columns": 4096, "packed": False},
    ),
    "sweep": tuple({"rows": rows, "columns": 3072} for rows in (64, 512, 4096, 16384)),
    "large": ({"rows": 2**15, "columns": 8192},),
}  # fmt: skip


def register_gated(
    name: str, plain: Callable[..., Tensor], option: str = "", *, samples: Sequence[Sample] | None = None,
    bad: Sequence[Bad] = (), flops: tuple[float, float] = (10.0, 20.0), **fields: Any,
) -> Op:  # fmt: skip
    """The op `name`. Arguments as register_activation's."""

    def forward(
        gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, seed: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor]:  # fmt: skip
        both = Halves.of(gate, up, gate_bias, up_bias, options[-2])
        y = math_of.act(_form(name, options), both.gate) * both.up
        return (math_of.dropped(y, seed, options[-1]).to(gate.dtype),)

    def backward(
        dy: Tensor, gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None,
        seed: Tensor | None, *rest: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        *options, needs = rest
        form, up_first = _form(name, options), options[-2]
        both = Halves.of(gate, up, gate_bias, up_bias, up_first)
        da = math_of.dropped(dy.to(both.gate.dtype), seed, options[-1])
        d = Halves(da * both.up * math_of.derivative(form, both.gate), da * math_of.act(form, both.gate))
        d_gate, d_up = (d.gate, d.up) if up is not None else (d.packed(up_first), d.up)
        return (
            d_gate.to(gate.dtype) if needs[0] else None,
            d_up.to(gate.dtype) if needs[1] else None,
            math_of.row_sum(d_gate) if needs[2] else None,
            math_of.row_sum(d_up) if needs[3] else None,
        )

    def outputs(gate: Tensor, up: Tensor | None, *rest: Any) -> tuple[Spec]:
        n = gate.shape[-1] // (2 if up is None else 1)
        return (Spec((*gate.shape[:-1], n), gate.dtype),)

    def gradients(
        dy: Tensor, gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, *rest: Any
    ) -> tuple[Spec, ...]:
        wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
        specs = [Spec(() if t is None else tuple(t.shape), gate.dtype) for t in (gate, up)]
        return *specs, *(Spec(() if t is None else tuple(t.shape), wide) for t in (gate_bias, up_bias))

    def cost(gate: Tensor, up: Tensor | None = None, *args: Any, **options: Any) -> Cost:
        """Reads both halves, writes y; reads both and dy, writes the gradients of both."""
        inputs = gate.nbytes + (0 if up is None else up.nbytes)
        n = inputs / 2 / gate.itemsize
        return Cost(flops[0] * n, 1.5 * inputs, flops[1] * n, 2.5 * inputs)

    def peer(
        gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
        *form: Any, up_first: bool = False, dropout_p: float = 0.0, seed: Tensor | None = None, **named: Any,
    ) -> Tensor:  # fmt: skip
        """What a PyTorch user writes today, with our mask."""
        dtype = gate.dtype
        gate = gate if gate_bias is None else gate + gate_bias
        if up is None:
            first, second = gate.chunk(2, -1)
            gate, up = (second, first) if up_first else (first, second)
        elif up_bias is not None:
            up = up + up_bias
        y = (plain(gate, *form, **named) * up).to(dtype)
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
    tensors = "Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias, Tensor? seed"
    schema = ", ".join([tensors, *filter(None, [option]), "bool up_first, float dropout_p"])
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
            grads=("gate", "up", "gate_bias", "up_bias"),
            accumulates=("gate_bias", "up_bias"),
            saved=("gate", "up", "gate_bias", "up_bias", "seed"),
            contiguous=False,
            **(record | fields),
        )
    )


def gated(
    op: Op, gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, form: tuple[Any, ...],
    up_first: bool, dropout_p: float, seed: Tensor | None, tape: Any,
) -> Tensor:  # fmt: skip
    """Validate once and apply."""
    check_floating("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate: got a 0-dimensional tensor; allowed: (..., N), or packed (..., 2 N)")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate: got shape {tuple(gate.shape)} and no up; allowed: an even last dimension")
        if up_bias is not None:
            raise ValueError("up_bias: got one with a packed gate; allowed: a packed gate_bias (2 N,)")
    else:
        check_floating("up", up)
        if up.shape != gate.shape:
            raise ValueError(f"up: got shape {tuple(up.shape)}; allowed: gate's, {tuple(gate.shape)}")
        if up.dtype != gate.dtype:
            raise TypeError(f"up: got dtype {up.dtype}; allowed: gate's, {gate.dtype}")
        if up_first:
            raise ValueError("up_first: got True with up; allowed: only with a packed gate")
        check_vector("up_bias", up_bias, up)
    check_vector("gate_bias", gate_bias, gate)
    seed = check_dropout(dropout_p, seed, gate, tape)
    check_same_device(gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias, seed=seed)
    y: Tensor = op(gate, up, gate_bias, up_bias, seed, *form, up_first, float(dropout_p), tape=tape)[0]
    return y
