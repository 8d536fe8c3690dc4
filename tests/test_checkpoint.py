"""Checkpoints: what is read is what was written, bit for bit, or an error that says what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.train import checkpoint, durable, generators
from fastlm.train.checkpoint import CheckpointError

safetensors = pytest.importorskip("safetensors.torch")

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        found[name] = torch.randint(0, 2, (3, 5), generator=g).to(dtype)
        found[f"{name}.scalar"] = torch.randint(0, 2, (), generator=g).to(dtype)
        found[f"{name}.none"] = torch.empty(0, 4, dtype=dtype)
    found["strided"] = torch.randn(6, 8, generator=g).t()[1::2]
    found["nan"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return found


def export(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "gpt2"}\n')
    (directory / "model.safetensors").write_bytes(bytes(range(256)))


def write(root: Path, step: int, found: dict[str, torch.Tensor] | None = None, **progress: Any) -> Path:
    return checkpoint.save(
        root,
        step,
        tensors(step) if found is None else found,
        config={"lr": 0.1},
        progress={"score": None, **progress},
        versions={"torch": "x"},
        export=export,
    )


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bitwise, so that NaN equals itself and -0.0 does not equal 0.0."""

    def bits(t: torch.Tensor) -> bytes:
        return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]) == bits(b[n]) for n in a
    )


def rewrite(path: Path, **files: bytes) -> None:
    """Replaces files of a checkpoint and makes its sizes and checksums agree: what a forger would do."""
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_bytes())
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        manifest["files"] = {
            n: (path / n).stat().st_size if type(s) is int else s for n, s in manifest["files"].items()
        }
        (path / "manifest.json").write_text(json.dumps(manifest))
    names = [p.name for p in path.iterdir() if p.name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (path / "SHA256SUMS").write_text("".join(lines))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_bytes())
    edit(manifest)
    rewrite(path, manifest__json=json.dumps(manifest).encode())


# --- what is written comes back


def test_everything_comes_back(tmp_path: Path) -> None:
    original = tensors()
    path = write(tmp_path, 7, original, guard=[1.1, 2.0**-1074])
    found = checkpoint.load(path)
    assert same(found.tensors, original)
    assert found.step == 7
    assert found.config == {"lr": 0.1}
    assert found.progress == {"score": None, "guard": [1.1, 2.0**-1074]}
    assert path.name == "step-00000007"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_peers_read_it(tmp_path: Path) -> None:
    """Independent readers: the safetensors library, and coreutils' sha256sum."""
    original = tensors()
    path = write(tmp_path, 1, original)
    assert same(safetensors.load_file(path / "state.safetensors"), original)
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(list(path.iterdir())) - 1


