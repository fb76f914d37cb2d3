"""Where the hypergradient must vanish: best learning rates on quadratics, and best preconditioners."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

import apo
from apo.domains import POSITIVE
from apo.types import Params
from tests.cases import flat, quadratic, randn, spd

H = spd(5, seed=1)
THETA = {"w": randn(5, seed=2)}
IDENTITY = torch.eye(5, dtype=torch.float64)
FEATURES = randn(7, 5, seed=3)  # J of a linear model on B', which has 7 examples


def loss(params: Params) -> Tensor:
    return params["w"] @ H @ params["w"] / 2


def outputs(params: Params) -> Tensor:
    return (FEATURES @ params["w"]).reshape(7, 1)


def slope_at(lr: Tensor, objective: apo.Proximal) -> Tensor:
    """∂Q/∂lr of one SGD step from THETA."""
    rule = apo.sgd()
    grads = grad(loss)(THETA)
    q = objective.at(THETA, loss, outputs, grads=grads)
    _, slopes = apo.hypergradient(rule, q, THETA, grads, rule.init(THETA), rule.hypers._replace(lr=lr))
    return slopes.lr


# The linear loss alone has no minimum, and is refused.
@pytest.mark.parametrize(
    ("loss_model", "fsd", "wsd"),
    [("exact", 0.0, 0.0), *((m, f, w) for m in ("exact", "linear") for f, w in ((0.7, 0.0), (0.0, 0.4), (0.7, 0.4)))],
)
def test_best_learning_rate_of_sgd(loss_model: Any, fsd: float, wsd: float) -> None:
    """η* = gᵀg / gᵀ(H + 2λ_FSD JᵀJ/n + λ_WSD I)g, without H where the loss is linearised."""
    g = grad(loss)(THETA)["w"]
    curvature = (loss_model == "exact") * H + 2.0 * fsd * FEATURES.T @ FEATURES / 7 + wsd * IDENTITY
    best = g @ g / (g @ curvature @ g)
    objective = apo.Proximal(fsd=fsd, wsd=wsd, loss_model=loss_model)
    assert slope_at(best, objective).abs() < 1e-12 * (g @ g)
    # Q is a parabola in lr: its slope at 0 is −gᵀg, and grows at the rate gᵀ(curvature)g.
    torch.testing.assert_close(slope_at(torch.zeros_like(best), objective), -g @ g, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(slope_at(3.0 * best, objective), 2.0 * g @ g, rtol=1e-12, atol=0.0)


def test_best_learning_rates_per_parameter() -> None:
    """With one rate per parameter, the best ones solve a linear system of the blocks' curvatures."""
    problem = quadratic()
    rule, params = apo.sgd(), problem.params
    grads = grad(problem.loss)(params)
    curvature = jacrev(grad(lambda z: problem.loss(unflat(z, params))))(flat(params))
    blocks = torch.stack([flat({k: g if k == key else 0.0 * g for k, g in grads.items()}) for key in grads], 1)
    best = torch.linalg.solve(blocks.T @ curvature @ blocks, blocks.T @ flat(grads))
    hypers = rule.hypers._replace(lr=dict(zip(params, best, strict=True)))
    _, slopes = apo.hypergradient(rule, problem.loss, params, grads, rule.init(params), hypers)
    assert all(slope.abs() < 1e-12 for slope in slopes.lr.values())


def unflat(vector: Tensor, like: Params) -> Params:
    parts = vector.split([p.numel() for p in like.values()])
    return {key: part.reshape(p.shape) for part, (key, p) in zip(parts, like.items(), strict=True)}


class Preconditioner(NamedTuple):
    matrix: Tensor


class Stateless(NamedTuple):
    pass


def preconditioned(matrix: Tensor) -> apo.Rule[Stateless, Preconditioner]:
    """θ' = θ − Pg: a rule whose hyperparameter is a matrix."""

    def step(params: Params, grads: Params, state: Stateless, hypers: Preconditioner) -> tuple[Params, Stateless]:
        return {"w": params["w"] - hypers.matrix @ grads["w"]}, state

    return apo.Rule(lambda params: Stateless(), step, Preconditioner(matrix), {"matrix": POSITIVE})


