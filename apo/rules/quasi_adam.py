"""Quasi-Adam: Adam's direction plus a quasi-Newton direction from the last two gradients.

    m ← β₁m + (1 − β₁)g          m̂ = m / (1 − β₁ᵗ)
    v ← β₂v + (1 − β₂)g²         v̂ = v / (1 − β₂ᵗ)
    θ ← θ − η( m̂ / √(v̂ + ε) + w H g )

η lr, w qn_weight, ε eps. H is the inverse Hessian of BFGS with a memory of one pair, s = θ − θ₋₁ and y = g − g₋₁, on
H₀ = γI with γ = sᵀy / yᵀy. Its compact form, γI + ΓMΓᵀ with Γ = [s, γy], applied to a vector u is

    H u = γu + (2 sᵀu/sᵀy − yᵀu/yᵀy) s − (sᵀu/yᵀy) y          so that H y = s.

The pair is accepted if sᵀy ≥ 10⁻¹⁰ ‖s‖‖y‖ and positive; else, and at the first step, Adam's direction is the whole one.
The "switch" variant takes the quasi-Newton direction in the place of Adam's, applies it to the average, and has y from
the averages, too, as they are before the correction for their start:

    θ ← θ − η w H m̂              where the pair is accepted, y = m − m₋₁ = (1 − β₁)(g − m₋₁)
    θ ← θ − η m̂ / √(v̂ + ε)       elsewhere

The step without momentum has g in the place of m̂, and the same pair. Source: Ranganath et al., *Quasi-Adam:
Accelerating Adam using quasi-Newton approximations*, 2024, Eq. 3-5 and 7-10, with w = 1; "switch" is after the code
that its authors released.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apo.checks import choice
from apo.domains import AVERAGING, POSITIVE, hyper
from apo.lifting import collect, init_each, slices
from apo.trees import inner, scalar
from apo.types import Params, Rule

Secant = Literal["global", "tensor"]
Variant = Literal["sum", "switch"]

ACCEPT = 1e-10
"""The smallest cosine between s and y of a pair that is used."""


class QuasiAdamHypers(NamedTuple):
    """Hyperparameters, each []: lr in parameter units per step, eps in squared gradient units.

    qn_weight is in inverse parameter units: lr times it is the part of a quasi-Newton step that is taken.
    """

    lr: Tensor
    qn_weight: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor


class QuasiAdamState(NamedTuple):
    """Averages m and v, the parameter and the gradient of the step before, and the number of steps t, [].

    All but t are shaped as the parameter. What was before is None where qn_weight was made 0, and the gradient also in
    "switch", which has its y from the averages.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    last_param: Tensor | None
    last_grad: Tensor | None
    step: Tensor


class Part(NamedTuple):
    """One tensor's part in a step.

    Attributes:
        name: The parameter's name.
        param: θ.
        adam: Adam's direction, shaped as θ.
        target: The u to which H is applied, likewise.
        pair: s and d, likewise, zero at the tensor's first step; None where qn_weight was made 0.
        rate: y is this times d: 1 − β₁, [], in "switch", where d is the gradient less its last average; 1 in "sum".
        hypers: The tensor's own hyperparameters.
        after: Its state after the step.
    """

    name: str
    param: Tensor
    adam: Tensor
    target: Tensor
    pair: tuple[Tensor, Tensor] | None
    rate: Tensor | float
    hypers: QuasiAdamHypers
    after: QuasiAdamState


def init(param: Tensor, *, pair: bool, variant: Variant) -> QuasiAdamState:
    """State of one tensor before the first step: m = v = 0, t = 0, and nothing of use in the pair."""
    zeros = partial(torch.zeros_like, param)
    last_param, last_grad = (zeros() if kept else None for kept in (pair, pair and variant == "sum"))
    return QuasiAdamState(zeros(), zeros(), last_param, last_grad, scalar(0.0))


