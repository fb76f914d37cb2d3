"""What a logger should show of an optimizer."""

from apo.optimizer import APO


def to_log(opt: APO, prefix: str = "apo") -> dict[str, float]:
    """The numbers to log after a step: the same names at every step.

    Args:
        opt: The optimizer.
        prefix: Goes before every name.

    Returns:
        ``"apo/effective_lr"``, the learning rate of the last step (by group ``"apo/effective_lr/0"`` if there are
        several), and the tuned hyperparameters for the next, schedules apart: ``"apo/lr"``, ... as in `APO.hypers`.
    """
    rates = [group["effective_lr"] for group in opt.param_groups]
    by_group = {"effective_lr" if len(rates) == 1 else f"effective_lr/{i}": rate for i, rate in enumerate(rates)}
    return {f"{prefix}/{name}": value for name, value in {**by_group, **opt.hypers()}.items()}
