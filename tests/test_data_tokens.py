"""Documents to token files: every promise of file and cache against an independent check."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fastlm.data import (
    DataError,
    Dataset,
    TokenFileError,
    Tokenizer,
    cache_dir,
    dataset,
    open_tokens,
    prepare,
)
from fastlm.data import tokens as tokens_module
from fastlm.data.tokens import Origin, TokenWriter, fingerprint

tokenizers = pytest.importorskip("tokenizers", reason="the extra [train] is not installed")

ROOT = Path(__file__).parents[1]
PROSE = "The ship sailed on.\nNobody aboard knew the harbour, nor the harbour the ship; so it goes, 1851.\n\n"


def python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    return out.strip()


def raw_tokens(path: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """The file as its description says, read without the code under test."""
    data = path.read_bytes()
    magic, length = struct.unpack_from("<8sI", data)
    assert magic == b"fastlmTK"
    header = json.loads(data[16 : 16 + length])
    tokens = np.frombuffer(data[4096:], header["dtype"])
    count = header["training"]["tokens"]
    assert len(tokens) == count + header["validation"]["tokens"]
    return header, tokens[:count], tokens[count:]


@pytest.fixture
def texts(tmp_path) -> list[str]:
    paths = [tmp_path / f"{i}.txt" for i in range(20)]
    for i, path in enumerate(paths):
        path.write_text(f"Text number {i}: {PROSE * (i % 3 + 1)}")
    return [str(path) for path in paths]


def test_tokens_hold_the_documents_each_with_its_separator(tmp_path, texts):
    stages = []
    data = prepare(
        texts,
        vocab_size=300,
        validation_fraction=0.2,
        cache=tmp_path / "cache",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    originals = Counter(Path(p).read_text() for p in texts)
    size = sum(len(t) for t in originals)
    header, training, validation = raw_tokens(data.path)
    both = Counter()
    for split, tokens in ((data.training, training), (data.validation, validation)):
        assert split.tokens.dtype == np.uint16 and not split.tokens.flags.writeable
        assert np.array_equal(split.tokens, tokens)
        *found, end = data.tokenizer.decode(tokens).split("<|endoftext|>")
        assert end == ""
        assert split.documents == len(found)
        assert split.bytes == sum(len(t.encode()) for t in found)
        assert split.sha256 == hashlib.sha256(tokens.tobytes()).hexdigest()
        both += Counter(found)
    assert both == originals
    assert 0.1 * size <= data.validation.bytes <= 0.2 * size
    assert header["origin"]["vocab_size"] == data.tokenizer.vocab_size
    assert header["origin"]["tokenizer"] == data.tokenizer.sha256
    last = {stage: (done, total) for stage, done, total in stages}
    assert last == {"reading": (size, 0), "learning tokens": (size, size), "tokenizing": (size, size)}


def test_tokenizer_learns_from_training_text_alone(tmp_path, texts):
    def learn(cache: str) -> Dataset:
        learnt_from.clear()
        with mock.patch.object(Tokenizer, "train") as train:
            train.side_effect = lambda given, size: learnt_from.extend(given) or Tokenizer.of_bytes()
            return prepare(texts, validation_fraction=0.3, cache=tmp_path / cache)

    learnt_from: list[str] = []
    data = learn("all")
    learnt, asked = (
        data.tokenizer.decode(split.tokens).split("<|endoftext|>")[:-1]
        for split in (data.training, data.validation)
    )
    assert learnt_from == learnt
    assert asked and not set(asked) & set(learnt)
    with mock.patch.object(dataset, "LEARN_BYTES", data.training.bytes // 3 + 1):
        learn("sample")
    assert learnt_from == learnt[::3], "of much text an even sample"


def test_spelt_out_separator_stays_text(tmp_path):
    text = PROSE * 5 + "<|endoftext|>" + PROSE * 5
    path = tmp_path / "a.txt"
    path.write_text(text)
    data = prepare([path], vocab_size=300, validation_fraction=0, cache=tmp_path / "cache")
    assert data.training.bytes == len(text)
    assert (data.training.tokens == data.tokenizer.separator_id).sum() == 1
    assert len(data.validation.tokens) == 0


def test_second_time_comes_from_the_cache_and_any_change_does_not(tmp_path, texts):
    cache = tmp_path / "cache"
    arguments = {"vocab_size": 300, "cache": cache}
    first = prepare(texts, **arguments)
    before = first.path.stat()
    with (
        mock.patch.object(Tokenizer, "train", side_effect=AssertionError),
        mock.patch.object(Tokenizer, "encode_batch", side_effect=AssertionError),
    ):
        again = prepare(texts, **arguments)
        assert prepare(texts, tokenizer=first.tokenizer, cache=cache).path == first.path
    assert again.path == first.path and again.path.stat().st_mtime_ns == before.st_mtime_ns
    first.tokenizer.save(tmp_path / "tokenizer.json")
    assert prepare(texts, tokenizer=tmp_path / "tokenizer.json", cache=cache).path == first.path
    others = [
        prepare(texts, vocab_size=301, cache=cache),
        prepare(texts, validation_fraction=0.1, **arguments),
        prepare(texts, tokenizer="bytes", cache=cache),
        prepare(texts[:-1], **arguments),
        prepare(texts[::-1], **arguments),
    ]
    Path(texts[0]).write_text("other text " * 20)
    others.append(prepare(texts, **arguments))
    assert len({first.path, *(other.path for other in others)}) == 7


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[-3:]
    elif how == "headless":
        del data[100:]
    elif how == "long":
        data += b"\0\0"
    elif how == "header":
        data[30] ^= 1
    elif how == "training":
        data[4096 + 11] ^= 4
    elif how == "validation":
        data[-1] ^= 4
    elif how == "version":
        old = bytes(data[16:4096].rstrip(b"\0"))
        new = old.replace(b'"version": 1', b'"version": 9')
        data[8:16] = struct.pack("<II", len(new), zlib.crc32(new))
        data[16 : 16 + len(new)] = new
    elif how == "foreign":
        data = bytearray(b"PK\3\4 something else")
    elif how == "empty":
        data.clear()
    path.write_bytes(data)


DAMAGE = {
    "truncated": "is truncated: [0-9]+ of [0-9]+ bytes",
    "headless": "is truncated: 100 bytes",
    "long": "is too long",
    "header": "is damaged: its header does not match its CRC-32",
    "training": "is damaged: its training tokens do not match their SHA-256",
    "validation": "is damaged: its validation tokens do not match their SHA-256",
    "version": "has format version 9, this program reads 1",
    "foreign": "is not a token file: it begins with b'PK",
    "empty": "is not a token file: it begins with b''",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_token_file_is_refused_and_made_again_with_a_line_saying_so(tmp_path, texts, how, caplog):
    arguments = {"tokenizer": "bytes", "cache": tmp_path / "cache"}
    good = prepare(texts, **arguments)
    content = good.path.read_bytes()
    damaged(good.path, how)
    with pytest.raises(TokenFileError, match=f"{good.path.name}.* {DAMAGE[how]}"):
        open_tokens(good.path)
    again = prepare(texts, **arguments)
    assert again.path == good.path and again.path.read_bytes() == content
    assert re.search(f"unusable cache file, making it again: .*{DAMAGE[how]}", caplog.text)


def test_other_token_file_or_broken_tokenizer_in_the_cache_is_replaced(tmp_path, texts, caplog):
    arguments = {"vocab_size": 300, "cache": tmp_path / "cache"}
    good = prepare(texts, **arguments)
    content = good.path.read_bytes()
    good.path.write_bytes(prepare(texts[1:], **arguments).path.read_bytes())
    for kept in (tmp_path / "cache" / "tokenizers").glob("*.txt"):
        kept.write_text(kept.read_text().replace('"e"', '"\u0130"'))
    assert prepare(texts, **arguments).path.read_bytes() == content
    assert "was made from something else" in caplog.text
    assert "it does not match its SHA-256" in caplog.text


def test_large_vocabulary_takes_32_bits_and_ids_are_checked(tmp_path):
    origin = Origin("c", "t", 70_000, 0, 0.5)
    with open(tmp_path / "x.tokens", "w+b") as file, open(tmp_path / "aside", "w+b") as aside:
        writer = TokenWriter(file, aside, origin)
        writer.write(np.array([1, 69_999]), validation=True, documents=1, size=7)
        writer.write(np.array([69_998, 0, 5]), validation=False, documents=2, size=9)
        with pytest.raises(ValueError, match=r"must be in \[0, 70000\), got 3 to 70000"):
            writer.write(np.array([3, 70_000]), validation=False, documents=0, size=0)
        writer.finish()
    found = open_tokens(tmp_path / "x.tokens")
    assert found.origin == origin
    assert found.training.tokens.dtype == np.uint32
    assert found.training.tokens.tolist() == [69_998, 0, 5]
    assert found.validation.tokens.tolist() == [1, 69_999]


def test_fingerprint_is_of_all_tokens():
    tokens = np.arange(100, dtype=np.uint16)
    for size in (7, 100, 1000):
        with mock.patch.object(tokens_module, "_HASH_TOKENS", size):
            assert fingerprint(tokens) == hashlib.sha256(tokens.tobytes()).hexdigest()
            assert fingerprint(tokens[::3]) == hashlib.sha256(tokens[::3].tobytes()).hexdigest()


TWICE = """
import hashlib, os, sys, time
from fastlm.data import Tokenizer, cache, prepare
slow, count = Tokenizer.encode_batch, []
def encode_batch(self, texts):
    count.append(1)
    if cache.fcntl is None:  # neither goes on before both work on the same file
        os.mkdir(f"{sys.argv[1]}met{os.getpid()}")
        limit = time.monotonic() + 60
        while sum(name.startswith("met") for name in os.listdir(sys.argv[1])) < 2:
            assert time.monotonic() <= limit, "the other process did not come"
            time.sleep(0.01)
    time.sleep(0.1)
    return slow(self, texts)
