"""Clipping as a transform of gradients, and chains of transforms in front of a rule."""

import pickle
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import apo
from apo.types import Params
from tests.cases import RULES, RuleCase, bits, mlp, moment, names, randn, tensors

Per = Literal["parameter", "global"]
every_per = pytest.mark.parametrize("per", ["parameter", "global"])
every_rule = pytest.mark.parametrize("case", RULES, ids=names(RULES))


def gradients(dtype: torch.dtype = torch.float64) -> Params:
    """Of norms from 0.01 to 20, and zero; none of them 1."""
    shapes = {"small": (0.005, (2, 2)), "middle": (1.0, (5,)), "large": (4.0, (4, 3, 2)), "scalar": (1.0, ())}
    found = {key: (scale * randn(*shape, seed=i)).to(dtype) for i, (key, (scale, shape)) in enumerate(shapes.items())}
    return {**found, "zero": torch.zeros(3, dtype=dtype), "empty": torch.zeros(0, 2, dtype=dtype)}


def by_torch(grads: Params, limit: float, per: Per) -> Params:
    """Clipped by torch, per parameter or together."""
    held = {key: torch.zeros_like(g).requires_grad_() for key, g in grads.items()}
    for key, p in held.items():
        p.grad = grads[key].clone()
    for group in [[p] for p in held.values()] if per == "parameter" else [list(held.values())]:
        torch.nn.utils.clip_grad_norm_(group, limit)
    return {key: p.grad for key, p in held.items() if p.grad is not None}


def norm_of(grads: Params) -> float:
    return torch.cat([g.double().reshape(-1) for g in grads.values()]).norm().item()


@every_per
@pytest.mark.parametrize("limit", [1e-3, 1.0, 10.0, 100.0])
def test_clips_as_torch_does(limit: float, per: Per) -> None:
    """But for the 1e-6 that torch adds to a norm that it divides by."""
    grads = gradients()
    clipped, expected = apo.clip_by_norm(limit, per=per)(grads), by_torch(grads, limit, per)
    assert list(clipped) == list(grads)
    for key, g in clipped.items():
        norm = grads[key].norm().item() if per == "parameter" else norm_of(grads)
        added = (norm + 1e-6) / norm if norm > limit else 1.0
        torch.testing.assert_close(g, expected[key] * added, rtol=1e-14, atol=0.0)
        assert (grads[key].norm() if per == "parameter" else norm_of(grads)) <= limit or g.norm() <= limit * (1 + 1e-15)


@every_per
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_short_passes_bit_for_bit(dtype: torch.dtype, per: Per) -> None:
    grads = gradients(dtype)
    info = torch.finfo(dtype)
    grads["signed"] = torch.tensor([-0.0, 0.0, info.tiny, -info.smallest_normal / 4], dtype=dtype)
    for limit in (1.001 * norm_of(grads), 1e3):
        clipped = apo.clip_by_norm(limit, per=per)(grads)
        assert {key: (g.dtype, bits(g)) for key, g in clipped.items()} == {
            key: (g.dtype, bits(g)) for key, g in grads.items()
        }
    grads = {"w": torch.tensor([3.0, -4.0], dtype=dtype)}
    assert bits(apo.clip_by_norm(5.0, per=per)(grads)["w"]) == bits(grads["w"])


@every_per
def test_does_not_overflow_in_half_precision(per: Per) -> None:
    """Squares of 300 are beyond float16."""
    clipped = apo.clip_by_norm(1.0, per=per)({"w": torch.full((4,), 300.0, dtype=torch.float16)})["w"]
    assert clipped.dtype == torch.float16
    assert clipped.tolist() == [0.5] * 4


@every_per
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_goes_as_in_torch(value: float, per: Per) -> None:
    grads = {"good": randn(3, seed=1), "bad": torch.tensor([1.0, value, 2.0], dtype=torch.float64)}
    clipped, expected = apo.clip_by_norm(0.1, per=per)(grads), by_torch(grads, 0.1, per)
    for key in grads:
        torch.testing.assert_close(clipped[key], expected[key], rtol=1e-5, atol=0.0, equal_nan=True)
    assert clipped["bad"].isnan()[1]


@every_per
def test_zero_stays_zero_with_a_finite_derivative(per: Per) -> None:
    clip = apo.clip_by_norm(1.0, per=per)
    assert bits(clip({"w": torch.zeros(3)})["w"]) == bits(torch.zeros(3))
    assert clip({}) == {}
    slopes = grad(lambda g: clip({"w": g})["w"].sum())(torch.zeros(3))
    assert slopes.tolist() == [1.0] * 3


