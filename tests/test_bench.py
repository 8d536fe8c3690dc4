"""How kernels are timed, and what `fastlm kernels bench` makes of it."""

from __future__ import annotations

import gc

import pytest
import torch

from fastlm.testbed import roof, timing


class Clock:
    """A clock that stands still but for what the candidates take."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def candidate(self, *durations):
        """A function that takes the durations in turn, the last one for ever."""
        left = list(durations)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_first_call_is_timed_apart_and_median_is_of_the_others(clock):
    fast, slow = clock.candidate(9.0, 1.0), clock.candidate(5.0, 2.0)
    got = timing.interleaved({"fast": fast, "slow": slow}, device="cpu", seconds=30.0)
    assert (got["fast"].first, got["slow"].first) == (9.0, 5.0)
    assert (got["fast"].median, got["slow"].median) == (1.0, 2.0)
    assert got["fast"].rounds == got["slow"].rounds == 10  # 30 s in rounds of 3


def test_quartiles(clock):
    warm_up = 1  # one round of a quarter of no time
    t = timing.interleaved(
        {"f": clock.candidate(*[0.0] * (1 + warm_up), 5.0, 1.0, 3.0, 2.0, 4.0)},
        device="cpu", seconds=0.0, min_rounds=5,
    )["f"]  # fmt: skip
    assert t.samples == (5.0, 1.0, 3.0, 2.0, 4.0)
    assert (t.low, t.median, t.high) == (2.0, 3.0, 4.0)
    assert timing.Timing((7.0,), 1.0).low == timing.Timing((7.0,), 1.0).high == 7.0


def test_every_round_runs_all_in_a_shuffled_order():
    seen = []
    names = ["a", "b", "c"]
    timing.interleaved(
        {n: lambda n=n: seen.append(n) for n in names}, device="cpu", seconds=0.0, min_rounds=60, max_rounds=60
    )  # fmt: skip
    rounds = [tuple(seen[i : i + 3]) for i in range(6, len(seen), 3)]  # after the first call and the warm-up
    assert len(rounds) == 60 and all(sorted(r) == names for r in rounds)
    assert len(set(rounds)) == 6  # all orders come
    for place in range(3):  # and nobody has a place of its own
        assert all(10 <= sum(r[place] == n for r in rounds) <= 30 for n in names)


def test_drift_hits_all_alike(clock):
    """A machine that slows down threefold while it is measured leaves the ratio of two medians alone."""

    def drifting(seconds):
        def run():
            clock.now += seconds * (1.0 + clock.now / 2000.0)

        return run

    got = timing.interleaved({"one": drifting(1.0), "two": drifting(2.0)}, device="cpu", seconds=8000.0)
    assert got["one"].samples[-1] > 2.5 * got["one"].samples[0]
    assert abs(got["two"].median / got["one"].median - 2.0) <= 0.02


def test_short_functions_are_called_several_times_when_warm(clock):
    got = timing.interleaved({"f": clock.candidate(1e-5)}, device="cpu", seconds=0.01, cold=False)["f"]
    assert got.calls in (10, 11)  # a sample lasts 0.1 ms at the least
    assert abs(got.median - 1e-5) <= 1e-12
    got = timing.interleaved({"f": clock.candidate(1e-5)}, device="cpu", seconds=0.01, cold=True)["f"]
    assert got.calls == 1


def test_cold_writes_more_than_the_cache_before_every_sample(monkeypatch):
    flushed = []
    add = torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda t, n: (flushed.append(t.nbytes), add(t, n))[1])
    timing.interleaved({"f": lambda: None}, device="cpu", seconds=0.0, min_rounds=3)
    assert len(flushed) == 3
    assert min(flushed) > timing._last_level_cache()


def test_setup_runs_before_every_call_and_is_not_timed(clock):
    seen = []

    def setup(name):
        seen.append(name)
        clock.now += 100.0

    def run():
        seen.append("run")
        clock.now += 1.0

    got = timing.interleaved({"f": run}, device="cpu", seconds=0.0, setup=setup, cold=False)["f"]
    assert seen == ["f", "run"] * (len(seen) // 2)
    assert got.median == 1.0


def test_a_candidate_that_raises_is_named():
    def broken():
        raise ValueError("no such tile")

    with pytest.raises(timing.CandidateError, match=r"^bad: ValueError: no such tile$") as caught:
        timing.interleaved({"good": lambda: None, "bad": broken}, device="cpu", seconds=0.0)
    assert caught.value.name == "bad" and isinstance(caught.value.__cause__, ValueError)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("candidates", "options", "text"),
    [({}, {}, "candidates: got none"), ({"f": int}, {"min_rounds": 3, "max_rounds": 2}, "min_rounds: got 3")],
)
def test_bad_arguments(candidates, options, text):
    with pytest.raises(ValueError, match=text):
        timing.interleaved(candidates, device="cpu", **options)


def test_roof_is_the_slower_of_the_two_rates():
    r = roof.Roof("cpu", "float32", 100.0, (roof.Gemm(1, 1, 1, 0.01), roof.Gemm(10, 10, 10, 1.0)))
    assert [g.flop_per_s for g in r.gemms] == [200.0, 2000.0]
    assert r.flop_per_s == 2000.0
    assert (r.floor(4000.0, 100.0), r.bound(4000.0, 100.0)) == (2.0, "flops")
    assert (r.floor(2000.0, 300.0), r.bound(2000.0, 300.0)) == (3.0, "bytes")


def test_roof_is_measured(monkeypatch):
    monkeypatch.setitem(roof._COPY_BYTES, "cpu", 1 << 20)
    r = roof.measure("cpu", torch.float32, [(64, 32, 16), (8, 8, 8)], seconds=0.02)
    assert [(g.m, g.n, g.k) for g in r.gemms] == [(64, 32, 16), (8, 8, 8)]
    assert 1e8 <= r.bytes_per_s <= 1e13 and 1e5 <= r.flop_per_s <= 1e15
    assert r.as_dict()["flop_per_s"] == r.flop_per_s == max(g.flop_per_s for g in r.gemms)
