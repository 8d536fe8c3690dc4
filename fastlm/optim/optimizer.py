"""What the optimizers share: parameters one by one through an op, the norm of them all, states that torch can read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["FusedOptimizer"]


class FusedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update is one op a parameter, in place; parameters stay where they are.

    Clipping is part of the update, which reads the gradient once more for it and writes it never:

        max_norm 0            no norm is taken: what torch's optimizer does, also with a NaN
        max_norm > 0          clip by the norm of all parameters of all groups, as `clip_grad_norm_` before the step;
                              a step whose norm is not finite changes nothing, decided on the device
        max_norm inf          only the latter
        clip_each             each parameter by its own norm, and skipped by its own

    Half-precision parameters have float32 states unless `state_dtype` says otherwise; a state dict of torch's, whose
    states are as narrow as the parameters, is widened when it is loaded. bfloat16 parameters (and bfloat16 states) are
    rounded to nearest as torch does, or stochastically with a `seed`: steps smaller than their rounding then count on
    average instead of not at all, and a resumed run repeats bit for bit.

    State dicts are torch's in names and shapes; `seed` and `state_dtype` live in the parameter groups.
    A `torch.amp.GradScaler` works: it unscales the gradients and leaves out the step, for which it waits for the device.
    Parameters are updated one after the other: on a GPU with hundreds of small ones launches cost more than
    torch's multi-tensor `fused=True` pays; `fastlm.engine` updates all in one launch. Not for sharded (DTensor)
    parameters.
    """

    STATES: tuple[str, ...] = ()  # of the parameter's shape

    def __init__(
        self, params: Any, defaults: dict[str, Any], max_norm: float, clip_each: bool, seed: int | None,
        state_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        for key in ("lr", "weight_decay", "eps", "momentum", "dampening"):
            value = defaults.get(key, 0.0)
            if isinstance(value, float | int | Tensor) and not value >= 0:
                raise ValueError(f"{name}: {key}: got {value}; allowed: >= 0")
        if isinstance(defaults["lr"], Tensor) and defaults["lr"].numel() != 1:
            raise ValueError(f"{name}: lr: got shape {tuple(defaults['lr'].shape)}; allowed: one element")
        betas = defaults.get("betas", (0.0, 0.0))
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"{name}: betas: got {betas}; allowed: two numbers in [0, 1)")
        if not max_norm >= 0:
            raise ValueError(f"{name}: max_norm: got {max_norm}; allowed: >= 0")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"{name}: state_dtype: got {state_dtype}; allowed: None, torch.float32, torch.bfloat16")
        self.max_norm, self.clip_each = float(max_norm), clip_each
        self._seeds: dict[tuple[int, int, torch.device], Tensor] = {}
        super().__init__(params, defaults | {"seed": seed, "state_dtype": state_dtype})

    # --- what a subclass says

    def _update(self, group: dict[str, Any], shape: torch.Size, shared: dict[str, Any], **tensors: Tensor) -> None:
        """Run the op on `tensors` (master, grad, the states by name, step: flat) with its options from the group."""
        raise NotImplementedError

    def _states(self, group: dict[str, Any], parameter: Tensor) -> tuple[str, ...]:
        """The states that this group keeps of this parameter."""
        return self.STATES

    def _fresh(self, name: str, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A state before the first step."""
        return torch.zeros_like(parameter, dtype=dtype)

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. closure: computes the loss anew, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norms = self._norms()
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step_of(group, parameter, norms, self._seed(group, index, place, parameter.device))
        return loss

    def _step_of(
        self, group: dict[str, Any], parameter: Tensor, norms: Mapping[torch.device, Tensor], seed: Tensor | None
    ) -> None:
        if parameter.is_complex() or parameter.grad is None or parameter.grad.is_sparse:
            kind = "a complex parameter" if parameter.is_complex() else "a sparse gradient"
            raise RuntimeError(f"{type(self).__name__}: got {kind}; allowed: dense real ones")
        state = self.state[parameter]
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        names = self._states(group, parameter)
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in names:
            if name not in state:
                kept = group["state_dtype"] if wide != torch.float64 else None
                state[name] = self._fresh(name, parameter, kept or wide)
        changed = {"master": parameter.detach(), "step": state["step"], **{name: state[name] for name in names}}
        # In memory of its own where a tensor is not contiguous; `step` has no dimensions to lose.
        flat = {name: t.contiguous().view(-1) if name != "step" else t for name, t in changed.items()}
        lr = group["lr"]
        shared = {
            "lr": lr.to(parameter.device, wide).reshape(()) if isinstance(lr, Tensor) else lr,
            "weight_decay": group["weight_decay"],
            "max_norm": self.max_norm,
            "norm": None if self.clip_each and self.max_norm else norms[parameter.device].to(wide),
            "seed": seed,
        }
        self._update(group, parameter.shape, shared, **flat, grad=parameter.grad.contiguous().view(-1))
        for name, t in changed.items():
            if not t.is_contiguous():
                t.copy_(flat[name].view(t.shape))

    def _norms(self) -> dict[torch.device, Tensor]:
        """The norm of all gradients, 0 if nobody asks for it, on every device."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        devices = dict.fromkeys(grad.device for grad in grads)
        total = torch.zeros((), dtype=torch.float64)
        if grads and self.max_norm and not self.clip_each:
            # float32, twice as fast as float64 here: a gradient beyond 1e19, whose square it cannot hold, is skipped
            parts = [
                torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
                for g in grads
                if not g.is_sparse
            ]
            total = torch.linalg.vector_norm(torch.stack([part.to(grads[0].device, torch.float64) for part in parts]))
        return {device: total.to(device) for device in devices}

    def _seed(self, group: dict[str, Any], index: int, place: int, device: torch.device) -> Tensor | None:
        """The seed of one parameter, a function of the group's and of the parameter's place alone."""
        if group["seed"] is None:
            return None
        key = (index, place, device)
        value = (group["seed"] + (index << 40) + (place << 20)) % 2**63
        if key not in self._seeds:
            self._seeds[key] = torch.tensor([value], dtype=torch.int64, device=device)
        return self._seeds[key]

    # --- state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seeds = {}
        for group in self.param_groups:  # of torch's own optimizer
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"max_norm": self.max_norm, "clip_each": self.clip_each}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state dict of this optimizer or of torch's of the same name; states keep their dtype or are widened."""
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize", "differentiable"):
                if group.get(name):
                    raise ValueError(f"{type(self).__name__}: {name}: got True in the state dict; allowed: False")
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, (group, parameter) in zip(ids, _parameters(self.param_groups), strict=True):
            given = state_dict["state"].get(i)
            if given is None:
                continue
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            kept = group["state_dtype"] if wide != torch.float64 else None
            own = self.state[parameter]
            for name, value in given.items():  # the base class casts to the parameter's dtype
                if isinstance(value, Tensor) and value.is_floating_point() and name != "step":
                    own[name] = value.detach().to(parameter.device, kept or wide, copy=True)
            if "step" in given:
                own["step"] = torch.as_tensor(given["step"], dtype=torch.float32).to(parameter.device, copy=True)
            self._complete(own)

    def _complete(self, state: dict[str, Any]) -> None:
        """Add what torch's state has not."""


def _parameters(groups: Iterable[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], Tensor]]:
    return ((group, p) for group in groups for p in group["params"])
