"""Every public function and method under hostile input: it works, or a TypeError or ValueError names the culprit.

Whatever is raised, nothing is half done: weights, traces, state, groups and tuned numbers are as they were.
"""

import inspect
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import apo
from tests.shell.helpers import everything

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
o = torch.optim
X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1])


class Rude:
    """Refuses to be a number."""

    def __float__(self) -> float:
        raise RuntimeError("no")


HOSTILE: list[Any] = [
    *(None, True, False, "", "0.1", b"x", 1 + 2j, 0, -3, 10**400, -(10**400), 0.0, -0.0, -1.0, 5e-324, 1e308),
    *(math.nan, math.inf, -math.inf, Fraction(1, 3), Decimal("NaN"), Decimal("0.1"), Rude(), object(), range(3)),
    *([], {}, (), set(), [1.0], (0.1, 0.2), {"lr": 1}, {1: 2}, float, nn.Linear, lambda: 1, lambda *_, **__: None),
    *(np.float32(0.1), np.int64(3), np.float64("nan"), np.bool_(True), np.array(0.5), np.array([1.0, 2.0])),
    *(torch.tensor(0.1), torch.tensor(math.nan), torch.ones(2), torch.ones((), dtype=torch.int), nn.Tanh()),
]
hostile = st.sampled_from(range(len(HOSTILE))).map(lambda i: HOSTILE[i])


def polite(call: Callable[[], Any], name: str = "") -> bool:
    """Call; whether it raised a TypeError or ValueError that names an argument. Anything else is not caught."""
    try:
        call()
    except (TypeError, ValueError) as error:
        assert str(error)
        assert name in str(error), f"{error} does not name {name}"
        return True
    return False


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.1), nn.Linear(3, 2))


def shell(**options: Any) -> tuple[nn.Sequential, apo.APO]:
    """A model with gradients, under an `apo.APO` that has been stepped once."""
    model = small()
    opt = apo.APO(model, options.pop("base", o.SGD(model.parameters(), lr=0.1)), **{"loss": F.cross_entropy, **options})
    F.cross_entropy(model(X), Y).backward()
    return model, opt


def made(**options: Any) -> apo.APO:
    model = options.pop("model", small())
    params = [*(model.parameters() if isinstance(model, nn.Module) else ())] or [torch.ones(2)]
    return apo.APO(**{"model": model, "base": o.SGD(params, lr=0.1), "loss": F.cross_entropy, **options})


MAKERS: dict[str, tuple[Any, Callable[..., Any]]] = {
    **{f.__name__: (f, f) for f in (apo.sgd, apo.rmsprop, apo.adam, apo.adamw, apo.apollo, apo.quasi_adam)},
    **{f.__name__: (f, f) for f in (apo.Tune, apo.Proximal, apo.Newton)},
    "kfac": (apo.kfac, lambda **k: apo.kfac(**{"model": small(), **k})),
    "clip_by_norm": (apo.clip_by_norm, lambda **k: apo.clip_by_norm(**{"max_norm": 1.0, **k})),
    "Gradient": (apo.Gradient, lambda **k: apo.Gradient(**{"factory": o.SGD, "lr": 0.1, **k})),
    "APO": (apo.APO, made),
}
ARGUMENTS = [
    (maker, name)
    for maker, (signature, _) in MAKERS.items()
    for name in inspect.signature(signature).parameters
    if name not in ("self", "options")
]


@pytest.mark.parametrize(("maker", "name"), ARGUMENTS, ids=["-".join(a) for a in ARGUMENTS])
def test_every_argument_of_every_constructor(maker: str, name: str) -> None:
    """Each hostile value in each place; the message has the name of the argument, or the value in a dict of them."""
    for value in HOSTILE:
        if name == "relative" and callable(value):
            continue  # the function's own errors are its own
        shown = {"factory": "", "tune": "by=" if isinstance(value, dict) and "lr" in value else "tune"}.get(name, name)
        polite(lambda value=value: MAKERS[maker][1](**{name: value}), shown)


@given(st.sampled_from(sorted(MAKERS)), st.data())
def test_two_bad_arguments_at_once(maker: str, data: st.DataObject) -> None:
    names = [name for m, name in ARGUMENTS if m == maker and name not in ("model", "relative", "factory")]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    polite(lambda: MAKERS[maker][1](**{name: data.draw(hostile) for name in chosen}))


