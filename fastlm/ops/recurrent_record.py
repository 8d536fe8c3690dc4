"""The records of the recurrent layers lstm, gru and rnn: what they share beside their cells (recurrent_math.py).

Schema: (x, weight, bias, h0, [c0], lengths, [nonlinearity], reverse) -> y, h, [c], [gates], [cells].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import autocast, check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from ..samples import Bad, Integers, Normal, Pick, Sample, Values
from . import recurrent_math as math_of
from .recurrent_math import CELLS, Cell

__all__: list[str] = []

_LENGTHS = Values([3, 1, 4, 0, 9], torch.int64)


def _arguments(
    cell: Cell, shape: tuple[int, int, int], state: bool = True, scale: float = 1.0
) -> dict[str, Any]:
    """x, weight and the first state for a shape (seq, batch, hidden)."""
    seq, batch, hidden = shape
    rows = cell.gates * hidden
    start = Normal((batch, hidden), scale=0.5)
    states = {"h0": start, **({"c0": start} if cell.c else {})}
    return {
        "x": Normal((seq, batch, rows), scale=scale), "weight": Normal((rows, hidden), scale=hidden**-0.5),
        **(states if state else {}),
    }  # fmt: skip


def samples_of(cell: Cell, **more: Any) -> tuple[Sample, ...]:
    """Edge cases 1 to 10. more: the op's own option."""

    def sample(
        edge: str, *shape: int, bias: bool = False, state: bool = True, scale: float = 1.0, **given: Any
    ) -> Sample:
        seq, batch, hidden = shape
        if bias:
            given["bias"] = Normal((cell.gates * hidden,), scale=0.5)
        return Sample(edge, **_arguments(cell, (seq, batch, hidden), state, scale), **given, **more)

    return (
        sample("1 plain", 3, 3, 7, bias=True),
        sample("2 no bias, no state", 3, 2, 5, state=False),
        sample("3 reversed", 3, 2, 7, bias=True, reverse=True),
        sample("4 lengths", 4, 5, 6, bias=True, lengths=_LENGTHS),
        sample("5 lengths reversed", 4, 5, 6, bias=True, lengths=_LENGTHS, reverse=True),
        sample("6 blocks", 2, 14, 70, bias=True),
        sample("7 no steps", 0, 2, 4, bias=True),
        sample("8 no rows", 3, 0, 4, bias=True),
        sample("9 one unit", 3, 1, 1, bias=True),
        sample("10 saturated", 3, 2, 6, scale=6.0),
    )


def errors_of(cell: Cell) -> tuple[Bad, ...]:
    """Bad arguments that all refuse."""
    x, w, n = Normal((3, 2, 4 * cell.gates)), Normal((4 * cell.gates, 4)), 4 * cell.gates
    return (
        Bad("x integer", TypeError, r"x: .*int64.*floating", x=Values([[[1]]], torch.int64), weight=w),
        Bad("x dimensions", ValueError, r"x: .*\(2, \d+\).*seq, batch", x=Normal((2, n)), weight=w),
        Bad("weight", ValueError, rf"weight: .*\({n + 1}, 4\).*\({n}, 4\)", x=x, weight=Normal((n + 1, 4))),
        Bad("weight dtype", TypeError, r"weight: .*float64.*float32", x=x, weight=Normal((n, 4), dtype=torch.float64)),
        Bad("x width", ValueError, rf"x: .*\(3, 2, {n - 1}\).*{n}", x=Normal((3, 2, n - 1)), weight=w),
        Bad("bias", ValueError, rf"bias: .*\(4, 1\).*\({n},\)", x=x, weight=w, bias=Normal((4, 1))),
        Bad("h0", ValueError, r"h0: .*\(3, 4\).*\(2, 4\)", x=x, weight=w, h0=Normal((3, 4)),
            **({"c0": Normal((2, 4))} if cell.c else {})),
        Bad("lengths", TypeError, r"lengths: .*float32.*int64", x=x, weight=w, lengths=Normal((2,))),
        Bad("lengths shape", ValueError, r"lengths: .*\(3,\).*\(2,\)", x=x, weight=w,
            lengths=Values([1, 2, 3], torch.int64)),
    )  # fmt: skip


