"""Every rule under torch's transformations: gradcheck, vmap, and torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import apo
from apo.trees import leaves, rebuild
from tests.cases import RULES, RuleCase, bits, granular, mlp, moment, names, quadratic, tensors

every_rule = pytest.mark.parametrize("case", RULES, ids=names(RULES))
every_granularity = pytest.mark.parametrize("granularity", ["global", "parameter"])

# Tracing takes half a second a row: one granularity each, in turn, and no row twice for its numbers alone.
COMPILED = [
    (case, ("global", "parameter")[i % 2])
    for i, case in enumerate(case for case in RULES if not case.name.endswith("-defaults"))
]


@every_granularity
@every_rule
def test_gradcheck(case: RuleCase, granularity: str) -> None:
    """Derivatives of the new parameters and state in parameters, gradients, state and hyperparameters."""
    rule = case.rule()
    at = moment(rule, quadratic(), 3)
    hypers = granular(granularity, rule, at.params)
    keys, cut = list(at.params), 2 * len(at.params)
    trees = tensors(at.params, at.grads, at.state, hypers)
    size = len(leaves(at.state))

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        params, grads = (dict(zip(keys, flat[i : i + len(keys)], strict=True)) for i in (0, len(keys)))
        state, h = rebuild(at.state, flat[cut : cut + size]), rebuild(hypers, flat[cut + size :])
        return tuple(t for t in tensors(*rule.step(params, grads, state, h)) if t.is_floating_point())

    # Step counts are not varied: they are whole numbers.
    inputs = [t.clone().requires_grad_(t.is_floating_point() and not is_count(at.state, t)) for t in trees]
    adapted = {f for f in hypers._fields if f in case.adaptable()}
    fields = [name for name, field in zip(hypers._fields, hypers, strict=True) for _ in leaves([field])]
    for name, leaf in zip(fields, inputs[cut + size :], strict=True):
        leaf.requires_grad_(name in adapted)
    assert torch.autograd.gradcheck(step, inputs, eps=1e-7, atol=1e-6, rtol=1e-5)


def is_count(state: Any, tensor: Tensor) -> bool:
    return any(tensor is count for count in getattr(state, "step", {}).values())


@every_rule
def test_vmaps_over_hyperparameters(case: RuleCase) -> None:
    """A batch of hyperparameters gives the batch of steps, and of hypergradients."""
    rule, problem = case.rule(), mlp()
    at = moment(rule, problem, 2)
    scales = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    batch = type(rule.hypers)(*(h * scales for h in rule.hypers))
    stepped, states = vmap(lambda h: rule.step(*at, h))(batch)

    def q(h: Any) -> Tensor:
        return problem.loss(rule.step(*at, h)[0])

    slopes = vmap(grad(q))(batch)
    for i in range(len(scales)):
        h = rebuild(rule.hypers, [column[i] for column in batch])
        new, state = rule.step(*at, h)
        expected = apo.hypergradient(rule, problem.loss, *at, h)[1]
        for key in new:
            torch.testing.assert_close(stepped[key][i], new[key], rtol=1e-13, atol=1e-14)
        for batched, one in zip(states, state, strict=True):
            for key in one:
                torch.testing.assert_close(batched[key][i], one[key], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close([s[i] for s in slopes], list(expected), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("case", "granularity"), COMPILED, ids=names(case for case, _ in COMPILED))
def test_compiles_to_one_graph(case: RuleCase, granularity: str) -> None:
    """torch.compile traces the step once, and reuses it for other hyperparameters, parameters and states."""
    rule = case.rule()
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(rule.step, fullgraph=True, backend=counting)
    for steps, scale in ((0, 1.0), (1, 0.5), (3, 0.9)):
        at = moment(rule, quadratic(), steps)
        hypers = granular(granularity, rule, at.params)
        hypers = rebuild(hypers, [h * scale for h in leaves(hypers)])
        for found, expected in zip(tensors(*compiled(*at, hypers)), tensors(*rule.step(*at, hypers)), strict=True):
            assert bits(found) == bits(expected)
    assert len(graphs) == 1
