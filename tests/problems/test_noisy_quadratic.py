"""The noisy quadratic against sampling, NumPy, and the figures of its source."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import apo
from apo.problems import LEARNING_RATES, PENALTIES, Family, NoisyQuadratic, best, receding

STEPS = 300


def relative(found: float, expected: float) -> float:
    return abs(found / expected - 1.0)


@pytest.mark.parametrize(
    ("policy", "final"), [("greedy", 220.15), ("same", 345.16), ("fresh", 220.15)], ids=["greedy", "same", "fresh"]
)
def test_methods_that_look_one_step_ahead(policy: str, final: float) -> None:
    problem = NoisyQuadratic()
    policies = {"greedy": problem.greedy(), "same": problem.apo(0.0), "fresh": problem.apo(0.0, fresh=True)}
    assert relative(problem.run(policies[policy], STEPS).loss[-1].item(), final) < 1e-4


@pytest.mark.parametrize(
    ("kind", "family", "final"),
    [
        ("sgd", "exponential", 3.823),
        ("sgd", "linear", 12.291),
        ("sgd", "fixed", 85.702),
        ("apo", "exponential", 6.937),
        ("apo", "linear_nonnegative", 41.99),
        ("apo", "fixed", 83.511),
    ],
)
def test_known_optima_are_found_and_are_optima(kind: str, family: str, final: float) -> None:
    """The loss is that of a recursion in NumPy; no neighbour along any parameter is better."""
    problem = NoisyQuadratic()
    policy = problem.scheduled if kind == "sgd" else problem.apo
    members = (LEARNING_RATES if kind == "sgd" else PENALTIES)[family]
    found = best(problem, policy, members._replace(starts=lambda steps: [members.starts(steps)[0]]), STEPS)
    assert relative(found.loss, final) < 1e-2
    assert relative(in_numpy(problem, found.sequence, kind), found.loss) < 1e-9
    times = torch.arange(STEPS, dtype=torch.float64) / STEPS
    for index in range(len(found.parameters)):
        for change in (-0.02, 0.02):
            moved = found.parameters.clone()
            moved[index] += change
            assert in_numpy(problem, members.sequence(moved, times), kind) >= found.loss * (1.0 - 1e-9)


def in_numpy(problem: NoisyQuadratic, sequence: Tensor, kind: str) -> float:
    """The final loss by the recursion A' = (1 − ηh)²A + η²h²V."""
    h, v = problem.curvature.numpy(), problem.variance.numpy()
    a = problem.start.position.numpy()
    for number in sequence.numpy():
        eta = number
        if kind == "apo":
            eta = (h**2 * (a + v)).sum() / (h**2 * (h + 2.0 * number) * (a + v)).sum()
        a = (1.0 - eta * h) ** 2 * a + eta**2 * h**2 * v
    return float(0.5 * (h * a).sum())


def test_no_step_of_the_optimal_schedule_can_be_improved() -> None:
    """The loss is affine in A after a step and so a parabola in its learning rate: NumPy finds every minimum."""
    problem = NoisyQuadratic(dimension=20, start=5.0)
    found = best(problem, problem.scheduled, LEARNING_RATES["optimal"], 30)
    h, v, rates = problem.curvature.numpy(), problem.variance.numpy(), found.sequence.numpy()
    moments = [problem.start.position.numpy()]
    for eta in rates:
        moments.append((1.0 - eta * h) ** 2 * moments[-1] + eta**2 * h**2 * v)
    costate = 0.5 * h
    for step in reversed(range(30)):
        a = moments[step]
        bend = (costate * h**2 * (a + v)).sum()
        gain = bend * (rates[step] - (costate * h * a).sum() / bend) ** 2
        assert gain < 1e-4 * found.loss
        costate = (1.0 - rates[step] * h) ** 2 * costate
    assert np.isclose(found.loss, 0.5 * (h * moments[-1]).sum(), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["falling", "apo"])
