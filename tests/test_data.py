"""Text to documents to two sides: every promise of corpus and split against an independent check."""

from __future__ import annotations

import ast
import gzip
import os
import sysconfig
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import (
    Corpus,
    DataError,
    Piece,
    corpus,
    read_corpus,
)
from fastlm.data.split import divide, same_text, scan, training_bytes

ROOT = Path(__file__).parents[1]
PROSE = "The ship sailed on.\nNobody aboard knew the harbour, nor the harbour the ship; so it goes, 1851.\n\n"
UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
quick = settings(max_examples=40, deadline=None)


def documents(pieces) -> list[str]:
    found, parts = [], []
    for piece in pieces:
        assert piece.text
        parts.append(piece.text)
        if piece.last:
            found.append("".join(parts))
            parts = []
    assert not parts, "the last document does not end"
    return found


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# The corpus


def test_standard_library_is_the_sorted_python_files_without_tests():
    root = Path(sysconfig.get_path("stdlib"))
    ours = Corpus()
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    expected = {
        p
        for p in root.rglob("*.py")
        if not skipped & set(p.relative_to(root).parts)
        and not p.relative_to(root).parts[0].startswith("config-")
        and not p.name.startswith("_sysconfigdata_")
        and p.name not in ("sitecustomize.py", "usercustomize.py")
    }
    # In each folder its files by name, then its folders by name.
    order = sorted(expected, key=lambda p: [(part != p.name, part) for part in p.relative_to(root).parts])
    assert [Path(p) for p in ours.paths] == order
    found = documents(ours.pieces())
    assert found == documents(read_corpus()), "two readings differ"
    assert found == [
        text for p in ours.paths if (text := Path(p).read_bytes().decode().removeprefix("\ufeff"))
    ]
    assert sum(map(len, found)) > 5_000_000


def test_sources_are_files_folders_globs_and_records_each_read_once(tmp_path):
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "b" / "z.md.gz", "packed")
    write(tmp_path / "b" / "sub" / "m.py", "code")
    write(tmp_path / "b" / "empty.txt", "")
    write(tmp_path / "b" / "picture.png", b"\x89PNG\0")
    write(tmp_path / "b" / ".hidden" / "x.txt", "hidden")
    write(tmp_path / "c.jsonl.gz", '\ufeff{"text": "one", "body": "eins"}\n\n{"text": "", "body": "zwei"}\n')
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    sources = [
        tmp_path / "a.txt",
        str(tmp_path / "b"),
        tmp_path / "*.txt",
        tmp_path / "**" / "*.jsonl.gz",
        tmp_path / "b",
    ]
    assert documents(read_corpus(sources)) == ["first", "packed", "code", "one"]
    assert documents(read_corpus([tmp_path / "c.jsonl.gz"], field="body")) == ["eins", "zwei"]
    assert documents(read_corpus([tmp_path / "b", tmp_path / "a.txt"])) == ["packed", "code", "first"]
    with mock.patch.dict(os.environ, HOME=str(tmp_path)):
        assert documents(read_corpus(["~/a.txt"])) == ["first"]
    assert documents(read_corpus([write(tmp_path / "x[1].txt", "brackets in a name")])) == [
        "brackets in a name"
    ]


