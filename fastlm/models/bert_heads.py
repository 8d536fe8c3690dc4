"""BERT with its heads, each a whole model that the engine trains: encoder, what reads its hidden states, and a loss.

Without targets a model returns logits (the sentence embedding: its embeddings); with them the loss in nats, the mean or,
by `reduction`, the sum over targets that are not -100. `outputs`, a dict, gets the logits beside the loss, except those
over the vocabulary, which are never all held.

In all of them input_ids and token_type_ids are int64 (batch, seq), and lengths int64 (batch,) the tokens of each row,
padding behind them; None for segment 0, and for no padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import Dropout, LayerNorm, Linear
from ..ops.rms_norm import rms_norm
from . import bert_checkpoint as checkpoint
from .bert import ACTIVATIONS, BERTConfig, Encoder, Pooler, initialise
from .recompute import Recomputing

__all__ = [
    "BERT",
    "BERTForMaskedLM",
    "BERTForPreTraining",
    "BERTForQuestionAnswering",
    "BERTForSentenceEmbedding",
    "BERTForSequenceClassification",
    "BERTForTokenClassification",
]

_IGNORED = -100


class _Model(Recomputing):
    """An encoder, and what a head shares with the others."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)

    @classmethod
    def from_pretrained(cls, directory: str | Path, strict: bool = True, **changes: Any) -> Self:
        """A model from config.json and model.safetensors as Hugging Face's BERT models write them, in float32.

        strict: the directory must hold this model's tensors and no others. False: heads that it has and the model has
            not are left out, and those that it lacks keep their initialisation, as for fine-tuning.
        changes: fields of the config to replace, dropout or labels for instance.

        ValueError names every tensor that is missing, unknown or of another shape, and options that we do not have.
        """
        config = checkpoint.read_config(directory, **changes)
        return checkpoint.load(cls(config), directory, strict)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors that transformers loads. Each file is whole or absent.

        With pre-norm or rotary, which its BERT has not, the config says so by its model_type.
        """
        checkpoint.save(self, directory)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Any:
        """How many terms the loss of this batch sums: targets that are not -100. 0-dim int64."""
        return _count(batch["targets"], tape)


class BERT(_Model):
    """The encoder and its pooler: (hidden states (batch, seq, hidden_size), pooled (batch, hidden_size)); no loss."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None, tape: Any = None
    ) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(input_ids, token_type_ids, lengths, tape=tape)
        return hidden, self.pooler(hidden, tape=tape)

    def backward(self, d_hidden: Tensor, d_pooled: Tensor, tape: Any) -> None:
        """Parameter gradients. d_hidden is added to."""
        d_hidden[:, 0].add_(self.pooler.backward(d_pooled, tape))
        self.encoder.backward(d_hidden, tape)


class MaskedLMHead(nn.Module):
    """norm(act(W h + b)) and the product with the vocabulary, of the masked positions alone.

    With `positions` (batch, m) the rows of hidden (batch, seq, width) are gathered first, so nothing of the head, its
    product with the vocabulary least of all, is computed for tokens that are not predicted.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        shape = config.vocab_size, config.hidden_size
        self.decoder = None if config.tie_word_embeddings else nn.Parameter(torch.empty(shape))
        self.activation, self.approximate = ACTIVATIONS[config.hidden_act]

    def forward(
        self, hidden: Tensor, table: Tensor, positions: Tensor | None, targets: Tensor | None, reduction: str,
        tape: Any = None,
    ) -> Tensor:  # fmt: skip
        """The loss; without targets the logits. table: the word embeddings."""
        if positions is not None:
            hidden = ops.embedding(_rows(positions, hidden.shape[1], tape), hidden.flatten(0, 1), tape=tape)
        y = self.dense(hidden, tape=tape)
        form = {"approximate": self.approximate} if self.activation == "gelu" else {}
        y = self.norm(getattr(ops, self.activation)(y, None, **form, tape=tape), tape=tape)
        weight = table if self.decoder is None else self.decoder
        if targets is None:
            return F.linear(y, weight, self.bias)
        loss: Tensor = ops.linear_cross_entropy(y, weight, targets, self.bias, reduction=reduction, tape=tape)
        return loss

    def backward(self, d_loss: Tensor, table: Tensor, d_hidden: Tensor, tape: Any) -> None:
        """Adds to d_hidden (batch, seq, width), float32 (float64 for float64); forward had positions."""
        weight = table if self.decoder is None else self.decoder
        dy = tape.backward("linear_cross_entropy", d_loss, weight=weight, bias=self.bias)
        dy = self.dense.backward(tape.backward(self.activation, self.norm.backward(dy, tape)), tape)
        tape.backward("embedding", dy, into={"weight": d_hidden.flatten(0, 1)})


class _MaskedLM(_Model):
    """What both models with a masked-LM head share."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.head = MaskedLMHead(config)

    @property
    def _table(self) -> Tensor:
        table: Tensor = self.encoder.embeddings.word_embeddings.weight
        return table

    def _check(self, positions: Tensor | None, targets: Tensor | None) -> None:
        if targets is not None and positions is None:
            raise ValueError("positions: got None with targets; allowed: the place of each target, (batch, m)")


