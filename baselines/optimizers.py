"""The optimizers of the training tasks: one table, from the name to apo's own rule and to `torch.optim`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import nn

import apo


class Optimizer(NamedTuple):
    """An optimizer under one name.

    Attributes:
        rule: makes apo's update rule, from the model and the options: lr and those below.
        of_torch: makes that of `torch.optim`, from the parameters and the same options; None where it has none.
        options: what can be set besides lr, each a field of `Config` whose None stands for the library's default.
    """

    rule: Callable[..., apo.Rule[Any, Any]]
    of_torch: Callable[..., torch.optim.Optimizer] | None = None
    options: tuple[str, ...] = ("weight_decay",)


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
    "adam-eps-inside": Optimizer(_for_any(partial(apo.quasi_adam, qn_weight=0.0)), options=()),
    "apollo": Optimizer(_for_any(apo.apollo)),
    "quasi-adam": Optimizer(_for_any(apo.quasi_adam), options=()),
    "quasi-adam-switch": Optimizer(_for_any(partial(apo.quasi_adam, variant="switch")), options=()),
    "kfac": Optimizer(apo.kfac, options=("weight_decay", "damping")),
}