def step(
    params: Params, grads: Params, state: QuasiAdamState, hypers: QuasiAdamHypers, *, secant: Secant, variant: Variant
) -> tuple[Params, QuasiAdamState]:
    """One step of all tensors with a gradient."""
    return collect(params, state, _updated(_parts(params, grads, state, hypers, variant), secant, variant))


def without_momentum(
    params: Params, grads: Params, state: QuasiAdamState, hypers: QuasiAdamHypers, *, secant: Secant, variant: Variant
) -> Params:
    """The step with the gradient in the place of its average."""
    parts = _parts(params, grads, state, hypers, variant, momentum=False)
    return collect(params, state, _updated(parts, secant, variant))[0]


def quasi_adam(
    lr: float = 1e-3,
    qn_weight: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    *,
    secant: Secant = "global",
    variant: Variant = "sum",
) -> Rule[QuasiAdamState, QuasiAdamHypers]:
    """Quasi-Adam.

    The pair (s, y) is the difference of the parameters and of the raw gradients between two steps, as they were found:
    a step that somebody shortened or overwrote counts as what it became. In "switch" y is the difference of the
    averages of the gradient. A tensor at its first step has no pair yet, and one without a gradient takes no part; H is
    then that of the others' pair, and is applied to all gradients there are.

    Args:
        lr: Learning rate η ≥ 0, in parameter units per step of Adam.
        qn_weight: Weight w ≥ 0 of the quasi-Newton direction, in inverse parameter units: ηw = 1 is a whole
            quasi-Newton step. 1 as in the source, which adds up the two directions. With 0 the rule is Adam with ε
            inside the root, and keeps no pair.
        beta1: β₁ in [0, 1).
        beta2: β₂ in [0, 1).
        eps: ε ≥ 0, inside the root as in the source, in squared gradient units.
        secant: "global" takes s and y over all tensors together, which under `apo.APO` are those of a parameter group;
            "tensor" gives each tensor a pair, and an H, of its own.
        variant: "sum" adds w H g to Adam's direction. "switch" takes w H m̂ instead of Adam's direction where the pair
            is accepted, m̂ being corrected for its start; there w only scales that step. Its y is m − m₋₁, of averages
            that are not corrected. So does the code that the source's authors released, where w is 1 and the pair each
            tensor's own, as with secant="tensor"; it differs by accepting any sᵀy > 0, and with ε outside the root.

    Returns:
        The rule, differentiable in every hyperparameter. The acceptance of a pair depends on none of them in "sum", and
        on none but beta1 in "switch". A qn_weight given as 0 is left out of the step for good.

    Raises:
        TypeError: If a hyperparameter is not a real number.
        ValueError: If one is outside its set, or an option is not one of those named.
    """
    choice("secant", secant, ("global", "tensor"))
    choice("variant", variant, ("sum", "switch"))
    hypers = QuasiAdamHypers(
        lr=hyper("lr", lr),
        qn_weight=hyper("qn_weight", qn_weight),
        beta1=hyper("beta1", beta1, below=1.0),
        beta2=hyper("beta2", beta2, below=1.0),
        eps=hyper("eps", eps),
    )
    domains = {"lr": POSITIVE, "qn_weight": POSITIVE, "beta1": AVERAGING, "beta2": AVERAGING, "eps": POSITIVE}
    return Rule(
        partial(init_each, partial(init, pair=qn_weight != 0.0, variant=variant)),
        partial(step, secant=secant, variant=variant),
        hypers,
        domains,
        partial(without_momentum, secant=secant, variant=variant),
    )


