"""From an update of one tensor to a rule on all of a model's: what most rules are built with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apo.checks import short
from apo.packing import packs, together
from apo.trees import as_scalar, compute_dtype, leaves, rebuild
from apo.types import Domain, H, Params, Rule, S

InPlace = Callable[[list[Tensor], list[Tensor], Any, Any], bool]
"""The steps of many tensors, of a state and hyperparameters as a rule's own; whether they have been taken."""


def elementwise(
    init: Callable[[Tensor], S],
    update: Callable[[Tensor, Tensor, S, H], tuple[Tensor, S]],
    hypers: H,
    domains: Mapping[str, Domain],
    without_momentum: Callable[[Tensor, Tensor, S, H], Tensor] | None = None,
    *,
    pack: bool = False,
    numbers: bool = False,
    in_place: InPlace | None = None,
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
        pack: Whether small tensors may be handed to the updates end to end, as one, and large ones in parts. True is
            right if an update treats every element of a tensor on its own; it saves most of the time on models with
            many small tensors, and much of it on large ones.
        numbers: Whether the updates take hyperparameters as plain numbers, too, where they are not differentiated. That
            saves passes over the tensors; otherwise they are given 0-d tensors always.
        in_place: ``in_place(params, grads, state, hypers) -> taken``, the steps of many tensors at once, in place: with
            lists of tensors, in every field of the state too (None where a tensor has none), and plain numbers. It
            returns False, and has changed nothing, where it cannot take them. `apo.APO` steps by it between meta-steps.

    Returns:
        The rule. Each field of its state is a dict keyed by parameter name.

    Raises:
        TypeError: If ``hypers`` is not such a NamedTuple.
        ValueError: If ``domains`` has other names.
    """
    fields: tuple[str, ...] | None = getattr(hypers, "_fields", None)
    if fields is None or not all(isinstance(h, Tensor) and h.shape == () and h.is_floating_point() for h in hypers):
        raise TypeError(f"hypers={short(hypers)} must be a NamedTuple of 0-d tensors, as apo.domains.hyper makes them")
    if domains.keys() != set(fields):
        raise ValueError(f"domains has {', '.join(domains)}, and must have the fields of hypers: {', '.join(fields)}")
    free: Any = Free(Lifted(partial(_stateless, without_momentum), pack, numbers)) if without_momentum else None
    step: Any = Lifted(update, pack, numbers, in_place)
    return Rule(partial(init_each, init), step, hypers, domains, free)


class Lifted(NamedTuple):
    """The step of a rule that `elementwise` made: each tensor's depends on that tensor alone.

    Attributes:
        update: ``update(param, grad, state, hypers) -> (param, state)`` for one tensor.
        pack: Whether it treats every element of a tensor on its own.
        numbers: Whether it takes hyperparameters as plain numbers, too.
        in_place: The same for many tensors in place.
    """

    update: Callable[[Tensor, Tensor, Any, Any], tuple[Tensor, Any]]
    pack: bool
    numbers: bool
    in_place: InPlace | None = None

    def __call__(self, params: Params, grads: Params, state: S, hypers: H) -> tuple[Params, S]:
        """Step all parameters that have a gradient."""
        if not self.numbers:
            hypers = rebuild(hypers, map(as_scalar, leaves(hypers)))
        packed = [keys for keys in packs(params, grads, state) if len(keys) > 1] if self.pack else []
        in_packs = {key for keys in packed for key in keys}
        others = {key: grad for key, grad in grads.items() if key not in in_packs}

        def updated() -> Iterator[tuple[str, Tensor, S]]:
            for key, param, grad, old, local in slices(params, others, state, hypers):
                yield key, *self.update(param, grad, old, local)
            for keys in packed:
                yield from together(self.update, keys, params, grads, state, hypers)

        return collect(params, state, updated())


class Free(NamedTuple):
    """The step without momentum of a rule that `elementwise` made."""

    lifted: Lifted

    def __call__(self, params: Params, grads: Params, state: S, hypers: H) -> Params:
        """Where it leads."""
        return self.lifted(params, grads, state, hypers)[0]


def is_lifted(rule: Rule[Any, Any]) -> bool:
    """Whether a rule is as `elementwise` made it, so that each tensor's step depends on that tensor alone."""
    return isinstance(rule.step, Lifted) and isinstance(rule.without_momentum, Free | None)


def init_each(init: Callable[[Tensor], S], params: Params) -> S:
    """The state of all tensors, from ``init(param) -> state`` for one; a TypeError if that is no NamedTuple."""
    blank = init(torch.zeros((), device="cpu"))
    if not hasattr(blank, "_fields"):
        raise TypeError(f"init returned {short(blank)}, and not a NamedTuple: one without fields remembers nothing")
    states = {key: init(param.detach().to(compute_dtype(param.dtype))) for key, param in params.items()}
    columns = ({key: s[i] for key, s in states.items() if s[i] is not None} for i in range(len(blank)))
    return type(blank)(*columns)


def slices(params: Params, grads: Params, state: S, hypers: H) -> Iterator[tuple[str, Tensor, Tensor, S, H]]:
    """What an update sees of each parameter with a gradient: name, parameter, gradient, state, hyperparameters."""
    for key, grad in grads.items():
        dtype = compute_dtype(params[key].dtype)
        slice_ = type(state)(*(field.get(key) for field in state))
        local = type(hypers)(*(h[key] if isinstance(h, dict) else h for h in hypers))
        yield key, params[key].to(dtype), grad.to(dtype), slice_, local


def collect(params: Params, state: S, updated: Iterable[tuple[str, Tensor, S]]) -> tuple[Params, S]:
    """All parameters and their state, given the name, the new parameter and the new state of each that changes."""
    new_params, fields = dict(params), [dict(field) for field in state]
    for key, new, after in updated:
        new_params[key] = new.to(params[key].dtype)
        for field, now in zip(fields, after, strict=True):
            if now is not None:
                field[key] = now.to(field[key].dtype)
    return new_params, type(state)(*fields)


def _stateless(
    free: Callable[[Tensor, Tensor, S, H], Tensor], param: Tensor, grad: Tensor, state: S, hypers: H
) -> tuple[Tensor, S]:
    nothing: Any = [None for _ in state]
    return free(param, grad, state, hypers), type(state)(*nothing)
