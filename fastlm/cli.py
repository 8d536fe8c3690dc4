"""The ``fastlm`` command: train, generate, sample, translate, audit, kernels, info.

Options are dataclasses that tyro turns into flags. Each command imports what it needs when it runs, so help
and mistakes in the options answer at once, without torch.

Exit status: 0 done; 1 it failed, or an audit found a wrong gradient; 2 an option cannot be used;
130 and 143 interrupted by Ctrl-C or SIGTERM, after saving.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastlm import cli_generate, cli_translate
from fastlm.cli_generate import Device, DType, GenerateOptions, SampleOptions, load_model, require
from fastlm.cli_translate import TranslateOptions
from fastlm.train.config import (
    MLP,
    Backend,
    Cell,
    Model,
    Norm,
    OptionError,
    Position,
    Preset,
    Task,
    TrainConfig,
)
from fastlm.train.directory import stored_config
from fastlm.train.validate import PAIRED, changed_options, presets_of, task_of, validate

__all__ = ["AuditOptions", "GenerateOptions", "InfoOptions", "SampleOptions", "TranslateOptions", "main"]


@dataclass(frozen=True)
class AuditOptions:
    """Compares every hand-written gradient of a model with float64 autograd; exit status 1 on a miss."""

    model: Model = "gpt"
    """gpt, lstm, bert, transformer, which is audited on packed batches, or t5, so on pairs only."""
    task: Task = "auto"
    """bert: which head is audited, auto: masked-lm with next sentence; t5: of which task the batches are."""
    preset: Preset = "tiny"
    """The shape of the model, whose weights are random; the next seven options change it."""
    pre_norm: bool = False
    """bert, transformer: norms before attention and MLP."""
    cell: Cell | None = None
    """lstm: lstm, gru or rnn."""
    norm: Norm | None = None
    """layer or rms; default: the preset's, as for the following ones."""
    position: Position | None = None
    """learned or rotary."""
    mlp: MLP | None = None
    """gelu, relu_squared, swiglu or geglu."""
    kv_heads: int | None = None
    """Heads of keys and values, a divisor of the preset's heads."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head."""
    model_dir: str | None = None
    """Audit the model in this directory instead: a run directory, a checkpoint, or a Hugging Face one."""
    batch_size: int = 2
    """Random sequences in the batch; from 2 on, accumulation over two micro-batches is audited too."""
    seq_len: int | None = None
    """Tokens in a sequence; default 128, or the model's longest context if that is shorter."""
    recompute: Literal["none", "mlp", "block"] = "none"
    """What backward computes again instead of keeping it, as in train."""
    rows: int | None = None
    """Rows of the table, worst first, beside all misses; default: all."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    dtype: DType = "float32"
    """Of weights and activations."""
    backend: Backend | None = None
    """Serve every op by this backend; default: chosen op by op."""
    seed: int = 0
    """Seed of weights and batch."""


@dataclass(frozen=True)
class KernelsOptions:
    """The kernel author's bench: list, check, compile, explain, bench and new; see fastlm kernels --help."""


