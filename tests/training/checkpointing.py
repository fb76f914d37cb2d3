"""What the tests of checkpoints share: runs of real models under the shell, with a scheduler and its random numbers."""

import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

import apo
from tests.shell.helpers import matrices, muon_and_adamw, vectors
from tests.training.models import TASKS, Batch, loss, made

o = torch.optim
TASK = {task.name: task for task in TASKS}
GRADIENT = apo.Gradient(o.Adam, lr=0.05, every=4)
NEWTON = apo.Newton(every=4)


def rule_and_torch(model: nn.Module) -> Any:
    return [(apo.rmsprop(lr=1e-2), matrices(model)), o.SGD(vectors(model), lr=0.1, momentum=0.9)]


class Case(NamedTuple):
    """A row of the table of runs."""

    name: str
    task: str
    base: Callable[[nn.Module], Any]
    options: dict[str, Any]


CASES = [
    Case("sgd", "resnet", lambda m: o.SGD(m.parameters(), lr=0.1), {"meta": NEWTON}),
    Case("sgd-momentum", "resnet", lambda m: o.SGD(m.parameters(), lr=0.05, momentum=0.9), {"meta": GRADIENT}),
    Case("adamw", "transformer", lambda m: o.AdamW(m.parameters(), lr=1e-2), {"meta": NEWTON}),
    Case("muon-adamw", "transformer", muon_and_adamw, {"meta": GRADIENT, "tune": {"lr": "layer"}}),
    Case("rule-and-torch", "lstm", rule_and_torch, {"meta": NEWTON, "tune": {"lr": "group"}}),
    Case("rule-sgd", "lstm", lambda _: apo.sgd(lr=0.1, momentum=0.9, nesterov=True), {"meta": NEWTON}),
    Case("rule-rmsprop", "lstm", lambda _: apo.rmsprop(), {"meta": NEWTON, "tune": {"lr": "global", "rho": "layer"}}),
    Case("rule-adam", "transformer", lambda _: apo.adamw(lr=1e-2), {"meta": GRADIENT, "tune": {"eps": "global"}}),
    Case("rule-apollo", "resnet", lambda _: apo.apollo(lr=0.1), {"meta": NEWTON}),
    Case("rule-quasi-adam", "lstm", lambda _: apo.quasi_adam(lr=1e-2), {"meta": NEWTON}),
    Case("rule-kfac", "resnet", lambda m: apo.kfac(m, lr=1e-2), {"meta": NEWTON, "tune": {"damping": "global"}}),
]
FSD = apo.Proximal(fsd=0.3, lookahead="step")


class Run(NamedTuple):
    """A model, its optimizer and a scheduler on it."""

    model: nn.Module
    opt: apo.APO
    scheduler: o.lr_scheduler.LRScheduler

    def train(self, data: Iterable[Batch]) -> list[float]:
        losses = []
        for batch in data:
            self.opt.zero_grad()
            value = loss(self.model(batch[0]), batch[1])
            value.backward()
            self.opt.step(batch=batch)
            self.scheduler.step()
            losses.append(value.item())
        return losses

    def checkpoint(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._asdict().items()} | {"rng": torch.get_rng_state()}

    def resume(self, saved: dict[str, Any]) -> None:
        for name, part in self._asdict().items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])


def run(case: Case, seed: int = 0, objective: apo.Proximal = FSD, **options: Any) -> Run:
    model = made(TASK[case.task], seed)
    opt = apo.APO(model, case.base(model), loss, objective=objective, **{**case.options, **options})
    return Run(model, opt, o.lr_scheduler.CosineAnnealingLR(opt, 30))


def data(case: Case, count: int) -> list[Batch]:
    return TASK[case.task].batches(count)


def through_a_file(saved: Any) -> Any:
    """What `torch.load` makes of it with weights only."""
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
