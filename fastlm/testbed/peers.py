"""What our ops are held against: the best that a PyTorch user could call instead, by name.

    eager             plain PyTorch, as models write it; the quickest way to write it, not the op's oracle
    compile           torch.compile of that
    sdpa, flex        F.scaled_dot_product_attention; flex_attention, compiled (attention only)
    liger, cce        liger-kernel and cut-cross-entropy, where installed, on a GPU
    torch-linear-ce   F.linear_cross_entropy in chunks (linear_cross_entropy only)

`find` gives a peer for a call or raises Absent with the reason. A peer that cannot do what the call asks is absent: it
would be timed at something else. What a peer computes is compared with float64 like our own results (bench.py), so
that an error column stands beside every ratio.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import info, ops
from ..registry import Op
from . import plain

__all__ = ["Absent", "NAMES", "Peer", "find"]

Args = Mapping[str, Any]


class Absent(Exception):
    """This peer cannot be compared here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A function with the signature of an op's public one."""

    function: Callable[..., Any]
    note: str = ""  # in what it differs; "" if in nothing
    comparable: bool = True  # its results can be held against ours
    prepare: Callable[[Args], dict[str, Any]] = dict  # the arguments as this peer wants them; untimed
    spoils: tuple[str, ...] = ()  # arguments that it overwrites


def find(name: str, op: Op, args: Args, direction: str) -> Peer:
    """The peer of that name for ``op.function(**args)``, timed in a direction: forward, backward or both.

    Raises Absent with the reason, ValueError for an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no peer named {name!r}; there are {', '.join(NAMES)}")
    return _BUILDERS[name](op, args, direction)


def _is_gpu(args: Args) -> bool:
    return any(isinstance(a, Tensor) and a.is_cuda for a in args.values())


def _only(op: Op, *names: str) -> None:
    if op.name not in names:
        raise Absent(f"it has no {op.name}")


def _lacks(args: Args, *options: str) -> None:
    """Absent if the call uses an option that the peer does not have."""
    if used := [name for name in options if _is_set(args.get(name))]:
        raise Absent(f"it has no {', '.join(used)}")


def _is_set(option: Any) -> bool:
    return isinstance(option, Tensor) or bool(option)


# --- plain PyTorch


def _narrow(x: str, *names: str) -> Callable[[Args], dict[str, Any]]:
    """Parameters in the activations' dtype, as a model in that dtype has them."""

    def prepare(args: Args) -> dict[str, Any]:
        dtype = args[x].dtype
        return {k: v.to(dtype) if k in names and isinstance(v, Tensor) else v for k, v in args.items()}

    return prepare


def _decayed_first(args: Args) -> dict[str, Any]:
    """AdamW's buffers with the decayed elements in front: to PyTorch they are two groups of parameters."""
    mask = args["decay_mask"]
    order = (mask == 0).to(torch.uint8).argsort(stable=True)
    return {
        k: v[order] if isinstance(v, Tensor) and v.shape == mask.shape else v for k, v in args.items()
    }  # fmt: skip


# What the losses have and torch's cross-entropy has not.
_BEYOND_TORCH = ("z_loss", "softcap", "token_weight", "extras", "logit_scale")


def _eager(op: Op, args: Args, direction: str) -> Peer:
    match op.name:
        case "add_layer_norm" | "add_rms_norm" if args.get("dropout_p"):
            norm: Callable[..., Any] = plain.add_layer_norm if op.name == "add_layer_norm" else plain.add_rms_norm
            note, _, narrow = _parameters(args, "x", "weight", "bias", "x_bias")
            return Peer(norm, "; ".join(filter(None, ("draws its own mask", note))), False, narrow)
        case "layer_norm" | "add_layer_norm":
            norm = plain.layer_norm if op.name == "layer_norm" else plain.add_layer_norm
            # On a CPU torch takes float32 parameters with a narrower input, and is faster at it; on a GPU it refuses.
            narrow_too = _is_gpu(args) or args.get("x_bias") is not None
            return Peer(norm, *_parameters(args, "x", "weight", "bias", "x_bias")) if narrow_too else Peer(norm)
        case "rms_norm" | "add_rms_norm":
            norm = plain.rms_norm if op.name == "rms_norm" else plain.add_rms_norm
            return Peer(norm, *_parameters(args, "x", "weight", "x_bias"))
        case "lstm" | "gru" | "rnn":
            return Peer(op.peer, "projects its inputs too, by the identity: for a fair ratio see benchmarks.train_step")
        case "gelu":
            return Peer(plain.gelu, *_parameters(args, "x", "bias"))
        case "dropout":
            return Peer(plain.dropout, "draws its own mask", comparable=False)
        case "cross_entropy" | "linear_cross_entropy" if not any(_is_set(args.get(name)) for name in _BEYOND_TORCH):
            return Peer(plain.cross_entropy if op.name == "cross_entropy" else plain.linear_cross_entropy)
        case "attention" if not _beyond_plain(args) and not _blind(args):
            return Peer(plain.attention)
        case "adamw" if args.get("decay_mask") is None:
            return Peer(plain.adamw(args["master"].numel()))
        case "adamw":
            return Peer(plain.adamw(int((args["decay_mask"] != 0).sum())), prepare=_decayed_first)
    return Peer(op.peer)


