"""BERT: the Transformer encoder (Devlin et al., 2018), post-norm with learned positions, pre-norm and rotary by config.

This file has the encoder. Whole models, with their heads, are in bert_heads.py, Hugging Face directories in
bert_checkpoint.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import MLP, LayerNorm, Linear, RotaryEmbedding, SelfAttention
from ..nn.dropout import draw_seed
from .recompute import Recomputing

__all__ = ["ACTIVATIONS", "BERTConfig", "Encoder", "Pooler", "initialise"]

ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "none")}


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """Sizes and options, most named as Hugging Face's BertConfig names them.

    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings (longest sequence),
    type_vocab_size (segments); intermediate_size: width of the MLP, None for 4 * hidden_size;
    hidden_act: "gelu" (erf), "gelu_tanh" or "relu"; hidden_dropout_prob: of the embedding and of each branch;
    attention_probs_dropout_prob: of the attention weights; classifier_dropout: before a classifier, None for
    hidden_dropout_prob; initializer_range: standard deviation of the weights at the start;
    tie_word_embeddings: the masked-LM head reads the embedding's table; labels: names of a classifier's classes;
    pre_norm: norms stand before attention and MLP, and one at the end; rotary: queries and keys are turned by their
    positions, and no positions are added.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True
    labels: tuple[str, ...] = ("0", "1")
    pre_norm: bool = False
    rotary: bool = False

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
            "type_vocab_size",
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"BERTConfig.{name}: got {value!r}; allowed: an integer >= 1")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(
                f"BERTConfig.intermediate_size: got {self.intermediate_size}; allowed: None or an integer >= 1"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BERTConfig.num_attention_heads: got {self.num_attention_heads}; allowed: a divisor of "
                f"hidden_size = {self.hidden_size}"
            )
        if self.rotary and self.hidden_size // self.num_attention_heads % 2:
            raise ValueError("BERTConfig.rotary: got True with heads of an odd width; allowed: an even width")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"BERTConfig.hidden_act: got {self.hidden_act!r}; allowed: {', '.join(ACTIVATIONS)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            p = getattr(self, name)
            if not (0 <= p < 1 if p is not None else name == "classifier_dropout"):
                raise ValueError(f"BERTConfig.{name}: got {p}; allowed: 0 <= p < 1")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"BERTConfig.labels: got {self.labels}; allowed: two or more different names")


