"""The arithmetic that rules are made of: one pass where a number is plain, a tape where it is tuned."""

import torch
from torch import Tensor

Number = Tensor | float
"""A 0-d tensor, which may be differentiated by, or a plain number, which costs less."""


def scaled(times: Number, a: Tensor) -> Tensor:
    """times·a."""
    return a if isinstance(times, float) and times == 1.0 else times * a


def plus(a: Tensor, times: Number, b: Tensor) -> Tensor:
    """The sum a + times·b."""
    return a + times * b if isinstance(times, Tensor) else torch.add(a, b, alpha=times)


def average(beta: Number, old: Tensor, new: Tensor) -> Tensor:
    """βold + (1 − β)new, a running average."""
    if isinstance(beta, Tensor):
        return beta * old + (1.0 - beta) * new
    return torch.add(beta * old, new, alpha=1.0 - beta)  # not by lerp, which is NaN from infinity on


def average_square(beta: Number, old: Tensor, new: Tensor) -> Tensor:
    """βold + (1 − β)new²."""
    if isinstance(beta, Tensor):
        return average(beta, old, new.square())
    return torch.addcmul(beta * old, new, new, value=1.0 - beta)


def plus_ratio(a: Tensor, times: Number, b: Tensor, c: Tensor) -> Tensor:
    """The sum a + times·b/c."""
    return a + times * (b / c) if isinstance(times, Tensor) else torch.addcdiv(a, b, c, value=times)


def plus_number(a: Tensor, number: Number) -> Tensor:
    """The sum a + number, in the place of a where nothing is differentiated."""
    return a + number if isinstance(number, Tensor) or a.requires_grad else a.add_(number)


def alike(*columns: list[Tensor]) -> bool:
    """Whether tensors in the same place can go through a kernel of torch's together.

    They are of one dtype, float32 or better, and contiguous: kernels that are fused go through memory in its order.
    """
    wide = (torch.float32, torch.float64)
    return all(
        first.dtype in wide and all(t.dtype == first.dtype and t.is_contiguous() for t in (first, *others))
        for first, *others in zip(*columns, strict=True)
    )


TINY = torch.finfo(torch.float32).tiny
"""The least ε that kernels of torch's can be given: below it they divide by zero where a square is zero."""


def on_cpu(params: list[Tensor]) -> bool:
    """Whether all are on the CPU, where fused kernels of torch's are the fastest."""
    return all(param.is_cpu for param in params)


def count(entry: Tensor) -> Number:
    """A 0-d state entry as a plain number, for no derivative is with respect to it; float64 [] while it is traced."""
    if torch.compiler.is_compiling():
        return entry.double()
    try:
        return float(entry)
    except RuntimeError:  # batched by vmap
        return entry.double()
