"""Attention as a drop-in for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from .dropout import draw_seed
from .linear import Linear

__all__ = ["MultiheadAttention"]


class MultiheadAttention(torch.nn.Module):
    """Drop-in for ``torch.nn.MultiheadAttention``: same constructor, initialisation, state dict, masks and values.

    Where torch gives NaN, a query whose keys are all masked, this gives out_proj's bias, weights of 0 and finite
    gradients. Which weights dropout drops differs; the weights returned are those that were used, as in torch. Masks
    are torch's: True, or -inf, hides a key. With is_causal, as in torch, the mask is trusted to be the causal one and is
    not read. Without ``need_weights`` no (L, S) tensor is made, whatever the padding mask; with it the weights are.
    Nested tensors are not taken.

    Shapes: query (L, N, embed_dim), key (S, N, kdim), value (S, N, vdim), or (N, L, ...) with batch_first, or without
    N; out like query; weights (N, L, S), or (N, heads, L, S) with average_attn_weights False.
    With a tape: needs need_weights False, a batch, and neither add_bias_kv nor add_zero_attn.
    """

    in_proj_weight: Parameter | None
    q_proj_weight: Parameter | None
    k_proj_weight: Parameter | None
    v_proj_weight: Parameter | None
    in_proj_bias: Parameter | None
    bias_k: Parameter | None
    bias_v: Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, add_bias_kv: bool = False,
        add_zero_attn: bool = False, kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; allowed: a divisor of embed_dim = {embed_dim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim

        def empty(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        one_width = self.kdim == embed_dim and self.vdim == embed_dim
        widths = {"q_proj_weight": embed_dim, "k_proj_weight": self.kdim, "v_proj_weight": self.vdim}
        for name, width in widths.items():
            self.register_parameter(name, None if one_width else empty(embed_dim, width))
        self.register_parameter("in_proj_weight", empty(3 * embed_dim, embed_dim) if one_width else None)
        self.register_parameter("in_proj_bias", empty(3 * embed_dim) if bias else None)
        self.out_proj = Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k, self.bias_v = (empty(1, 1, embed_dim) if add_bias_kv else None for _ in range(2))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                torch.nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            torch.nn.init.zeros_(self.in_proj_bias)
            torch.nn.init.zeros_(self.out_proj.bias)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                torch.nn.init.xavier_normal_(extra)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, tape: Any = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if tape is not None and (need_weights or self.bias_k is not None or self.add_zero_attn or query.dim() != 3):
            raise ValueError(
                "tape: got need_weights, add_bias_kv, add_zero_attn or an input without a batch; allowed on a tape: "
                "none of them"
            )
        if query.dim() == 2:
            out, weights = self._forward_one(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return out, weights
        kind, (q, k, v) = self._project(query, key, value, tape)
        lengths = (query.shape[1], key.shape[1]) if self.batch_first else (query.shape[0], key.shape[0])
        q, k, v = (self._heads(t) for t in (q, k, v))
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (_append(t, self._row(b)) for t, b in ((k, self.bias_k), (v, self.bias_v)))
            extra += 1
        if self.add_zero_attn:
            k, v = (_append(t, t.new_zeros(1, 1, 1, 1)) for t in (k, v))
            extra += 1
        causal = is_causal and extra == 0
        if is_causal and extra:
            attn_mask = torch.ones(lengths, dtype=torch.bool, device=q.device).triu(1)
        options = _masks(key_padding_mask, None if causal else attn_mask, q, k, extra, self.num_heads)
        p = self.dropout if self.training else 0.0
        options |= {"causal": causal, "alignment": "top-left"}
        if p > 0:
            options |= {"dropout_p": p, "dropout_seed": draw_seed(q.device, tape)}
        weights = None
        if need_weights:
            y, lse = ops.attention(q, k, v, return_lse=True, **options)
            weights = _weights(q, k, lse, **options)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = ops.attention(q, k, v, tape=tape, **options)
        y = (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).reshape(query.shape).contiguous()
        out = self.out_proj(y, tape=tape)
        if tape is not None:
            tape.push("multihead_attention", kind, query.shape, key.shape, value.shape)
        return out, weights

    def backward(self, dy: Tensor, tape: Any) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The mirror of forward: dx where query, key and value were one tensor, else (d_query, d_key, d_value)."""
        kind, *shapes = tape.pop("multihead_attention")
        width = self.embed_dim
        dy = self.out_proj.backward(dy, tape)
        sizes = {"self": (3,), "memory": (1, 2), "three": (1, 1, 1)}[kind]
        firsts = [shapes[0], shapes[1], shapes[2]]
        buffers = [
            tape.empty((*firsts[i][:-1], n * width), dy.dtype) for i, n in enumerate(sizes)
        ]
        dq, dk, dv = (self._heads(part) for buffer in buffers for part in buffer.split(width, -1))
        tape.backward("attention", self._heads(dy), None, into={"q": dq, "k": dk, "v": dv})
        grads: list[Tensor] = []
        last = 3
        for buffer, n in zip(reversed(buffers), reversed(sizes), strict=True):
            grads.insert(0, self._linear_backward(buffer, last - n, last, tape))
            last -= n
        if kind == "self":
            return grads[0]
        return (grads[0], grads[1], torch.zeros_like(grads[1])) if kind == "memory" else (grads[0], grads[1], grads[2])

    def _forward_one(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, *rest: Any) -> Any:
        """Without a batch dimension."""
        batch = 0 if self.batch_first else 1
        one = query.unsqueeze(batch)
        key_one = one if key is query else key.unsqueeze(batch)
        value_one = key_one if value is key else value.unsqueeze(batch)
        out, weights = self(one, key_one, value_one, None if padding is None else padding[None], *rest)
        return out.squeeze(batch), None if weights is None else weights.squeeze(0)

    def _weight(self, first: int, last: int) -> tuple[Tensor, slice]:
        """The parameter of projections first to last (of q, k, v) and its rows."""
        if self.in_proj_weight is not None:
            return self.in_proj_weight, slice(first * self.embed_dim, last * self.embed_dim)
        own = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[first]
        assert own is not None
        return own, slice(None)

    def _project(self, query: Tensor, key: Tensor, value: Tensor, tape: Any) -> tuple[str, tuple[Tensor, ...]]:
        """Projected q, k and v by as few products as there are different inputs."""
        one_width = self.in_proj_weight is not None
        if one_width and query is key and key is value:
            return "self", self._linear(query, 0, 3, tape).split(self.embed_dim, -1)
        if one_width and key is value:
            q = self._linear(query, 0, 1, tape)
            return "memory", (q, *self._linear(key, 1, 3, tape).split(self.embed_dim, -1))
        return "three", tuple(self._linear(x, i, i + 1, tape) for i, x in enumerate((query, key, value)))

    def _linear(self, x: Tensor, first: int, last: int, tape: Any) -> Tensor:
        weight, rows = self._weight(first, last)
        whole = self.in_proj_bias
        bias = None if whole is None else whole[first * self.embed_dim : last * self.embed_dim]
        if tape is None:
            return F.linear(x, weight[rows], bias)
        y: Tensor = tape.linear(x, weight[rows], bias)
        return y

    def _linear_backward(self, dy: Tensor, first: int, last: int, tape: Any) -> Tensor:
        weight, rows = self._weight(first, last)
        bias_rows = slice(first * self.embed_dim, last * self.embed_dim)
        dx: Tensor = tape.linear_backward(dy, weight, self.in_proj_bias, rows, bias_rows)
        return dx

    def _heads(self, t: Tensor) -> Tensor:
        """(N, L, E) or (L, N, E) as (N, heads, L, head_dim), a view."""
        t = t.unflatten(-1, (self.num_heads, self.head_dim))
        return t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3)

    def _row(self, extra: Tensor) -> Tensor:
        """(1, 1, E) as (1, heads, 1, head_dim)."""
        return extra.view(1, self.num_heads, 1, self.head_dim)


