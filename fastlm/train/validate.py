"""What the options may be: of each model its own, and of a run that goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import DataOptions, ModelOptions, OptionError, TrainConfig
from .presets import BERT_PRESETS, LSTM_PRESETS, PRESETS, T5_PRESETS, TRANSFORMER_PRESETS

__all__ = ["LABELLED", "MODELS", "PAIRED", "Choices", "changed_options", "presets_of", "recompute_kinds", "task_of", "validate"]

LABELLED = ("classification", "tagging", "span-qa")
"""Tasks whose data are labelled."""
PAIRED = ("sequence-to-sequence",)
"""Tasks whose data are pairs of texts."""
_PAIRS = ("target", "validation_target", "source_column", "target_column")


@dataclass(frozen=True)
class Choices:
    """What there is for one --model.

    presets: by name, the default first. tasks: the first is what auto stands for. own: those of the model options that
    not every model has; what no other option says, must be as it usually is. recompute: what its backward can compute
    again, the least first.
    """

    presets: Mapping[str, TrainConfig]
    tasks: tuple[str, ...]
    own: tuple[str, ...]
    recompute: tuple[str, ...] = ("none", "mlp", "block")


MODELS: dict[str, Choices] = {
    "gpt": Choices(
        {"small": PRESETS["small"], **PRESETS}, ("causal-lm",), ("norm", "position", "mlp", "kv_heads", "qk_norm", "bias")
    ),
    "lstm": Choices({"small": LSTM_PRESETS["small"], **LSTM_PRESETS}, ("causal-lm",), ("cell", "carry"), ("none",)),
    "bert": Choices(
        {"mini": BERT_PRESETS["mini"], **BERT_PRESETS}, ("masked-lm", *LABELLED), ("position", "init", "pre_norm")
    ),
    "transformer": Choices(
        {"small": TRANSFORMER_PRESETS["small"], **TRANSFORMER_PRESETS}, PAIRED,
        ("norm", "position", "mlp", "bias", "pre_norm", "n_inner", "decoder_layers", "label_smoothing"),
    ),
    "t5": Choices(
        {"small": T5_PRESETS["small"], **T5_PRESETS}, ("span-corruption", *PAIRED),
        ("norm", "position", "mlp", "bias", "pre_norm", "n_inner", "decoder_layers", "label_smoothing", "init"),
    ),
}  # fmt: skip

# What a run cannot change half-way without becoming another run.
_FIXED = {
    "data": {option.name for option in dataclasses.fields(DataOptions)},
    "model": {option.name for option in dataclasses.fields(ModelOptions)} - {"dropout"},
    "optimizer": {"moments"},
    "run": {"seed", "dtype"},
}


def presets_of(model: str) -> Mapping[str, TrainConfig]:
    """The presets of a model by name, the default first; of an unknown one gpt's."""
    return MODELS.get(model, MODELS["gpt"]).presets


def task_of(config: TrainConfig) -> str:
    """The task, where it is auto that of the model."""
    return MODELS[config.model.model].tasks[0] if config.data.task == "auto" else config.data.task


def recompute_kinds(config: TrainConfig) -> tuple[str, ...]:
    """What the backward of the model can compute again, the least first."""
    return MODELS[config.model.model].recompute


def validate(config: TrainConfig) -> None:
    """Raises ``OptionError`` for the first option that cannot work."""
    for group, name in (
        ("data", "seq_len"),
        ("model", "n_layer"),
        ("model", "n_head"),
        ("model", "n_embd"),
        ("optimizer", "steps"),
        ("optimizer", "batch_size"),
        ("optimizer", "grad_accum"),
        ("run", "log_every"),
    ):
        _require(config, group, name, lambda x: x >= 1, "1 and more")
    for group, name in (
        ("optimizer", "warmup"),
        ("run", "eval_batches"),
        ("run", "eval_every"),
        ("run", "save_every"),
        ("run", "audit_every"),
        ("run", "max_skipped"),
        ("run", "sample_tokens"),
        ("run", "profile"),
    ):
        _require(config, group, name, lambda x: x >= 0, "0 and more")
    for group, name in (
        ("optimizer", "weight_decay"),
        ("optimizer", "clip"),
        ("run", "spike_deviations"),
        ("run", "max_minutes"),
    ):
        _require(config, group, name, lambda x: math.isfinite(x) and x >= 0, "finite numbers from 0")
    for name in ("beta1", "beta2"):
        _require(config, "optimizer", name, lambda x: 0 <= x < 1, "0 <= x < 1")
    _require(config, "model", "dropout", lambda x: 0 <= x < 1, "0 <= x < 1")
    _require(config, "data", "vocab_size", lambda x: x >= 257, "257 and more (256 bytes and the end of text)")
    _require(config, "data", "validation_fraction", lambda x: 0 < x < 1, "0 < x < 1")
    _require(config, "run", "keep", lambda x: x >= 2, "2 and more")
    _require(config, "run", "seed", lambda x: 0 <= x < 2**63, "0 <= x < 2**63")
    lr, steps = config.optimizer.lr, config.optimizer.steps
    _require(config, "optimizer", "lr", lambda x: math.isfinite(x) and x > 0, "finite numbers above 0")
    _require(config, "optimizer", "min_lr", lambda x: 0 <= x <= lr, f"0 to --lr {lr:g}")
    _require(config, "optimizer", "warmup", lambda x: x <= steps, f"0 to --steps {steps}")
    heads = config.model.n_head
    _require(config, "model", "n_embd", lambda x: x % heads == 0, f"multiples of --n-head {heads}")
    divides = f"divisors of --n-head {heads}"
    _require(config, "model", "kv_heads", lambda x: x is None or (x >= 1 and heads % x == 0), divides)
    if config.model.position == "rotary":
        pairs = f"multiples of {2 * heads}, as --position rotary turns pairs of a head's columns"
        _require(config, "model", "n_embd", lambda x: x % (2 * heads) == 0, pairs)
    _validate_model(config)
    if config.run.resume and config.run.out is None:
        raise OptionError("resume", "no --out", "--resume together with the run directory in --out")


