"""What happens to gradients before a rule sees them: transforms, and the rule behind a chain of them.

A transform is a pure function ``Params -> Params`` of gradients. ``chain(first, second, rule)`` steps along
second(first(g)), and is an update rule like any other: judged, tuned, compiled and saved as one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from apo.checks import choice, real
from apo.types import H, Params, Rule, S

Transform = Callable[[Params], Params]


def chain(*links: Transform | Rule[Any, Any]) -> Rule[Any, Any]:
    """A rule on transformed gradients.

    The step and the step without momentum take the transformed gradients, and all else is the rule's own. Weight decay
    is the rule's, so it comes after the transforms. Under `apo.APO` a rule takes one parameter group at a time, and so
    do its transforms. The rule can be pickled if the transforms can: functions of a module, or partials of them.

    Args:
        *links: Any number of transforms, applied first to last, and then the rule. A gradient that a transform leaves
            out counts as missing.

    Returns:
        The rule, with the state and the hyperparameters of the given one.

    Raises:
        TypeError: If the last argument is not a rule, or another one is not a function.
    """
    *transforms, rule = links or (None,)
    if not isinstance(rule, Rule):
        raise TypeError(f"chain(..., {rule!r}) must end in a rule, such as apo.sgd()")
    first: tuple[Transform, ...] = ()
    for transform in transforms:
        if isinstance(transform, Rule | type) or not callable(transform):
            raise TypeError(f"chain({transform!r}, ...) must be functions of gradients, and one rule at the end")
        first += (transform,)
    free = rule.without_momentum
    return rule._replace(
        step=partial(_step, first, rule.step),
        without_momentum=partial(_without_momentum, first, free) if free else None,
    )


def clip_by_norm(max_norm: float, per: Literal["parameter", "global"] = "parameter") -> Transform:
    """Scale gradients down to a largest 2-norm.

    What is no longer than that passes bit for bit. As in ``torch.nn.utils.clip_grad_norm_``, without its 1e-6: an
    infinite norm turns finite gradients into 0 and infinite ones into NaN, and a norm that is NaN turns all into NaN.

    Args:
        max_norm: The largest norm, in gradient units; in (0, ∞).
        per: "parameter" clips the gradient of each parameter by its own norm, "global" scales all of them by the norm
            of all together. Source of the first: Ma, arXiv 2009.13586, App. D.4.

    Returns:
        A pure function from gradients to gradients, differentiable, picklable, keeping dtypes.

    Raises:
        TypeError: If ``max_norm`` is not a real number.
        ValueError: If it is outside its set, or ``per`` is neither of the two.
    """
    choice("per", per, ("parameter", "global"))
    limit = real("max_norm", max_norm, ends="()")
    return partial(_clip_each if per == "parameter" else _clip_together, limit)


def _step(
    transforms: tuple[Transform, ...],
    step: Callable[[Params, Params, S, H], tuple[Params, S]],
    params: Params,
    grads: Params,
    state: S,
    hypers: H,
) -> tuple[Params, S]:
    return step(params, _through(transforms, grads), state, hypers)


def _without_momentum(
    transforms: tuple[Transform, ...],
    free: Callable[[Params, Params, S, H], Params],
    params: Params,
    grads: Params,
    state: S,
    hypers: H,
) -> Params:
    return free(params, _through(transforms, grads), state, hypers)


def _through(transforms: tuple[Transform, ...], grads: Params) -> Params:
    for transform in transforms:
        grads = transform(grads)
    return grads


def _clip_each(limit: float, grads: Params) -> Params:
    return {key: _shortened(grad, _norm(grad), limit) for key, grad in grads.items()}


def _clip_together(limit: float, grads: Params) -> Params:
    norms = [_norm(grad) for grad in grads.values()]
    if not norms:
        return {}
    norm = _norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return {key: _shortened(grad, norm.to(grad.device), limit) for key, grad in grads.items()}


def _norm(grad: Tensor) -> Tensor:
    """The 2-norm, [], in float64: squares of half precision would overflow."""
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64)
    return norm


def _shortened(grad: Tensor, norm: Tensor, limit: float) -> Tensor:
    # The factor is limit / limit = 1 for every norm up to the limit, 0 among them.
    factor: Tensor = limit / norm.clamp_min(limit)
    return (grad * factor).to(grad.dtype)
