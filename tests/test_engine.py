"""The engine: gradients, accumulation, memory, non-finite steps, state."""

from __future__ import annotations

import copy
import gc
import itertools
from unittest import mock

import pytest
import torch
from conftest import BACKENDS_HERE
from models import QWEN3, lm_batch, tiny_gpt

import fastlm
from fastlm import backends
from fastlm.engine import AdamWConfig, Engine, gradients
from fastlm.engine.arena import Arena, Loan
from fastlm.engine.placement import Part
from fastlm.engine.tape import Tape
from fastlm.ops.optimizer_step import joined
from fastlm.registry import Spec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _to(batch, device=DEVICE):
    return {k: v.to(device) for k, v in batch.items()}


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_gradients_equal_autograd_through_the_drop_in_model(backend):
    """The same model under plain autograd (the ops' registered backward) and under the engine's tape."""
    device = DEVICE if backend != "cpu" else "cpu"
    model, batch = tiny_gpt().to(device), _to(lm_batch(), device)
    with fastlm.use_backend(backend):
        loss, grads = gradients(model, batch)
        expected = model(**batch)
        expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    named = dict(model.named_parameters())
    assert grads.keys() == named.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        error = (grad - named[name].grad).abs().max() / named[name].grad.abs().max()
        assert error <= 2e-6, f"{name}: {error}"


