"""Cross-entropy of a linear layer's output, without ever holding all its logits.

    logits = hidden @ weight.T + bias          loss = cross_entropy(logits, target, ...), cross_entropy.py

A language model's logits are its largest activation: at 8192 tokens and 128k classes 2 GB in bfloat16, and
autograd keeps several copies. Here they are made for a chunk of tokens at a time, in the workspace, and made
again in backward; or, for a loss that is one number, the gradients are made in forward while the chunk's logits are
there (`Op.together`), three products instead of four, and backward multiplies them by the loss's own gradient.

Gradients. With dlogits as in cross_entropy.py, for the tokens of a chunk:
    dhidden = dlogits @ weight        dweight += dlogits.T @ hidden        dbias += sum over tokens of dlogits
The logits and their gradient's sums are float32; dlogits is rounded to hidden's dtype for the two products,
which is what autograd does. dweight and dbias are float32 across all chunks. A frozen hidden or weight costs
nothing.

Saved: hidden, weight, target, bias and the weights of classes and tokens as given; statistics and denominators as in
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

13  probabilities, several chunks                14  the extras and every option, several chunks

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), arXiv:2411.09009,
section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import autocast, check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from . import linear_cross_entropy_samples as examples
from .cross_entropy_arguments import check_class_vector, check_options, check_targets, check_token_weight
from .cross_entropy_math import (
    CrossEntropyExtras,
    Options,
    class_weights,
    reduce,
    result_specs,
    results,
    token_gradients,
    token_statistics,
    upstream,
    wide,
)

__all__ = ["linear_cross_entropy"]


def row_bytes(classes: int, dtype: torch.dtype) -> int:
    """Workspace of one token."""
    return classes * (dtype.itemsize if dtype.itemsize >= 4 else 4 + dtype.itemsize)


def workspace_bytes(workspace_mb: float | None, classes: int, dtype: torch.dtype) -> int:
    """The argument in bytes, 0 for None."""
    if workspace_mb is None:
        return 0
    least = row_bytes(classes, dtype)
    if not least <= workspace_mb * 2**20 < math.inf:
        raise ValueError(
            f"workspace_mb: got {workspace_mb}; allowed: None or at least {least / 2**20:.3g}, "
            f"which is one token of {classes} classes in {dtype}"
        )
    return int(workspace_mb * 2**20)


def _chunks(hidden: Tensor, weight: Tensor, workspace_bytes: int) -> list[slice]:
    rows = hidden.numel() // hidden.shape[-1]
    step = workspace_bytes // row_bytes(weight.shape[0], hidden.dtype) if workspace_bytes else 1024
    return [slice(i, min(i + step, rows)) for i in range(0, max(rows, 1), step)]


def _flat(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (tokens, H), target (tokens) or (tokens, V)."""
    tokens = hidden.shape[:-1].numel()
    shape = (tokens, target.shape[-1]) if target.is_floating_point() else (tokens,)
    return hidden.reshape(tokens, hidden.shape[-1]), target.reshape(shape)


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None,
    token_weight: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """hidden (..., H), weight (V, H), target (...) or (..., V) -> loss, the extras, statistics, denominators."""
    *options, workspace_bytes = rest
    o, lead = Options(*options), hidden.shape[:-1]
    flat, goal = _flat(hidden, target)
    matrix, offset = wide(weight).contiguous(), None if bias is None else wide(bias).contiguous()
    w = class_weights(class_weight, matrix[:, 0])
    parts = []
    for rows in _chunks(hidden, weight, workspace_bytes):
        parts.append(token_statistics(F.linear(wide(flat[rows]), matrix, offset), goal[rows], w, o))
    statistics, *marks = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    statistics = statistics.reshape(len(statistics), *lead)
    loss, z, denominators = reduce(statistics, target, w, token_weight, o)
    return *results(loss, z, statistics, [m.reshape(lead) for m in marks]), statistics, denominators


