"""The experiments of Amortized Proximal Optimization, and the comparison of all optimizers that follows from them."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of

PAPER: Final = "Amortized Proximal Optimization"
# The paper's grids of λ for SGD and RMSprop (§5.2), its advice for Adam (App. G), and ours for the rest.
LAMBDAS: Final[dict[str, tuple[float, ...]]] = {
    "sgd": (0.1, 1e-2, 1e-3),
    "sgdm": (0.1, 1e-2, 1e-3),
    "rmsprop": (0.1, 1e-2, 1e-3, 1e-4, 1e-5, 0.0),
    "adam": (1.0, 0.1, 1e-2),
    "kfac": (1.0, 0.1, 1e-2),
    "apollo": (0.1, 1e-2, 1e-3, 0.0),
    "quasi-adam": (0.1, 1e-2, 1e-3, 0.0),
}
START: Final = {"sgd": 0.1, "sgdm": 0.1, "rmsprop": 1e-3, "adam": 1e-3, "kfac": 1e-3, "apollo": 0.1, "quasi-adam": 1e-3}
NAMES: Final = {
    "sgd": "SGD",
    "sgdm": "SGDm",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "kfac": "K-FAC",
    "apollo": "Apollo",
    "quasi-adam": "Quasi-Adam",
}


def lambdas(optimizer: str) -> tuple[Mapping[str, Any], ...]:
    """The grid of λ for an optimizer, as options of a curve."""
    return tuple({"fsd": value} for value in LAMBDAS[optimizer])


def task(budget: Budget, **of_short: Any) -> dict[str, Any]:
    """The fields of a task at a budget: digits and a few steps for smoke, the given ones else."""
    if budget == "smoke":
        return {"data": "digits", "model": of_short.get("model", "mlp"), "steps": 4, "log_every": 2, "eval_every": 4}
    steps = of_short["steps"]
    return {"log_every": max(1, steps // 60), "eval_every": max(1, steps // 15), **of_short}


def hand_and_apo(optimizer: str, fields: Mapping[str, Any], seeds: int) -> list[Curve]:
    """Three schedules with their own best learning rates; the paper's APO with λ searched; apo's default."""

    def method(name: str, **more: Any) -> Config:
        return Config(optimizer=optimizer, method=name, lr=START[optimizer], **fields, **more)

    default = {"fsd": 1.0} if optimizer == "kfac" else {}
    return [
        Curve("fixed", method("fixed"), walk="lr", seeds=seeds),
        Curve("cosine", method("cosine"), walk="lr", against="fixed", seeds=seeds),
        Curve("wsd", method("wsd"), walk="lr", against="fixed", seeds=seeds),
        Curve("APO, paper", method("apo", meta="paper"), options=lambdas(optimizer), against="fixed", seeds=seeds),
        Curve("APO, default", method("apo", **default), against="fixed", seeds=seeds),
    ]


def comparison(short: int | None = None, short_kfac: int | None = None, **of_full: Any) -> Callable[[Budget], Panels]:
    """The panels of one task: every optimizer with every way of setting its learning rate.

    Args:
        short: The steps at the budget short; None: as many as in full.
        short_kfac: The steps of K-FAC, whose steps are the dearest, at the budget short; None: as many as the others.
        of_full: Fields of the task.
    """

    def panels(budget: Budget) -> Panels:
        made: Panels = {}
        for optimizer in ("rmsprop", "kfac") if budget == "smoke" else tuple(NAMES):
            fewer = short_kfac if short_kfac and optimizer == "kfac" else short
            fields = task(budget, **of_full if budget == "full" or not fewer else {**of_full, "steps": fewer})
            made[NAMES[optimizer]] = hand_and_apo(optimizer, fields, seeds_of(budget))
        return made

    return panels


SMOKE: Final = "Smoke: digits, 4 steps and two optimizers, to see that everything runs; the numbers mean nothing."
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "comparison-mlp": Experiment(
        source=f"{PAPER}, §5.2.1, with every optimizer",
        title="Every optimizer on a small MLP: by hand and by APO",
        panels=comparison(data="fashion-mnist", examples=10_000, hidden=(200, 200), steps=6000),
        departs={
            "smoke": SMOKE,
            "short": "An MLP 784-200-200-10, the first 10,000 images of Fashion-MNIST, batches of 100, 6,000 steps (60 "
            "epochs). Learning rates set by hand are the best of a 1-3-10 grid, each schedule's own; λ is the best of "
            "the paper's grid (for K-FAC, Apollo and Quasi-Adam: of ours).",
            "full": "As short: this is the whole of it.",
        },
    ),
    "comparison-mlp-wide": Experiment(
        source=f"{PAPER}, §5.2.1, with every optimizer",
        title="Every optimizer on the paper's MLP: by hand and by APO",
        panels=comparison(data="fashion-mnist", steps=6000, short_kfac=600),
        departs={
            "smoke": SMOKE,
            "short": "An MLP 784-1000-1000-10, Fashion-MNIST in full, batches of 100, 6,000 steps (10 epochs); K-FAC, "
            "whose steps are many times dearer, 600 steps.",
            "full": "An MLP 784-1000-1000-10, Fashion-MNIST in full, batches of 100, 6,000 steps (10 epochs).",
        },
    ),
    "comparison-cnn": Experiment(
        source=f"{PAPER}, App. C, with every optimizer",
        title="Every optimizer on the paper's CNN: by hand and by APO",
        panels=comparison(data="fashion-mnist", model="cnn", steps=6000, short=1500),
        departs={
            "smoke": SMOKE,
            "short": "Two 5x5 convolutions (16, 32 filters) and a linear layer, Fashion-MNIST in full, batches of 100, "
            "1,500 steps (2.5 epochs).",
            "full": "Two 5x5 convolutions (16, 32 filters) and a linear layer, Fashion-MNIST in full, batches of 100, "
            "6,000 steps (10 epochs).",
        },
    ),
}
