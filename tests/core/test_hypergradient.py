"""The hypergradient is the derivative of Q(θ'(φ)): against differences, the full graph, and forward mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import apo
from apo.trees import leaves, rebuild
from apo.types import Params
from tests.cases import PROBLEMS, RULES, Moment, Problem, RuleCase, granular, moment, randn

OBJECTIVE = apo.Proximal(fsd=0.3, wsd=0.2)
STATES = {"fresh": 0, "after-4-steps": 4}

# Every step that can be judged: that of each rule, and its momentum-free one where there is one.
JUDGED = [(case, case.rule()) for case in RULES]
JUDGED += [(case, apo.momentum_free(rule)) for case, rule in JUDGED if rule.without_momentum is not None]

every_step = pytest.mark.parametrize(
    ("case", "rule"), JUDGED, ids=[case.name + "-free" * (i >= len(RULES)) for i, (case, _) in enumerate(JUDGED)]
)
every_granularity = pytest.mark.parametrize("granularity", ["global", "parameter"])
every_state = pytest.mark.parametrize("steps", STATES.values(), ids=STATES)
every_problem = pytest.mark.parametrize("problem", [make() for make in PROBLEMS.values()], ids=PROBLEMS)


def judged(problem: Problem, at: Moment) -> Callable[[Params], Tensor]:
    """Q as a function of the new parameters, with every term in it."""
    return OBJECTIVE.at(at.params, problem.loss, problem.outputs)


def adapted(case: RuleCase, hypers: Any) -> list[tuple[int, str]]:
    """The place among the leaves of ``hypers``, and the field, of every hyperparameter that can be adapted."""
    fields = [name for name, field in zip(hypers._fields, hypers, strict=True) for _ in leaves([field])]
    return [(i, name) for i, name in enumerate(fields) if name in case.adaptable()]


def differences(f: Callable[[Tensor], Tensor], x: Tensor, strides: Tensor) -> Tensor:
    """The gradient of f at x by central differences, extrapolated to step 0 until rounding takes over (Ridders).

    Args:
        f: ``f(x: [n]) -> []``.
        x: Where, [n].
        strides: The widest step of each coordinate, [n].

    Returns:
        The gradient, [n].
    """
    steps = strides[None] / 1.4 ** torch.arange(9, dtype=torch.float64)[:, None]
    moves = torch.diag_embed(steps)  # [step, coordinate, n]
    slopes = (vmap(vmap(f))(x + moves) - vmap(vmap(f))(x - moves)) / (2.0 * steps)
    best, least = slopes[0].clone(), torch.full_like(x, torch.inf)
    previous: list[Tensor] = []
    for slope in slopes:
        row = [slope]
        for j, old in enumerate(previous):
            row.append(row[j] + (row[j] - old) / (1.4 ** (2 * j + 2) - 1.0))
            error = torch.maximum((row[j + 1] - row[j]).abs(), (row[j + 1] - old).abs())
            best, least = torch.where(error < least, row[j + 1], best), torch.minimum(error, least)
        previous = row
    return best


def stride(rule: apo.Rule, name: str, value: float) -> float:
    """The first step of the differences: a fraction of the scale on which an update changes."""
    return max(0.1 * value, 1e-4) if rule.domains[name].one_step else 0.4 * (1.0 - value)


def within_reach(f: Callable[[Tensor], Tensor], x: Tensor, strides: Tensor) -> Tensor:
    """Strides shortened until f is near f(x) on both sides: where ε is inside a root there is no update below −v̂."""
    for _ in range(10):
        moves = torch.diag(strides)
        far = (torch.stack([vmap(f)(x + moves), vmap(f)(x - moves)]) - f(x)).abs().amax(0)
        strides = torch.where(far < 1.0, strides, strides / 4.0)
    return strides


def test_differences_are_exact_enough() -> None:
    x = randn(4, seed=1)
    found = differences(lambda z: (z.exp() * z.sin()).sum(), x, torch.full_like(x, 0.3))
    torch.testing.assert_close(found, x.exp() * (x.sin() + x.cos()), rtol=1e-9, atol=0.0)


@every_problem
@every_state
@every_granularity
@every_step
def test_equals_central_differences(
    case: RuleCase, rule: apo.Rule, granularity: str, steps: int, problem: Problem
) -> None:
    at = moment(case.rule(), problem, steps)
    objective, hypers = judged(problem, at), granular(granularity, rule, at.params)
    place = adapted(case, hypers)
    value, found = apo.hypergradient(rule, objective, *at, hypers)
    assert type(found) is type(hypers)

    def q(x: Tensor) -> Tensor:
        moved = leaves(hypers)
        for j, (i, _) in enumerate(place):
            moved[i] = x[j]
        return objective(rule.step(*at, rebuild(hypers, moved))[0])

    x = torch.stack([leaves(hypers)[i] for i, _ in place])
    strides = torch.tensor([stride(rule, name, v) for (_, name), v in zip(place, x.tolist(), strict=True)])
    expected = differences(q, x, within_reach(q, x, strides.double()))
    torch.testing.assert_close(value, q(x), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(torch.stack([leaves(found)[i] for i, _ in place]), expected, rtol=1e-6, atol=1e-9)
    assert found.lr != 0.0 if granularity == "global" else all(h != 0.0 for h in found.lr.values())


@every_problem
@every_state
@every_granularity
@every_step
def test_equals_the_full_graph(case: RuleCase, rule: apo.Rule, granularity: str, steps: int, problem: Problem) -> None:
    at = moment(case.rule(), problem, steps)
    objective, hypers = judged(problem, at), granular(granularity, rule, at.params)
    inputs = [h.clone().requires_grad_() for h in leaves(hypers)]
    whole = objective(rule.step(*at, rebuild(hypers, inputs))[0])
    expected = torch.autograd.grad(whole, inputs, allow_unused=True, materialize_grads=True)
    value, found = apo.hypergradient(rule, objective, *at, hypers)
    assert value == whole
    torch.testing.assert_close(leaves(found), list(expected), rtol=1e-14, atol=1e-15)


# torch's own forward mode still scripts its decompositions.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_granularity
@every_step
def test_equals_forward_mode_and_functional_reverse_mode(case: RuleCase, rule: apo.Rule, granularity: str) -> None:
    """⟨pullback(G), φ̇⟩ = ⟨G, θ̇'⟩; and torch.func differentiates the rule as autograd does."""
    at = moment(case.rule(), PROBLEMS["mlp"](), 4)
    hypers = granular(granularity, rule, at.params)
    cotangents = {key: randn(*p.shape, seed=i) for i, (key, p) in enumerate(at.params.items())}
    tangents = rebuild(hypers, [randn(seed=i) for i, _ in enumerate(leaves(hypers))])
    pulled = apo.lookahead(rule, *at, hypers).pullback(cotangents)
    _, pushed = jvp(lambda h: rule.step(*at, h)[0], (hypers,), (tangents,))
    back = sum((a * b for a, b in zip(leaves(pulled), leaves(tangents), strict=True)), torch.tensor(0.0))
    forth = sum(((cotangents[key] * pushed[key]).sum() for key in pushed), torch.tensor(0.0))
    torch.testing.assert_close(back, forth, rtol=1e-12, atol=1e-12)

    def scalar(h: Any) -> Tensor:
        new, _ = rule.step(*at, h)
        return torch.stack([(cotangents[key] * new[key]).sum() for key in new]).sum()

    torch.testing.assert_close(leaves(grad(scalar)(hypers)), leaves(pulled), rtol=1e-12, atol=1e-14)


