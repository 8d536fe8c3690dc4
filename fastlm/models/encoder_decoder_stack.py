"""The stacks of an encoder-decoder: embedding, blocks of attention and MLP, final norm; forward and backward by hand.

In a pre-norm stack the residual stream x runs beside the branch that was computed last, as in gpt.py; in a post-norm
stack each norm takes the branch and x at once. Either way dropout of the branch, its addition and the norm are one op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import MLP, CrossAttention, Dropout, LayerNorm, RMSNorm, SelfAttention
from .encoder_decoder_config import ACTIVATIONS, EncoderDecoderConfig
from .recompute import Recomputing

__all__ = ["Block", "Sinusoids", "Stack"]


def _norm(c: EncoderDecoderConfig) -> LayerNorm | RMSNorm:
    if c.norm == "rms":
        return RMSNorm(c.n_embd, eps=c.layer_norm_epsilon)
    return LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)


def _both(found: Any) -> Any:
    """(d_branch, dx), which are one tensor where nothing was dropped."""
    return found if isinstance(found, tuple) else (found, found)


class Sinusoids(nn.Module):
    """A table of constants, (positions, width): sin(p / 10000^(2 i / width)) in column i, the cosine in i + width / 2."""

    weight: Tensor

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(positions, width), persistent=False)
        self._fill()

    def _fill(self) -> None:
        positions, width = self.weight.shape
        f = 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=self.weight.device) / width)
        angles = torch.arange(positions, dtype=torch.float64, device=self.weight.device)[:, None] * f
        self.weight.copy_(torch.cat((angles.sin(), angles.cos()), 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sinusoids:
        empty = self.weight.is_meta
        super()._apply(fn, recurse)
        if empty:
            self._fill()
        return self


class Block(nn.Module):
    """Self-attention, in a decoder attention to the memory, and MLP, each with its norm.

    (branch, x) -> (branch, x); post-norm, and into the first block of a stack, the branch is None.
    """

    def __init__(self, config: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()
        c = config
        self.pre_norm, self.dropout = c.pre_norm, c.resid_pdrop
        attention: dict[str, Any] = {
            "head_dim": c.head_dim, "bias": c.bias, "dropout": c.attn_pdrop, "scale": None if c.scale_attention else 1.0,
        }  # fmt: skip
        options: dict[str, Any] = ACTIVATIONS[c.activation]
        self.attn = SelfAttention(c.n_embd, c.n_head, causal=decoder, **attention)
        self.ln_attn = _norm(c)
        self.cross = CrossAttention(c.n_embd, c.n_head, **attention) if decoder else None
        self.ln_cross = _norm(c) if decoder else None
        self.mlp = MLP(c.n_embd, c.inner_width, c.bias, inner_dropout=c.inner_pdrop, **options)
        self.ln_mlp = _norm(c)

    def forward(
        self, branch: Tensor | None, x: Tensor, attend: dict[str, Any], memory: Tensor | None = None,
        across: dict[str, Any] | None = None, tape: Any = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """attend, across: what the two attentions take beside their inputs."""
        branch, x = self._around(self.ln_attn, branch, x, lambda y: self.attn(y, tape=tape, **attend), tape)
        if (cross := self.cross) is not None:
            more = across or {}
            branch, x = self._around(self.ln_cross, branch, x, lambda y: cross(y, memory, tape=tape, **more), tape)
        return self._around(self.ln_mlp, branch, x, lambda y: self.mlp(y, tape=tape), tape)

    def _around(self, norm: Any, branch: Tensor | None, x: Tensor, layer: Callable[[Tensor], Tensor], tape: Any) -> Any:
        if not self.pre_norm:
            return None, norm(layer(x), x, tape=tape, dropout_p=self.dropout)[0]
        if branch is None:
            return layer(norm(x, tape=tape)), x
        y, x = norm(branch, x, tape=tape, dropout_p=self.dropout)
        return layer(y), x

    def backward(
        self, d_branch: Tensor | None, dx: Tensor, tape: Any, first: bool = False,
        relative_bias: Tensor | None = None, d_memory: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """(d_branch, dx) of what came in, and d_memory, which a decoder's block adds to and the last one makes."""

        def across(dy: Tensor) -> Tensor:
            nonlocal d_memory
            assert self.cross is not None
            dy, d_memory = self.cross.backward(dy, tape, d_memory=d_memory)
            return dy

        def attend(dy: Tensor) -> Tensor:
            return self.attn.backward(dy, tape, relative_bias=relative_bias)

        d_branch, dx = self._around_backward(self.ln_mlp, d_branch, dx, lambda dy: self.mlp.backward(dy, tape), tape)
        if self.cross is not None:
            d_branch, dx = self._around_backward(self.ln_cross, d_branch, dx, across, tape)
        d_branch, dx = self._around_backward(self.ln_attn, d_branch, dx, attend, tape, first)
        return d_branch, dx, d_memory

    def _around_backward(
        self, norm: Any, d_branch: Tensor | None, dx: Tensor, layer: Callable[[Tensor], Tensor], tape: Any,
        first: bool = False,
    ) -> Any:  # fmt: skip
        if not self.pre_norm:
            d_branch, dx = _both(norm.add_backward(dx, None, tape))
            return None, layer(d_branch).add_(dx)
        assert d_branch is not None
        dy = layer(d_branch)
        if first:
            return None, norm.backward(dy, tape).add_(dx)
        return _both(norm.add_backward(dy, dx, tape))