BATCHES: list[Any] = [
    *HOSTILE[1::4], (X,), (X, Y, Y),
    {"labels": Y}, {"x": X}, {"input": X, "labels": None}, (n for n in range(3)), [[X], [Y]],
    (None, None), (X, None), (X[:3], Y), X, (np.ones((5, 4)), np.ones(5)), {1: X}, [], (X, [Y]), iter([X, Y]),
]  # fmt: skip
METAS = [apo.Newton(every=1), apo.Newton(every=1, search=False), apo.Gradient(o.SGD, lr=0.1, every=1)]


def bare(model: nn.Module) -> list[Tensor]:
    return [p.detach() - 0.1 * p.grad for p in model.parameters()]


PLACES = [("batch", METAS[0]), ("batch", METAS[1]), ("batch", METAS[2]), ("other", METAS[0])]


@pytest.mark.parametrize(("place", "meta"), PLACES, ids=["search", "newton", "gradient", "other"])
def test_batches_of_strange_structure(place: str, meta: Any) -> None:
    """Before the commit all is as it was; after it the bare step is done, and everything else is as it was."""
    for strange in BATCHES:
        model, opt = shell(meta=meta, objective=apo.Proximal(fsd=1.0, discrepancy="kl"))
        before, stepped = everything(model, opt), bare(model)
        given = {"batch": (X, Y), "other": (X, Y), place: strange}
        try:
            opt.step(**given)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:  # those of torch on a bad tensor included
            assert str(error)
            after = everything(model, opt)
            if opt._counts.steps == 0:
                assert after == before
            else:
                assert after[1] == before[1]
                torch.testing.assert_close(list(model.parameters()), stepped)
                assert opt.hypers() == {"lr": 0.1}
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert not opt._feeding.fed


@pytest.mark.parametrize("name", ["loss", "forward", "target", "evaluate", "fsd", "wsd", "discrepancy", "relative"])
def test_functions_that_return_nonsense(name: str) -> None:
    for value in [*HOSTILE[::3], 1e308, math.nan, None]:
        nonsense = lambda *_, value=value: value  # noqa: E731
        if name in ("fsd", "wsd", "discrepancy"):
            options = {"objective": apo.Proximal(**{"fsd": 1.0, name: nonsense})}
        else:
            options = {name: nonsense}
        model = opt = None

        def go(options: Any = options) -> None:
            nonlocal model, opt
            model, opt = shell(meta=apo.Newton(every=1), **options)
            before = everything(model, opt)
            try:
                opt.step(batch=(X, Y), other=(X, Y))
            finally:
                if opt._counts.steps == 0:
                    assert everything(model, opt) == before

        try:
            polite(go)
        except (IndexError, RuntimeError):
            # The user's own loss on a tensor that is none, and a learning rate of 1e308, which torch refuses itself.
            assert name == "forward" or (name == "relative" and value == 1e308)
        if opt is not None:
            assert math.isfinite(opt.param_groups[0]["lr"])
            assert not opt._feeding.fed


