"""Small algebra on tensors by name: the leaves of a state, inner products, norms."""

from collections.abc import Iterable

import torch
from torch import Tensor

from apo.types import H, Params, S


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


def scalar(value: float) -> Tensor:
    """A number as hyperparameters and counts are kept: [], float64, on the CPU, whatever the default device is."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def as_scalar(value: Tensor | float) -> Tensor:
    """A plain number as `scalar`, a tensor as it is."""
    return value if isinstance(value, Tensor) else scalar(value)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a rule computes: the parameter's own, but never below float32."""
    return torch.promote_types(dtype, torch.float32)


def add_part(gradient: Params, name: str, part: Tensor) -> None:
    """Add a part to the gradient of a parameter, of which there may be none yet."""
    gradient[name] = gradient[name] + part if name in gradient else part


def dense(tensor: Tensor) -> Tensor:
    """A tensor in the ordinary layout: itself, or what a sparse one stands for."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two tensors of one shape, [], in float32 or better."""
    dtype = compute_dtype(torch.promote_types(a.dtype, b.dtype))
    return torch.dot(a.to(dtype).reshape(-1), b.to(dtype).reshape(-1))


def total(terms: Iterable[Tensor]) -> float:
    """The sum of 0-d tensors in float64, with one transfer from each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for term in terms:
        by_device.setdefault(term.device, []).append(term)
    return sum((torch.stack(parts).sum(dtype=torch.float64).item() for parts in by_device.values()), start=0.0)


def half_square(delta: Params) -> Tensor:
    """The weight-space discrepancy ½‖Δ‖², []."""
    return 0.5 * sum((inner(d, d) for d in delta.values()), start=torch.zeros((), device="cpu"))


def detached(state: S) -> S:
    """A state without its graph."""
    return rebuild(state, [tensor.detach() for tensor in leaves(state)])
