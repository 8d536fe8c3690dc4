"""The shape of a GPT: GPT-2's by default, and by option those of Llama, Qwen and others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["GPTConfig"]

_ACTIVATIONS = ("gelu_tanh", "gelu", "relu_squared", "swiglu", "geglu")
_GATED = ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and options; those that GPT-2 has are named as Hugging Face's GPT2Config names them.

    vocab_size, n_positions (longest sequence), n_embd, n_layer, n_head; n_kv_head: heads of keys and values, each read by
    n_head / n_kv_head query heads, None for n_head; head_dim: None for n_embd / n_head;
    norm: "layer" or "rms"; layer_norm_epsilon: of either; qk_norm: an RMSNorm of each head's queries and keys;
    position: "learned", or "rotary" with rope_theta, rotary_dim (how many columns of a head turn, None for all) and
    rope_scaling (see `fastlm.nn.RotaryEmbedding`);
    activation: "gelu_tanh", "gelu" (erf), "relu_squared", or gated "swiglu", "geglu" (erf);
    n_inner: width of the MLP, None for 4 * n_embd, or if gated 8/3 of n_embd, up to a multiple of 64;
    bias: whether projections and LayerNorms have biases; qkv_bias, out_bias, mlp_bias, norm_bias: of one kind, None for
    `bias`;
    embd_pdrop, resid_pdrop, attn_pdrop: dropout of the embedding, of each branch and of the attention weights;
    initializer_range: standard deviation of the weights at the start (projections into the stream: / sqrt(2 * n_layer)).
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    head_dim: int | None = None
    n_inner: int | None = None
    activation: str = "gelu_tanh"
    norm: str = "layer"
    layer_norm_epsilon: float = 1e-5
    qk_norm: bool = False
    position: str = "learned"
    rope_theta: float = 10000.0
    rotary_dim: int | None = None
    rope_scaling: Mapping[str, Any] | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            _require(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        for name in ("n_inner", "n_kv_head", "head_dim"):
            value = getattr(self, name)
            good = value is None or (isinstance(value, int) and value >= 1)
            _require(name, value, good, "None or an integer >= 1")
        divides = self.head_dim is not None or self.n_embd % self.n_head == 0
        _require("n_head", self.n_head, divides, f"a divisor of n_embd = {self.n_embd}")
        divides = self.n_kv_head is None or self.n_head % self.n_kv_head == 0
        _require("n_kv_head", self.n_kv_head, divides, f"a divisor of n_head = {self.n_head}")
        for name, allowed in (
            ("activation", _ACTIVATIONS), ("norm", ("layer", "rms")), ("position", ("learned", "rotary")),
        ):  # fmt: skip
            value = getattr(self, name)
            _require(name, repr(value), value in allowed, ", ".join(allowed))
        if self.position == "rotary":
            turned = self.head_width if self.rotary_dim is None else self.rotary_dim
            good = turned % 2 == 0 and 2 <= turned <= self.head_width
            _require("rotary_dim", turned, good, f"an even number from 2 to head_dim = {self.head_width}")
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 <= p < 1")

    @property
    def head_width(self) -> int:
        """Columns of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Columns of the MLP's activation."""
        if self.n_inner is not None:
            return self.n_inner
        return -(-8 * self.n_embd // 3 // 64) * 64 if self.activation in _GATED else 4 * self.n_embd

    def has_bias(self, part: str) -> bool:
        """Whether the parts of a kind have biases: "qkv", "out", "mlp" or "norm"."""
        own: bool | None = getattr(self, f"{part}_bias")
        return self.bias if own is None else own


def _require(name: str, given: object, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"GPTConfig.{name}: got {given}; allowed: {allowed}")
