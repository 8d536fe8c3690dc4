"""Span corruption: the text comes back, T5's lengths and distribution, sentinels, and that a place is the whole state."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import T5_V1_1, tiny_encoder_decoder

from fastlm.data import DataError, Draws, SampleLoader, SampleValidation, Tokenizer
from fastlm.engine import gradients
from fastlm.tasks import SpanCorruption, SpanText, with_sentinels

TEXT, PAD, EOS = 300, 300, 301
SENTINELS = tuple(range(501, 301, -1))
VOCAB = 502
quick = settings(max_examples=60, deadline=None)


def task(seq: int = 32, **options) -> SpanCorruption:
    return SpanCorruption(VOCAB, seq, PAD, EOS, **({"sentinels": SENTINELS} | options))


def parts_of(ids) -> dict[int, list[int]]:
    """What follows each sentinel, up to the next one; under None what comes before the first. Without the end."""
    assert ids[-1] == EOS
    parts: dict[int | None, list[int]] = {None: []}
    last = None
    for token in map(int, ids[:-1]):
        if token in SENTINELS:
            assert token not in parts, "a sentinel stands once"
            last = token
            parts[last] = []
        else:
            parts[last].append(token)
    return parts


def restored(inputs, targets) -> list[int]:
    """The text: each span of the targets at its sentinel's place in the inputs."""
    kept, cut = parts_of(inputs), parts_of(targets)
    assert cut.pop(None) == [] and list(cut)[:-1] == [s for s in kept if s is not None] == list(SENTINELS[: len(kept) - 1])
    assert list(cut.items())[-1] == (SENTINELS[len(kept) - 1], []), "the sentinel after the last span"
    text = kept.pop(None)
    for sentinel, stretch in kept.items():
        text += [*cut[sentinel], *stretch]
    return text


@quick
@given(st.integers(2, 400), st.integers(0, 10**6), st.floats(0.02, 0.98), st.floats(1, 12))
def test_the_text_comes_back(length, seed, density, mean_span):
    """And of it are cut as many tokens, in as many spans, as T5's formulas say."""
    ids = np.random.default_rng(seed).integers(0, TEXT, length)
    one = task(8, noise_density=density, mean_span=mean_span)
    inputs, targets = one.corrupt(ids, Draws(seed, 0, 0))
    assert restored(inputs, targets) == ids.tolist()
    assert (len(inputs), len(targets)) == one.lengths_of(length)
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    kept, cut = parts_of(inputs), parts_of(targets)
    assert sum(map(len, cut.values())) == noise and len(cut) - 2 == spans
    assert all(cut[s] for s in SENTINELS[:spans]), "no span is empty"
    assert kept[None] and all(kept[s] for s in SENTINELS[: spans - 1]), "and no text between two"
    assert kept[SENTINELS[spans - 1]] == [], "a span ends the text"


def t5_lengths(inputs_length: int, density: float, mean_span: float) -> tuple[int, int]:
    """random_spans_helper of T5's code, which has no final sentinel: (tokens of text, of targets)."""

    def lengths(tokens):
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


@quick
@given(st.integers(40, 1024), st.floats(0.1, 0.45), st.floats(1.5, 6))
def test_lengths_are_t5s(seq, density, mean_span):
    """T5's search begins at inputs_length, ours at 2, and both end in the same place."""
    one = SpanCorruption(2000, seq, PAD, EOS, tuple(range(302, 2000)), density, mean_span)
    assert (one.text_len, one.target_len - 1) == t5_lengths(seq, density, mean_span)
    assert one.lengths_of(one.text_len)[0] == seq


def test_the_published_lengths():
    assert (task(512).text_len, task(512).target_len) == (568, 115)  # transformers' and T5's: 568 and 114


def test_every_division_is_as_likely_as_any_other():
    """Of 12 tokens 4 in 2 spans: 3 divisions of the spans times 7 of the text, each 1/21."""
    one = task(8, noise_density=1 / 3, mean_span=2.0)
    assert one.cut(12) == (4, 2)
    count, seen = 4200, {}
    for place in range(count):
        inputs, targets = one.corrupt(np.arange(12), Draws(7, 0, place))
        kept, cut = parts_of(inputs), parts_of(targets)
        key = len(kept[None]), len(cut[SENTINELS[0]])
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) == {(a, b) for a in range(1, 8) for b in range(1, 4)}
    share = 1 / 21
    chi = sum((n - count * share) ** 2 for n in seen.values()) / (count * share)
    assert chi <= 20 + 5 * 40**0.5  # 20 degrees of freedom, whose variance is 40


