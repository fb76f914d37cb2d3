"""The proximal objective is its equation, term by term, and refuses what it cannot mean."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

import apo
from apo.discrepancies import squared_error
from apo.proximal import value_and_grad
from apo.types import Params
from tests.cases import PROBLEMS, Problem, flat, mlp, randn

TARGETS = torch.tensor([0, 1, 2, 1, 0])


def moved(params: Params, size: float = 0.1) -> Params:
    return {key: p + size * randn(*p.shape, seed=i) for i, (key, p) in enumerate(params.items())}


def output_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets)


every_problem = pytest.mark.parametrize("problem", [make() for make in PROBLEMS.values()], ids=PROBLEMS)


@every_problem
@pytest.mark.parametrize("fsd", [0.0, 0.5])
@pytest.mark.parametrize("wsd", [0.0, 2.0])
def test_exact_loss(problem: Problem, fsd: float, wsd: float) -> None:
    new = moved(problem.params)
    square = (problem.outputs(new) - problem.outputs(problem.params)).square()
    expected = problem.loss(new) + fsd * square.sum() / len(square)
    expected = expected + wsd * (flat(new) - flat(problem.params)).square().sum() / 2
    q = apo.Proximal(fsd=fsd, wsd=wsd).at(problem.params, problem.loss, problem.outputs)
    torch.testing.assert_close(q(new), expected, rtol=1e-14, atol=0.0)
    assert q(problem.params) == problem.loss(problem.params)


@every_problem
@pytest.mark.parametrize(("fsd", "wsd"), [(0.0, 2.0), (0.5, 0.0), (0.5, 2.0)])
def test_linear_loss(problem: Problem, fsd: float, wsd: float) -> None:
    new, grads = moved(problem.params), grad(problem.loss)(problem.params)
    linear = problem.loss(problem.params) + flat(grads) @ (flat(new) - flat(problem.params))
    exact = apo.Proximal(fsd=fsd, wsd=wsd).at(problem.params, problem.loss, problem.outputs)(new)
    q = apo.Proximal(fsd=fsd, wsd=wsd, loss_model="linear").at(
        problem.params, problem.loss, problem.outputs, grads=grads
    )
    torch.testing.assert_close(q(new), exact - problem.loss(new) + linear, rtol=1e-13, atol=1e-14)
    # The two models have one slope at θ.
    for ours, theirs in zip(grad(q)(problem.params).values(), grads.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


def test_linear_loss_where_gradients_are_missing() -> None:
    problem = mlp()
    new, grads = moved(problem.params), grad(problem.loss)(problem.params)
    some = {key: g for key, g in grads.items() if key != "0.bias"}
    stay = {**new, "0.bias": problem.params["0.bias"]}
    objective = apo.Proximal(wsd=1.0, loss_model="linear")
    partial, whole = (objective.at(problem.params, problem.loss, grads=g) for g in (some, grads))
    torch.testing.assert_close(partial(stay), whole(stay), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("name", ["squared_error", "kl", "bregman", "gauss_newton"])
def test_each_discrepancy_is_weighed_by_fsd(name: str) -> None:
    problem = mlp()
    new = moved(problem.params)
    objective = apo.Proximal(fsd=0.5, discrepancy=name)
    q = objective.at(problem.params, problem.loss, problem.outputs, output_loss=output_loss, targets=TARGETS)
    distance = objective.distance(problem.outputs(new), problem.outputs(problem.params), output_loss, TARGETS)
    assert distance > 0.0
    torch.testing.assert_close(q(new), problem.loss(new) + 0.5 * distance, rtol=1e-14, atol=0.0)


def test_a_function_can_be_the_discrepancy() -> None:
    problem = mlp()
    new = moved(problem.params)
    named, given, scalar = (
        apo.Proximal(fsd=0.5, discrepancy=d).at(problem.params, problem.loss, problem.outputs)(new)
        for d in ("squared_error", squared_error, lambda a, b: (a - b).square().sum(-1).mean())
    )
    assert named == given
    torch.testing.assert_close(named, scalar, rtol=1e-15, atol=0.0)


def test_weights_follow_their_schedules() -> None:
    problem = mlp()
    new = moved(problem.params)
    scheduled = apo.Proximal(fsd=lambda step: 0.1 * step, wsd=lambda step: 1.0 / (1.0 + step))
    assert scheduled.weights(4) == (0.4, 0.2)
    fixed = apo.Proximal(fsd=0.4, wsd=0.2).at(problem.params, problem.loss, problem.outputs)(new)
    assert scheduled.at(problem.params, problem.loss, problem.outputs, steps=4)(new) == fixed
    # Where fsd is 0, no outputs are needed.
    assert scheduled.at(problem.params, problem.loss)(problem.params) == problem.loss(problem.params)
    # A schedule may be all the penalty that a linear loss has.
    assert apo.Proximal(wsd=lambda step: 1.0, loss_model="linear").weights(0) == (0.0, 1.0)


def test_objective_keeps_no_graph_of_the_old_parameters() -> None:
    problem = mlp()
    params = {key: p.clone().requires_grad_() for key, p in problem.params.items()}
    q = apo.Proximal(fsd=0.5, wsd=0.3).at(params, problem.loss, problem.outputs)
    value, slopes = value_and_grad(q, moved(problem.params))
    assert not value.requires_grad
    assert all(p.grad is None for p in params.values())
    assert not any(g.requires_grad for g in slopes.values())
    q({key: p.detach().requires_grad_() for key, p in params.items()}).backward()
    assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("value", [-1.0, -1e-9, math.nan, math.inf, "1", None, [1.0], True, 1j])
@pytest.mark.parametrize("name", ["fsd", "wsd"])
def test_refuses_a_weight(name: str, value: Any) -> None:
    number = isinstance(value, float)
    error = ValueError if number else TypeError
    shown = re.escape(repr(value))
    message = rf"^{name}={shown} is not in \[0, ∞\)$" if number else rf"^{name} must be a float, not {shown} of type "
    with pytest.raises(error, match=message):
        apo.Proximal(**{name: value})
    schedule: Any = {name: lambda step: value}
    with pytest.raises(error, match=message):
        apo.Proximal(**schedule).weights(3)


@pytest.mark.parametrize("value", [0, 1, 0.25, torch.tensor(0.5)])
def test_takes_any_number_as_a_weight(value: Any) -> None:
    assert apo.Proximal(fsd=value, wsd=lambda step: value).weights(0) == (float(value), float(value))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discrepancy": "mse"}, "discrepancy='mse' is not one of 'squared_error', 'kl', 'bregman', 'gauss_newton'"),
        ({"discrepancy": None}, "discrepancy=None is not one of 'squared_error', 'kl', 'bregman', 'gauss_newton'"),
        ({"loss_model": "quadratic", "wsd": 1.0}, "loss_model='quadratic' is not one of 'exact', 'linear'"),
        ({"lookahead": "momentum"}, "lookahead='momentum' is not one of 'steady', 'no-momentum', 'step'"),
        ({"other_fraction": 0.0}, "other_fraction=0.0 is not in (0, 1]"),
        ({"other_fraction": 1.5}, "other_fraction=1.5 is not in (0, 1]"),
        ({"other_fraction": math.nan}, "other_fraction=nan is not in (0, 1]"),
        ({"loss_model": "linear"}, "loss_model='linear' with fsd=0 and wsd=0 has no minimum: make fsd or wsd positive"),
    ],
)
def test_refuses_an_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apo.Proximal(**options)


def test_says_which_argument_is_missing() -> None:
    problem = mlp()
    with pytest.raises(ValueError, match="fsd > 0 needs outputs=, the model's outputs on another batch"):
        apo.Proximal(fsd=0.1).at(problem.params, problem.loss)
    with pytest.raises(ValueError, match="loss_model='linear' needs grads=, the gradient of the loss at params"):
        apo.Proximal(wsd=0.1, loss_model="linear").at(problem.params, problem.loss)
    for name in ("bregman", "gauss_newton"):
        q = apo.Proximal(fsd=0.1, discrepancy=name).at(problem.params, problem.loss, problem.outputs)
        with pytest.raises(ValueError, match=f"discrepancy='{name}' needs loss=, a function of outputs and targets"):
            q(problem.params)


@pytest.mark.parametrize(
    ("discrepancy", "message"),
    [
        (
            lambda new, old: (new - old).sum(-1),
            "must be zero with zero gradient at equality.*gradient of up to 0.2 there$",
        ),
        (lambda new, old: (new - old).square().sum(-1) + 3.0, "must be zero .* but has value 3 and"),
        (lambda new, old: (new - old).square().sum(-1).sqrt(), "must be zero .*gradient of up to nan"),
        (lambda new, old: old.square().sum(-1), "does not depend on its first argument"),
    ],
    ids=["slope", "value", "root", "constant"],
)
def test_refuses_a_discrepancy_that_does_not_vanish_at_equality(discrepancy: Any, message: str) -> None:
    problem = mlp()
    with pytest.raises(ValueError, match=rf"^discrepancy=<function .*{message}"):
        apo.Proximal(fsd=0.1, discrepancy=discrepancy).at(problem.params, problem.loss, problem.outputs)


@pytest.mark.parametrize("bad", [lambda p: p["0.bias"], lambda p: 1.0, lambda p: torch.zeros(())])
def test_refuses_an_objective_that_is_no_scalar_of_the_parameters(bad: Any) -> None:
    problem, rule = mlp(), apo.sgd()
    with pytest.raises(ValueError, match=r"^the objective must return a 0-d tensor that depends on its argument, not "):
        apo.hypergradient(rule, bad, problem.params, {}, rule.init(problem.params), rule.hypers)


def test_plain_numbers_will_do_for_hyperparameters() -> None:
    problem = mlp()
    rule = apo.rmsprop(lr=1e-2)
    state = rule.init(problem.params)
    _, grads = value_and_grad(problem.loss, problem.params)
    plain = rule.hypers._replace(lr=3e-2)
    exact = rule.hypers._replace(lr=torch.tensor(3e-2, dtype=torch.float64))
    found = [apo.hypergradient(rule, problem.loss, problem.params, grads, state, h) for h in (plain, exact)]
    assert found[0] == found[1]