def _parts(
    params: Params,
    grads: Params,
    state: QuasiAdamState,
    hypers: QuasiAdamHypers,
    variant: Variant,
    *,
    momentum: bool = True,
) -> Iterator[Part]:
    """The part of every tensor with a gradient, with or without its momentum."""
    for name, param, grad, old, own in slices(params, grads, state, hypers):
        count = old.step + 1.0
        exp_avg = own.beta1 * old.exp_avg + (1.0 - own.beta1) * grad
        exp_avg_sq = own.beta2 * old.exp_avg_sq + (1.0 - own.beta2) * grad.square()
        corrected = exp_avg_sq / (1.0 - own.beta2**count) + own.eps
        # A root has no finite derivative at zero; where v̂ + ε vanishes so does g, and any positive number will do.
        root = corrected.clamp_min(torch.finfo(corrected.dtype).tiny).sqrt()
        mean = exp_avg / (1.0 - own.beta1**count) if momentum else grad
        pair, last_param, last_grad = None, None, None
        switch = variant == "switch"
        before = old.exp_avg if switch else old.last_grad
        if old.last_param is not None and before is not None:
            # A product: a count on the CPU may scale tensors on an accelerator, but not always choose between them.
            begun = (old.step > 0.0).to(param.dtype)
            pair = begun * (param - old.last_param), begun * (grad - before)
            # Copies, since the owner of parameters and gradients may go on to write into them.
            last_param, last_grad = param.clone(), None if switch else grad.clone()
        after = QuasiAdamState(exp_avg, exp_avg_sq, last_param, last_grad, count)
        # m − m₋₁ = (1 − β₁)(g − m₋₁), without the rounding errors that the difference has for a y where g = m₋₁.
        target, rate = (mean, 1.0 - own.beta1) if switch else (grad, 1.0)
        yield Part(name, param, mean / root, target, pair, rate, own, after)


def _updated(parts: Iterator[Part], secant: Secant, variant: Variant) -> Iterator[tuple[str, Tensor, QuasiAdamState]]:
    """The name, the new parameter and the new state of every part; one by one where they share nothing."""
    sharing: Iterable[list[Part]] = [list(parts)] if secant == "global" else ([part] for part in parts)
    for group in sharing:
        for part, direction in zip(group, _directions(group, variant), strict=True):
            yield part.name, part.param - part.hypers.lr * direction, part.after


def _directions(parts: Sequence[Part], variant: Variant) -> list[Tensor]:
    """The directions of tensors that share a pair."""
    pairs = [part.pair for part in parts if part.pair is not None]
    if not pairs:
        return [part.adam for part in parts]
    # The rate is of float64, and makes the quotients so: in β₁, they have derivatives that float32 could not hold.
    products = [
        (r * inner(s, d), inner(s, s), r**2 * inner(d, d), inner(s, u), r * inner(d, u))
        for (s, d), r, u in ((pair, part.rate, part.target) for part, pair in zip(parts, pairs, strict=True))
    ]
    sy, ss, yy, su, yu = (_sum(terms) for terms in zip(*products, strict=True))
    # Below the smallest normal number a product has lost its digits, and a quotient of two could be anything.
    least = torch.minimum(sy, torch.minimum(ss, yy))
    accepted = (sy >= ACCEPT * ss.sqrt() * yy.sqrt()) & (least >= torch.finfo(ss.dtype).tiny)
    # A pair that is left out must not divide by zero, or it would leave NaN in the derivatives.
    sy, yy = torch.where(accepted, sy, 1.0), torch.where(accepted, yy, 1.0)
    factors = [torch.where(accepted, f, 0.0) for f in (sy / yy, 2.0 * su / sy - yu / yy, su / yy)]
    directions = []
    for part, (s, d) in zip(parts, pairs, strict=True):
        gamma, along_s, along_y = (factor.to(part.param.device) for factor in factors)
        newton = part.hypers.qn_weight * (gamma * part.target + along_s * s - along_y * part.rate * d)
        if variant == "sum":
            directions.append(part.adam + newton)
        else:
            directions.append(torch.where(accepted.to(part.param.device), newton, part.adam))
    return directions


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of 0-d tensors, [], on the device of the first."""
    return sum((term.to(terms[0].device) for term in terms[1:]), start=terms[0])
