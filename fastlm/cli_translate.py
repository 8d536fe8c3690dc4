"""``fastlm translate``: a text for every line of a file, by beam search with an encoder-decoder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.cli_generate import Device, DType, GenerateError, load_model, require
from fastlm.train.config import Backend, OptionError

if TYPE_CHECKING:
    from fastlm.data import Codec

__all__ = ["TranslateOptions", "run"]

Found = list[tuple[str, float]]
"""The texts of a line, best first, and their scores."""


@dataclass(frozen=True)
class TranslateOptions:
    """Translates the lines of a text with an encoder-decoder, or makes of them what else it was trained to make."""

    file: str
    """A text file, also with .gz; -: standard input."""
    model: str | None = None
    """A run directory, a checkpoint in it, or a Hugging Face directory of T5 or Marian with its tokenizer.json."""
    out: str | None = None
    """Write here, not to standard output. What is done is kept beside it in OUT.partial, from which the same command goes
    on if it is interrupted."""
    beams: int = 4
    """Prefixes that the search follows; 1: always the likeliest token."""
    length_penalty: float = 1.0
    """Above 0 favours long texts, below 0 short ones."""
    num: int = 1
    """The best so many texts of each line, from 2 on as "number ||| text ||| score" with lines counted from 0."""
    tokens: int | None = None
    """Tokens of a text at most; default: twice those of its source and 16, as far as the model reaches."""
    no_repeat_ngram: int = 0
    """From 1 on: no so many tokens come twice in a row in a text."""
    batch: int = 16
    """Lines that are translated together, of like length."""
    jsonl: bool = False
    """Print a line of JSON for each text: source, text, score."""
    reference: str | None = None
    """A file of what each line should become: print the sacreBLEU of the best texts. Needs fastlm[translation]."""
    device: Device = "auto"
    """auto: the GPU if there is one."""
    dtype: DType = "float32"
    """Of weights and activations."""
    backend: Backend | None = None
    """Serve every op by this backend; default: chosen op by op."""


def run(options: TranslateOptions) -> int:
    """Runs the command and returns its exit status."""
    for name, value in (("beams", options.beams), ("num", options.num), ("batch", options.batch)):
        require(name, value, value >= 1, "1 and more")
    require("num", options.num, options.num <= options.beams, f"1 to --beams {options.beams}")
    require("tokens", options.tokens, options.tokens is None or options.tokens >= 1, "1 and more")
    require("no-repeat-ngram", options.no_repeat_ngram, options.no_repeat_ngram >= 0, "0 and more")
    require("length-penalty", options.length_penalty, abs(options.length_penalty) < float("inf"), "finite numbers")
    if options.model is None:
        raise OptionError("model", None, "a directory with an encoder-decoder")
    lines = _read(options.file)
    references = None if options.reference is None else _references(options.reference, len(lines))
    directory, model, codec = _load(options, options.model)
    found: dict[int, Found] = {number: [("", 0.0)] for number, line in enumerate(lines) if not line.strip()}
    journal = None if options.out is None else _Journal(Path(options.out).expanduser(), _identity(options, directory, lines))
    if journal is not None:
        found |= journal.read()
    before, started = len(found), time.monotonic()
    received: list[int] = []
    try:
        with _interrupted_by_both(received), _progress(len(lines)) as advance:
            advance(before)
            for part in _translated(options, model, codec, lines, found):
                if journal is not None:
                    journal.add(part)
                found |= part
                advance(len(part))
    except KeyboardInterrupt:
        received = received or [signal.SIGINT]
    took = time.monotonic() - started
    print(f"{len(found):,} of {len(lines):,} lines; {len(found) - before:,} of them in {took:.1f} s", file=sys.stderr)
    if received and journal is not None:
        print(f"interrupted: {journal.partial} keeps them; the same command goes on from there", file=sys.stderr)
        return 128 + received[0]
    text = "".join(_printed(options, lines, found))
    if journal is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        if received:
            print("interrupted: lines that are not done are empty", file=sys.stderr)
            return 128 + received[0]
    else:
        journal.finish(text)
    if references is not None:
        score = _bleu([found[number][0][0] for number in range(len(lines))], references)
        print(score, file=sys.stderr if journal is None else sys.stdout)
    return 0


def _read(name: str) -> list[str]:
    from fastlm.data import DataError, read_lines

    if name == "-":
        return [line.removesuffix("\n").removesuffix("\r") for line in sys.stdin]
    path = Path(name).expanduser()
    if not path.is_file():
        raise OptionError("file", name, "a text file, or - for standard input")
    try:
        return list(read_lines(str(path)))
    except DataError as error:
        raise GenerateError(str(error)) from error


def _references(name: str, lines: int) -> list[str]:
    if importlib.util.find_spec("sacrebleu") is None:
        raise OptionError("reference", name, "none without the package sacrebleu; install fastlm[translation]")
    references = _read(name)
    require("reference", f"{name} with {len(references):,} lines", len(references) == lines, f"one of {lines:,}, as the text")
    return references


def _load(options: TranslateOptions, name: str) -> tuple[Path, Any, Codec]:
    import torch

    from fastlm.data import Codec, DataError
    from fastlm.train.device import choose_device, choose_dtype, choose_threads

    device, _ = choose_device(options.device)
    dtype, _ = choose_dtype(options.dtype, device)
    torch.set_num_threads(choose_threads()[0])
    directory, model = load_model(name)
    require("model", name, not model.continues, "an encoder-decoder; of other models see fastlm generate")
    try:
        codec = Codec.load(directory)
    except DataError as error:
        raise GenerateError(str(error)) from error
    if codec.vocab_size > model.config.vocab_size:
        sizes = f"{codec.vocab_size} tokens, the model {model.config.vocab_size}"
        raise GenerateError(f"{directory}: the tokenizer has {sizes}; they do not belong together")
    return directory, model.to(device=device, dtype=dtype).eval(), codec


def _translated(
    options: TranslateOptions, model: Any, codec: Codec, lines: Sequence[str], done: dict[int, Found]
) -> Iterator[dict[int, Found]]:
    """The texts of the lines that are not done, longest first, batch by batch."""
    from fastlm.backends import use_backend
    from fastlm.generate import beam_search

    end, context = model.config.eos_token_id, model.context
    padding = {model.config.pad_token_id} - {end}  # Marian's own decoder never chooses it either
    left = [number for number in range(len(lines)) if number not in done]
    sources = dict(zip(left, codec.encode([lines[number] for number in left], end), strict=True))
    for number, ids in sources.items():
        if context is not None and len(ids) > context:
            print(f"line {number + 1}: {len(ids)} tokens, cut to the {context} that the model reads", file=sys.stderr)
            sources[number] = [*ids[: context - 1], end]
    left.sort(key=lambda number: -len(sources[number]))
    for first in range(0, len(left), options.batch):
        numbers = left[first : first + options.batch]
        longest = len(sources[numbers[0]])
        with use_backend(options.backend):
            found = beam_search(
                model, [sources[number] for number in numbers], options.tokens or 2 * longest + 16, beams=options.beams,
                n_best=options.num, length_penalty=options.length_penalty, stop={end},
                no_repeat_ngram=options.no_repeat_ngram, vocab_size=codec.vocab_size, banned=padding,
            )  # fmt: skip
        texts = ([(codec.decode(h.tokens), h.score) for h in hypotheses] for hypotheses in found)
        yield dict(zip(numbers, texts, strict=True))


def _printed(options: TranslateOptions, lines: Sequence[str], found: dict[int, Found]) -> Iterator[str]:
    for number, line in enumerate(lines):
        for text, score in found.get(number, [("", 0.0)] if options.num == 1 else []):
            one = " ".join(text.splitlines())
            if options.jsonl:
                yield json.dumps({"source": line, "text": text, "score": score}, ensure_ascii=False) + "\n"
            elif options.num > 1:
                yield f"{number} ||| {one} ||| {score:.4f}\n"
            else:
                yield f"{one}\n"


def _identity(options: TranslateOptions, directory: Path, lines: Sequence[str]) -> str:
    """Of everything that decides the texts."""
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(directory.glob("*.safetensors"))]
    names = ("beams", "length_penalty", "num", "tokens", "no_repeat_ngram", "batch", "device", "dtype", "backend")
    parts = [[getattr(options, name) for name in names], str(directory.resolve()), weights, list(lines)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class _Journal:
    """What is done of a file that is not: a line of JSON for each translated one, behind a line that says of what."""

    def __init__(self, out: Path, identity: str) -> None:
        self._out, self._identity = out, identity
        self.partial = out.with_name(f"{out.name}.partial")

    def read(self) -> dict[int, Found]:
        """What an earlier run of the same command has done; from here on `add` goes on behind it."""
        try:
            with open(self.partial, "ab+") as file:
                file.seek(0)
                first, *lines = file.read().split(b"\n")
                if first.decode(errors="replace") != self._identity or not lines:  # of something else, or new
                    file.truncate(0)
                    file.write(f"{self._identity}\n".encode())
                    return {}
                file.truncate(len(b"\n".join([first, *lines[:-1]])) + 1)  # the last line was not finished
        except OSError as error:
            raise OptionError("out", self._out, f"a file that can be written ({error.strerror})") from error
        found = (json.loads(line) for line in lines[:-1])
        return {number: [(text, score) for text, score in texts] for number, texts in found}

    def add(self, part: dict[int, Found]) -> None:
        with open(self.partial, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([number, texts]) + "\n" for number, texts in part.items())

    def finish(self, text: str) -> None:
        from fastlm.data.cache import written_whole

        with written_whole(self._out) as file:
            file.write(text.encode())
        self.partial.unlink()


@contextmanager
def _interrupted_by_both(received: list[int]) -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt too, and is noted."""

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Yields what is told how many more lines are done."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("lines", total=total)
        yield lambda more: progress.advance(bar, more)


def _bleu(texts: Sequence[str], references: Sequence[str]) -> str:
    import sacrebleu

    metric = sacrebleu.BLEU()
    return f"{metric.corpus_score([' '.join(t.splitlines()) for t in texts], [list(references)])}\n{metric.get_signature()}"