@every_per
def test_is_pure_picklable_and_differentiable(per: Per) -> None:
    grads, clip = gradients(), apo.clip_by_norm(0.7, per=per)
    before = [bits(g) for g in grads.values()]
    once, again = clip(grads), pickle.loads(pickle.dumps(clip))(grads)
    assert [bits(g) for g in grads.values()] == before
    assert [bits(g) for g in once.values()] == [bits(g) for g in again.values()]
    keys = ("small", "large", "scalar")
    inputs = [grads[key].clone().requires_grad_() for key in keys]

    def clipped(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(clip(dict(zip(keys, values, strict=True))).values())

    assert torch.autograd.gradcheck(clipped, inputs)
    batch = {key: torch.stack([grads[key], 3.0 * grads[key]]) for key in keys}
    for key, g in vmap(clip)(batch).items():
        torch.testing.assert_close(g[1], clip({k: b[1] for k, b in batch.items()})[key], rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_norm_outside_its_set(max_norm: float) -> None:
    with pytest.raises(ValueError, match=rf"^max_norm={re.escape(repr(max_norm))} is not in \(0, ∞\)$"):
        apo.clip_by_norm(max_norm)


def test_refuses_what_is_no_norm_and_no_kind() -> None:
    with pytest.raises(TypeError, match=r"^max_norm must be a float, not '1' of type str$"):
        apo.clip_by_norm("1")
    with pytest.raises(ValueError, match=r"^per='layer' is not one of 'parameter', 'global'$"):
        apo.clip_by_norm(1.0, per="layer")


def doubled(grads: Params) -> Params:
    return {key: 2.0 * g for key, g in grads.items()}


def cubed(grads: Params) -> Params:
    return {key: g**3 for key, g in grads.items()}


def without_last(grads: Params) -> Params:
    return dict(list(grads.items())[:-1])


@every_rule
def test_a_chain_is_the_rule_on_transformed_gradients(case: RuleCase) -> None:
    """First to last, in both steps; everything else is the rule's own."""
    rule, problem = case.rule(), mlp()
    at = moment(rule, problem, 3)
    chained = apo.chain(doubled, cubed, apo.clip_by_norm(0.3, per="global"), rule)
    assert chained._replace(step=rule.step, without_momentum=rule.without_momentum) == rule
    seen = apo.clip_by_norm(0.3, per="global")(cubed(doubled(at.grads)))
    found, expected = chained.step(*at, rule.hypers), rule.step(at.params, seen, at.state, rule.hypers)
    assert [bits(t) for t in tensors(*found)] == [bits(t) for t in tensors(*expected)]
    assert (chained.without_momentum is None) == (rule.without_momentum is None)
    if rule.without_momentum is not None and chained.without_momentum is not None:
        free = chained.without_momentum(*at, rule.hypers)
        for key, p in rule.without_momentum(at.params, seen, at.state, rule.hypers).items():
            assert bits(free[key]) == bits(p)


def test_chains_nest_and_may_be_empty() -> None:
    rule = apo.sgd(lr=1.0)
    params, grads = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, -1.0])}
    for chained, factor in (
        (apo.chain(rule), 1.0),
        (apo.chain(doubled, cubed, rule), 8.0),
        (apo.chain(doubled, apo.chain(cubed, rule)), 8.0),
        (apo.chain(cubed, doubled, rule), 2.0),
    ):
        new, _ = chained.step(params, grads, chained.init(params), chained.hypers)
        assert torch.equal(new["w"], -factor * grads["w"])


def test_a_gradient_that_is_left_out_counts_as_missing() -> None:
    rule = apo.chain(without_last, apo.adam())
    params = {"first": torch.ones(2), "last": torch.ones(2)}
    new, state = rule.step(params, params, rule.init(params), rule.hypers)
    assert torch.equal(new["last"], params["last"])
    assert not torch.equal(new["first"], params["first"])
    assert state.step["last"] == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: apo.chain(), r"^chain\(\.\.\., None\) must end in a rule"),
        (lambda: apo.chain(apo.sgd(), doubled), r"must end in a rule, such as apo.sgd\(\)$"),
        (lambda: apo.chain(apo.sgd(), apo.sgd()), "must be functions of gradients, and one rule at the end$"),
        (lambda: apo.chain(0.5, apo.sgd()), r"^chain\(0\.5, \.\.\.\) must be functions"),
        (lambda: apo.chain(dict, apo.sgd()), "must be functions"),
    ],
)
def test_refuses_what_is_no_chain(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("free", [False, True], ids=["step", "momentum-free"])
@every_per
def test_the_hypergradient_of_a_chain_equals_central_differences(per: Per, free: bool) -> None:
    problem = mlp()
    rule = apo.chain(apo.clip_by_norm(0.05, per=per), apo.apollo(lr=0.3, eps=1e-2, weight_decay=0.1, sigma=0.01))
    judged = apo.momentum_free(rule) if free else rule
    at = moment(rule, problem, 4)
    objective = apo.Proximal(fsd=0.3, wsd=0.2).at(at.params, problem.loss, problem.outputs)
    _, found = apo.hypergradient(judged, objective, *at, rule.hypers)
    for name in ("lr", "eps", "weight_decay"):
        value, width = getattr(rule.hypers, name), 1e-5 * getattr(rule.hypers, name)
        ends = [objective(judged.step(*at, rule.hypers._replace(**{name: value + s * width}))[0]) for s in (1, -1)]
        assert getattr(found, name) != 0.0
        torch.testing.assert_close(getattr(found, name), (ends[0] - ends[1]) / (2.0 * width), rtol=1e-6, atol=1e-9)
