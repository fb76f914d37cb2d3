"""A torch optimizer as a base optimizer: its step is linear in its learning rate, and that is all there is to know."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from apo.bases.base import Base, Slopes, Taken, Values
from apo.bases.directions import BY_CLASS, UNCORRECTED, built_up, momentum
from apo.bases.linearity import why_not_linear
from apo.domains import POSITIVE
from apo.hypers import Coordinate, Tune
from apo.shards import local
from apo.trees import compute_dtype, dense, inner, total
from apo.types import Domain, Judged, Params


class TorchBase(Base):
    """A torch optimizer whose step is linear in its learning rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tune: Mapping[str, Tune],
        names: Mapping[Tensor, str],
        *,
        assume_linear: bool,
        judged: Judged,
    ) -> None:
        """Wrap an optimizer.

        Raises:
            ValueError: If its step is not, or cannot be shown to be, linear in its learning rate.
        """
        super().__init__(optimizer, tune, names)
        reason = None if assume_linear or not tune else why_not_linear(optimizer)
        if reason:
            raise ValueError(reason)
        unknown = type(optimizer) not in BY_CLASS and any(momentum(g) for g in optimizer.param_groups)
        if tune and unknown and judged != "step":
            warnings.warn(
                f"the momentum of {type(optimizer).__name__} cannot be told from its step, so the step itself is "
                "judged, momentum included; objective=apo.Proximal(lookahead='step') says the same without a warning",
                stacklevel=4,
            )

    @property
    def domains(self) -> Mapping[str, Domain]:
        """Only the learning rate."""
        return {"lr": POSITIVE}

    def step(self, values: Values) -> None:
        """Take the step; learning rates that differ within a group scale each parameter's displacement."""
        apart = [index for index, _ in self.groups() if isinstance(values[index].get("lr"), dict)]
        scaled = {name for index, _, name, _ in self.moving() if index in apart} if apart else set()
        self._step(values, self.copies(scaled) if scaled else {})

    def take(self, values: Values, judged: Judged) -> Taken:
        """Take the step; its pullback is ⟨G, Δ⟩."""
        moving = list(self.moving())
        before = self.copies()
        # With foreach, SGD leaves g + μv in the place of a gradient g under nesterov.
        gradient = {n: _gradient(p).clone() if g.get("nesterov") else _gradient(p) for _, g, n, p in moving}
        self._step(values, before)
        known, free = BY_CLASS.get(type(self.optimizer)), self.without_momentum(judged)
        delta: Params = {}
        distinct = False
        for index, group, name, param in moving:
            averages, wide = bool(momentum(group)), compute_dtype(param.dtype)
            # Of a step of weights of low precision, their rounding may be all that is left.
            if known is None or (averages and not free) or not (averages or wide != param.dtype):
                delta[name] = local(param.detach()) - before[name]
                continue
            distinct = distinct or averages
            rate = values[index].get("lr", group["lr"])
            state = {key: local(x) if isinstance(x, Tensor) else x for key, x in self.optimizer.state[param].items()}
            along = known(group, state, gradient[name].to(wide), before[name].to(wide))
            delta[name] = -(rate[name] if isinstance(rate, dict) else rate) * along
        owners = {
            name: (self.coordinate("lr", group, name), index) for index, group, name, _ in moving if "lr" in self.tune
        }

        def pullback(cotangents: Params) -> Slopes:
            parts: dict[tuple[Coordinate, int], list[Tensor]] = {}
            for name, where in owners.items():
                terms = parts.setdefault(where, [])
                if name in cotangents:
                    terms.append(inner(cotangents[name], delta[name]))
            return {where: total(terms) for where, terms in parts.items()}

        return Taken(gradient, before, delta, distinct, pullback)

    def build_up(self) -> float:
        """The longest memory of the groups whose momentum is not corrected for its start."""
        groups = self.optimizer.param_groups if isinstance(self.optimizer, UNCORRECTED) else []
        return max([1.0, *(built_up(group, 1.0 + momentum(group) * bool(group.get("nesterov"))) for group in groups)])

    def _step(self, values: Values, before: Params) -> None:
        moving = list(self.moving()) if before else []
        self._separate()
        kept = {index: _copy(group["lr"]) for index, group in self.groups()}
        rates = {index: values[index].get("lr", lr) for index, lr in kept.items()}
        # Rates that differ within a group scale a step at the largest of them: a longer one would lose digits.
        taken = {
            index: max(rate.values(), default=0.0) if isinstance(rate, dict) else rate for index, rate in rates.items()
        }
        try:
            for index, group in self.groups():
                _set(group, taken[index])
            self.optimizer.step()
        finally:
            for index, group in self.groups():
                _set(group, kept[index])
        with torch.no_grad():
            for index, _, name, param in moving:
                rate = rates[index]
                if isinstance(rate, dict) and rate[name] != taken[index]:
                    live = local(param)
                    live.copy_(before[name] + (rate[name] / taken[index]) * (live - before[name]))

    def _separate(self) -> None:
        """Give a group a learning rate of its own where torch put one tensor into several, which may come to differ."""
        seen: set[int] = set()
        for _, group in self.groups():
            if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))


def _copy(rate: Any) -> Any:
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _set(group: dict[str, Any], rate: Any) -> None:
    """Set a group's learning rate; a tensor is written into, as a compiled step holds on to it."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].copy_(rate) if isinstance(rate, Tensor) else group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _gradient(param: Tensor) -> Tensor:
    return dense(local(cast(Tensor, param.grad)))
