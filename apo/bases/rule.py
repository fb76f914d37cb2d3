"""An update rule as a base optimizer: its state in an optimizer's groups, its tape as the pullback."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from apo.bases.base import Base, Slopes, Taken, Values
from apo.bases.directions import built_up
from apo.domains import derivative
from apo.hypers import Coordinate
from apo.proximal import lookahead, momentum_free
from apo.shards import local, spread_like
from apo.trees import scalar
from apo.types import Domain, Judged, Params, Rule, Statistics


class RuleOptimizer(torch.optim.Optimizer):
    """The groups and the state of an update rule; its `RuleBase` steps it.

    A field of the rule's state that is keyed by parameter name lives in ``state[p][field]``, any other in the state of
    the group's first parameter.
    """

    def __init__(self, params: Iterable[Any], rule: Rule[Any, Any], names: Mapping[Tensor, str]) -> None:
        """Hold a rule's groups; every hyperparameter of the rule is an option of the group, a float."""
        self.rule, self.names = rule, names
        super().__init__(params, {name: value.item() for name, value in rule.hypers._asdict().items()})

    def __getstate__(self) -> dict[str, Any]:
        """Everything that a copy needs."""
        return {**super().__getstate__(), "rule": self.rule, "names": self.names}

    @property
    def required(self) -> tuple[str, ...]:
        """The options that a group of a checkpoint must have."""
        return tuple(self.rule.hypers._fields)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Refuse: hyperparameters come from the shell."""
        raise RuntimeError("a rule's step is taken by apo.APO, not by the optimizer that holds its state")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what the rule leaves out of its step cannot be an option of the group."""
        self.check_left_out(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load without casting: a rule's state keeps the dtype, and the device that ``init`` gives it."""
        params = [param for group in self.param_groups for param in group["params"]]
        entries = {params[i]: self._housed(params[i], entry) for i, entry in state_dict["state"].items()}
        for group in state_dict["param_groups"]:
            self.check_left_out(group)
        super().load_state_dict(state_dict)
        self.state.update(entries)

    def _housed(self, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state as loaded, on the devices where it lives."""
        name = self.names[param]
        fresh = self.rule.init({name: param.detach()})._asdict()
        own = {field: value[name] for field, value in fresh.items() if isinstance(value, dict) and name in value}
        homes = own | {field: value for field, value in fresh.items() if isinstance(value, Tensor)}
        if entry and not own.keys() <= entry.keys() <= homes.keys():
            raise ValueError(
                f"the checkpoint's state of {name} is {', '.join(sorted(entry))}, that of this rule "
                f"{', '.join(sorted(own)) or 'empty'}: it is of another rule, or of one with other options"
            )
        for field, value in entry.items():
            if not isinstance(value, Tensor) or value.shape != homes[field].shape:
                was = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"the checkpoint's {field} of {name} is {was}, not of shape {tuple(homes[field].shape)}: "
                    "are the parameters in the same order?"
                )
        return {field: value.to(homes[field].device, copy=True) for field, value in entry.items()}

    def check_left_out(self, group: Mapping[str, Any]) -> None:
        """Raise if a group sets what the rule leaves out of its step."""
        for hyper, made in self.rule.hypers._asdict().items():
            if hyper != "lr" and made == 0.0 and group.get(hyper, 0.0) != 0.0:
                raise ValueError(
                    f"a group has {hyper}={group[hyper]!r}, but its rule was made with {hyper}=0, which may leave it "
                    f"out of the step: make the rule with a positive {hyper}, and set 0 in the other groups"
                )

    def gather(self, group: dict[str, Any]) -> tuple[Params, Params, Params, Any]:
        """Live parameters, their values, gradients and state, of all in a group that have a gradient; their shards.

        Raises:
            ValueError: If a gradient is sparse.
        """
        live = {self.names[param]: param for param in group["params"] if param.grad is not None}
        for name, param in live.items():
            if cast(Tensor, param.grad).layout != torch.strided:
                raise ValueError(
                    f"{name} has a sparse gradient, which a rule cannot take: make its layer with sparse=False, "
                    "or give apo.APO a list, with torch.optim.SGD, Adagrad or SparseAdam for this parameter"
                )
        params = {name: local(param.detach()) for name, param in live.items()}
        fresh = self.rule.init({name: param for name, param in params.items() if not self.state.get(live[name])})
        fields = []
        for field, start in fresh._asdict().items():
            if isinstance(start, dict):
                kept = {name: local(self.state[p][field]) for name, p in live.items() if field in self.state.get(p, ())}
                fields.append(kept | start)
            else:
                fields.append(self.state[group["params"][0]].get(field, start))
        return live, params, {name: local(cast(Tensor, p.grad)) for name, p in live.items()}, type(fresh)(*fields)

    def keep(self, group: dict[str, Any], live: Params, state: Any) -> None:
        """Write a new state to where it lives.

        Distributed checkpointing wants an entry for every parameter, if there is one for any.
        """
        if any(not isinstance(value, dict) or value for value in state):
            for param in live.values():
                self.state.setdefault(param, {})
        for field, value in state._asdict().items():
            if isinstance(value, dict):
                for name, entry in value.items():
                    self.state[live[name]][field] = spread_like(live[name], entry)
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
        rule, done = self.optimizer.rule, []
        for index, group in self.groups():
            live, params, grads, state = self.optimizer.gather(group)
            with torch.no_grad():
                done.append((group, live, *rule.step(params, grads, state, self._hypers(group, values[index]))))
        self._commit(done)

    def take(self, values: Values, judged: Judged) -> Taken:
        """Take the step; its pullback is the tape of the rule."""
        rule, done = self.optimizer.rule, []
        judge = momentum_free(rule) if self.without_momentum(judged) else rule
        gradient: Params = {}
        before: Params = {}
        delta: Params = {}
        groups, pullbacks = dict(self.groups()), {}
        for index, group in self.groups():
            live, params, grads, state = self.optimizer.gather(group)
            params = {name: param.clone() for name, param in params.items()}  # the commit must not touch the tape
            hypers = self._hypers(group, values[index])
            new, new_state, pullbacks[index] = lookahead(judge, params, grads, state, hypers)
            gradient |= grads
            before |= params
            delta |= {name: new[name] - param for name, param in params.items()}
            if judge is not rule:
                with torch.no_grad():
                    new, new_state = rule.step(params, grads, state, hypers)
            done.append((group, live, new, new_state))
        self._commit(done)

        def pull(cotangents: Params) -> Slopes:
            slopes: Slopes = {}
            for index, pullback in pullbacks.items():
                natural = pullback(cotangents)._asdict()
                for hyper in (hyper for hyper in self.tune if hyper in natural and hyper in values[index]):
                    for coordinate, slope in self._chain(groups[index], hyper, natural[hyper], values[index][hyper]):
                        slopes[coordinate, index] = slopes.get((coordinate, index), 0.0) + slope
            return slopes

        return Taken(gradient, before, delta, judge is not rule, pull)

    def observe(self, statistics: Statistics) -> Callable[[], None]:
        """Fold statistics of the model's curvature into the state; the returned function takes it back."""
        restore = self._state()
        gathered = [(group, *self.optimizer.gather(group)) for _, group in self.groups()]
        for group, live, _, _, before in gathered:
            self.optimizer.keep(group, live, cast(Any, self.optimizer.rule.observe)(before, statistics))
        return restore

    def backup(self) -> Callable[[], None]:
        """Save what a step may change: the weights. It computes out of place, so the state's tensors need no copies."""
        restore_state = self._state()
        kept = [(param, param.detach().clone()) for *_, param in self.moving()]

        def restore() -> None:
            with torch.no_grad():
                for param, value in kept:
                    param.copy_(value)
            restore_state()

        return restore

    def build_up(self) -> float:
        """That of a rule with a hyperparameter ``momentum``, by the first step that it takes on a toy."""
        groups = [group for group in self.optimizer.param_groups if group.get("momentum")]
        return max([1.0, *(built_up(group, self._first(group)) for group in groups)])

    def _first(self, group: dict[str, Any]) -> float:
        """The length of the rule's first step, against that without momentum."""
        rule, params, grads = self.optimizer.rule, {"": torch.zeros(1)}, {"": torch.ones(1)}
        hypers = self._hypers({**group, "lr": 1.0}, {})
        with torch.no_grad():
            taken, free = (r.step(params, grads, rule.init(params), hypers)[0][""] for r in (rule, momentum_free(rule)))
        return (taken / free).item()

    def _state(self) -> Callable[[], None]:
        """Note which tensors the state is; the returned function puts them back."""
        state = self.optimizer.state
        kept = {param: dict(entry) for param, entry in state.items()}

        def restore() -> None:
            state.clear()
            state.update(kept)

        return restore

    def _commit(self, done: Sequence[tuple[dict[str, Any], Params, Params, Any]]) -> None:
        """Write what all groups have computed, once none can fail any more."""
        for group, live, new, state in done:
            with torch.no_grad():
                for name, param in live.items():
                    local(param).copy_(new[name])
            self.optimizer.keep(group, live, state)

    def _hypers(self, group: dict[str, Any], settings: Mapping[str, float | dict[str, float]]) -> Any:
        """The rule's hyperparameters for a group: 0-d float64 tensors, or dicts of them by parameter name."""
        self.optimizer.check_left_out(group)
        kind = type(self.optimizer.rule.hypers)
        return kind(*(_tensors(settings.get(hyper, group[hyper])) for hyper in kind._fields))

    def _chain(
        self, group: dict[str, Any], hyper: str, natural: Tensor | Params, value: float | dict[str, float]
    ) -> Iterable[tuple[Coordinate, float]]:
        """Derivatives with respect to offsets, from those in natural units."""
        domain = self.domains[hyper]
        if isinstance(natural, dict) and isinstance(value, dict):
            pairs = [(name, natural[name], value[name]) for name in natural]
        else:
            pairs = [("", cast(Tensor, natural), cast(float, value))]
        for name, slope, at in pairs:
            if domain.contains(at):
                yield self.coordinate(hyper, group, name), slope.item() * derivative(domain, at)


def _tensors(value: float | dict[str, float]) -> Tensor | Params:
    if isinstance(value, dict):
        return {name: scalar(v) for name, v in value.items()}
    return scalar(float(value))
