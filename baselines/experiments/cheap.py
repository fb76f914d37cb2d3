"""What cheaper judgements cost in quality: apo's default against itself, with less to compute at a meta-step."""

from collections.abc import Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import NAMES, SMOKE, task
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of

LOSSES: Final = {"curvature": "losses"}
CHEAPER: Final[Mapping[float, Mapping[str, Mapping[str, Any]]]] = {
    0.0: {"exact": {}, "by losses": LOSSES},
    0.1: {
        "exact": {},
        "half of B'": {"other_fraction": 0.5},
        "quarter of B'": {"other_fraction": 0.25},
        "linear loss": {"loss_model": "linear"},
        "linear loss, half of B'": {"loss_model": "linear", "other_fraction": 0.5},
        "by losses": LOSSES,
        "by losses, half of B'": {**LOSSES, "other_fraction": 0.5},
    },
}
TASKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "digits, 10% of the labels random": {"data": "digits", "model": "mlp", "label_noise": 0.1, "batch_size": 50},
    "Fashion-MNIST": {"data": "fashion-mnist", "model": "mlp", "examples": 10_000},
}
STEPS: Final[Mapping[Budget, int]] = {"smoke": 4, "short": 3_000, "full": 6_000}


def panels(budget: Budget) -> Panels:
    """A panel for each task, optimizer and λ."""
    made: Panels = {}
    for name, fields in TASKS.items():
        for optimizer in ("sgd", "adam"):
            for fsd, ways in CHEAPER.items():
                own = task(budget, **fields, steps=STEPS[budget])
                made[f"{name}, {NAMES[optimizer]}, λ = {fsd:g}"] = [
                    Curve(
                        label,
                        Config(optimizer=optimizer, method="apo", lr=1e-3, fsd=fsd, relaxation=1.0, **own, **options),
                        against=None if label == "exact" else "exact",
                        seeds=seeds_of(budget),
                    )
                    for label, options in ways.items()
                ]
    return made


NOTE: Final = (
    "A meta-step every ten steps, from a learning rate of 1e-3, with `relaxation=1`. By losses: "
    "`apo.Newton(curvature='losses')`, which takes no gradient at the end of the step; the other ways are fields of "
    "`apo.Proximal`."
)
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "cheap-judgements": Experiment(
        "apo",
        "What cheaper judgements cost in quality",
        panels,
        {
            "smoke": SMOKE,
            "short": f"MLPs, {STEPS['short']:,} steps. {NOTE}",
            "full": f"MLPs, {STEPS['full']:,} steps. {NOTE}",
        },
    )
}
