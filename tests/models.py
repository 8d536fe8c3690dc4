"""Tiny models and batches shared by the tests."""

from __future__ import annotations

import torch

from fastlm.models import GPT, GPTConfig

TINY = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "norm": "rms", "position": "rotary", "activation": "swiglu", "bias": False, "tie_word_embeddings": False,
    "n_head": 4, "n_kv_head": 2,
}  # fmt: skip
QWEN3 = LLAMA | {"qk_norm": True, "head_dim": 8}


def tiny_gpt(seed: int = 0, **options) -> GPT:
    """A GPT whose every parameter is away from its initial value, so that no gradient vanishes by symmetry."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**(TINY | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def lm_batch(
    batch: int = 3, seq: int = 7, vocab: int = TINY["vocab_size"], seed: int = 1
) -> dict[str, torch.Tensor]:
    """A causal-LM batch in which some targets are ignored and some ids repeat."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (batch, seq + 1), generator=g)
    ids[0, :3] = 5
    targets = ids[:, 1:].clone()
    targets[0, 1], targets[-1, -2:] = -100, -100
    return {"input_ids": ids[:, :-1].contiguous(), "targets": targets}
