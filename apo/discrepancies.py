"""How far outputs have moved: the discrepancy D of the proximal objective.

    squared_error   D(z, z_k) = ‖z − z_k‖²                          paper, Eq. 7,  Gauss-Newton
    kl              D(z, z_k) = KL(softmax z ‖ softmax z_k)         paper, Eq. 9,  natural gradient
    bregman         D(z, z_k) = ℓ(z) − ℓ(z_k) − ⟨∇ℓ(z_k), z − z_k⟩  paper, Eq. 8,  generalised Gauss-Newton
    gauss_newton    D(z, z_k) = (z − z_k)ᵀ ∇²ℓ(z_k) (z − z_k)       paper, Eq. 16, proximal Newton at λ = ½

Each takes outputs ``new`` and ``old`` and, where it involves the loss, ``loss`` and ``targets``; it returns one number
an example, [B], or their mean, []. Every discrepancy is zero, with zero gradient, at equality.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Any, Any], Tensor]
Discrepancy = Callable[..., Tensor]


def squared_error(new: Tensor, old: Tensor) -> Tensor:
    """Squared error: summed over the outputs of an example (paper, Eq. 7).

    Args:
        new: Outputs, [B, ...]; [B, T, V] is a sequence: summed over V, averaged over T.
        old: Outputs, shaped as ``new``.

    Returns:
        One number an example, [B].
    """
    _check_alike(new, old)
    squares = (new - old).square()
    if squares.ndim == 3:
        return squares.sum(-1).mean(-1)
    return squares.reshape(len(squares), -1).sum(-1) if squares.ndim > 1 else squares


def kl(new: Tensor, old: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p_new ‖ p_old) of categorical distributions given by logits (paper, Eq. 9).

    Args:
        new: Logits, [B, ..., V], classes last.
        old: Logits, shaped as ``new``.

    Returns:
        One number an example, [B]; the mean over the dimensions between.
    """
    _check_alike(new, old)
    log_new, log_old = F.log_softmax(new, -1), F.log_softmax(old, -1)
    divergence = (log_new.exp() * (log_new - log_old)).sum(-1)
    return divergence.reshape(len(divergence), -1).mean(-1) if divergence.ndim > 1 else divergence


def bregman(new: Tensor, old: Tensor, loss: Loss, targets: Any) -> Tensor:
    """Bregman divergence of the loss as a function of the outputs (paper, Eq. 8).

    Args:
        new: Outputs, [B, ...].
        old: Outputs, shaped as ``new``.
        loss: ``loss(outputs, targets) -> []``, averaged over examples.
        targets: Whatever ``loss`` takes.

    Returns:
        The mean over examples, [].
    """
    slope: Tensor = torch.func.grad(loss)(old, targets)
    return loss(new, targets) - loss(old, targets) - (slope * (new - old)).sum()


def gauss_newton(new: Tensor, old: Tensor, loss: Loss, targets: Any) -> Tensor:
    """Squared length of the change in the metric of the loss's Hessian in output space (paper, Eq. 16).

    There is no factor ½: λ = ½ makes the proximal step a Newton step, and this is twice the second-order term of
    `bregman`.

    Args:
        new: Outputs, [B, ...].
        old: Outputs, shaped as ``new``.
        loss: ``loss(outputs, targets) -> []``, averaged over examples, twice differentiable.
        targets: Whatever ``loss`` takes.

    Returns:
        The mean over examples, [].
    """
    change = new - old

    def slope(z: Tensor) -> Tensor:
        return cast(Tensor, torch.func.grad(loss)(z, targets))

    product: Tensor = torch.func.vjp(slope, old)[1](change.detach())[0]
    length = (change.detach() * product).sum()
    return 2.0 * (change * product).sum() - length  # a quadratic form: its value is `length`, its gradient 2HΔz


def mean_of(discrepancy: Discrepancy, new: Tensor, old: Tensor) -> Tensor:
    """The mean of a discrepancy ``D(new, old)`` over examples, [].

    Raises:
        TypeError: If it returns no tensor of floats.
    """
    value: Any = discrepancy(new, old)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"discrepancy={discrepancy!r} must return a tensor of floats, [] or [B], not {value!r}")
    mean: Tensor = value.mean()
    return mean


def _check_alike(new: Any, old: Any) -> None:
    """Raise if these are not tensors of one shape."""
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        raise TypeError(f"outputs must be tensors, not a {type(new).__name__} and a {type(old).__name__}")
    if new.shape != old.shape:
        raise ValueError(f"outputs of shapes {list(new.shape)} and {list(old.shape)} cannot be compared")


def check_vanishes(discrepancy: Discrepancy, outputs: Tensor) -> None:
    """Check that a discrepancy vanishes at equality, with its gradient; else Q has the wrong slope at a zero step.

    Args:
        discrepancy: ``D(new, old)`` that returns [] or [B].
        outputs: Any outputs, [B, ...].

    Raises:
        ValueError: If its value or its gradient there is not zero, to half the digits of the outputs' dtype.
    """
    old = outputs.detach()
    new = old.clone().requires_grad_()
    with torch.enable_grad():
        value = mean_of(discrepancy, new, old)
    slope = torch.autograd.grad(value, new, allow_unused=True)[0] if value.requires_grad else None
    if slope is None:
        raise ValueError(f"discrepancy={discrepancy!r} does not depend on its first argument, the new outputs")
    largest = torch.cat([value.detach().reshape(1), slope.reshape(-1)]).abs().max()
    if not largest <= torch.finfo(outputs.dtype).eps ** 0.5:
        raise ValueError(
            f"discrepancy={discrepancy!r} must be zero with zero gradient at equality, but has "
            f"value {value.item():.3g} and a gradient of up to {slope.abs().max().item():.3g} there"
        )


BY_NAME: dict[str, Discrepancy] = {
    "squared_error": squared_error,
    "kl": kl,
    "bregman": bregman,
    "gauss_newton": gauss_newton,
}
NEEDS_LOSS = ("bregman", "gauss_newton", bregman, gauss_newton)
