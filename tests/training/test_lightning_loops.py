"""Lightning's other loops: several optimizers stepped by hand, batches without a loss; and misuse."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apo
from tests.shell.helpers import everything

pl = pytest.importorskip("lightning.pytorch", reason="needs the extra apo[lightning]")
from apo.integrations.lightning import training_step  # noqa: E402
from tests.training.lightning_runs import (  # noqa: E402
    BATCHES,
    NEWTON,
    THEIRS,
    Classifier,
    adamw,
    inner,
    loader,
    logged,
    trainer,
)

pytestmark = THEIRS


class Adversaries(pl.LightningModule):
    """Two optimizers, so the optimization is manual, and the batch is passed by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.maker, self.critic = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def fooled(self, maker: nn.Module, batch: Tensor) -> tuple[Tensor, None]:
        return F.softplus(-self.critic(maker(batch))).mean(), None

    def told_apart(self, critic: nn.Module, batch: Tensor) -> tuple[Tensor, None]:
        made = self.maker(batch).detach()
        return (F.softplus(critic(made)) + F.softplus(-critic(batch[:, :2]))).mean(), None

    def configure_optimizers(self) -> list[apo.APO]:
        makers, critics = adamw(self.maker), adamw(self.critic)
        self.opts = [
            apo.APO(self.maker, makers, evaluate=self.fooled, meta=NEWTON),
            apo.APO(self.critic, critics, evaluate=self.told_apart, meta=NEWTON),
        ]
        return self.opts

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        plays = [(self.maker, self.fooled), (self.critic, self.told_apart)]
        for opt, (net, loss) in zip(self.optimizers(), plays, strict=True):
            self.toggle_optimizer(opt)
            opt.zero_grad()
            self.manual_backward(loss(net, batch)[0])
            opt.step(batch=batch)
            self.untoggle_optimizer(opt)
        if batch_idx == 5:
            self.optimizers()[0].freeze()


def test_several_optimizers_are_stepped_by_hand(tmp_path: Path) -> None:
    batches = [x.flatten(1)[:, :3] for x, _ in BATCHES]
    module, other = Adversaries(), Adversaries()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    maker, critic = other.configure_optimizers()
    for number, batch in enumerate(batches):
        for opt, net, loss in ((maker, other.maker, other.fooled), (critic, other.critic, other.told_apart)):
            opt.zero_grad()
            loss(net, batch)[0].backward()
            opt.step(batch=batch)
        if number == 5:
            maker.freeze()
    assert [len(opt.record.rows) for opt in module.opts] == [2, 3]
    for mine, theirs, net, twin in zip(module.opts, (maker, critic), module.children(), other.children(), strict=True):
        net.zero_grad(), twin.zero_grad()
        assert everything(net, mine) == everything(twin, theirs)
    assert logged(run, "apo1/lr")[-1] == pytest.approx(critic.hypers()["lr"])
    assert logged(run, "apo0/lr")[-1] == pytest.approx(maker.hypers()["lr"])


def test_a_batch_without_a_loss_is_not_fed(tmp_path: Path) -> None:
    class Choosy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx in (0, 4) else super().training_step(batch, batch_idx)

    module, other = Choosy(inner), Classifier(inner)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    other.configure_optimizers()
    for batch in BATCHES[1:4] + BATCHES[5:]:
        other.opt.zero_grad()
        F.cross_entropy(other(batch[0]), batch[1]).backward()
        other.opt.step(batch=batch)
    assert module.opt.hypers() == other.opt.hypers()


def test_without_apo_the_callback_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the optimizers are AdamW: return an apo\.APO"):
        trainer(tmp_path).fit(Classifier(adamw), loader(), loader())  # type: ignore[arg-type]


def test_a_training_step_needs_the_lightning_module(tmp_path: Path) -> None:
    def wrong(module: Any) -> apo.APO:
        return apo.APO(module.net, adamw(module), evaluate=training_step)

    with pytest.raises(TypeError, match="not a ResNet"):
        trainer(tmp_path).fit(Classifier(wrong), loader(), loader())
