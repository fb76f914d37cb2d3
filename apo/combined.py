"""Several optimizers as one: their groups and their state, live."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apo import checkpoint


class Combined(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose groups and state are those of other optimizers on one model.

    It is not stepped itself: a subclass says what a step is.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Hold the optimizers; the defaults are the first one's."""
        self._optimizers = list(optimizers)
        super().__init__([torch.zeros(())], {})
        self.defaults = self._optimizers[0].defaults

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
            ValueError: If there are several optimizers: add the group to the one it belongs to.
        """
        if "defaults" in self.__dict__ and self.defaults is self._optimizers[0].defaults:
            if len(self._optimizers) > 1:
                raise ValueError("there are several base optimizers: call add_param_group of the one it belongs to")
            self._optimizers[0].add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load each optimizer's part of a state dict, if all of it fits.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If its groups do not fit; nothing has been loaded then.
        """
        for hook in getattr(self, "_optimizer_load_state_dict_pre_hooks", {}).values():
            state_dict = hook(self, state_dict) or state_dict
        for optimizer, part in zip(self._optimizers, checkpoint.split(state_dict, self._optimizers), strict=True):
            optimizer.load_state_dict(part)
        for hook in getattr(self, "_optimizer_load_state_dict_post_hooks", {}).values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but a scheduler's hold on ``step``."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}
