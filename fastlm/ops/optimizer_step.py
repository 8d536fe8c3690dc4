"""What the optimizer ops share: the norm, the decision whether a step counts, clipping, decay, rounding, the checks.

    norm = sqrt(sum(grad**2)), or the one that is given        clip = min(1, max_norm / (norm + 1e-6))
    with offsets: clip of each segment from its own norm; the norm of the whole buffer still decides whether to skip

If the norm is not finite nothing changes, skipped is 1, and only zero_grad is still done. An infinite or NaN norm that
is given skips the step; a finite one saves the pass over the gradient, and with max_norm 0 nothing is skipped.

Squares are summed in float64, in an order that depends on the sizes alone: a gradient of 1e30, whose square float32
cannot hold, has the right norm, and a run repeats bit for bit. All else is float32 (float64 for a float64 master).

Stochastic rounding, where a seed is given, of what is stored in bfloat16 (master and states, never param): the upper 16
bits of (bits of the float32 + r), with r uniform in [0, 2**16): up or down with the probability that makes the mean
exact. Step t takes r of element i from word i & 3 of Philox at the counter (i >> 2, its upper half, t, pair): the lower
half for state or master number 2 * pair, the upper for 2 * pair + 1, the master being the last number. Nothing but seed
and step is kept, so a run that is resumed rounds as one that never stopped. NaN and infinities stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..philox import philox_lanes
from ..registry import Cost
from ..samples import Bad, Integers, Normal, Values

__all__: list[str] = []

_f32, _bf16, _f16 = torch.float32, torch.bfloat16, torch.float16

MASK_RUN = 64
"""Elements that one flag of a short decay_mask stands for."""

SCHEMA_HEAD = "Tensor(a!) master, Tensor(b!) grad"
SCHEMA_SHARED = (
    "Tensor(e!) step, Tensor(f!)? param, Tensor? decay_mask, Tensor? seed, Tensor? norm, Tensor? offsets, Tensor lr"
)


def widened(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for masters of this dtype."""
    return torch.float64 if dtype == torch.float64 else _f32


def joined(master: Tensor, trail: Tensor | None) -> Tensor:
    """The weights: masters, or the float32 numbers of which they are the upper halves and `trail` the lower."""
    if trail is None:
        return master
    bits = (master.to(_bf16).view(torch.int16).to(torch.int32) << 16) + trail
    return bits.view(_f32).to(widened(master.dtype))


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(bfloat16, int16) halves of float32 numbers: the upper is the number rounded to nearest, halves away from zero, and
    the lower, with its sign, what is to be added to its bits."""
    bits = weights.float().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(_bf16), (bits - (upper << 16)).to(torch.int16)


class Begun(NamedTuple):
    """What is known before the update: all in the wide dtype but `applied` (bool) and t (float64, this step counted)."""

    grad: Tensor  # clipped
    norm: Tensor
    applied: Tensor
    t: Tensor


def begin(
    master: Tensor, grad: Tensor, step: Tensor, norm: Tensor | None, offsets: Tensor | None, max_norm: float
) -> Begun:
    """Take the norm and clip a copy of the gradient."""
    g = grad.to(widened(master.dtype))
    clipping = 0.0 < max_norm < math.inf

    def clip(length: Tensor) -> Tensor:
        return (max_norm / (length + 1e-6)).clamp(max=1.0)

    if norm is not None:
        total = norm.to(g.dtype)
    else:
        total = torch.linalg.vector_norm(g, dtype=torch.float64).to(g.dtype)
    if clipping and offsets is not None and g.numel():
        squares = torch.segment_reduce(g.double().square(), "sum", offsets=offsets, unsafe=True)
        segment = torch.bucketize(torch.arange(g.numel(), device=g.device), offsets[1:-1], right=True)
        g = g * clip(squares.sqrt().to(g.dtype))[segment]
    elif clipping:
        g = g * clip(total)
    return Begun(g, total, total.isfinite(), step.double() + 1.0)


def decay_of(
    weights: Tensor, decay_mask: Tensor | None, lr: Tensor | None, weight_decay: float
) -> Tensor:
    """weight_decay, times lr if there is one, for each element or for all."""
    # 0-dimensional, so that float64 here does not widen what it multiplies
    decay = weight_decay * (lr.double() if lr is not None else torch.ones((), dtype=torch.float64, device=weights.device))
    return decay if decay_mask is None else whole_mask(decay_mask, weights.numel()) * decay.to(weights.dtype)


def whole_mask(decay_mask: Tensor, n: int) -> Tensor:
    """(n,) bool of a mask with a flag for each element or each MASK_RUN of them."""
    mask = decay_mask != 0
    return mask if mask.numel() == n else mask.repeat_interleave(MASK_RUN)[:n]


def random_words(seed: Tensor, t: Tensor, n: int, number: int) -> Tensor:
    """r of n elements for the tensor of this number, int64 in [0, 2**16)."""
    counter = torch.arange((n + 3) // 4, device=seed.device)
    words = philox_lanes(seed, counter & 0xFFFFFFFF, counter >> 32, t.long() & 0xFFFFFFFF, number // 2)[:n]
    return words >> 16 if number % 2 else words & 0xFFFF


def rounded(new: Tensor, old: Tensor, seed: Tensor | None, t: Tensor, number: int) -> Tensor:
    """`new` in the dtype of `old`: to nearest, or with a seed and in bfloat16 stochastically."""
    if seed is None or old.dtype != _bf16:
        return new.to(old.dtype)
    new = new.float()
    bits = new.view(torch.int32).long() + random_words(seed, t, new.numel(), number).view(new.shape)
    up = (bits >> 16 << 16).to(torch.int32).view(_f32)
    return torch.where(new.isfinite(), up, new).to(_bf16)


def commit(
    begun: Begun, master: Tensor, new_master: Tensor, states: Sequence[tuple[Tensor | None, Tensor]], step: Tensor,
    param: Tensor | None, seed: Tensor | None, grad: Tensor, zero_grad: bool, trail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write what is new, if the step counts -> grad_norm and skipped."""
    kept = [(old, new) for old, new in states if old is not None]
    if trail is not None:
        new_master, lower = split(new_master)
        trail.copy_(torch.where(begun.applied, lower, trail))
    for number, (old, new) in enumerate([*kept, (master, new_master)]):
        old.copy_(torch.where(begun.applied, rounded(new, old, seed, begun.t, number), old))
    for other, new in ((step, begun.t), (param, new_master)):
        if other is not None:
            other.copy_(torch.where(begun.applied, new.to(other.dtype), other))
    if zero_grad:
        grad.zero_()
    return begun.norm.clone(), (~begun.applied).to(begun.norm.dtype)


