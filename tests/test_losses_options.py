"""The losses' options: any two together on every backend, the extras, weights of tokens, probabilities."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS_HERE
from covering import covering_rows

from fastlm import backends, check, ops, registry
from fastlm.ops.cross_entropy_samples import Probabilities
from fastlm.samples import Integers, Normal, Sample, Values

PLAIN, LINEAR = registry.get("cross_entropy"), registry.get("linear_cross_entropy")
QUICK = [b for b in BACKENDS_HERE if b.values[0] != "triton"]
TOKENS, CLASSES, WIDTH = 7, 37, 12
INDICES = Values([3, 36, 5, 0, 5, 20, 3], torch.int64)
PROBABILITIES = Probabilities((TOKENS, CLASSES), 2.0)
OPTIONS = {
    "weight": {"weight": Normal((CLASSES,), 0.2, 1.0)},
    "ignore_index": {"ignore_index": 5},
    "label_smoothing": {"label_smoothing": 0.15},
    "z_loss": {"z_loss": 0.03},
    "softcap": {"softcap": 4.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "logit_scale": {"logit_scale": 1.7},
    "token_weight": {"token_weight": Normal((TOKENS,), 0.4, 1.0)},
    "extras": {"extras": True},
    "probabilities": {"target": PROBABILITIES},
}
CLASHES = [{"sum", "none"}, {"ignore_index", "probabilities"}]
LINEAR_OPTIONS = {name: option for name, option in OPTIONS.items() if name != "weight"} | {
    "class_weight": {"class_weight": Normal((CLASSES,), 0.2, 1.0)},
    "bias": {"bias": Normal((CLASSES,))},
    "workspace_mb": {"workspace_mb": 3 * 8 * CLASSES / 2**20},
}


def _clash(a, b):
    return {a, b} in CLASHES


def _row(op, names):
    """The arguments of a row of options."""
    if op is PLAIN:
        arguments, options = {"logits": Normal((TOKENS, CLASSES), 2.0)}, OPTIONS
    else:
        arguments = {"hidden": Normal((TOKENS, WIDTH)), "weight": Normal((CLASSES, WIDTH), 0.5)}
        options = LINEAR_OPTIONS
    chosen = {"target": INDICES} | {k: v for n in names for k, v in options[n].items()}
    return Sample(" + ".join(names), **arguments, **chosen)


ROWS = [(PLAIN, row) for row in covering_rows(list(OPTIONS), _clash)]
ROWS += [(LINEAR, row) for row in covering_rows(list(LINEAR_OPTIONS), _clash)]
ROWS = [pytest.param(*row, id=f"{row[0].name}: {' + '.join(row[1])}") for row in ROWS]
MOST = [max((r for r in ROWS if r.values[0] is op), key=lambda r: len(r.values[1])) for op in (PLAIN, LINEAR)]
each_row = pytest.mark.parametrize(("op", "names"), ROWS)
both = pytest.mark.parametrize("op", [PLAIN, LINEAR], ids=lambda op: op.name)


@both
def test_rows_cover_all_pairs(op):
    """Of all options of the op; only those of which one rules out the other are never together."""
    names = list(OPTIONS if op is PLAIN else LINEAR_OPTIONS)
    given = {argument for name in names for argument in (OPTIONS | LINEAR_OPTIONS)[name]} - {"target", "bias"}
    keywords = (p for p in inspect.signature(op.function).parameters.values() if p.kind is p.KEYWORD_ONLY)
    assert given == {p.name for p in keywords} - {"tape"}
    rows = [row for of, row in (r.values for r in ROWS) if of is op]
    together = {(a, b) for a, b in itertools.combinations(names, 2) if any(a in row and b in row for row in rows)}
    assert [set(p) for p in set(itertools.combinations(names, 2)) - together if set(p) not in CLASHES] == []
    for a, b in itertools.permutations(names, 2):
        assert any(a in row and b not in row for row in rows), f"{a} without {b}"
        assert any(a not in row and b not in row for row in rows), f"neither {a} nor {b}"
    assert len(rows) <= 10


@each_row
def test_every_option_of_a_row_shows(op, names):
    """Without it there is another result; else the row would not test it. A workspace must not show."""
    args = _row(op, names).build(torch.float64)
    with backends.use_backend("reference"):
        everything = check.evaluate(op.function, op, args)
        for name in {*names} - {"workspace_mb"}:
            dropped = (OPTIONS | LINEAR_OPTIONS)[name]
            rest = {k: v for k, v in args.items() if k not in dropped}
            if name == "probabilities":
                rest["target"] = INDICES.draw(torch.Generator(), torch.float64)
            without = check.evaluate(op.function, op, rest)
            same = without.keys() == everything.keys() and all(
                value.shape == without[key].shape and torch.equal(value, without[key])
                for key, value in everything.items()
            )
            assert not same, name


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@each_row
def test_any_two_options(op, names, backend):
    check.check_budget(op, _row(op, names), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize(("op", "names"), MOST)
def test_most_options_in_bfloat16(op, names, backend):
    check.check_budget(op, _row(op, names), torch.bfloat16, backend)


@pytest.mark.parametrize("backend", QUICK)
@each_row
def test_any_layout_any_gradient_again(op, names, backend):
    for test in (check.check_layouts, check.check_requires_grad, check.check_repeatable):
        test(op, _row(op, names), torch.float32, backend)


EVERY = ["weight", "label_smoothing", "z_loss", "softcap", "logit_scale", "token_weight"]


def _leaves(op, args):
    return {n: args[n].clone().requires_grad_() for n in check.differentiable(op, args)}


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("which", ["z_loss", "lse", "both"])
@both
def test_extras_are_differentiable_by_themselves(op, which, backend):
    """Their gradient is right without the loss's, of ignored tokens too; together is what the rows check."""
    names = [n if op is PLAIN or n != "weight" else "class_weight" for n in (*EVERY, "ignore_index")]
    args = _row(op, names).build(torch.float32) | {"extras": True}
    generator = torch.Generator().manual_seed(3)
    up = [torch.randn(n, generator=generator) for n in ((), (TOKENS,))]

    def gradients(function, args):
        leaves = _leaves(op, args)
        extras = check.tensors(function(**(args | leaves)))[1:3]
        chosen = {"z_loss": [0], "lse": [1], "both": [0, 1]}[which]
        d = [up[i].to(extras[i].dtype) for i in chosen]
        return torch.autograd.grad([extras[i] for i in chosen], list(leaves.values()), d)

    exact = gradients(op.peer, check.widened(args))
    with backends.use_backend(backend), check.poisoned_memory():
        for grad, right in zip(gradients(op.function, args), exact, strict=True):
            assert check.max_error(grad, right)[0] <= 3e-6 * right.abs().max().item()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_the_first_of_equal_logits_is_the_answer(backend, soft):
    """As torch.argmax; and not after capping, which may make equal what was not. A row with a NaN is never right."""
    rows = [[1.0, 3.0, 3.0], [3.0, 3.0, 1.0], [900.0, 901.0, 0.0], [0.0, torch.nan, 1.0], [0.0, 1.0, 2.0]]
    logits, target = torch.tensor(rows), torch.tensor([2, 0, 1, 1, 2])
    assert (logits.argmax(-1) == target).tolist() == [False, True, True, True, True]
    if soft:
        target = F.one_hot(target, 3) * 0.4 + 0.2
    with backends.use_backend(backend):
        _, extras = ops.cross_entropy(logits, target, softcap=1.0, extras=True)
    assert extras.correct.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_extras_of_wide_rows(backend):
    """Over several tiles: the largest logit in the last, a maximum that rises, a confident row, equal ones apart."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4500, generator=generator).sort(-1).values
    logits[1] = logits[1].flip(0)
    logits[2, 4400] = 40.0
    logits[4:, [100, 2148, 4196]] = 9.0  # in one place of each tile
    target = torch.tensor([4499, 0, 4400, 7, 100, 2148])
    p = logits.double().softmax(-1)
    with backends.use_backend(backend):
        _, extras = ops.cross_entropy(logits, target, extras=True)
    assert extras.correct.tolist() == [True, True, True, False, True, False]
    assert check.max_error(extras.confidence, p.amax(-1))[0] <= 1e-6
    assert check.max_error(extras.entropy, torch.special.entr(p).sum(-1))[0] <= 1e-5
    assert check.max_error(extras.lse, logits.double().logsumexp(-1))[0] <= 1e-5
    assert not extras.correct.requires_grad and not extras.entropy.requires_grad


def test_extras_not_asked_for_have_no_memory():
    for op in (PLAIN, LINEAR):
        sizes = []
        for names in ([], ["extras"]):
            seen = []

            class Recorder:
                def forward(self, op, args, seen=seen):
                    seen.append(op.outputs(*args))
                    return op.run_forward(args)[: op.returned]

            op.function(**_row(op, names).build(torch.float32), tape=Recorder())
            sizes.append([torch.Size(spec.shape).numel() for spec in seen[0][1:6]])
        assert sizes == [[0] * 5, [1] + [TOKENS] * 4]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@both
def test_a_token_weight_of_two_is_the_token_twice(op, backend):
    """In the mean of every term."""
    names = [n if op is PLAIN or n != "weight" else "class_weight" for n in EVERY]
    args = _row(op, names).build(torch.float32)
    x = "logits" if op is PLAIN else "hidden"
    args["token_weight"] = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    twice = torch.tensor([0, 1, 1, 2, 3, 5, 6])
    doubled = args | {x: args[x][twice], "target": args["target"][twice], "token_weight": None}
    with backends.use_backend(backend):
        a, b = (check.evaluate(op.function, op, given) for given in (args, doubled))
    expected = torch.zeros_like(args[x]).index_add_(0, twice, b[f"d_{x}"])
    torch.testing.assert_close(a["output"], b["output"], rtol=2e-6, atol=0)
    torch.testing.assert_close(a[f"d_{x}"], expected, rtol=1e-5, atol=1e-7)
    assert (a[f"d_{x}"][4] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_probabilities_of_one_class_are_its_index(backend):
    """With class weights the sums agree; the mean is PyTorch's, by the number of tokens."""
    logits = torch.randn(TOKENS, CLASSES, generator=torch.Generator().manual_seed(0))
    target, weight = INDICES.draw(torch.Generator(), torch.float32), torch.linspace(0.5, 2, CLASSES)
    one = F.one_hot(target, CLASSES).float()
    options = {"weight": weight, "label_smoothing": 0.1}
    with backends.use_backend(backend):
        for reduction in ("sum", "none"):
            a, b = (ops.cross_entropy(logits, t, reduction=reduction, **options) for t in (target, one))
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
        mean = ops.cross_entropy(logits, one, **options)
    torch.testing.assert_close(mean, F.cross_entropy(logits, one, **options), rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_masked_class_of_probability_zero(backend):
    """Adds 0 and has gradient 0, where PyTorch gives NaN."""
    logits = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    target = torch.tensor([[0.3, 0.0, 0.7]])
    kept = [0, 2]
    inner = logits.detach()[:, kept].double().requires_grad_()
    exact = F.cross_entropy(inner, target[:, kept].double())
    with backends.use_backend(backend):
        loss = ops.cross_entropy(logits, target)
        (grad,) = torch.autograd.grad(loss, logits, torch.tensor(1.7))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[:, kept].double(), torch.autograd.grad(exact, inner, torch.tensor(1.7).double())[0])
    assert grad[0, 1] == 0


