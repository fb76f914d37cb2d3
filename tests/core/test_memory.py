"""Hypergradients keep nothing: no graph, no cycle, no tensor that outlives its call."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

import apo
from apo.trees import leaves
from tests.cases import RULES, RuleCase, moment, names, quadratic

every_rule = pytest.mark.parametrize("case", RULES, ids=names(RULES))


def live_tensors() -> int:
    """How many tensors there are; by ``type``, since ``isinstance`` would wake lazy proxies."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_a_thousand_hypergradients_leave_nothing_behind() -> None:
    """The number of live tensors stays flat over a run, without the garbage collector's help."""
    problem, rule = quadratic(), apo.adamw()
    params, state, hypers = problem.params, rule.init(problem.params), rule.hypers
    grads = grad(problem.loss)(params)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for step in range(1001):
            objective = apo.Proximal(fsd=0.1, wsd=0.1).at(params, problem.loss, problem.outputs)
            _, slopes = apo.hypergradient(rule, objective, params, grads, state, hypers)
            params, state, _ = apo.lookahead(rule, params, grads, state, hypers)
            hypers = hypers._replace(lr=hypers.lr - 1e-9 * slopes.lr)
            if step % 250 == 0:
                counts.append(live_tensors())
    finally:
        gc.enable()
    assert counts[1:] == counts[1:2] * 4
    assert not any(t.requires_grad for t in [*params.values(), *leaves(state), *leaves(hypers)])


@every_rule
def test_a_lookahead_frees_its_tape_when_it_goes(case: RuleCase) -> None:
    """What a step computes dies with the lookahead, by reference counts alone."""
    rule = case.rule()
    at = moment(rule, quadratic(), 2)
    born: list[weakref.ref[Tensor]] = []

    def step(*arguments: Any) -> Any:
        params, state = rule.step(*arguments)
        born.extend(weakref.ref(t) for t in [*params.values(), *leaves(state)])
        return params, state

    ahead = apo.lookahead(rule._replace(step=step), *at, rule.hypers)
    ahead.pullback(at.grads)
    assert any(ref() is not None for ref in born)
    gc.disable()
    try:
        del ahead
        assert all(ref() is None for ref in born)
    finally:
        gc.enable()


@every_rule
def test_state_and_results_share_no_memory_with_a_tape(case: RuleCase) -> None:
    """New parameters can be changed in place, as a training loop does, without touching what they came from."""
    rule = case.rule()
    at = moment(rule, quadratic(), 2)
    before = {key: p.clone() for key, p in at.params.items()}
    ahead = apo.lookahead(rule, *at, rule.hypers)
    once = leaves(ahead.pullback(at.grads))
    for p in ahead.params.values():
        p.add_(1.0)
    for old, kept in zip(at.params.values(), before.values(), strict=True):
        assert torch.equal(old, kept)
    assert leaves(ahead.pullback(at.grads)) == once