def cost(
    flops: float, master: Tensor, grad: Tensor, states: Sequence[Tensor | None], step: Tensor, zero_grad: bool,
    norm: Tensor | None, *others: Tensor | None,
) -> Cost:  # fmt: skip
    """Reads grad twice unless its norm is given, reads and writes master and states, moves the others once."""
    changed = sum(t.nbytes for t in (master, step, *states) if t is not None)
    passes = (1 if norm is not None else 2) + zero_grad
    rest = sum(t.nbytes for t in others if t is not None)
    return Cost(flops * max(master.numel(), 1), 2.0 * changed + passes * grad.nbytes + rest)


# What changes the weights of one group in place: (weights, gradient, states, weight decay, skipped).
Update = Callable[[Tensor, Tensor, list[Tensor], float, Tensor], None]


def torch_step(
    update: Update, master: Tensor, grad: Tensor, states: Sequence[Tensor], step: Tensor, *, param: Tensor | None,
    decay_mask: Tensor | None, seed: Tensor | None, norm: Tensor | None, offsets: Tensor | None, weight_decay: float,
    max_norm: float, zero_grad: bool, trail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a PyTorch user writes today: the usual clip, the optimizer, a copy; a mask makes two groups."""
    wide = widened(master.dtype)
    g = grad.to(wide)
    total = torch.linalg.vector_norm(g) if norm is None else norm.to(wide)
    skipped = (~total.isfinite()).to(wide)
    if 0.0 < max_norm < math.inf:
        parts = [g] if offsets is None else list(g.split(offsets.diff().tolist()))
        norms = [total] if offsets is None else [torch.linalg.vector_norm(part) for part in parts]
        clips = [(max_norm / (length + 1e-6)).clamp(max=1.0) for length in norms]
        g = torch.cat([part * clip for part, clip in zip(parts, clips, strict=True)])
    mask = None if decay_mask is None else whole_mask(decay_mask, master.numel())
    rows: list[Any] = [slice(None)] if mask is None else [mask, ~mask]
    old = [*states, master]
    new = [t.to(wide, copy=True) for t in (*states, joined(master, trail))]
    for row, decay in zip(rows, (weight_decay, 0.0), strict=False):
        parts = [t[row] for t in new]
        update(parts[-1], g[row], parts[:-1], decay, skipped)
        for whole, part in zip(new, parts, strict=True):
            whole[row] = part
    t = step.double() + 1.0
    if trail is not None:
        new[-1], lower = split(new[-1])
        trail.copy_(torch.where(skipped > 0, trail, lower))
    for number, (before, after) in enumerate(zip(old, new, strict=True)):
        before.copy_(torch.where(skipped > 0, before, rounded(after, before, seed, t, number)))
    step.copy_(torch.where(skipped > 0, step, t.to(step.dtype)))
    if param is not None:
        param.copy_(torch.where(skipped > 0, param, master.to(param.dtype)))
    if zero_grad:
        grad.zero_()
    return total, skipped


# --- the checks


def check_buffer(
    name: str, t: object, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], changes: bool = True
) -> None:
    """A tensor of this shape and one of these dtypes, contiguous if the op changes it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}; allowed: a tensor")
    if t.shape != shape:
        allowed = f"{shape}, the shape of master" if shape else "a 0-dimensional tensor"
        raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: {allowed}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {t.dtype}; allowed: {', '.join(map(str, dict.fromkeys(dtypes)))}")
    if changes and not t.is_contiguous():
        raise ValueError(f"{name}: got strides {t.stride()}; allowed: contiguous, since it is changed in place")