@pytest.mark.parametrize("name", ["target", "token_weight"])
@both
def test_a_gradient_that_there_is_none_of_is_refused(op, name):
    args = _row(op, ["probabilities", "token_weight"]).build(torch.float32)
    args[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name}: got requires_grad=True; allowed: {name}.detach()"):
        op.function(**args)
    with torch.no_grad():
        op.function(**args)


@pytest.mark.parametrize("backend", [b for b in BACKENDS_HERE if b.values[0] != "reference"])
def test_a_frozen_input_reaches_the_kernel_as_none(backend, monkeypatch):
    """So that it pays nothing for the gradient that nobody wants."""
    seen = []
    function = backends.function

    def spy(op, backend, direction):
        run = function(op, backend, direction)

        def noting(*given):
            if direction != "forward":
                gradients = given[-4:-1] if direction == "together" else given[-3:]  # behind them `replace`
                seen.append([g is not None for g in gradients])
            return run(*given)

        return noting

    monkeypatch.setattr(backends, "function", spy)
    args = _row(LINEAR, ["bias"]).build(torch.float32)
    names = ("hidden", "weight", "bias")
    with backends.use_backend(backend):
        for wanted in itertools.product([False, True], repeat=3):
            if any(wanted):
                check.evaluate(LINEAR.function, LINEAR, args, list(itertools.compress(names, wanted)))
                assert seen.pop() == list(wanted)
    assert seen == []


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_integers_of_any_leading_shape(backend):
    """Probabilities, weights and extras of tokens in several dimensions, and of none."""
    for lead in ((2, 3), (), (0, 2)):
        sample = Sample(
            "lead", hidden=Normal((*lead, WIDTH)), weight=Normal((CLASSES, WIDTH)), extras=True, reduction="none",
            target=Integers(lead, 0, CLASSES), token_weight=Normal(lead, 0.2, 1.0),
        )  # fmt: skip
        check.check_budget(LINEAR, sample, torch.float32, backend)
        sample.args["target"] = Probabilities((*lead, CLASSES), 2.0)
        check.check_budget(LINEAR, sample, torch.float32, backend)
