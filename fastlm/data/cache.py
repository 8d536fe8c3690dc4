"""Files that are made once and kept: where they live, how they are written, who may make them.

A file appears under its name only when it is whole: it is written under a temporary name in the same folder,
flushed to the disk and renamed. So readers need no lock, and two processes that make the same file at once do
no harm. The lock only saves the second one the work.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, cast

from fastlm.data.corpus import DataError

fcntl: ModuleType | None
try:
    fcntl = import_module("fcntl")
except ImportError:  # not a POSIX system: work may be done twice, nothing worse
    fcntl = None

__all__ = ["cache_dir", "exclusive", "written_whole"]

logger = logging.getLogger(__name__)


def cache_dir(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the cache, made if need be: `path`, else `FASTLM_CACHE`, else `fastlm` below
    `XDG_CACHE_HOME` when that is an absolute path, else `~/.cache/fastlm`.

    Raises:
        DataError: the folder cannot be made or written to.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache")
    folder = Path(path or os.environ.get("FASTLM_CACHE") or home / "fastlm").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"cannot write to the cache folder {folder}: {error.strerror}; "
            "set FASTLM_CACHE to a folder that can be written"
        ) from error
    return folder.absolute()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path`, durably, when the block ends; when it raises, nothing is left."""
    handle, name = tempfile.mkstemp(prefix=_temporary_prefix(path), suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`, and clear what a killed one left half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "ab") as file:
        if _lock(file, path):
            for left in path.parent.glob(f"{_temporary_prefix(path)}*.tmp"):
                left.unlink(missing_ok=True)
        yield


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}."


def _lock(file: BinaryIO, path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("waiting for another process that is making %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks
        logger.warning("cannot lock %s (%s): going on without", path, error.strerror)
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
