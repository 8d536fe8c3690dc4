"""Sequence to sequence: aligned texts, packed batches of one shape, training and translating by the command line."""

from __future__ import annotations

import gzip
import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastlm import cli_translate
from fastlm.cli import main
from fastlm.data import (
    Codec,
    DataError,
    Draws,
    Pack,
    PackLoader,
    PackValidation,
    Tokenizer,
    learn_tokenizer,
    read_aligned,
)
from fastlm.data import packs as packs_module
from fastlm.engine import Engine, audit, gradients
from fastlm.generate import beam_search
from fastlm.models import EncoderDecoder, EncoderDecoderConfig
from fastlm.tasks import SequencePairs, SequenceToSequence
from fastlm.tasks import sequence_to_sequence as s2s

ENGLISH = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
GERMAN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]


# --- aligned texts


def test_aligned_files_and_records(tmp_path):
    with gzip.open(tmp_path / "a.en.gz", "wb") as file:
        file.write(b"one\r\n\ntwo\nthree")
    (tmp_path / "a.de").write_text("eins\nnichts\nzwei\n  \n")
    (tmp_path / "b.en").write_text("four\n")
    (tmp_path / "b.de").write_text("vier\n")
    found = read_aligned([tmp_path / "a.en.gz", tmp_path / "b.en"], [tmp_path / "a.de", tmp_path / "b.de"])
    assert (found.sources, found.targets, found.empty) == (["one", "two", "four"], ["eins", "zwei", "vier"], 2)
    (tmp_path / "c.tsv").write_text("source\ttarget\none\teins\n")
    (tmp_path / "c.jsonl").write_text('{"source": "two", "target": "zwei", "more": 1}\n')
    found = read_aligned([tmp_path / "c.tsv", tmp_path / "c.jsonl"])
    assert (found.sources, found.targets) == (["one", "two"], ["eins", "zwei"])
    found = read_aligned([tmp_path / "c.tsv"], columns=("target", "source"))
    assert (found.sources, found.targets) == (["eins"], ["one"])


def test_texts_that_do_not_align(tmp_path):
    (tmp_path / "a").write_text("one\n" * 1200)
    (tmp_path / "b").write_text("eins\n" * 1199)
    (tmp_path / "c").write_text("\n" * 1200)
    with pytest.raises(DataError, match=r"a has 1,200 lines and .*b 1,199"):
        read_aligned([tmp_path / "a"], [tmp_path / "b"])
    with pytest.raises(DataError, match=r"b has 1,199 lines and .*a 1,200"):
        read_aligned([tmp_path / "b"], [tmp_path / "a"])
    with pytest.raises(DataError, match=r"1 files of sources .* and 2 of targets"):
        read_aligned([tmp_path / "a"], [tmp_path / "b", tmp_path / "c"])
    with pytest.raises(DataError, match="no pair of texts"):
        read_aligned([tmp_path / "a"], [tmp_path / "c"])
    (tmp_path / "a.csv").write_text("source,other\na,b\n")
    with pytest.raises(DataError, match="no field 'target'"):
        read_aligned([tmp_path / "a.csv"])


def test_the_joint_tokenizer_is_kept(tmp_path, monkeypatch):
    texts = [" ".join(ENGLISH), " ".join(GERMAN)] * 4
    first = learn_tokenizer(texts, 400, tmp_path)
    assert {"Ġeight", "Ġsieben"} <= set(json.loads(first.to_json())["model"]["vocab"])
    monkeypatch.setattr(Tokenizer, "train", None)  # from here on it may not be learned
    assert learn_tokenizer(texts, 400, tmp_path).to_json() == first.to_json()
    with pytest.raises(TypeError):
        learn_tokenizer([*texts[:-1], texts[-1] + "n"], 300, tmp_path)
    with pytest.raises(TypeError):  # the same text, cut elsewhere
        learn_tokenizer(["".join(texts[:2]), "", *texts[2:]], 300, tmp_path)


# --- packed batches

START, END, PAD = 90, 91, 92
TASK = SequenceToSequence(100, 12, START, END, PAD)


