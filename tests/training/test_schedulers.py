"""Every scheduler on top: its numbers stay its own, and the step takes them times the factor that is learned."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as s
from torch.optim.swa_utils import SWALR

import apo
from tests.shell.helpers import batches, matrices, net, o, train, vectors, weights
from tests.training.models import TASKS, Task, loss, made

STEPS, BREAK = 13, 5
Optimizer = torch.optim.Optimizer


class Plateau:
    """ReduceLROnPlateau, told losses that rise."""

    def __init__(self, opt: Optimizer) -> None:
        self.inner, self.loss = s.ReduceLROnPlateau(opt, factor=0.5, patience=1), 0.0

    def step(self) -> None:
        self.loss += 1.0
        self.inner.step(self.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, **self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = state.pop("loss")
        self.inner.load_state_dict(state)


def one_cycle(opt: Optimizer) -> s.OneCycleLR:
    return s.OneCycleLR(opt, max_lr=0.05, total_steps=STEPS, cycle_momentum=cycles(opt))


def cyclic(opt: Optimizer) -> s.CyclicLR:
    return s.CyclicLR(opt, 0.0, 0.05, step_size_up=4, cycle_momentum=cycles(opt))


def cycles(opt: Optimizer) -> bool:
    """Whether the scheduler can cycle the momentum."""
    return "momentum" in opt.defaults or "betas" in opt.defaults


def sequential(opt: Optimizer) -> s.SequentialLR:
    return s.SequentialLR(opt, [s.LinearLR(opt, 0.1, total_iters=4), s.CosineAnnealingLR(opt, 8)], milestones=[4])


def chained(opt: Optimizer) -> s.ChainedScheduler:
    return s.ChainedScheduler([s.ConstantLR(opt, 0.1, total_iters=3), s.ExponentialLR(opt, 0.9)], opt)


def warmed(opt: Optimizer) -> s.LRScheduler:
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(opt, 3, STEPS - 1)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda opt: s.LambdaLR(opt, lambda step: step / 5),
    "MultiplicativeLR": lambda opt: s.MultiplicativeLR(opt, lambda step: 0.8),
    "StepLR": lambda opt: s.StepLR(opt, 3),
    "MultiStepLR": lambda opt: s.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: s.ConstantLR(opt, 0.1, total_iters=4),
    "LinearLR": lambda opt: s.LinearLR(opt, 1 / 3, 0.0, total_iters=STEPS - 5),
    "ExponentialLR": lambda opt: s.ExponentialLR(opt, 0.7),
    "PolynomialLR": lambda opt: s.PolynomialLR(opt, STEPS - 3, 2.0),
    "CosineAnnealingLR": lambda opt: s.CosineAnnealingLR(opt, STEPS - 1),
    "CosineAnnealingWarmRestarts": lambda opt: s.CosineAnnealingWarmRestarts(opt, 4),
    "ReduceLROnPlateau": Plateau,
    "CyclicLR": cyclic,
    "OneCycleLR": one_cycle,
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.02, anneal_epochs=5),
    "get_linear_schedule_with_warmup": warmed,
}

BASES: dict[str, Callable[[nn.Module], Any]] = {
    "adamw": lambda model: o.AdamW(model.parameters(), lr=1e-2),
    "tensor-lr": lambda model: o.AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda model: o.SGD([{"params": [p], "lr": 0.05 / (1 + p.ndim)} for p in model.parameters()], momentum=0.9),
    "list": lambda model: [o.AdamW(matrices(model), lr=1e-2), o.NAdam(vectors(model), lr=1e-3)],
    "rule": lambda model: apo.rmsprop(lr=1e-2),
}
META = apo.Newton(every=3)


def test_every_scheduler_of_torch_has_a_row() -> None:
    own = {name for name, cls in inspect.getmembers(s, inspect.isclass) if issubclass(cls, s.LRScheduler)}
    assert own - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys() - {"SWALR", "get_linear_schedule_with_warmup"}


def numbers(opt: Optimizer) -> list[dict[str, Any]]:
    """What a scheduler may write into a group, as floats."""
    names = ("lr", "initial_lr", "max_lr", "momentum", "betas")
    return [{n: float(g[n]) if n == "lr" else g[n] for n in names if n in g} for g in opt.param_groups]


class Run:
    """A model in training under a scheduler made for the shell, or for its base before or after wrapping."""

    def __init__(self, task: Task, base: Callable[[nn.Module], Any], scheduler: Callable[[Optimizer], Any], where: str):
        self.model = made(task)
        inner = base(self.model)
        self.scheduler = scheduler(inner) if where == "before" else None
        self.opt = apo.APO(self.model, inner, loss, meta=META)
        self.scheduler = self.scheduler or scheduler(inner if where == "base" else self.opt)

    def steps(self, data: Any) -> Iterator[list[dict[str, Any]]]:
        """Train; the groups' numbers before each step."""
        for batch in data:
            before, factors = numbers(self.opt), [group["lr_factor"] for group in self.opt.param_groups]
            self.opt.zero_grad()
            loss(self.model(batch[0]), batch[1]).backward()
            rows = len(self.opt.record)
            self.opt.step(batch=batch)
            assert numbers(self.opt) == before, "the scheduler's numbers stay its own"
            judged = len(self.opt.record) > rows
            searched = rows == 0 or (judged and self.opt.record[-1]["scale"] != 1.0)
            for group, number, factor in zip(self.opt.param_groups, before, factors, strict=True):
                factor = self.opt.record[-1]["scale"] * factor if judged and searched else factor
                scheduled = number["lr"] if abs(number["lr"]) > 1e-15 else 0.0  # LinearLR's rounding where it ends at 0
                assert group["effective_lr"] == pytest.approx(scheduled * factor, rel=1e-9)
                assert type(group["effective_lr"]) is type(group["lr_factor"]) is float
                assert group["effective_lr"] == scheduled * factor or (judged and searched)
            self.scheduler.step()
            yield before


