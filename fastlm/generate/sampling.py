"""Greedy and sampled continuations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from .choice import choose, constrain, probabilities
from .rows import Generative, Rows, check_counts, check_prompts

__all__ = ["generate", "stream"]


def generate(
    model: Generative, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new tokens of each prompt, without the one that ended it. options and errors: see `stream`."""
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, **options):
        for row, token in tokens.items():
            new[row].append(token)
    return new


@torch.no_grad()
def stream(
    model: Generative, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, generators: Sequence[torch.Generator] | None = None,
    stop: Collection[int] = (), min_new_tokens: int = 0, no_repeat_ngram: int = 0, vocab_size: int | None = None,
) -> Iterator[dict[int, int]]:  # fmt: skip
    """Continues prompts together, token by token: yields {row: its next token} of the rows that are not at their end.

    Args:
        prompts: ids, one and more each, of any lengths (`unpadded` makes them of a padded batch).
        max_new_tokens: of each row at most.
        temperature, top_k, top_p: see `probabilities`; temperature 0 is greedy.
        generators: one for each row, on the CPU: a row's text is decided by its own, whatever other rows draw (their
            number may change the rounding of its logits). None for torch's global one.
        stop: ids that end a row; they are not yielded.
        min_new_tokens: before so many no row ends.
        no_repeat_ngram: n > 0: no n-gram comes twice in a row, the prompt included.
        vocab_size: ids from here on, which a padded embedding may have, are never chosen.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, an argument out of range.
    """
    check_prompts(prompts, vocab_size)
    if generators is not None and len(generators) != len(prompts):
        raise ValueError(f"generators: got {len(generators)}; allowed: one for each of {len(prompts)} prompts")
    check_counts(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, no_repeat_ngram=no_repeat_ngram)
    alive, done = list(range(len(prompts))), 0
    rows = Rows(model, prompts, max_new_tokens) if max_new_tokens else None
    while rows is not None and alive:
        banned = list(stop) if done < min_new_tokens else []
        logits = constrain(rows.logits[:, :vocab_size], rows.tokens, no_repeat_ngram=no_repeat_ngram, banned=banned)
        tokens = []
        for row, values in zip(alive, logits.cpu(), strict=True):
            p = probabilities(values, temperature=temperature, top_k=top_k, top_p=top_p)
            tokens.append(choose(p, None if generators is None else generators[row]))
        going = [i for i, token in enumerate(tokens) if token not in stop]
        done += 1
        if going:
            yield {alive[i]: tokens[i] for i in going}
        if not going or done == max_new_tokens or rows.full:
            return
        rows.advance(going, [tokens[i] for i in going])
        alive = [alive[i] for i in going]
