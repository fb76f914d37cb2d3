"""Under Lightning's trainer a run is, bit for bit, that of a plain loop, and its loggers show the learning rate."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import everything

pl = pytest.importorskip("lightning.pytorch", reason="needs the extra apo[lightning]")
from torchmetrics import MeanMetric, Metric, MetricCollection  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402

from apo.integrations.lightning import APOCallback  # noqa: E402
from tests.training.lightning_runs import (  # noqa: E402
    BATCHES,
    NEWTON,
    THEIRS,
    Classifier,
    adamw,
    curvature,
    inner,
    loader,
    logged,
    stepwise,
    trainer,
    whole,
)

pytestmark = THEIRS


def plain(
    module: Classifier, epochs: int = 2, accumulated: int = 1, clip: float = 0.0, bf16: bool = False
) -> Classifier:
    """The same by hand: no trainer, no callback."""
    configured = module.configure_optimizers()
    schedule = configured["lr_scheduler"]["scheduler"] if module.warm_up else None
    module.train()
    for number, batch in enumerate(BATCHES * epochs, start=1):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = F.cross_entropy(module(batch[0]), batch[1])
        (loss / accumulated).backward()
        module.opt.feed(batch)
        if number % accumulated == 0:
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            module.opt.step()
            module.opt.zero_grad()
        if schedule is not None and number % accumulated == 0:
            schedule.step()
    return module


def same(module: Classifier, other: Classifier) -> None:
    for model in (module, other):
        model.train()  # the trainer ends where it validates
        model.zero_grad()  # and clears gradients before a backward, not after the step
    # A trainer may call more than the model in a forward: the loss at the start of a step is then evaluated.
    rows, others = ([{**row, "evaluations": None} for row in found.opt.record] for found in (module, other))
    assert rows == others and len(rows) >= 2
    assert everything(module.net, module.opt) == everything(other.net, other.opt)


@pytest.mark.parametrize("wrap", [inner, whole, stepwise, curvature])
def test_a_run_is_that_of_a_plain_loop(wrap: Callable[[Any], apo.APO], tmp_path: Path) -> None:
    module = Classifier(wrap)
    trainer(tmp_path).fit(module, loader(), loader())
    same(module, plain(Classifier(wrap if wrap is curvature else inner)))


@pytest.mark.parametrize("wrap", [inner, stepwise])
def test_accumulated_clipped_scheduled_in_bfloat16(wrap: Callable[[Any], apo.APO], tmp_path: Path) -> None:
    module = Classifier(wrap, warm_up=True)
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"}
    trainer(tmp_path, **options).fit(module, loader(), loader())
    same(module, plain(Classifier(inner, warm_up=True), accumulated=2, clip=0.1, bf16=True))


class Inward(Classifier):
    """Its training step goes past its forward, where the conditions of a forward would be noted."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_training_step_is_judged_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    def by_hand(module: nn.Module, batch: Any) -> tuple[Tensor, None]:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(module.net(batch[0]), batch[1]), None

    module = Inward(stepwise)
    trainer(tmp_path, precision="bf16-mixed", max_epochs=1).fit(module, loader(), loader())
    other = Inward(lambda m: apo.APO(m, adamw(m), evaluate=by_hand, meta=NEWTON))
    other.configure_optimizers()
    for batch in BATCHES:
        other.opt.zero_grad()
        by_hand(other, batch)[0].backward()
        other.opt.step(batch=batch)
    same(module, other)


def test_loggers_show_the_learning_rate(tmp_path: Path) -> None:
    module = Classifier(inner, warm_up=True)
    run = trainer(tmp_path, callbacks=[APOCallback(), pl.callbacks.LearningRateMonitor()])
    run.fit(module, loader(), loader())
    tuned, used, scheduled = (logged(run, name) for name in ("apo/lr", "apo/effective_lr", "lr-APO"))
    assert len(tuned) == len(used) == len(scheduled) == 16
    assert tuned[0] != 1e-4 and tuned[-1] == pytest.approx(module.opt.hypers()["lr"])
    assert tuned[::3] == pytest.approx([row["lr"] for row in module.opt.record.rows])
    assert scheduled[0] == pytest.approx(1e-5) and scheduled[5:] == pytest.approx([1e-4] * 11)
    assert used[1:] == pytest.approx([lr * s / 1e-4 for lr, s in zip(tuned, scheduled[1:], strict=False)])


class Seen(Metric):
    """Sums in place, and keeps a list."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("values", [], dist_reduce_fx=None)

    def update(self, value: Tensor) -> None:
        self.total += value
        self.values.append(value)

    def compute(self) -> float:
        return self.total.item() + 100 * len(self.values)


class Measuring(Classifier):
    """Its training step keeps metrics."""

    def __init__(self, wrap: Callable[[Any], apo.APO]) -> None:
        super().__init__(wrap)
        both = {"macro": MulticlassAccuracy(4), "micro": MulticlassAccuracy(4, average="micro")}
        self.seen, self.mean, self.accuracy = Seen(), MeanMetric(), MetricCollection(both)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        outputs = self(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        self.seen.update(loss.detach())
        self.log_dict({"train_loss": self.mean(loss), **self.accuracy(outputs, batch[1])})
        return {"loss": loss}


def test_what_a_training_step_logs_and_measures_is_not_doubled(tmp_path: Path) -> None:
    seen = {}
    for wrap in (stepwise, inner):
        module = Measuring(wrap)
        run = trainer(tmp_path)
        run.fit(module, loader(), loader())
        totals = {name: value.item() for name, value in module.accuracy.compute().items()}
        seen[wrap] = [
            totals,
            module.mean.compute().item(),
            module.seen.compute(),
            logged(run, "train_loss"),
            logged(run, "micro"),
        ]
    assert seen[stepwise] == seen[inner] and len(seen[inner][-1]) == 16


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    runs = []
    for folder, epochs, resumed in (("whole", 4, None), ("half", 2, None), ("rest", 4, tmp_path / "half/last.ckpt")):
        module = Classifier(inner, warm_up=True, dropout=0.0)  # random numbers are not in Lightning's checkpoints
        keep = pl.callbacks.ModelCheckpoint(tmp_path / folder, save_last=True)
        run = trainer(tmp_path, max_epochs=epochs, callbacks=[APOCallback(), keep], enable_checkpointing=True)
        run.fit(module, loader(), loader(), ckpt_path=resumed, weights_only=resumed and True)
        runs.append(module)
    whole, half, rest = runs
    assert half.opt.record.rows + rest.opt.record.rows == whole.opt.record.rows and rest.opt.record.rows
    assert everything(rest.net, rest.opt) == everything(whole.net, whole.opt)
