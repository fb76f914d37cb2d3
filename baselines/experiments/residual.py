"""The experiments of Amortized Proximal Optimization on residual networks (§5.2.2-5.3, App. G)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import PAPER, lambdas, task
from baselines.experiments.base import Budget, Curve, Experiment, Panels, seeds_of

FIVE: Final = {"decay_factor": 0.2, "decay_at": (0.3, 0.6, 0.9)}  # of 200 epochs: 60, 120, 180
GRID: Final = (0.1, 0.01, 0.001)  # of fixed learning rates
DECAY: Final = 5e-4
STAND_IN: Final[dict[str, Any]] = {"data": "fashion-mnist", "examples": 10_000, "model": "resnet8", "steps": 500}


def fields(budget: Budget, steps: int = 500, **of_full: Any) -> dict[str, Any]:
    """The fields of a task: those of the paper at the budget full, those of the stand-in else."""
    if budget == "full":
        return {"batch_size": 128, "augment": True, "log_every": 100, **of_full}
    own = task(budget, **STAND_IN | {"steps": steps, "batch_size": 128, "augment": True})
    return own if budget == "smoke" else own | {"eval_every": steps // 4}


def own_lambda(budget: Budget, optimizer: str, of_paper: float) -> tuple[Mapping[str, Any], ...]:
    """The paper's λ for its task; on the stand-in, its grid."""
    return lambdas(optimizer) if budget == "short" else ({"fsd": of_paper},)


def curves(
    budget: Budget,
    task: Mapping[str, Any],
    optimizer: str,
    fixed: Sequence[float],
    peak: float,
    decay: Mapping[str, Any],
    start: float,
    fsd: float,
) -> list[Curve]:
    """An optimizer with fixed learning rates, the paper's schedule by hand, and APO.

    Args:
        budget: Of the experiment.
        task: Fields of the task.
        optimizer: Which.
        fixed: Learning rates.
        peak: Where the schedule starts.
        decay: Its factor and its places.
        start: The initial learning rate of APO.
        fsd: The paper's λ.
    """
    own: dict[str, Any] = {"optimizer": optimizer, **task}
    by_hand: dict[str, Any] = {"against": "APO", "seeds": seeds_of(budget)}
    tuned = Config(method="apo", meta="paper", lr=start, **own)
    return [
        *(Curve(f"fixed, {lr:g}", Config(method="fixed", lr=lr, **own), **by_hand) for lr in fixed),
        Curve("schedule by hand", Config(method="step", lr=peak, **own, **decay), **by_hand),
        Curve("APO", tuned, options=own_lambda(budget, optimizer, fsd), seeds=seeds_of(budget)),
    ]


def sgd_and_momentum(data: str, of_sgd: Sequence[float], of_momentum: Sequence[float]) -> Callable[[Budget], Panels]:
    """Fig. 2c and 4: SGD without and with Nesterov momentum, with fixed learning rates of both."""

    def panels(budget: Budget) -> Panels:
        of_task = fields(budget, data=data, model="resnet34", epochs=200)
        return {
            "SGD": curves(budget, of_task, "sgd", of_sgd, 0.1, FIVE, 0.1, 1e-3),
            "SGDm": curves(budget, of_task, "sgdm", of_momentum, 0.1, FIVE, 0.1, 0.1),
        }

    return panels


def one(
    optimizer: str,
    fixed: Sequence[float],
    decay: Mapping[str, Any],
    fsd: float,
    **of_full: Any,
) -> Callable[[Budget], Panels]:
    """One optimizer of the Adam family from a learning rate of 1e-3."""

    def panels(budget: Budget) -> Panels:
        of_task = fields(budget, **of_full)
        return {of_full["model"]: curves(budget, of_task, optimizer, fixed, 1e-3, decay, 1e-3, fsd)}

    return panels


def kfac(budget: Budget) -> Panels:
    """Fig. 3: the learning rate fixed, by hand, tuned, and tuned together with the damping."""
    of_task = fields(budget, 200, data="cifar10", model="resnet34", epochs=100)
    found = curves(budget, of_task, "kfac", (1e-3,), 1e-3, {"decay_factor": 0.1, "decay_at": (0.4, 0.8)}, 1e-3, 1e-2)
    both = Config(optimizer="kfac", method="apo", meta="paper", tune=("lr", "damping"), **of_task)
    options = own_lambda(budget, "kfac", 1e-2)
    label = "APO, learning rate and damping"
    return {"K-FAC": [*found, Curve(label, both, options=options, against="APO", seeds=seeds_of(budget))]}


