"""Methods that estimate the learning rate from distances travelled, by their authors' packages.

Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101; prodigyopt), D-Adaptation (Defazio & Mishchenko 2023, arXiv
2301.07733; dadaptation) and DoG (Ivgi et al. 2023, arXiv 2302.12022; dog-optimizer), each with its authors' defaults.
`lr` is a factor on the estimate, and 1 is what the authors recommend.
"""

import io
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from baselines.comparators.contract import Batch, OptimizerMethod, batch_normalises, put_back
from baselines.optimizers import weight_decay

if TYPE_CHECKING:
    from baselines.config import Config


class Estimating(OptimizerMethod):
    """An optimizer with an estimate d of a distance, on which its learning rate depends."""

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        with redirect_stdout(io.StringIO()):  # both packages print that weight decay is decoupled
            self.optimizer = self.make(model.parameters(), lr=config.lr, weight_decay=weight_decay(config))
        self.used: float | None = None  # the learning rate of the last step

    @abstractmethod
    def make(self, params: Iterator[nn.Parameter], **options: float) -> torch.optim.Optimizer:
        """The package's optimizer."""

    def rate(self, estimate: float) -> float:
        """The learning rate of a step with this d."""
        return estimate * self.config.lr

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step, if there was one, and the estimate d for the next."""
        rate = {} if self.used is None else {"lr": self.used}
        return rate | {"d": float(self.optimizer.param_groups[0]["d"])}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step at the present estimate, which it changes for the next."""
        estimate = float(self.optimizer.param_groups[0]["d"])
        loss = super().step(batch, progress)
        self.used = self.rate(estimate)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the last learning rate."""
        return {"optimizer": super().state_dict(), "used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state["optimizer"])
        self.used = state["used"]


class Prodigy(Estimating):
    """`prodigyopt.Prodigy`: L2 weight decay for adam, decoupled for adamw."""

    def make(self, params: Iterator[nn.Parameter], **options: float) -> torch.optim.Optimizer:
        """The package's optimizer."""
        from prodigyopt import Prodigy as Package

        return Package(params, decouple=self.config.optimizer == "adamw", **options)


class DAdaptAdam(Estimating):
    """`dadaptation.DAdaptAdam`: L2 weight decay for adam, decoupled for adamw."""

    def make(self, params: Iterator[nn.Parameter], **options: float) -> torch.optim.Optimizer:
        """The package's optimizer."""
        from dadaptation import DAdaptAdam as Package

        return Package(params, decouple=self.config.optimizer == "adamw", **options)


class DAdaptSGD(Estimating):
    """`dadaptation.DAdaptSGD`: without momentum for sgd; with 0.9, as an average of weights, for sgdm."""

    def make(self, params: Iterator[nn.Parameter], **options: float) -> torch.optim.Optimizer:
        """The package's optimizer."""
        from dadaptation import DAdaptSGD as Package

        return Package(params, momentum=0.9 if self.config.optimizer == "sgdm" else 0.0, **options)

    def rate(self, estimate: float) -> float:
        """The learning rate of a step with this d: d × lr / ‖g₀‖."""
        return estimate * self.config.lr / float(self.optimizer.param_groups[0]["g0_norm"])


class DoG(OptimizerMethod):
    """`dog.DoG` over SGD, judged by the average of its weights, without which its authors advise against it.

    The average is the package's `PolynomialDecayAverager`, with its default of 8; it holds the buffers, too. The
    initial distance is the 1e-6 that the authors suggest, and their 1e-4 for models with batch normalisation.
    """

    def __init__(self, model: nn.Module, config: "Config") -> None:
        super().__init__(model, config)
        from dog import DoG as Package
        from dog import PolynomialDecayAverager

        distance = 1e-4 if batch_normalises(model) else 1e-6
        self.optimizer = Package(model.parameters(), reps_rel=distance, lr=config.lr, weight_decay=weight_decay(config))
        self.averager = PolynomialDecayAverager(model)

    def hypers(self) -> dict[str, float]:
        """The learning rate of the last step."""
        (group,) = self.optimizer.param_groups
        return {"lr": float(group["eta"][0])} if "eta" in group else {}

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Take the optimizer's step and average."""
        loss = super().step(batch, progress)
        self.averager.step()
        return loss

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model holds the average."""
        with put_back(self.model):
            self.model.load_state_dict(self.averager.averaged_model.state_dict())
            yield

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the average."""
        return {"optimizer": super().state_dict(), "average": self.averager.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state["optimizer"])
        self.averager.load_state_dict(state["average"])


def d_adaptation(model: nn.Module, config: "Config") -> Estimating:
    """The one of D-Adaptation's optimizers that stands for the configuration's."""
    return (DAdaptSGD if config.optimizer in ("sgd", "sgdm") else DAdaptAdam)(model, config)