# --- sentinels


def test_sentinels_in_a_tokenizer(tmp_path):
    plain = Tokenizer.of_bytes()
    assert plain.sentinels == () and plain.special_id("a") is None and plain.special_id("<|endoftext|>") == 256
    tokenizer = with_sentinels(plain, 30)
    assert tokenizer.vocab_size == 257 + 31 and tokenizer.special_id("<pad>") == 257
    assert tokenizer.sentinels == tuple(range(287, 257, -1))  # the number 0 has the last id, as in T5
    assert with_sentinels(tokenizer) is tokenizer
    text = "a <extra_id_0> spelt out is text: <pad>é\n"
    assert tokenizer.encode(text) == plain.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bytes_per_token == np.append(plain.bytes_per_token, np.zeros(31))).all()
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.sha256 == tokenizer.sha256 != plain.sha256 and again.sentinels == tokenizer.sentinels
    with pytest.raises(DataError, match="has a token '<pad>' already"):
        tokenizer.with_tokens(["<x>", "<pad>"])
    one = SpanCorruption.of(tokenizer, 64)
    assert (one.vocab_size, one.pad_id, one.eos_id, one.sentinels) == (288, 257, 256, tokenizer.sentinels)
    with pytest.raises(DataError, match="has no <pad>"):
        SpanCorruption.of(plain, 64)


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = with_sentinels(Tokenizer.of_bytes(), 8)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))  # by which it would guess another class
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (257, 256) and len(theirs) == tokenizer.vocab_size
    assert theirs("ab <extra_id_1>é").input_ids == [97, 98, 32, tokenizer.sentinels[1], 195, 169]
    assert theirs.decode([97, tokenizer.sentinels[0], 256], skip_special_tokens=True) == "a"


# --- batches


def samples(seq: int = 32, tokens: int = 1000, **options) -> SpanText:
    return SpanText(task(seq, **options), np.random.default_rng(0).integers(0, TEXT, tokens).astype(np.uint16))


def taken(loader, count):
    return [next(loader) for _ in range(count)]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def test_windows_follow_each_other_and_fill_their_rows():
    source = samples()
    one = source.task
    (batch,) = SampleValidation(source, source.count)
    one.check(batch)
    assert batch["input_ids"].shape == (source.count, 32) and (batch["lengths"] == 32).all()
    assert batch["targets"].shape == (source.count, one.target_len) and (batch["targets"] != -100).all()
    text = [restored(*row) for row in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True)]
    whole = [token for window in text[:-1] for token in window]
    assert whole == source._tokens[: len(whole)].tolist()
    assert text[-1] == source._tokens[-one.text_len :].tolist() and 0 <= 1000 - len(whole) <= one.text_len
    count, nats = one.baseline([batch])
    assert count == batch["targets"].numel()
    words = batch["targets"][batch["targets"] < TEXT]
    shares = torch.bincount(words).double() / len(words)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum().item()
    assert abs(nats - entropy * len(words) / count) <= 1e-9
    last = list(SampleValidation(source, source.count - 1))[1]
    one.check(last)
    assert (last["targets"][1:] == -100).all() and (last["input_ids"][1:] == PAD).all() and last["lengths"][1] == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_place_is_the_whole_state(prefetch):
    whole = taken(SampleLoader(samples(), 4, seed=3), 24)
    assert len({b["input_ids"].numpy().tobytes() for b in whole}) == 24
    loader = SampleLoader(samples(), 4, seed=3, prefetch=prefetch)
    assert all(same(a, b) for a, b in zip(taken(loader, 9), whole, strict=False))
    state = json.loads(json.dumps(loader.state_dict()))
    next(loader)
    again = SampleLoader(samples(), 4, seed=3, prefetch=prefetch)
    again.load_state_dict(state)
    assert again.tokens == 9 * 4 * (32 + samples().task.target_len)
    assert all(same(a, b) for a, b in zip(taken(again, 15), whole[9:], strict=True))
    double = next(SampleLoader(samples(), 8, seed=3))
    ranks = [next(SampleLoader(samples(), 4, seed=3, rank=r, world_size=2)) for r in range(2)]
    for key, value in double.items():
        assert torch.equal(value, torch.cat([b[key] for b in whole[:2]]))
        assert torch.equal(value, torch.cat([b[key] for b in ranks]))
    for other, text in (
        (samples(noise_density=0.2), "noise_density was 0.15 and is now 0.2"),
        (samples(mean_span=4.0), "mean_span was 3.0 and is now 4.0"),
        (samples(sentinels=SENTINELS[:9]), "sentinels was"),
        (samples(tokens=999), "tokens was 1000 and is now 999"),
    ):
        with pytest.raises(DataError, match=text):
            SampleLoader(other, 4, seed=3).load_state_dict(state)


