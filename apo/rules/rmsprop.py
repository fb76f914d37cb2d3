"""RMSprop with a free exponent.

    s ← γs + (1 − γ)g²
    θ ← θ − η g / (s^ρ + ε)

with g including the L2 decay wθ. η lr, ρ rho, ε eps, γ alpha, w weight_decay. ρ = ½ is ``torch.optim.RMSprop``; both ρ
and ε act as damping. There is no momentum. With ``bias_correction``, s / (1 − γᵗ) takes the place of s in the step;
without it, as in the source and in torch, the first step is 1/√(1 − γ) = 10 lr per weight at the defaults.
Source: the paper, Eq. 20-21.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop as by_torch

from apo.arithmetic import TINY, alike, average_square, count, plus, plus_ratio
from apo.checks import flag
from apo.domains import AVERAGING, EXPONENT, POSITIVE, hyper
from apo.lifting import elementwise
from apo.trees import scalar
from apo.types import Rule


class RMSpropHypers(NamedTuple):
    """Hyperparameters, each []: lr in parameter units per step (at ρ = ½), eps in units of s^ρ."""

    lr: Tensor
    rho: Tensor
    eps: Tensor
    alpha: Tensor
    weight_decay: Tensor


class RMSpropState(NamedTuple):
    """Averaged squared gradient s, shaped as the parameter; the number of steps, [], where the bias is corrected."""

    square_avg: Tensor
    step: Tensor | None


def init(param: Tensor, *, bias_correction: bool) -> RMSpropState:
    """State before the first step: s = 0."""
    return RMSpropState(torch.zeros_like(param), scalar(0.0) if bias_correction else None)


def step(
    param: Tensor, grad: Tensor, state: RMSpropState, hypers: RMSpropHypers, *, decay: bool
) -> tuple[Tensor, RMSpropState]:
    """One step for one tensor."""
    if decay:
        grad = plus(grad, hypers.weight_decay, param)
    square_avg = average_square(hypers.alpha, state.square_avg, grad)
    s, steps = square_avg, None
    if state.step is not None:
        s, steps = s / (1.0 - hypers.alpha ** (count(state.step) + 1.0)), state.step + 1.0
    # A power has no finite derivative at zero; where s vanishes so does the gradient, and any positive base will do.
    s = s.clamp_min(torch.finfo(s.dtype).tiny)
    return plus_ratio(param, -hypers.lr, grad, s**hypers.rho + hypers.eps), RMSpropState(square_avg, steps)


def in_place(params: list[Tensor], grads: list[Tensor], state: Any, hypers: Any, *, decay: bool) -> bool:
    """The steps of many tensors by torch's kernels, which know ρ = ½ only, and divide by zero where s = ε = 0."""
    as_torch = hypers.rho == 0.5 and hypers.eps >= TINY and state.step is None
    if not as_torch or not alike(params, grads, state.square_avg):
        return False
    by_torch(
        params,
        grads,
        state.square_avg,
        [],
        [],
        [torch.zeros((), device="cpu")] * len(params),  # counts of steps, which it does not use
        foreach=True,
        lr=hypers.lr,
        alpha=hypers.alpha,
        eps=hypers.eps,
        weight_decay=hypers.weight_decay if decay else 0.0,
        momentum=0.0,
        centered=False,
    )
    return True


def rmsprop(
    lr: float = 1e-2,
    rho: float = 0.5,
    eps: float = 1e-8,
    alpha: float = 0.99,
    weight_decay: float = 0.0,
    bias_correction: bool = False,
) -> Rule[RMSpropState, RMSpropHypers]:
    """RMSprop with the exponent of its denominator as a hyperparameter.

    Args:
        lr: Learning rate η ≥ 0, in parameter units per step at ρ = ½.
        rho: Exponent ρ ≥ 0 of the averaged square: ½ is RMSprop, 0 is SGD with learning rate η / (1 + ε).
        eps: ε ≥ 0, in units of s^ρ.
        alpha: γ in [0, 1), the decay of the average (``alpha`` as in torch).
        weight_decay: L2 decay w ≥ 0, added to the gradient as wθ.
        bias_correction: Whether to divide s by 1 − γᵗ. Off as in the source.

    Returns:
        The rule, differentiable in every hyperparameter. A weight_decay given as 0 is left out of the step for good.

    Raises:
        TypeError: If a hyperparameter is not a real number.
        ValueError: If one is outside its set.
    """
    flag(bias_correction=bias_correction)
    hypers = RMSpropHypers(
        lr=hyper("lr", lr),
        rho=hyper("rho", rho),
        eps=hyper("eps", eps),
        alpha=hyper("alpha", alpha, below=1.0),
        weight_decay=hyper("weight_decay", weight_decay),
    )
    domains = {"lr": POSITIVE, "rho": EXPONENT, "eps": POSITIVE, "alpha": AVERAGING, "weight_decay": POSITIVE}
    decay = weight_decay != 0.0
    return elementwise(
        partial(init, bias_correction=bias_correction),
        partial(step, decay=decay),
        hypers,
        domains,
        pack=True,
        numbers=True,
        in_place=partial(in_place, decay=decay),
    )
