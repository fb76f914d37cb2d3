"""Apollo: a diagonal quasi-Newton method that learns the curvature of each parameter tensor from its own steps.

    m' = [β(1 − βᵗ)m + (1 − β)g] / (1 − βᵗ⁺¹)
    α  = [dᵀ(m' − m) + dᵀBd] / (‖d‖₄ + ε)⁴
    B' = B − α Diag(d²)
    d' = m' / max(|B'|, σ)
    θ' = θ − ηd'

from m = d = B = 0 at t = 0; one α for each tensor, everything else elementwise. η lr, β beta, ε eps, w weight_decay.
The L2 decay adds wθ to g; the decoupled decay adds it to d', and so to the d that the next step learns from. α is what
makes dᵀB'd = −dᵀ(m' − m) at ε = 0 with the least change of B. The last step was −ηd, so B is η times the curvature:
where |B| is above σ the step is Newton's, m over the curvature, whatever η is; elsewhere it is SGD's with rate η/σ.

m' − m is computed as (g − m)(1 − β) / (1 − βᵗ⁺¹), which is the same. The step without momentum has g in the place of
m' in d' alone: B' is the real step's, average and all. Source: Ma, arXiv 2009.13586, Algorithms 1 and 2, Eq. 7-11.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apo.arithmetic import alike, count, on_cpu, plus
from apo.checks import choice, real
from apo.domains import AVERAGING, POSITIVE, hyper
from apo.lifting import elementwise
from apo.pieces import in_pieces, rows
from apo.trees import inner, scalar
from apo.types import Rule

Decay = Literal["l2", "decoupled"]


class ApolloHypers(NamedTuple):
    """Hyperparameters, each []: lr in parameter per gradient units, weight_decay in its inverse, eps in gradients."""

    lr: Tensor
    beta: Tensor
    eps: Tensor
    weight_decay: Tensor


class ApolloState(NamedTuple):
    """Averaged gradient m, curvature B and direction d, shaped as the parameter; the number of steps t, []."""

    exp_avg: Tensor
    curvature: Tensor
    direction: Tensor
    step: Tensor


def init(param: Tensor) -> ApolloState:
    """State before the first step: m = B = d = 0, t = 0."""
    m, b, d = (torch.zeros_like(param) for _ in range(3))
    return ApolloState(m, b, d, scalar(0.0))


def step(
    param: Tensor, grad: Tensor, state: ApolloState, hypers: ApolloHypers, *, decay: Decay | None, sigma: float
) -> tuple[Tensor, ApolloState]:
    """One step for one tensor."""
    _, exp_avg, curvature = _prepare(param, grad, state, hypers, decay)
    direction = _direction(param, exp_avg, curvature, hypers, decay, sigma)
    return plus(param, -hypers.lr, direction), ApolloState(exp_avg, curvature, direction, state.step + 1.0)


def without_momentum(
    param: Tensor, grad: Tensor, state: ApolloState, hypers: ApolloHypers, *, decay: Decay | None, sigma: float
) -> Tensor:
    """The step along the gradient over the curvature that the step itself divides by."""
    grad, _, curvature = _prepare(param, grad, state, hypers, decay)
    return plus(param, -hypers.lr, _direction(param, grad, curvature, hypers, decay, sigma))


def in_place(
    params: list[Tensor], grads: list[Tensor], state: Any, hypers: Any, *, decay: Decay | None, sigma: float
) -> bool:
    """The steps of tensors one after the other, on a CPU, each in parts that stay in its cache."""
    if not on_cpu(params) or not alike(params, grads, *state[:3]):
        return False
    for *tensors, steps in zip(params, grads, *state, strict=True):
        parts = [[rows(tensor, cut[""]) for tensor in tensors] for cut in in_pieces({"": tensors[0]})]
        share = (1.0 - hypers.beta) / (1.0 - hypers.beta ** (steps.item() + 1.0))
        _one_in_place(parts, hypers, share, decay, sigma)
        steps += 1.0
    return True


def apollo(
    lr: float = 0.1,
    beta: float = 0.9,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    *,
    decay: Decay = "l2",
    sigma: float = 1.0,
) -> Rule[ApolloState, ApolloHypers]:
    """Apollo, a diagonal quasi-Newton method.

    Only η/σ matters as long as εσ stays (Theorem 1 of the source, which forgets ε): tune η, and leave σ. The source
    warms η up linearly over the first steps, in which B is learnt: that is for a schedule, not for the rule.

    Args:
        lr: Learning rate η ≥ 0, in parameter units per gradient unit. The source warms it up to 0.1 on a small CNN (the
            default here), to 0.5 on CIFAR-10 and to 10 on language.
        beta: β in [0, 1).
        eps: ε ≥ 0, in gradient units: directions that are much shorter teach B nothing.
        weight_decay: w ≥ 0, in gradient units per parameter unit.
        decay: "l2" adds wθ to the gradient, "decoupled" to the direction, where it is not divided by the curvature.
        sigma: σ > 0, the least |B| that a step divides by; B has no unit.

    Returns:
        The rule, differentiable in every hyperparameter. A weight_decay given as 0 is left out of the step for good.

    Raises:
        TypeError: If a number is expected and something else is given.
        ValueError: If one is outside its set, or ``decay`` is neither of the two.
    """
    choice("decay", decay, ("l2", "decoupled"))
    hypers = ApolloHypers(
        lr=hyper("lr", lr),
        beta=hyper("beta", beta, below=1.0),
        eps=hyper("eps", eps),
        weight_decay=hyper("weight_decay", weight_decay),
    )
    domains = {"lr": POSITIVE, "beta": AVERAGING, "eps": POSITIVE, "weight_decay": POSITIVE}
    used, least = decay if weight_decay != 0.0 else None, real("sigma", sigma, ends="()")
    return elementwise(
        init,
        partial(step, decay=used, sigma=least),
        hypers,
        domains,
        partial(without_momentum, decay=used, sigma=least),
        numbers=True,
        in_place=partial(in_place, decay=used, sigma=least),
    )


def _prepare(
    param: Tensor, grad: Tensor, state: ApolloState, hypers: ApolloHypers, decay: Decay | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What both steps share: the gradient after L2 decay, m' and B'."""
    if decay == "l2":
        grad = plus(grad, hypers.weight_decay, param)
    change = (1.0 - hypers.beta) / (1.0 - hypers.beta ** (count(state.step) + 1.0)) * (grad - state.exp_avg)
    # d is scaled before it is squared again. A root has no finite derivative at zero, and ε may be zero; where d
    # vanishes any positive norm will do.
    norm = _norm(state.direction.square()).clamp_min(torch.finfo(state.direction.dtype).tiny).sqrt() + hypers.eps
    unit = state.direction / norm
    share = unit.square()
    alpha = inner(unit, change) / norm + inner(share, state.curvature)  # times (‖d‖₄ + ε)²
    return grad, state.exp_avg + change, state.curvature - alpha * share