WRITING = ("LambdaLR", "LinearLR", "CyclicLR", "SWALR", "OneCycleLR", "SequentialLR")
"""Those that write into the groups as they are made, so that it matters for whom, and whether before the wrapping."""
CASES = [
    *((name, TASKS[i % 3], list(BASES)[i % 5], "shell") for i, name in enumerate(SCHEDULERS)),
    *((name, TASKS[2], "adamw", ["before", "base"][i % 2]) for i, name in enumerate(WRITING)),
    *((name, TASKS[2], base, "shell") for name in ("OneCycleLR", "CyclicLR") for base in ("adamw", "sgd", "list")),
]


@pytest.mark.parametrize(("name", "task", "base", "where"), CASES, ids=lambda part: getattr(part, "name", part))
def test_a_schedulers_path_is_that_over_the_bare_optimizer(name: str, task: Task, base: str, where: str) -> None:
    """Bit for bit, learning rates and cycled momenta, on all kinds of bases; effective = scheduled × learned.

    From a checkpoint, weights, learning rates, momenta and the tuning go on as if nothing had happened.
    """
    run, data, path = Run(task, BASES[base], SCHEDULERS[name], where), task.batches(STEPS), []
    twin = made(task)
    lonely = BASES[base](twin)
    lonely = lonely if isinstance(lonely, Optimizer) else apo.APO(twin, lonely, loss, tune={})
    scheduler = SCHEDULERS[name](lonely)
    for step, before in enumerate(run.steps(data), 1):
        path.append(before)
        assert before == numbers(lonely)
        lonely.step()
        scheduler.step()
        if step == BREAK:
            saved = copy.deepcopy([part.state_dict() for part in (run.model, run.opt, run.scheduler)])
            random = torch.get_rng_state()
    assert numbers(run.opt) == numbers(lonely)
    assert len(run.opt.record) >= 3
    assert run.opt.param_groups[0]["lr_factor"] != 1.0
    if where != "shell":
        return
    other = Run(task, BASES[base], SCHEDULERS[name], where)
    for part, state in zip((other.model, other.opt, other.scheduler), saved, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    assert list(other.steps(data[BREAK:])) == path[BREAK:]
    assert weights(other.model) == weights(run.model)
    assert (other.opt.hypers(), numbers(other.opt)) == (run.opt.hypers(), numbers(run.opt))


@pytest.mark.parametrize("start", [0.7, 1 / 3])
def test_a_schedule_that_ends_at_zero_ends_the_training(start: float) -> None:
    """Also where rounding leaves something on either side of it: the weights stay, and so does what is tuned."""
    model = net()
    opt = apo.APO(model, o.SGD(model.parameters(), lr=0.1), F.cross_entropy, meta=apo.Newton(every=1))
    scheduler = s.LinearLR(opt, start, 0.0, total_iters=3)
    for batch in batches(3):
        train(model, opt, [batch])
        scheduler.step()
    assert 0.0 < abs(opt.param_groups[0]["lr"]) < 1e-16
    assert (opt.param_groups[0]["lr"] < 0.0) == (start == 0.7)
    before, tuned = weights(model), opt.hypers()
    train(model, opt, batches(3))
    assert (weights(model), opt.hypers()) == (before, tuned)
    assert opt.param_groups[0]["effective_lr"] == 0.0
    opt.param_groups[0]["lr"] = -1e-3
    with pytest.raises(ValueError, match=r"lr=-0.001 is not in \[0, ∞\)"):
        train(model, opt, batches(1))


def unit(make: Callable[[Optimizer], Any], before: bool) -> list[float]:
    """The tuned learning rate of a schedule, with its tuning still at factor 1."""
    model = net()
    sgd = o.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(sgd) if before else None
    opt = apo.APO(model, sgd, F.cross_entropy, meta=apo.Newton(every=50, search=False))
    scheduler = scheduler or make(opt)
    found = []
    for batch in batches(8):
        train(model, opt, [batch])
        scheduler.step()
        found.append(opt.hypers()["lr"] / opt.param_groups[0]["lr_factor"])
    return found


def test_the_unit_of_a_schedule() -> None:
    """The number that the tuned learning rate is counted in does not move with the schedule."""
    cyclic = SCHEDULERS["CyclicLR"]
    assert unit(SCHEDULERS["StepLR"], before=False) == pytest.approx([0.1] * 8)
    assert unit(one_cycle, before=False) == unit(one_cycle, before=True) == pytest.approx([0.05] * 8)
    assert unit(cyclic, before=False) == pytest.approx([0.1] * 8)
    assert unit(cyclic, before=True)[1:] == pytest.approx([0.05 / 4] * 7)


def test_one_cycle_peaks_at_what_was_tuned() -> None:
    """Tuned at the foot of its cycle, it would peak at 25 times that."""
    model = made(TASKS[1])
    opt = apo.APO(model, o.AdamW(model.parameters(), lr=1e-3), loss, meta=apo.Newton(every=5))
    scheduler = s.OneCycleLR(opt, max_lr=1e-2, total_steps=61)
    for batch in TASKS[1].batches(60):
        opt.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)
        scheduler.step()
    assert 2e-3 < max(opt.record.rates[0]) < 5e-2
