"""Hugging Face directories: config.json + model.safetensors, read with checks and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Parts", "assign", "read_config", "read_json", "read_tensors", "write"]

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# (our parameter's name, its shape) -> the tensors of the file that make it up, one under the other
Parts = Callable[[str, tuple[int, ...]], list[tuple[str, tuple[int, ...]]]]


def read_json(directory: str | Path) -> dict[str, Any]:
    """config.json of a directory; FileNotFoundError, or ValueError unless it is an object."""
    path = Path(directory) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model directory holds {_CONFIG} and {_WEIGHTS}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e})") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}; allowed: an object")
    return raw


def read_config(directory: str | Path, *model_types: str) -> dict[str, Any]:
    """`read_json`; ValueError unless its model_type is one of `model_types`."""
    raw = read_json(directory)
    if raw.get("model_type") not in model_types:
        allowed = ", ".join(map(repr, model_types))
        path = Path(directory) / _CONFIG
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}; allowed: {allowed}")
    return raw


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    files = [directory / _WEIGHTS]
    if (directory / _INDEX).is_file():
        names = sorted(
            set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        )
        if bad := [n for n in names if Path(n).name != n]:
            raise ValueError(f"{directory / _INDEX}: names {bad[0]!r}; allowed: files of the same directory")
        files = [directory / n for n in names]
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError, ValueError) as e:
            raise ValueError(f"{path}: not a whole safetensors file ({e})") from e
    return tensors


def assign(
    model: nn.Module, tensors: dict[str, Tensor], where: str | Path, parts: Parts | None = None
) -> None:
    """Give the model (on the meta device) these tensors as float32; ValueError names each that does not fit.

    parts: for a file whose names or tensors are not the model's own.
    """
    own = dict(model.named_parameters(remove_duplicate=True))
    shapes = {n: tuple(p.shape) for n, p in own.items()}
    pieces = {n: parts(n, s) if parts is not None else [(n, s)] for n, s in shapes.items()}
    wanted = {n: s for each in pieces.values() for n, s in each}
    problems = [f"missing: {n} {s}" for n, s in wanted.items() if n not in tensors]
    problems += [f"unknown: {n} {tuple(t.shape)}" for n, t in tensors.items() if n not in wanted]
    problems += [
        f"{n}: got shape {tuple(tensors[n].shape)}, allowed: {s}"
        for n, s in wanted.items()
        if n in tensors and tensors[n].shape != s
    ]
    problems += [
        f"{n}: got dtype {t.dtype}, allowed: floating"
        for n, t in tensors.items()
        if not t.is_floating_point()
    ]
    if problems:
        raise ValueError(f"{where}: the weights do not fit the model\n  " + "\n  ".join(problems))
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    by_id = {id(p): n for n, p in own.items()}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(by_id[id(p)], []).append((module, key))
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            module.to_empty(device="cpu", recurse=False)  # tables that the module fills itself
    for name, places in owners.items():
        parts_of = [tensors[n].float() for n, _ in pieces[name]]
        parameter = nn.Parameter(parts_of[0] if len(parts_of) == 1 else torch.cat(parts_of))
        for module, key in places:  # one parameter for all its places, so that what is tied stays tied
            setattr(module, key, parameter)


def write(directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files, each to a temporary name, flushed to the disk and renamed; the config comes last."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights, text = directory / f".{_WEIGHTS}.{os.getpid()}", directory / f".{_CONFIG}.{os.getpid()}"
    try:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for temporary, final in ((weights, _WEIGHTS), (text, _CONFIG)):
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, directory / final)
    finally:
        weights.unlink(missing_ok=True)
        text.unlink(missing_ok=True)