def register_recurrent(
    name: str, option: str = "", *, samples: Sequence[Sample], errors: Sequence[Bad] = (), choices: Sequence[str] = (),
) -> Op:  # fmt: skip
    """The op `name`. option: the schema's text of what picks the cell, `choices` its values; empty where there is one."""
    cell = CELLS[f"{name}_{choices[0]}" if choices else name]
    states = ("h", "c") if cell.c else ("h",)
    n_states = len(states)

    def cell_of(options: Sequence[Any]) -> Cell:
        return CELLS[f"{name}_{options[0]}"] if choices else cell

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        starts, (lengths, *options) = rest[:n_states], rest[n_states:]
        y, last, kept, cells = math_of.forward(cell_of(options), x, weight, bias, starts, lengths, options[-1])
        return (y, *last, *([kept] if cell.kept else []), *([cells] if cell.c else []))

    def backward(*args: Any) -> tuple[Tensor | None, ...]:
        dy, *d_state = args[: 1 + n_states]
        weight, *rest = args[1 + n_states :]
        starts, (lengths, y, *rest) = tuple(rest[:n_states]), rest[n_states:]
        kept = rest.pop(0) if cell.kept else None
        cells = rest.pop(0) if cell.c else None
        *options, needs = rest
        dx, d_weight, d_bias, d_starts = math_of.backward(
            cell_of(options), dy, tuple(d_state), weight, starts, lengths, y, kept, cells, options[-1]
        )
        grads = (dx.to(y.dtype), d_weight, d_bias, *(d.to(y.dtype) for d in d_starts))
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))

    def outputs(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Spec, ...]:
        (seq, batch, _), hidden = x.shape, weight.shape[1]
        specs = [Spec((seq, batch, hidden), x.dtype), *[Spec((batch, hidden), x.dtype)] * n_states]
        specs += [Spec((seq, batch, cell.kept * hidden), x.dtype)] if cell.kept else []
        return *specs, *([Spec((seq, batch, hidden), _sums(x.dtype))] if cell.c else [])

    def gradients(*args: Any) -> tuple[Spec, ...]:
        weight, y = args[1 + n_states], args[3 + 2 * n_states]
        (seq, batch, hidden), rows = y.shape, weight.shape[0]
        return (
            Spec((seq, batch, rows), y.dtype), Spec((rows, hidden), _sums(y.dtype)), Spec((rows,), _sums(y.dtype)),
            *[Spec((batch, hidden), y.dtype)] * n_states,
        )  # fmt: skip

    def cost(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Cost:
        """The recurrent product of every step, of which backward has two; x in, y and what is kept out, and back."""
        product, y = 2.0 * x.shape[0] * x.shape[1] * weight.numel(), x.nbytes / cell.gates
        kept = cell.kept * y + (x.numel() / cell.gates * 4 if cell.c else 0)
        pointwise = 10.0 * x.numel()
        return Cost(
            product + pointwise, x.nbytes + weight.nbytes + y + kept,
            2 * product + 2 * pointwise, x.nbytes + 2 * weight.nbytes + 2 * y + kept,
        )  # fmt: skip

    def peer(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, lengths: Tensor | None = None, reverse: bool = False,
        nonlinearity: str = "tanh", **starts: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """PyTorch's own layer behind a projection by the identity, which multiplies by 1 and adds 0."""
        return _torch_layer(name, nonlinearity, cell, x, weight, bias, starts, lengths, reverse)

    def random(pick: Pick) -> Sample:
        """Any small sizes, with and without state, bias and lengths, in both directions."""
        shape = pick.integer(1, 4), pick.integer(1, 6), pick.integer(1, 20)
        lengths = pick.one_of(None, Integers((shape[1],), 0, shape[0] + 2))
        bias = pick.one_of(None, Normal((cell.gates * shape[2],)))
        more = {option.split()[1]: pick.one_of(*choices)} if choices else {}
        return Sample(
            "random", **_arguments(cell, shape, pick.one_of(True, False), pick.one_of(1.0, 0.01)),
            bias=bias, lengths=lengths, reverse=pick.one_of(False, True), **more,
        )  # fmt: skip

    def case(seq: int = 64, batch: int = 32, hidden: int = 512) -> Sample:
        """A layer with a bias and a state, no lengths."""
        bias = Normal((cell.gates * hidden,))
        return Sample("case", **_arguments(cell, (seq, batch, hidden)), bias=bias)

    starts = [f"{s}0" for s in states]
    kept = [*(["gates"] if cell.kept else []), *(["cells"] if cell.c else [])]
    given = ["Tensor x", "Tensor weight", "Tensor? bias", *(f"Tensor? {s}" for s in starts), "Tensor? lengths"]
    schema = ", ".join([*given, *filter(None, [option]), "bool reverse"])
    shapes: Mapping[str, Sequence[Mapping[str, Any]]] = {
        "default": ({"hidden": 256}, {"hidden": 512}, {"hidden": 650}),
        "sweep": tuple({"batch": b} for b in (1, 8, 128)),
        "large": ({"batch": 256, "hidden": 2048},),
    }
    return register(
        Op(
            name=name,
            schema=f"({schema}) -> ({', '.join(f'Tensor {n}' for n in ('y', *states, *kept))})",
            forward=forward,
            backward=backward,
            outputs=outputs,
            gradients=gradients,
            cost=cost,
            peer=peer,
            samples=samples,
            errors=(*errors_of(cell), *errors),
            random=random,
            case=case,
            shapes=shapes,
            grads=("x", "weight", "bias", *starts),
            accumulates=("weight", "bias"),
            saved=("weight", *starts, "lengths", "y", *kept),
            results=1 + n_states,
            contiguous=False,
        )
    )


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _torch_layer(
    name: str, nonlinearity: str, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Mapping[str, Any],
    lengths: Tensor | None, reverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (seq, batch, rows), hidden = x.shape, weight.shape[1]
    given = [starts.get(s) for s in ("h0", "c0")[: 1 + cell.c]]
    state = [x.new_zeros(batch, hidden) if s is None else s for s in given]
    some = torch.arange(batch, device=x.device) if lengths is None else (lengths > 0).nonzero()[:, 0]
    if seq == 0 or not len(some):  # PyTorch refuses this; a sum of zeros links the results to every argument
        nothing = (x.sum() + weight.sum() + (0.0 if bias is None else bias.sum())) * 0
        return x[..., :hidden] * 0 + nothing, *(s + nothing for s in state)
    own = [torch.eye(rows, dtype=x.dtype, device=x.device), weight]
    own += [] if bias is None else [torch.zeros_like(bias), bias]
    weights = [torch.zeros_like(w) for w in own] + own if reverse else own
    run = getattr(torch._VF, f"rnn_{nonlinearity}" if name == "rnn" else name)
    first = [s[some][None] for s in state]
    first = [torch.cat([torch.zeros_like(s), s]) if reverse else s for s in first]
    hx = first if cell.c else first[0]
    options = (bias is not None, 1, 0.0, torch.is_grad_enabled(), reverse)
    last: list[Tensor]
    if lengths is None:
        out, *last = run(x, hx, weights, *options, False)
    else:
        order = lengths[some].argsort(descending=True, stable=True)
        some = some[order]
        sizes = lengths[some].clamp(max=seq)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x[:, some], sizes.cpu())
        hx = [h[:, order] for h in first] if cell.c else first[0][:, order]
        data, *last = run(packed.data, packed.batch_sizes, hx, weights, *options)
        again = torch.nn.utils.rnn.PackedSequence(data, packed.batch_sizes)
        part, _ = torch.nn.utils.rnn.pad_packed_sequence(again, total_length=seq)
        out = x.new_zeros(seq, batch, part.shape[-1]).index_copy(1, some, part)
    y = out[..., -hidden:]
    return y, *(s.index_copy(0, some, new[-1]) for s, new in zip(state, last, strict=True))


def recurrent(
    op: Op, cell: Cell, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Mapping[str, Tensor | None],
    lengths: Tensor | None, options: tuple[Any, ...], reverse: bool, tape: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Validate once and apply."""
    check_floating("x", x)
    check_floating("weight", weight)
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}; allowed: (seq, batch, {cell.gates} * hidden)")
    if weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[0] != cell.gates * weight.shape[1]:
        hidden = weight.shape[-1] if weight.dim() else 1
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}; allowed: {(cell.gates * hidden, hidden)}, "
            f"({cell.gates} * hidden, hidden) with hidden >= 1"
        )
    if x.shape[2] != weight.shape[0]:
        raise ValueError(f"x: got shape {tuple(x.shape)}; allowed: (seq, batch, {weight.shape[0]}), weight's rows")
    state = (x.shape[1], weight.shape[1])
    for name, t, shape in (("bias", bias, weight.shape[:1]), *((n, s, state) for n, s in starts.items())):
        if t is not None:
            check_floating(name, t)
            if t.shape != shape:
                raise ValueError(f"{name}: got shape {tuple(t.shape)}; allowed: {tuple(shape)}")
    if len({s is None for s in starts.values()}) > 1:
        missing = next(n for n, s in starts.items() if s is None)
        raise ValueError(f"{missing}: got None with {', '.join(n for n in starts if n != missing)}; allowed: both or none")
    if lengths is not None:
        if lengths.dtype != torch.int64:
            raise TypeError(f"lengths: got dtype {lengths.dtype}; allowed: torch.int64")
        if lengths.shape != x.shape[1:2]:
            raise ValueError(f"lengths: got shape {tuple(lengths.shape)}; allowed: {tuple(x.shape[1:2])}, the batch")
    check_same_device(x=x, weight=weight, bias=bias, lengths=lengths, **starts)
    given: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, **starts}
    present = [name for name, t in given.items() if t is not None]
    given |= dict(zip(present, autocast(*(given[name] for name in present)), strict=True))
    dtype = given["x"].dtype
    for name in present:
        if given[name].dtype != dtype:
            raise TypeError(f"{name}: got dtype {given[name].dtype}; allowed: x's, {dtype}")
    return tuple(op(*given.values(), lengths, *options, reverse, tape=tape))
