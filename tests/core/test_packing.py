"""Small tensors that are packed are stepped as they would be one by one, and so is every derivative."""

from typing import Any

import pytest
import torch
from torch import Tensor

import apo
from apo import packing
from apo.packing import packs
from apo.types import Params
from tests.cases import RULES, RuleCase, granular, names

SHAPES = [(3, 4), (5,), (2, 2, 2), (1,), (), (200, 100), (0,), (7,)]
PACKED = [case for case in RULES if case.make in (apo.sgd, apo.rmsprop, apo.adam, apo.adamw)]
every_rule = pytest.mark.parametrize("case", PACKED, ids=names(PACKED))


def drawn(dtype: torch.dtype, seed: int) -> Params:
    """Tensors of many shapes, one of them too large to be packed, one transposed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return {str(place): tensor.t() if tensor.ndim == 2 else tensor for place, tensor in enumerate(tensors)}


def trained(rule: apo.Rule, params: Params, hypers: Any, dtype: torch.dtype) -> list[Any]:
    """Parameters and state after four steps, of which some parameters miss the second; and the last pullback."""
    state = rule.init(params)
    for step in range(4):
        grads = drawn(dtype, 10 + step)
        if step == 1:
            del grads["1"], grads["2"]
        ahead = apo.lookahead(rule, params, grads, state, hypers)
        params, state = ahead.params, ahead.state
    return [params, state, ahead.pullback(drawn(dtype, 20))]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SMALL", {"cpu": -1})


@every_rule
@pytest.mark.parametrize("granularity", ["global", "parameter"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("judged", ["step", "no-momentum"])
def test_packed_steps_are_those_taken_one_by_one(
    case: RuleCase, granularity: str, dtype: torch.dtype, judged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = drawn(dtype, 0)
    rule = case.rule()
    if judged == "no-momentum":
        rule = apo.proximal.momentum_free(rule)
    hypers = granular(granularity, rule, params)
    packed = trained(rule, params, hypers, dtype)
    one_by_one(monkeypatch)
    apart = trained(rule, params, hypers, dtype)
    eps = torch.finfo(dtype).eps
    for place, (own, other) in enumerate(zip(packed, apart, strict=True)):
        pairs = [(own, other)] if place == 0 else [(leaves_by_name(own), leaves_by_name(other))]
        for one, two in pairs:
            assert one.keys() == two.keys()
            for key, tensor in one.items():
                assert tensor.shape == two[key].shape and tensor.dtype == two[key].dtype, key
                torch.testing.assert_close(tensor, two[key], rtol=50 * eps, atol=50 * eps)


def leaves_by_name(tree: Any) -> Params:
    """The tensors of a state or of hypers, by field and parameter."""
    return {
        f"{field} {key}": tensor
        for field, entry in tree._asdict().items()
        for key, tensor in (entry.items() if isinstance(entry, dict) else [("", entry)])
    }


@every_rule
def test_one_call_steps_all_small_tensors_of_one_age(case: RuleCase) -> None:
    rule, params = case.rule(), drawn(torch.float32, 0)
    state = rule.init(params)
    grads = drawn(torch.float32, 1)
    small = [str(place) for place in (0, 1, 2, 3, 6, 7)]
    assert sorted(packs(params, grads, state)) == sorted([small, ["4"], ["5"]])
    _, state = rule.step(params, {"1": grads["1"]}, state, rule.hypers)
    if any(field["0"].ndim == 0 for field in state if "0" in field):  # it counts its steps
        assert sorted(packs(params, grads, state)) == [["0", "2", "3", "6", "7"], ["1"], ["4"], ["5"]]
    half = {key: tensor.bfloat16() if key in "27" else tensor for key, tensor in params.items()}
    assert sorted(packs(half, grads, rule.init(half))) == [["0", "1", "3", "6"], ["2", "7"], ["4"], ["5"]]


@every_rule
def test_what_is_packed_can_be_changed_apart(case: RuleCase) -> None:
    """As a checkpoint does that is loaded in place, or a user who resets one tensor's state."""
    rule, params = case.rule(), drawn(torch.float32, 0)
    params, state = rule.step(params, drawn(torch.float32, 1), rule.init(params), rule.hypers)
    for tree in (params, *(field for field in state if isinstance(field, dict))):
        others = {key: tensor.clone() for key, tensor in tree.items() if key != "0"}
        if "0" in tree:
            tree["0"].zero_() if tree["0"].dtype == torch.bool else tree["0"].add_(1.0)
        assert all(torch.equal(tree[key], other) for key, other in others.items())


def test_only_rules_that_say_so_are_packed() -> None:
    """A rule may look at a whole tensor: its norm is not that of all of them together."""
    seen = []

    def update(param: Tensor, grad: Tensor, state: Any, hypers: Any) -> tuple[Tensor, Any]:
        seen.append(tuple(grad.shape))
        return param - hypers.lr * grad / grad.norm(), state

    adam = apo.sgd()
    rule = apo.elementwise(adam.init.args[0], update, adam.hypers, adam.domains)  # type: ignore[attr-defined]
    params = drawn(torch.float32, 0)
    rule.step(params, params, rule.init(params), rule.hypers)
    assert seen == [tuple(tensor.shape) for tensor in params.values()]


def test_a_compiled_step_is_not_packed() -> None:
    rule, params = apo.adam(), {key: value for key, value in drawn(torch.float32, 0).items() if key in "0123"}
    state = rule.init(params)
    compiled = torch.compile(rule.step, backend="eager", fullgraph=True)
    for step in range(3):
        grads = {key: value for key, value in drawn(torch.float32, 1 + step).items() if key in params}
        plain, after = rule.step(params, grads, state, rule.hypers)
        params, state = compiled(params, grads, state, rule.hypers)
        for key in params:
            torch.testing.assert_close(params[key], plain[key])
        assert all(torch.equal(state.step[key], after.step[key]) for key in params)
