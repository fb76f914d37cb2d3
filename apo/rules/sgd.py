"""Stochastic gradient descent, with heavy-ball or Nesterov momentum.

    v ← μv + (1 − τ)g                (v = g at the first step)
    θ ← θ − ηv                       heavy ball
    θ ← θ − η(g + μv)                Nesterov

with g including the L2 decay wθ. η lr, μ momentum, τ dampening, w weight_decay. The step without momentum is
θ ← θ − ηg. Source: the paper, Eq. 18-19 (SGDm there is ``momentum=0.9, nesterov=True``);
the defaults, and every option, are those of ``torch.optim.SGD``.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd as by_torch

from apo.arithmetic import alike, count, on_cpu, plus, scaled
from apo.checks import flag
from apo.domains import AVERAGING, POSITIVE, hyper
from apo.lifting import elementwise
from apo.types import Rule


class SGDHypers(NamedTuple):
    """Hyperparameters, each []: lr in parameter units per gradient unit, weight_decay in its inverse."""

    lr: Tensor
    momentum: Tensor
    dampening: Tensor
    weight_decay: Tensor


class SGDState(NamedTuple):
    """Averaged gradient v, shaped as the parameter, and whether it has begun, []; None without momentum."""

    momentum_buffer: Tensor | None
    begun: Tensor | None


def init(param: Tensor, *, momentum: bool) -> SGDState:
    """State before the first step: v = 0."""
    if not momentum:
        return SGDState(None, None)
    return SGDState(torch.zeros_like(param), torch.zeros((), dtype=torch.bool, device="cpu"))


def step(
    param: Tensor, grad: Tensor, state: SGDState, hypers: SGDHypers, *, nesterov: bool, decay: bool
) -> tuple[Tensor, SGDState]:
    """One step for one tensor."""
    grad = _decayed(param, grad, hypers, decay)
    if state.momentum_buffer is None or state.begun is None:
        return plus(param, -hypers.lr, grad), state
    share = 1.0 - hypers.dampening * count(state.begun)
    buffer = plus(scaled(share, grad), hypers.momentum, state.momentum_buffer)
    direction = plus(grad, hypers.momentum, buffer) if nesterov else buffer
    return plus(param, -hypers.lr, direction), SGDState(buffer, torch.ones_like(state.begun))


def without_momentum(param: Tensor, grad: Tensor, state: SGDState, hypers: SGDHypers, *, decay: bool) -> Tensor:
    """The step along the gradient alone."""
    return plus(param, -hypers.lr, _decayed(param, grad, hypers, decay))


def in_place(
    params: list[Tensor], grads: list[Tensor], state: Any, hypers: Any, *, nesterov: bool, decay: bool
) -> bool:
    """The steps of many tensors by torch's kernels."""
    buffers, begun = state
    if not alike(params, grads, *([buffers] if buffers else [])):
        return False
    if buffers and (hypers.momentum == 0.0 or (hypers.dampening and not all(begun))):
        return False  # torch would leave v as it is, or damp the first gradient
    fused = on_cpu(params)
    by_torch(
        params,
        grads,
        buffers or [None for _ in params],
        foreach=not fused and not nesterov,  # which would write to the gradients
        fused=fused,
        weight_decay=hypers.weight_decay if decay else 0.0,
        momentum=hypers.momentum if buffers else 0.0,
        lr=hypers.lr,
        dampening=hypers.dampening,
        nesterov=nesterov,
        maximize=False,
    )
    for entry in begun or []:
        entry.fill_(True)
    return True


def sgd(
    lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False
) -> Rule[SGDState, SGDHypers]:
    """Stochastic gradient descent.

    Args:
        lr: Learning rate η ≥ 0, in parameter units per gradient unit.
        momentum: μ in [0, 1).
        dampening: τ in [0, 1). The first gradient enters the average undamped.
        weight_decay: L2 decay w ≥ 0, added to the gradient as wθ.
        nesterov: Whether to look ahead along the momentum; needs momentum > 0 and dampening = 0.

    Returns:
        The rule, differentiable in every hyperparameter. Momentum or decay given as 0 is left out of the step for good.

    Raises:
        TypeError: If a hyperparameter is not a real number.
        ValueError: If one is outside its set, or ``nesterov`` is given without momentum or with dampening.
    """
    flag(nesterov=nesterov)
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError(f"nesterov needs momentum > 0 and dampening = 0, not {momentum=} and {dampening=}")
    hypers = SGDHypers(
        lr=hyper("lr", lr),
        momentum=hyper("momentum", momentum, below=1.0),
        dampening=hyper("dampening", dampening, below=1.0),
        weight_decay=hyper("weight_decay", weight_decay),
    )
    domains = {"lr": POSITIVE, "momentum": AVERAGING, "dampening": AVERAGING, "weight_decay": POSITIVE}
    decay = weight_decay != 0.0
    return elementwise(
        partial(init, momentum=momentum != 0.0),
        partial(step, nesterov=nesterov, decay=decay),
        hypers,
        domains,
        partial(without_momentum, decay=decay) if momentum != 0.0 else None,
        pack=True,
        numbers=True,
        in_place=partial(in_place, nesterov=nesterov, decay=decay),
    )


def _decayed(param: Tensor, grad: Tensor, hypers: SGDHypers, decay: bool) -> Tensor:
    return plus(grad, hypers.weight_decay, param) if decay else grad
