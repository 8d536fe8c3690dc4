"""What cross_entropy is tested and measured on."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from .cross_entropy_math import cap

__all__: list[str] = []


def peer(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean",
    logit_scale: float = 1.0, token_weight: Tensor | None = None, extras: bool = False,
) -> Any:  # fmt: skip
    """What a PyTorch user writes today, and 0 where PyTorch's mean over nothing is NaN. The extras come flat."""
    soft, lead = target.is_floating_point(), logits.shape[:-1]
    x = logits.reshape(lead.numel(), logits.shape[-1])
    if softcap is not None or logit_scale != 1 or z_loss:
        x = cap(x, softcap, logit_scale)
    flat = target.reshape(x.shape).to(x.dtype) if soft else target.reshape(-1)
    valid = torch.ones(len(x), dtype=torch.bool, device=x.device) if soft else flat != ignore_index
    if weight is not None:
        weight = weight.to(x.dtype)
    counts = valid.to(x.dtype)
    if weight is not None and not soft:
        counts = counts * weight[flat.where(valid, 0)]
    u = valid.to(x.dtype) if token_weight is None else token_weight.reshape(-1).to(x.dtype).where(valid, 0.0)
    options: dict[str, Any] = {"label_smoothing": label_smoothing} | ({} if soft else {"ignore_index": ignore_index})
    if reduction == "mean" and (counts * u).sum() == 0:
        loss = (x * 0.0).sum()
    elif token_weight is None:
        loss = F.cross_entropy(x, flat, weight, reduction=reduction, **options)
    else:
        loss = F.cross_entropy(x, flat, weight, reduction="none", **options) * u
        loss = loss if reduction == "none" else loss.sum() / ((counts * u).sum() if reduction == "mean" else 1)
    z = torch.zeros_like(loss)
    if z_loss or extras:
        lse = torch.logsumexp(x, -1)
        z = z_loss * lse.square() * u
        if reduction != "none":
            z = z.sum() / (torch.where(u.sum() == 0, 1.0, u.sum()) if reduction == "mean" else 1)
        loss = loss + z
    if reduction == "none":
        loss, z = loss.reshape(lead), z.reshape(lead)
    if not extras:
        return loss
    p = x.detach().softmax(-1)
    hit = valid & (logits.reshape(x.shape).argmax(-1) == (flat.argmax(-1) if soft else flat))
    confidence, entropy = p.amax(-1).where(valid, 0.0), torch.special.entr(p).sum(-1).where(valid, 0.0)
    return loss, z, lse.where(valid, 0.0).reshape(lead), *(t.reshape(lead) for t in (hit, confidence, entropy))


def _target(*values: int) -> Values:
    return Values(list(values), torch.int64)


_f32, _i64 = torch.float32, torch.int64
_every = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7}


class Probabilities(Normal):
    """The softmax over the last dimension of normal numbers."""

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return super().draw(generator, torch.float64).softmax(-1).to(self.dtype or dtype)


samples = (
    Sample("1 leading dimensions", logits=Normal((2, 3, 67)), target=Integers((2, 3), 0, 67)),
    Sample("11 sum, every option", logits=Normal((6, 50), 3.0), target=_target(3, -100, 49, 0, 7, 7),
           reduction="sum", weight=Normal((50,), 0.2, 1.0), **_every),
    Sample("2 no leading dimension", logits=Normal((33,)), target=Values(4, _i64), z_loss=1e-3),
    Sample("3 ignored", logits=Normal((5, 40)), target=_target(1, 7, 39, 7, 0), ignore_index=7),
    Sample("4 smoothing", logits=Normal((4, 40), 2.0), target=_target(1, -100, 39, 0), label_smoothing=0.2),
    Sample("5 weights and smoothing", logits=Normal((4, 40)), target=_target(1, -100, 39, 0),
           weight=Normal((40,), 0.3, 1.0), label_smoothing=0.1),
    Sample("6 z-loss", logits=Normal((4, 24), 2.0), target=_target(1, 3, -100, 0),
           weight=Normal((24,), 0.3, 1.0), z_loss=0.1),
    Sample("7 softcap", logits=Normal((4, 40), 8.0), target=_target(1, 3, 5, 0), softcap=10.0),
    Sample("8 all ignored", logits=Normal((3, 20)), target=_target(-100, -100, -100), **_every),
    Sample("9 weights of 0", logits=Normal((2, 4)), target=_target(1, 1),
           weight=Values([1.0, 0.0, 2.0, 1.0]), z_loss=0.1),
    Sample("10 none, every option", logits=Normal((2, 3, 50), 3.0),
           target=Values([[3, -100, 49], [0, 7, 7]], _i64), weight=Normal((50,), 0.2, 1.0), reduction="none",
           token_weight=Normal((2, 3), 0.5, 1.0), **_every),
    Sample("12 no tokens", logits=Normal((0, 16)), target=Integers((0,), 0, 16), **_every),
    Sample("13 V = 1", logits=Normal((3, 1)), target=_target(0, -100, 0), **_every),
    Sample("14 wide", logits=Normal((3, 9001), 2.0), target=_target(9000, 0, 4096),
           weight=Normal((9001,), 0.2, 1.0), **_every),
    Sample("15 large", logits=Normal((4, 30), 1.0, 1e4), target=_target(0, 3, -100, 29), label_smoothing=0.1),
    Sample("16 masked class", logits=Values([[0.5, -math.inf, 1.0, 2.0], [-math.inf, 0.1, -math.inf, 3.0]]),
           target=_target(3, 1)),
    Sample("17 float32 weights", logits=Normal((6, 48)), target=Integers((6,), 0, 48),
           weight=Normal((48,), 0.2, 1.0, _f32)),
    Sample("18 probabilities", logits=Normal((2, 3, 33), 2.0), target=Probabilities((2, 3, 33), 2.0)),
    Sample("19 probabilities, every option", logits=Normal((5, 70), 3.0), target=Probabilities((5, 70), 2.0, 0.0, _f32),
           weight=Normal((70,), 0.2, 1.0), token_weight=Normal((5,), 0.5, 1.0, _f32), extras=True, **_every),
    Sample("20 extras", logits=Normal((7, 50), 3.0), target=_target(3, -100, 49, 0, 7, 7, 1), extras=True,
           weight=Normal((50,), 0.2, 1.0), token_weight=Normal((7,), 0.5, 1.0), **_every),
)  # fmt: skip

