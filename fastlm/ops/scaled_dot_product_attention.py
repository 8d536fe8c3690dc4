"""PyTorch's function for attention by our op: to replace ``F.scaled_dot_product_attention`` is one line."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import attention

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: same arguments, same values, our kernels.

    `is_causal` keeps PyTorch's alignment, "top-left": query i sees keys j <= i. `attention` aligns to the
    bottom-right corner by default, as FlashAttention does; they differ where there are more keys than queries, or
    fewer. A query that sees no key gives 0, and gradients of 0, where PyTorch's kernels may give NaN. Which weights
    dropout drops differs from PyTorch's choice; the probability is the same.

    Args:
        query: (..., heads, queries, head_dim); head dims from 1 to 256.
        key: (..., key_heads, keys, head_dim), value: (..., key_heads, keys, value_dim).
        attn_mask: what broadcasts to (..., heads, queries, keys): bool, True where a query sees a key; or of query's
            dtype or float32, added to the scores. Its gradient is summed over broadcast dimensions.
        dropout_p: probability in [0, 1) of dropping a weight; the seed comes from torch's generator.
        is_causal: not together with attn_mask.
        scale: None for 1 / sqrt(head_dim).
        enable_gqa: key_heads may be a divisor of heads.

    Returns:
        (..., heads, queries, value_dim), of query's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: got a mask with is_causal=True; allowed: one of the two")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != query.dim() or t.dim() < 2 or t.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}; allowed: (..., heads, seq, head_dim), with query's leading "
                f"dimensions {tuple(query.shape[:-3])}"
            )
    if not enable_gqa and query.dim() > 2 and key.shape[-3] != query.shape[-3]:
        raise ValueError(
            f"key: got {key.shape[-3]} heads; allowed: query's {query.shape[-3]}, or a divisor with enable_gqa=True"
        )
    leading = query.shape[:-2]
    q, k, v = (_four(t) for t in (query, key, value))
    bias: Any = attn_mask
    if bias is not None and query.dim() > 4 and bias.dim() > 3:
        bias = bias.expand(*query.shape[:-3], *bias.shape[-3:]).flatten(0, -4)
    out: Tensor = attention(
        q, k, v, causal=is_causal, alignment="top-left", scale=scale, bias=bias, dropout_p=dropout_p
    )
    return out.reshape(*leading, *out.shape[-2:])


def _four(t: Tensor) -> Tensor:
    """(..., heads, seq, width) with one batch dimension; a missing one, or missing heads, count 1."""
    if t.dim() == 4:
        return t
    return t.flatten(0, -4) if t.dim() > 4 else t[(None,) * (4 - t.dim())]
