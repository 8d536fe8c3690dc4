"""Language models that predict the next token of plain text: GPT and the LSTM."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fastlm.data import Dataset, Loader, Tokenizer, ValidationLoader
from fastlm.models import GPT, LSTM, GPTConfig, LSTMConfig
from fastlm.registry import Spec
from fastlm.tasks import CausalLM

from .config import TrainConfig
from .device import choose_device
from .family import AUDIT_ROWS, Data, Facts, Family, prefetched
from .feed import Feed
from .text import read_tokens

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["GPTFamily", "LSTMFamily", "gpt_config"]

_AUDIT_SEQ = 512
_PORTION = 1 << 16  # bytes of a mapped file that the system reads at once


class _Decoder(Family):
    def read(self, config: TrainConfig, console: Console) -> Data:
        run, optimizer, seq_len = config.run, config.optimizer, config.data.seq_len
        device, _ = choose_device(run.device)
        dataset = read_tokens(config, console)
        tokenizer, rows = dataset.tokenizer, optimizer.batch_size
        assert isinstance(tokenizer, Tokenizer)
        task = CausalLM(tokenizer.vocab_size, tokenizer.bytes_per_token)
        contiguous = config.model.model == "lstm" and config.model.carry
        loader = Loader(
            dataset.training, rows, seq_len, run.seed, prefetch=prefetched(config), contiguous=contiguous
        )
        return Data(
            tokenizer,
            task,
            Facts(tokenizer.vocab_size, held=_mapped(config, dataset)),
            loader,
            Feed(loader, task, rows, seq_len, optimizer.grad_accum, device),
            ValidationLoader(dataset.validation, rows, seq_len, windows=run.eval_batches * rows or None),
            list(ValidationLoader(dataset.training, 1, min(seq_len, _AUDIT_SEQ), windows=AUDIT_ROWS)),
        )

    def task(self, config: TrainConfig, facts: Facts) -> CausalLM:
        return CausalLM(facts.vocab_size)

    def audit_batches(self, config: TrainConfig, facts: Facts) -> list[dict[str, Spec]]:
        data = dataclasses.replace(config.data, seq_len=min(config.data.seq_len, _AUDIT_SEQ))
        return super().audit_batches(dataclasses.replace(config, data=data), facts)


class GPTFamily(_Decoder):
    """GPT-2's, Llama's and others' shape."""

    def model(self, config: TrainConfig, facts: Facts) -> GPT:
        return GPT(gpt_config(config, facts.vocab_size))


class LSTMFamily(_Decoder):
    """LSTM, GRU and Elman's, with the state of each row carried from batch to batch."""

    def model(self, config: TrainConfig, facts: Facts) -> LSTM:
        shape = config.model
        model = LSTM(
            LSTMConfig(
                vocab_size=facts.vocab_size,
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


def _mapped(config: TrainConfig, dataset: Dataset) -> int:
    """Bytes of the token file that a run reads, in the system's portions."""
    optimizer = config.optimizer
    windows = optimizer.steps * optimizer.batch_size * optimizer.grad_accum
    return min(dataset.path.stat().st_size, windows * _PORTION)