def test_sampled_runs_agree(momentum: float, kind: str) -> None:
    problem = NoisyQuadratic(dimension=30)
    rates = torch.linspace(1.5, 0.05, 60, dtype=torch.float64) * (1.0 - momentum)
    if kind == "apo":
        rates = problem.run(problem.apo(2.0), 60, momentum).rates
    expected = problem.run(problem.scheduled(rates), 60, momentum).loss
    sampled = problem.simulate(apo.sgd(momentum=momentum), rates, runs=400)
    error = sampled.std(0) / math.sqrt(400)
    assert sampled.shape == (400, 61)
    assert bool(((sampled.mean(0) - expected).abs() <= 4.0 * error + 1e-9 * expected).all())


def test_apo_minimises_the_sampled_proximal_objective() -> None:
    """Against the minimum over a grid of the mean over many batches, at the initial point and after a few steps."""
    problem = NoisyQuadratic(dimension=20, start=3.0)
    h = problem.curvature
    generator = torch.Generator().manual_seed(0)
    for fresh in (False, True):
        x = torch.full((10_000, 20), 3.0, dtype=torch.float64)
        noise, other = (
            problem.variance.sqrt() * torch.randn(10_000, 20, generator=generator, dtype=torch.float64) for _ in "ab"
        )
        step = h * (x - noise)
        judged = other if fresh else noise
        curve = []
        grid = torch.linspace(0.3, 1.3, 101, dtype=torch.float64)
        for eta in grid:
            after = x - eta * step
            objective = 0.5 * (after - judged).square() @ h + 0.3 * (after - x).square().sum(1)
            curve.append(objective.mean().item())
        expected = grid[int(np.argmin(curve))].item()
        found = problem.apo(0.3, fresh=fresh)(0, problem.start).item()
        assert abs(found - expected) < 0.03


def test_apo_is_what_the_library_s_hypergradient_leads_to() -> None:
    """At the learning rate of the closed form, the mean hypergradient over batches vanishes."""
    problem = NoisyQuadratic(dimension=20, start=3.0)
    lr = problem.apo(0.3)(0, problem.start)
    rule, generator = apo.sgd(), torch.Generator().manual_seed(1)
    params = {"x": torch.full((20_000, 20), 3.0, dtype=torch.float64)}
    noise = problem.variance.sqrt() * torch.randn(20_000, 20, generator=generator, dtype=torch.float64)
    objective = problem.noisy(noise)

    def proximal(moved: dict[str, Tensor]) -> Tensor:
        return objective(moved) + 0.3 * (moved["x"] - params["x"]).square().sum()

    grads = torch.func.grad(objective)(params)
    slopes = [
        apo.hypergradient(rule, proximal, params, grads, rule.init(params), rule.hypers._replace(lr=rate))[1].lr.item()
        for rate in (0.98 * lr, lr, 1.02 * lr)
    ]
    assert slopes[0] < 0.0 < slopes[2] and abs(slopes[1]) < 0.5 * min(-slopes[0], slopes[2])


def test_hypergradient_descent_rests_where_greedy_is() -> None:
    """Its first change is none from greedy's learning rate, down from above it and up from below."""
    problem = NoisyQuadratic()
    moments = problem.run(problem.greedy(), 20).moments
    rest = problem.greedy()(0, moments).item()
    for first, expected in ((rest, 0.0), (1.1 * rest, -1.0), (0.9 * rest, 1.0)):
        rates = problem.run(problem.hypergradient_descent(first, 0.3), 2, start=moments).rates
        change = (rates[1] / rates[0] - 1.0).item()
        assert abs(change) < 1e-12 if expected == 0.0 else change * expected > 1e-3


def test_a_look_of_one_step_is_greedy_and_a_longer_one_ends_lower() -> None:
    problem = NoisyQuadratic(dimension=50)
    greedy = problem.run(problem.greedy(), 100)
    ends = {h: problem.run(receding(problem, h, 100), 100) for h in (1, 10, 100)}
    torch.testing.assert_close(ends[1].rates, greedy.rates, rtol=1e-2, atol=0.0)
    assert ends[100].loss[-1] < 0.8 * ends[10].loss[-1] and ends[10].loss[-1] < 0.8 * ends[1].loss[-1]


