"""APO against population-based training: Figure 15 of Amortized Proximal Optimization."""

import dataclasses
from typing import Final

from baselines.config import Config
from baselines.experiments.apo import PAPER, SMOKE, lambdas, task
from baselines.experiments.base import ROWS, Budget, Curve, Experiment, Panels


def _panels(budget: Budget) -> Panels:
    """RMSprop on one task: by hand, by APO and by a population, whose initial learning rate is searched."""
    fields = task(budget, data="fashion-mnist", model="cnn", steps=3000 if budget == "short" else 30_000)
    by_hand = Config(method="fixed", optimizer="rmsprop", **fields)
    paper = dataclasses.replace(by_hand, method="apo", meta="paper")
    curves = [
        Curve("fixed", by_hand, walk="lr"),
        Curve("APO, paper", paper, options=lambdas("rmsprop"), against="PBT"),
        Curve("APO, default", dataclasses.replace(by_hand, method="apo"), against="PBT"),
        Curve("PBT", dataclasses.replace(by_hand, method="pbt"), walk="lr"),
    ]
    if budget == "smoke":  # every population starts Ray, or a process of its own
        return {"RMSprop": [dataclasses.replace(c, walk=None, options=c.options[:1], seeds=1) for c in curves]}
    return {"RMSprop": curves}


STAND_IN: Final = (
    "The CNN (two 5x5 convolutions of 16 and 32 filters, one linear layer) on Fashion-MNIST stands in for the paper's "
    "ResNet34 on CIFAR-10, and a core for its GPU. As there, 4 networks, factors 0.8 and 1.2, nothing drawn anew. "
    "Ours: 20 perturbations a run, at which the worst network goes on from the best one, by the mean batch loss since "
    "the last; the initial learning rate is the best of a 1-3-10 grid. PBT's curves are those of the best network at "
    "each time, and its seconds those of all 4."
)
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "apo-fig15": Experiment(
        f"{PAPER}, Fig. 15",
        "APO and population-based training, over time",
        _panels,
        {
            "smoke": SMOKE,
            "short": f"{STAND_IN} 3,000 steps (5 epochs), batches of 100.",
            "full": f"{STAND_IN} 30,000 steps (50 epochs), batches of 100.",
        },
        rows=ROWS,
        along="seconds",
    ),
}
