"""The experiments by name: every table and figure, by one command."""

from typing import Final

from baselines.experiments import apo, apo_figures, peers
from baselines.experiments.base import BUDGETS, Experiment

__all__ = ["BUDGETS", "EXPERIMENTS", "Experiment"]

EXPERIMENTS: Final[dict[str, Experiment]] = {**apo_figures.EXPERIMENTS, **apo.EXPERIMENTS, **peers.EXPERIMENTS}
