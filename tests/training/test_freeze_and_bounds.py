"""Freezing in the middle of a training, and bounds, on models that people train."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import apo
from tests.shell.helpers import traces, weights
from tests.training.models import TASKS, Task, loss, made

o = torch.optim
EVERY = apo.Newton(every=1)
METAS = {"newton": EVERY, "gradient": apo.Gradient(o.RMSprop, lr=0.5, every=1)}
every_task = pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])


def train(model: nn.Module, opt: Any, data: list[Any], judged: bool = True) -> None:
    for x, y in data:
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step(batch=(x, y)) if judged else opt.step()


def halves(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    """Matrices and kernels, and the rest."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim == 1], **second}]


@every_task
def test_frozen_steps_are_the_bare_ones(task: Task) -> None:
    """At the learning rate that was found; thawed, the tuning goes on from where it was."""
    model, data = made(task), task.batches(12)
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-4), loss, meta=EVERY, objective=apo.Proximal(fsd=0.01))
    train(model, opt, data[:4])
    found, averages = opt.hypers(), copy.copy(opt._tuning.newton)
    opt.freeze()
    twin = copy.deepcopy(model)
    bare = o.AdamW(twin.parameters(), lr=1e-4)
    bare.load_state_dict(copy.deepcopy(opt._optimizers[0].state_dict()))
    bare.param_groups[0]["lr"] = found["lr"]
    rng = torch.get_rng_state()
    train(model, opt, data[4:8])
    torch.set_rng_state(rng)
    train(twin, bare, data[4:8], judged=False)
    assert weights(model) == weights(twin)
    assert traces(model) == traces(twin)
    assert (opt.hypers(), len(opt.record), opt._tuning.newton) == (found, 4, averages)
    opt.unfreeze()
    train(model, opt, data[8:])
    assert len(opt.record) == 8
    assert opt.record.column("step") == [0.0, 1.0, 2.0, 3.0, 8.0, 9.0, 10.0, 11.0]
    # The batch before is not kept while nothing is tuned: its term is missing once at the start, and once again here.
    assert opt.record.column("without_other") == [1.0] * 4 + [2.0] * 4


def test_the_search_waits_for_the_thaw() -> None:
    task = TASKS[0]
    model, data = made(task), task.batches(4)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=1e-5), loss, meta=EVERY)
    opt.freeze()
    train(model, opt, data[:2])
    assert (opt.hypers(), len(opt.record), opt._tuning.searched) == ({"lr": 1e-5}, 0, False)
    opt.unfreeze()
    assert opt.due
    train(model, opt, data[2:])
    assert opt.record[0]["scale"] > 100.0
    assert opt._tuning.searched


@pytest.mark.parametrize("fsd", [0.0, 0.01])
def test_frozen_through_a_checkpoint(fsd: float) -> None:
    """It stays frozen, and thaws to what the run without a break does."""
    task = TASKS[0]
    found = []
    for broken in (False, True):
        model, data = made(task), task.batches(8)

        def build(model: nn.Module = model) -> apo.APO:
            base = o.AdamW(model.parameters(), lr=1e-3)
            return apo.APO(model, base, loss, meta=EVERY, objective=apo.Proximal(fsd=fsd))

        opt = build()
        train(model, opt, data[:3])
        opt.freeze()
        train(model, opt, data[3:5])
        if broken:
            fresh = build()
            fresh.load_state_dict(opt.state_dict())
            assert not fresh.due
            opt = fresh
        train(model, opt, data[5:6])
        opt.unfreeze()
        train(model, opt, data[6:])
        found.append((weights(model), opt.hypers(), list(opt.record)[-2:]))
    assert found[0] == found[1]


