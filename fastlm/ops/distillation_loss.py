"""Distillation: a divergence between the distributions of a teacher and a student, from the logits of both.

    p = softmax(teacher / tau)        q = softmax(student / tau)        m = beta p + (1 - beta) q
    "forward_kl"   L = KL(p || q) = sum_c p_c b_c      b = log p - log q
    "reverse_kl"   L = KL(q || p) = sum_c q_c a_c      a = log q - log p
    "js"           L = beta KL(p || m) + (1 - beta) KL(q || m) = sum_c p_c b_c + sum_c q_c a_c
                   b = beta (log p - log m)            a = (1 - beta) (log q - log m)
    "none": tau**2 w_t L_t for each token t (without rescale: w_t L_t)          "sum": their sum
    "mean": the sum over the sum of w_t               "batchmean": the sum over the first dimension's size

tau**2 keeps the gradient's size when tau changes, since d L / d student is about 1 / tau**2.

Gradients. With A = sum_c p_c b_c, B = sum_c q_c a_c and d q_k / d (student_c / tau) = q_k ([k = c] - q_c), the terms
that come from the normalisations cancel, also those through m (sum_c d m_c = 0 and beta p + (1 - beta) q = m), so
    "forward_kl"   d student = g (q - p)               d teacher = g p (b - A)
    "reverse_kl"   d student = g q (a - B)             d teacher = g (p - q)
    "js"           d student = g q (a - B)             d teacher = g p (b - A)
with g = d_loss w_t tau (without rescale: / tau) over the denominator.

log p - log m = -log(1 + (1 - beta) (e**d - 1)) with d = log q - log p, and likewise from the other side, whichever has
the exponential that cannot overflow; m itself may underflow. A class of probability 0 adds 0 to its own sum.

Saved: both logits and token_weight as given; statistics (6, ...): log-sum-exp of student / tau and of teacher / tau,
each in two float32 parts as in cross_entropy.py, then A and B, all 0 where w_t is 0; the denominator, on the device.
The loss is float32 (float64 for float64) whatever the dtype of the logits.

Edge cases
 1  forward KL, leading dimensions               8  no tokens
 2  reverse KL, temperature                      9  V = 1
 3  Jensen-Shannon, weights with zeros, "none"  10  V wider than one block
 4  a mask, without rescale                     11  logits around 1e3, far apart
 5  every token masked: loss 0, gradient 0      12  a class masked for both by -inf
 6  no leading dimension, "batchmean"           13  a class masked for the teacher alone
 7  beta near 0, "sum"                          14  equal logits: loss 0, gradient 0

Sources: Hinton, Vinyals, Dean (2015), arXiv:1503.02531, section 2 (temperature); Agarwal et al., "On-policy
distillation" (2023), arXiv:2306.13649, section 2 (generalised Jensen-Shannon, of which forward and reverse KL are the
limits beta -> 0 and 1 after division by beta and 1 - beta).
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
from .cross_entropy_math import per_denominator, wide

__all__ = ["distillation_loss"]

DIVERGENCES = ("forward_kl", "reverse_kl", "js")
REDUCTIONS = ("mean", "batchmean", "sum", "none")


def log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities (..., V) of logits / temperature, and their log-sum-exp in two parts (...)."""
    x = wide(logits) / temperature
    top = x.detach().amax(-1, keepdim=True)
    log_sum = (x - top).exp().sum(-1, keepdim=True).log()
    lse = top + log_sum
    part = lse - top
    low = (top - (lse - part)) + (log_sum - part)  # what rounding took from lse (Knuth's two-sum)
    return (x - top) - log_sum, lse.squeeze(-1), low.squeeze(-1)


