"""An encoder-decoder: the Transformer of 2017, and by config T5, Marian and what lies between.

The decoder's layers read one memory, the encoder's output, whose gradient is their sum; the layers of a stack share one
table of relative positions, to whose gradient each of them adds. The stacks are in encoder_decoder_stack.py, Hugging
Face directories in encoder_decoder_files.py.

Sources: Vaswani et al., "Attention is all you need" (2017), arXiv:1706.03762; Raffel et al., T5 (2020),
arXiv:1910.10683; v1.1 of T5 as in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import KVCache, Linear, MemoryCache, Packed
from . import encoder_decoder_files as files
from .encoder_decoder_config import EncoderDecoderConfig
from .encoder_decoder_stack import Stack
from .recompute import Recomputing

__all__ = ["DecoderState", "EncoderDecoder", "EncoderDecoderConfig"]

_GUESSED_AT_ONCE = 512  # tokens whose logits are held


class DecoderState:
    """What the decoder remembers of rows in generation: its own keys and values, and those of each row's memory."""

    def __init__(self, layers: int, capacity: int, memory: Tensor | None, lengths: Tensor) -> None:
        self.own = KVCache(layers, capacity)
        self.memories = [MemoryCache() for _ in range(layers)]
        self.memory, self.lengths = memory, lengths

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; rows (n,) int64, n fewer or more than the rows there are."""
        self.own.reorder(rows)
        for memory in self.memories:
            memory.reorder(rows)
        self.lengths = self.lengths[rows]


class EncoderDecoder(Recomputing):
    """An encoder-decoder, for translation and other text that follows from text.

    ``model(input_ids, targets)`` -> loss in nats, float32, the mean (or, by `reduction`, sum) over targets that are not
    -100; the decoder reads decoder_input_ids, or None for the targets one place later behind the start token.
    ``model(input_ids, decoder_input_ids=ids)`` -> logits (batch, target seq, target vocab).

    Padded: input_ids (batch, seq), targets and decoder_input_ids (batch, target seq), lengths (batch,), int64: what of
    each source is not padding, None for all; targets at padding are -100.
    Packed: all three (tokens,), sequences one after another as cu_seqlens and target_cu_seqlens (sequences + 1,), int64,
    say; then decoder_input_ids and, unless they are relative, positions and target_positions (tokens,) must be given.
    max_seqlen, max_target_seqlen: the longest sequence, None for as long as tokens and positions allow. Tokens behind the
    last sequence belong to none; they reach no other, and their targets must be -100.

    outputs: a dict, gets beside the loss under "guesses" the likeliest token in place of each target, of its shape.

    recompute: see `Recomputing`.
    """

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.lm_head = Linear(config.n_embd, config.decoder_vocab_size, bias=config.logit_bias)
        if config.tie_source_target:
            self.decoder.wte.weight = self.encoder.wte.weight
        if config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.wte.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start that config.initializer names; zero biases, unit norms."""
        c = self.config
        t5 = c.initializer == "t5"
        packed = {"c_attn": 3, "c_kv": 2, "c_fc": 2 if c.is_gated else 1}  # matrices, one under the other
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            if name.endswith("bias") and p.dim() == 1:
                nn.init.zeros_(p)
            elif p.dim() == 1:
                nn.init.ones_(p)
            elif layer in ("wte", "wpe"):
                nn.init.normal_(p, std=1.0 if t5 else c.n_embd**-0.5)
            elif t5 or name.endswith("relative_bias"):
                nn.init.normal_(p, std=c.n_embd**-0.5 if name.endswith("relative_bias") else p.shape[1] ** -0.5)
                if layer in ("c_attn", "c_q") and not c.scale_attention:
                    with torch.no_grad():
                        p[: c.n_head * c.head_width] *= c.head_width**-0.5
            else:
                for matrix in p.data.chunk(packed.get(layer, 1)):
                    nn.init.xavier_uniform_(matrix)

    # --- training

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, *, decoder_input_ids: Tensor | None = None,
        lengths: Tensor | None = None, positions: Tensor | None = None, target_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None, target_cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
        max_target_seqlen: int | None = None, reduction: str = "mean", tape: Any = None,
        outputs: dict[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        if decoder_input_ids is None:
            if targets is None:
                raise ValueError("targets: got None; allowed: None only with decoder_input_ids")
            if cu_seqlens is not None:
                raise ValueError("decoder_input_ids: got None with packed sequences; allowed: ids (tokens,)")
            decoder_input_ids = self._shifted(targets, tape)
        source: dict[str, Any] = {"key_lengths": lengths}
        target: dict[str, Any] = {}
        across: dict[str, Any] = {"key_lengths": lengths}
        if cu_seqlens is not None:
            _check_packed(
                self.encoder.wpe is not None, input_ids=input_ids, positions=positions,
                decoder_input_ids=decoder_input_ids, target_positions=target_positions,
            )  # fmt: skip
            if target_cu_seqlens is None or lengths is not None:
                raise ValueError("cu_seqlens: allowed with target_cu_seqlens, and without lengths")
            packed = Packed(cu_seqlens, self._longest(input_ids) if max_seqlen is None else max_seqlen)
            longest = self._longest(decoder_input_ids) if max_target_seqlen is None else max_target_seqlen
            packed_target = Packed(target_cu_seqlens, longest)
            source, target, across = {"packed": packed}, {"packed": packed_target}, {"packed": (packed_target, packed)}
        elif input_ids.dim() != 2 or decoder_input_ids.dim() != 2 or len(input_ids) != len(decoder_input_ids):
            given = f"{tuple(input_ids.shape)} with {tuple(decoder_input_ids.shape)} of the decoder"
            raise ValueError(f"input_ids: got shape {given}; allowed: (batch, seq) both, or packed by cu_seqlens")
        memory = self.encoder(input_ids, positions, source, tape=tape)
        y = self.decoder(decoder_input_ids, target_positions, target, memory, across, tape=tape)
        if targets is None:
            return self._logits(y, tape)
        if outputs is not None:
            outputs["guesses"] = self._guesses(y, tape)
        return ops.linear_cross_entropy(
            y, self.lm_head.weight, targets, self.lm_head.bias, reduction=reduction, tape=tape,
            label_smoothing=self.config.label_smoothing if self.training else 0.0, logit_scale=self._logit_scale,
        )  # fmt: skip

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        dy = tape.backward("linear_cross_entropy", d_loss, weight=self.lm_head.weight, bias=self.lm_head.bias)
        d_memory = self.decoder.backward(dy, tape)
        assert d_memory is not None
        self.encoder.backward(d_memory, tape)

    @property
    def _logit_scale(self) -> float:
        return float(self.config.n_embd**-0.5) if self.config.scale_logits else 1.0

    def _logits(self, y: Tensor, tape: Any = None) -> Tensor:
        logits: Tensor = self.lm_head(y, tape=tape)
        return logits.mul_(self._logit_scale) if self.config.scale_logits else logits

    def _longest(self, ids: Tensor) -> int:
        """The most tokens that a sequence of packed ids (tokens,) can have."""
        return ids.numel() if self.context is None else min(ids.numel(), self.context)

    @torch.no_grad()
    def _guesses(self, y: Tensor, tape: Any) -> Tensor:
        """The likeliest token behind each hidden state (..., n_embd), without holding the logits of all."""

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=y.device) if tape is None else tape.empty(shape, dtype)

        rows, head = y.detach().flatten(0, -2), self.lm_head  # (tokens, n_embd)
        found = empty(y.shape[:-1], torch.int64)
        logits = empty((min(_GUESSED_AT_ONCE, len(rows)), head.out_features), y.dtype)
        for some, into in zip(rows.split(_GUESSED_AT_ONCE), found.view(-1).split(_GUESSED_AT_ONCE), strict=True):
            here = torch.mm(some, head.weight.t(), out=logits[: len(some)])
            if head.bias is not None:
                here.add_(head.bias)
            torch.argmax(here, -1, out=into)
        return found

    def _shifted(self, targets: Tensor, tape: Any) -> Tensor:
        """What the decoder reads to predict targets (batch, seq): the start token, then all but the last."""
        ids = torch.empty_like(targets) if tape is None else tape.empty(targets.shape, targets.dtype)
        ids[:, :1].fill_(self.config.decoder_start_token_id)
        ids[:, 1:].copy_(targets[:, :-1])
        if tape is None:
            return ids.masked_fill_(ids == -100, self.config.pad_token_id)
        ignored = tape.empty(ids.shape, torch.bool)
        torch.eq(ids, tape.constant(-100, ids.dtype), out=ignored)
        return ids.masked_fill_(ignored, self.config.pad_token_id)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Tensor:
        """How many terms the loss of this batch sums: targets that are not -100. 0-dim int64."""
        targets = batch["targets"]
        valid = torch.ne(targets, tape.constant(-100, torch.int64), out=tape.empty(targets.shape, torch.int64))
        return torch.sum(valid, dim=tuple(range(targets.dim())), out=tape.empty((), torch.int64))

    # --- generation (see fastlm.generate)

    continues = False  # the prompt is the encoder's input

    @property
    def context(self) -> int | None:
        """The most tokens of a row that the decoder can hold."""
        return self.config.n_positions if self.decoder.wpe is not None else None

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, DecoderState]:
        """(logits (rows, vocab) of each row's first token, the state for `step`).

        prompts: source ids, at least one each, of any lengths. capacity: the most tokens of a row of the decoder, its
        start token included.
        """
        counts = [len(p) for p in prompts]
        if not counts or min(counts) < 1:
            raise ValueError(f"prompts: got lengths {counts}; allowed: 1 and more tokens each")
        device = self.lm_head.weight.device
        ids = torch.tensor([[*p, *[p[-1]] * (max(counts) - len(p))] for p in prompts], device=device)
        lengths = torch.tensor(counts, device=device)
        memory = self.encoder(ids, None, {"key_lengths": lengths})
        state = DecoderState(self.config.decoder_layers, capacity, memory, lengths)
        start = torch.full((len(counts),), self.config.decoder_start_token_id, device=device)
        logits = self.step(state, start)
        state.memory = None  # the caches have what is needed of it
        return logits, state

    @torch.no_grad()
    def step(self, state: DecoderState, tokens: Tensor) -> Tensor:
        """Append tokens (rows,), one to each row; the logits (rows, vocab) of the token that follows."""
        rows, device = tokens.shape[0], tokens.device
        positions = state.own.positions(rows, 1, device)
        caches = list(zip(state.own.layers, state.memories, strict=True))
        across = {"key_lengths": state.lengths}
        y = self.decoder(tokens[:, None], positions, {}, state.memory, across, caches)
        state.own.advance(1, rows, device)
        return self._logits(y[:, 0])

    # --- Hugging Face directories

    model_types = files.MODEL_TYPES

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> EncoderDecoder:
        """A model in float32 from config.json and the safetensors files beside it, of T5 or Marian.

        ValueError names every tensor that is missing, unknown or of another shape, and options that we do not have.
        """
        return files.load(cls, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or absent.

        In T5's or Marian's layout if one of them has the model's options, so that transformers loads it; else in one of
        our own.
        """
        files.save(self, directory)


def _check_packed(placed: bool, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is None and (placed or not name.endswith("positions")):
            raise ValueError(f"{name}: got None with packed sequences; allowed: (tokens,)")
        if t is not None and t.dim() != 1:
            raise ValueError(f"{name}: got shape {tuple(t.shape)} with packed sequences; allowed: (tokens,)")
