"""The seam between the shell and a base optimizer: take the step, and return its pullback.

Two implementations. An update rule keeps the tape of its own arithmetic (`rule_base`). A torch optimizer needs no tape:
its step is proportional to its learning rate, so dθ'/d log lr is the displacement Δ = θ' − θ, and the pullback ⟨G, Δ⟩.
"""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from apo.directions import BY_CLASS, UNCORRECTED, momentum
from apo.domains import POSITIVE
from apo.hypers import Coordinate, Tune
from apo.linearity import why_not_linear
from apo.proximal import inner
from apo.types import Domain, Params

Values = list[dict[str, float | dict[str, float]]]
"""Effective hyperparameters, one dict a group: a float, or a dict of them by parameter name."""
Slopes = dict[tuple[Coordinate, int], float]
"""Derivatives with respect to offsets, apart for each group that shares one."""


class Taken(NamedTuple):
    """A step that has been taken, and what it takes to judge it.

    Attributes:
        before: θ, copies.
        delta: The displacement that is judged, θ' − θ.
        committed: Copies of the live weights after the step, where they are not θ + delta; else None.
        pullback: From a gradient at θ + delta to derivatives with respect to offsets.
    """

    before: Params
    delta: Params
    committed: Params | None
    pullback: Callable[[Params], Slopes]


class Base(ABC):
    """A base optimizer under the shell.

    Attributes:
        optimizer: Holds the groups and the state; its groups are the shell's own.
        tune: How each hyperparameter is tuned.
        names: The name of every parameter.
        first: The index of its first group among all groups of the shell.
    """

    first: int = 0

    def __init__(self, optimizer: torch.optim.Optimizer, tune: Mapping[str, Tune], names: Mapping[Tensor, str]) -> None:
        """Hold an optimizer."""
        self.optimizer, self.tune, self.names = optimizer, tune, names

    @property
    @abstractmethod
    def domains(self) -> Mapping[str, Domain]:
        """The hyperparameters that can be tuned, and their domains."""

    @abstractmethod
    def step(self, values: Values) -> None:
        """Take the step with the given hyperparameters."""

    @abstractmethod
    def take(self, values: Values, judged: str) -> Taken:
        """Take the step, and return what it takes to judge it.

        Args:
            values: Effective hyperparameters.
            judged: "no-momentum" or "step".
        """

    @abstractmethod
    def build_up(self) -> float:
        """The factor by which momentum will lengthen later steps against the first, at least 1."""

    def moving(self) -> Iterable[tuple[int, dict[str, Any], str, Tensor]]:
        """Group index, group, name and parameter of everything that has a gradient."""
        for index, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                if param.grad is not None:
                    yield index, group, self.names[param], param

    def copies(self, only: set[str] | None = None) -> Params:
        """Copies of everything that has a gradient, or of the named part of it."""
        return {n: p.detach().clone() for _, _, n, p in self.moving() if only is None or n in only}

    def backup(self) -> Callable[[], None]:
        """Save the weights that would move and the optimizer's state; the returned function puts them back."""
        state, weights = self.optimizer.state, [(param, param.detach().clone()) for *_, param in self.moving()]
        params = {param for group in self.optimizer.param_groups for param in group["params"]}
        saved = {p: {key: _clone(value) for key, value in state[p].items()} for p in params if p in state}

        def restore() -> None:
            with torch.no_grad():
                for param, weight in weights:
                    param.copy_(weight)
            for param in params:
                state.pop(param, None)
            state.update(saved)

        return restore


class TorchBase(Base):
    """A torch optimizer whose step is linear in its learning rate."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tune: Mapping[str, Tune],
        names: Mapping[Tensor, str],
        *,
        assume_linear: bool,
        judged: str,
    ) -> None:
        """Wrap an optimizer.

        Raises:
            ValueError: If its step is not, or cannot be shown to be, linear in its learning rate.
        """
        super().__init__(optimizer, tune, names)
        reason = None if assume_linear or not tune else why_not_linear(optimizer)
        if reason:
            raise ValueError(f"{reason}; if you know that it is linear, pass assume_linear=True")
        unknown = type(optimizer) not in BY_CLASS and any(momentum(g) for g in optimizer.param_groups)
        if tune and unknown and judged == "no-momentum":
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
        scaled = (name for index, _, name, _ in self.moving() if isinstance(values[index].get("lr"), dict))
        self._step(values, self.copies(set(scaled)))

    def take(self, values: Values, judged: str) -> Taken:
        """Take the step; its pullback is ⟨G, Δ⟩."""
        before = self.copies()
        self._step(values, before)
        direction = BY_CLASS.get(type(self.optimizer)) if judged == "no-momentum" else None
        delta: Params = {}
        committed = None
        for index, group, name, param in self.moving():
            if direction is None or not momentum(group):
                delta[name] = param.detach() - before[name]
                continue
            committed = self.copies() if committed is None else committed
            rate = values[index].get("lr", group["lr"])
            along = direction(group, self.optimizer.state[param], cast(Tensor, param.grad), before[name])
            delta[name] = -(rate[name] if isinstance(rate, dict) else rate) * along
        owners = {name: self.first + index for index, _, name, _ in self.moving()}

        def pullback(cotangents: Params) -> Slopes:
            parts: dict[tuple[Coordinate, int], list[Tensor]] = {}
            for name, group in owners.items() if "lr" in self.tune else ():
                if name not in cotangents:
                    continue
                where = Coordinate("lr", self.tune["lr"].key(group, name)), group
                parts.setdefault(where, []).append(inner(cotangents[name], delta[name]))
            return {where: sum(part.item() for part in terms) for where, terms in parts.items()}

        return Taken(before, delta, committed, pullback)

    def build_up(self) -> float:
        """The longest memory of the groups whose momentum is not corrected for its start."""
        if not isinstance(self.optimizer, UNCORRECTED):
            return 1.0
        return max(1.0 / (1.0 - momentum(group)) for group in self.optimizer.param_groups)

    def _step(self, values: Values, before: Params) -> None:
        groups = self.optimizer.param_groups
        kept = [group["lr"] for group in groups]
        rates = [v.get("lr", lr) for v, lr in zip(values, kept, strict=True)]
        try:
            for group, rate in zip(groups, rates, strict=True):
                if not isinstance(rate, dict):
                    group["lr"] = rate
            self.optimizer.step()
        finally:
            for group, lr in zip(groups, kept, strict=True):
                group["lr"] = lr
        with torch.no_grad():
            for index, _, name, param in self.moving():
                rate = rates[index]
                if isinstance(rate, dict) and rate[name] != kept[index] != 0.0:
                    param.copy_(before[name] + (rate[name] / kept[index]) * (param - before[name]))


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