def _validate_model(config: TrainConfig) -> None:
    """The options of one model or task that others have not."""
    model, task, usual = config.model.model, task_of(config), ModelOptions()
    has, of = MODELS[model], f"for --model {model}"
    if config.preset not in has.presets:
        raise OptionError("preset", config.preset, f"{', '.join(has.presets)} {of}")
    if task not in has.tasks:
        raise OptionError("task", task, f"{', '.join(has.tasks)} {of}")
    for name in dict.fromkeys(name for choices in MODELS.values() for name in choices.own):
        given, value = getattr(config.model, name), getattr(usual, name)
        if name not in has.own and given != value:
            raise OptionError(name, given, f"{value} {of}")
    kinds = "auto", *has.recompute
    _require(config, "run", "recompute", lambda x: x in kinds, f"{', '.join(kinds[:-1])} or {kinds[-1]} {of}")
    if task in LABELLED:
        _require(config, "data", "data", bool, f"files of labelled data for --task {task}")
        if config.model.init is None and config.data.tokenizer is None:
            raise OptionError("init", None, f"a directory, or a --tokenizer, for --task {task}")
    elif task in PAIRED:
        _require(config, "data", "data", bool, f"files of sources for --task {task}")
        both = bool(config.data.target) and bool(config.data.validation_data)
        text = "the targets of --validation-data" if both else "none without --target and --validation-data"
        _require(config, "data", "validation_target", lambda x: bool(x) == both, text)
    elif config.data.validation_data:
        raise OptionError("validation_data", " ".join(config.data.validation_data), "none for a task on plain text")
    if task not in PAIRED:
        for name in _PAIRS:
            given, value = getattr(config.data, name), getattr(DataOptions, name)
            if given != value:
                raise OptionError(name, given, f"{value or 'none'} for --task {task}")
    positions = {"transformer": ("sinusoidal", "learned"), "t5": ("relative",)}.get(model, ("learned", "rotary"))
    _require(config, "model", "position", lambda x: x in positions, f"{' or '.join(positions)} {of}")
    odd = config.model.position == "sinusoidal" and config.model.n_embd % 2
    _require(config, "model", "n_embd", lambda x: not odd, "even numbers with --position sinusoidal")
    foreign = "relu_squared" if model in ("transformer", "t5") else "relu"
    _require(config, "model", "mlp", lambda x: x != foreign, f"another activation {of}")
    for name in ("n_inner", "decoder_layers"):
        _require(config, "model", name, lambda x: x is None or x >= 1, "1 and more")
    _require(config, "model", "label_smoothing", lambda x: 0 <= x < 1, "0 <= x < 1")
    _require(config, "data", "mask_rate", lambda x: 0 < x < 1, "0 < x < 1")
    _require(config, "data", "mean_span", lambda x: math.isfinite(x) and x >= 1, "finite numbers from 1")


def changed_options(stored: TrainConfig, given: TrainConfig) -> list[str]:
    """What ``given`` changes of a ``stored`` run, as ``"--lr 0.001 -> 0.0005"``.

    Raises ``OptionError`` where it changes what a run cannot change: its data, shape, seed or dtype.
    """
    changes = []
    for group in ("data", "model", "optimizer", "run"):
        old, new = getattr(stored, group), getattr(given, group)
        for option in dataclasses.fields(old):
            before, after = getattr(old, option.name), getattr(new, option.name)
            if before == after or option.name in ("out", "resume", "profile", "plan"):
                continue
            if option.name in _FIXED[group]:
                raise OptionError(option.name, after, f"{before}, which the run to resume has")
            changes.append(f"--{option.name.replace('_', '-')} {before} -> {after}")
    return changes


def _require(config: TrainConfig, group: str, name: str, good: Callable[[Any], object], allowed: str) -> None:
    value = getattr(getattr(config, group), name)
    if not good(value):
        raise OptionError(name, value, allowed)
