"""Recurrent language models, and a recurrent encoder of one or both directions with an output for tokens or sequences.

LSTM: embedding, layers of LSTM, GRU or RNN cells with dropout around each, and a softmax that is tied to the embedding or
has a weight of its own. Trained by truncated back-propagation through time: `carry` has the state at the end of a batch
be the first state of the next, without its gradient, so row r of successive batches must hold one text that goes on.

Source: Zaremba, Sutskever, Vinyals, "Recurrent neural network regularization" (2014), arXiv:1409.2329; the tied softmax
from Press, Wolf (2017), arXiv:1608.05859.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import GRU, RNN, Dropout, Linear
from ..nn import LSTM as LSTMLayers
from . import checkpoint

__all__ = ["LSTM", "LSTMConfig", "LSTMEncoder", "RecurrentState"]

CELLS = ("lstm", "gru", "rnn", "rnn_relu")
OUTPUTS = ("tokens", "sequence")


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """Sizes and options.

    vocab_size; n_embd: width of the embedding; n_hidden: width of the state, None for n_embd; n_layer;
    cell: "lstm", "gru", "rnn" (tanh) or "rnn_relu";
    dropout: of the embedding, between the layers and of the last one's output;
    tie_word_embeddings: the softmax's weight is the embedding; where n_hidden is not n_embd, a projection comes before it;
    initializer_range: bound of the embedding's uniform start (layers start as torch.nn's do);
    bidirectional: of the encoder; a language model must not see what follows.
    """

    vocab_size: int = 10000
    n_embd: int = 650
    n_hidden: int | None = None
    n_layer: int = 2
    cell: str = "lstm"
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    initializer_range: float = 0.05
    bidirectional: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_embd", "n_layer", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                name = "n_hidden" if name == "width" else name
                raise ValueError(f"LSTMConfig.{name}: got {value!r}; allowed: an integer >= 1")
        if self.cell not in CELLS:
            raise ValueError(f"LSTMConfig.cell: got {self.cell!r}; allowed: {', '.join(CELLS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LSTMConfig.dropout: got {self.dropout}; allowed: 0 <= p < 1")

    @property
    def width(self) -> int:
        """Of the state."""
        return self.n_embd if self.n_hidden is None else self.n_hidden


def _layers(c: LSTMConfig) -> LSTMLayers | GRU | RNN:
    inner = c.dropout if c.n_layer > 1 else 0.0
    options: dict[str, Any] = {"dropout": inner, "bidirectional": c.bidirectional}
    if c.cell == "lstm":
        return LSTMLayers(c.n_embd, c.width, c.n_layer, **options)
    if c.cell == "gru":
        return GRU(c.n_embd, c.width, c.n_layer, **options)
    return RNN(c.n_embd, c.width, c.n_layer, "relu" if c.cell == "rnn_relu" else "tanh", **options)


def _time_major(ids: Tensor, tape: Any) -> Tensor:
    """(batch, seq) -> (seq, batch), contiguous."""
    return ids.t().contiguous() if tape is None else tape.empty(ids.t().shape, ids.dtype).copy_(ids.t())


def _count(targets: Tensor, tape: Any) -> Tensor:
    """How many targets are not -100. 0-dim int64."""
    ignored = tape.constant(-100, torch.int64)
    valid = torch.ne(targets, ignored, out=tape.empty(targets.shape, torch.int64))
    return torch.sum(valid, dim=tuple(range(targets.dim())), out=tape.empty((), torch.int64))


class RecurrentState:
    """The state of rows in generation, for `LSTM.step`: of each of h and c (layers, rows, hidden)."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] was; rows (n,) int64, repeated or left out at will."""
        self.parts = tuple(p.index_select(1, rows) for p in self.parts)


