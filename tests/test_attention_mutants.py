"""Broken attention is refused: of the reference by its functions, of Triton's kernels by their text."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from fastlm import backends, check, registry
from fastlm.ops import attention_math
from fastlm.samples import Normal, Sample, Values

OP = registry.get("attention")


def _shifted_window(patch):
    seen = attention_math._visible
    patch.setattr(attention_math, "_visible", lambda q, k, p: seen(q, k, _with(p, left=p.left + 1)))


def _with(problem, **changes):
    return type(problem)(**(problem.__dict__ | changes))


def _lost_delta(patch):
    original = attention_math.backward
    patch.setattr(attention_math, "backward", lambda *a: original(*a[:6], a[6] * 0, *a[7:]))  # of out


def _wrong_softcap_slope(patch):
    original = attention_math._scores

    def scores(q, k, p):
        s, slope = original(q, k, p)
        return s, None if slope is None else slope.sqrt()

    patch.setattr(attention_math, "_scores", scores)


def _dropped_sink_gradient(patch):
    original = attention_math.backward
    patch.setattr(attention_math, "backward", lambda *a: (*(g := original(*a))[:5], g[5] * 0))


def _lost_part_of_the_table(patch):
    original = attention_math._relative_gradient
    patch.setattr(attention_math, "_relative_gradient", lambda ds, q, *r: original(ds[:, :, 1:], q[:, :, 1:], *r))


def _lost_tile_of_the_bias(patch):
    original = attention_math.backward

    def backward(*args):
        grads = list(original(*args))
        grads[3] = torch.cat([grads[3][..., :16] * 0, grads[3][..., 16:]], -1)
        return tuple(grads)

    patch.setattr(attention_math, "backward", backward)


def _missing_rescale(patch):
    original = attention_math._weights
    patch.setattr(attention_math, "_weights", lambda s, lse: original(s, lse - 1e-3))


MUTANTS = (
    _shifted_window, _lost_delta, _wrong_softcap_slope, _dropped_sink_gradient, _lost_part_of_the_table,
    _lost_tile_of_the_bias, _missing_rescale,
)  # fmt: skip


@pytest.mark.backend("reference")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__.strip("_"))
def test_mutants_of_the_reference_are_caught(mutant, monkeypatch):
    """The budget check passes as it is and fails on each broken reference."""
    sample = Sample(
        "mutants", q=Normal((2, 2, 37, 16)), k=Normal((2, 2, 40, 16)), v=Normal((2, 2, 40, 24)), window=(9, 4), softcap=1.5,
        bias=Normal((1, 2, 37, 40)), relative_bias=Normal((8, 2)), relative_max_distance=20, sinks=Normal((2,)),
    )  # fmt: skip
    check.check_budget(OP, sample, torch.float32, "reference")
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match="FAILS"):
        check.check_budget(OP, sample, torch.float32, "reference")


KERNELS = ("attention", "attention_backward", "attention_bias", "attention_terms", "attention_tiles")
BROKEN_KERNELS = {
    "nothing": ("attention_backward", "if HAS_DLSE:\n", "if HAS_DLSE:\n"),
    "a key too few": ("attention_terms", "(j <= i + shift + t.right)", "(j < i + shift + t.right)"),
    "interior a step too long": (
        "attention_terms", "tl.maximum(every_end, 0) // STEP * STEP\n", "tl.cdiv(tl.maximum(every_end, 0), STEP) * STEP\n"),
    "a segment's span too short": ("attention_terms", "tl.where(m, c + 1, 0)", "tl.where(m, c, 0)"),
    "sum of weights not rescaled": ("attention", "b_sum * b_alpha + tl.sum", "b_sum + tl.sum"),
    "sink not in lse": ("attention", "b_sum * b_kept + tl.exp(b_sink - b_shift)", "b_sum * b_kept"),
    "delta without dlse": ("attention_backward", "    if HAS_DLSE:\n", "    if False:\n"),
    "dropout of other keys": ("attention_tiles", "c_col = i_n // 4 +", "c_col = i_n // 4 + 1 +"),
    "far keys not in T5's gradient": ("attention_backward", "tl.store(p_far, tl.sum(b_low, 0))", "tl.store(p_far, 0.0)"),
    "a near diagonal not in T5's gradient": ("attention_bias", "(offset + c - r) < t.clip", "(offset + c - r) < 3"),
}  # fmt: skip


def _break_kernel(patch, path, name, text, broken):
    """Kernels whose text is changed, in the place of those of the same name, wherever they are called."""
    modules = {n: importlib.import_module(f"fastlm.kernels.{n}") for n in KERNELS}
    source = Path(modules[name].__file__).read_text()
    assert source.count(text) == 1, f"kernels/{name}.py has {text!r} {source.count(text)} times, not once"
    path.write_text(source.replace(text, broken))
    spec = importlib.util.spec_from_file_location(f"fastlm.kernels.broken_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for n, kernel in list(vars(modules[name]).items()):
        if hasattr(kernel, "fn") and kernel.fn.__module__ == modules[name].__name__:
            for user in modules.values():
                if vars(user).get(n) is kernel:
                    patch.setattr(user, n, getattr(module, n))


@pytest.mark.backend("triton")
@pytest.mark.skipif(not backends.interpreting(), reason="tensors are on the CPU")
@pytest.mark.parametrize("broken", BROKEN_KERNELS)
def test_mutants_of_triton_are_caught(broken, monkeypatch, tmp_path):
    """The budget check passes with nothing broken and fails with each broken kernel. Without T5 there are interior steps."""
    sample = Sample(
        "mutants", q=Normal((1, 2, 21, 16)), k=Normal((1, 1, 81, 16)), v=Normal((1, 1, 81, 8)), causal=True,
        segment_ids=Values([[1] * 21], torch.int32), key_segment_ids=Values([[0] * 7 + [1] * 74], torch.int32),
        dropout_p=0.3, dropout_seed=Values([5], torch.int64), sinks=Normal((2,)), return_lse=True,
        relative_bias=Normal((8, 2)) if broken == "nothing" or "T5" in broken else None, relative_max_distance=10,
    )  # fmt: skip
    _break_kernel(monkeypatch, tmp_path / "broken.py", *BROKEN_KERNELS[broken])
    with contextlib.nullcontext() if broken == "nothing" else pytest.raises(AssertionError, match="FAILS"):
        check.check_budget(OP, sample, torch.float32, "triton")
