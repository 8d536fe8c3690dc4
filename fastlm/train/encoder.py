"""The parts of a run that trains BERT: tokenizer, task, samples to learn and held out, model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from fastlm import models
from fastlm.data import (
    DataError,
    Dataset,
    Samples,
    WordPiece,
    read_questions,
    read_tagged,
)
from fastlm.data.order import EpochOrder
from fastlm.models import BERTConfig
from fastlm.models.bert_checkpoint import read_config
from fastlm.tasks import Classification, EncoderTask, MaskedLM, MaskedText, SpanQA, Tagging
from fastlm.tasks.classification import known_labels, read_texts

from .config import DataOptions, OptionError, TrainConfig, task_of
from .directory import model_directory

__all__ = ["EncoderParts", "bert_config", "encoder_parts", "model_of", "random_task", "task_options"]

T = TypeVar("T")


@dataclass(frozen=True)
class EncoderParts:
    """``text``: says in words what there is to learn."""

    tokenizer: WordPiece
    task: EncoderTask
    training: Samples
    held_out: Samples
    model: nn.Module
    text: str


def encoder_parts(config: TrainConfig, tokenize: Callable[..., Dataset]) -> EncoderParts:
    """Reads the data and makes the model, its weights fresh from the seed or those of --init.

    tokenize: makes tokens of plain text, given the tokenizer or its path.

    Raises:
        DataError: the data or the tokenizer cannot be used.
        OptionError: --init cannot.
    """
    options, name = config.data, task_of(config)
    start = _start(config)
    path = options.tokenizer or start
    if name == "masked-lm":
        dataset = tokenize(None if path is None else WordPiece.load(path))
        assert isinstance(dataset.tokenizer, WordPiece)
        tokenizer = dataset.tokenizer
        masked = MaskedLM.of(tokenizer, options.seq_len, **task_options(options))
        task: EncoderTask = masked
        samples: list[Samples] = [MaskedText(masked, split) for split in (dataset.training, dataset.validation)]
        labels: tuple[str, ...] = BERTConfig.labels
        text = dataset.source
    else:
        assert path is not None
        tokenizer = WordPiece.load(path)
        task, samples = _labelled(options, name, tokenizer, config.run.seed)
        labels = getattr(task, "labels", BERTConfig.labels)
        text = ", ".join(options.data)
    model = model_of(config, name, tokenizer.vocab_size, labels, start)
    sizes = f"{samples[0].count:,} rows to learn, {samples[1].count:,} held out"
    return EncoderParts(
        tokenizer, task, samples[0], samples[1], model, f"{name}: {text}; {sizes}, vocabulary {tokenizer.vocab_size:,}"
    )


def random_task(config: TrainConfig, name: str) -> tuple[EncoderTask, nn.Module]:
    """(a task over made-up ids, its model) for an audit: of --init's shape and weights, or of the options'."""
    start = _start(config, fits=False)
    shape = bert_config(config, config.data.vocab_size) if start is None else read_config(start)
    size, longest = shape.vocab_size, shape.max_position_embeddings
    special = (size, longest, 1, 2, 0)
    tasks: dict[str, Callable[[], EncoderTask]] = {
        "masked-lm": lambda: MaskedLM(
            *special, 3, np.arange(4, size), np.zeros(size, dtype=bool), **task_options(config.data)
        ),
        "classification": lambda: Classification(*special, shape.labels),
        "tagging": lambda: Tagging(*special, shape.labels),
        "span-qa": lambda: SpanQA(*special),
    }
    if name not in tasks:
        raise OptionError("task", name, f"{', '.join(tasks)} for --model bert")
    return tasks[name](), model_of(config, name, size, shape.labels, start)


def task_options(options: DataOptions) -> dict[str, Any]:
    """MaskedLM's."""
    names = ("mask_rate", "next_sentence", "whole_word")
    return {name: getattr(options, name) for name in names}


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


def bert_config(config: TrainConfig, vocab_size: int, labels: tuple[str, ...] = BERTConfig.labels) -> BERTConfig:
    """The shape that the options describe, for a tokenizer of so many ids."""
    shape = config.model
    return BERTConfig(
        vocab_size=vocab_size,
        hidden_size=shape.n_embd,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        max_position_embeddings=config.data.seq_len,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        tie_word_embeddings=shape.tie,
        labels=labels,
        pre_norm=shape.pre_norm,
        rotary=shape.position == "rotary",
    )


def model_of(
    config: TrainConfig, name: str, vocab_size: int, labels: tuple[str, ...] = BERTConfig.labels, start: Path | None = None
) -> nn.Module:
    """The model of a task; with `start`, its weights and shape from that directory, with the head's where it has them."""
    kinds: dict[str, Any] = {
        "masked-lm": models.BERTForPreTraining if config.data.next_sentence else models.BERTForMaskedLM,
        "classification": models.BERTForSequenceClassification,
        "tagging": models.BERTForTokenClassification,
        "span-qa": models.BERTForQuestionAnswering,
    }
    if start is None:
        model: nn.Module = kinds[name](bert_config(config, vocab_size, labels))
        return model
    dropout = config.model.dropout
    try:
        model = kinds[name].from_pretrained(
            start, strict=False, labels=labels, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
    except ValueError as error:
        raise OptionError("init", config.model.init, f"weights of a BERT that fit the task ({error})") from error
    held: Any = model.config
    if vocab_size > held.vocab_size:
        raise OptionError("init", config.model.init, f"a model for a tokenizer of {vocab_size} ids")
    return model


def _labelled(
    options: DataOptions, name: str, tokenizer: WordPiece, seed: int
) -> tuple[EncoderTask, list[Samples]]:
    """(the task, rows to learn and rows held out)."""
    sources = [options.data, options.validation_data]
    if name == "span-qa":
        questions = _divided([list(read_questions(files)) if files else None for files in sources], options, seed)
        qa = SpanQA.of(tokenizer, options.seq_len)
        return qa, [qa.examples(tokenizer, part) for part in questions]
    if name == "tagging":
        sentences = _divided([list(read_tagged(files)) if files else None for files in sources], options, seed)
        tags = sorted({tag for sentence in sentences[0] for tag in sentence.tags})
        known_labels([tag for s in sentences[1] for tag in s.tags], tags, "held-out data")
        tagging = Tagging.of(tokenizer, options.seq_len, _two(tags, options))
        return tagging, [tagging.examples(tokenizer, part) for part in sentences]
    columns = options.text_column, options.second_column, options.label_column
    rows = []
    for files in sources:
        found = read_texts(files, *columns) if files else None
        rows.append(None if found is None else list(zip(found[0], found[1] or found[0], found[2], strict=True)))
    parts = _divided(rows, options, seed)
    labels = sorted({label for *_, label in parts[0]})
    known_labels([label for *_, label in parts[1]], labels, "held-out data")
    task = Classification.of(tokenizer, options.seq_len, _two(labels, options))
    samples: list[Samples] = []
    for part in parts:
        texts, others, classes = ([row[i] for row in part] for i in range(3))
        samples.append(task.examples(tokenizer, texts, others if options.second_column else None, classes))
    return task, samples


def _two(labels: Sequence[str], options: DataOptions) -> Sequence[str]:
    if len(labels) < 2:
        raise DataError(f"{', '.join(options.data)}: one label, {labels[0]!r}, in all rows; there must be two")
    return labels


def _divided(rows: Sequence[list[T] | None], options: DataOptions, seed: int) -> list[list[T]]:
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
