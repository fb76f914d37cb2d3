"""Stochastic damped L-BFGS (SdLBFGS): a limited-memory inverse Hessian that stays positive definite without convexity.

    s = θ' − θ,  y = ∇f(θ'; B) − ∇f(θ; B) on the same batch,  γ = max(yᵀy / sᵀy, δ)
    ȳ = ϑy + (1 − ϑ)γs,  ϑ = 0.75σ / (σ − sᵀy) if sᵀy < 0.25σ, else 1,  σ = γsᵀs        so that sᵀȳ ≥ 0.25σ
    H ← (I − ρsȳᵀ)H(I − ρȳsᵀ) + ρssᵀ,  ρ = 1 / sᵀȳ,  over the last pairs, from H = I/γ;  θ ← θ − lr · Hg

Source: Wang, Ma, Goldfarb, Liu 2017 (SIAM J. Optim. 27:927). The second gradient is taken after the step, on its batch.
variant="released" is the public code (harryliew/SdLBFGS, for torch 0.3) that Apollo's Fig. 5 compares with: γ = 1,
the direction scaled to length 1, and y from the gradients of successive batches. It divides lr by √t besides, which is
left to the schedule here. No package has the method.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

VARIANTS: Final = ("paper", "released")


class Pair(NamedTuple):
    """A displacement s [N] and the damped change of the gradient ȳ [N] along it."""

    s: Tensor
    y: Tensor


def damped(s: Tensor, y: Tensor, gamma: float) -> Tensor:
    """The y of a pair, mixed with γs until sᵀȳ ≥ 0.25 γsᵀs."""
    product, scale = torch.dot(s, y), gamma * torch.dot(s, s)
    weight = torch.where(product < 0.25 * scale, 0.75 * scale / (scale - product), 1.0)
    return weight * y + (1 - weight) * gamma * s


def times_inverse_hessian(vector: Tensor, pairs: list[Pair], gamma: float) -> Tensor:
    """H v by the two loops, [N]; the pairs come oldest first."""
    factors: list[Tensor] = []
    for s, y in reversed(pairs):
        factors.append(torch.dot(s, vector) / torch.dot(s, y))
        vector = vector - factors[-1] * y
    vector = vector / gamma
    for s, y in pairs:
        vector = vector + (factors.pop() - torch.dot(y, vector) / torch.dot(s, y)) * s
    return vector


class SdLBFGS(torch.optim.Optimizer):
    """SdLBFGS, over a closure that returns the loss with its graph.

    Args:
        params: the parameters, in one group.
        lr: 1 is a quasi-Newton step; for variant="released" the length of a step in parameter units.
        memory: how many pairs are kept; 20 is this library's choice, Apollo's Fig. 5 has 100.
        delta: the lower bound of γ; 1 is this library's choice: at 0.1 runs of a small MLP diverged for lr in 0.03-0.3.
        variant: "paper" or "released".

    Raises:
        ValueError: another variant, or a value out of range.
    """

    def __init__(
        self, params: Any, lr: float = 1.0, memory: int = 20, delta: float = 1.0, variant: str = "paper"
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
        if memory < 1 or delta <= 0:
            raise ValueError(f"memory={memory} must be at least 1 and delta={delta} above 0")
        super().__init__(params, {"lr": lr, "memory": memory, "delta": delta, "variant": variant})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take a step.

        Args:
            closure: the loss [] on one batch, with its graph; variant="paper" calls it a second time, after the step.

        Returns:
            The loss before the step, without a graph.
        """
        (group,) = self.param_groups
        state = self.state[group["params"][0]]  # torch casts and moves what belongs to a parameter
        state.setdefault("pairs", [])
        state.setdefault("gamma", 1.0)
        loss = closure()
        grad = self._gradient(loss)
        released = group["variant"] == "released"
        if released and "grad" in state:
            self._remember(state, group, state["s"], grad - state["grad"])
        direction = times_inverse_hessian(grad, [Pair(*pair) for pair in state["pairs"]], state["gamma"])
        if released:
            direction = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
        before = parameters_to_vector(group["params"]).detach()
        after = before - group["lr"] * direction
        sizes = [param.numel() for param in group["params"]]
        with torch.no_grad():
            for param, part in zip(group["params"], after.split(sizes), strict=True):
                param.copy_(part.view_as(param))
        if released:
            state["grad"], state["s"] = grad, after - before
        else:
            self._remember(state, group, after - before, self._gradient(closure()) - grad)
        return loss.detach()

    def _gradient(self, loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, self.param_groups[0]["params"])
        return torch.cat([grad.reshape(-1) for grad in grads])

    def _remember(self, state: dict[str, Any], group: dict[str, Any], s: Tensor, y: Tensor) -> None:
        """Add a pair and drop the oldest beyond the memory; a step of length 0 tells nothing."""
        if not s.any():
            return
        if group["variant"] == "paper":
            product = torch.dot(s, y).item()
            state["gamma"] = max(torch.dot(y, y).item() / product, group["delta"]) if product > 0 else group["delta"]
        state["pairs"] = [*state["pairs"], [s, damped(s, y, state["gamma"])]][-group["memory"] :]
