"""Cross-entropy between logits and class indices or probabilities, with every option a language model trains with.

    x = softcap * tanh(logit_scale * logits / softcap)  (logit_scale * logits if softcap is None: scale, then cap)
    lse = log(sum_c exp(x_c))
    token loss = u * ((1 - s) * sum_c q_c * (lse - x_c) + s / V * sum_c w_c * (lse - x_c) + z * lse**2)

with s label_smoothing, w the class weights (1 if none), u the token weights (1 if none), z z_loss, V the number of
classes, and q_c = w_c * [c = t] for a class index t, w_c * target_c for probabilities; and

    "none": the token losses, 0 where ignored          "sum": their sum
    "mean": sum of the first two terms / sum of u * w_t + sum of the third / sum of u, both over tokens not
            ignored. For probabilities w_t is 1 here: PyTorch, too, divides by the number of tokens.

Gradients. With p = exp(x - lse), d lse / d x_c = p_c. For a token with upstream gradients G of the first two
terms and H of the third (both d_loss * u, for "mean" over the denominator of each; the returned z term adds its own
to H), and L of the returned lse:
    A = G * (1 - s)        B = G * s / V        D = H * 2 * z * lse + L        Q = sum_c q_c        W = sum_c w_c
    d x_c = A * (Q * p_c - q_c) + B * (W * p_c - w_c) + D * p_c
    d logits_c = d x_c * logit_scale * (1 - (x_c / softcap)**2)
Neither the target nor a weight has a gradient.

Saved: logits, target and weights as given; statistics (3, ...): lse in two float32 parts whose sum it is, so
that p is as exact for logits around 1e4 as around 1 (one float32 holds 1e4 to 5e-4 only), and the token
losses without u and z-loss, all 0 where ignored, and for probabilities (4, ...): Q; denominators (2): the two of the
mean, on the device. float64 for float64.

The loss is float32 (float64 for float64) whatever the dtype of the logits: a bfloat16 loss of 4 is off by up
to 0.008.

Edge cases
 1  leading dimensions, V not a power of two      9  a class weight of 0 for every target: the mean is 0
 2  no leading dimension                         10  reduction "none"
 3  ignored tokens                               11  reduction "sum" with every option
 4  label smoothing                              12  no tokens
 5  class weights and label smoothing            13  V = 1
 6  z-loss, mean over tokens and not weights     14  V wider than one block
 7  soft-capped logits                           15  logits around 1e4
 8  every token ignored: loss 0 and gradient 0   16  a logit of -inf (a masked class)
18  probabilities                                17  float32 class weights with bfloat16 logits
19  probabilities, every option                  20  the extras, every option
21  a class of probability 0 whose logit is -inf adds 0, where PyTorch gives NaN
22  a target of NO_CLASS

Sources: label smoothing, Szegedy et al. (2015), arXiv:1512.00567, section 7; z-loss, Chowdhery et al., "PaLM"
(2022), arXiv:2204.02311, section 5; soft cap, Gemma Team, "Gemma 2" (2024), arXiv:2408.00118, section 2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_floating, check_same_device
from ..registry import Cost, Op, Spec, register
from . import cross_entropy_samples as examples
from .cross_entropy_arguments import check_class_vector, check_options, check_targets, check_token_weight
from .cross_entropy_math import (
    CrossEntropyExtras,
    Options,
    class_weights,
    reduce,
    result_specs,
    results,
    token_gradients,
    token_statistics,
    upstream,
    wide,
)

__all__ = ["cross_entropy"]


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    """logits (..., V), target (...) or (..., V) -> loss () or (...), the extras, statistics, denominators (2)."""
    o = Options(*options)
    w = class_weights(weight, wide(logits))
    statistics, *marks = token_statistics(logits, target, w, o)
    loss, z, denominators = reduce(statistics, target, w, token_weight, o)
    return *results(loss, z, statistics, marks), statistics, denominators


def backward(
    d_loss: Tensor | None, d_z: Tensor | None, d_lse: Tensor | None, logits: Tensor, target: Tensor,
    weight: Tensor | None, token_weight: Tensor | None, statistics: Tensor, denominators: Tensor, *rest: Any,
) -> tuple[Tensor | None]:  # fmt: skip
    """d_loss and d_z () or (...), d_lse (...) -> d_logits like logits."""
    *options, needs = rest
    if not needs[0]:
        return (None,)
    o, w = Options(*options), class_weights(weight, wide(logits))
    up = upstream(d_loss, d_z, d_lse, target, w, token_weight, denominators, o)
    return (token_gradients(up, logits, target, w, statistics, o).to(logits.dtype),)


def outputs(
    logits: Tensor, target: Tensor, weight: Any, token_weight: Any, *options: Any
) -> tuple[Spec, ...]:
    """loss; the extras; statistics, denominators."""
    return result_specs(logits, target, Options(*options))


def gradients(d_loss: Any, d_z: Any, d_lse: Any, logits: Tensor, *rest: Any) -> tuple[Spec, ...]:
    """d_logits."""
    return (Spec(tuple(logits.shape), logits.dtype),)


def cost(logits: Tensor, target: Tensor, **options: Any) -> Cost:
    """Forward reads the logits, backward reads them and writes as much; about 5 operations an element. Both read
    probabilities."""
    read = logits.nbytes + (target.nbytes if target.is_floating_point() else 0.0)
    return Cost(5.0 * logits.numel(), 1.0 * read, 5.0 * logits.numel(), read + logits.nbytes)


op = register(
    Op(
        name="cross_entropy",
        schema="(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, int ignore_index, "
        "float label_smoothing, float z_loss, float? softcap, float logit_scale, str reduction, bool extras) -> "
        "(Tensor loss, Tensor z, Tensor lse, Tensor correct, Tensor confidence, Tensor entropy, Tensor statistics, "
        "Tensor denominators)",
        forward=forward,
        backward=backward,
        outputs=outputs,
        gradients=gradients,
        cost=cost,
        peer=examples.peer,
        samples=examples.samples,
        errors=examples.errors,
        random=examples.random,
        case=examples.case,
        shapes=examples.shapes,
        grads=("logits",),
        saved=("logits", "target", "weight", "token_weight", "statistics", "denominators"),
        results=3,
        constants=3,
    )
)


def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, reduction: str = "mean",
    logit_scale: float = 1.0, token_weight: Tensor | None = None, extras: bool = False, tape: Any = None,
) -> Any:  # fmt: skip
    """``torch.nn.functional.cross_entropy`` of logits with classes last, and more.

    Args:
        logits: (..., V), floating-point, V >= 1; never written to.
        target: (...), int64, in [0, V) or ignore_index. One out of range raises IndexError on a CPU; on a GPU,
            where looking would stall the device, it makes the loss NaN. Or (..., V), of logits' dtype or float32:
            a probability for each class, as PyTorch takes them; it has no gradient (requires_grad is refused).
            `fastlm.ops.NO_CLASS` is a target that is none of these V classes (of a shard of a vocabulary): w_t and
            q are 0, and smoothing, z-loss and the extras are as for any token.
        weight: (V,), of logits' dtype or float32: a weight for each class; None for 1. It has no gradient.
        ignore_index: tokens with this target add nothing to the loss and have gradient 0, whatever their
            logits. It does not apply to probabilities, as in PyTorch.
        label_smoothing: in [0, 1]; weighted as in PyTorch.
        z_loss: adds z_loss * lse**2, of the scaled and capped logits, for every token not ignored, never weighted by
            class.
        softcap: c > 0 replaces logits by c * tanh(logit_scale * logits / c); None leaves them.
        reduction: "mean" divides by the sum of the targets' weights (for probabilities by the number of tokens), and
            the z-loss by the number of tokens not ignored; "sum"; or "none".
        logit_scale: > 0, multiplies the logits, before the cap.
        token_weight: (...), of logits' dtype or float32: multiplies each token's loss, its z term too. The mean
            divides by sum(token_weight * the target's weight), the z-loss by sum(token_weight), over tokens not
            ignored. It has no gradient (requires_grad is refused).
        extras: also return what the same pass can tell of each token, see `CrossEntropyExtras`.
        tape: the engine's, for a forward pass without autograd.

    Returns:
        The loss, in nats, () or (...) for "none"; float32 (float64 for float64) whatever the dtype of logits.
        A mean over nothing (every token ignored, or every target of weight 0) is 0 with gradient 0, where
        PyTorch gives NaN. With extras, (loss, CrossEntropyExtras).

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was given and what is allowed.
    """
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}; allowed: (..., V) with V >= 1")
    check_targets("logits", logits, target, logits.shape[-1])
    check_class_vector("weight", weight, logits.shape[-1], logits.dtype)
    check_token_weight(token_weight, logits)
    check_same_device(logits=logits, target=target, weight=weight, token_weight=token_weight)
    o = check_options(ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, extras)
    loss, *more = op(logits, target, weight, token_weight, *o, tape=tape)
    return (loss, CrossEntropyExtras(*more)) if extras else loss
