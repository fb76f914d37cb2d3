"""The groups and the state of an update rule, as a torch optimizer has them."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from apo.shards import local, spread_like
from apo.types import Params, Rule


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
