"""The tasks with labels: their data, their rows, their metrics; and training them through the command line."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.cli import main
from fastlm.data import (
    DataError,
    SampleLoader,
    SampleValidation,
    WordPiece,
    prepare,
    read_questions,
    read_records,
    read_tagged,
)
from fastlm.tasks import Classification, SpanQA, Tagging
from fastlm.tasks.span_qa import best_spans
from fastlm.tasks.tagging import entities
from fastlm.tasks.task import Scores

WORDS = [
    "good", "bad", "fine", "awful", "film", "plot", "actor", "scene", "is", "was", "a", "the", "very", "not", "and",
    "paris", "london", "anna", "runs", "to", "lives", "in",
]  # fmt: skip
PIECES = ["##s", "##ed", "##ing", "?", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
PAD, UNK, CLS, SEP, MASK = range(5)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> WordPiece:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return WordPiece.load(path)


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(piece) for piece in text.split()]


# --- WordPiece


def test_wordpiece_pieces_and_specials(tokenizer, tmp_path):
    assert tokenizer.encode("Good films, Paris!") == ids("good film ##s [UNK] paris [UNK]")
    assert MASK not in tokenizer.encode("a [MASK] is a film")  # spelt out in a text, it is text
    assert tokenizer.encode_words(["acting", "runs", "filmed."]) == (
        ids("[UNK] runs film ##ed ."), [0, 1, 2, 2, 2],
    )  # fmt: skip
    found, offsets = tokenizer.encode_offsets("the films")
    assert found == ids("the film ##s") and offsets == [(0, 3), (4, 8), (8, 9)]
    assert tokenizer.decode(ids("the film ##s")) == "the films"
    assert tokenizer.continues.nonzero()[0].tolist() == ids("##s ##ed ##ing")
    assert tokenizer.ordinary.tolist() == list(range(5, len(VOCABULARY))) and tokenizer.vocab_size == len(VOCABULARY)
    tokenizer.save(tmp_path)
    again = WordPiece.load(tmp_path)
    assert again.sha256 == tokenizer.sha256 == WordPiece.from_json(tokenizer.to_json()).sha256
    (tmp_path / "cased").mkdir()
    (tmp_path / "cased" / "vocab.txt").write_text("\n".join(VOCABULARY))
    (tmp_path / "cased" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert WordPiece.load(tmp_path / "cased").encode("Good film") == ids("[UNK] film")


def test_wordpiece_agrees_with_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the independent peer is in the extra `test`")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    peer = transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in ("Good films, Paris!", "The ACTOR was  filming in\tLondon.", "", "Ánna rùns to 東京"):
        assert tokenizer.encode(text) == list(peer(text, add_special_tokens=False)["input_ids"])


def test_wordpiece_learns_from_text(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("the actor acted and the acting was fine\n" * 50)
    data = prepare([tmp_path / "a.txt"], kind=WordPiece, vocab_size=60, validation_fraction=0.2)
    assert isinstance(data.tokenizer, WordPiece) and data.tokenizer.vocab_size <= 60
    assert data.training.tokens[-1] == data.tokenizer.sep_id
    text = data.tokenizer.decode(data.training.tokens[:7])
    assert text.startswith("the actor acted and"[: len(text)])
    again = prepare([tmp_path / "a.txt"], kind=WordPiece, vocab_size=60, validation_fraction=0.2)
    assert again.path == data.path and again.tokenizer.sha256 == data.tokenizer.sha256


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nword", r"has no \[MASK\]"),
        (None, "no tokenizer at .*: looked for tokenizer.json, or vocab.txt"),
        ('{"version": "1.0"}', "cannot load a tokenizer"),
    ],
)
def test_tokenizers_that_are_none_are_refused(content, text, tmp_path):
    if content is not None:
        (tmp_path / ("vocab.txt" if content.startswith("[") else "tokenizer.json")).write_text(content)
    with pytest.raises(DataError, match=text):
        WordPiece.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size must be more than 5, got 5"):
        WordPiece.train(["a"], 5)


# --- data


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "one \\"film\\"", "label": 1}\n\n{"text": "two, bad", "label": 0}\n'),
        ("a.csv.gz", 'text,label\n"one ""film""",1\n"two, bad",0\n'),
        ("a.tsv", '\ufefftext\tlabel\none "film"\t1\ntwo, bad\t0\n'),
    ],
)
def test_records_of_every_kind(name, text, tmp_path):
    found = list(read_records([write(tmp_path / name, text)], ["text", "label"]))
    assert [(r.text("text"), r.label("label")) for r in found] == [('one "film"', "1"), ("two, bad", "0")]
    assert found[1].where == f"{tmp_path / name}:3"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"a\.txt: records are read from \.csv"),
        ("a.csv", "text,label\none,1,2\n", r"a\.csv:2: 3 fields where the first row names 2 columns"),
        ("a.csv", "text,text\n", "two columns have one name"),
        ("a.csv", 'text,label\n"one,1\n', r"a\.csv:2: malformed"),
        ("a.tsv", "text\tlabel\n", r"a\.tsv holds no records"),
        ("a.tsv", "sentence\tlabel\nx\t1\n", r"a\.tsv:2: no field 'text'; the record has 'sentence', 'label'"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a record must be a JSON object, got list"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', r"a\.jsonl:1: field 'text' must be a string, got int"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', r"a\.jsonl:1: field 'label' must be a string or an integer"),
        ("a.tsv.gz", None, r"cannot read .*a\.tsv\.gz"),
    ],
)
def test_records_that_cannot_be_used(name, text, message, tmp_path):
    path = tmp_path / name
    if text is None:
        path.write_bytes(b"no gzip")
    else:
        write(path, text)
    with pytest.raises(DataError, match=message):
        for record in read_records([path], ["text", "label"]):
            record.text("text")
            record.label("label")


