"""How long momentum makes the steps of a rule or an optimizer, whatever is done to its gradients."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apo
from tests.shell.helpers import batches, net, train

o = torch.optim


def centred(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g - g.mean() for name, g in grads.items()}


def of_the_last_layer(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grads[name] for name in list(grads) if name.startswith("3.")}


def by_name(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return grads | {"3.weight": 2.0 * grads["3.weight"]}


def noisy(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g + 0.3 * torch.randn_like(g) for name, g in grads.items()}


class Averaged(NamedTuple):
    v: Tensor


def averaging(momentum: float, corrected: bool) -> Any:
    """A user's rule whose momentum averages, corrected for its start or not; right for the first two steps."""

    class Hypers(NamedTuple):
        lr: Tensor
        momentum: Tensor

    def update(param: Tensor, grad: Tensor, state: Averaged, hypers: Hypers) -> Any:
        v = hypers.momentum * state.v + (1.0 - hypers.momentum) * grad
        lacks = 1.0 - hypers.momentum if not state.v.any() else 1.0 - hypers.momentum**2
        return param - hypers.lr * (v / lacks if corrected else v), Averaged(v)

    hypers = Hypers(apo.domains.hyper("lr", 0.1), apo.domains.hyper("momentum", momentum, below=1.0))
    domains = {"lr": apo.domains.POSITIVE, "momentum": apo.domains.AVERAGING}
    free = lambda param, grad, state, hypers: param - hypers.lr * grad  # noqa: E731
    return apo.elementwise(lambda p: Averaged(torch.zeros_like(p)), update, hypers, domains, free)


@pytest.mark.parametrize(
    ("rule", "last"),
    [
        *((apo.chain(transform, apo.sgd(lr=0.1, momentum=0.9)), 10.0) for transform in (centred, by_name, noisy)),
        (apo.chain(of_the_last_layer, apo.sgd(lr=0.1, momentum=0.9)), 10.0),
        (apo.chain(apo.clip_by_norm(0.5), apo.sgd(lr=0.1, momentum=0.9, nesterov=True)), 10.0),
        (averaging(0.9, corrected=True), 1.0),
        (averaging(0.9, corrected=False), 1.0),
    ],
)
def test_gains_of_users_rules(rule: Any, last: float) -> None:
    """Whether momentum adds up is tried on a toy; where a transform makes nonsense of it, it counts as adding up."""
    opt = apo.APO(net(), rule, F.cross_entropy)
    first, steady = opt._bases[0].gains(opt.param_groups[0])
    assert steady == pytest.approx(last) and first > 0.0
    torch.manual_seed(0)
    after = torch.random.get_rng_state()
    opt._bases[0]._known.clear()
    opt._bases[0].gains(opt.param_groups[0])
    assert torch.equal(after, torch.random.get_rng_state())


class Renamed(o.SGD):
    """An optimizer whose class is not known."""


@pytest.mark.filterwarnings("ignore:the momentum of Renamed")
def test_what_is_judged_as_it_is_taken_has_its_length_allowed_for() -> None:
    """An unknown class, and a momentum that is tuned itself, are judged by the step, whatever is asked for."""
    rates = []
    for judged in ("steady", "step"):
        model = net(dropout=0.0)
        base, objective = Renamed(model.parameters(), lr=0.01, momentum=0.9), apo.Proximal(lookahead=judged)
        opt = apo.APO(model, base, F.cross_entropy, objective=objective)
        train(model, opt, batches(12))
        rates.append(opt.hypers()["lr"])
    assert rates[0] == rates[1]
    model = net(dropout=0.0)
    tune = {"lr": "global", "momentum": apo.Tune(force=True)}
    opt = apo.APO(model, apo.sgd(lr=0.01, momentum=0.9), F.cross_entropy, tune=tune, meta=apo.Newton(every=1))
    train(model, opt, batches(12))
    assert opt.hypers()["momentum"] != 0.9


@pytest.mark.parametrize("options", [{"dampening": 1.0}, {"dampening": 1.5}])
def test_a_momentum_that_never_builds_up_has_no_length(options: dict[str, Any]) -> None:
    model = net(dropout=0.0)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.01, momentum=0.9, **options), F.cross_entropy)
    train(model, opt, batches(12))
    assert len(opt.record) == 2 and opt.record[0]["slope"] < 0.0
