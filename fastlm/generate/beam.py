"""Beam search: the likeliest continuations that a breadth-first search over a few prefixes finds."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .choice import constrain
from .rows import Generative, Rows, check_counts, check_prompts

__all__ = ["Hypothesis", "beam_search"]


class Hypothesis(NamedTuple):
    """New tokens, without the one that ended them, and their log-probability over length ** length_penalty."""

    tokens: list[int]
    score: float


class _Search:
    """The beams of one prompt: prefixes that go on, best first, and the best finished hypotheses, best first."""

    def __init__(
        self, beams: int, limit: int, length_penalty: float, early_stopping: bool | Literal["never"]
    ) -> None:
        self.beams, self.limit, self.penalty, self.early = beams, limit, length_penalty, early_stopping
        self.running: list[tuple[float, list[int]]] = [(0.0, [])]
        self.finished: list[Hypothesis] = []
        self.parents = [0]

    def extend(self, candidates: Sequence[tuple[float, int, int]], stop: Collection[int], last: bool) -> None:
        """candidates: (log-probability, index of a running prefix, token), best first; last: no step follows."""
        running: list[tuple[float, list[int]]] = []
        parents: list[int] = []
        length = len(self.running[0][1]) + 1
        for rank, (score, beam, token) in enumerate(candidates):
            if score == -math.inf:
                break
            before = self.running[beam][1]
            if token in stop or last:
                # what comes behind the first `beams` is there to fill the running ones only
                if rank < self.beams:
                    kept = before if token in stop else [*before, token]
                    self.finished.append(Hypothesis(kept, score / length**self.penalty))
            elif len(running) < self.beams:
                running.append((score, [*before, token]))
                parents.append(beam)
        if not running and not last and not self.finished:  # nothing may follow: the prefixes are the answer
            self.finished = [Hypothesis(t, s / max(length - 1, 1) ** self.penalty) for s, t in self.running if t]
        self.finished = sorted(self.finished, key=lambda h: -h.score)[: self.beams]
        self.running, self.parents = running, parents

    @property
    def done(self) -> bool:
        """Whether no running prefix can change the answer, as far as `early_stopping` wants to know it."""
        if not self.running:
            return True
        if len(self.finished) < self.beams:
            return False
        if self.early is True:
            return True
        score, tokens = self.running[0]
        length = self.limit if self.early == "never" and self.penalty > 0 else len(tokens)
        return score / length**self.penalty <= self.finished[-1].score


@torch.no_grad()
def beam_search(
    model: Generative, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, beams: int, n_best: int = 1,
    length_penalty: float = 1.0, early_stopping: bool | Literal["never"] = False, stop: Collection[int] = (),
    min_new_tokens: int = 0, no_repeat_ngram: int = 0, vocab_size: int | None = None, banned: Collection[int] = (),
) -> list[list[Hypothesis]]:  # fmt: skip
    """The `n_best` best hypotheses of each prompt, best first.

    A hypothesis is finished when it reaches an id in `stop`, or `max_new_tokens`; its score is its log-probability
    divided by length ** length_penalty, the stop token counted.

    Args:
        beams: prefixes that are followed, and finished hypotheses that are kept, for each prompt.
        length_penalty: above 0 favours long hypotheses, below 0 short ones, 0 takes the plain log-probability.
        early_stopping: when a prompt with `beams` finished hypotheses is done. True: at once. False: when the best
            running prefix, at its present length, is no better than the worst of them. "never": when it could not
            become better even at the greatest length.
        banned: ids that are never chosen, a padding token for instance.
        prompts, max_new_tokens, stop, min_new_tokens, no_repeat_ngram, vocab_size: see `stream`.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, an argument out of range.

    The same choices as transformers' ``generate(num_beams=beams, ...)``, except where scores tie.
    """
    check_prompts(prompts, vocab_size)
    check_counts(1, beams=beams, max_new_tokens=max_new_tokens)
    check_counts(min_new_tokens=min_new_tokens, no_repeat_ngram=no_repeat_ngram)
    if not 1 <= n_best <= beams:
        raise ValueError(f"n_best: got {n_best}; allowed: 1 to beams = {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f'early_stopping: got {early_stopping!r}; allowed: True, False or "never"')
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: got {length_penalty}; allowed: a finite number")
    searches = [_Search(beams, max_new_tokens, length_penalty, early_stopping) for _ in prompts]
    rows = Rows(model, prompts, max_new_tokens)
    alive, done = list(searches), 0
    while alive:
        done += 1
        log_p = torch.log_softmax(rows.logits.float(), -1)[:, :vocab_size]
        never = [*banned, *(stop if done <= min_new_tokens else ())]
        log_p = constrain(log_p, rows.tokens, no_repeat_ngram=no_repeat_ngram, banned=never)
        width = log_p.shape[1]
        scores = log_p + _scores(alive, log_p)[:, None]
        # each prefix may have as many endings as there are stop tokens, and `beams` that go on must be among these
        count = max(2, 1 + len(stop)) * beams
        first, parents, tokens, going = 0, [], [], []
        for search, values in zip(alive, scores.split([len(s.running) for s in alive]), strict=True):
            best = torch.topk(values.flatten(), min(count, values.numel()))
            found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            prefixes = len(search.running)
            search.extend(
                [(score, at // width, at % width) for score, at in found], stop,
                last=done == max_new_tokens or rows.full,
            )  # fmt: skip
            if not search.done:
                going.append(search)
                parents += [first + parent for parent in search.parents]
                tokens += [prefix[-1] for _, prefix in search.running]
            first += prefixes
        alive = going
        if alive:
            rows.advance(parents, tokens)
    return [search.finished[:n_best] for search in searches]


def _scores(searches: Sequence[_Search], like: Tensor) -> Tensor:
    return torch.tensor([score for s in searches for score, _ in s.running], dtype=like.dtype, device=like.device)