def test_gradients_leave_the_model_alone():
    model, batch = tiny_gpt(), lm_batch()
    before = copy.deepcopy(model.state_dict())
    gradients(model, batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_micro_batches_add_up_to_the_whole_batch():
    """The mean is over all valid targets of the step, however unevenly they fall on the micro-batches."""
    whole = lm_batch(batch=6)
    whole["targets"][:2, 1:] = -100  # a first micro-batch with few valid targets
    micro = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    one, three = (Engine(tiny_gpt(), AdamWConfig(lr=1e-3)) for _ in range(2))
    a, b = one.step([whole]), three.step(micro)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.flat.exp_avg, three.flat.exp_avg, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_steps_are_bitwise_repeatable_and_learn(dtype):
    losses = []
    for _ in range(2):
        engine = Engine(tiny_gpt(embd_pdrop=0.1, attn_pdrop=0.1), AdamWConfig(lr=3e-3), dtype, seed=3)
        losses.append([engine.step([lm_batch(), lm_batch(seed=2)]).loss.item() for _ in range(20)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, QWEN3], ids=["gpt2", "qwen3"])
def test_steady_state_allocates_nothing(dtype, options):
    """Ten steps with two micro-batches after the first steps: torch's allocator is not asked for a byte."""
    if fastlm.native.why_not("cpu"):
        pytest.skip(fastlm.native.why_not("cpu"))
    model = tiny_gpt(embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1, **options)
    engine = Engine(model, dtype=dtype, backend="cpu")
    micro = [lm_batch(), lm_batch(seed=2)]
    for _ in range(3):  # the first plans, the second binds the views
        engine.step(micro, lr=1e-3)
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        probe = torch.empty(1000)
        for _ in range(10):
            engine.step(micro, lr=1e-3)
    events = profile.profiler.kineto_results.events()
    allocated = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    assert probe.nbytes in allocated, "the profiler saw no allocation at all: the test is blind"
    assert allocated == [probe.nbytes], f"{len(allocated) - 1} allocations: {allocated[:20]}"


def test_non_finite_step_changes_nothing_and_is_counted():
    engine = Engine(tiny_gpt(), AdamWConfig(lr=1e-2), torch.bfloat16)
    engine.step([lm_batch()])
    before = {k: v.clone() for k, v in engine.state_dict().items() if k != "seeds"}
    healthy = engine.flat.param[5].item()
    engine.flat.param[5] = float("nan")
    stats = engine.step([lm_batch()])
    assert stats.skipped.item() == 1 and not stats.grad_norm.isfinite()
    engine.flat.param[5] = healthy
    for name in ("param", "trail", "exp_avg", "exp_avg_sq", "updates"):
        assert torch.equal(engine.state_dict()[name], before[name]), name
    assert engine.skipped_total.item() == 1
    assert engine.step([lm_batch()]).skipped.item() == 0


def test_state_round_trip_continues_bitwise():
    engine, other = (Engine(tiny_gpt(embd_pdrop=0.2), AdamWConfig(lr=1e-2), torch.bfloat16) for _ in range(2))
    for _ in range(3):
        engine.step([lm_batch()])
    state = {k: v.clone() for k, v in engine.state_dict().items()}
    other.load_state_dict(state)
    for _ in range(3):
        assert engine.step([lm_batch()]).loss.item() == other.step([lm_batch()]).loss.item()
    assert torch.equal(engine.flat.master, other.flat.master) and torch.equal(engine.flat.trail, other.flat.trail)


def test_bfloat16_weights_keep_the_float32_ones_that_they_are_made_of():
    model = tiny_gpt()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = Engine(model, dtype=torch.bfloat16).flat
    for name, p in model.named_parameters():
        assert torch.equal(joined(p.detach(), flat.view(flat.trail, name)), start[name]), name
        nearest = (start[name].bfloat16().float() - start[name]).abs()  # torch takes the even one of two that are as near
        assert torch.equal((p.float() - start[name]).abs(), nearest), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_steps_gradients_are_its_own(dtype, recompute, backend):
    """Whatever the buffers hold from before, of one micro-batch and of two."""
    model = tiny_gpt()
    model.recompute = recompute
    fresh, used = (Engine(copy.deepcopy(model), dtype=dtype) for _ in range(2))
    micro = [lm_batch(), lm_batch(seed=2)]
    for batches in (micro, micro[1:]):
        found = []
        for engine in (fresh, used):
            engine.flat.grad.fill_(0.0 if engine is fresh else float("nan"))
            with torch.no_grad(), fastlm.use_backend(backend):
                engine._accumulate(batches)
            found.append(engine.flat.views(engine.flat.grad))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with fastlm.use_backend(backend):
        _, alone = gradients(copy.deepcopy(fresh.model), micro[1])
    assert all(torch.equal(found[1][name], alone[name]) for name in alone)


def test_parameters_that_get_no_gradient_have_zero():
    model = tiny_gpt()
    model.unused = torch.nn.Parameter(torch.ones(5, 7))
    engine = Engine(model, AdamWConfig(lr=0.1, weight_decay=0.5))
    for _ in range(2):
        engine.flat.view(engine.flat.grad, "unused").fill_(float("nan"))
        assert engine.step([lm_batch()]).skipped.item() == 0
    torch.testing.assert_close(model.unused.detach(), torch.full((5, 7), 0.95**2))


def test_bfloat16_moments_are_right_in_the_mean():
    """A step moves them by less than they are rounded by: to nearest they would stay where they are."""
    betas = (0.99, 0.999)
    narrow, wide = (
        Engine(tiny_gpt(), AdamWConfig(lr=0.0, betas=betas, max_norm=0.0, moments=moments), torch.bfloat16, seed=3)
        for moments in (torch.bfloat16, torch.float32)
    )
    for _ in range(100):
        narrow.step([lm_batch()])
        wide.step([lm_batch()])
    for name in ("exp_avg", "exp_avg_sq"):
        got, exact = narrow.state_dict()[name], wide.state_dict()[name]
        assert (got.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
        got, exact = got.double(), exact.double()
        assert (got.sum() - exact.sum()).abs() <= 2e-3 * exact.abs().sum(), name
        assert (got - exact).norm() <= 0.03 * exact.norm(), name
    assert Engine(tiny_gpt()).flat.exp_avg.dtype == torch.float32
    with pytest.raises(ValueError, match=r"moments: got torch.float16; allowed: torch.float32, torch.bfloat16"):
        AdamWConfig(moments=torch.float16)


def test_weight_decay_acts_on_matrices_alone():
    """A flag of the mask stands for 64 elements, and no two parameters share one."""
    engine = Engine(tiny_gpt(), AdamWConfig(lr=0.1, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    engine._update()  # with gradients of 0
    for name, p in engine.model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if p.dim() >= 2 else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0, msg=name)


def test_bad_state_is_refused_whole():
    engine = Engine(tiny_gpt())
    state = {k: v.clone() for k, v in engine.state_dict().items()}
    state["master"] = state["master"][:-1] + 1
    state["exp_avg"] += 1
    state["extra"] = state.pop("updates")
    with pytest.raises(
        ValueError, match=r"missing: updates\n.*unknown: extra\n.*master: got .*float32, allowed"
    ):
        engine.load_state_dict(state)
    assert not engine.flat.exp_avg.any(), "a refused state changed the engine"


def test_evaluate_equals_the_models_loss_without_dropout():
    model = tiny_gpt(embd_pdrop=0.5)
    engine = Engine(model)
    batch = lm_batch()
    total, units = engine.evaluate(batch)
    expected = model.eval()(**batch, reduction="sum")
    assert units.item() == (batch["targets"] != -100).sum()
    torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0)


def test_tied_parameters_stay_tied_and_frozen_ones_stay():
    model = tiny_gpt()
    model.wpe.weight.requires_grad_(False)
    before = model.wpe.weight.clone()
    engine = Engine(model, AdamWConfig(lr=1e-2))
    engine.step([lm_batch()])
    assert model.lm_head.weight is model.wte.weight
    assert torch.equal(model.wpe.weight, before)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Engine(tiny_gpt(), dtype=torch.int8), r"dtype: got torch.int8; allowed: torch.float32"),
        (lambda: Engine(tiny_gpt()).step([]), "micro_batches: got none"),
        (lambda: AdamWConfig(lr=-1.0), r"AdamWConfig.lr: got -1.0; allowed: >= 0"),
        (lambda: AdamWConfig(betas=(0.9, 1.0)), r"AdamWConfig.betas: got \(0.9, 1.0\)"),
        (
            lambda: tiny_gpt()(torch.zeros(1, 99, dtype=torch.int64)),
            r"input_ids: got shape \(1, 99\).*seq <= 16",
        ),
        (lambda: tiny_gpt(n_head=5), "n_head: got 5; allowed: a divisor of n_embd = 24"),
        (lambda: Engine(tiny_gpt().requires_grad_(False)), "no parameter requires a gradient"),
    ],
)
def test_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# --- the arena


