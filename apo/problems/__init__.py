"""Test problems with known answers."""

from apo.problems.functions import IllConditionedRegression, rosenbrock
from apo.problems.noisy_quadratic import Course, Moments, NoisyQuadratic, Policy
from apo.problems.schedules import LEARNING_RATES, PENALTIES, Best, Family, best, receding

__all__ = [
    "LEARNING_RATES",
    "PENALTIES",
    "Best",
    "Course",
    "Family",
    "IllConditionedRegression",
    "Moments",
    "NoisyQuadratic",
    "Policy",
    "best",
    "receding",
    "rosenbrock",
]