class Embeddings(nn.Module):
    """Token, position and segment embeddings, their norm and dropout, in one op."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = None if config.rotary else nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def _tables(self) -> dict[str, Tensor | None]:
        return {
            "weight": self.word_embeddings.weight,
            "position_weight": None if self.position_embeddings is None else self.position_embeddings.weight,
            "segment_weight": self.token_type_embeddings.weight,
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
        }

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, tape: Any = None) -> Tensor:
        p = self.dropout if self.training else 0.0
        seed = draw_seed(input_ids.device, tape) if p > 0 else None
        tables: dict[str, Any] = self._tables()
        return ops.embedding_layer_norm(
            input_ids, segments=token_type_ids, eps=self.norm.eps, dropout_p=p, seed=seed, tape=tape, **tables
        )

    def backward(self, dy: Tensor, tape: Any) -> None:
        tape.backward("embedding_layer_norm", dy, **self._tables())


class Layer(nn.Module):
    """Attention and MLP. Post-norm: x -> x. Pre-norm: (branch, x) -> (branch, x), where the first layer gets branch None.

    Dropout of a branch, its addition to x and the norm are one op.
    """

    def __init__(self, config: BERTConfig, rotary: RotaryEmbedding | None) -> None:
        super().__init__()
        c = config
        activation, approximate = ACTIVATIONS[c.hidden_act]
        self.pre_norm, self.dropout = c.pre_norm, c.hidden_dropout_prob
        self.attn = SelfAttention(
            c.hidden_size, c.num_attention_heads, dropout=c.attention_probs_dropout_prob, rotary=rotary
        )
        self.ln_1 = LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        inner = c.intermediate_size or 4 * c.hidden_size
        self.mlp = MLP(c.hidden_size, inner, approximate=approximate, activation=activation)
        self.ln_2 = LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, branch: Tensor | None, x: Tensor, lengths: Tensor | None, tape: Any = None) -> Any:
        if not self.pre_norm:
            x, _ = self.ln_1(self.attn(x, tape=tape, key_lengths=lengths), x, tape=tape, dropout_p=self.dropout)
            x, _ = self.ln_2(self.mlp(x, tape=tape), x, tape=tape, dropout_p=self.dropout)
            return None, x
        if branch is None:
            y = self.ln_1(x, tape=tape)
        else:
            y, x = self.ln_1(branch, x, tape=tape, dropout_p=self.dropout)
        branch = self.attn(y, tape=tape, key_lengths=lengths)
        y, x = self.ln_2(branch, x, tape=tape, dropout_p=self.dropout)
        return self.mlp(y, tape=tape), x

    def backward(self, d_branch: Tensor | None, dx: Tensor, tape: Any, first: bool = False) -> Any:
        """(d_branch, dx) of what came in."""
        if d_branch is None:
            d_branch, dx = both(self.ln_2.add_backward(dx, None, tape))
            dx = self.mlp.backward(d_branch, tape).add_(dx)
            d_branch, dx = both(self.ln_1.add_backward(dx, None, tape))
            return None, self.attn.backward(d_branch, tape).add_(dx)
        dy = self.mlp.backward(d_branch, tape)
        d_branch, dx = both(self.ln_2.add_backward(dy, dx, tape))
        dy = self.attn.backward(d_branch, tape)
        if first:
            return None, self.ln_1.backward(dy, tape).add_(dx)
        return both(self.ln_1.add_backward(dy, dx, tape))


def both(found: Any) -> Any:
    """(d_branch, dx), which are one tensor where nothing was dropped."""
    return found if isinstance(found, tuple) else (found, found)


class Pooler(nn.Module):
    """tanh(W h + b) of the first token's hidden state: hidden (batch, seq, width) -> (batch, width)."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, tape: Any = None) -> Tensor:
        y: Tensor = self.dense(hidden[:, 0], tape=tape).tanh_()
        if tape is not None:
            tape.push("tanh", y)
        return y

    def backward(self, dy: Tensor, tape: Any) -> Tensor:
        """The gradient of the first token's hidden state, (batch, width): d tanh(x) = (1 - tanh(x)^2) dx."""
        (y,) = tape.pop("tanh")
        d = torch.ops.aten.tanh_backward.grad_input(dy, y, grad_input=tape.empty(y.shape, y.dtype))
        return self.dense.backward(d, tape)


class Encoder(Recomputing):
    """Embeddings and layers: input_ids (batch, seq) -> hidden states (batch, seq, hidden_size).

    Sequences are padded behind: row b has lengths[b] tokens. Hidden states there mean nothing, but are finite.
    recompute: see `Recomputing`.
    """

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        head_dim = config.hidden_size // config.num_attention_heads
        self.rotary = RotaryEmbedding(head_dim, config.max_position_embeddings) if config.rotary else None
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, self.rotary) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else None

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, lengths: Tensor | None = None, tape: Any = None
    ) -> Tensor:
        seq, longest = input_ids.shape[-1], self.config.max_position_embeddings
        if input_ids.dim() != 2 or seq > longest:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}; allowed: (batch, seq), seq <= {longest}"
            )
        x = self.embeddings(input_ids, token_type_ids, tape=tape)
        branch = None
        whole = self._recompute == "block" and tape is not None
        for layer in self.layers:
            branch, x = (
                tape.checkpoint(layer, branch, x, lengths) if whole else layer(branch, x, lengths, tape=tape)
            )
        if self.norm is not None:
            x, _ = self.norm(branch, x, tape=tape, dropout_p=self.config.hidden_dropout_prob)
        return x

    def backward(self, dx: Tensor, tape: Any) -> None:
        d_branch = None
        if self.norm is not None:
            d_branch, dx = both(self.norm.add_backward(dx, None, tape))
        for i, layer in reversed(list(enumerate(self.layers))):
            back: Any = layer.backward
            if self._recompute == "block":
                d_branch, dx = tape.checkpoint_backward(back, d_branch, dx, first=i == 0)
            else:
                d_branch, dx = back(d_branch, dx, tape, first=i == 0)
        self.embeddings.backward(dx, tape)


def initialise(model: nn.Module) -> None:
    """BERT's start: normal weights, zero biases, unit norms."""
    std = next(m.config for m in model.modules() if isinstance(m, Encoder)).initializer_range
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(p)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=std)
