"""Text from a language model: the next token's distribution, a choice from it, and text streamed as it comes.

Logits are brought to the CPU and treated in float64, and every choice uses one uniform number of a CPU
generator, so the same logits and seed give the same text on every device.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastlm.data.tokenizer import Tokenizer

__all__ = ["choose", "generate", "probabilities", "stream_text"]


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


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    prompt: Iterable[int],
    tokens: int,
    *,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    vocab_size: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Continues a prompt, token by token.

    Args:
        model: (1, seq) int64 ids to (1, seq, vocab) logits; put an ``nn.Module`` into evaluation mode first.
        prompt: at least one id.
        tokens: how many to generate at most.
        context: the model's longest sequence; it sees the last ``context`` ids.
        temperature, top_k, top_p: see ``probabilities``.
        generator: a CPU generator; None uses torch's global one.
        stop: an id that ends the text; it is not yielded.
        vocab_size: ids from here on, which a padded embedding may have, are never chosen.
        device: where the model is.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or an argument out of range.
    """
    ids = list(prompt)
    if not ids:
        raise ValueError("prompt: got no token, allowed: one and more")
    if context < 1:
        raise ValueError(f"context: got {context}, allowed: 1 and more")
    if vocab_size is not None and not all(0 <= i < vocab_size for i in ids):
        raise ValueError(f"prompt: got ids {min(ids)} to {max(ids)}, allowed: 0 to {vocab_size - 1}")
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]], dtype=torch.int64, device=device)
        logits = model(window)[0, -1, :vocab_size]
        token = choose(probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p), generator)
        if token == stop:
            return
        ids.append(token)
        yield token


def stream_text(tokenizer: Tokenizer | Any, ids: Iterable[int]) -> Iterator[str]:
    """Text of ids as they come, never with half a character: its bytes may be spread over several tokens.

    Bytes that can no longer become a character appear as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        # surrogateescape carries any bytes through str unharmed
        data = tokenizer.decode([token], errors="surrogateescape").encode(errors="surrogateescape")
        if text := decoder.decode(data):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
