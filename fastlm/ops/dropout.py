"""Dropout whose mask is a function of a seed and the place of an element: nothing is stored but the seed.

    word n = word n & 3 of Philox4x32-10 at the counter (low 32 bits of n >> 2, high 32 bits, 0, 0)
    n counts the elements in contiguous order
    y = x / (1 - p)  where  word >= floor(p * 2**32),  else exactly 0 (also for an infinite or NaN x)

Gradient: y is linear in x with the mask as its coefficients, so dx is the same function of dy. The mask is
the same, bit for bit, on every backend, and independent of dtype and strides.

Saved: the seed, one int64 on the device.

Edge cases
 1  several rows, a count that is no multiple of 4      5  empty
 2  a key with its high bits set, three dimensions      6  one element
 3  p = 0: a copy of x                                  7  more than one block
 4  p = 1: zeros                                        8  p that rounds to 1 in float32

Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting" (JMLR 2014);
the generator: Salmon, Moraes, Dror, Shaw (SC 2011), see fastlm/philox.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device, check_seed
from ..philox import drop_threshold, philox_lanes
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values

__all__ = ["dropout"]


def keep_mask(seed: Tensor, shape: torch.Size, p: float) -> Tensor:
    """True where an element of a tensor of this shape is kept."""
    n = shape.numel()
    counter = torch.arange((n + 3) // 4, device=seed.device)
    words = philox_lanes(seed, counter & 0xFFFFFFFF, counter >> 32)
    return (words[:n] >= drop_threshold(p)).view(shape)


def forward(x: Tensor, seed: Tensor, p: float) -> tuple[Tensor]:
    """x of any shape -> y like x."""
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return (torch.where(keep_mask(seed, x.shape, p), x * scale, 0.0),)


def backward(dy: Tensor, seed: Tensor, p: float, needs: tuple[bool]) -> tuple[Tensor | None]:
    """dy -> dx."""
    return forward(dy, seed, p) if needs[0] else (None,)


def outputs(x: Tensor, seed: Tensor, p: float) -> tuple[Spec]:
    """y."""
    return (Spec(tuple(x.shape), x.dtype),)


def gradients(dy: Tensor, seed: Tensor, p: float, needs: Any) -> tuple[Spec]:
    """dx."""
    return (Spec(tuple(dy.shape), dy.dtype),)


def cost(x: Tensor, p: float = 0.5, seed: Tensor | None = None) -> Cost:
    """One read and one write each way; a product an element beside about 25 integer operations."""
    return Cost(1.0 * x.numel(), 2.0 * x.nbytes, 1.0 * x.numel(), 2.0 * x.nbytes)


def peer(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """PyTorch's arithmetic with our mask (its own comes from another stream)."""
    if p == 0.0:
        return x.clone()
    return x.masked_fill(~keep_mask(seed, x.shape, p), 0.0) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


_key = Values([0x1234_5678_9ABC_DEF0], torch.int64)
samples = (
    Sample("1 rows", x=Normal((5, 67)), p=0.3, seed=_key),
    Sample("2 high key, 3-D", x=Normal((2, 3, 40)), p=0.5, seed=Values(-2, torch.int64)),
    Sample("3 p = 0", x=Normal((3, 7)), p=0.0, seed=_key),
    Sample("4 p = 1", x=Normal((3, 7)), p=1.0, seed=_key),
    Sample("5 empty", x=Normal((0, 8)), p=0.1, seed=_key),
    Sample("6 one element", x=Normal(()), p=0.1, seed=_key),
    Sample("7 blocks", x=Normal((5, 4099)), p=0.1, seed=Integers((1,), 0, 2**62)),
    Sample("8 almost 1", x=Normal((64,)), p=1.0 - 2.0**-30, seed=_key),
)

errors = (
    Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([1, 2], torch.int64), p=0.5),
    Bad("p negative", ValueError, r"p: .*-0\.1.*0 to 1", x=Normal((4,)), p=-0.1),
    Bad("p above 1", ValueError, r"p: .*1\.5.*0 to 1", x=Normal((4,)), p=1.5),
    Bad("p NaN", ValueError, r"p: .*nan.*0 to 1", x=Normal((4,)), p=float("nan")),
    Bad("seed float", TypeError, r"seed: .*float32.*int64", x=Normal((4,)), p=0.5, seed=Values([1.0])),
    Bad("seed int", TypeError, r"seed: .*int.*tensor", x=Normal((4,)), p=0.5, seed=3),
    Bad(
        "seeds",
        ValueError,
        r"seed: .*\(2,\).*one element",
        x=Normal((4,)),
        p=0.5,
        seed=Values([1, 2], torch.int64),
    ),
)

def random(pick: Pick) -> Sample:
    """Any shape and probability, both halves of the key."""
    shape = tuple(pick.integer(0, 40) for _ in range(pick.integer(0, 3)))
    seed = Integers((1,), -(2**63), 2**63 - 1)
    return Sample("random", x=Normal(shape), p=pick.one_of(0.1, 0.5, 0.0, 1.0, pick.real(0.0, 1.0)), seed=seed)


def case(rows: int = 2048, columns: int = 768) -> Sample:
    """Activations (rows, columns), a tenth dropped."""
    return Sample("case", x=Normal((rows, columns)), p=0.1, seed=_key)


shapes = {
    "default": ({"rows": 2048, "columns": 768}, {"rows": 8192, "columns": 1024}),
    "sweep": tuple({"rows": rows, "columns": 1024} for rows in (64, 512, 4096, 32768)),
    "large": ({"rows": 2**17, "columns": 1024},),
}


op = register(
    Op(
        name="dropout",
        schema="(Tensor x, Tensor seed, float p) -> Tensor y",
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
        grads=("x",),
        saved=("seed",),
    )
)


def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, tape: Any = None) -> Tensor:
    """x with each element set to 0 with probability p, and the others divided by 1 - p.

    Args:
        x: any shape, floating-point.
        p: 0 to 1.
        seed: int64, one element, on x's device; None draws one from PyTorch's generator of that device. The
            same seed gives the same mask on every backend; it is read on the device.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        y, of x's shape and dtype; never x itself.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Srivastava et al. (JMLR 2014); Salmon et al. (SC 2011) for the generator.
    """
    check_floating("x", x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: got {p}; allowed: 0 to 1")
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    check_seed(seed)
    check_same_device(x=x, seed=seed)
    y: Tensor = op(x, seed, float(p), tape=tape)[0]
    return y