def backward(
    d_loss: Tensor | None, d_z: Tensor | None, d_lse: Tensor | None, hidden: Tensor, weight: Tensor, target: Tensor,
    bias: Tensor | None, class_weight: Tensor | None, token_weight: Tensor | None, statistics: Tensor,
    denominators: Tensor, *rest: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d_loss and d_z () or (...), d_lse (...) -> dhidden like hidden, dweight (V, H) and dbias (V) in float32."""
    *options, workspace_bytes, needs = rest
    o = Options(*options)
    flat, goal = _flat(hidden, target)
    matrix, offset = wide(weight).contiguous(), None if bias is None else wide(bias).contiguous()
    w = class_weights(class_weight, matrix[:, 0])
    up = upstream(d_loss, d_z, d_lse, target, w, token_weight, denominators, o).flat()
    statistics = statistics.reshape(len(statistics), len(flat))
    dhidden = torch.empty_like(flat) if needs[0] else None
    dweight = torch.zeros_like(matrix) if needs[1] else None
    dbias = torch.zeros_like(matrix[:, 0]) if needs[2] else None
    for rows in _chunks(hidden, weight, workspace_bytes):
        x = wide(flat[rows])
        logits = F.linear(x, matrix, offset)
        dlogits = token_gradients(up.of(rows), logits, goal[rows], w, statistics[:, rows], o)
        if dhidden is not None:
            dhidden[rows] = (dlogits @ matrix).to(hidden.dtype)
        if dweight is not None:
            dweight.addmm_(dlogits.T, x)
        if dbias is not None:
            dbias += dlogits.sum(0)
    return None if dhidden is None else dhidden.reshape(hidden.shape), dweight, dbias


def outputs(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Any, class_weight: Any, token_weight: Any, *rest: Any
) -> tuple[Spec, ...]:
    """loss; the extras; statistics, denominators."""
    return result_specs(hidden, target, Options(*rest[:-1]))


def gradients(d_loss: Any, d_z: Any, d_lse: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """dhidden, dweight, dbias."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        Spec(tuple(hidden.shape), hidden.dtype),
        Spec(tuple(weight.shape), dtype),
        Spec((weight.shape[0],), dtype),
    )


def cost(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> Cost:
    """One product in forward, two in backward, the fewest; hidden, weight and their gradients move once."""
    product = 2.0 * hidden.numel() * weight.shape[0]
    moved = float(hidden.nbytes + weight.nbytes + (target.nbytes if target.is_floating_point() else 0))
    return Cost(product, moved, 2.0 * product, moved + hidden.nbytes + 4.0 * weight.numel())


op = register(
    Op(
        name="linear_cross_entropy",
        schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, Tensor? token_weight, "
        "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, str reduction, "
        "bool extras, int workspace_bytes) -> (Tensor loss, Tensor z, Tensor lse, Tensor correct, Tensor confidence, "
        "Tensor entropy, Tensor statistics, Tensor denominators)",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=examples.peer,
        samples=examples.samples,
        errors=examples.errors,
        random=examples.random,
        case=examples.case,
        shapes=examples.shapes,
        grads=("hidden", "weight", "bias"),
        accumulates=("weight", "bias"),
        together=lambda *options: "none" not in options,
        saved=("hidden", "weight", "target", "bias", "class_weight", "token_weight", "statistics", "denominators"),
        results=3,
        constants=3,
    )
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    class_weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean", logit_scale: float = 1.0,
    token_weight: Tensor | None = None, extras: bool = False, workspace_mb: float | None = None, tape: Any = None,
) -> Any:  # fmt: skip
    """``cross_entropy(linear(hidden, weight, bias), target, ...)`` without ever holding all the logits.

    Args:
        hidden: (..., H), floating-point, H >= 1.
        weight: (V, H), of hidden's dtype, V >= 1.
        target: (...), int64, in [0, V) or ignore_index, or probabilities (..., V) of hidden's dtype or float32, as
            in `cross_entropy`.
        bias: (V,), of hidden's dtype or float32; None for 0.
        class_weight: (V,), of hidden's dtype or float32: a weight for each class; None for 1. No gradient.
        ignore_index, label_smoothing, z_loss, softcap, reduction, logit_scale, token_weight, extras: as in
            `cross_entropy`, of logits with their bias; the extras too are had without all the logits.
        workspace_mb: the most memory for logits and their gradient, in units of 2**20 bytes, at least that of
            one token: 6 V bytes in bfloat16 and float16, 4 V in float32, 8 V in float64. None chooses by
            tokens, V, H and the device. The loss and its gradients are the same for any, up to the rounding of
            sums over chunks. The CPU kernels take about 0.4 MB a thread on top and need at least 0.6 KB an
            element of H; the reference, plain PyTorch, takes a dozen such chunks.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, () or (...) for "none"; float32 (float64 for float64) whatever the dtype of hidden. With
        extras, (loss, CrossEntropyExtras).

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
    hidden, weight = autocast(hidden, weight)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: got dtype {weight.dtype}; allowed: hidden's dtype {hidden.dtype}")
    classes = weight.shape[0]
    check_targets("hidden", hidden, target, classes)
    check_class_vector("bias", bias, classes, hidden.dtype)
    check_class_vector("class_weight", class_weight, classes, hidden.dtype)
    check_token_weight(token_weight, hidden)
    check_same_device(
        hidden=hidden, weight=weight, target=target, bias=bias, class_weight=class_weight, token_weight=token_weight
    )
    o = check_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, extras)
    workspace = workspace_bytes(workspace_mb, classes, hidden.dtype)
    loss, *more = op(hidden, weight, target, bias, class_weight, token_weight, *o, workspace, tape=tape)
    return (loss, CrossEntropyExtras(*more)) if extras else loss
