"""Several optimizers as one: their groups and their state, live."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from apo import checkpoint


class Combined(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose groups and state are those of other optimizers on one model.

    It is not stepped itself: a subclass says what a step is.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Hold the optimizers; the defaults are those of the one, or the first one's that all of several have."""
        self._optimizers = list(optimizers)
        super().__init__([torch.zeros(())], {})
        first, *others = (optimizer.defaults for optimizer in self._optimizers)
        common = {name: value for name, value in first.items() if all(name in other for other in others)}
        self.defaults = common if others else first

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizers' groups, live."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: object) -> None:
        """Ignore what torch's constructor sets: the groups are there already."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The optimizers' state, live: of one, its own; of several, their entries in one dict."""
        if len(self._optimizers) == 1:
            return self._optimizers[0].state
        entries = ((param, entry) for optimizer in self._optimizers for param, entry in optimizer.state.items())
        return defaultdict(dict, entries)

    @state.setter
    def state(self, state: object) -> None:
        """Ignore what torch's constructor sets: the state is there already."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the one optimizer there is.

        Args:
            param_group: As in torch.

        Raises:
            TypeError: If it is not a dict with "params".
            ValueError: If there are several optimizers: add the group to the one it belongs to.
        """
        if self.__dict__.get("defaults"):  # not in torch's constructor, which adds an empty group
            if len(self._optimizers) > 1:
                raise ValueError("there are several base optimizers: call add_param_group of the one it belongs to")
            given: Any = param_group
            if not isinstance(given, dict) or "params" not in given:
                raise TypeError(f"param_group={given!r} must be a dict with 'params'")
            self._optimizers[0].add_param_group(param_group)

    @contextmanager
    def _loading(self, state_dict: Any, *parts: object) -> Iterator[Any]:
        """Run a user's hooks before and after; if loading fails, the optimizers and some objects are as before.

        Args:
            state_dict: What the user gave.
            parts: Objects whose attributes are replaced, and not changed within.

        Yields:
            What the hooks make of it.
        """
        given = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, given) or given
        kept = [(optimizer, optimizer.state, optimizer.param_groups) for optimizer in self._optimizers]
        attributes = [(part, dict(vars(part))) for part in (self, *parts)]
        try:
            yield given
        except BaseException:
            for optimizer, state, groups in kept:
                optimizer.state, optimizer.param_groups = state, groups
            for part, values in attributes:
                vars(part).update(values)
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load each optimizer's part of a state dict.

        Raises:
            ValueError: If its groups do not fit.
        """
        for optimizer, part in zip(self._optimizers, checkpoint.split(state_dict, self._optimizers), strict=True):
            options = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
            try:
                optimizer.load_state_dict(part)  # which may fill in options that older versions did not have
            except KeyError as error:
                text = (
                    f"the checkpoint lacks {error}, which {type(optimizer).__name__} needs: it is of another optimizer"
                )
                raise ValueError(text) from error
            checkpoint.check_complete(optimizer.param_groups, options)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but a scheduler's hold on ``step``."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}
