"""The directory of a run: what lies where, one process at a time, its stored options, its model."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from .checkpoint import CheckpointError, list_checkpoints, verify
from .config import OptionError, TrainConfig, from_json, to_json
from .durable import remove_unfinished, replace_file

__all__ = ["RunDirectory", "model_directory", "stored_config"]


class RunDirectory:
    """Names of a run's files, and a lock that the system frees when the process ends, however it ends.

    Args:
        config: ``run.out`` and ``run.resume`` say which directory and whether it must be new.

    Raises:
        OptionError: there is something in it already and ``--resume`` is not given, it cannot be made, or
            another process is using it.
    """

    def __init__(self, config: TrainConfig) -> None:
        out = config.run.out or _free(Path("runs"), config.preset)
        self.path = Path(out).expanduser()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.plot = self.path / "loss.png"
        self.sample = self.path / "sample.txt"
        self.trace = self.path / "trace.json"
        self.report = self.path / "report.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OptionError("out", out, f"a directory that can be written ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OptionError("out", out, "a directory that no other process is training in") from None
        # What starts with a dot is the lock, or was left by a process that was killed before its first step.
        if not config.run.resume and any(not path.name.startswith(".") for path in self.path.iterdir()):
            self.close()
            raise OptionError("out", out, "a new or empty directory; with --resume, one that holds a run")
        remove_unfinished(self.path)
        remove_unfinished(self.checkpoints)

    def store(self, config: TrainConfig) -> None:
        replace_file(self.config, (json.dumps(to_json(config), indent=1) + "\n").encode())

    def resume_command(self) -> str:
        """What to type to go on with this run."""
        typed = Path(sys.argv[0])
        program = f"{_shortest(sys.executable)} -m fastlm" if typed.suffix == ".py" else _shortest(typed)
        return f"{program} train --out {shlex.quote(str(self.path))} --resume"

    def close(self) -> None:
        os.close(self._lock)


def _free(parent: Path, name: str) -> Path:
    """The first of name, name-2, name-3 and so on that is missing or empty."""
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or not any(path.iterdir()):
            return path
    raise AssertionError("counting does not end")


def _shortest(program: str | Path) -> str:
    """How to type a program: by its name if the shell finds it, else by its path from here."""
    name = Path(program).name
    if shutil.which(name) and os.path.samefile(str(shutil.which(name)), program):
        return name
    path = os.path.relpath(program)
    return shlex.quote(str(program) if path.startswith("..") else path)


def stored_config(out: str) -> TrainConfig:
    """The options of the run in ``out``.

    Raises:
        OptionError: there is no run, or its ``config.json`` is damaged.
    """
    path = Path(out).expanduser() / "config.json"
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise OptionError("resume", out, f"a directory that holds a run ({path} is missing)") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OptionError("resume", out, f"a directory that holds a run ({path}: {error})") from error


def model_directory(path: Path) -> Path:
    """Where the model of ``path`` is: that of a finished run, else its newest good checkpoint, else ``path``.

    Raises:
        CheckpointError: a checkpoint is damaged, and there is no other one.
    """
    if (path / "SHA256SUMS").exists():
        verify(path)
        return path
    if not (path / "checkpoints").is_dir():
        return path
    if (path / "model").is_dir():
        return path / "model"
    problems = [f"{path / 'checkpoints'} holds no checkpoint that can be used"]
    for found in list_checkpoints(path / "checkpoints"):
        try:
            verify(found)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return found
    raise CheckpointError("; ".join(problems))
