"""The shape of an encoder-decoder: the 2017 Transformer's by default, and by option T5's, Marian's and others."""

from __future__ import annotations

import dataclasses

__all__ = ["ACTIVATIONS", "EncoderDecoderConfig"]

ACTIVATIONS = {  # config name: the MLP's options
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu", "approximate": "none"},
    "gelu_tanh": {"activation": "gelu", "approximate": "tanh"},
    "silu": {"activation": "silu"},
    "reglu": {"activation": "reglu"},
    "geglu": {"activation": "geglu", "approximate": "none"},
    "geglu_tanh": {"activation": "geglu", "approximate": "tanh"},
    "swiglu": {"activation": "swiglu"},
}
_POSITIONS = ("sinusoidal", "learned", "relative")


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and options; the defaults are the base model of Vaswani et al. (2017).

    vocab_size; target_vocab_size: the decoder's, None for vocab_size; n_embd; n_layer: of the encoder; n_decoder_layer:
    None for n_layer; n_head; head_dim: None for n_embd / n_head; n_inner: width of the MLP, None for 4 * n_embd;
    activation: "relu", "gelu" (erf), "gelu_tanh", "silu", or gated "reglu", "geglu" (erf), "geglu_tanh", "swiglu";
    position: "sinusoidal" (sines in the first half of the columns, cosines in the second: the paper's, its columns in
    another order), "learned", or "relative": T5's bias of the attention scores by distance, one table for the layers of
    a stack, with relative_buckets and relative_max_distance; n_positions: longest sequence, any if relative;
    norm: "layer" or "rms"; layer_norm_epsilon: of either; pre_norm: norms stand before attention and MLP, not behind;
    final_norm: a norm at the end of each stack, None for pre_norm, which needs it;
    bias: of projections and LayerNorms; scale_attention: scores by 1 / sqrt(head_dim); scale_embedding: the token's
    embedding by sqrt(n_embd); scale_logits: logits by 1 / sqrt(n_embd), as the tied T5 does; logit_bias: a bias of the
    logits;
    tie_source_target: encoder and decoder share one embedding; tie_word_embeddings: the head's weight is the decoder's
    embedding;
    label_smoothing: of the loss in training (in evaluation the loss is the plain cross-entropy);
    embd_pdrop, resid_pdrop, attn_pdrop, inner_pdrop, final_pdrop: dropout of the embedding, of each branch, of the
    attention weights, of the MLP's activation and of each stack's output;
    pad_token_id: what an ignored target becomes as the decoder's input; decoder_start_token_id: what it begins with;
    eos_token_id: what ends a text;
    initializer: "xavier" (uniform; embeddings normal, of variance 1 / n_embd) or "t5" (normal, of variance 1 / inputs,
    queries by head_dim less; embeddings of variance 1).
    """

    vocab_size: int = 37000
    target_vocab_size: int | None = None
    n_positions: int = 1024
    n_embd: int = 512
    n_layer: int = 6
    n_decoder_layer: int | None = None
    n_head: int = 8
    head_dim: int | None = None
    n_inner: int | None = None
    activation: str = "relu"
    position: str = "sinusoidal"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm: str = "layer"
    layer_norm_epsilon: float = 1e-5
    pre_norm: bool = False
    final_norm: bool | None = None
    bias: bool = True
    scale_attention: bool = True
    scale_embedding: bool = True
    scale_logits: bool = False
    logit_bias: bool = False
    tie_source_target: bool = True
    tie_word_embeddings: bool = True
    label_smoothing: float = 0.0
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    inner_pdrop: float = 0.0
    final_pdrop: float = 0.0
    pad_token_id: int = 0
    decoder_start_token_id: int = 0
    eos_token_id: int = 1
    initializer: str = "xavier"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            _require(name, value, isinstance(value, int) and value >= 1, "an integer >= 1")
        for name in ("target_vocab_size", "n_decoder_layer", "head_dim", "n_inner"):
            value = getattr(self, name)
            good = value is None or (isinstance(value, int) and value >= 1)
            _require(name, value, good, "None or an integer >= 1")
        divides = self.head_dim is not None or self.n_embd % self.n_head == 0
        _require("n_head", self.n_head, divides, f"a divisor of n_embd = {self.n_embd}")
        for name, allowed in (
            ("activation", tuple(ACTIVATIONS)), ("position", _POSITIONS), ("norm", ("layer", "rms")),
            ("initializer", ("xavier", "t5")),
        ):  # fmt: skip
            value = getattr(self, name)
            _require(name, repr(value), value in allowed, ", ".join(allowed))
        if self.position == "relative":
            buckets, distance = self.relative_buckets, self.relative_max_distance
            _require("relative_buckets", buckets, buckets >= 4 and buckets % 2 == 0, "an even number >= 4")
            _require("relative_max_distance", distance, distance > buckets // 2, f"more than {buckets // 2}")
        good = self.position != "sinusoidal" or self.n_embd % 2 == 0
        _require("n_embd", self.n_embd, good, "an even number with sinusoidal positions")
        _require("final_norm", self.final_norm, self.has_final_norm or not self.pre_norm, "None or True with pre_norm")
        _require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "0 <= x < 1")
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop", "inner_pdrop", "final_pdrop"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 <= p < 1")
        _require("logit_bias", True, not (self.logit_bias and self.scale_logits), "False with scale_logits")
        same = self.decoder_vocab_size == self.vocab_size or not self.tie_source_target
        _require("tie_source_target", True, same, "False where the vocabularies differ in size")
        for name in ("pad_token_id", "decoder_start_token_id", "eos_token_id"):
            value, last = getattr(self, name), self.decoder_vocab_size - 1
            _require(name, value, 0 <= value <= last, f"0 to {last}")

    @property
    def decoder_vocab_size(self) -> int:
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size

    @property
    def decoder_layers(self) -> int:
        return self.n_layer if self.n_decoder_layer is None else self.n_decoder_layer

    @property
    def head_width(self) -> int:
        """Columns of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Columns of the MLP's activation."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's activation is a gated unit."""
        return self.activation.endswith(("glu", "glu_tanh"))

    @property
    def has_final_norm(self) -> bool:
        return self.pre_norm if self.final_norm is None else self.final_norm


def _require(name: str, given: object, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"EncoderDecoderConfig.{name}: got {given}; allowed: {allowed}")
