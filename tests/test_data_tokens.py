"""Documents to token files: every promise of tokenizer, token file and cache against an independent check."""

from __future__ import annotations

import ast
import gzip
import hashlib
import itertools
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
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import (
    DataError,
    Dataset,
    TokenFileError,
    Tokenizer,
    cache_dir,
    corpus,
    dataset,
    open_tokens,
    prepare,
)
from fastlm.data.tokens import Origin, TokenWriter

tokenizers = pytest.importorskip("tokenizers", reason="the extra [train] is not installed")

ROOT = Path(__file__).parents[1]
SHARED = next((p / "shared" / "data" for p in ROOT.parents if (p / "shared" / "data").is_dir()), None)
PROSE = "The ship sailed on.\nNobody aboard knew the harbour, nor the harbour the ship; so it goes, 1851.\n\n"
UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
WORDS = ["word", "naïve", " ", "\n", "  ", "x=1;", "<|endoftext|>", "日本", "'s", "\t", "🙂"]
SEPARATED = st.lists(st.sampled_from(WORDS)).map("".join)
quick = settings(max_examples=40, deadline=None)


def shared(path: str) -> Path:
    if SHARED is None or not (SHARED / path).exists():
        pytest.skip(f"shared/data/{path} is not there")
    return SHARED / path


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


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    texts = [Path(ast.__file__).read_text(encoding="utf-8"), PROSE * 20, "naïve 日本語 🙂 " * 20]
    return Tokenizer.train(texts, 600)


# The tokenizer


@quick
@given(st.one_of(UNICODE, SEPARATED))
def test_every_string_comes_back_and_every_byte_is_counted(learnt, text):
    for tokenizer in (learnt, Tokenizer.of_bytes()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.separator_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
        # Any range: decoding byte for byte must give as many bytes as the table says.
        for cut in range(0, len(ids), 7):
            raw = tokenizer.decode(ids[:cut], errors="surrogateescape").encode(errors="surrogateescape")
            assert text.encode().startswith(raw)
            assert len(raw) == tokenizer.bytes_per_token[ids[:cut]].sum()


def test_byte_tokenizer_is_the_bytes():
    tokenizer = Tokenizer.of_bytes()
    text = bytes(range(128)).decode() + "é日🙂<|endoftext|>"
    assert tokenizer.encode(text) == list(text.encode())
    assert (tokenizer.vocab_size, tokenizer.separator_id) == (257, 256)
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"
    assert tokenizer.bytes_per_token.tolist() == [1] * 256 + [0]
    with pytest.raises(IndexError, match="token id 257 is outside the vocabulary of 257"):
        tokenizer.decode([257])


def test_learning_gives_the_vocabulary_that_the_text_has(learnt):
    assert learnt.vocab_size == 600
    assert Tokenizer.train(["aaaa bbbb"], 5000).vocab_size < 300
    with pytest.raises(ValueError, match="vocab_size must be at least 257 .*, got 256"):
        Tokenizer.train(["text"], 256)


def test_saved_tokenizer_is_the_same_and_is_readable_by_the_library(tmp_path, learnt):
    learnt.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.sha256 == learnt.sha256
        assert again.encode(PROSE + "<|endoftext|>") == learnt.encode(PROSE + "<|endoftext|>")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(PROSE).ids == learnt.encode(PROSE)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def slow_bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """GPT-2's algorithm as published, without any of its speed."""
    parts = list(word)
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, 1 << 30))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            join = tuple(parts[i : i + 2]) == best
            merged.append("".join(parts[i : i + 1 + join]))
            i += 1 + join
        parts = merged
    return parts


def test_gpt2_vocabulary_gives_gpt2_tokens(tmp_path):
    for theirs, ours in (("gpt2.encoder.json.gz", "vocab.json"), ("gpt2.vocab.bpe.gz", "merges.txt")):
        (tmp_path / ours).write_bytes(gzip.decompress(shared(f"tokenizers/{theirs}").read_bytes()))
    gpt2 = Tokenizer.load(tmp_path)
    assert (gpt2.vocab_size, gpt2.separator_id) == (50257, 50256)
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split(" ")): i for i, line in enumerate(lines)}
    split = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
    text = Path(ast.__file__).read_text(encoding="utf-8")[:20_000]
    assert text.isascii()
    words = (w.replace(" ", "Ġ").replace("\n", "Ċ").replace("\t", "ĉ") for w in split.findall(text))
    assert gpt2.encode(text) == [vocabulary[part] for word in words for part in slow_bpe(word, ranks)]


