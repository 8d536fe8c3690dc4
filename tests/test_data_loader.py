"""Tokens to batches: order, resumption, coverage."""

from __future__ import annotations

import gc
import itertools
import json
import math
import threading
import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import DataError, Loader, TokenSplit, ValidationLoader
from fastlm.data.order import EpochOrder

quick = settings(max_examples=40, deadline=None)
SIZES = {"batch_size": st.integers(1, 5), "seq_len": st.integers(1, 9), "extra": st.integers(1, 300)}


def places(count: int) -> np.ndarray:
    """Tokens that say where they stand."""
    return np.arange(count, dtype=np.uint16)


def taken(loader: Loader, steps: int) -> list[list[int]]:
    """The inputs of every sample of some batches."""
    return [row for _ in range(steps) for row in next(loader)["input_ids"].tolist()]


# The order


@quick
@given(st.integers(), st.integers(0, 1 << 40), st.integers(1, 3000))
def test_order_is_a_permutation(seed, epoch, count):
    order = EpochOrder(seed, epoch, count)
    whole = order(np.arange(count))
    assert sorted(whole.tolist()) == list(range(count))
    some = np.arange(0, count, 7)
    assert np.array_equal(order(some), whole[some]), "each value depends on its own index alone"


def test_order_never_changes_between_versions():
    assert EpochOrder(0, 0, 10)(np.arange(10)).tolist() == [2, 7, 5, 3, 6, 8, 0, 1, 9, 4]
    assert EpochOrder(1234, 5, 1 << 40)(np.array([0, 1, 1 << 39])).tolist() == [
        270149295785,
        631994309889,
        285974983060,
    ]
    assert [EpochOrder(7, epoch, 3).shift(999) for epoch in range(3)] == [607, 182, 752]


