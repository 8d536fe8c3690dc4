"""From options to the parts of a run: chip, dtype and threads, tokens, batches, model and engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastlm.data import (
    Dataset,
    Loader,
    SampleLoader,
    SampleValidation,
    Tokenizer,
    ValidationLoader,
    WordPiece,
    prepare,
)
from fastlm.engine import AdamWConfig, Engine
from fastlm.models import GPT, LSTM, GPTConfig, LSTMConfig
from fastlm.tasks import CausalLM, Task

from . import generators
from .config import TrainConfig
from .device import choose_device, choose_dtype, choose_threads
from .encoder import encoder_parts
from .feed import Feed, SampleFeed
from .validation import Validation

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Parts", "build", "choose_hardware", "gpt_config", "make_model", "moved_from_start", "read_tokens", "say"]

M = TypeVar("M", bound=nn.Module)

AUDIT_ROWS, AUDIT_SEQ = 2, 512


@dataclass(frozen=True)
class Parts:
    """What a run is made of. ``audit_batch``: a few rows to learn, on the device."""

    tokenizer: Tokenizer | WordPiece
    task: Task
    loader: Loader | SampleLoader
    feed: Feed | SampleFeed
    validation: Validation
    engine: Engine
    audit_batch: dict[str, torch.Tensor]


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no colours for numbers, no folding."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def choose_hardware(config: TrainConfig, console: Console) -> TrainConfig:
    """Decides what ``auto`` stands for, says why, and returns the options with the dtype that was chosen.

    The device stays ``auto`` in them: a run may go on elsewhere.
    """
    device, device_why = choose_device(config.run.device)
    dtype, dtype_why = choose_dtype(config.run.dtype, device)
    threads, threads_why = choose_threads()
    torch.set_num_threads(threads)
    name: Any = str(dtype).removeprefix("torch.")
    chosen = f"device {device} ({device_why}), {name} ({dtype_why}), {threads} threads ({threads_why})"
    say(console, chosen)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=name))


def build(config: TrainConfig, console: Console) -> Parts:
    """Makes everything from options whose dtype is chosen; the model's weights are fresh from the seed.

    Raises:
        DataError: the text, the tokenizer or the cache cannot be used.
        MemoryNeeded: the run certainly does not fit into memory.
    """
    generators.seed_all(config.run.seed)
    return _encoder(config, console) if config.model.model == "bert" else _decoder(config, console)


def _decoder(config: TrainConfig, console: Console) -> Parts:
    from .plan import choose_recompute

    run, optimizer, seq_len = config.run, config.optimizer, config.data.seq_len
    device, _ = choose_device(run.device)
    dataset = read_tokens(config, console)
    tokenizer = dataset.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    task = CausalLM(tokenizer.vocab_size, tokenizer.bytes_per_token)
    contiguous = config.model.model == "lstm" and config.model.carry
    loader = Loader(
        dataset.training, optimizer.batch_size, seq_len, run.seed, prefetch=_prefetch(config, device), contiguous=contiguous
    )
    windows = run.eval_batches * optimizer.batch_size or None
    held_out = ValidationLoader(dataset.validation, optimizer.batch_size, seq_len, windows=windows)
    recompute = choose_recompute(config, dataset, console)
    model = make_model(config, tokenizer.vocab_size)
    if isinstance(model, GPT):
        model.recompute = recompute
    few = ValidationLoader(dataset.training, AUDIT_ROWS, min(seq_len, AUDIT_SEQ), windows=AUDIT_ROWS)
    return Parts(
        tokenizer,
        task,
        loader,
        Feed(loader, task, optimizer.batch_size, seq_len, optimizer.grad_accum, device),
        Validation(task, held_out, device),
        _engine(model, config, device),
        {name: tensor.to(device) for name, tensor in next(iter(few)).items()},
    )


def _encoder(config: TrainConfig, console: Console) -> Parts:
    run, optimizer = config.run, config.optimizer
    device, _ = choose_device(run.device)

    def tokenize(tokenizer: WordPiece | None) -> Dataset:
        return read_tokens(config, console, tokenizer, WordPiece)

    parts = encoder_parts(config, tokenize)
    say(console, parts.text)
    loader = SampleLoader(parts.training, optimizer.batch_size, run.seed, prefetch=_prefetch(config, device))
    rows = run.eval_batches * optimizer.batch_size or None
    held_out = SampleValidation(parts.held_out, optimizer.batch_size, rows)
    few = SampleValidation(parts.training, AUDIT_ROWS, AUDIT_ROWS)
    return Parts(
        parts.tokenizer,
        parts.task,
        loader,
        SampleFeed(loader, optimizer.grad_accum, device),
        Validation(parts.task, held_out, device),
        _engine(parts.model, config, device),
        {name: tensor.to(device) for name, tensor in next(iter(few)).items()},
    )


def _prefetch(config: TrainConfig, device: torch.device) -> int:
    return 2 * config.optimizer.grad_accum if device.type == "cuda" else 0


def _engine(model: nn.Module, config: TrainConfig, device: torch.device) -> Engine:
    run, optimizer = config.run, config.optimizer
    adamw = AdamWConfig(
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
        max_norm=optimizer.clip,
    )
    dtype, _ = choose_dtype(run.dtype, device)
    return Engine(model, adamw, dtype, device, run.backend, seed=run.seed)


def read_tokens(
    config: TrainConfig,
    console: Console,
    tokenizer: WordPiece | None = None,
    kind: type[Tokenizer] | type[WordPiece] = Tokenizer,
) -> Dataset:
    """Tokens of the text, from the cache or made now. tokenizer: None for that of the options, of this kind."""
    options = config.data
    with console.status("reading the text") as status:

        def progress(stage: str, done: int, total: int) -> None:
            share = f", {100 * done // total}%" if total else ""
            status.update(f"{stage}: {done / 1e6:.1f} MB{share}")

        dataset = prepare(
            options.data or None,
            tokenizer=options.tokenizer if tokenizer is None else tokenizer,
            kind=kind,
            vocab_size=options.vocab_size,
            validation_fraction=options.validation_fraction,
            progress=progress,
        )
    learned, held_out = len(dataset.training.tokens), len(dataset.validation.tokens)
    sizes = f"{learned:,} tokens to learn, {held_out:,} held out"
    say(console, f"text: {dataset.source}; {sizes}, vocabulary {dataset.tokenizer.vocab_size:,}")
    return dataset


def make_model(config: TrainConfig, vocab_size: int) -> GPT | LSTM:
    """The model that the options describe, for a tokenizer of so many ids, with fresh weights."""
    if config.model.model == "gpt":
        return GPT(gpt_config(config, vocab_size))
    shape = config.model
    model = LSTM(
        LSTMConfig(
            vocab_size=vocab_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            cell=shape.cell,
            dropout=shape.dropout,
            tie_word_embeddings=shape.tie,
        )
    )
    model.carry(config.optimizer.batch_size if shape.carry else None)
    return model


def gpt_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The shape that the options describe, for a tokenizer of so many ids."""
    shape = config.model
    return GPTConfig(
        vocab_size=vocab_size,
        n_positions=config.data.seq_len,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_kv_head=shape.kv_heads,
        activation="gelu_tanh" if shape.mlp == "gelu" else shape.mlp,
        norm=shape.norm,
        position=shape.position,
        qk_norm=shape.qk_norm,
        bias=shape.bias,
        tie_word_embeddings=shape.tie,
        embd_pdrop=shape.dropout,
        resid_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
    )


@torch.no_grad()
def moved_from_start(model: M, generator: torch.Generator) -> M:
    """Adds noise to every vector, in place, and returns the model.

    Fresh norms have weights of 1 and every bias is 0, and there a backward that forgets to multiply by a
    weight, or to pass a bias on, gives the right gradient all the same.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.2)
    return model
