"""The experiments by name: every table and figure, by one command."""

from typing import Final

from baselines.experiments import apo, peers
from baselines.experiments.base import BUDGETS, Experiment

__all__ = ["BUDGETS", "EXPERIMENTS", "Experiment"]

EXPERIMENTS: Final[dict[str, Experiment]] = {**apo.EXPERIMENTS, **peers.EXPERIMENTS}
