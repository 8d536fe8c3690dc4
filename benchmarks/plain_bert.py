"""BERT's pre-training as a good PyTorch user writes it, for the train-step benchmark.

Nothing here is fastlm's: fused projections, F.scaled_dot_product_attention, and a masked-LM head that sees the masked positions
only. transformers' own BertForPreTraining computes the head, its product with the vocabulary included, for every position, and
projects queries, keys and values apart; it is no contender, as that costs it more than our engine could win. Parameters bear
the names of fastlm.models.BERTForPreTraining, so that the same weights load into both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.models import BERTConfig

__all__ = ["PlainBERT"]


class PlainAttention(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.c_attn = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.c_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        split = (batch, seq, self.heads, width // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.c_attn(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v)  # (batch, heads, seq, head_dim)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, seq, width))
        return out


class PlainMLP(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        inner = c.intermediate_size or 4 * c.hidden_size
        self.c_fc = nn.Linear(c.hidden_size, inner)
        self.c_proj = nn.Linear(inner, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return y


class PlainLayer(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.attn, self.mlp = PlainAttention(c), PlainMLP(c)
        self.ln_1, self.ln_2 = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_1(x + self.attn(x))
        x = self.ln_2(x + self.mlp(x))
        return x


class PlainEmbeddings(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        y: Tensor = self.norm(x + self.token_type_embeddings(token_type_ids))
        return y


class PlainEncoder(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.embeddings = PlainEmbeddings(c)
        self.layers = nn.ModuleList(PlainLayer(c) for _ in range(c.num_hidden_layers))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        x: Tensor = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class PlainHead(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), table, self.bias)


class PlainPooler(nn.Module):
    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


class PlainBERT(nn.Module):
    """Masked tokens and next sentence -> the sum of both mean losses in nats. Rows without padding; without dropout.

    input_ids, token_type_ids: (batch, seq); positions, targets: (batch, m), the places in each row and what stood there;
    next_sentence: (batch,).
    """

    def __init__(self, c: BERTConfig) -> None:
        super().__init__()
        self.encoder = PlainEncoder(c)
        self.head = PlainHead(c)
        self.pooler = PlainPooler(c)
        self.next_sentence = nn.Linear(c.hidden_size, 2)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, positions: Tensor, targets: Tensor, next_sentence: Tensor
    ) -> Tensor:
        hidden = self.encoder(input_ids, token_type_ids)
        batch, seq, _ = hidden.shape
        rows = positions + torch.arange(0, batch * seq, seq, device=positions.device)[:, None]
        masked = hidden.flatten(0, 1).index_select(0, rows.flatten())  # (batch * m, width)
        logits = self.head(masked, self.encoder.embeddings.word_embeddings.weight)
        follows = F.cross_entropy(self.next_sentence(self.pooler(hidden)), next_sentence)
        return F.cross_entropy(logits, targets.flatten()) + follows
