"""What a model must have to generate, and the rows of tokens that grow step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Generative", "Rows", "State", "unpadded"]


class State(Protocol):
    """What a model remembers of the rows: keys and values, or a recurrent state."""

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; rows (n,) int64, n fewer or more than the rows there are."""


class Generative(Protocol):
    """A model that can generate. Put an ``nn.Module`` into evaluation mode first."""

    @property
    def context(self) -> int | None:
        """The most tokens that a row of its state can hold; None for any number."""

    @property
    def continues(self) -> bool:
        """Whether what it generates continues the prompt; False where the prompt is an encoder's input."""

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, Any]:
        """(logits (rows, vocab) of the first new token, the `State` for up to `capacity` tokens a row)."""

    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Append tokens (rows,) int64 to the rows; the logits (rows, vocab) of what follows."""


class Rows:
    """Rows of tokens and the model's state of them.

    When a model's context is full, a row goes on from its last ``context`` tokens, which then are read anew for every
    token; an encoder-decoder, whose output has to begin at its beginning, cannot, and `full` says so.

    Attributes:
        tokens: of each row, all that the model continues: its prompt, unless that is an encoder's input, and the new.
        logits: (rows, vocab), of the token that comes next.
    """

    def __init__(self, model: Generative, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.model = model
        self.tokens = [list(p) if model.continues else [] for p in prompts]
        if model.context is not None and model.context < 1:
            raise ValueError(f"context: got {model.context}; allowed: 1 and more")
        self._new = new_tokens
        self._read([list(p) for p in prompts])

    def _read(self, prompts: Sequence[list[int]]) -> None:
        context = self.model.context
        if self.model.continues:
            prompts = prompts if context is None else [p[-context:] for p in prompts]
            self._held = max(len(p) for p in prompts)
        else:
            self._held = 1  # the token that a decoder begins with
        wanted = self._held + self._new
        self._capacity = wanted if context is None else min(wanted, context)
        self.logits, self._state = self.model.prefill(prompts, self._capacity)

    @property
    def full(self) -> bool:
        """Whether no row can go on."""
        return not self.model.continues and self._held == self._capacity

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, with tokens[i] behind it."""
        unchanged = list(rows) == list(range(len(self.tokens)))
        self.tokens = [[*self.tokens[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._new -= 1
        if self._held == self._capacity:
            self._read(self.tokens)
            return
        device = self.logits.device
        if not unchanged:
            self._state.reorder(torch.tensor(rows, device=device))
        self.logits = self.model.step(self._state, torch.tensor(tokens, device=device))
        self._held += 1


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int | None) -> None:
    """At least one prompt, none empty, no id outside the vocabulary."""
    if not prompts:
        raise ValueError("prompts: got none; allowed: one and more")
    for i, ids in enumerate(prompts):
        if not len(ids):
            raise ValueError(f"prompts[{i}]: got no token; allowed: one and more")
        if vocab_size is not None and not all(0 <= t < vocab_size for t in ids):
            raise ValueError(f"prompts[{i}]: got ids {min(ids)} to {max(ids)}; allowed: 0 to {vocab_size - 1}")


def check_counts(least: int = 0, **counts: int) -> None:
    """Each at least `least`."""
    for name, value in counts.items():
        if value < least:
            raise ValueError(f"{name}: got {value}; allowed: {least} and more")


def unpadded(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """The rows of a padded batch as lists: input_ids and attention_mask (rows, seq), 0 at padding, on the left or right.

    ValueError where a row's real tokens are not side by side.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        given = f"{tuple(attention_mask.shape)} for input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask: got shape {given}; allowed: both (rows, seq)")
    prompts = []
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)):
        first = mask.index(True) if True in mask else 0
        count = sum(mask)
        if not all(mask[first : first + count]):
            raise ValueError(f"attention_mask: got padding inside of row {row}; allowed: on its left or right")
        prompts.append(ids[first : first + count])
    return prompts
