"""APO against what a user would pick instead, at equal steps and at equal time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import SMOKE, task
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of

Peers = tuple[tuple[str, str, str, bool], ...]
"""Label, optimizer, method, and whether a learning rate is searched: the others have their authors', in `METHODS`."""
SGD: Final[Peers] = (
    ("hypergradient descent", "sgd", "hd", False),
    ("gdtuo", "sgd", "gdtuo", False),
    ("D-Adaptation", "sgd", "dadapt", False),
    ("DoG", "sgd", "dog", False),
    ("GeN", "sgd", "gen", False),
    ("schedule-free", "sgdm", "schedule-free", True),
    ("plateau", "sgd", "plateau", True),
)
ADAM: Final[Peers] = (
    ("hypergradient descent", "adam", "hd", False),
    ("gdtuo", "adam", "gdtuo", False),
    ("Prodigy", "adam", "prodigy", False),
    ("D-Adaptation", "adam", "dadapt", False),
    ("GeN", "adam", "gen", False),
    ("schedule-free", "adamw", "schedule-free", True),
    ("plateau", "adam", "plateau", True),
    ("PBT", "adam", "pbt", True),
)
# By family: the optimizer that is tuned, its initial learning rate by hand, and its peers.
FAMILIES: Final = {"SGD": ("sgd", 0.1, SGD), "Adam": ("adam", 1e-3, ADAM)}


def curves(optimizer: str, lr: float, peers: Peers, fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    """The optimizer by hand and by APO, and its peers."""
    found = [
        Curve("fixed", Config(optimizer=optimizer, method="fixed", lr=lr, **fields), walk="lr", seeds=seeds),
        Curve("cosine", Config(optimizer=optimizer, method="cosine", lr=lr, **fields), walk="lr", seeds=seeds),
        Curve("APO", Config(optimizer=optimizer, method="apo", **fields), seeds=seeds),
    ]
    for label, base, method, searched in peers:
        own: dict[str, Any] = {**fields, "lr": lr} if searched else {**fields}
        config = Config(optimizer=base, method=method, **own)
        found.append(Curve(label, config, walk="lr" if searched else None, seeds=seeds))
    return [dataclasses.replace(curve, against=None if curve.label == "APO" else "APO") for curve in found]


def against_peers(**of_short: Any) -> Callable[[Budget], Panels]:
    """The panels of one task: both families, at equal steps and at equal time."""

    def panels(budget: Budget) -> Panels:
        fields, smoke = task(budget, **of_short), budget == "smoke"
        made: Panels = {}
        for family, (optimizer, lr, peers) in FAMILIES.items():
            few = tuple(peer for peer in peers if not (smoke and peer[2] == "pbt"))  # each population starts Ray
            same_steps = curves(optimizer, lr, few, fields, seeds_of(budget))
            made[f"{family}, equal steps"] = same_steps
            made[f"{family}, equal time"] = [
                dataclasses.replace(curve, time_of=same_steps[0]) if curve is not same_steps[0] else curve
                for curve in same_steps
            ]
        return made

    return panels


NOTE: Final = (
    "Ratios are over APO's loss: above 1, APO's is the lower. Equal time: each winner is run again with as many steps "
    "as fit into the time of the fixed learning rate's run. APO is the default, from learning rate 1e-3; the others "
    "start where their authors say, or have their learning rate searched where something won."
)


def _experiment(what: str, **of_short: Any) -> Experiment:
    length = f"{of_short['steps']:,} steps"
    return Experiment(
        source="The comparison that a user would make",
        title=f"APO and its peers on {what}",
        panels=against_peers(**of_short),
        departs={"smoke": SMOKE, "short": f"{length}. {NOTE}", "full": f"{length}. {NOTE}"},
    )


EXPERIMENTS: Final[dict[str, Experiment]] = {
    "peers-mlp": _experiment(
        "a small MLP (784-200-200-10, 10,000 images of Fashion-MNIST)",
        data="fashion-mnist",
        examples=10_000,
        hidden=(200, 200),
        steps=6000,
    ),
    "peers-mlp-wide": _experiment(
        "the paper's MLP (784-1000-1000-10, Fashion-MNIST)", data="fashion-mnist", steps=6000
    ),
    "peers-cnn": _experiment("the paper's CNN (Fashion-MNIST)", data="fashion-mnist", model="cnn", steps=1500),
}
