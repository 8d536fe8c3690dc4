"""Distillation between two linear layers' outputs, without ever holding all the logits of either.

    student = student_hidden @ student_weight.T + student_bias        teacher likewise, with a hidden size of its own
    loss = distillation_loss(student, teacher, ...), distillation_loss.py

Gradients. With dlogits as in distillation_loss.py, for the tokens of a chunk:
    d student_hidden = dlogits @ student_weight        d student_weight += dlogits.T @ student_hidden
    d student_bias += sum over tokens of dlogits
Logits and their gradient's sums are float32; dlogits is rounded to hidden's dtype for the two products, which is what
autograd does. d student_weight and d student_bias are float32 across all chunks. The teacher has no gradient: it is the
fixed point of distillation; one that requires a gradient is refused.

Saved: all tensors as given; statistics and denominator as in distillation_loss.py.

Workspace. The tokens of a chunk are as many as fit workspace_bytes with `row_bytes` each: a float32 row of both logits
and the student's dlogits (in place for float32 and float64). 0 lets each backend choose.

Edge cases
 1  leading dimensions, hidden sizes that differ     6  V = 1, H = 1
 2  biases, several chunks                           7  no leading dimension
 3  js, weights with zeros, "none", chunk by chunk   8  more classes than one block of the kernels
 4  every token masked: loss 0, gradients 0          9  float32 biases with bfloat16 hidden
 5  no tokens                                       10  reverse KL, "batchmean"

Sources: those of distillation_loss.py; chunks as in linear_cross_entropy.py.
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
from .cross_entropy_arguments import check_class_vector
from .cross_entropy_math import wide
from .distillation_loss import (
    DIVERGENCES,
    REDUCTIONS,
    check_options,
    check_token_weight,
    reduce,
    token_divergences,
    token_gradients,
)
from .distillation_loss import peer as distillation_peer

__all__ = ["linear_distillation_loss"]

_CHUNK = 1024  # tokens, where the workspace does not say


def row_bytes(classes: int, dtype: torch.dtype) -> int:
    """Workspace of one token."""
    return classes * (2 * max(dtype.itemsize, 4) + (dtype.itemsize if dtype.itemsize < 4 else 0))


def _chunks(tokens: int, classes: int, dtype: torch.dtype, workspace_bytes: int) -> list[slice]:
    step = workspace_bytes // row_bytes(classes, dtype) if workspace_bytes else _CHUNK
    return [slice(i, min(i + step, tokens)) for i in range(0, max(tokens, 1), step)]


def _flat(hidden: Tensor) -> Tensor:
    return hidden.reshape(hidden.shape[:-1].numel(), hidden.shape[-1])


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(wide(hidden), wide(weight).contiguous(), None if bias is None else wide(bias).contiguous())


def forward(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    student_bias: Tensor | None, teacher_bias: Tensor | None, token_weight: Tensor | None, divergence: str, beta: float,
    temperature: float, scale: float, reduction: str, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden (..., H), weight (V, H) of each -> loss () or (...), statistics (6, ...), denominator (1)."""
    lead = student_hidden.shape[:-1]
    s, t = _flat(student_hidden), _flat(teacher_hidden)
    w = None if token_weight is None else token_weight.reshape(-1)
    parts = []
    for rows in _chunks(lead.numel(), student_weight.shape[0], s.dtype, workspace_bytes):
        both = _logits(s[rows], student_weight, student_bias), _logits(t[rows], teacher_weight, teacher_bias)
        parts.append(token_divergences(*both, None if w is None else w[rows], divergence, beta, temperature))
    statistics = torch.cat(parts, 1).reshape(6, *lead)
    loss, denominator = reduce(statistics, token_weight, scale, reduction)
    return loss, statistics, denominator