class BERTForMaskedLM(_MaskedLM):
    """Predicts masked tokens: positions, targets int64 (batch, m). Logits (batch, m, vocab), without positions of all."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None,
        positions: Tensor | None = None, targets: Tensor | None = None, *, reduction: str = "mean", tape: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        self._check(positions, targets)
        hidden = self.encoder(input_ids, token_type_ids, lengths, tape=tape)
        found: Tensor = self.head(hidden, self._table, positions, targets, reduction, tape=tape)
        if tape is not None:
            tape.push("hidden", hidden.shape, hidden.dtype)
        return found

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        shape, dtype = tape.pop("hidden")
        d_hidden = tape.empty(shape, _wide(dtype)).zero_()
        self.head.backward(d_loss, self._table, d_hidden, tape)
        self.encoder.backward(_narrowed(d_hidden, dtype, tape), tape)


class BERTForPreTraining(_MaskedLM):
    """Predicts masked tokens, and whether segment 1 follows segment 0: a loss of two terms, which are added.

    positions, targets: int64 (batch, m); next_sentence: int64 (batch,), 0 where it follows, 1 where not, or -100. Without
    targets, the logits of both: (batch, m or seq, vocab) and (batch, 2). With reduction "sum" the two sums.
    """

    loss_terms = 2

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.next_sentence = Linear(config.hidden_size, 2)
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None,
        positions: Tensor | None = None, targets: Tensor | None = None, next_sentence: Tensor | None = None, *,
        reduction: str = "mean", tape: Any = None, outputs: dict[str, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        self._check(positions, targets)
        if (targets is None) != (next_sentence is None):
            raise ValueError("next_sentence: allowed: given with targets, and without them None")
        hidden = self.encoder(input_ids, token_type_ids, lengths, tape=tape)
        if tape is not None:
            tape.term(0)
        found = self.head(hidden, self._table, positions, targets, reduction, tape=tape)
        logits = self.next_sentence(self.pooler(hidden, tape=tape), tape=tape)
        if outputs is not None:
            outputs["next_sentence"] = logits
        if next_sentence is None:
            return found, logits
        if tape is not None:
            tape.term(1)
        follows = ops.cross_entropy(logits, next_sentence, reduction=reduction, tape=tape)
        if tape is not None:
            tape.push("hidden", hidden.shape, hidden.dtype)
        return (found, follows) if reduction == "sum" else found + follows

    def backward(self, d_loss: tuple[Tensor, Tensor], tape: Any) -> None:
        """Parameter gradients of the terms, each times its d_loss; the mirror of forward."""
        shape, dtype = tape.pop("hidden")
        d_hidden = tape.empty(shape, _wide(dtype)).zero_()
        d_pooled = self.next_sentence.backward(tape.backward("cross_entropy", d_loss[1]), tape)
        d_hidden[:, 0].add_(self.pooler.backward(d_pooled, tape))
        self.head.backward(d_loss[0], self._table, d_hidden, tape)
        self.encoder.backward(_narrowed(d_hidden, dtype, tape), tape)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> tuple[Tensor, Tensor]:
        """Masked tokens, and pairs."""
        return _count(batch["targets"], tape), _count(batch["next_sentence"], tape)


class BERTForSequenceClassification(_Model):
    """A class for each row, from the pooled first token: targets int64 (batch,), logits (batch, classes)."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = Linear(config.hidden_size, len(config.labels))
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None,
        targets: Tensor | None = None, *, reduction: str = "mean", tape: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        hidden = self.encoder(input_ids, token_type_ids, lengths, tape=tape)
        pooled = self.dropout(self.pooler(hidden, tape=tape), tape=tape)
        found = _classified(self.classifier(pooled, tape=tape), targets, reduction, tape, outputs)
        if tape is not None:
            tape.push("hidden", hidden.shape)
        return found

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        (shape,) = tape.pop("hidden")
        d_pooled = self.classifier.backward(tape.backward("cross_entropy", d_loss), tape)
        d_first = self.pooler.backward(self.dropout.backward(d_pooled, tape), tape)
        d_hidden = tape.empty(shape, d_first.dtype).zero_()
        d_hidden[:, 0].copy_(d_first)
        self.encoder.backward(d_hidden, tape)


