"""Philox's known answers, and what the generated tests cannot know of dropout, gelu, embedding and add_layer_norm."""

from __future__ import annotations

import pytest
import torch

from fastlm.philox import drop_threshold, philox, philox_lanes

# Random123's known answers (kat_vectors, philox4x32 with 10 rounds): key, counter, words.
PI = (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344))
KNOWN = [
    (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (-1, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(seed, counter, words):
    key = torch.tensor([seed])
    assert " ".join(f"{int(w):08x}" for w in philox(key, *counter)) == words
    as_tensors = philox(key, *(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(w):08x}" for w in as_tensors) == words


def test_philox_lanes_order():
    seed, c0 = torch.tensor(7), torch.arange(5).expand(3, 5)
    lanes = philox_lanes(seed, c0, torch.arange(3)[:, None], 1, 2)
    assert lanes.shape == (3, 20)
    for row in range(3):
        for n in range(20):
            assert lanes[row, n] == philox(seed, n >> 2, row, 1, 2)[n & 3]


def test_drop_threshold_ends():
    assert drop_threshold(0.0) == 0 and drop_threshold(1.0) == 2**32 and drop_threshold(0.5) == 2**31
