"""The noisy quadratic: what a learning rate schedule does to SGD, in exact expectation.

    f̃(x) = ½ (x − c)ᵀH(x − c),   c ∼ N(0, V) anew at every step,   g = H(x − c);   H, V diagonal

The coordinates do not mix, so three second moments of each follow a recursion of their own, and the expected loss under
any schedule needs no sampling. With A = E x², M = E xv and W = E v², for v' = μv + g and x' = x − ηv':

    A' = (1 − ηh)²A + η²h²V − 2(1 − ηh)ημM + η²μ²W          E f = ½ Σ hA
    M' = (1 − ηh)hA − ηh²V + (1 − 2ηh)μM − ημ²W
    W' = h²(A + V) + 2μhM + μ²W

A policy says which learning rate is taken next, given these moments. `NoisyQuadratic.greedy` looks one step ahead, as
every method does that asks what the next step is worth; `NoisyQuadratic.apo` minimises the proximal objective.

Source: the paper, App. F, where f̃ lacks the ½: with it, the model has the numbers of the source's Table 2. The problem
is that of Schaul et al. (2013) and Wu et al. (2018), who found the short-horizon bias on it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo.checks import real, whole
from apo.types import Params, Rule


class Moments(NamedTuple):
    """Second moments of every coordinate.

    Attributes:
        position: A = E x², [..., N].
        mixed: M = E xv, [..., N].
        velocity: W = E v², [..., N].
    """

    position: Tensor
    mixed: Tensor
    velocity: Tensor


Policy = Callable[[int, Moments], Tensor]
"""From the number of steps taken and the moments to the next learning rate, [...]."""


class Course(NamedTuple):
    """What a policy leads to.

    Attributes:
        loss: The expected loss ½ Σ hA before the first step and after every step, [..., T + 1].
        rates: The learning rate of every step, [..., T].
        moments: The moments at the end.
    """

    loss: Tensor
    rates: Tensor
    moments: Moments


class NoisyQuadratic:
    """The noisy quadratic problem, in float64.

    Attributes:
        curvature: h, the diagonal of H, evenly spaced from 1/κ to 1, [N].
        variance: The variance of c in each coordinate, [N].
        start: The moments at rest at the initial point.
    """

    def __init__(
        self, dimension: int = 1000, condition: float = 100.0, noise: float = 1.0, start: float = 100.0
    ) -> None:
        """Set the problem up; the defaults are the source's.

        Args:
            dimension: N ≥ 2.
            condition: κ ≥ 1, the ratio of the extreme curvatures.
            noise: The variance of c in each coordinate, times its curvature.
            start: The value of every coordinate of the initial point.

        Raises:
            TypeError: If a value is of the wrong type.
            ValueError: If it is out of its range.
        """
        whole("dimension", dimension)
        if dimension < 2:
            raise ValueError(f"dimension={dimension!r} is below 2")
        real("condition", condition, low=1.0)
        self.curvature = torch.linspace(1.0 / condition, 1.0, dimension, dtype=torch.float64)
        self.variance: Tensor = real("noise", noise) / self.curvature
        position = torch.full((dimension,), real("start", start) ** 2, dtype=torch.float64)
        self.start = Moments(position, torch.zeros_like(position), torch.zeros_like(position))

    def loss(self, moments: Moments) -> Tensor:
        """The expected loss without the noise's own part, ½ Σ hA, [...]."""
        return 0.5 * moments.position @ self.curvature

    def run(self, policy: Policy, steps: int, momentum: float = 0.0, start: Moments | None = None) -> Course:
        """The exact expected course of SGD under a policy; differentiable in what the policy depends on.

        Args:
            policy: Says the learning rates.
            steps: T, how many there are.
            momentum: μ of `apo.sgd` and `torch.optim.SGD`.
            start: The moments to start from; the default is the initial point at rest.

        Returns:
            Losses, learning rates and the moments at the end.

        Raises:
            TypeError: If ``steps`` or ``momentum`` is of the wrong type.
            ValueError: If one is out of its range.
        """
        whole("steps", steps)
        real("momentum", momentum)
        h, v = self.curvature, self.variance
        moments = self.start if start is None else start
        losses, rates = [self.loss(moments)], []
        for step in range(steps):
            rate = policy(step, moments)
            a, m, w = moments
            eta = rate[..., None]
            kept, taken = 1.0 - eta * h, eta * h  # not A − 2ηhA + η²h²A, which cancels where ηh is near 1
            position = kept.square() * a + taken.square() * v
            mixed = h * (kept * a - taken * v)
            velocity = h.square() * (a + v)
            if momentum:
                position = position - momentum * eta * (2.0 * kept * m - momentum * eta * w)
                mixed = mixed + momentum * ((kept - taken) * m - momentum * eta * w)
                velocity = velocity + momentum * (momentum * w + 2.0 * h * m)
            moments = Moments(position, mixed, velocity)
            losses.append(self.loss(moments))
            rates.append(rate)
        losses[0] = losses[0].expand(losses[-1].shape)  # a policy may bring in leading dimensions
        return Course(torch.stack(losses, -1), torch.stack(rates, -1), moments)

    @staticmethod
    def scheduled(rates: Tensor | Sequence[float]) -> Policy:
        """The policy that takes given learning rates, [..., T]."""
        table = torch.as_tensor(rates, dtype=torch.float64)
        return lambda step, moments: table[..., step]

    def greedy(self) -> Policy:
        """The policy that minimises the expected loss after the next step: η = Σh²A / Σh³(A + V)."""
        return self.apo(0.0, fresh=True)

    def apo(self, penalties: Tensor | float, fresh: bool = False) -> Policy:
        """The policy that minimises the expected proximal objective, J = f̃(x') + λ‖x' − x‖².

        Judged on the batch that gave the gradient, η = Σh²(A + V) / Σh²(h + 2λ)(A + V): the step may well reduce the
        loss on that batch's own noise. Judged on a fresh batch, V is absent from the numerator.

        Args:
            penalties: λ, one for all steps, or [..., T].
            fresh: Whether f̃ is that of a fresh batch.

        Returns:
            The policy. It is exact without momentum; with momentum the step is judged without it. A λ so far below 0
            that J falls for ever, κ + 2λ ≤ 0 with κ = Σh³(A + V) / Σh²(A + V), gives an infinite learning rate.
        """
        h2 = self.curvature.square()
        h3 = self.curvature * h2
        table = torch.as_tensor(penalties, dtype=torch.float64)

        def policy(step: int, moments: Moments) -> Tensor:
            penalty = table[..., step] if table.ndim else table
            whole_square = moments.position + self.variance
            gain = moments.position @ h2 if fresh else whole_square @ h2
            bend = whole_square @ h3 + 2.0 * penalty * (whole_square @ h2)
            return torch.where(bend <= 0.0, math.inf, gain / bend)

        return policy

    def hypergradient_descent(self, rate: float, meta_rate: float) -> Policy:
        """The policy of multiplicative hypergradient descent (Baydin et al., 2018), in the mean.

        η ← η (1 + β C), with C = E[gₜᵀgₜ₋₁] / E‖gₜ₋₁‖² and E[gₜᵀgₜ₋₁] = Σh²((1 − ηh)A − ηhV) for SGD without momentum.
        The source divides by the norms of both gradients; in expectation the one before stands for both.

        Args:
            rate: The first learning rate.
            meta_rate: β.

        Returns:
            The policy; it starts anew at step 0.
        """
        h = self.curvature
        before: list[tuple[Moments, Tensor]] = []

        def policy(step: int, moments: Moments) -> Tensor:
            if step == 0:
                now = torch.tensor(rate, dtype=torch.float64)
            else:
                last, eta = before.pop()
                agreement = h.square() * ((1.0 - eta * h) * last.position - eta * h * self.variance)
                size = h.square() * (last.position + self.variance)
                now = eta * (1.0 + meta_rate * agreement.sum() / size.sum())
            before[:] = [(moments, now)]
            return now

        return policy

    def noisy(self, noise: Tensor) -> Callable[[Params], Tensor]:
        """f̃ for given noise c, [..., N], as a function of ``{"x": [..., N]}``, summed over leading dimensions."""

        def objective(params: Params) -> Tensor:
            return 0.5 * ((params["x"] - noise).square() @ self.curvature).sum()

        return objective

    def simulate(self, rule: Rule[Any, Any], rates: Tensor | Sequence[float], runs: int, seed: int = 0) -> Tensor:
        """Train by sampling the noise, many runs at once, with a rule that treats every coordinate alike.

        Args:
            rule: The update rule; its learning rate is replaced by the schedule's.
            rates: The learning rate of every step, [T].
            runs: How many independent runs, at least 1.
            seed: Of the noise.

        Returns:
            The loss ½ xᵀHx of each run before the first step and after every step, [R, T + 1].
        """
        whole("runs", runs)
        generator = torch.Generator().manual_seed(seed)
        params: Params = {"x": self.start.position.sqrt().expand(runs, -1).clone()}
        state = rule.init(params)
        losses = [0.5 * params["x"].square() @ self.curvature]
        for rate in torch.as_tensor(rates, dtype=torch.float64):
            sample = torch.randn(runs, len(self.curvature), generator=generator, dtype=torch.float64)
            grads = torch.func.grad(self.noisy(sample * self.variance.sqrt()))(params)
            params, state = rule.step(params, grads, state, rule.hypers._replace(lr=rate))
            losses.append(0.5 * params["x"].square() @ self.curvature)
        return torch.stack(losses, 1)
