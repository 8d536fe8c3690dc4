"""What linear_cross_entropy is tested and measured on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from .cross_entropy_samples import Probabilities, random_options, random_target
from .cross_entropy_samples import peer as cross_entropy_peer

__all__: list[str] = []


def peer(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    class_weight: Tensor | None = None, workspace_mb: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    """What a PyTorch user writes today: all the logits at once."""
    if bias is not None and bias.dtype != hidden.dtype:  # torch refuses mixed dtypes here
        logits = F.linear(hidden, weight) + bias
    else:
        logits = F.linear(hidden, weight, bias)
    return cross_entropy_peer(logits, target, weight=class_weight, **options)


_f32, _i64 = torch.float32, torch.int64
_tiny = 1.0 / 2**10  # workspace_mb of 1 KiB: a few tokens of the samples
_every = {
    "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7, "workspace_mb": _tiny,
}  # fmt: skip
samples = (
    Sample("1 leading dimensions", hidden=Normal((2, 3, 24)), weight=Normal((67, 24), 0.3),
           target=Integers((2, 3), 0, 67)),
    Sample("3 every option", hidden=Normal((13, 24)), weight=Normal((50, 24), 0.5), bias=Normal((50,)),
           target=Values([3, -100, 49, 0, 7, 7, 1, 2, -100, 4, 5, 48, 47], _i64),
           class_weight=Normal((50,), 0.2, 1.0), reduction="sum", **_every),
    Sample("2 bias and chunks", hidden=Normal((21, 16)), weight=Normal((40, 16), 0.5), bias=Normal((40,)),
           target=Integers((21,), 0, 40), workspace_mb=_tiny),
    Sample("4 ignored", hidden=Normal((14, 16)), weight=Normal((40, 16), 0.5), ignore_index=7,
           workspace_mb=_tiny, target=Values([1, *[7] * 12, 0], _i64)),
    Sample("5 all ignored", hidden=Normal((7, 8)), weight=Normal((40, 8)), bias=Normal((40,)),
           target=Integers((7,), -100, -99), **_every),
    Sample("6 no leading dimension", hidden=Normal((16,)), weight=Normal((33, 16)), target=Values(4, _i64),
           z_loss=1e-3),
    Sample("7 none", hidden=Normal((4, 3, 16)), weight=Normal((50, 16), 0.5), target=Integers((4, 3), 0, 50),
           class_weight=Normal((50,), 0.2, 1.0), reduction="none", **_every),
    Sample("8 no tokens", hidden=Normal((0, 16)), weight=Normal((9, 16)), bias=Normal((9,)),
           target=Integers((0,), 0, 9), **_every),
    Sample("9 V = 1, H = 1", hidden=Normal((3, 1)), weight=Normal((1, 1)), target=Values([0, -100, 0], _i64),
           **_every),
    Sample("10 many classes", hidden=Normal((5, 8)), weight=Normal((4099, 8)), bias=Normal((4099,)),
           target=Values([4098, 0, 4096, -100, 17], _i64), label_smoothing=0.1),
    Sample("11 float32 bias", hidden=Normal((6, 16)), weight=Normal((48, 16)), bias=Normal((48,), dtype=_f32),
           target=Integers((6,), 0, 48), class_weight=Normal((48,), 0.2, 1.0, _f32)),
    Sample("12 large", hidden=Normal((6, 16), 30.0), weight=Normal((30, 16), 10.0),
           target=Integers((6,), 0, 30)),
    Sample("13 probabilities", hidden=Normal((9, 16)), weight=Normal((40, 16), 0.5), bias=Normal((40,)),
           target=Probabilities((9, 40), 2.0, 0.0, _f32), workspace_mb=_tiny),
    Sample("14 extras", hidden=Normal((13, 24)), weight=Normal((50, 24), 0.5), bias=Normal((50,)),
           target=Values([3, -100, 49, 0, 7, 7, 1, 2, -100, 4, 5, 48, 47], _i64),
           class_weight=Normal((50,), 0.2, 1.0), token_weight=Normal((13,), 0.5, 1.0, _f32), extras=True, **_every),
)  # fmt: skip

_two = {"hidden": Normal((2, 8)), "weight": Normal((4, 8)), "target": Integers((2,), 0, 4)}
errors = (
    Bad(
        "hidden integer", TypeError, r"hidden: .*int64.*floating", **_two | {"hidden": Integers((2, 8), 0, 4)}
    ),
    Bad("hidden scalar", ValueError, r"hidden: .*\(\).*H >= 1", **_two | {"hidden": Values(1.0)}),
    Bad("weight shape", ValueError, r"weight: .*\(8, 4\).*\(V, 8\)", **_two | {"weight": Normal((8, 4))}),
    Bad(
        "weight dtype",
        TypeError,
        r"weight: .*float64.*float32",
        **_two | {"weight": Normal((4, 8), dtype=torch.float64)},
    ),
    Bad("target shape", ValueError, r"target: .*\(3,\).*\(2,\)", **_two | {"target": Integers((3,), 0, 4)}),
    Bad(
        "target range", IndexError, r"target: got 4.*0 to 3.*-100", **_two | {"target": Values([1, 4], _i64)}
    ),
    Bad("bias shape", ValueError, r"bias: .*\(8,\).*\(4,\)", **_two, bias=Normal((8,))),
    Bad(
        "class weight shape", ValueError, r"class_weight: .*\(2,\).*\(4,\)", **_two, class_weight=Normal((2,))
    ),
    Bad("reduction", ValueError, r"reduction: .*'avg'.*mean, sum, none", **_two, reduction="avg"),
    Bad("workspace", ValueError, r"workspace_mb: .*1e-06.*one token of 4 classes", **_two, workspace_mb=1e-6),
    Bad(
        "workspace negative",
        ValueError,
        r"workspace_mb: .*-1.*one token of 4 classes",
        **_two,
        workspace_mb=-1.0,
    ),
)

def random(pick: Pick) -> Sample:
    """Every option at once or none; the workspace from less than a token to more than all."""
    classes, width = pick.integer(1, 120), pick.integer(1, 40)  # so that _tiny holds a token
    lead = tuple(pick.integer(0, 6) for _ in range(pick.integer(0, 2)))
    return Sample(
        "random", hidden=Normal((*lead, width)), weight=Normal((classes, width), 0.3),
        target=random_target(pick, lead, classes), bias=pick.one_of(None, Normal((classes,))),
        class_weight=pick.one_of(None, Normal((classes,), 0.2, 1.0, pick.one_of(None, _f32))),
        **random_options(pick, lead),
        workspace_mb=pick.one_of(None, _tiny),
    )  # fmt: skip


def case(tokens: int = 1024, width: int = 768, classes: int = 50304) -> Sample:
    """Hidden states (tokens, width) and a vocabulary (classes, width), mean."""
    return Sample(
        "case", hidden=Normal((tokens, width)), weight=Normal((classes, width), width**-0.5),
        target=Integers((tokens,), 0, classes),
    )  # fmt: skip


shapes = {
    "default": (
        {"tokens": 1024, "width": 768, "classes": 50304},
        {"tokens": 2048, "width": 384, "classes": 4096},
    ),
    "sweep": tuple({"tokens": 512, "width": 768, "classes": v} for v in (1024, 4096, 16384, 65536)),
    "large": (
        {"tokens": 16384, "width": 768, "classes": 50304},
        {"tokens": 8192, "width": 4096, "classes": 128256},
    ),
}
