"""A decoder-only language model: GPT-2, and by config the variants that Llama, Qwen and others made of it.

The residual stream x runs beside the branch that was computed last; adding the branch and normalising for the next one
is one op, so a block is (branch, x) -> (branch, x) and the stream is read and written once for each norm.

Sources: Radford et al., GPT-2 (2019); Touvron et al., Llama (2023), arXiv:2302.13971; Qwen3 (2025), arXiv:2505.09388.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import MLP, Dropout, KVCache, LayerNorm, Linear, RMSNorm, RotaryEmbedding, SelfAttention
from . import gpt_files
from .gpt_config import GPTConfig
from .recompute import Recomputing

__all__ = ["GPT", "GPTConfig"]

_MLPS = {  # activation: the layer's options
    "gelu_tanh": {"approximate": "tanh"},
    "gelu": {"approximate": "none"},
    "relu_squared": {"activation": "relu_squared"},
    "swiglu": {"activation": "swiglu"},
    "geglu": {"activation": "geglu", "approximate": "none"},
}


def _norm(c: GPTConfig) -> LayerNorm | RMSNorm:
    if c.norm == "rms":
        return RMSNorm(c.n_embd, eps=c.layer_norm_epsilon)
    return LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.has_bias("norm"))


class Block(nn.Module):
    """Attention and MLP, each behind a norm; (branch, x) -> (branch, x). The first block gets branch None."""

    def __init__(self, config: GPTConfig, rotary: RotaryEmbedding | None) -> None:
        super().__init__()
        c = config
        options: dict[str, Any] = _MLPS[c.activation]
        self.ln_1 = _norm(c)
        self.attn = SelfAttention(
            c.n_embd, c.n_head, c.n_kv_head, c.head_dim, causal=True, qkv_bias=c.has_bias("qkv"),
            out_bias=c.has_bias("out"), dropout=c.attn_pdrop, resid_dropout=c.resid_pdrop, rotary=rotary,
            qk_norm=(lambda width: RMSNorm(width, c.layer_norm_epsilon)) if c.qk_norm else None,
        )  # fmt: skip
        self.ln_2 = _norm(c)
        self.mlp = MLP(c.n_embd, c.inner_width, c.has_bias("mlp"), dropout=c.resid_pdrop, **options)

    def forward(
        self, branch: Tensor | None, x: Tensor, attend: dict[str, Any] | None = None, tape: Any = None
    ) -> tuple[Tensor, Tensor]:
        """attend: what the attention takes beside its input."""
        if branch is None:
            y = self.ln_1(x, tape=tape)
        else:
            y, x = self.ln_1(branch, x, tape=tape)
        a = self.attn(y, tape=tape, **(attend or {}))
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


class GPT(Recomputing):
    """A decoder-only language model.

    ``model(input_ids)`` -> logits (batch, seq, vocab); ``model(input_ids, targets)`` -> loss in nats, float32, the mean
    (or, by `reduction`, sum) over targets that are not -100; targets are already shifted. ids and targets: (batch, seq).
    segment_ids (batch, seq), int64: a token sees those of its own id, for documents packed into one sequence; positions
    (batch, seq), int64: where each token stands, None for 0, 1, ....
    recompute: see `Recomputing`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        rotary = None
        if config.position == "rotary":
            width = config.rotary_dim or config.head_width
            rotary = RotaryEmbedding(width, config.n_positions, config.rope_theta, scaling=config.rope_scaling)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if rotary is None else None
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, rotary) for _ in range(config.n_layer))
        self.ln_f = _norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal weights, zero biases, unit norms, smaller projections into the stream."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 1:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else std)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, *, positions: Tensor | None = None,
        segment_ids: Tensor | None = None, reduction: str = "mean", tape: Any = None,
    ) -> Tensor:  # fmt: skip
        y = self._hidden(input_ids, positions, {"segment_ids": segment_ids}, tape=tape)
        if targets is None:
            logits: Tensor = self.lm_head(y, tape=tape)
            return logits
        return ops.linear_cross_entropy(y, self.lm_head.weight, targets, reduction=reduction, tape=tape)

    def _hidden(
        self, input_ids: Tensor, positions: Tensor | None, attend: dict[str, Any], cache: KVCache | None = None,
        tape: Any = None,
    ) -> Tensor:  # fmt: skip
        """(batch, seq, n_embd), what the head reads."""
        if input_ids.dim() != 2 or input_ids.shape[1] > self.config.n_positions:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}; allowed: (batch, seq), seq <= {self.config.n_positions}"
            )
        if self.wpe is None:
            x = ops.embedding(input_ids, self.wte.weight, tape=tape)
            attend = attend | {"positions": positions}
        else:
            x = ops.embedding(input_ids, self.wte.weight, positions, self.wpe.weight, tape=tape)
        x = self.drop(x, tape=tape)
        branch = None
        blocks = self._recompute == "block" and tape is not None
        for i, block in enumerate(self.h):
            more = attend if cache is None else attend | {"cache": cache.layers[i]}
            branch, x = (
                tape.checkpoint(block, branch, x, more) if blocks else block(branch, x, more, tape=tape)
            )
        y: Tensor = self.ln_f(branch, x, tape=tape)[0]
        return y

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
        positions = None if self.wpe is None else self.wpe.weight
        tape.backward("embedding", dx, weight=self.wte.weight, position_weight=positions)

    @staticmethod
    def units(batch: dict[str, Tensor], tape: Any) -> Tensor:
        """How many terms the loss of this batch sums: targets that are not -100. 0-dim int64."""
        targets = batch["targets"]
        ignored = tape.constant(-100, torch.int64)
        valid = torch.ne(targets, ignored, out=tape.empty(targets.shape, torch.int64))
        return torch.sum(valid, dim=(0, 1), out=tape.empty((), torch.int64))

    # --- generation (see fastlm.generate)

    continues = True  # what it generates continues the prompt

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, KVCache]:
        """(logits (rows, vocab) of the token behind each prompt, the state for `step`).

        prompts: ids, at least one each, of any lengths. capacity: the most tokens of a row, its prompt included.
        """
        lengths = [len(p) for p in prompts]
        if not lengths or min(lengths) < 1 or max(lengths) > capacity:
            raise ValueError(f"prompts: got lengths {lengths}; allowed: 1 to capacity = {capacity} tokens each")
        if capacity > self.config.n_positions:
            raise ValueError(f"capacity: got {capacity}; allowed: 1 to n_positions = {self.config.n_positions}")
        device = self.wte.weight.device
        ids = torch.tensor([[*p, *[p[-1]] * (max(lengths) - len(p))] for p in prompts], device=device)
        cache = KVCache(self.config.n_layer, capacity)
        y = self._hidden(ids, None, {}, cache)
        cache.advance(lengths, len(lengths), device)
        last = torch.tensor(lengths, device=device) - 1
        return self.lm_head(y[torch.arange(len(lengths), device=device), last]), cache

    @torch.no_grad()
    def step(self, state: KVCache, tokens: Tensor) -> Tensor:
        """Append tokens (rows,), one to each row; the logits (rows, vocab) of the token that follows."""
        rows = tokens.shape[0]
        y = self._hidden(tokens[:, None], state.positions(rows, 1, tokens.device), {}, state)
        state.advance(1, rows, tokens.device)
        logits: Tensor = self.lm_head(y[:, 0])
        return logits

    @property
    def context(self) -> int:
        """The most tokens of a row in generation."""
        return self.config.n_positions

    # --- Hugging Face directories

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GPT:
        """A model in float32 from config.json and the safetensors files beside it, of GPT-2, Llama, Qwen2 or Qwen3.

        ValueError names every tensor that is missing, unknown or of another shape, and options that we do not have.
        """
        return gpt_files.load(cls, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or absent.

        In the layout of the first of GPT-2, Llama, Qwen2 and Qwen3 that has the model's options, so that transformers
        loads it; else in one of our own. Where GPT-2's layout always has biases, a model without gets zeros.
        """
        gpt_files.save(self, directory)
