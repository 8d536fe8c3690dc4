"""Tiny models and batches shared by the tests."""

from __future__ import annotations

import torch

from fastlm.models import GPT, EncoderDecoder, EncoderDecoderConfig, GPTConfig

TINY = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "norm": "rms", "position": "rotary", "activation": "swiglu", "bias": False, "tie_word_embeddings": False,
    "n_head": 4, "n_kv_head": 2,
}  # fmt: skip
QWEN3 = LLAMA | {"qk_norm": True, "head_dim": 8}
TRANSFORMER = {"vocab_size": 41, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
T5 = {
    "position": "relative", "relative_buckets": 8, "relative_max_distance": 12, "norm": "rms", "pre_norm": True,
    "bias": False, "scale_attention": False, "scale_embedding": False, "scale_logits": True, "head_dim": 6,
    "layer_norm_epsilon": 1e-6, "initializer": "t5",
}  # fmt: skip
T5_V1_1 = T5 | {"activation": "geglu_tanh", "n_inner": 40, "scale_logits": False, "tie_word_embeddings": False}


def tiny_gpt(seed: int = 0, **options) -> GPT:
    """A GPT whose every parameter is away from its initial value, so that no gradient vanishes by symmetry."""
    torch.manual_seed(seed)
    return _moved(GPT(GPTConfig(**(TINY | options))))


def tiny_encoder_decoder(seed: int = 0, **options) -> EncoderDecoder:
    """As tiny_gpt."""
    torch.manual_seed(seed)
    return _moved(EncoderDecoder(EncoderDecoderConfig(**(TRANSFORMER | options))))


def _moved(model):
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


def translation_batch(
    batch: int = 3, seq: int = 13, target_seq: int = 11, vocab: int = TRANSFORMER["vocab_size"], seed: int = 1
) -> dict[str, torch.Tensor]:
    """A padded batch with sources of several lengths, ignored targets at the end and one in the middle."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (batch, target_seq), generator=g)
    targets[0, 1], targets[-1, -2:] = -100, -100
    lengths = torch.tensor([seq - 2 * i for i in range(batch)])
    return {"input_ids": torch.randint(0, vocab, (batch, seq), generator=g), "targets": targets, "lengths": lengths}