_two = {"logits": Normal((2, 4)), "target": Integers((2,), 0, 4)}
errors = (
    Bad(
        "logits integer", TypeError, r"logits: .*int64.*floating", **_two | {"logits": Integers((2, 4), 0, 4)}
    ),
    Bad("logits scalar", ValueError, r"logits: .*\(\).*V >= 1", **_two | {"logits": Values(1.0)}),
    Bad("no classes", ValueError, r"logits: .*\(2, 0\).*V >= 1", **_two | {"logits": Normal((2, 0))}),
    Bad(
        "target dtype",
        TypeError,
        r"target: .*int32.*int64",
        **_two | {"target": Integers((2,), 0, 4, torch.int32)},
    ),
    Bad("probabilities shape", ValueError, r"target: .*\(2,\).*\(2, 4\)", **_two | {"target": Normal((2,))}),
    Bad("probabilities dtype", TypeError, r"target: .*float16.*float32",
        **_two | {"target": Normal((2, 4), dtype=torch.float16)}),
    Bad("token weight shape", ValueError, r"token_weight: .*\(4,\).*\(2,\)", **_two, token_weight=Normal((4,))),
    Bad("token weight dtype", TypeError, r"token_weight: .*int64", **_two, token_weight=Integers((2,), 0, 2)),
    Bad("scale", ValueError, r"logit_scale: .*0.0.*> 0", **_two, logit_scale=0.0),
    Bad("target shape", ValueError, r"target: .*\(3,\).*\(2,\)", **_two | {"target": Integers((3,), 0, 4)}),
    Bad("target range", IndexError, r"target: got 4.*0 to 3.*-100", **_two | {"target": _target(1, 4)}),
    Bad("target negative", IndexError, r"target: got -1.*0 to 3.*-100", **_two | {"target": _target(-1, 2)}),
    Bad("weight shape", ValueError, r"weight: .*\(2,\).*\(4,\)", **_two, weight=Normal((2,))),
    Bad("weight dtype", TypeError, r"weight: .*float64", **_two, weight=Normal((4,), dtype=torch.float64)),
    Bad("smoothing", ValueError, r"label_smoothing: .*1.5.*0 to 1", **_two, label_smoothing=1.5),
    Bad("z-loss", ValueError, r"z_loss: .*nan.*>= 0", **_two, z_loss=math.nan),
    Bad("softcap", ValueError, r"softcap: .*0.*> 0", **_two, softcap=0.0),
    Bad("reduction", ValueError, r"reduction: .*'avg'.*mean, sum, none", **_two, reduction="avg"),
)

def random_options(pick: Pick, lead: tuple[int, ...]) -> dict[str, Any]:
    """Each option there or not."""
    return {
        "ignore_index": pick.one_of(-100, 0), "label_smoothing": pick.one_of(0.0, 0.2), "z_loss": pick.one_of(0.0, 1e-2),
        "softcap": pick.one_of(None, 5.0), "reduction": pick.one_of("mean", "sum", "none"),
        "logit_scale": pick.one_of(1.0, 0.6), "extras": pick.one_of(False, True),
        "token_weight": pick.one_of(None, Normal(lead, 0.2, 1.0, pick.one_of(None, _f32))),
    }  # fmt: skip


def random_target(pick: Pick, lead: tuple[int, ...], classes: int) -> Any:
    """Class indices or probabilities."""
    soft = Probabilities((*lead, classes), 2.0, 0.0, pick.one_of(None, _f32))
    return pick.one_of(Integers(lead, 0, classes), soft)


def random(pick: Pick) -> Sample:
    """Every option at once or none, with ignored targets among the others."""
    classes = pick.integer(1, 300)
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 2)))
    return Sample(
        "random", logits=Normal((*lead, classes), scale=pick.one_of(1.0, 5.0)),
        target=random_target(pick, lead, classes),
        weight=pick.one_of(None, Normal((classes,), 0.2, 1.0, pick.one_of(None, _f32))),
        **random_options(pick, lead),
    )  # fmt: skip


def case(tokens: int = 1024, classes: int = 50304) -> Sample:
    """Logits (tokens, classes), mean."""
    return Sample("case", logits=Normal((tokens, classes)), target=Integers((tokens,), 0, classes))


shapes = {
    "default": ({"tokens": 1024, "classes": 50304}, {"tokens": 2048, "classes": 4096}),
    "sweep": tuple({"tokens": 2**24 // v, "classes": v} for v in (1024, 4096, 16384, 65536, 262144)),
    "large": tuple({"tokens": 2**29 // v, "classes": v} for v in (4096, 32768, 65536, 131072)),
}
