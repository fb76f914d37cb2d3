"""The experiments of the Apollo paper on images: its tables 1, 4 and 5, and its figures 1, 2 and 5."""

import math
from collections.abc import Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import task
from baselines.experiments.apollo_language import fields as language
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of
from baselines.experiments.residual import fields

PAPER: Final = "Apollo"
EXAMPLES: Final = 50_000  # of CIFAR-10, in whose steps the paper counts
WARMED: Final = 100  # steps
STEPS: Final = 300  # on the stand-in
# By label: the optimizer, its learning rate and weight decay (App. C.1), and whether it is warmed up. Adjusted: the
# product of weight decay and learning rate is Apollo's.
ROWS: Final[dict[str, tuple[dict[str, Any], bool]]] = {
    "SGDm": ({"optimizer": "sgdm", "lr": 0.1, "weight_decay": 5e-4}, False),
    "Adam": ({"optimizer": "adamw", "lr": 1e-3, "weight_decay": 5e-4}, False),
    "RAdam": ({"optimizer": "radamw", "lr": 1e-3, "weight_decay": 5e-4}, False),
    "Adam, adjusted": ({"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.25}, False),
    "RAdam, adjusted": ({"optimizer": "radamw", "lr": 1e-3, "weight_decay": 0.25}, False),
    "AdaHessian": ({"optimizer": "adahessian", "lr": 0.15, "eps": 1e-2, "weight_decay": 1e-3}, True),
    "Apollo": ({"optimizer": "apollo", "lr": 0.5, "weight_decay": 5e-4}, True),
}
SCHEDULES: Final[dict[str, tuple[int, dict[str, Any]]]] = {  # epochs, and the method
    "milestones": (164, {"method": "step", "decay_at": (80 / 164, 120 / 164)}),
    "cosine": (200, {"method": "cosine"}),
}
SMALL: Final = ("RAdam, adjusted", "Apollo")  # of these, at the budget smoke
FACTORS: Final = (0.2, 1.0, 2.0, 10.0)
RATES: Final = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01, 0.005)


def configuration(budget: Budget, label: str, schedule: str, factor: float = 1.0) -> Config:
    """A row of Table 1 under a schedule; its learning rate times a factor, and its weight decay over it."""
    row, warmed = ROWS[label]
    epochs, method = SCHEDULES[schedule]
    own = fields(budget, STEPS, data="cifar10", model="resnet110", epochs=epochs)
    warmup = WARMED / (epochs * math.ceil(EXAMPLES / 128)) if budget == "full" else 0.1
    scaled = {"lr": row["lr"] * factor, "weight_decay": row["weight_decay"] / factor}
    return Config(**own, **method, **row | scaled, warmup=warmup if warmed else 0.0)


def table1(budget: Budget) -> Panels:
    """Every optimizer under two schedules."""
    return {
        schedule: [
            Curve(
                label,
                configuration(budget, label, schedule),
                against=None if label == "Apollo" else "Apollo",
                seeds=seeds_of(budget),
            )
            for label in (SMALL if budget == "smoke" else ROWS)
        ]
        for schedule in SCHEDULES
    }


def robustness(budget: Budget) -> Panels:
    """Fig. 2: the learning rate of Table 1 times a factor."""
    return {
        label: [
            Curve(
                f"× {factor:g}",
                configuration(budget, label, "milestones", factor),
                against=None if factor == 1.0 else "× 1",
                seeds=seeds_of(budget),
            )
            for factor in FACTORS
        ]
        for label in (SMALL if budget == "smoke" else ("SGDm", "Adam, adjusted", "RAdam, adjusted", "Apollo"))
    }


def cost(budget: Budget) -> Panels:
    """Table 5: the time that a step takes."""
    tasks: dict[str, dict[str, Any]] = {
        "residual network": fields(budget, 100, data="cifar10", model="resnet110", epochs=1),
        "CNN": task(budget, data="fashion-mnist", examples=10_000, model="cnn", steps=200),
        "MLP": task(budget, data="fashion-mnist", examples=10_000, steps=200),
        "LSTM": language("smoke" if budget == "smoke" else "short", "lstm", 100),
        "Transformer": language("smoke" if budget == "smoke" else "short", "transformer", 100),
    }
    return {
        name: [
            Curve(
                label,
                Config(method="fixed", **own, **ROWS[label][0]),
                against=None if label == "SGDm" else "SGDm",
                seeds=seeds_of(budget),
            )
            for label in ("SGDm", "Adam", "Apollo", "AdaHessian")
        ]
        for name, own in tasks.items()
    }


def toy(budget: Budget) -> Panels:
    """Fig. 5: SdLBFGS and Apollo, the learning rate decayed after every epoch."""
    epochs = 50 if budget == "full" else 10
    data: dict[str, Any] = {"data": "cifar10"} if budget == "full" else {"data": "fashion-mnist", "examples": 10_000}
    examples = EXAMPLES if budget == "full" else 10_000
    steps = epochs * math.ceil(examples / 64)
    # The images of digits are too small for the paper's CNN.
    own = task(budget, **data, model="cnn" if budget == "smoke" else "toy-cnn", batch_size=64, steps=steps)
    decay: dict[str, Any] = {"decay_factor": 0.95, "decay_at": tuple(epoch / epochs for epoch in range(1, epochs))}
    rates = [{"lr": lr} for lr in (RATES[3:4] if budget == "smoke" else RATES)]

    def curve(label: str, optimizer: str, warmup: float = 0.0) -> Curve:
        config = Config(optimizer=optimizer, method="step", warmup=warmup, **decay, **own)
        against = None if optimizer == "apollo" else "Apollo"
        return Curve(label, config, options=tuple(rates), against=against, seeds=seeds_of(budget))

    return {
        "toy CNN": [
            curve("SdLBFGS, released code", "sdlbfgs-released"),
            curve("SdLBFGS", "sdlbfgs"),
            curve("Apollo", "apollo", 10 / steps),
        ]
    }


SMOKE: Final = "Smoke: digits, 4 steps and some of the curves, to see that everything runs; the numbers mean nothing."
STAND_IN: Final = (
    "A stand-in, on a CPU: Fashion-MNIST's first 10,000 images and a ResNet-8 of 78,000 parameters, {steps} steps of "
    "128 images, with random crops and reflections; the paper has CIFAR-10 and a ResNet-110 of 1.73 million "
    "parameters, {of}. "
)
OURS: Final = (
    "SGDm is our `sgdm`, with Nesterov momentum 0.9; decay is decoupled for Adam, RAdam and AdaHessian, and L2 for "
    "SGDm and Apollo. Warm-up is from 0 instead of 0.01."
)
SETTING: Final = (
    f"The learning rates and weight decays are the paper's. {OURS} The schedules' steps are at the paper's fractions "
    "of the run; the warm-up of Apollo and AdaHessian is a tenth of it, because the paper's 100 steps are a third."
)
FULL: Final = f"The paper's setting, with three seeds instead of five and without ImageNet. {OURS}"

BESIDE: Final = (
    "Beside it the CNN and the MLP of the APO paper, 200 steps of 100 images of Fashion-MNIST, and the small language "
    "models of `apollo-lm`, 100 steps of 64 windows. Learning rates are those of Table 1 throughout: only the costs "
    "mean something here, and no loss. Memory and ImageNet are left out."
)


def _departs(short: str, full: str) -> Mapping[Budget, str]:
    return {"smoke": SMOKE, "short": short, "full": full}


EXPERIMENTS: Final[dict[str, Experiment]] = {
    "apollo-table1": Experiment(
        source=f"{PAPER}, Tables 1 and 4, Fig. 1",
        title="Apollo against SGD, Adam, RAdam and AdaHessian on a ResNet",
        panels=table1,
        departs=_departs(STAND_IN.format(steps=STEPS, of="164 epochs (milestones) and 200 (cosine)") + SETTING, FULL),
    ),
    "apollo-fig2": Experiment(
        source=f"{PAPER}, Fig. 2",
        title="Learning rates that are off by a factor, weight decay over it",
        panels=robustness,
        departs=_departs(
            STAND_IN.format(steps=STEPS, of="and does not say under which schedule: here, the milestones") + SETTING,
            f"{FULL} The paper does not say under which schedule: here, the milestones.",
        ),
    ),
    "apollo-table5": Experiment(
        source=f"{PAPER}, Table 5",
        title="What a step costs, over SGD's",
        panels=cost,
        departs=_departs(
            STAND_IN.format(steps=100, of="on a GPU")
            + f"{BESIDE} The column cost is of CPU time in training steps, on one thread.",
            f"The paper's CIFAR-10 and ResNet-110, one epoch. {BESIDE}",
        ),
    ),
    "apollo-fig5": Experiment(
        source=f"{PAPER}, Fig. 5, App. E",
        title="SdLBFGS and Apollo on a toy CNN",
        panels=toy,
        departs=_departs(
            "A stand-in: Fashion-MNIST's first 10,000 images, 10 epochs; the paper has CIFAR-10 and 50 epochs. The "
            "CNN, the batches of 64, the decay by 0.95 after every epoch and the grid of learning rates are the "
            "paper's. The released code is what the paper compares with; SdLBFGS is the algorithm as published, of two "
            "gradients a step. The learning rate is the best by training loss. Warm-up is from 0 instead of 0.01.",
            "The paper's setting, and SdLBFGS as published (two gradients a step) beside the released code that the "
            "paper compares with. Warm-up is from 0 instead of 0.01.",
        ),
    ),
}
