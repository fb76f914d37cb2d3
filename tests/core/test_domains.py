"""Bijections onto the domains of hyperparameters, and the check of a number given for one."""

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apo.domains import AVERAGING, POSITIVE, UNIT_INTERVAL, derivative, hyper, shift
from apo.types import Domain
from tests.cases import DOMAINS

every_domain = pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)

EDGES = {
    POSITIVE.name: (sys.float_info.min, sys.float_info.max),
    UNIT_INTERVAL.name: (sys.float_info.min, 1.0 - sys.float_info.epsilon),
}


def inside(domain: Domain) -> st.SearchStrategy[float]:
    """Numbers of a domain, up to its very edges."""
    low, high = EDGES[domain.name]
    numbers = st.floats(low, high, allow_subnormal=False)
    return numbers | st.floats(math.log(low), math.log(high)).map(math.exp).filter(lambda x: low <= x <= high)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@every_domain
@given(data=st.data())
def test_round_trip_from_the_domain(domain: Domain, data: st.DataObject) -> None:
    value = data.draw(inside(domain))
    assert domain.contains(value)
    free = domain.unconstrain(scalar(value))
    assert free.isfinite()
    # Rounding the free coordinate moves the value by its own size times that coordinate's.
    assert domain.constrain(free).item() == pytest.approx(value, rel=1e-15 * (4.0 + abs(free.item())))


@every_domain
@given(free=st.floats(-30.0, 30.0))
def test_round_trip_from_the_reals(domain: Domain, free: float) -> None:
    value = domain.constrain(scalar(free)).item()
    assert domain.contains(value)
    # Near 1 the logit sees the spacing of doubles: a relative error of 1e-16 / (1 − value).
    room = 1.0 if domain is POSITIVE else 1.0 - value
    assert domain.unconstrain(scalar(value)).item() == pytest.approx(free, rel=1e-14, abs=1e-14 / room)


@every_domain
@given(pair=st.tuples(st.floats(-30.0, 30.0), st.floats(1e-3, 5.0)))
def test_constrain_rises(domain: Domain, pair: tuple[float, float]) -> None:
    low, gap = pair
    assert domain.constrain(scalar(low)) <= domain.constrain(scalar(low + gap))


@every_domain
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.inf, -math.inf, math.nan])
def test_does_not_contain(domain: Domain, value: float) -> None:
    assert not domain.contains(value)
    with pytest.raises(ValueError, match=rf"{value} is not in \(0, .\), so it cannot be adapted"):
        shift(domain, value, 0.1)


def test_the_unit_interval_ends_at_one() -> None:
    assert not UNIT_INTERVAL.contains(1.0)
    assert POSITIVE.contains(1.0)


def test_one_step_objectives_judge_all_but_averaging() -> None:
    assert POSITIVE.one_step
    assert UNIT_INTERVAL.one_step
    assert not AVERAGING.one_step


@every_domain
@given(data=st.data())
def test_shift_by_zero_is_exact(domain: Domain, data: st.DataObject) -> None:
    value = data.draw(inside(domain))
    assert shift(domain, value, 0.0) == value


@every_domain
@given(value=st.floats(0.01, 0.99), offset=st.floats(-3.0, 3.0))
def test_shift_moves_the_free_coordinate(domain: Domain, value: float, offset: float) -> None:
    moved = shift(domain, value, offset)
    slope = derivative(domain, moved)
    assert domain.contains(moved)
    free = domain.unconstrain(scalar(moved)) - domain.unconstrain(scalar(value))
    assert free.item() == pytest.approx(offset, rel=1e-12, abs=1e-12)
    h = 1e-5
    difference = (shift(domain, value, offset + h) - shift(domain, value, offset - h)) / (2.0 * h)
    assert slope == pytest.approx(difference, rel=1e-8)
    # Closed forms: dφ/du = φ for exp, φ(1 − φ) for the logistic function.
    assert slope == pytest.approx(moved if domain is POSITIVE else moved * (1.0 - moved), rel=1e-12)


@every_domain
@given(value=st.floats(0.01, 0.99), first=st.floats(-2.0, 2.0), second=st.floats(-2.0, 2.0))
def test_shifts_add_up(domain: Domain, value: float, first: float, second: float) -> None:
    twice = shift(domain, shift(domain, value, first), second)
    assert twice == pytest.approx(shift(domain, value, first + second), rel=1e-12)


def test_shift_leaves_no_graph_and_works_without_gradients() -> None:
    with torch.no_grad():
        assert shift(POSITIVE, 2.0, math.log(3.0)) == pytest.approx(6.0)
        assert derivative(POSITIVE, 6.0) == pytest.approx(6.0)


@given(value=st.floats(0.0, allow_infinity=False) | st.integers(0, 10**300))
def test_hyper_keeps_a_number(value: float) -> None:
    tensor = hyper("lr", value)
    assert tensor.item() == float(value)
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.float64, (), "cpu")
    assert not tensor.requires_grad


@pytest.mark.parametrize("value", [True, False, None, "0.1", b"1", [0.1], 1j, object(), torch.tensor(0.1)])
def test_hyper_refuses_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^lr must be a float, not .* of type {type(value).__name__}$"):
        hyper("lr", value)


@pytest.mark.parametrize(
    ("value", "options", "allowed"),
    [
        (math.nan, {}, r"\[0, ∞\)"),
        (math.inf, {}, r"\[0, ∞\)"),
        (-math.inf, {}, r"\[0, ∞\)"),
        (-1e-30, {}, r"\[0, ∞\)"),
        (-1, {}, r"\[0, ∞\)"),
        (1.0, {"below": 1.0}, r"\[0, 1\)"),
        (1.5, {"below": 1.5}, r"\[0, 1.5\)"),
    ],
)
def test_hyper_refuses_what_is_outside(value: float, options: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^beta={value!r} is not in {allowed}$"):
        hyper("beta", value, **options)


@given(value=st.floats() | st.integers(-5, 5))
def test_hyper_returns_what_is_in_the_set_or_raises(value: float) -> None:
    try:
        tensor = hyper("beta1", value, below=1.0)
    except ValueError as error:
        assert not 0.0 <= value < 1.0
        assert str(error) == f"beta1={value!r} is not in [0, 1)"
    else:
        assert 0.0 <= tensor.item() < 1.0
