"""Steps in place, and of plain numbers, are those of the pure rule; what kernels would get wrong is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        (apo.adam(), {"eps": 1e-46}),
        (apo.rmsprop(), {"eps": 0.0}),
        (apo.rmsprop(), {"eps": 1e-46}),
        (apo.rmsprop(), {"rho": 0.4}),
        (apo.rmsprop(bias_correction=True), {}),
        (apo.sgd(momentum=0.9, dampening=0.5), {}),
        (apo.sgd(momentum=0.9), {"momentum": 0.0}),
    ],
)
def test_refuses_what_torch_does_otherwise(rule: apo.Rule, options: dict[str, float]) -> None:
    params, grads = contiguous(torch.float32, 0), contiguous(torch.float32, 1)
    assert not take(rule, params, grads, rule.init(params), **options)


def entries(state: Any) -> list[Tensor]:
    return [entry for field in state for entry in field.values()]


def held(rule: apo.Rule, **options: Any) -> tuple[nn.Linear, apo.APO]:
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    return model, apo.APO(model, rule, F.mse_loss, tune=options.pop("tune", {}), **options)


def step(model: nn.Linear, opt: apo.APO, *grad: float) -> list[float]:
    model.weight.grad = torch.tensor([grad])
    opt.step()
    after: list[float] = model.weight[0].tolist()
    return after


@pytest.mark.parametrize("reset", [lambda state, p: state[p], lambda state, p: state[p].clear()])
def test_a_state_that_is_there_but_empty_is_kept_from_then_on(reset: Any) -> None:
    model, opt = held(apo.sgd(lr=0.5, momentum=0.5))
    reset(opt.state, model.weight)
    found = [step(model, opt, 1.0, 0.0, -1.0)[0] for _ in range(3)]
    assert found == [0.5, 0.5 - 0.75, 0.5 - 0.75 - 0.875]


@pytest.mark.parametrize("tune", [{}, {"lr": "parameter"}])
@pytest.mark.parametrize("rule", [apo.adam(lr=0.01), apo.rmsprop(lr=0.01)])
@pytest.mark.filterwarnings("ignore:lr is not being tuned")
def test_an_average_may_leave_the_range(rule: apo.Rule, tune: dict[str, str]) -> None:
    """The weight whose average is infinite stands still, as with torch; it is not lost."""
    model, opt = held(rule, tune=tune)
    step(model, opt, 1.0, 1e25, 1.0)
    after = step(model, opt, 1.0, 1.0, 1.0)
    assert after[1] == 1.0 and after[0] == after[2] < 1.0


def test_a_momentum_that_is_0_for_a_while_is_that_of_the_pure_rule() -> None:
    rule = apo.sgd(lr=0.1, momentum=0.9)
    pure = rule._replace(step=lambda *arguments: rule.step(*arguments))
    found = []
    for each in (rule, pure):
        model, opt = held(each)
        for place, momentum in enumerate((0.9, 0.9, 0.0, 0.0, 0.9)):
            opt.param_groups[0]["momentum"] = momentum
            after = step(model, opt, float(place), 1.0, -1.0)
        found.append(after)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_counts_of_another_dtype_are_counted_once() -> None:
    params, grads = {"w": torch.ones(3)}, {"w": torch.ones(3)}
    state = apo.adam().init(params)
    state.step["w"] = state.step["w"].float()
    assert take(apo.adam(), params, grads, state)
    assert state.step["w"].item() == 1.0


def test_a_users_step_without_momentum_sees_0_d_hyperparameters() -> None:
    def free(params: Params, grads: Params, state: Any, hypers: Any) -> Params:
        assert all(isinstance(h, Tensor) and h.shape == () for h in hypers)
        return {name: param - hypers.lr * grads[name] for name, param in params.items()}

    model = nn.Linear(3, 2)
    opt = apo.APO(model, apo.adam(lr=0.1)._replace(without_momentum=free), F.mse_loss)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    F.mse_loss(model(x), y).backward()
    opt.step(batch=(x, y))
    assert len(opt.record) == 1


def test_a_hyperparameter_that_is_no_number_changes_nothing() -> None:
    """Not in the groups before it either."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    groups = [{"params": list(layer.parameters())} for layer in model]
    opt = apo.APO(model, [(apo.adam(lr=0.01), groups)], F.mse_loss, tune={})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.param_groups[1]["beta1"] = None
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(TypeError):
        opt.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_a_step_too_small_for_the_weights_is_said_to_be() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(3.0)
    opt = apo.APO(model, apo.sgd(lr=1e-9), F.mse_loss, meta=apo.Newton(every=1, search=False))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    F.mse_loss(model(x), y).backward()
    with pytest.warns(UserWarning, match="too small to change any weight"):
        opt.step(batch=(x, y))
    assert len(opt.record) == 0


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
def test_states_of_low_precision_are_judged_without_rounding(cls: Any) -> None:
    """With fused=True torch keeps its averages in the weights' dtype, where ε is nothing."""
    model = nn.Linear(2, 1, bias=False).half()
    base = cls(model.parameters(), lr=0.01, fused=True)
    opt = apo.APO(model, base, lambda a, b: F.mse_loss(a.float(), b.float()), meta=apo.Newton(every=1))
    x, y = torch.tensor([[1.0, 0.0]]).half(), torch.tensor([[3.0]]).half()
    for _ in range(4):
        opt.zero_grad()
        F.mse_loss(model(x).float(), y.float()).backward()
        opt.step(batch=(x, y))
    assert len(opt.record) == 4 and opt.record[-1]["skipped"] == 0.0


@pytest.mark.parametrize("rule", [apo.adam(lr=0.01), apo.sgd(lr=0.1, momentum=0.9)])
@pytest.mark.filterwarnings("ignore:lr is not being tuned")
def test_large_tensors_with_learning_rates_of_their_own_are_stepped_in_place(rule: apo.Rule) -> None:
    """And what cannot be, of low precision here, beside them out of place; the steps are those of the pure rule."""
    pure = rule._replace(step=lambda *arguments: rule.step(*arguments))
    runs = []
    for each in (rule, pure):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 300), nn.Linear(300, 200), nn.Linear(200, 100).bfloat16())
        opt = apo.APO(model, each, F.mse_loss, tune={"lr": "parameter"})
        opt._tuning.offsets = {at: 0.1 * place for place, at in enumerate(opt._tuning.offsets)}
        addresses = []
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            opt.step()
            state = opt.state[model[1].weight]
            addresses.append(next(entry for entry in state.values() if entry.ndim).data_ptr())
        runs.append(([param.detach().clone() for param in model.parameters()], len(set(addresses))))
    (own, one), (expected, several) = runs
    assert one == 1 and several > 1
    for param, other in zip(own, expected, strict=True):
        near = 1e-5 if param.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(param, other, rtol=near, atol=near)
