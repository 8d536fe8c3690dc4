"""The options of a run: dataclasses that the command line is made from, their presets and their checks.

Nothing here imports torch, so ``fastlm train --help`` is quick. A run's options are stored as
``config.json`` in its directory and in every checkpoint; ``to_json`` and ``from_json`` are exact inverses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "PRESETS",
    "presets_of",
    "DataOptions",
    "ModelOptions",
    "OptimizerOptions",
    "OptionError",
    "RunOptions",
    "TrainConfig",
    "changed_options",
    "from_json",
    "task_of",
    "to_json",
    "validate",
]

Model = Literal["gpt", "lstm", "bert"]
Cell = Literal["lstm", "gru", "rnn"]
Task = Literal["auto", "causal-lm", "masked-lm", "classification", "tagging", "span-qa"]
Preset = Literal["tiny", "mini", "small", "base", "gpt2", "llama"]
Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary"]
MLP = Literal["gelu", "relu_squared", "swiglu", "geglu"]
Backend = Literal["reference", "triton", "cpu", "cuda"]


class OptionError(ValueError):
    """A bad option; the message names the option, what was given and what is allowed."""

    def __init__(self, option: str, given: object, allowed: str) -> None:
        super().__init__(f"--{option.replace('_', '-')}: got {given}, allowed: {allowed}")


@dataclass(frozen=True)
class DataOptions:
    """What is learned."""

    data: tuple[str, ...] = ()
    """Files, folders or globs (.txt, .jsonl, ...); none: the source of Python's standard library."""
    vocab_size: int = 4096
    """Entries of the byte-level BPE that is trained on the data (fewer if the data is small)."""
    seq_len: int = 256
    """Tokens in a training sequence, and the model's longest context."""
    tokenizer: str | None = None
    """A tokenizer.json or a folder that holds one, or "bytes"; default: a BPE is trained on the data."""
    validation_fraction: float = 0.05
    """Part of the text, in bytes, that is held out; of labelled data without --validation-data, part of its rows."""
    task: Task = "auto"
    """What is learned; auto: causal-lm for gpt, masked-lm for bert, whose other tasks need labelled --data:
    classification .jsonl, .csv or .tsv, tagging CoNLL columns, span-qa SQuAD's .json."""
    validation_data: tuple[str, ...] = ()
    """Files of labelled data to validate on, read as --data is."""
    text_column: str = "text"
    """Classification: the field of the text."""
    second_column: str | None = None
    """Classification: the field of the second text of a pair."""
    label_column: str = "label"
    """Classification: the field of the label."""
    mask_rate: float = 0.15
    """Masked LM: part of the tokens that is predicted."""
    whole_word: bool = False
    """Masked LM: mask whole words, not pieces of them."""
    next_sentence: bool = True
    """Masked LM: learn also whether the second half of a row follows the first."""


@dataclass(frozen=True)
class ModelOptions:
    """A decoder-only model, GPT-2's shape, or Llama's and others' by option; an LSTM; or BERT, an encoder."""

    model: Model = "gpt"
    """gpt, lstm, or bert."""
    cell: Cell = "lstm"
    """lstm: of its layers; rnn: Elman's, with tanh."""
    carry: bool = True
    """lstm: each row goes on in the text, with its state, where it ended in the batch before; else shuffled windows."""
    init: str | None = None
    """bert: begin with the weights, shape and tokenizer of this Hugging Face or run directory, as for fine-tuning."""
    pre_norm: bool = False
    """bert: norms before attention and MLP, and one at the end, instead of behind them."""
    n_layer: int = 6
    """Transformer blocks, or layers."""
    n_head: int = 6
    """Attention heads a block."""
    n_embd: int = 384
    """Width; a multiple of n-head."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residual branches; around the layers of an lstm."""
    bias: bool = True
    """Whether linear layers and norms have a bias."""
    norm: Norm = "layer"
    """LayerNorm, or RMSNorm, which has no bias."""
    position: Position = "learned"
    """A learned embedding of positions, or rotary queries and keys."""
    mlp: MLP = "gelu"
    """Activation of the MLP: GELU (tanh form), squared ReLU, or the gated SwiGLU and GEGLU."""
    kv_heads: int | None = None
    """Heads of keys and values, each read by n-head / kv-heads query heads; default: n-head."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head by an RMSNorm."""
    tie: bool = True
    """Whether the output projection is the embedding."""


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with linear warm-up and cosine decay."""

    steps: int = 400
    """Optimizer updates in the whole run."""
    batch_size: int = 8
    """Sequences in a micro-batch."""
    grad_accum: int = 1
    """Micro-batches in an update."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate of the last update."""
    warmup: int = 40
    """Updates of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; vectors are not decayed."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class RunOptions:
    """Where and how it runs, and what it keeps."""

    out: str | None = None
    """Run directory; default runs/<preset>, or runs/<preset>-2 and so on if that is taken."""
    resume: bool = False
    """Go on from the newest good checkpoint in --out; its stored options hold where none are given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: what the chip does well, with the reason printed. Masters and moments are float32 in any case."""
    backend: Backend | None = None
    """Serve every op by this backend; default: chosen op by op."""
    recompute: Literal["auto", "none", "mlp", "block"] = "auto"
    """Activations that backward computes again instead of keeping them: the MLPs', or all within a block. The numbers
    stay the same to the last bit. auto: the least with which the run fits into memory."""
    plan: bool = False
    """Print what the run would hold in memory and what would fit, and stop before it starts."""
    seed: int = 1337
    """Seed of weights, order of the data, dropout and samples."""
    eval_every: int = 100
    """Updates between validations; 0: only at the end."""
    eval_batches: int = 4
    """Micro-batches of a validation, always the same ones; 0: all that is held out."""
    save_every: int = 100
    """Updates between checkpoints; 0: only at the end. A best validation is saved as well."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best; at least 2, so that one good one always survives."""
    audit: bool = True
    """Check every hand-written gradient against float64 autograd before the first update."""
    audit_every: int = 0
    """Updates between further audits; 0: none."""
    log_every: int = 10
    """Updates between reads of the device's numbers. Every update is recorded whatever this is."""
    spike_deviations: float = 10.0
    """Warn of a loss or gradient norm this many robust deviations above its recent median; 0: never."""
    max_skipped: int = 20
    """Stop after so many non-finite updates in a row; 0: never. Each is skipped and changes nothing."""
    profile: int = 0
    """Updates to profile after the first three: print where their time goes, and write it to trace.json. Alone: 10."""
    max_minutes: float = 0.0
    """Save and stop after this time, to be resumed; 0: no limit."""
    sample_tokens: int = 200
    """Tokens of the text sample at the end; 0: none."""
    prompt: str = "def "
    """What the text sample continues."""


