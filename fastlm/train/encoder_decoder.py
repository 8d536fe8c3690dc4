"""The Transformer of 2017, trained on pairs of texts: translation, and whatever else makes a text of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastlm.backends import use_backend
from fastlm.data import (
    Codec,
    DataError,
    Pack,
    PackLoader,
    PackValidation,
    Pairs,
    TextPairs,
    Tokenizer,
    learn_tokenizer,
    read_aligned,
)
from fastlm.generate import generate
from fastlm.models import EncoderDecoder, EncoderDecoderConfig
from fastlm.registry import Spec
from fastlm.tasks import SequencePairs, SequenceToSequence, Task

from .config import RunOptions, TrainConfig
from .device import choose_device
from .encoder import divided
from .family import Data, Facts, Family, prefetched
from .feed import SampleFeed
from .log import say

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TransformerFamily", "packed_data", "transformer_config"]

_SHOWN = 3
_AUDITED, _AUDITED_PAIRS = 2, 4  # micro-batches of the audit, and pairs of each


class TransformerFamily(Family):
    """An encoder-decoder with one tokenizer, and one embedding, for both sides."""

    def read(self, config: TrainConfig, console: Console) -> Data:
        options = config.data
        texts = _texts(config)
        tokenizer, facts = self.tokenized(config, texts[0], console)
        end = facts.end_id
        task = _pairs_task(config, facts)
        parts = []
        for part in texts:
            sides = ([[*ids, end] for ids in tokenizer.encode_batch(side)] for side in (part.sources, part.targets))
            try:
                parts.append(SequencePairs(task, zip(*sides, strict=True)))
            except ValueError as error:
                raise DataError(f"{part.name}: {error}") from error
        sizes = f"{parts[0].count:,} pairs to learn, {parts[1].count:,} held out"
        say(console, f"{task.name}: {texts[0].name}; {sizes}, vocabulary {tokenizer.vocab_size:,}")
        long, empty = sum(part.too_long for part in parts), sum(part.empty for part in texts)
        if long or empty:
            say(console, f"left out: {long:,} pairs longer than --seq-len {options.seq_len}, {empty:,} with an empty side")
        facts = dataclasses.replace(facts, held=sum(part.nbytes for part in parts))
        references = list(zip(texts[1].sources[:_SHOWN], texts[1].targets[:_SHOWN], strict=True))

        def sample(model: Any, run: RunOptions) -> str:
            return _translations(model, tokenizer, references, run)

        return packed_data(config, tokenizer, task, facts, parts[0], parts[1], sample)

    def tokenized(self, config: TrainConfig, texts: TextPairs, console: Console) -> tuple[Tokenizer | Codec, Facts]:
        """The tokenizer of these texts to learn, given or learned now, and what a run takes of it."""
        options = config.data
        if options.tokenizer is not None:
            tokenizer = Tokenizer.of_bytes() if options.tokenizer == "bytes" else Tokenizer.load(options.tokenizer)
        else:
            with console.status("learning tokens"):
                tokenizer = learn_tokenizer([*texts.sources, *texts.targets], options.vocab_size)
        end = tokenizer.separator_id
        return tokenizer, Facts(tokenizer.vocab_size, end_id=end, start_id=end)

    def task(self, config: TrainConfig, facts: Facts) -> Task:
        return _pairs_task(config, facts)

    def model(self, config: TrainConfig, facts: Facts) -> EncoderDecoder:
        return EncoderDecoder(transformer_config(config, facts))

    def audit_batches(self, config: TrainConfig, facts: Facts) -> list[dict[str, Spec]]:
        room = _audited(config)
        limits = _pairs_task(config, facts).limits(room)
        return [{name: Spec(limit.shape, torch.int64) for name, limit in limits.items()}] * _AUDITED


def _pairs_task(config: TrainConfig, facts: Facts) -> SequenceToSequence:
    return SequenceToSequence(facts.vocab_size, config.data.seq_len, facts.start_id, facts.end_id, facts.start_id)


def packed_data(
    config: TrainConfig, tokenizer: Tokenizer | Codec, task: SequenceToSequence, facts: Facts, training: Pairs, held_out: Pairs,
    sample: Callable[[Any, RunOptions], str] | None = None,
) -> Data:  # fmt: skip
    """Data of pairs that are packed, --batch-size times --seq-len tokens a side. sample: see `Data`."""
    run, optimizer = config.run, config.optimizer
    room = Pack.of(optimizer.batch_size * config.data.seq_len)
    loader = PackLoader(training, room, run.seed, prefetch=prefetched(config))
    few = PackLoader(training, _audited(config), run.seed)
    return Data(
        tokenizer,
        task,
        facts,
        loader,
        SampleFeed(loader, optimizer.grad_accum, choose_device(run.device)[0]),
        PackValidation(held_out, room, run.eval_batches or None),
        [few.next_batch() for _ in range(_AUDITED)],
        sample,
    )


def transformer_config(config: TrainConfig, facts: Facts) -> EncoderDecoderConfig:
    """The shape that the options describe. Dropout is the paper's: of embeddings and of each branch."""
    shape = config.model
    return EncoderDecoderConfig(
        vocab_size=facts.vocab_size,
        n_positions=config.data.seq_len,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_decoder_layer=shape.decoder_layers,
        n_head=shape.n_head,
        n_inner=shape.n_inner,
        activation="gelu_tanh" if shape.mlp == "gelu" else shape.mlp,
        position=shape.position,
        norm=shape.norm,
        pre_norm=shape.pre_norm,
        bias=shape.bias,
        tie_word_embeddings=shape.tie,
        label_smoothing=shape.label_smoothing,
        embd_pdrop=shape.dropout,
        resid_pdrop=shape.dropout,
        pad_token_id=facts.start_id,
        decoder_start_token_id=facts.start_id,
        eos_token_id=facts.end_id,
    )


def _audited(config: TrainConfig) -> Pack:
    """The room of a micro-batch of the audit, whose plain formulas pad every sequence to the longest there may be."""
    return Pack(config.data.seq_len, _AUDITED_PAIRS)


def _texts(config: TrainConfig) -> list[TextPairs]:
    """[pairs to learn, pairs held out]."""
    options = config.data
    columns = options.source_column, options.target_column
    learned = read_aligned(options.data, options.target, columns)
    if options.validation_data:
        return [learned, read_aligned(options.validation_data, options.validation_target, columns)]
    pairs = list(zip(learned.sources, learned.targets, strict=True))
    parts = divided([pairs, None], options, config.run.seed)
    counts = [learned.empty, 0]
    return [
        TextPairs(learned.name, [source for source, _ in part], [target for _, target in part], empty)
        for part, empty in zip(parts, counts, strict=True)
    ]


def _translations(
    model: Any, tokenizer: Tokenizer | Codec, pairs: Sequence[tuple[str, str]], run: RunOptions
) -> str:
    """Some held-out sources, what the model makes of each, always taking the likeliest token, and what is expected."""
    end, training = tokenizer.separator_id, model.training
    most = None if model.context is None else model.context - 1
    sources = tokenizer.encode_batch([source for source, _ in pairs])
    model.eval()
    with use_backend(run.backend):
        found = generate(
            model, [[*ids[:most], end] for ids in sources], run.sample_tokens, temperature=0.0, stop={end},
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
    model.train(training)
    shown = zip(pairs, map(tokenizer.decode, found), strict=True)
    return "\n\n".join(f"source    {source}\nmodel     {text}\nreference {target}" for (source, target), text in shown)