def check(
    master: Tensor, grad: Tensor, states: dict[str, Tensor | None], step: Tensor, *, param: Tensor | None,
    decay_mask: Tensor | None, seed: Tensor | None, norm: Tensor | None, offsets: Tensor | None, lr: float | Tensor,
    matrix: bool = False, trail: Tensor | None = None, **numbers: float,
) -> Tensor:  # fmt: skip
    """Raise for what no optimizer op takes; `numbers` must be >= 0. Returns lr as a tensor on the device."""
    check_floating("master", master)
    if master.dim() != 1 and not (matrix and master.dim() == 2):
        allowed = "(n,) or (rows, columns)" if matrix else "(n,), one flat buffer"
        raise ValueError(f"master: got shape {tuple(master.shape)}; allowed: {allowed}")
    shape, wide = tuple(master.shape), widened(master.dtype)
    check_buffer("master", master, shape, (master.dtype,))
    narrow = () if wide == torch.float64 else (_bf16,)
    check_buffer("grad", grad, shape, (wide, master.dtype, *narrow, *((_f16,) if narrow else ())))
    for name, t in states.items():
        check_buffer(name, t, shape, (wide, master.dtype, *narrow))
    check_buffer("step", step, (), (wide, _f32, torch.int64))
    if param is not None:
        if master.dtype != wide:
            raise ValueError(f"param: got a tensor; allowed: None with a master in {master.dtype}, which is the parameter")
        check_buffer("param", param, shape, (wide, _f32, _bf16, _f16))
    if trail is not None:
        if master.dtype != _bf16:
            raise ValueError(f"trail: got a tensor; allowed: None with a master in {master.dtype}, only bfloat16 has one")
        check_buffer("trail", trail, shape, (torch.int16,))
    if decay_mask is not None:
        short = (-(-master.numel() // MASK_RUN),)
        fits = isinstance(decay_mask, Tensor) and decay_mask.shape == short
        check_buffer("decay_mask", decay_mask, short if fits else shape, (torch.bool, torch.uint8), changes=False)
    if seed is not None:
        _check_seed(seed)
    if norm is not None:
        check_buffer("norm", norm, (), (wide,), changes=False)
    if offsets is not None:
        _check_offsets(offsets, norm)
    if isinstance(lr, Tensor):
        check_buffer("lr", lr, (), (wide,), changes=False)
    elif not 0.0 <= lr < math.inf:
        raise ValueError(f"lr: got {lr}; allowed: a finite number >= 0")
    for name, value in numbers.items():
        if not value >= 0.0:
            raise ValueError(f"{name}: got {value}; allowed: >= 0")
    rate = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=wide, device=master.device)
    check_same_device(
        master=master, grad=grad, **states, step=step, param=param, decay_mask=decay_mask, seed=seed, norm=norm,
        offsets=offsets, lr=rate, trail=trail,
    )  # fmt: skip
    return rate


def _check_seed(seed: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed: got {type(seed).__name__}; allowed: a tensor of dtype int64, or None")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: got dtype {seed.dtype}; allowed: torch.int64")
    if seed.numel() != 1:
        raise ValueError(f"seed: got shape {tuple(seed.shape)}; allowed: one element")


def _check_offsets(offsets: Tensor, norm: Tensor | None) -> None:
    if norm is not None:
        raise ValueError("offsets: got a tensor; allowed: None together with norm, which is one for all segments")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int64:
        given = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"offsets: got {given}; allowed: a tensor of dtype torch.int64, or None")
    if offsets.dim() != 1 or offsets.numel() < 2:
        raise ValueError(f"offsets: got shape {tuple(offsets.shape)}; allowed: (segments + 1,), one segment or more")


