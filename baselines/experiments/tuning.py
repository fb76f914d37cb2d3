"""How well learning rates are tuned: apo's default from far-off starts, against the best by hand and the peers."""

from collections.abc import Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import NAMES, SMOKE, START, task
from baselines.experiments.base import Budget, Curve, Experiment, Panels

TASKS: Final[Mapping[str, Mapping[str, Any]]] = {
    "digits, 10% of the labels random, MLP": {"data": "digits", "label_noise": 0.1, "batch_size": 50},
    "Fashion-MNIST, MLP": {"data": "fashion-mnist", "examples": 10_000, "hidden": (100, 100)},
    "digits, CNN": {"data": "digits", "model": "cnn", "batch_size": 32},
}
BASES: Final = {name: NAMES[name] for name in ("sgd", "sgdm", "rmsprop")} | {"adamw": "AdamW"}
STARTS: Final = (1e-6, 1e-3, 1.0)
PEERS: Final = {
    "sgd": (("DoG", "sgd", "dog"), ("D-Adaptation", "sgd", "dadapt")),
    "sgdm": (("schedule-free", "sgdm", "schedule-free"),),
    "rmsprop": (),
    "adamw": (("Prodigy", "adamw", "prodigy"), ("schedule-free", "adamw", "schedule-free")),
}
"""Label, optimizer and method; of schedule-free the learning rate is searched."""
STEPS: Final[Mapping[Budget, int]] = {"smoke": 4, "short": 1_500, "full": 6_000}


def curves(optimizer: str, fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    """The best by hand, apo from every start without a schedule and with one, and peers that choose for themselves."""
    lr, hand = START.get(optimizer, 1e-3), []
    for method in ("fixed", "cosine", "wsd"):
        config = Config(optimizer=optimizer, method=method, lr=lr, **fields)
        hand.append(Curve(method, config, walk="lr", against=None if method == "fixed" else "fixed", seeds=seeds))
    tuned = [
        Curve(
            f"APO{', wsd' if relative == 'wsd' else ''}, from {start:g}",
            Config(optimizer=optimizer, method="apo", lr=start, relative=relative, **fields),
            against="fixed" if relative == "constant" else "wsd",
            seeds=seeds,
        )
        for relative in ("constant", "wsd")
        for start in STARTS
    ]
    peers = [
        Curve(label, Config(optimizer=base, method=method, **fields), walk=walk, against="fixed", seeds=seeds)
        for label, base, method in PEERS[optimizer]
        for walk in ["lr" if method == "schedule-free" else None]
    ]
    return hand + tuned + peers


def panels(budget: Budget) -> Panels:
    """A panel for each task and optimizer."""
    seeds = 1 if budget == "smoke" else 2
    tasks = list(TASKS.items())[:1] if budget == "smoke" else TASKS.items()
    bases = ("sgdm", "adamw") if budget == "smoke" else BASES
    return {
        f"{name}, {BASES[optimizer]}": curves(optimizer, task(budget, **fields, steps=STEPS[budget]), seeds)
        for name, fields in tasks
        for optimizer in bases
    }


NOTE: Final = (
    "Two seeds. APO is `apo.APO(model, optimizer, loss)` and nothing else, a meta-step every ten steps; with wsd, "
    "`relative=` constant, then linear to 0 over the last 30%. The digits MLP and the Fashion-MNIST MLP were used to "
    "choose the defaults; the CNN was not. Of schedule-free the learning rate is searched as by hand."
)
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "tuning": Experiment(
        "apo",
        "How well learning rates are tuned",
        panels,
        {
            "smoke": SMOKE,
            "short": f"{STEPS['short']:,} steps. {NOTE}",
            "full": f"{STEPS['full']:,} steps. {NOTE}",
        },
    )
}
