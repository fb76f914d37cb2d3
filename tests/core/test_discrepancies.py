"""Discrepancies follow their conventions, vanish at equality with their gradients, and have the stated curvature."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacrev

import apo
from apo.discrepancies import BY_NAME, bregman, gauss_newton, kl, squared_error
from tests.cases import randn

SHAPES = [(4,), (4, 3), (4, 5, 3), (2, 3, 4, 5)]
OLD, TARGETS = randn(4, 3, seed=1), torch.tensor([0, 2, 1, 1])


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose curvature is no projection, and differs from place to place."""
    return (outputs - targets[:, None]).pow(4).sum(-1).mean() + outputs.prod(-1).mean()


def measure(name: str, new: Tensor, old: Tensor, loss: Any = cross_entropy, targets: Tensor = TARGETS) -> Tensor:
    """The mean over examples, as the proximal objective takes it."""
    return apo.Proximal(discrepancy=name).distance(new, old, loss, targets)


every_discrepancy = pytest.mark.parametrize("name", BY_NAME)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_error_sums_over_outputs_and_averages_over_examples(shape: tuple[int, ...]) -> None:
    new, old = randn(*shape, seed=1), randn(*shape, seed=2)
    square = (new - old).pow(2)
    # [B, T, V] is a sequence: averaged over T too.
    expected = square.sum() / (shape[0] * shape[1] if len(shape) == 3 else shape[0])
    assert squared_error(new, old).shape == shape[:1]
    torch.testing.assert_close(measure("squared_error", new, old), expected)
    # Each example's number is its own.
    torch.testing.assert_close(squared_error(new, old)[:1], squared_error(new[:1], old[:1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_sums_over_classes_and_averages_over_the_rest(shape: tuple[int, ...]) -> None:
    new, old = randn(*shape, seed=1), randn(*shape, seed=2)
    p, q = (torch.distributions.Categorical(logits=z) for z in (new, old))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(measure("kl", new, old), expected.mean())
    assert kl(new, old).shape == expected.shape[:1]
    if len(shape) > 1:
        torch.testing.assert_close(kl(new, old), expected.reshape(shape[0], -1).mean(-1))
        assert not torch.allclose(kl(new, old), kl(old, new))  # the new distribution comes first


def test_kl_does_not_overflow() -> None:
    new, old = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[-1e4, 0.0, 1e4]])
    assert kl(new, old).item() == pytest.approx(2e4)


@every_discrepancy
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_vanishes_at_equality_with_its_gradient(name: str, scale: float) -> None:
    old = scale * OLD
    assert measure(name, old, old).abs() < 1e-15
    assert grad(measure, argnums=1)(name, old, old).abs().max() < 1e-15
    assert measure(name, old + 0.1 * randn(4, 3, seed=3), old) > 0.0


@every_discrepancy
@pytest.mark.parametrize("loss", [cross_entropy, quartic])
def test_gradcheck(name: str, loss: Any) -> None:
    new = (OLD + 0.5 * randn(4, 3, seed=3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: measure(name, z, OLD, loss), new)


def curvature(name: str, old: Tensor, loss: Any = cross_entropy) -> Tensor:
    """∇²D at equality, per example times the number of examples, [B·V, B·V]."""
    size = old.numel()
    blocks = jacrev(grad(lambda z: measure(name, z, old, loss)))(old)
    return len(old) * blocks.reshape(size, size)


def fisher(logits: Tensor) -> Tensor:
    """The Fisher matrix of categorical distributions, one block an example."""
    p = logits.softmax(-1)
    return torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))


def test_curvature_of_squared_error_is_twice_the_identity() -> None:
    torch.testing.assert_close(curvature("squared_error", OLD), 2.0 * torch.eye(12, dtype=torch.float64))


def test_curvature_of_kl_is_the_fisher_matrix() -> None:
    torch.testing.assert_close(curvature("kl", OLD), fisher(OLD))
    move = 1e-4 * randn(4, 3, seed=3)
    second_order = move.reshape(-1) @ fisher(OLD) @ move.reshape(-1) / 2
    torch.testing.assert_close(4.0 * measure("kl", OLD + move, OLD), second_order, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("loss", [cross_entropy, quartic])
def test_bregman_and_gauss_newton_against_the_explicit_hessian(loss: Any) -> None:
    hessian = 4.0 * jacrev(grad(loss))(OLD, TARGETS).reshape(12, 12)  # of the sum over the 4 examples
    assert hessian.abs().max() > 0.1
    torch.testing.assert_close(curvature("bregman", OLD, loss), hessian)
    move = randn(4, 3, seed=3)
    quadratic_form = move.reshape(-1) @ hessian @ move.reshape(-1)
    for scale in (1e-3, 1.0):  # a quadratic form, at every size
        new = OLD + scale * move
        torch.testing.assert_close(4.0 * gauss_newton(new, OLD, loss, TARGETS), scale**2 * quadratic_form)
        slope = 4.0 * grad(gauss_newton)(new, OLD, loss, TARGETS).reshape(-1)
        torch.testing.assert_close(slope, 2.0 * scale * hessian @ move.reshape(-1))
    # No factor ½: twice the second-order term of the Bregman divergence.
    new = OLD + 1e-5 * move
    ratio = gauss_newton(new, OLD, loss, TARGETS) / bregman(new, OLD, loss, TARGETS)
    assert ratio.item() == pytest.approx(2.0, rel=1e-3)


def test_bregman_by_hand() -> None:
    """D = ℓ(z) − ℓ(z_k) − ⟨∇ℓ(z_k), z − z_k⟩; of half the squared error it is half the squared distance."""
    new = randn(4, 3, seed=3)
    slope = (OLD.softmax(-1) - F.one_hot(TARGETS, 3)) / 4.0
    expected = cross_entropy(new, TARGETS) - cross_entropy(OLD, TARGETS) - (slope * (new - OLD)).sum()
    torch.testing.assert_close(bregman(new, OLD, cross_entropy, TARGETS), expected)

    def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(-1).mean() / 2

    found = bregman(new, OLD, half_square, randn(4, 3, seed=4))
    torch.testing.assert_close(found, measure("squared_error", new, OLD) / 2)


def test_newton_at_half() -> None:
    """Minimising the linearised loss + ½ gauss_newton over the outputs is a Newton step (the paper, Eq. 16)."""
    slope, hessian = grad(quartic)(OLD, TARGETS).reshape(-1), jacrev(grad(quartic))(OLD, TARGETS).reshape(12, 12)
    newton = (OLD.reshape(-1) - torch.linalg.solve(hessian, slope)).reshape(4, 3)
    total = slope + 0.5 * grad(gauss_newton)(newton, OLD, quartic, TARGETS).reshape(-1)
    assert total.abs().max() < 1e-12 * slope.abs().max()


def test_the_loss_can_take_any_targets() -> None:
    """Targets need not be a tensor."""
    pair = {"labels": TARGETS, "weight": 2.0}

    def weighted(outputs: Tensor, targets: Any) -> Tensor:
        return targets["weight"] * F.cross_entropy(outputs, targets["labels"])

    new = randn(4, 3, seed=3)
    for discrepancy in (bregman, gauss_newton):
        found = discrepancy(new, OLD, weighted, pair)
        torch.testing.assert_close(found, 2.0 * discrepancy(new, OLD, cross_entropy, TARGETS))
