"""Which optimizers are taken: those whose step is proportional to their learning rate, found by trying."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import apo
from apo.bases.linearity import why_not_linear
from tests.shell.helpers import batches, matrices, muon_and_adamw, net, optimizers, state, train, vectors

o = torch.optim
ACCEPTED: dict[str, Any] = {
    "sgd": lambda m: o.SGD(m.parameters(), lr=0.1),
    "sgd-momentum": lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda m: o.Adam(m.parameters(), lr=1e-3),
    "adamw": lambda m: o.AdamW(m.parameters(), lr=1e-3),
    "adamw-fused": lambda m: o.AdamW(m.parameters(), lr=1e-3, fused=True),
    "adamw-foreach": lambda m: o.AdamW(m.parameters(), lr=1e-3, foreach=True),
    "adamw-amsgrad": lambda m: o.AdamW(m.parameters(), lr=1e-3, amsgrad=True),
    "sgd-foreach": lambda m: o.SGD(m.parameters(), lr=1e-3, momentum=0.9, nesterov=True, foreach=True),
    "rmsprop": lambda m: o.RMSprop(m.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda m: o.Adagrad(m.parameters(), lr=1e-2, lr_decay=0.1, initial_accumulator_value=0.1),
    "nadam": lambda m: o.NAdam(m.parameters(), lr=1e-3, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": lambda m: o.RAdam(m.parameters(), lr=1e-3, weight_decay=0.1),
    "adamax": lambda m: o.Adamax(m.parameters(), lr=1e-3),
    "adadelta": lambda m: o.Adadelta(m.parameters(), lr=1.0),
    "muon": lambda m: o.Muon(matrices(m), lr=0.02),
}


@pytest.mark.filterwarnings("ignore:the momentum of Muon")
@pytest.mark.parametrize("build", [*ACCEPTED.values(), muon_and_adamw], ids=[*ACCEPTED, "muon-adamw"])
def test_accepted(build: Any) -> None:
    model = net()
    base = build(model)
    random, before = torch.get_rng_state(), state(model, optimizers(base))
    opt = apo.APO(model, base, F.cross_entropy)
    assert torch.equal(torch.get_rng_state(), random), "the trial leaves the random numbers alone"
    assert state(model, [opt]) == before, "and the optimizer"
    train(model, opt, batches(3))
    assert len(opt.record) == 1


REFUSED: dict[str, tuple[Any, str]] = {
    "asgd": (lambda p: o.ASGD(p, lr=0.1), "the step of ASGD is not proportional to its lr.*assume_linear=True"),
    "rprop": (lambda p: o.Rprop(p, lr=0.1), "the step of Rprop is not proportional to its lr.*assume_linear=True"),
    "adafactor": (
        lambda p: o.Adafactor(p, lr=0.1),
        "the step of Adafactor is not proportional to its lr.*assume_linear=True",
    ),
    "lbfgs": (lambda p: o.LBFGS(p, lr=0.1), "LBFGS evaluates the loss within its step"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_at_construction_saying_why(build: Any, reason: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=reason):
        apo.APO(model, build(model.parameters()), F.cross_entropy)
    assert not model._forward_pre_hooks, "and the model is as it was"


def test_refused_in_a_list_and_in_a_later_group_option() -> None:
    model = net()
    with pytest.raises(ValueError, match="step of ASGD"):
        apo.APO(model, [o.SGD(matrices(model), lr=0.1), o.ASGD(vectors(model), lr=0.1)], F.cross_entropy)


def test_a_refused_optimizer_runs_where_nothing_is_tuned() -> None:
    model = net()
    opt = apo.APO(model, o.Rprop(model.parameters(), lr=0.1), F.cross_entropy, tune={})
    assert all(loss > 0.0 for loss in train(model, opt, batches(3)))


class Demanding(o.SGD):
    """A class that cannot be built from its groups."""

    def __init__(self, params: Any, lr: float, secret: object) -> None:
        super().__init__(params, lr=lr)
        self.secret = secret


def test_a_class_that_cannot_be_rebuilt_is_admitted_on_the_users_word() -> None:
    model = net()
    build = lambda: Demanding(model.parameters(), 0.1, object())  # noqa: E731
    with pytest.raises(ValueError, match=r"a toy Demanding could not be built.*'secret'.*assume_linear=True"):
        apo.APO(model, build(), F.cross_entropy)
    opt = apo.APO(model, build(), F.cross_entropy, assume_linear=True)
    train(model, opt, batches(3))
    assert opt.hypers()["lr"] != 0.1


class Capped(o.SGD):
    """Linear for small learning rates only."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=min(group["lr"], 0.5))


class Lazy(o.SGD):
    """Linear for its first ten steps only."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.data.sub_(p.grad, alpha=group["lr"] if count < 10 else 0.1)


@pytest.mark.parametrize("cls", [Capped, Lazy])
def test_deviations_at_large_rates_and_late_steps_are_found(cls: Any) -> None:
    model = net()
    assert f"the step of {cls.__name__} is not proportional" in str(why_not_linear(cls(model.parameters(), lr=0.1)))


def test_each_group_is_tried_with_its_own_options() -> None:
    """One group of a class may be linear, and another not."""

    class Switch(Capped):
        def __init__(self, params: Any, lr: float = 0.1, capped: bool = False) -> None:
            o.Optimizer.__init__(self, params, {"lr": lr, "capped": capped})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=min(group["lr"], 0.5 if group["capped"] else 1e9))

    model = net()
    assert why_not_linear(Switch(model.parameters())) is None
    groups = [{"params": matrices(model)}, {"params": vectors(model), "capped": True}]
    assert why_not_linear(Switch(groups)) is not None