def _parameters(args: Args, x: str, *names: str) -> tuple[str, bool, Callable[[Args], dict[str, Any]]]:
    """(note, comparable, prepare) of a peer that wants its parameters in the activations' dtype."""
    given = [args[n] for n in names if isinstance(args.get(n), Tensor)]
    if all(t.dtype == args[x].dtype for t in given):
        return "", True, dict
    return f"parameters in {args[x].dtype}".replace("torch.", ""), True, _narrow(x, *names)


def _beyond_plain(args: Args) -> list[str]:
    """The options of a call of attention that plain attention does not know."""
    return [name for name in args.keys() - {"q", "k", "v", "causal", "scale"} if _is_set(args[name])]


def _blind(args: Args) -> bool:
    """Whether some queries see no key, where softmax gives NaN."""
    return args["k"].shape[2] == 0 or (bool(args.get("causal")) and args["q"].shape[2] > args["k"].shape[2])


def _compiled(op: Op, args: Args, direction: str) -> Peer:
    if op.name == "adamw":  # element by element: what it has to fuse
        return Peer(torch.compile(plain.adamw_formula, dynamic=False))
    eager = _eager(op, args, direction)
    return replace(eager, function=torch.compile(eager.function, dynamic=False))


# --- other attention


# What PyTorch's function can be given as a mask.
_MASKED = (
    "window", "segment_ids", "key_segment_ids", "bias", "relative_bias", "relative_bidirectional",
    "relative_max_distance",
)  # fmt: skip


def _plain_attention(op: Op, args: Args, takes: tuple[str, ...] = ()) -> None:
    if op.name != "attention":
        raise Absent("it has attention only")
    if args.get("dropout_p"):
        raise Absent("it draws its own dropout mask")
    _lacks(args, *(name for name in _beyond_plain(args) if name not in takes))
    if _blind(args):
        raise Absent("a query that sees no key gives NaN")


def _sdpa(op: Op, args: Args, direction: str) -> Peer:
    _plain_attention(op, args, _MASKED)
    queries, keys = args["q"].shape[2], args["k"].shape[2]
    masked = any(args.get(name) is not None for name in _MASKED)
    if args.get("causal") and queries != keys and not masked:
        raise Absent("its causal mask is aligned top-left")
    distance = torch.arange(keys, device=args["q"].device)
    distance = distance - torch.arange(keys - queries, keys, device=args["q"].device)[:, None]
    seen, buckets = (_seen(args, distance) if masked else None), None  # made once, as in a model, and not timed
    if (table := args.get("relative_bias")) is not None:
        both, far = args.get("relative_bidirectional", True), args.get("relative_max_distance", 128)
        buckets = ops.relative_position_bucket(distance, table.shape[0], both, far)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
        bias: Tensor | None = None, relative_bias: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        grouped, mask = q.shape[1] != k.shape[1], seen
        if relative_bias is not None:
            own = relative_bias[buckets].permute(2, 0, 1).to(q.dtype)
            bias = own if bias is None else own + bias
        if bias is not None and bias.dtype != torch.bool:
            mask = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
        )

    return Peer(attention, "with a mask" if masked else "")


def _seen(args: Args, distance: Tensor) -> Tensor | None:
    """Which keys each query sees, broadcast to (batch, heads, queries, keys); None for all."""
    left, right = args.get("window") or (None, None)
    conditions = [distance >= -left] if left is not None and left >= 0 else []
    conditions += [distance <= right] if right is not None and right >= 0 else []
    conditions += [distance <= 0] if args.get("causal") else []
    if (own := args.get("segment_ids")) is not None:
        other = own if args.get("key_segment_ids") is None else args["key_segment_ids"]
        conditions.append(own[:, None, :, None] == other[:, None, None, :])
    if (bias := args.get("bias")) is not None and bias.dtype == torch.bool:
        conditions.append(bias)
    seen: Tensor | None = None
    for condition in conditions:
        seen = condition if seen is None else seen & condition
    return seen