def log_ratios(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """(b, a) of the docstring, 0 where their own class has probability 0."""
    has_p, has_q = log_p.exp() > 0, log_q.exp() > 0
    zero = torch.zeros_like(log_p)
    if divergence == "forward_kl":
        return torch.where(has_p, log_p, 0.0) - torch.where(has_p, log_q, 0.0), zero
    if divergence == "reverse_kl":
        return zero, torch.where(has_q, log_q, 0.0) - torch.where(has_q, log_p, 0.0)
    d = torch.where(has_p & has_q, log_q, 0.0) - torch.where(has_p & has_q, log_p, 0.0)
    e = (-d.abs()).exp() - 1.0
    r = -torch.log1p(torch.where(d <= 0, (1.0 - beta) * e, beta * e))
    b, a = torch.where(d <= 0, r, r - d), torch.where(d <= 0, r + d, r)
    b = torch.where(has_q, b, -math.log(beta))
    a = torch.where(has_p, a, -math.log1p(-beta))
    return beta * torch.where(has_p, b, 0.0), (1.0 - beta) * torch.where(has_q, a, 0.0)


def token_divergences(
    student: Tensor, teacher: Tensor, token_weight: Tensor | None, divergence: str, beta: float, temperature: float
) -> Tensor:
    """Logits (..., V) -> statistics (6, ...)."""
    if token_weight is not None:
        counts = (token_weight != 0).unsqueeze(-1)
        student, teacher = torch.where(counts, student, 0.0), torch.where(counts, teacher, 0.0)
    log_q, *q_lse = log_softmax(student, temperature)
    log_p, *p_lse = log_softmax(teacher, temperature)
    b, a = log_ratios(log_p, log_q, divergence, beta)
    statistics = torch.stack([*q_lse, *p_lse, (log_p.exp() * b).sum(-1), (log_q.exp() * a).sum(-1)])
    return statistics if token_weight is None else torch.where(token_weight != 0, statistics, 0.0)


def reduce(
    statistics: Tensor, token_weight: Tensor | None, scale: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """statistics (6, ...) -> loss () or (...), denominator (1)."""
    losses = scale * (statistics[4] + statistics[5])
    count = losses.new_tensor([float(losses.numel())])
    if token_weight is not None:
        losses, count = losses * token_weight, token_weight.sum().reshape(1)
    if reduction == "mean":
        return losses.sum() * per_denominator(losses.new_ones(()), count)[0], count
    size = losses.shape[0] if reduction == "batchmean" and losses.dim() else 1
    denominator = losses.new_full((1,), float(size))
    if reduction == "none":
        return losses, denominator
    return losses.sum() * per_denominator(losses.new_ones(()), denominator)[0], denominator


def token_gradients(
    d_loss: Tensor, student: Tensor, teacher: Tensor, token_weight: Tensor | None, statistics: Tensor,
    denominator: Tensor, divergence: str, beta: float, temperature: float, scale: float, needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of both logits (..., V) in the wide dtype; d_loss a scalar, or (...) for reduction "none"."""
    q_lse, q_low, p_lse, p_low, mean_b, mean_a = (s.unsqueeze(-1) for s in statistics)
    g = (per_denominator(d_loss, denominator[0]) * (scale / temperature)).expand(statistics.shape[1:])
    if token_weight is not None:
        g = g * token_weight
        counts = (token_weight != 0).unsqueeze(-1)
        student, teacher = torch.where(counts, student, 0.0), torch.where(counts, teacher, 0.0)
    g = g.unsqueeze(-1)
    log_q = (wide(student) / temperature - q_lse) - q_low
    log_p = (wide(teacher) / temperature - p_lse) - p_low
    p, q = log_p.exp(), log_q.exp()
    b, a = log_ratios(log_p, log_q, divergence, beta)
    d_student = (q - p if divergence == "forward_kl" else q * (a - mean_a)) if needs[0] else None
    d_teacher = (p - q if divergence == "reverse_kl" else p * (b - mean_b)) if needs[1] else None
    results = (None if d is None else g * d for d in (d_student, d_teacher))
    if token_weight is None:
        a_, b_ = results
    else:
        a_, b_ = (None if d is None else torch.where(counts, d, 0.0) for d in results)
    return a_, b_


def forward(
    student: Tensor, teacher: Tensor, token_weight: Tensor | None, divergence: str, beta: float, temperature: float,
    scale: float, reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits (..., V) -> loss () or (...), statistics (6, ...), denominator (1)."""
    statistics = token_divergences(student, teacher, token_weight, divergence, beta, temperature)
    loss, denominator = reduce(statistics, token_weight, scale, reduction)
    return loss, statistics, denominator


def backward(
    d_loss: Tensor, student: Tensor, teacher: Tensor, token_weight: Tensor | None, statistics: Tensor,
    denominator: Tensor, divergence: str, beta: float, temperature: float, scale: float, reduction: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """d_loss () or (...) -> the gradients of both logits, like them."""
    options = (divergence, beta, temperature, scale)
    d_student, d_teacher = token_gradients(
        wide(d_loss), student, teacher, token_weight, statistics, denominator, *options, needs
    )
    return (
        None if d_student is None else d_student.to(student.dtype),
        None if d_teacher is None else d_teacher.to(teacher.dtype),
    )


def outputs(student: Tensor, teacher: Any, token_weight: Any, *options: Any) -> tuple[Spec, ...]:
    """loss; statistics, denominator."""
    shape, dtype = tuple(student.shape[:-1]), torch.float64 if student.dtype == torch.float64 else torch.float32
    return Spec(shape if options[-1] == "none" else (), dtype), Spec((6, *shape), dtype), Spec((1,), dtype)


def gradients(d_loss: Any, student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Spec, Spec]:
    """d_student, d_teacher."""
    return Spec(tuple(student.shape), student.dtype), Spec(tuple(teacher.shape), teacher.dtype)


def cost(student: Tensor, teacher: Tensor, **options: Any) -> Cost:
    """Forward reads both logits; backward reads them and writes the student's gradient. About 20 operations each."""
    n, moved = 20.0 * student.numel(), 1.0 * student.nbytes
    return Cost(n, 2 * moved, n, 3 * moved)


def peer(
    student: Tensor, teacher: Tensor, *, token_weight: Tensor | None = None, divergence: str = "forward_kl",
    beta: float = 0.5, temperature: float = 1.0, rescale: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """What a PyTorch user writes today, in float32, and 0 where its mean over nothing is NaN."""
    if token_weight is not None:
        token_weight = token_weight.to(wide(student).dtype)
        counts = (token_weight != 0).unsqueeze(-1)
        student, teacher = torch.where(counts, student, 0.0), torch.where(counts, teacher, 0.0)
    log_q = F.log_softmax(wide(student) / temperature, -1)
    log_p = F.log_softmax(wide(teacher) / temperature, -1)

    def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
        there = log_x > -math.inf
        difference = torch.where(there, log_x, 0.0) - torch.where(there, log_y, 0.0)
        return (log_x.exp() * difference).sum(-1)

    if divergence == "js":
        parts = torch.stack([log_p + math.log(beta), log_q + math.log1p(-beta)])
        nowhere = (parts == -math.inf).all(0)
        log_m = torch.where(nowhere, -math.inf, torch.where(nowhere, 0.0, parts).logsumexp(0))
        losses = beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)
    else:
        losses = kl(log_p, log_q) if divergence == "forward_kl" else kl(log_q, log_p)
    losses = losses * temperature**2 if rescale else losses
    weight = torch.ones_like(losses) if token_weight is None else token_weight
    losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "mean":
        return losses.sum() / torch.where(weight.sum() == 0, 1.0, weight.sum())
    return losses.sum() / (max(len(losses), 1) if reduction == "batchmean" and losses.dim() else 1)


def terms(
    upstream: list[Tensor], student: Tensor, teacher: Tensor, *, token_weight: Tensor | None = None,
    divergence: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0, rescale: bool = True,
    reduction: str = "mean",
) -> dict[str, float]:  # fmt: skip
    """Each gradient is a difference, of 0 where the distributions are equal."""
    w = None if token_weight is None else token_weight.to(wide(student).dtype)
    scale = temperature**2 if rescale else 1.0
    _, statistics, denominator = forward(student, teacher, w, divergence, beta, temperature, scale, reduction)
    if not student.numel():
        return {}
    g = per_denominator(upstream[0], denominator[0]).abs().max().item() * scale / temperature
    largest = 1.0 if w is None else w.abs().max().item()
    q, p = log_softmax(student, temperature)[0].exp(), log_softmax(teacher, temperature)[0].exp()
    spread = statistics[4:].abs().sum(0).unsqueeze(-1)
    size = g * largest * ((q + p) * (1.0 + spread)).nan_to_num().max().item()
    return {"student": size, "teacher": size}


def _pair(*shape: int, scale: float = 2.0, shift: float = 0.0) -> dict[str, Any]:
    return {"student": Normal(shape, scale, shift), "teacher": Normal(shape, scale)}


_inf = math.inf
_js = {"divergence": "js", "beta": 0.3, "temperature": 1.7}
samples = (
    Sample("1 leading dimensions", **_pair(2, 3, 67)),
    Sample("2 reverse, temperature", **_pair(5, 40), divergence="reverse_kl", temperature=2.5),
    Sample("3 js, weights, none", **_pair(2, 3, 50), **_js, reduction="none",
           token_weight=Values([[0.5, 0.0, 2.0], [1.0, 0.0, 0.25]])),
    Sample("4 mask", **_pair(4, 33), token_weight=Values([True, False, True, True], torch.bool), temperature=0.5,
           rescale=False),
    Sample("5 all masked", **_pair(3, 20), **_js, token_weight=Values([0.0, 0.0, 0.0])),
    Sample("6 no leading dimension", **_pair(33), reduction="batchmean", divergence="reverse_kl"),
    Sample("7 beta near 0", **_pair(4, 3, 24), divergence="js", beta=0.01, reduction="sum"),
    Sample("8 no tokens", **_pair(0, 16), **_js, reduction="batchmean"),
    Sample("9 V = 1", **_pair(3, 1), **_js),
    Sample("10 wide", **_pair(3, 9001), **_js),
    Sample("11 large", **_pair(4, 30, scale=10.0, shift=1e3), **_js),
    Sample("12 masked class", student=Values([[0.5, -_inf, 1.0, 2.0], [-_inf, 0.1, 0.3, 3.0]]),
           teacher=Values([[1.5, -_inf, -1.0, 0.2], [-_inf, 0.7, 0.2, 1.0]])),
    Sample("13 masked teacher", student=Values([[0.5, 0.4, 1.0, 2.0]]), teacher=Values([[1.5, -_inf, -1.0, 0.2]]),
           divergence="js"),
    Sample("14 equal", student=Values([[0.5, 0.4, 1.0, 2.0]]), teacher=Values([[0.5, 0.4, 1.0, 2.0]]),
           divergence="js", beta=0.7),
)  # fmt: skip

_two = {"student": Normal((2, 4)), "teacher": Normal((2, 4))}
errors = (
    Bad("student integer", TypeError, r"student: .*int64", **_two | {"student": Integers((2, 4), 0, 4)}),
    Bad("student scalar", ValueError, r"student: .*\(\).*V >= 1", **_two | {"student": Values(1.0)}),
    Bad("shapes", ValueError, r"teacher: .*\(2, 5\).*\(2, 4\)", **_two | {"teacher": Normal((2, 5))}),
    Bad("dtypes", TypeError, r"teacher: .*float64.*float32", **_two | {"teacher": Normal((2, 4), dtype=torch.float64)}),
    Bad("divergence", ValueError, r"divergence: got 'kl'; allowed: forward_kl, reverse_kl, js", **_two, divergence="kl"),
    Bad("beta", ValueError, r"beta: got 1\.0; allowed: between 0 and 1.*reverse_kl", **_two, divergence="js", beta=1.0),
    Bad("temperature", ValueError, r"temperature: got 0\.0; allowed: .*> 0", **_two, temperature=0.0),
    Bad("reduction", ValueError, r"reduction: got 'avg'; allowed: mean, batchmean, sum, none", **_two, reduction="avg"),
    Bad("weight shape", ValueError, r"token_weight: .*\(3,\).*\(2,\)", **_two, token_weight=Normal((3,))),
    Bad("weight dtype", TypeError, r"token_weight: .*int64.*bool", **_two, token_weight=Integers((2,), 0, 2)),
)  # fmt: skip

def random(pick: Pick) -> Sample:
    """Every option at once or none."""
    lead = tuple(pick.integer(0, 5) for _ in range(pick.integer(0, 2)))
    return Sample(
        "random", **_pair(*lead, pick.integer(1, 300), scale=pick.one_of(1.0, 5.0)),
        token_weight=pick.one_of(None, Normal(lead, 0.5, 1.0), Integers(lead, 0, 2, torch.bool)),
        divergence=pick.one_of(*DIVERGENCES), beta=pick.real(0.05, 0.95), temperature=pick.one_of(1.0, 3.0),
        rescale=pick.one_of(True, False), reduction=pick.one_of(*REDUCTIONS),
    )  # fmt: skip


def case(tokens: int = 1024, classes: int = 50304, divergence: str = "forward_kl") -> Sample:
    """Logits (tokens, classes) of both, mean."""
    return Sample("case", **_pair(tokens, classes), divergence=divergence, temperature=2.0)


shapes = {
    "default": ({"tokens": 1024, "classes": 50304}, {"tokens": 2048, "classes": 4096, "divergence": "js"}),
    "sweep": tuple({"tokens": 2**23 // v, "classes": v} for v in (1024, 4096, 16384, 65536)),
    "large": tuple({"tokens": 2**28 // v, "classes": v} for v in (32768, 131072)),
}


op = register(
    Op(
        name="distillation_loss",
        schema="(Tensor student, Tensor teacher, Tensor? token_weight, str divergence, float beta, float temperature, "
        "float scale, str reduction) -> (Tensor loss, Tensor statistics, Tensor denominator)",
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
        terms=terms,
        grads=("student", "teacher"),
        saved=("student", "teacher", "token_weight", "statistics", "denominator"),
    )
)


def check_options(divergence: str, beta: float, temperature: float, reduction: str) -> None:
    """The options that are numbers and names."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: got {divergence!r}; allowed: {', '.join(DIVERGENCES)}")
    if divergence == "js" and not 0 < beta < 1:
        raise ValueError(
            f"beta: got {beta}; allowed: between 0 and 1, both excluded; their limits are forward_kl and reverse_kl"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}; allowed: finite and > 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; allowed: {', '.join(REDUCTIONS)}")


def check_token_weight(token_weight: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor | None:
    """token_weight in the dtype of the statistics."""
    if token_weight is None:
        return None
    if not isinstance(token_weight, Tensor) or not (token_weight.is_floating_point() or token_weight.dtype == torch.bool):
        given = f"dtype {token_weight.dtype}" if isinstance(token_weight, Tensor) else type(token_weight).__name__
        raise TypeError(f"token_weight: got {given}; allowed: a tensor of dtype bool or floating-point, or None")
    if token_weight.shape != shape:
        raise ValueError(f"token_weight: got shape {tuple(token_weight.shape)}; allowed: {tuple(shape)}, one a token")
    return token_weight.detach().to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def distillation_loss(
    student: Tensor, teacher: Tensor, *, token_weight: Tensor | None = None, divergence: str = "forward_kl",
    beta: float = 0.5, temperature: float = 1.0, rescale: bool = True, reduction: str = "mean", tape: Any = None,
) -> Tensor:  # fmt: skip
    """A divergence between softmax(teacher / temperature) and softmax(student / temperature).

    Args:
        student: logits (..., V), floating-point, V >= 1; never written to.
        teacher: logits, of student's shape and dtype. Both have a gradient, computed for those that require it.
        token_weight: (...), a factor for each token; bool for a mask. None for 1. A token of weight 0 adds nothing
            to the loss and has gradient 0, whatever its logits. It has no gradient itself.
        divergence: "forward_kl", KL(teacher || student); "reverse_kl", KL(student || teacher); or "js", the
            generalised Jensen-Shannon divergence of GKD.
        beta: for "js", the teacher's share of the mixture, between 0 and 1.
        temperature: > 0; both logits are divided by it.
        rescale: whether the loss is multiplied by temperature**2.
        reduction: "mean" divides by the sum of token_weight, "batchmean" by the size of the first dimension (1 if
            there is none but V); "sum"; or "none".
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, () or (...) for "none"; float32 (float64 for float64) whatever the dtype of the logits.
        A mean over nothing is 0 with gradient 0. Infinite where a divergence is.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Sources: Hinton et al. (2015), arXiv:1503.02531; Agarwal et al. (2023), arXiv:2306.13649.
    """
    check_floating("student", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student: got shape {tuple(student.shape)}; allowed: (..., V) with V >= 1")
    check_floating("teacher", teacher)
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: got shape {tuple(teacher.shape)}; allowed: student's, {tuple(student.shape)}")
    if teacher.dtype != student.dtype:
        raise TypeError(f"teacher: got dtype {teacher.dtype}; allowed: student's, {student.dtype}")
    check_options(divergence, beta, temperature, reduction)
    weight = check_token_weight(token_weight, student.shape[:-1], student)
    check_same_device(student=student, teacher=teacher, token_weight=weight)
    scale = float(temperature) ** 2 if rescale else 1.0
    options = (divergence, float(beta), float(temperature), scale, reduction)
    loss: Tensor = op(student, teacher, weight, *options, tape=tape)[0]
    return loss