def test_tagged_sentences(tmp_path):
    text = "-DOCSTART- -X- O\n\nanna NNP I-PER\nlives V O\n\n\nparis NNP I-LOC\n"
    found = list(read_tagged([write(tmp_path / "a.conll", text)]))
    assert [(s.words, s.tags) for s in found] == [(["anna", "lives"], ["I-PER", "O"]), (["paris"], ["I-LOC"])]
    assert found[1].where.endswith(":7")
    for wrong, message in (
        ("a O\nb\n", ":2: 1 columns where the sentence began with 2"),
        ("a\n", "the word is in column 0, the tag in -1"),
        ("\n", "holds no sentences"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_tagged([write(tmp_path / "b.conll", wrong)]))


def squad(tmp_path, answer="paris", start=14) -> Path:
    entry = {"id": "q", "question": "the film is in ?", "answers": [{"text": answer, "answer_start": start}]}
    none = {"id": "r", "question": "the actor ?", "answers": []}
    data = {"data": [{"title": "t", "paragraphs": [{"context": "anna lives in paris .", "qas": [entry, none]}]}]}
    return write(tmp_path / "a.json", json.dumps(data))


def test_questions(tmp_path):
    first, second = read_questions([squad(tmp_path)])
    assert first.answers == [("paris", 14)] and second.answers == [] and "question 'q'" in first.where
    for path, message in (
        (squad(tmp_path, start=13), "the answer 'paris' is not in the context at 13"),
        (write(tmp_path / "b.json", "{}"), "not JSON as SQuAD has it"),
        (write(tmp_path / "c.json", '{"data": []}'), "holds no questions"),
        (write(tmp_path / "c.txt", "x"), "questions are read from .json"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_questions([path]))


def test_shared_data_is_read_whole():
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED}")
    dev = list(read_records([SHARED / "classification/sst2.dev.tsv.gz"], ["sentence", "label"]))
    assert len(dev) == 872 and {r.label("label") for r in dev} == {"0", "1"}
    assert sum(1 for _ in read_tagged([SHARED / "ner/conll2003.eng.testb.gz"])) == 3453
    assert sum(1 for _ in read_questions([SHARED / "qa/squad-dev-v1.1.rebuilt.json.gz"])) == 10570


# --- rows


def test_classification_rows(tokenizer):
    task = Classification.of(tokenizer, 8, ["no", "yes"])
    rows = task.examples(tokenizer, ["good film", "the film was very very very good"], None, ["yes", "no"])
    batch = next(iter(SampleValidation(rows, 3)))
    task.check(batch)
    assert batch["input_ids"].tolist() == [
        [CLS, *ids("good film"), SEP, 0, 0, 0, 0], [CLS, *ids("the film was very very very"), SEP], [PAD] * 8,
    ]  # fmt: skip
    assert batch["targets"].tolist() == [1, 0, -100] and batch["lengths"].tolist() == [4, 8, 1]
    pair = task.examples(tokenizer, ["good film is good film"], ["bad plot"], ["no"])
    batch = next(iter(SampleValidation(pair, 1)))
    assert batch["input_ids"][0].tolist() == [CLS, *ids("good film is"), SEP, *ids("bad plot"), SEP]
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 3
    with pytest.raises(ValueError, match="labels must be two or more"):
        Classification.of(tokenizer, 8, ["no"])


def test_batches_are_as_wide_as_they_must_be(tokenizer):
    task = Classification.of(tokenizer, 64, ["no", "yes"])
    texts = [" ".join(["film"] * (1 + n % 60)) for n in range(400)]
    rows = task.examples(tokenizer, texts, None, ["no"] * 400)
    loader = SampleLoader(rows, 32, seed=1)
    batches = [next(loader) for _ in range(12)]
    assert loader.samples == 384 and loader.epoch == 1
    assert {b["input_ids"].shape[1] for b in batches} == {16, 32, 48, 64}
    assert all(b["lengths"].max() > b["input_ids"].shape[1] - 16 for b in batches)
    padding = 1 - sum(int(b["lengths"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)
    assert padding <= 0.3
    assert loader.tokens == sum(int(b["lengths"].sum()) for b in batches)
    state = SampleLoader(rows, 32, seed=1).state_dict()
    other = SampleLoader(task.examples(tokenizer, texts, None, ["yes"] * 400), 32, seed=1)
    with pytest.raises(DataError, match="examples_sha256"):
        other.load_state_dict(state)


def test_tagging_rows(tokenizer, tmp_path):
    text = "anna I-PER\nruns O\nfilmed. O\nparis I-LOC\n"
    task = Tagging.of(tokenizer, 6, ["I-LOC", "I-PER", "O"])
    rows = task.examples(tokenizer, read_tagged([write(tmp_path / "a.conll", text)]))
    assert rows.count == 2  # too long: cut between words
    batch = next(iter(SampleValidation(rows, 2)))
    task.check(batch)
    found = sorted(zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True), key=lambda row: row[1][1])
    assert found == [
        ([CLS, *ids("anna runs"), SEP, 0, 0], [-100, 1, 2, -100, -100, -100]),
        ([CLS, *ids("film ##ed . paris"), SEP], [-100, 2, -100, -100, 0, -100]),
    ]


def test_question_rows(tokenizer, tmp_path):
    task = SpanQA.of(tokenizer, 16)
    rows = task.examples(tokenizer, read_questions([squad(tmp_path)]))
    batch = next(iter(SampleValidation(rows, 2)))
    task.check(batch)
    for row in range(2):
        first, last = batch["targets"][row].tolist()
        asked = len(ids("the film is in ?")) if first else len(ids("the actor ?"))
        assert batch["token_type_ids"][row].sum() == 5 + 1 and batch["lengths"][row] == 3 + asked + 5
        assert (first, last) == (0, 0) or batch["input_ids"][row][first : last + 1].tolist() == ids("paris")
    assert (batch["targets"] > 0).any()
    long = " ".join(["film"] * 20) + " paris " + " ".join(["film"] * 20)
    question = next(iter(read_questions([squad(tmp_path)])))
    windows = task.examples(tokenizer, [type(question)("here", "the plot ?", long, [("paris", 100)])])
    held = [(row, target) for row, _, target in windows.rows if target != (0, 0)]
    assert windows.count > 4 and 1 <= len(held) <= 2
    assert all(row[a : b + 1] == ids("paris") for row, (a, b) in held)
    covered = sum(row.count(ids("film")[0]) for row, _, _ in windows.rows)
    assert covered >= 40


# --- metrics


def test_classification_metrics_by_hand(tokenizer):
    task = Classification.of(tokenizer, 8, ["a", "b", "c"])
    evaluation = task.evaluation()
    guesses = torch.tensor([0, 0, 1, 2, 1])
    batch = {"targets": torch.tensor([0, 1, 1, 1, -100])}
    evaluation.add_batch([2.0], [4], batch, {"logits": torch.nn.functional.one_hot(guesses, 3)})
    found = evaluation.result()
    # a: 1 right of 1 + 2 labelled or said twice: 2/3; b: 2/(3 + 1); c: 0
    assert found.loss == 0.5 and found.values["accuracy"] == 0.5
    assert abs(found.values["f1"] - (2 / 3 + 2 / 4 + 0) / 3) <= 1e-12
    count, nats = task.baseline([batch])
    assert count == 4 and abs(nats - (0.25 * np.log(4) + 0.75 * np.log(4 / 3))) <= 1e-12


def test_what_is_best():
    assert Scores(0.5, {}, 9).score == 0.5
    assert Scores(0.5, {"f1": 0.75, "accuracy": 0.9}, 9, "f1").score == -0.75
    assert math.isnan(Scores(0.5, {"f1": None}, 9, "f1").score)


def test_entities_of_both_conventions():
    assert entities(["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG"]) == {
        (0, 1, "PER"), (3, 3, "LOC"), (4, 4, "LOC"), (5, 5, "ORG"),
    }  # fmt: skip
    assert entities(["B-PER", "I-PER", "B-PER", "O"]) == {(0, 1, "PER"), (2, 2, "PER")}
    assert entities(["NN", "NN", "O", "VB"]) == {(0, 1, "NN"), (3, 3, "VB")} and entities([]) == set()


def test_tagging_metrics_by_hand(tokenizer):
    task = Tagging.of(tokenizer, 8, ["B-X", "I-X", "O"])
    evaluation = task.evaluation()
    targets = torch.tensor([[-100, 0, 1, -100, 2, 0]])  # entities (0, 1) and (3, 3) of four words
    guesses = torch.tensor([[0, 0, 1, 0, 0, 2]])  # (0, 1) and (2, 2)
    evaluation.add_batch([1.0], [4], {"targets": targets}, {"logits": torch.nn.functional.one_hot(guesses, 3)})
    assert evaluation.result().values == {"accuracy": 0.5, "f1": 0.5}


def test_span_metrics_by_hand(tokenizer):
    task = SpanQA.of(tokenizer, 16)
    logits = torch.zeros(3, 8, 2)
    logits[0, 4, 0] = logits[0, 5, 1] = 5.0  # says (4, 5)
    logits[1, 6, 0] = logits[1, 5, 1] = 5.0  # ends before it begins: no such span
    logits[1, 5, 0] = 4.0
    logits[2, 0] = 5.0  # says none
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0]] * 3)
    batch = {"targets": torch.tensor([[4, 4], [5, 5], [0, 0]]), "token_type_ids": types, "lengths": torch.tensor([7] * 3)}
    assert best_spans(logits, batch).tolist() == [[4, 5], [5, 5], [0, 0]]
    evaluation = task.evaluation()
    evaluation.add_batch([3.0], [6], batch, {"logits": logits})
    found = evaluation.result()
    assert found.loss == 0.5 and abs(found.values["exact"] - 2 / 3) <= 1e-12
    assert abs(found.values["f1"] - (2 / 3 + 1 + 1) / 3) <= 1e-12


