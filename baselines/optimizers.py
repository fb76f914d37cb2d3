"""The optimizers of the training tasks: one table, from the name to apo's own rule and to one of the torch kind."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn

import apo
from baselines.comparators.adahessian import AdaHessian
from baselines.comparators.sdlbfgs import SdLBFGS

if TYPE_CHECKING:
    from baselines.config import Config


class Optimizer(NamedTuple):
    """An optimizer under one name.

    Attributes:
        rule: makes apo's update rule, from the model and the options: lr and those below; None where it has none.
        of_torch: makes that of the torch kind, from the parameters and the same options; None where there is none.
        options: what can be set besides lr, each a field of `Config` whose None stands for the library's default.
        evaluates_itself: its step takes a closure that returns the batch's loss with its graph, and differentiates it.
    """

    rule: Callable[..., apo.Rule[Any, Any]] | None
    of_torch: Callable[..., torch.optim.Optimizer] | None = None
    options: tuple[str, ...] = ("weight_decay",)
    evaluates_itself: bool = False


def _for_any(factory: Callable[..., apo.Rule[Any, Any]]) -> Callable[..., apo.Rule[Any, Any]]:
    """A factory of rules that do not depend on the model, called with one."""

    def rule(model: nn.Module, **options: float) -> apo.Rule[Any, Any]:
        return factory(**options)

    return rule


_NESTEROV: Final[dict[str, Any]] = {"momentum": 0.9, "nesterov": True}

OPTIMIZERS: Final[dict[str, Optimizer]] = {
    "sgd": Optimizer(_for_any(apo.sgd), torch.optim.SGD),
    "sgdm": Optimizer(_for_any(partial(apo.sgd, **_NESTEROV)), partial(torch.optim.SGD, **_NESTEROV)),
    "rmsprop": Optimizer(_for_any(apo.rmsprop), torch.optim.RMSprop),
    "adam": Optimizer(_for_any(apo.adam), torch.optim.Adam),
    "adamw": Optimizer(_for_any(apo.adamw), torch.optim.AdamW),
    "radam": Optimizer(None, torch.optim.RAdam),
    "radamw": Optimizer(None, partial(torch.optim.RAdam, decoupled_weight_decay=True)),
    "adam-eps-inside": Optimizer(_for_any(partial(apo.quasi_adam, qn_weight=0.0)), options=()),
    "apollo": Optimizer(_for_any(apo.apollo)),
    "quasi-adam": Optimizer(_for_any(apo.quasi_adam), options=()),
    "quasi-adam-switch": Optimizer(_for_any(partial(apo.quasi_adam, variant="switch")), options=()),
    "kfac": Optimizer(apo.kfac, options=("weight_decay", "damping")),
    "adahessian": Optimizer(None, AdaHessian, options=("weight_decay", "eps"), evaluates_itself=True),
    "sdlbfgs": Optimizer(None, SdLBFGS, options=(), evaluates_itself=True),
    "sdlbfgs-released": Optimizer(
        None, partial(SdLBFGS, variant="released", memory=100), options=(), evaluates_itself=True
    ),
}


def make_base(model: nn.Module, config: "Config") -> apo.Rule[Any, Any] | torch.optim.Optimizer:
    """What takes the steps: apo's rule or an optimizer of the torch kind, with that library's defaults."""
    optimizer = OPTIMIZERS[config.optimizer]
    given = {name: getattr(config, name) for name in optimizer.options}
    options = {"lr": config.lr} | {name: value for name, value in given.items() if value is not None}
    if config.uses_rule and optimizer.rule is not None:
        return optimizer.rule(model, **options)
    assert optimizer.of_torch is not None  # every entry has one of the two
    return optimizer.of_torch(model.parameters(), **options)


def weight_decay(config: "Config") -> float:
    """The configuration's weight decay, with the default of `torch.optim`: 0.01 for adamw, else 0."""
    if config.weight_decay is not None:
        return config.weight_decay
    return 0.01 if config.optimizer == "adamw" else 0.0