def _one_in_place(parts: list[list[Tensor]], hypers: Any, share: float, decay: Decay | None, sigma: float) -> None:
    """The step of one tensor, of each part of which there are the parameter, its gradient, m, B and d."""
    norm = math.hypot(*(_norm(d.square()).item() for *_, d in parts)) ** 0.5 + hypers.eps
    norm = max(norm, torch.finfo(parts[0][0].dtype).tiny ** 0.5)
    alpha = 0.0
    for param, grad, exp_avg, curvature, direction in parts:
        change = grad - exp_avg
        if decay == "l2":
            change.add_(param, alpha=hypers.weight_decay)
        exp_avg.add_(change.mul_(share))
        unit = direction / norm
        alpha += inner(unit, change).item() / norm + inner(unit.square_(), curvature).item()
    for param, _, exp_avg, curvature, direction in parts:
        unit = direction / norm
        curvature.addcmul_(unit, unit, value=-alpha)
        torch.div(exp_avg, torch.abs(curvature, out=unit).clamp_min_(sigma), out=direction)
        if decay == "decoupled":
            direction.add_(param, alpha=hypers.weight_decay)
        param.add_(direction, alpha=-hypers.lr)


def _norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm, [], summed in float64, as fourth powers leave the range of float32 early."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def _direction(
    param: Tensor, along: Tensor, curvature: Tensor, hypers: ApolloHypers, decay: Decay | None, sigma: float
) -> Tensor:
    """A gradient or an average over the rectified curvature, and the decoupled decay."""
    direction = along / curvature.abs().clamp_min(sigma)
    return plus(direction, hypers.weight_decay, param) if decay == "decoupled" else direction
