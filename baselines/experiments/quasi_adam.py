"""The experiments of the Quasi-Adam paper (§VI.D): Quasi-Adam against Adam, at the paper's learning rates."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from baselines.config import Config
from baselines.experiments.apo import SMOKE, task
from baselines.experiments.base import Budget, Curve, Experiment, Panels

PAPER: Final = "Quasi-Adam, §VI.D"
OPTIMIZERS: Final = {
    "adam": "Adam",
    "adam-eps-inside": "Adam, ε inside",
    "quasi-adam": "Quasi-Adam",
    "quasi-adam-switch": "Quasi-Adam, switch",
}
RECONSTRUCTION: Final = {"loss": "loss of the batches", "test_loss": "loss on the test set"}
EPOCHS: Final[Mapping[Budget, int]] = {"smoke": 1, "short": 6, "full": 40}


def panels(model: str, lr: float, sizes: tuple[int, ...], full: str) -> Callable[[Budget], Panels]:
    """The panels of an experiment: one a batch size."""

    def make(budget: Budget) -> Panels:
        made: Panels = {}
        for size in sizes:
            steps = EPOCHS[budget] * -(-60_000 // size)
            own: dict[str, Any] = {"data": full if budget == "full" else "fashion-mnist", "model": model}
            fields = task(budget, **own, batch_size=size, steps=steps)
            if budget == "smoke":  # the images of digits are too small for these models
                fields |= {"model": "cnn"}
            made[f"batch {size}"] = [
                Curve(
                    label,
                    Config(optimizer=optimizer, method="fixed", lr=lr, **fields),
                    against=None if optimizer == "adam" else "Adam",
                    seeds=1 if budget == "smoke" else 3,
                )
                for optimizer, label in OPTIMIZERS.items()
            ]
        return made

    return make


def departs(what: str, stand_in: str) -> Mapping[Budget, str]:
    """What is different at each budget, of a task."""
    note = (
        "The learning rate is the paper's for all. Adam is `torch.optim.Adam`; with ε inside the root it is Adam as "
        "the paper writes it, from which Quasi-Adam differs in the second direction only; the switch is what the "
        "authors' released code does."
    )
    return {
        "smoke": SMOKE,
        "short": f"{what}, {EPOCHS['short']} epochs{stand_in}. {note}",
        "full": f"{what}, {EPOCHS['full']} epochs (the paper does not say how many). {note}",
    }


CLASSIFIER: Final = "A LeNet (the paper gives no widths)"
AUTOENCODER: Final = "A convolutional autoencoder of 87,125 parameters, squared error"
INSTEAD: Final = ", Fashion-MNIST in the place of MNIST"
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "quasi-adam-exp1": Experiment(
        f"{PAPER}, Experiment I (Fig. 1)",
        "Quasi-Adam: classification of MNIST",
        panels("lenet", 1e-2, (256, 512), "mnist"),
        departs(CLASSIFIER, f"{INSTEAD}, so the runs are those of Experiment II"),
    ),
    "quasi-adam-exp2": Experiment(
        f"{PAPER}, Experiment II (Fig. 2)",
        "Quasi-Adam: classification of Fashion-MNIST",
        panels("lenet", 1e-2, (256, 512), "fashion-mnist"),
        departs(CLASSIFIER, ""),
    ),
    "quasi-adam-exp4": Experiment(
        f"{PAPER}, Experiment IV (Fig. 4)",
        "Quasi-Adam: reconstruction of MNIST",
        panels("autoencoder", 1e-2, (256,), "mnist"),
        departs(AUTOENCODER, INSTEAD),
        rows=RECONSTRUCTION,
    ),
    "quasi-adam-exp5": Experiment(
        f"{PAPER}, Experiment V (Fig. 5)",
        "Quasi-Adam: reconstruction of Fashion-MNIST",
        panels("autoencoder", 1e-3, (256,), "fashion-mnist"),
        departs(AUTOENCODER, ""),
        rows=RECONSTRUCTION,
    ),
}
