"""The two theorems on idealised APO, where they hold and where the printed one does not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apo import oracle

STEPS = 40


def quadratic(target: Tensor, lipschitz: float = 1.0) -> oracle.Loss:
    return lambda point: 0.5 * lipschitz * (point - target).square().sum()


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sufficient(lipschitz: float, curvature: float, excess: float) -> float:
    """λ = max(CG, L/2), with the bound G² ≤ 2L(L₀ − L*) on the gradients of a path whose loss falls."""
    return max(curvature * math.sqrt(2.0 * lipschitz * excess), lipschitz / 2.0)


def test_the_printed_condition_lets_a_path_swing_for_ever() -> None:
    """M is the line, ℓ = ½Lz², λ = L/4: z → −z, and the gradient never falls below any bound that does."""
    line = oracle.Affine(tensor(0.0), tensor(1.0)[:, None])
    path = oracle.projected_gradient(line, quadratic(tensor(0.0), 3.0), tensor(1.0), 3.0 / 4.0, STEPS)
    torch.testing.assert_close(path.points[:, 0], tensor(*[(-1.0) ** k for k in range(STEPS + 1)]))
    printed = 2.0 * oracle.bound(3.0 / 4.0, path.losses[0].item(), STEPS)
    assert path.effective.min() ** 2 > 10.0 * printed


@settings(max_examples=40)
@given(
    lipschitz=st.floats(0.1, 10.0), more=st.floats(1.0, 20.0), seed=st.integers(0, 10_000), steps=st.integers(1, STEPS)
)
def test_theorem_1_on_subspaces(lipschitz: float, more: float, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, origin, start = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(3))
    plane = oracle.Affine(origin, torch.randn(4, 2, generator=generator, dtype=torch.float64))
    loss = quadratic(target, lipschitz)
    penalty = more * sufficient(lipschitz, 0.0, 1.0)
    path = oracle.projected_gradient(plane, loss, start, penalty, steps)
    excess = (path.losses[0] - loss(plane.nearest(target, torch.eye(4, dtype=torch.float64)))).item()
    assert path.effective[:-1].min() ** 2 <= oracle.bound(penalty, excess, steps) * (1 + 1e-9) + 1e-20


@settings(max_examples=40)
@given(
    radius=st.floats(0.2, 10.0),
    distance=st.floats(0.0, 5.0),
    angle=st.floats(0.1, 3.1),
    lipschitz=st.floats(0.1, 10.0),
    steps=st.integers(1, STEPS),
)
def test_theorem_1_on_circles(radius: float, distance: float, angle: float, lipschitz: float, steps: int) -> None:
    loss = quadratic(tensor(distance, 0.0), lipschitz)
    start = radius * tensor(math.cos(angle), math.sin(angle))
    least = 0.5 * lipschitz * (radius - distance) ** 2
    # The gradients are bounded by those of the whole circle, whose farthest point is at radius + distance.
    penalty = max(lipschitz * (radius + distance) / radius, lipschitz / 2.0)
    path = oracle.projected_gradient(oracle.Circle(radius), loss, start, penalty, steps)
    excess = path.losses[0].item() - least
    assert path.effective[:-1].min() ** 2 <= oracle.bound(penalty, excess, steps) * (1 + 1e-9) + 1e-20


@pytest.mark.parametrize("seed", range(3))
def test_theorem_1_on_the_range_of_a_network(seed: int) -> None:
    """Outputs tanh(wx) of one weight on four inputs: a curve, whose curvature is taken from its derivatives."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 0.5 + torch.rand(4, generator=generator, dtype=torch.float64)

    def outputs(weight: Tensor) -> Tensor:
        return torch.tanh(weight * inputs)

    grid = torch.linspace(-3.0, 3.0, 601, dtype=torch.float64)
    rows = torch.tanh(grid[:, None] * inputs)
    velocity = (1.0 - rows**2) * inputs
    bend = -2.0 * rows * (1.0 - rows**2) * inputs**2
    speed = velocity.square().sum(1)
    along = (bend * velocity).sum(1) / speed
    curvature = ((bend - along[:, None] * velocity).norm(dim=1) / speed).max().item()
    target = 0.8 * torch.tanh(0.7 * inputs) + 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)
    loss = quadratic(target)
    manifold = oracle.Range(outputs, tensor(-1.0, 0.0, 1.0)[:, None])
    start = outputs(tensor(-1.0))
    largest = (rows - target).norm(dim=1).max().item()
    penalty = max(curvature * largest, 0.5)
    path = oracle.projected_gradient(manifold, loss, start, penalty, 10)
    least = torch.stack([loss(row) for row in rows]).min().item()
    assert path.losses.diff().max() <= 1e-12
    for steps in (1, 5, 10):
        assert path.effective[:steps].min() ** 2 <= oracle.bound(penalty, path.losses[0].item() - least, steps)


def test_the_nearest_points_of_a_range_are_those_of_a_fine_grid() -> None:
    def outputs(params: Tensor) -> Tensor:
        return torch.stack([torch.sin(params[0]), torch.cos(params[0] * 1.3), 0.3 * params[0]])

    grid = torch.linspace(-12.0, 12.0, 80001, dtype=torch.float64)
    rows = torch.stack([torch.sin(grid), torch.cos(grid * 1.3), 0.3 * grid], 1)
    metric = torch.diag(tensor(1.0, 2.0, 0.5))
    manifold = oracle.Range(outputs, torch.linspace(-12.0, 12.0, 25, dtype=torch.float64)[:, None])
    for target in torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        apart = rows - target
        nearest = rows[((apart @ metric) * apart).sum(1).argmin()]
        found = manifold.nearest(target, metric)
        torch.testing.assert_close(found, nearest, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_2_on_soft_targets(seed: int) -> None:
    """ℓ = softplus(z) − tz: L_H = 1/(6√3), and μ is the least σ(1 − σ) on the way."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.randn(6, generator=generator, dtype=torch.float64)
    targets = torch.sigmoid(best)
    directions = torch.randn(6, 3, generator=generator, dtype=torch.float64)

    def loss(point: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(point) - targets * point).sum()

    start = best + directions @ (0.3 * torch.randn(3, generator=generator, dtype=torch.float64))
    path = oracle.proximal_newton(oracle.Affine(best, directions), loss, start, 6)
    errors = (path.points - best).norm(dim=1)
    kept = errors[:-1] > 1e-6  # below, the next error is rounding
    ratios = errors[1:][kept] / errors[:-1][kept] ** 2
    spread = torch.sigmoid(path.points) * (1.0 - torch.sigmoid(path.points))
    assert len(ratios) >= 2 and errors[-1] < 1e-12
    assert bool((ratios <= 1.0 / (6.0 * math.sqrt(3.0)) / spread.min()).all())


def test_newton_on_a_quadratic_is_there_after_one_step() -> None:
    plane = oracle.Affine(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:, :2])
    path = oracle.proximal_newton(plane, quadratic(tensor(1.0, 2.0, 3.0), 5.0), tensor(4.0, -1.0, 0.0), 1)
    torch.testing.assert_close(path.points[1], tensor(1.0, 2.0, 0.0))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Euclidean norm only"):
        oracle.Circle(1.0).nearest(tensor(1.0, 2.0), torch.diag(tensor(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"radius=0\.0 is not in"):
        oracle.Circle(0.0)
    with pytest.raises(ValueError, match=r"penalty=-1\.0 is not in"):
        oracle.projected_gradient(oracle.Circle(1.0), quadratic(tensor(0.0, 0.0)), tensor(1.0, 0.0), -1.0, 3)