def test_a_pack_by_hand():
    batch = TASK.pack([([5, 6, END], [7, END]), ([8, END], [9, 10, END])], Pack(7, 3))
    assert {key: t.tolist() for key, t in batch.items()} == {
        "input_ids": [5, 6, END, 8, END, PAD, PAD],
        "positions": [0, 1, 2, 0, 1, 0, 0],
        "cu_seqlens": [0, 3, 5, 5],
        "targets": [7, END, 9, 10, END, -100, -100],
        "decoder_input_ids": [START, 7, START, 9, 10, PAD, PAD],
        "target_positions": [0, 1, 0, 1, 2, 0, 0],
        "target_cu_seqlens": [0, 2, 5, 5],
    }
    TASK.check(batch)
    full = TASK.pack([([5, END], [7, END])], Pack(2, 1))
    assert full["decoder_input_ids"].tolist() == [START, 7] and full["targets"].tolist() == [7, END]
    TASK.check(full)
    empty = TASK.pack([], Pack(2, 1))
    assert empty["targets"].tolist() == [-100, -100] and not empty["cu_seqlens"].any()
    with pytest.raises(ValueError, match="do not fit"):
        TASK.pack([([5, 6, END], [7, END])] * 2, Pack(5, 3))
    with pytest.raises(ValueError, match="do not fit"):
        TASK.pack([([5], [7])] * 2, Pack(5, 1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"targets": torch.tensor([100, 1])}, r"targets must be in \[0, 100\) or -100, got 100 at \[0\]"),
        ({"input_ids": torch.tensor([1, -100])}, r"input_ids must be in \[0, 100\), got -100"),
        ({"cu_seqlens": torch.tensor([1, 2])}, "cu_seqlens must begin with 0"),
        ({"target_cu_seqlens": torch.tensor([0, 3])}, r"target_cu_seqlens must be in \[0, 3\)"),
        ({"positions": torch.tensor([0, 12])}, r"positions must be in \[0, 12\)"),
        ({"target_positions": torch.tensor([0])}, r"target_positions must have shape \(2,\)"),
    ],
)
def test_batches_that_cannot_be(change, text):
    with pytest.raises(ValueError, match=text):
        TASK.check(TASK.pack([([5, END], [7, END])], Pack(2, 1)) | change)


def pairs_of(count: int = 53, seed: int = 0) -> SequencePairs:
    dice = np.random.default_rng(seed)
    sides = [[[*dice.integers(0, 90, dice.integers(1, 12)), END] for _ in range(count)] for _ in range(2)]
    return SequencePairs(TASK, zip(*sides, strict=True))


