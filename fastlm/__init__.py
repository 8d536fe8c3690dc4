"""fastlm: a compact training engine for language models.

    fastlm.ops      fused operations (attention, norms, losses, ...), differentiable, torch.compile-able
    fastlm.nn       drop-in layers, each a hand-written forward/backward pair
    fastlm.optim    drop-in optimizers, each update one op
    fastlm.models   GPT
    fastlm.engine   the training step without autograd, and the audit that proves its gradients

Importing fastlm is light: no Triton, no compiler stack, no CUDA start-up until an op needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "data", "engine", "explain", "models", "nn", "ops", "optim", "tasks", "train", "use_backend"]

_ROOMS = (
    "data",
    "engine",
    "models",
    "nn",
    "ops",
    "optim",
    "tasks",
    "train",
    "registry",
    "info",
    "check",
    "native",
    "backends",
)
_NAMES = {"use_backend": "fastlm.backends", "explain": "fastlm.backends"}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"fastlm.{name}")
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
