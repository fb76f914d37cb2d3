"""Idealised APO: the proximal objective minimised exactly, in output space (the paper, §3, App. A-B).

The outputs of a network on all training examples are one point Z of a manifold M, the range of the network. An oracle
that minimises the proximal objective exactly, with the loss linearised, takes one of two steps:

    D = ‖z' − z‖²                     Z ← argmin over M of ‖Z' − (Z − ∇L(Z)/2λ)‖²         projected gradient (14)
    D = (z' − z)ᵀ∇²ℓ(z)(z' − z)       Z ← argmin over M of ⟨∇L, Z' − Z⟩ + ½‖Z' − Z‖²_H    proximal Newton (17), λ = ½

Theorem 1, corrected. With an L-Lipschitz gradient of norm at most G and curvature of M at most C, λ ≥ max(CG, L/2)
gives min ‖effective gradient‖² ≤ 8λ(L₀ − L∗)/T. The printed condition, L/4, is too weak: on a line, with ℓ = ½Lz² and
λ = L/4, each step is z → −z.

Theorem 2. Where proximal Newton converges, lim sup ‖Z' − Z∗‖/‖Z − Z∗‖² ≤ L_H/μ, if ∇²ℓ ⪰ μ is L_H-Lipschitz. (The
printed assumption, quadratic growth, is not all that its proof uses.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apo.checks import real, whole

Loss = Callable[[Tensor], Tensor]
"""From outputs [n] to the loss, []."""


class Manifold(Protocol):
    """A set of outputs that a network can have."""

    def nearest(self, target: Tensor, metric: Tensor) -> Tensor:
        """The point of the manifold nearest to a target, [n], in the norm of a positive definite metric, [n, n]."""
        ...

    def tangent(self, point: Tensor) -> Tensor:
        """An orthonormal basis of the tangent space at a point, [n, k]."""
        ...


class Affine:
    """A line, a plane, or any affine subspace: the range of a linear model. Its curvature is 0."""

    def __init__(self, origin: Tensor, directions: Tensor) -> None:
        """Hold the subspace through a point, [n], along directions, [n, k]."""
        self.origin = origin
        self._basis = _span(directions)

    def nearest(self, target: Tensor, metric: Tensor) -> Tensor:
        """The nearest point, by the normal equations."""
        weighed = self._basis.T @ metric
        along: Tensor = torch.linalg.solve(weighed @ self._basis, weighed @ (target - self.origin))
        return self.origin + self._basis @ along

    def tangent(self, point: Tensor) -> Tensor:
        """The directions, which are those everywhere."""
        return self._basis


class Range:
    """The range of a function of a few parameters, such as a small network: nearest points by Levenberg-Marquardt.

    From each of the starts, and from where the last search ended, so that the nearest point is found although the
    distance has local minima.
    """

    def __init__(self, outputs: Callable[[Tensor], Tensor], starts: Tensor, iterations: int = 60) -> None:
        """Hold the function, from parameters [p] to outputs [n], and starts, [S, p].

        Raises:
            ValueError: If ``starts`` is of another shape, or empty.
        """
        if starts.ndim != 2 or not len(starts):
            raise ValueError(f"starts is of shape {list(starts.shape)}, and must be [S, p]: one start a row, S ≥ 1")
        self._outputs = outputs
        self._jacobian = torch.func.jacrev(outputs)
        self._starts, self._iterations = starts, iterations
        self._at = starts[0]

    def nearest(self, target: Tensor, metric: Tensor) -> Tensor:
        """The nearest point that any start leads to.

        Raises:
            ValueError: If the outputs are not finite at any start.
        """
        root = torch.linalg.cholesky(metric).T
        found = [self._search(start, target, root) for start in (self._at, *self._starts)]
        finite = [pair for pair in found if math.isfinite(pair[1])]
        if not finite:
            raise ValueError(f"no start of {len(found)} has a finite distance to {target.tolist()}")
        self._at, _ = min(finite, key=lambda pair: pair[1])
        return self._outputs(self._at)

    def tangent(self, point: Tensor) -> Tensor:
        """The span of the derivatives where the last search ended."""
        return _span(self._jacobian(self._at))

    def _search(self, start: Tensor, target: Tensor, root: Tensor) -> tuple[Tensor, float]:
        """Parameters of a local minimum of ‖root (outputs − target)‖², and its value."""

        def residual(params: Tensor) -> Tensor:
            return root @ (self._outputs(params) - target)

        params, damping = start, 1e-3
        value = residual(params).square().sum()
        eye = torch.eye(len(start), dtype=start.dtype)
        for _ in range(self._iterations):
            jacobian = root @ self._jacobian(params)
            step = torch.linalg.solve(jacobian.T @ jacobian + damping * eye, jacobian.T @ residual(params))
            if step.abs().max() < 1e-12:
                break
            there = residual(params - step).square().sum()
            if there < value:
                params, value, damping = params - step, there, damping / 10.0
            else:
                damping *= 10.0
        return params, value.item()


class Circle:
    """A circle around the origin of the plane; its curvature is 1/r."""

    def __init__(self, radius: float) -> None:
        """Hold the radius."""
        self.radius = real("radius", radius, ends="()")

    def nearest(self, target: Tensor, metric: Tensor) -> Tensor:
        """The nearest point in the Euclidean norm; for the centre, to which all are equally near, (r, 0).

        Raises:
            ValueError: If the metric is not a multiple of the identity.
        """
        if not torch.equal(metric, metric[0, 0] * torch.eye(2, dtype=metric.dtype)):
            raise ValueError("the nearest point of a circle is known in the Euclidean norm only; use oracle.Range")
        if not target.any():
            target = torch.eye(2, dtype=target.dtype)[0]
        nearest: Tensor = self.radius * target / torch.linalg.vector_norm(target)
        return nearest

    def tangent(self, point: Tensor) -> Tensor:
        """The direction at a right angle to the radius."""
        basis: Tensor = torch.stack([-point[1], point[0]])[:, None] / self.radius
        return basis


class Path(NamedTuple):
    """The course of an idealised run.

    Attributes:
        points: Z before the first step and after every step, [T + 1, n].
        losses: L there, [T + 1].
        effective: The norm of the effective gradient, the projection of ∇L onto the tangent space, there, [T + 1].
    """

    points: Tensor
    losses: Tensor
    effective: Tensor


def projected_gradient(manifold: Manifold, loss: Loss, start: Tensor, penalty: float, steps: int) -> Path:
    """Idealised APO with D = ‖z − z'‖² and the loss linearised (14).

    Args:
        manifold: M.
        loss: L.
        start: Where to start; the nearest point of M is taken, [n].
        penalty: λ > 0.
        steps: T.

    Returns:
        The path.
    """
    real("penalty", penalty, ends="()")
    identity = torch.eye(len(start), dtype=start.dtype)

    def step(point: Tensor, gradient: Tensor) -> Tensor:
        return manifold.nearest(point - gradient / (2.0 * penalty), identity)

    return _path(manifold, loss, manifold.nearest(start, identity), step, steps)


def proximal_newton(manifold: Manifold, loss: Loss, start: Tensor, steps: int) -> Path:
    """Idealised APO with D = (z − z')ᵀ∇²ℓ(z')(z − z') and λ = ½ (17).

    Args:
        manifold: M.
        loss: L, strictly convex.
        start: Where to start; the nearest point of M is taken, [n].
        steps: T.

    Returns:
        The path.

    Raises:
        ValueError: If the Hessian of the loss is not positive definite somewhere on the way.
    """
    of_loss = torch.func.hessian(loss)

    def hessian(point: Tensor) -> Tensor:
        found: Tensor = of_loss(point)
        if torch.linalg.cholesky_ex(found).info:
            raise ValueError(
                f"the Hessian of the loss is not positive definite at {point.tolist()}; take a convex loss"
            )
        return found

    def step(point: Tensor, gradient: Tensor) -> Tensor:
        metric = hessian(point)
        return manifold.nearest(point - torch.linalg.solve(metric, gradient), metric)

    return _path(manifold, loss, manifold.nearest(start, hessian(start)), step, steps)


def bound(penalty: float, excess: float, steps: int) -> float:
    """The bound of Theorem 1, corrected, on the least squared norm of the effective gradient: 8λ(L₀ − L∗)/T."""
    whole("steps", steps)
    return 8.0 * penalty * excess / steps


def _span(directions: Tensor) -> Tensor:
    """An orthonormal basis of what directions span, [n, k] to [n, rank]."""
    basis: Tensor
    basis, lengths, _ = torch.linalg.svd(directions, full_matrices=False)
    least = max(directions.shape) * torch.finfo(directions.dtype).eps * lengths.max() if len(lengths) else 0.0
    return basis[:, lengths > least]


def _path(manifold: Manifold, loss: Loss, point: Tensor, step: Callable[[Tensor, Tensor], Tensor], steps: int) -> Path:
    """Take steps from a point of the manifold."""
    whole("steps", steps)
    gradient = torch.func.grad(loss)
    rows = []
    for taken in range(steps + 1):
        slope = gradient(point)
        norm = torch.linalg.vector_norm(manifold.tangent(point).T @ slope)
        rows.append((point, loss(point), norm))
        if taken < steps:
            point = step(point, slope)
    return Path(*(torch.stack(column) for column in zip(*rows, strict=True)))
