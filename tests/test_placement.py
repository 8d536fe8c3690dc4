"""Where tensors lie: nothing that lives at once overlaps, and little is needed."""

from __future__ import annotations

import itertools
import random

import pytest

from fastlm.engine.placement import ALIGN, Part, place


def _frame(seed: int, lent: int) -> tuple[list[tuple[int, int, int]], list[tuple[Part, int]]]:
    """Tensors (born, died, bytes), many of which die in the reverse of the order of their birth, and the loan's parts."""
    draw = random.Random(seed)
    end = 240
    tensors = []
    for born in range(0, end, 2):
        died = end - born if born < end // 2 and draw.random() < 0.6 else min(end, born + draw.randint(1, 20))
        tensors.append((born, died, ALIGN * draw.randint(1, 40)))
    cuts = sorted({0, lent, *(64 * draw.randint(1, max(1, lent // 64)) for _ in range(12))} if lent else ())
    parts = [Part(low, high) for low, high in itertools.pairwise(cuts) if high <= lent]
    times = [draw.choice([-1, *range(end // 2 + 1, end, 2)]) for _ in parts]
    return tensors, list(zip(parts, times, strict=True))


@pytest.mark.parametrize("lent", [0, 64 * 1000, 64 * 6400 + 64])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_overlaps_and_little_is_needed(seed, lent):
    tensors, taken = _frame(seed, lent)
    offsets = place(tensors, taken, lent)
    spans = [(o, o + size) for o, (_, _, size) in zip(offsets, tensors, strict=True)]
    for (low, high), (_, died, _) in zip(spans, tensors, strict=True):
        assert low % ALIGN == 0
        assert high <= lent or low >= lent, "on both sides of the end of the loan"
        for part, at in taken:
            assert at >= died or high <= part.start or low >= part.end, "in a part that was taken"
    for a, b in itertools.combinations(range(len(tensors)), 2):
        if tensors[a][0] < tensors[b][1] and tensors[b][0] < tensors[a][1]:
            assert spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0], "two at once"
    need = max(high for _, high in spans) - lent
    most = max(
        sum(size for born, died, size in tensors if born <= now < died)
        + sum(part.end - part.start for part, at in taken if at <= now)
        for now in range(240)
    )
    assert need <= max(0, most - lent) + 0.15 * most


def test_what_lives_long_lies_where_the_loan_is_taken_late():
    """As a step does: activations die in the reverse of the order in which they came, while gradients come last block first."""
    blocks, size = 10, 64 * ALIGN
    tensors = [(i, 2 * blocks - i, 6 * (i + 1) * ALIGN) for i in range(blocks)]
    taken = [(Part(i * size, (i + 1) * size), 2 * blocks - 1 - i) for i in range(blocks)]
    offsets = place(tensors, taken, blocks * size)
    beside = sum(size for offset, (_, _, size) in zip(offsets, tensors, strict=True) if offset >= blocks * size)
    assert beside == 6 * ALIGN  # the first block's own, which is there when the last part is taken


def test_an_empty_frame_needs_nothing():
    assert place([], [], 0) == place([], [(Part(0, 64), -1)], 64) == []
