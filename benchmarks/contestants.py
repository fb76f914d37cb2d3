"""Who is timed: Adam as it is, Adam tuned by apo, and the packages that users would take instead, all on Adam.

A contestant is made for a model and takes one batch a call. Its name says how often it moves the learning rate
(`every`), and with which discrepancy (`λ`: on a whole B' if nothing else is said).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

import apo
from baselines.config import Config
from baselines.methods import METHODS
from benchmarks.tasks import Batch, Task

Step = Callable[[Batch], None]
Make = Callable[[nn.Module, Task], Step]
LR: Final = 1e-4  # so small that no model leaves its beginning, where all have the same arithmetic to do
BARE: Final = "Adam (torch)"


class Contestant(NamedTuple):
    """One that is timed.

    Attributes:
        make: What takes a batch, for a model on a task.
        every: How often it does more than a plain step; blocks are a multiple of it.
        peer: Whether it is another package.
    """

    make: Make
    every: int = 1
    peer: bool = False


def plain(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task, *, create_graph: bool = False) -> Step:
    """Forward, backward and step of an optimizer of torch's kind."""

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        task.loss(model(batch[0]), batch[1]).backward(create_graph=create_graph)
        optimizer.step()

    return step


def fed(opt: apo.APO, model: nn.Module, task: Task) -> Step:
    """The same under `apo.APO`, which is given the batch."""

    def step(batch: Batch) -> None:
        opt.zero_grad()
        task.loss(model(batch[0]), batch[1]).backward()
        opt.step(batch=batch)

    return step


def bare(model: nn.Module, task: Task) -> Step:
    """Adam of torch, in its default implementation."""
    return plain(torch.optim.Adam(model.parameters(), lr=LR), model, task)


def tuned(
    model: nn.Module,
    task: Task,
    *,
    rule: bool = False,
    every: int = 10,
    meta: apo.Newton | apo.Gradient | None = None,
    tune: dict[str, str] | None = None,
    **objective: Any,
) -> Step:
    """Adam, of torch or our own rule, under `apo.APO`.

    Args:
        model: What is trained.
        task: On what.
        rule: Whether by our own rule.
        every: Steps between meta-steps.
        meta: What moves the learning rate; None: `apo.Newton`.
        tune: What is tuned; None: the default.
        objective: Fields of `apo.Proximal`.
    """
    base: Any = apo.adam(lr=LR) if rule else torch.optim.Adam(model.parameters(), lr=LR)
    meta = meta or apo.Newton(every=every, search=False)
    return fed(apo.APO(model, base, task.loss, objective=apo.Proximal(**objective), tune=tune, meta=meta), model, task)


def _log_rate() -> tuple[Tensor, torch.optim.Optimizer]:
    """The logarithm of a learning rate, and what moves it, where a package only differentiates."""
    rate = torch.tensor(math.log(LR), requires_grad=True)
    return rate, torch.optim.Adam([rate], lr=0.01)


def by_higher(model: nn.Module, task: Task, *, every: int) -> Step:
    """`higher` differentiates one step of Adam by the learning rate, on a copy of the model; torch takes the step."""
    import higher

    rate, meta = _log_rate()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    base, steps = plain(optimizer, model, task), count()

    def step(batch: Batch) -> None:
        if next(steps) % every == 0:
            options = {"override": {"lr": [rate.exp()]}, "copy_initial_weights": True}
            with higher.innerloop_ctx(model, optimizer, **options) as (copy, functional):
                functional.step(task.loss(copy(batch[0]), batch[1]))
                (rate.grad,) = torch.autograd.grad(task.loss(copy(batch[0]), batch[1]), rate)
            meta.step()
            optimizer.param_groups[0]["lr"] = rate.exp().item()
        base(batch)

    return step


def by_torchopt(model: nn.Module, task: Task, *, every: int) -> Step:
    """TorchOpt's `MetaAdam` takes every step; its graph is kept for those that are judged, and cut after them."""
    import torchopt

    rate, meta = _log_rate()
    optimizer = torchopt.MetaAdam(model, lr=lambda _: rate.exp())
    steps = count()

    def step(batch: Batch) -> None:
        due = next(steps) % every == 0
        optimizer.step(task.loss(model(batch[0]), batch[1]))
        if due:
            (rate.grad,) = torch.autograd.grad(task.loss(model(batch[0]), batch[1]), rate)
            meta.step()
        torchopt.stop_gradient(model)
        torchopt.stop_gradient(optimizer)

    return step