@every_step
def test_pullback_is_linear_and_repeatable(case: RuleCase, rule: apo.Rule) -> None:
    at = moment(case.rule(), PROBLEMS["mlp"](), 2)
    ahead = apo.lookahead(rule, *at, rule.hypers)
    once = leaves(ahead.pullback(at.grads))
    assert once == leaves(ahead.pullback(at.grads))
    doubled = leaves(ahead.pullback({key: 2.0 * g for key, g in at.grads.items()}))
    torch.testing.assert_close(doubled, [2.0 * h for h in once], rtol=1e-15, atol=0.0)
    assert leaves(ahead.pullback({})) == [torch.zeros(()).double() for _ in once]
    parts = [leaves(ahead.pullback({key: g})) for key, g in at.grads.items()]
    torch.testing.assert_close([sum(h) for h in zip(*parts, strict=True)], once, rtol=1e-13, atol=1e-15)


def test_the_tape_of_some_hyperparameters() -> None:
    """Derivatives of those that are named, to the last digit, and 0 of the others; also where they differ by tensor."""
    rule = apo.adam(lr=1e-2, weight_decay=0.1)
    params = {name: randn(3, seed=seed) for seed, name in enumerate("ab")}
    grads = {name: randn(3, seed=seed) for seed, name in enumerate("ab", 5)}
    state = rule.init(params)
    hypers = rule.hypers._replace(lr={name: torch.tensor(0.1 * k).double() for k, name in enumerate("ab", 1)})
    whole = apo.lookahead(rule, params, grads, state, hypers).pullback(grads)
    some = apo.lookahead(rule, params, grads, state, hypers, wrt=["lr"]).pullback(grads)
    assert some.lr == whole.lr and all(slope != 0.0 for slope in some.lr.values())
    assert whole.eps != 0.0 and some.eps == 0.0
    none = apo.lookahead(rule, params, grads, state, hypers, wrt=[]).pullback(grads)
    assert leaves(none) == [torch.zeros(()).double() for _ in leaves(hypers)]
