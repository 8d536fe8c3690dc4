"""Cross-entropy of a linear layer's output, without ever holding all its logits.

    logits = hidden @ weight.T + bias          loss = cross_entropy(logits, target, ...), cross_entropy.py

A language model's logits are its largest activation: at 8192 tokens and 128k classes 2 GB in bfloat16, and
autograd keeps several copies. Here they are made for a chunk of tokens at a time, in the workspace, and made
again in backward.

Gradients. With dlogits as in cross_entropy.py, for the tokens of a chunk:
    dhidden = dlogits @ weight        dweight += dlogits.T @ hidden        dbias += sum over tokens of dlogits
The logits and their gradient's sums are float32; dlogits is rounded to hidden's dtype for the two products,
which is what autograd does. dweight and dbias are float32 across all chunks. A frozen hidden or weight costs
nothing.

Saved: hidden, weight, target, bias and class_weight as given; statistics and denominators as in
cross_entropy.py.

Workspace. The tokens of a chunk are as many as fit workspace_bytes with `row_bytes` each: a float32 row of
logits and the same row of dlogits (in place for float32). 0 lets each backend choose: enough tokens that
adding dweight in float32 once a chunk is small against the products and, on a GPU, that dhidden's tiles fill
the multiprocessors.

Edge cases
 1  leading dimensions                            7  "none", chunk by chunk
 2  bias, several chunks                          8  no tokens
 3  every option, several chunks, "sum"           9  V = 1 and H = 1
 4  ignored tokens, a chunk of them only         10  more classes than one block of the kernels
 5  every token ignored: loss 0, gradients 0     11  float32 bias and class weights with bfloat16 hidden
 6  no leading dimension                         12  logits around 1e3

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), arXiv:2411.09009,
section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from .cross_entropy import (
    cap,
    check_class_vector,
    check_options,
    check_targets,
    class_weights,
    reduce,
    result_specs,
    token_gradients,
    token_losses,
    wide,
)
from .cross_entropy import peer as cross_entropy_peer

__all__ = ["linear_cross_entropy"]


def row_bytes(classes: int, dtype: torch.dtype) -> int:
    """Workspace of one token."""
    return classes * (dtype.itemsize if dtype.itemsize >= 4 else 4 + dtype.itemsize)


def _chunks(hidden: Tensor, weight: Tensor, workspace_bytes: int) -> list[slice]:
    rows = hidden.numel() // hidden.shape[-1]
    step = workspace_bytes // row_bytes(weight.shape[0], hidden.dtype) if workspace_bytes else 1024
    return [slice(i, min(i + step, rows)) for i in range(0, max(rows, 1), step)]


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden (..., H), weight (V, H), target (...) -> loss, statistics, denominators."""
    flat, index = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    matrix, offset = wide(weight).contiguous(), None if bias is None else wide(bias).contiguous()
    w = class_weights(class_weight, matrix[:, 0])
    parts = []
    for rows in _chunks(hidden, weight, workspace_bytes):
        x = cap(F.linear(wide(flat[rows]), matrix, offset), softcap)
        parts.append(token_losses(x, index[rows], w, ignore_index, label_smoothing))
    statistics = torch.cat(parts, 1).reshape(3, *target.shape)
    loss, denominators = reduce(statistics, target, w, ignore_index, z_loss, reduction)
    return loss, statistics, denominators


def backward(
    d_loss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    class_weight: Tensor | None, statistics: Tensor, denominators: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, workspace_bytes: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d_loss () or (...) -> dhidden like hidden, dweight (V, H) and dbias (V) in float32."""
    flat, index = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    matrix, offset = wide(weight).contiguous(), None if bias is None else wide(bias).contiguous()
    w = class_weights(class_weight, matrix[:, 0])
    d_loss = wide(d_loss).reshape(-1) if reduction == "none" else wide(d_loss)
    statistics = statistics.reshape(3, target.numel())
    dhidden = torch.empty_like(flat) if needs[0] else None
    dweight = torch.zeros_like(matrix) if needs[1] else None
    dbias = torch.zeros_like(matrix[:, 0]) if needs[2] else None
    options = (ignore_index, label_smoothing, z_loss, softcap, reduction)
    for rows in _chunks(hidden, weight, workspace_bytes):
        x = wide(flat[rows])
        upstream = d_loss[rows] if reduction == "none" else d_loss
        logits = F.linear(x, matrix, offset)
        dlogits = token_gradients(
            upstream, logits, index[rows], w, statistics[:, rows], denominators, *options
        )
        if dhidden is not None:
            dhidden[rows] = (dlogits @ matrix).to(hidden.dtype)
        if dweight is not None:
            dweight.addmm_(dlogits.T, x)
        if dbias is not None:
            dbias += dlogits.sum(0)
    return None if dhidden is None else dhidden.reshape(hidden.shape), dweight, dbias


def outputs(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Any, class_weight: Any, *options: Any
) -> tuple[Spec, ...]:
    """loss; statistics, denominators."""
    return result_specs(hidden, target, options[-2])


def gradients(d_loss: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """dhidden, dweight, dbias."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        Spec(tuple(hidden.shape), hidden.dtype),
        Spec(tuple(weight.shape), dtype),
        Spec((weight.shape[0],), dtype),
    )


