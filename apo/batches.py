"""What batches and outputs look like: parts of them, and their names in messages."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def head(batch: Any, fraction: float) -> Any:
    """The leading fraction of the examples of a batch: of every tensor in it with a first dimension, at least one."""
    if fraction == 1.0:
        return batch
    if isinstance(batch, Tensor):
        return batch[: max(1, round(fraction * len(batch)))] if batch.ndim else batch
    if isinstance(batch, Mapping):
        parts = {key: head(value, fraction) for key, value in batch.items()}
        return parts if type(batch) is dict else type(batch)(parts)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(head(value, fraction) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(head(value, fraction) for value in batch)
    return batch


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


def describe(value: Any) -> str:
    """A value in a few words, for a message."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