def test_arena_reuses_memory_and_never_overlaps_what_lives():
    """Frames of random lifetimes: a value written is there until the tensor's last use, in half the memory."""
    arena = Arena(torch.device("cpu"))
    gen = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 3000, (200,), generator=gen).tolist()
    holds = torch.randint(1, 12, (200,), generator=gen).tolist()
    for _ in range(3):
        with arena.frame("a"):
            live = []
            for i, (size, hold) in enumerate(zip(sizes, holds, strict=True)):
                for t, value, _ in live:
                    assert (t == value).all(), "a live tensor was overwritten"
                live = [x for x in live if x[2] > i]
                t = arena.alloc(Spec((size,), torch.float32)).fill_(i)
                live.append((t[: size // 2 + 1], i, i + hold))  # a view keeps the whole alive
                del t
            live = []
    assert arena.planned_bytes < 0.5 * 4 * sum(sizes)


@pytest.mark.parametrize("seed", range(4))
def test_a_loan_is_used_until_its_parts_are_taken(seed):
    """Frames of random lifetimes over a lent buffer: nothing that lives is overwritten, and no part that was taken or kept."""
    gen = torch.Generator().manual_seed(seed)
    lent = torch.zeros(64 * 4000, dtype=torch.float32)
    cuts = [0, *(64 * torch.randperm(3999, generator=gen)[:19].sort().values + 64).tolist(), len(lent)]
    kept = lent[cuts[3] - 5 : cuts[3]]
    loan = Loan(lent, (Part(4 * (cuts[3] - 5), 4 * cuts[3]),))
    parts = [lent[a:b] if b != cuts[3] else lent[a : b - 5] for a, b in itertools.pairwise(cuts)]
    order = torch.randperm(20, generator=gen).tolist()
    sizes = [n if i < 80 else n // 8 + 1 for i, n in enumerate(torch.randint(1, 9000, (200,), generator=gen).tolist())]
    holds = torch.randint(1, 30, (200,), generator=gen).tolist()
    arena, used = Arena(torch.device("cpu")), 0
    for _ in range(3):
        with arena.frame("a", loan):
            live, taken = [], {}
            for i, (size, hold) in enumerate(zip(sizes, holds, strict=True)):
                live = [x for x in live if x[2] > i]
                if i >= 60 and i % 5 == 4 and i // 5 - 12 < len(order):
                    part = parts[order[i // 5 - 12]]
                    arena.take(part)
                    taken[i] = part.fill_(-i)
                t = arena.alloc(Spec((size,), torch.float32)).fill_(i)
                used += int(lent.data_ptr() <= t.data_ptr() < lent.data_ptr() + lent.nbytes)
                live.append((t[: size // 2 + 1], i, i + hold))  # a view keeps the whole alive
                del t
                assert all((t == value).all() for t, value, _ in live), "a live tensor was overwritten"
                assert all((t == -i).all() for i, t in taken.items()), "a part was written to after it was taken"
            live = []
        assert kept.eq(0).all()
        lent[:].zero_()
    assert used > 60
    alone = Arena(torch.device("cpu"))
    with alone.frame("a"):
        live = []
        for i, (size, hold) in enumerate(zip(sizes, holds, strict=True)):
            live = [x for x in live if x[1] > i]
            live.append((alone.alloc(Spec((size,), torch.float32)), i + hold))
        live = []
    assert arena.planned_bytes < 0.7 * alone.planned_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_the_same_with_gradients_lent_and_not(dtype, accumulate):
    """Activations in the gradient buffers change nothing, with an evaluation in between and weights without a gradient."""

    def run(lend: bool) -> tuple[list[float], dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = tiny_gpt(vocab_size=61, n_embd=40, n_head=5, resid_pdrop=0.1, tie_word_embeddings=False)
        model.unused = torch.nn.Parameter(torch.randn(100, 7))
        engine = Engine(model, AdamWConfig(lr=1e-2), dtype)
        if not lend:
            engine.flat.loan = None
        losses = []
        for s in range(4):
            losses += [x.item() for x in engine.step([lm_batch(seed=10 * s + i) for i in range(accumulate)])]
            losses += [x.item() for x in engine.evaluate(lm_batch(3, 7, seed=s))]
        return losses, {n: t.clone() for n, t in engine.state_dict().items()}, engine.arena.planned_bytes

    (losses, state, own), (expected, right, planned) = run(True), run(False)
    assert losses == expected
    for name, t in state.items():
        assert torch.equal(t, right[name]), name
    assert own <= planned if accumulate > 1 else own < planned


def test_arena_refuses_a_frame_that_differs_from_its_plan():
    arena = Arena(torch.device("cpu"))
    for _ in range(2):
        with arena.frame("a"):
            arena.alloc(Spec((3,), torch.float32))
    with pytest.raises(RuntimeError, match="tensor 0 of the frame is"), arena.frame("a"):
        arena.alloc(Spec((4,), torch.float32))
    with pytest.raises(RuntimeError, match="made 0 tensors where its plan has 1"), arena.frame("a"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_cuda_graph_step_equals_the_eager_step():
    runs = []
    for graph in (False, True):
        engine = Engine(
            tiny_gpt(embd_pdrop=0.1), AdamWConfig(lr=1e-2), torch.bfloat16, "cuda", capture=graph
        )
        batches = [[_to(lm_batch(seed=s)), _to(lm_batch(seed=s + 50))] for s in range(6)]
        runs.append([engine.step(b).loss.item() for b in batches])
    assert runs[0] == runs[1]


@pytest.mark.skipif(bool(backends.missing("linear_cross_entropy", "together", "cpu")), reason="no C++ kernels")
@pytest.mark.backend("cpu")
def test_a_step_takes_the_losses_gradients_with_the_loss():
    """One pass over the vocabulary a micro-batch; backward may then begin with no other gradient."""
    ran = []

    def recorded(op, backend, direction, real=backends.function):
        ran.append((op.name, direction))
        return real(op, backend, direction)

    model, batch = tiny_gpt(), lm_batch()
    with mock.patch.object(backends, "function", recorded):
        Engine(model, AdamWConfig(), device="cpu").step([batch])
    assert [d for name, d in ran if name == "linear_cross_entropy"] == ["together"]
    arena, d_loss = Arena("cpu"), torch.tensor(0.5)
    with torch.no_grad(), arena.frame("a"):
        tape = Tape(arena, {}, d_loss=d_loss)
        model(**batch, reduction="sum", tape=tape)
        with pytest.raises(RuntimeError, match="another gradient than the d_loss"):
            model.backward(d_loss.clone(), tape)


def test_a_new_plan_is_made_without_the_buffer():
    """What is held at once is the larger of two shapes, not both."""
    arena, held = Arena(torch.device("cpu")), []
    for key, size in (("a", 1000), ("a", 1000), ("b", 900), ("b", 900), ("a", 1000)):
        with arena.frame(key):
            arena.alloc(Spec((size,), torch.float32)).fill_(size)
            held.append(arena.buffer is not None)
    assert held == [False, True, False, True, True]
    assert arena.buffer is not None and arena.buffer.view(torch.float32)[:1000].eq(1000).all()
