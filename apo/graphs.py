"""The leaves of a graph, and their gradients set aside while a backward runs that must not reach them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor


@contextmanager
def aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Set ``.grad`` of leaves aside, and put it back at the end."""
    kept = [(tensor, tensor.grad) for tensor in tensors]
    try:
        for tensor, _ in kept:
            tensor.grad = None
        yield
    finally:
        for tensor, grad in kept:
            tensor.grad = grad


def leaves_below(root: Tensor) -> list[Tensor]:
    """The leaves of a graph into which its backward accumulates."""
    found, seen, nodes = [], set(), [root.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(cast(Tensor, node.variable))
        nodes.extend(after for after, _ in node.next_functions)
    return found
