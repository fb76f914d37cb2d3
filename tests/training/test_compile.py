"""`torch.compile`: models and steps that are compiled give the same numbers, whatever the learning rate does."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import Batch, batches, net, o, weights
from tests.training.models import TASKS, Task, loss, made

Loss = Callable[[Tensor, Tensor], Tensor]
EAGER = {"backend": "aot_eager"}
# What torch itself warns of while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled is left over."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tuned(
    model: nn.Module, forward: nn.Module, opt: apo.APO, loss: Loss, data: list[Batch], feeds: int = 1
) -> list[Any]:
    """A training run with two warm meta-steps, after which nothing may be compiled any more: what it comes to."""
    losses = []
    for step in range(len(data) // feeds):
        warm = torch.compiler.set_stance("fail_on_recompile") if step > 4 else contextlib.nullcontext()
        with warm:
            opt.zero_grad()
            for x, y in data[step * feeds : (step + 1) * feeds]:
                part = loss(forward(x), y) / feeds
                part.backward()
                losses.append(part.item())
                opt.feed((x, y))
            opt.step()
    assert len(set(opt.record.rates[0])) > 3
    return [losses, weights(model), opt.record.rows, opt.hypers(), opt.state_dict()["param_groups"]]


def run(task: Task, compiled: str, feeds: int = 1, **options: Any) -> list[Any]:
    model = made(task)
    before = torch.compile(model, **EAGER, **options) if compiled == "before" else model
    base = o.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    opt = apo.APO(before, base, loss, tune={"lr": "layer"}, meta=apo.Newton(every=2), objective=apo.Proximal(fsd=0.1))
    if compiled == "in place":
        model.compile(**EAGER, **options)
    forward = torch.compile(model, **EAGER, **options) if compiled == "after" else before
    return tuned(model, forward, opt, loss, task.batches(8 * feeds), feeds)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_compiled_model_gives_the_numbers_of_an_eager_one(task: Task) -> None:
    """Compiled before the wrapping, after it, or in place; the names of layers are those of the model."""
    feeds, others = (3, ("after", "in place")) if task.name == "resnet" else (1, ())
    eager = run(task, "not", feeds)
    options = {"fullgraph": True} if task.name != "lstm" else {}  # torch breaks the graph at an LSTM itself
    assert run(task, "before", feeds, **options) == eager
    for compiled in others:
        assert run(task, compiled, feeds) == eager


def test_a_whole_graph_is_compiled_before_the_wrapping() -> None:
    """Afterwards the model has our hook, and torch says where the graph breaks: nothing is lost silently."""
    for compiled in ("after", "in place"):
        with pytest.raises(RuntimeError, match=r"recorder.py"):
            run(TASKS[1], compiled, fullgraph=True)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def stepped(make: Callable[[nn.Module], Any]) -> list[Any]:
    model = plain()
    opt = apo.APO(model, make(model), F.cross_entropy, meta=apo.Newton(every=2))
    scheduler = o.lr_scheduler.CosineAnnealingLR(opt, 20)
    opt.register_step_post_hook(lambda *_: scheduler.step())
    return tuned(model, model, opt, F.cross_entropy, batches(9))


def step_compiled(base: o.Optimizer) -> o.Optimizer:
    base.step = torch.compile(base.step, **EAGER)  # type: ignore[method-assign]
    return base


def test_a_compiled_step_of_a_torch_optimizer() -> None:
    """With its lr as a tensor, which is written into: a schedule and the tuning compile nothing anew."""

    def adamw(model: nn.Module) -> o.Optimizer:
        return o.AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)

    eager, compiled = stepped(adamw), stepped(lambda model: step_compiled(adamw(model)))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[3] == pytest.approx(eager[3], rel=1e-4)


def test_a_compiled_rule() -> None:
    rule = apo.rmsprop(lr=1e-2)
    eager = stepped(lambda model: rule)
    compiled = stepped(lambda model: rule._replace(step=torch.compile(rule.step, **EAGER)))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[3] == pytest.approx(eager[3], rel=1e-4)


def test_kfac_measures_the_curvature_of_a_compiled_model() -> None:
    ends = []
    for compiled in (False, True):
        model = net(dropout=0.0)
        forward = torch.compile(model, **EAGER) if compiled else model
        opt = apo.APO(forward, apo.kfac(forward, lr=1e-2, fisher="exact"), F.cross_entropy, meta=apo.Newton(every=2))
        ends.append(tuned(model, forward, opt, F.cross_entropy, batches(8)))
    assert ends[0] == ends[1]