def without_decay(budget: Budget) -> Panels:
    """Fig. 6: SGD with weight decay against APO without."""
    of_task = fields(budget, data="cifar10", model="resnet34", epochs=200)
    found = curves(budget, of_task, "sgd", (0.1, 0.01), 0.1, FIVE, 0.1, 1e-3)
    decayed = curves(budget, {**of_task, "weight_decay": DECAY}, "sgd", (0.1, 0.01), 0.1, FIVE, 0.1, 1e-3)
    return {"SGD with weight decay, APO without": [*decayed[:-1], found[-1]]}


SMOKE: Final = "Smoke: digits and a ResNet-8, 4 steps, to see that everything runs; the numbers mean nothing."
SHORT: Final = (
    "A stand-in, on a CPU: Fashion-MNIST's first 10,000 images and a ResNet-8 of 78,000 parameters (three stages of "
    "one block, 16 channels), {steps} steps of 128 images ({epochs} epochs), with random crops and reflections; the "
    "paper has {paper}. Schedules have their steps at the paper's fractions of the run, and the learning rates are the "
    "paper's; λ is the best of its grid{grid}."
)
FULL: Final = (
    "The paper's setting: {paper}, batches of 128, random crops and reflections, λ = {fsd}. The padding of 4 pixels is "
    "ours, since the paper gives none."
)


def departs(paper: str, fsd: str, steps: int = 500, grid: str = "") -> dict[Budget, str]:
    """What is different at each budget, from the paper's setting."""
    short = SHORT.format(steps=steps, epochs=f"{128 * steps / 10_000:.1f}", paper=paper, grid=grid)
    return {"smoke": SMOKE, "short": short, "full": FULL.format(paper=paper, fsd=fsd)}


CIFAR10: Final = {"data": "cifar10", "model": "resnet34", "epochs": 200}
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "apo-fig2c": Experiment(
        source=f"{PAPER}, Fig. 2(c), §5.2.2",
        title="SGD on a ResNet: fixed learning rates, a schedule, APO",
        panels=sgd_and_momentum("cifar10", (0.1, 0.01), (0.01,)),
        departs=departs("CIFAR-10, a ResNet-34 and 200 epochs", "1e-3 for SGD and 0.1 with momentum"),
    ),
    "apo-fig2d": Experiment(
        source=f"{PAPER}, Fig. 2(d), §5.2.2",
        title="RMSprop on a ResNet: fixed learning rates, a schedule, APO",
        panels=one("rmsprop", (1e-3, 1e-4), FIVE, 1e-3, **CIFAR10),
        departs=departs("CIFAR-10, a ResNet-34 and 200 epochs", "1e-3"),
    ),
    "apo-fig3": Experiment(
        source=f"{PAPER}, Fig. 3, §5.2.2",
        title="K-FAC on a ResNet: the learning rate and the damping tuned",
        panels=kfac,
        departs=departs(
            "CIFAR-10, a ResNet-34 and 100 epochs", "1e-2", steps=200, grid=", for K-FAC ours: 1, 0.1, 1e-2"
        ),
    ),
    "apo-fig4": Experiment(
        source=f"{PAPER}, Fig. 4, §5.2.3",
        title="SGD on a ResNet and a hundred classes: fixed learning rates, a schedule, APO",
        panels=sgd_and_momentum("cifar100", GRID, GRID),
        departs=departs(
            "CIFAR-100, a ResNet-34 and 200 epochs",
            "1e-3 for SGD and 0.1 with momentum",
            grid=". The fixed learning rates are the paper's whole grid, and the task is that of apo-fig2c: there is "
            "no stand-in with a hundred classes",
        ),
    ),
    "apo-fig5": Experiment(
        source=f"{PAPER}, Fig. 5, §5.2.4",
        title="RMSprop on a ResNet and house numbers: a fixed learning rate, a schedule, APO",
        panels=one(
            "rmsprop",
            (1e-3, 1e-4),
            {"decay_factor": 0.1, "decay_at": (0.5, 0.75)},
            1e-3,
            data="svhn",
            model="resnet18",
            epochs=160,
        ),
        departs=departs("SVHN, a ResNet-18 and 160 epochs", "1e-3 (the paper does not give it here)"),
    ),
    "apo-fig6": Experiment(
        source=f"{PAPER}, Fig. 6, §5.3",
        title="Weight decay under batch normalisation: SGD with it, APO without",
        panels=without_decay,
        departs=departs("CIFAR-10, a ResNet-34, 200 epochs and a weight decay of 5e-4", "1e-3"),
    ),
    "apo-fig14": Experiment(
        source=f"{PAPER}, Fig. 14, App. G",
        title="Adam on a ResNet: a fixed learning rate, a schedule, APO",
        panels=one("adam", (1e-3,), FIVE, 0.1, **CIFAR10),
        departs=departs("CIFAR-10, a ResNet-34 and 200 epochs", "0.1 (the paper advises 1e-2 to 1)"),
    ),
}