class BERTForTokenClassification(_Model):
    """A class for each token: targets int64 (batch, seq), logits (batch, seq, classes)."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = Linear(config.hidden_size, len(config.labels))
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None,
        targets: Tensor | None = None, *, reduction: str = "mean", tape: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        hidden = self.dropout(self.encoder(input_ids, token_type_ids, lengths, tape=tape), tape=tape)
        return _classified(self.classifier(hidden, tape=tape), targets, reduction, tape, outputs)

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        d_hidden = self.classifier.backward(tape.backward("cross_entropy", d_loss), tape)
        self.encoder.backward(self.dropout.backward(d_hidden, tape), tape)


class BERTForQuestionAnswering(_Model):
    """Where an answer begins and ends: targets int64 (batch, 2), logits (batch, seq, 2).

    The loss is a softmax over the tokens of a row; unlike in transformers, padding takes no part in it (its logits are
    -inf), so that a row's loss does not depend on the rows beside it.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None,
        targets: Tensor | None = None, *, reduction: str = "mean", tape: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        hidden = self.encoder(input_ids, token_type_ids, lengths, tape=tape)
        logits: Tensor = self.qa_outputs(hidden, tape=tape)
        if lengths is not None:
            logits = logits.masked_fill_(_padding(lengths, logits.shape[1], tape)[..., None], -torch.inf)
        if outputs is not None:
            outputs["logits"] = logits
        if targets is None:
            return logits
        over_tokens = logits.transpose(1, 2)  # (batch, 2, seq)
        over_tokens = over_tokens.contiguous() if tape is None else _new(over_tokens, tape).copy_(over_tokens)
        loss: Tensor = ops.cross_entropy(over_tokens, targets, reduction=reduction, tape=tape)
        return loss

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        d = tape.backward("cross_entropy", d_loss).transpose(1, 2)
        self.encoder.backward(self.qa_outputs.backward(_new(d, tape).copy_(d), tape), tape)


