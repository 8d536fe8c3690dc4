"""Checkpoints: one directory each, written aside and renamed into place, checksummed, without pickle.

::

    checkpoints/step-00000400/
        config.json, model.safetensors, tokenizer.json   the model, Hugging Face layout
        state.safetensors      "engine.*" masters, moments, counters; "generator.*" random states
        manifest.json          format, version, step, options, progress, versions, size of every file
        SHA256SUMS             `sha256sum -c SHA256SUMS` agrees

The rename is the commit: before it nothing bears the name, after it everything under the name is complete
and on disk. Reading trusts nothing. Names, sizes, checksums, format, version, step and every tensor's name,
shape and dtype are compared with what is expected, and the error says which file differs in what.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .durable import UNFINISHED as _UNFINISHED
from .durable import NewFile, remove_tree, sync_directory, sync_file, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "compare_tensors",
    "list_checkpoints",
    "load",
    "load_newest",
    "prune",
    "save",
    "set_aside",
    "verify",
]

FORMAT = "fastlm-checkpoint"
VERSION = 1

_SUMS, _MANIFEST, _STATE = "SHA256SUMS", "manifest.json", "state.safetensors"
_DIRECTORY = re.compile(r"step-(\d{8,})")
# No separator and no leading dot: a name cannot lead out of the directory.
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")
_MOST_JSON = 64 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified."""

    path: Path
    step: int
    config: dict[str, Any]
    progress: dict[str, Any]
    versions: dict[str, str]
    tensors: dict[str, Tensor]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    progress: Mapping[str, Any],
    versions: Mapping[str, str],
    export: Callable[[Path], None] | None = None,
) -> Path:
    """Writes ``root/step-<step>`` and returns its path.

    Args:
        root: where the checkpoints of a run live; made if missing.
        step: updates done so far.
        tensors: any device; streamed to the file one by one.
        config, progress, versions: JSON-serialisable.
        export: writes further plain files into the directory that it is given, the model for instance.

    Raises:
        CheckpointError: the system refused, because the disk is full or the step is there already; nothing is
            left half-done and the message names the last checkpoint that holds.
    """
    final = root / f"step-{step:08d}"
    unfinished = root / f"{_UNFINISHED}{final.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        if export is not None:
            export(unfinished)
        written = {path.name: sync_file(path) for path in sorted(unfinished.iterdir())}
        state = write_tensors(unfinished / _STATE, tensors)
        written[_STATE] = (state.sha256, state.size)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "files": {name: size for name, (_, size) in written.items()},
            "progress": progress,
            "config": config,
            "versions": versions,
        }
        with NewFile(unfinished / _MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1, allow_nan=False).encode() + b"\n")
        written[_MANIFEST] = (file.sha256, file.size)
        with NewFile(unfinished / _SUMS) as sums:
            sums.write("".join(f"{sha256}  {name}\n" for name, (sha256, _) in written.items()).encode())
        sync_directory(unfinished)
        os.rename(unfinished, final)
        sync_directory(root)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        good = next(iter(list_checkpoints(root)), None)
        last = f"the last good one is {good}" if good else "there is no earlier one"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {root}: {error.strerror or error}; {last}"
        ) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under ``root``, newest step first, by their names alone."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _DIRECTORY.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(path: Path) -> dict[str, Any]:
    """Checks names, sizes and checksums of everything in a checkpoint and returns its manifest.

    Raises:
        CheckpointError: with the file and what is wrong with it.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    sums = _read_sums(path)
    if _MANIFEST not in sums:
        raise CheckpointError(f"{path / _SUMS}: does not list {_MANIFEST}")
    manifest = _read_manifest(path, sums.pop(_MANIFEST))
    files = manifest["files"]
    if not all(type(size) is int for size in files.values()):
        raise CheckpointError(f"{path / _MANIFEST}: a file size is no integer")
    if files.keys() != sums.keys():
        different = ", ".join(sorted(files.keys() ^ sums.keys()))
        raise CheckpointError(f"{path}: {_MANIFEST} and {_SUMS} do not list the same files ({different})")
    if _STATE not in files:
        raise CheckpointError(f"{path / _MANIFEST}: does not list {_STATE}")
    for name, size in files.items():
        found = _regular_size(path / name)
        if found != size:
            kind = "truncated" if found < size else "too long"
            raise CheckpointError(f"{path / name}: {kind}, {found} bytes where {size} were written")
    for name, expected in sums.items():
        with open(path / name, "rb") as file:
            _compare_digest(path / name, hashlib.file_digest(file, "sha256").hexdigest(), expected)
    return manifest


def load(path: Path) -> Checkpoint:
    """Reads and verifies the checkpoint in ``path``; its tensors arrive on the CPU.

    Raises:
        CheckpointError: missing, truncated, foreign, of another version, or damaged; the message says which.
    """
    from safetensors import SafetensorError, safe_open

    manifest = verify(path)
    state = path / _STATE
    try:
        with safe_open(state, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{state}: not a valid safetensors file: {error}") from error
    return Checkpoint(
        path, manifest["step"], manifest["config"], manifest["progress"], manifest["versions"], tensors
    )


def load_newest(
    root: Path, accept: Callable[[Checkpoint], None], warn: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint that verifies and that ``accept`` does not refuse with a ``CheckpointError``.

    Each one passed over is reported through ``warn``. None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but not one is good.
    """
    paths = list_checkpoints(root)
    for path in paths:
        try:
            checkpoint = load(path)
            accept(checkpoint)
        except CheckpointError as error:
            warn(f"passing over {path.name}: {error}")
        else:
            return checkpoint
    if paths:
        raise CheckpointError(f"{root}: none of its {len(paths)} checkpoints can be used")
    return None


