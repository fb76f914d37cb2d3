"""From a learning rate 100 times too small and 100 times too large, the tuning moves it the right way."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import Batch, matrices, vectors

o = torch.optim
STEPS = 300
GOOD: dict[str, tuple[Any, float]] = {
    "sgd": (o.SGD, 0.3),
    "sgd-momentum": (lambda p, lr: o.SGD(p, lr=lr, momentum=0.9), 0.05),
    "adam": (o.Adam, 0.01),
    "adamw": (o.AdamW, 0.01),
    "adamw-fused": (lambda p, lr: o.AdamW(p, lr=lr, fused=True), 0.01),
    "adamw-foreach": (lambda p, lr: o.AdamW(p, lr=lr, foreach=True), 0.01),
    "rmsprop": (o.RMSprop, 0.003),
    "adagrad": (o.Adagrad, 0.05),
    "nadam": (o.NAdam, 0.01),
    "radam": (o.RAdam, 0.01),
    "adamax": (o.Adamax, 0.02),
    "adadelta": (o.Adadelta, 2.0),
    "muon": (o.Muon, 0.03),
    "muon-adamw": (None, 0.02),
    "rule-sgd": (lambda p, lr: apo.sgd(lr=lr), 0.3),
    "rule-rmsprop": (lambda p, lr: apo.rmsprop(lr=lr), 0.003),
    "rule-adam": (lambda p, lr: apo.adam(lr=lr), 0.01),
    "rule-adamw": (lambda p, lr: apo.adamw(lr=lr), 0.01),
    "rule-quasi-adam": (lambda p, lr: apo.quasi_adam(lr=lr), 0.01),
    "rule-quasi-adam-tensor": (lambda p, lr: apo.quasi_adam(lr=lr, secant="tensor"), 0.01),
    "rule-quasi-adam-switch": (lambda p, lr: apo.quasi_adam(lr=lr, variant="switch"), 0.01),
    "rule-apollo": (lambda p, lr: apo.apollo(lr=lr), 0.5),
    "rule-apollo-clipped": (lambda p, lr: apo.chain(apo.clip_by_norm(0.5), apo.apollo(lr=lr)), 0.5),
}
"""A base, and a learning rate that serves it on the digits."""
METAS = {
    "search": "newton",
    "newton": apo.Newton(every=5, search=False, growth=1.5, average=0.9),
    "paper": "paper",
}


@pytest.fixture(scope="module")
def digits() -> list[Batch]:
    """The bundled digits in batches of 64."""
    from sklearn import datasets

    data = datasets.load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16.0, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[i], y[i]) for i in order.split(64)[:-1]]


def base_of(name: str, model: nn.Module, scale: float) -> Any:
    build, lr = GOOD[name]
    if name == "muon-adamw":
        return [o.Muon(matrices(model), lr=lr * scale), o.AdamW(vectors(model), lr=lr * scale / 2)]
    return build(matrices(model) if name == "muon" else model.parameters(), lr * scale)


def mlp(activation: Any = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10))


def mean_loss(model: nn.Module, data: list[Batch]) -> float:
    with torch.no_grad():
        losses: list[Tensor] = [F.cross_entropy(model(x), y) for x, y in data]
    return torch.stack(losses).mean().item()


def run(model: nn.Module, opt: apo.APO, data: list[Batch], enough: Callable[[float], bool] | None = None) -> float:
    """Up to 300 steps, fewer where enough is seen; the factor on the learning rate."""
    start = min(opt.hypers().values())
    for batch in itertools.islice(itertools.cycle(data), STEPS):
        opt.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
        factor = min(opt.hypers().values()) / start
        if enough is not None and enough(factor):
            break
    return factor


every_name = pytest.mark.parametrize("name", GOOD)
from_far_off = pytest.mark.parametrize("scale", [0.01, 100.0], ids=["too-small", "too-large"])
pytestmark = pytest.mark.filterwarnings("ignore:the momentum of Muon")


@from_far_off
@pytest.mark.parametrize("meta", METAS)
@every_name
def test_moves_the_right_way(name: str, meta: str, scale: float, digits: list[Batch]) -> None:
    """By a factor of 4 up, or 2 down: a network that the first step has blown up says little."""
    model = mlp()
    opt = apo.APO(model, base_of(name, model, scale), F.cross_entropy, meta=METAS[meta])
    if scale < 1.0:
        assert run(model, opt, digits, lambda factor: factor > 4.0) > 4.0
    else:
        assert run(model, opt, digits, lambda factor: factor < 0.5) < 0.5


@from_far_off
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize(
    "name",
    ["sgd", "sgd-momentum", "adamw", "rmsprop", "adagrad", "muon-adamw", "rule-sgd", "rule-apollo", "rule-quasi-adam"],
)
def test_a_searched_start_does_not_end_dead(name: str, activation: Any, scale: float, digits: list[Batch]) -> None:
    """The default, after 300 steps. A network that outputs the class frequencies has a loss of 2.3."""
    model = mlp(activation)
    opt = apo.APO(model, base_of(name, model, scale), F.cross_entropy)
    run(model, opt, digits)
    assert mean_loss(model, digits) < 0.7


@from_far_off
@pytest.mark.parametrize("meta", ["newton", "paper"])
def test_two_hyperparameters_of_a_rule_move_together(meta: str, scale: float, digits: list[Batch]) -> None:
    """The weight of Quasi-Adam's second direction finds its size beside a learning rate that is far off."""
    model = mlp()
    base, tune = base_of("rule-quasi-adam", model, scale), {"lr": "global", "qn_weight": "global"}
    opt = apo.APO(model, base, F.cross_entropy, tune=tune, meta=meta)
    start = opt.hypers()["lr"]
    run(model, opt, digits)
    factor = opt.hypers()["lr"] / start
    assert factor > 4.0 if scale < 1.0 else factor < 0.5
    assert max(abs(math.log(weight)) for weight in opt.record.column("qn_weight")) > 0.1
    assert mean_loss(model, digits) < 0.7
