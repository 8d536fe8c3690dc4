"""The options of a run: dataclasses that the command line is made from. Presets and checks are in presets.py, validate.py.

Nothing in these three imports torch, so ``fastlm train --help`` is quick. A run's options are stored as
``config.json`` in its directory and in every checkpoint; ``to_json`` and ``from_json`` are exact inverses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "DataOptions",
    "ModelOptions",
    "OptimizerOptions",
    "OptionError",
    "RunOptions",
    "TrainConfig",
    "from_json",
    "to_json",
]

Model = Literal["gpt", "lstm", "bert", "transformer", "t5"]
Cell = Literal["lstm", "gru", "rnn"]
Task = Literal[
    "auto", "causal-lm", "masked-lm", "classification", "tagging", "span-qa", "sequence-to-sequence", "span-corruption"
]  # fmt: skip
Preset = Literal["tiny", "mini", "small", "base", "gpt2", "llama"]
Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary", "sinusoidal", "relative"]
MLP = Literal["relu", "gelu", "relu_squared", "swiglu", "geglu"]
Backend = Literal["reference", "triton", "cpu", "cuda"]


class OptionError(ValueError):
    """A bad option; the message names the option, what was given and what is allowed."""

    def __init__(self, option: str, given: object, allowed: str) -> None:
        super().__init__(f"--{option.replace('_', '-')}: got {given}, allowed: {allowed}")


@dataclass(frozen=True)
class DataOptions:
    """What is learned."""

    data: tuple[str, ...] = ()
    """Files, folders, globs (.txt, .jsonl, ...) or hf:NAME[:SPLIT] of the datasets library; none: the source of Python's
    standard library."""
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
    classification .jsonl, .csv or .tsv, tagging CoNLL columns, span-qa SQuAD's .json; sequence-to-sequence for
    transformer: pairs, of which --data has the sources; span-corruption for t5, which learns pairs too."""
    target: tuple[str, ...] = ()
    """Sequence to sequence: text files whose line n is what line n of --data becomes; none: --data is .jsonl, .csv or .tsv
    that has both."""
    source_column: str = "source"
    """Sequence to sequence: the field of the source, without --target."""
    target_column: str = "target"
    """Sequence to sequence: the field of the target."""
    validation_data: tuple[str, ...] = ()
    """Files of labelled data, or of sources, to validate on, read as --data is."""
    validation_target: tuple[str, ...] = ()
    """The targets of --validation-data, as --target those of --data."""
    text_column: str = "text"
    """Plain text and classification from records: the field of the text; tagging from hf: names: that of the words."""
    second_column: str | None = None
    """Classification: the field of the second text of a pair."""
    label_column: str = "label"
    """Classification: the field of the label; tagging from hf: names: that of the tags."""
    mask_rate: float = 0.15
    """Masked LM: part of the tokens that is predicted; span corruption: that is cut out."""
    mean_span: float = 3.0
    """Span corruption: tokens of a span on average."""
    whole_word: bool = False
    """Masked LM: mask whole words, not pieces of them."""
    next_sentence: bool = True
    """Masked LM: learn also whether the second half of a row follows the first."""


@dataclass(frozen=True)
class ModelOptions:
    """A decoder-only model, GPT-2's shape, or Llama's and others' by option; an LSTM; BERT, an encoder; or the Transformer
    of 2017 or T5, an encoder and a decoder."""

    model: Model = "gpt"
    """gpt, lstm, bert, transformer, or t5."""
    cell: Cell = "lstm"
    """lstm: of its layers; rnn: Elman's, with tanh."""
    carry: bool = True
    """lstm: each row goes on in the text, with its state, where it ended in the batch before; else shuffled windows."""
    init: str | None = None
    """bert, t5: begin with the weights, shape and tokenizer of this Hugging Face or run directory, as for fine-tuning; t5
    also with Marian's."""
    pre_norm: bool = False
    """bert, transformer, t5: norms before attention and MLP, and one at the end, instead of behind them."""
    n_layer: int = 6
    """Transformer blocks, or layers; of transformer its encoder's."""
    decoder_layers: int | None = None
    """transformer, t5: blocks of the decoder; default: n-layer."""
    n_inner: int | None = None
    """transformer, t5: width of the MLP; default: 4 n-embd."""
    label_smoothing: float = 0.0
    """transformer, t5: part of the target's probability that all tokens share, in training."""
    n_head: int = 6
    """Attention heads a block."""
    n_embd: int = 384
    """Width; a multiple of n-head."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and residual branches; of transformer not of attention; around the layers of an
    lstm."""
    bias: bool = True
    """Whether linear layers and norms have a bias."""
    norm: Norm = "layer"
    """LayerNorm, or RMSNorm, which has no bias."""
    position: Position = "learned"
    """A learned embedding of positions, or rotary queries and keys; of transformer also sines and cosines, of t5 its
    relative bias."""
    mlp: MLP = "gelu"
    """Activation of the MLP: GELU (tanh form), squared ReLU, of transformer and t5 ReLU, or the gated SwiGLU and GEGLU."""
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
    """Sequences in a micro-batch; of sequence-to-sequence pairs, as many as in batch-size x seq-len tokens a side."""
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
    moments: Literal["float32", "bfloat16"] = "float32"
    """What AdamW's moments are kept in; bfloat16, rounded stochastically, saves 4 bytes a parameter and costs time."""


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
    eval_every: int = 200
    """Updates between validations; 0: only at the end."""
    eval_batches: int = 4
    """Micro-batches of a validation, always the same ones; 0: all that is held out."""
    save_every: int = 200
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
    """Tokens of the text sample, or of each sample translation, at the end; 0: none."""
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