def test_order_of_a_long_epoch_takes_no_memory_and_stays_in_range():
    count = (1 << 61) + 12345
    found = EpochOrder(3, 1, count)(np.arange(100_000) * (count // 100_000))
    assert len(set(found.tolist())) == 100_000
    assert found.min() >= 0 and found.max() < count
    # Uniform over the range: each of 100 equal parts gets 1000 of them, within 5 standard deviations.
    parts = np.bincount(found // (count // 100 + 1), minlength=100)
    assert np.abs(parts - 1000).max() <= 5 * math.sqrt(1000)
    with pytest.raises(ValueError, match="count must be at least 1"):
        EpochOrder(0, 0, 0)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 10, 30])
def test_order_puts_every_sample_everywhere_equally_often(count):
    epochs = 2000
    seen = np.zeros((count, count))
    for epoch in range(epochs):
        seen[np.arange(count), EpochOrder(1, epoch, count)(np.arange(count))] += 1
    expected = epochs / count
    chi2 = ((seen - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(chi2 - freedom) <= 5 * math.sqrt(2 * freedom) + 5


def test_neighbours_and_epochs_are_not_related():
    first, second = (EpochOrder(1, epoch, 10_000)(np.arange(10_000)) for epoch in (0, 1))
    bound = 5 / math.sqrt(10_000)
    for a, b in ((first, np.arange(10_000)), (first[1:], first[:-1]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) <= bound
    assert (first == second).sum() <= 10
    assert np.mean(EpochOrder(1, 0, 1000)(np.arange(1000)) == EpochOrder(2, 0, 1000)(np.arange(1000))) <= 0.01


# Training batches


@quick
@given(**SIZES, seed=st.integers())
def test_a_batch_is_windows_and_their_next_tokens(batch_size, seq_len, extra, seed):
    tokens = places(seq_len + extra)
    loader = Loader(tokens, batch_size, seq_len, seed)
    for _ in range(5):
        batch = next(loader)
        assert set(batch) == {"input_ids", "targets"}
        for tensor in batch.values():
            assert tensor.shape == (batch_size, seq_len) and tensor.dtype == torch.int64
        assert torch.equal(batch["input_ids"], batch["input_ids"][:, :1] + torch.arange(seq_len))
        assert torch.equal(batch["targets"], batch["input_ids"] + 1)
        assert batch["targets"].max() < len(tokens)


@quick
@given(seq_len=SIZES["seq_len"], extra=SIZES["extra"])
def test_an_epoch_has_no_window_twice_and_leaves_less_than_two_out(seq_len, extra):
    tokens = places(seq_len + extra)
    loader = Loader(tokens, 1, seq_len, 5)
    for _ in range(3):
        targets = [t for _ in range(loader.windows) for t in next(loader)["targets"].flatten().tolist()]
        assert len(set(targets)) == len(targets)
        assert len(tokens) - 1 - len(targets) < 2 * seq_len
    assert loader.epoch == 3


def test_borders_move_and_every_token_is_learnt():
    tokens, seq_len = places(100), 16
    loader = Loader(tokens, 1, seq_len)
    seen, offsets = set(), Counter()
    for _ in range(400):
        epoch = [next(loader) for _ in range(loader.windows)]
        seen.update(t for batch in epoch for t in batch["targets"].flatten().tolist())
        offsets[min(int(batch["input_ids"].min()) for batch in epoch)] += 1
    assert seen == set(range(1, 100))
    assert set(offsets) == set(range(20)), "99 targets, 5 windows of 16: 19 to spare"
    assert max(offsets.values()) <= 20 + 5 * math.sqrt(20)


@quick
@given(**SIZES, seed=st.integers(0, 99), world=st.integers(1, 5), steps=st.integers(1, 6))
def test_ranks_share_out_exactly_what_one_process_takes(batch_size, seq_len, extra, seed, world, steps):
    tokens = places(seq_len + extra)
    alone = Loader(tokens, batch_size * world, seq_len, seed)
    ranks = [
        Loader(tokens, batch_size, seq_len, seed, rank=r, world_size=world, prefetch=r % 3)
        for r in range(world)
    ]
    for _ in range(steps):
        assert [row for rank in ranks for row in taken(rank, 1)] == taken(alone, 1)
    assert {rank.cursor for rank in ranks} == {alone.cursor}
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


@quick
@given(**SIZES, before=st.integers(0, 8), other=st.integers(1, 5), prefetch=st.sampled_from([0, 1, 3]))
def test_resumed_at_any_point_is_the_same_as_not_interrupted(
    batch_size, seq_len, extra, before, other, prefetch
):
    tokens = places(seq_len + extra)
    whole = taken(Loader(tokens, 1, seq_len, 9), 60)
    loader = Loader(tokens, batch_size, seq_len, 9, prefetch=prefetch)
    head = taken(loader, before)
    state = json.loads(json.dumps(loader.state_dict()))
    tail = Loader(tokens, other, seq_len, 9, prefetch=prefetch)
    taken(tail, 1)  # so that what its thread made ready is of no use
    tail.load_state_dict(state)
    assert tail.cursor == before * batch_size
    rest = taken(tail, 3)
    assert head + rest == whole[: len(head + rest)]
    # And with another number of processes, from the same place.
    ranks = [Loader(tokens, 1, seq_len, 9, rank=r, world_size=other) for r in range(other)]
    for rank in ranks:
        rank.load_state_dict(state)
    assert [row for _ in range(3) for rank in ranks for row in taken(rank, 1)] == rest


@quick
@given(**SIZES, seed=st.integers(0, 9), world=st.integers(1, 3))
def test_contiguous_rows_go_on_from_call_to_call(batch_size, seq_len, extra, seed, world):
    """Each row walks through the text window by window, and together they read every window once a round."""
    rows = batch_size * world
    tokens = places(rows * seq_len + extra)
    loaders = [
        Loader(tokens, batch_size, seq_len, seed, rank=r, world_size=world, contiguous=True) for r in range(world)
    ]
    calls = (len(tokens) - 1) // seq_len // rows
    end = calls * rows * seq_len  # where the last window ends
    follows = None  # what each row must begin with
    for _ in range(2):
        seen = []
        for _ in range(calls):
            batches = [next(loader) for loader in loaders]
            got = torch.cat([b["input_ids"] for b in batches])
            assert follows is None or torch.equal(got[:, 0], follows)
            follows = torch.cat([b["targets"] for b in batches])[:, -1] % end
            seen += got.flatten().tolist()
        assert sorted(seen) == list(range(end))
    assert loaders[0].epoch == 2


def test_contiguous_rows_resume_and_refuse():
    tokens = places(200)
    whole, cut = (Loader(tokens, 3, 7, contiguous=True, prefetch=n) for n in (0, 2))
    taken(cut, 5)
    again = Loader(tokens, 3, 7, contiguous=True)
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert taken(again, 20) == taken(whole, 25)[15:]
    with pytest.raises(DataError, match="contiguous_rows was 3 and is now 4"):
        Loader(tokens, 4, 7, contiguous=True).load_state_dict(cut.state_dict())
    with pytest.raises(DataError, match="too few tokens: 20, and 3 contiguous rows of seq_len 7 need 22"):
        Loader(places(20), 3, 7, contiguous=True)


def test_state_of_other_data_is_refused():
    state = Loader(places(100), 2, 8, 3).state_dict()
    changed = places(100)
    changed[50] = 0
    for loader, message in (
        (Loader(places(100), 2, 8, 4), "seed was 3 and is now 4"),
        (Loader(places(100), 2, 9, 3), "seq_len was 8 and is now 9"),
        (Loader(places(101), 2, 8, 3), "tokens was 100 and is now 101; tokens_sha256 was"),
        (Loader(changed, 2, 8, 3), "cannot be restored: tokens_sha256 was '[0-9a-f]{64}' and is now"),
    ):
        with pytest.raises(DataError, match=message):
            loader.load_state_dict(state)
        assert loader.cursor == 0
    with pytest.raises(DataError, match="seed was 'not saved' and is now 3"):
        Loader(places(100), 2, 8, 3).load_state_dict({})
    for wrong in (-1, 1.5, None, True):
        with pytest.raises(DataError, match=f"next_sample is {wrong}"):
            Loader(places(100), 2, 8, 3).load_state_dict({**state, "next_sample": wrong})
    split = TokenSplit("training", places(100), 1, 100, "known from the file")
    assert Loader(split, 2, 8).state_dict()["tokens_sha256"] == "known from the file"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_given_buffers_are_filled_and_nothing_is_allocated(prefetch):
    tokens = places(500)
    expected = Loader(tokens, 3, 8)
    loader = Loader(tokens, 3, 8, prefetch=prefetch)
    wide = torch.zeros(3, 16, dtype=torch.int64)
    out = {"input_ids": wide[:, ::2], "targets": torch.zeros(3, 8, dtype=torch.int64)}
    places_before = [tensor.data_ptr() for tensor in out.values()]
    loader.next_batch(out)
    next(expected)
    for _ in range(200):
        with mock.patch("torch.empty", side_effect=AssertionError("allocated")):
            batch = loader.next_batch(out)
        assert batch is out
        for name, tensor in next(expected).items():
            assert torch.equal(out[name], tensor)
    assert [tensor.data_ptr() for tensor in out.values()] == places_before
    assert not wide[:, 1::2].any(), "nothing beside the buffer is touched"


def test_batches_that_are_kept_stay_as_they_were():
    for prefetch in (0, 2):
        kept = list(itertools.islice(Loader(places(300), 2, 8, prefetch=prefetch), 20))
        assert [row for batch in kept for row in batch["input_ids"].tolist()] == taken(
            Loader(places(300), 2, 8), 20
        )


def test_prefetch_changes_nothing_reports_failure_and_ends_with_its_loader():
    loader = Loader(places(300), 2, 8, prefetch=3)
    assert taken(loader, 50) == taken(Loader(places(300), 2, 8), 50)
    one = Loader(places(300), 2, 8, world_size=2, prefetch=3)
    with mock.patch.object(one._source, "fill", wraps=one._source.fill) as filled:
        taken(one, 50)
        assert filled.call_count <= 53, "nothing is made that is not used"
    del one
    fill = loader._source.fill
    with mock.patch.object(loader._source, "fill", side_effect=OSError("gone")):
        state = loader.state_dict()
        with pytest.raises(OSError, match="gone"):
            for _ in range(5):
                state = loader.state_dict()
                next(loader)
        assert loader.state_dict() == state, "what failed was not consumed"
    loader._source.fill = fill
    threads = [t for t in threading.enumerate() if t.name.startswith("fastlm-prefetch")]
    assert threads
    del loader, fill
    deadline = time.monotonic() + 30
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        gc.collect()  # the failure's traceback knew the loader, and so does the thread while it fills a batch
        time.sleep(0.01)
    assert not [thread for thread in threads if thread.is_alive()]


def test_wrong_arguments_are_named():
    cases = (
        (DataError, "too few tokens: 8, and one window of seq_len 8 needs 9", (places(8), 1, 8), {}),
        (ValueError, "batch_size must be at least 1, got 0", (places(9), 0, 8), {}),
        (ValueError, "seq_len must be at least 1, got 0", (places(9), 1, 0), {}),
        (ValueError, "world_size must be at least 1, got 0", (places(9), 1, 8), {"world_size": 0}),
        (
            ValueError,
            r"rank must be in \[0, world_size=2\), got 2",
            (places(9), 1, 8),
            {"rank": 2, "world_size": 2},
        ),
        (TypeError, "must be a 1-d integer array, got 1-d float64", (np.ones(9), 1, 8), {}),
        (TypeError, "must be a 1-d integer array, got 2-d uint16", (places(18).reshape(2, 9), 1, 8), {}),
    )
    for error, message, arguments, keywords in cases:
        for loader in (Loader, ValidationLoader):
            with pytest.raises(error, match=message):
                loader(*arguments, **keywords)
    with pytest.raises(DataError, match=r"too few validation tokens: 0, .*another validation fraction"):
        ValidationLoader(TokenSplit("validation", places(0), 0, 0, ""), 1, 8)
    with pytest.raises(ValueError, match="prefetch must be at least 0, got -1"):
        Loader(places(9), 1, 8, prefetch=-1)
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        ValidationLoader(places(9), 1, 8, windows=0)
    assert Loader(places(9), 1, 8).windows == 1
    good = torch.zeros(2, 8, dtype=torch.int64)
    for out, message in (
        ({"input_ids": good}, r"out must hold 'input_ids' and 'targets', got \['input_ids'\]"),
        (
            {"input_ids": good, "targets": good.int()},
            r"out\['targets'\] must be an int64 CPU tensor .*got torch.int32",
        ),
        (
            {"input_ids": good[:1], "targets": good},
            r"out\['input_ids'\] .*of shape \(2, 8\), got .*shape \(1, 8\)",
        ),
        ({"input_ids": good, "targets": good.to("meta")}, r"got torch.int64 on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(places(99), 2, 8).next_batch(out)


# Validation batches


@quick
@given(**SIZES, world=st.integers(1, 4))
def test_validation_has_every_target_once_in_order(batch_size, seq_len, extra, world):
    tokens = places(seq_len + extra)
    ranks = [ValidationLoader(tokens, batch_size, seq_len, rank=r, world_size=world) for r in range(world)]
    steps = list(zip(*ranks, strict=True))  # strict: every rank has as many batches
    assert len(steps) == len(ranks[0])
    seen = []
    for batch in itertools.chain.from_iterable(steps):
        inputs, targets = batch["input_ids"], batch["targets"]
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        counted = targets != -100
        assert torch.equal(inputs[counted] + 1, targets[counted])
        assert not inputs[~counted].any()
        seen += targets[counted].tolist()
    assert seen == list(range(1, len(tokens)))


def test_part_of_validation_is_spread_over_it_and_the_buffer_is_reused():
    tokens = places(1001)
    some = ValidationLoader(tokens, 2, 10, windows=5)
    starts = [row[0] for batch in some for row in batch["input_ids"].tolist()]
    assert starts == [0, 200, 400, 600, 800, 0], "the last row is padding"
    assert [b["targets"][1].tolist() for b in some][-1] == [-100] * 10
    assert ValidationLoader(tokens, 2, 10, windows=10_000).windows == 100
    out = {name: torch.full((2, 10), 7) for name in ("input_ids", "targets")}
    fresh = [{k: v.clone() for k, v in b.items()} for b in some.batches(out)]
    assert all(b is out for b in some.batches(out))
    for ours, theirs in zip(fresh, some, strict=True):
        assert all(torch.equal(ours[k], theirs[k]) for k in out)
