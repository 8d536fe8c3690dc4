"""What benchmarks.train_step measures: shapes of models, tasks made of them, their batches, our model and PyTorch's.

A batch is the same for all contenders. Of an encoder-decoder whose rows differ in length ours gets it packed, PyTorch's
padded to the longest row, as there is no other way that its users go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_bert import PlainBERT
from benchmarks.plain_encoder_decoder import PlainEncoderDecoder
from benchmarks.plain_gpt import PlainGPT
from benchmarks.plain_lstm import PlainLSTM
from fastlm.data import IGNORED, Draws
from fastlm.engine import AdamWConfig
from fastlm.models import (
    GPT,
    LSTM,
    BERTConfig,
    BERTForPreTraining,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    LSTMConfig,
)
from fastlm.tasks import MaskedLM
from fastlm.train.config import TrainConfig
from fastlm.train.decoder import gpt_config
from fastlm.train.encoder import bert_config
from fastlm.train.family import Facts
from fastlm.train.presets import BERT_PRESETS, LSTM_PRESETS, PRESETS

__all__ = ["FAMILIES", "SHAPES", "Family", "Shape", "Task", "batches", "for_peer", "model_of"]

Batch = dict[str, Tensor]

_SPREAD, _RATIO = 0.6, 0.17  # standard deviations of log(source tokens) and of log(target tokens / source tokens)
_POOL = 16  # batches that are sorted together
_PAD, _CLS, _SEP, _MASK, _ORDINARY = range(5)


@dataclass(frozen=True)
class Task:
    """What to measure; plain JSON values.

    family: of FAMILIES. config: the fields of its configuration. target_len: of an encoder-decoder, else 0.
    rows: "full": all of seq_len (and target_len) tokens. Else of an encoder-decoder, in tokens: sources log-normal of mean
    seq_len (English sentences: WikiText-2's have a deviation of 0.6 in the logarithm), targets as long but for a factor
    (Multi30k's German: a deviation of 0.17) and target_len / seq_len; "random": as they come; "sorted": batches of
    neighbours among 16 batches' pairs sorted by source, the one in the middle. All micro-batches have the same lengths.
    moments, recompute: of our engine, which saves memory by them.
    data: options of a loss curve (see `Curve`), empty where steps are timed.
    """

    family: str
    config: dict[str, Any]
    batch_size: int
    seq_len: int
    accumulate: int
    device: str
    seed: int
    data: dict[str, Any]
    target_len: int = 0
    rows: str = "full"
    moments: str = "float32"
    recompute: str = "none"

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of each row of a micro-batch: the source's, and of an encoder-decoder the target's."""
        if self.rows == "full":
            return [self.seq_len] * self.batch_size, [self.target_len] * self.batch_size
        draw = np.random.Generator(np.random.Philox(self.seed)).standard_normal
        count = self.batch_size * (_POOL if self.rows == "sorted" else 1)
        source = self.seq_len * np.exp(_SPREAD * draw(count) - _SPREAD**2 / 2)
        target = source * np.exp(_RATIO * draw(count)) * self.target_len / self.seq_len
        if self.rows == "sorted":
            order = np.argsort(source, kind="stable")
            middle = order[(count - self.batch_size) // 2 :][: self.batch_size]
            source, target = source[middle], target[middle]
        longest = self.config["n_positions"]
        counts = [np.clip(np.rint(n), 2, longest).astype(int).tolist() for n in (source, target)]
        return counts[0], counts[1]

    @cached_property
    def tokens(self) -> int:
        """In one step, of both sides, without padding."""
        return self.accumulate * sum(map(sum, self.lengths))

    @property
    def padding(self) -> float:
        """Share of a padded batch that is padding."""
        sides = [side for side in self.lengths if any(side)]
        return 1.0 - sum(map(sum, sides)) / sum(len(side) * max(side) for side in sides)

    @property
    def dims(self) -> dict[str, Any]:
        """What makes a row of results another row, beside the model."""
        source, target = (max(side) for side in self.lengths)
        across = {"target_len": target, "rows": self.rows} if target else {}
        saving = {n: v for n, v in (("moments", self.moments), ("recompute", self.recompute)) if v not in ("float32", "none")}
        return {"batch_size": self.batch_size, "seq_len": source, **across, "accumulate": self.accumulate, **saving}

    @property
    def label(self) -> str:
        """The batch in words."""
        d = self.dims
        sizes = f"({d['seq_len']} + {d['target_len']})" if self.target_len else str(d["seq_len"])
        padded = f", of which {self.padding:.0%} padding" if self.padding else ""
        saving = "".join(f", {n} {d[n]}" for n in ("moments", "recompute") if n in d)
        return f"batch {self.batch_size} x {sizes} tokens{padded} x {self.accumulate}{saving}"

    @property
    def mlp(self) -> tuple[int, int, int]:
        """(rows, inner width, width) of the MLP's products, or of those of their size."""
        c = self.config
        width = c["hidden_size"] if self.family == "bert" else c["n_embd"]
        return sum(self.lengths[0]), c.get("n_inner") or c.get("intermediate_size") or 4 * width, width


@dataclass(frozen=True)
class Shape:
    """A model by name, with the batch that it is measured at, and what a loss curve needs of a preset.

    longest: the most tokens that a row can have, None for any. rows: those that it can be measured with.
    """

    family: str
    config: Any
    batch_size: int
    seq_len: int
    target_len: int = 0
    preset: TrainConfig | None = None
    longest: int | None = None
    rows: tuple[str, ...] = ("full",)


@dataclass(frozen=True)
class Family:
    """Our model and PyTorch's, both by our config, and how they begin in a comparison.

    start: fields of the config that weights are drawn by. lr: of the optimizer. At the one that BERT is trained with after its
    warm-up, and with 12 layers at 2e-5, the first steps of fresh weights jump so that rounding, PyTorch's as well, shows a
    hundredfold.
    """

    config: Callable[..., Any]
    model: Callable[[Any], nn.Module]
    plain: Callable[[Any], nn.Module]
    start: Callable[[Any], dict[str, Any]]
    lr: float = AdamWConfig.lr


FAMILIES = {
    "gpt": Family(GPTConfig, GPT, PlainGPT, lambda c: {"initializer_range": c.n_embd**-0.5}),
    "lstm": Family(LSTMConfig, LSTM, PlainLSTM, lambda c: {"initializer_range": c.n_embd**-0.5}),
    "bert": Family(BERTConfig, BERTForPreTraining, PlainBERT, lambda c: {"initializer_range": c.hidden_size**-0.5}, 2e-6),
    "encoder-decoder": Family(EncoderDecoderConfig, EncoderDecoder, PlainEncoderDecoder, lambda c: {}, 5e-5),
}


def _gpt(preset: TrainConfig) -> Shape:
    return Shape("gpt", gpt_config(preset, preset.data.vocab_size), preset.optimizer.batch_size, preset.data.seq_len,
                 preset=preset)  # fmt: skip


def _lstm(vocab_size: int) -> Shape:
    preset = LSTM_PRESETS["small"]
    shape = LSTMConfig(vocab_size, preset.model.n_embd, n_layer=preset.model.n_layer)
    return Shape("lstm", shape, preset.optimizer.batch_size, preset.data.seq_len, preset=preset)


def _bert(name: str, batch_size: int, seq_len: int) -> Shape:
    preset = BERT_PRESETS[name]
    config = dataclasses.replace(
        bert_config(preset, Facts(preset.data.vocab_size)), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return Shape("bert", config, batch_size, seq_len, longest=config.max_position_embeddings)


def _translation(config: EncoderDecoderConfig, batch_size: int, seq_len: int) -> Shape:
    rows = "full", "sorted", "random"
    return Shape("encoder-decoder", config, batch_size, seq_len, seq_len, longest=config.n_positions, rows=rows)


_T5 = EncoderDecoderConfig(
    vocab_size=32128, n_positions=512, n_embd=512, n_layer=8, n_head=6, head_dim=64, n_inner=1024,
    activation="geglu_tanh", position="relative", norm="rms", layer_norm_epsilon=1e-6, pre_norm=True, bias=False,
    scale_attention=False, scale_embedding=False, tie_word_embeddings=False, initializer="t5",
)  # fmt: skip

SHAPES = {
    **{name: _gpt(PRESETS[name]) for name in ("tiny", "small", "gpt2")},
    "lstm": _lstm(LSTM_PRESETS["small"].data.vocab_size),
    "lstm-bytes": _lstm(257),
    "bert": _bert("base", 8, 128),
    "bert-mini": _bert("mini", 32, 128),
    "transformer": _translation(EncoderDecoderConfig(n_positions=128, label_smoothing=0.1), 32, 32),
    "t5": Shape("encoder-decoder", _T5, 4, 512, 114, longest=_T5.n_positions),
}


def model_of(task: Task, **fields: Any) -> nn.Module:
    """The task's model with these fields of its config; a recurrent one carries its state from batch to batch."""
    family = FAMILIES[task.family]
    model = family.model(family.config(**task.config | fields))
    if isinstance(model, LSTM):
        model.carry(task.batch_size)
    return model


def batches(task: Task) -> list[Batch]:
    """The micro-batches, as our models take them; ids from torch's generator."""
    if task.family == "bert":
        made = [_pre_training(task, i) for i in range(task.accumulate)]
    elif task.family == "encoder-decoder":
        made = [_pairs(task) for _ in range(task.accumulate)]
    else:
        shape = task.accumulate, task.batch_size, task.seq_len + 1
        ids = torch.randint(task.config["vocab_size"], shape)
        made = [{"input_ids": row[:, :-1].contiguous(), "targets": row[:, 1:].contiguous()} for row in ids]
    return [{name: t.to(task.device) for name, t in batch.items()} for batch in made]


def _pre_training(task: Task, number: int) -> Batch:
    """Full rows of two segments with their masks, as the masked-LM task draws them."""
    vocab, batch, seq = task.config["vocab_size"], task.batch_size, task.seq_len
    masked = MaskedLM(
        vocab, seq, _CLS, _SEP, _PAD, _MASK, np.arange(_ORDINARY, vocab), np.zeros(vocab, dtype=bool)
    )
    ids = torch.randint(_ORDINARY, vocab, (batch, seq))
    ids[:, 0], ids[:, seq // 2], ids[:, -1] = _CLS, _SEP, _SEP
    rows = [masked.mask(row.numpy(), Draws(task.seed, number, i)) for i, row in enumerate(ids)]
    positions, targets, seen = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return {
        "input_ids": seen, "token_type_ids": (torch.arange(seq) > seq // 2).long().repeat(batch, 1),
        "positions": positions, "targets": targets, "next_sentence": torch.randint(2, (batch,)),
    }  # fmt: skip


def _pairs(task: Task) -> Batch:
    """Sources and targets; packed, unless all rows are full."""
    vocab = task.config["vocab_size"]
    source, target = task.lengths
    input_ids, targets = (torch.randint(2, vocab, (sum(side),)) for side in (source, target))
    begins, target_begins = (torch.tensor([0, *side]).cumsum(0) for side in (source, target))
    decoder_input_ids = targets.roll(1)
    decoder_input_ids[target_begins[:-1]] = task.config["decoder_start_token_id"]
    batch = {"input_ids": input_ids, "targets": targets, "decoder_input_ids": decoder_input_ids}
    if task.rows == "full":
        return {name: t.view(task.batch_size, -1) for name, t in batch.items()}
    batch |= {"cu_seqlens": begins, "target_cu_seqlens": target_begins}
    if task.config["position"] != "relative":
        places = [torch.cat([torch.arange(n) for n in side]) for side in (source, target)]
        batch |= {"positions": places[0], "target_positions": places[1]}
    return batch


def for_peer(batch: Batch) -> Batch:
    """A batch as PyTorch's model takes it: packed sequences padded, with a mask."""
    if "cu_seqlens" not in batch:
        return batch
    ends, target_ends = (batch[name][1:].tolist() for name in ("cu_seqlens", "target_cu_seqlens"))

    def padded(name: str, ends: list[int], value: int) -> Tensor:
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        return nn.utils.rnn.pad_sequence(list(batch[name].split(sizes)), batch_first=True, padding_value=value)

    input_ids = padded("input_ids", ends, -1)
    return {
        "input_ids": input_ids.clamp(min=_PAD), "source_mask": (input_ids >= 0)[:, None, None],
        "decoder_input_ids": padded("decoder_input_ids", target_ends, _PAD),
        "targets": padded("targets", target_ends, IGNORED),
    }  # fmt: skip