BAD = {
    "empty.txt": (b"", "empty.txt is empty"),
    "empty.jsonl": (b"\n \n", "empty.jsonl is empty"),
    "nul.txt": (b"text\0", "nul.txt is binary, not text: byte 4 is NUL"),
    "far.txt": (b"a" * 70 + b"\0", "far.txt is binary, not text: byte 70 is NUL"),
    "latin.txt": (
        "é".encode() * 40 + b"\xe9t\xe9",
        r"latin.txt is not UTF-8 text: byte 80 \(0xe9\), invalid continuation",
    ),
    "cut.txt": (
        ("a" * 63 + "é").encode()[:-1],
        r"cut.txt is not UTF-8 text: byte 63 \(0xc3\), unexpected end",
    ),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt is (binary|not UTF-8)"),
    "brace.jsonl": (b'{"text": "fine"}\n{"text": ', "brace.jsonl:2: malformed JSON: Expecting value.*column"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: malformed JSON: "),
    "absent.jsonl": (
        b'{"text": "fine"}\n\n{"body": 1, "id": 2}',
        "absent.jsonl:3: no field 'text'; the record has 'body', 'id'",
    ),
    "number.jsonl": (b'{"text": 3}', "number.jsonl:1: field 'text' must be a string, got int"),
    "list.jsonl": (b'["text"]', "list.jsonl:1: a record must be a JSON object, got list"),
    "half.jsonl": (
        b'{"text": "\\ud800"}',
        "half.jsonl:1: field 'text' is not Unicode text: a lone surrogate",
    ),
    "nul.jsonl": (b'{"text": "a"}\n\0', "nul.jsonl:2 is binary"),
    "latin.jsonl": (b'\n{"text": "\xe9"}', r"latin.jsonl:2 is not UTF-8 text: byte 10 \(0xe9\)"),
    "not.txt.gz": (b"plain", "cannot read .*not.txt.gz: Not a gzipped file"),
    "short.txt.gz": (
        gzip.compress(bytes(range(1, 100)))[:-9],
        "cannot read .*short.txt.gz: Compressed file ended",
    ),
    "crc.txt.gz": (gzip.compress(b"text")[:-8] + bytes(8), "cannot read .*crc.txt.gz: CRC check failed"),
    "flate.txt.gz": (gzip.compress(b"text")[:10] + b"\xff" * 9, "cannot read .*flate.txt.gz: Error -3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_what_is_wrong(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with mock.patch.object(corpus, "READ_BYTES", 64), pytest.raises(DataError, match=message):
        list(read_corpus([tmp_path / name]))


def test_bad_source_is_named_with_what_is_wrong(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nothing")
    for source, message in (
        ("missing.txt", "no such file or folder: .*missing.txt"),
        ("*.nothing", r"the pattern .*\*.nothing matches no file"),
        ("folder", r"the folder .*folder holds no text files \(looked for .jsonl .md"),
        ("pipe", "pipe is not a regular file"),
        ("dangling.txt", "dangling.txt is not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            Corpus([tmp_path / source])
    write(tmp_path / "folder" / "a.txt", "")
    with pytest.raises(DataError, match=r"folder: no text, all files found \(1\) are empty"):
        list(read_corpus([tmp_path / "folder"]))
    with pytest.raises(TypeError, match="sequence of paths, got the single path"):
        Corpus("a.txt")


def test_unreadable_file_and_folder(tmp_path):
    path = write(tmp_path / "locked.txt", "text")
    # The one who runs the tests may be root, whom no permission stops.
    with (
        mock.patch("builtins.open", side_effect=PermissionError(13, "Permission denied")),
        pytest.raises(DataError, match=r"cannot read .*locked.txt: Permission denied"),
    ):
        list(read_corpus([path]))
    with (
        mock.patch("os.scandir", side_effect=PermissionError(13, "Permission denied", "private")),
        pytest.raises(DataError, match="cannot list the folder private: Permission denied"),
    ):
        Corpus([tmp_path])


@quick
@given(st.lists(UNICODE), st.integers(1, 8), st.integers(1, 40))
def test_pieces_join_to_the_text_and_stay_short(texts, piece, more):
    with mock.patch.multiple(corpus, PIECE_CHARS=piece, LONGEST_PIECE=piece + more):
        pieces = list(corpus._cut(texts, "x"))
    assert "".join(p.text for p in pieces) == "".join(texts)
    assert all(len(p.text) <= piece + more for p in pieces[:-1])
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


def test_reading_takes_bounded_memory(tmp_path):
    path = write(tmp_path / "big.txt.gz", PROSE * 300_000)  # 30 MB in one document
    tracemalloc.start()
    size = scan(read_corpus([path])).bytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 300_000 * len(PROSE)
    assert peak <= 12 << 20


# The split

TEXTS = st.lists(st.text("ab\né🙂", min_size=1, max_size=30), min_size=1, max_size=30)


def as_pieces(texts: list[str], size: int = 5) -> list[Piece]:
    return [
        Piece(text[i : i + size], "x", i + size >= len(text))
        for text in texts
        for i in range(0, len(text), size)
    ]


@quick
@given(TEXTS, st.floats(0, 0.99))
def test_split_keeps_all_text_and_puts_no_document_on_both_sides(texts, fraction):
    pieces = as_pieces(texts)
    training = training_bytes(scan(pieces), fraction)
    divided = list(divide(pieces, training))
    assert "".join(p.text for p, _ in divided) == "".join(texts)
    sides = [documents(p for p, v in divided if v == side) for side in (False, True)]
    sizes = [len(t.encode()) for t in texts]
    cut = {t for t, keep, size in zip(texts, training.tolist(), sizes, strict=True) if 0 < keep < size}
    assert len(cut) <= 1, "at most one text is cut"
    whole = [
        [t for t, keep in zip(texts, training.tolist(), strict=True) if (keep > 0) == side]
        for side in (True, False)
    ]
    if not cut:
        assert sides == whole
        assert not set(sides[0]) & set(sides[1])
    validation = sum(sizes) - int(training.sum())
    target = int(fraction * sum(sizes))
    assert validation <= target
    assert 2 * validation >= target - 2 * len(texts), "much less than was asked for"


@quick
@given(st.integers(1, 60), st.integers(1, 7), st.floats(0.01, 0.99), st.integers(1, 3))
def test_one_document_is_cut_once_after_a_line_and_every_copy_there(lines, size, fraction, copies):
    text = "".join(f"line é {i}\n" for i in range(lines))
    pieces = as_pieces([text] * copies, size * 10)
    divided = list(divide(pieces, training_bytes(scan(pieces), fraction)))
    heads, tails = (documents(p for p, v in divided if v == side) for side in (False, True))
    assert len(set(heads)) == 1 and len(heads) == copies
    assert len(set(tails)) <= 1
    assert heads[0] + (tails[0] if tails else "") == text
    if size * 10 > len(text) and tails and lines > 1:
        line_ends = {i + 1 for i, c in enumerate(text) if c == "\n"}
        target = len(text.encode()) - int(fraction * copies * len(text.encode())) // copies
        assert len(heads[0]) in line_ends or target > len(text[: max(line_ends - {len(text)})].encode())


def test_split_follows_content_and_not_order():
    texts = [f"document {i} " * 9 for i in range(200)]
    chosen = []
    for order in (texts, texts[::-1]):
        pieces = as_pieces(order, 50)
        divided = divide(pieces, training_bytes(scan(pieces), 0.1))
        chosen.append(set(documents(p for p, v in divided if v)))
    assert chosen[0] == chosen[1]
    places = sorted(texts.index(t) for t in chosen[0])
    assert 15 <= len(places) <= 20
    assert places[0] < 60 and places[-1] > 140, "validation is a sample, not an end of the corpus"
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        training_bytes(scan(as_pieces(texts)), 1.0)


@pytest.mark.parametrize("second", [["one", "two!"], ["one"], ["one", "two", "three"], ["onetwo"]])
def test_text_that_changes_between_readings_is_noticed(second):
    first = scan(as_pieces(["one", "two"]))
    assert list(same_text(as_pieces(["one", "two"]), first)) == as_pieces(["one", "two"])
    with pytest.raises(DataError, match="while it was being read"):
        list(same_text(as_pieces(second), first))


def test_rooms_import_only_what_lies_below():
    for room, allowed in (("data", {"fastlm.data"}), ("tasks", {"fastlm.data", "fastlm.tasks"})):
        for path in (ROOT / "fastlm" / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    if name.split(".")[0] == "fastlm":
                        assert ".".join(name.split(".")[:2]) in allowed, f"{path.name} imports {name}"