Tokenizer.encode_batch = encode_batch
for name in ("locked", "unlocked"):
    print("ready", flush=True)
    sys.stdin.readline()
    data = prepare(sys.argv[2:], vocab_size=400, cache=sys.argv[1] + name)
    print(len(count), hashlib.sha256(data.path.read_bytes()).hexdigest(), flush=True)
    cache.fcntl, count[:] = None, []
"""


def test_two_processes_at_once_make_one_good_file(tmp_path, texts):
    both = [
        python(TWICE, f"{tmp_path}/", *texts, RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads)
        for threads in ("1", "3")
    ]
    # Of a tokenizer that each learns by itself: the same in every process, the file says its SHA-256.
    expected = prepare(texts, vocab_size=400, cache=tmp_path / "alone").path.read_bytes()
    for cache, builds in (("locked", {"0", "1"}), ("unlocked", {"1"})):
        assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        results = [process.stdout.readline().split() for process in both]
        assert {digest for _, digest in results} == {hashlib.sha256(expected).hexdigest()}
        assert {count for count, _ in results} == builds, "with a lock one works, without it both do"
        assert not list((tmp_path / cache).rglob("*.tmp"))
    for process in both:
        finished(process)


def test_kill_in_the_middle_of_writing_leaves_nothing_that_counts(tmp_path, texts):
    cache = tmp_path / "cache"
    code = (
        "import os, signal, sys\n"
        "from fastlm.data import prepare\n"
        "from fastlm.data.tokens import TokenWriter\n"
        "def die(self):\n"
        "    self._sides[0].file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "TokenWriter.finish = die\n"
        "prepare(sys.argv[2:], tokenizer='bytes', cache=sys.argv[1])"
    )
    finished(python(code, cache, *texts), -signal.SIGKILL)
    (left,) = cache.rglob("*.tmp")
    assert left.stat().st_size > 4096 and not list(cache.rglob("*.tokens"))
    data = prepare(texts, tokenizer="bytes", cache=cache)
    assert data.training.documents + data.validation.documents == len(texts)
    assert not left.exists()


def test_failure_while_writing_leaves_nothing(tmp_path, texts):
    cache = tmp_path / "cache"
    with (
        mock.patch.object(TokenWriter, "finish", side_effect=OSError(28, "No space left on device")),
        pytest.raises(DataError, match=r"cannot write .*\.tokens: No space left on device"),
    ):
        prepare(texts, tokenizer="bytes", cache=cache)
    assert [p.suffix for p in (cache / "tokens").iterdir()] == [".lock"]


def test_text_that_changes_during_preparation_is_an_error(tmp_path, texts):
    def change(stage: str, done: int, total: int) -> None:
        if stage == "learning tokens":
            Path(texts[-1]).write_text("something else")

    with pytest.raises(DataError, match=r"19.txt changed while it was being read"):
        prepare(texts, vocab_size=300, cache=tmp_path / "cache", progress=change)


def test_tokenizer_that_loses_text_unseen_is_caught_by_its_bytes(tmp_path, texts):
    settings = json.loads(Tokenizer.of_bytes().to_json())
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"String": "ship"}, "behavior": "Removed", "invert": False},
            settings["pre_tokenizer"],
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match=r"the tokenizer does not keep the text: [0-9]+ bytes up to .*txt became [0-9]+"
    ):
        prepare(texts, tokenizer=tmp_path, cache=tmp_path / "cache")


def test_cache_folder_follows_the_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FASTLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / "home" / ".cache" / "fastlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fastlm"
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert cache_dir(tmp_path / "given") == tmp_path / "given"
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"cannot write to the cache folder .*file/x: .*; set FASTLM_CACHE to a folder"
    ):
        cache_dir(tmp_path / "file" / "x")
