"""Recomputation: the same numbers to the last bit, less memory, and no more work than promised."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conftest import BACKENDS_HERE
from models import lm_batch, tiny_gpt
from torch import nn

import fastlm
from fastlm.engine import AdamWConfig, Engine, audit, gemm
from fastlm.engine.arena import Arena
from fastlm.engine.tape import AutogradTape, Tape
from fastlm.nn import MLP, Dropout, LayerNorm, Linear
from fastlm.registry import Op

DROPOUT = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def _model(recompute: str, **options):
    model = tiny_gpt(**options)
    model.recompute = recompute
    return model


def _after_steps(model, dtype: torch.dtype = torch.float32, backend: str = "reference", steps: int = 2):
    """Everything that steps of two micro-batches leave behind."""
    engine = Engine(model, AdamWConfig(lr=1e-2), dtype, backend=backend, seed=5)
    stats = [
        torch.stack(engine.step([lm_batch(seed=i), lm_batch(seed=i + 50)])[:2]).clone() for i in range(steps)
    ]
    return {**engine.state_dict(), "stats": torch.stack(stats)}


def _differ(a, b) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@DTYPES
@pytest.mark.parametrize("backend", [b for b in BACKENDS_HERE if b.values[0] != "triton"])
def test_every_number_is_the_same_to_the_last_bit(backend, dtype):
    kept = _after_steps(_model("none", **DROPOUT), dtype, backend)
    assert kept["stats"].isfinite().all() and kept["exp_avg"].any()
    for recompute in ("mlp", "block"):
        assert not _differ(kept, _after_steps(_model(recompute, **DROPOUT), dtype, backend)), recompute


@DTYPES
@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_the_audit_passes(recompute, dtype):
    report = audit(_model(recompute, **DROPOUT), lm_batch(), dtype)
    assert report.ok, report.table(limit=5)


# --- what it saves, and what it costs

WIDTH, ROWS = 64, 2 * 32


def _planned(recompute: str, layers: int, dtype: torch.dtype) -> int:
    shape = {"vocab_size": 61, "n_positions": 32, "n_embd": WIDTH, "n_head": 2}
    engine = Engine(_model(recompute, n_layer=layers, **shape), dtype=dtype)
    engine.flat.loan = None  # all activations in the arena's own memory
    engine.step([lm_batch(2, 32)])
    return engine.arena.planned_bytes


@DTYPES
def test_memory_falls_by_what_is_not_kept(dtype):
    """A further block costs a step that many activations of (rows, width), beside the statistics.

    none: two sums of the stream; the norms' two outputs; q, k, v; attention's output; 4 before and 4 behind the
    activation. mlp: without those 8. block: the branch and the stream that come in.
    """
    unit = ROWS * WIDTH * dtype.itemsize
    a_block = {r: (_planned(r, 6, dtype) - _planned(r, 4, dtype)) / 2 / unit for r in ("none", "mlp", "block")}
    statistics = 3 * 2 * ROWS * 4 / unit  # the norms' means and deviations, attention's log-sum-exps of two heads
    for recompute, activations in (("none", 16), ("mlp", 8)):
        assert activations <= a_block[recompute] <= activations + statistics + 0.2, a_block
    assert a_block["block"] == 2


def _calls(recompute: str, **options) -> dict[str, int]:
    """How often a step of one micro-batch runs matrix products for activations, and each op's forward."""
    counts: dict[str, int] = {}

    def counted(name, real):
        def call(*args, **kwargs):
            key = args[0].name if name == "op" else name
            counts[key] = counts.get(key, 0) + 1
            return real(*args, **kwargs)

        return call

    with (
        mock.patch.object(gemm, "product", counted("product", gemm.product)),
        mock.patch.object(Op, "run_forward", counted("op", Op.run_forward)),
    ):
        Engine(_model(recompute, **options)).step([lm_batch()])
    return counts


