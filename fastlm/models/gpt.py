"""GPT-2: pre-norm decoder with learned positions and a tied head (Radford et al., 2019).

The residual stream x runs beside the branch that was computed last; adding the branch and normalising for the next one
is one op, so a block is (branch, x) -> (branch, x) and the stream is read and written once for each norm.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import MLP, CausalSelfAttention, Dropout, LayerNorm, Linear
from . import checkpoint

__all__ = ["GPT", "GPTConfig"]

RECOMPUTE = ("none", "mlp", "block")
_GELU = {"gelu_tanh": "tanh", "gelu": "none"}
_HF_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and options, named as Hugging Face's GPT2Config names them.

    vocab_size, n_positions (longest sequence), n_embd, n_layer, n_head; n_inner: width of the MLP, None for 4 * n_embd;
    activation: "gelu_tanh" or "gelu" (erf); bias: whether projections and norms have biases;
    embd_pdrop, resid_pdrop, attn_pdrop: dropout of the embedding, of each branch and of the attention weights;
    initializer_range: standard deviation of the weights at the start (projections into the stream: / sqrt(2 * n_layer)).
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    bias: bool = True
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"GPTConfig.{name}: got {value!r}; allowed: an integer >= 1")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"GPTConfig.n_inner: got {self.n_inner}; allowed: None or an integer >= 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig.n_head: got {self.n_head}; allowed: a divisor of n_embd = {self.n_embd}"
            )
        if self.activation not in _GELU:
            raise ValueError(f"GPTConfig.activation: got {self.activation!r}; allowed: {', '.join(_GELU)}")
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"GPTConfig.{name}: got {getattr(self, name)}; allowed: 0 <= p < 1")


class Block(nn.Module):
    """Attention and MLP, each behind a norm; (branch, x) -> (branch, x). The first block gets branch None."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = config
        self.ln_1 = LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.attn = CausalSelfAttention(c.n_embd, c.n_head, c.bias, c.attn_pdrop, c.resid_pdrop)
        self.ln_2 = LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.mlp = MLP(c.n_embd, c.n_inner or 4 * c.n_embd, c.bias, _GELU[c.activation], c.resid_pdrop)

    def forward(self, branch: Tensor | None, x: Tensor, tape: Any = None) -> tuple[Tensor, Tensor]:
        if branch is None:
            y = self.ln_1(x, tape=tape)
        else:
            y, x = self.ln_1(branch, x, tape=tape)
        a = self.attn(y, tape=tape)
        y, x = self.ln_2(a, x, tape=tape)
        return self.mlp(y, tape=tape), x

    def backward(self, d_branch: Tensor, dx: Tensor, tape: Any, first: bool = False) -> Tensor:
        """The gradient of x, which is also that of the branch that came in."""
        dy = self.mlp.backward(d_branch, tape)
        dx = self.ln_2.add_backward(dy, dx, tape)
        dy = self.attn.backward(dx, tape)
        if first:
            return dx.add_(self.ln_1.backward(dy, tape))
        return self.ln_1.add_backward(dy, dx, tape)


