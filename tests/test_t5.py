"""T5 through the command line: span corruption from scratch, goes on to the bit, and fine-tuning from directories."""

from __future__ import annotations

import json
import re

import pytest
import torch
from models import T5_V1_1, tiny_encoder_decoder

from fastlm.cli import main
from fastlm.data import Tokenizer
from fastlm.models import EncoderDecoder
from fastlm.train.families import FAMILIES
from fastlm.train.family import Facts
from fastlm.train.presets import T5_PRESETS

COMMON = [
    "train", "--model", "t5", "--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--seq-len", "32",
    "--batch-size", "4", "--eval-every", "5", "--save-every", "5", "--warmup", "0", "--sample-tokens", "8",
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastlm.train.build.choose_threads", lambda: (1, "a test"))
    for part in range(3):
        lines = (f"the {i % 7}th word of {(i * 31) % 11} lines, and {i % 5} more\n" for i in range(200 + part))
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"source": f"up {i}", "target": f"down {i}"}) + "\n" for i in range(40))
    )
    return tmp_path


TEXT = ["--data", "0.txt", "1.txt", "2.txt", "--tokenizer", "bytes"]


def rows_of(path):
    return [
        {k: v for k, v in json.loads(line).items() if "seconds" not in k and "per_second" not in k}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]


def test_span_corruption_goes_on_as_if_never_stopped_and_begins_a_fine_tuning(home, capsys):
    options = [*COMMON, *TEXT, "--dropout", "0.1", "--steps", "10"]
    assert main([*options, "--out", "whole"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"span-corruption: 0.txt, 1.txt, 2.txt; \d+ rows to learn, \d+ held out, vocabulary 358", said)
    assert "0 misses: passed" in said and said.count("\nreference <extra_id_0>") == 3
    assert main([*options, "--no-audit", "--max-minutes", "0.0000001", "--out", "cut"]) == 0
    assert main(["train", "--out", "cut", "--resume", "--max-minutes", "0"]) == 0
    whole, cut = (rows_of(home / out) for out in ("whole", "cut"))
    assert whole == cut and len(whole) == 11 and whole[-1]["val_loss"] < whole[0]["val_loss"]
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        first, second = ((home / out / "model" / file).read_bytes() for out in ("whole", "cut"))
        assert first == second, file
    config = json.loads((home / "whole" / "model" / "config.json").read_text())
    assert config["model_type"] == "t5" and config["feed_forward_proj"] == "gated-gelu" and not config["tie_word_embeddings"]
    assert (config["pad_token_id"], config["decoder_start_token_id"], config["eos_token_id"]) == (257, 257, 256)
    # on pairs, with its weights, its ids and its tokenizer
    tuned = [*COMMON, "--task", "sequence-to-sequence", "--data", "pairs.jsonl", "--init", "whole", "--no-audit"]
    assert main([*tuned, "--steps", "1", "--lr", "1e-9", "--min-lr", "0", "--out", "fine"]) == 0
    before, after = (EncoderDecoder.from_pretrained(home / out / "model") for out in ("whole", "fine"))
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert after.config.decoder_start_token_id == 257
    assert Tokenizer.load(home / "fine" / "model").sha256 == Tokenizer.load(home / "whole" / "model").sha256


def t5_directory(path):
    """What transformers saves of a tiny T5 1.1 with a SentencePiece tokenizer; more rows than the tokenizer has ids."""
    transformers = pytest.importorskip("transformers")
    words = ["▁the", "▁word", "▁lines", "▁of", "▁and", "▁more", ",", "▁", *"0123456789abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -3.0 - i / 9) for i, word in enumerate(words))]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=20)
    tokenizer.save_pretrained(path)
    size = len(tokenizer) + 7
    config = transformers.T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(path)
    return tokenizer, size


@pytest.mark.parametrize("task", ["span-corruption", "sequence-to-sequence"])
def test_fine_tuning_of_a_t5_directory(task, home, capsys):
    tokenizer, size = t5_directory(home / "t5")
    data = TEXT[:4] if task == "span-corruption" else ["--data", "pairs.jsonl"]
    options = [*COMMON, "--task", task, *data, "--init", "t5", "--steps", "4", "--lr", "1e-3", "--dropout", "0.1"]
    assert main([*options, "--out", "fine"]) == 0
    said = capsys.readouterr().out
    assert f"vocabulary {len(tokenizer)}" in said and "0 misses: passed" in said
    transformers = pytest.importorskip("transformers")
    tuned = transformers.T5ForConditionalGeneration.from_pretrained(home / "fine" / "model")
    assert tuned.config.vocab_size == size and tuned.config.dropout_rate == 0.1
    again = transformers.AutoTokenizer.from_pretrained(home / "fine" / "model")
    assert again("the word 7").input_ids == tokenizer("the word 7").input_ids
    assert (again.pad_token_id, again.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--task", "masked-lm"], 2, "--task: got masked-lm, allowed: span-corruption, sequence-to-sequence for --model t5"),
        (["--position", "learned"], 2, "--position: got learned, allowed: relative for --model t5"),
        (["--mean-span", "0.5"], 2, "--mean-span: got 0.5, allowed: finite numbers from 1"),
        (["--init", "nowhere"], 2, "--init: got nowhere, allowed: a directory with a T5 or Marian"),
        (["--seq-len", "5"], 2, "--seq-len: got 5, allowed: rows that span corruption can have"),
        (["--seq-len", "4096", "--mask-rate", "0.3"], 2, "sentinels must be at least"),
        (["--init", "plain"], 1, "the tokenizer of plain has no <extra_id_0>, which span corruption needs"),
        (["--init", "small"], 2, "--init: got small, allowed: a model for a tokenizer of 257 ids"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, status, message, home, capsys):
    for name, size in (("plain", 257), ("small", 61)):
        tiny_encoder_decoder(**T5_V1_1, vocab_size=size).save_pretrained(home / name)
        Tokenizer.of_bytes().save(home / name)
    data = TEXT if "--init" not in options else TEXT[:4]
    assert main([*COMMON, *data, *options, "--out", "never"]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["span-corruption", "sequence-to-sequence"])
def test_audit(task, capsys):
    assert main(["audit", "--model", "t5", "--task", task, "--rows", "1"]) == 0
    assert "0 misses: passed" in capsys.readouterr().out


def test_made_up_facts_give_the_shapes_of_a_run():
    """What a plan is made by: batches of the tiny preset."""
    batch = FAMILIES["t5"].batch(T5_PRESETS["tiny"], Facts(613, end_id=0, start_id=512), 8)
    assert {name: spec.shape for name, spec in batch.items()} == {"input_ids": (8, 64), "lengths": (8,), "targets": (8, 15)}
