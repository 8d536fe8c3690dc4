"""The 2017 Transformer and T5 as a good PyTorch user writes them, for the train-step benchmark.

Nothing here is fastlm's: padded batches, F.scaled_dot_product_attention with a mask only where there is padding, which hides
it from the encoder and from what the decoder reads of it (the decoder's own padding comes last, where no token sees it);
products and a softmax where T5 adds its bias to the scores.
Parameters bear the names of fastlm.models.EncoderDecoder, so that the same weights load into both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import EncoderDecoderConfig

__all__ = ["PlainEncoderDecoder"]


class PlainAttention(nn.Module):
    """Of x to itself, or with `cross` to a memory."""

    def __init__(self, c: EncoderDecoderConfig, cross: bool = False) -> None:
        super().__init__()
        self.head_dim, inner = c.head_width, c.n_head * c.head_width
        self.scale = None if c.scale_attention else 1.0
        if cross:
            self.c_q = nn.Linear(c.n_embd, inner, bias=c.bias)
            self.c_kv = nn.Linear(c.n_embd, 2 * inner, bias=c.bias)
        else:
            self.c_attn = nn.Linear(c.n_embd, 3 * inner, bias=c.bias)
        self.c_proj = nn.Linear(inner, c.n_embd, bias=c.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, seq, head_dim)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None, causal: bool = False) -> Tensor:
        if memory is None:
            q, k, v = (self._heads(t) for t in self.c_attn(x).chunk(3, -1))
        else:
            q = self._heads(self.c_q(x))
            k, v = (self._heads(t) for t in self.c_kv(memory).chunk(2, -1))
        if mask is None or mask.dtype == torch.bool:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
        else:  # T5's bias: no fused kernel of SDPA has its gradient, and this is faster than what it does instead
            y = (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v
        out: Tensor = self.c_proj(y.transpose(1, 2).flatten(2))
        return out


class PlainMLP(nn.Module):
    def __init__(self, c: EncoderDecoderConfig) -> None:
        super().__init__()
        self.gated = c.is_gated
        self.activation = c.activation
        self.c_fc = nn.Linear(c.n_embd, (2 if c.is_gated else 1) * c.inner_width, bias=c.bias)
        self.c_proj = nn.Linear(c.inner_width, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        if self.activation == "relu":
            h = F.relu(h)
        else:
            gate, up = h.chunk(2, -1)
            h = F.gelu(gate, approximate="tanh") * up
        y: Tensor = self.c_proj(h)
        return y


def _norm(c: EncoderDecoderConfig) -> nn.Module:
    if c.norm == "rms":
        return nn.RMSNorm(c.n_embd, eps=c.layer_norm_epsilon)
    return nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)


class PlainBlock(nn.Module):
    def __init__(self, c: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()
        self.pre_norm = c.pre_norm
        self.attn, self.ln_attn = PlainAttention(c), _norm(c)
        self.cross = PlainAttention(c, cross=True) if decoder else None
        self.ln_cross = _norm(c) if decoder else None
        self.mlp, self.ln_mlp = PlainMLP(c), _norm(c)

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, memory: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        if not self.pre_norm:
            x = self.ln_attn(x + self.attn(x, None, mask, causal))
            if self.cross is not None and self.ln_cross is not None:
                x = self.ln_cross(x + self.cross(x, memory, memory_mask))
            x = self.ln_mlp(x + self.mlp(x))
            return x
        x = x + self.attn(self.ln_attn(x), None, mask, causal)
        if self.cross is not None and self.ln_cross is not None:
            x = x + self.cross(self.ln_cross(x), memory, memory_mask)
        x = x + self.mlp(self.ln_mlp(x))
        return x


class PlainStack(nn.Module):
    """The encoder or the decoder; sinusoidal positions, or T5's relative bias, made once for all blocks."""

    table: Tensor
    buckets: Tensor
    unseen: Tensor

    def __init__(self, c: EncoderDecoderConfig, decoder: bool) -> None:
        super().__init__()
        self.decoder, self.relative = decoder, c.position == "relative"
        self.scale = math.sqrt(c.n_embd) if c.scale_embedding else 1.0
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        if self.relative:
            self.relative_bias = nn.Parameter(torch.empty(c.relative_buckets, c.n_head))
            buckets = _buckets(c.n_positions, c.relative_buckets, c.relative_max_distance, not decoder)
            self.register_buffer("buckets", buckets, persistent=False)
            unseen = torch.full((c.n_positions, c.n_positions), -math.inf).triu(1)
            self.register_buffer("unseen", unseen, persistent=False)
        else:
            self.register_buffer("table", _sinusoids(c.n_positions, c.n_embd), persistent=False)
        self.h = nn.ModuleList(PlainBlock(c, decoder) for _ in range(c.decoder_layers if decoder else c.n_layer))
        self.ln_f = _norm(c) if c.has_final_norm else None

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        seq, causal = ids.shape[1], self.decoder
        x = self.wte(ids) * self.scale
        if self.relative:
            mask, causal = F.embedding(self.buckets[:seq, :seq], self.relative_bias).permute(2, 0, 1)[None], False
            if self.decoder:
                mask = mask + self.unseen[:seq, :seq]  # (1, heads, seq, seq)
        else:
            x = x + self.table[:seq]
        for block in self.h:
            x = block(x, mask, causal, memory, memory_mask)
        return x if self.ln_f is None else self.ln_f(x)


class PlainEncoderDecoder(nn.Module):
    """(input_ids (batch, seq), targets and decoder_input_ids (batch, target seq)) -> mean loss in nats. Without dropout.

    targets at padding are -100; source_mask: (batch, 1, 1, seq), False at padding, None where there is none. With relative
    positions there must be none.
    """

    def __init__(self, c: EncoderDecoderConfig) -> None:
        super().__init__()
        position = c.position == "sinusoidal" or (c.position == "relative" and not c.scale_attention)
        made = position, c.tie_source_target, c.activation in ("relu", "geglu_tanh"), not c.scale_logits
        assert all(made), "the cases of benchmarks.train_step, and no others, are made here"
        self.encoder, self.decoder = PlainStack(c, decoder=False), PlainStack(c, decoder=True)
        self.decoder.wte.weight = self.encoder.wte.weight
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.decoder.wte.weight
        self.label_smoothing = c.label_smoothing

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, targets: Tensor, source_mask: Tensor | None = None
    ) -> Tensor:
        memory = self.encoder(input_ids, source_mask)
        logits = self.lm_head(self.decoder(decoder_input_ids, None, memory, source_mask))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=self.label_smoothing)


def _sinusoids(positions: int, width: int) -> Tensor:
    """(positions, width): sines in the first half of the columns, cosines in the second."""
    angles = torch.arange(positions)[:, None].double() * 10000.0 ** -(torch.arange(0, width, 2).double() / width)
    return torch.cat((angles.sin(), angles.cos()), 1).float()


def _buckets(longest: int, buckets: int, max_distance: int, both_sides: bool) -> Tensor:
    """T5's bucket of each distance from query i to key j, (longest, longest): near ones exactly, far ones by logarithm."""
    distance = torch.arange(longest)[None] - torch.arange(longest)[:, None]
    first = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        first, distance = (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return first + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))