def _flex(op: Op, args: Args, direction: str) -> Peer:
    _plain_attention(op, args)
    q, k = args["q"], args["k"]
    if direction != "forward" and not _is_gpu(args):
        raise Absent("it has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offset, mask = k.shape[2] - q.shape[2], None
    if args.get("causal"):  # made once, as in a model, and not timed

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i + offset

        mask = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        out: Tensor = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
        return out

    return Peer(attention)


# --- other libraries


def _library(package: str, module: str, args: Args) -> Any:
    if not info.installed(package):
        raise Absent(f"{package} is not installed")
    if not _is_gpu(args):
        raise Absent("it needs a GPU")
    try:
        return importlib.import_module(module)
    except Exception as error:  # another version, or one that this Triton cannot run: not our failure
        raise Absent(f"{package} cannot be imported: {type(error).__name__}: {error}") from error


def _whole(direction: str) -> None:
    if direction == "backward":
        raise Absent("it computes its gradients in forward: see both")


def _liger(op: Op, args: Args, direction: str) -> Peer:
    _only(op, "layer_norm", "rms_norm", "cross_entropy", "linear_cross_entropy")
    liger = _library("liger-kernel", "liger_kernel.transformers.functional", args)
    if op.name == "layer_norm":
        if args.get("weight") is None or args.get("bias") is None:
            raise Absent("it needs a weight and a bias")

        def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
            y: Tensor = liger.liger_layer_norm(x, weight, bias, eps)
            return y

        return Peer(layer_norm)
    if op.name == "rms_norm":
        if args.get("weight") is None:
            raise Absent("it needs a weight")

        def rms_norm(
            x: Tensor, weight: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: str = "gemma"
        ) -> Tensor:
            y: Tensor = liger.liger_rms_norm(x, weight, eps, offset, casting, in_place=False)  # else it overwrites dy
            return y

        return Peer(rms_norm)
    _whole(direction)
    _lacks(args, "token_weight", "extras", "logit_scale")
    if op.name == "cross_entropy":

        def cross_entropy(logits: Tensor, target: Tensor, z_loss: float = 0.0, **options: Any) -> Tensor:
            flat = logits.view(-1, logits.shape[-1])
            loss: Tensor = liger.liger_cross_entropy(flat, target.view(-1), lse_square_scale=z_loss, **options)
            return loss

        # The gradient is written over the logits: a user who needs them has to keep a copy.
        return Peer(cross_entropy, "overwrites the logits", spoils=("logits",))

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
        class_weight: Tensor | None = None, z_loss: float = 0.0, workspace_mb: float | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        loss: Tensor = liger.liger_fused_linear_cross_entropy(
            hidden.view(-1, hidden.shape[-1]), weight, target.view(-1), bias, class_weight,
            lse_square_scale=z_loss, **options,
        )  # fmt: skip
        return loss

    return Peer(linear_cross_entropy)


def _cce(op: Op, args: Args, direction: str) -> Peer:
    _only(op, "linear_cross_entropy")
    cce = _library("cut-cross-entropy", "cut_cross_entropy", args)
    _lacks(args, "label_smoothing", "class_weight", "bias", *(n for n in _BEYOND_TORCH if n != "softcap"))
    if args["hidden"].dtype == torch.float32:
        raise Absent("its backward takes float16 and bfloat16 only")

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, target: Tensor, bias: None = None, *, ignore_index: int = -100,
        softcap: float | None = None, reduction: str = "mean", **_: Any,
    ) -> Tensor:  # fmt: skip
        loss: Tensor = cce.linear_cross_entropy(
            hidden, weight, target, ignore_index=ignore_index, softcap=softcap, reduction=reduction
        )
        return loss

    return Peer(linear_cross_entropy, "leaves out small gradients")


def _torch_linear_ce(op: Op, args: Args, direction: str) -> Peer:
    _only(op, "linear_cross_entropy")
    function = getattr(F, "linear_cross_entropy", None)
    options_type = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options_type is None:
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    _lacks(args, *_BEYOND_TORCH)
    _whole(direction)

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
        class_weight: Tensor | None = None, workspace_mb: float | None = None, z_loss: float = 0.0,
        softcap: None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        loss: Tensor = function(
            hidden, weight, target, linear_bias=bias, weight=class_weight, options=options_type(), **options
        )
        return loss

    return Peer(linear_cross_entropy)


_BUILDERS: dict[str, Callable[[Op, Args, str], Peer]] = {
    "eager": _eager,
    "compile": _compiled,
    "sdpa": _sdpa,
    "flex": _flex,
    "liger": _liger,
    "cce": _cce,
    "torch-linear-ce": _torch_linear_ce,
}
NAMES = tuple(_BUILDERS)
