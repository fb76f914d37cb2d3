"""The seam between the shell and a base optimizer: take the step, and return its pullback.

Two implementations. An update rule keeps the tape of its own arithmetic. A torch optimizer needs no tape: its step is
proportional to its learning rate, so dθ'/d log lr is the displacement Δ = θ' − θ, and the pullback is ⟨G, Δ⟩.
"""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from apo.directions import BY_CLASS, UNCORRECTED, momentum
from apo.domains import POSITIVE, shift
from apo.hypers import Coordinate, Tune
from apo.linearity import why_not_linear
from apo.proximal import inner, lookahead, momentum_free
from apo.types import Domain, Params, Rule

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
    """

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
        """Save the optimizer's state; the returned function puts it back."""
        state = self.optimizer.state
        saved = {param: {key: _clone(value) for key, value in entry.items()} for param, entry in state.items()}

        def restore() -> None:
            state.clear()
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
            rate = values[index]["lr"]
            along = direction(group, self.optimizer.state[param], cast(Tensor, param.grad), before[name])
            delta[name] = -(rate[name] if isinstance(rate, dict) else rate) * along
        tune = self.tune.get("lr")
        owners = [(n, Coordinate("lr", tune.key(i, n)), i) for i, _, n, _ in self.moving()] if tune else []

        def pullback(cotangents: Params) -> Slopes:
            parts: dict[tuple[Coordinate, int], list[Tensor]] = {}
            for name, coordinate, index in owners:
                if name in cotangents:
                    parts.setdefault((coordinate, index), []).append(inner(cotangents[name], delta[name]))
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
                if isinstance(rate, dict) and kept[index]:
                    param.copy_(before[name] + (rate[name] / kept[index]) * (param - before[name]))


class RuleOptimizer(torch.optim.Optimizer):
    """The groups and the state of an update rule; its `RuleBase` steps it.

    A field of the rule's state that is keyed by parameter name lives in ``state[p][field]``, any other in the state of
    the group's first parameter.
    """

    def __init__(self, params: Iterable[Any], rule: Rule[Any, Any]) -> None:
        """Hold a rule's groups; every hyperparameter of the rule is an option of the group, a float."""
        self.rule = rule
        super().__init__(params, {name: value.item() for name, value in rule.hypers._asdict().items()})

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy needs."""
        return {**super().__getstate__(), "rule": self.rule}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refuse: hyperparameters come from the shell."""
        raise RuntimeError("a rule's step is taken by apo.APO, not by the optimizer that holds its state")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load without casting: a rule's state may be of a better dtype than its parameter."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for position, entry in state_dict["state"].items():
            param = params[position]
            self.state[param] = {field: value.to(param.device, copy=True) for field, value in entry.items()}

    def gather(self, group: dict[str, Any], names: Mapping[Tensor, str]) -> tuple[Params, Params, Params, Any]:
        """Live parameters, their values, gradients and state, of all in a group that have a gradient."""
        live = {names[param]: param for param in group["params"] if param.grad is not None}
        params = {name: param.detach() for name, param in live.items()}
        fresh = self.rule.init({name: param for name, param in params.items() if not self.state.get(live[name])})
        fields = []
        for field, start in fresh._asdict().items():
            if isinstance(start, dict):
                kept = {name: self.state[p][field] for name, p in live.items() if field in self.state.get(p, ())}
                fields.append(kept | start)
            else:
                fields.append(self.state[group["params"][0]].get(field, start))
        return live, params, {name: param.grad for name, param in live.items()}, type(fresh)(*fields)

    def commit(self, group: dict[str, Any], live: Params, new: Params, state: Any) -> None:
        """Write new parameters and state to where they live."""
        with torch.no_grad():
            for name, param in live.items():
                param.copy_(new[name])
        for field, value in state._asdict().items():
            if isinstance(value, dict):
                for name, entry in value.items():
                    self.state[live[name]][field] = entry
            else:
                self.state[group["params"][0]][field] = value


class RuleBase(Base):
    """One of our update rules, or a user's own."""

    optimizer: RuleOptimizer

    @property
    def domains(self) -> Mapping[str, Domain]:
        """Every hyperparameter of the rule."""
        return self.optimizer.rule.domains

    def step(self, values: Values) -> None:
        """Take the step."""
        rule = self.optimizer.rule
        for group, settings in zip(self.optimizer.param_groups, values, strict=True):
            live, params, grads, state = self.optimizer.gather(group, self.names)
            with torch.no_grad():
                new, new_state = rule.step(params, grads, state, self._hypers(group, settings))
            self.optimizer.commit(group, live, new, new_state)

    def take(self, values: Values, judged: str) -> Taken:
        """Take the step; its pullback is the tape of the rule."""
        rule = self.optimizer.rule
        judge = momentum_free(rule) if judged == "no-momentum" else rule
        before: Params = {}
        delta: Params = {}
        committed: Params | None = None if judge is rule else {}
        pullbacks = []
        for group, settings in zip(self.optimizer.param_groups, values, strict=True):
            live, params, grads, state = self.optimizer.gather(group, self.names)
            hypers = self._hypers(group, settings)
            new, new_state, pullback = lookahead(judge, params, grads, state, hypers)
            before |= {name: param.clone() for name, param in params.items()}
            delta |= {name: new[name] - param for name, param in params.items()}
            if committed is not None:
                with torch.no_grad():
                    new, new_state = rule.step(params, grads, state, hypers)
                committed |= {name: new[name] for name in params}
            self.optimizer.commit(group, live, new, new_state)
            pullbacks.append(pullback)

        def pull(cotangents: Params) -> Slopes:
            slopes: Slopes = {}
            for index, pullback in enumerate(pullbacks):
                natural = pullback(cotangents)._asdict()
                for hyper in self.tune.keys() & natural.keys():
                    for coordinate, slope in self._chain(index, hyper, natural[hyper], values[index][hyper]):
                        slopes[coordinate, index] = slopes.get((coordinate, index), 0.0) + slope
            return slopes

        return Taken(before, delta, committed, pull)

    def build_up(self) -> float:
        """1 / (1 − μ) for a rule with a hyperparameter ``momentum``."""
        return max(1.0 / (1.0 - float(group.get("momentum", 0.0))) for group in self.optimizer.param_groups)

    def _hypers(self, group: dict[str, Any], settings: Mapping[str, float | dict[str, float]]) -> Any:
        """The rule's hyperparameters for a group: 0-d float64 tensors, or dicts of them by parameter name."""
        kind = type(self.optimizer.rule.hypers)
        return kind(*(_tensors(settings.get(hyper, group[hyper])) for hyper in kind._fields))

    def _chain(
        self, index: int, hyper: str, natural: Tensor | Params, value: float | dict[str, float]
    ) -> Iterable[tuple[Coordinate, float]]:
        """Derivatives with respect to offsets, from those in natural units."""
        tune, domain = self.tune[hyper], self.domains[hyper]
        if isinstance(natural, dict) and isinstance(value, dict):
            pairs = [(tune.key(index, name), natural[name], value[name]) for name in natural]
        else:
            pairs = [(tune.key(index, ""), cast(Tensor, natural), cast(float, value))]
        for key, derivative, at in pairs:
            if domain.contains(at):
                yield Coordinate(hyper, key), derivative.item() * shift(domain, at, 0.0)[1]


def _tensors(value: float | dict[str, float]) -> Tensor | Params:
    if isinstance(value, dict):
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in value.items()}
    return torch.tensor(value, dtype=torch.float64)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
