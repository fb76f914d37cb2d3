"""What batches and outputs look like: parts of them, and their names in messages."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from apo.conditions import Conditions


class Fed(NamedTuple):
    """A batch that the training has made a gradient of.

    Attributes:
        batch: The batch.
        weight: Its weight in the mean over batches.
        conditions: Of the forward that gave its gradient; None if unknown.
        outputs: What came out of that forward, the model being given the batch as it is here; None if unknown.
    """

    batch: Any
    weight: float
    conditions: Conditions | None
    outputs: Tensor | None


def head(batch: Any, fraction: float) -> Any:
    """The leading fraction of the examples of a batch: of every tensor in it with a first dimension, at least one."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[: max(1, round(fraction * len(tensor)))] if tensor.ndim else tensor

    return batch if fraction == 1.0 else mapped(cut, batch)


def detached(batch: Any) -> Any:
    """A batch without the graphs that its tensors carry, fit for a backward also if made in inference mode."""

    def plain(tensor: Tensor) -> Tensor:
        if tensor.is_inference():
            return tensor.clone()
        return tensor.detach() if tensor.grad_fn is not None else tensor

    return mapped(plain, batch)


def mapped(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with a function applied to its tensors, in mappings, tuples and lists; anything else stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if type(batch) in (list, tuple):
        return type(batch)(mapped(function, value) for value in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(function, value) for value in batch))
    if isinstance(batch, Mapping):
        parts = {key: mapped(function, value) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    return batch


def tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors in outputs: in mappings, sequences, and the attributes of anything else, with what they hold."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (list, tuple, Mapping)):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from tensors(value)
    elif hasattr(outputs, "__dict__"):
        for value in vars(outputs).values():
            if isinstance(value, (Tensor, list, tuple, Mapping)):
                yield from tensors(value)


def logits(outputs: Any) -> Tensor:
    """The tensor in which outputs are compared: themselves, or their ``logits``.

    Raises:
        TypeError: If there is none.
    """
    tensor = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"outputs must be a tensor or have .logits, not {describe(outputs)}; pass forward= or evaluate="
        )
    return tensor


def themselves(outputs: Any) -> Any:
    """What a loss function is given of outputs."""
    return outputs


def own_loss(outputs: Any) -> Any:
    """The loss that outputs have, or are."""
    return getattr(outputs, "loss", outputs)


def describe(value: Any) -> str:
    """A value in a few words, for a message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
