"""Meta-optimizers: what ``meta=`` may be."""

import torch

from apo.gradient import Gradient
from apo.newton import Newton

Meta = Newton | Gradient


def parse_meta(meta: object, by_parameter: bool) -> Meta:
    """The ``meta=`` argument as a configuration.

    Args:
        meta: "newton", "paper", or a configuration.
        by_parameter: Whether anything is tuned more finely than a group: the paper then takes a meta learning rate of
            1e-3 (the paper, App. C); at every step is our choice.

    Returns:
        The configuration.

    Raises:
        TypeError: If it is neither.
        ValueError: If the name is unknown.
    """
    if isinstance(meta, Newton | Gradient):
        return meta
    if not isinstance(meta, str):
        raise TypeError(f"meta={meta!r} must be 'newton', 'paper', apo.Newton(...) or apo.Gradient(...)")
    if meta not in ("newton", "paper"):
        raise ValueError(f"meta={meta!r} is neither 'newton' nor 'paper'")
    return Newton() if meta == "newton" else paper(by_parameter)


def paper(by_parameter: bool, every: int | None = None) -> Gradient:
    """The paper's meta-optimizer."""
    if by_parameter:
        return Gradient(torch.optim.RMSprop, lr=1e-3, every=every or 1)
    return Gradient(torch.optim.RMSprop, lr=0.1, every=every or 10)
