"""What the ``base=`` argument may be: a rule, a torch optimizer, or a list of these on one model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apo.bases import Base, TorchBase
from apo.hypers import Tune
from apo.rule_base import RuleBase, RuleOptimizer
from apo.types import Rule


def bases_of(
    base: Any,
    model: nn.Module,
    tune: Mapping[str, Tune],
    names: Mapping[Tensor, str],
    assume_linear: bool,
    judged: str,
) -> list[Base]:
    """The base optimizers under the shell.

    Args:
        base: A rule, which takes every trainable parameter of the model; a torch optimizer; or a list of torch
            optimizers and pairs (rule, parameters).
        model: The module that is trained.
        tune: How each hyperparameter is tuned.
        names: Filled later: the name of every parameter.
        assume_linear: Take it as given that a step is linear in its learning rate.
        judged: "no-momentum" or "step".

    Returns:
        One base for each.

    Raises:
        TypeError: If the argument is something else.
        ValueError: If a torch optimizer's step is not linear in its learning rate.
    """
    bases: list[Base] = []
    for item in _items(base, model):
        if isinstance(item, RuleOptimizer):
            bases.append(RuleBase(item, tune, names))
        else:
            linear = assume_linear or "lr" not in tune
            bases.append(TorchBase(item, tune, names, assume_linear=linear, judged=judged))
    return bases


def _items(base: Any, model: nn.Module) -> list[torch.optim.Optimizer]:
    if isinstance(base, Rule):
        return [RuleOptimizer([p for p in model.parameters() if p.requires_grad], base)]
    if isinstance(base, torch.optim.Optimizer):
        return [base]
    if not isinstance(base, list | tuple) or not base:
        raise TypeError(f"base={base!r} must be a rule, a torch optimizer, or a list of optimizers and (rule, params)")
    items: list[torch.optim.Optimizer] = []
    for item in base:
        if isinstance(item, torch.optim.Optimizer):
            items.append(item)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Rule):
            items.append(RuleOptimizer(item[1], item[0]))
        else:
            raise TypeError(f"{item!r} in base= must be a torch optimizer or a pair (rule, parameters)")
    return items