def test_the_course_is_differentiable() -> None:
    problem = NoisyQuadratic(dimension=5)
    rates = torch.rand(4, dtype=torch.float64).requires_grad_()
    for momentum in (0.0, 0.7):

        def final(rates: Tensor, momentum: float = momentum) -> Tensor:
            return problem.run(problem.scheduled(rates), 4, momentum).loss[-1] / 1e4

        assert torch.autograd.gradcheck(final, (rates,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 1}, "dimension=1 is below 2"),
        ({"condition": 0.5}, "condition=0.5 is not in"),
        ({"noise": -1.0}, "noise=-1.0 is not in"),
        ({"noise": math.nan}, "noise=nan is not in"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyQuadratic(**options)


def test_a_penalty_without_a_best_step_gives_an_infinite_one() -> None:
    """J falls for ever along the step where κ + 2λ < 0; the formula would give the learning rate of its maximum."""
    problem = NoisyQuadratic(dimension=5)
    assert 0.0 < problem.apo(-0.3)(0, problem.start) < math.inf
    assert problem.apo(-5.0)(0, problem.start) == math.inf
    below = Family(lambda u, t: u[0].expand(len(t)), lambda steps: [(-5.0,)])
    with pytest.raises(ValueError, match="no start of the family's 1 leads to a finite loss"):
        best(problem, problem.apo, below, 5)


def test_a_family_of_one_s_own() -> None:
    """Decay in inverse time, of which the best for one flat curvature has a closed form: η = 1/(h(t + A/V))."""
    problem = NoisyQuadratic(dimension=2, condition=1.0, start=1.0)
    inverse = Family(lambda u, t: 1.0 / (u[0].exp() + u[1].exp() * t), lambda steps: [(0.0, 1.0)])
    found = best(problem, problem.scheduled, inverse, 20)
    expected = 1.0 / (2.0 + torch.arange(20, dtype=torch.float64))
    torch.testing.assert_close(found.sequence, expected, rtol=1e-3, atol=0.0)
    assert relative(found.loss, problem.run(problem.greedy(), 20).loss[-1].item()) < 1e-6


def test_best_in_smaller_units_is_the_same() -> None:
    """The docstring's way out where courses leave the range of float64."""
    families = [LEARNING_RATES["exponential"], LEARNING_RATES["linear"]]
    for family in families:
        natural, small = (NoisyQuadratic(10, noise=unit**2, start=100.0 * unit) for unit in (1.0, 2.0**-200))
        found, again = (best(problem, problem.scheduled, family, 30) for problem in (natural, small))
        assert relative(again.loss * 2.0**400, found.loss) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda problem: problem.run(problem.greedy(), 0), "steps=0 is not at least 1"),
        (lambda problem: problem.run(problem.greedy(), 3, momentum=-0.5), "momentum=-0.5 is not in"),
        (lambda problem: problem.simulate(apo.sgd(), [0.1], runs=-1), "runs=-1 is not at least 1"),
        (lambda problem: receding(problem, 3, 0), "steps=0 is not at least 1"),
        (lambda problem: best(problem, problem.scheduled, LEARNING_RATES["fixed"], 3, iterations=0), "iterations=0"),
        (
            lambda problem: best(problem, problem.scheduled, Family(lambda u, t: u, lambda steps: [(0.1,)]), 3),
            r"sequence is of shape \[1\], and must be \[3\]",
        ),
        (
            lambda problem: best(problem, problem.scheduled, Family(lambda u, t: u * t, lambda steps: []), 3),
            "no start of the family's 0",
        ),
    ],
)
def test_bad_calls(call: Callable[[NoisyQuadratic], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(NoisyQuadratic(dimension=2))


def test_a_search_over_the_edge_of_admissible_penalties_turns_back() -> None:
    problem = NoisyQuadratic(dimension=10, condition=10.0)
    assert all(relative(loss, 2.00986) < 1e-4 for loss in best(problem, problem.apo, PENALTIES["linear"], 12).losses)