def unpacked(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    sides = []
    for ids, ends in (("input_ids", "cu_seqlens"), ("targets", "target_cu_seqlens")):
        cut = batch[ends].tolist()
        sides.append([tuple(batch[ids][a:b].tolist()) for a, b in pairwise(cut) if b > a])
    return list(zip(*sides, strict=True))


def test_every_pair_once_an_epoch_whatever_the_batches():
    source = pairs_of()
    everything = sorted(unpacked(source.pack([(i, Draws(0, 0, i)) for i in range(53)], Pack(2000, 60))))
    orders = []
    for room in (Pack(40, 5), Pack(40, 40), Pack(13, 1), Pack(700, 100)):
        loader, order, shapes = PackLoader(source, room, seed=3), [], set()
        while len(order) < 3 * 53:
            batch = loader.next_batch()
            TASK.check(batch)
            order += unpacked(batch)
            shapes.add(tuple((name, tuple(t.shape)) for name, t in batch.items()))
            assert loader.cursor == len(order) and loader.epoch == len(order) / 53
        assert len(shapes) == 1
        assert sorted(order[:53]) == sorted(order[53:106]) == everything and order[:53] != order[53:106]
        orders.append(order[: 3 * 53])
        assert loader.tokens == sum(len(a) + len(b) for a, b in order)
    assert all(order == orders[0] for order in orders)
    assert PackLoader(source, 40, seed=4).next_batch()["input_ids"].tolist() != PackLoader(source, 40, 3).next_batch()


def test_packs_are_as_full_as_their_order_allows():
    source, room = pairs_of(), Pack(40, 40)
    loader = PackLoader(source, room)
    batches = [unpacked(loader.next_batch()) for _ in range(20)]
    for batch, following in pairwise(batches):
        used = [sum(map(len, side)) + len(following[0][i]) for i, side in enumerate(zip(*batch, strict=True))]
        assert max(used) > 40


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_position_is_restored(prefetch):
    source = pairs_of()
    whole = PackLoader(source, 60, seed=1)
    batches = [whole.next_batch() for _ in range(12)]
    cut = PackLoader(source, 60, seed=1, prefetch=prefetch)
    for batch in batches[:5]:
        assert all(torch.equal(t, batch[name]) for name, t in cut.next_batch().items())
    state = json.loads(json.dumps(cut.state_dict()))
    other = PackLoader(source, 60, seed=1, prefetch=prefetch)
    other.next_batch()
    other.load_state_dict(state)
    for batch in batches[5:]:
        assert all(torch.equal(t, batch[name]) for name, t in other.next_batch().items())
    assert other.state_dict() == whole.state_dict()
    for changed in (PackLoader(source, 60, seed=2), PackLoader(pairs_of(seed=1), 60, seed=1)):
        with pytest.raises(DataError, match="the data position cannot be restored"):
            changed.load_state_dict(state)
    with pytest.raises(DataError, match="next_sample is -1"):
        other.load_state_dict(state | {"next_sample": -1})


def test_ranks_share_an_epoch():
    source = pairs_of()
    whole = PackLoader(source, 60, seed=1)
    ranks = [PackLoader(source, 60, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(6):
        for rank in ranks:
            expected = whole.next_batch()
            assert all(torch.equal(t, expected[name]) for name, t in rank.next_batch().items())
        assert {rank.cursor for rank in ranks} == {whole.cursor}


def test_validation_takes_each_pair_once():
    source = pairs_of()
    batches = list(PackValidation(source, 60))
    found = [pair for batch in batches for pair in unpacked(batch)]
    assert len(found) == 53 and sorted(found) == sorted(unpacked(source.pack([(i, None) for i in range(53)], Pack(999, 53))))
    few = PackValidation(source, 60, most=3)
    assert len(few) == 3 and [unpacked(b) for b in few] == [unpacked(batches[len(batches) * i // 3]) for i in range(3)]


def test_pairs_that_are_too_long():
    pairs = SequencePairs(TASK, [([1] * 13, [2]), ([1], [2] * 13), ([1] * 12, [2] * 12)])
    assert pairs.count == 1 and pairs.too_long == 2
    with pytest.raises(ValueError, match="got 1, none of at most seq_len = 12 tokens"):
        SequencePairs(TASK, [([1] * 13, [2])])
    with pytest.raises(DataError, match="a sequence of 12 tokens does not fit into batches of 11"):
        PackLoader(pairs, 11)


# --- the model on packed batches


def tiny_model(**changes) -> EncoderDecoder:
    torch.manual_seed(0)
    shape = {"vocab_size": 100, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24}
    special = {"pad_token_id": PAD, "decoder_start_token_id": START, "eos_token_id": END}
    return EncoderDecoder(EncoderDecoderConfig(**(shape | special | changes)))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_left_of_a_pack_counts_for_nothing(backend):
    """More room, more places for pairs, and anything in them: the same loss and gradients."""
    from fastlm.backends import use_backend

    model, pairs = tiny_model(label_smoothing=0.1), pairs_of(4)
    chosen = [(i, Draws(0, 0, i)) for i in range(4)]
    used = int(pairs.lengths.sum(0).max())
    results = []
    for room in (Pack(used, 4), Pack(used + 9, 11)):
        batch = pairs.pack(chosen, room)
        batch["input_ids"][int(batch["cu_seqlens"][-1]) :] = 17
        with use_backend(backend):
            results.append(gradients(model, batch))
    (loss, grads), (other, others) = results
    assert abs(loss.item() - other.item()) <= 1e-6 * loss.item()
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 1e-5 * max(1e-3, grad.norm()), name


def test_guesses_are_the_likeliest_tokens(monkeypatch):
    monkeypatch.setattr("fastlm.models.encoder_decoder._GUESSED_AT_ONCE", 7)
    for changes in ({}, {"logit_bias": True}):
        model = tiny_model(**changes).eval()
        if changes:
            torch.nn.init.normal_(model.lm_head.bias)
        batch = next(iter(PackValidation(pairs_of(), 60)))
        logits = model(**{name: t for name, t in batch.items() if name != "targets"})
        outputs: dict[str, torch.Tensor] = {}
        total, count = Engine(model).evaluate(batch, outputs)
        assert torch.equal(outputs["guesses"], logits.argmax(-1))
        counted = batch["targets"] != -100
        loss = torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum")
        assert count == counted.sum() and abs(total.item() - loss.item()) <= 1e-5 * loss.item()
        evaluation = TASK.evaluation()
        for _ in range(2):
            evaluation.add_batch([total.item()], [int(count)], batch, outputs)
        found = evaluation.result()
        right = (outputs["guesses"] == batch["targets"])[counted].double().mean().item()
        assert abs(found.loss - (loss / count).item()) <= 1e-5 * found.loss and found.targets == 2 * int(count)
        assert abs(found.values["perplexity"] - math.exp(found.loss)) <= 1e-9 * math.exp(found.loss)
        assert abs(found.values["token_accuracy"] - right) <= 1e-12


def first_token_given_away(patch):
    """The decoder reads what it is to predict."""
    original = SequenceToSequence.pack

    def pack(self, pairs, room):
        batch = original(self, pairs, room)
        return batch | {"decoder_input_ids": batch["targets"].clamp(min=0)}

    patch.setattr(SequenceToSequence, "pack", pack)


def positions_go_on(patch):
    original = s2s._joined

    def joined(side, room):
        ids, _, ends = original(side, room)
        return ids, np.arange(room.tokens) % TASK.seq_len, ends

    patch.setattr(s2s, "_joined", joined)


def one_pair_of_a_batch_lost(patch):
    original = packs_module._fitting
    patch.setattr(packs_module, "_fitting", lambda lengths, room: max(1, original(lengths, room) - 1))


def one_pair_of_a_batch_twice(patch):
    original = PackLoader._plan

    def plan(self, first):
        first, chosen, tokens, after = original(self, first)
        return first, chosen, tokens, max(first + 1, after - 1)

    patch.setattr(PackLoader, "_plan", plan)


def every_epoch_alike(patch):
    patch.setattr(packs_module, "EpochOrder", lambda seed, epoch, count, of=packs_module.EpochOrder: of(seed, 0, count))


def tail_is_learned(patch):
    patch.setattr(s2s, "IGNORED", PAD)


MUTANTS = {
    first_token_given_away: test_a_pack_by_hand,
    positions_go_on: test_a_pack_by_hand,
    tail_is_learned: test_a_pack_by_hand,
    one_pair_of_a_batch_lost: test_packs_are_as_full_as_their_order_allows,
    one_pair_of_a_batch_twice: test_every_pair_once_an_epoch_whatever_the_batches,
    every_epoch_alike: test_every_pair_once_an_epoch_whatever_the_batches,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    MUTANTS[mutant]()
    mutant(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        MUTANTS[mutant]()


def test_audit_takes_micro_batches_as_they_are():
    batches = [TASK.random(rows, 12, torch.Generator().manual_seed(rows)) for rows in (2, 3)]
    for batch in batches:
        TASK.check(batch)
    model = tiny_model(label_smoothing=0.1, resid_pdrop=0.2, embd_pdrop=0.2)
    report = audit(model, batches, torch.float32, "reference")
    assert report.ok and "2 micro-batches" in report.title, report.table(3)


# --- through the command line


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastlm.train.build.choose_threads", lambda: (1, "a test"))
    dice = np.random.default_rng(0)
    for name, count in (("train", 600), ("val", 30)):
        numbers = [dice.integers(0, 8, dice.integers(2, 7)).tolist() for _ in range(count)]
        for language, words in (("en", ENGLISH), ("de", GERMAN)):
            (tmp_path / f"{name}.{language}").write_text("".join(" ".join(words[n] for n in row) + "\n" for row in numbers))
    return tmp_path


DATA = [
    "--data", "train.en", "--target", "train.de", "--validation-data", "val.en", "--validation-target", "val.de",
]  # fmt: skip
COMMON = [
    "train", "--model", "transformer", "--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--vocab-size", "300",
    "--seq-len", "32", "--batch-size", "4", "--save-every", "10",
]  # fmt: skip


def test_training_goes_on_as_if_never_stopped(home, capsys):
    options = [*COMMON, *DATA, "--dropout", "0.1", "--steps", "20", "--eval-every", "10", "--grad-accum", "2"]
    assert main([*options, "--out", "whole"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"sequence-to-sequence: train.en, train.de; 600 pairs to learn, 30 held out, vocabulary \d+", said)
    assert "0 misses: passed" in said and "token accuracy" in said and "reference" in said
    sample = (home / "whole" / "sample.txt").read_text()
    first = (home / "val.en").read_text().split("\n")[0], (home / "val.de").read_text().split("\n")[0]
    assert sample.startswith(f"source    {first[0]}\nmodel     ") and f"\nreference {first[1]}\n" in sample
    assert sample.count("\nmodel ") == 3
    assert main([*options, "--max-minutes", "0.0000001", "--out", "cut"]) == 0
    assert main(["train", "--out", "cut", "--resume", "--max-minutes", "0"]) == 0
    rows = [
        [{k: v for k, v in json.loads(line).items() if "seconds" not in k and "per_second" not in k}
         for line in (home / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("whole", "cut")
    ]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 21
    assert rows[0][-1]["val_loss"] < rows[0][0]["val_loss"] and "val_perplexity" in rows[0][-1]
    weights = [(home / out / "model" / "model.safetensors").read_bytes() for out in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_language_is_learned_and_translated(home, capsys, monkeypatch):
    options = [*COMMON, *DATA, "--steps", "500", "--eval-every", "0", "--no-audit", "--save-every", "0"]
    options += ["--lr", "0.01", "--min-lr", "0.0001", "--label-smoothing", "0"]
    assert main([*options, "--out", "run"]) == 0
    report = json.loads((home / "run" / "report.json").read_text())
    assert report["token_accuracy"] > 0.97 and report["perplexity"] < 1.3
    capsys.readouterr()
    expected = (home / "val.de").read_text()
    assert main(["translate", "val.en", "--model", "run", "--batch", "7", "--reference", "val.de"]) == 0
    said = capsys.readouterr()
    right = sum(a == b for a, b in zip(said.out.splitlines(), expected.splitlines(), strict=True))
    assert right >= 21
    assert float(re.search(r"BLEU = ([\d.]+)", said.err)[1]) > 75
    translated = said.out

    # interrupted, it goes on where it was
    whole, calls = cli_translate._translated, []

    def interrupted(*args):
        for part in whole(*args):
            calls.append(len(part))
            yield part
            if len(calls) == 2:
                raise KeyboardInterrupt

    command = ["translate", "val.en", "--model", "run", "--batch", "7", "--out", "val.out"]
    monkeypatch.setattr(cli_translate, "_translated", interrupted)
    assert main(command) == 130 and not (home / "val.out").exists()
    assert "14 of 30 lines" in capsys.readouterr().err
    with open(home / "val.out.partial", "a") as file:
        file.write('[3, [["half a')  # killed while it wrote
    assert main(command) == 0 and sum(calls) == 30
    assert (home / "val.out").read_text() == translated and not (home / "val.out.partial").exists()
    monkeypatch.undo()
    monkeypatch.chdir(home)

    # what is done of other lines, or by other options, is not taken
    (home / "val.out.partial").write_text("another\n[0, [[\"wrong\", 0.0]]]\n")
    assert main(command) == 0 and (home / "val.out").read_text() == translated

    # empty lines, n-best, JSON, standard input, the same without a sorted batch
    lines = ["", "three two", "  ", "one two three four five six seven eight " * 6]
    (home / "few.en").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main(["translate", "few.en", "--model", "run", "--num", "2", "--beams", "3", "--jsonl"]) == 0
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [one["source"] for one in found] == [lines[0], lines[1], lines[1], lines[2], lines[3], lines[3]]
    assert found[0]["text"] == found[3]["text"] == "" and found[1]["text"] == "drei zwei"
    assert found[1]["score"] >= found[2]["score"] and found[4]["score"] >= found[5]["score"]
    assert re.search(r"line 4: \d+ tokens, cut to the 32 that the model reads", said.err)
    monkeypatch.setattr("sys.stdin", iter(["three two\n"]))
    assert main(["translate", "-", "--model", "run", "--num", "2"]) == 0
    assert re.match(r"0 \|\|\| drei zwei \|\|\| -[\d.]+\n0 \|\|\| ", capsys.readouterr().out)


def test_a_t5_directory_with_its_tokenizer(home, capsys):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *ENGLISH, *GERMAN]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:2])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    model = tiny_model(
        vocab_size=len(words), position="relative", norm="rms", pre_norm=True, bias=False, scale_embedding=False,
        scale_attention=False, initializer="t5", pad_token_id=0, decoder_start_token_id=0, eos_token_id=1, n_layer=2,
        scale_logits=True,
    ).eval()  # fmt: skip
    model.save_pretrained(home / "t5")
    assert json.loads((home / "t5" / "config.json").read_text())["model_type"] == "t5"
    backend.save(str(home / "t5" / "tokenizer.json"))
    codec = Codec.load(home / "t5")
    sources = codec.encode(["one three two", "six"], 1)
    assert sources == [[3, 5, 4, 1], [8, 1]] and codec.vocab_size == len(words)
    assert codec.decode([3, 5, 1, 0]) == "one three"
    assert codec.encode(["one </s>"], 1) == [[3, 2, 2, 2, 1]]  # spelt out, it is text
    found = beam_search(model, sources, 10, beams=3, stop={1}, banned={0})
    (home / "two.en").write_text("one three two\nsix\n")
    assert main(["translate", "two.en", "--model", "t5", "--beams", "3", "--tokens", "10", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, (best,) in zip(rows, found, strict=True):
        assert best.tokens and row["text"] == codec.decode(best.tokens) and abs(row["score"] - best.score) <= 1e-5


def test_banned_tokens_are_never_chosen():
    model = tiny_model().eval()
    chosen = {t for h in beam_search(model, [[5, 6, END]], 8, beams=3, n_best=3)[0] for t in h.tokens}
    banned = sorted(chosen)[:2]
    for hypothesis in beam_search(model, [[5, 6, END]], 8, beams=3, n_best=3, banned=banned, min_new_tokens=2)[0]:
        assert hypothesis.tokens and not set(banned) & set(hypothesis.tokens)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "--data: got (), allowed: files of sources for --task sequence-to-sequence"),
        (["--data", "train.en"], 1, "records are read from"),
        (["--data", "train.en", "--target", "val.de"], 1, "train.en has 600 lines and val.de 30"),
        (["--data", "train.en", "--target", "train.de", "--validation-data", "val.en"], 2, "--validation-target: got ()"),
        (["--data", "train.en", "--target", "train.de", "--validation-target", "val.de"], 2, "--validation-target: got"),
        ([*DATA, "--seq-len", "3"], 1, "none of at most seq_len = 3 tokens"),
        ([*DATA, "--position", "rotary"], 2, "--position: got rotary, allowed: sinusoidal or learned"),
        ([*DATA, "--mlp", "relu_squared"], 2, "--mlp: got relu_squared"),
        ([*DATA, "--n-inner", "0"], 2, "--n-inner: got 0"),
        ([*DATA, "--label-smoothing", "1"], 2, "--label-smoothing: got 1.0, allowed: 0 <= x < 1"),
        (["--model", "gpt", "--target", "train.de"], 2, "--target: got"),
        (["--model", "gpt", "--label-smoothing", "0.1"], 2, "--label-smoothing: got 0.1, allowed: 0.0 for --model gpt"),
        (["--model", "bert", "--mlp", "relu"], 2, "--mlp: got relu"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, status, message, home, capsys):
    assert main([*COMMON, *options, "--out", "never"]) == status
    assert message in capsys.readouterr().err


def test_mistakes_of_translating_are_named(home, capsys, monkeypatch):
    (home / "model").mkdir()
    tiny_model(vocab_size=257).save_pretrained(home / "model")
    for options, message in (
        (["val.en"], "--model: got None, allowed: a directory"),
        (["nothing.en", "--model", "model"], "--file: got nothing.en"),
        (["val.en", "--model", "nowhere"], "--model: got nowhere"),
        (["val.en", "--model", "model", "--num", "5"], "--num: got 5, allowed: 1 to --beams 4"),
        (["val.en", "--model", "model", "--reference", "train.de"], "--reference: got train.de with 600 lines"),
    ):
        assert main(["translate", *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["translate", "val.en", "--model", "model"]) == 1
    assert "no tokenizer at model" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["translate", "val.en", "--model", "model", "--reference", "val.de"]) == 2
    assert "install fastlm[translation]" in capsys.readouterr().err


def test_the_command_line_audits_packed_batches(capsys):
    assert main(["audit", "--model", "transformer", "--rows", "1", "--seq-len", "24"]) == 0
    said = capsys.readouterr().out
    assert "0 misses: passed" in said and "2 micro-batches" in said
    assert main(["audit", "--model", "transformer", "--rows", "1", "--seq-len", "16", "--pre-norm", "--batch-size", "1",
                 "--recompute", "block", "--dtype", "bfloat16"]) == 0  # fmt: skip