@pytest.mark.parametrize("by", ["global", "group", "layer", "parameter"])
@pytest.mark.parametrize("meta", METAS)
def test_bounds_and_paces(by: str, meta: str) -> None:
    """Every tuned value of every meta-step; a start out of bounds begins at the nearest one."""
    task, low, high, pace = TASKS[1], 2e-3, 5e-3, 1.2
    for start in (1e-4, 0.1):
        model = made(task)
        tune = {"lr": apo.Tune(by, low=low, high=high, max_change=pace)}
        opt = apo.APO(model, o.AdamW(halves(model), lr=start), loss, tune=tune, meta=METAS[meta])
        assert list(opt.hypers().values()) == pytest.approx([min(max(start, low), high)] * len(opt.hypers()), rel=1e-9)
        train(model, opt, task.batches(3))
        for label in opt.hypers():
            rates = opt.record.column(label)
            assert all(low * (1 - 1e-9) <= rate <= high * (1 + 1e-9) for rate in rates)
            changes = [abs(math.log(b / a)) for a, b in itertools.pairwise(rates)]
            assert max(changes) <= math.log(pace) * (1 + 1e-9)
        assert all(low * (1 - 1e-9) <= group["effective_lr"] <= high * (1 + 1e-9) for group in opt.param_groups)


@pytest.mark.parametrize("meta", METAS)
def test_a_bound_above_what_the_schedule_says_now(meta: str) -> None:
    """Bounds are for the tuned learning rate, schedule apart: a schedule still ends at zero."""
    task = TASKS[0]
    model, data = made(task), task.batches(8)
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.02), loss, tune={"lr": apo.Tune(low=0.01)}, meta=METAS[meta])
    schedule = o.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=8)
    ratios = []
    for batch in data:
        ratios.append(opt.param_groups[0]["lr"] / 0.02)
        tuned = opt.hypers()["lr"]
        train(model, opt, [batch])
        assert opt.hypers()["lr"] >= 0.01 * (1 - 1e-9)
        if len(ratios) > 1 and opt.record[-1]["scale"] == 1.0:
            assert opt.param_groups[0]["effective_lr"] == pytest.approx(ratios[-1] * tuned, rel=1e-9)
        schedule.step()
    assert ratios[-1] == pytest.approx(0.125)
    assert opt.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("by", ["global", "group", "layer"])
@pytest.mark.parametrize("meta", METAS)
def test_a_group_at_zero_knows_no_bounds(by: str, meta: str) -> None:
    task = TASKS[1]
    model = made(task)
    still = [p.detach().clone() for p in halves(model)[1]["params"]]
    base = o.AdamW(halves(model, lr=0.0), lr=1e-4)
    opt = apo.APO(model, base, loss, tune={"lr": apo.Tune(by, low=1e-3, high=1e-2)}, meta=METAS[meta])
    train(model, opt, task.batches(3))
    assert all(torch.equal(a, b) for a, b in zip(still, halves(model)[1]["params"], strict=True))
    assert opt.param_groups[1]["effective_lr"] == 0.0
    assert 1e-3 * (1 - 1e-9) <= opt.param_groups[0]["effective_lr"] <= 1e-2 * (1 + 1e-9)


@pytest.mark.parametrize("meta", METAS)
def test_bounds_of_other_hyperparameters(meta: str) -> None:
    """Moved from outside to the nearest bound, and kept within."""
    task = TASKS[2]
    model = made(task)
    tune = {
        "lr": "global",
        "eps": apo.Tune(low=1e-7, high=1e-5),
        "weight_decay": apo.Tune("layer", low=0.02, high=0.2, max_change=1.5),
    }
    opt = apo.APO(model, apo.adamw(lr=1e-3, eps=1e-8, weight_decay=0.5), loss, tune=tune, meta=METAS[meta])
    assert opt.hypers()["eps"] == pytest.approx(1e-7, rel=1e-9)
    train(model, opt, task.batches(4))
    assert len(opt.record) == 4
    for label in opt.hypers():
        low, high = {"eps": (1e-7, 1e-5), "weight_decay": (0.02, 0.2)}.get(label.partition("/")[0], (0.0, math.inf))
        assert all(low * (1 - 1e-9) <= value <= high * (1 + 1e-9) for value in opt.record.column(label))