@dataclass(frozen=True)
class TrainConfig:
    """Trains a GPT, an LSTM or a BERT, with every gradient hand-written and audited before the first update.

    Without an option it trains the ``small`` GPT on the source of Python's standard library; ``--model bert`` alone, the
    ``mini`` BERT.
    """

    preset: Preset = "small"
    """Defaults of all options below: tiny (seconds, for tests); small (minutes on two cores); of gpt also gpt2 (124M),
    llama (small in Llama's shape); of bert mini (minutes on two cores), small, base (110M)."""
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions = field(default_factory=RunOptions)


PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=64),
        model=ModelOptions(n_layer=2, n_head=2, n_embd=32),
        optimizer=OptimizerOptions(steps=60, batch_size=4, lr=3e-3, min_lr=3e-4, warmup=6),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1, sample_tokens=40),
    ),
    "small": TrainConfig(),
    "gpt2": TrainConfig(
        preset="gpt2",
        data=DataOptions(vocab_size=50304, seq_len=1024),
        model=ModelOptions(n_layer=12, n_head=12, n_embd=768),
        optimizer=OptimizerOptions(
            steps=20_000, batch_size=16, grad_accum=32, lr=6e-4, min_lr=6e-5, warmup=700
        ),
        run=RunOptions(eval_every=250, eval_batches=40, save_every=1000),
    ),
    "llama": TrainConfig(
        preset="llama",
        model=ModelOptions(bias=False, norm="rms", position="rotary", mlp="swiglu", kv_heads=2, tie=False),
    ),
}


LSTM_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=32),
        model=ModelOptions(model="lstm", n_layer=2, n_head=1, n_embd=32),
        optimizer=OptimizerOptions(steps=60, batch_size=4, lr=1e-2, min_lr=1e-3, warmup=6),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1, sample_tokens=40),
    ),
    "small": TrainConfig(
        preset="small",
        data=DataOptions(seq_len=64),
        model=ModelOptions(model="lstm", n_layer=2, n_head=1, n_embd=512, dropout=0.2),
        optimizer=OptimizerOptions(steps=1000, batch_size=32, lr=2e-3, min_lr=2e-4, warmup=50),
    ),
}


