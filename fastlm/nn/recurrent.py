"""LSTM, GRU and RNN: layers in one or both directions, each the projection of all inputs at once, then the recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .. import ops
from .dropout import draw_seed

__all__ = ["GRU", "LSTM", "RNN"]


class _Recurrent(torch.nn.RNNBase):
    """What the three share: the parameters of torch.nn's modules, with forward and backward of ours.

    Not subclasses of those modules, by which torch.compile knows what it refuses to trace.
    """

    _op = ""
    _states: tuple[str, ...] = ("h0",)

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        if self.proj_size:
            raise ValueError(f"proj_size: got {self.proj_size}; allowed: 0")

    def _options(self) -> dict[str, Any]:
        return {}

    @property
    def directions(self) -> int:
        """1, or 2 for both."""
        return 2 if self.bidirectional else 1

    def _weights(self, k: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """weight_ih, weight_hh, bias_ih, bias_hh of state k: the direction k % directions of layer k // directions."""
        layer, direction = divmod(k, self.directions)
        end = f"_l{layer}{'_reverse' if direction else ''}"
        bias = [getattr(self, f"bias_{kind}{end}") if self.bias else None for kind in ("ih", "hh")]
        return getattr(self, f"weight_ih{end}"), getattr(self, f"weight_hh{end}"), *bias

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, lengths: Tensor | None = None, tape: Any = None
    ) -> Any:
        """As torch.nn's: (output, h), for LSTM (output, (h, c)).

        input: (seq, batch, input_size), with batch_first (batch, seq, input_size); without a batch (seq, input_size); or a
            PackedSequence, not with a tape.
        hx: h0, for LSTM (h0, c0), of (layers * directions, batch, hidden_size); None for 0.
        lengths: (batch,) int64, what of each row is not padding, for the packed sequence's results without packing: the
            output is 0 at padding.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, lengths, tape)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}; allowed: 2 or 3 dimensions, the last {self.input_size}"
            )
        hx = self._given(hx)
        if input.dim() == 2:
            output, state = self._run(input.unsqueeze(1), None if hx is None else [s.unsqueeze(1) for s in hx], lengths, tape)
            return output.squeeze(1), self._returned([s.squeeze(1) for s in state])
        x = _swapped(input, tape) if self.batch_first else input
        output, state = self._run(x, hx, lengths, tape)
        return (_swapped(output, tape) if self.batch_first else output), self._returned(state)

    def _given(self, hx: Any) -> tuple[Any, ...] | None:
        if hx is None:
            return None
        given = tuple(hx) if len(self._states) > 1 else (hx,)
        first = self.num_layers * self.directions
        for name, s in zip(self._states, given, strict=True):
            if s is None:
                continue
            if s.dim() < 2 or s.shape[0] != first or s.shape[-1] != self.hidden_size:
                raise ValueError(
                    f"{name}: got shape {tuple(s.shape)}; allowed: ({first}, batch, {self.hidden_size})"
                )
        return given

    def _returned(self, state: Sequence[Tensor]) -> Any:
        return tuple(state) if len(self._states) > 1 else state[0]

    def _packed(self, packed: PackedSequence, hx: Any, lengths: Tensor | None, tape: Any) -> Any:
        """A PackedSequence back, its rows in the order and the places of the one that came."""
        if tape is not None or lengths is not None:
            name = "tape" if lengths is None else "lengths"
            raise ValueError(f"{name}: got one with a PackedSequence; allowed: None")
        x, sizes = pad_packed_sequence(packed)  # in the caller's order of rows, as hx is
        output, state = self._run(x, self._given(hx), sizes.to(x.device), None)
        if packed.sorted_indices is not None:
            output, sizes = output.index_select(1, packed.sorted_indices), sizes[packed.sorted_indices.cpu()]
        data, batch_sizes = torch._VF._pack_padded_sequence(output, sizes, False)
        again = PackedSequence(data, batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return again, self._returned(state)

    def _run(
        self, x: Tensor, hx: Sequence[Tensor] | None, lengths: Tensor | None, tape: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """x (seq, batch, input_size) -> output (seq, batch, directions * hidden_size), the last states."""
        op, last = getattr(ops, self._op), []
        for layer in range(self.num_layers):
            if layer and self._drops:
                x = ops.dropout(x, self.dropout, seed=draw_seed(x.device, tape), tape=tape)
            parts = []
            for k in range(layer * self.directions, (layer + 1) * self.directions):
                w_ih, w_hh, b_ih, b_hh = self._weights(k)
                gates = F.linear(x, w_ih, b_ih) if tape is None else tape.linear(x, w_ih, b_ih)
                starts = {} if hx is None else {n: s[k] for n, s in zip(self._states, hx, strict=True)}
                reverse = k % self.directions == 1
                y, *state = op(
                    gates, w_hh, b_hh, **starts, **self._options(), lengths=lengths, reverse=reverse, tape=tape
                )
                parts.append(y)
                last.append(state)
            x = parts[0] if len(parts) == 1 else _joined(parts, tape)
        return x, [_stacked(s, tape) for s in zip(*last, strict=True)]

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def backward(self, dy: Tensor | None, tape: Any, d_state: Any = None) -> tuple[Tensor, Any]:
        """(dx, the gradient of hx, None if there was none), the mirror of forward on 3-dimensional input.

        dy: like the output; d_state: like the state that forward returned; each, and each part, None for 0.
        """
        if dy is not None and self.batch_first:
            dy = dy.transpose(0, 1)
        upstream = self._given(d_state) or (None,) * len(self._states)
        starts: list[Sequence[Tensor]] = []
        n, hidden = self.directions, self.hidden_size
        for layer in reversed(range(self.num_layers)):
            dx: Tensor | None = None
            for k in reversed(range(layer * n, (layer + 1) * n)):
                w_ih, w_hh, b_ih, b_hh = self._weights(k)
                part = None if dy is None else dy[..., k % n * hidden : (k % n + 1) * hidden]
                ups = (None if s is None else s[k] for s in upstream)
                grads = tape.backward(self._op, part, *ups, weight=w_hh, bias=b_hh)
                d_gates, *d_start = grads if isinstance(grads, tuple) else (grads,)
                d = tape.linear_backward(d_gates, w_ih, b_ih)
                dx = d if dx is None else dx.add_(d)
                starts.insert(0, d_start)
            dy = tape.backward("dropout", dx) if layer and self._drops else dx
        assert dy is not None
        d_hx = [_stacked(s, tape) for s in zip(*starts, strict=True)]
        return _swapped(dy, tape) if self.batch_first else dy, self._returned(d_hx) if d_hx else None


class LSTM(_Recurrent):
    """Drop-in for ``torch.nn.LSTM``: same constructor, initialisation, state dict and results. Refused: proj_size."""

    _op = "lstm"
    _states = ("h0", "c0")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(_Recurrent):
    """Drop-in for ``torch.nn.GRU``: same constructor, initialisation, state dict and results."""

    _op = "gru"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNN(_Recurrent):
    """Drop-in for ``torch.nn.RNN``: same constructor, initialisation, state dict and results."""

    _op = "rnn"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", *args: Any, **kwargs: Any
    ) -> None:  # fmt: skip
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: got {nonlinearity!r}; allowed: tanh, relu")
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)
        self.nonlinearity = nonlinearity

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}


def _swapped(x: Tensor, tape: Any) -> Tensor:
    """The first two dimensions exchanged; on a tape contiguous."""
    x = x.transpose(0, 1)
    return x if tape is None else tape.empty(x.shape, x.dtype).copy_(x)


def _joined(parts: Sequence[Tensor], tape: Any) -> Tensor:
    """Side by side in the last dimension."""
    if tape is None:
        return torch.cat(list(parts), -1)
    n = parts[0].shape[-1]
    out: Tensor = tape.empty((*parts[0].shape[:-1], n * len(parts)), parts[0].dtype)
    for i, part in enumerate(parts):
        out[..., i * n : (i + 1) * n].copy_(part)
    return out


def _stacked(parts: Sequence[Tensor], tape: Any) -> Tensor:
    """In a new first dimension."""
    if tape is None:
        return torch.stack(list(parts))
    out: Tensor = tape.empty((len(parts), *parts[0].shape), parts[0].dtype)
    for i, part in enumerate(parts):
        out[i].copy_(part)
    return out
