"""Adam and AdamW.

    m ← β₁m + (1 − β₁)g          m̂ = m / (1 − β₁ᵗ)
    v ← β₂v + (1 − β₂)g²         v̂ = v / (1 − β₂ᵗ)
    θ ← θ − η m̂ / (√v̂ + ε)

η lr, ε eps, w weight_decay. Adam adds the L2 decay wθ to g; AdamW shrinks θ by 1 − ηw instead (decoupled decay). The
step without momentum has g in the place of m̂. Source: the paper, Eq. 22-26; AdamW from
Loshchilov & Hutter, arXiv 1711.05101. Equal to ``torch.optim.Adam`` and ``torch.optim.AdamW``.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as by_torch

from apo.arithmetic import TINY, Number, alike, average, average_square, count, on_cpu, plus, plus_number, plus_ratio
from apo.domains import AVERAGING, POSITIVE, hyper
from apo.lifting import elementwise
from apo.trees import scalar
from apo.types import Rule


class AdamHypers(NamedTuple):
    """Hyperparameters, each []: lr in parameter units per step, eps in gradient units."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor


class AdamState(NamedTuple):
    """Averaged gradient m and squared gradient v, shaped as the parameter, and the number of steps t, []."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def init(param: Tensor) -> AdamState:
    """State before the first step: m = v = 0, t = 0."""
    return AdamState(torch.zeros_like(param), torch.zeros_like(param), scalar(0.0))


def step(
    param: Tensor, grad: Tensor, state: AdamState, hypers: AdamHypers, *, decay: bool, decoupled: bool
) -> tuple[Tensor, AdamState]:
    """One step for one tensor."""
    steps = count(state.step) + 1.0
    kept, grad, exp_avg_sq, root, denominator = _prepare(param, grad, state, hypers, steps, decay, decoupled)
    exp_avg = average(hypers.beta1, state.exp_avg, grad)
    scale = root * hypers.lr / (1.0 - hypers.beta1**steps)
    return plus_ratio(kept, -scale, exp_avg, denominator), AdamState(exp_avg, exp_avg_sq, state.step + 1.0)


def without_momentum(
    param: Tensor, grad: Tensor, state: AdamState, hypers: AdamHypers, *, decay: bool, decoupled: bool
) -> Tensor:
    """The step along the scaled gradient alone."""
    steps = count(state.step) + 1.0
    kept, grad, _, root, denominator = _prepare(param, grad, state, hypers, steps, decay, decoupled)
    return plus_ratio(kept, -root * hypers.lr, grad, denominator)


def in_place(
    params: list[Tensor], grads: list[Tensor], state: Any, hypers: Any, *, decay: bool, decoupled: bool
) -> bool:
    """The steps of many tensors by torch's kernels, which divide by zero where v = ε = 0."""
    if hypers.eps < TINY or not alike(params, grads, state.exp_avg, state.exp_avg_sq):
        return False
    fused = on_cpu(params)
    by_torch(
        params,
        grads,
        state.exp_avg,
        state.exp_avg_sq,
        [],
        [steps.to(torch.float32, copy=True) for steps in state.step] if fused else state.step,
        foreach=not fused,
        fused=fused,
        amsgrad=False,
        beta1=hypers.beta1,
        beta2=hypers.beta2,
        lr=hypers.lr,
        weight_decay=hypers.weight_decay if decay else 0.0,
        eps=hypers.eps,
        maximize=False,
        decoupled_weight_decay=decoupled,
    )
    if fused:
        torch._foreach_add_(state.step, 1.0)
    return True


def adam(
    lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Rule[AdamState, AdamHypers]:
    """Adam, with L2 weight decay.

    Args:
        lr: Learning rate η ≥ 0, in parameter units per step.
        beta1: β₁ in [0, 1).
        beta2: β₂ in [0, 1).
        eps: ε ≥ 0, in gradient units.
        weight_decay: L2 decay w ≥ 0, added to the gradient as wθ.

    Returns:
        The rule, differentiable in every hyperparameter. A weight_decay given as 0 is left out of the step for good.

    Raises:
        TypeError: If a hyperparameter is not a real number.
        ValueError: If one is outside its set.
    """
    return _factory(lr, beta1, beta2, eps, weight_decay, decoupled=False)


def adamw(
    lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-2
) -> Rule[AdamState, AdamHypers]:
    """Adam with decoupled weight decay.

    Args:
        lr: Learning rate η ≥ 0, in parameter units per step.
        beta1: β₁ in [0, 1).
        beta2: β₂ in [0, 1).
        eps: ε ≥ 0, in gradient units.
        weight_decay: Decoupled decay w ≥ 0: θ shrinks by the factor 1 − ηw.

    Returns:
        The rule, differentiable in every hyperparameter. A weight_decay given as 0 is left out of the step for good.

    Raises:
        TypeError: If a hyperparameter is not a real number.
        ValueError: If one is outside its set.
    """
    return _factory(lr, beta1, beta2, eps, weight_decay, decoupled=True)


def _factory(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool
) -> Rule[AdamState, AdamHypers]:
    hypers = AdamHypers(
        lr=hyper("lr", lr),
        beta1=hyper("beta1", beta1, below=1.0),
        beta2=hyper("beta2", beta2, below=1.0),
        eps=hyper("eps", eps),
        weight_decay=hyper("weight_decay", weight_decay),
    )
    domains = {"lr": POSITIVE, "beta1": AVERAGING, "beta2": AVERAGING, "eps": POSITIVE, "weight_decay": POSITIVE}
    decay = weight_decay != 0.0
    return elementwise(
        init,
        partial(step, decay=decay, decoupled=decoupled),
        hypers,
        domains,
        partial(without_momentum, decay=decay, decoupled=decoupled),
        pack=True,
        numbers=True,
        in_place=partial(in_place, decay=decay, decoupled=decoupled),
    )


def _prepare(
    param: Tensor, grad: Tensor, state: AdamState, hypers: AdamHypers, steps: Number, decay: bool, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor, Number, Tensor]:
    """What both steps share: the parameter and gradient after decay, v, c = √(1 − β₂ᵗ), and c(√v̂ + ε) = √v + cε."""
    kept = param
    if decay and decoupled:
        kept = param * (1.0 - hypers.lr * hypers.weight_decay)
    elif decay:
        grad = plus(grad, hypers.weight_decay, param)
    exp_avg_sq = average_square(hypers.beta2, state.exp_avg_sq, grad)
    root = (1.0 - hypers.beta2**steps) ** 0.5
    # A root has no finite derivative at zero; where v vanishes so does g, and any positive number will do.
    positive = exp_avg_sq.clamp_min(torch.finfo(exp_avg_sq.dtype).tiny)
    denominator = plus_number(positive.sqrt_(), root * hypers.eps)
    return kept, grad, exp_avg_sq, root, denominator
