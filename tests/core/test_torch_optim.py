"""Every rule that torch also has takes the same steps."""

from typing import Any

import pytest
import torch
from torch.func import grad

from tests.cases import PROBLEMS, RULES, RuleCase, names, randn

TWINS = [case for case in RULES if case.twin is not None]


def same_run(case: RuleCase, problem_name: str, missing: Any = lambda step, i: False) -> None:
    """Take 20 steps with both, gradients of parameter i being missing at a step where ``missing`` says so."""
    assert case.twin is not None
    problem = PROBLEMS[problem_name]()
    theirs = {key: p.clone().requires_grad_() for key, p in problem.params.items()}
    twin = case.twin(theirs.values())
    rule = case.rule()
    params, state = problem.params, rule.init(problem.params)
    for step in range(20):
        grads = grad(problem.loss)(params)
        grads = {key: g for i, (key, g) in enumerate(grads.items()) if not missing(step, i)}
        params, state = rule.step(params, grads, state, rule.hypers)
        twin.zero_grad()
        problem.loss(theirs).backward()
        for key, p in theirs.items():
            if key not in grads:
                p.grad = None
        twin.step()
        for key, p in theirs.items():
            torch.testing.assert_close(params[key], p.detach(), rtol=1e-12, atol=1e-12)
    moved = max((params[key] - start).abs().max().item() for key, start in problem.params.items())
    assert moved > 1e-3  # or there would be nothing to compare


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", TWINS, ids=names(TWINS))
def test_takes_the_steps_of_torch(case: RuleCase, problem: str) -> None:
    same_run(case, problem)


@pytest.mark.parametrize("case", TWINS, ids=names(TWINS))
def test_takes_the_steps_of_torch_where_gradients_are_missing(case: RuleCase) -> None:
    # One parameter misses its first two steps, one every third, one has them all: step counts differ.
    same_run(case, "mlp", missing=lambda step, i: (step < 2 and i == 1) or (step % 3 == 2 and i == 2))


@pytest.mark.parametrize("case", TWINS, ids=names(TWINS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_a_step_in_float64_rounded_once(case: RuleCase, dtype: torch.dtype) -> None:
    """Low precision parameters take the exact step, computed in float32 and rounded at the end."""
    rule = case.rule()
    params = {"w": randn(50, seed=1).to(dtype)}
    grads = {"w": randn(50, seed=2).to(dtype)}
    exact = {key: p.double() for key, p in params.items()}
    low, _ = rule.step(params, grads, rule.init(params), rule.hypers)
    high, _ = rule.step(exact, {"w": grads["w"].double()}, rule.init(exact), rule.hypers)
    ulp = torch.finfo(dtype).eps
    bound = 0.51 * ulp if dtype == torch.bfloat16 else 4 * ulp
    error = (low["w"].double() - high["w"]).abs() / high["w"].abs().clamp_min(0.1)
    assert error.max() <= bound
