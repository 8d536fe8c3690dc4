"""The states of all random generators of the process, to and from a checkpoint, without pickle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "restore", "seed_all"]


def seed_all(seed: int) -> None:
    """Seeds torch (every device), numpy's global generator and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All states: the large parts as tensors, the rest as JSON-serialisable values.

    A CUDA generator is included for every device, once CUDA is in use.
    """
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = state
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
    }
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    numpy_rest = {"kind": kind, "position": position, "has_gauss": has_gauss, "cached": cached}
    return tensors, {"python": {"version": version, "gauss": gauss}, "numpy": numpy_rest}


def restore(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """The inverse of ``capture``. CUDA states are restored for the devices that are here.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: what is given did not come from ``capture``.
    """
    torch.set_rng_state(tensors["torch"])
    python, numpy = rest["python"], rest["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