class BERTForSentenceEmbedding(_Model):
    """A vector for each row: the mean of the hidden states of its tokens, (batch, hidden_size).

    normalize: to length 1. With pairs the loss is that of finding each row's other among the others of the batch, by
    the dot product of their embeddings over `temperature` (in-batch negatives; Henderson et al., 2017).
    """

    def __init__(self, config: BERTConfig, normalize: bool = True, temperature: float = 0.05) -> None:
        super().__init__(config)
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}; allowed: > 0")
        self.normalize, self.temperature = normalize, temperature
        initialise(self)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None,
        other_ids: Tensor | None = None, other_lengths: Tensor | None = None, *, reduction: str = "mean",
        tape: Any = None, outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Embeddings; with other_ids (batch, any length), the pairs' others, and other_lengths the loss."""
        first = self._embed(input_ids, token_type_ids, lengths, tape)
        if outputs is not None:
            outputs["embeddings"] = first
        if other_ids is None:
            return first
        other = self._embed(other_ids, None, other_lengths, tape)
        batch = len(first)
        if tape is None:
            scores, own = first @ other.t(), torch.arange(batch, device=first.device)
        else:
            scores = tape.linear(first, other, None)
            own = torch.arange(batch, out=tape.empty((batch,), torch.int64))
            tape.push("pairs", first, other)
        scale = 1.0 / self.temperature
        loss: Tensor = ops.cross_entropy(scores, own, reduction=reduction, logit_scale=scale, tape=tape)
        return loss

    def _embed(self, ids: Tensor, types: Tensor | None, lengths: Tensor | None, tape: Any) -> Tensor:
        """Attention whose scores are all 0 is the mean over the keys, and knows their lengths."""
        hidden = self.encoder(ids, types, lengths, tape=tape)
        heads = self._heads(hidden)
        pooled = ops.attention(heads[:, :, :1], heads, heads, scale=0.0, key_lengths=lengths, tape=tape)
        pooled = pooled.transpose(1, 2).flatten(1)  # (batch, width)
        if tape is not None:
            tape.push("hidden", hidden.shape)
        if not self.normalize:
            return pooled
        return self._unit(rms_norm(pooled, None, _TINY, tape=tape), tape)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)

    def _unit(self, x: Tensor, tape: Any) -> Tensor:
        """Root mean square 1 to length 1, or a gradient back."""
        scale = self.config.hidden_size**-0.5
        return x * scale if tape is None else _new(x, tape).copy_(x).mul_(scale)

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        d_scores = tape.backward("cross_entropy", d_loss)
        first, other = tape.pop("pairs")
        d_other = torch.mm(d_scores.t(), first, out=_new(other, tape))
        d_first = tape.linear_backward(d_scores, other, None)
        for d in (d_other, d_first):
            self._embed_backward(d, tape)

    def _embed_backward(self, d: Tensor, tape: Any) -> None:
        if self.normalize:
            d = tape.backward("rms_norm", self._unit(d, tape))
        (shape,) = tape.pop("hidden")
        d_hidden = tape.empty(shape, d.dtype)
        tape.backward("attention", self._heads(d[:, None]), None, into={"v": self._heads(d_hidden)})
        self.encoder.backward(d_hidden, tape)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Tensor:
        """Pairs."""
        return tape.empty((), torch.int64).fill_(len(batch["input_ids"]))


_TINY = 1e-12


def _count(targets: Tensor, tape: Any) -> Tensor:
    ignored = tape.constant(_IGNORED, torch.int64)
    valid = torch.ne(targets, ignored, out=tape.empty(targets.shape, torch.int64))
    return torch.sum(valid, dim=tuple(range(targets.dim())), out=tape.empty((), torch.int64))


def _rows(positions: Tensor, seq: int, tape: Any) -> Tensor:
    """Places (batch, m) in a row of seq as places in all rows one after another."""
    batch = len(positions)
    if tape is None:
        return positions + torch.arange(0, batch * seq, seq, device=positions.device)[:, None]
    starts = torch.arange(0, batch * seq, seq, out=tape.empty((batch,), torch.int64))
    return torch.add(positions, starts[:, None], out=tape.empty(positions.shape, torch.int64))


def _padding(lengths: Tensor, seq: int, tape: Any) -> Tensor:
    """(batch, seq), True behind each row's tokens."""
    if tape is None:
        return torch.arange(seq, device=lengths.device) >= lengths[:, None]
    place = torch.arange(seq, out=tape.empty((seq,), torch.int64))
    return torch.ge(place, lengths[:, None], out=tape.empty((len(lengths), seq), torch.bool))


def _classified(
    logits: Tensor, targets: Tensor | None, reduction: str, tape: Any, outputs: dict[str, Tensor] | None
) -> Tensor:
    """The loss, or without targets the logits (..., classes)."""
    if outputs is not None:
        outputs["logits"] = logits
    if targets is None:
        return logits
    loss: Tensor = ops.cross_entropy(logits, targets, reduction=reduction, tape=tape)
    return loss


def _classifier_dropout(config: BERTConfig) -> Dropout:
    p = config.classifier_dropout
    return Dropout(config.hidden_dropout_prob if p is None else p)


def _new(x: Tensor, tape: Any) -> Tensor:
    out: Tensor = tape.empty(x.shape, x.dtype)
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _narrowed(x: Tensor, dtype: torch.dtype, tape: Any) -> Tensor:
    return x if x.dtype == dtype else tape.empty(x.shape, dtype).copy_(x)
