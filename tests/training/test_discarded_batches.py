"""A batch whose gradient has been thrown away is judged by nobody: skips of a GradScaler, guards of the user."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import apo
from tests.cases import bits
from tests.training.models import TASKS, Batch, Task, loss, made


class Judged:
    """What evaluations are given: the batches by number, and whether each has the random numbers of its forward."""

    def __init__(self, task: Task, count: int) -> None:
        self.data = task.batches(count)
        self.numbers = {id(batch): number for number, batch in enumerate(self.data)}
        self.forwards: dict[int, bytes] = {}
        self.seen: list[int] = []
        self.strays: list[int] = []

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        self.forwards[self.numbers[id(batch)]] = bits(torch.get_rng_state())
        return loss(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        number = next(n for n, own in enumerate(self.data) if own[0].data_ptr() == batch[0].data_ptr())
        self.seen.append(number)
        if self.forwards[number] != bits(torch.get_rng_state()):
            self.strays.append(number)
        outputs = model(batch[0])
        return loss(outputs, batch[1]), outputs


class Loop(SimpleNamespace):
    """A training loop with a scaler; its order of calls is what the tests vary."""

    model: nn.Module
    opt: apo.APO
    scaler: GradScaler
    judged: Judged

    def forward(self, number: int) -> Tensor:
        return self.judged.forward(self.model, self.judged.data[number])

    def backward(self, value: Tensor, bad: bool) -> None:
        self.scaler.scale(value).backward()
        if bad:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(torch.inf)

    def step(self, **options: Any) -> None:
        self.scaler.step(self.opt, **options)
        self.scaler.update()


def given_to_step(loop: Loop, number: int, bad: bool) -> None:
    loop.opt.zero_grad()
    loop.backward(loop.forward(number), bad)
    loop.step(batch=loop.judged.data[number])


def fed_after_the_backward(loop: Loop, number: int, bad: bool) -> None:
    loop.backward(loop.forward(number), bad)
    loop.opt.feed(loop.judged.data[number])
    loop.step()
    loop.opt.zero_grad(set_to_none=False)


def fed_first_and_cleared_before_the_backward(loop: Loop, number: int, bad: bool) -> None:
    loop.opt.feed(loop.judged.data[number])
    value = loop.forward(number)
    loop.opt.zero_grad()
    loop.backward(value, bad)
    loop.step()


def cleared_through_the_model(loop: Loop, number: int, bad: bool) -> None:
    loop.opt.feed(loop.judged.data[number])
    loop.backward(loop.forward(number), bad)
    loop.step()
    loop.model.zero_grad()


def never_backwarded(loop: Loop, number: int, bad: bool) -> None:
    """A guard of the user's own: a loss that is not finite has no backward."""
    loop.opt.feed(loop.judged.data[number])
    value = loop.forward(number)
    loop.opt.zero_grad()
    if not bad:
        loop.backward(value, False)
        loop.step()


def with_a_forward_aside(loop: Loop, number: int, bad: bool) -> None:
    """A metric is taken with gradients enabled."""
    loop.model(loop.judged.data[number][0])
    given_to_step(loop, number, bad)
    loop.model(loop.judged.data[number][0])


ORDERS = [
    given_to_step,
    fed_after_the_backward,
    fed_first_and_cleared_before_the_backward,
    cleared_through_the_model,
    never_backwarded,
    with_a_forward_aside,
]


def run(task: Task, order: Callable[[Loop, int, bool], None], bad: set[int], count: int, **options: Any) -> Loop:
    model, judged = made(task), Judged(task, count)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    opt = apo.APO(model, base, evaluate=judged.evaluate, **options)
    loop = Loop(model=model, opt=opt, scaler=GradScaler("cpu", init_scale=8.0), judged=judged)
    for number in range(count):
        order(loop, number, number in bad)
    return loop


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_skips_are_as_if_they_had_not_been(task: Task, order: Any) -> None:
    """Skipped: the first call, two before a meta-step, and one after it. Calls that count: 1 4 5 6 | 8 9."""
    loop = run(task, order, {0, 2, 3, 7}, 10, meta=apo.Newton(every=3, backtrack=False))
    assert [row["step"] for row in loop.opt.record.rows] == [0.0, 3.0]
    assert set(loop.judged.seen) == {1, 6}
    assert loop.judged.strays == []
    assert loop.opt.due is True


@pytest.mark.parametrize("order", ORDERS)
def test_the_other_batch_is_that_of_the_last_call_that_was_made(order: Any) -> None:
    """The call before the meta-step supplies B'; the skip between the two loses nothing."""
    meta = apo.Newton(every=4, curvature="gradients", search=False)
    loop = run(TASKS[1], order, {4, 5}, 8, meta=meta, objective=apo.Proximal(fsd=1.0))
    assert [row["step"] for row in loop.opt.record.rows] == [0.0, 4.0]
    assert loop.judged.seen == [0, 0, 0, 3, 6, 3, 6]  # the first loss at the start of a step is taken twice
    assert loop.judged.strays == []
    assert loop.opt.record.rows[-1]["without_other"] == 1.0  # the first call had none


def test_two_forwards_of_one_step_outlive_clearing_before_their_backward() -> None:
    judged = Judged(TASKS[0], 2)
    model = made(TASKS[0])
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.1), evaluate=judged.evaluate)
    values = []
    for batch in judged.data:
        opt.feed(batch)
        values.append(judged.forward(model, batch))
    opt.zero_grad()
    (sum(values) / 2).backward()
    opt.step()
    assert set(judged.seen) == {0, 1}
    assert judged.strays == []


def test_a_discarded_batch_is_released() -> None:
    model = made(TASKS[0])
    opt = apo.APO(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    for batch in TASKS[0].batches(5):
        loss(model(batch[0]), batch[1]).backward()
        opt.feed(batch)
        opt.zero_grad()
    assert opt._feeding.fed == []
    assert opt._evaluation.recorder.seen == []


class Itself(nn.Module):
    """A model whose output is its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.weight


def test_outputs_that_are_a_parameter_keep_no_hooks() -> None:
    model = Itself()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = apo.APO(model, base, evaluate=lambda m, b: ((m() - b).square().sum(), m()))
    for _ in range(3):
        opt.zero_grad()
        (model() - 2.0).square().sum().backward()
        opt.step(batch=torch.full((3,), 2.0))
    opt.freeze()
    opt.step()
    assert not model.weight._backward_hooks