def cost(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> Cost:
    """One product in forward, three in backward (the logits again); hidden, weight and their gradients move
    once."""
    product = 2.0 * hidden.numel() * weight.shape[0]
    moved = float(hidden.nbytes + weight.nbytes)
    return Cost(product, moved, 3.0 * product, moved + hidden.nbytes + 4.0 * weight.numel())


def peer(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    class_weight: Tensor | None = None, workspace_mb: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """What a PyTorch user writes today: all the logits at once."""
    if bias is not None and bias.dtype != hidden.dtype:  # torch refuses mixed dtypes here
        logits = F.linear(hidden, weight) + bias
    else:
        logits = F.linear(hidden, weight, bias)
    return cross_entropy_peer(logits, target, weight=class_weight, **options)


_f32, _i64 = torch.float32, torch.int64
_tiny = 1.0 / 2**10  # workspace_mb of 1 KiB: a few tokens of the samples
_every = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "workspace_mb": _tiny}
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
        target=Integers(lead, 0, classes), bias=pick.one_of(None, Normal((classes,))),
        class_weight=pick.one_of(None, Normal((classes,), 0.2, 1.0, pick.one_of(None, _f32))),
        ignore_index=pick.one_of(-100, 0), label_smoothing=pick.one_of(0.0, 0.2), z_loss=pick.one_of(0.0, 1e-2),
        softcap=pick.one_of(None, 5.0), reduction=pick.one_of("mean", "sum", "none"),
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


op = register(
    Op(
        name="linear_cross_entropy",
        schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
        "int ignore_index, float label_smoothing, float z_loss, float? softcap, str reduction, int workspace_bytes) "
        "-> (Tensor loss, Tensor statistics, Tensor denominators)",
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
        grads=("hidden", "weight", "bias"),
        accumulates=("weight", "bias"),
        saved=("hidden", "weight", "target", "bias", "class_weight", "statistics", "denominators"),
    )
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    class_weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean",
    workspace_mb: float | None = None, tape: Any = None,
) -> Tensor:  # fmt: skip
    """``cross_entropy(linear(hidden, weight, bias), target, ...)`` without ever holding all the logits.

    Args:
        hidden: (..., H), floating-point, H >= 1.
        weight: (V, H), of hidden's dtype, V >= 1.
        target: (...), int64, in [0, V) or ignore_index; one out of range as in `cross_entropy`.
        bias: (V,), of hidden's dtype or float32; None for 0.
        class_weight: (V,), of hidden's dtype or float32: a weight for each class; None for 1. No gradient.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as in `cross_entropy`.
        workspace_mb: the most memory for logits and their gradient, in units of 2**20 bytes, at least that of
            one token: 6 V bytes in bfloat16 and float16, 4 V in float32, 8 V in float64. None chooses by
            tokens, V, H and the device. The loss and its gradients are the same for any, up to the rounding of
            sums over chunks. The CPU kernels take about 0.4 MB a thread on top and need at least 0.6 KB an
            element of H; the reference, plain PyTorch, takes a dozen such chunks.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, () or (...) for "none"; float32 (float64 for float64) whatever the dtype of hidden.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was given and what is allowed.

    Source: Wijmans et al. (2024), arXiv:2411.09009.
    """
    check_floating("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}; allowed: (..., H) with H >= 1")
    check_floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}; allowed: (V, {hidden.shape[-1]}) with V >= 1"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: got dtype {weight.dtype}; allowed: hidden's dtype {hidden.dtype}")
    classes = weight.shape[0]
    check_targets("hidden", hidden, target)
    check_class_vector("bias", bias, classes, hidden.dtype)
    check_class_vector("class_weight", class_weight, classes, hidden.dtype)
    check_same_device(hidden=hidden, weight=weight, target=target, bias=bias, class_weight=class_weight)
    check_options(label_smoothing, z_loss, softcap, reduction)
    workspace = 0
    if workspace_mb is not None:
        least = row_bytes(classes, hidden.dtype)
        if not least <= workspace_mb * 2**20 < math.inf:
            raise ValueError(
                f"workspace_mb: got {workspace_mb}; allowed: None or at least {least / 2**20:.3g}, "
                f"which is one token of {classes} classes in {hidden.dtype}"
            )
        workspace = int(workspace_mb * 2**20)
    cap_at = None if softcap is None else float(softcap)
    options = (int(ignore_index), float(label_smoothing), float(z_loss), cap_at, reduction, workspace)
    loss: Tensor = op(hidden, weight, target, bias, class_weight, *options, tape=tape)[0]
    return loss