class Stack(Recomputing):
    """The encoder or the decoder: embedding, blocks, final norm; ids -> hidden states (..., n_embd)."""

    def __init__(self, config: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()
        c = config
        self.config, self.is_decoder = c, decoder
        self.wte = nn.Embedding(c.decoder_vocab_size if decoder else c.vocab_size, c.n_embd)
        self.wpe: nn.Embedding | Sinusoids | None = None
        self.relative_bias: nn.Parameter | None = None
        if c.position == "learned":
            self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        elif c.position == "sinusoidal":
            self.wpe = Sinusoids(c.n_positions, c.n_embd)
        else:
            self.relative_bias = nn.Parameter(torch.zeros(c.relative_buckets, c.n_head))
        self.scale = math.sqrt(c.n_embd) if c.scale_embedding else 1.0
        self.drop = Dropout(c.embd_pdrop)
        self.h = nn.ModuleList(Block(c, decoder) for _ in range(c.decoder_layers if decoder else c.n_layer))
        self.ln_f = _norm(c) if c.has_final_norm else None
        self.last_drop = Dropout(c.final_pdrop)

    def forward(
        self, ids: Tensor, positions: Tensor | None, attend: dict[str, Any], memory: Tensor | None = None,
        across: dict[str, Any] | None = None, caches: Sequence[Sequence[Any]] | None = None, tape: Any = None,
    ) -> Tensor:  # fmt: skip
        """ids (batch, seq) or, packed, (tokens,). positions: of ids' shape, None for 0, 1, ....

        attend, across: as a block's. caches: of generation, of each block its attention's and its cross-attention's.
        """
        x = self.drop(self._embed(ids, positions, tape), tape=tape)
        if self.relative_bias is not None:
            attend = attend | {
                "relative_bias": self.relative_bias, "relative_bidirectional": not self.is_decoder,
                "relative_max_distance": self.config.relative_max_distance,
            }  # fmt: skip
        branch = None
        for i, block in enumerate(self.h):
            inputs: tuple[Any, ...] = (branch, x, attend, memory, across)
            if caches is not None:
                own, memories = caches[i]
                inputs = (branch, x, attend | {"cache": own}, memory, (across or {}) | {"cache": memories})
            if self.recompute == "block" and tape is not None:
                branch, x = tape.checkpoint(block, *inputs)
            else:
                branch, x = block(*inputs, tape=tape)
        if self.ln_f is not None:
            if branch is None:
                x = self.ln_f(x, tape=tape)
            else:
                x, _ = self.ln_f(branch, x, tape=tape, dropout_p=self.config.resid_pdrop)
        return self.last_drop(x, tape=tape)

    def backward(self, dy: Tensor, tape: Any) -> Tensor | None:
        """Adds the parameters' gradients, the mirror of forward; returns the memory's, of a decoder."""
        dx = self.last_drop.backward(dy, tape)
        d_branch: Tensor | None = None
        if self.ln_f is not None:
            if self.config.pre_norm:
                d_branch, dx = _both(self.ln_f.add_backward(dx, None, tape))
            else:
                dx = self.ln_f.backward(dx, tape)
        d_memory: Tensor | None = None
        for i, block in reversed(list(enumerate(self.h))):
            shared = {"first": i == 0, "relative_bias": self.relative_bias, "d_memory": d_memory}
            back: Any = block.backward
            if self.recompute == "block":
                d_branch, dx, d_memory = tape.checkpoint_backward(back, d_branch, dx, **shared)
            else:
                d_branch, dx, d_memory = back(d_branch, dx, tape, **shared)
        self._embed_backward(self.drop.backward(dx, tape), tape)
        return d_memory

    def _embed(self, ids: Tensor, positions: Tensor | None, tape: Any) -> Tensor:
        """scale * (the token's row) + (the position's row)."""
        if self.wpe is not None and positions is None:
            seq, longest = ids.shape[-1], self.config.n_positions
            if seq > longest:
                raise ValueError(f"ids: got {seq} tokens in a row; allowed: up to n_positions = {longest}")
            if tape is None:
                positions = torch.arange(seq, device=ids.device).expand(ids.shape)
            else:
                places = torch.arange(seq, out=tape.empty((seq,), torch.int64))
                positions = tape.empty(ids.shape, torch.int64).copy_(places)
        x = ops.embedding(ids, self.wte.weight, tape=tape)
        if self.scale != 1.0:
            x.mul_(self.scale)
        if self.wpe is not None:
            x.add_(ops.embedding(positions, self.wpe.weight, tape=tape))
        return x

    def _embed_backward(self, dx: Tensor, tape: Any) -> None:
        if self.wpe is not None:
            tape.backward("embedding", dx, weight=self.wpe.weight)
        if self.scale != 1.0:
            dx.mul_(self.scale)
        tape.backward("embedding", dx, weight=self.wte.weight)
