"""What every rule promises: pure, keeps types and structure, leaves what has no gradient, finite at zero."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import apo
from apo.trees import leaves, rebuild
from apo.types import Params
from tests.cases import DEVICES, DTYPES, RULES, RuleCase, bits, granular, moment, names, quadratic, tensors

every_rule = pytest.mark.parametrize("case", RULES, ids=names(RULES))
every_granularity = pytest.mark.parametrize("granularity", ["global", "parameter"])


@every_granularity
@every_rule
def test_is_pure(case: RuleCase, granularity: str) -> None:
    """The step, the lookahead and the momentum-free step change no input, bit for bit, and repeat exactly."""
    rule = case.rule()
    at = moment(rule, quadratic(), 2)
    hypers = granular(granularity, rule, at.params)
    inputs = tensors(*at, hypers)
    before, versions = copy.deepcopy(inputs), [t._version for t in inputs]
    first = rule.step(*at, hypers)
    ahead = apo.lookahead(rule, *at, hypers)
    ahead.pullback(at.grads)
    if rule.without_momentum is not None:
        rule.without_momentum(*at, hypers)
    second = rule.step(*at, hypers)
    assert [bits(t) for t in inputs] == [bits(t) for t in before]
    assert [t._version for t in inputs] == versions
    assert all(t.grad is None and not t.requires_grad for t in inputs)
    for again in (second, (ahead.params, ahead.state)):
        assert [bits(t) for t in tensors(*first)] == [bits(t) for t in tensors(*again)]


@every_rule
def test_leaves_no_graph(case: RuleCase) -> None:
    """What comes out has no graph, even where everything that goes in has one."""
    rule = case.rule()
    at = moment(rule, quadratic(), 2)
    params, grads = ({key: t.clone().requires_grad_() * 1.0 for key, t in d.items()} for d in at[:2])
    state = rebuild(
        at.state, [t.clone().requires_grad_() * 1.0 if t.is_floating_point() else t for t in tensors(at.state)]
    )
    hypers = rebuild(rule.hypers, [h.clone().requires_grad_() * 1.0 for h in rule.hypers])
    ahead = apo.lookahead(rule, params, grads, state, hypers)
    value, slopes = apo.hypergradient(rule, quadratic().loss, params, grads, state, hypers)
    for t in tensors(ahead.params, ahead.state, [value], slopes, ahead.pullback(at.grads)):
        assert not t.requires_grad
        assert t.grad_fn is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_granularity
@every_rule
def test_keeps_dtype_device_structure_and_types(
    case: RuleCase, granularity: str, dtype: torch.dtype, device: str
) -> None:
    rule = case.rule()
    params = {key: p.to(device, dtype) for key, p in quadratic().params.items()}
    params["empty"] = torch.zeros(0, 3, device=device, dtype=dtype)
    grads = {key: 0.1 * torch.ones_like(p) for key, p in params.items()}
    hypers, state = granular(granularity, rule, params), rule.init(params)
    assert all(h.dtype == torch.float64 and h.ndim == 0 and h.device.type == "cpu" for h in rule.hypers)
    seen = [state]
    for _ in range(2):
        new_params, new_state = rule.step(params, grads, seen[-1], hypers)
        seen.append(new_state)
        outcomes = [new_params]
        if rule.without_momentum is not None:
            outcomes.append(rule.without_momentum(params, grads, state, hypers))
        for outcome in outcomes:
            assert list(outcome) == list(params)
            for key, p in params.items():
                new = outcome[key]
                assert (new.dtype, new.device, new.shape) == (p.dtype, p.device, p.shape)
                assert bool((new != p).all()) or dtype.itemsize == 2  # where a small step can round to none
    for other in seen:
        assert type(other) is type(state)
        for field, first in zip(other, state, strict=True):
            assert isinstance(field, dict)
            assert set(field) <= params.keys()
            for key, value in field.items():
                assert (value.dtype, value.shape, value.device) == (
                    first[key].dtype,
                    first[key].shape,
                    first[key].device,
                )
                if value.is_floating_point():
                    assert torch.finfo(value.dtype).bits >= max(32, torch.finfo(dtype).bits)
    _, slopes = apo.hypergradient(
        rule, lambda p: torch.stack([t.float().sum() for t in p.values()]).sum(), params, grads, state, hypers
    )
    assert type(slopes) is type(hypers)
    for slope, h in zip(leaves(slopes), leaves(hypers), strict=True):
        assert (slope.dtype, slope.shape, slope.device.type) == (torch.float64, h.shape, "cpu")
        assert bool(slope.isfinite())


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@every_rule
def test_mixes_devices_as_an_accelerator_allows(case: RuleCase, dtype: torch.dtype) -> None:
    """Parameters and state on a GPU, hyperparameters on the CPU; fake tensors check the devices without one."""
    rule = case.rule()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        params = {key: torch.empty_like(p, dtype=dtype, device="cuda") for key, p in quadratic().params.items()}
        state = rule.init(params)
        new_params, new_state = rule.step(params, params, state, rule.hypers)
        outcomes = [new_params, apo.momentum_free(rule).step(params, params, state, rule.hypers)[0]]
    for outcome in outcomes:
        assert all((p.device.type, p.dtype) == ("cuda", dtype) for p in outcome.values())
    for before, after in zip(leaves(state), leaves(new_state), strict=True):
        assert (before.device, before.dtype, before.shape) == (after.device, after.dtype, after.shape)
        assert after.ndim == 0 or after.device.type == "cuda"


def rest(tensors: Params) -> Params:
    """All but one."""
    return {key: tensor for key, tensor in tensors.items() if key != "matrix.weight"}


@every_rule
def test_missing_gradients_leave_parameter_and_state(case: RuleCase) -> None:
    rule = case.rule()
    at = moment(rule, quadratic(), 2)
    present = rest(at.grads)
    whole_params, whole_state = rule.step(*at, rule.hypers)
    some_params, some_state = rule.step(at.params, present, at.state, rule.hypers)
    none_params, none_state = rule.step(at.params, {}, at.state, rule.hypers)
    assert bits(some_params["matrix.weight"]) == bits(at.params["matrix.weight"])
    assert [bits(t) for t in tensors(none_params, none_state)] == [bits(t) for t in tensors(at.params, at.state)]
    for before, some, whole in zip(at.state, some_state, whole_state, strict=True):
        assert list(some) == list(before)
        for key in some:
            assert bits(some[key]) == bits(before[key] if key == "matrix.weight" else whole[key])
    if case.coupled:  # then the others step as if it were not there, which is not as if it had a gradient
        whole_params, _ = rule.step(rest(at.params), present, type(at.state)(*map(rest, at.state)), rule.hypers)
    for key in present:
        assert bits(some_params[key]) == bits(whole_params[key])
    if rule.without_momentum is not None:
        free = rule.without_momentum(at.params, present, at.state, rule.hypers)
        assert bits(free["matrix.weight"]) == bits(at.params["matrix.weight"])


@every_rule
def test_takes_no_parameters(case: RuleCase) -> None:
    rule = case.rule()
    state = rule.init({})
    params, new_state = rule.step({}, {}, state, rule.hypers)
    assert params == {}
    assert type(new_state) is type(state)
    assert leaves(new_state) == []
    slopes = apo.lookahead(rule, {}, {}, state, rule.hypers).pullback({})
    assert type(slopes) is type(rule.hypers)
    assert all(slope == 0.0 for slope in slopes)


@every_rule
def test_momentum_free_step(case: RuleCase) -> None:
    """It keeps the state, and is the rule itself where there is no momentum."""
    rule = case.rule()
    free = apo.momentum_free(rule)
    at = moment(rule, quadratic(), 2)
    new, state = free.step(*at, rule.hypers)
    if rule.without_momentum is None:
        assert free is rule
        return
    assert state is at.state
    # With the coefficients of the averaged gradient at zero the step itself has no momentum either.
    averaging = {"momentum", "dampening", "beta", "beta1"} & set(rule.hypers._fields)
    still = rule.hypers._replace(**dict.fromkeys(averaging, torch.zeros(()).double()))
    expected, _ = rule.step(*at, still)
    # Apollo and Quasi-Adam's "switch" take the curvature from the averages in both steps, so that both depend on β.
    if "beta" in averaging or case.options.get("variant") == "switch":
        new, _ = free.step(*at, still)
    for key in new:
        torch.testing.assert_close(new[key], expected[key], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_rule
def test_is_finite_at_zero(case: RuleCase, dtype: torch.dtype) -> None:
    """Zero gradients and zero state: the step is the decay alone, and every derivative in hypers is finite."""
    rule = case.rule()
    params = {"w": torch.ones(3, dtype=dtype), "s": torch.ones((), dtype=dtype)}
    grads = {key: torch.zeros_like(p) for key, p in params.items()}
    state = rule.init(params)
    for judged in (rule, apo.momentum_free(rule)):
        for _ in range(2):
            ahead = apo.lookahead(judged, params, grads, state, rule.hypers)
            slopes = leaves(ahead.pullback({key: torch.ones_like(p) for key, p in params.items()}))
            assert all(bool(slope.isfinite()) for slope in slopes)
            assert all(bool(t.isfinite().all()) for t in tensors(ahead.params, ahead.state))
            if getattr(rule.hypers, "weight_decay", 0.0) == 0.0:
                assert all(bool((p == 1.0).all()) for p in ahead.params.values())
            state = ahead.state


@pytest.mark.parametrize("fraction", [1e-30, 1e-20, 1e-10])
@every_rule
def test_is_finite_near_zero(case: RuleCase, fraction: float) -> None:
    """Gradients whose squares underflow in float32, beside others that do not."""
    rule = case.rule()
    params = {"w": torch.ones(3)}
    grads = {"w": torch.tensor([0.0, fraction, 1.0])}
    ahead = apo.lookahead(rule, params, grads, rule.init(params), rule.hypers)
    assert all(bool(slope.isfinite()) for slope in leaves(ahead.pullback({"w": torch.ones(3)})))
    assert bool(ahead.params["w"].isfinite().all())


@every_rule
def test_pickles_and_copies(case: RuleCase) -> None:
    """A rule and its state go to a file or another process, and step on from there as they would have."""
    rule = case.rule()
    at = moment(rule, quadratic(), 2)
    expected = tensors(*rule.step(*at, rule.hypers))
    for other, there in (pickle.loads(pickle.dumps((rule, at))), copy.deepcopy((rule, at))):
        assert [bits(t) for t in tensors(*other.step(*there, other.hypers))] == [bits(t) for t in expected]
        assert all(
            other.domains[name].contains(0.5) and not domain.contains(-1.0) for name, domain in rule.domains.items()
        )
