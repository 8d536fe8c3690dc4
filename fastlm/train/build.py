"""From options to the parts of a run: chip, dtype and threads, data, model and engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastlm.engine import Engine
from fastlm.engine.arena import give_back_at_once

from . import generators
from .config import TrainConfig
from .device import choose_device, choose_dtype, choose_threads
from .families import FAMILIES
from .family import Data
from .log import say
from .optimizer import adamw_of
from .plan import choose_recompute
from .validation import Validation

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Parts", "build", "choose_hardware", "moved_from_start"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    data: Data
    validation: Validation
    engine: Engine


def choose_hardware(config: TrainConfig, console: Console) -> TrainConfig:
    """Decides what ``auto`` stands for, says why, and returns the options with the dtype that was chosen.

    The device stays ``auto`` in them: a run may go on elsewhere.
    """
    device, device_why = choose_device(config.run.device)
    dtype, dtype_why = choose_dtype(config.run.dtype, device)
    threads, threads_why = choose_threads()
    torch.set_num_threads(threads)
    name: Any = str(dtype).removeprefix("torch.")
    chosen = f"device {device} ({device_why}), {name} ({dtype_why}), {threads} threads ({threads_why})"
    say(console, chosen)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dtype=name))


def build(config: TrainConfig, console: Console) -> Parts:
    """Makes everything from options whose dtype is chosen; the model's weights are fresh from the seed, or --init's.

    Raises:
        DataError: the text, the tokenizer or the cache cannot be used.
        MemoryNeeded: the run certainly does not fit into memory.
    """
    give_back_at_once()
    generators.seed_all(config.run.seed)
    family = FAMILIES[config.model.model]
    device, _ = choose_device(config.run.device)
    data = family.read(config, console)
    recompute = choose_recompute(config, data.facts, console)
    model = family.started(config, data.facts)
    if recompute != "none":
        model.recompute = recompute  # type: ignore[assignment]
    return Parts(data, Validation(data.task, data.held_out, device), _engine(model, config, device))


def _engine(model: nn.Module, config: TrainConfig, device: torch.device) -> Engine:
    run = config.run
    dtype, _ = choose_dtype(run.dtype, device)
    return Engine(model, adamw_of(config), dtype, device, run.backend, seed=run.seed)


@torch.no_grad()
def moved_from_start(model: M, generator: torch.Generator) -> M:
    """Adds noise to every vector, in place, and returns the model.

    Fresh norms have weights of 1 and every bias is 0, and there a backward that forgets to multiply by a
    weight, or to pass a bias on, gives the right gradient all the same.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.2)
    return model
