"""Under Accelerate a run is, bit for bit, that of a plain loop; it resumes, and its trackers show the learning rate."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo
from apo.integrations.logs import to_log
from tests.shell.helpers import everything
from tests.training.models import TASKS, Task, images, loss, made

accelerate = pytest.importorskip("accelerate", reason="needs the extra apo[transformers]")
from accelerate.tracking import GeneralTracker, on_main_process  # noqa: E402

NEWTON = apo.Newton(every=3)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    """Accelerate's settings are those of the process: forget them."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Kept(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory = "kept", False

    def __init__(self) -> None:
        super().__init__()
        self.values: list[dict[str, float]] = []

    @property
    def tracker(self) -> list[dict[str, float]]:
        return self.values

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """There is none."""

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.values.append(values)


def wrapped(model: nn.Module, **options: Any) -> apo.APO:
    return apo.APO(model, torch.optim.AdamW(model.parameters(), lr=1e-3), meta=NEWTON, **options)


def warm_up(opt: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=4)


class Run:
    """A model, an optimizer, a schedule and batches, prepared."""

    def __init__(self, task: Task, **options: Any) -> None:
        self.kept = Kept()
        self.accelerator = accelerate.Accelerator(cpu=True, log_with=self.kept, **options)
        self.accelerator.init_trackers("run")
        batches = task.batches(9)
        data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        loader = torch.utils.data.DataLoader(data, batch_size=8, generator=torch.Generator())
        model = made(task)
        self.opt = wrapped(model, loss=loss)
        prepared = self.accelerator.prepare(model, self.opt, loader, warm_up(self.opt))
        self.model, self.stepper, self.loader, self.schedule = prepared

    def epoch(self) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss(self.model(x), y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.opt.feed((x, y))
                self.stepper.step()
                self.schedule.step()
                self.stepper.zero_grad()
            self.accelerator.log(to_log(self.opt))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize(("accumulated", "precision"), [(1, "no"), (4, "bf16")])
def test_a_run_is_that_of_a_plain_loop(task: Task, accumulated: int, precision: str) -> None:
    """Of 9 batches accumulated by 4 the last stands alone; Accelerate divides its loss by 4 all the same."""

    def forward(model: nn.Module, batch: Any) -> Tensor:
        bf16 = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with bf16:
            return model(batch[0]).float()

    run = Run(task, gradient_accumulation_steps=accumulated, mixed_precision=precision)
    run.epoch()
    other = made(task)
    opt = wrapped(other, loss=loss, forward=forward)
    schedule = warm_up(opt)
    for number, batch in enumerate(task.batches(9), start=1):
        (loss(forward(other, batch), batch[1]) / accumulated).backward()
        opt.feed(batch)
        if number % accumulated == 0 or number == 9:
            nn.utils.clip_grad_norm_(other.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
    # Where forward= is the user's, the loss at the start of a step is evaluated anew.
    rows, others = ([{**row, "evaluations": None} for row in found.record] for found in (run.opt, opt))
    assert rows == others and rows
    assert everything(run.model, run.opt) == everything(other, opt)


def test_a_saved_state_resumes_exactly(tmp_path: Path) -> None:
    task = TASKS[0]
    whole = Run(task, gradient_accumulation_steps=2)
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    before = len(whole.opt.record.rows)
    whole.epoch()
    rest = Run(task, gradient_accumulation_steps=2)
    rest.accelerator.load_state(str(tmp_path))
    rest.epoch()
    assert 0 < len(rest.opt.record.rows) and rest.opt.record.rows == whole.opt.record.rows[before:]
    assert everything(rest.model, rest.opt) == everything(whole.model, whole.opt)


def test_trackers_show_the_learning_rate() -> None:
    run = Run(TASKS[0])
    run.epoch()
    tuned, used = ([values[name] for values in run.kept.values] for name in ("apo/lr", "apo/effective_lr"))
    assert tuned[::3] == [row["lr"] for row in run.opt.record.rows] and tuned[0] != 1e-3
    assert used[1:] == pytest.approx([lr * min(1.0, 0.1 + 0.225 * i) for i, lr in enumerate(tuned[:-1], start=1)])


def test_several_groups_are_logged_apart() -> None:
    model = made(TASKS[0])
    groups = [{"params": list(model.stem.parameters()), "lr": 1e-4}, {"params": list(model.head.parameters())}]
    opt = apo.APO(model, torch.optim.SGD(groups, lr=1e-2), loss=loss)
    batch = images(1)[0]
    loss(model(batch[0]), batch[1]).backward()
    opt.step(batch=batch)
    logged = to_log(opt, "tuned")
    assert list(logged) == ["tuned/effective_lr/0", "tuned/effective_lr/1", "tuned/lr/0", "tuned/lr/1"]
    assert logged["tuned/effective_lr/1"] == pytest.approx(100 * logged["tuned/effective_lr/0"])
