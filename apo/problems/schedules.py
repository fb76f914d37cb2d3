"""The best schedule of a family, for a problem whose expected loss is known exactly.

A family is a set of sequences, one number a step: learning rates of SGD, or λ of APO. The best of it minimises the
logarithm of the final loss, by L-BFGS on the gradient through the whole run (the paper, App. F, took Adam), from
several starts, since the landscape has local minima.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apo.checks import whole
from apo.problems.noisy_quadratic import Moments, NoisyQuadratic, Policy


class Family(NamedTuple):
    """A family of sequences.

    Attributes:
        sequence: From parameters [P] and the times t/T of all steps, [T], to the sequence, [T].
        starts: From the number of steps to where searches begin, each [P].
    """

    sequence: Callable[[Tensor, Tensor], Tensor]
    starts: Callable[[int], Sequence[Sequence[float]]]


class Best(NamedTuple):
    """The best sequence of a family.

    Attributes:
        loss: The expected loss after the last step.
        sequence: The sequence, [T].
        parameters: Its parameters, [P].
        losses: The final loss that each start led to.
    """

    loss: float
    sequence: Tensor
    parameters: Tensor
    losses: list[float]


def best(
    problem: NoisyQuadratic,
    policy: Callable[[Tensor], Policy],
    family: Family,
    steps: int,
    momentum: float = 0.0,
    iterations: int = 400,
) -> Best:
    """The best sequence of a family.

    A family of one's own is a function from its parameters and the times, and where to begin:

        inverse = Family(lambda u, t: u[0].exp() / (1.0 + u[1].exp() * t), lambda steps: [(0.0, 2.0)])
        found = best(problem, problem.scheduled, inverse, steps=300)

    A course that leaves the range of float64 on the way counts as infinitely bad. Some of the best exponential learning
    rates do that at high condition numbers; in smaller units, with ``start`` times u and ``noise`` times u², schedules
    are the same and losses u² times as large.

    Args:
        problem: The problem.
        policy: From a sequence to a policy: ``problem.scheduled`` for learning rates, ``problem.apo`` for λ.
        family: The family.
        steps: T.
        momentum: Of SGD.
        iterations: L-BFGS iterations from each start, at most.

    Returns:
        The best that any start led to. It may be a local minimum: `Best.losses` says whether the starts agree.

    Raises:
        TypeError: If ``steps`` or ``iterations`` is of the wrong type.
        ValueError: If one is below 1, a sequence is not [T], or no start leads to a finite loss.
    """
    whole("steps", steps)
    whole("iterations", iterations)
    times = torch.arange(steps, dtype=torch.float64) / steps

    def final(parameters: Tensor) -> Tensor:
        sequence = family.sequence(parameters, times)
        if sequence.shape != times.shape:
            raise ValueError(f"the family's sequence is of shape {list(sequence.shape)}, and must be [{steps}]")
        return problem.run(policy(sequence), steps, momentum).loss[-1]

    found = [_minimised(final, torch.tensor(start, dtype=torch.float64), iterations) for start in family.starts(steps)]
    losses = [loss for _, loss in found]
    parameters, loss = min(found, key=lambda pair: pair[1], default=(times, math.inf))
    if loss == math.inf:
        raise ValueError(f"no start of the family's {len(found)} leads to a finite loss: begin with shorter steps")
    return Best(loss, family.sequence(parameters, times), parameters, losses)


def receding(problem: NoisyQuadratic, horizon: int, steps: int, momentum: float = 0.0) -> Policy:
    """The policy that looks some steps ahead: it takes the fixed learning rate with the least expected loss then.

    It plans anew after every tenth of the horizon, with a learning rate in [1e-4, 10], and never looks beyond the end.
    A horizon of 1 is greedy.

    Args:
        problem: The problem.
        horizon: How many steps it looks ahead.
        steps: T, the length of the whole run.
        momentum: Of SGD.

    Returns:
        The policy.

    Raises:
        TypeError: If ``horizon`` or ``steps`` is not an int.
        ValueError: If one is below 1.
    """
    whole("horizon", horizon)
    whole("steps", steps)
    every, planned = max(1, horizon // 10), torch.tensor(0.0, dtype=torch.float64)

    def policy(step: int, moments: Moments) -> Tensor:
        nonlocal planned
        if step % every == 0:
            ahead = min(horizon, steps - step)
            grid = torch.logspace(-4.0, 1.0, 26, dtype=torch.float64)
            for _ in range(3):  # to a relative precision of 1e-3
                course = problem.run(problem.scheduled(grid[:, None].expand(-1, ahead)), ahead, momentum, moments)
                least = int(course.loss[..., -1].nan_to_num(math.inf).argmin())
                low, high = grid[max(least - 1, 0)], grid[min(least + 1, len(grid) - 1)]
                planned = grid[least]
                grid = torch.logspace(low.log10().item(), high.log10().item(), 26, dtype=torch.float64)
        return planned

    return policy


def _minimised(final: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Where L-BFGS leads from a start, and the loss there (infinite if it is not finite)."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=iterations,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = final(parameters).log().nan_to_num(math.inf, math.inf)  # line searches turn back at ∞, not at NaN
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    loss = final(parameters.detach()).item()
    return parameters.detach(), loss if math.isfinite(loss) else math.inf


def _ramps(steps: int, *ends: tuple[float, float]) -> list[list[float]]:
    """Straight lines in log space, as starts for free sequences."""
    return [torch.linspace(first, last, steps).tolist() for first, last in ends]


LEARNING_RATES = {
    "optimal": Family(lambda u, t: u.exp(), lambda steps: _ramps(steps, (0.0, -5.0), (1.0, -5.0))),
    "exponential": Family(lambda u, t: (u[0] + u[1] * t).exp(), lambda steps: [(0.0, -5.0), (2.0, -8.0), (-1.0, -3.0)]),
    "linear": Family(lambda u, t: u[0] + u[1] * t, lambda steps: [(1.0, -1.0), (1.5, -1.4), (0.1, 0.0)]),
    "fixed": Family(lambda u, t: u[0].exp().expand(len(t)), lambda steps: [(-1.0,), (-2.0,)]),
}
"""Families of learning rates; t runs from 0 to 1."""

PENALTIES = {
    "optimal": Family(lambda u, t: u.exp(), lambda steps: _ramps(steps, (-5.0, 5.0), (-3.0, 4.0))),
    "exponential": Family(lambda u, t: (u[0] + u[1] * t).exp(), lambda steps: [(-3.0, 7.0), (0.0, 1.0)]),
    "linear": Family(lambda u, t: u[0] + u[1] * t, lambda steps: [(-0.3, 5.0), (0.1, 1.0)]),
    "linear_nonnegative": Family(lambda u, t: u[0].exp() * (1.0 - t) + u[1].exp() * t, lambda steps: [(-1.0, 1.0)]),
    "linear_clipped": Family(
        lambda u, t: (u[0] + u[1] * t).clamp_min(0.0), lambda steps: [(-0.3, 5.0), (-1.0, 3.0), (-0.3, 0.6)]
    ),
    "fixed": Family(lambda u, t: u[0].exp().expand(len(t)), lambda steps: [(0.0,), (2.0,)]),
}
"""Families of λ: only "linear" may be negative."""
