"""The next token's distribution, a choice from it, and what may not be chosen.

For sampling, logits are brought to the CPU and treated in float64, and every choice uses one uniform number of a CPU
generator, so the same logits and seed give the same text on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["choose", "constrain", "probabilities"]


def constrain(
    logits: Tensor, sequences: Sequence[Sequence[int]], *, no_repeat_ngram: int = 0, banned: Sequence[int] = ()
) -> Tensor:
    """A copy of logits (rows, vocab) that is -inf where a token may not come next.

    Args:
        sequences: the tokens of each row so far.
        no_repeat_ngram: n > 0 excludes what would end an n-gram that the row has already.
        banned: ids that no row may choose.
    """
    out = logits.clone()
    if banned:
        out[:, list(banned)] = -math.inf
    if no_repeat_ngram:
        n = no_repeat_ngram
        for row, ids in enumerate(sequences):
            head = list(ids[len(ids) - n + 1 :]) if len(ids) >= n else None
            if head is None:
                continue
            seen = [ids[i + n - 1] for i in range(len(ids) - n + 1) if list(ids[i : i + n - 1]) == head]
            out[row, [t for t in seen if t < out.shape[1]]] = -math.inf
    return out


def probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that the next token is drawn from.

    First ``softmax(logits / temperature)``; then only the ``top_k`` most probable tokens stay; then of those,
    renormalised, the smallest set of the most probable ones whose probabilities reach ``top_p`` (nucleus
    sampling, Holtzman et al. 2020). Among equals the lower id comes first, so both sets are unique.

    Args:
        logits: (vocab,), any float dtype and device; -inf excludes a token.
        temperature: 0 puts everything on the most probable token, whatever ``top_k`` and ``top_p``.
        top_k: None or 1 and more.
        top_p: None or 0 < top_p <= 1.

    Returns:
        (vocab,) float64 on the CPU, sums to 1, exactly 0 for what is excluded.

    Raises:
        ValueError: an argument out of range, or logits that hold NaN or +inf or nothing but -inf.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: got {temperature}, allowed: finite numbers from 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}, allowed: None or 1 and more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, allowed: None or 0 < top_p <= 1")
    if logits.dim() != 1:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, allowed: (vocab,)")
    values = logits.detach().to("cpu", torch.float64)
    top = values.max()
    if not torch.isfinite(top):  # max is NaN if any is NaN
        raise ValueError("logits: got NaN, +inf or nothing but -inf; allowed: finite numbers and some -inf")
    if temperature == 0:
        result = torch.zeros_like(values)
        result[(values == top).nonzero()[0]] = 1.0
        return result
    p = torch.softmax((values - top) / temperature, dim=0)
    if top_k is None and top_p is None:
        return p
    ordered, ids = torch.sort(p, descending=True, stable=True)
    if top_k is not None:
        ordered[top_k:] = 0.0
        ordered /= ordered.sum()
    if top_p is not None:
        before = torch.cumsum(ordered, 0) - ordered
        before[0] = 0.0
        ordered[before >= top_p] = 0.0
        ordered /= ordered.sum()
    return torch.zeros_like(p).index_copy_(0, ids, ordered)


def choose(p: Tensor, generator: torch.Generator | None = None) -> int:
    """A token drawn from ``p``, (vocab,) float64: its distribution function inverted at a uniform number."""
    cumulative = torch.cumsum(p, 0)
    at = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, at, right=True))
    return min(token, int(p.nonzero()[-1]))  # rounding may put `at` on the very end