def test_the_model_takes_padded_and_packed_batches():
    """And gives the same loss and gradients for both."""
    one = SpanCorruption(61, 24, 50, 51, tuple(range(60, 51, -1)))
    rng = np.random.default_rng(1)
    rows = [one.corrupt(rng.integers(0, 50, n), Draws(0, 0, n)) for n in (26, 9, 17)]
    padded, packed = one.collate(rows), one.collate(rows, packed=True)
    counts = [len(inputs) for inputs, _ in rows]
    assert padded["input_ids"].shape == (3, max(counts)) and packed["input_ids"].shape == (sum(counts),)
    model = tiny_encoder_decoder(**T5_V1_1, vocab_size=61, pad_token_id=50, decoder_start_token_id=50, eos_token_id=51)
    loss, expected = gradients(model, padded)
    packed_loss, found = gradients(model, packed)
    assert abs(packed_loss.item() - loss.item()) <= 1e-6 * loss.item()
    for name, g in found.items():
        assert ((g - expected[name]).norm() <= 1e-5 * expected[name].norm()).item(), name


def test_bad_arguments_are_named():
    for options, text in (
        ({"noise_density": 1.0}, "noise_density must be above 0 and below 1, got 1.0"),
        ({"mean_span": 0.5}, "mean_span must be at least 1, got 0.5"),
        ({"seq": 7}, "seq_len must be at least 8, got 7"),
        ({"sentinels": SENTINELS[:2]}, "sentinels must be at least 3 for a seq_len of 32, got 2"),
        ({"sentinels": (EOS, *SENTINELS)}, "sentinels must be different ids"),
        ({"sentinels": (VOCAB, *SENTINELS)}, "must be in"),
    ):
        with pytest.raises(ValueError, match=text):
            task(**options)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        task().corrupt(np.array([5]), Draws(0, 0, 0))
    with pytest.raises(ValueError, match="fewer than 3 spans, got 100 tokens with 5"):
        task(sentinels=SENTINELS[:3]).corrupt(np.zeros(100), Draws(0, 0, 0))
    with pytest.raises(DataError, match="too few tokens: 20, and a window for seq_len 32 needs 34"):
        samples(tokens=20)
    (batch,) = SampleValidation(samples(tokens=40), 2)
    for key, value, error, text in (
        ("targets", batch["targets"][:, 1:], ValueError, r"targets must have shape \(2, 9\), got \(2, 8\)"),
        ("lengths", torch.tensor([3, 33]), ValueError, r"lengths must be in \[1, 33\), got 33"),
        ("input_ids", batch["input_ids"].int(), TypeError, "input_ids must be int64, got torch.int32"),
    ):
        with pytest.raises(error, match=text):
            task().check({**batch, key: value})


def test_spans_are_a_promise():
    """A saved run goes on with the same spans under any later version."""
    inputs, targets = task().corrupt(np.arange(60), Draws(1, 2, 3))
    assert inputs.tolist() == PROMISED and restored(inputs, targets) == list(range(60))


PROMISED = [
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 501, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 500, 28, 29, 30, 31, 32, 33, 34, 35, 36,
    37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 499, 301,
]  # fmt: skip
