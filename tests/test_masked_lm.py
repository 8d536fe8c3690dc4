"""Masked language modelling: what is masked, which pairs are drawn, and that all of it is a function of the place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import DataError, Draws, SampleLoader, SampleValidation
from fastlm.data.order import EpochOrder, LengthOrder
from fastlm.tasks import MaskedLM, MaskedText

CLS, SEP, PAD, MASK = 1, 2, 0, 3
VOCAB = 1000
quick = settings(max_examples=40, deadline=None)


def task(seq: int = 32, **options) -> MaskedLM:
    continues = np.zeros(VOCAB, dtype=bool)
    continues[VOCAB // 2 :] = True
    return MaskedLM(VOCAB, seq, CLS, SEP, PAD, MASK, np.arange(4, VOCAB), continues, **options)


def corpus(documents: int = 12, length: int = 90, seed: int = 0) -> np.ndarray:
    """Documents of different lengths; token 10 + d begins and ends every piece of five tokens of document d."""
    rng = np.random.default_rng(seed)
    pieces = []
    for document in range(documents):
        tokens = rng.integers(100, VOCAB, length - document)
        tokens[::5] = 10 + document
        pieces += [tokens, [SEP]]
    return np.concatenate(pieces).astype(np.uint16)


@quick
@given(st.integers(4, 40), st.integers(0, 10**6), st.floats(0.05, 0.6), st.booleans())
def test_masking_by_its_rules(length, seed, rate, whole_word):
    rng = np.random.default_rng(seed)
    ids = np.concatenate(([CLS], rng.integers(4, VOCAB, length), [SEP], rng.integers(4, VOCAB, length), [SEP]))
    one = task(3 + 2 * length if length > 4 else 11, mask_rate=rate, whole_word=whole_word)
    positions, targets, seen = one.mask(ids, Draws(seed, 0, 0))
    assert (np.diff(positions) > 0).all() and len(positions) <= one.most
    assert not np.isin(ids[positions], (CLS, SEP)).any() and (targets == ids[positions]).all()
    untouched = np.setdiff1d(np.arange(len(ids)), positions)
    assert (seen[untouched] == ids[untouched]).all()
    wanted = min(one.most, max(1, round(rate * len(ids))))
    if not whole_word:
        assert len(positions) == wanted
        return
    chosen = set(positions.tolist())
    for place in range(1, len(ids) - 1):  # a piece that continues a word is chosen with the one before it, or neither is
        if one.continues[ids[place]] and ids[place - 1] not in (CLS, SEP) and ids[place] != SEP:
            assert (place in chosen) == (place - 1 in chosen)


def test_eighty_ten_ten():
    one, ids = task(512, mask_rate=0.5), np.full(509, 777)
    counts = np.zeros(3)
    others = []
    for place in range(40):
        positions, _, seen = one.mask(ids, Draws(0, 0, place))
        new = seen[positions]
        counts += ((new == MASK).sum(), (new == 777).sum(), ((new != MASK) & (new != 777)).sum())
        others += new[(new != MASK) & (new != 777)].tolist()
    total = counts.sum()
    assert total == 40 * round(0.5 * len(ids))
    for share, exact in zip(counts / total, (0.8, 0.1, 0.1), strict=True):
        assert abs(share - exact) <= 5 * (exact * (1 - exact) / total) ** 0.5
    assert min(others) >= 4 and len(set(others)) > 500


def rows_of(samples: MaskedText, count: int):
    batch = samples.empty(count, samples.seq_len)
    for row in range(count):
        samples.fill(batch, row, row % samples.count, Draws(5, row, row))
    return batch


@pytest.mark.parametrize("whole_word", [False, True])
def test_rows_are_pairs_of_one_document_or_of_two(whole_word):
    samples = MaskedText(task(whole_word=whole_word), corpus())
    batch = rows_of(samples, 400)
    samples.task.check(batch)
    shortened = 0
    for row in range(400):
        n = int(batch["lengths"][row])
        ids = batch["input_ids"][row].clone()
        counted = batch["targets"][row] != -100
        assert counted.any() and (batch["positions"][row][~counted] == 0).all()
        ids[batch["positions"][row][counted]] = batch["targets"][row][counted]
        assert ids[0] == CLS and ids[n - 1] == SEP and (ids[n:] == PAD).all()
        (ends,) = (ids == SEP).nonzero(as_tuple=True)
        assert len(ends) == 2
        types = batch["token_type_ids"][row]
        first = int(ends[0])
        assert not types[: first + 1].any() and types[first + 1 : n].all() and not types[n:].any()
        a, b = ids[1:first], ids[first + 1 : n - 1]
        marks = [set((part[part < 100] - 10).tolist()) for part in (a, b)]
        assert all(len(m) <= 1 for m in marks), "a segment lies in one document"
        if marks[0] and marks[1]:
            assert (marks[0] == marks[1]) == (batch["next_sentence"][row] == 0)
        shortened += n < 20
    share = (batch["next_sentence"] == 0).double().mean().item()
    assert abs(share - 0.5) <= 5 * 0.5 / 20
    assert 0 < shortened < 120


def test_what_follows_is_what_followed():
    """With nothing masked away, a pair that follows is a stretch of the corpus, and one that does not is not."""
    tokens = np.arange(4, 900).astype(np.uint16)
    tokens[400] = SEP
    samples = MaskedText(task(), np.append(tokens, SEP))
    batch = rows_of(samples, 200)
    for row in range(200):
        ids, counted = batch["input_ids"][row].clone(), batch["targets"][row] != -100
        ids[batch["positions"][row][counted]] = batch["targets"][row][counted]
        n = int(batch["lengths"][row])
        first = int((ids == SEP).nonzero()[0])
        a, b = ids[1:first], ids[first + 1 : n - 1]
        assert (a.diff() == 1).all() and (b.diff() == 1).all()
        assert (b[0] == a[-1] + 1) == (batch["next_sentence"][row] == 0)


def test_without_next_sentence_rows_are_single():
    samples = MaskedText(task(next_sentence=False), corpus())
    batch = next(SampleLoader(samples, 6))
    assert set(batch) == {"input_ids", "token_type_ids", "lengths", "positions", "targets"}
    assert not batch["token_type_ids"].any() and ((batch["input_ids"] == SEP).sum(1) == 1).all()


def taken(loader, count):
    return [next(loader) for _ in range(count)]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_place_is_the_whole_state(prefetch):
    samples = MaskedText(task(), corpus())
    whole = taken(SampleLoader(samples, 4, seed=3), 30)
    loader = SampleLoader(samples, 4, seed=3, prefetch=prefetch)
    assert all(same(a, b) for a, b in zip(taken(loader, 11), whole, strict=False))
    state = loader.state_dict()
    next(loader)
    again = SampleLoader(MaskedText(task(), corpus()), 4, seed=3, prefetch=prefetch)
    again.load_state_dict(state)
    assert again.tokens == sum(int(batch["lengths"].sum()) for batch in whole[:11])
    assert all(same(a, b) for a, b in zip(taken(again, 19), whole[11:], strict=True))
    again.load_state_dict(state)  # back to where it was
    assert same(next(again), whole[11])
    # other batch sizes and ranks cut the same rows differently
    double = next(SampleLoader(samples, 8, seed=3))
    ranks = [next(SampleLoader(samples, 4, seed=3, rank=r, world_size=2)) for r in range(2)]
    for key, value in double.items():
        assert torch.equal(value, torch.cat([b[key] for b in whole[:2]]))
        assert torch.equal(value, torch.cat([b[key] for b in ranks]))


def test_epochs_differ_and_each_has_every_window():
    samples = MaskedText(task(), corpus())
    loader = SampleLoader(samples, samples.count, seed=0)
    first, second = taken(loader, 2)
    assert loader.epoch == 2
    assert not torch.equal(first["targets"], second["targets"])
    assert sorted(EpochOrder(0, 1, samples.count)(np.arange(samples.count))) == list(range(samples.count))


def test_a_position_of_something_else_is_refused():
    samples = MaskedText(task(), corpus())
    state = SampleLoader(samples, 4, seed=3).state_dict()
    for other, text in (
        (SampleLoader(samples, 4, seed=4), "seed was 3 and is now 4"),
        (SampleLoader(MaskedText(task(mask_rate=0.2), corpus()), 4, seed=3), "mask_rate was 0.15 and is now 0.2"),
        (SampleLoader(MaskedText(task(), corpus(seed=1)), 4, seed=3), "tokens_sha256 was"),
    ):
        with pytest.raises(DataError, match=text):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="next_sample is -1"):
        SampleLoader(samples, 4, seed=3).load_state_dict({**state, "next_sample": -1})


def test_validation_is_the_same_each_time_and_has_each_window_once():
    samples = MaskedText(task(), corpus())
    batches = list(SampleValidation(samples, 7))
    assert all(same(a, b) for a, b in zip(batches, SampleValidation(samples, 7), strict=True))
    rows = sum(int((b["next_sentence"] != -100).sum()) for b in batches)
    assert rows == samples.count and {tuple(b["input_ids"].shape) for b in batches} == {(7, 32)}
    assert len(list(SampleValidation(samples, 7, most=10))) == 2
    count, nats = samples.task.baseline(batches)
    assert count == sum(int((b["targets"] != -100).sum()) for b in batches)
    assert 0.69 < nats <= np.log(count) + np.log(2)


def test_metrics_by_hand():
    one = task()
    batch = {"next_sentence": torch.tensor([0, 1, 1, -100]), "targets": torch.tensor([[5, -100]])}
    evaluation = one.evaluation()
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 9.0]])
    evaluation.add_batch([6.0, 1.5], [3, 3], batch, {"next_sentence": logits})
    evaluation.add_batch([2.0, 0.5], [1, 1], {"next_sentence": torch.tensor([0])}, {"next_sentence": logits[:1]})
    found = evaluation.result()
    assert abs(found.loss - (8 / 4 + 2 / 4)) <= 1e-12 and found.targets == 4
    assert found.values == {"masked_lm_loss": 2.0, "next_sentence_loss": 0.5, "next_sentence_accuracy": 0.75}
    assert found.text() == (
        "validation loss 2.5000, masked lm loss 2.0000, next sentence loss 0.5000, next sentence accuracy 0.7500"
    )
    with pytest.raises(ValueError, match="every target was ignored"):
        one.evaluation().result()


def test_bad_arguments_are_named():
    for options, text in (({"mask_rate": 0.0}, "mask_rate must be above 0"), ({"seq": 10}, "seq_len must be at least 11")):
        with pytest.raises(ValueError, match=text):
            task(**options)
    with pytest.raises(DataError, match="too few tokens: no document has 8 of them"):
        MaskedText(task(), np.array([5, 6, SEP, 7, SEP]))
    with pytest.raises(DataError, match="pairs need two windows"):
        MaskedText(task(), np.append(np.arange(10, 20), SEP))
    batch = rows_of(MaskedText(task(), corpus()), 2)
    one = task()
    for key, value, error, text in (
        ("positions", batch["positions"].int(), TypeError, "positions must be int64, got torch.int32"),
        ("targets", batch["targets"][:, 1:], ValueError, r"targets must have shape \(2, 5\), got \(2, 4\)"),
        ("lengths", torch.tensor([3, 33]), ValueError, r"lengths must be in \[1, 33\), got 33 at \[1\]"),
        ("next_sentence", torch.tensor([2, 0]), ValueError, r"next_sentence must be in \[0, 2\) or -100, got 2"),
    ):
        with pytest.raises(error, match=text):
            one.check({**batch, key: value})
    with pytest.raises(ValueError, match=r"a batch must hold input_ids, .*next_sentence, got"):
        one.check({k: v for k, v in batch.items() if k != "positions"})


@quick
@given(st.integers(1, 5000), st.integers(0, 99), st.integers(0, 5))
def test_length_order_groups_like_lengths(count, seed, epoch):
    lengths = np.random.default_rng(seed).integers(1, 400, count)
    order = LengthOrder(seed, epoch, lengths)
    samples = LengthOrder.samples(count)
    found = order(np.arange(samples))
    assert len(set(found.tolist())) == samples and found.min() >= 0 and found.max() < count
    if count >= 2 * LengthOrder.POOL:
        groups = lengths[found].reshape(-1, LengthOrder.GROUP)
        assert np.median(np.ptp(groups, axis=1)) <= 40  # of 400 without sorting


def test_draws_are_a_promise():
    """A saved run goes on with the same masks under any later version."""
    assert Draws(1, 2, 3).uniform(3).tolist() == PROMISED
    assert Draws(1, 2, 3).permutation(8).tolist() == PERMUTED
    many = Draws(0, 0, 0).uniform(20_000)
    assert abs(many.mean() - 0.5) <= 0.02 and many.min() >= 0 and many.max() < 1
    assert Draws(0, 0, 1).uniform(1) != Draws(0, 1, 0).uniform(1) != Draws(1, 0, 0).uniform(1)


PROMISED = [0.6681493525759477, 0.8485263605689638, 0.6577622492216664]
PERMUTED = [3, 6, 7, 2, 0, 5, 1, 4]
