"""GELU-gated linear unit: one half of a projection through GELU, times the other, and dropout after it.

    g = gate + gate_bias        w = up + up_bias        (neither rounded)
    a(g) = gelu(g) in the form that `approximate` names, a'(g) its derivative: see gelu.py
    y = dropout(a(g) * w), see dropout.py; the elements are numbered as y's in contiguous order

Gradients, with da = dropout(dy) by the same mask:
    d_gate = da * w * a'(g)
    d_up   = da * a(g)
    d_gate_bias, d_up_bias = sums over rows of d_gate, d_up, in float32

Without `up`, gate is packed (..., 2 N) = [gate | up] along the last dimension, its bias and their gradients likewise;
with up_first the halves are [up | gate], the order of torch.nn.functional.glu, which activates the second half.

Saved: the inputs as given and the seed; the activation, its derivative and the mask are computed again.

Edge cases
 1  gate and up apart, N not a power of two    6  a bias of one half only, in float32
 2  packed, three dimensions                   7  no rows
 3  packed with up first                       8  far tails
 4  apart, no biases                           9  dropout, rows that share Philox counters and rows that do not
 5  more than one block of rows and columns  10  the form by erf

Source: Shazeer, "GLU variants improve transformer" (2020), arXiv:2002.05202, section 2.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..samples import Bad, Normal, Pick, Sample
from .gated_record import case, gated, random_of, register_gated, samples_of

__all__ = ["geglu"]


def random(pick: Pick) -> Sample:
    """Both forms."""
    return random_of(pick, approximate=pick.one_of("none", "tanh"))


def geglu_case(rows: int = 2048, columns: int = 3072, packed: bool = True, approximate: str = "tanh") -> Sample:
    """gate and up of (rows, columns) each, no bias."""
    return Sample("case", **case(rows, columns, packed).args, approximate=approximate)


op = register_gated(
    "geglu",
    F.gelu,
    "str approximate",
    samples=(
        *samples_of(approximate="tanh"),
        Sample("10 erf", gate=Normal((5, 74), scale=2.0), gate_bias=Normal((74,))),
    ),
    bad=(Bad("approximate", ValueError, r"approximate: .*erf.*none.*tanh", gate=Normal((4,)), approximate="erf"),),
    flops=(20.0, 35.0),
    random=random,
    case=geglu_case,
)


def geglu(
    gate: Tensor, up: Tensor | None = None, gate_bias: Tensor | None = None, up_bias: Tensor | None = None,
    approximate: str = "none",
    *, up_first: bool = False, dropout_p: float = 0.0, seed: Tensor | None = None, tape: Any = None,
) -> Tensor:  # fmt: skip
    """dropout(gelu(gate + gate_bias) * (up + up_bias)).

    Args:
        gate: (..., N), floating-point, with any strides: the halves of ``x.chunk(2, -1)`` are read where they lie.
            Without up: packed (..., 2 N), [gate | up].
        up: as gate; None if gate is packed.
        gate_bias, up_bias: (N,), of gate's dtype or float32; None for 0. Packed: gate_bias (2 N,) in gate's order.
        approximate: "none" for the normal distribution function, "tanh" for its approximation (T5 v1.1's, Gemma's).
        up_first: packed as [up | gate] instead, as torch.nn.functional.glu has it.
        dropout_p: probability of dropping an element of the result, 0 to 1.
        seed: of the mask, as `fastlm.ops.dropout`'s; None draws one where it is needed.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y (..., N), of gate's dtype. All arithmetic in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Shazeer (2020), arXiv:2002.05202.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: got {approximate!r}; allowed: 'none', 'tanh'")
    return gated(op, gate, up, gate_bias, up_bias, (approximate,), up_first, dropout_p, seed, tape)
