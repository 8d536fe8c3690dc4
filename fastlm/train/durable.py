"""Files that are either there whole or not there at all, whatever kills the process or the machine.

A write counts only once its bytes are fsynced, its name is in place by an atomic rename, and the directory
that holds the name is fsynced too. Unfinished work bears a name that starts with ``UNFINISHED``, so that
whoever comes next can tell it apart and remove it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "UNFINISHED",
    "NewFile",
    "remove_tree",
    "remove_unfinished",
    "replace_file",
    "sync_directory",
    "sync_file",
    "write_tensors",
]

UNFINISHED = ".unfinished-"


class NewFile:
    """A file being written for the first time: hashed on the way, fsynced at the end.

    ``with NewFile(path) as file: file.write(...)``, after which ``file.sha256`` and ``file.size`` describe
    what is on disk. Raises ``FileExistsError`` rather than overwrite.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        self._hash.update(rest)
        self.size += len(rest)
        while len(rest):  # one call writes at most 2 GiB, and less than asked on a nearly full disk
            rest = rest[os.write(self._fd, rest) :]

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._fd)
                self.sha256 = self._hash.hexdigest()
        finally:
            os.close(self._fd)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> NewFile:
    """Writes a new ``.safetensors`` file, one tensor at a time: no second copy of the whole is ever made.

    Raises ``ValueError`` for a dtype that the format does not know.
    """
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in names:
            allowed = ", ".join(str(dtype) for dtype in names)
            raise ValueError(f"tensor {name!r}: got {tensor.dtype}, allowed: {allowed}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with NewFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            host = tensors[name].detach().cpu().contiguous()
            file.write(host.reshape(-1).view(torch.uint8).numpy().data)
    return file


def replace_file(path: Path, data: bytes) -> None:
    """Puts ``data`` under ``path``, atomically and durably; what was there stays whole until then."""
    unfinished = path.parent / f"{UNFINISHED}{path.name}-{os.getpid()}"
    try:
        with NewFile(unfinished) as file:
            file.write(data)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> tuple[str, int]:
    """Fsyncs a file that other code wrote; returns its sha256 and its size in bytes."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Removes a directory so that no half of it is ever seen under its own name."""
    doomed = path.parent / f"{UNFINISHED}removal-{path.name}-{os.getpid()}"
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(directory: Path) -> int:
    """Removes what killed processes left in ``directory``; returns how many there were."""
    left = list(directory.glob(f"{UNFINISHED}*"))
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(left)
