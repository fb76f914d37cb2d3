"""The two theorems on idealised APO, where they hold and where the printed one does not."""

import math
from collections.abc import Callable

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


def test_the_printed_condition_does_not_give_the_printed_bound() -> None:
    """λ a little above L/4: now the path falls, but more slowly than printed, and λ = L/2 is there after a step."""
    line = oracle.Affine(tensor(0.0), tensor(1.0)[:, None])
    path = oracle.projected_gradient(line, quadratic(tensor(0.0), 3.0), tensor(1.0), 0.26 * 3.0, 6)
    assert path.losses.diff().max() < 0.0
    assert path.effective[:-1].min() ** 2 > 1.2 * 2.0 * oracle.bound(0.26 * 3.0, path.losses[0].item(), 6)
    path = oracle.projected_gradient(line, quadratic(tensor(0.0), 3.0), tensor(1.0), 0.5 * 3.0, 1)
    assert path.effective[1] == 0.0


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


def network(seed: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """A residual network of one trained weight w, xw + vᵀtanh(uxw + b) at a few inputs x: its range is a curve."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(outputs, generator=generator, dtype=torch.float64)
    u, v, b = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return lambda weight: weight * x + torch.tanh(weight * x[:, None] * u + b) @ v


def curvature(derivative: Tensor, second: Tensor) -> float:
    """The largest curvature of a curve, by its derivatives at many points, [G, n] each."""
    speed = derivative.square().sum(1, keepdim=True)
    normal = second - (second * derivative).sum(1, keepdim=True) / speed * derivative
    return (normal.norm(dim=1) / speed[:, 0]).max().item()


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), lipschitz=st.floats(0.1, 10.0), count=st.integers(2, 4))
def test_theorem_1_on_the_range_of_a_network(seed: int, lipschitz: float, count: int) -> None:
    """Each step is to the nearest point of the whole curve, and the bound holds after any number of them."""
    outputs = network(seed, count)
    grid = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64)[:, None]
    rows = torch.func.vmap(outputs)(grid)
    slope = torch.func.jacrev(outputs)
    derivative = torch.func.vmap(slope)(grid)[..., 0]
    second = torch.func.vmap(torch.func.jacrev(slope))(grid)[..., 0, 0]
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = rows[800] + 0.3 * noise
    loss = quadratic(target, lipschitz)
    start = rows[400]
    excess = loss(start).item() - min(loss(row).item() for row in rows)
    penalty = sufficient(lipschitz, curvature(derivative, second), loss(start).item())
    manifold = oracle.Range(outputs, torch.linspace(-4.0, 4.0, 5, dtype=torch.float64)[:, None], iterations=30)
    path = oracle.projected_gradient(manifold, loss, start, penalty, 5)
    for steps in range(1, 6):
        here = path.points[steps - 1]
        wanted = here - lipschitz * (here - target) / (2.0 * penalty)
        assert (path.points[steps] - wanted).norm() <= (rows - wanted).norm(dim=1).min() + 1e-9
        assert path.effective[:steps].min() ** 2 <= oracle.bound(penalty, excess, steps) * (1 + 1e-9) + 1e-20


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


@pytest.mark.parametrize("seed", range(4))
def test_theorem_2_on_the_range_of_a_network(seed: int) -> None:
    """The same on a curved manifold, with soft targets that the network can meet."""
    outputs = network(seed, 3)
    best = outputs(tensor(0.4))

    def loss(point: Tensor) -> Tensor:
        return (torch.nn.functional.softplus(point) - torch.sigmoid(best) * point).sum()

    manifold = oracle.Range(outputs, tensor(0.0, 1.0)[:, None], iterations=30)
    path = oracle.proximal_newton(manifold, loss, outputs(tensor(0.7)), 5)
    errors = (path.points - best).norm(dim=1)
    kept = errors[:-1] > 1e-4  # below, the next error is rounding
    ratios = errors[1:][kept] / errors[:-1][kept] ** 2
    spread = torch.sigmoid(path.points) * (1.0 - torch.sigmoid(path.points))
    assert len(ratios) >= 2 and errors[-1] < 1e-8
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


def test_directions_that_depend_on_each_other_span_what_they_span() -> None:
    identity = torch.eye(3, dtype=torch.float64)
    twice = oracle.Affine(tensor(0.0, 0.0, 0.0), torch.stack([tensor(1.0, 1.0, 0.0), tensor(2.0, 2.0, 0.0)], 1))
    torch.testing.assert_close(twice.nearest(tensor(1.0, 2.0, 3.0), identity), tensor(1.5, 1.5, 0.0))
    point = oracle.Affine(tensor(1.0, 1.0, 1.0), torch.zeros(3, 1, dtype=torch.float64))
    assert point.nearest(tensor(1.0, 2.0, 3.0), identity).tolist() == [1.0, 1.0, 1.0]


def test_the_tangent_of_a_range_with_parameters_to_spare_is_that_of_its_outputs() -> None:
    spare = oracle.Range(lambda w: (w[0] + w[1]) * tensor(1.0, 1.0, 0.0), torch.zeros(1, 2, dtype=torch.float64))
    path = oracle.projected_gradient(spare, quadratic(tensor(1.0, 2.0, 3.0)), tensor(4.0, 4.0, 0.0), 1.0, 40)
    assert spare.tangent(path.points[-1]).shape == (3, 1)
    assert path.effective[0] > 1.0 and path.effective[-1] < 1e-6


def test_a_start_without_finite_outputs_is_passed_over() -> None:
    def outputs(params: Tensor) -> Tensor:
        return torch.cat([params.log(), params])

    identity = torch.eye(2, dtype=torch.float64)
    manifold = oracle.Range(outputs, tensor(-1.0, 2.0)[:, None])
    torch.testing.assert_close(manifold.nearest(outputs(tensor(3.0)), identity), outputs(tensor(3.0)))
    with pytest.raises(ValueError, match="no start of 2 has a finite distance"):
        oracle.Range(outputs, tensor(-1.0)[:, None]).nearest(tensor(1.0, 1.0), identity)


def test_a_path_through_the_centre_of_a_circle_goes_on() -> None:
    path = oracle.projected_gradient(oracle.Circle(2.0), quadratic(tensor(0.0, 0.0)), tensor(0.0, -2.0), 0.5, 2)
    assert path.points.tolist() == [[0.0, -2.0], [2.0, 0.0], [2.0, 0.0]]


@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_newton_on_a_loss_that_is_not_strictly_convex_is_refused(curvature: float) -> None:
    plane = oracle.Affine(tensor(0.0, 0.0), torch.eye(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="is not positive definite"):
        oracle.proximal_newton(plane, lambda z: z.sum() + curvature * z.square().sum(), tensor(1.0, 1.0), 2)


def test_starts_of_a_range_are_rows() -> None:
    with pytest.raises(ValueError, match=r"starts is of shape \[2\], and must be \[S, p\]"):
        oracle.Range(lambda w: w, tensor(0.0, 1.0))
