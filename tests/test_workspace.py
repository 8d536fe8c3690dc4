"""Whose memory C++ kernels work in."""

from __future__ import annotations

import threading

import pytest
import torch

from fastlm import native, use_backend
from fastlm.ops import linear_cross_entropy

pytestmark = [
    pytest.mark.backend("cpu"),
    pytest.mark.skipif(
        bool(native.why_not("cpu")) or not hasattr(native.load("cpu"), "lend_scratch"), reason="no C++ kernels"
    ),
]


def _loss_and_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 48, generator=gen).to(dtype).requires_grad_()
    weight = torch.randn(501, 48, generator=gen).to(dtype).requires_grad_()
    target = torch.randint(501, (70,), generator=gen)
    with use_backend("cpu"):
        loss = linear_cross_entropy(hidden, weight, target)
        loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_work_in_what_they_are_given(dtype):
    """All of the memory is used, none of it afterwards, and the results are those of the thread's own memory."""
    rooms = []

    def give(size: int) -> torch.Tensor:
        room = torch.full((size + 64,), 0xAB, dtype=torch.uint8)
        rooms.append(room)
        return room[-room.data_ptr() % 64 :][:size]

    alone = _loss_and_gradients(dtype)
    with native.workspace_from(give):
        given = _loss_and_gradients(dtype)
    assert rooms, "nobody asked"
    assert all((room != 0xAB).float().mean() > 0.5 for room in rooms)
    for room in rooms:
        room.fill_(0xCD)
    after = _loss_and_gradients(dtype)
    assert all((room == 0xCD).all() for room in rooms), "used when it was no longer lent"
    for one, two, three in zip(alone, given, after, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_thread_that_is_given_too_little_takes_more_of_its_own():
    alone = _loss_and_gradients(torch.float32)
    with native.workspace_from(lambda size: torch.empty(size // 2 // 64 * 64 + 64, dtype=torch.uint8)[:-64]):
        given = _loss_and_gradients(torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(alone, given, strict=True))


def test_a_kernel_that_refuses_gives_the_memory_back():
    rooms = []

    def give(size: int) -> torch.Tensor:
        rooms.append(torch.full((size,), 0xAB, dtype=torch.uint8))
        return rooms[-1]

    bad = torch.zeros(3, 8), torch.zeros(5, 8), torch.tensor([0, 1, 99])
    with native.workspace_from(give), use_backend("cpu"), pytest.raises(IndexError, match="target"):
        linear_cross_entropy(*bad)
    rooms[-1].fill_(0xAB)
    _loss_and_gradients(torch.float32)
    assert (rooms[-1] == 0xAB).all()


def test_other_threads_have_their_own():
    """What one thread's calls are inside of, those of others are not."""
    asked, noted, found = [], [], []

    def elsewhere() -> None:
        found.extend(_loss_and_gradients(torch.float32))

    def give(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    with native.workspace_from(give), native.noting(lambda *call: noted.append(call)):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert not asked and not noted and len(found) == 3
