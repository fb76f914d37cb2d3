"""The optimizers that the comparators bring along, against independent oracles in float64."""

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from transformers.optimization import GreedyLR

from baselines.comparators.adahessian import AdaHessian, hessian_diagonal, spatial_average
from baselines.comparators.schedules import Plateau
from baselines.comparators.sdlbfgs import Pair, SdLBFGS, damped, times_inverse_hessian
from baselines.config import Config

F64 = torch.float64


def test_the_estimate_of_the_hessians_diagonal_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    point = torch.randn(6, dtype=F64, requires_grad=True)
    matrix = torch.randn(6, 6, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return (matrix @ x).tanh().square().sum() + x.pow(4).sum()

    exact = torch.autograd.functional.hessian(loss, point).diagonal()
    draws = []
    for _ in range(500):
        grads = torch.autograd.grad(loss(point), [point], create_graph=True)
        draws += hessian_diagonal(list(grads), [point])
    deviation, mean = torch.std_mean(torch.stack(draws), 0)
    assert ((mean - exact).abs() < 4 * deviation / 500**0.5).all()
    assert deviation.min() > 0.1  # the rest of the matrix is felt in a single draw


def test_the_estimate_of_a_diagonal_hessian_is_exact() -> None:
    points = [torch.randn(3, dtype=F64, requires_grad=True), torch.randn(2, 2, dtype=F64, requires_grad=True)]
    grads = torch.autograd.grad(sum(point.pow(4).sum() for point in points), points, create_graph=True)
    for point, diagonal in zip(points, hessian_diagonal(list(grads), points), strict=True):
        torch.testing.assert_close(diagonal, 12 * point.detach() ** 2)


def test_averages_are_over_rows_and_kernels() -> None:
    matrix = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    assert spatial_average(matrix).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert spatial_average(torch.tensor([-1.0, 2.0])).tolist() == [1.0, 2.0]
    kernels = torch.arange(-8.0, 8.0).reshape(2, 2, 2, 2)
    averages = spatial_average(kernels)
    assert averages.shape == kernels.shape
    torch.testing.assert_close(averages[..., 0, 0], kernels.abs().mean((2, 3)))


def test_adahessian_is_that_of_pytorch_optimizer_where_nothing_is_averaged() -> None:
    """Vectors are not averaged, and the Hessian is diagonal, so that the draws of the signs do not matter."""
    start = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.03, "eps": 1e-3}
    one, two = AdaHessian([ours], **options), pytorch_optimizer.AdaHessian([theirs], **options)
    for _ in range(10):
        one.step(lambda: ours.pow(4).sum() + ours.exp().sum())
        theirs.grad = (4 * theirs**3 + theirs.exp()).detach()
        two.step(hessian=[(12 * theirs**2 + theirs.exp()).detach()])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours - start).abs().min() > 0.1


def test_damping_keeps_every_pair_positive() -> None:
    torch.manual_seed(0)
    binding = 0
    for _ in range(200):
        s, y, gamma = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64), torch.rand((), dtype=F64).item() + 0.1
        bound = 0.25 * gamma * torch.dot(s, s)
        mixed = damped(s, y, gamma)
        assert torch.dot(s, mixed) >= bound * (1 - 1e-12)
        if torch.dot(s, y) < bound:
            torch.testing.assert_close(torch.dot(s, mixed), bound)
            binding += 1
        else:
            assert torch.equal(mixed, y)
    assert 50 < binding < 200


def test_the_two_loops_are_the_dense_recursion() -> None:
    torch.manual_seed(0)
    gamma, eye = 0.7, torch.eye(6, dtype=F64)
    pairs, dense = [], eye / gamma
    for _ in range(4):
        s = torch.randn(6, dtype=F64)
        y = damped(s, torch.randn(6, dtype=F64), gamma)
        pairs.append(Pair(s, y))
        rho = 1 / torch.dot(s, y)
        left = eye - rho * torch.outer(s, y)
        dense = left @ dense @ left.T + rho * torch.outer(s, s)
    vector = torch.randn(6, dtype=F64)
    torch.testing.assert_close(times_inverse_hessian(vector, pairs, gamma), dense @ vector, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dense @ pairs[-1].y, pairs[-1].s)  # the secant equation
    assert torch.linalg.eigvalsh(dense).min() > 0


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_sdlbfgs_uses_the_pairs_its_variant_names(variant: str) -> None:
    """On a quadratic y = A s, whatever the batch: the pairs that are stored are checked against that."""
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=F64)
    matrix = root @ root.T / 5 + torch.eye(5, dtype=F64)
    point = nn.Parameter(torch.randn(5, dtype=F64))
    optimizer = SdLBFGS([point], lr=0.3, memory=3, delta=1e-3, variant=variant)
    moved = torch.zeros(5, dtype=F64)
    for steps in range(1, 7):
        last, before = moved, point.detach().clone()
        optimizer.step(lambda: 0.5 * point @ matrix @ point)
        state = optimizer.state[point]
        moved = point.detach() - before
        if variant == "released":
            torch.testing.assert_close(moved.norm(), torch.tensor(0.3, dtype=F64))
            assert state["gamma"] == 1.0 and len(state["pairs"]) == min(steps - 1, 3)
            for s, y in state["pairs"][-1:]:
                torch.testing.assert_close(s, last)
                torch.testing.assert_close(y, damped(s, matrix @ s, 1.0))
        else:
            s, y = state["pairs"][-1]
            torch.testing.assert_close(s, moved)
            torch.testing.assert_close(y, damped(s, matrix @ s, state["gamma"]))
            product = (s @ matrix @ s).item()
            assert state["gamma"] == pytest.approx((matrix @ s).square().sum().item() / product)
            assert len(state["pairs"]) == min(steps, 3)


def test_sdlbfgs_at_lr_1_solves_a_quadratic() -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0, 10.0], dtype=F64))
    point = nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=F64))
    optimizer = SdLBFGS([point], lr=1.0, delta=1e-3)
    losses = [optimizer.step(lambda: 0.5 * point @ matrix @ point).item() for _ in range(40)]
    assert losses[-1] < 1e-8 * losses[0]
    with pytest.raises(ValueError, match="variant='own' is not one of paper, released"):
        SdLBFGS([point], variant="own")
    with pytest.raises(ValueError, match="memory=0 must be at least 1"):
        SdLBFGS([point], memory=0)


def test_the_plateau_rule_is_greedylr_without_bounds() -> None:
    torch.manual_seed(0)
    losses = [*torch.linspace(2, 1, 200).tolist(), *(1 + torch.rand(300)).tolist(), *torch.linspace(1, 0, 200).tolist()]
    model = nn.Flatten()
    model.weight = nn.Parameter(torch.zeros(3))
    ours = Plateau(model, Config(method="plateau", optimizer="sgd", lr=0.1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    theirs = GreedyLR(optimizer, smooth=True, min_lr=0.0, max_lr=float("inf"))
    rates = []
    for loss in losses:
        ours.observe(loss)
        theirs.step(loss)
        assert 0.1 * ours.scale == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        rates.append(ours.scale)
    assert max(rates) > 1.5 and min(rates) < 0.7