def by_gdtuo(model: nn.Module, task: Task, *, every: int) -> Step:
    """Gdtuo's Adam under SGD; between its hypergradients the backward keeps no graph."""
    from gradient_descent_the_ultimate_optimizer import gdtuo

    wrapper = gdtuo.ModuleWrapper(model, optimizer=gdtuo.Adam(alpha=LR, optimizer=gdtuo.SGD(1e-9)))
    wrapper.initialize()
    steps = count()

    def step(batch: Batch) -> None:
        wrapper.begin()
        wrapper.zero_grad()
        loss = task.loss(model(batch[0]), batch[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
            loss.backward(create_graph=next(steps) % every == 0)
        wrapper.step()

    return step


def by_method(model: nn.Module, task: Task, *, method: str, optimizer: str = "adam") -> Step:
    """A comparator of `baselines`, as it is there."""
    taken = METHODS[method].make(model, Config(method=method, optimizer=optimizer))
    taken.loss = task.loss

    def step(batch: Batch) -> None:
        taken.step(batch, 0.5)

    return step


def _of_apo() -> Iterator[tuple[str, Contestant]]:
    for base, rule in (("torch's", False), ("our rule", True)):
        for every in (1, 5, 10, 100):
            yield f"apo, {base}, every {every}", Contestant(partial(tuned, rule=rule, every=every), every)
    losses, gradients = (apo.Newton(curvature=how, search=False) for how in ("losses", "gradients"))
    judged: dict[str, dict[str, Any]] = {
        "by losses": {"meta": losses},
        "by losses, λ = 0.1": {"meta": losses, "fsd": 0.1, "other_fraction": 1.0},
        "by losses, λ = 0.1 on a half of B'": {"fsd": 0.1},  # the default
        "λ = 0.1": {"meta": gradients, "fsd": 0.1},
        "λ = 0.1 on a quarter of B'": {"meta": gradients, "fsd": 0.1, "other_fraction": 0.25},
        "λ = 0.1, linear loss": {"meta": gradients, "fsd": 0.1, "loss_model": "linear"},
    }
    for name, options in judged.items():
        yield f"apo, torch's, every 10, {name}", Contestant(partial(tuned, **options), 10)
    paper = apo.Gradient(torch.optim.RMSprop, lr=0.1, every=10)
    yield "apo, our rule, every 10, paper's", Contestant(partial(tuned, rule=True, meta=paper), 10)
    by_layer: dict[str, Any] = {"rule": True, "meta": paper, "tune": {"lr": "parameter"}}
    yield "apo, our rule, every 10, paper's by parameter", Contestant(partial(tuned, **by_layer), 10)


CONTESTANTS: Final[dict[str, Contestant]] = {
    BARE: Contestant(bare),
    "Adam (our rule), untuned": Contestant(partial(tuned, rule=True, tune={})),
    **dict(_of_apo()),
    "higher, every 1": Contestant(partial(by_higher, every=1), 1, True),
    "higher, every 10": Contestant(partial(by_higher, every=10), 10, True),
    "TorchOpt, every 1": Contestant(partial(by_torchopt, every=1), 1, True),
    "TorchOpt, every 10": Contestant(partial(by_torchopt, every=10), 10, True),
    "gdtuo, every 1": Contestant(partial(by_gdtuo, every=1), 1, True),
    "gdtuo, every 10": Contestant(partial(by_gdtuo, every=10), 10, True),
    "Prodigy": Contestant(partial(by_method, method="prodigy"), 1, True),
    "D-Adaptation": Contestant(partial(by_method, method="dadapt"), 1, True),
    "schedule-free": Contestant(partial(by_method, method="schedule-free", optimizer="adamw"), 1, True),
    "GeN, every 10": Contestant(partial(by_method, method="gen"), 10, True),
}
