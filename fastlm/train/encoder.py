"""BERT: the data of its tasks, and the model with the head of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from fastlm import models
from fastlm.data import DataError, Samples, WordPiece, read_questions, read_tagged
from fastlm.data.order import EpochOrder
from fastlm.data.samples import widest
from fastlm.models import BERTConfig
from fastlm.models.bert_checkpoint import read_config
from fastlm.tasks import Classification, EncoderTask, Examples, MaskedLM, MaskedText, SpanQA, Tagging
from fastlm.tasks.classification import known_labels, read_texts

from .config import DataOptions, OptionError, TrainConfig
from .directory import model_directory
from .family import Data, Facts, Family, sample_data
from .log import say
from .text import read_tokens
from .validate import MODELS, task_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["BERTFamily", "bert_config", "divided", "random_task"]

T = TypeVar("T")

_MODELS: dict[str, type[Any]] = {
    "classification": models.BERTForSequenceClassification,
    "tagging": models.BERTForTokenClassification,
    "span-qa": models.BERTForQuestionAnswering,
}


class BERTFamily(Family):
    """BERT with the head of a task, from scratch or from the weights of --init."""

    def read(self, config: TrainConfig, console: Console) -> Data:
        options, name = config.data, task_of(config)
        start = _start(config)
        path = options.tokenizer or start
        if name == "masked-lm":
            dataset = read_tokens(config, console, None if path is None else WordPiece.load(path), WordPiece)
            assert isinstance(dataset.tokenizer, WordPiece)
            tokenizer = dataset.tokenizer
            masked = MaskedLM.of(tokenizer, options.seq_len, **_masking(options))
            texts = [MaskedText(masked, split) for split in (dataset.training, dataset.validation)]
            task: EncoderTask = masked
            samples: Sequence[Samples] = texts
            held = dataset.path.stat().st_size + sum(text.nbytes for text in texts)
            facts, source = Facts(tokenizer.vocab_size, held=held), dataset.source
        else:
            assert path is not None
            tokenizer = WordPiece.load(path)
            task, examples = _labelled(options, name, tokenizer, config.run.seed)
            facts = Facts(
                tokenizer.vocab_size,
                getattr(task, "labels", ()),
                max(widest(part) for part in examples),
                sum(part.nbytes for part in examples),
            )
            samples, source = examples, ", ".join(options.data)
        training, held_out = samples
        sizes = f"{training.count:,} rows to learn, {held_out.count:,} held out"
        say(console, f"{name}: {source}; {sizes}, vocabulary {tokenizer.vocab_size:,}")
        return sample_data(config, tokenizer, task, facts, training, held_out)

    def task(self, config: TrainConfig, facts: Facts) -> EncoderTask:
        name, size = task_of(config), facts.vocab_size
        special = size, config.data.seq_len, 1, 2, 0
        if name == "masked-lm":
            ordinary, continues = np.arange(4, size), np.zeros(size, dtype=bool)
            return MaskedLM(*special, 3, ordinary, continues, **_masking(config.data))
        if name == "span-qa":
            return SpanQA(*special)
        return (Tagging if name == "tagging" else Classification)(*special, facts.labels or BERTConfig.labels)

    def model(self, config: TrainConfig, facts: Facts) -> nn.Module:
        start = _start(config)
        shape = bert_config(config, facts) if start is None else read_config(start, **_changes(config, facts))
        model: nn.Module = _kind(config)(shape)
        return model

    def started(self, config: TrainConfig, facts: Facts) -> nn.Module:
        """With --init its weights and shape, with the head's where it has them."""
        start = _start(config)
        if start is None:
            return self.model(config, facts)
        try:
            model: Any = _kind(config).from_pretrained(start, strict=False, **_changes(config, facts))
        except ValueError as error:
            raise OptionError("init", config.model.init, f"weights of a BERT that fit the task ({error})") from error
        if facts.vocab_size > model.config.vocab_size:
            raise OptionError("init", config.model.init, f"a model for a tokenizer of {facts.vocab_size} ids")
        return model

    def longest(self, config: TrainConfig) -> int | None:
        start = _start(config)
        return None if start is None else read_config(start).max_position_embeddings


def random_task(config: TrainConfig, name: Any) -> tuple[EncoderTask, nn.Module]:
    """(a task over made-up ids, its model) for an audit: of --init's shape and weights, or of the options'."""
    if name not in MODELS["bert"].tasks:
        raise OptionError("task", name, f"{', '.join(MODELS['bert'].tasks)} for --model bert")
    start = _start(config, fits=False)
    shape = bert_config(config, Facts(config.data.vocab_size)) if start is None else read_config(start)
    data = dataclasses.replace(config.data, task=name, seq_len=shape.max_position_embeddings)
    config, facts = dataclasses.replace(config, data=data), Facts(shape.vocab_size, shape.labels)
    family = BERTFamily()
    return family.task(config, facts), family.started(config, facts)


