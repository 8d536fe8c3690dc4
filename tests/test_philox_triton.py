"""The Triton tile of random words against the reference."""

from __future__ import annotations

import pytest
import torch

from fastlm.philox import philox_lanes

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
lanes = pytest.importorskip("fastlm.kernels.philox").philox_lanes


@triton.jit
def _kernel(seed, out, M: tl.constexpr, N: tl.constexpr):
    rows, counters = tl.arange(0, M), 3 + tl.arange(0, N // 4)
    b_words = lanes(tl.load(seed), counters[None, :] + tl.zeros([M, 1], tl.int32), rows[:, None], 5, 6)
    tl.store(out + rows[:, None] * N + tl.arange(0, N)[None, :], b_words.to(tl.int64))


@pytest.mark.backend("triton")
@pytest.mark.parametrize("seed", [0, -1, 0x299F31D0A4093822])
def test_philox_triton(seed):
    """The reference's words in the reference's order, for a tile of rows and columns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    key, out = torch.tensor([seed], device=device), torch.empty(4, 32, dtype=torch.int64, device=device)
    _kernel[(1,)](key, out, 4, 32)
    expected = philox_lanes(
        key, 3 + torch.arange(8, device=device)[None], torch.arange(4, device=device)[:, None], 5, 6
    )
    assert torch.equal(out, expected)
