"""Many small tensors as one: an update that treats every element on its own is taken on all of them together.

What a small tensor costs is the calls, not the arithmetic; packed, hundreds of them cost a few calls.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from apo.arithmetic import Number
from apo.trees import as_scalar, compute_dtype
from apo.types import H, Params, S

SMALL = {"cpu": 2**14}
"""Elements of a tensor up to which its calls cost more than packing it, by device."""
ELSEWHERE = 2**17
"""The same on devices that take longer to start a kernel."""


def packs(params: Params, grads: Params, state: S) -> Iterator[list[str]]:
    """Names of parameters whose steps can be taken together: small, alike in dtype and device, of one age.

    Of one age are those whose 0-d state entries, such as counts of steps, are equal. Where these cannot be read, as
    while a step is compiled, every parameter is on its own.
    """
    alike: dict[object, list[str]] = {}
    for key, grad in grads.items():
        small = 0 < grad.ndim and grad.numel() <= SMALL.get(grad.device.type, ELSEWHERE)
        age = _age([field.get(key) for field in state]) if small and not torch.compiler.is_compiling() else None
        age = key if age is None else age
        alike.setdefault((params[key].dtype, grad.dtype, grad.device, age), []).append(key)
    yield from alike.values()


def together(
    update: Callable[[Tensor, Tensor, S, H], tuple[Tensor, S]],
    keys: list[str],
    params: Params,
    grads: Params,
    state: S,
    hypers: H,
) -> Iterator[tuple[str, Tensor, S]]:
    """Take the step of parameters that are alike, in one call of the update: name, new parameter, new state of each."""
    like = [params[key] for key in keys]
    dtype, sizes = like[0].dtype, [tensor.numel() for tensor in like]
    compute = compute_dtype(dtype)
    entries: list[Any] = [_packed(field, keys) for field in state]
    param, grad = _flat(like).to(compute), _flat(grads[key] for key in keys).to(compute)
    local: list[Any] = [_spread(h, keys, sizes, like[0].device) if isinstance(h, dict) else h for h in hypers]
    new, after = update(param, grad, type(state)(*entries), type(hypers)(*local))
    columns: list[Sequence[Any]] = [[None] * len(keys) for _ in entries]
    for place, (before, now) in enumerate(zip(entries, after, strict=True)):
        if before is not None and now is not None:
            columns[place] = _unpacked(now.to(before.dtype), like, sizes)
    for key, moved, *fields in zip(keys, _unpacked(new.to(dtype), like, sizes), *columns, strict=True):
        yield key, moved, type(state)(*fields)


def _age(entries: Iterable[Tensor | None]) -> object:
    """What must be equal for states to be packed: which entries there are, their dtypes or numbers; None: unknown."""
    try:
        return tuple(e if e is None else e.item() if e.ndim == 0 else e.dtype for e in entries)
    except RuntimeError:  # of tensors that are traced or batched
        return None


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _packed(field: Params, keys: list[str]) -> Tensor | None:
    """One entry of a state for all: theirs end to end, or the number that they share."""
    first = field.get(keys[0])
    return first if first is None or first.ndim == 0 else _flat(field[key] for key in keys)


def _unpacked(flat: Tensor, like: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """One tensor for each, with its shape, or a number of its own."""
    if flat.ndim == 0:
        return list(flat.repeat(len(like)).unbind())
    if flat.requires_grad:  # one backward for all; copied, as what split returns may not be changed in place
        return [part.view(p.shape).clone() for part, p in zip(torch.split(flat, sizes), like, strict=True)]
    starts = accumulate(sizes, initial=0)
    return [flat.narrow(0, at, size).view(p.shape) for at, size, p in zip(starts, sizes, like, strict=False)]


def _spread(hypers: Mapping[str, Number], keys: list[str], sizes: list[int], device: torch.device) -> Tensor:
    """A hyperparameter of each tensor, for each of its elements."""
    each = torch.stack([as_scalar(hypers[key]) for key in keys]).to(device)
    return each.repeat_interleave(torch.tensor(sizes, device=device))