# --- through the command line


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastlm.train.build.choose_threads", lambda: (1, "a test"))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


COMMON = [
    "train", "--model", "bert", "--preset", "tiny", "--device", "cpu", "--dtype", "float32",
    "--eval-every", "10", "--save-every", "10", "--no-audit",
]  # fmt: skip


def train(*options: str) -> int:
    return main([*COMMON, *options])


def test_pretraining_goes_on_as_if_never_stopped(home, capsys):
    text = "".join(f"the actor {WORDS[i % 8]} in paris and the {WORDS[i * 7 % 11]} film was {i % 10}.\n" for i in range(600))
    for part in range(4):
        (home / f"{part}.txt").write_text(text[part * 4000 :])
    options = ["--data", *(f"{part}.txt" for part in range(4)), "--tokenizer", "vocab.txt", "--seq-len", "32"]
    options += ["--dropout", "0.1", "--warmup", "0"]
    assert train(*options, "--steps", "20", "--out", "whole") == 0
    said = capsys.readouterr().out
    assert "masked lm loss" in said and "next sentence accuracy" in said
    assert train(*options, "--steps", "20", "--max-minutes", "0.0000001", "--out", "cut") == 0
    assert main(["train", "--out", "cut", "--resume", "--max-minutes", "0"]) == 0
    rows = [
        [{k: v for k, v in json.loads(line).items() if "seconds" not in k and "per_second" not in k}
         for line in (home / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("whole", "cut")
    ]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 21
    assert rows[0][-1]["val_loss"] < rows[0][0]["val_loss"] and "val_next_sentence_accuracy" in rows[0][-1]
    assert 20 * 8 * 8 < rows[0][-1]["tokens"] < 20 * 8 * 32  # padding is not counted
    weights = [(home / out / "model" / "model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert weights[0] == weights[1]
    report = json.loads((home / "whole" / "report.json").read_text())
    assert abs(report["val_loss"] - report["masked_lm_loss"] - report["next_sentence_loss"]) <= 1e-6
    # its model begins a fine-tuning
    (home / "a.tsv").write_text("text\tlabel\n" + "".join(
        f"the {w} was {q}\t{label}\n" for w in WORDS[4:8] for q, label in (("good", "yes"), ("bad", "no"), ("fine", "yes"),
                                                                          ("awful", "no")) for _ in range(10)))  # fmt: skip
    options = ["--task", "classification", "--init", "whole", "--data", "a.tsv", "--seq-len", "16", "--eval-batches", "0"]
    assert train(*options, "--steps", "60", "--lr", "0.003", "--warmup", "5", "--out", "fine") == 0
    report = json.loads((home / "fine" / "report.json").read_text())
    assert report["accuracy"] == 1.0 and report["f1"] == 1.0 and report["val_tokens"] == 8
    # the best of its models is the first of the highest accuracy, though the loss went on falling
    rows = [json.loads(line) for line in (home / "fine" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: (row["val_accuracy"], row["val_loss"]) for row in rows[1:] if "val_loss" in row}
    first = max(measured, key=lambda step: measured[step][0])
    assert first < 60 and measured[first][1] > measured[60][1] and report["best_step"] == first
    assert (home / "fine" / "checkpoints" / "best").resolve().name == f"step-{first:08d}"
    config = json.loads((home / "fine" / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["no", "yes"]
    assert re.search(r"accuracy +1\.0000", capsys.readouterr().out)


def test_tagging_and_questions_are_learned(home):
    (home / "a.conll").write_text("".join(f"anna I-PER\n{w} O\nin O\nparis I-LOC\n\n" for w in WORDS for _ in range(4)))
    options = ["--task", "tagging", "--tokenizer", "vocab.txt", "--data", "a.conll", "--seq-len", "16"]
    assert train(*options, "--steps", "60", "--out", "tags") == 0
    report = json.loads((home / "tags" / "report.json").read_text())
    assert report["f1"] == 1.0 and report["accuracy"] == 1.0
    context = "anna lives in paris and the film was good ."
    entries = [
        {"id": f"{i}", "question": f"the {w} lives in ?", "answers": [{"text": "paris", "answer_start": 14}]}
        for i, w in enumerate(WORDS)
    ]
    data = {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": entries}]}]}
    (home / "a.json").write_text(json.dumps(data))
    options = ["--task", "span-qa", "--tokenizer", "vocab.txt", "--data", "a.json", "--validation-data", "a.json"]
    assert train(*options, "--seq-len", "32", "--steps", "60", "--out", "qa") == 0
    assert json.loads((home / "qa" / "report.json").read_text())["exact"] == 1.0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--model", "gpt", "--task", "tagging"], 2, "--task: got tagging, allowed: causal-lm for --model gpt"),
        (["--task", "causal-lm"], 2, "--task: got causal-lm, allowed: masked-lm, classification"),
        (["--task", "tagging"], 2, "--data: got (), allowed: files of labelled data"),
        (["--task", "tagging", "--data", "a.tsv"], 2, "--init: got None, allowed: a directory, or a --tokenizer"),
        (["--init", "nowhere"], 2, "--init: got nowhere, allowed: a directory with a BERT"),
        (["--mask-rate", "1"], 2, "--mask-rate: got 1.0, allowed: 0 < x < 1"),
        (["--norm", "rms"], 2, "--norm: got rms, allowed: layer for --model bert"),
        (["--model", "gpt", "--preset", "mini"], 2, "--preset: got mini, allowed: small, tiny"),
        (["--task", "classification", "--data", "a.tsv", "--tokenizer", "vocab.txt"], 1, "no field 'text'"),
        (["--task", "classification", "--data", "a.tsv", "--tokenizer", "vocab.txt", "--text-column", "words"], 1,
         "a.tsv: one label, 'x', in all rows"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, status, message, home, capsys):
    (home / "a.tsv").write_text("words\tlabel\na\tx\nb\tx\n")
    assert train(*options, "--out", "never") == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["masked-lm", "classification", "tagging", "span-qa"])
def test_audit_of_every_head(task, capsys):
    assert main(["audit", "--model", "bert", "--task", task, "--rows", "1", "--seq-len", "48"]) == 0
    assert "0 misses: passed" in capsys.readouterr().out