def mean_q(matrix: Tensor, all_grads: Tensor, objective: apo.Proximal, model: Any = outputs) -> tuple[Tensor, Tensor]:
    """The mean of Q over a set of gradients, [n, 5], and its derivative in the preconditioner."""
    rule = preconditioned(matrix)
    values, slopes = [], []
    for g in all_grads:
        q = objective.at(THETA, lambda params, g=g: g @ params["w"], model, grads={"w": g})
        value, slope = apo.hypergradient(rule, q, THETA, {"w": g}, rule.init(THETA), rule.hypers)
        values.append(value)
        slopes.append(slope.matrix)
    return torch.stack(values).mean(), torch.stack(slopes).mean(0)


def best_preconditioner(g_matrix: Tensor, fsd: float, wsd: float) -> Tensor:
    """(λ_FSD G + λ_WSD I)⁻¹, G = E[Jᵀ ∇²D J] (the paper, Eq. 6)."""
    return torch.linalg.inv(fsd * g_matrix + wsd * IDENTITY)


def test_best_full_preconditioner_with_squared_error() -> None:
    """∇²D = 2I: the outputs are linear, so P = (2λ_FSD JᵀJ/n + λ_WSD I)⁻¹ is exact at every size of step."""
    objective = apo.Proximal(fsd=0.7, wsd=0.3, loss_model="linear")
    best = best_preconditioner(2.0 * FEATURES.T @ FEATURES / 7, 0.7, 0.3)
    all_grads = randn(6, 5, seed=4)  # E[ggᵀ] has full rank
    least, slope = mean_q(best, all_grads, objective)
    assert slope.abs().max() < 1e-12
    for seed in range(10):
        assert mean_q(best + 0.1 * randn(5, 5, seed=seed), all_grads, objective)[0] > least + 1e-4
    # One gradient alone determines Pg and nothing else.
    g, other = all_grads[0], all_grads[1] - all_grads[0] * (all_grads[0] @ all_grads[1]) / all_grads[0].square().sum()
    assert mean_q(best + torch.outer(randn(5, seed=5), other), g[None], objective)[1].abs().max() < 1e-12


def test_best_full_preconditioner_with_kl() -> None:
    """∇²D is the Fisher matrix of the outputs; the outputs' curvature fades as the steps get small."""
    features = randn(6, 3, 5, seed=6)  # 6 examples, 3 classes

    def logits(params: Params) -> Tensor:
        return features @ params["w"]

    p = logits(THETA).softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    g_matrix = (features.mT @ fisher @ features).mean(0)
    objective = apo.Proximal(fsd=0.7, wsd=0.3, discrepancy="kl", loss_model="linear")
    best, all_grads = best_preconditioner(g_matrix, 0.7, 0.3), randn(6, 5, seed=4)

    def remainder(scale: float, matrix: Tensor) -> Tensor:
        return mean_q(matrix, scale * all_grads, objective, logits)[1].abs().max() / scale**2

    errors = [remainder(scale, best) for scale in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.1
    assert errors[1] < 0.11 * errors[0]
    assert errors[2] < 0.11 * errors[1]
    assert remainder(1e-4, 1.01 * best) > 1e-3


@pytest.mark.parametrize("make", [apo.rmsprop, apo.adam])
def test_best_learning_rate_along_any_direction(make: Callable[..., apo.Rule]) -> None:
    """Wherever the step is −ηd, η* = gᵀd / dᵀHd; the momentum-free step is judged along its own d."""
    rule = apo.momentum_free(make())
    state, grads = rule.init(THETA), grad(loss)(THETA)
    unit, _ = rule.step(THETA, grads, state, rule.hypers._replace(lr=torch.ones((), dtype=torch.float64)))
    d = THETA["w"] - unit["w"]
    best = grads["w"] @ d / (d @ H @ d)
    _, slopes = apo.hypergradient(rule, loss, THETA, grads, state, rule.hypers._replace(lr=best))
    assert slopes.lr.abs() < 1e-12
