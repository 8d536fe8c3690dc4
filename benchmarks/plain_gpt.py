"""The other side of the train-step benchmark: GPT-2 and its training step as a good PyTorch user writes them.

Nothing here is fastlm's: layers, attention, loss, clipping and optimizer are torch's own, in their fastest form. Only the
parameters' names are those of fastlm.models.GPT, so that the same weights load into both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.engine import AdamWConfig
from fastlm.models import GPTConfig

__all__ = ["PlainGPT", "PlainStep"]


class PlainAttention(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.heads = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        split = (batch, seq, self.heads, width // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, seq, head_dim)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, seq, width))
        return out


class PlainMLP(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        inner = c.n_inner or 4 * c.n_embd
        self.c_fc = nn.Linear(c.n_embd, inner, bias=c.bias)
        self.c_proj = nn.Linear(inner, c.n_embd, bias=c.bias)
        self.approximate = {"gelu_tanh": "tanh", "gelu": "none"}[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))
        return y


class PlainBlock(nn.Module):
    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.attn = PlainAttention(c)
        self.ln_2 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.mlp = PlainMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class PlainGPT(nn.Module):
    """(input_ids, targets), both (batch, seq) -> mean loss in nats. Without dropout."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.n_positions, c.n_embd)
        self.h = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainStep:
    """Trains by autograd: `step` is all micro-batches, clipping and fused AdamW, and returns (loss, gradient norm), 0-dim.

    A step's `lr` holds for it and those after it; None leaves the optimizer's.

    torch's own gradient norm in float32 on a CPU is 0.3% low for a matrix of 38 million elements. It clips all the same; but
    while `exact_norm` is true, what is returned is the norm in float64.

    Args:
        model: on its device, float32.
        optimizer: fastlm's options, given to torch's optimizer.
        autocast: bfloat16 autocast around forward and loss; weights, gradients and optimizer stay float32.
        compile_mode: torch.compile's mode; None: eager.
    """

    def __init__(
        self, model: nn.Module, optimizer: AdamWConfig, autocast: bool = False, compile_mode: str | None = None
    ) -> None:
        self.parameters = list(model.parameters())
        self.device, self.autocast, self.max_norm = (
            self.parameters[0].device.type,
            autocast,
            optimizer.max_norm,
        )
        self.exact_norm = False
        self.model = model
        self.loss = model if compile_mode is None else torch.compile(model, mode=compile_mode)
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )

    def step(
        self, micro_batches: Sequence[Mapping[str, Tensor]], lr: float | None = None
    ) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                # All have as many targets, so the mean of means is the mean.
                loss = self.loss(**batch) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        exact = self._exact_norm() if self.exact_norm else None
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm if exact is None else exact

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss summed over the targets that are not -100, how many they are)."""
        self.model.eval()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.model(**batch)
        self.model.train()
        count = (batch["targets"] != -100).sum()
        return loss * count, count

    def _exact_norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm()
