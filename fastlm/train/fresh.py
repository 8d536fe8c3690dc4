"""A model for a run's options, and the same model moved off its special starting point, for the audit."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from fastlm.models import GPTConfig

from .config import TrainConfig

__all__ = ["gpt_config", "moved_from_start"]

M = TypeVar("M", bound=nn.Module)


def gpt_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The shape that the options describe, for a tokenizer of so many ids."""
    shape = config.model
    return GPTConfig(
        vocab_size=vocab_size,
        n_positions=config.data.seq_len,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        bias=shape.bias,
        embd_pdrop=shape.dropout,
        resid_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
    )


@torch.no_grad()
def moved_from_start(model: M, generator: torch.Generator) -> M:
    """Adds noise to every vector, in place, and returns the model.

    Fresh norms have weights of 1 and every bias is 0, and there a backward that forgets to multiply by a weight,
    or to pass a bias on, gives the right gradient all the same.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.2)
    return model
