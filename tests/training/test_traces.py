"""A meta-step of any kind leaves a model as found, but for the step; an error leaves all of it, or all but that."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import apo
from tests.cases import bits
from tests.shell.helpers import state, weights
from tests.training.models import TASKS, Batch, Task, loss, made
from tests.training.odd import Odd, found

o = torch.optim
every_task = pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
pytestmark = pytest.mark.filterwarnings("ignore:these take the plain gradient step")


class Kind(NamedTuple):
    """A kind of meta-step: the base, the shell's options, steps before it, and a factor on its gradient."""

    name: str
    base: Callable[[nn.Module], Any]
    options: dict[str, Any]
    before: int = 2
    factor: float = 1.0


def adamw(model: nn.Module) -> o.Optimizer:
    return o.AdamW(model.parameters(), lr=1e-3)


def sgd(model: nn.Module) -> o.Optimizer:
    return o.SGD(model.parameters(), lr=1e-2)


STEADY = apo.Newton(every=1, search=False)
FSD = apo.Proximal(fsd=0.1)
KINDS = [
    Kind("search", lambda m: o.AdamW(m.parameters(), lr=1e-6), {"meta": apo.Newton(every=1)}, before=0),
    Kind("ordinary", sgd, {"meta": STEADY}),
    Kind("swapped", adamw, {"meta": STEADY}),
    Kind("fsd", sgd, {"meta": STEADY, "objective": FSD}),
    Kind("layers", adamw, {"meta": apo.Gradient(o.Adam, lr=0.1, every=1), "tune": {"lr": "layer"}, "objective": FSD}),
    Kind("rule", lambda m: apo.rmsprop(), {"meta": "paper", "tune": {"lr": "parameter", "rho": "global"}}),
    Kind("backtrack", sgd, {"meta": apo.Newton(every=1, search=False)}, before=3, factor=-1e4),
    Kind("guard", lambda m: apo.kfac(m, lr=1e-2, damping=0.1), {"meta": apo.Newton(every=10, search=False)}),
    Kind("curvature", lambda m: apo.kfac(m, lr=1e-2, damping=0.1), {"tune": {}}),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])


def ready(task: Task, kind: Kind, odd: bool = True) -> tuple[nn.Module, apo.APO, Batch]:
    """A run up to the backward of the step in question."""
    model = made(task)
    if task.name == "resnet":
        model.blocks[0].body[1].eval()  # frozen statistics
    model = Odd(model) if odd else model
    opt = apo.APO(model, kind.base(model), loss, **kind.options)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    *earlier, batch = task.batches(kind.before + 1)
    for x, y in earlier:
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step(batch=(x, y))
    opt.zero_grad()
    (kind.factor * loss(model(batch[0]), batch[1])).backward()
    return model, opt, batch


@every_kind
@every_task
def test_a_meta_step_leaves_everything_but_the_weights_as_found(task: Task, kind: Kind) -> None:
    model, opt, batch = ready(task, kind)
    rows, before, old = len(opt.record), found(model), weights(model)
    opt.step(batch=batch)
    assert found(model) == before
    assert weights(model) != old
    row = opt.record[-1] if len(opt.record) > rows else None
    assert (row is None) == (kind.name in ("guard", "curvature"))
    if row is not None:
        assert (row["evaluations"] > 2.0) == (kind.name in ("search", "backtrack"))
        assert (row["fsd"] > 0.0) == ("objective" in kind.options)
    if kind.name == "backtrack":
        assert row["scale"] < 1.0
    assert len(model.history) == kind.before + 1


FALLIBLE = [kind for kind in KINDS if kind.name in ("search", "swapped", "fsd", "backtrack", "guard", "curvature")]
PAIRS = [(FALLIBLE[0], TASKS[1]), (FALLIBLE[0], TASKS[2]), *((kind, TASKS[i % 3]) for i, kind in enumerate(FALLIBLE))]


@pytest.mark.parametrize(("kind", "task"), PAIRS, ids=lambda part: part.name)
def test_an_error_leaves_everything_or_everything_but_the_step(task: Task, kind: Kind) -> None:
    """Whichever of the evaluations of a meta-step it is that fails."""
    model, opt, batch = ready(task, kind)
    if kind.name != "search":  # whose step is taken at the learning rate that is found
        opt.freeze()
    opt.step(batch=batch)
    stepped = weights(model), state(model, [opt])
    count = 0
    while True:
        count += 1 + count // 3
        model, opt, batch = ready(task, kind)
        hypers, before = opt.hypers(), found(model)
        old = weights(model), state(model, [opt])
        steps = opt._counts.steps
        model.fuse.left = count
        try:
            opt.step(batch=batch)
        except RuntimeError as error:
            assert str(error) == "trapped"
        else:
            break
        model.fuse.left = 0
        assert found(model) == before, count
        committed = opt._counts.steps > steps
        assert (weights(model), state(model, [opt])) == (stepped if committed else old), count
        assert kind.name == "search" or opt.hypers() == hypers
    assert count > 1, "something failed"


@pytest.mark.parametrize("how", ["nothing", "judged"])
@pytest.mark.parametrize("base", [adamw, lambda m: o.SGD(m.parameters(), lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
@every_task
def test_training_is_the_bare_optimizers(task: Task, base: Any, how: str) -> None:
    """Bit for bit, with nothing tuned, and judged at every other step by a meta-optimizer that moves nothing."""
    still = apo.Gradient(o.SGD, lr=0.0, every=2)
    options: dict[str, Any] = {"tune": {}} if how == "nothing" else {"meta": still, "objective": apo.Proximal(fsd=0.1)}
    runs = []
    for shelled in (False, True):
        model = made(task)
        opt = base(model)
        opt = apo.APO(model, opt, loss, **options) if shelled else opt
        torch.manual_seed(1)
        run = []
        for x, y in task.batches(12):
            opt.zero_grad()
            value = loss(model(x), y)
            value.backward()
            opt.step(batch=(x, y)) if shelled else opt.step()
            run.append([value.item(), weights(model), [bits(b) for b in model.buffers()], bits(torch.get_rng_state())])
        runs.append(run)
    assert runs[0] == runs[1]
    assert len(opt.record) == (6 if how == "judged" else 0)
