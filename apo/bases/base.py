"""What a base optimizer owes the shell: a step to be judged, in pieces, and the pullback of each.

Two implementations. An update rule keeps the tape of its own arithmetic. A torch optimizer needs no tape: its step is
proportional to its learning rate, so dθ'/d log lr is the displacement Δ = θ' − θ, and the pullback is ⟨G, Δ⟩.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo.hypers import Coordinate, Tune
from apo.pieces import Cut
from apo.shards import local
from apo.trees import dense
from apo.types import Domain, Judged, Params

Settings = dict[str, float | dict[str, float]]
"""Effective hyperparameters of a group: a float, or a dict of them by parameter name."""
Values = list[Settings]
"""Those of every group of the shell."""
Where = tuple[Coordinate, int]
"""A tuned number, and one of the groups that share it."""
Terms = dict[Where, list[Tensor]]
"""Derivatives with respect to offsets: of each, numbers [] that add up to it."""
Slopes = dict[Where, float]
"""Derivatives with respect to offsets."""
NUMBER = "group_number"
"""The key under which a group keeps its number: it stays the same when a group is added to a base before its own."""


class Piece(NamedTuple):
    """A step, as far as it is of some parameters, or rows of one.

    Attributes:
        delta: Their displacement that is judged.
        pullback: From a gradient at θ + delta to derivatives with respect to offsets.
    """

    delta: Params
    pullback: Callable[[Params], Terms]


class Trial(NamedTuple):
    """A step that is to be judged.

    Attributes:
        gradient: The gradient g of everything that it moves.
        before: θ, copies.
        cuts: What it moves, in pieces.
        look: From what is in a piece to that piece, any number of times while the live weights are where it leads.
        commit: Takes the base optimizer's step, with the live weights at θ again; None where it has been taken, which
            is the only way to know where it leads.
    """

    gradient: Params
    before: Params
    cuts: list[Cut]
    look: Callable[[Cut], Piece]
    commit: Callable[[], None] | None


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
    def trial(self, values: Values, judged: Judged) -> Trial:
        """The step to be judged; it is taken if that is the only way to know where it leads.

        Args:
            values: Effective hyperparameters.
            judged: Which step is judged.
        """

    @abstractmethod
    def takes(self, judged: Judged) -> bool:
        """Whether a trial takes the step."""

    @abstractmethod
    def gains(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """The length of a group's first step, and of the last while the gradient stays, over those without momentum."""

    @abstractmethod
    def judges(self, judged: Judged) -> Judged:
        """Which step is judged after all: the step itself where momentum cannot be left out."""

    def build_up(self, judged: Judged) -> float:
        """The factor by which momentum will lengthen later steps against the first that is judged, at least 1."""
        judged = self.judges(judged)
        gains = [self.gains(group) for group in self.optimizer.param_groups if judged != "steady"]
        return max([1.0, *(last / (first if judged == "step" else 1.0) for first, last in gains)])

    @abstractmethod
    def momentum(self, group: Mapping[str, Any]) -> float:
        """The coefficient of a group's momentum that can be left out of the judgement; 0 if there is none."""

    def left_out(self, judged: Judged) -> float:
        """The least momentum that is left out of the judgement."""
        return 0.0 if self.judges(judged) == "step" else min(map(self.momentum, self.optimizer.param_groups))

    def groups(self) -> Iterable[tuple[int, dict[str, Any]]]:
        """Every group, and its index among all groups of the shell."""
        return enumerate(self.optimizer.param_groups, self.first)

    def moving(self) -> Iterable[tuple[int, dict[str, Any], str, Tensor]]:
        """Group index, group, name and parameter of everything that has a gradient."""
        for index, group in self.groups():
            for param in group["params"]:
                if param.grad is not None:
                    yield index, group, self.names[param], param

    def coordinate(self, hyper: str, group: Mapping[str, Any], name: str) -> Coordinate:
        """The tuned number that moves a hyperparameter of a parameter in a group."""
        return Coordinate(hyper, self.tune[hyper].key(group[NUMBER], name))

    def copies(self, only: set[str] | None = None) -> Params:
        """Copies of everything that has a gradient, or of the named part of it; of shards, those that are here."""
        return {n: local(p.detach()).clone() for _, _, n, p in self.moving() if only is None or n in only}

    def gradients(self) -> Params:
        """The gradients of everything that has one, without graphs; of shards, those that are here."""
        return {n: dense(local(p.grad.detach())) for *_, n, p in self.moving() if p.grad is not None}

    def finite(self) -> bool:
        """Whether every gradient is finite, as far as it is in this process."""
        grads = (local(param.grad) for *_, param in self.moving() if param.grad is not None)
        entries = (grad.coalesce().values() if grad.is_sparse else grad for grad in grads)
        return all(bool(torch.isfinite(entry).all()) for entry in entries)

    def backup(self) -> Callable[[], None]:
        """Save what a step may change: weights, their gradients, the state; the returned function puts it back."""
        state = self.optimizer.state
        kept = [
            (tensor, tensor.detach().clone()) for *_, p in self.moving() for tensor in (p, p.grad) if tensor is not None
        ]
        params = {param for group in self.optimizer.param_groups for param in group["params"]}
        saved = {p: {key: _clone(value) for key, value in state[p].items()} for p in params if p in state}

        def restore() -> None:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
            for param in params:
                state.pop(param, None)
            state.update(saved)

        return restore


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
