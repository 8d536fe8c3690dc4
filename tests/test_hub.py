"""Data by name: what the `datasets` library reads from a folder here, and how names for the Hub reach it."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from fastlm.cli import main
from fastlm.data import DataError, hub, prepare, read_corpus, read_questions, read_records, read_tagged


@pytest.fixture(autouse=True)
def nothing_kept():
    hub._loaded.cache_clear()
    yield
    hub._loaded.cache_clear()


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found.disable_progress_bars()
    return found


def test_plain_text_is_that_of_a_file(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "tokens"))
    texts = ["One text.\n", "", "Another é, longer. " * 2000, "the third"] * 5
    datasets.Dataset.from_dict({"body": texts, "id": list(range(20))}).save_to_disk(tmp_path / "kept")
    (tmp_path / "same.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    named = f"hf:{tmp_path / 'kept'}"
    pieces = [list(read_corpus([source], "body")) for source in (named, tmp_path / "same.jsonl")]
    assert [(p.text, p.last) for p in pieces[0]] == [(p.text, p.last) for p in pieces[1]]
    assert pieces[0][0].source == f"{named}: row 0" and pieces[0][-1].source == f"{named}: row 19"
    found = [prepare([source], field="body", tokenizer="bytes") for source in (named, tmp_path / "same.jsonl")]
    assert found[0].training.sha256 == found[1].training.sha256 and found[0].source == named
    twice = [named, named, tmp_path / "same.jsonl"]  # what is met twice is read once
    assert len(list(read_corpus(twice, "body"))) == 2 * len(pieces[0])
    with pytest.raises(DataError, match="no field 'text'; the records have 'body', 'id'"):
        list(read_corpus([named]))
    with pytest.raises(DataError, match="no split 'dev'; there are 'train'"):
        list(read_corpus([f"{named}:dev"], "body"))


def labelled(datasets, path):
    names = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"one": datasets.Value("string"), "other": datasets.Value("string"), "label": names})

    def split(label, count):
        rows = {"one": [f"a{i}" for i in range(count)], "other": ["b"] * count, "label": [label] * count}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": split(1, 3), "validation": split(0, 2), "test": split(-1, 1)}).save_to_disk(path)
    return f"hf:{path}"


def test_labelled_rows_and_pairs(datasets, tmp_path):
    named = labelled(datasets, tmp_path / "kept")
    rows = list(read_records([named, f"{named}:validation"], ["one", "other", "label"]))
    assert [(r.text("one"), r.text("other"), r.label("label")) for r in rows] == [
        ("a0", "b", "yes"), ("a1", "b", "yes"), ("a2", "b", "yes"), ("a0", "b", "no"), ("a1", "b", "no"),
    ]  # fmt: skip
    assert rows[4].where == f"{named}:validation: row 1"
    for source, columns, text in (
        (f"{named}:test", ["label"], ":test: row 0: -1 is not the number of a class, of which there are 2"),
        (f"{named}:dev", ["label"], "no split 'dev'; there are 'train', 'validation', 'test'"),
        (named, ["sentence"], "no field 'sentence'; the records have 'one', 'other', 'label'"),
        ("hf:", ["one"], "hf:: a name must follow"),
    ):
        with pytest.raises(DataError, match=text):
            list(read_records([source], columns))


def test_a_folder_of_files_and_columns_within_columns(datasets, tmp_path):
    (tmp_path / "files").mkdir()
    for split, count in (("train", 5), ("validation", 2)):
        rows = ({"translation": {"en": f"one {i}", "de": f"eins {i}"}} for i in range(count))
        (tmp_path / "files" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = f"hf:{tmp_path / 'files'}"
    rows = list(read_records([f"{named}:train[1:3]"], ["translation.en", "translation.de"]))
    assert [r.fields for r in rows] == [{"translation.en": f"one {i}", "translation.de": f"eins {i}"} for i in (1, 2)]
    assert len(list(read_records([f"{named}:validation"], ["translation.en"]))) == 2
    with pytest.raises(DataError, match=r"cannot load hf:.*:dev: Unknown split"):
        list(read_records([f"{named}:dev"], ["translation.en"]))


def test_tagged_sentences(datasets, tmp_path):
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    rows = {"tokens": [["anna", "runs"], [], ["in", "paris"]], "ner_tags": [[1, 0], [], [0, 0]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "kept")
    named = f"hf:{tmp_path / 'kept'}"
    found = list(read_tagged([named], tags_field="ner_tags"))
    assert [(s.words, s.tags) for s in found] == [(["anna", "runs"], ["B-PER", "O"]), (["in", "paris"], ["O", "O"])]
    assert found[1].where == f"{named}: row 2"
    wrong = {"tokens": [["a", "b"]], "tags": [["O"]], "text": ["a b"]}
    datasets.Dataset.from_dict(wrong).save_to_disk(tmp_path / "wrong")
    for fields, text in (
        ({}, "row 0: 2 words and 1 tags"),
        ({"words_field": "text"}, "field 'text' must be a list of strings, got 'a b'"),
    ):
        with pytest.raises(DataError, match=text):
            list(read_tagged([f"hf:{tmp_path / 'wrong'}"], **fields))


def test_questions(datasets, tmp_path):
    context = "anna lives in paris ."
    for name, start in (("kept", 14), ("wrong", 13)):
        answers = [{"text": ["paris"], "answer_start": [start]}, {"text": [], "answer_start": []}]
        rows = {"question": ["where ?", "who ?"], "context": [context] * 2, "answers": answers}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
    first, second = read_questions([f"hf:{tmp_path / 'kept'}"])
    assert first.answers == [("paris", 14)] and second.answers == [] and first.context == context
    with pytest.raises(DataError, match="row 0: the answer 'paris' is not in the context at 13"):
        list(read_questions([f"hf:{tmp_path / 'wrong'}"]))


@pytest.mark.parametrize("what", ["text", "pairs", "tags"])
def test_a_run_takes_its_columns_from_the_options(what, datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "tokens"))
    monkeypatch.setattr("fastlm.train.build.choose_threads", lambda: (1, "a test"))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]) + "\n")
    rows = {
        "words": [["a", "b"], ["b", "c"]] * 9, "ner": [["O", "X"], ["X", "O"]] * 9, "one": ["a b", "b a"] * 9,
        "other": ["c", "a"] * 9, "class": [0, 1] * 9, "body": ["some text, and more of it than that\n" * 40] * 18,
    }  # fmt: skip
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "kept")
    options = {
        "text": ["--text-column", "body", "--tokenizer", "bytes", "--sample-tokens", "0"],
        "pairs": ["--model", "bert", "--task", "classification", "--text-column", "one", "--second-column", "other",
                  "--label-column", "class", "--tokenizer", "vocab.txt"],
        "tags": ["--model", "bert", "--task", "tagging", "--text-column", "words", "--label-column", "ner",
                 "--tokenizer", "vocab.txt"],
    }[what]  # fmt: skip
    common = ["--preset", "tiny", "--seq-len", "16", "--steps", "2", "--warmup", "0", "--no-audit", "--device", "cpu"]
    assert main(["train", "--data", "hf:kept", *common, *options, "--out", "run"]) == 0
    assert (tmp_path / "run" / "report.json").is_file()


# --- names for the Hub, by a stand-in for the library


class Table(list):
    column_names = ["text"]
    features = {"text": None}

    def flatten(self):
        return self

    def select_columns(self, names):
        assert names == ["text"]
        return self


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A library that has only the data sets `glue` (of which sst2 is a config) and `owner/name`; what it was asked for."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def load_dataset(*name, split):
        calls.append((*name, split))
        if name[0] not in ("glue", "owner/name"):
            raise FileNotFoundError(f"there is no {name[0]}")
        return Table([{"text": f"{name} {split}"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("glue", [("glue", "train")]),
        ("owner/name:validation", [("owner/name", "validation")]),
        ("glue/sst2:train[:5]", [("glue/sst2", "train[:5]"), ("glue", "sst2", "train[:5]")]),
        ("owner/name/config:test", [("owner/name", "config", "test")]),
    ],
)
def test_names(name, calls, asked):
    (row,) = read_records([f"hf:{name}"], ["text"])
    assert asked == calls and row.text("text") == f"{calls[-1][:-1]} {calls[-1][-1]}"
    list(read_records([f"hf:{name}"], ["text"]))
    assert asked == calls, "a data set is loaded once"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such", "cannot load hf:no/such: there is no no"),
        ("a/b/c/d", "cannot load hf:a/b/c/d: a name is name, owner/name, name/config or owner/name/config"),
        ("a//b", "a name is name"),
    ],
)
def test_names_that_cannot_be(name, message, asked):
    with pytest.raises(DataError, match=message):
        list(read_records([f"hf:{name}"], ["text"]))


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    options = ["--preset", "tiny", "--data", "hf:glue/sst2:train", "--out", str(tmp_path / "run")]
    assert main(["train", *options]) == 1
    assert "install fastlm with its extra [hf]" in capsys.readouterr().err