def _append(t: Tensor, row: Tensor) -> Tensor:
    """(N, heads, S, D) with one more key."""
    return torch.cat([t, row.to(t.dtype).expand(t.shape[0], t.shape[1], 1, t.shape[3])], 2)


def _masks(
    padding: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor, extra: int, heads: int
) -> dict[str, Any]:
    """torch's masks as options of `attention`; the `extra` last keys are seen by all."""
    options: dict[str, Any] = {}
    bias: Tensor | None = None
    batch, _, queries, _ = q.shape
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"attn_mask: got dtype {mask.dtype}; allowed: bool or floating-point")
        shapes = ((queries, k.shape[2] - extra), (batch * heads, queries, k.shape[2] - extra))
        if tuple(mask.shape) not in shapes:
            raise ValueError(f"attn_mask: got shape {tuple(mask.shape)}; allowed: {shapes[0]} or {shapes[1]}")
        mask = mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads))
        bias = F.pad(~mask, (0, extra), value=True) if mask.dtype == torch.bool else F.pad(mask, (0, extra))
    if padding is not None:
        if tuple(padding.shape) != (batch, k.shape[2] - extra):
            raise ValueError(
                f"key_padding_mask: got shape {tuple(padding.shape)}; allowed: {(batch, k.shape[2] - extra)}"
            )
        padding = F.pad(padding, (0, extra))
        if padding.dtype == torch.bool:  # hidden keys are another segment than all queries
            options["segment_ids"] = torch.zeros((batch, queries), dtype=torch.int32, device=q.device)
            options["key_segment_ids"] = padding.to(torch.int32)
        else:
            row = padding[:, None, None, :]
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=row.dtype).masked_fill(~bias, -torch.inf)
            bias = row if bias is None else bias + row
    if bias is not None:
        options["bias"] = bias if bias.dtype in (torch.bool, torch.float32) else bias.to(q.dtype)
    return options


def _weights(
    q: Tensor, k: Tensor, lse: Tensor, causal: bool = False, alignment: str = "", bias: Tensor | None = None,
    segment_ids: Tensor | None = None, key_segment_ids: Tensor | None = None, dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The weights that attention used, (N, heads, L, S), from its log-sum-exp; differentiable."""
    s = (q @ k.transpose(-1, -2)).to(lse.dtype) / q.shape[3] ** 0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    if key_segment_ids is not None:
        seen = seen & (key_segment_ids == 0)[:, None, None]
    if bias is not None:
        seen = seen & (bias if bias.dtype == torch.bool else bias != -torch.inf)
        s = s if bias.dtype == torch.bool else s + bias
    lse = lse.unsqueeze(-1)
    p = torch.exp(torch.where(seen, s, 0.0) - lse.masked_fill(lse == -torch.inf, 0.0)).masked_fill(~seen, 0.0)
    if dropout_p and dropout_seed is not None:
        batch, heads, queries, keys = p.shape
        kept = ops.attention_dropout_mask(dropout_seed, dropout_p, batch, heads, queries, keys)
        p = p * kept / (1.0 - dropout_p)
    return p.to(q.dtype)
