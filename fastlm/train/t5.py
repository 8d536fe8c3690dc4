"""T5: pre-trained by span corruption of plain text, or trained on pairs; from scratch, or from the weights of --init."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm.backends import use_backend
from fastlm.data import Codec, DataError, SampleValidation, TextPairs, Tokenizer
from fastlm.generate import generate
from fastlm.models import EncoderDecoder, EncoderDecoderConfig
from fastlm.models.encoder_decoder_files import read_shape
from fastlm.registry import Spec
from fastlm.tasks import SpanCorruption, SpanText, Task, with_sentinels

from .config import OptionError, RunOptions, TrainConfig
from .directory import model_directory
from .encoder_decoder import TransformerFamily, transformer_config
from .family import Data, Facts, Family, sample_data
from .log import say
from .text import read_tokens
from .validate import task_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["T5Family", "t5_config"]

_SHOWN = 3
_SPANS = "span-corruption"


class T5Family(TransformerFamily):
    """T5, or with --init whatever encoder-decoder there is; a tokenizer of ours gets <pad> and sentinels."""

    def read(self, config: TrainConfig, console: Console) -> Data:
        return _span_data(config, console) if task_of(config) == _SPANS else super().read(config, console)

    def tokenized(self, config: TrainConfig, texts: TextPairs, console: Console) -> tuple[Tokenizer | Codec, Facts]:
        start = _start(config)
        tokenizer = _given_tokenizer(config, start)
        if tokenizer is None:
            tokenizer, _ = super().tokenized(config, texts, console)
        tokenizer = _complete(tokenizer, start)
        return tokenizer, _facts(tokenizer, start, config)

    def task(self, config: TrainConfig, facts: Facts) -> Task:
        if task_of(config) != _SPANS:
            return super().task(config, facts)
        special = facts.start_id, facts.end_id
        sentinels = tuple(i for i in reversed(range(facts.vocab_size)) if i not in special)
        return _span_task(config, lambda **options: SpanCorruption(facts.vocab_size, sentinels=sentinels, **options), *special)

    def model(self, config: TrainConfig, facts: Facts) -> EncoderDecoder:
        start = _start(config)
        return EncoderDecoder(t5_config(config, facts) if start is None else _changed(read_shape(start), config))

    def started(self, config: TrainConfig, facts: Facts) -> EncoderDecoder:
        """With --init its weights."""
        model = self.model(config, facts)
        if (start := _start(config)) is not None:
            try:
                held = EncoderDecoder.from_pretrained(start)
                if held.config.tie_word_embeddings != model.config.tie_word_embeddings:  # only the weights tell
                    model = EncoderDecoder(_changed(held.config, config))
            except ValueError as error:
                raise OptionError("init", config.model.init, f"weights of a whole encoder-decoder ({error})") from error
            model.load_state_dict(held.state_dict())
        return model

    def longest(self, config: TrainConfig) -> int | None:
        start = _start(config)
        shape = None if start is None else read_shape(start)
        return None if shape is None or shape.position == "relative" else shape.n_positions

    def audit_batches(self, config: TrainConfig, facts: Facts) -> list[dict[str, Spec]]:
        if task_of(config) == _SPANS:
            return Family.audit_batches(self, config, facts)
        return super().audit_batches(config, facts)


def t5_config(config: TrainConfig, facts: Facts) -> EncoderDecoderConfig:
    """The shape that the options describe. Dropout is everywhere, and GELU in tanh's form, as in transformers' T5."""
    shape, p = config.model, config.model.dropout
    return dataclasses.replace(
        transformer_config(config, facts),
        activation="geglu_tanh" if shape.mlp == "geglu" else "gelu_tanh" if shape.mlp == "gelu" else shape.mlp,
        layer_norm_epsilon=1e-6,
        scale_attention=False,
        scale_embedding=False,
        scale_logits=shape.tie,
        initializer="t5",
        attn_pdrop=p,
        inner_pdrop=p,
        final_pdrop=p,
    )


def _changed(held: EncoderDecoderConfig, config: TrainConfig) -> EncoderDecoderConfig:
    """The shape of --init with the dropout and the smoothing of the options: T5's everywhere, others' of their branches."""
    p = config.model.dropout
    more: dict[str, Any] = {"attn_pdrop": p, "inner_pdrop": p, "final_pdrop": p} if held.position == "relative" else {}
    changes: dict[str, Any] = {"embd_pdrop": p, "resid_pdrop": p, "label_smoothing": config.model.label_smoothing}
    return dataclasses.replace(held, **changes, **more)


def _start(config: TrainConfig) -> Path | None:
    """The directory of --init, checked to hold an encoder-decoder that takes rows of --seq-len."""
    if config.model.init is None:
        return None
    try:
        directory = model_directory(Path(config.model.init).expanduser())
        shape = read_shape(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise OptionError("init", config.model.init, f"a directory with a T5 or Marian ({error})") from error
    if shape.position != "relative" and config.data.seq_len > shape.n_positions:
        raise OptionError("seq_len", config.data.seq_len, f"up to {shape.n_positions}, the positions of --init")
    return directory


def _given_tokenizer(config: TrainConfig, start: Path | None) -> Tokenizer | Codec | None:
    """That of --tokenizer, else of --init; None where one is to be learned."""
    path = config.data.tokenizer or start
    if path is None:
        return None
    if path == "bytes":
        return Tokenizer.of_bytes()
    try:
        return Tokenizer.load(path)
    except DataError:  # not byte-level
        if start is None:
            raise
        return Codec.load(path, read_shape(start).eos_token_id)


def _complete(tokenizer: Tokenizer | Codec, start: Path | None) -> Tokenizer | Codec:
    """With <pad> and sentinels, where the vocabulary is not that of --init."""
    return with_sentinels(tokenizer) if start is None and isinstance(tokenizer, Tokenizer) else tokenizer


def _facts(tokenizer: Tokenizer | Codec, start: Path | None, config: TrainConfig) -> Facts:
    if start is None:
        pad = tokenizer.special_id("<pad>")
        assert pad is not None
        return Facts(tokenizer.vocab_size, end_id=tokenizer.separator_id, start_id=pad)
    shape = read_shape(start)
    if tokenizer.vocab_size > shape.vocab_size:
        raise OptionError("init", config.model.init, f"a model for a tokenizer of {tokenizer.vocab_size} ids")
    return Facts(shape.vocab_size, end_id=shape.eos_token_id, start_id=shape.decoder_start_token_id)


# --- span corruption


def _span_task(config: TrainConfig, make: Any, pad: int, end: int) -> SpanCorruption:
    options = config.data
    try:
        task: SpanCorruption = make(
            seq_len=options.seq_len, pad_id=pad, eos_id=end, noise_density=options.mask_rate, mean_span=options.mean_span
        )
    except ValueError as error:
        raise OptionError("seq_len", options.seq_len, f"rows that span corruption can have ({error})") from error
    return task


def _span_data(config: TrainConfig, console: Console) -> Data:
    start = _start(config)
    dataset = read_tokens(config, console, _given_tokenizer(config, start))
    assert isinstance(dataset.tokenizer, Tokenizer | Codec)
    tokenizer = _complete(dataset.tokenizer, start)
    facts = dataclasses.replace(_facts(tokenizer, start, config), held=dataset.path.stat().st_size)
    if not tokenizer.sentinels:
        raise DataError(f"the tokenizer of {config.model.init} has no <extra_id_0>, which span corruption needs")
    task = _span_task(
        config,
        lambda **options: SpanCorruption(facts.vocab_size, sentinels=tokenizer.sentinels, **options),
        facts.start_id,
        facts.end_id,
    )
    training, held_out = (SpanText(task, split) for split in (dataset.training, dataset.validation))
    sizes = f"{training.count:,} rows to learn, {held_out.count:,} held out"
    say(console, f"{task.name}: {dataset.source}; {sizes}, vocabulary {tokenizer.vocab_size:,}")
    (shown,) = SampleValidation(held_out, _SHOWN, _SHOWN)

    def sample(model: Any, run: RunOptions) -> str:
        return _filled_in(model, tokenizer, shown, run)

    return dataclasses.replace(
        sample_data(config, tokenizer, task, facts, training, held_out), sample=sample
    )


def _filled_in(model: Any, tokenizer: Tokenizer | Codec, batch: Any, run: RunOptions) -> str:
    """Some held-out texts with spans cut out, what the model says stood there, and what did."""
    training, end = model.training, tokenizer.separator_id
    rows = [(ids[:n].tolist(), t[t != -100].tolist()) for ids, n, t in zip(*(batch[k] for k in _ROW), strict=True)]
    rows = [(source, target) for source, target in rows if target]
    model.eval()
    with use_backend(run.backend), torch.no_grad():
        found = generate(
            model, [source for source, _ in rows], run.sample_tokens, temperature=0.0, stop={end},
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
    model.train(training)

    def text(ids: Sequence[int]) -> str:
        text_of = tokenizer.decode_all if isinstance(tokenizer, Codec) else tokenizer.decode
        return text_of([i for i in ids if i != end])

    shown = zip(rows, found, strict=True)
    return "\n\n".join(f"{text(a)}\nmodel     {text(said)}\nreference {text(b)}" for (a, b), said in shown)


_ROW = ("input_ids", "lengths", "targets")