@dataclass(frozen=True)
class InfoOptions:
    """Prints versions, the chip, and which backends can serve, or why not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in ``argv`` (default: the process's) and returns its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        import tyro
    except ImportError:
        return _fail("the command line needs the package tyro; install fastlm[train]", 1)
    try:
        if args[:1] == ["kernels"]:
            return _kernels(args[1:])
        args = _with_value(args, "--profile", "10")
        stored, defaults = _train_defaults(args)
        command: Any = tyro.cli(
            Annotated[TrainConfig, tyro.conf.subcommand("train", default=defaults)]
            | Annotated[GenerateOptions, tyro.conf.subcommand("generate")]
            | Annotated[SampleOptions, tyro.conf.subcommand("sample")]
            | Annotated[TranslateOptions, tyro.conf.subcommand("translate")]
            | Annotated[AuditOptions, tyro.conf.subcommand("audit")]
            | Annotated[KernelsOptions, tyro.conf.subcommand("kernels")]
            | Annotated[InfoOptions, tyro.conf.subcommand("info")],
            prog="fastlm",
            description="A compact training engine for language models.",
            args=args,
            config=_style(),
        )
        if isinstance(command, TrainConfig):
            return _train(command, stored)
        if isinstance(command, (GenerateOptions, SampleOptions)):
            return cli_generate.run(command)
        if isinstance(command, TranslateOptions):
            return cli_translate.run(command)
        if isinstance(command, AuditOptions):
            return _audit(command)
        return _info()
    except OptionError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever reads our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        if type(error).__module__.startswith("fastlm."):  # written for the user: no traceback
            return _fail(str(error), 1)
        raise


def _style() -> tuple[Any, ...]:
    """How tyro turns dataclasses into flags."""
    import tyro

    return tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs


def _fail(message: str, status: int) -> int:
    print(f"fastlm: error: {message}", file=sys.stderr)
    return status


def _with_value(args: Sequence[str], option: str, value: str) -> list[str]:
    """The arguments with a value put behind an option that stands alone."""
    full = list(args)
    for i in range(len(full) - 1, -1, -1):
        if full[i] == option and (i + 1 == len(full) or full[i + 1].startswith("--")):
            full.insert(i + 1, value)
    return full


def _train_defaults(args: Sequence[str]) -> tuple[TrainConfig | None, TrainConfig]:
    """(The options of the run to resume, if any; what ``train`` fills in where nothing is given)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", default="gpt")
    parser.add_argument("--preset")
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    try:
        known, _ = parser.parse_known_args(args)
    except argparse.ArgumentError:  # tyro says it better
        return None, presets_of("gpt")["small"]
    if list(args[:1]) == ["train"] and known.resume and known.out and not {"-h", "--help"} & set(args):
        stored = stored_config(known.out)
        return stored, stored
    presets = presets_of(known.model)
    return None, presets.get(known.preset, next(iter(presets.values())))


def _train(config: TrainConfig, stored: TrainConfig | None) -> int:
    validate(config)
    console = _console()
    if stored is not None:
        for change in changed_options(stored, config):
            console.print(f"resuming with {change}", markup=False, highlight=False)
    from fastlm.data import DataError
    from fastlm.train.loop import train
    from fastlm.train.plan import report

    try:
        return report(config, console) if config.run.plan else train(config, console)
    except DataError as error:
        return _fail(str(error), 1)


def _audit(options: AuditOptions) -> int:
    require("batch-size", options.batch_size, options.batch_size >= 1, "1 and more")
    require("rows", options.rows, options.rows is None or options.rows >= 1, "1 and more")
    require("seed", options.seed, 0 <= options.seed < 2**63, "0 <= x < 2**63")
    import torch

    from fastlm.engine import audit
    from fastlm.models import LSTM, EncoderDecoder
    from fastlm.train.build import moved_from_start
    from fastlm.train.device import choose_device, choose_dtype, choose_threads
    from fastlm.train.families import FAMILIES
    from fastlm.train.family import Facts

    device, _ = choose_device(options.device)
    dtype, _ = choose_dtype(options.dtype, device)
    torch.set_num_threads(choose_threads()[0])
    generator = torch.Generator().manual_seed(options.seed)
    if options.model == "bert":
        model, batch = _bert(options, generator)
        model.recompute = options.recompute
        report = audit(model.to(device), {k: v.to(device) for k, v in batch.items()}, dtype, options.backend, seed=options.seed)
        print(report.table(limit=options.rows))
        return 0 if report.ok else 1
    if options.model_dir is not None:
        _, model = load_model(options.model_dir)
    else:
        torch.manual_seed(options.seed)
        presets = presets_of(options.model)
        require("preset", options.preset, options.preset in presets, f"{', '.join(presets)} for --model {options.model}")
        preset = presets[options.preset]
        preset = _shaped(dataclasses.replace(preset, data=dataclasses.replace(preset.data, task=options.task)), options)
        model = moved_from_start(FAMILIES[options.model].model(preset, Facts(preset.data.vocab_size)), generator)
    if options.recompute != "none":
        require("recompute", options.recompute, hasattr(model, "recompute"), "none, as this model keeps all")
        model.recompute = options.recompute
    longest = 2**31 if model.context is None else model.context
    seq_len = min(128, longest) if options.seq_len is None else options.seq_len
    require("seq-len", seq_len, 1 <= seq_len <= longest, f"1 to {longest}, the model's longest context")
    shape = options.batch_size, seq_len
    if isinstance(model, LSTM):
        model.carry(options.batch_size)
        for state in model.carried().values():
            state.copy_(torch.randn(state.shape, generator=generator))
    if options.model_dir is None and task_of(preset) in PAIRED:
        task: Any = FAMILIES[options.model].task(preset, Facts(preset.data.vocab_size))
        packs = [task.random(rows, seq_len, generator) for rows in _halves(options.batch_size)]
        batches = [{name: t.to(device) for name, t in pack.items()} for pack in packs]
        report = audit(model.to(device), batches, dtype, options.backend, seed=options.seed)
        print(report.table(limit=options.rows))
        return 0 if report.ok else 1
    batch = {"input_ids": torch.randint(model.config.vocab_size, shape, generator=generator)}
    size = model.config.decoder_vocab_size if isinstance(model, EncoderDecoder) else model.config.vocab_size
    batch["targets"] = torch.randint(size, shape, generator=generator)
    batch["targets"][:, -1] = -100  # ignored targets are part of the contract
    if isinstance(model, EncoderDecoder):  # so is padding
        batch["lengths"] = torch.randint(1, seq_len + 1, shape[:1], generator=generator)
    batch = {name: t.to(device) for name, t in batch.items()}
    report = audit(model.to(device), batch, dtype=dtype, backend=options.backend, seed=options.seed)
    print(report.table(limit=options.rows))
    return 0 if report.ok else 1


