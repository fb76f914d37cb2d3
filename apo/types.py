"""The vocabulary of the library: parameters by name, hyperparameters, and the update rule.

An *update rule* is one step of a base optimizer as a pure function,

    θ', ξ' = u(θ, g, ξ; φ)

of parameters θ, gradients g, optimizer state ξ and hyperparameters φ. It works out of place, has no side effects, and
is differentiable in φ. Everything else in the library is built on that signature. Source: Amortized Proximal
Optimization, Eq. 10.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Tensors by parameter name, as in ``dict(model.named_parameters())``; gradients and displacements too."""

S = TypeVar("S", bound=tuple[Any, ...])
H = TypeVar("H", bound=tuple[Any, ...])


class Domain(NamedTuple):
    """Where a hyperparameter lives: an open set, and a smooth bijection from the reals onto it.

    Attributes:
        name: The set in mathematical notation, used in error messages.
        contains: Whether a number lies in the set.
        constrain: The bijection from the reals onto the set, elementwise on tensors.
        unconstrain: Its inverse.
        one_step: Whether a one-step objective can judge the hyperparameter. False for averaging coefficients
            (momentum, betas), whose effect takes many steps to show.
    """

    name: str
    contains: Callable[[float], bool]
    constrain: Callable[[Tensor], Tensor]
    unconstrain: Callable[[Tensor], Tensor]
    one_step: bool = True


class Rule(NamedTuple, Generic[S, H]):
    """One step of a base optimizer as pure functions, with the hyperparameters as an argument.

    Attributes:
        init: ``init(params) -> state``.
        step: ``step(params, grads, state, hypers) -> (params, state)``. Parameters without an entry in ``grads`` stay
            as they are, and so does their state.
        hypers: The hyperparameters given to the factory: a NamedTuple of 0-d float64 tensors. Wherever a rule takes
            hypers, each field may also be a dict of 0-d tensors keyed as ``params``.
        domains: The domain of every field of ``hypers``.
        without_momentum: ``without_momentum(params, grads, state, hypers) -> params``, the step with its momentum
            left out, given the state before the step; None where ``step`` itself has none.
        observe: ``observe(state, statistics) -> state``, a pure fold of curvature statistics into the state; None
            where the rule uses none.
    """

    init: Callable[[Params], S]
    step: Callable[[Params, Params, S, H], tuple[Params, S]]
    hypers: H
    domains: Mapping[str, Domain]
    without_momentum: Callable[[Params, Params, S, H], Params] | None = None
    observe: Callable[[S, Any], S] | None = None


def leaves(tree: Iterable[Tensor | Params]) -> list[Tensor]:
    """The tensors of hypers or of a state, in a fixed order: fields in turn, dict entries in insertion order."""
    flat: list[Tensor] = []
    for field in tree:
        flat.extend(field.values() if isinstance(field, dict) else [field])
    return flat


def rebuild(like: H, values: Iterable[Tensor]) -> H:
    """The inverse of `leaves`: a tuple with the structure of ``like`` and the given tensors."""
    rest = iter(values)
    fields = ({key: next(rest) for key in field} if isinstance(field, dict) else next(rest) for field in like)
    return type(like)(*fields)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a rule computes: the parameter's own, but never below float32."""
    return torch.promote_types(dtype, torch.float32)


def elementwise(
    init: Callable[[Tensor], S],
    update: Callable[[Tensor, Tensor, S, H], tuple[Tensor, S]],
    hypers: H,
    domains: Mapping[str, Domain],
    without_momentum: Callable[[Tensor, Tensor, S, H], Tensor] | None = None,
) -> Rule[S, H]:
    """Lift an update of one tensor to a `Rule` on dicts of tensors.

    The update sees a parameter and its gradient in float32 or better, its own slice of the state, and 0-d
    hyperparameters (a dict of them is looked up by the parameter's name). The new parameter is cast to the parameter's
    dtype last. A state field that is None for a tensor is left out of the lifted state.

    Args:
        init: ``init(param) -> state`` for one tensor: a NamedTuple of tensors or None.
        update: ``update(param, grad, state, hypers) -> (param, state)`` for one tensor.
        hypers: Defaults: a NamedTuple of 0-d float64 tensors.
        domains: The domain of every field of ``hypers``.
        without_momentum: ``without_momentum(param, grad, state, hypers) -> param`` for one tensor, if the update has
            momentum.

    Returns:
        The rule. Each field of its state is a dict keyed by parameter name.
    """
    return Rule(
        partial(_init, init),
        partial(_step, update),
        hypers,
        domains,
        partial(_without_momentum, without_momentum) if without_momentum else None,
    )


def _init(init: Callable[[Tensor], S], params: Params) -> S:
    blank = init(torch.zeros(()))
    slices = {key: init(param.detach().to(compute_dtype(param.dtype))) for key, param in params.items()}
    columns = ({key: s[i] for key, s in slices.items() if s[i] is not None} for i in range(len(blank)))
    return type(blank)(*columns)


def _step(
    update: Callable[[Tensor, Tensor, S, H], tuple[Tensor, S]], params: Params, grads: Params, state: S, hypers: H
) -> tuple[Params, S]:
    new_params, fields = dict(params), [dict(field) for field in state]
    for key, param, grad, old, local in _slices(params, grads, state, hypers):
        new, after = update(param, grad, old, local)
        new_params[key] = new.to(params[key].dtype)
        for field, was, now in zip(fields, old, after, strict=True):
            if now is not None:
                field[key] = now.to(was.dtype)
    return new_params, type(state)(*fields)


def _without_momentum(
    free: Callable[[Tensor, Tensor, S, H], Tensor], params: Params, grads: Params, state: S, hypers: H
) -> Params:
    new_params = dict(params)
    for key, param, grad, old, local in _slices(params, grads, state, hypers):
        new_params[key] = free(param, grad, old, local).to(params[key].dtype)
    return new_params


def _slices(params: Params, grads: Params, state: S, hypers: H) -> Iterator[tuple[str, Tensor, Tensor, S, H]]:
    """What an update sees of each parameter with a gradient: name, parameter, gradient, state, hyperparameters."""
    for key, grad in grads.items():
        dtype = compute_dtype(params[key].dtype)
        slice_ = type(state)(*(field.get(key) for field in state))
        local = type(hypers)(*(h[key] if isinstance(h, dict) else h for h in hypers))
        yield key, params[key].to(dtype), grad.to(dtype), slice_, local
