"""Attention's options: any two together, T5's bias in O(S) memory and as in transformers, a grid of shapes, mutants."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from covering import covering_rows

from fastlm import backends, check, native, registry
from fastlm.ops import attention, relative_position_bucket, varlen_attention
from fastlm.samples import Integers, Normal, Sample, Values

OP, VARLEN = registry.get("attention"), registry.get("varlen_attention")
needs_cpu = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu") or "there")
BACKENDS = [
    pytest.param("reference", marks=pytest.mark.backend("reference")),
    pytest.param("cpu", marks=[pytest.mark.backend("cpu"), needs_cpu]),
]
GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not (GPU or backends.interpreting()), reason="there is no GPU and no interpreter")
TRITON = pytest.param("triton", marks=[pytest.mark.backend("triton"), needs_triton])
ALL_BACKENDS = [*BACKENDS, TRITON]
SEED = Values([12345], torch.int64)


def _device(backend):
    return "cuda" if backend == "triton" and GPU else "cpu"


def _qkv(b, h, hk, sq, sk, d, dv=None):
    shapes = {"q": (b, h, sq, d), "k": (b, hk, sk, d), "v": (b, hk, sk, dv or d)}
    return {name: Normal(shape) for name, shape in shapes.items()}


def _options(queries, keys, lengths):
    """Every option of both ops, for 4 heads; two that give one argument cannot be had together."""
    batch = len(lengths)
    return {
        "causal": {"causal": True},
        "top-left": {"alignment": "top-left"},
        "scale": {"scale": -0.4},
        "window": {"window": (40, 6)},
        "softcap": {"softcap": 1.5},
        "ALiBi": {"alibi_slopes": Normal((batch, 4), 0.2)},
        "bias": {"bias": Normal((1, 4, queries, keys))},
        "mask": {"bias": Integers((batch, 1, queries, keys), 0, 2, torch.bool)},
        "T5": {"relative_bias": Normal((8, 4)), "relative_max_distance": 10},
        "one-way T5": {"relative_bias": Normal((5, 4)), "relative_bidirectional": False, "relative_max_distance": 7},
        "lengths": {"key_lengths": Values(lengths, torch.int32)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
        "sinks": {"sinks": Normal((4,))},
        "lse": {"return_lse": True},
    }  # fmt: skip


OPTIONS = _options(21, 70, [70, 18]) | {
    "segments": {"segment_ids": Integers((2, 21), 0, 2), "key_segment_ids": Integers((2, 70), 0, 2)}
}
VARLEN_OPTIONS = _options(21, 70, [18, 90, 8])


def _clash(a, b):
    return not set(OPTIONS[a]).isdisjoint(OPTIONS[b])


def _packed(h, hk, d, q_lengths, k_lengths):
    """Sequences of these lengths, and three rows of none."""
    q_ends, k_ends = ([0, *itertools.accumulate(n)] for n in (q_lengths, k_lengths))
    shapes = {"q": (q_ends[-1] + 3, h, d), "k": (k_ends[-1] + 3, hk, d), "v": (k_ends[-1] + 3, hk, d)}
    return {name: Normal(shape) for name, shape in shapes.items()} | {
        "cu_seqlens_q": Values(q_ends, torch.int32), "cu_seqlens_k": Values(k_ends, torch.int32),
        "max_seqlen_q": max(q_lengths), "max_seqlen_k": max(k_lengths),
    }  # fmt: skip


def _row(op, names):
    """The arguments of a row of options."""
    if op is OP:
        arguments, options = _qkv(2, 4, 2, 21, 70, 16), OPTIONS
    else:
        arguments, options = _packed(4, 2, 16, [21, 0, 6], [70, 5, 9]), VARLEN_OPTIONS
    return Sample(" + ".join(names), **arguments, **{k: v for n in names for k, v in options[n].items()})


ROWS = [(OP, row) for row in covering_rows(list(OPTIONS), _clash)]
ROWS += [(VARLEN, row) for row in covering_rows(list(VARLEN_OPTIONS), _clash)]
ROWS = [pytest.param(*row, id=f"{row[0].name}: {' + '.join(row[1])}") for row in ROWS]
MOST = [max((r for r in ROWS if r.values[0] is op), key=lambda r: len(r.values[1])) for op in (OP, VARLEN)]
each_row = pytest.mark.parametrize(("op", "names"), ROWS)


@pytest.mark.parametrize("op", [OP, VARLEN], ids=lambda op: op.name)
def test_rows_cover_all_pairs(op):
    """Of all options of the op; only those that give the same argument are never together."""
    names = list(OPTIONS if op is OP else VARLEN_OPTIONS)
    given = {argument for name in names for argument in (OPTIONS | VARLEN_OPTIONS)[name]}
    signature = inspect.signature(op.function).parameters.values()
    assert given == {p.name for p in signature if p.kind is p.KEYWORD_ONLY} - {"tape"}
    rows = [row for of, row in (r.values for r in ROWS) if of is op]
    together = {(a, b) for a, b in itertools.combinations(names, 2) if any(a in row and b in row for row in rows)}
    assert set(itertools.combinations(names, 2)) - together == {("bias", "mask"), ("T5", "one-way T5")}
    for a, b in itertools.permutations(names, 2):
        assert any(a in row and b not in row for row in rows), f"{a} without {b}"
        assert any(a not in row and b not in row for row in rows), f"neither {a} nor {b}"
    assert len(rows) <= 10


@each_row
def test_every_option_of_a_row_shows(op, names):
    """Without it there is another result; else the row would not test it."""
    args = _row(op, names).build(torch.float64)
    with backends.use_backend("reference"):
        everything = check.evaluate(op.function, op, args)
        for name in names:
            dropped = (OPTIONS | VARLEN_OPTIONS)[name]
            rest = {k: v for k, v in args.items() if k not in dropped}
            without = check.evaluate(op.function, op, rest)
            assert without.keys() != everything.keys() or not torch.equal(without["d_q"], everything["d_q"]), name


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@each_row
def test_any_two_options(op, names, backend):
    check.check_budget(op, _row(op, names), torch.float32, backend, _device(backend))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("op", "names"), MOST)
def test_most_options_in_bfloat16(op, names, backend):
    check.check_budget(op, _row(op, names), torch.bfloat16, backend, _device(backend))


def _check_repeats(op, names, backend, times):
    """The same bits again; in Triton's interpreter with each launch's programs in the other order."""
    args = _row(op, names).build(torch.float32, _device(backend))
    with backends.use_backend(backend):
        first = check.evaluate(op.function, op, args)
        with check.reversed_programs():
            for _ in range(times - 1):
                for name, value in check.evaluate(op.function, op, args).items():
                    assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@each_row
def test_repeats_bitwise(op, names, backend):
    _check_repeats(op, names, backend, 50)


@needs_triton
@pytest.mark.backend("triton")
@pytest.mark.parametrize(("op", "names"), MOST)
def test_repeats_bitwise_in_any_order_of_programs(op, names):
    _check_repeats(op, names, "triton", 3)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(("op", "names"), MOST)
def test_gradients_of_tables_and_sinks_are_added(op, names, backend):
    assert {"one-way T5", "sinks"} <= set(names)
    check.check_accumulation(op, _row(op, names), torch.float32, backend, _device(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@each_row
def test_any_layout_and_any_subset_of_gradients(op, names, backend):
    check.check_layouts(op, _row(op, names), torch.float32, backend)
    check.check_requires_grad(op, _row(op, names), torch.float32, backend)


@needs_triton
@pytest.mark.backend("triton")
def test_any_layout_in_triton():
    """Of every tensor there is."""
    sample = Sample(
        "layouts", **_qkv(2, 1, 1, 3, 7, 16), key_lengths=Values([7, 5], torch.int32), sinks=Normal((1,)),
        bias=Normal((2, 1, 3, 7)), alibi_slopes=Normal((2, 1), 0.2), relative_bias=Normal((8, 1)), relative_max_distance=10,
        segment_ids=Integers((2, 3), 0, 2), key_segment_ids=Integers((2, 7), 0, 2), return_lse=True,
    )  # fmt: skip
    check.check_layouts(OP, sample, torch.float32, "triton", _device("triton"))


@needs_triton
@pytest.mark.backend("triton")
@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "relative_bias", "sinks"])
def test_one_gradient_alone_in_triton(wanted):
    sample = Sample(
        "one gradient", **_qkv(1, 2, 1, 5, 19, 16), bias=Normal((5, 19)), relative_bias=Normal((8, 2)), sinks=Normal((2,))
    )
    args = sample.build(torch.float32, _device("triton"))
    with backends.use_backend("triton"):
        alone = check.evaluate(attention, OP, args, [wanted])
        together = check.evaluate(attention, OP, args)
    assert alone.keys() == {"output", f"d_{wanted}"}
    assert all(torch.equal(value, together[name]) for name, value in alone.items())


FLASH_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
FLASH_SHAPES = (
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024), (1024, 1023),
    (1, 239), (239, 1), (3, 799), (799, 3), (127, 513),
)  # fmt: skip
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": (57, 31)}}


def _grid_case(shape, d, mask, heads, p, dtype, backend):
    sq, sk = shape
    more = {"dropout_p": p, "dropout_seed": SEED} if p else {}
    sample = Sample("grid", **_qkv(1, 6, heads, sq, sk, d), **MASKS[mask], **more)
    check.check_budget(OP, sample, dtype, backend, _device(backend), roundings=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("shape", "d", "heads"), [((113, 203), 40, 2), ((3, 799), 64, 6), ((799, 3), 111, 1)], ids=str)
def test_part_of_the_grid(shape, d, heads, mask, backend):
    _grid_case(shape, d, mask, heads, 0.17, torch.bfloat16, backend)


@pytest.mark.grid
@pytest.mark.parametrize("backend", ALL_BACKENDS[1:] if GPU else BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p", [0.0, 0.17])
@pytest.mark.parametrize("heads", [6, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", FLASH_DIMS)
@pytest.mark.parametrize("shape", FLASH_SHAPES, ids=str)
def test_grid(shape, d, mask, heads, p, dtype, backend):
    """FlashAttention's own grid of tests: `pytest -m grid`. In the interpreter it would take days."""
    _grid_case(shape, d, mask, heads, p, dtype, backend)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_bias_of_minus_infinity_is_a_mask(backend):
    """Of a whole row, too: that query is blind."""
    sample = Sample("mask", **_qkv(1, 2, 1, 9, 20, 16), bias=Integers((1, 1, 9, 20), 0, 2, torch.bool))
    args = sample.build(torch.float32, _device(backend))
    args["bias"][:, :, 4] = False
    args["return_lse"] = True
    with backends.use_backend(backend):
        masked = check.evaluate(attention, OP, args)
        args["bias"] = torch.zeros_like(args["bias"], dtype=torch.float32).masked_fill(~args["bias"], -torch.inf)
        for name, value in check.evaluate(attention, OP, args, ["q", "k", "v"]).items():
            torch.testing.assert_close(value, masked[name], rtol=1e-5, atol=1e-5)
    assert (masked["output 0"][:, :, 4] == 0).all() and (masked["output 1"][:, :, 4] == -torch.inf).all()


