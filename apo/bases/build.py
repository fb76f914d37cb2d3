"""What the ``base=`` argument may be: a rule, a torch optimizer, or a list of these on one model."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apo.bases.base import NUMBER, Base
from apo.bases.rule import RuleBase
from apo.bases.rule_optimizer import RuleOptimizer
from apo.bases.sharding import check_shards
from apo.bases.torch_optimizer import TorchBase
from apo.checkpoint import BLANK
from apo.checks import short
from apo.combined import Combined
from apo.hypers import Tune
from apo.shards import check_spread, reshard
from apo.types import Judged, Rule


def bases_of(
    base: Any,
    model: nn.Module,
    tune: Mapping[str, Tune],
    names: Mapping[Tensor, str],
    assume_linear: bool,
    judged: Judged,
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
    for item in _items(base, model, names):
        if isinstance(item, Combined):
            raise TypeError("base= is an apo.APO already: wrap the optimizer inside it")
        if isinstance(item, RuleOptimizer):
            bases.append(RuleBase(item, tune, names))
        else:
            linear = assume_linear or "lr" not in tune
            bases.append(TorchBase(item, tune, names, assume_linear=linear, judged=judged))
    return bases


def _items(base: Any, model: nn.Module, names: Mapping[Tensor, str]) -> list[torch.optim.Optimizer]:
    if isinstance(base, Rule):
        return [RuleOptimizer([p for p in model.parameters() if p.requires_grad], base, names)]
    if isinstance(base, torch.optim.Optimizer):
        return [base]
    if not isinstance(base, list | tuple) or not base:
        raise TypeError(
            f"base={short(base)} must be a rule, a torch optimizer, or a list of optimizers and (rule, params)"
        )
    items: list[torch.optim.Optimizer] = []
    for item in base:
        if isinstance(item, torch.optim.Optimizer):
            items.append(item)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Rule):
            items.append(RuleOptimizer(item[1], item[0], names))
        else:
            raise TypeError(f"{short(item)} in base= must be a torch optimizer or a pair (rule, parameters)")
    return items


def named(model: nn.Module, params: Sequence[Tensor]) -> dict[Tensor, str]:
    """The names of parameters: the model's own, or "extra.0", "extra.1", ... for those that are not in it.

    Raises:
        ValueError: If a parameter is there twice, or none is the model's.
    """
    known: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    if not any(param in known for param in params):
        raise ValueError("none of the optimizer's parameters is the model's: were they made for another model?")
    taken = set(known.values())
    fresh = (f"extra.{number}" for number in itertools.count())
    names = {param: known[param] if param in known else next(n for n in fresh if n not in taken) for param in params}
    if len(names) < len(params):
        twice = next(names[p] for p in params if sum(p is q for q in params) > 1)
        raise ValueError(f"{twice} is in more than one group; give it to one optimizer")
    return names


def follow(bases: Sequence[Base], model: nn.Module, names: dict[Tensor, str], params: dict[str, Tensor]) -> None:
    """Bring up to date what depends on the groups of all bases.

    Args:
        bases: The bases; the number of each one's first group is set.
        model: Names the parameters.
        names: Becomes the name of every parameter.
        params: Becomes the parameter of every name.

    Raises:
        ValueError: If a parameter is there twice, or none is the model's; or if they are spread over processes in a way
            that the model or a rule does not allow.
    """
    reshard(model)
    groups = [group for base in bases for group in base.optimizer.param_groups]
    found = named(model, [param for group in groups for param in group["params"]])
    names.clear()
    names.update(found)
    params.clear()
    params.update({name: param for param, name in found.items()})
    _number(groups)
    counts = [len(base.optimizer.param_groups) for base in bases]
    for base, first in zip(bases, itertools.accumulate(counts, initial=0), strict=False):
        base.first = first
    check_spread(model, params)
    check_shards(bases)


def _number(groups: Sequence[dict[str, Any]]) -> None:
    """Give a number to every group that has none, or that of another, and the keys that checkpoints want."""
    kept: set[int] = set()
    fresh = []
    for group in groups:
        group |= BLANK
        if type(group.get(NUMBER)) is int and group[NUMBER] not in kept:
            kept.add(group[NUMBER])
        else:
            fresh.append(group)
    for group, number in zip(fresh, (n for n in itertools.count() if n not in kept), strict=False):
        group[NUMBER] = number


def check_tunable(tune: Mapping[str, Tune], bases: Sequence[Base]) -> None:
    """Raise if a hyperparameter cannot be tuned on these bases.

    Raises:
        ValueError: If no base has it, a one-step objective cannot judge it, or a value or bound is outside its domain.
    """
    for hyper, how in tune.items():
        owners = [base for base in bases if hyper in base.domains]
        if not owners:
            choices = ", ".join(dict.fromkeys(repr(name) for base in bases for name in base.domains))
            hint = _CLOSED if any(hyper in base.optimizer.defaults for base in bases) else ""
            raise ValueError(f"tune={{{hyper!r}: ...}}: the base optimizer can adapt {choices}{hint}")
        for base in owners:
            if any(group.get("maximize") for group in base.optimizer.param_groups):
                raise ValueError("maximize=True cannot be tuned: the objective is minimised; minimise −loss instead")
            domain = base.domains[hyper]
            if not domain.one_step and not how.force:
                raise ValueError(
                    f"{hyper} shows its effect over many steps, so a one-step objective misjudges it; drop it from "
                    f"tune=, or insist with apo.Tune(force=True)"
                )
            for name, bound in (("low", how.low), ("high", how.high)):
                if bound is not None and not domain.contains(bound):
                    raise ValueError(f"{name}={bound!r} is not in {domain.name}, as {hyper} is: give another or None")
            for number in [] if hyper == "lr" else [float(group[hyper]) for group in base.optimizer.param_groups]:
                if not domain.contains(number):
                    raise ValueError(
                        f"{hyper}={number!r} is not in {domain.name}, so it cannot be adapted; drop it from tune="
                    )


_CLOSED = "; a torch optimizer's other options are closed to us, but our rules (apo.adam, apo.rmsprop, ...) are open"
