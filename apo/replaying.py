"""A schedule that has been found, replayed on a bare optimizer: the record of a tuned run as an `LRScheduler`."""

from array import array
from os import PathLike
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from apo.checks import instance
from apo.optimizer import APO
from apo.record import Record


class Replay(LRScheduler):
    """The effective learning rates of a tuned run, step for step: tuning, schedules on top and shortened steps alike.

    ``scheduler.step()`` is to be called after each step of the optimizer. After the last step of the record, its
    learning rates stay.
    """

    def __init__(self, record: Record, optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> None:
        """Take the learning rates out of the record, and set the first of them; see `replay`."""
        instance("optimizer", optimizer, torch.optim.Optimizer, "a torch optimizer")
        groups = len(optimizer.param_groups)
        if not record.rates:
            raise ValueError("the record has no learning rates: no step has been taken yet")
        if isinstance(optimizer, APO) and any(name.partition("/")[0] == "lr" for name in optimizer.hypers()):
            raise ValueError("this optimizer tunes its lr: replay on the bare one, or on apo.APO(..., tune={})")
        if groups != len(record.rates):
            raise ValueError(f"the record is of {len(record.rates)} parameter groups, the optimizer has {groups}")
        for group, column in enumerate(record.rates):
            if any(rate != rate for rate in column):
                raise ValueError(
                    f"the parameters of group {group} have no learning rate in common at every step of the record, as "
                    "they were tuned apart or added later: a replay needs lr tuned globally or by group, from the start"
                )
        if last_epoch + 1 < record.first:
            raise ValueError(
                f"the record begins after {record.first} steps, as that of a run that was resumed: replay it from "
                f"there, with last_epoch={record.first - 1}"
            )
        self._first, self._rates = record.first, [array("d", column) for column in record.rates]
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group for the next step."""
        at = self.last_epoch - self._first
        return [column[min(at, len(column) - 1)] for column in self._rates]

    def state_dict(self) -> dict[str, Any]:
        """Where the replay stands; the record itself is left out."""
        return {name: value for name, value in super().state_dict().items() if name not in ("_first", "_rates")}


def replay(record: Record | str | PathLike[str], optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> Replay:
    """A scheduler that gives a bare optimizer the learning rates of a tuned run.

    Args:
        record: ``opt.record`` of the tuned run, or the path of what ``opt.record.to_csv(path)`` wrote.
        optimizer: The bare optimizer, with as many groups; for a rule or a list, ``apo.APO(model, base, tune={})``.
        last_epoch: As in torch: the number of steps taken before, less one.

    Returns:
        A `torch.optim.lr_scheduler.LRScheduler`, to be stepped after each step of the optimizer.

    Raises:
        TypeError: If the record or the optimizer is none.
        ValueError: If the record is empty, or of other groups; or parameters of one group differed; or it begins later.
    """
    if isinstance(record, str | PathLike):
        record = Record.from_csv(record)
    instance("record", record, Record, "opt.record, or the path of what opt.record.to_csv(path) wrote")
    return Replay(record, optimizer, last_epoch)
