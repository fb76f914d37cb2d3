"""A module for Lightning that logs, three ways to say what is judged, and a quiet trainer."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.training.models import ResNet, images

pl = pytest.importorskip("lightning.pytorch", reason="needs the extra apo[lightning]")
from apo.integrations.lightning import APOCallback, training_step  # noqa: E402

THEIRS = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]
"""Warnings of Lightning's own."""
NEWTON = apo.Newton(every=3)
BATCHES = images(8)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-4)


class Classifier(pl.LightningModule):
    """A ResNet; three ways to say what is judged."""

    def __init__(self, wrap: Callable[[Any], apo.APO], warm_up: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.wrap, self.warm_up = ResNet(dropout), wrap, warm_up

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        self.opt = self.wrap(self)
        if not self.warm_up:
            return self.opt
        schedule = torch.optim.lr_scheduler.LinearLR(self.opt, 0.1, total_iters=5)
        return {"optimizer": self.opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def inner(module: Any) -> apo.APO:
    return apo.APO(module.net, adamw(module), loss=F.cross_entropy, meta=NEWTON)


def whole(module: Any) -> apo.APO:
    return apo.APO(module, adamw(module), loss=F.cross_entropy, meta=NEWTON)


def stepwise(module: Any) -> apo.APO:
    return apo.APO(module, adamw(module), evaluate=training_step, meta=NEWTON)


def curvature(module: Any) -> apo.APO:
    rule = apo.kfac(module, lr=1e-2, fisher="empirical")
    return apo.APO(module, rule, loss=F.cross_entropy, meta=NEWTON)


def trainer(folder: Path, **options: Any) -> Any:
    kept = {"callbacks": [APOCallback()], "max_epochs": 2, "enable_checkpointing": False, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    logger = pl.loggers.CSVLogger(folder)
    return pl.Trainer(default_root_dir=folder, logger=logger, **{**quiet, **kept, **options})


def loader() -> Any:
    return torch.utils.data.DataLoader(BATCHES, batch_size=None, generator=torch.Generator())


def logged(run: Any, name: str) -> list[float]:
    run.logger.save()
    with (Path(run.logger.log_dir) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
