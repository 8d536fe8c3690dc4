"""The LSTM language model as a good PyTorch user writes it, for the train-step benchmark.

Nothing here is fastlm's: the layers are torch.nn.LSTM, GRU and RNN, which on a CPU are oneDNN's and on a GPU cuDNN's. Only the
parameters' names are those of fastlm.models.LSTM, so that the same weights load into both.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import LSTMConfig

__all__ = ["PlainLSTM"]


class PlainLSTM(nn.Module):
    """(input_ids, targets), both (batch, seq) -> mean loss in nats.

    In training from the state that the call before ended with, in evaluation from 0.
    """

    def __init__(self, c: LSTMConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        made = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[c.cell]
        self.layers = made(c.n_embd, c.width, c.n_layer)
        self.lm_head = nn.Linear(c.n_embd if c.tie_word_embeddings else c.width, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        self.state: Any = None

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        y, state = self.layers(self.wte(input_ids.t()), self.state if self.training else None)
        if self.training:
            self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return F.cross_entropy(self.lm_head(y).flatten(0, 1), targets.t().flatten())