class LSTM(nn.Module):
    """A recurrent language model.

    ``model(input_ids)`` -> logits (batch, seq, vocab); ``model(input_ids, targets)`` -> loss in nats, float32, the mean
    (or, by `reduction`, sum) over targets that are not -100; targets are already shifted. ids and targets: (batch, seq).
    reset (batch,), bool: rows that begin with a state of 0 whatever is carried, as where a new text begins.

    Without `carry`, and always in evaluation, every row of every batch begins with a state of 0.
    """

    model_type = "fastlm_lstm"

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        if config.bidirectional:
            raise ValueError("LSTMConfig.bidirectional: got True for a language model; allowed: False, or an LSTMEncoder")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.layers = _layers(config)
        self.last_drop = Dropout(config.dropout)
        tied = config.tie_word_embeddings
        project = tied and config.width != config.n_embd
        self.proj = Linear(config.width, config.n_embd, bias=False) if project else None
        self.lm_head = Linear(config.n_embd if tied else config.width, config.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        for i in range(self._parts):
            self.register_buffer(f"carried_{i}", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform embedding and head; layers and projection as torch.nn's."""
        bound = self.config.initializer_range
        self.layers.reset_parameters()
        for weight in {self.wte.weight, self.lm_head.weight}:
            nn.init.uniform_(weight, -bound, bound)

    @property
    def _parts(self) -> int:
        return 2 if self.config.cell == "lstm" else 1

    # --- truncated back-propagation through time

    def carry(self, rows: int | None) -> None:
        """Carry the state of so many rows from batch to batch in training, from 0 on; None carries nothing.

        A batch of fewer rows goes on with the first of them.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"rows: got {rows}; allowed: None or 1 and more")
        like = self.wte.weight
        for i in range(self._parts):
            shape = (self.config.n_layer, rows or 0, self.config.width)
            setattr(self, f"carried_{i}", None if rows is None else like.new_zeros(shape))

    def carried(self) -> dict[str, Tensor]:
        """What `carry` keeps, (layers, rows, hidden) each, by name: part of the engine's state."""
        kept = {f"carried_{i}": getattr(self, f"carried_{i}") for i in range(self._parts)}
        return {name: t for name, t in kept.items() if t is not None}

    def _first_state(self, batch: int, reset: Tensor | None, tape: Any) -> Any:
        """The carried state of the batch's rows, copied, for `carried` is written to before backward reads it."""
        kept = list(self.carried().values()) if self.training else []
        if not kept:
            return None
        if batch > kept[0].shape[1]:
            raise ValueError(f"input_ids: got {batch} rows; allowed: the {kept[0].shape[1]} that carry was called for, or less")
        state = [t[:, :batch] for t in kept]
        state = [t.clone() if tape is None else tape.empty(t.shape, t.dtype).copy_(t) for t in state]
        if reset is not None:
            for t in state:
                t.masked_fill_(reset[:, None], 0.0)
        return tuple(state) if self._parts > 1 else state[0]

    def _keep(self, state: Any) -> None:
        last = state if isinstance(state, tuple) else (state,)
        for kept, t in zip(self.carried().values(), last, strict=False):
            kept[:, : t.shape[1]].copy_(t.detach())

    # --- training

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, *, reset: Tensor | None = None,
        reduction: str = "mean", tape: Any = None,
    ) -> Tensor:  # fmt: skip
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}; allowed: (batch, seq)")
        y, state = self._hidden(input_ids, self._first_state(input_ids.shape[0], reset, tape), tape=tape)
        if self.training:
            self._keep(state)
        if targets is None:
            logits: Tensor = self.lm_head(y, tape=tape)
            return logits.transpose(0, 1)
        return ops.linear_cross_entropy(
            y, self.lm_head.weight, _time_major(targets, tape), reduction=reduction, tape=tape
        )

    def _hidden(self, input_ids: Tensor, state: Any, lengths: Tensor | None = None, tape: Any = None) -> tuple[Tensor, Any]:
        """(seq, batch, width of the head), what the head reads; the last state."""
        x = ops.embedding(_time_major(input_ids, tape), self.wte.weight, tape=tape)
        x = self.drop(x, tape=tape)
        y, state = self.layers(x, state, lengths, tape=tape)
        y = self.last_drop(y, tape=tape)
        return y if self.proj is None else self.proj(y, tape=tape), state

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        dy = tape.backward("linear_cross_entropy", d_loss, weight=self.lm_head.weight)
        if self.proj is not None:
            dy = self.proj.backward(dy, tape)
        dy = self.last_drop.backward(dy, tape)
        dx, _ = self.layers.backward(dy, tape)
        dx = self.drop.backward(dx, tape)
        tape.backward("embedding", dx, weight=self.wte.weight)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Tensor:
        """How many terms the loss of this batch sums: targets that are not -100. 0-dim int64."""
        return _count(batch["targets"], tape)

    # --- generation (see fastlm.generate)

    context = None  # a state holds any number of tokens
    continues = True

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, RecurrentState]:
        """(logits (rows, vocab) of the token behind each prompt, the state for `step`).

        prompts: ids, at least one each, of any lengths. capacity: not less than any; the state takes no more room for it.
        """
        sizes = [len(p) for p in prompts]
        if not sizes or min(sizes) < 1 or max(sizes) > capacity:
            raise ValueError(f"prompts: got lengths {sizes}; allowed: 1 to capacity = {capacity} tokens each")
        device = self.wte.weight.device
        ids = torch.tensor([[*p, *[0] * (max(sizes) - len(p))] for p in prompts], device=device)
        lengths = torch.tensor(sizes, device=device)
        y, state = self._hidden(ids, None, lengths)
        logits: Tensor = self.lm_head(y[lengths - 1, torch.arange(len(sizes), device=device)])
        return logits, RecurrentState(state if isinstance(state, tuple) else (state,))

    @torch.no_grad()
    def step(self, state: RecurrentState, tokens: Tensor) -> Tensor:
        """Append tokens (rows,), one to each row; the logits (rows, vocab) of the token that follows."""
        y, last = self._hidden(tokens[:, None], state.parts if self._parts > 1 else state.parts[0])
        state.parts = last if isinstance(last, tuple) else (last,)
        logits: Tensor = self.lm_head(y[0])
        return logits

    # --- directories

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LSTM:
        """A model in float32 from config.json and model.safetensors as `save_pretrained` writes them.

        ValueError names every tensor that is missing, unknown or of another shape.
        """
        raw = checkpoint.read_config(directory, cls.model_type)
        names = {f.name for f in dataclasses.fields(LSTMConfig)}
        with torch.device("meta"):
            model = cls(LSTMConfig(**{k: v for k, v in raw.items() if k in names}))
        checkpoint.assign(model, checkpoint.read_tensors(directory), directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or absent. The layers bear torch.nn's names."""
        state = {name: p.detach() for name, p in self.named_parameters()}
        checkpoint.write(directory, {"model_type": self.model_type, **dataclasses.asdict(self.config)}, state)


class LSTMEncoder(nn.Module):
    """A recurrent encoder with labels for tokens or for sequences.

    ``model(input_ids)`` -> logits (batch, seq, labels), or of sequences (batch, labels); with targets, (batch, seq) or
    (batch,) int64, -100 ignored, the loss as LSTM's. A sequence is read from the last layer's last states, of both
    directions side by side. lengths (batch,), int64: what of each row is not padding; targets at padding must be -100.

    Args:
        config: of the layers; bidirectional as it says. labels: how many. output: "tokens" or "sequence".
    """

    def __init__(self, config: LSTMConfig, labels: int, output: str = "tokens") -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output: got {output!r}; allowed: {', '.join(OUTPUTS)}")
        if labels < 1:
            raise ValueError(f"labels: got {labels}; allowed: 1 and more")
        self.config, self.output = config, output
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.layers = _layers(config)
        self.last_drop = Dropout(config.dropout)
        self.head = Linear(self.layers.directions * config.width, labels)
        bound = config.initializer_range
        nn.init.uniform_(self.wte.weight, -bound, bound)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, *, lengths: Tensor | None = None,
        reduction: str = "mean", tape: Any = None,
    ) -> Tensor:  # fmt: skip
        x = ops.embedding(_time_major(input_ids, tape), self.wte.weight, tape=tape)
        x = self.drop(x, tape=tape)
        y, state = self.layers(x, None, lengths, tape=tape)
        if self.output == "sequence":
            y = self._summary(state[0] if isinstance(state, tuple) else state, tape)
        y = self.last_drop(y, tape=tape)
        if targets is None:
            logits: Tensor = self.head(y, tape=tape)
            return logits.transpose(0, 1) if self.output == "tokens" else logits
        if self.output == "tokens":
            targets = _time_major(targets, tape)
        return ops.linear_cross_entropy(
            y, self.head.weight, targets, self.head.bias, reduction=reduction, tape=tape
        )

    def _summary(self, h: Tensor, tape: Any) -> Tensor:
        """h (layers * directions, batch, hidden) -> (batch, directions * hidden) of the last layer."""
        last = h[-self.layers.directions :].transpose(0, 1)
        return last.flatten(1) if tape is None else tape.empty(last.shape, h.dtype).copy_(last).flatten(1)

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        dy = tape.backward("linear_cross_entropy", d_loss, weight=self.head.weight, bias=self.head.bias)
        dy = self.last_drop.backward(dy, tape)
        if self.output == "tokens":
            dx, _ = self.layers.backward(dy, tape)
        else:
            n = self.layers.directions
            dh = tape.empty((self.config.n_layer * n, dy.shape[0], self.config.width), dy.dtype).zero_()
            dh[-n:].copy_(dy.view(dy.shape[0], n, -1).transpose(0, 1))
            dx, _ = self.layers.backward(None, tape, (dh, None) if self.config.cell == "lstm" else dh)
        dx = self.drop.backward(dx, tape)
        tape.backward("embedding", dx, weight=self.wte.weight)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Tensor:
        """How many terms the loss of this batch sums: targets that are not -100. 0-dim int64."""
        return _count(batch["targets"], tape)
