"""Layers: each one forward and one hand-written backward, and each a drop-in module.

Without a tape a layer is ordinary PyTorch: autograd, AMP, ``torch.compile(fullgraph=True)``, DDP and FSDP2 work, and the
gradients are still ours, those of the ops. With the engine's tape the same forward runs without autograd and
``backward(dy, tape)``, its mirror, adds parameter gradients to their float32 buffers and returns the input's.
"""

from __future__ import annotations

from .activation import GEGLU, GELU, ReGLU, ReLU, SiLU, SwiGLU
from .attention import MultiheadAttention
from .cache import KVCache, LayerCache, MemoryCache
from .distillation import DistillationLoss
from .dropout import Dropout
from .embedding import Embedding
from .layer_norm import LayerNorm, RMSNorm
from .linear import Linear
from .loss import CrossEntropyLoss, LinearCrossEntropyLoss
from .mlp import MLP
from .recurrent import GRU, LSTM, RNN
from .rotary_embedding import RotaryEmbedding
from .self_attention import CausalSelfAttention, CrossAttention, Packed, SelfAttention

__all__ = [
    "CausalSelfAttention",
    "CrossAttention",
    "CrossEntropyLoss",
    "DistillationLoss",
    "Dropout",
    "Embedding",
    "GEGLU",
    "GELU",
    "GRU",
    "KVCache",
    "LayerCache",
    "LSTM",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MLP",
    "MemoryCache",
    "MultiheadAttention",
    "Packed",
    "RMSNorm",
    "RNN",
    "ReGLU",
    "ReLU",
    "RotaryEmbedding",
    "SelfAttention",
    "SiLU",
    "SwiGLU",
]
