"""The experiments by name: every table and figure, by one command."""

from baselines.experiments.apo import EXPERIMENTS
from baselines.experiments.base import BUDGETS, Experiment

__all__ = ["BUDGETS", "EXPERIMENTS", "Experiment"]
