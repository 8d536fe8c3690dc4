"""Tiny BERT models and batches, one of each kind, shared by the tests."""

from __future__ import annotations

import torch

from fastlm import models
from fastlm.models import BERTConfig
from fastlm.tasks import Classification, MaskedLM, SpanQA, Tagging

TINY = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 16, "labels": ("a", "b", "c"),
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {
    "masked": models.BERTForMaskedLM,
    "pretraining": models.BERTForPreTraining,
    "sequence": models.BERTForSequenceClassification,
    "token": models.BERTForTokenClassification,
    "question": models.BERTForQuestionAnswering,
    "embedding": models.BERTForSentenceEmbedding,
}


def tiny_bert(kind: str, seed: int = 0, **options):
    """A BERT whose every parameter is away from its initial value, so that no gradient vanishes by symmetry."""
    torch.manual_seed(seed)
    model = KINDS[kind](BERTConfig(**(TINY | options)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tiny_task(kind: str, seq: int = 12):
    """The task that the model of this kind is trained on; None for sentence embeddings."""
    vocab, special = TINY["vocab_size"], (seq, 1, 2, 0)
    ordinary, continues = torch.arange(4, vocab).numpy(), (torch.arange(vocab) % 3 == 0).numpy()
    match kind:
        case "masked" | "pretraining":
            pairs = kind == "pretraining"
            return MaskedLM(vocab, *special, 3, ordinary, continues, mask_rate=0.3, next_sentence=pairs)
        case "sequence":
            return Classification(vocab, *special, TINY["labels"])
        case "token":
            return Tagging(vocab, *special, TINY["labels"])
        case "question":
            return SpanQA(vocab, 16, *special[1:])
    return None


def bert_batch(kind: str, rows: int = 4, seq: int = 12, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random rows of different lengths, of which some targets are ignored."""
    g = torch.Generator().manual_seed(seed)
    task = tiny_task(kind, seq)
    if task is not None:
        return task.random(rows, seq, g)
    ids = torch.randint(0, TINY["vocab_size"], (2, rows, seq), generator=g)
    lengths = torch.randint(2, seq + 1, (2, rows), generator=g)
    other = {"other_ids": ids[1, :, :-2].contiguous(), "other_lengths": lengths[1].clamp(max=seq - 2)}
    return {"input_ids": ids[0], "lengths": lengths[0], **other}
