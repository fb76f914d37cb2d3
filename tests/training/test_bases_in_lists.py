"""Several base optimizers as one: a step is all of theirs or none, and groups keep what was tuned for them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import apo
from apo.bases.rule import RuleBase
from tests.shell.helpers import everything, matrices, vectors
from tests.training.checkpointing import GRADIENT, NEWTON
from tests.training.models import TASKS, loss, made

o = torch.optim
STEP = apo.Proximal(lookahead="step")


class Failing(o.SGD):
    """A base whose step raises on demand."""

    fails = False

    def step(self, closure: Any = None) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        super().step()


def bases(kind: str, model: nn.Module) -> list[Any]:
    first = {
        "adamw": lambda: o.AdamW(matrices(model), lr=1e-2),
        "nesterov": lambda: o.SGD(matrices(model), lr=0.1, momentum=0.9, nesterov=True, foreach=True),
        "rule": lambda: (apo.adam(lr=1e-2), matrices(model)),
    }
    return [first[kind](), Failing(vectors(model), lr=0.1, momentum=0.9)]


def forward(model: nn.Module, opt: apo.APO, batch: Any) -> None:
    opt.zero_grad()
    loss(model(batch[0]), batch[1]).backward()


@pytest.mark.parametrize("after", [0, 1, 2], ids=["search", "plain", "meta-step"])
@pytest.mark.parametrize("kind", ["adamw", "nesterov", "rule"])
def test_a_later_base_that_raises_takes_back_the_earlier(kind: str, after: int) -> None:
    """At the searched first step, at one that is not judged, and at one that is; then the step can be taken again."""
    model = made(TASKS[1])
    opt = apo.APO(model, bases(kind, model), loss, meta=apo.Newton(every=2), objective=STEP)
    data = TASKS[1].batches(3)
    for batch in data[:after]:
        forward(model, opt, batch)
        opt.step(batch=batch)
    forward(model, opt, data[after])
    before = everything(model, opt)
    Failing.fails = True
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step(batch=data[after])
    finally:
        Failing.fails = False
    assert everything(model, opt) == before
    opt.step(batch=data[after])
    assert everything(model, opt)[0] != before[0]


def test_one_base_alone_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuleBase, "backup", None)
    model = made(TASKS[1])
    opt = apo.APO(model, apo.sgd(lr=0.1), loss, meta=apo.Newton(every=2, search=False))
    for batch in TASKS[1].batches(4):
        forward(model, opt, batch)
        opt.step(batch=batch)


def by_group(model: nn.Module) -> apo.APO:
    given = [o.AdamW(matrices(model), lr=1e-2), o.SGD(vectors(model)[:-2], lr=0.1)]
    return apo.APO(model, given, loss, meta=GRADIENT, tune={"lr": "group"})


def test_a_group_added_to_an_earlier_base_shifts_nothing() -> None:
    """Nor in a checkpoint; the new group has a number of its own, at its own start."""
    model = made(TASKS[1])
    opt = by_group(model)
    data = TASKS[1].batches(12)
    for batch in data[:6]:
        forward(model, opt, batch)
        opt.step(batch=batch)
    tuned = opt.hypers()
    assert tuned.keys() == {"lr/0", "lr/1"}
    assert tuned["lr/1"] != 0.1
    opt._bases[0].optimizer.add_param_group({"params": vectors(model)[-2:], "lr": 0.5})
    assert opt.hypers() == {**tuned, "lr/2": 0.5}
    assert [group["group_number"] for group in opt.param_groups] == [0, 2, 1]
    assert opt.param_groups[2]["lr_factor"] == pytest.approx(tuned["lr/1"] / 0.1)
    for batch in data[6:9]:
        forward(model, opt, batch)
        opt.step(batch=batch)
    twin = made(TASKS[1], seed=5)
    other = by_group(twin)
    other._bases[0].optimizer.add_param_group({"params": vectors(twin)[-2:], "lr": 0.1})
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    twin.load_state_dict(model.state_dict())
    assert other.hypers() == opt.hypers()
    ends = []
    for m, each in ((model, opt), (twin, other)):
        torch.manual_seed(2)
        for batch in data[9:]:
            forward(m, each, batch)
            each.step(batch=batch)
        ends.append(everything(m, each))
    assert ends[0] == ends[1]


def test_a_group_made_from_another_has_a_number_of_its_own() -> None:
    model = made(TASKS[1])
    params = list(model.parameters())
    opt = apo.APO(model, o.AdamW(params[:-2]), loss, tune={"lr": "group"}, meta=NEWTON)
    opt.add_param_group({**opt.param_groups[0], "params": params[-2:]})
    assert opt.hypers().keys() == {"lr/0", "lr/1"}
    assert [group["group_number"] for group in opt.param_groups] == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.5, "dampening": 0.8},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["torch", "rule"])
def test_how_far_momentum_builds_up(kind: str, options: dict[str, Any]) -> None:
    """The search of the first step allows for it; the oracle is torch's SGD under a constant gradient."""
    param, lengths = nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
    bare = o.SGD([param], lr=1.0, **options)
    for _ in range(300):
        before = param.item()
        param.grad = torch.ones(1, dtype=torch.float64)
        bare.step()
        lengths.append(before - param.item())
    model = nn.Linear(3, 2)
    base = (
        o.SGD(model.parameters(), lr=0.1, **options) if kind == "torch" else apo.sgd(0.1, weight_decay=0.1, **options)
    )
    found = apo.APO(model, base, loss)._bases[0].build_up("step")
    assert found == pytest.approx(max(1.0, lengths[-1] / lengths[0]), rel=1e-6)
