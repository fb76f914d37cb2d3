"""Factories of rules: what they return, and what they refuse, saying the value and the set."""

import inspect
import math
import re
from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import apo
from tests.cases import RULES, RuleCase, names, randn

every_rule = pytest.mark.parametrize("case", RULES, ids=names(RULES))

FACTORIES = list({case.make.__name__: case.make for case in RULES}.values())
BELOW_ONE = ("momentum", "dampening", "alpha", "beta", "beta1", "beta2")
NUMBERS = [(make, name) for make in FACTORIES for name in make().hypers._fields]
every_number = pytest.mark.parametrize(("make", "name"), NUMBERS, ids=[f"{m.__name__}-{n}" for m, n in NUMBERS])


@every_rule
def test_hypers_are_the_options(case: RuleCase) -> None:
    rule = case.rule()
    defaults = {name: p.default for name, p in inspect.signature(case.make).parameters.items()}
    for name, tensor in rule.hypers._asdict().items():
        assert tensor.item() == {**defaults, **case.options}[name]
        assert (tensor.dtype, tensor.shape) == (torch.float64, ())
    assert set(rule.domains) == set(rule.hypers._fields)
    assert all(rule.domains[name].contains(0.5) for name in rule.domains)
    assert {name for name, domain in rule.domains.items() if not domain.one_step} <= set(BELOW_ONE)


@every_number
@pytest.mark.parametrize("value", [-1e-3, -1, math.nan, math.inf, -math.inf])
def test_refuses_a_number_outside_its_set(make: Any, name: str, value: float) -> None:
    upper = "1" if name in BELOW_ONE else "∞"
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} is not in \[0, {upper}\)$"):
        make(**{name: value})


@pytest.mark.parametrize("value", [1.0, 1, 1.5])
@every_number
def test_averaging_coefficients_stay_below_one(make: Any, name: str, value: float) -> None:
    if name in BELOW_ONE:
        with pytest.raises(ValueError, match=rf"^{name}={value!r} is not in \[0, 1\)$"):
            make(**{name: value})
    else:
        assert getattr(make(**{name: value}).hypers, name) == value


@every_number
@pytest.mark.parametrize(
    "value", ["0.1", None, True, [0.1], torch.tensor(0.1)], ids=["str", "None", "bool", "list", "tensor"]
)
def test_refuses_what_is_no_number(make: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a float, not .* of type {type(value).__name__}$"):
        make(**{name: value})


@pytest.mark.parametrize("make", FACTORIES)
def test_refuses_an_unknown_option(make: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        make(learning_rate=0.1)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_undamped_momentum(options: dict[str, float]) -> None:
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    message = f"nesterov needs momentum > 0 and dampening = 0, not {momentum=} and {dampening=}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        apo.sgd(nesterov=True, **options)


@pytest.mark.parametrize("make", FACTORIES)
@given(data=st.data())
def test_any_legal_options_make_a_finite_step(make: Any, data: st.DataObject) -> None:
    """Zero is legal for every number, eps too; gradients may vanish; steps and derivatives stay finite."""
    numbers = st.just(0.0) | st.floats(0.0, 1.0, exclude_max=True, allow_subnormal=False)
    options = {name: data.draw(numbers, label=name) for name in make().hypers._fields}
    rule = make(**options)
    params, grads = {"w": randn(4, seed=1)}, {"w": torch.tensor([0.0, 1e-9, 0.1, -2.0], dtype=torch.float64)}
    state = rule.init(params)
    for _ in range(2):
        params, state, pullback = apo.lookahead(rule, params, grads, state, rule.hypers)
        assert bool(params["w"].isfinite().all())
        assert all(bool(slope.isfinite()) for slope in pullback({"w": randn(4, seed=3)}))


@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_what_is_zero_at_the_factory_stays_out_of_the_step(name: str) -> None:
    """Momentum and decay of 0 cost nothing, and so cannot be turned on later: their derivative is 0."""
    rule = apo.sgd(lr=0.1)
    params, grads = {"w": randn(4, seed=1)}, {"w": randn(4, seed=2)}
    turned_on = rule.hypers._replace(**{name: torch.tensor(0.5, dtype=torch.float64)})
    for hypers in (rule.hypers, turned_on):
        ahead = apo.lookahead(rule, params, grads, rule.init(params), hypers)
        assert torch.equal(ahead.params["w"], params["w"] - 0.1 * grads["w"])
        assert getattr(ahead.pullback(grads), name) == 0.0


def made_by_hand(hypers: Any, fields: str = "lr", state: Any = None, update: Any = None) -> Any:
    Remembered = namedtuple("Remembered", [])
    domains = dict.fromkeys(fields.split(), apo.domains.POSITIVE)
    rule = apo.elementwise(
        lambda param: Remembered() if state is None else state,
        update or (lambda p, g, s, h: (p - h.lr * g, s)),
        hypers,
        domains,
    )
    return rule, rule.init({"w": torch.zeros(2)})


def test_a_rule_of_ones_own_is_of_named_tuples_and_has_all_domains() -> None:
    Hypers = namedtuple("Hypers", ["lr"])
    lr = torch.tensor(0.1, dtype=torch.float64)
    assert made_by_hand(Hypers(lr))[1] == ()
    for wrong in (Hypers(0.1), {"lr": lr}, Hypers(lr[None]), Hypers(torch.tensor(1)), None):
        with pytest.raises(TypeError, match=r"^hypers=.* must be a NamedTuple of 0-d tensors, as"):
            made_by_hand(wrong)
    for fields in ("", "lr eps", "rate"):
        with pytest.raises(ValueError, match=r"must have the fields of hypers: lr$"):
            made_by_hand(Hypers(lr), fields)
    for state in ({"m": lr}, (), [lr], lr):
        with pytest.raises(TypeError, match=r"^init returned .* and not a NamedTuple"):
            made_by_hand(Hypers(lr), state=state)


@pytest.mark.parametrize(
    "update",
    [
        lambda p, g, s, h: (p.sub_(h.lr.detach() * g), s),
        lambda p, g, s, h: (p - h.lr * g.add_(p), s),
        lambda p, g, s, h: (p - h.lr * s.m.mul_(0.9).add_(g), s),
    ],
    ids=["params", "grads", "state"],
)
def test_a_rule_of_ones_own_that_works_in_place_is_refused(update: Any) -> None:
    Hypers, State = namedtuple("Hypers", ["lr"]), namedtuple("State", ["m"])
    hypers = Hypers(torch.tensor(0.1, dtype=torch.float64))
    rule, state = made_by_hand(hypers, state=State(torch.zeros(2)), update=update)
    point = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"^the rule changed params, grads or state in place"):
        apo.lookahead(rule, point, {"w": torch.ones(2)}, state, hypers)
