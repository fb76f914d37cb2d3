"""AdaHessian: Adam with the square of an estimate of the Hessian's diagonal in place of the squared gradient.

    D = |z ⊙ Hz|, z uniform in {−1, 1} (Hutchinson), averaged over a matrix's row, or over a convolution's kernel
    m ← β₁m + (1 − β₁)g,   v ← β₂v + (1 − β₂)D²
    θ ← θ − lr · (m̂ / (√v̂ + ε) + weight_decay · θ),   m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ)

Source: Yao et al. 2021 (arXiv 2006.00719), with the averages and defaults of the authors' code, which is no package and
runs on CUDA only. `pytorch_optimizer.AdaHessian` works with torch 2.13; it leaves out the averages and m's correction.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def hessian_diagonal(grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """One draw of z ⊙ Hz, whose mean over draws is the Hessian's diagonal, from torch's global generator.

    Args:
        grads: the gradients of a loss, with their graphs.
        params: what they are taken by.

    Returns:
        The estimates, in the shapes of `params`.
    """
    signs = [torch.randint_like(param, 2).mul_(2).sub_(1) for param in params]
    products = torch.autograd.grad(grads, params, signs, materialize_grads=True)
    return [sign * product for sign, product in zip(signs, products, strict=True)]


def spatial_average(diagonal: Tensor) -> Tensor:
    """The absolute values, averaged over the inputs of a linear layer's output or over a convolution's kernel."""
    dims = {2: (1,), 3: (2,), 4: (2, 3)}.get(diagonal.dim(), ())
    return diagonal.abs().mean(dims, keepdim=True).expand_as(diagonal) if dims else diagonal.abs()


class AdaHessian(torch.optim.Optimizer):
    """AdaHessian, over a closure that returns the loss with its graph.

    Args:
        params: parameters, or groups of them.
        lr: in parameter units per unit of gradient over curvature; 0.15 in the paper's image classification.
        betas: decay of the averages of g and of D².
        eps: added to √v̂.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take a step.

        Args:
            closure: the loss [], with its graph.

        Returns:
            The loss, without.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        loss = closure()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        diagonals = iter(hessian_diagonal(list(grads), params))
        gradients = iter(grads)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    self._update(param, next(gradients), spatial_average(next(diagonals)), group)
        return loss.detach()

    def _update(self, param: Tensor, grad: Tensor, diagonal: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[param]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(diagonal, diagonal, value=1 - beta2)
        mean = state["exp_avg"] / (1 - beta1 ** state["step"])
        scale = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        param.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, scale, value=-group["lr"])
