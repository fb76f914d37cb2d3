"""The experiments by name: every table and figure, by one command."""

from typing import Final

from baselines.experiments import (
    apo,
    apo_figures,
    apollo,
    apollo_language,
    cheap,
    peers,
    populations,
    quasi_adam,
    residual,
    tuning,
)
from baselines.experiments.base import BUDGETS, Experiment

__all__ = ["BUDGETS", "EXPERIMENTS", "Experiment"]

EXPERIMENTS: Final[dict[str, Experiment]] = {
    name: experiment
    for module in (apo_figures, residual, populations, apollo, apollo_language, quasi_adam, apo, peers, cheap, tuning)
    for name, experiment in module.EXPERIMENTS.items()
}