def compare_tensors(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ``CheckpointError`` unless both have the same names, shapes and dtypes."""
    for word, names in (
        ("missing", expected.keys() - found.keys()),
        ("unknown", found.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise CheckpointError(f"{path}: {len(names)} {word} tensor{'s' * (len(names) > 1)}: {some}")
    for name, wanted in expected.items():
        tensor = found[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise CheckpointError(
                f"{path}: tensor {name} is {_describe(tensor)}, the run has {_describe(wanted)}"
            )


def prune(root: Path, keep: int) -> list[Path]:
    """Removes all but the ``keep`` newest checkpoints and the best: the first of the lowest ``progress["score"]``.

    Points ``root/best`` at the latter. Returns what was removed.
    """
    paths = list_checkpoints(root)
    scores = {path: _score(path) for path in paths}
    best = min(reversed(paths), key=lambda path: scores[path], default=None)
    if best is not None and math.isfinite(scores[best]):
        _point(root / "best", best.name)
    doomed = [path for path in paths[keep:] if path != best]
    for path in doomed:
        remove_tree(path)
    return doomed


def set_aside(root: Path, after: int) -> list[Path]:
    """Renames the checkpoints of steps later than ``after`` to ``<name>.bad``.

    A run that had to go back to an older checkpoint will write those steps again.
    """
    aside = []
    for path in list_checkpoints(root):
        if int(path.name.removeprefix("step-")) > after:
            target = path.with_name(f"{path.name}.bad")
            if target.exists():
                remove_tree(target)
            os.rename(path, target)
            aside.append(target)
    return aside


def _read_sums(path: Path) -> dict[str, str]:
    file = path / _SUMS
    text = _read_small(file)
    if not text.endswith("\n"):
        raise CheckpointError(f"{file}: truncated, its last line has no end")
    sums: dict[str, str] = {}
    for number, line in enumerate(text[:-1].split("\n"), 1):
        match = _SUM_LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise CheckpointError(
                f"{file}: line {number} is not a checksum and a new, plain file name: {line[:100]!r}"
            )
        sums[match[2]] = match[1]
    return sums


def _read_manifest(path: Path, sha256: str) -> dict[str, Any]:
    file = path / _MANIFEST
    text = _read_small(file)
    _compare_digest(file, hashlib.sha256(text.encode()).hexdigest(), sha256)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not the manifest of a {FORMAT}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: version {manifest.get('version')!r}, but this fastlm reads version {VERSION}"
        )
    kinds = {"step": int, "files": dict, "progress": dict, "config": dict, "versions": dict}
    for key, kind in kinds.items():
        if type(manifest.get(key)) is not kind:
            raise CheckpointError(f"{file}: {key!r} is missing or no {kind.__name__}")
    match = _DIRECTORY.fullmatch(path.resolve().name)
    if match and int(match[1]) != manifest["step"]:
        raise CheckpointError(f"{file}: holds step {manifest['step']}, but its directory is {path.name}")
    return manifest


def _read_small(file: Path) -> str:
    size = _regular_size(file)
    if size > _MOST_JSON:
        raise CheckpointError(f"{file}: {size} bytes, more than any real one ({_MOST_JSON})")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not text: {error}") from error


def _regular_size(file: Path) -> int:
    try:
        status = file.lstat()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: not a regular file")
    return status.st_size


def _compare_digest(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{file}: damaged, its sha256 is {found[:12]}... where {expected[:12]}... was written"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _score(path: Path) -> float:
    try:
        score = json.loads((path / _MANIFEST).read_bytes())["progress"]["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return float(score) if isinstance(score, int | float) and math.isfinite(score) else math.inf


def _point(link: Path, target: str) -> None:
    unfinished = link.parent / f"{_UNFINISHED}{link.name}-{os.getpid()}"
    unfinished.unlink(missing_ok=True)
    os.symlink(target, unfinished)
    os.replace(unfinished, link)
