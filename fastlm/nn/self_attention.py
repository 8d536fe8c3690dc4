"""Self- and cross-attention as models have them: projections around `ops.attention`, forward and backward by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .cache import LayerCache, MemoryCache
from .dropout import Dropout, draw_seed
from .linear import Linear
from .rotary_embedding import RotaryEmbedding

__all__ = ["CausalSelfAttention", "CrossAttention", "Packed", "SelfAttention"]


class Packed(NamedTuple):
    """How sequences lie one after another, without padding: begins (sequences + 1,), int32 or int64, and the longest."""

    cu_seqlens: Tensor
    max_seqlen: int


class _Attention(torch.nn.Module):
    """What both kinds share: heads, weights' dropout, the output projection, and the call of the op."""

    def __init__(
        self, n_embd: int, n_head: int, n_kv_head: int | None, head_dim: int | None, out_bias: bool, dropout: float,
        resid_dropout: float, scale: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        if n_head < 1 or (head_dim is None and n_embd % n_head):
            raise ValueError(f"n_head: got {n_head}; allowed: a divisor of n_embd = {n_embd}")
        n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_kv_head < 1 or n_head % n_kv_head:
            raise ValueError(f"n_kv_head: got {n_kv_head}; allowed: a divisor of n_head = {n_head}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}; allowed: [0, 1)")
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim or n_embd // n_head
        self.attn_dropout, self.scale = dropout, scale
        self.c_proj = Linear(n_head * self.head_dim, n_embd, bias=out_bias)
        self.dropout = Dropout(resid_dropout)

    def extra_repr(self) -> str:
        return f"n_head={self.n_head}, n_kv_head={self.n_kv_head}, head_dim={self.head_dim}"

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, packed: tuple[Packed, Packed] | None, options: dict[str, Any], tape: Any
    ) -> Tensor:
        """q, k and v with heads inside of tokens, (batch, seq, heads, head_dim) or packed -> the layer's output."""
        p = self.attn_dropout if self.training else 0.0
        options |= {"scale": self.scale, "dropout_p": p, "dropout_seed": draw_seed(q.device, tape) if p > 0 else None}
        if packed is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = ops.attention(q, k, v, **options, tape=tape).transpose(1, 2)
        else:
            (begins_q, longest_q), (begins_k, longest_k) = packed
            y = ops.varlen_attention(q, k, v, begins_q, begins_k, longest_q, longest_k, **options, tape=tape)
        return self.dropout(self.c_proj(y.flatten(-2), tape=tape), tape=tape)

    def _attend_backward(
        self, dy: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, relative_bias: Tensor | None, d_bias: Tensor | None,
        tape: Any,
    ) -> None:  # fmt: skip
        """Writes dq, dk and dv, with heads inside of tokens; adds the gradients of the biases."""
        dy = self.c_proj.backward(self.dropout.backward(dy, tape), tape)
        dy = dy.unflatten(-1, (self.n_head, self.head_dim))
        name = "varlen_attention"
        if dq.dim() == 4:
            name, (dy, dq, dk, dv) = "attention", (t.transpose(1, 2) for t in (dy, dq, dk, dv))
        grads = tape.backward(name, dy, None, into={"q": dq, "k": dk, "v": dv}, relative_bias=relative_bias)
        if d_bias is not None:
            d_bias.add_(grads[3].view(d_bias.shape))


