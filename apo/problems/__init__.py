"""Test problems with known answers."""

from apo.problems.functions import IllConditionedRegression, rosenbrock

__all__ = ["IllConditionedRegression", "rosenbrock"]
