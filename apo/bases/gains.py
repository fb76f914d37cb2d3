"""How long momentum makes the steps of a rule, which may add gradients up or average them."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from apo.bases.directions import gain
from apo.types import Rule


def gains_of(rule: Rule[Any, Any], hypers: Any, group: Mapping[str, Any]) -> tuple[float, float]:
    """The length of the first step, and of the last while the gradient stays, over those without momentum.

    By two steps on a toy. Where it does not tell, as with transforms that need the model's own gradients, momentum
    counts as adding up.

    Args:
        rule: A rule that has a step without momentum.
        hypers: Its hyperparameters.
        group: The same by name, with ``momentum`` among them.

    Returns:
        Both, positive.
    """
    try:
        first, second = _lengths(rule, hypers)
    except Exception:  # whatever a user's transform makes of a toy
        first = second = math.nan
    mu = float(group["momentum"])
    last = (second - mu * first) / (1.0 - mu) if mu < 1.0 else math.nan  # as lengths obey l ← μl + k
    averages = 0.0 < first <= 1.0 and abs(last - 1.0) < 0.1
    return first if 0.0 < first < math.inf else 1.0, 1.0 if averages else gain(group)


def _lengths(rule: Any, hypers: Any) -> tuple[float, float]:
    """The lengths of a toy's first two steps, over those without momentum."""
    params, grads = ({"": torch.full((1,), x, dtype=torch.float64, device="cpu")} for x in (0.0, 1.0))
    state = rule.init(params)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        free = rule.without_momentum(params, grads, state, hypers)[""]
        once, state = rule.step(params, grads, state, hypers)
        twice, _ = rule.step(params, grads, state, hypers)
    return (once[""] / free).item(), (twice[""] / free).item()
