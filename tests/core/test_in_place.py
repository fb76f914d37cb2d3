"""Steps in place are those of the pure rule, and are refused where they would not be."""

from typing import Any

import pytest
import torch
from torch import Tensor

import apo
from apo.lifting import Lifted
from apo.types import Params
from tests.cases import RULES, RuleCase, names
from tests.core.test_packing import drawn

CASES = [case for case in RULES if getattr(case.rule().step, "in_place", None)]
every_rule = pytest.mark.parametrize("case", CASES, ids=names(CASES))


def numbers(rule: apo.Rule) -> Any:
    return type(rule.hypers)(*(h.item() for h in rule.hypers))


def take(rule: apo.Rule, params: Params, grads: Params, state: Any, **hypers: float) -> bool:
    """Step all of them in place, and say whether that was possible."""
    assert isinstance(rule.step, Lifted) and rule.step.in_place
    columns = ([field[name] for name in params] if field else None for field in state)
    given = numbers(rule)._replace(**hypers)
    return rule.step.in_place(list(params.values()), list(grads.values()), type(state)(*columns), given)


def contiguous(dtype: torch.dtype, seed: int) -> Params:
    return {name: tensor.contiguous() for name, tensor in drawn(dtype, seed).items()}


def test_all_that_should_are_here() -> None:
    assert {case.make for case in CASES} >= {apo.sgd, apo.rmsprop, apo.adam, apo.adamw, apo.apollo}


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_pure_step(case: RuleCase, dtype: torch.dtype) -> None:
    """Over several steps, of parameters of different age; gradients are left as they are."""
    rule, params = case.rule(), contiguous(dtype, 0)
    grads = contiguous(dtype, 1)
    params, state = rule.step(params, grads, rule.init(params), rule.hypers)
    params, state = rule.step(params, {"1": grads["1"]}, state, rule.hypers)
    live = {name: param.clone() for name, param in params.items()}
    kept = type(state)(*({name: entry.clone() for name, entry in field.items()} for field in state))
    taken = []
    for step in range(4):
        grads = contiguous(dtype, 2 + step)
        given = {name: grad.clone() for name, grad in grads.items()}
        params, state = rule.step(params, grads, state, rule.hypers)
        taken.append(take(rule, live, given, kept))
        if not taken[-1]:
            break
        assert all(torch.equal(given[name], grad) for name, grad in grads.items())
        eps = 100 * torch.finfo(dtype).eps
        for name, param in params.items():
            torch.testing.assert_close(live[name], param, rtol=eps, atol=eps)
        for field, entries in state._asdict().items():
            for name, entry in entries.items():
                now = getattr(kept, field)[name]
                assert now.dtype == entry.dtype
                torch.testing.assert_close(now, entry, rtol=eps, atol=eps)
    assert all(taken) or case.name in ("rmsprop-rho", "rmsprop-rho-one", "rmsprop-corrected")


@every_rule
@pytest.mark.parametrize("odd", ["bfloat16", "transposed"])
def test_refuses_what_kernels_would_get_wrong(case: RuleCase, odd: str) -> None:
    """And has changed nothing."""
    rule = case.rule()
    params, grads = ({"w": torch.randn(3, 4)} for _ in range(2))
    if odd == "bfloat16":
        params, grads = ({"w": tensors["w"].bfloat16()} for tensors in (params, grads))
    else:
        grads = {"w": torch.randn(4, 3).t()}
    state = rule.init(params)
    before = [tensor.clone() for tensor in (params["w"], *entries(state))]
    assert not take(rule, params, grads, state)
    assert all(torch.equal(one, other) for one, other in zip((params["w"], *entries(state)), before, strict=True))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (apo.adam(), {"eps": 0.0}),
        (apo.rmsprop(), {"eps": 0.0}),
        (apo.rmsprop(), {"rho": 0.4}),
        (apo.rmsprop(bias_correction=True), {}),
        (apo.sgd(momentum=0.9, dampening=0.5), {}),
    ],
)
def test_refuses_what_torch_does_otherwise(rule: apo.Rule, options: dict[str, float]) -> None:
    params, grads = contiguous(torch.float32, 0), contiguous(torch.float32, 1)
    assert not take(rule, params, grads, rule.init(params), **options)


def entries(state: Any) -> list[Tensor]:
    return [entry for field in state for entry in field.values()]
