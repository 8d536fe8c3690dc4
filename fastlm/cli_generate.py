"""The commands that write text: ``fastlm generate`` for many prompts by any method, ``fastlm sample`` for one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastlm.train.config import Backend, OptionError

__all__ = ["Device", "DType", "GenerateOptions", "SampleOptions", "load_model", "require", "run"]

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]


class GenerateError(RuntimeError):
    """A directory whose files do not go together."""


@dataclass(frozen=True)
class SampleOptions:
    """Continues a prompt with a trained model."""

    model: str
    """A run directory, a checkpoint in it, or a Hugging Face directory with its tokenizer."""
    prompt: str = ""
    """The text to continue; none: a new document."""
    tokens: int = 200
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it, 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the so many likeliest tokens only."""
    top_p: float | None = None
    """Choose within the smallest set of tokens that together reach this probability."""
    seed: int = 0
    """Equal seeds give equal texts."""
    num: int = 1
    """How many texts."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    dtype: DType = "float32"
    """Of weights and activations."""
    backend: Backend | None = None
    """Serve every op by this backend; default: chosen op by op."""


@dataclass(frozen=True)
class GenerateOptions:
    """Continues prompts by sampling, greedily (--temperature 0) or by beam search (--beams)."""

    model: str
    """A run directory, a checkpoint in it, or a Hugging Face directory with its tokenizer."""
    prompt: tuple[str, ...] = ()
    """The texts to continue; none, and no --file: a new document."""
    file: str | None = None
    """A text file of prompts, one a line."""
    tokens: int = 200
    """Tokens to generate at most for each."""
    num: int = 1
    """Texts for each prompt: samples, or the best so many of a beam search."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it, 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the so many likeliest tokens only."""
    top_p: float | None = None
    """Choose within the smallest set of tokens that together reach this probability."""
    beams: int = 1
    """From 2 on: beam search with so many beams, in place of sampling."""
    length_penalty: float = 1.0
    """Of beam search: above 0 favours long texts, below 0 short ones."""
    early_stopping: Literal["no", "yes", "never"] = "no"
    """Of beam search: end with enough finished texts (yes), when better ones are unlikely (no), or impossible (never)."""
    min_tokens: int = 0
    """No text ends before so many."""
    no_repeat_ngram: int = 0
    """From 1 on: no so many tokens come twice in a row in a text."""
    batch_size: int = 16
    """Texts that are generated together."""
    jsonl: bool = False
    """Print a line of JSON for each text: prompt, text, and the score of a beam search."""
    seed: int = 0
    """Equal seeds give equal texts, whatever the other prompts are."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    dtype: DType = "float32"
    """Of weights and activations."""
    backend: Backend | None = None
    """Serve every op by this backend; default: chosen op by op."""


def require(option: str, given: object, good: bool, allowed: str) -> None:
    """Raises OptionError unless `good`."""
    if not good:
        raise OptionError(option, given, allowed)


def load_model(path: str) -> tuple[Path, Any]:
    """(the directory, the model) that ``path`` stands for."""
    from fastlm.models import load
    from fastlm.train.directory import model_directory

    try:
        directory = model_directory(Path(path).expanduser())
        return directory, load(directory)
    except (OSError, ValueError) as error:
        raise OptionError("model", path, f"a directory with a whole model ({error})") from error


def run(options: GenerateOptions | SampleOptions) -> int:
    """Runs the command and returns its exit status."""
    require("tokens", options.tokens, options.tokens >= 0, "0 and more")
    require("num", options.num, options.num >= 1, "1 and more")
    require("seed", options.seed, 0 <= options.seed < 2**63, "0 <= x < 2**63")
    good = 0 <= options.temperature < float("inf")
    require("temperature", options.temperature, good, "finite numbers from 0")
    require("top-k", options.top_k, options.top_k is None or options.top_k >= 1, "1 and more")
    require("top-p", options.top_p, options.top_p is None or 0 < options.top_p <= 1, "0 < x <= 1")
    prompts = _prompts(options) if isinstance(options, GenerateOptions) else [options.prompt]
    import torch

    from fastlm.backends import use_backend
    from fastlm.data import DataError, Tokenizer
    from fastlm.train.device import choose_device, choose_dtype, choose_threads

    device, _ = choose_device(options.device)
    dtype, _ = choose_dtype(options.dtype, device)
    torch.set_num_threads(choose_threads()[0])
    directory, model = load_model(options.model)
    require("model", options.model, model.continues, "a model that continues its prompt, which an encoder-decoder does not")
    try:
        tokenizer = Tokenizer.load(directory)
    except DataError as error:
        raise GenerateError(str(error)) from error
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        raise GenerateError(f"{directory}: the tokenizer has {sizes}; they do not belong together")
    model.to(device=device, dtype=dtype).eval()
    with use_backend(options.backend):
        if isinstance(options, SampleOptions):
            _sample(options, model, tokenizer)
        else:
            _generate(options, prompts, model, tokenizer)
    return 0


def _sample(options: SampleOptions, model: Any, tokenizer: Any) -> None:
    import torch

    from fastlm.generate import stream, stream_text

    ids = tokenizer.encode(options.prompt) or [tokenizer.separator_id]
    for index in range(options.num):
        if options.num > 1:
            print(f"--- {index + 1} of {options.num}")
        print(options.prompt, end="", flush=True)
        steps = stream(
            model, [ids], options.tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            generators=[torch.Generator().manual_seed(options.seed + index)], stop={tokenizer.separator_id},
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        for text in stream_text(tokenizer, (step[0] for step in steps)):
            print(text, end="", flush=True)
        print()


def _prompts(options: GenerateOptions) -> list[str]:
    """Checks what only `generate` has, and collects its prompts."""
    require("beams", options.beams, options.beams >= 1, "1 and more")
    if options.beams > 1:
        require("num", options.num, options.num <= options.beams, f"1 to --beams {options.beams}")
        require("tokens", options.tokens, options.tokens >= 1, "1 and more with --beams")
        for name in ("top_k", "top_p"):
            given = getattr(options, name)
            require(name.replace("_", "-"), given, given is None, "none with --beams, which does not sample")
    good = abs(options.length_penalty) < float("inf")
    require("length-penalty", options.length_penalty, good, "finite numbers")
    for name in ("min_tokens", "no_repeat_ngram"):
        given = getattr(options, name)
        require(name.replace("_", "-"), given, given >= 0, "0 and more")
    require("batch-size", options.batch_size, options.batch_size >= 1, "1 and more")
    prompts = list(options.prompt)
    if options.file is not None:
        try:
            prompts += Path(options.file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError("file", options.file, f"a text file of prompts ({error})") from error
        require("file", options.file, bool(prompts), "a file with a line in it")
    return prompts or [""]


def _generate(options: GenerateOptions, prompts: Sequence[str], model: Any, tokenizer: Any) -> None:
    total = len(prompts) * options.num
    for index, (prompt, new, score) in enumerate(_texts(options, prompts, model, tokenizer)):
        text = tokenizer.decode(new, errors="replace")
        if options.jsonl:
            print(json.dumps({"prompt": prompt, "text": text, "score": score}, ensure_ascii=False), flush=True)
            continue
        if total > 1:
            which = f"prompt {index // options.num + 1} of {len(prompts)}, text {index % options.num + 1} of {options.num}"
            print(f"--- {which}" + ("" if score is None else f", score {score:.4f}"))
        print(f"{prompt}{text}", flush=True)


def _texts(
    options: GenerateOptions, prompts: Sequence[str], model: Any, tokenizer: Any
) -> Iterator[tuple[str, list[int], float | None]]:
    """(prompt, new tokens, score) of every text, in order."""
    import torch

    from fastlm.generate import beam_search, generate

    limits: dict[str, Any] = {
        "stop": {tokenizer.separator_id}, "min_new_tokens": options.min_tokens,
        "no_repeat_ngram": options.no_repeat_ngram, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    ids = [tokenizer.encode(prompt) or [tokenizer.separator_id] for prompt in prompts]
    if options.beams > 1:
        early: Any = {"no": False, "yes": True, "never": "never"}[options.early_stopping]
        each = max(1, options.batch_size // options.beams)
        for first in range(0, len(ids), each):
            found = beam_search(
                model, ids[first : first + each], options.tokens, beams=options.beams, n_best=options.num,
                length_penalty=options.length_penalty, early_stopping=early, **limits,
            )  # fmt: skip
            for prompt, hypotheses in zip(prompts[first : first + each], found, strict=True):
                yield from ((prompt, h.tokens, h.score) for h in hypotheses)
        return
    rows = [(prompt, row) for prompt, row in zip(prompts, ids, strict=True) for _ in range(options.num)]
    for first in range(0, len(rows), options.batch_size):
        batch = rows[first : first + options.batch_size]
        seeds = (options.seed + (first + i) for i in range(len(batch)))
        new = generate(
            model, [row for _, row in batch], options.tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, generators=[torch.Generator().manual_seed(s % 2**63) for s in seeds], **limits,
        )  # fmt: skip
        yield from ((prompt, tokens, None) for (prompt, _), tokens in zip(batch, new, strict=True))