def check_betas(betas: Sequence[float]) -> tuple[float, float]:
    """Two decay rates."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas: got {betas}; allowed: two numbers in [0, 1)")
    return float(betas[0]), float(betas[1])


# --- samples


def buffers(n: int, *states: str, first: bool = False, scale: float = 1.0, dtype: torch.dtype = _f32) -> dict[str, Any]:
    """Masters, a gradient of that scale, states (zero at the first step; "exp_avg_sq" positive) and the count."""
    made: dict[str, Any] = {"master": Normal((n,), dtype=dtype), "grad": Normal((n,), scale, dtype=_f32)}
    for name in states:
        shift = 1.0 if name == "exp_avg_sq" and not first else 0.0
        made[name] = Normal((n,), 0.0 if first else 0.1, shift, _f32)
    return made | {"step": Values(0.0 if first else 7.0, _f32)}


def model_copy(n: int, mask: torch.dtype = torch.bool) -> dict[str, Any]:
    """The model-dtype copy, and a mask that holds for half of the elements."""
    return {"param": Normal((n,)), "decay_mask": Integers((n,), 0, 2, mask)}


def narrow(n: int, *states: str, first: bool = False) -> dict[str, Any]:
    """Masters, gradient and states in bfloat16, and a seed."""
    made = buffers(n, *states, first=first)
    made |= {k: v.__class__(v.shape, v.scale, v.shift, _bf16) for k, v in made.items() if isinstance(v, Normal)}
    return made | {"seed": Values([0x1234_5678_9ABC_DEF0], torch.int64)}


def halves(n: int) -> dict[str, Any]:
    """Masters in two halves."""
    return {"master": Normal((n,), dtype=_bf16), "trail": Integers((n,), -(2**15), 2**15, torch.int16)}


def bad_calls(*states: str) -> list[Bad]:
    """Calls that every optimizer op refuses."""

    def bad(edge: str, error: type[Exception], text: str, **changed: Any) -> Bad:
        return Bad(edge, error, text, **buffers(4, *states) | {"lr": 0.1} | changed)

    f64, i64, mask = torch.float64, torch.int64, torch.bool
    first = states[0]
    return [
        bad("master dtype", TypeError, r"master: .*int32.*float32", master=Values([1, 2, 3, 4], torch.int32)),
        bad("master 2-D", ValueError, r"master: .*\(2, 2\).*\(n,\)", master=Normal((2, 2), dtype=_f32)),
        bad("grad shape", ValueError, r"grad: .*\(3,\).*\(4,\)", grad=Normal((3,), dtype=_f32)),
        bad("grad dtype", TypeError, r"grad: .*float64.*float32", grad=Normal((4,), dtype=f64)),
        bad(f"{first} dtype", TypeError, rf"{first}: .*float64.*bfloat16", **{first: Normal((4,), dtype=f64)}),
        bad("step shape", ValueError, r"step: .*\(1,\).*0-dimensional", step=Values([1.0], _f32)),
        bad("step dtype", TypeError, r"step: .*int32.*int64", step=Values(1, torch.int32)),
        bad("step number", TypeError, r"step: .*int.*tensor", step=3),
        bad("param dtype", TypeError, r"param: .*int32", param=Values([1, 2, 3, 4], torch.int32)),
        bad("param shape", ValueError, r"param: .*\(5,\).*\(4,\)", param=Normal((5,))),
        bad("param of bfloat16", ValueError, r"param: .*None.*bfloat16", master=Normal((4,), dtype=_bf16), param=Normal((4,))),
        bad("mask dtype", TypeError, r"decay_mask: .*float32.*bool", decay_mask=Normal((4,), dtype=_f32)),
        bad("mask shape", ValueError, r"decay_mask: .*\(2,\).*\(4,\)", decay_mask=Integers((2,), 0, 2, mask)),
        bad("seed float", TypeError, r"seed: .*float32.*int64", seed=Values([1.0], _f32)),
        bad("seeds", ValueError, r"seed: .*\(2,\).*one element", seed=Values([1, 2], i64)),
        bad("norm shape", ValueError, r"norm: .*\(1,\).*0-dimensional", norm=Values([1.0], _f32)),
        bad("norm dtype", TypeError, r"norm: .*float64.*float32", norm=Values(1.0, f64)),
        bad("offsets dtype", TypeError, r"offsets: .*int32.*int64", offsets=Values([0, 4], torch.int32)),
        bad("offsets shape", ValueError, r"offsets: .*\(1,\).*segments", offsets=Values([0], i64)),
        bad("offsets and norm", ValueError, r"offsets: .*norm", offsets=Values([0, 4], i64), norm=Values(1.0, _f32)),
        bad("lr negative", ValueError, r"lr: .*-0.1", lr=-0.1),
        bad("lr tensor dtype", TypeError, r"lr: .*float16.*float32", lr=Values(0.1, torch.float16)),
        bad("lr tensor shape", ValueError, r"lr: .*\(2,\).*0-dimensional", lr=Values([0.1, 0.1], _f32)),
        bad("weight_decay negative", ValueError, r"weight_decay: .*-0.01", weight_decay=-0.01),
        bad("max_norm NaN", ValueError, r"max_norm: .*nan", max_norm=math.nan),
    ]  # fmt: skip