def _halves(rows: int) -> list[int]:
    """Rows of the micro-batches of an audit that packs them."""
    return [rows // 2, rows - rows // 2] if rows > 1 else [rows]


def _bert(options: AuditOptions, generator: Any) -> tuple[Any, dict[str, Any]]:
    """(a BERT with the head of the task, a random batch for it)."""
    import torch

    from fastlm.train.build import moved_from_start
    from fastlm.train.encoder import random_task

    presets = presets_of("bert")
    if options.preset not in presets:
        raise OptionError("preset", options.preset, f"{', '.join(presets)} for --model bert")
    config = _shaped(presets[options.preset], options)
    name = "masked-lm" if options.task == "auto" else options.task
    if options.model_dir is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=options.model_dir))
    torch.manual_seed(options.seed)
    task, model = random_task(config, name)
    longest = task.seq_len
    seq_len = min(128, longest) if options.seq_len is None else options.seq_len
    require("seq-len", seq_len, 1 <= seq_len <= longest, f"1 to {longest}, the model's longest context")
    if options.model_dir is None:
        moved_from_start(model, generator)
    return model, task.random(options.batch_size, seq_len, generator)


def _shaped(preset: TrainConfig, options: AuditOptions) -> TrainConfig:
    """The preset with the shape that the options of the audit ask for."""
    names = ("cell", "norm", "position", "mlp", "kv_heads", "qk_norm", "pre_norm")
    given = {n: getattr(options, n) for n in names}
    changes: dict[str, Any] = {n: value for n, value in given.items() if value not in (None, False)}
    config = dataclasses.replace(preset, model=dataclasses.replace(preset.model, **changes))
    validate(dataclasses.replace(config, data=dataclasses.replace(config.data, data=("random ids",))))
    return config


def _kernels(args: Sequence[str]) -> int:
    import tyro

    from fastlm.testbed import options as of

    command: Any = tyro.cli(
        Annotated[of.ListOptions, tyro.conf.subcommand("list")]
        | Annotated[of.CheckOptions, tyro.conf.subcommand("check")]
        | Annotated[of.CompileOptions, tyro.conf.subcommand("compile")]
        | Annotated[of.ExplainOptions, tyro.conf.subcommand("explain")]
        | Annotated[of.BenchOptions, tyro.conf.subcommand("bench")]
        | Annotated[of.NewOptions, tyro.conf.subcommand("new")],
        prog="fastlm kernels",
        description="A bench for kernels: every op of the registry, on any backend, with or without a GPU.",
        args=list(args),
        config=_style(),
    )
    name = type(command).__name__.removesuffix("Options").lower()
    return int(importlib.import_module(f"fastlm.testbed.{name}").run(command))


def _info() -> int:
    from fastlm.info import report

    print(report())
    return 0


def _console() -> Any:
    from rich.console import Console

    return Console()