BERT_PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        data=DataOptions(vocab_size=512, seq_len=64),
        model=ModelOptions(model="bert", n_layer=2, n_head=2, n_embd=32),
        optimizer=OptimizerOptions(steps=60, batch_size=8, lr=3e-3, min_lr=3e-4, warmup=6),
        run=RunOptions(eval_every=20, eval_batches=4, save_every=20, log_every=1),
    ),
    "mini": TrainConfig(
        preset="mini",
        data=DataOptions(vocab_size=8192, seq_len=128),
        model=ModelOptions(model="bert", n_layer=4, n_head=4, n_embd=256),
        optimizer=OptimizerOptions(steps=6000, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=300, beta2=0.98),
        run=RunOptions(eval_every=500, eval_batches=32, save_every=500),
    ),
    "small": TrainConfig(
        preset="small",
        data=DataOptions(vocab_size=16384, seq_len=128),
        model=ModelOptions(model="bert", n_layer=4, n_head=8, n_embd=512),
        optimizer=OptimizerOptions(steps=20_000, batch_size=32, lr=6e-4, min_lr=6e-6, warmup=1000, beta2=0.98),
        run=RunOptions(eval_every=1000, eval_batches=32, save_every=1000),
    ),
    "base": TrainConfig(
        preset="base",
        data=DataOptions(vocab_size=30522, seq_len=512),
        model=ModelOptions(model="bert", n_layer=12, n_head=12, n_embd=768, dropout=0.1),
        optimizer=OptimizerOptions(
            steps=100_000, batch_size=32, grad_accum=8, lr=1e-4, min_lr=0.0, warmup=10_000, beta2=0.999, weight_decay=0.01
        ),
        run=RunOptions(eval_every=1000, eval_batches=40, save_every=1000),
    ),
}


def presets_of(model: str) -> dict[str, TrainConfig]:
    """The presets of a model by name, the default first."""
    if model == "bert":
        return {"mini": BERT_PRESETS["mini"], **BERT_PRESETS}
    presets = LSTM_PRESETS if model == "lstm" else PRESETS
    return {"small": presets["small"], **presets}


# What a run cannot change half-way without becoming another run.
_FIXED = {
    "data": {option.name for option in dataclasses.fields(DataOptions)},
    "model": {option.name for option in dataclasses.fields(ModelOptions)} - {"dropout"},
    "optimizer": set[str](),
    "run": {"seed", "dtype"},
}


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


def task_of(config: TrainConfig) -> str:
    """The task, where it is auto that of the model."""
    auto = "masked-lm" if config.model.model == "bert" else "causal-lm"
    return auto if config.data.task == "auto" else config.data.task


def _validate_model(config: TrainConfig) -> None:
    """The options of one model or task that others have not."""
    model, task, usual = config.model.model, task_of(config), ModelOptions()
    if config.preset not in presets_of(model):
        raise OptionError("preset", config.preset, f"{', '.join(presets_of(model))} for --model {model}")
    if (model == "bert") == (task == "causal-lm"):
        allowed = "masked-lm, classification, tagging, span-qa" if model == "bert" else "causal-lm"
        raise OptionError("task", task, f"{allowed} for --model {model}")
    foreign = {
        "gpt": ("cell", "carry", "init", "pre_norm"),
        "lstm": ("norm", "position", "mlp", "kv_heads", "qk_norm", "bias", "init", "pre_norm"),
        "bert": ("norm", "mlp", "kv_heads", "qk_norm", "bias", "cell", "carry"),
    }[model]  # fmt: skip
    for name in foreign:
        value = getattr(usual, name)
        _require(config, "model", name, lambda x, value=value: x == value, f"{value} for --model {model}")
    if model != "gpt":
        _require(config, "run", "recompute", lambda x: x in ("auto", "none"), f"auto or none for --model {model}")
        _require(config, "run", "plan", lambda x: not x or model == "lstm", f"no --plan for --model {model}")
    if task in ("classification", "tagging", "span-qa"):
        _require(config, "data", "data", bool, f"files of labelled data for --task {task}")
        if config.model.init is None and config.data.tokenizer is None:
            raise OptionError("init", None, f"a directory, or a --tokenizer, for --task {task}")
    elif config.data.validation_data:
        raise OptionError("validation_data", " ".join(config.data.validation_data), "none for a task on plain text")
    _require(config, "data", "mask_rate", lambda x: 0 < x < 1, "0 < x < 1")


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


def to_json(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_json(stored: Mapping[str, Any]) -> TrainConfig:
    """The inverse of ``to_json``. Raises ``ValueError`` naming the first key that is unknown or missing."""
    groups: dict[str, Any] = {
        "data": DataOptions,
        "model": ModelOptions,
        "optimizer": OptimizerOptions,
        "run": RunOptions,
    }
    built: dict[str, Any] = {}
    _same_keys("the options", stored, {"preset", *groups})
    for name, options in groups.items():
        values = stored[name]
        if not isinstance(values, Mapping):
            raise ValueError(f"the options' {name}: got {type(values).__name__}, allowed: an object")
        _same_keys(f"the options' {name}", values, {option.name for option in dataclasses.fields(options)})
        built[name] = options(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return TrainConfig(preset=stored["preset"], **built)


def _same_keys(what: str, stored: Mapping[str, Any], wanted: set[str]) -> None:
    for key in sorted(stored.keys() ^ wanted):
        raise ValueError(f"{what}: {key!r} is {'unknown' if key in stored else 'missing'}")


def _require(config: TrainConfig, group: str, name: str, good: Any, allowed: str) -> None:
    value = getattr(getattr(config, group), name)
    if not good(value):
        raise OptionError(name, value, allowed)