class GPT(nn.Module):
    """GPT-2 language model.

    ``model(input_ids)`` -> logits (batch, seq, vocab); ``model(input_ids, targets)`` -> loss in nats, float32, the mean
    (or, by `reduction`, sum) over targets that are not -100; targets are already shifted. ids and targets: (batch, seq).
    recompute: what a tape does not keep and backward computes again: "none", "mlp" (its activation) or "block" (all but
    a block's inputs); it changes no number.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self._recompute = "none"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        self.reset_parameters()

    @property
    def recompute(self) -> str:
        return self._recompute

    @recompute.setter
    def recompute(self, what: str) -> None:
        if what not in RECOMPUTE:
            raise ValueError(f"recompute: got {what!r}; allowed: {', '.join(RECOMPUTE)}")
        self._recompute = what
        for block in self.h:
            block.mlp.recompute = what == "mlp"  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal weights, zero biases, unit norms, smaller projections into the stream."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif ".ln_" in f".{name}":
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else std)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, *, reduction: str = "mean", tape: Any = None
    ) -> Tensor:
        seq = input_ids.shape[-1]
        if input_ids.dim() != 2 or seq > self.config.n_positions:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}; allowed: (batch, seq), seq <= {self.config.n_positions}"
            )
        x = ops.embedding(input_ids, self.wte.weight, position_weight=self.wpe.weight, tape=tape)
        x = self.drop(x, tape=tape)
        branch = None
        blocks = self._recompute == "block" and tape is not None
        for block in self.h:
            branch, x = tape.checkpoint(block, branch, x) if blocks else block(branch, x, tape=tape)
        y, _ = self.ln_f(branch, x, tape=tape)
        if targets is None:
            logits: Tensor = self.lm_head(y, tape=tape)
            return logits
        return ops.linear_cross_entropy(y, self.lm_head.weight, targets, reduction=reduction, tape=tape)

    def backward(self, d_loss: Tensor, tape: Any) -> None:
        """Parameter gradients of d_loss * loss, the mirror of forward. d_loss: 0-dim float32."""
        dy = tape.backward("linear_cross_entropy", d_loss, weight=self.lm_head.weight)
        dx = self.ln_f.add_backward(dy, None, tape)
        for i, block in reversed(list(enumerate(self.h))):
            if self._recompute == "block":
                dx = tape.checkpoint_backward(block.backward, dx, dx, first=i == 0)
            else:
                dx = block.backward(dx, dx, tape, first=i == 0)  # type: ignore[operator]
        dx = self.drop.backward(dx, tape)
        tape.backward("embedding", dx, weight=self.wte.weight, position_weight=self.wpe.weight)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Tensor:
        """How many terms the loss of this batch sums: targets that are not -100. 0-dim int64."""
        targets = batch["targets"]
        ignored = tape.constant(-100, torch.int64)
        valid = torch.ne(targets, ignored, out=tape.empty(targets.shape, torch.int64))
        return torch.sum(valid, dim=(0, 1), out=tape.empty((), torch.int64))

    # --- Hugging Face directories

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GPT:
        """A model from config.json and model.safetensors as Hugging Face's GPT-2 writes them, in float32.

        ValueError names every tensor that is missing, unknown or of another shape, and options that we do not have.
        """
        raw = checkpoint.read_config(directory, "gpt2")
        config = config_from_hf(raw)
        with torch.device("meta"):
            model = cls(config)
        tensors = checkpoint.read_tensors(directory)
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        buffers = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry
        tensors = {k: v for k, v in tensors.items() if not k.endswith(buffers)}
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        tensors = {
            k: v.t().contiguous() if _is_projection(k) and v.dim() == 2 else v for k, v in tensors.items()
        }
        if not config.bias:
            tensors = {k: v for k, v in tensors.items() if not (k.endswith(".bias") and not v.any())}
        checkpoint.assign(model, tensors, directory)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors that transformers' GPT2LMHeadModel loads. Each file is whole or absent.

        A model without biases is written with zero biases, which Hugging Face's GPT-2 always has.
        """
        state = {k: v.detach() for k, v in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        if not self.config.bias:
            for name in [n for n in state if n.endswith("weight") and ("ln_" in n or _is_projection(n))]:
                state[name.removesuffix("weight") + "bias"] = state[name].new_zeros(state[name].shape[0])
        state = {k: v.t() if _is_projection(k) and v.dim() == 2 else v for k, v in state.items()}
        prefixed = {k if k.startswith("lm_head") else f"transformer.{k}": v for k, v in state.items()}
        checkpoint.write(directory, config_to_hf(self.config), prefixed)


def _is_projection(name: str) -> bool:
    """Whether Hugging Face keeps this weight as Conv1D does, (in, out)."""
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """The fields of config.json."""
    fields = dataclasses.asdict(config)
    activation = {v: k for k, v in reversed(_HF_GELU.items())}[fields.pop("activation")]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": activation,
        **fields,
    }


def config_from_hf(raw: dict[str, Any]) -> GPTConfig:
    """GPTConfig of a config.json; ValueError for what GPT does not implement."""
    activation = raw.get("activation_function", "gelu_new")
    if activation not in _HF_GELU:
        raise ValueError(
            f"config.json: activation_function is {activation!r}; allowed: {', '.join(_HF_GELU)}"
        )
    fixed = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {raw[key]}; allowed: {value}")
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    # Hugging Face's defaults where the file is silent
    fields = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1} | {
        k: v for k, v in raw.items() if k in names
    }
    return GPTConfig(**(fields | {"activation": _HF_GELU[activation]}))