def test_the_extra_work_is_what_backward_reads_and_no_more():
    """Two blocks. A block without dropout ends in a product that only its output needs: it is not run again."""
    kept, mlp, block = (_calls(r) for r in ("none", "mlp", "block"))
    extra = {name: mlp[name] - n for name, n in kept.items() if mlp[name] != n}
    assert extra == {"product": 2, "gelu": 2}
    extra = {name: block[name] - n for name, n in kept.items() if block[name] != n}
    assert extra == {"product": 6, "gelu": 2, "attention": 2, "layer_norm": 1, "add_layer_norm": 3}
    # Behind dropout of the branch the product in front is run again in blocks, and not in `mlp`, which ends before.
    kept, mlp, block = (_calls(r, resid_pdrop=0.1) for r in ("none", "mlp", "block"))
    assert (mlp["product"], block["product"]) == (kept["product"] + 2, kept["product"] + 8)


# --- the contract, for any layer


class _Stack(nn.Module):
    """Segments within a segment, several inputs and outputs, frozen parameters and dropout at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop = LayerNorm(12), MLP(12, 20, dropout=0.2), Dropout(0.3)
        self.mlp.recompute = True
        self.out = Linear(12, 12)
        self.out.weight.requires_grad_(False)

    def forward(self, x, residual, tape=None):
        y, total = self.norm(x, residual, tape=tape)
        return self.drop(self.out(self.mlp(y, tape=tape), tape=tape), tape=tape), total

    def backward(self, dy, d_total, tape):
        dy = self.out.backward(self.drop.backward(dy, tape), tape)
        return self.norm.add_backward(self.mlp.backward(dy, tape), d_total, tape)


def _run(stack: _Stack, checkpointed: bool):
    """Outputs, the inputs' gradient and every parameter's, with a dropout site before and behind the stack."""
    gen = torch.Generator().manual_seed(2)
    x, residual, dy, d_total = torch.randn(4, 2, 5, 12, generator=gen).unbind()
    grads = {p: torch.zeros_like(p) for p in stack.parameters() if p.requires_grad}
    arena, site = Arena(torch.device("cpu")), Dropout(0.4)
    with torch.no_grad(), arena.frame("a"):
        tape = Tape(arena, grads, torch.arange(20, dtype=torch.int64))
        x = site(x, tape=tape)
        y, total = tape.checkpoint(stack, x, residual) if checkpointed else stack(x, residual, tape=tape)
        y = site(y, tape=tape)
        d = site.backward(dy, tape)
        if checkpointed:
            d = tape.checkpoint_backward(stack.backward, d, d_total)
        else:
            d = stack.backward(d, d_total, tape)
        d = site.backward(d, tape)
        tape.finish()
        return [t.clone() for t in (y, total, d)] + list(grads.values())


def test_any_layer_can_be_a_segment_and_segments_nest():
    torch.manual_seed(0)
    stack = _Stack()
    for ours, kept in zip(_run(stack, True), _run(stack, False), strict=True):
        assert kept.any() and torch.equal(ours, kept)


def test_a_segment_that_keeps_nothing_is_not_run_again():
    class Nothing(nn.Module):
        runs = 0

        def forward(self, x, tape=None):
            self.runs += 1
            return x

        def backward(self, dy, tape):
            return dy

    layer, tape = Nothing(), Tape(Arena(torch.device("cpu")), {})
    x = torch.ones(3)
    assert tape.checkpoint(layer, x) is x
    assert tape.checkpoint_backward(layer.backward, x) is x
    tape.finish()
    assert layer.runs == 1


def test_evaluation_and_the_oracle_run_the_segment_once():
    model, batch = _model("block", **DROPOUT), lm_batch()
    with mock.patch.object(Op, "run_forward", autospec=True, side_effect=Op.run_forward) as run:
        Engine(model).evaluate(batch)
    assert sum(c.args[0].name == "attention" for c in run.call_args_list) == 2
    seeds = torch.arange(50, dtype=torch.int64)
    losses = [
        _model(r, **DROPOUT).train()(**batch, tape=AutogradTape(seeds)).item() for r in ("none", "block")
    ]
    assert losses[0] == losses[1]


def test_a_backward_that_is_not_the_mirror_is_refused():
    one, other = MLP(8, 8), MLP(8, 8)
    arena = Arena(torch.device("cpu"))
    x = torch.ones(1, 2, 8)
    with torch.no_grad(), arena.frame("a"):
        tape = Tape(arena, {})
        tape.checkpoint(one, x)
        with pytest.raises(RuntimeError, match="a segment of MLP goes backward where one of MLP is next"):
            tape.checkpoint_backward(other.backward, x)
        tape.checkpoint(one, x)
        with pytest.raises(RuntimeError, match="backward ended with 1 entries left, the next is 'checkpoint'"):
            tape.finish()
        with pytest.raises(RuntimeError, match="'linear' goes backward where 'checkpoint' is next"):
            one.c_proj.backward(x, tape)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="recompute: got 'all'; allowed: none, mlp, block"):
        tiny_gpt().recompute = "all"


# --- mutants: each must change a number that the tests above compare


def _wrong_seeds(tape, start, record, real=Tape._segment):
    return real(tape, start + record, record)


def _first_seeds(tape, start, record, real=Tape._segment):
    return real(tape, 0 if record else start, record)


def _in_evaluation(tape, backward, *d_outputs, real=Tape.checkpoint_backward, **options):
    segment = tape._entries[-1][1][0]
    layer = getattr(segment, "__self__", segment)

    def run(*inputs, tape):
        layer.eval()
        try:
            return segment(*inputs, tape=tape)
        finally:
            layer.train()

    run.__self__ = layer
    key, (_, *kept) = tape._entries[-1]
    tape._entries[-1] = key, (run, *kept)
    return real(tape, backward, *d_outputs, **options)


def _loses_the_input_gradient(tape, backward, *d_outputs, real=Tape.checkpoint_backward, **options):
    return torch.zeros_like(real(tape, backward, *d_outputs, **options))


def _does_not_move_on(tape, segment, *inputs, real=Tape.checkpoint):
    start = tape._sites
    out = real(tape, segment, *inputs)
    tape._sites = start
    return out


def _adds_twice(tape, backward, *d_outputs, real=Tape.checkpoint_backward, **options):
    for p in tape.gradients:
        tape.gradients[p].mul_(2 if p.dim() == 1 else 1)
    return real(tape, backward, *d_outputs, **options)


# The MLP's segment has no dropout inside.
MUTANTS = [
    ("block", "_segment", _wrong_seeds), ("block", "_segment", _first_seeds),
    ("block", "checkpoint_backward", _in_evaluation), ("block", "checkpoint", _does_not_move_on),
    ("mlp", "checkpoint_backward", _loses_the_input_gradient), ("mlp", "checkpoint_backward", _adds_twice),
    ("block", "checkpoint_backward", _loses_the_input_gradient), ("block", "checkpoint_backward", _adds_twice),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recompute", "method", "mutant"), MUTANTS, ids=[f"{r}-{m.__name__.strip('_')}" for r, _, m in MUTANTS]
)
def test_mutants_are_caught(recompute, method, mutant):
    """By the comparison of bits, and by the audit."""
    kept = _after_steps(_model("none", **DROPOUT), steps=1)
    with mock.patch.object(Tape, method, mutant), fastlm.use_backend("reference"):
        try:
            differ = _differ(kept, _after_steps(_model(recompute, **DROPOUT), steps=1))
            passed = audit(_model(recompute, **DROPOUT), lm_batch()).ok
        except RuntimeError as error:  # a pass that does not mirror the other may end there
            differ, passed = [str(error)], False
    assert differ, "the same bits"
    assert not passed
