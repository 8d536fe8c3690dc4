"""Sampling: distributions against their definitions, written out token by token."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.generate import choose, generate, probabilities, stream_text


def by_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """In plain Python: softmax, then the k first, then the shortest prefix that reaches p."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    p = [w / math.fsum(weights) for w in weights]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    order = order[:top_k]
    total = math.fsum(p[i] for i in order)
    if top_p is not None:
        reached, kept = 0.0, []
        for i in order:
            kept.append(i)
            reached += p[i] / total
            if reached >= top_p:
                break
        order, total = kept, math.fsum(p[i] for i in kept)
    return [p[i] / total if i in order else 0.0 for i in range(len(p))]


LOGITS = st.lists(st.floats(-20, 20), min_size=1, max_size=12)


@given(LOGITS, st.floats(0.1, 5), st.none() | st.integers(1, 15), st.none() | st.floats(0.01, 1))
@settings(max_examples=300, deadline=None)
def test_against_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    found = probabilities(values, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = torch.tensor(by_definition(logits, temperature, top_k, top_p), dtype=torch.float64)
    assert found.dtype == torch.float64 and abs(found.sum() - 1) <= 1e-12
    if top_p is not None:  # where the sum comes within rounding of p, one token more or less is right
        full = torch.tensor(by_definition(logits, temperature, top_k, None), dtype=torch.float64)
        reached = torch.cumsum(full.sort(descending=True).values, 0)
        if ((reached - top_p).abs() < 1e-12).any():
            return
    assert torch.equal(found > 0, expected > 0)
    assert (found - expected).abs().max() <= 1e-12


def test_sets_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = {
        (1, None): [1],
        (2, None): [1, 3],
        (9, None): [0, 1, 2, 3],
        (None, 0.4): [1],
        (None, 0.41): [1, 3],
        (None, 0.69): [1, 3],
        (None, 0.8): [1, 2, 3],
        (None, 1.0): [0, 1, 2, 3],
        (2, 0.5): [1],  # 0.4 / 0.7 > 0.5: renormalised before top_p
        (3, 0.5): [1, 3],  # 0.4 / 0.9 < 0.5
    }
    for (top_k, top_p), expected in kept.items():
        found = probabilities(logits, top_k=top_k, top_p=top_p)
        assert found.nonzero().flatten().tolist() == expected, (top_k, top_p)
    ties = torch.zeros(5)
    assert probabilities(ties, top_k=2).tolist() == [0.5, 0.5, 0, 0, 0]
    assert probabilities(ties, top_p=0.5).nonzero().flatten().tolist() == [0, 1, 2]
    assert probabilities(ties, temperature=0).tolist() == [1, 0, 0, 0, 0]
    assert probabilities(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]  # 0.25 + 0.25 reaches 0.5
    many = torch.arange(6000) % 3
    assert probabilities(many.float(), top_k=900).nonzero().flatten().tolist() == list(range(2, 2700, 3))


def test_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0])
    assert torch.allclose(probabilities(logits, temperature=0.5), torch.softmax(2 * logits.double(), 0))
    assert probabilities(logits, temperature=0, top_k=2, top_p=0.5).tolist() == [0, 0, 1]
    assert probabilities(logits, temperature=1e-30).tolist() == [0, 0, 1]
    assert probabilities(torch.tensor([-math.inf, 0.0, 0.0])).tolist() == [0, 0.5, 0.5]
    assert probabilities(torch.tensor([1e4, -1e4], dtype=torch.bfloat16)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1, allowed: finite numbers from 0"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"top_k": 0}, "top_k: got 0, allowed: None or 1 and more"),
        ({"top_p": 0.0}, "top_p: got 0.0, allowed: None or 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"top_p": math.nan}, "top_p: got nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        probabilities(torch.zeros(3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits(bad: float) -> None:
    for values in ([0.0, bad], [bad, bad]):
        with pytest.raises(ValueError, match="logits: got NaN, \\+inf or nothing but -inf"):
            probabilities(torch.tensor(values))
    with pytest.raises(ValueError, match="logits: got NaN"):
        probabilities(torch.full((3,), -math.inf))
    with pytest.raises(ValueError, match=r"logits: got shape \(1, 3\), allowed: \(vocab,\)"):
        probabilities(torch.zeros(1, 3))


def test_choices_follow_the_distribution() -> None:
    """Pearson's chi-square over 20,000 draws; with 4 degrees of freedom 23.5 is exceeded once in 10,000."""
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.08, 0.02, 0.0], dtype=torch.float64)
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(p), dtype=torch.float64)
    for _ in range(draws):
        counts[choose(p, generator)] += 1
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 23.5


def test_choice_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    for uniform, expected in ((0.0, 1), (0.25, 3), (math.nextafter(0.25, 0), 1), (math.nextafter(1, 0), 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.tensor(u, dtype=torch.float64))
        assert choose(p) == expected, uniform


class Recorder:
    """Logits that say: after token t comes t + 1."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.windows: list[list[int]] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.windows.append(ids[0].tolist())
        return 50.0 * torch.nn.functional.one_hot((ids + 1) % self.vocab, self.vocab)


def test_context_is_the_last_tokens() -> None:
    model = Recorder(10)
    assert list(generate(model, [3, 4], 5, context=4, temperature=0)) == [5, 6, 7, 8, 9]
    assert model.windows == [[3, 4], [3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7], [5, 6, 7, 8]]
    model = Recorder(10)
    assert list(generate(model, list(range(9)), 1, context=3)) == [9]
    assert model.windows == [[6, 7, 8]]


def test_stop_and_limits() -> None:
    assert list(generate(Recorder(10), [3], 9, context=4, stop=7)) == [4, 5, 6]
    assert list(generate(Recorder(10), [3], 0, context=4)) == []
    # 9 would come next, but only ids below 8 may be chosen: the rest are all equal
    chosen = list(generate(Recorder(10), [7], 50, context=1, temperature=1e9, vocab_size=8))
    assert max(chosen) <= 7 and len(set(chosen)) > 4
    for prompt, options, message in (
        ([], {}, "prompt: got no token"),
        ([1], {"context": 0}, "context: got 0"),
        ([1, 11], {"vocab_size": 10}, "prompt: got ids 1 to 11, allowed: 0 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            next(generate(Recorder(10), prompt, 1, **({"context": 4} | options)))


def test_seed_decides() -> None:
    def run(seed: int) -> list[int]:
        def model(ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 100)

        return list(generate(model, [0], 20, context=8, generator=torch.Generator().manual_seed(seed)))

    assert run(1) == run(1) != run(2)


class Bytes:
    """One token a byte, decoded as the real tokenizers do."""

    def decode(self, ids: list[int], errors: str = "strict") -> str:
        return bytes(ids).decode(errors=errors)


def test_text_is_never_cut_inside_a_character() -> None:
    text = "a\u00e9\u20ac\U0001f600z"
    pieces = list(stream_text(Bytes(), text.encode()))
    assert pieces == list(text)  # each as soon as it is whole
    broken = b"a\xe2\x82z\xff\xf0\x9f"
    assert "".join(stream_text(Bytes(), broken)) == broken.decode(errors="replace")
    assert list(stream_text(Bytes(), [])) == []
