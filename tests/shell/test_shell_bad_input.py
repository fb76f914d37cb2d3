"""Bad input: a clear error, and everything as it was."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import apo
from tests.shell.helpers import backward, batches, everything, matrices, net, state, traces, train, vectors, weights

o = torch.optim


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return o.SGD(model.parameters(), **{"lr": 0.1, **options})


TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "model": (lambda: apo.APO(lambda x: x, sgd(net())), r"model=.* must be a torch.nn.Module; for plain functions see"),
    "base": (lambda: apo.APO(net(), 0.1), "base=0.1 must be a rule, a torch optimizer, or a list"),
    "base-class": (lambda: apo.APO(net(), o.SGD), "base=.*SGD.* must be a rule"),
    "base-empty": (lambda: apo.APO(net(), []), r"base=\[\] must be a rule"),
    "base-item": (lambda: apo.APO(net(), [sgd(net()), 3]), "3 in base= must be a torch optimizer or a pair"),
    "base-factory": (lambda: apo.APO(net(), apo.sgd), "base=.*sgd.* must be a rule"),
    "apo": (lambda: apo.APO(m := net(), apo.APO(m, sgd(m))), "an apo.APO already: wrap the optimizer inside it"),
    "apo-list": (lambda: apo.APO(m := net(), [apo.APO(m, sgd(m))]), "an apo.APO already"),
    "loss": (
        lambda: apo.APO(m := net(), sgd(m), "mse"),
        "loss='mse' must be a function \\(an instance, not a class\\) or None",
    ),
    "forward": (
        lambda: apo.APO(m := net(), sgd(m), forward=1),
        "forward=1 must be a function \\(an instance, not a class\\) or None",
    ),
    "target": (
        lambda: apo.APO(m := net(), sgd(m), target=1),
        "target=1 must be a function \\(an instance, not a class\\) or None",
    ),
    "evaluate": (
        lambda: apo.APO(m := net(), sgd(m), evaluate=1),
        "evaluate=1 must be a function \\(an instance, not a class\\) or None",
    ),
    "relative": (
        lambda: apo.APO(m := net(), sgd(m), relative=0.5),
        "relative=0.5 must be a function \\(an instance, not a class\\) or None",
    ),
    "objective": (lambda: apo.APO(m := net(), sgd(m), objective=0.1), r"objective=0.1 must be an apo.Proximal"),
    "tune": (lambda: apo.APO(m := net(), sgd(m), tune="lr"), "tune='lr' must be a dict from hyperparameter names"),
    "tune-key": (lambda: apo.APO(m := net(), sgd(m), tune={1: "global"}), "must be a dict from hyperparameter names"),
    "tune-by": (lambda: apo.APO(m := net(), sgd(m), tune={"lr": 3}), "by=3 must be one of .* or a function"),
    "meta": (lambda: apo.APO(m := net(), sgd(m), meta=0.1), r"meta=0.1 must be 'newton', 'paper', apo.Newton"),
    "every": (lambda: apo.Newton(every=2.5), "every=2.5"),
    "every-gradient": (lambda: apo.Gradient(o.SGD, lr=0.1, every=True), "every=True"),
    "factory": (lambda: apo.Gradient("rmsprop", lr=0.1), "factory='rmsprop' must be a torch optimizer class"),
}


@pytest.mark.parametrize(("make", "message"), TYPES.values(), ids=TYPES)
def test_wrong_types(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (lambda: apo.APO(m := net(), sgd(m), meta="adam"), "meta='adam' is neither 'newton' nor 'paper'"),
    "by": (lambda: apo.Tune("block"), "by='block' is not one of 'global', 'group', 'layer', 'parameter'"),
    "max-change": (lambda: apo.Tune(max_change=1.0), r"max_change=1.0 is not in \(1, ∞\)"),
    "low-high": (lambda: apo.Tune(low=0.2, high=0.1), "low=0.2 is not below high=0.1"),
    "bound": (lambda: apo.APO(m := net(), sgd(m), tune={"lr": apo.Tune(low=-1.0)}), r"low=-1.0 is not in"),
    "every": (lambda: apo.Newton(every=0), "every=0"),
    "average": (lambda: apo.Newton(average=1.0), r"average=1.0 is not in \[0, 1\)"),
    "growth": (lambda: apo.Newton(growth=0.9), r"growth=0.9 is not in \(1, ∞\)"),
    "shrink": (lambda: apo.Newton(shrink=1.0), r"shrink=1.0 is not in \(1, ∞\)"),
    "clip": (lambda: apo.Gradient(o.SGD, lr=0.1, clip=0.0), r"clip=0.0 is not in \(0, ∞\)"),
    "linear": (lambda: apo.Proximal(loss_model="linear"), "no minimum: make fsd or wsd positive"),
    "unknown": (
        lambda: apo.APO(net(), apo.rmsprop(), tune={"lrr": "global"}),
        r"tune=\{'lrr': ...\}: the base optimizer can adapt 'lr', 'rho', 'eps', 'alpha', 'weight_decay'$",
    ),
    "closed": (
        lambda: apo.APO(m := net(), o.Adam(m.parameters()), tune={"eps": "global"}),
        r"can adapt 'lr'; a torch optimizer's other options are closed to us, but our rules .* are open",
    ),
    "momentum": (
        lambda: apo.APO(net(), apo.sgd(0.1, 0.9), tune={"momentum": "global"}),
        r"momentum shows its effect over many steps, .* or insist with apo.Tune\(force=True\)",
    ),
    "beta1": (lambda: apo.APO(net(), apo.adam(), tune={"beta1": "global"}), "beta1 shows its effect over many steps"),
    "zero-decay": (
        lambda: apo.APO(net(), apo.adamw(weight_decay=0.0), tune={"weight_decay": "global"}),
        r"weight_decay=0.0 is not in \(0, ∞\), so it cannot be adapted; drop it from tune=",
    ),
    "zero-momentum": (
        lambda: apo.APO(net(), apo.sgd(), tune={"momentum": apo.Tune(force=True)}),
        r"momentum=0.0 is not in \(0, 1\), so it cannot be adapted",
    ),
    "twice": (
        lambda: apo.APO(m := net(), [o.SGD(m.parameters(), lr=0.1), o.Adam(matrices(m))]),
        "is in more than one group; give it to one optimizer",
    ),
    "no-parameters": (lambda: apo.APO(nn.Tanh(), apo.sgd()), "empty parameter list"),
    "negative-rule": (lambda: apo.sgd(lr=-0.1), r"lr=-0.1 is not in \[0, ∞\)"),
}


@pytest.mark.parametrize(("make", "message"), VALUES.values(), ids=VALUES)
def test_values_that_cannot_work(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(st.one_of(st.floats(max_value=0.0), st.just(math.inf), st.just(math.nan)))
def test_weights_of_batches(weight: float) -> None:
    model = nn.Linear(6, 3)
    opt = apo.APO(model, sgd(model), F.cross_entropy)
    with pytest.raises(ValueError, match=r"weight=.* is not in \(0, ∞\)"):
        opt.feed(batches(1)[0], weight)
    assert not opt._feeding.fed


@pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("build", [sgd, lambda _: apo.sgd(0.1, 0.9)])
def test_a_learning_rate_that_is_none_in_a_group(build: Any, rate: float) -> None:
    """Set later, on a call that is a meta-step and on one that is not."""
    model = net()
    opt = apo.APO(model, build(model), F.cross_entropy, meta=apo.Newton(every=2))
    for batch in batches(2):
        opt.zero_grad()
        backward(model, batch)
        kept, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], rate
        before = weights(model), traces(model), state(model, [opt])
        with pytest.raises(ValueError, match=rf"lr={rate} is not in \[0, ∞\)"):
            opt.step(batch=batch)
        assert (weights(model), traces(model), state(model, [opt])) == before
        opt.param_groups[0]["lr"] = kept
        opt.step(batch=batch)
    assert len(opt.record) == 1


@pytest.mark.parametrize("ratio", [-0.5, math.nan])
def test_a_schedule_that_returns_no_ratio(ratio: float) -> None:
    model = net()
    values = iter([1.0] * 3)
    opt = apo.APO(model, sgd(model), F.cross_entropy, relative=lambda _: next(values, ratio), meta="paper")
    with pytest.raises(ValueError, match=r"relative\(\d\)=?.*(not in \[0, ∞\))"):
        train(model, opt, batches(3))


@pytest.mark.parametrize("strength", [-1.0, math.inf])
def test_a_penalty_that_is_none(strength: float) -> None:
    model = net()
    opt = apo.APO(model, sgd(model), F.cross_entropy, objective=apo.Proximal(wsd=lambda _: strength))
    (batch,) = batches(1)
    backward(model, batch)
    before = everything(model, opt)
    with pytest.raises(ValueError, match=rf"wsd={strength} is not in \[0, ∞\)"):
        opt.step(batch=batch)
    assert everything(model, opt) == before


LOSSES: dict[str, tuple[Any, str, type[Exception]]] = {
    "vector": (lambda z, y: F.cross_entropy(z, y, reduction="none"), r"one element, not shape \(12,\)", TypeError),
    "float": (lambda z, y: 0.5, "one element, not a float", TypeError),
    "detached": (lambda z, y: F.cross_entropy(z, y).detach(), "does not depend on the model's parameters", ValueError),
}


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(("loss", "message", "error"), LOSSES.values(), ids=LOSSES)
def test_losses_that_are_none(loss: Any, message: str, error: Any, search: bool) -> None:
    """Found in the search, nothing has happened; found after the step, the bare step has."""
    model, twin = net(), net()
    opt = apo.APO(model, sgd(model), loss, meta=apo.Newton(search=search))
    bare = sgd(twin)
    (batch,) = batches(1)
    for m in (model, twin):
        torch.manual_seed(4)
        backward(m, batch)
    if not search:
        bare.step()
    before = weights(twin), traces(twin)
    with pytest.raises(error, match=message):
        opt.step(batch=batch)
    assert (weights(model), traces(model)) == before
    assert opt.hypers() == {"lr": 0.1}


def test_outputs_without_a_tensor() -> None:
    model = net()
    opt = apo.APO(
        model,
        sgd(model),
        evaluate=lambda m, b: (F.cross_entropy(m(b[0]), b[1]), {"scores": 1}),
        objective=apo.Proximal(fsd=1.0),
        meta=apo.Newton(every=1),
    )
    train(model, opt, batches(1))
    with pytest.raises(TypeError, match=r"outputs must be a tensor or have .logits, not a dict; pass forward="):
        train(model, opt, batches(1))


@pytest.mark.parametrize("discrepancy", ["bregman", "gauss_newton"])
def test_a_discrepancy_that_needs_a_loss_without_one(discrepancy: str) -> None:
    """Known before anything has run."""
    model = net()
    with pytest.raises(ValueError, match=rf"discrepancy='{discrepancy}' needs loss="):
        apo.APO(
            model,
            sgd(model),
            evaluate=lambda m, b: (F.cross_entropy(m(b[0]), b[1]), m(b[0])),
            objective=apo.Proximal(fsd=1.0, discrepancy=discrepancy),
        )


def test_a_discrepancy_with_a_slope_at_equality() -> None:
    model = net()
    objective = apo.Proximal(fsd=1.0, discrepancy=lambda new, old: (new - old).sum(1))
    opt = apo.APO(model, sgd(model), F.cross_entropy, objective=objective, meta=apo.Newton(every=1))
    data = batches(2)
    train(model, opt, data[:1])
    opt.zero_grad()
    backward(model, data[1])
    before = everything(model, opt)
    with pytest.raises(ValueError, match="must be zero with zero gradient at equality"):
        opt.step(batch=data[1])
    assert everything(model, opt) == before


@pytest.mark.parametrize("skip", [True, False])
def test_gradients_that_are_not_finite(skip: bool) -> None:
    """Skipped with the option, and taken as the bare optimizer takes them without."""
    model = net()
    opt = apo.APO(model, sgd(model), F.cross_entropy, skip_nonfinite=skip, meta=apo.Newton(every=1))
    data = batches(4)
    train(model, opt, data[:2])
    backward(model, data[2])
    model[0].weight.grad[0, 0] = math.nan
    before = weights(model)
    with pytest.warns(UserWarning, match="a gradient is not finite: steps" if skip else "the meta-step is skipped"):
        opt.step(batch=data[2])
    assert (weights(model) == before) is skip
    assert len(opt.record) == (2 if skip else 3)
    if skip:
        train(model, opt, data[3:])
        assert opt.record[-1]["skipped"] == 1.0
        assert opt.record[-1]["step"] == 2.0


@pytest.mark.filterwarnings("ignore:.*")
def test_a_model_on_two_devices() -> None:
    """One part on a device that holds no numbers: an error before the step that is searched, after any other."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3, device="meta"))
    x, y = batches(1)[0]
    for search in (True, False):
        opt = apo.APO(model, sgd(model), F.cross_entropy, meta=apo.Newton(search=search))
        model[0].weight.grad = torch.ones_like(model[0].weight)
        before = model[0].weight.detach().clone()
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
            opt.step(batch=(x, y))
        assert opt.hypers() == {"lr": 0.1}
        assert torch.equal(model[0].weight.detach(), before if search else before - 0.1)


@pytest.mark.parametrize("by", ["global", "group", "layer", "parameter"])
@pytest.mark.parametrize("build", [lambda g: o.SGD(g, lr=0.1), lambda g: [(apo.sgd(lr=0.1), g)]], ids=["torch", "rule"])
def test_an_empty_group(build: Any, by: str) -> None:
    """It is as if it were not there."""
    rows = []
    for empty in (False, True):
        model = net()
        groups = [{"params": matrices(model)}, {"params": vectors(model)}]
        base = build([*groups, {"params": []}] if empty else groups)
        opt = apo.APO(model, base, F.cross_entropy, tune={"lr": by}, meta=apo.Newton(every=2))
        train(model, opt, batches(4))
        rows.append((weights(model), [row["objective"] for row in opt.record]))
    assert rows[0] == rows[1]