class SelfAttention(_Attention):
    """Attention of a sequence to itself, for encoders and decoders: x (batch, seq, n_embd) -> the same shape.

    Args:
        n_kv_head: heads of keys and values, a divisor of n_head, each read by as many query heads (grouped-query
            attention); None for n_head.
        head_dim: None for n_embd / n_head.
        causal: a token sees itself and those before.
        bias: of all projections; qkv_bias, out_bias: of one of them, None for `bias`.
        dropout: of the attention weights; resid_dropout: of the output. Both in training only.
        rotary: turns queries and keys by their positions; layers may share one.
        qk_norm: makes the norm of each head's queries and the one of its keys from head_dim (Qwen3 and others:
            ``lambda width: RMSNorm(width, 1e-6)``); it acts before `rotary`.
        scale: of the scores, None for 1 / sqrt(head_dim).

    State dict: c_attn, rows of q, then k, then v, head h of q in rows h * head_dim and on; c_proj; q_norm, k_norm.
    """

    q_norm: Any
    k_norm: Any

    def __init__(
        self, n_embd: int, n_head: int, n_kv_head: int | None = None, head_dim: int | None = None, causal: bool = False,
        bias: bool = True, qkv_bias: bool | None = None, out_bias: bool | None = None, dropout: float = 0.0,
        resid_dropout: float = 0.0, rotary: RotaryEmbedding | None = None,
        qk_norm: Callable[[int], torch.nn.Module] | None = None, scale: float | None = None,
    ) -> None:  # fmt: skip
        out_bias = bias if out_bias is None else out_bias
        super().__init__(n_embd, n_head, n_kv_head, head_dim, out_bias, dropout, resid_dropout, scale)
        self.causal = causal
        width = (n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = Linear(n_embd, width, bias=bias if qkv_bias is None else qkv_bias)
        self.q_norm, self.k_norm = (None if qk_norm is None else qk_norm(self.head_dim) for _ in range(2))
        self.rotary = rotary
        if rotary is not None and rotary.rotary_dim > self.head_dim:
            raise ValueError(f"rotary: got rotary_dim {rotary.rotary_dim}; allowed: up to head_dim = {self.head_dim}")

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(..., width) as q, k and v, each (..., heads, head_dim), views."""
        return qkv.unflatten(-1, (-1, self.head_dim)).split((self.n_head, self.n_kv_head, self.n_kv_head), -2)

    def forward(
        self, x: Tensor, tape: Any = None, *, positions: Tensor | None = None, packed: Packed | None = None,
        cache: LayerCache | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """x (batch, seq, n_embd); or (tokens, n_embd), sequences one after another as `packed` says.

        positions: for `rotary`, int64 (batch, seq), (seq,) or packed (tokens,); None for 0, 1, ... (not packed).
        cache: of generation: x's tokens follow those that it holds, and it takes their keys and values.
        options: `ops.attention`'s that shape the scores: key_lengths or a boolean bias for padding, segment_ids,
            bias (heads, seq, seq), relative_bias (buckets, heads) with relative_bidirectional and
            relative_max_distance, window, softcap.
        """
        q, k, v = self._split(self.c_attn(x, tape=tape))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (norm(_whole(t, tape), tape=tape) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        if self.rotary is not None:
            if packed is not None and positions is None:
                raise ValueError("positions: got None with packed sequences; allowed: each token's, (tokens,)")
            q, k = (self.rotary(t, positions, -3, tape=tape) for t in (q, k))
        options["causal"] = self.causal
        if cache is not None:
            k, v, options = cache.extend(k, v, options)
        return self._attend(q, k, v, None if packed is None else (packed, packed), options, tape)

    def backward(
        self, dy: Tensor, tape: Any, *, relative_bias: Tensor | None = None, d_bias: Tensor | None = None
    ) -> Tensor:
        """dx, the mirror of forward. The gradients of q, k and v are made in one buffer for c_attn.

        relative_bias: as in forward; its gradient is added to its buffer, so layers may share it.
        d_bias: what the gradient of forward's `bias` is added to, of bias's shape.
        """
        dqkv = tape.empty((*dy.shape[:-1], self.c_attn.out_features), dy.dtype)
        dq, dk, dv = self._split(dqkv)
        normed = self.q_norm is not None and self.k_norm is not None
        d_q, d_k = (tape.empty(d.shape, d.dtype) if normed else d for d in (dq, dk))
        self._attend_backward(dy, d_q, d_k, dv, relative_bias, d_bias, tape)
        if self.rotary is not None:
            self.rotary.backward(d_k, tape, -3, into=d_k)
            self.rotary.backward(d_q, tape, -3, into=d_q)
        if normed:
            dk.copy_(self.k_norm.backward(d_k, tape))
            dq.copy_(self.q_norm.backward(d_q, tape))
        return self.c_attn.backward(dqkv, tape)


def _whole(t: Tensor, tape: Any) -> Tensor:
    """On a tape a contiguous copy in its memory, so that no kernel has to make one of its own."""
    return t if tape is None else tape.empty(t.shape, t.dtype).copy_(t)


class CausalSelfAttention(SelfAttention):
    """GPT-2's attention. attn_dropout acts on the attention weights, dropout on the output."""

    def __init__(
        self, n_embd: int, n_head: int, bias: bool = True, attn_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__(n_embd, n_head, causal=True, bias=bias, dropout=attn_dropout, resid_dropout=dropout)


class CrossAttention(_Attention):
    """Attention of a sequence x (batch, seq, n_embd) to a memory (batch, memory_seq, memory_width) -> x's shape.

    memory_width: None for n_embd. The other arguments are SelfAttention's, q_bias and kv_bias in place of qkv_bias.

    State dict: c_q; c_kv, rows of k, then v; c_proj.
    """

    def __init__(
        self, n_embd: int, n_head: int, n_kv_head: int | None = None, head_dim: int | None = None,
        memory_width: int | None = None, bias: bool = True, q_bias: bool | None = None, kv_bias: bool | None = None,
        out_bias: bool | None = None, dropout: float = 0.0, resid_dropout: float = 0.0, scale: float | None = None,
    ) -> None:  # fmt: skip
        out_bias = bias if out_bias is None else out_bias
        super().__init__(n_embd, n_head, n_kv_head, head_dim, out_bias, dropout, resid_dropout, scale)
        self.c_q = Linear(n_embd, n_head * self.head_dim, bias=bias if q_bias is None else q_bias)
        kv_width = 2 * self.n_kv_head * self.head_dim
        self.c_kv = Linear(memory_width or n_embd, kv_width, bias=bias if kv_bias is None else kv_bias)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim))

    def forward(
        self, x: Tensor, memory: Tensor, tape: Any = None, *, packed: tuple[Packed, Packed] | None = None,
        cache: MemoryCache | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """packed: where x (tokens, n_embd) and memory (memory tokens, ...) hold sequences without padding.

        cache: of generation: holds the memory's keys and values, which the first call makes; `memory` is then not read.
        options: `ops.attention`'s, as in SelfAttention: key_lengths is the memory's.
        """
        q = self._heads(self.c_q(x, tape=tape))
        if cache is None:
            k, v = self._heads(self.c_kv(memory, tape=tape)).chunk(2, -2)
        else:
            k, v = cache.get(lambda: self._heads(self.c_kv(memory)).chunk(2, -2))
        y = self._attend(q, k, v, packed, options, tape)
        if tape is not None:
            tape.push("cross_attention", memory.shape)
        return y

    def backward(
        self, dy: Tensor, tape: Any, *, d_memory: Tensor | None = None, relative_bias: Tensor | None = None,
        d_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(dx, d_memory), the mirror of forward.

        d_memory: what the memory's gradient is added to, and which is returned: the layers of a decoder share a memory.
        relative_bias, d_bias: as SelfAttention's.
        """
        (shape,) = tape.pop("cross_attention")
        dq = tape.empty((*dy.shape[:-1], self.c_q.out_features), dy.dtype)
        dkv = tape.empty((*shape[:-1], self.c_kv.out_features), dy.dtype)
        dk, dv = self._heads(dkv).chunk(2, -2)
        self._attend_backward(dy, self._heads(dq), dk, dv, relative_bias, d_bias, tape)
        d_own = self.c_kv.backward(dkv, tape)
        return self.c_q.backward(dq, tape), d_own if d_memory is None else d_memory.add_(d_own)