def backward(
    d_loss: Tensor, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    student_bias: Tensor | None, teacher_bias: Tensor | None, token_weight: Tensor | None, statistics: Tensor,
    denominator: Tensor, divergence: str, beta: float, temperature: float, scale: float, reduction: str,
    workspace_bytes: int, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """d_loss () or (...) -> d student_hidden like it, d student_weight (V, H) and d student_bias (V) in float32."""
    tokens = statistics[0].numel()
    s, t = _flat(student_hidden), _flat(teacher_hidden)
    w = None if token_weight is None else token_weight.reshape(-1)
    d_loss, statistics = wide(d_loss), statistics.reshape(6, tokens)
    matrix = wide(student_weight).contiguous()
    d_hidden = torch.empty_like(s) if needs[0] else None
    d_weight = torch.zeros_like(matrix) if needs[1] else None
    d_bias = torch.zeros_like(matrix[:, 0]) if needs[2] else None
    for rows in _chunks(tokens, len(matrix), s.dtype, workspace_bytes):
        both = _logits(s[rows], student_weight, student_bias), _logits(t[rows], teacher_weight, teacher_bias)
        upstream = d_loss.reshape(-1)[rows] if reduction == "none" else d_loss
        d, _ = token_gradients(
            upstream, *both, None if w is None else w[rows], statistics[:, rows], denominator, divergence, beta,
            temperature, scale, (True, False),
        )  # fmt: skip
        assert d is not None
        if d_hidden is not None:
            d_hidden[rows] = (d @ matrix).to(s.dtype)
        if d_weight is not None:
            d_weight.addmm_(d.T, wide(s[rows]))
        if d_bias is not None:
            d_bias += d.sum(0)
    return None if d_hidden is None else d_hidden.reshape(student_hidden.shape), d_weight, d_bias


def outputs(student_hidden: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """loss; statistics, denominator."""
    shape = tuple(student_hidden.shape[:-1])
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    return Spec(shape if rest[-2] == "none" else (), dtype), Spec((6, *shape), dtype), Spec((1,), dtype)


def gradients(d_loss: Any, student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """d student_hidden, d student_weight, d student_bias."""
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    return (
        Spec(tuple(student_hidden.shape), student_hidden.dtype),
        Spec(tuple(student_weight.shape), dtype),
        Spec((student_weight.shape[0],), dtype),
    )


def cost(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **options: Any
) -> Cost:
    """Two products in forward, four in backward (both logits again); what is given and the gradients move once."""
    student = 2.0 * student_hidden.numel() * student_weight.shape[0]
    teacher = 2.0 * teacher_hidden.numel() * teacher_weight.shape[0]
    moved = float(sum(t.nbytes for t in (student_hidden, student_weight, teacher_hidden, teacher_weight)))
    gradients = student_hidden.nbytes + 4.0 * student_weight.numel()
    return Cost(student + teacher, moved, 3.0 * student + teacher, moved + gradients)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and bias.dtype != hidden.dtype:  # torch refuses mixed dtypes here
        return F.linear(hidden, weight) + bias
    return F.linear(hidden, weight, bias)


def peer(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, workspace_mb: float | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """What a PyTorch user writes today: all the logits at once."""
    student = _linear(student_hidden, student_weight, student_bias)
    return distillation_peer(student, _linear(teacher_hidden, teacher_weight, teacher_bias), **options)


_f32 = torch.float32
_tiny = 1.0 / 2**10  # workspace_mb of 1 KiB: a few tokens of the samples


def _pair(lead: tuple[int, ...], classes: int, s: int, t: int) -> dict[str, Any]:
    return {
        "student_hidden": Normal((*lead, s)), "student_weight": Normal((classes, s), 0.5),
        "teacher_hidden": Normal((*lead, t)), "teacher_weight": Normal((classes, t), 0.5),
    }  # fmt: skip


def _biases(classes: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {"student_bias": Normal((classes,), dtype=dtype), "teacher_bias": Normal((classes,), dtype=dtype)}


_js = {"divergence": "js", "beta": 0.3, "temperature": 1.7}
samples = (
    Sample("1 leading dimensions", **_pair((2, 3), 67, 24, 16)),
    Sample("2 biases, chunks", **_pair((11,), 20, 16, 24), **_biases(20), workspace_mb=_tiny, temperature=2.0),
    Sample("3 js, weights, none", **_pair((2, 3), 20, 8, 8), **_js, reduction="none", workspace_mb=_tiny,
           token_weight=Values([[0.5, 0.0, 2.0], [1.0, 0.0, 0.25]])),
    Sample("4 all masked", **_pair((3,), 20, 8, 8), **_js, token_weight=Values([False] * 3, torch.bool)),
    Sample("5 no tokens", **_pair((0,), 9, 8, 16), **_biases(9)),
    Sample("6 V = 1, H = 1", **_pair((3,), 1, 1, 1), **_biases(1)),
    Sample("7 no leading dimension", **_pair((), 33, 16, 8), reduction="sum", rescale=False),
    Sample("8 many classes", **_pair((5,), 1100, 8, 8), **_js),
    Sample("9 float32 biases", **_pair((6,), 48, 16, 16), **_biases(48, _f32)),
    Sample("10 reverse", **_pair((3, 4), 40, 16, 16), divergence="reverse_kl", reduction="batchmean"),
)  # fmt: skip

_two = _pair((2,), 4, 8, 6)
errors = (
    Bad("hidden integer", TypeError, r"student_hidden: .*int64", **_two | {"student_hidden": Integers((2, 8), 0, 4)}),
    Bad("weight shape", ValueError, r"teacher_weight: .*\(4, 5\).*\(V, 6\)", **_two | {"teacher_weight": Normal((4, 5))}),
    Bad("classes", ValueError, r"teacher_weight: .*\(5, 6\).*4 rows", **_two | {"teacher_weight": Normal((5, 6))}),
    Bad("tokens", ValueError, r"teacher_hidden: .*\(3, 6\).*\(2, 6\)", **_two | {"teacher_hidden": Normal((3, 6))}),
    Bad("dtypes", TypeError, r"teacher_hidden: .*float64.*float32",
        **_two | {"teacher_hidden": Normal((2, 6), dtype=torch.float64)}),
    Bad("bias shape", ValueError, r"student_bias: .*\(8,\).*\(4,\)", **_two, student_bias=Normal((8,))),
    Bad("divergence", ValueError, r"divergence: got 'kl'", **_two, divergence="kl"),
    Bad("workspace", ValueError, r"workspace_mb: .*1e-06.*one token of 4 classes", **_two, workspace_mb=1e-6),
)  # fmt: skip

def random(pick: Pick) -> Sample:
    """Every option at once or none; the workspace from less than a token to more than all."""
    classes = pick.integer(1, 50)  # so that _tiny holds a token in any dtype
    lead = tuple(pick.integer(0, 6) for _ in range(pick.integer(0, 2)))
    return Sample(
        "random", **_pair(lead, classes, pick.integer(1, 30), pick.integer(1, 30)),
        student_bias=pick.one_of(None, Normal((classes,))), teacher_bias=pick.one_of(None, Normal((classes,), dtype=_f32)),
        token_weight=pick.one_of(None, Normal(lead, 0.5, 1.0), Integers(lead, 0, 2, torch.bool)),
        divergence=pick.one_of(*DIVERGENCES), beta=pick.real(0.05, 0.95), temperature=pick.one_of(1.0, 3.0),
        rescale=pick.one_of(True, False), reduction=pick.one_of(*REDUCTIONS), workspace_mb=pick.one_of(None, _tiny),
    )  # fmt: skip


def case(tokens: int = 1024, student: int = 768, teacher: int = 1024, classes: int = 50304) -> Sample:
    """Hidden states of GPT-2 124M and 355M and their vocabularies, mean."""
    return Sample(
        "case", student_hidden=Normal((tokens, student)), student_weight=Normal((classes, student), student**-0.5),
        teacher_hidden=Normal((tokens, teacher)), teacher_weight=Normal((classes, teacher), teacher**-0.5),
        temperature=2.0,
    )  # fmt: skip


shapes = {
    "default": (
        {"tokens": 512, "student": 768, "teacher": 1024, "classes": 50304},
        {"tokens": 2048, "student": 384, "teacher": 768, "classes": 4096},
    ),
    "sweep": tuple({"tokens": 512, "classes": v} for v in (1024, 4096, 16384, 65536)),
    "large": ({"tokens": 16384, "student": 2048, "teacher": 4096, "classes": 128256},),
}


op = register(
    Op(
        name="linear_distillation_loss",
        schema="(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight, "
        "Tensor? student_bias, Tensor? teacher_bias, Tensor? token_weight, str divergence, float beta, "
        "float temperature, float scale, str reduction, int workspace_bytes) "
        "-> (Tensor loss, Tensor statistics, Tensor denominator)",
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
        grads=("student_hidden", "student_weight", "student_bias"),
        accumulates=("student_weight", "student_bias"),
        saved=("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "student_bias", "teacher_bias",
               "token_weight", "statistics", "denominator"),
    )
)  # fmt: skip


def _check_layer(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    check_floating(f"{who}_hidden", hidden)
    check_floating(f"{who}_weight", weight)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{who}_hidden: got shape {tuple(hidden.shape)}; allowed: (..., H) with H >= 1")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        shape = tuple(weight.shape)
        raise ValueError(f"{who}_weight: got shape {shape}; allowed: (V, {hidden.shape[-1]}) with V >= 1")
    for name, t in ((f"{who}_hidden", hidden), (f"{who}_weight", weight)):
        if t.dtype != like.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}; allowed: student_hidden's, {like.dtype}")
    check_class_vector(f"{who}_bias", bias, weight.shape[0], hidden.dtype)


def linear_distillation_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    student_bias: Tensor | None = None, teacher_bias: Tensor | None = None, token_weight: Tensor | None = None,
    divergence: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0, rescale: bool = True,
    reduction: str = "mean", workspace_mb: float | None = None, tape: Any = None,
) -> Tensor:  # fmt: skip
    """``distillation_loss`` of two linear layers' outputs without ever holding all the logits of either.

    Args:
        student_hidden, teacher_hidden: (..., H), each with its own H >= 1, floating-point, of one dtype.
        student_weight, teacher_weight: (V, H), of that dtype, V >= 1 the same for both.
        student_bias, teacher_bias: (V,), of that dtype or float32; None for 0.
        token_weight, divergence, beta, temperature, rescale, reduction: as in `distillation_loss`.
        workspace_mb: the most memory for logits and their gradient, in units of 2**20 bytes, at least that of one
            token: 10 V bytes in bfloat16 and float16, 8 V in float32, 16 V in float64. None lets the backend choose.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, () or (...) for "none"; float32 (float64 for float64). Gradients reach the student.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; among them a teacher that
            requires a gradient where gradients are recorded.
    """
    _check_layer("student", student_hidden, student_weight, student_bias, student_hidden)
    _check_layer("teacher", teacher_hidden, teacher_weight, teacher_bias, student_hidden)
    lead, classes = student_hidden.shape[:-1], student_weight.shape[0]
    if teacher_hidden.shape[:-1] != lead:
        allowed = (*lead, teacher_hidden.shape[-1])
        raise ValueError(f"teacher_hidden: got shape {tuple(teacher_hidden.shape)}; allowed: {allowed}")
    if teacher_weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight: got shape {tuple(teacher_weight.shape)}; allowed: {classes} rows, as student_weight has"
        )
    frozen = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    for name, t in frozen.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled() and tape is None:
            raise ValueError(f"{name}: got a tensor that requires a gradient; allowed: one that does not, as .detach()")
    check_options(divergence, beta, temperature, reduction)
    weight = check_token_weight(token_weight, lead, student_hidden)
    check_same_device(
        student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias, token_weight=weight,
        **frozen,
    )  # fmt: skip
    workspace = 0
    if workspace_mb is not None:
        least = row_bytes(classes, student_hidden.dtype)
        if not least <= workspace_mb * 2**20 < math.inf:
            raise ValueError(
                f"workspace_mb: got {workspace_mb}; allowed: None or at least {least / 2**20:.3g}, "
                f"which is one token of {classes} classes in {student_hidden.dtype}"
            )
        workspace = int(workspace_mb * 2**20)
    scale = float(temperature) ** 2 if rescale else 1.0
    options = (divergence, float(beta), float(temperature), scale, reduction, workspace)
    hidden = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    loss: Tensor = op(*hidden, student_bias, teacher_bias, weight, *options, tape=tape)[0]
    return loss