def test_tokenizer_that_would_lose_text_is_refused(tmp_path, learnt):
    def save(change) -> Path:
        settings = json.loads(learnt.to_json())
        change(settings)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(settings))
        return path

    cases = (
        (lambda s: s.update(normalizer={"type": "Lowercase"}), r"it normalizes text \(Lowercase\)"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "it puts a space before the text"),
        (
            lambda s: s.update(pre_tokenizer={"type": "Whitespace"}),
            "its pre-tokenizer is Whitespace, not ByteLevel",
        ),
        (lambda s: s.update(pre_tokenizer=None), "its pre-tokenizer is none, not ByteLevel"),
        (lambda s: s["model"].update(dropout=0.1), "it drops merges at random"),
        (lambda s: s["model"]["vocab"].pop("\u0100"), "1 of the 256 bytes have no token"),
        (lambda s: s["model"]["vocab"].update({"▁": 600}), "the token '▁' is not made of bytes"),
        (
            lambda s: s.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "its model is WordLevel",
        ),
    )
    for change, message in cases:
        with pytest.raises(DataError, match=f"tokenizer.json is not byte-level.*{message}"):
            Tokenizer.load(save(change))
    with pytest.raises(DataError, match=r"has no token '</s>' to put between documents"):
        Tokenizer.load(save(lambda s: None), separator="</s>")
    (tmp_path / "tokenizer.json").write_text(learnt.to_json()[:5000])
    with pytest.raises(DataError, match="cannot load a tokenizer from .*: EOF while parsing"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no tokenizer at .*nowhere: looked for tokenizer.json"):
        Tokenizer.load(tmp_path / "nowhere")


@quick
@given(SEPARATED)
def test_cutting_changes_no_token(learnt, text):
    with mock.patch.object(corpus, "PIECE_CHARS", 3):
        pieces = [p.text for p in corpus._cut([text], "x")]
    assert [i for ids in learnt.encode_batch(pieces) for i in ids] == learnt.encode(text)


# The token file and the cache


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


TWICE = """
import hashlib, sys, time
from fastlm.data import Tokenizer, cache, prepare
slow, count = Tokenizer.encode_batch, []
def encode_batch(self, texts):
    count.append(1)
    time.sleep(0.5)
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

    with pytest.raises(DataError, match="19.txt changed while it was being read"):
        prepare(texts, vocab_size=300, cache=tmp_path / "cache", progress=change)


def test_tokenizer_that_loses_text_unseen_is_caught_by_its_bytes(tmp_path, texts, learnt):
    settings = json.loads(learnt.to_json())
    settings["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"String": "ship"}, "behavior": "Removed", "invert": False},
            settings["pre_tokenizer"],
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match="the tokenizer does not keep the text: [0-9]+ bytes up to .*txt became [0-9]+"
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
        DataError, match="cannot write to the cache folder .*file/x: .*; set FASTLM_CACHE to a folder"
    ):
        cache_dir(tmp_path / "file" / "x")


@pytest.mark.parametrize("name", ["lm/tinyshakespeare.txt.gz", "lm/wikitext2.test.txt.gz"])
def test_real_text_survives_whole(tmp_path, name):
    path = shared(name)
    original = gzip.decompress(path.read_bytes()).decode()
    data = prepare([path], vocab_size=512, validation_fraction=0.1, cache=tmp_path)
    head, tail = (data.tokenizer.decode(s.tokens) for s in (data.training, data.validation))
    assert head.removesuffix("<|endoftext|>") + tail.removesuffix("<|endoftext|>") == original
    assert head.endswith("\n<|endoftext|>"), "cut after a line"
    assert abs(data.validation.bytes / len(original.encode()) - 0.1) <= 0.002
    assert data.training.bytes / len(data.training.tokens) >= 1.8