METHODS: dict[str, Callable[[apo.APO, Any], Any]] = {
    "feed": lambda opt, v: opt.feed((X, Y), v),
    "step": lambda opt, v: None if callable(v) else opt.step(v),
    "load_state_dict": lambda opt, v: opt.load_state_dict(v),
    "load-groups": lambda opt, v: opt.load_state_dict({"state": {}, "param_groups": v}),
    "load-state": lambda opt, v: opt.load_state_dict({**opt.state_dict(), "state": v} if v != {} else v),
    "load-group": lambda opt, v: opt.load_state_dict({"state": {}, "param_groups": [v]}),
    "add_param_group": lambda opt, v: opt.add_param_group(v),
    "add-params": lambda opt, v: opt.add_param_group({"params": v}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", [False, True], ids=["torch", "rule"])
def test_methods_with_hostile_input(method: str, rule: bool) -> None:
    """What they refuse has changed nothing."""
    for value in HOSTILE[rule::2]:
        model, opt = shell(**({"base": apo.sgd(lr=0.1)} if rule else {}))
        before, fed = everything(model, opt), len(opt._feeding.fed)
        if value is not None and polite(lambda opt=opt, value=value: METHODS[method](opt, value)):
            assert everything(model, opt) == before
            assert len(opt._feeding.fed) == fed


@pytest.mark.parametrize("name", ["rule", "objective", "params", "grads", "state", "hypers"])
def test_the_functional_core(name: str) -> None:
    rule = apo.sgd(momentum=0.5)
    params = {"w": torch.ones(3)}
    good: dict[str, Any] = {"rule": rule, "objective": lambda p: p["w"].sum(), "params": params, "grads": params}
    good |= {"state": rule.init(params), "hypers": rule.hypers}
    rest = {n: v for n, v in good.items() if n != "objective"}
    for value in HOSTILE:
        if name == "objective":
            if not callable(value):
                polite(lambda value=value: apo.hypergradient(**{**good, name: value}), name)
            polite(lambda value=value: apo.hypergradient(**{**good, name: lambda _: value}), name)
            continue
        shown = "" if isinstance(value, dict) else name
        polite(lambda value=value: apo.hypergradient(**{**good, name: value}), shown)
        polite(lambda value=value: apo.lookahead(**{**rest, name: value}), shown)


def test_gradients_that_do_not_fit() -> None:
    rule, params = apo.sgd(), {"w": torch.ones(3)}
    for grads, message in (
        ({"w": torch.ones(4)}, r"grads\['w'\] is of shape \[4\], but params\['w'\] is of shape \[3\]"),
        ({"v": torch.ones(3)}, r"grads\['v'\] is of shape \[3\], but params\['v'\] is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            apo.lookahead(rule, params, grads, rule.init(params), rule.hypers)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "chain": apo.chain,
    "chain-first": lambda v: apo.chain(v, apo.sgd()),
    "momentum_free": apo.momentum_free,
    "fisher-rule": lambda v: apo.fisher_factors(v, small(), lambda: X),
    "fisher-model": lambda v: apo.fisher_factors(apo.kfac(small()), v, lambda: X),
    "fisher-outputs": lambda v: apo.fisher_factors(apo.kfac(m := small()), m, lambda: v),
    "squared_error": lambda v: apo.discrepancies.squared_error(X, v),
    "kl": lambda v: apo.discrepancies.kl(v, X),
    "shift": lambda v: apo.domains.shift(apo.domains.POSITIVE, v, 0.1),
    "shift-offset": lambda v: apo.domains.shift(apo.domains.UNIT_INTERVAL, 0.1, v),
    "derivative": lambda v: apo.domains.derivative(apo.domains.UNIT_INTERVAL, v),
    "base-list": lambda v: apo.APO(small(), [v]),
    "base-pair": lambda v: apo.APO(small(), [(apo.sgd(), v)]),
    "to_csv": lambda v: None if isinstance(v, str | bytes) else apo.Record().to_csv(v),
}


@pytest.mark.parametrize("function", OTHERS)
def test_other_functions(function: str) -> None:
    for value in HOSTILE:
        polite(lambda value=value: OTHERS[function](value))


@settings(max_examples=100)
@given(hostile, st.floats(min_value=0.0, exclude_min=True, max_value=1e6))
@example(np.float32(0.5), 1.0)
@example(torch.tensor(0.5), 1.0)
def test_settings_are_plain_floats(value: Any, lr: float) -> None:
    """Whatever kind of number was given: a checkpoint can hold nothing else."""
    for make in (
        lambda: apo.Tune(low=value).low,
        lambda: apo.Newton(average=value).average,
        lambda: apo.Proximal(fsd=value).fsd,
        lambda: apo.Gradient(o.SGD, lr=lr, clip=value).clip,
    ):
        try:
            assert callable(made := make()) or made is None or type(made) is float
        except (TypeError, ValueError):
            continue


def test_an_evaluation_that_returns_the_loss_alone() -> None:
    _, opt = shell(evaluate=lambda m, b: F.cross_entropy(m(b[0]), b[1]), loss=None)
    with pytest.raises(TypeError, match=r"evaluate= must return a pair \(loss, outputs\), not shape \(\)"):
        opt.step(batch=(X, Y))
