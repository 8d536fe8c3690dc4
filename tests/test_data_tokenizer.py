"""Text to token ids and back: every promise of the tokenizer against an independent check."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import (
    DataError,
    Tokenizer,
    corpus,
    prepare,
)

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


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    texts = [Path(ast.__file__).read_text(encoding="utf-8"), PROSE * 20, "naïve 日本語 🙂 " * 20]
    return Tokenizer.train(texts, 600)


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
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*, got 256"):
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
    with pytest.raises(DataError, match=r"cannot load a tokenizer from .*: EOF while parsing"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match=r"no tokenizer at .*nowhere: looked for tokenizer.json"):
        Tokenizer.load(tmp_path / "nowhere")


@quick
@given(SEPARATED)
def test_cutting_changes_no_token(learnt, text):
    with mock.patch.object(corpus, "PIECE_CHARS", 3):
        pieces = [p.text for p in corpus._cut([text], "x")]
    assert [i for ids in learnt.encode_batch(pieces) for i in ids] == learnt.encode(text)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_cutting_a_program_changes_no_token(learnt, size):
    text = Path(ast.__file__).read_text(encoding="utf-8")
    with mock.patch.object(corpus, "PIECE_CHARS", size):
        pieces = [p.text for p in corpus._cut([text], "x")]
    assert len(pieces) >= len(text) // (size + 100)
    assert [i for ids in learnt.encode_batch(pieces) for i in ids] == learnt.encode(text)


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