def test_offsets_are_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    durable.write_tensors(path, tensors())
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        assert (8 + size + entry["data_offsets"][0]) % tensors()[name].element_size() == 0, name


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor 'c': got torch.complex64, allowed: torch.float64"):
        write(tmp_path, 1, {"c": torch.zeros(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_generators_continue() -> None:
    generators.seed_all(3)
    random.gauss(0, 1), np.random.standard_normal()  # leave the second of a pair cached
    states, rest = generators.capture()
    rest = json.loads(json.dumps(rest))
    states = {name: state.clone() for name, state in states.items()}

    def draw() -> list[float]:
        return [
            *torch.rand(3).tolist(), torch.randn(1).item(), random.random(), random.gauss(0, 1),
            random.gauss(0, 1), *np.random.standard_normal(3), np.random.random(),
        ]  # fmt: skip

    expected = draw()
    generators.seed_all(4)
    assert draw() != expected
    generators.restore(states, rest)
    assert draw() == expected


# --- damage


@given(seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None)
def test_any_flipped_bit_is_found(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("flip")
    path = write(root, 1)
    dice = random.Random(seed)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for place in dice.sample(range(len(data)), min(len(data), 12)):
            broken = bytearray(data)
            broken[place] ^= 1 << dice.randrange(8)
            file.write_bytes(broken)
            with pytest.raises(CheckpointError, match=r"step-00000001"):
                checkpoint.load(path)
        file.write_bytes(data)
    assert same(checkpoint.load(path).tensors, tensors(1))
    shutil.rmtree(root)


def test_every_byte_of_the_small_files_counts(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for file in (path / "SHA256SUMS", path / "manifest.json"):
        data = file.read_bytes()
        for place in range(len(data)):
            broken = bytearray(data)
            broken[place] ^= 1 << place % 8
            file.write_bytes(broken)
            with pytest.raises(CheckpointError):
                checkpoint.verify(path)
        file.write_bytes(data)
    checkpoint.verify(path)


def test_truncated_at_any_length(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for length in {0, 1, len(data) // 2, len(data) - 1, *random.Random(0).sample(range(len(data)), 8)}:
            file.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=file.name):
                checkpoint.load(path)
        file.write_bytes(data)
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"state.safetensors: truncated, 100 bytes where \d+ were written"
    ):
        checkpoint.load(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000009: no such checkpoint directory"):
        checkpoint.load(tmp_path / "step-00000009")
    for name in ("SHA256SUMS", "manifest.json", "state.safetensors", "model.safetensors", "config.json"):
        path = write(tmp_path, 1)
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: missing"):
            checkpoint.load(path)
        shutil.rmtree(path)


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


FORGED = {
    "not safetensors": (b"PK\x03\x04" + bytes(100), "state.safetensors: not a valid safetensors file"),
    "empty": (b"", "state.safetensors: not a valid safetensors file"),
    "absurd header length": ((2**63).to_bytes(8, "little") + b"{}", "state.safetensors: not a valid"),
    "header longer than the file": ((10**6).to_bytes(8, "little") + b"{}", "state.safetensors: not a valid"),
    "header is no JSON": ((4).to_bytes(8, "little") + b"{{{{", "state.safetensors: not a valid"),
    "outside the file": (
        header(x={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
        "state.safetensors: not a valid",
    ),
    "negative": (
        header(x={"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}) + bytes(16),
        "state.safetensors: not a valid",
    ),
    "overlapping": (
        header(
            x={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            y={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        )
        + bytes(16),
        "state.safetensors: not a valid",
    ),
    "overflowing shape": (
        header(x={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}) + bytes(16),
        "state.safetensors: not a valid",
    ),
    "unknown dtype": (
        header(x={"dtype": "PICKLE", "shape": [4], "data_offsets": [0, 16]}) + bytes(16),
        "state.safetensors: not a valid",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_tensors(what: str, tmp_path: Path) -> None:
    data, message = FORGED[what]
    path = write(tmp_path, 1)
    rewrite(path, state__safetensors=data)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "foreign": (lambda m: m.update(format="other"), "not the manifest of a fastlm-checkpoint"),
    "newer": (lambda m: m.update(version=2), "version 2, but this fastlm reads version 1"),
    "no version": (lambda m: m.pop("version"), "version None, but this fastlm reads version 1"),
    "other step": (lambda m: m.update(step=2), "holds step 2, but its directory is step-00000001"),
    "step is no number": (lambda m: m.update(step="1"), "'step' is missing or no int"),
    "step is a bool": (lambda m: m.update(step=True), "'step' is missing or no int"),
    "no config": (lambda m: m.pop("config"), "'config' is missing or no dict"),
    "progress is a list": (lambda m: m.update(progress=[]), "'progress' is missing or no dict"),
    "size is no number": (lambda m: m["files"].update({"config.json": "9"}), "a file size is no integer"),
    "file not in the sums": (lambda m: m["files"].update(more=1), r"do not list the same files \(more\)"),
    "traversal": (lambda m: m["files"].update({"../../x": 1}), r"do not list the same files \(../../x\)"),
    "no state": (lambda m: m["files"].pop("state.safetensors"), "do not list the same files"),
}  # fmt: skip


@pytest.mark.parametrize("what", MANIFESTS)
def test_forged_manifest(what: str, tmp_path: Path) -> None:
    edit, message = MANIFESTS[what]
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_bytes())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    sums = (path / "SHA256SUMS").read_text().splitlines()[:-1]  # the manifest's own line is the last
    digest = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    (path / "SHA256SUMS").write_text("".join(f"{line}\n" for line in [*sums, f"{digest}  manifest.json"]))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"[]", "not the manifest"), (b"[" * 100_000, "not JSON"), (b"\xff\xfe", "not text"), (b"", "not JSON")],
)
def test_manifest_that_is_none(data: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "manifest.json").write_bytes(data)
    (path / "SHA256SUMS").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")
    with pytest.raises(CheckpointError, match=f"manifest.json: {message}"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ".hidden", "a/b", "", "a b", "manifest.json"])
def test_sums_cannot_lead_elsewhere(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (tmp_path / "secret").write_bytes(b"secret")
    with open(path / "SHA256SUMS", "a") as file:
        file.write(f"{hashlib.sha256(b'secret').hexdigest()}  {name}\n")
    with pytest.raises(
        CheckpointError, match=r"SHA256SUMS: line 5 is not a checksum and a new, plain file name"
    ):
        checkpoint.load(path)


def test_links_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "state.safetensors").rename(tmp_path / "elsewhere")
    (path / "state.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"state.safetensors: not a regular file"):
        checkpoint.load(path)


def test_tensors_must_fit() -> None:
    own = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    where = Path("step-00000001")
    checkpoint.compare_tensors(where, own, own)
    for found, message in (
        ({"a": own["a"]}, "1 missing tensor: b"),
        ({**own, "c": own["a"]}, "1 unknown tensor: c"),
        ({**own, "a": torch.zeros(3, 2)}, r"tensor a is float32 \(3, 2\), the run has float32 \(2, 3\)"),
        (
            {**own, "b": torch.zeros(4, dtype=torch.bfloat16)},
            r"tensor b is bfloat16 \(4,\), the run has float32",
        ),
        ({}, "2 missing tensors: a, b"),
    ):
        with pytest.raises(CheckpointError, match=f"step-00000001: {message}"):
            checkpoint.compare_tensors(where, found, own)


# --- falling back, keeping, removing


def test_newest_good_one_is_found(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, lambda c: None, pytest.fail) is None
    for step in (1, 2, 10):
        write(tmp_path, step)
    warnings: list[str] = []
    found = checkpoint.load_newest(tmp_path, lambda c: None, warnings.append)
    assert found is not None and found.step == 10 and not warnings

    data = (tmp_path / "step-00000010/state.safetensors").read_bytes()
    (tmp_path / "step-00000010/state.safetensors").write_bytes(data[:-1])

    def accept(c: checkpoint.Checkpoint) -> None:
        if c.step == 2:
            raise CheckpointError("does not fit")

    found = checkpoint.load_newest(tmp_path, accept, warnings.append)
    assert found is not None and found.step == 1 and same(found.tensors, tensors(1))
    assert "passing over step-00000010" in warnings[0] and "truncated" in warnings[0]
    assert warnings[1] == "passing over step-00000002: does not fit"

    assert [p.name for p in checkpoint.set_aside(tmp_path, 1)] == ["step-00000010.bad", "step-00000002.bad"]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    shutil.rmtree(tmp_path / "step-00000001/model.safetensors", ignore_errors=True)
    (tmp_path / "step-00000001/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        checkpoint.load_newest(tmp_path, accept, warnings.append)


def test_prune_keeps_newest_and_best(tmp_path: Path) -> None:
    scores = {1: 3.0, 2: 1.5, 3: None, 4: 2.0, 5: None, 6: 1.75}
    for step, score in scores.items():
        write(tmp_path, step, {"a": torch.ones(1)}, score=score)
        checkpoint.prune(tmp_path, keep=2)
    assert [int(p.name[5:]) for p in checkpoint.list_checkpoints(tmp_path)] == [6, 5, 2]
    assert (tmp_path / "best").resolve().name == "step-00000002"
    assert checkpoint.load(tmp_path / "best").step == 2
    write(tmp_path, 7, {"a": torch.ones(1)}, score=-1.0)
    checkpoint.prune(tmp_path, keep=2)
    assert [int(p.name[5:]) for p in checkpoint.list_checkpoints(tmp_path)] == [7, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "step-00000006", "step-00000007"]


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with pytest.raises(
        CheckpointError, match=r"cannot write the checkpoint of step 3 .*; the last good one is"
    ):
        write(tmp_path, 3, tensors(99))
    assert same(checkpoint.load(tmp_path / "step-00000003").tensors, tensors(3))
    assert len(list(tmp_path.iterdir())) == 1


# --- death in the middle

CALLS = ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir", "replace", "symlink")


@contextmanager
def at_call(number: int, act: Callable[[str, Any, tuple[Any, ...]], Any]) -> Iterator[list[str]]:
    """Counts calls of os functions; instead of call ``number`` runs ``act(name, function, args)``."""
    original = {name: getattr(os, name) for name in CALLS}
    seen: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == number:
                return act(name, original[name], args)
            return original[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(name))
    try:
        yield seen
    finally:
        for name in CALLS:
            setattr(os, name, original[name])


def save_and_prune(root: Path, step: int) -> None:
    write(root, step, {"a": torch.full((64,), float(step))}, score=10.0 - step)
    checkpoint.prune(root, keep=2)


def test_killed_at_every_call(tmp_path: Path) -> None:
    """A process that dies between two system calls of a save, or half-way through a write, does no harm."""
    start, trial = tmp_path / "start", tmp_path / "trial"
    for step in (1, 2):
        save_and_prune(start, step)
    shutil.copytree(start, trial, symlinks=True)
    with at_call(-1, lambda *_: None) as calls:
        save_and_prune(trial, 3)
    assert {"write", "fsync", "rename", "mkdir", "symlink"} <= set(calls) and len(calls) > 30
    deaths = [(number, False) for number in range(len(calls))]
    deaths += [(number, True) for number, name in enumerate(calls) if name == "write"]
    newest = {}
    for number, half in deaths:
        shutil.rmtree(trial)
        shutil.copytree(start, trial, symlinks=True)

        def die(name: str, call: Any, args: tuple[Any, ...], half: bool = half) -> None:
            if half:
                call(args[0], args[1][: len(args[1]) // 2])
            os._exit(9)

        child = os.fork()
        if child == 0:
            with at_call(number, die):
                save_and_prune(trial, 3)
            os._exit(0)  # not reached
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        durable.remove_unfinished(trial)
        found = checkpoint.load_newest(trial, lambda c: None, pytest.fail)
        assert found is not None and found.step in (2, 3)
        assert same(found.tensors, {"a": torch.full((64,), float(found.step))})
        newest[number] = found.step
        if found.step == 2:
            save_and_prune(trial, 3)
        else:
            checkpoint.prune(trial, keep=2)
        assert sorted(p.name for p in trial.iterdir()) == ["best", "step-00000002", "step-00000003"]
        assert checkpoint.load(trial / "best").step == 3
    steps = [newest[number] for number in range(len(calls))]
    assert steps.index(3) == calls.index("rename") + 1 and steps == sorted(steps)  # the only turning point


def test_what_must_be_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against losing power: every file and its directory are fsynced before the rename, the root after it."""
    paths: dict[int, str] = {}
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        paths[fd] = os.readlink(f"/proc/self/fd/{fd}")
        events.append(("fsync", Path(paths[fd]).name))
        real_fsync(fd)

    def rename(a: Any, b: Any) -> None:
        events.append(("rename", Path(b).name))
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    path = write(tmp_path, 1)
    at = events.index(("rename", path.name))
    files = {p.name for p in path.iterdir()}
    before = [name for kind, name in events[:at] if kind == "fsync"]
    assert set(before[:-1]) == files and len(before) == len(files) + 1
    assert before[-1].startswith(durable.UNFINISHED)  # the directory itself, last
    assert events[at + 1 :] == [("fsync", tmp_path.name)]


def test_full_disk(tmp_path: Path) -> None:
    """The disk fills at any write: a clear error, nothing left half-done, the last good one holds."""
    write(tmp_path, 1)

    def full(name: str, call: Any, args: tuple[Any, ...]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with at_call(-1, lambda *_: None) as calls:
        write(tmp_path / "count", 2)
    shutil.rmtree(tmp_path / "count")
    writes = [i for i, name in enumerate(calls) if name in ("write", "fsync", "mkdir", "open")]
    assert len(writes) > 15
    for number in writes[1:]:  # the first only finds the root in place
        with (
            at_call(number, full),
            pytest.raises(
                CheckpointError,
                match=r"cannot write the checkpoint of step 2 .*No space left on device; "
                r"the last good one is .*step-0000000[12]",
            ),
        ):
            write(tmp_path, 2)
        left = [p.name for p in tmp_path.iterdir()]
        assert left in (["step-00000001"], ["step-00000001", "step-00000002"]), (number, left)
        if len(left) == 2:  # only the fsync of the parent comes after the rename
            assert number >= writes[-2]
            shutil.rmtree(tmp_path / "step-00000002")
        assert same(checkpoint.load(tmp_path / "step-00000001").tensors, tensors(1))


def test_the_system_really_refuses(tmp_path: Path) -> None:
    """The same by the kernel's own refusal: files may grow to 64 KiB and no further."""
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*File too large; the last good one is"):
            write(tmp_path, 2, {"a": torch.zeros(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.load(tmp_path / "step-00000001")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 3)]))
    path = write(tmp_path, 1)
    monkeypatch.undo()
    assert same(checkpoint.load(path).tensors, tensors(1))


def test_replace_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    durable.replace_file(path, b"one")

    def fail(name: str, call: Any, args: tuple[Any, ...]) -> None:
        raise OSError(errno.ENOSPC, "full")

    for number in range(4):  # open, write, fsync, close
        with at_call(number, fail), pytest.raises(OSError, match="full"):
            durable.replace_file(path, b"two")
        assert path.read_bytes() == b"one"
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    durable.replace_file(path, b"two")
    assert path.read_bytes() == b"two"
