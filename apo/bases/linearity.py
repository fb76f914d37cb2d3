"""Whether an optimizer's step is proportional to its learning rate, found by trying.

Where it is, dθ'/d log lr is the step itself, and any optimizer can be tuned without looking inside. The class is built
anew on a toy tensor with the options of a parameter group, and its steps at lr and 2·lr from one state are compared:
after some steps, as ASGD and Rprop look linear at first, and for large learning rates, as Adafactor caps its step.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

RATES = (1e-3, 3e-2, 3.0)
WARM_UPS = (5, 30)
TOLERANCE = 1e-8
_FOUND: WeakKeyDictionary[type, dict[str, bool]] = WeakKeyDictionary()
"""What has been found out already, by class, options and learning rate."""
ADVICE = "; if you know that it is linear, pass assume_linear=True"


def why_not_linear(optimizer: torch.optim.Optimizer) -> str | None:
    """The reason why an optimizer's learning rate cannot be tuned through its steps, or None.

    Args:
        optimizer: Any optimizer; it is left alone, a toy of its class is tried.

    Returns:
        A sentence for an error message, or None if every group's step is linear in its learning rate.
    """
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return f"{name} evaluates the loss within its step, which therefore is not proportional to its lr"
    found = _FOUND.setdefault(type(optimizer), {})
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key in optimizer.defaults and key != "lr"}
        for rate in RATES:
            key = repr((options, rate))
            try:
                if key not in found:
                    found[key] = _linear(type(optimizer), options, rate)
            except Exception as error:
                return (
                    f"a toy {name} could not be built and stepped to see if its step is linear in lr ({error}){ADVICE}"
                )
            if not found[key]:
                return (
                    f"the step of {name} is not proportional to its lr, so its lr cannot be judged by its step{ADVICE}"
                )
    return None


def _linear(cls: Callable[..., torch.optim.Optimizer], options: dict[str, Any], rate: float) -> bool:
    """Whether the step at a learning rate is linear in it; a class that takes only sparse gradients gets them."""
    try:
        return all(_linear_after(cls, options, rate, warm_up) for warm_up in WARM_UPS)
    except Exception as error:
        if "sparse" not in str(error).lower():
            raise
    return all(_linear_after(cls, options, rate, warm_up, sparse=True) for warm_up in WARM_UPS)


def _linear_after(
    cls: Callable[..., torch.optim.Optimizer], options: dict[str, Any], rate: float, warm_up: int, sparse: bool = False
) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    toy = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64, device="cpu"))
    accepted = inspect.signature(cls).parameters
    variadic = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    options = {key: value for key, value in options.items() if key in accepted or variadic}
    options |= {key: False for key in ("capturable", "differentiable") if key in options}
    optimizer = cls([toy], lr=rate, **options)
    for _ in range(warm_up):
        grad = torch.randn(4, 3, generator=generator, dtype=torch.float64, device="cpu")
        toy.grad = grad.to_sparse(1) if sparse else grad
        optimizer.step()
    start, state = toy.detach().clone(), copy.deepcopy(optimizer.state_dict())
    gradient = torch.randn(4, 3, generator=generator, dtype=torch.float64, device="cpu")
    moved = []
    for factor in (1.0, 2.0):
        with torch.no_grad():
            toy.copy_(start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.param_groups[0]["lr"] = factor * rate
        toy.grad = gradient.to_sparse(1) if sparse else gradient.clone()
        optimizer.step()
        moved.append(toy.detach() - start)
    gap, size = (moved[1] - 2.0 * moved[0]).norm().item(), moved[1].norm().item()
    # θ' − θ carries the rounding of θ itself, which no step can be blamed for.
    rounding = 8.0 * torch.finfo(torch.float64).eps * start.norm().item()
    return math.isfinite(size) and gap <= TOLERANCE * size + rounding
