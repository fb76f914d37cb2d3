"""The leaves of a graph: whether they are cast, and their gradients, set aside where a backward must not reach them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import Node


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
    return [cast(Any, node).variable for node in _nodes_below(root) if _is_leaf(node)]


def casts_leaves(root: Tensor) -> bool:
    """Whether leaves are cast to another dtype before they are used, as autocast casts weights."""
    casts = (node for node in _nodes_below(root) if node.name() == "ToCopyBackward0")
    return any(_is_leaf(below) for node in casts for below, _ in node.next_functions)


def _is_leaf(node: Node | None) -> bool:
    """Whether a node accumulates into a leaf; a function of the user's own may have any attribute, but another name."""
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def _nodes_below(root: Tensor) -> Iterator[Node]:
    """Every node of a graph, once."""
    seen: set[Node] = set()
    nodes = [root.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(after for after, _ in node.next_functions)
