"""The objective: what a batch is, and the arithmetic of its loss."""

from __future__ import annotations

import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import Loader, Tokenizer
from fastlm.tasks import CausalLM, Evaluation, causal_lm, unigram_entropy

quick = settings(max_examples=40, deadline=None)


def batch_of(inputs, targets=None) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(inputs), "targets": torch.tensor(targets or inputs)}


def test_check_accepts_batches_and_names_what_is_wrong():
    task = CausalLM(10)
    task.check(batch_of([[0, 9]], [[-100, 9]]))
    task.check(next(Loader(np.arange(10), 1, 4)))
    empty = task.empty(3, 5)
    assert set(empty) == {"input_ids", "targets"}
    assert all(t.shape == (3, 5) and t.dtype == torch.int64 for t in empty.values())
    for error, message, batch in (
        (
            ValueError,
            r"must hold input_ids and targets, got \['input_ids'\]",
            {"input_ids": torch.ones(1, 1).long()},
        ),
        (
            TypeError,
            "targets must be int64, got torch.int32",
            {**batch_of([[1]]), "targets": torch.ones(1, 1).int()},
        ),
        (ValueError, r"input_ids must be \(batch, seq\) and not empty, got shape \(2,\)", batch_of([1, 2])),
        (
            ValueError,
            r"not empty, got shape \(1, 0\)",
            batch_of([[]], [[]]) | {"input_ids": torch.ones(1, 0).long()},
        ),
        (
            ValueError,
            r"one shape and device, got \(1, 2\) on cpu and \(2, 1\)",
            batch_of([[1, 2]], [[1], [2]]),
        ),
        (ValueError, r"input_ids must be in \[0, 10\), got 10 at \[0, 1\]", batch_of([[1, 10]], [[1, 1]])),
        (
            ValueError,
            r"input_ids must be in \[0, 10\), got -100 at \[0, 0\]",
            batch_of([[-100, 1]], [[1, 1]]),
        ),
        (
            ValueError,
            r"targets must be in \[0, 10\) or -100, got 10 at \[1, 0\]",
            batch_of([[1], [1]], [[1], [10]]),
        ),
        (ValueError, r"targets must be in \[0, 10\) or -100, got -1 at \[0, 0\]", batch_of([[1]], [[-1]])),
    ):
        with pytest.raises(error, match=message):
            task.check(batch)
    with pytest.raises(ValueError, match=r"bytes_per_token must have shape \(10,\), got \(9,\)"):
        CausalLM(10, np.ones(9))
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        CausalLM(0)


def test_bits_per_byte_by_hand():
    # Ids: 0 separates, 1 is "abc", 2 is "de". "abc" at probability 1/4, "de" at 1/2, the end at 1/8:
    # 2 + 1 + 3 = 6 bits for 5 bytes; 2 bits a token, so a perplexity of 4.
    task = CausalLM(3, np.array([0, 3, 2]))
    mean = 6 * math.log(2) / 3
    evaluation = Evaluation(task)
    evaluation.add(mean, torch.tensor([[1, 2, 0, -100]]))
    found = evaluation.result()
    assert (found.tokens, found.bytes) == (3, 5)
    assert abs(found.bits_per_byte - 1.2) <= 1e-12
    assert abs(found.perplexity - 4) <= 1e-12
    assert abs(found.loss - mean) <= 1e-12
    # A model of bytes that knows nothing needs 8 bits for each.
    tokenizer = Tokenizer.of_bytes()
    targets = torch.tensor([tokenizer.encode("any text, é")])
    evaluation = Evaluation(CausalLM(tokenizer.vocab_size, tokenizer.bytes_per_token))
    evaluation.add(torch.tensor(math.log(256)), targets)
    assert abs(evaluation.result().bits_per_byte - 8) <= 1e-6


def test_batches_are_weighted_by_what_counts_in_them():
    logits = torch.randn(4, 6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(24).reshape(4, 6) % 11
    targets[1, 2:] = targets[3] = -100
    loss = torch.nn.functional.cross_entropy
    evaluation = Evaluation(CausalLM(11))
    for rows in (
        slice(0, 1),
        slice(1, 3),
        slice(3, 4),
    ):  # the last one has a loss of NaN and counts for nothing
        evaluation.add(loss(logits[rows].flatten(0, 1), targets[rows].flatten()), targets[rows])
    found = evaluation.result()
    exact = loss(logits.flatten(0, 1), targets.flatten()).item()
    assert abs(found.loss - exact) <= 1e-12
    assert abs(found.perplexity - math.exp(exact)) <= 1e-10
    assert (found.tokens, found.bytes, found.bits_per_byte) == (14, None, None)


def test_metrics_of_a_run_gone_wrong():
    nan, diverged = Evaluation(CausalLM(3)), Evaluation(CausalLM(3))
    nan.add(0.5, torch.tensor([[1]]))
    nan.add(math.nan, torch.tensor([[1]]))
    assert math.isnan(nan.result().loss) and math.isnan(nan.result().perplexity)
    diverged.add(1e4, torch.tensor([[1]]))
    assert diverged.result().perplexity == math.inf
    with pytest.raises(ValueError, match="every target was ignored"):
        Evaluation(CausalLM(3)).result()


@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=200), st.integers(1, 60))
def test_unigram_entropy(tokens, at_once):
    share = [n / len(tokens) for n in Counter(tokens).values()]
    exact = -sum(p * math.log(p) for p in share)
    with mock.patch.object(causal_lm, "_COUNTED_AT_ONCE", at_once):
        assert abs(unigram_entropy(np.array(tokens, dtype=np.uint16)) - exact) <= 1e-12
        assert abs(unigram_entropy(torch.tensor(tokens)) - exact) <= 1e-12


def test_unigram_entropy_of_the_known():
    assert abs(unigram_entropy(np.arange(4096)) - math.log(4096)) <= 1e-12
    assert unigram_entropy(np.zeros(9, dtype=np.uint32)) == 0
    with pytest.raises(ValueError, match="entropy of no tokens"):
        unigram_entropy(np.arange(0))