def _kind(config: TrainConfig) -> type[Any]:
    pretrained = models.BERTForPreTraining if config.data.next_sentence else models.BERTForMaskedLM
    return _MODELS.get(task_of(config), pretrained)


def _masking(options: DataOptions) -> dict[str, Any]:
    """MaskedLM's options."""
    return {name: getattr(options, name) for name in ("mask_rate", "next_sentence", "whole_word")}


def _changes(config: TrainConfig, facts: Facts) -> dict[str, Any]:
    """Of the configuration in --init."""
    dropout, labels = config.model.dropout, facts.labels or BERTConfig.labels
    return {"labels": labels, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def _start(config: TrainConfig, fits: bool = True) -> Path | None:
    """The directory of --init, checked to hold a BERT, and if it is to fit one of enough positions."""
    if config.model.init is None:
        return None
    try:
        directory = model_directory(Path(config.model.init).expanduser())
        longest = read_config(directory).max_position_embeddings
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError("init", config.model.init, f"a directory with a BERT ({error})") from error
    if fits and config.data.seq_len > longest:
        raise OptionError("seq_len", config.data.seq_len, f"up to {longest}, the positions of --init")
    return directory


def bert_config(config: TrainConfig, facts: Facts) -> BERTConfig:
    """The shape that the options describe."""
    shape = config.model
    return BERTConfig(
        vocab_size=facts.vocab_size,
        hidden_size=shape.n_embd,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        max_position_embeddings=config.data.seq_len,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        tie_word_embeddings=shape.tie,
        labels=facts.labels or BERTConfig.labels,
        pre_norm=shape.pre_norm,
        rotary=shape.position == "rotary",
    )


def _labelled(
    options: DataOptions, name: str, tokenizer: WordPiece, seed: int
) -> tuple[EncoderTask, list[Examples]]:
    """(the task, rows to learn and rows held out)."""
    sources = [options.data, options.validation_data]
    if name == "span-qa":
        questions = divided([list(read_questions(files)) if files else None for files in sources], options, seed)
        qa = SpanQA.of(tokenizer, options.seq_len)
        return qa, [qa.examples(tokenizer, part) for part in questions]
    if name == "tagging":
        words, labels_of = options.text_column, options.label_column
        found = [
            list(read_tagged(files, words_field=words, tags_field=labels_of)) if files else None for files in sources
        ]
        sentences = divided(found, options, seed)
        tags = sorted({tag for sentence in sentences[0] for tag in sentence.tags})
        known_labels([tag for s in sentences[1] for tag in s.tags], tags, "held-out data")
        tagging = Tagging.of(tokenizer, options.seq_len, _two(tags, options))
        return tagging, [tagging.examples(tokenizer, part) for part in sentences]
    columns = options.text_column, options.second_column, options.label_column
    rows = []
    for files in sources:
        texts = read_texts(files, *columns) if files else None
        rows.append(None if texts is None else list(zip(texts[0], texts[1] or texts[0], texts[2], strict=True)))
    parts = divided(rows, options, seed)
    labels = sorted({label for *_, label in parts[0]})
    known_labels([label for *_, label in parts[1]], labels, "held-out data")
    task = Classification.of(tokenizer, options.seq_len, _two(labels, options))
    samples: list[Examples] = []
    for part in parts:
        firsts, others, classes = ([row[i] for row in part] for i in range(3))
        samples.append(task.examples(tokenizer, firsts, others if options.second_column else None, classes))
    return task, samples


def _two(labels: Sequence[str], options: DataOptions) -> Sequence[str]:
    if len(labels) < 2:
        raise DataError(f"{', '.join(options.data)}: one label, {labels[0]!r}, in all rows; there must be two")
    return labels


def divided(rows: Sequence[list[T] | None], options: DataOptions, seed: int) -> list[list[T]]:
    """[rows to learn, rows held out]: the second given, or a random part of the first."""
    learned, held_out = rows
    assert learned is not None
    if held_out is not None:
        return [learned, held_out]
    most = max(1, int(options.validation_fraction * len(learned)))
    if len(learned) < 2:
        raise DataError(f"{', '.join(options.data)}: one row, which cannot be both learned and held out")
    order = [int(place) for place in EpochOrder(seed, -1, len(learned))(np.arange(len(learned)))]
    return [[learned[i] for i in sorted(order[most:])], [learned[i] for i in sorted(order[:most])]]