MEMORY = """
import resource, sys, torch
from fastlm import backends
from fastlm.ops import attention
torch.set_num_threads(1)
def run(s):
    q, k, v = (torch.randn(1, 1, s, 32, requires_grad=True) for _ in range(3))
    table = torch.randn(32, 1, requires_grad=True)
    with backends.use_backend("cpu"):
        out = attention(q, k, v, relative_bias=table)
        grads = torch.autograd.grad(out, (q, k, v, table), torch.randn_like(out))
    assert all(g.isfinite().all() for g in grads) and grads[3].abs().sum() > 0
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@needs_cpu
@pytest.mark.backend("cpu")
def test_relative_bias_takes_memory_linear_in_the_length():
    """At S = 4096 the peak grows by less than a quarter of what one (S, S) float32 tensor would take."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4096 * 4096 * 4 / 4


def _documents(*ids):
    return {"segment_ids": Values([[ids[0]] * 47 + [ids[1]] * 82 + [ids[2]] * 22], torch.int64)}


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize(
    "options", [_documents(0, 1, 2), _documents(9, 4, -1), _documents(3, 8, 3), {"window": (57, 31)}],
    ids=["rising", "falling", "returning", "window"],
)  # fmt: skip
def test_many_tiles(options, backend):
    """Interior ones, some that no query of another sees, and the first or last key of a document alone in one."""
    sample = Sample("many tiles", **_qkv(1, 1, 1, 151, 151, 16), **options)
    check.check_budget(OP, sample, torch.float32, backend, _device(backend))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_t5_of_transformers(decoder, backend):
    """Its attention layer: scores unscaled, its own bias table, keys beyond its largest distance; gradients too."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        d_model=32, d_kv=8, num_heads=2, dropout_rate=0.0, is_decoder=decoder, relative_attention_max_distance=40
    )
    torch.manual_seed(0)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).eval().to(_device(backend))
    x = torch.randn(1, 110, 32).to(_device(backend))
    seen = torch.ones(110, 110, dtype=torch.bool, device=x.device)
    seen = seen.tril() if decoder else seen
    mask = x.new_zeros(1, 1, 110, 110).masked_fill(~seen, torch.finfo(torch.float32).min)
    theirs = layer(x, mask=mask)[0]
    up = torch.randn_like(theirs)
    table = layer.relative_attention_bias.weight
    exact = torch.autograd.grad(theirs, (layer.q.weight, layer.v.weight, table), up)
    q, k, v = (m(x).view(1, 110, 2, 8).transpose(1, 2) for m in (layer.q, layer.k, layer.v))
    with backends.use_backend(backend):
        y = attention(
            q, k, v, scale=1.0, causal=decoder, relative_bias=table, relative_bidirectional=not decoder,
            relative_max_distance=40,
        )  # fmt: skip
        ours = layer.o(y.transpose(1, 2).reshape(1, 110, 16))
        grads = torch.autograd.grad(ours, (layer.q.weight, layer.v.weight, table), up)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (64, 128), (16, 64), (32, 100), (8, 20), (128, 2048)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(bidirectional, buckets, distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    d = torch.arange(-3000, 3001)
    theirs = t5.T5Attention._relative_position_bucket(d, bidirectional, buckets, distance)
    assert torch.equal(relative_position_bucket(d, buckets, bidirectional, distance), theirs)


@needs_cpu
@pytest.mark.backend("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_sequences_have_the_bits_of_single_ones(dtype):
    """Across tiles and tasks, with T5's bias, a window and sinks."""
    lengths = [700, 1, 0, 90]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(ends[-1], 2, 16, generator=generator).to(dtype).requires_grad_() for _ in range(4))
    options = {
        "causal": True, "window": (200, None), "relative_bias": torch.randn(32, 2, generator=generator),
        "relative_bidirectional": False, "sinks": torch.randn(2, generator=generator),
    }  # fmt: skip
    with backends.use_backend("cpu"):
        out = varlen_attention(q, k, v, ends, ends, 700, 700, **options)
        grads = torch.autograd.grad(out, (q, k, v), up)
        for a, b in itertools.pairwise(ends.tolist()):
            one = [t[a:b].detach().transpose(0, 1)[None].requires_grad_() for t in (q, k, v)]
            alone = attention(*one, **options)
            assert torch.equal(alone[0].transpose(0, 1), out[a:b])
            own = torch.autograd.grad(alone, one, up[a:b].transpose(0, 1)[None])
            for whole, part in zip(grads, own, strict=True):
                assert torch.equal(part[0].transpose(0, 1), whole[a:b])
